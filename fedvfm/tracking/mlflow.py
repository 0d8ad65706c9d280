"""MLflow: a run of its own in experiment "fedvfm", at a tracking server or in a folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Mapping
from typing import Any

from fedvfm.tracking import base

EXPERIMENT = "fedvfm"
ENVIRONMENT = {
    # Nothing goes anywhere but to the server that a person named.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # A server that is away is asked again with the next round, and not for an hour.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ALLOW_FILE_STORE": "true",
}
"""Set in the tracker's process, where nobody set them."""
_REFUSED = re.compile(r"[^0-9A-Za-z_\-./ ]")


class MLflow:
    """Logs to MLflow through its client.

    Args:
        target: a tracking URI.
    """

    def __init__(self, target: str) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient(tracking_uri=target)

    def begin(self, run: base.Run, known: str) -> str:
        """See :class:`fedvfm.tracking.base.Tracker`."""
        from mlflow.entities import Param

        if known:
            self._client.update_run(known, status="RUNNING")
            return known
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        number = experiment.experiment_id if experiment is not None else self._client.create_experiment(EXPERIMENT)
        opened = self._client.create_run(number, run_name=run.name, tags={"fedvfm.run": run.place}).info.run_id
        rows = [Param(_name(key), value) for key, value in run.parameters.items()]
        try:
            for start in range(0, len(rows), 100):  # the most that MLflow takes at once
                self._client.log_batch(opened, params=rows[start : start + 100])
        except Exception:  # it is tried again with a run of its own
            with contextlib.suppress(Exception):
                self._client.delete_run(opened)
            raise
        return str(opened)

    def log(self, known: str, step: int, values: Mapping[str, float]) -> None:
        """See :class:`fedvfm.tracking.base.Tracker`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(_name(name), value, now, step) for name, value in values.items()]
        for start in range(0, len(rows), 1000):
            self._client.log_batch(known, metrics=rows[start : start + 1000])

    def end(self, known: str) -> None:
        """See :class:`fedvfm.tracking.base.Tracker`."""
        self._client.set_terminated(known, "FINISHED")

    def close(self) -> None:
        """See :class:`fedvfm.tracking.base.Tracker`."""


def _name(text: str) -> str:
    """A name as MLflow takes it. Two classes that it would write alike keep apart, in every round by the same name."""
    written = _REFUSED.sub("_", text)
    return written if written == text else f"{written}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
