"""Codes of errors: each class has its own, those that share an exit code agree on a restart, and the page is true."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.runtime import processes

ROOT = Path(__file__).parents[1]


@pytest.fixture
def page() -> Any:
    spec = importlib.util.spec_from_file_location("make_errors", ROOT / "docs" / "make_errors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_class_has_a_code_of_its_own() -> None:
    kinds = [kind for kind in errors.tree() if kind.__module__ == errors.__name__]
    assert len({kind.code for kind in kinds}) == len(kinds) > 20
    assert all("code" in vars(kind) for kind in kinds)


def test_an_exit_code_says_whether_a_restart_helps() -> None:
    by_exit = defaultdict(set)
    for kind in errors.tree():
        by_exit[kind.exit_code].add(kind.restart)
    assert {len(answers) for answers in by_exit.values()} == {1}
    again = sorted(code for code, answers in by_exit.items() if answers == {True})
    assert again == [1, 7, 11, 130], "unknown, a full disk, an engine, a person who stopped it"
    assert set(errors.LASTING) == {errors.NOT_READY, *by_exit} - set(again)


def test_the_page_is_what_the_code_says(page: Any) -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.text(), "run: python docs/make_errors.py"


def test_what_another_process_wrote_is_not_this_one_s_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = processes.error_path(tmp_path, "server")
    monkeypatch.setenv(processes.ERROR_FILE, str(path))
    processes.write_failure(errors.StorageError("the disk is full"))
    failure = processes.read_failure(path, processes.own_pid(), errors.StorageError.exit_code)
    assert (failure.code, failure.text) == ("storage", "the disk is full")
    assert failure.error("the run").exit_code == errors.StorageError.exit_code
    for pid, code in ((processes.own_pid() + 1, 7), (processes.own_pid(), 2)):
        assert processes.read_failure(path, pid, code).text == f"it ended with exit code {code} and left no error"
    path.write_text("{")
    assert processes.read_failure(path, processes.own_pid(), 7).code == "error"
    killed = processes.read_failure(path, 1, -9).error("the run")
    assert (str(killed), killed.exit_code) == ("the run: it ended with SIGKILL and left no error", 11)
