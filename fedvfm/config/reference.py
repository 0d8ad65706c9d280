"""The reference of every key, read off the models: for ``fedvfm explain``, docs, JSON schemas and templates.

The text below a field of a model is ``(unit) Meaning. Change: when.``; type, limits and default are the model's own.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pydantic
from pydantic.fields import FieldInfo

from fedvfm import errors
from fedvfm.config import schema, server, survey

ROOTS: dict[str, type[pydantic.BaseModel]] = {
    "recipe": schema.Recipe,
    "site": schema.SiteConfig,
    "server": server.ServerConfig,
    "survey": survey.Survey,
    "experiment": schema.Experiment,
}
"""First word of a key -> the file it stands in."""

_CHANGE = " Change: "
_PLAIN = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
_PLURAL = {"text": "texts", "name": "names", "whole number": "whole numbers", "number": "numbers"}
_COUNTS = {2: "two ", 3: "three "}


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        path: dotted, its file first: ``recipe.optimiser.learning_rate``.
        type: in words: ``number``, ``list of names``, ``table``.
        limits: what values it takes, in words; empty where the type says all.
        unit: empty where it has none.
        default: as TOML writes it; "none" where it may be left out and nothing stands for it; None if it is required.
        meaning: what it does.
        change: when to give another value; empty for tables.
    """

    path: str
    type: str
    limits: str
    unit: str
    default: str | None
    meaning: str
    change: str

    @property
    def name(self) -> str:
        """The last word of the path."""
        return self.path.rpartition(".")[2]

    @property
    def form(self) -> str:
        """Type, unit, limits and default in one line."""
        typed = f"{self.type} ({self.unit})" if self.unit else self.type
        given = "required" if self.default is None else f"default {self.default}"
        return "; ".join(part for part in (typed, self.limits, given) if part)


@dataclass(frozen=True)
class Table:
    """One table of a file.

    Attributes:
        path: dotted, its file first; a file itself is its name alone.
        meaning: what it is for.
        keys: those that stand in it.
        tables: paths of the tables in it.
    """

    path: str
    meaning: str
    keys: tuple[Key, ...]
    tables: tuple[str, ...]


def model_of(field: FieldInfo) -> type[pydantic.BaseModel] | None:
    """The model of a field that is a table of its own."""
    given = field.annotation
    options = typing.get_args(given) if isinstance(given, types.UnionType) else (given,)
    models = (kind for kind in options if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel))
    return next(models, None)


def tables(root: str, *, deep: bool = False) -> Iterator[Table]:
    """The tables of a file, itself first.

    Args:
        root: a name of :data:`ROOTS`.
        deep: into other files' tables too, as a recipe in an experiment.
    """
    yield from _tables(root, ROOTS[root], _first_paragraph(ROOTS[root]), deep)


def _tables(path: str, model: type[pydantic.BaseModel], meaning: str, deep: bool) -> Iterator[Table]:
    inner = {name: kind for name, field in model.model_fields.items() if (kind := model_of(field)) is not None}
    properties = model.model_json_schema()["properties"]
    keys = tuple(
        _key(f"{path}.{name}", field, properties[name])
        for name, field in model.model_fields.items()
        if name not in inner
    )
    yield Table(path, meaning, keys, tuple(f"{path}.{name}" for name in inner))
    for name, kind in inner.items():
        if deep or kind not in ROOTS.values():
            yield from _tables(f"{path}.{name}", kind, _words(model.model_fields[name].description), deep)


def _key(path: str, field: FieldInfo, node: Mapping[str, Any]) -> Key:
    text = _words(field.description)
    unit, meaning = "", text.partition(_CHANGE)[0]
    if meaning.startswith("("):
        unit, _, meaning = meaning[1:].partition(") ")
    default = None if field.is_required() else _literal(field.get_default(call_default_factory=True))
    return Key(path, _type(node), _limits(node), unit, default, meaning, text.partition(_CHANGE)[2])


