"""The server's state folder, and who may take part: init, invite, approve, revoke.

The folder is its owner's alone (0700, files 0600) and never overwritten:

    federation.json                 name, address, names, recipe   (written last: then the folder is whole)
    authority.pem authority.key     signs the server's certificate and the invites
    server.pem server.key           what the TLS port shows
    recipes/<hash>.json .safetensors  locked recipes and their initial adapters
    surveys/<hash>/                 what sites were asked before training: survey, answers, and who has not answered why
    steering.json                   what the coordinator ordered: pause, finish, extend, the recipe that follows
    runs/<hash>/                    journal, checkpoints and evaluation of each recipe
    roster.jsonl audit.jsonl        hash-chained
    roster-document.json            who may be in a sum of secure aggregation; signed
    audit-sealed/                   earlier segments of the audit log, where it is long
    invites/<site>.invite.json      to hand over; removed when the site is approved
    study.json                      what invites say of the study
    rekeyed/                        what sites sent for another key; to give again after a backup of before
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.config import schema
from fedvfm.state import checkpoint
from fedvfm.storage import storage
from fedvfm.trust import (
    certificates,
    invites,
    keys,
    locked_recipe,
    rekeying,
    requests,
    roster_document,
    signed_documents,
    tokens,
)
from fedvfm.trust import roster as rosters
from fedvfm.trust import study as studies

ABOUT = "federation.json"
MAX_SITES = 1000
RENEWED_DAYS = 60
"""Days before its end from which a certificate is renewed, or its people are warned."""


class About(schema.Strict):
    """What ``federation.json`` says."""

    format: Literal["fedvfm-server-1"] = "fedvfm-server-1"
    federation: invites.FederationName
    address: certificates.Address
    names: Annotated[tuple[str, ...], Field(strict=False)]
    recipe: schema.Sha256
    created: signed_documents.Time


@dataclass(frozen=True)
class State:
    """An opened state folder."""

    folder: Path
    about: About

    @property
    def authority(self) -> Path:
        """The authority's certificate: what sites trust."""
        return self.folder / "authority.pem"

    @property
    def authority_key(self) -> Path:
        """Its private key: only invites and new server certificates need it."""
        return self.folder / "authority.key"

    @property
    def certificate(self) -> Path:
        """The server's certificate."""
        return self.folder / "server.pem"

    @property
    def key(self) -> Path:
        """The server's private key."""
        return self.folder / "server.key"

    @property
    def roster_path(self) -> Path:
        """The roster's file."""
        return self.folder / "roster.jsonl"

    @property
    def roster(self) -> rosters.Roster:
        """The roster, to change it."""
        return rosters.Roster(self.roster_path, self.about.federation)

    @property
    def audit_path(self) -> Path:
        """The audit log's file."""
        return self.folder / "audit.jsonl"

    @property
    def audit(self) -> audit.Audit:
        """The audit log, to add to."""
        return audit.Audit(self.audit_path, self.about.federation, "server")

    def sites(self) -> dict[str, rosters.Entry]:
        """Site name -> roster entry."""
        return rosters.read(self.roster_path)

    @property
    def roster_document_path(self) -> Path:
        """The roster document of secure aggregation."""
        return self.folder / "roster-document.json"

    def roster_document(self) -> roster_document.RosterDocument | None:
        """Who may be in a sum of secure aggregation; None before it was published.

        Raises:
            TrustError: if the file was changed.
        """
        path = self.roster_document_path
        if not path.exists():
            return None
        return signed_documents.read(path, roster_document.RosterDocument, "roster document")

    def study(self) -> studies.Study | None:
        """What invites say of the study; None where nothing was written.

        Raises:
            TrustError: if the file is not of its form.
        """
        path = self.folder / studies.FILE
        return signed_documents.read(path, studies.Study, "study") if path.exists() else None

    def recipe_path(self, recipe: str) -> Path:
        """A locked recipe's file; the initial adapter lies beside it."""
        return self.folder / "recipes" / f"{recipe}.json"

    def run_path(self, recipe: str) -> Path:
        """The folder of a recipe's rounds."""
        return self.folder / "runs" / recipe

    def finished(self, recipe: str) -> bool:
        """Whether a recipe's federation came to its end."""
        return (self.run_path(recipe) / "evaluation.json").is_file()

    @property
    def begun(self) -> bool:
        """Whether rounds of any recipe were begun."""
        return any((self.folder / "runs").glob("*/journal.jsonl"))

    def invited(self) -> dict[str, bool]:
        """Site that was invited and not approved yet -> whether its invite is still good."""
        found = {name: entry.expires for name, entry in self.sites().items() if entry.status == rosters.INVITED}
        return {name: signed_documents.moment(expires) > signed_documents.now() for name, expires in found.items()}

    def invite_path(self, site: str) -> Path:
        """The file to hand to a site."""
        return self.folder / "invites" / f"{site}.invite.json"

    def lock(self) -> locked_recipe.LockedRecipe:
        """The recipe that runs."""
        return signed_documents.read(self.recipe_path(self.about.recipe), locked_recipe.LockedRecipe, "locked recipe")

    def locked(self) -> locked_recipe.LockedRecipe:
        """The recipe that runs, with its initial adapter: what the round loop takes.

        Raises:
            CheckpointError: if the adapter is damaged or another's.
        """
        path = self.recipe_path(self.about.recipe).with_suffix(".safetensors")
        return self.lock().with_adapter(checkpoint.read(path)[0], path)

    def fingerprint(self) -> str:
        """The authority's, to be told to sites by another channel."""
        return certificates.fingerprint(certificates.read_pem(self.authority.read_text(), str(self.authority)))


