"""The licence of a backbone's weights, as recipes, records and policies state it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

PATTERN = r"^[A-Za-z0-9][A-Za-z0-9.+-]{0,99}$"
NO_DERIVATIVES, NON_COMMERCIAL, RESEARCH_ONLY = "no-derivatives", "non-commercial", "research-only"
LIMITS = {
    NO_DERIVATIVES: "nothing that is made of the weights may be passed on",
    NON_COMMERCIAL: "no commercial use",
    RESEARCH_ONLY: "for research alone, no patient's care",
}
"""What a licence may forbid, and what that means."""

Name = Annotated[str, Field(pattern=PATTERN)]
Limit = Literal["no-derivatives", "non-commercial", "research-only"]
_IMPLIED = {"ND": NO_DERIVATIVES, "NC": NON_COMMERCIAL}


@dataclass(frozen=True)
class Licence:
    """The terms of use of a backbone's weights.

    Attributes:
        names: SPDX identifiers, or LicenseRef-NAME where SPDX has none; several where two sources name two, and both
            count; empty where nobody says.
        limits: words of ``LIMITS``, sorted.
    """

    names: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()

    @staticmethod
    def of(name: str = "", limits: Sequence[str] = ()) -> Licence:
        """One name and its limits; a Creative Commons licence says some of them in its name."""
        parts = name.upper().split("-")
        implied = {_IMPLIED[part] for part in parts if part in _IMPLIED} if parts[0] == "CC" else set()
        return Licence((name,) if name else (), tuple(sorted({*limits, *implied})))

    def __bool__(self) -> bool:
        """Whether anything is known."""
        return bool(self.names or self.limits)

    def __add__(self, other: Licence) -> Licence:
        """Both: what either forbids is forbidden."""
        known = {name.casefold() for name in self.names}
        names = (*self.names, *(name for name in other.names if name.casefold() not in known))
        return Licence(names, tuple(sorted({*self.limits, *other.limits})))

    def __str__(self) -> str:
        """Its names and what it forbids."""
        named = " and ".join(self.names) or "not stated"
        return f"{named} ({', '.join(self.limits)})" if self.limits else named

    def taken_by(self, names: tuple[str, ...]) -> bool:
        """Whether a list of names has all of these; what nobody states is in no list."""
        known = {name.casefold() for name in names}
        return bool(self.names) and all(name.casefold() in known for name in self.names)

    @staticmethod
    def read(values: object) -> Licence:
        """What :meth:`to_json` gave; nothing of None.

        Raises:
            ValueError: if it is something else.
        """
        if values is None:
            return Licence()
        if not isinstance(values, dict) or values.keys() != {"names", "limits"}:
            raise ValueError("no licence")
        names, limits = values["names"], values["limits"]
        if not (isinstance(names, list) and isinstance(limits, list)):
            raise ValueError("no licence")
        texts = [*names, *limits]
        if not all(isinstance(text, str) for text in texts) or any(faults(name, limits) for name in ["", *names]):
            raise ValueError("no licence")
        return Licence(tuple(names), tuple(sorted(set(limits))))

    def to_json(self) -> dict[str, list[str]]:
        """As exports carry it."""
        return {"names": list(self.names), "limits": list(self.limits)}


def faults(name: str, limits: Sequence[str]) -> list[str]:
    """What is wrong with a name and limits that a person gave."""
    wrong = []
    if name and not re.fullmatch(PATTERN, name):
        wrong.append(f"licence '{name}': an SPDX identifier (Apache-2.0, CC-BY-NC-ND-4.0), or LicenseRef-NAME")
    wrong += [f"limit '{limit}': known are {', '.join(LIMITS)}" for limit in limits if limit not in LIMITS]
    return wrong
