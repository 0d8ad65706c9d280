"""What a process may use, where control groups give less than the machine has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedvfm.runtime import capacity

MIB = 1 << 20


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_cores_without_a_control_group(eight: None, tmp_path: Path) -> None:
    assert capacity.cores(tmp_path) == 8


@pytest.mark.parametrize(("text", "number"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)])
def test_cores_of_version_2(eight: None, tmp_path: Path, text: str, number: int) -> None:
    write(tmp_path, cpu__max=text)
    assert capacity.cores(tmp_path) == number


@pytest.mark.parametrize(("quota", "number"), [("-1", 8), ("300000", 3), ("20000", 1)])
def test_cores_of_version_1(eight: None, tmp_path: Path, quota: str, number: int) -> None:
    write(tmp_path / "cpu", cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
    assert capacity.cores(tmp_path) == number


def test_memory_is_the_least_of_machine_and_control_groups(tmp_path: Path) -> None:
    whole = capacity.memory_mib(tmp_path)
    assert whole > 50
    write(tmp_path, memory__max=str(40 * MIB), memory__current=str(30 * MIB))
    assert capacity.memory_mib(tmp_path) == 10
    write(tmp_path, memory__stat=f"anon 5\ninactive_file {4 * MIB}")
    assert capacity.memory_mib(tmp_path) == 14, "the file cache is given back"
    write(tmp_path, memory__max="max")
    assert capacity.memory_mib(tmp_path) > 50
    write(tmp_path / "memory", memory__limit_in_bytes=str(20 * MIB), memory__usage_in_bytes=str(25 * MIB))
    assert capacity.memory_mib(tmp_path) == 0
