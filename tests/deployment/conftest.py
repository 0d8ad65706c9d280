"""The tiny experiment of the command line's tests, for federations of real processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cli import conftest as cli
from tests.deployment import two_hospitals
from tests.support import forks


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, template: forks.Template) -> Any:
    return cli.write(tmp_path_factory.mktemp("tiny"), template)


def ours(folder: Path) -> dict[int, list[str]]:
    """Processes that name a folder in their arguments, or work for one that does."""
    found = {}
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(folder) in word for word in words):
            found[process.pid] = words
    return found


def until(true: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(name="ours")
def ours_fixture() -> Any:
    return ours


@pytest.fixture(name="until")
def until_fixture() -> Any:
    return until


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """No process that works below this test's folder outlives it."""
    yield
    left = until(lambda: not ours(tmp_path), two_hospitals.END_S)
    for pid in ours(tmp_path):
        psutil.Process(pid).kill()
    assert left
