"""Writes: private files, and one remedy for each way in which an operating system refuses."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedvfm import errors
from fedvfm.storage import storage


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
    assert said.endswith("what was finished before is kept, and a run goes on with: fedvfm simulate --resume")


@pytest.mark.parametrize(("mark", "who"), [("federation.json", "a server"), ("site.json", "a client")])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO, errno.ENAMETOOLONG])
def test_in_a_state_folder_no_remedy_speaks_of_options_that_are_not_there(
    tmp_path: Path, mark: str, who: str, number: int
) -> None:
    (tmp_path / mark).touch()
    for path in (tmp_path / "run" / "one.log", tmp_path / "audit.jsonl", tmp_path):
        said = str(storage.refusal(path, OSError(number, os.strerror(number))))
        assert said.endswith(f"{who} that runs goes on by itself, any other command is given again")
        assert "--output" not in said
        assert "--resume" not in said
    assert "--output" in str(storage.refusal(tmp_path.parent / "mask.png", OSError(number, os.strerror(number))))


@pytest.mark.parametrize(("name", "who"), [("authority.key", "a server"), ("site.key", "a client")])
def test_the_first_file_of_a_state_folder(tmp_path: Path, name: str, who: str) -> None:
    said = str(storage.refusal(tmp_path / name, OSError(errno.ENOSPC, "No space left on device")))
    assert f"{who} that runs" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_state_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(errors.StorageError, match="Choose a --state that this user may write to"):
        storage.private_folder(tmp_path / "closed" / "state")


def test_a_state_folder_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.StorageError, match="Choose another --state") as caught:
        storage.private_folder(tmp_path / "file")
    assert "--output" not in str(caught.value)


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


def test_what_is_written_is_on_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file before it has its name, and its name before anybody goes on; a line before it is said to be written."""
    path, synced = tmp_path / "file", []

    def sync(handle: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(handle).st_mode), path.exists()))

    monkeypatch.setattr(os, "fsync", sync)
    storage.write_text(path, "x")
    assert synced == [(False, False), (True, True)]
    storage.append_line(path, "y")
    assert synced[2:] == [(False, True)]
    path.unlink()
    storage.append_line(path, "first of a new file")
    assert synced[3:] == [(False, True), (True, True)]


@pytest.mark.parametrize("tested", [True, False])
def test_a_fault_point_kills_under_tests_alone(tested: bool) -> None:
    """A variable in a service's environment must not be able to stop it between two writes."""
    kept = {name: value for name, value in os.environ.items() if tested or name != storage.TESTED}
    code = "from fedvfm.storage import storage; storage.fault_point('here'); print('alive')"
    environment = {**kept, "FEDVFM_FAULT_POINT": "here"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout) == ((-9, "") if tested else (0, "alive\n"))
