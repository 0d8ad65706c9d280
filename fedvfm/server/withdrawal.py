"""``fedvfm server withdraw``: a site withdraws, and what its updates are part of.

What stays: the journal, the audit log and scores, which hold no update. An update cannot be taken out of an adapter, so
every adapter since the first round that the site had a part in has a part of it, and so has what was made of them. The
signed withdrawal (``withdrawals/SITE.json``) lists rounds, files, evidence, and the sites that were sent such adapters.
:mod:`fedvfm.server.rerun` trains without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.protocol import protocol
from fedvfm.report import quantity
from fedvfm.runtime import processes
from fedvfm.server import state_folder, surveys
from fedvfm.server.coordinator import orders, status_file
from fedvfm.server.rounds import dp_aggregation, secure_round, update_store
from fedvfm.server.rounds import journal as journals
from fedvfm.state import checkpoint
from fedvfm.storage import hash_chain, storage
from fedvfm.tracking import follower
from fedvfm.trust import certificates, invites, keys, locked_recipe, signed_documents
from fedvfm.trust import roster as rosters

FOLDER = "withdrawals"
KIND, EVIDENCE = "withdraw", "evidence"
_RECORDS = ("journal.jsonl", "evaluation.json", "experiment.json")
"""Of a recipe's folder: what holds no number of an adapter. That noise was drawn is a record too."""

_Rounds = Annotated[tuple[int, ...], Field(strict=False)]
_Names = Annotated[tuple[schema.SiteName, ...], Field(strict=False)]


class File(schema.Strict):
    """A file that was made of the site's updates: its place in the state folder, and its sha256."""

    path: str
    sha256: schema.Sha256


class Touched(schema.Strict):
    """A recipe whose adapters the site's updates are part of.

    Attributes:
        first: the first round whose adapter is so; 0 where the recipe goes on from such an adapter.
        last: the last round that is done.
        rounds: those that its own updates joined.
        files: what the state folder holds that was made of them.
        sent_to: the sites that were sent such an adapter.
    """

    recipe: schema.Sha256
    first: int
    last: int
    rounds: _Rounds
    files: Annotated[tuple[File, ...], Field(strict=False)]
    sent_to: _Names


class Withdrawal(signed_documents.Document):
    """The tombstone of a site.

    Attributes:
        evidence: sha256 of each ``evidence.json`` that was written of these recipes; where they lie is not noted.
    """

    SIGNATURES: ClassVar[tuple[str, ...]] = ("signature",)

    format: Literal["fedvfm-withdrawal-1"] = "fedvfm-withdrawal-1"
    federation: invites.FederationName
    site: schema.SiteName
    public_key: signed_documents.PublicKey
    withdrew: signed_documents.Time
    created: signed_documents.Time
    touched: Annotated[tuple[Touched, ...], Field(strict=False)]
    evidence: Annotated[tuple[schema.Sha256, ...], Field(strict=False)]
    certificate: invites.Pem
    signature: signed_documents.Signature


def path_of(where: state_folder.State, site: str) -> Path:
    """The file of a site's withdrawal."""
    return where.folder / FOLDER / f"{site}.json"


def read(where: state_folder.State, site: str) -> Withdrawal:
    """A site's withdrawal, its signature checked.

    Raises:
        TrustError: if it is not there, or was changed.
    """
    path = path_of(where, site)
    document = signed_documents.read(path, Withdrawal, "withdrawal")
    authority = certificates.read_pem(where.authority.read_text(), "authority")
    own = certificates.issued_key(certificates.read_pem(document.certificate, str(path)), authority, str(path))
    if not keys.verified(own, document.signature, document.signed_bytes()):
        raise errors.TrustError(f"{path}: was changed after this federation's server signed it")
    return document


def withdraw(where: state_folder.State, site: str, *, pause: bool = True) -> Withdrawal:
    """Let a site withdraw: off the roster at once, its update of the round in hand out, and the tombstone written.

    Done again it writes the tombstone anew, of all that is known then.

    Args:
        where: the state folder.
        site: its name.
        pause: whether rounds that would go on from its updates are paused.

    Raises:
        TrustError: if the site never took part.
        CheckpointError: if a record was edited.
    """
    now, before = signed_documents.now(), where.sites().get(site)
    entry = where.roster.withdraw(site, now)
    status = before.status if before is not None else ""
    # Where an earlier call was killed before the tombstone, all that was to be done then is done now.
    killed = status == rosters.WITHDRAWN and not path_of(where, site).exists()
    in_hand = _in_hand(where, site, approved=killed or status == rosters.APPROVED)
    if killed or status != rosters.WITHDRAWN:
        where.audit.record("steered", kind=KIND, site=site, key=entry.key_fingerprint)
    where.invite_path(site).unlink(missing_ok=True)
    if not _runs(where):
        for folder in (where.folder / "runs").glob("*/received"):
            update_store.Received(folder).remove(site)
            secure_round.remove(folder.parent, site)
    document = _signed(where, entry, trace(where, site, in_hand))
    path = path_of(where, site)
    storage.make_private(path.parent)
    signed_documents.write(path, document)
    digest = hashlib.sha256(document.signed_bytes()).hexdigest()
    where.audit.record("decided", kind="withdrawal", verdict="signed", peer=site, digest=digest)
    if pause and _goes_on(where, document):
        orders.pause(where)
    return document


