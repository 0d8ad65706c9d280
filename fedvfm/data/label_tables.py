"""What the numbers of a NIfTI mask stand for, in a file beside it: dcmqi's JSON, or a BIDS table.

Sources: dcmqi, "Meta information schema" (segmentAttributes: labelID, SegmentedPropertyTypeCodeSequence);
    BIDS 1.10, "Common image-derived labels" (``*_dseg.tsv``: index, name).
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedvfm.data import defect, structures

ENDINGS = (".nii.gz", ".nii", ".nrrd")
MOST_BYTES = 1 << 20


def beside(mask: Path) -> tuple[structures.Structure, ...]:
    """The structures of a mask by the file of its name beside it, or for BIDS by the nearest table above; none without.

    Raises:
        DataError: if that file cannot be read as what it should be.
    """
    stem = next((mask.name[: -len(end)] for end in ENDINGS if mask.name.lower().endswith(end)), mask.stem)
    for name in (f"{stem}.json", f"{stem}-meta.json"):
        told = _dcmqi(mask.parent / name) if (mask.parent / name).is_file() else ()
        if told:
            return told
    for table in _tables(mask.parent, stem):
        return _bids(table)
    # One mask a structure, named in the file's name (BIDS 1.10, entity "label"): drawn as 1.
    labelled = re.fullmatch(r"sub-.*_label-([^_]+)(?:_.*)?_mask", stem)
    return (structures.Structure(1, "", structures.plain(labelled[1])),) if labelled else ()


def _tables(folder: Path, stem: str) -> Iterator[Path]:
    """BIDS tables for a mask: of its own name, else (inheritance) one whose entities all are its own, nearest first."""
    parts = stem.split("_")
    if parts[-1] not in ("dseg", "mask") or not stem.startswith("sub-"):
        return
    for here in (folder, *folder.parents):
        fitting = [path for path in sorted(here.glob(f"*{parts[-1]}.tsv")) if set(path.stem.split("_")) <= set(parts)]
        yield from sorted(fitting, key=lambda path: -len(path.stem.split("_")))
        if here.name == "derivatives" or (here / "dataset_description.json").is_file():
            return


def _text(path: Path) -> str:
    if path.stat().st_size > MOST_BYTES:
        raise defect.TOO_LARGE.error(f"{path}: larger than a table of labels can be; take it out")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise defect.UNREADABLE.error(f"{path}: cannot be read as UTF-8 text; save it again or take it out") from None


def _dcmqi(path: Path) -> tuple[structures.Structure, ...]:
    try:
        content = json.loads(_text(path))
    except ValueError:
        raise defect.UNREADABLE.error(f"{path}: cannot be read as JSON; correct it or take it out") from None
    groups = content.get("segmentAttributes") if isinstance(content, dict) else None
    if not isinstance(groups, list):
        return ()
    try:
        return tuple(_segment(one) for group in groups for one in (group if isinstance(group, list) else [group]))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise defect.TABLE.error(f"{path}: segmentAttributes without labelID; correct it as dcmqi writes it") from None


def _segment(one: Mapping[str, Any]) -> structures.Structure:
    kind, meaning = _code(one.get("SegmentedPropertyTypeCodeSequence"))
    modifier, side = _code(one.get("SegmentedPropertyTypeModifierCodeSequence"))
    words = {structures.plain(text) for text in (f"{side} {meaning}", f"{meaning} {side}")} - {""}
    name = structures.plain(str(one.get("SegmentLabel") or one.get("SegmentDescription") or ""))
    region, where = (_code(one.get(f"AnatomicRegion{part}Sequence"))[0] for part in ("", "Modifier"))
    code = structures.qualified(kind, modifier, region, where)
    return structures.Structure(int(one["labelID"]), code, name, tuple(sorted(words)))


def _code(given: Any) -> tuple[str, str]:
    one = given[0] if isinstance(given, list) and given else given
    if not isinstance(one, Mapping):
        return "", ""
    scheme, value = str(one.get("CodingSchemeDesignator", "")), str(one.get("CodeValue", ""))
    return structures.code_of(scheme, value), str(one.get("CodeMeaning", ""))


def _bids(path: Path) -> tuple[structures.Structure, ...]:
    rows = list(csv.DictReader(_text(path).splitlines(), delimiter="\t"))
    try:
        return tuple(
            structures.Structure(int(row["index"]), "", structures.plain(row["name"]))
            for row in rows
            if row["index"] != "0"
        )
    except (KeyError, TypeError, ValueError):
        raise defect.TABLE.error(f"{path}: needs the columns index and name; correct it as BIDS asks") from None
