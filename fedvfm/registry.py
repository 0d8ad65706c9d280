"""Lazy name tables: a name points to ``"module:attribute"`` and nothing is imported until it is asked for.

Third parties join by an entry point of the table's group, or from a notebook with :meth:`Table.add`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import Any

from fedvfm import errors


def nearest(name: str, known: list[str]) -> str:
    """Return ``", nearest: 'x'"`` for the known name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; nearest: '{close[0]}'" if close else ""


class Table:
    """A table of named things, each given as a lazy ``"module:attribute"`` string or as the thing itself.

    Args:
        noun: what an entry is, for error messages (``"backbone"``).
        entries: name -> ``"module:attribute"``.
    """

    def __init__(self, noun: str, entries: Mapping[str, str]) -> None:
        self.noun = noun
        self.group = "fedvfm." + noun.replace(" ", "_")
        self._entries: dict[str, Any] = dict(entries)
        self._discovered = False

    def _discover(self) -> None:
        if not self._discovered:
            self._discovered = True
            for point in importlib.metadata.entry_points(group=self.group):
                self._entries.setdefault(point.name, point.value)

    def add(self, name: str, thing: Any, *, replace: bool = False) -> None:
        """Register ``thing`` (an object or a ``"module:attribute"`` string) under ``name``.

        Raises:
            ConfigError: if the name is taken and ``replace`` is false.
        """
        self._discover()
        if name in self._entries and not replace:
            raise errors.ConfigError(f"{self.noun} table", [f"'{name}' is already registered; pass replace=True"])
        self._entries[name] = thing

    def names(self) -> list[str]:
        """All names, sorted."""
        self._discover()
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def fault(self, name: str) -> str:
        """The sentence for a name that is not in the table."""
        known = self.names()
        return f"unknown {self.noun} '{name}'; known: {', '.join(known)}{nearest(name, known)}"

    def get(self, name: str) -> Any:
        """Resolve ``name``, importing its module on first use.

        Raises:
            UnknownName: with the known names and the nearest one.
        """
        self._discover()
        if name not in self._entries:
            raise errors.UnknownName(self.fault(name))
        thing = self._entries[name]
        if isinstance(thing, str):
            module, _, attribute = thing.partition(":")
            thing = getattr(importlib.import_module(module), attribute)
            self._entries[name] = thing
        return thing
