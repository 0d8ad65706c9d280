"""A row of ``fedvfm doctor``: what was looked at, what is wrong with it, why that matters, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedvfm import errors

BLOCKER, WARNING, OK = "blocker", "warning", "ok"
SEVERITIES = (BLOCKER, WARNING, OK)

WHY = {
    "approval": "nothing is trained on a recipe that no person here approved",
    "authority": "sites trust this one certificate and no other; without its key nobody new can be invited",
    "batch": "where no job can be given to the scheduler, every message of the coordinator is refused",
    "backbone": "an adapter fits one backbone, byte for byte; the handshake refuses every other",
    "certificate": "sites that cannot verify the coordinator's certificate do not connect",
    "clock": "a SuperNode signs the time; 5 s ahead or 305 s behind the coordinator it is refused as a stranger",
    "data": "what is wrong with the data is wrong with every round that trains on it",
    "device": "a device that is not there stops the first round",
    "disk": "a round that cannot be written is trained again",
    "files": "whoever reads these files can act in this end's name, or sees what was trained",
    "health": "sites see of the coordinator what this request sees",
    "intercepted": "whoever opens the TLS sees and can change every update; a SuperNode refuses such a connection",
    "invites": "a site whose invite is void cannot join",
    "other-users": "every local user reaches loopback, where the SuperLink listens; only a token keeps them out",
    "policy": "the client refuses what its policy does not accept, before anything is computed",
    "port": "sites reach this port and no other; if another program holds it, the server does not start",
    "precision": "a processor that emulates bfloat16 is 4 to 20 times slower with it, so it computes in float32",
    "privacy": "a round of a mechanism is charged to the site's ledger before its update leaves, or not trained",
    "processes": "messages wait while a process is away",
    "proxy-settings": "programs that are told of a proxy send even 127.0.0.1 through it unless they are told not to",
    "quorum": "a round needs its quorum; the server waits until so many sites are there",
    "reach": "a site needs one way out: HTTPS to the coordinator's address",
    "split": "with another split into train, val and test, a recipe in mid-run trains on patients it was tested on",
    "standing": "the coordinator decides whom it asks; a site that is dropped or revoked waits for nothing",
    "state": "everything this end knows lies in its state folder",
    "windows": "under WSL the files, the clock and the time that programs live are Windows' in part",
    "versions": "the two ends understand each other in one version; another may build another adapter",
}
"""What is looked at -> why it matters."""


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        check: one of :data:`WHY`.
        severity: ``blocker`` (not ready), ``warning`` or ``ok``.
        problem: what was found; of an ``ok`` row what is well.
        remedy: what to do; empty where nothing is.
    """

    check: str
    severity: str
    problem: str
    remedy: str = ""

    @property
    def why(self) -> str:
        """Why it matters."""
        return WHY[self.check]

    def as_json(self) -> dict[str, str]:
        """For ``--json``."""
        return {**asdict(self), "why": self.why}


def blocker(check: str, problem: str, remedy: str) -> Row:
    """Something that must be mended first."""
    return Row(check, BLOCKER, problem, remedy)


def warning(check: str, problem: str, remedy: str) -> Row:
    """Something that should be known."""
    return Row(check, WARNING, problem, remedy)


def ok(check: str, state: str) -> Row:
    """Something that is well."""
    return Row(check, OK, state)


def caught(check: str, look: Callable[[], Iterable[Row]], remedy: str = "") -> list[Row]:
    """What ``look`` finds; an error of its own is a blocker, so that one fault hides no other."""
    try:
        return list(look())
    except errors.FedvfmError as error:
        return [blocker(check, str(error), remedy or "do what the message says, then run this again")]


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Blockers first, then warnings, then what is well; by name inside each."""
    return sorted(rows, key=lambda row: (SEVERITIES.index(row.severity), row.check))


def ready(rows: Sequence[Row]) -> bool:
    """Whether nothing must be mended first."""
    return all(row.severity != BLOCKER for row in rows)


def document(end: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The JSON document of one end."""
    return {"end": end, "ready": ready(rows), "rows": [row.as_json() for row in ranked(rows)]}


def lines(rows: Sequence[Row]) -> list[str]:
    """The same for a person."""
    texts = []
    for row in ranked(rows):
        if row.severity == OK:
            texts.append(f"ok       {row.check}: {row.problem}")
        else:
            texts += [f"{row.severity.upper():8} {row.check}: {row.problem}"]
            texts += [f"         why: {row.why}", f"         do:  {row.remedy}"]
    number = sum(row.severity == BLOCKER for row in rows)
    return [*texts, "ready" if not number else f"not ready: {number} blocker{'s' if number > 1 else ''}"]