def _signed(where: state_folder.State, entry: rosters.Entry, touched: Sequence[Touched]) -> Withdrawal:
    recipes = {row.recipe for row in touched}
    noted = [
        str(line["digest"])
        for line in where.audit.scan()
        if line["event"] == "decided" and line["kind"] == EVIDENCE and line.get("recipe") in recipes
    ]
    draft = Withdrawal(
        federation=where.about.federation,
        site=entry.site,
        public_key=entry.public_key,
        withdrew=entry.since,
        created=signed_documents.stamp(signed_documents.now()),
        touched=tuple(touched),
        evidence=tuple(dict.fromkeys(noted)),
        certificate=where.certificate.read_text(),
        signature="A" * 40,
    )
    return draft.model_copy(update={"signature": keys.sign(keys.read_private(where.key), draft.signed_bytes())})


def _runs(where: state_folder.State) -> bool:
    return bool(processes.running(processes.pid_path(where.folder / status_file.RUN, "coordinate")))


def _in_hand(where: state_folder.State, site: str, *, approved: bool) -> int:
    """The round that may hold an update of a site that was approved until now; 0 where none is in hand."""
    recipe = where.about.recipe
    if where.finished(recipe):
        return 0
    lines = rounds_of(where, recipe)
    number = int(lines[-1]["round"]) + 1 if lines else where.lock().recipe.first_round
    if not _runs(where):  # a sum that is settled is opened with the site; all else of it goes
        return number * (secure_round.settled_with(where.run_path(recipe), site) == number)
    if not approved and path_of(where, site).exists():  # asked again, and that round may be in hand still
        return number * any(row.recipe == recipe and row.first == number for row in read(where, site).touched)
    return number * approved


def _goes_on(where: state_folder.State, document: Withdrawal) -> bool:
    """Whether rounds go on from an adapter that has a part of the site."""
    recipe = where.about.recipe
    return not where.finished(recipe) and any(row.recipe == recipe for row in document.touched)


# -- what its updates are part of --------------------------------------------------------------------------------------


def trace(where: state_folder.State, site: str, in_hand: int = 0) -> list[Touched]:
    """Each recipe whose adapters a site's updates are part of, the earlier ones first.

    Args:
        where: the state folder.
        site: its name.
        in_hand: the round of the present recipe that may hold an update of it; 0 for none.

    Raises:
        CheckpointError: if a journal was edited.
    """
    lines = {recipe: rounds_of(where, recipe) for recipe in _recipes(where)}
    firsts = _firsts(where, lines, site, in_hand)
    sent = _sent(where, firsts)
    rows = []
    for recipe, first in firsts.items():
        own = tuple(int(line["round"]) for line in lines[recipe] if site in line["examples"])
        last = int(lines[recipe][-1]["round"]) if lines[recipe] else 0
        files = tuple(_files(where, recipe, first))
        to = tuple(sorted(sent.get(recipe, set()) - {site}))
        rows.append(Touched(recipe=recipe, first=first, last=last, rounds=own, files=files, sent_to=to))
    return rows


def _recipes(where: state_folder.State) -> list[str]:
    """Kept recipes, in the order in which they were kept."""
    paths = (where.folder / "recipes").glob("*.json")
    return [path.stem for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name))]


def rounds_of(where: state_folder.State, recipe: str) -> list[dict[str, Any]]:
    """The journal of a recipe."""
    return hash_chain.read(where.run_path(recipe) / "journal.jsonl")


