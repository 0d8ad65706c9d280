"""How much of the machine the executor takes: threads, priority, a GPU's memory, and whether it sees a GPU at all."""

from __future__ import annotations

import os

from fedvfm.config import schema
from fedvfm.model import device_check
from fedvfm.runtime import capacity

POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def environment(site: schema.SiteConfig) -> dict[str, str]:
    """What must be set before the executor's process starts: libraries read it when they are loaded."""
    found = {name: str(site.limits.threads) for name in POOLS} if site.limits.threads else {}
    if {site.device, *site.spare_devices} == {"cpu"} or site.batch is not None:
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


def apply(limits: schema.LimitsConfig, device: str) -> None:
    """Keep to the limits from here on; in the executor's own process, before anything is computed.

    Where the site's file names no number of threads, a recipe may (see :class:`fedvfm.client.app.Models`).
    """
    import threadpoolctl
    import torch

    os.setpriority(os.PRIO_PROCESS, 0, max(limits.nice, os.getpriority(os.PRIO_PROCESS, 0)))
    torch.set_num_threads(limits.threads or min(torch.get_num_threads(), capacity.cores()))
    if limits.threads:
        threadpoolctl.threadpool_limits(limits.threads)
    device_check.bound(device, limits.gpu_memory)
