"""Weights & Biases, offline: files in ``wandb/`` of the run's folder, which a person sends with ``wandb sync``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from fedvfm.tracking import base

ENVIRONMENT = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
"""Set in the tracker's process, whatever stood there: nothing leaves this machine by itself."""


class WeightsAndBiases:
    """Writes offline runs.

    Args:
        target: the project's name.
    """

    def __init__(self, target: str) -> None:
        os.environ.update(ENVIRONMENT)
        self._project = target
        self._runs: dict[str, Any] = {}

    def begin(self, run: base.Run, known: str) -> str:
        """See :class:`fedvfm.tracking.base.Tracker`."""
        import wandb

        number = known or hashlib.sha256(f"{run.folder}".encode()).hexdigest()[:16]
        settings = wandb.Settings(
            mode="offline",
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
        )
        self._runs[number] = wandb.init(
            project=self._project,
            id=number,
            name=run.name,
            dir=str(run.folder),
            config=dict(run.parameters),
            settings=settings,
            reinit="create_new",
        )
        return number

    def log(self, known: str, step: int, values: Mapping[str, float]) -> None:
        """See :class:`fedvfm.tracking.base.Tracker`."""
        self._runs[known].log(dict(values), step=step)

    def end(self, known: str) -> None:
        """See :class:`fedvfm.tracking.base.Tracker`."""
        self._runs.pop(known).finish()

    def close(self) -> None:
        """See :class:`fedvfm.tracking.base.Tracker`."""
        for number in list(self._runs):
            self.end(number)
