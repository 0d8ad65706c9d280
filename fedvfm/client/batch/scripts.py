"""The scripts that run a job on a compute node: the templates of the package, filled in for a site."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import sys
from importlib import resources
from pathlib import Path

from fedvfm import errors
from fedvfm.backbones import weights
from fedvfm.config import schema

SLURM, APPTAINER, DEFINITION = "fedvfm.sbatch", "fedvfm-apptainer.sbatch", "fedvfm.def"
_LEFT = re.compile(r"@[A-Z]+@")


def slurm(site: schema.SiteConfig, image: Path | None = None, *, require_no_network: bool = False) -> str:
    """The batch script of a site.

    Args:
        site: its file.
        image: an Apptainer image; None runs the Python that this is, which compute nodes must see too.
        require_no_network: whether a node that lets no user make a network namespace computes nothing.

    Raises:
        ConfigError: if the file has no [batch], or a path holds what no script can.
    """
    if site.batch is None:
        raise errors.ConfigError("site", ["[batch] is not given; docs/sites-it.md says how"])
    gpu = site.device not in ("cpu", "mps")
    spool, cache = Path(site.batch.spool), weights.cache().absolute()
    reads = [*([] if site.data.path is None else [Path(site.data.path)]), *map(Path, site.data.roots), cache]
    values = {
        "LOGS": _plain(spool / "logs"),
        "GPU": "" if gpu else "#",
        "CACHE": _word(cache),
        "NETWORK": "required" if require_no_network else "wanted",
        "PYTHON": shlex.quote(sys.executable),
        "NV": "--nv" if gpu else "",
        "SPOOL": _word(spool),
        "BINDS": " ".join(f"--bind {_word(path)}:{_word(path)}:ro" for path in dict.fromkeys(reads)),
        "IMAGE": "" if image is None else _word(image.absolute()),
    }
    return _filled(SLURM if image is None else APPTAINER, values)


def definition() -> str:
    """The definition file of an Apptainer image of this release."""
    return _filled(DEFINITION, {"VERSION": importlib.metadata.version("fedvfm")})


def _filled(name: str, values: dict[str, str]) -> str:
    text = resources.files("fedvfm.templates").joinpath(name).read_text(encoding="utf-8")
    return _LEFT.sub(lambda mark: values[mark[0].strip("@")], text)


def _plain(path: Path) -> str:
    """A path as a comment of Slurm holds it: nothing is quoted there.

    Raises:
        ConfigError: for one with spaces, percent signs and the like.
    """
    if re.fullmatch(r"[A-Za-z0-9/._+-]+", str(path)) is None:
        raise errors.ConfigError("batch.spool", [f"'{path}': letters, digits and . _ + - alone can stand there"])
    return str(path)


def _word(path: Path) -> str:
    """A path as a word of a script, and of a bind, which parts at colons and commas.

    Raises:
        ConfigError: if it cannot be one.
    """
    if not str(path).isprintable() or set(str(path)) & {":", ","}:
        raise errors.ConfigError(
            "batch", [f"'{path}': a path with a colon, comma or control character cannot be bound"]
        )
    return shlex.quote(str(path))
