"""How many workers compute, and whose turn it is.

Arms are independent, and so are the sites of a round; the rounds of an arm are not. So what goes first is the arm with
most work still to be done one piece after another: pooled, whose only site holds all images, goes on from beginning to
end beside the others.

Source: longest path first; Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM J. Appl. Math. 17(2), 1969.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.model import adapted_model, memory
from fedvfm.protocol import protocol
from fedvfm.runtime import capacity
from fedvfm.server.rounds import federation

OWN_MIB = 200.0
"""What a further worker takes beside the activations of a step: pages that Python and torch write to."""

MOST_THREADS = 4


class Schedule:
    """The order of a run's messages.

    Args:
        jobs: the arms.
        members: the sites.
    """

    def __init__(self, jobs: Sequence[federation.Job], members: Sequence[sites.Site]) -> None:
        self._examples = {site.name: float(max(1, len(site.split("train")))) for site in members}
        self._places = {job.name: float(place) for place, job in enumerate(jobs)}
        self.jobs = sorted(jobs, key=lambda job: self._left(job, job.rounds))

    def _left(self, job: federation.Job, rounds: int) -> tuple[float, float]:
        """Training that is left: at the site with most images, and at all of them; negative, so that most goes first.

        Units: images, each as often as it is trained on.
        """
        costs = [self._examples[name] * job.locked.recipe.optimiser.local_epochs for name in job.train_sites]
        return -max(costs) * rounds, -sum(costs) * rounds

    def rank(self, job: federation.Job, number: int, site: str, kind: str) -> tuple[float, ...]:
        """Of messages the one of least rank goes first.

        Args:
            job: whose message it is.
            number: of the round.
            site: that is asked.
            kind: of message.
        """
        left = job.rounds - number + (kind == protocol.TRAIN)
        return (*self._left(job, left), self._places[job.name], -self._examples[site])


def threads(what: schema.Experiment) -> int:
    """How many CPU threads a site of a simulation computes with.

    As many as the experiment or its recipe says; else one where workers can be forked, because workers gain more of
    further cores than threads do, and results are then equal to the last bit on any number of cores; else up to four.
    """
    stated = what.threads or what.recipe.threads
    if stated:
        return stated
    return 1 if can_fork() and what.device == "cpu" else min(MOST_THREADS, capacity.cores())


def can_fork() -> bool:
    """Whether a process that holds torch may be forked safely: on Linux; Apple's own libraries do not allow it."""
    return sys.platform == "linux"


def side_by_side(jobs: Sequence[federation.Job]) -> int:
    """How many messages of these arms may be answered at a time."""
    return sum(at_a_time(len(job.train_sites), job.server) for job in jobs)


def at_a_time(sites: int, server: schema.ServerConfig) -> int:
    """How many of an arm's sites are asked at a time."""
    return min(server.cohort or sites, sites)


def count(what: schema.Experiment, tasks: int, build: Callable[[], adapted_model.AdaptedModel]) -> tuple[int, str]:
    """How many workers compute, and why it is only one where more were asked for or could be expected.

    Args:
        what: the experiment; its ``workers`` where that is a number.
        tasks: how many could have something to do at a time.
        build: a model, for the memory of its steps; called where there may be several workers.
    """
    places, why = _places(what)
    wanted = min(places, tasks) if what.workers == "auto" else what.workers
    if wanted == 1 or why:
        return 1, why if wanted > 1 else ""
    if what.device != "cpu":
        number = min(wanted, places)
        return number, f"1 worker: the sites take turns on {what.device}" if number == 1 < wanted else ""
    model = build()
    own = memory.activations(model) / memory.MIB + OWN_MIB
    room = int((capacity.memory_mib() - what.cache_mib) // own)
    if what.workers != "auto" or room >= wanted:
        return wanted, ""
    return max(1, room), "" if room > 1 else f"1 worker: there is no memory for another ({own:,.0f} MiB each)"


def _places(what: schema.Experiment) -> tuple[int, str]:
    """How many workers have a core, or a GPU, of their own; and why there can be but one."""
    if not can_fork():
        return capacity.cores(), f"1 worker: processes that hold torch cannot be forked safely on {sys.platform}"
    if what.device == "cpu":
        return max(1, capacity.cores() // threads(what)), ""
    if what.device == "cuda":
        import torch

        gpus = max(1, torch.cuda.device_count())
        used = gpus > 1 and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return gpus, "1 worker: this process used CUDA before, and cannot be forked any more" if used else ""
    return 1, ""
