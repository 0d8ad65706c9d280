"""Lazy name tables: a name points to ``"module:attribute"`` and nothing is imported until it is asked for.

Third parties join by an entry point of the table's group (``fedvfm.backbone``, ``fedvfm.data_source``, ...), or from a
notebook with the ``register_*`` functions here, which name the tables by where they lie.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from fedvfm import errors


def nearest(name: str, known: list[str]) -> str:
    """Return ``", nearest: 'x'"`` for the known name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; nearest: '{close[0]}'" if close else ""


def face(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__``: names for scripts outside, each loaded when it is asked for.

    Args:
        package: its name.
        names: name -> ``"module:attribute"``, or ``"module"`` for the module itself.
    """

    def attribute(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return _resolved(names[name])

    return attribute


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
            import importlib.metadata  # loads the parser of e-mail: many processes ask no table

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

    def place(self, name: str) -> str:
        """Where a name leads, as ``"module:attribute"``; nothing is loaded.

        Raises:
            UnknownName: with the known names and the nearest one.
        """
        if name not in self:
            raise errors.UnknownName(self.fault(name))
        thing = self._entries[name]
        return thing if isinstance(thing, str) else f"{thing.__module__}:{getattr(thing, '__qualname__', '')}"

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
            thing = _resolved(thing)
            self._entries[name] = thing
        return thing


def _resolved(place: str) -> Any:
    module, _, attribute = place.partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded


Thing = TypeVar("Thing", bound=Callable[..., Any] | str)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")


def _register(place: str, name: str, thing: Thing, replace: bool, methods: Sequence[str] = ()) -> Thing:
    """Put a thing into a table, if it can be one.

    Raises:
        ConfigError: if the name or the thing cannot be used, or the name is taken.
    """
    table: Table = _resolved(place)
    faults = (
        [] if isinstance(name, str) and NAME.fullmatch(name) else [f"{name!r}: letters, digits, ., _, / and - only"]
    )
    if not callable(thing) and not (isinstance(thing, str) and ":" in thing):
        faults.append(f"{thing!r} cannot be called; give a class, a function or 'module:name'")
    lacking = [method for method in methods if isinstance(thing, type) and not callable(getattr(thing, method, None))]
    faults += [f"{getattr(thing, '__name__', thing)} has no method {method}()" for method in lacking]
    if faults:
        raise errors.ConfigError(f"{table.noun} table, '{name}'", faults)
    table.add(name, thing, replace=replace)
    return thing


def register_backbone(name: str, load: Thing, *, replace: bool = False) -> Thing:
    """``load(settings, *, with_weights=True, device="cpu") -> backbones.base.Backbone``.

    The options it reads are named by ``@backbones.base.takes("option")``; adapter kinds and tasks name theirs in
    ``known_options``. Others are refused.
    """
    return _register("fedvfm.backbones.table:TABLE", name, load, replace)


def register_adapter(name: str, kind: Thing, *, replace: bool = False) -> Thing:
    """``kind() -> adapters.base.Adapter``."""
    return _register("fedvfm.adapters.table:TABLE", name, kind, replace, ("inject", "faults"))


def register_rule(name: str, rule: Thing, *, replace: bool = False) -> Thing:
    """``rule(**options) -> aggregators.base.Aggregator``; pure NumPy."""
    return _register("fedvfm.aggregators.table:TABLE", name, rule, replace, ("init", "fold", "finish", "for_site"))


def register_source(name: str, source: Thing, *, replace: bool = False) -> Thing:
    """``source(config.SourceConfig) -> data.sample.Source``."""
    return _register("fedvfm.data.sources.table:TABLE", name, source, replace, ("samples", "read"))


def register_task(name: str, task: Thing, *, replace: bool = False) -> Thing:
    """``task(config.Recipe) -> tasks.base.Task``."""
    return _register("fedvfm.tasks.table:TABLE", name, task, replace, ("head", "target", "loss", "scores", "score"))


def register_baseline(name: str, arms: Thing, *, replace: bool = False) -> Thing:
    """``arms(experiment, site names) -> list of simulation.baselines.Arm``."""
    return _register("fedvfm.simulation.tables:BASELINES", name, arms, replace)