@dataclass(frozen=True)
class Plan:
    """What ``init`` is asked for.

    Attributes:
        address: ``host:port`` that sites connect to.
        names: further host names and addresses of the server's certificate.
        sites: whom to invite.
        days: how long the invites are good.
        study: what they say of the study; every later invite too.
    """

    federation: str
    address: str
    names: tuple[str, ...]
    sites: tuple[str, ...]
    days: int = invites.VALID_DAYS
    study: studies.Study | None = None

    def check(self) -> None:
        """Check all of it.

        Raises:
            ConfigError: with all faults at once.
        """
        faults = _address_faults(self.address)
        faults += [f"--san {fault}" for fault in certificates.names_faults(self.names)]
        faults += [f"--name '{signed_documents.shown(self.federation)}': {_NAMES}"] * (not _is_name(self.federation))
        faults += [f"--sites '{signed_documents.shown(one)}': {_NAMES}" for one in self.sites if not _is_name(one)]
        folded = [one.casefold() for one in self.sites]
        if len(set(folded)) < len(folded):
            faults.append("--sites: a name is given twice (upper and lower case count as one)")
        if not 1 <= len(self.sites) <= MAX_SITES:
            faults.append(f"--sites: {len(self.sites)} given; from 1 to {MAX_SITES}")
        if not 1 <= self.days <= 365:
            faults.append(f"--days {self.days}: from 1 to 365")
        if faults:
            raise errors.ConfigError("server init", faults)


def _address_faults(address: str) -> list[str]:
    try:
        certificates.split_address(address)
    except errors.ConfigError as error:
        return [f"--address {fault}" for fault in error.faults]
    return []


_NAMES = "letters, digits, '.', '_', '-' and inner spaces, 64 at most, beginning and ending in a letter or digit"


def _is_name(text: str) -> bool:
    return audit.FIELDS["site"](text) and not text.endswith((".", " "))


def init(folder: Path, plan: Plan, locked: locked_recipe.LockedRecipe) -> State:
    """Make the state folder: authority, server certificate, recipe, roster and one invite a site.

    Raises:
        ConfigError: if a name or address cannot be used.
        CheckpointError: without the initial adapter.
        OutputInUse: if the folder holds anything.
    """
    plan.check()
    locked_recipe.require_travels(locked)
    host, _ = certificates.split_address(plan.address)
    _ = locked.adapter  # before anything is made
    storage.private_folder(folder)
    now = signed_documents.now()
    names = tuple(dict.fromkeys([host, *plan.names]))
    about = About(
        federation=plan.federation,
        address=plan.address,
        names=names,
        recipe=locked.hash,
        created=signed_documents.stamp(now),
    )
    made = State(folder, about)
    authority_key, authority = certificates.make_authority(plan.federation, now)
    server_key, certificate = certificates.make_server(authority_key, authority, names, now)
    keys.write_private(made.authority_key, authority_key)
    storage.write_text(made.authority, certificates.to_pem(authority))
    keys.write_private(made.key, server_key, pem=True)
    storage.write_text(made.certificate, certificates.to_pem(certificate))
    keep_recipe(made, locked)
    if plan.study is not None:
        signed_documents.write(folder / studies.FILE, plan.study)
    for site in plan.sites:
        invite(made, site, plan.days)
    for inner in ("recipes", "invites"):
        (folder / inner).chmod(0o700)
    signed_documents.write(folder / ABOUT, about)
    return made


def keep_recipe(where: State, locked: locked_recipe.LockedRecipe) -> None:
    """Keep a locked recipe and its initial adapter; the adapter first, so that a recipe that is there can be run."""
    locked_recipe.require_travels(locked)
    path = where.recipe_path(locked.hash)
    checkpoint.write(path.with_suffix(".safetensors"), locked.adapter, {"round": "0", "recipe": locked.hash})
    signed_documents.write(path, locked)


