"""``--track KIND:TARGET``: what a person asks for, checked before anything begins; a tracker's process is told it.

An address with a name or a password in it is refused: every user of a machine can read the arguments of its processes.
A tracker's own client takes both from the environment (:data:`LOGINS`).

Trackers are looked up in :data:`TRACKERS`; a further one is a class with the four methods of
:class:`fedvfm.tracking.base.Tracker` and an entry point of group ``fedvfm.tracker``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedvfm import errors, registry
from fedvfm.tracking import base

TRACKERS = registry.Table(
    "tracker",
    {
        "tensorboard": "fedvfm.tracking.tensorboard:TensorBoard",
        "mlflow": "fedvfm.tracking.mlflow:MLflow",
        "wandb": "fedvfm.tracking.wandb:WeightsAndBiases",
    },
)
EXTRAS = {"tensorboard": "tensorboard", "mlflow": "mlflow-skinny", "wandb": "wandb"}
"""Import name, which is the extra's too -> the package that brings it."""
_WHERE = {"tensorboard": "a folder", "mlflow": "a tracking URI, or a folder", "wandb": "a project"}
LOGINS = {
    "mlflow": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; for a data base what "
    "its own client reads, as PGPASSWORD",
    "wandb": "WANDB_API_KEY for 'wandb sync'; here only files are written",
}
"""Tracker -> the environment variables that its client reads a login from."""
_LOGIN = re.compile(r"//[^/\s]*@")
_WEB = re.compile(r"(?i)^https?://[^/\s]*@")
_PASSWORD = re.compile(r"//[^/\s@]*:[^/\s]*@")
_QUERY = re.compile(r"(?i)([?&;](?:\w*pass\w*|pwd|\w*token|\w*secret|api_?key|odbc_connect)=)[^&\s]+")
"""What data bases take behind the address, as ``?user=me&password=...``."""


@dataclass(frozen=True)
class Target:
    """One tracker that was asked for.

    Attributes:
        kind: its name in :data:`TRACKERS`.
        where: what it is told; what another program put there is shown without a login all the same.
    """

    kind: str
    where: str

    @property
    def shown(self) -> str:
        """For people and logs."""
        return f"{self.kind}:{without_login(self.where)}"

    @property
    def mark(self) -> str:
        """A short name that is its own."""
        return f"{self.kind}-{hashlib.sha256(self.where.encode()).hexdigest()[:8]}"

    def open(self) -> base.Tracker:
        """The tracker itself."""
        tracker: base.Tracker = TRACKERS.get(self.kind)(self.where)
        return tracker


def without_login(text: str) -> str:
    """A text whose addresses hold no name and password."""
    return _QUERY.sub(r"\1...", _LOGIN.sub("//", text))


def _has_login(where: str) -> bool:
    """Whether an address holds a password; in one of the web a name alone may be a token, and is no less a secret."""
    return any(form.search(where) is not None for form in (_WEB, _PASSWORD, _QUERY))


def parse(words: Sequence[str]) -> list[Target]:
    """The trackers that were asked for.

    Raises:
        ConfigError: with all faults at once.
        MissingExtra: if a tracker's package is not installed.
    """
    targets, faults = [], []
    for word in words:
        kind, _, where = word.partition(":")
        if kind not in TRACKERS:
            known = ", ".join(TRACKERS)
            faults.append(
                f"--track {without_login(word)[:80]}: known are {known}{registry.nearest(kind, list(TRACKERS))}"
            )
        elif not where:
            faults.append(f"--track {kind}: name {_WHERE.get(kind, 'where to')} after a colon: --track {kind}:...")
        elif kind != "tensorboard" and _has_login(where):
            faults.append(
                f"--track {kind}:{without_login(where)[:200]}: the address had a name or a password in it, and every "
                "user of this machine can read a command line. Leave it out, change that password, and set in the "
                f"environment {LOGINS.get(kind, 'what the client of this tracker reads')}"
            )
        else:
            targets.append(Target(kind, _absolute(kind, where)))
    if faults:
        raise errors.ConfigError("--track", faults)
    for target in targets:
        package = EXTRAS.get(target.kind)
        if package is not None and importlib.util.find_spec(target.kind) is None:
            raise errors.MissingExtra(
                f"--track {target.kind} needs {package}, which is not installed here. Run: pip install "
                f'"fedvfm[{target.kind}]"'
            )
    return list(dict.fromkeys(targets))


def _absolute(kind: str, where: str) -> str:
    """A folder as an absolute path: the tracker's process may work elsewhere."""
    if kind == "tensorboard" or (kind == "mlflow" and ":" not in where and where != "databricks"):
        return str(Path(where).expanduser().absolute())
    return where
