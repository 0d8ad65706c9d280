"""safetensors files of our own making: the same arrays give the same bytes, whatever library versions are installed.

A sha256 is only worth pinning if two sites that convert the same file get the same one. The library's output may change
with its version; this layout is the published format, and does not.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import safetensors

from fedvfm import errors
from fedvfm.storage import storage

SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True)
class Row:
    """One array: its name, safetensors' word for its type, its shape, its little-endian numbers in C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def write(path: Path, rows: Sequence[Row], *, mode: int = 0o600) -> None:
    """Write the arrays, larger types first, then by name; metadata says "format: pt", which transformers wants.

    Raises:
        StorageError: if the disk refuses.
    Source: the format section of safetensors' documentation (8-byte length, JSON header, data).
    """
    ordered = sorted(rows, key=lambda row: (-SIZES[row.dtype], row.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for row in ordered:
        stop = start + row.data.nbytes
        header[row.name] = {"dtype": row.dtype, "shape": list(row.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def put(file: IO[bytes]) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for row in ordered:
            file.write(row.data)

    storage.write_file(path, put, mode=mode)


def mark(path: Path, metadata: Mapping[str, str]) -> None:
    """Put other metadata into a file, whose arrays stay as they are.

    Raises:
        StorageError: if the disk refuses.
    """
    with path.open("rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        header: dict[str, object] = json.loads(source.read(length)) | {"__metadata__": dict(metadata)}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)

        def put(file: IO[bytes]) -> None:
            file.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(source, file, 1 << 20)

        storage.write_file(path, put)


@contextlib.contextmanager
def guard(place: Path) -> Iterator[None]:
    """Say what helps where weights cannot be written: another cache folder.

    Raises:
        StorageError: in place of what the operating system, or a write below, said.
    """
    try:
        yield
    except (OSError, errors.StorageError) as error:
        cause = error.__cause__ if isinstance(error, errors.StorageError) else error
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error)
        raise errors.StorageError(
            f"cannot write weights to {place}: {reason}. Free space there, or set FEDVFM_CACHE to a folder on another "
            "disk"
        ) from None


def names(path: Path) -> list[str]:
    """Names of the arrays in a file; reads the header only, but finds a file that was cut short.

    Raises:
        WeightsError: if it is no whole safetensors file.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return sorted(file.keys())
    except (OSError, safetensors.SafetensorError) as error:
        raise errors.WeightsError(
            f"{path}: is no whole safetensors file ({type(error).__name__}): cut short or damaged. Copy or download it "
            "again"
        ) from None
