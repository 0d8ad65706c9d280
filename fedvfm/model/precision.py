"""The numbers a model computes with: bfloat16 where this machine is not slower with it, float32 elsewhere.

A processor without instructions for bfloat16 emulates it, 4 to 20 times slower than float32. What torch tells of a
processor does not say so (it asks for vector instructions, not for those of bfloat16), so both are timed once a process
and kind of device. All processes of one simulation get the decision of the first: one run computes with one kind.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.model import device as devices
from fedvfm.storage import storage

FLOAT32, BFLOAT16 = schema.COMPUTED_IN
LIMIT = 1.2
"""bfloat16 is taken where it needs at most this multiple of float32's time."""
CLEAR = (0.8, 2.0)
"""Between these the timing is repeated. Machines were measured at 0.5 (with instructions) and 4 to 10 (without)."""
TIMED, MOST = 8, 24
"""How often each kind is timed in turns: at least, and where it is not clear."""
SHAPES = {"cpu": (64, 256, 256)}
ON_A_GPU = (2048, 1024, 1024)
"""Rows, inputs and outputs of the linear layer that is timed. On a GPU a small one would time only its launch."""

_ratios: dict[str, float] = {}
"""By kind of device: bfloat16's time over float32's; infinite where the device has no bfloat16."""


def of(asked: str, device: str) -> str:
    """What a model computes in: "float32" or "bfloat16".

    Args:
        asked: of the recipe; "float32" is strict, "bfloat16" and "auto" leave it to the machine.
        device: where it computes.
    """
    return FLOAT32 if asked == FLOAT32 or ratio(device) > LIMIT else BFLOAT16


def words(asked: str, device: str) -> str:
    """The same with its reason, for people."""
    if asked == FLOAT32:
        return "float32, as the recipe says"
    found = ratio(device)
    what = "CPU" if _kind(device) == "cpu" else "GPU"
    if math.isinf(found):
        return f"this {what} has no bfloat16: computing in float32"
    if found > LIMIT:
        return f"this {what} emulates bfloat16 ({found:.1f} times the time of float32 here): computing in float32"
    return f"bfloat16 ({found:.2f} times the time of float32 here)"


def ratio(device: str) -> float:
    """bfloat16's time over float32's on this device, measured once a process and kind of device."""
    kind = _kind(device)
    if kind not in _ratios:
        _ratios[kind] = measure(device)
    return _ratios[kind]


def take(device: str, found: float) -> None:
    """From now on this process computes as another one decided."""
    _ratios[_kind(device)] = found


@contextlib.contextmanager
def taken(device: str, found: float) -> Iterator[None]:
    """For a while this process computes as was decided elsewhere or earlier."""
    before = _ratios.get(_kind(device))
    take(device, found)
    try:
        yield
    finally:
        _ratios.pop(_kind(device))
        if before is not None:
            take(device, before)


def write(path: Path, device: str) -> None:
    """Keep the decision for other processes, or for when the work goes on.

    Raises:
        StorageError: if the disk refuses.
    """
    found = ratio(device)
    values = {"device": device, "bfloat16_over_float32": None if math.isinf(found) else found}
    storage.write_text(path, json.dumps(values) + "\n")


def read(path: Path) -> float:
    """The ratio that :func:`write` kept.

    Raises:
        CheckpointError: if the file is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["bfloat16_over_float32"]
        kept = math.inf if found is None else float(found)
    except (OSError, ValueError, KeyError, TypeError):
        raise errors.CheckpointError(f"{path} is damaged; restore it from a backup") from None
    if not kept > 0:
        raise errors.CheckpointError(f"{path} is damaged: {kept} is no ratio of times; restore it from a backup")
    return kept


def measure(device: str) -> float:
    """Time a linear layer in both kinds, in turns; the least of each counts, as others may use the machine too.

    On one thread: a pool of threads that was used before this process forks would be lost to its children.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _apart(device) if _kind(device) == "cuda" and sys.platform == "linux" else _measured(device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # what torch raises where a device does not have a kind of number
        return math.inf
    finally:
        torch.set_num_threads(threads)


def _apart(device: str) -> float:
    """The same in a child of this process, if this one did not use CUDA yet: once it did, no worker can be forked.

    Raises:
        EngineError: if the child ends.
    """
    import torch

    daemon = multiprocessing.current_process().daemon  # may have no children, and so no workers either
    if daemon or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return _measured(device)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as child:
        try:
            return child.submit(_measured, device).result()
        except concurrent.futures.BrokenExecutor:
            raise errors.EngineError(
                f"the process that timed float32 and bfloat16 on {device} was ended, by a lack of memory or a fault of "
                'the driver. Mend that, or say recipe.precision = "float32"'
            ) from None


def _measured(device: str) -> float:
    import torch

    rows, inputs, outputs = SHAPES.get(_kind(device), ON_A_GPU)
    kinds = (torch.float32, torch.bfloat16)
    layers = [[torch.ones(side, inputs, dtype=kind, device=device) for side in (rows, outputs)] for kind in kinds]
    least = [math.inf, math.inf]
    with torch.inference_mode():
        for turn in range(1 + MOST):
            for kind, (pixels, weight) in enumerate(layers):
                devices.wait(device)
                started = time.perf_counter()
                torch.nn.functional.linear(pixels, weight)
                devices.wait(device)
                if turn:  # the first one chooses kernels
                    least[kind] = min(least[kind], time.perf_counter() - started)
            if turn >= TIMED and not CLEAR[0] < least[1] / least[0] < CLEAR[1]:
                break
    return least[1] / least[0]


def _kind(device: str) -> str:
    return device.partition(":")[0]
