"""The site's state folder, and how a site joins: look at the invite, decide, make the key here, write a request.

The folder is its owner's alone (0700, files 0600) and never overwritten:

    site.json                    site, federation, address        (written last: the folder is whole)
    authority.pem                the federation's authority: what this site trusts
    site.key site.pub            the site's key pair, made here; the private half never leaves
    site.key.new rekeying.json   a new key that waits for the coordinator, and what asks for it
    rekeyed/                     what asked for keys that were taken; for a coordinator that goes back to a backup
    request.json                 to send back to the coordinator
    recipes/<hash>.json          recipes this site was asked to take part in
    study.json                   what the invite said of the study
    approvals.jsonl audit.jsonl  hash-chained
    audit-sealed/                earlier segments of the audit log, where it is long
    splits/                      what the split into train, val and test follows from, of each recipe that began here
    sent/                        the update that was sent last, of each recipe
    surveys/<hash>.json          surveys that arrived; beside them answers that left, and of which patients, as hashes
    survey-approvals.jsonl       which surveys a person here approved; hash-chained
    rosters/<hash>.json          roster documents that arrived: with whom this site's update may be summed
    secure/                      keys and shares of sessions of secure aggregation; secrets
    adapters/                    final adapters that came, and what was decided of each
    features/                    what the frozen blocks computed of images, while a recipe trains here
    run/                         pid files, logs and secrets of the processes
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.config import schema
from fedvfm.config import survey as survey_config
from fedvfm.storage import storage
from fedvfm.trust import (
    approvals,
    certificates,
    invites,
    keys,
    locked_recipe,
    requests,
    roster_document,
    signed_documents,
)
from fedvfm.trust import study as studies

ABOUT = "site.json"
REHEARSAL = "rehearsal-"
"""How the folder of a rehearsal begins; it is gone afterwards unless that was killed."""
Approvals: TypeAlias = approvals.Approvals
SHA256 = re.compile("[0-9a-f]{64}")
DEFAULT = Path("fedvfm-site")
"""Where the commands look for it that are not told."""
_COMMAND = re.compile(
    r"fedvfm client (?:(?:review|approve|withdraw) \w+|start SITE\.toml|status\b"
    r"|adapter(?! personal)(?: --(?:accept|decline) \w+)?)"
)
MAX_SEEN = 1000
"""Recipes that are kept; a coordinator that sends more fills no disk."""


class About(schema.Strict):
    """What ``site.json`` says."""

    format: Literal["fedvfm-site-1"] = "fedvfm-site-1"
    federation: invites.FederationName
    address: certificates.Address
    site: schema.SiteName
    fingerprint: str
    joined: signed_documents.Time


@dataclass(frozen=True)
class State:
    """An opened state folder."""

    folder: Path
    about: About

    @property
    def authority(self) -> Path:
        """The federation's authority: the only one trusted."""
        return self.folder / "authority.pem"

    @property
    def key(self) -> Path:
        """The site's private key, in the form a SuperNode reads."""
        return self.folder / "site.key"

    @property
    def public_key(self) -> Path:
        """Its public half."""
        return self.folder / "site.pub"

    @property
    def spoken_key(self) -> str:
        """The public key's fingerprint as people compare it."""
        return keys.spoken(self.public_key.read_text().strip())

    @property
    def request(self) -> Path:
        """The request to send to the coordinator."""
        return self.folder / "request.json"

    @property
    def sent(self) -> Path:
        """Where the updates lie that were sent last."""
        return self.folder / "sent"

    @property
    def features(self) -> Path:
        """Where files lie of what the frozen blocks computed of this site's images; as sensitive as these."""
        return self.folder / "features"

    @property
    def approvals(self) -> approvals.Approvals:
        """Which recipes a person here approved."""
        return approvals.Approvals(self.folder / "approvals.jsonl", self.about.site)

    @property
    def survey_approvals(self) -> Approvals:
        """Which surveys a person here approved."""
        return approvals.Approvals(self.folder / "survey-approvals.jsonl", self.about.site, "survey")

    @property
    def surveys(self) -> Path:
        """Where surveys lie that arrived, and the answers that left."""
        return self.folder / "surveys"

    def surveys_seen(self) -> list[str]:
        """Hashes of the surveys that arrived."""
        return sorted(path.stem for path in self.surveys.glob("*.json") if SHA256.fullmatch(path.stem))

    def find_survey(self, asked: str) -> survey_config.Survey | None:
        """A survey that arrived by its hash, or the first twelve letters or more of it; None where none is meant.

        Raises:
            TrustError: if the file was changed.
        """
        word = asked.lower()
        named = [known for known in self.surveys_seen() if len(word) >= 12 and known.startswith(word)]
        if len(named) != 1:
            return None
        path = self.surveys / f"{named[0]}.json"
        survey = signed_documents.read(path, survey_config.Survey, "survey")
        if survey.hash != named[0]:
            raise errors.TrustError(f"{path}: holds another survey than its name says")
        return survey

    def remember_survey(self, survey: survey_config.Survey) -> bool:
        """Keep a survey that arrived, so that a person can review it; whether it is new here.

        Raises:
            PolicyRefused: if too many were kept.
        """
        path = self.surveys / f"{survey.hash}.json"
        if path.exists():
            return False
        if len(self.surveys_seen()) >= MAX_SEEN:
            raise errors.PolicyRefused("policy-message", f"{MAX_SEEN} surveys were seen already")
        storage.make_private(self.surveys)
        storage.write_text(path, signed_documents.to_text(survey))
        return True

    @property
    def audit_path(self) -> Path:
        """The audit log's file."""
        return self.folder / "audit.jsonl"

    @property
    def audit(self) -> audit.Audit:
        """The audit log, to add to."""
        return audit.Audit(self.audit_path, self.about.site, "site")

    @property
    def secure(self) -> Path:
        """Where secrets of secure aggregation lie."""
        return self.folder / "secure"

    def roster_path(self, document: str) -> Path:
        """A roster document's file, by its hash."""
        return self.folder / "rosters" / f"{document}.json"

    def rosters(self) -> list[roster_document.RosterDocument]:
        """The roster documents that arrived, the newest last.

        Raises:
            TrustError: if a file was changed.
        """
        paths = sorted((self.folder / "rosters").glob("*.json"))
        documents = [signed_documents.read(path, roster_document.RosterDocument, "roster document") for path in paths]
        return sorted(documents, key=lambda document: (document.created, document.hash))

    def roster(self, document: str, *, former: bool = False) -> roster_document.RosterDocument:
        """A roster document that arrived, checked again.

        Args:
            document: its hash.
            former: whether it may list this site with a key that it had before; for a session that began under it.

        Raises:
            TrustError: if there is none of this hash, or it is not one for this site.
        """
        path = self.roster_path(document)
        if not re.fullmatch("[0-9a-f]{64}", document) or not path.is_file():
            raise errors.TrustError(
                f"roster document '{signed_documents.shown(document)[:64]}': none of this hash came here. A running "
                "client is sent it by the coordinator: fedvfm client review RECIPE shows those that came"
            )
        kept = signed_documents.read(path, roster_document.RosterDocument, "roster document")
        if kept.hash != document:
            raise errors.TrustError(f"{path}: holds another roster document than its name says")
        self._check_roster(kept, kept.keys.get(self.about.site, "") if former else None)
        return kept

    def remember_roster(self, document: roster_document.RosterDocument) -> bool:
        """Keep a roster document that arrived, so that a person can review it; whether it is new here.

        Raises:
            TrustError: if it is not one for this site.
            PolicyRefused: if too many were kept.
        """
        self._check_roster(document)
        path = self.roster_path(document.hash)
        if path.exists():
            return False
        if len(list(path.parent.glob("*.json"))) >= MAX_SEEN:
            raise errors.PolicyRefused("policy-message", f"{MAX_SEEN} roster documents were seen already")
        storage.make_private(path.parent)
        storage.write_text(path, signed_documents.to_text(document))
        self.audit.record("received", kind="roster", fingerprint=document.hash, bytes=path.stat().st_size)
        return True

    def _check_roster(self, document: roster_document.RosterDocument, own: str | None = None) -> None:
        authority = certificates.read_pem(self.authority.read_text(), str(self.authority))
        key = certificates.authority_key(authority, str(self.authority))
        own = self.public_key.read_text().strip() if own is None else own
        roster_document.check(document, key, self.about.federation, self.about.site, own)

    def study(self) -> studies.Study | None:
        """What the invite said of the study; None where it said nothing.

        Raises:
            TrustError: if the file is not of its form.
        """
        path = self.folder / studies.FILE
        return signed_documents.read(path, studies.Study, "study") if path.exists() else None

    def invited(self) -> str:
        """Hash of the recipe that the invite was for; empty where the request to join is not here any more."""
        if not self.request.exists():
            return ""
        return signed_documents.read(self.request, requests.Request, "request").recipe

    def recipe_path(self, recipe: str) -> Path:
        """A seen recipe's file."""
        return self.folder / "recipes" / f"{recipe}.json"

    def seen(self) -> list[str]:
        """Hashes of the recipes this site was asked to take part in."""
        return sorted(path.stem for path in (self.folder / "recipes").glob("*.json"))

    def find(self, asked: str) -> locked_recipe.LockedRecipe:
        """A seen recipe by its hash, or the first twelve letters or more of it.

        Raises:
            TrustError: if none or several are meant, or the file was changed.
        """
        word = asked.lower()
        named = [known for known in self.seen() if known == word or (len(word) >= 12 and known.startswith(word))]
        if len(named) != 1:
            known = ", ".join(self.seen()) or "none"
            raise errors.TrustError(
                f"recipe '{signed_documents.shown(asked)[:80]}': is not one this site "
                f"was asked to take part in: {known}"
            )
        locked = signed_documents.read(self.recipe_path(named[0]), locked_recipe.LockedRecipe, "locked recipe")
        if locked.hash != named[0]:
            raise errors.TrustError(f"{self.recipe_path(named[0])}: holds another recipe than its name says")
        return locked

    def remember(self, locked: locked_recipe.LockedRecipe) -> bool:
        """Keep a recipe that arrived, so that a person can review it; whether it is new here.

        Raises:
            PolicyRefused: if too many were kept.
        """
        path = self.recipe_path(locked.hash)
        if path.exists():
            return False
        if len(self.seen()) >= MAX_SEEN:
            raise errors.PolicyRefused(
                "policy-message", f"{MAX_SEEN} recipes were seen already; remove old ones from {path.parent}"
            )
        storage.write_text(path, signed_documents.to_text(locked))
        self.audit.record("received", kind="recipe", recipe=locked.hash, bytes=path.stat().st_size)
        return True


