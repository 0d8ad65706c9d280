"""The Ray engine: Flower's Simulation Runtime, the way to many GPUs and machines. Needs the extra ``ray``.

Each Ray actor is a process with one frozen backbone of its own, kept between messages. The actors build their sites from the
resolved experiment: no pixels and no weights travel.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

from fedvfm import config as configs
from fedvfm import errors, flower, progress
from fedvfm.client import app as client_app
from fedvfm.client import site as sites
from fedvfm.server import app as server_app
from fedvfm.server import strategy

with flower.warnings.catch_warnings():
    flower.warnings.simplefilter("ignore", DeprecationWarning)
    from flwr.app import Context
    from flwr.clientapp import ClientApp


@functools.lru_cache(maxsize=1)
def _members(experiment_json: str) -> list[sites.Site]:
    """The sites as one actor sees them; built once a process."""
    import torch

    from fedvfm.simulation import experiment as experiments
    from fedvfm.simulation import run as runs

    what = configs.Experiment.model_validate_json(experiment_json)
    torch.set_num_threads(what.recipe.threads)
    return runs.members(what, experiments.hospitals(what))


@functools.lru_cache(maxsize=1)
def _models() -> client_app.Models:
    """The models of one actor; kept between messages."""
    return client_app.Models()


def run(
    jobs: Sequence[strategy.Job], members: Sequence[sites.Site], observer: progress.Observer, experiment: configs.Experiment
) -> None:
    """Run or resume every job with one virtual node a site.

    Raises:
        MissingExtra: if Ray is not installed.
        FedvfmError: what stopped the federation.
    """
    if importlib.util.find_spec("ray") is None:
        raise errors.MissingExtra("engine 'ray' needs Ray. Run: pip install 'fedvfm[ray]', or use --engine in-process")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    text = experiment.model_dump_json()

    def site_of(context: Context) -> sites.Site:
        return _members(text)[int(context.node_config["partition-id"])]

    def make() -> ClientApp:
        return client_app.make_client_app(site_of, _models())

    gpus = 1.0 if experiment.device.startswith("cuda") else 0.0
    server = server_app.make_server_app(jobs, observer)
    flower.run_on_ray(server, make, len(members), min(experiment.recipe.threads, os.cpu_count() or 1), gpus)
