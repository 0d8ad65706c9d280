"""Where a model computes: the name a person gives, as torch takes it."""

from __future__ import annotations

from fedvfm import errors

NAMES = "cpu, cuda, cuda:N, mps or auto"


def choose(name: str) -> str:
    """The device of a name; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: if there is no such name, or torch sees no such device here.
    """
    import torch  # the command line names devices long before it needs torch

    kind, colon, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps", "auto") or (colon and (kind != "cuda" or not number.isdecimal())):
        raise errors.ConfigError("--device", [f"'{name}': give {NAMES}"])
    if kind == "auto":
        return "cuda" if torch.cuda.device_count() else "cpu"
    if kind == "cuda" and not torch.cuda.device_count():  # unlike is_available, this leaves processes forkable
        raise errors.ConfigError("--device", [f"'{name}': torch sees no CUDA device here; use cpu or auto"])
    if colon and int(number) >= torch.cuda.device_count():
        known = torch.cuda.device_count()
        raise errors.ConfigError("--device", [f"'{name}': torch sees {known} CUDA devices, numbered from 0"])
    if kind == "mps" and not torch.backends.mps.is_available():
        raise errors.ConfigError("--device", ["'mps': torch sees no Apple GPU here; use cpu or auto"])
    return name


def wait(device: str) -> None:
    """Until the device has done all it was asked to."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()
