"""Whether a device computes right now: asked before each round of a site, which costs about a millisecond.

A GPU that fell off the bus, counts wrongly or is full of another program's data ends a round after minutes, or with
wrong numbers. Here it multiplies two matrices of small whole numbers, whose product every format that training computes
in gives exactly, and its free memory is held against what a step of the recipe takes.
"""

from __future__ import annotations

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
        return float(torch.cuda.mem_get_info(device)[0] + ours) / MIB

    return Probe(multiply, free_mib)


def require(device: str, needed_mib: Callable[[], float] = lambda: 0.0, asked: Probe | None = None) -> None:
    """Check that a device computes.

    Args:
        device: its name.
        needed_mib: what a step takes there; asked only where the device says what is free.
        asked: it; None for the one that torch computes on.

    Raises:
        DeviceError: if it does not answer, miscounts, or has too little memory free.
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
    if free is not None and free < (needed := needed_mib()):
        raise errors.DeviceError(
            f"device '{device}': a step takes about {needed:,.0f} MiB, {free:,.0f} MiB are free. Another program uses "
            "it, or the recipe's batch is too large for it"
        )


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


def step_mib(model: Any) -> float:
    """What a step of a model takes beside what lies on the device already."""
    from fedvfm.model import memory, precision

    return memory.activations(model, narrow=model.precision == precision.BFLOAT16) / MIB
