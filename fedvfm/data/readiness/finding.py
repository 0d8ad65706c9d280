"""A finding: problem, why it matters, remedy, severity. Samples are named by their number, never by file or patient."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedvfm.data.readiness import catalogue

SEVERITIES = ("blocker", "warning", "note")
SHOWN = 12
"""Sample numbers shown of a finding; all are in the list of affected files."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing a hospital should know before it joins.

    Attributes:
        code: a short stable name, one of :data:`catalogue.ENTRIES`.
        severity: "blocker" (not ready), "warning" or "note".
        problem: what was found, with numbers.
        why: what it does to training or results.
        remedy: what to do.
        count: how many samples (or files, patients, classes) it concerns.
        samples: their numbers from 1 in the source's order, where it concerns samples.
    """

    code: str
    severity: str
    problem: str
    why: str
    remedy: str
    count: int
    samples: tuple[int, ...] = ()

    @property
    def where(self) -> str:
        """The first sample numbers in words, or nothing."""
        if not self.samples:
            return ""
        more = f" and {len(self.samples) - SHOWN} more" if len(self.samples) > SHOWN else ""
        noun = "sample" if len(self.samples) == 1 else "samples"
        return f"{noun} {', '.join(map(str, self.samples[:SHOWN]))}{more}"

    def as_json(self) -> dict[str, Any]:
        """The finding with the keys of the JSON document."""
        return {
            "code": self.code,
            "severity": self.severity,
            "count": self.count,
            "samples": list(self.samples),
            "problem": self.problem,
            "why": self.why,
            "remedy": self.remedy,
        }


def make(
    code: str, problem: str, count: int = 1, samples: Sequence[int] = (), *, severity: str = "", remedy: str = ""
) -> Finding:
    """A finding of the catalogue; ``severity`` and ``remedy`` replace the catalogue's where the case is another."""
    entry = catalogue.ENTRIES[code]
    return Finding(
        code, severity or entry.severity, problem, entry.why, remedy or entry.remedy, count, tuple(sorted(set(samples)))
    )


def ranked(findings: Sequence[Finding]) -> list[Finding]:
    """Blockers first, then warnings, then notes; by code inside each, and every code once."""
    joined: dict[str, Finding] = {}
    for one in findings:
        joined[one.code] = _joined(joined[one.code], one) if one.code in joined else one
    return sorted(joined.values(), key=lambda one: (SEVERITIES.index(one.severity), one.code))


def _joined(one: Finding, other: Finding) -> Finding:
    """Two findings of one kind, as headers and pixels may tell it, as one."""
    return dataclasses.replace(
        one,
        problem=f"{one.problem}; {other.problem}",
        severity=min(one.severity, other.severity, key=SEVERITIES.index),
        count=one.count + other.count,
        samples=tuple(sorted({*one.samples, *other.samples})),
    )


def number(count: int, noun: str, plural: str = "") -> str:
    """``1 image``, ``2 images``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
