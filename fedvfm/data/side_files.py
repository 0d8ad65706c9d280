"""Small text files of strangers beside the pixels, tables and JSON: regular files, of a size that such a file has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedvfm.data import defect

MOST_BYTES = 16 << 20
"""A datalist of 50,000 cases has 10 MB; parsed it takes about twenty times its size."""


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The text of a file.

    Args:
        path: the file.
        most: bytes that are read at most.

    Raises:
        DataError: for what is no regular file (a pipe never ends), is larger, or no UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise defect.UNREADABLE.error(f"{path}: a pipe, device or folder, no regular file; take it out")
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise defect.TOO_LARGE.error(f"{path}: larger than {most >> 20} MiB, which no such text is; take it out")
        return content.decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise defect.UNREADABLE.error(f"{path}: cannot be read ({reason}); give this user the right to") from None
    except UnicodeDecodeError:
        raise defect.UNREADABLE.error(f"{path}: cannot be read as UTF-8 text; save it again or take it out") from None


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: as :func:`read_text`; also for what is no JSON, or nested deeper than anybody writes it.
    """
    try:
        return json.loads(read_text(path, most))
    except (ValueError, RecursionError):
        raise defect.UNREADABLE.error(f"{path}: cannot be read as JSON; correct it or take it out") from None
