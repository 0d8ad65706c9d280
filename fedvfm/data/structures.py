"""Which number of a mask means which structure: by coded type and name, never by the position in one file.

DICOM-SEG, NRRD of 3D Slicer and MITK, label tables of NIfTI, dcmqi's JSON and BIDS tables say of every number what it
stands for. Where these names or codes are those of the classes, masks are read by them. Where they are not, numbers
are taken as classes only if every number is one structure in all files. Names and meanings are text of a file that
may name a patient: they are compared, and never shown; codes of known schemes are.

Sources: DICOM PS3.3, C.8.20.2 (Segment Description Macro) and C.8.8.5 (Structure Set); PS3.16, CID 7151; 3D Slicer,
"Segmentation file formats"; dcmqi, JSON meta information; BIDS 1.10, "Common image-derived labels".
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedvfm import errors
from fedvfm.data import defect

SCHEMES = {
    "SCT": "SCT",
    "SRT": "SRT",
    "SNM3": "SRT",
    "99SDM": "SRT",
    "FMA": "FMA",
    "DCM": "DCM",
    "UMLS": "UMLS",
    "NCIT": "NCIt",
}
"""Coding schemes whose codes come from closed lists and may be shown."""
CODE = re.compile(r"[A-Z0-9][A-Z0-9.-]{0,15}", re.IGNORECASE)
GENERAL = frozenset(
    f"SCT:{code}"
    for code in (
        "85756007",  # tissue
        "123037004",  # body structure
        "91723000",  # anatomical structure
        "113343008",  # organ
        "49755003",  # morphologically abnormal structure
        "52988006",  # lesion
        "4147007",  # mass
        "108369006",  # neoplasm
        "309825002",  # spatial and relational concept
        "64572001",  # disease
    )
)
"""Codes that say too little to tell structures apart: there the name counts, too."""

# fmt: off
SEVERAL_ORGANS = frozenset(
    (
        "apex", "arch", "atrium", "base", "body", "bulb", "canal", "capsule", "cavity", "chamber", "cortex",
        "crest", "duct", "fundus", "gland", "head", "hilum", "horn", "lobe", "medulla", "neck", "nucleus",
        "pole", "root", "septum", "sinus", "stem", "tail", "trunk", "tube", "valve", "ventricle", "wall",
    )
)
# fmt: on
"""Names of parts that several organs have (brain and heart have ventricles): they have no code by themselves."""

GENERIC = frozenset({"foreground", "object", "structure", "mask", "segment", "roi"})
"""Class names that say no more than that there is something."""

BETWEEN_WORDS = re.compile(r"[\s_.,;:/\\()\[\]{}'\"-]+")

EMPTY: Mapping[str, str] = types.MappingProxyType({})

Key = tuple[str, str]
"""Code and name of a structure."""


@dataclass(frozen=True, slots=True)
class Structure:
    """What one number of a mask stands for.

    Attributes:
        value: the number in this file.
        code: "SCT:10200004", with modifiers and region, or empty.
        name: as the file calls it, in plain words (:func:`plain`).
        meanings: other words for it: what its code means.
        region: whether it is a region of interest of an RT structure set: its number says nothing, and a set holds
            regions that are no class (the body's outline, margins).
        shared: whether a file gives this code to structures of other names: the code does not say all of it.
        listed: whether a table lists it, which may hold structures that no mask has (an atlas).
    """

    value: int
    code: str = ""
    name: str = field(default="", repr=False)
    meanings: tuple[str, ...] = field(default=(), repr=False)
    region: bool = False
    shared: bool = False
    listed: bool = False

    @property
    def key(self) -> Key:
        """What tells it apart."""
        return self.code, self.name

    @property
    def own_name(self) -> str:
        """A class name for it where nobody gave one: its code, which may be shown, else a hash of its name."""
        if self.shared:
            return f"{self.code} {hash_of(self.name)}"
        return self.code if self.code and not (self.region and self.name) else f"structure {hash_of(self.name)}"

    @property
    def shown(self) -> str:
        """How a message calls it, without text of its file."""
        return f"number {self.value} ({self.code})" if self.code else f"number {self.value}"


@dataclass(frozen=True, slots=True)
class Assigned:
    """What structures stand for.

    Attributes:
        names: the classes.
        table: class number of every structure; None where numbers are taken as they are stored.
        faults: one sentence each.
        notes: case -> what is to be said of it.
        aliases: codes and plain names by which ``[labels]`` may call a class.
        left: regions that are no class and are left out, one sentence each, for those who may see names.
    """

    names: tuple[str, ...]
    table: Mapping[Key, int] | None = None
    faults: tuple[errors.Fault, ...] = ()
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    left: tuple[str, ...] = ()


Found = Mapping[str, Sequence[Sequence[Structure]]]
"""Case -> the structures of each of its mask files."""

TWO_OBJECTS = "two segmentation objects of the study hold one structure; both are taken together"
TWO_REGIONS = "a structure set has two regions of one name; both are taken together"
TWO_STRUCTURES = "two structures of one mask are one class; both are taken together"
REGIONS_LEFT = "a structure set has regions that are no class, beside one for every class; they are left out"


def plain(text: str) -> str:
    """Words in lower case with single blanks: capitals and what stands between words tell no structures apart.

    Signs that change the meaning stay: "ER+" is not "ER-", and in some scripts vowels are marks on letters.
    """
    known = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(word for word in BETWEEN_WORDS.split(known) if word)


def code_of(scheme: str, value: str) -> str:
    """A code as it is compared and shown: SNOMED's old form (T-62000) as its new one; of other schemes a hash."""
    known, value = SCHEMES.get(scheme.strip().upper(), ""), value.strip()
    if known == "SRT":
        from pydicom.sr import _snomed_dict as snomed  # the one table of both forms that is installed

        found = snomed.mapping["SRT"].get(value.upper())
        known, value = ("SCT", found) if found else (known, value)
    if not value:
        return ""
    return f"{known}:{value}" if known and CODE.fullmatch(value) else f"other scheme:{hash_of(scheme + value)}"


def qualified(kind: str, modifier: str = "", region: str = "", side: str = "") -> str:
    """A coded type with what narrows it down: its modifier, the region it lies in, and that region's modifier (side).

    A region that only says the type again adds its side alone.
    """
    if kind and region == kind:
        region, modifier = "", "+".join(dict.fromkeys(part for part in (modifier, side) if part))
    code = kind + (f"+{modifier}" if kind and modifier else "")
    where = region + (f"+{side}" if region and side else "")
    return f"{code}@{where}" if code and where else code


def require_distinct(where: str, held: Sequence[Structure]) -> None:
    """Refuse one file that gives one number to two structures: whichever is taken, the other would be it.

    Raises:
        DataError: with the number.
    """
    known: dict[int, Key] = {}
    for structure in held:
        if not structure.region and known.setdefault(structure.value, structure.key) != structure.key:
            raise defect.MASK_VALUE.error(
                f"{where}: number {structure.value} stands for two structures; save each structure under its own "
                "number, or each mask with its own table",
                [structure.value],
            )


def coded(item: Any, name: str) -> tuple[str, str]:
    """The codes of a sequence of a DICOM item (:func:`code_of`), and what they mean in words; empty without one.

    A structure may have several modifiers (left, upper), in any order.
    """
    every = sorted(_code_and_meaning(code) for code in item.get(name) or ())
    return "+".join(code for code, _ in every if code), " ".join(meaning for _, meaning in every if meaning)


def _code_and_meaning(item: Any) -> tuple[str, str]:
    value = item.get("CodeValue") or item.get("LongCodeValue") or ""
    code = code_of(str(item.get("CodingSchemeDesignator") or ""), str(value))
    return code, str(item.get("CodeMeaning") or "")


def hash_of(text: str) -> str:
    """A short name of a text that must not be shown."""
    import hashlib

    return hashlib.sha256(plain(text).encode()).hexdigest()[:8]


@functools.lru_cache(maxsize=1)
def _concepts() -> Mapping[str, frozenset[str]]:
    """Plain name -> SNOMED CT codes that pydicom's dictionary knows by it."""
    from pydicom.sr import _concepts_dict as concepts

    found: dict[str, set[str]] = {}
    known: Any = concepts.concepts["SCT"]
    for keyword, meant in known.items():
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", keyword)
        for code, (meaning, _) in meant.items():
            for name in (words, re.sub(r"\(.*?\)| structure\b", "", meaning)):
                found.setdefault(plain(name), set()).add(f"SCT:{code}")
    return {name: frozenset(codes) for name, codes in found.items()}


def codes_of(name: str) -> frozenset[str]:
    """SNOMED CT codes of a class name, where it is a term of pydicom's dictionary ("liver", "left lung")."""
    return frozenset() if several_organs(name) else _concepts().get(plain(name), frozenset())


def several_organs(name: str) -> bool:
    """Whether a name, its side aside, is that of a part which several organs have."""
    words = [word.removesuffix("s") for word in plain(name).split() if word not in ("left", "right")]
    return len(words) == 1 and words[0] in SEVERAL_ORGANS


def _words(one: Structure) -> set[str]:
    return {word for word in (one.name, *one.meanings) if word}


def _classes(one: Structure, names: Sequence[str], stated: Mapping[str, str] = EMPTY) -> set[int]:
    """The classes that a structure may be: by code, by name, by what its code means, by the code a recipe states."""
    codes = {one.code.casefold(), one.code.partition(":")[2].casefold()} - {""}
    found = {at for at, name in enumerate(names) if name.casefold().strip() in codes or plain(name) in _words(one)}
    if one.region:
        found |= {at for at, name in enumerate(names) if at and name == one.own_name}
    if one.code not in GENERAL:
        found |= {at for at, name in enumerate(names) if at and one.code in codes_of(name)}
    return found | {at for at, name in enumerate(names) if at and one.code and one.code == stated.get(name)}


def assign(
    found: Found,
    names: Sequence[str],
    values: Sequence[int],
    *,
    numbers: bool,
    stated: bool,
    mapped: Sequence[str] = (),
) -> Assigned:
    """What the structures of all masks of a folder stand for.

    Args:
        found: the structures of all cases.
        names: the classes, background first.
        values: the number of each class, where numbers count.
        numbers: whether the site says itself which number is which class (``mask_values``).
        stated: whether the site, or the data, says the class names.
        mapped: codes and names that ``[labels]`` maps: such a region is never left out.

    Returns:
        Classes by name where a structure has the name or code of one; else by number, with a fault for every number
        that is not one structure everywhere. Regions of a structure set have no number that counts.
    """
    found = _with_shared_codes(found)
    every = list({one.key: one for one in _all(found)}.values())
    if not every:
        return Assigned(tuple(names))
    classes, regions = tuple(names), any(one.region for one in every)
    several = len({one.code for one in every}) > 1 or any(structure.shared for structure in every)
    if not stated and not numbers and (regions or several):
        classes = (names[0], *_derived(every))
    fitting = {one.key: _classes(one, classes) for one in every}
    notes = _notes(found)
    if (numbers or not any(fitting.values())) and not regions:
        faults = [*_number_faults(found), *(_contradictions(found, classes, values, fitting) if numbers else ())]
        return Assigned(classes, None, tuple(faults), notes, _by_number(found, classes, values))
    needless = _needless(found, fitting, classes, mapped)
    wrong = _ambiguous([one for one in every if one.key not in needless], fitting, classes)
    if numbers:
        text = "data.options.mask_values: regions of structure sets go by their names, not by numbers; leave it out"
        wrong.append(defect.OPTIONS.fault(text))
    wrong += [
        defect.CLASS_UNKNOWN.fault(
            f"a structure of the masks, {one.shown}, stands for no class of {', '.join(classes)}; name it (or its "
            "code) in data.options.class_names too, and map it in [labels], to the background if it does not count"
        )
        for one in every
        if not fitting[one.key] and one.key not in needless
    ]
    table = {key: min(at) for key, at in fitting.items() if at}
    aliases = {word: classes[table[one.key]] for one in every if one.key in table for word in _aliases(one)}
    notes = _with_left(_with_joined(notes, found, table), found, needless)
    return Assigned(classes, table, tuple(wrong), notes, aliases, _left(found, needless))


def _with_shared_codes(found: Found) -> Found:
    """The structures, those marked whose code one file also gives to a structure of another name.

    Names that differ by a number at their end are parts of one structure ("nodule 1", "nodule 2").
    """
    shared: set[str] = set()
    for files in found.values():
        for held in files:
            names: dict[str, set[str]] = {}
            for structure in held:
                names.setdefault(structure.code, set()).add(structure.name.rstrip("0123456789 "))
            shared |= {code for code, under in names.items() if code and len(under) > 1}
    return {
        case: [
            [dataclasses.replace(structure, shared=structure.code in shared) for structure in held] for held in files
        ]
        for case, files in found.items()
    }


def _with_joined(
    notes: Mapping[str, tuple[str, ...]], found: Found, table: Mapping[Key, int]
) -> dict[str, tuple[str, ...]]:
    """The notes, and one for every case in which one mask has two structures of one class."""
    joined = []
    for case, files in found.items():
        classes = [[table[key] for key in {structure.key for structure in held} if table.get(key)] for held in files]
        joined += [case] if any(len(here) > len(set(here)) for here in classes) else []
    return {**notes, **{case: (*notes.get(case, ()), TWO_STRUCTURES) for case in joined}}


def _ambiguous(every: Sequence[Structure], fitting: Mapping[Key, set[int]], names: Sequence[str]) -> list[errors.Fault]:
    """A fault for every structure that may be several classes."""
    return [
        defect.CLASS_UNKNOWN.fault(
            f"a structure of the masks, {structure.shown}, has code and name of several classes "
            f"({' and '.join(names[at] for at in sorted(fitting[structure.key]))})"
        )
        for structure in every
        if len(fitting[structure.key]) > 1
    ]


def _needless(
    found: Found, fitting: Mapping[Key, set[int]], names: Sequence[str], mapped: Sequence[str]
) -> frozenset[Key]:
    """Regions that are no class and may be left out: every case that has one has a structure of every class beside it.

    Where a class is missing such a region may be that class under another name, so it has to be mapped. Rows of a table
    beside which some row is a class are left out until a mask has their number, which is refused then.
    """
    tables = any(fitting.values())
    words = {*(word.strip().casefold() for word in mapped), *map(plain, mapped)}
    wanted, needed, others = set(range(1, len(names))), set[Key](), set[Key]()
    for files in found.values():
        here = [one for held in files for one in held]
        complete = wanted <= {at for one in here for at in fitting[one.key]}
        for one in here:
            others |= {one.key} if (one.region or (one.listed and tables)) and not fitting[one.key] else set()
            needed |= {one.key} if (one.region and not complete) or words & set(_aliases(one)) else set()
    return frozenset(others - needed)


def _with_left(
    notes: Mapping[str, tuple[str, ...]], found: Found, needless: frozenset[Key]
) -> dict[str, tuple[str, ...]]:
    """The notes, and one for every case with regions that are left out."""
    leaving = [
        case
        for case, files in found.items()
        if any(structure.region and structure.key in needless for held in files for structure in held)
    ]
    return {**notes, **{case: (*notes.get(case, ()), REGIONS_LEFT) for case in leaving}}


def _left(found: Found, needless: frozenset[Key]) -> tuple[str, ...]:
    return tuple(
        f"{case}: region '{one.name}' of a structure set: no class"
        for case, files in found.items()
        for held in files
        for one in held
        if one.region and one.key in needless
    )


def under(
    found: Found, wanted: Sequence[str], mapped: Sequence[str] = (), stated: Mapping[str, str] = EMPTY
) -> Assigned | None:
    """The structures of all masks by a recipe's classes, where neither the site nor the data has said any.

    A structure that is none of the recipe's becomes a class of its own, called by its code, so that ``[labels]`` can
    map it and nothing is trained under another's name. None where the masks do not say what they are, or the recipe
    does not. ``mapped`` as in :func:`assign`; ``stated`` are the codes that the recipe gives its classes.
    """
    found = _with_shared_codes(found)
    every = list({one.key: one for one in _all(found)}.values())
    fitting = {one.key: _classes(one, wanted, stated) for one in every}
    telling = any(fitting.values()) or any(_telling(one) for one in every)
    if not every or not telling or {plain(name) for name in wanted[1:]} <= GENERIC:
        return None
    needless = _needless(found, fitting, wanted, mapped)
    every = [one for one in every if one.key not in needless]
    wrong = _ambiguous(every, fitting, wanted)
    others = _derived([one for one in every if not fitting[one.key]])
    names = (*wanted, *others) if any(fitting.values()) else (wanted[0], *others)
    table = {one.key: min(fitting[one.key]) if fitting[one.key] else names.index(one.own_name) for one in every}
    aliases = {word: names[table[one.key]] for one in every for word in _aliases(one)}
    notes = _with_left(_with_joined(_notes(found), found, table), found, needless)
    return Assigned(names, table, tuple(wrong), notes, aliases, _left(found, needless))


def _telling(one: Structure) -> bool:
    """Whether a structure says more of itself than that it is one."""
    named = bool(one.name) and re.fullmatch(r"(segment|label|class|structure|object|roi|mask)?\s*\d*", one.name) is None
    return (bool(one.code) and one.code not in GENERAL) or named


def _aliases(one: Structure) -> Iterator[str]:
    if one.code and not one.shared:
        yield one.code.casefold()
        yield one.code.partition(":")[2].casefold()
    yield from _words(one)


def _all(found: Found) -> Iterator[Structure]:
    return (structure for files in found.values() for held in files for structure in held)


def _derived(every: Sequence[Structure]) -> list[str]:
    """Class names of structures where nobody gave any, in order."""
    return sorted({structure.own_name for structure in every})


def _by_number(found: Found, names: Sequence[str], values: Sequence[int]) -> dict[str, str]:
    called = dict(zip(values, names, strict=False))
    return {
        word: called[structure.value]
        for structure in _all(found)
        if structure.value in called
        for word in _aliases(structure)
    }


def _contradictions(
    found: Found, names: Sequence[str], values: Sequence[int], fitting: Mapping[Key, set[int]]
) -> Iterator[errors.Fault]:
    """Numbers of ``mask_values`` that a mask gives to another class."""
    told = set()
    for structure in _all(found):
        wrong = [at for at in fitting[structure.key] if at < len(values) and values[at] != structure.value]
        if wrong and structure.value not in told:
            told.add(structure.value)
            yield (
                defect.OPTIONS.fault(
                    f"masks: {structure.shown} is {names[wrong[0]]} by its name or code, but data.options.mask_values "
                    f"give that class the number {values[wrong[0]]}; leave mask_values out"
                )
            )


def _number_faults(found: Found) -> Iterator[errors.Fault]:
    """Why a number cannot be taken for a class."""
    remedy = "give the classes their names (or codes) in data.options.class_names, then masks are read by them"
    meant: dict[int, set[Key]] = {}
    for one in _all(found):
        code_says_all = bool(one.code) and one.code not in GENERAL and not one.shared
        meant.setdefault(one.value, set()).add((one.code, "" if code_says_all else one.name))
    for value, keys in sorted(meant.items()):
        if len(keys) > 1:
            codes = sorted({code for code, _ in keys if code})
            told = f" ({', '.join(codes)})" if len(codes) > 1 else ""
            yield defect.OPTIONS.fault(f"masks: number {value} is another structure from file to file{told}; {remedy}")
    under: dict[Key, set[int]] = {}
    together: set[Key] = set()
    for files in found.values():
        for held in files:
            keys_here: dict[Key, int] = {}
            for one in held:
                under.setdefault(one.key, set()).add(one.value)
                keys_here[one.key] = keys_here.get(one.key, 0) + 1
            together |= {key for key, times in keys_here.items() if times > 1}
    for key, values in under.items():
        if len(values) > 1 and key not in together and any(key):
            listed = ", ".join(map(str, sorted(values)))
            yield defect.OPTIONS.fault(
                f"masks: one structure{f' ({key[0]})' if key[0] else ''} has the numbers {listed}; {remedy}"
            )


def _notes(found: Found) -> dict[str, tuple[str, ...]]:
    """Cases in which several objects, or two regions of one name, hold one structure."""
    made: dict[str, tuple[str, ...]] = {}
    for case, files in found.items():
        held = [key for structures in files for key in {one.key for one in structures}]
        if len(held) > len(set(held)):
            made[case] = (TWO_OBJECTS,)
        regions = [[one.key for one in structures if one.region] for structures in files]
        if any(len(keys) > len(set(keys)) for keys in regions):
            made[case] = (*made.get(case, ()), TWO_REGIONS)
    return made
