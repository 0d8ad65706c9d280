"""What the numbers of a NIfTI mask stand for, in a file beside it: dcmqi's JSON, or a BIDS table.

Sources: dcmqi, "Meta information schema" (segmentAttributes: labelID, SegmentedPropertyTypeCodeSequence);
    BIDS 1.10, "Common image-derived labels" (``*_dseg.tsv``: index, name).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedvfm.data import defect, side_files, structures

ENDINGS = (".nii.gz", ".nii", ".nrrd")
MOST_BYTES = 1 << 20
MOST_NUMBER = (1 << 31) - 1


def beside(mask: Path) -> tuple[structures.Structure, ...]:
    """The structures of a mask by the file of its name beside it, or for BIDS by the nearest table above; none without.

    Raises:
        DataError: if that file cannot be read as what it should be.
    """
    stem = next((mask.name[: -len(end)] for end in ENDINGS if mask.name.lower().endswith(end)), mask.stem)
    for name in (f"{stem}.json", f"{stem}-meta.json"):
        told = _dcmqi(mask.parent / name) if (mask.parent / name).exists() else ()
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


def _dcmqi(path: Path) -> tuple[structures.Structure, ...]:
    content = side_files.read_json(path, MOST_BYTES)
    groups = content.get("segmentAttributes") if isinstance(content, dict) else None
    if not isinstance(groups, list):
        return ()
    try:
        return tuple(_segment(one) for group in groups for one in (group if isinstance(group, list) else [group]))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise defect.TABLE.error(f"{path}: segmentAttributes without labelID; correct it as dcmqi writes it") from None


def _segment(one: Mapping[str, Any]) -> structures.Structure:
    kind, meaning = _code(one.get("SegmentedPropertyTypeCodeSequence"))
    modifier, side = _code(one.get("SegmentedPropertyTypeModifierCodeSequence"))
    words = {structures.plain(text) for text in (f"{side} {meaning}", f"{meaning} {side}")} - {""}
    name = structures.plain(str(one.get("SegmentLabel") or one.get("SegmentDescription") or ""))
    region, where = (_code(one.get(f"AnatomicRegion{part}Sequence"))[0] for part in ("", "Modifier"))
    code = structures.qualified(kind, modifier, region, where)
    return structures.Structure(_number(one["labelID"]), code, name, tuple(sorted(words)))


def _number(given: Any) -> int:
    """A value that a mask can have.

    Raises:
        ValueError, TypeError, OverflowError: for any other.
    """
    number = int(given)
    if abs(number) > MOST_NUMBER:
        raise OverflowError
    return number


def _code(given: Any) -> tuple[str, str]:
    one = given[0] if isinstance(given, list) and given else given
    if not isinstance(one, Mapping):
        return "", ""
    scheme, value = str(one.get("CodingSchemeDesignator", "")), str(one.get("CodeValue", ""))
    return structures.code_of(scheme, value), str(one.get("CodeMeaning", ""))


def _bids(path: Path) -> tuple[structures.Structure, ...]:
    try:
        rows = csv.DictReader(side_files.read_text(path, MOST_BYTES).splitlines(), delimiter="\t")
        return tuple(
            structures.Structure(
                _number(row["index"]), "", structures.plain(row["name"]), listed=row["name"].strip() not in ("", "n/a")
            )
            for row in rows
            if row["index"] != "0"
        )
    except (KeyError, TypeError, ValueError, OverflowError, csv.Error):
        raise defect.TABLE.error(f"{path}: needs the columns index and name; correct it as BIDS asks") from None