def open_state(folder: Path) -> State:
    """A state folder made by :func:`init`.

    Raises:
        TrustError: if it is none, or ``init`` did not finish.
    """
    path = folder / ABOUT
    if not path.is_file():
        raise errors.TrustError(
            f"{folder}: is no server's state folder (no {ABOUT}). Name it with --state; if 'server init' was "
            "interrupted, remove the folder and run it again"
        )
    return State(folder, signed_documents.read(path, About, "federation file"))


def invite(where: State, site: str, days: int = invites.VALID_DAYS) -> Path:
    """Write a new invite for a site, new or revoked; an open one it has becomes void.

    Raises:
        ConfigError: if the name cannot be one.
        TrustError: if the site is approved.
    """
    if not _is_name(site) or not 1 <= days <= 365:
        raise errors.ConfigError(
            "server invite", [f"'{signed_documents.shown(site)}', {days} days: a name is {_NAMES}; days are 1 to 365"]
        )
    now = signed_documents.now()
    made = invites.make(
        keys.read_private(where.authority_key),
        federation=where.about.federation,
        address=where.about.address,
        site=site,
        authority=where.authority.read_text(),
        recipe=where.lock(),
        now=now,
        days=days,
        study=where.study(),
    )
    where.roster.invite(site, tokens.verifier(made.token, made.federation, site), made.expires, now)
    where.audit.record("invited", site=site, expires=made.expires)
    path = signed_documents.write(where.invite_path(site), made)
    path.parent.chmod(0o700)
    return path


def approve(where: State, path: Path, told: str | None = None) -> tuple[rosters.Entry, bool]:
    """Check a request file and put its key on the roster.

    Done again for a request whose key is there it is refused, but where a killed process left the line of the audit log
    out: then that is written.

    Args:
        where: the state folder.
        path: the request.
        told: the key's fingerprint as the site's people said it (see :func:`fedvfm.trust.keys.spoken`); None enrols
            whoever had the invite, and is noted so.

    Returns: the entry, and whether the site approved the recipe that runs now.

    Raises:
        TrustError: if anything about the request is not as it should be.
    """
    request = signed_documents.read(path, requests.Request, "request")
    try:
        _require_told(f"request of site '{request.site}'", request.public_key, told)
        left = [entry for entry in _not_enrolled(where) if entry.public_key == request.public_key]
        entry = left[0] if left else where.roster.approve(request, signed_documents.now())
    except errors.TrustError:
        where.audit.record("decided", kind="request", verdict="refused", peer=request.site)
        raise
    _enrolled(where, entry, checked=told is not None)
    return entry, entry.recipe == where.about.recipe


def _enrolled(where: State, entry: rosters.Entry, *, checked: bool) -> None:
    about = {} if checked else {"reason": "unchecked"}
    where.audit.record("enrolled", site=entry.site, key=entry.key_fingerprint, recipe=entry.recipe, **about)
    where.invite_path(entry.site).unlink(missing_ok=True)


def _not_enrolled(where: State) -> list[rosters.Entry]:
    """The sites on the roster whose key no line of the audit log names: a process was killed between the two."""
    noted = {str(line["key"]) for line in where.audit.scan() if line["event"] in audit.KEY_EVENTS}
    known = [entry for entry in where.sites().values() if entry.status in rosters.KNOWN]
    return [entry for entry in known if entry.key_fingerprint not in noted and not where.roster.rekeyed(entry.site)]


def note_enrolled(where: State) -> None:
    """Write the lines of the audit log that a killed :func:`approve` left out; whether a key was checked is lost then.

    Without its line a site that was enrolled anew would be held to the log of its old folder.
    """
    for entry in _not_enrolled(where):
        _enrolled(where, entry, checked=False)


def rekey(where: State, path: Path, told: str | None = None) -> rosters.Entry:
    """Check the file by which a site asks for a new key, and put that on the roster in place of the one it has.

    Done again it changes nothing, but writes the line of the audit log that a killed process left out.

    Args:
        where: the state folder.
        path: what ``client rekey`` wrote.
        told: as of :func:`approve`, of the new key.

    Raises:
        TrustError: if anything about the file is not as it should be.
    """
    asked = signed_documents.read(path, rekeying.Rekeying, "rekeying")
    try:
        _require_told(f"new key of site '{asked.site}'", asked.public_key, told)
        entry = where.roster.rekey(asked, signed_documents.now())
    except errors.TrustError:
        where.audit.record("decided", kind="rekeying", verdict="refused", peer=asked.site)
        raise
    for key, old in _not_noted(where, entry.site):
        about = {"reason": "unchecked"} if told is None and key == entry.key_fingerprint else {}
        where.audit.record("rekeyed", site=entry.site, key=key, base=old, **about)
    rekeying.keep(where.folder / "rekeyed" / f"{entry.site}-{entry.key_fingerprint[:16]}.json", asked)
    return entry