def _firsts(
    where: state_folder.State, lines: Mapping[str, Sequence[Mapping[str, Any]]], site: str, in_hand: int
) -> dict[str, int]:
    """Recipe -> the first round whose adapter has a part of the site, 0 for the initial one; others are left out."""
    firsts: dict[str, int] = {}
    touched: set[str] = set()
    for _ in lines:  # as many passes as a chain of recipes may be long
        known = len(firsts)
        for recipe, rows in lines.items():
            first = journals.first_part(rows, site) or (in_hand if recipe == where.about.recipe else 0)
            if locked(where, recipe).recipe.start in touched:
                firsts[recipe] = 0
            elif first:
                firsts[recipe] = first
            if recipe in firsts:
                touched |= {str(row["fingerprint"]) for row in rows if int(row["round"]) >= firsts[recipe]}
        if len(firsts) == known:
            break
    return {recipe: firsts[recipe] for recipe in lines if recipe in firsts}


def locked(where: state_folder.State, recipe: str) -> locked_recipe.LockedRecipe:
    """A kept recipe, without its initial adapter."""
    return signed_documents.read(where.recipe_path(recipe), locked_recipe.LockedRecipe, "locked recipe")


def _sent(where: state_folder.State, firsts: Mapping[str, int]) -> dict[str, set[str]]:
    """Recipe -> sites that were sent an adapter of its touched rounds, as the audit log says."""
    holders: dict[str, set[str]] = {}
    for line in where.audit.scan():
        recipe = str(line.get("recipe"))
        if line["event"] != "sent" or "peer" not in line or recipe not in firsts or "round" not in line:
            continue
        carried = int(line["round"]) - (line["kind"] != protocol.WORDS[protocol.EVALUATE])
        if carried >= firsts[recipe]:
            holders.setdefault(recipe, set()).add(str(line["peer"]))
    return holders


def _made_of(where: state_folder.State, recipe: str, first: int) -> Iterator[Path]:
    """Files that hold, or were made of, an adapter of round ``first`` or later."""
    folder = where.run_path(recipe)
    if first == 0:
        yield where.recipe_path(recipe).with_suffix(".safetensors")
    for path in sorted(folder.rglob("*")):
        record = (
            path.name in _RECORDS
            or path.suffix in (".lock", dp_aggregation.DRAWN, update_store.ASKED)
            or _of_tracker(folder, path)
        )
        early = path.stem.startswith("round-") and checkpoint.round_of(path) < first
        if path.is_file() and not record and not early:
            yield path


def _of_tracker(folder: Path, path: Path) -> bool:
    """Whether it is a tracker's: what it took of the journal, or a copy of that; without it all would be taken anew."""
    return path.name.startswith(follower.PREFIX) or path.relative_to(folder).parts[0] == "wandb"


def _files(where: state_folder.State, recipe: str, first: int) -> Iterator[File]:
    for path in _made_of(where, recipe, first):
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            yield File(path=str(path.relative_to(where.folder)), sha256=digest)


# -- what can be removed -----------------------------------------------------------------------------------------------


def purge(where: state_folder.State, document: Withdrawal) -> tuple[int, int]:
    """Remove the files that were made of the site's updates, and its answers to surveys; records stay.

    Returns: number and bytes of what went.

    Raises:
        ConfigError: while the present recipe goes on from them.
        StorageError: if the disk refuses.
    """
    recipe, rows = where.about.recipe, trace(where, document.site)
    if any(row.recipe == recipe for row in rows):
        fault = f"recipe {recipe[:12]}, the present one, has a part of '{document.site}'. Run it with --rerun"
        raise errors.ConfigError("server withdraw --purge", [fault])
    count = size = 0
    for row in rows:
        for path in _made_of(where, row.recipe, row.first):
            if path.is_file():
                size, count = size + path.stat().st_size, count + 1
                with storage.guard(path):
                    path.unlink()
    for path in surveys.answer_paths(where, document.site):
        size, count = size + path.stat().st_size, count + 1
        with storage.guard(path):
            path.unlink()
    where.audit.record("purged", kind="withdrawal", numbers=count, bytes=size)
    return count, size


# -- words -------------------------------------------------------------------------------------------------------------


def lines(document: Withdrawal) -> list[str]:
    """For a terminal: what its updates are part of."""
    said = [f"site {document.site} withdrew at {document.withdrew}; its key and its name are let in no more"]
    if not document.touched:
        return [*said, "no adapter has a part of its updates"]
    for row in document.touched:
        own = f"its updates joined {quantity.of(len(row.rounds), 'round')}" if row.rounds else "it goes on from them"
        since = f"every adapter from round {row.first} to {row.last}" if row.first else "every adapter"
        said.append(f"recipe {row.recipe[:12]}: {own}; {since} has a part of them")
        said += [f"  sent to: {', '.join(row.sent_to)}"] if row.sent_to else []
        said += [f"  {file.path}" for file in row.files]
    said += [f"evidence was written of it: sha256 {digest}" for digest in document.evidence]
    return [*said, "what was exported or copied elsewhere is not known here: remove it by hand"]
