"""This machine against what the recipe needs: device, memory, disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedvfm import errors
from fedvfm.backbones import weights
from fedvfm.data.readiness import finding
from fedvfm.model import device as devices
from fedvfm.model import memory as budget

TIGHT = 1.25
"""A resource is tight below this multiple of what is needed."""

GPU_BASE_MIB = 600.0
"""What CUDA itself takes of a GPU."""

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Machine:
    """What is there, in MiB.

    Attributes:
        device: as the site's file asks, "auto" resolved.
        device_name: the GPU's name, or empty.
        memory: free memory; under a container's limit, what is left of it.
        gpu_memory: free memory of the GPU, or None.
        disk: free space where weights and state lie.
    """

    device: str
    device_name: str
    memory: float
    gpu_memory: float | None
    disk: float


def look(wanted: str, cgroup: Path = CGROUP) -> tuple[Machine, list[finding.Finding]]:
    """What this machine has, and what is wrong with the wanted device."""
    import torch

    found = []
    try:
        device = devices.choose(wanted)
    except errors.ConfigError as error:
        device = "cpu"
        found.append(finding.make("device-missing", error.faults[0]))
    if device == "cpu" and wanted == "cpu" and torch.cuda.is_available():
        found.append(finding.make("gpu-idle", f"{torch.cuda.get_device_name(0)} is there and not used"))
    name, gpu = "", None
    if device.startswith("cuda"):
        name, gpu = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0] / budget.MIB
    return Machine(device, name, free_memory(cgroup), gpu, _free_disk()), found


def free_memory(cgroup: Path = CGROUP) -> float:
    """Free memory in MiB: of the machine, or of the container where that has less left."""
    free = psutil.virtual_memory().available / budget.MIB
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else min(free, (int(limit) - int(used)) / budget.MIB)
    except (OSError, ValueError):
        return free


def _free_disk() -> float:
    folder = weights.cache().absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / budget.MIB


def judge(machine: Machine, memory: budget.Memory, disk: float) -> list[finding.Finding]:
    """Findings about memory and disk."""
    found = []
    on_gpu = machine.gpu_memory is not None
    needed = memory.base + memory.backbone + memory.kept if on_gpu else memory.total
    found += _short("memory", needed, machine.memory, {"short": "memory-short", "tight": "memory-tight"})
    if machine.gpu_memory is not None:
        needed = GPU_BASE_MIB + memory.backbone + memory.activations
        if machine.gpu_memory < needed:
            problem = f"about {needed:,.0f} MiB of GPU memory needed, {machine.gpu_memory:,.0f} MiB free"
            found.append(finding.make("gpu-memory-short", problem))
    return found + _short("disk", disk, machine.disk, {"short": "disk-short", "tight": "disk-tight"})


def _short(what: str, needed: float, free: float, codes: Mapping[str, str]) -> list[finding.Finding]:
    if free >= TIGHT * needed:
        return []
    code = codes["short" if free < needed else "tight"]
    return [finding.make(code, f"about {needed:,.0f} MiB of {what} needed, {free:,.0f} MiB free")]
