"""The Ray engine: Flower's Simulation Runtime, the way to many GPUs and machines. Needs the extra ``ray``.

Each Ray actor is a process with one frozen backbone of its own, kept between messages. The actors build their sites
from the resolved experiment: no pixels and no weights travel.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedvfm import errors
from fedvfm.client import app as client_app
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.flower import internals
from fedvfm.model import precision
from fedvfm.report import progress
from fedvfm.server import app as server_app
from fedvfm.server.rounds import federation
from fedvfm.simulation import run_folder
from fedvfm.simulation.engines import worker_schedule
from fedvfm.simulation.results import site_errors

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""No reports home; the last one is the behaviour that Ray announces as its next default."""


@dataclass(frozen=True)
class VirtualNodes:
    """The ClientApp of all virtual nodes, small enough to travel to an actor with every message.

    Attributes:
        experiment: the resolved experiment as JSON.
        run: the run folder; actors on its machine share what the frozen blocks computed.
        faults: folder in which an actor leaves a site's error, so that a simulation can show what a real coordinator
        never sees.
        ratio: what decides the precision, so that all actors compute alike; see :mod:`fedvfm.model.precision`.
    """

    experiment: str
    run: str
    faults: str
    ratio: float

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message in an actor."""
        try:
            reply: Message = _app(self)(message, context)
        except Exception as error:
            self.report(f"node {context.node_id}", error)
            raise
        return reply

    def report(self, where: str, error: Exception) -> None:
        """Leave a site's error where the driver looks for it; on another machine nobody does."""
        site_errors.leave(Path(self.faults), where, error)


@functools.lru_cache(maxsize=1)
def _app(nodes: VirtualNodes) -> ClientApp:
    """The real ClientApp of one actor: sites and models are built once a process and kept between messages."""
    import torch

    from fedvfm.simulation import experiment as experiments
    from fedvfm.simulation import run as runs

    what = schema.Experiment.model_validate_json(nodes.experiment)
    built = client_app.Models(threads=worker_schedule.threads(what))
    torch.set_num_threads(built.threads)
    precision.take(what.device, nodes.ratio)
    members = runs.members(what, experiments.hospitals(what), runs.shared_files(Path(nodes.run), what), Path(nodes.run))

    def site_of(context: Context) -> sites.Site:
        return members[int(context.node_config["partition-id"])]

    return client_app.make_client_app(site_of, built, nodes.report)


def run(
    jobs: Sequence[federation.Job],
    members: Sequence[sites.Site],
    observer: progress.Observer,
    experiment: schema.Experiment,
) -> None:
    """Run or resume every job with one virtual node a site.

    Raises:
        MissingExtra: if Ray is not installed.
        FedvfmError: what stopped the federation; where a site's own error did, that one.
    """
    if importlib.util.find_spec("ray") is None:
        raise errors.MissingExtra("engine 'ray' needs Ray. Run: pip install 'fedvfm[ray]', or use --engine in-process")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    gpus = 1.0 if experiment.device.startswith("cuda") else 0.0
    server = server_app.make_server_app(jobs, observer)
    with tempfile.TemporaryDirectory(prefix="fedvfm-ray-") as faults:
        nodes = VirtualNodes(
            experiment.model_dump_json(),
            str(run_folder.of_arm(jobs[0].folder)),
            faults,
            precision.ratio(experiment.device),
        )
        with site_errors.shown(lambda: site_errors.last(Path(faults))):
            cpus = min(worker_schedule.threads(experiment), os.cpu_count() or 1)
            internals.run_on_ray(server, nodes, len(members), cpus, gpus)
