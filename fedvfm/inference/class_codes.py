"""Codes of the classes of a recipe: those it states, SNOMED CT's of common organs, else private ones.

Source: DICOM PS3.16, CID 7150 (categories), 7191 (tissues), 7192 (anatomical structures), 7194 (morphologically
    abnormal structures), 244 (laterality), as pydicom's dictionary holds them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedvfm.data import structures

SCHEME = "99FEDVFM"
"""Names that no table knows are the recipe's own, so their codes are private."""

Triple = tuple[str, str, str]
"""Code, scheme and meaning, in the order in which highdicom takes them."""

SIDES: dict[str, Triple] = {"left": ("7771000", "SCT", "Left"), "right": ("24028007", "SCT", "Right")}
TISSUE: Triple = ("85756007", "SCT", "Tissue")
ANATOMY: Triple = ("123037004", "SCT", "Anatomical Structure")
ABNORMAL: Triple = ("49755003", "SCT", "Morphologically Altered Structure")
NEUTRAL: Triple = ("309825002", "SCT", "Spatial and Relational Concept")
CATEGORIES = {7191: TISSUE, 7192: ANATOMY, 7194: ABNORMAL}
"""Context group of types -> the category they are of; of one in several the last counts."""


class Coded(NamedTuple):
    """What a segment is, for DICOM's Segment Description."""

    category: Triple
    kind: Triple
    modifier: Triple | None = None


def of(name: str, stated: Mapping[str, str]) -> Coded:
    """The codes of a class: as the recipe states, of an organ by its name (also "left ..."), else private.

    Args:
        name: of the class.
        stated: class -> code, as in ``recipe.data.class_codes``.
    """
    if name in stated:
        kind, _, modifier = stated[name].partition("+")
        return _coded(kind, name, _triple(modifier, _meaning(modifier)) if modifier else None)
    words = structures.plain(name).split()
    sides = [word for word in words if word in SIDES]
    whole, part = _code(words), _code([word for word in words if word not in SIDES])
    if whole:
        return _coded(whole, name)
    if part and len(sides) == 1:
        return _coded(part, name, SIDES[sides[0]])
    # One code for one name in every recipe: a number would be another class in the next.
    return Coded(NEUTRAL, (f"CLASS-{structures.hash_of(name)}", SCHEME, name[:64]))


def _code(words: Sequence[str]) -> str:
    """The one code of these words, or nothing."""
    if structures.several_organs(" ".join(words)):
        return ""
    codes = _named().get(" ".join(words), frozenset())
    return next(iter(codes)) if len(codes) == 1 else ""


def _coded(kind: str, name: str, modifier: Triple | None = None) -> Coded:
    """A type with its own category and meaning; of one that no table knows the class's name is the meaning."""
    category, meaning = _known().get(kind, (NEUTRAL, name[:64]))
    return Coded(category, _triple(kind, meaning), modifier)


def _triple(code: str, meaning: str) -> Triple:
    scheme, _, value = code.partition(":")
    return value, scheme, meaning


def _meaning(code: str) -> str:
    return next((side[2] for side in SIDES.values() if code == f"SCT:{side[0]}"), code)


@functools.lru_cache(maxsize=1)
def _known() -> Mapping[str, tuple[Triple, str]]:
    """Code -> its category and meaning, of all types for segments."""
    return {code: (category, meaning) for _, code, meaning, category in _types()}


@functools.lru_cache(maxsize=1)
def _named() -> Mapping[str, frozenset[str]]:
    """Plain name -> codes of types for segments."""
    by_name: dict[str, set[str]] = {}
    for word, code, meaning, _ in _types():
        for name in (word, re.sub(r"\(.*?\)| structure\b", "", meaning)):
            by_name.setdefault(structures.plain(name), set()).add(code)
    return {name: frozenset(codes) for name, codes in by_name.items()}


@functools.lru_cache(maxsize=1)
def _types() -> tuple[tuple[str, str, str, Triple], ...]:
    """Keyword in words, code, meaning and category of every type for segments that pydicom knows in SNOMED CT."""
    from pydicom.sr import _cid_dict as groups
    from pydicom.sr import _concepts_dict as concepts

    held: Any = groups.cid_concepts
    known: Any = concepts.concepts["SCT"]
    return tuple(
        (re.sub(r"(?<=[a-z])(?=[A-Z])", " ", keyword), f"SCT:{code}", str(meaning), category)
        for group, category in CATEGORIES.items()
        for keyword in held[group]["SCT"]
        for code, (meaning, members) in known.get(keyword, {}).items()
        if group in members
    )
