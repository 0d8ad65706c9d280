"""What is installed apart: a command that lacks it says which package and how to install it, and begins nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.cli import audit
from fedvfm.runtime import extras

FIND = importlib.util.find_spec


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else FIND(name))


def test_here_everything_is_installed() -> None:
    extras.require()


@pytest.mark.parametrize("name", extras.CLIENT)
def test_each_package_is_missed_by_its_own_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, name)
    with pytest.raises(errors.MissingExtra, match=rf'needs {extras.CLIENT[name]}, .* pip install "fedvfm\[client\]"'):
        extras.require()


def test_only_a_part_of_ours_is_called_missing() -> None:
    found = extras.missing(ModuleNotFoundError(name="torch.nn.functional"))
    assert isinstance(found, errors.MissingExtra)
    for name in ("fedvfm.nowhere", "numpy", None):
        assert extras.missing(ModuleNotFoundError(name=name)) is None


@pytest.mark.parametrize(
    "words",
    [
        ("simulate", "brain-mri"),
        ("simulate", "brain-mri", "--dry-run"),
        ("simulate", "--resume", "run"),
        ("predict", "adapter", "images", "-o", "masks"),
        ("export", "adapter", "-o", "merged"),
        ("data", "check", "site.toml"),
        ("client", "rehearse", "site.toml"),
        ("client", "start", "site.toml"),
    ],
)
def test_what_begins_work_asks_first(
    cli: Any, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "torch")
    monkeypatch.chdir(tmp_path)
    answer = cli(*words)
    assert (answer.code, answer.out) == (errors.MissingExtra.exit_code, "")
    assert answer.err.startswith("MissingExtra: this command needs torch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "code"), [("nibabel.nifti1", errors.MissingExtra.exit_code), ("something", None)])
def test_an_import_that_fails_anywhere_is_said_the_same_way(
    cli: Any, name: str, code: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path) -> Path:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(audit, "_log", fails)
    if code is None:
        with pytest.raises(ModuleNotFoundError):
            cli("audit", "show", "x")
        return
    answer = cli("audit", "show", "x")
    assert (answer.code, "needs nibabel" in answer.err) == (code, True)
