"""Writes: private files, and one remedy for each way in which an operating system refuses."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fedvfm import errors, storage


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Free space"),
        (errno.EDQUOT, "raise the quota"),
        (errno.EFBIG, "Free space"),
        (errno.EACCES, "this user may write to"),
        (errno.EROFS, "this user may write to"),
        (errno.EIO, "is failing"),
        (errno.ENAMETOOLONG, "Choose another --output"),
    ],
)
def test_one_remedy_a_kind_of_refusal(number: int, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(errors.StorageError) as caught, storage.guard(tmp_path / "file"):
        raise OSError(number, os.strerror(number))
    said = str(caught.value)
    assert said.startswith(f"cannot write {tmp_path / 'file'}: {os.strerror(number)}. ")
    assert remedy in said
    assert ("Free space" in said) == (number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    assert said.endswith("what was finished before is kept, go on with --resume")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(
        errors.StorageError, match=r"Permission denied\. Choose an --output that this user may write to"
    ):
        storage.write_text(tmp_path / "closed" / "file", "x")


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(errors.StorageError, match=r"name too long\. Choose another --output"):
        storage.write_text(tmp_path / ("x" * 300), "x")


def test_files_are_private(tmp_path: Path) -> None:
    storage.write_text(tmp_path / "a" / "whole", "x")
    storage.append_line(tmp_path / "a" / "lines", "x")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {0o600}
