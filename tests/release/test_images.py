"""Base images by digest: the script writes what a registry says, and nothing that is no digest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "security" / "pin_images.py"
DIGESTS = {"python": "sha256:" + "a1" * 32, "debian": "sha256:" + "b2" * 32}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = []
    for end in ("server", "client"):
        (tmp_path / end).mkdir()
        made.append(Path(shutil.copy(ROOT / end / "Dockerfile", tmp_path / end)))
    return made


def run(tmp_path: Path, answer: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """With a ``docker`` on the path that answers so; the registry is no part of what is tested."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "docker").write_text(f'#!/bin/sh\nfor last; do :; done\necho "$*" >> {tmp_path}/asked\n{answer}\n')
    (folder / "docker").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:/usr/bin:/bin"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


ANSWER = f'case "$last" in python:*) echo {DIGESTS["python"]};; debian:*) echo {DIGESTS["debian"]};; esac'


def test_digests_are_written_for_every_stage(tmp_path: Path, files: list[Path]) -> None:
    before = [path.read_text() for path in files]
    assert run(tmp_path, "exit 1", "--check", *files).returncode == 1
    done = run(tmp_path, ANSWER, *files)
    assert done.returncode == 0, done.stderr
    server, client = (path.read_text() for path in files)
    assert server.count(f'ARG PYTHON_DIGEST="@{DIGESTS["python"]}"') == 1
    assert server.count(f'ARG DEBIAN_DIGEST="@{DIGESTS["debian"]}"') == 1
    assert client.count(f'ARG PYTHON_DIGEST="@{DIGESTS["python"]}"') == 1
    for text in (server, client):
        bases = [line.split()[1] for line in text.splitlines() if line.startswith("FROM ")]
        assert all(base.endswith("_DIGEST}") for base in bases)
    assert run(tmp_path, "exit 1", "--check", *files).returncode == 0
    assert [path.read_text().count("\n") for path in files] == [text.count("\n") for text in before]
    asked = (tmp_path / "asked").read_text()
    assert sorted({line.split()[-1].split(":")[0] for line in asked.splitlines()}) == ["debian", "python"]


@pytest.mark.parametrize("answer", ["exit 1", "echo latest", "echo sha256:12", "true"])
def test_what_is_no_digest_changes_nothing(tmp_path: Path, files: list[Path], answer: str) -> None:
    before = [path.read_text() for path in files]
    done = run(tmp_path, answer, *files)
    assert done.returncode == 2
    assert done.stderr.startswith("nothing was changed: ")
    assert "Traceback" not in done.stderr
    assert [path.read_text() for path in files] == before