def _literal(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _words(text: str | None) -> str:
    return " ".join((text or "").split())


def _first_paragraph(model: type[pydantic.BaseModel]) -> str:
    return _words((model.__doc__ or "").split("\n\n")[0])


# -- types in words ----------------------------------------------------------------------------------------------------


def _options(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a value may be, text before lists; null is not counted: such a key is left out."""
    given = [option for option in node.get("anyOf", [node]) if option.get("type") != "null"]
    return sorted(given, key=lambda option: option.get("type") == "array")


def _type(node: Mapping[str, Any]) -> str:
    return " or ".join(dict.fromkeys(_single(option) for option in _options(node)))


def _single(node: Mapping[str, Any]) -> str:
    kind = node.get("type", "string")
    if kind == "object":
        return "table"
    if kind != "array":
        return "sha256" if "64" in node.get("pattern", "") else _PLAIN[kind]
    each = node["prefixItems"] if "prefixItems" in node else [node.get("items", {})]
    word = "name" if each[0].get("type") == "string" and "minLength" in each[0] else _single(each[0])
    return (
        f"list of {_COUNTS.get(node.get('maxItems', 0), '') if 'prefixItems' in node else ''}{_PLURAL.get(word, word)}"
    )


def _limits(node: Mapping[str, Any]) -> str:
    return " or ".join(filter(None, (_range(option) for option in _options(node))))


def _range(node: Mapping[str, Any]) -> str:
    if "enum" in node or "const" in node:
        return ", ".join(json.dumps(word) for word in node.get("enum", [node.get("const")]))
    if node.get("type") == "array" and "prefixItems" not in node:
        inner = _range(node.get("items", {}))
        return f"each {inner}" if inner and node["items"].get("type") != "string" else ""
    low, above = node.get("minimum"), node.get("exclusiveMinimum")
    high, below = node.get("maximum"), node.get("exclusiveMaximum")
    parts = [(low, "at least"), (above, "above"), (high, "at most"), (below, "below")]
    return ", ".join(f"{word} {_number(bound)}" for bound, word in parts if bound is not None)


def _number(bound: float) -> str:
    return f"{bound:g}" if bound < 10_000 else f"{int(bound):,}"


# -- finding -----------------------------------------------------------------------------------------------------------


def find(word: str) -> list[Table | Key]:
    """What is meant by ``recipe.optimiser``, ``optimiser.learning_rate`` or ``learning_rate``: all that end so.

    Raises:
        UnknownName: with the nearest names.
    """
    known = _known(word.partition(".")[0] == "experiment")
    path = word.strip().strip("[]").removesuffix(".toml")
    if path in known:
        return [known[path]]
    matches = [entry for name, entry in known.items() if path and name.endswith(f".{path}")]
    options = known.get(path.rpartition(".")[0])  # of a table that is one key, each option is told there
    if isinstance(options, Key) and options.type == "table":
        return [options]
    if not matches:
        raise errors.UnknownName(f"no key or table '{word[:80]}'{_nearest(path, known)}; files: {', '.join(ROOTS)}")
    return matches


def _known(deep: bool) -> dict[str, Table | Key]:
    known: dict[str, Table | Key] = {}
    for root in ROOTS:
        for table in tables(root, deep=deep and root == "experiment"):
            known |= {table.path: table} | {key.path: key for key in table.keys}
    return known


def _nearest(path: str, known: Mapping[str, Any]) -> str:
    """The paths that are nearest as a whole, or by their last word."""
    last: dict[str, str] = {}
    for name in known:
        last.setdefault(name.rpartition(".")[2], name)
    close = difflib.get_close_matches(path, list(known), n=3, cutoff=0.75)
    by_word = difflib.get_close_matches(path.rpartition(".")[2], list(last), n=3, cutoff=0.6)
    names = list(dict.fromkeys([*close, *(last[word] for word in by_word)]))[:3]
    return f"; nearest: {', '.join(names)}" if names else ""


# -- JSON schema -------------------------------------------------------------------------------------------------------

DRAFT = "http://json-schema.org/draft-04/schema#"
"""What editors of TOML understand."""


def json_schema(root: str) -> dict[str, Any]:
    """The JSON schema of a file, draft 4, for editors that follow a line ``#:schema``."""
    document = ROOTS[root].model_json_schema(ref_template="#/definitions/{model}")
    document["definitions"] = document.pop("$defs", {})
    return {"$schema": DRAFT, **typing.cast("dict[str, Any]", _older(document))}


def _older(node: Any) -> Any:
    """The same in the words of draft 4."""
    if isinstance(node, list):
        return [_older(each) for each in node]
    if not isinstance(node, dict):
        return node
    node = {name: _older(each) for name, each in node.items()}
    for bound, word in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(node.get(word), int | float):
            node |= {bound: node[word], word: True}
    if "const" in node:
        node["enum"] = [node.pop("const")]
    if "prefixItems" in node:
        node["items"] = node.pop("prefixItems")
    if isinstance(node.get("description"), str):
        node["description"] = _words(node["description"].split("\n\n")[0]).replace("``", "")
    return node
