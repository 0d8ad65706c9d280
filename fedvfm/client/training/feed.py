"""The next batch of training, prepared in a thread while the device computes the step before."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch

from fedvfm.client.training import site as sites
from fedvfm.model import adapted_model
from fedvfm.runtime import capacity

T = TypeVar("T")


def helps(model: adapted_model.AdaptedModel, site: sites.Site) -> bool:
    """Whether a thread of its own for the images gains anything.

    Views that are drawn once are kept, so there is next to nothing to prepare; and virtual hospitals on a CPU already
    compute side by side on all its cores.
    """
    if model.recipe.data.views:
        return False
    return model.device != "cpu" or (not site.simulated and capacity.cores() > torch.get_num_threads())


@contextlib.contextmanager
def ahead(batches: Iterator[T], wanted: bool) -> Iterator[Iterator[T]]:
    """The same batches in the same order, each prepared while the one before is in use.

    One thread prepares one after the other, so every draw is the one that it is without; what it raises is raised where
    the batch would have come.

    Args:
        batches: where they come from; used by nobody else.
        wanted: False to prepare each as it is asked for.
    """
    if not wanted:
        yield batches
        return
    threads = torch.get_num_threads()
    # A thread that is new to torch would take as many threads as the machine has cores.
    pool = concurrent.futures.ThreadPoolExecutor(1, "batches", torch.set_num_threads, (threads,))
    try:
        yield _taken(pool, batches)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _taken(pool: concurrent.futures.Executor, batches: Iterator[T]) -> Iterator[T]:
    end = object()
    waiting = pool.submit(next, batches, end)
    while True:
        found = waiting.result()
        if found is end:
            return
        waiting = pool.submit(next, batches, end)
        yield found  # type: ignore[misc]
