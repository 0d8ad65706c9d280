"""The same sources give the same wheel, whoever builds it, where and when."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("pyproject.toml", "README.md", "LICENSE", "fedvfm", "simulations/experiments")


def build(folder: Path, **environment: str) -> Path:
    """A wheel from a copy of the sources in this folder."""
    for part in PARTS:
        target = folder / "src" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, target)
    return wheel(folder, **environment)


def wheel(folder: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
    subprocess.run(
        command, cwd=folder / "src", env={**os.environ, **environment}, check=True, capture_output=True, timeout=300
    )
    (made,) = (folder / "dist").glob("*.whl")
    return made


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_two_builds_are_equal_to_the_last_byte(tmp_path: Path) -> None:
    moment = {"SOURCE_DATE_EPOCH": "1767225600"}
    first = build(tmp_path / "one", **moment, TZ="UTC")
    second_folder = tmp_path / "elsewhere" / "two"
    second = build(second_folder, **moment, TZ="Asia/Tokyo", LC_ALL="C", PYTHONHASHSEED="7")
    assert digest(first) == digest(second)
    for path in (second_folder / "src").rglob("*"):  # another time of the files, other permissions of a group
        os.utime(path, (1_000_000_000, 1_000_000_000))
        path.chmod(path.stat().st_mode & ~0o077)
    second.unlink()
    assert digest(wheel(second_folder, **moment)) == digest(first)
    changed = second_folder / "src" / "fedvfm" / "errors.py"
    changed.write_text(changed.read_text() + "# changed\n")
    second.unlink()
    assert digest(wheel(second_folder, **moment)) != digest(first), "it is the sources that are compared"
    with zipfile.ZipFile(first) as packed:
        assert {entry.date_time for entry in packed.infolist()} == {(2026, 1, 1, 0, 0, 0)}
