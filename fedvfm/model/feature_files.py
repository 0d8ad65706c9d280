"""Files of features: what the frozen blocks computed of an image, in a private folder that several processes share.

Nobody waits for anybody to read: a file appears whole (atomic rename) under the digest of what it was computed from,
and carries a checksum of its own. One that is damaged or cut is removed and computed anew. Files are read, not mapped:
pages of the operating system's file cache are shared by all processes either way, and a mapping of a file that a
failing disk cannot give would end the process.

Features of patients' images are as sensitive as the images: the folder is 0700, files are 0600, and both are removed
when the run ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from fedvfm import errors
from fedvfm.storage import storage

RESERVE = 1 << 30
"""Bytes of the disk that are left free: checkpoints and logs need room more than features do."""

SUFFIX = ".features"
_COUNTER = ".bytes"
_CHECKSUM = hashlib.sha256().digest_size


class FeatureFiles:
    """Named tensors in files, bounded in bytes over all processes that write there.

    Args:
        folder: where; :meth:`prepare` makes it. Where it is not (another machine), nothing is kept or found.
        limit: bytes of all files together.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self._limit = folder, limit
        self._open = limit > 0

    def prepare(self) -> None:
        """Make the folder, or take what an earlier process left in it; before others write there.

        Raises:
            StorageError: if it cannot be made.
        """
        storage.make_private(self.folder)
        storage.sweep(self.folder)
        with storage.guard(self.folder), self._counter() as counter:
            _set(counter, sum(path.stat().st_size for path in self.folder.glob(f"*{SUFFIX}")))

    def read(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a name, or None where there are none that can be trusted."""
        path = self._path(name)
        try:
            with path.open("rb") as file:
                checksum, content = file.read(_CHECKSUM), file.read()
        except OSError:
            return None
        if checksum == _checksum(name, content):
            with contextlib.suppress(safetensors.SafetensorError):
                return safetensors.torch.load(content)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return None

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> bool:
        """Keep tensors under a name; whether they are kept. A full or failing disk ends it, and never the run.

        There is no fsync: what a power cut leaves is told from its checksum.
        """
        if not self._open:
            return False
        path = self._path(name)
        if path.exists():  # another process came first
            return True
        content = safetensors.torch.save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
        need = _CHECKSUM + len(content)
        try:
            if not self._reserve(need):
                return False
            _write(path, _checksum(name, content), content)
        except OSError:
            self._open = False
            return False
        return True

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def _reserve(self, need: int) -> bool:
        """Count bytes in before they are written, so that several processes together stay below the limit."""
        if shutil.disk_usage(self.folder).free - need < RESERVE:
            return False
        with self._counter() as counter:
            used = int.from_bytes(os.pread(counter, 8, 0), "little")
            if used + need > self._limit:
                return False
            _set(counter, used + need)
        return True

    @contextlib.contextmanager
    def _counter(self) -> Iterator[int]:
        handle = os.open(self.folder / _COUNTER, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)


@contextlib.contextmanager
def of_run(folder: Path, limit: int) -> Iterator[FeatureFiles | None]:
    """Files for the time of a run, None for a limit of 0: removed once it is finished, left for a resume where not.

    Raises:
        StorageError: if the folder cannot be made or removed.
    """
    if limit:
        files = FeatureFiles(folder, limit)
        files.prepare()
        yield files
    else:
        yield None
    storage.remove_folder(folder)


def of_recipe(folder: Path, recipe: str, limit: int) -> FeatureFiles | None:
    """Files for a recipe at a site, None for a limit of 0 or where the disk gives none; those of others are removed.

    Args:
        folder: of the features of all recipes.
        recipe: its hash.
        limit: bytes.
    """
    for other in folder.glob("*"):
        if other.name != recipe or not limit:
            storage.remove_folder(other)
    if not limit:
        return None
    files = FeatureFiles(folder / recipe, limit)
    try:
        storage.make_private(folder)
        files.prepare()
    except errors.StorageError:
        return None
    return files


def _set(counter: int, used: int) -> None:
    os.pwrite(counter, used.to_bytes(8, "little"), 0)


def _checksum(name: str, content: bytes) -> bytes:
    """Of name and content: a file under another one's name is damaged too."""
    made = hashlib.sha256(name.encode())
    made.update(content)
    return made.digest()


def _write(path: Path, *parts: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=storage.PART, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(parts)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
