"""Where results go: a folder that is free, and exports that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fedvfm import errors
from fedvfm.storage import storage


def require_free(folder: Path) -> None:
    """Refuse an output folder that is a file or holds anything.

    Raises:
        OutputInUse: saying which.
    """
    if folder.exists() and not folder.is_dir():
        raise errors.OutputInUse(f"output folder {folder} is a file. Choose another --output")
    if folder.is_dir() and not all(storage.is_part(path) for path in folder.iterdir()):
        raise errors.OutputInUse(f"output folder {folder} is not empty. Choose another --output")


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` when the block ends well, and is removed when it does not.

    Every file in it becomes its owner's alone, whoever wrote it.

    Raises:
        OutputInUse: if the folder is not free.
        StorageError: if the disk refuses.
    """
    require_free(folder)
    with storage.guard(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=storage.PART, dir=folder.parent))
    try:
        yield made
        with storage.guard(folder):
            for path in made.rglob("*"):
                path.chmod(0o700 if path.is_dir() else 0o600)
            if folder.is_dir():
                storage.sweep(folder)
                folder.rmdir()
            os.replace(made, folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
