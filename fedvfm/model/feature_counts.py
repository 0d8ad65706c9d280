"""How often what the frozen blocks compute was asked for, and where it came from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Counts:
    """How often features were asked for, by where they came from.

    Attributes:
        computed: by the frozen blocks, for the first time or not.
        again: of these, not for the first time in this process: what a larger cache would have kept.
        memory, files: found there.
    """

    computed: int = 0
    again: int = 0
    memory: int = 0
    files: int = 0

    @property
    def asked(self) -> int:
        """How often in all."""
        return self.computed + self.memory + self.files

    def __str__(self) -> str:
        """In words, with what to do where the cache is too small."""
        words = f"{self.computed:,} computed, {self.memory:,} from memory, {self.files:,} from files"
        more = f"; {self.again:,} of them again: raise cache_mib or cache_disk_mib" if self.again else ""
        return words + more

    def __sub__(self, earlier: Counts) -> Counts:
        values = zip(dataclasses.astuple(self), dataclasses.astuple(earlier), strict=True)
        return Counts(*(now - before for now, before in values))


METRICS = {name: f"features_{name}" for name in ("computed", "again", "memory", "files")}
"""Counts -> what the journal of a simulation calls them."""


def as_metrics(counts: Counts) -> dict[str, float]:
    """As a training round of a simulation reports them; nothing where no features were asked for."""
    values = dataclasses.asdict(counts)
    return {METRICS[name]: float(value) for name, value in values.items()} if any(values.values()) else {}