def _not_noted(where: State, site: str) -> list[tuple[str, str]]:
    """The keys that a site took, each with the one before, that the audit log does not have since the last it has."""
    noted = {str(line["key"]) for line in where.audit.scan() if line["event"] in audit.KEY_EVENTS}
    missing: list[tuple[str, str]] = []
    for key, old in where.roster.rekeyed(site):
        missing = [] if key in noted else [*missing, (key, old)]
    return missing


def _require_told(what: str, public_key: str, told: str | None) -> None:
    if told is not None and not keys.is_spoken(public_key, told):
        raise errors.TrustError(
            f"{what}: its key is not the one you were told. Whoever copies a file can send another. Ask the site's "
            "people again, by telephone: fedvfm client status shows it"
        )


def revoke(where: State, site: str) -> rosters.Entry:
    """Take a site off the roster; the others are not touched.

    Raises:
        TrustError: if it is not on the roster.
    """
    entry = where.roster.revoke(site, signed_documents.now())
    where.audit.record("revoked", site=site, **({"key": entry.key_fingerprint} if entry.public_key else {}))
    where.invite_path(site).unlink(missing_ok=True)
    return entry


def publish_roster(where: State) -> roster_document.RosterDocument:
    """Sign the document of the sites that are approved now; the one before counts no more, nor its approvals.

    Raises:
        TrustError: if fewer than three are approved, or the authority's key is not here.
    """
    approved = {name: entry.public_key for name, entry in where.sites().items() if entry.status == rosters.APPROVED}
    before = where.roster_document()
    if before is not None and dict(before.keys) == approved:
        return before
    document = roster_document.make(keys.read_private(where.authority_key), where.about.federation, approved)
    where.audit.record("decided", kind="roster", verdict="published", fingerprint=document.hash)
    signed_documents.write(where.roster_document_path, document)
    return document


def recertify(where: State, names: Sequence[str]) -> list[str]:
    """A new server key and certificate for the names it has and these; sites notice nothing.

    Returns: all names of the certificate.

    Raises:
        ConfigError: if a name cannot be in a certificate.
    """
    faults = [f"--san {fault}" for fault in certificates.names_faults(names)]
    if faults:
        raise errors.ConfigError("server certify", faults)
    every = list(dict.fromkeys([*where.about.names, *names]))
    authority = certificates.read_pem(where.authority.read_text(), str(where.authority))
    key, certificate = certificates.make_server(
        keys.read_private(where.authority_key), authority, every, signed_documents.now()
    )
    expires = signed_documents.stamp(certificate.not_valid_after_utc)
    where.audit.record("certified", key=keys.fingerprint(keys.public_text(key)), expires=expires)
    keys.write_private(where.key, key, pem=True)
    storage.write_text(where.certificate, certificates.to_pem(certificate))
    signed_documents.write(where.folder / ABOUT, where.about.model_copy(update={"names": tuple(every)}))
    return every


def certified_until(where: State) -> datetime.datetime:
    """When the server's certificate ends."""
    return certificates.read_pem(where.certificate.read_text(), str(where.certificate)).not_valid_after_utc


def renew(where: State) -> str:
    """Make a new server certificate where less than :data:`RENEWED_DAYS` are left; sites notice nothing.

    Returns: a note for people; empty where nothing is to be done.

    Raises:
        TrustError: if it has expired and the authority's key, which would sign a new one, is not here.
    """
    ends, now = certified_until(where), signed_documents.now()
    if ends - now >= datetime.timedelta(days=RENEWED_DAYS):
        return ""
    until = signed_documents.stamp(ends)
    if where.authority_key.exists():
        recertify(where, ())
        return f"the server's certificate ended at {until}: a new one is good until " + signed_documents.stamp(
            certified_until(where)
        )
    remedy = f"Bring {where.authority_key} here and run: fedvfm server certify"
    if now >= ends:
        raise errors.TrustError(f"{where.certificate}: expired at {until}; every site refuses it. {remedy}")
    return f"the server's certificate expires in {(ends - now).days} days, at {until}. {remedy}"


def summary(where: State) -> dict[str, Any]:
    """What ``server init`` and ``server roster`` print."""
    return {
        "state": str(where.folder),
        "federation": where.about.federation,
        "address": where.about.address,
        "names": list(where.about.names),
        "fingerprint": where.fingerprint(),
        "recipe": where.about.recipe,
        "sites": [entry.to_json() for entry in where.sites().values()],
    }