def named(text: str, folder: Path) -> str:
    """A sentence for this site's people whose commands say where the state folder is, unless they find it themselves.

    Args:
        text: with commands as ``fedvfm client approve 0123456789ab``.
        folder: the state folder.
    """
    if folder.absolute() == DEFAULT.absolute():
        return text
    return _COMMAND.sub(lambda command: f"{command[0]} --state {shlex.quote(str(folder.absolute()))}", text)


def open_state(folder: Path) -> State:
    """A state folder made by :func:`join`.

    Raises:
        TrustError: if it is none, or ``join`` did not finish.
    """
    path = folder / ABOUT
    if not path.is_file():
        raise errors.TrustError(
            f"{folder}: is no site's state folder (no {ABOUT}). Name it with --state; if 'client join' was "
            "interrupted, remove the folder and run it again with a new invite"
        )
    return State(folder, signed_documents.read(path, About, "site file"))


def read_invite(path: Path, told: str) -> invites.Invite:
    """An invite, checked against the fingerprint that came by another channel.

    Raises:
        TrustError: if anything about it is not as it should be.
    """
    found = signed_documents.read(path, invites.Invite, "invite")
    invites.check(found, told, signed_documents.now())
    return found


def free(folder: Path) -> None:
    """Check that a state folder can be made here, before a person is asked anything.

    Raises:
        OutputInUse: if it holds anything.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise errors.OutputInUse(
            f"{folder} is not empty and is left as it is: one state folder a federation. Choose another --state"
        )


def join(folder: Path, invite: invites.Invite, approved: str, person: str | None = None) -> State:
    """Make the site's key and state folder here, record the approval and write the request.

    Args:
        folder: must not exist or be empty.
        invite: as :func:`read_invite` checked it.
        approved: hash of the recipe that a person approved.
        person: who did; default is the login name.

    Raises:
        TrustError: if that is another recipe than the invite's.
        OutputInUse: if the folder holds anything.
    """
    if approved != invite.lock.hash:
        raise errors.TrustError(
            f"approved was {signed_documents.shown(approved)[:64]}, the invite's recipe is "
            f"{invite.lock.hash}: another recipe "
            "needs another approval"
        )
    free(folder)
    storage.private_folder(folder)
    now = signed_documents.now()
    authority = certificates.read_pem(invite.authority, "the invite's certificate")
    about = About(
        federation=invite.federation,
        address=invite.address,
        site=invite.site,
        fingerprint=certificates.fingerprint(authority),
        joined=signed_documents.stamp(now),
    )
    made, key = State(folder, about), keys.make()
    keys.write_private(made.key, key)
    storage.write_text(made.public_key, keys.public_text(key) + "\n")
    storage.write_text(made.authority, certificates.to_pem(authority))
    if invite.study is not None:
        signed_documents.write(folder / studies.FILE, invite.study)
    made.remember(invite.lock)
    made.recipe_path(invite.lock.hash).parent.chmod(0o700)
    approve(made, invite.lock, person)
    request = requests.make(invite, key, now)
    signed_documents.write(made.request, request)
    made.audit.record("sent", kind="request", recipe=request.recipe, bytes=made.request.stat().st_size)
    signed_documents.write(folder / ABOUT, about)
    return made


def approve(
    where: State, locked: locked_recipe.LockedRecipe, person: str | None = None, roster: str = ""
) -> dict[str, str]:
    """Record that a person here approved a recipe, and beside it the roster document of this hash.

    Raises:
        TrustError: if that is none that came here for this site, or has too few sites for the recipe; or if the recipe
            has no secure aggregation, so that there is nothing to sum with whom.
    """
    if roster and locked.recipe.secure_aggregation is None:
        raise errors.TrustError(
            f"recipe {locked.hash[:12]}: has no secure aggregation, so the coordinator sees this site's update whoever "
            "the others are. Leave --roster out"
        )
    if roster:
        sites = len(where.roster(roster).sites)
        if sites < locked.recipe.min_sites:
            raise errors.TrustError(
                f"roster document {roster[:12]}: lists {sites} sites, and recipe.min_sites = "
                f"{locked.recipe.min_sites}; no sum would ever be opened. Ask the coordinator for another one"
            )
    line = where.approvals.approve(locked.hash, person, roster)
    about = {"fingerprint": roster} if roster else {}
    where.audit.record("decided", kind="approval", recipe=locked.hash, verdict="approved", **about)
    return line


def withdraw(where: State, recipe: str, person: str | None = None) -> dict[str, str]:
    """Record that an approval no longer stands.

    Raises:
        TrustError: if none stands.
    """
    line = where.approvals.withdraw(recipe, person)
    where.audit.record("decided", kind="approval", recipe=recipe, verdict="withdrawn")
    return line


def approve_survey(where: State, survey: survey_config.Survey, person: str | None = None) -> dict[str, Any]:
    """Record that a person here approved a survey."""
    line = where.survey_approvals.approve(survey.hash, person)
    where.audit.record("decided", kind="survey-approval", fingerprint=survey.hash, verdict="approved")
    return line


def withdraw_survey(where: State, survey: survey_config.Survey, person: str | None = None) -> dict[str, Any]:
    """Record that the approval of a survey no longer stands.

    Raises:
        TrustError: if none stands.
    """
    line = where.survey_approvals.withdraw(survey.hash, person)
    where.audit.record("decided", kind="survey-approval", fingerprint=survey.hash, verdict="withdrawn")
    return line
