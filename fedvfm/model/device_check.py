"""Whether a device computes right now: asked before each round of a site, which costs about a millisecond.

A GPU that fell off the bus, counts wrongly or is full of another program's data ends a round after minutes, or with
wrong numbers. Here it multiplies two matrices of small whole numbers, whose product every format that training computes
in gives exactly, and its free memory is held against what a step of the recipe takes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.model import device as devices

LOG = logging.getLogger(__name__)
MIB = 1 << 20
SIDE = 256
LARGEST = 8
"""Products of whole numbers up to it, summed over a row, are exact in float32, in TF32 and with bfloat16 factors."""

Matrix = NDArray[np.float32]

_SHARES: dict[str, float] = {}
"""Device -> what of its memory this process may take, where that is not all."""


@dataclass(frozen=True)
class Probe:
    """What is asked of a device.

    Attributes:
        multiply: the product of two matrices there, waited for.
        free_mib: memory that a step may still take; None where the device is the machine itself, whose memory is
            counted when the data is checked.
    """

    multiply: Callable[[Matrix, Matrix], Matrix]
    free_mib: Callable[[], float | None] = lambda: None


def probe(device: str) -> Probe:
    """The device that torch computes on."""
    import torch

    def multiply(left: Matrix, right: Matrix) -> Matrix:
        product = torch.from_numpy(left).to(device) @ torch.from_numpy(right).to(device)
        devices.wait(device)
        result: Matrix = product.cpu().numpy()
        return result

    def free_mib() -> float | None:
        if not device.startswith("cuda"):
            return None
        ours = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )  # kept by torch for the next step
        free, total = torch.cuda.mem_get_info(device)
        left = _SHARES.get(device, 1.0) * total - torch.cuda.memory_allocated(device)
        return float(max(0.0, min(free + ours, left))) / MIB

    return Probe(multiply, free_mib)


def require(device: str, needed_mib: Callable[[], float] = lambda: 0.0, asked: Probe | None = None) -> None:
    """Check that a device computes and has room.

    Args:
        device: its name.
        needed_mib: what a step takes there; asked only where the device says what is free.
        asked: it; None for the one that torch computes on.

    Raises:
        DeviceError: if it does not answer, miscounts, or has too little memory free.
    """
    if fault := shortage(device, needed_mib, asked):
        raise errors.DeviceError(fault)


def shortage(device: str, needed_mib: Callable[[], float], asked: Probe | None = None) -> str:
    """What to say where a device that computes has too little memory free for a step; empty where it has enough.

    Args, Raises:
        As :func:`require`, which takes a shortage for an error too.
    """
    numbers = np.random.default_rng(0).integers(-LARGEST, LARGEST + 1, (2, SIDE, SIDE))
    try:
        asked = probe(device) if asked is None else asked
        product = asked.multiply(numbers[0].astype(np.float32), numbers[1].astype(np.float32))
        free = asked.free_mib()
    except Exception as error:  # torch raises kinds of its own, by backend
        raise errors.DeviceError(
            f"device '{device}' does not compute ({type(error).__name__}). Look at it with nvidia-smi; a GPU that fell "
            "off the bus needs its driver, or the machine, started again"
        ) from error
    if not np.array_equal(product, (numbers[0] @ numbers[1]).astype(np.float32)):
        raise errors.DeviceError(
            f"device '{device}' computes wrong numbers: a product of whole numbers is not exact there. Take it out of "
            "use; nothing it computed lately can be trusted"
        )
    if free is None or free >= (needed := needed_mib()):
        return ""
    return (
        f"device '{device}': a step takes about {needed:,.0f} MiB, {free:,.0f} MiB are free. Another program uses "
        "it, or the recipe's batch is too large for it"
    )


def bound(device: str, share: float) -> None:
    """Let this process take at most this share of a GPU's memory: torch refuses more as if the GPU were full."""
    import torch

    if device.startswith("cuda") and share < 1.0:
        _SHARES[device] = share
        torch.cuda.set_per_process_memory_fraction(share, torch.device(device))


def roomy(
    names: Sequence[str], needed_mib: Callable[[str], float], fits: Callable[[str], bool], share: float = 1.0
) -> str:
    """The first of these devices that computes and has room for a step, as torch takes its name; for one round.

    Args:
        names: that of the process first, then those that may be used in its place.
        needed_mib: what a step takes on a device.
        fits: whether a device in place of the first computes what that one would.
        share: of a GPU's memory, the most that may be taken of one in place of the first.

    Raises:
        DeviceError: where the first does not compute, which is for a new process to go round; or where all are full.
    """
    if not (full := shortage(names[0], lambda: needed_mib(names[0]))):
        return names[0]
    for name in names[1:]:
        try:
            device = devices.choose(name)
            if not fits(device):
                continue
            bound(device, share)
            if not shortage(device, functools.partial(needed_mib, device)):
                LOG.warning(f"{full}; this round is computed on '{device}'")
                return device
        except (errors.ConfigError, errors.DeviceError) as error:
            LOG.warning(f"{error}; the next device is taken")
    raise errors.DeviceError(full)


def after(names: Sequence[str], device: str) -> tuple[str, ...]:
    """Those of these names that stand behind the device which :func:`first` took."""
    for number, name in enumerate(names, 1):
        with contextlib.suppress(errors.ConfigError):
            if devices.choose(name) == device:
                return tuple(names[number:])
    return ()


def first(names: Sequence[str], check: Callable[[str], None] = require) -> str:
    """The first of these devices that is there and computes, as torch takes its name.

    Args:
        names: as a person gives them, at least one.
        check: raises where a device does not compute.

    Raises:
        ConfigError, DeviceError: of the last one, where none does.
    """
    for number, name in enumerate(names, 1):
        try:
            device = devices.choose(name)
            check(device)
            return device
        except (errors.ConfigError, errors.DeviceError) as error:
            if number == len(names):
                raise
            LOG.warning(f"{error}; the next device is taken")
    raise ValueError("no device is named")


def step_mib(model: Any, computes: str = "") -> float:
    """What a step of a model takes beside what lies on the device already.

    Args:
        model: it, or its shapes.
        computes: its precision where it is only shapes, which have none.
    """
    from fedvfm.model import memory, precision

    return memory.activations(model, narrow=(computes or model.precision) == precision.BFLOAT16) / MIB


def weights_mib(model: Any) -> float:
    """What a model's own numbers take."""
    held = (*model.parameters(), *model.buffers())
    return float(sum(each.numel() * each.element_size() for each in held)) / MIB
