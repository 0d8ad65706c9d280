"""The child that decodes: it gives up what it does not need, then answers requests until nobody can ask any more."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from fedvfm import errors
from fedvfm.data import defect
from fedvfm.data.decoding import decoder, landlock, message
from fedvfm.runtime import extras

MOST_REQUEST = 1 << 40
NO_NEW_PRIVILEGES = 38
"""``prctl``: no program that this process starts has more rights than it."""
OPEN_FILES = 64
LIBRARIES = {
    "nifti": ("nibabel.loadsave", "nibabel.nifti1"),
    "nrrd": ("nrrd",),
    "slide": ("tifffile", "imagecodecs._jpeg8", "imagecodecs._zlib", "imagecodecs._jpeg2k", "imagecodecs._imcd"),
    "dicom": ("pydicom.pixels.utils", "pydicom.pixels.processing"),
}
"""What readers import with their first file."""
NEVER: tuple[str, ...] = ("requests", "tqdm")
"""What pydicom imports where it is installed, to fetch its own test files: nothing here has a network."""
LIBRARY_BYTES = 1 << 30
"""Address space that libraries may take, beside the memory for a file."""


def main(memory_mib: str, seconds: str, pipes: str) -> None:
    """Answer until the other end is closed.

    Args:
        memory_mib: address space that decoding may take beside what the process has when it starts.
        seconds: of computing for one file.
        pipes: numbers of the pipe that requests come from and of that for answers.
    """
    requests, answers = (int(item) for item in pipes.split(","))
    for name in NEVER:
        sys.modules[name] = None  # type: ignore[assignment]
    decoder.become_child()
    memory = int(memory_mib) << 20
    _give_up(_taken() + LIBRARY_BYTES + memory)
    try:
        message.send(answers, message.packed(message.READY, None))
        while True:
            _, number, (name, given), arrays = message.parts(requests, [message.REQUEST], MOST_REQUEST)
            limits = memory, int(seconds)
            message.send(answers, _answer(number, functools.partial(_computed, name, given, arrays, limits)))
    except (message.Ended, BrokenPipeError):
        os._exit(0)


@functools.cache
def _loaded(module: str) -> bool:
    """Import what a module decodes with, once: this is no part of a file's memory."""
    importlib.import_module(module)  # what the site asks for is not a stranger's
    libraries = LIBRARIES.get(module.rpartition(".")[2].partition("_")[0])
    for name in libraries or ():
        importlib.import_module(name)
    if libraries is None:
        Image.init()  # pictures
    return True


def _give_up(most_memory: int) -> None:
    """Take from this process what no decoder needs; what a system does not know is left as it is."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent is asked to stop, and it may still need an answer
    warnings.simplefilter("ignore")
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")  # rather this than the site
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        landlock.give_up()
    limits = {"CORE": 0, "FSIZE": 0, "NPROC": 0, "NOFILE": OPEN_FILES, "AS": most_memory}
    for name, most in limits.items():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            which = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(which)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(which, (most, most))


@functools.cache
def _memory_file() -> int:
    """Kept open: later nothing in ``/proc`` can be opened."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


def _taken() -> int:
    """Bytes of address space that this process has."""
    with contextlib.suppress(OSError, ValueError):
        return int(os.pread(_memory_file(), 256, 0).split()[0]) * resource.getpagesize()
    return 1 << 30


def _give_memory(memory: int) -> None:
    """Let a file take so much memory beside what the process has now."""
    with contextlib.suppress(OSError, ValueError):
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (min(_taken() + memory, hard), hard))


def _give_time(seconds: int) -> None:
    """Let the next file take so much computing; the system ends what takes more."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime) + 1 + seconds
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _answer(number: int, compute: Callable[[], tuple[int, Any]]) -> list[memoryview]:
    try:
        return message.packed(*compute(), number)
    except MemoryError:
        return message.packed(message.MEMORY, [], number)
    except ValueError as error:
        return message.packed(message.BROKEN, [type(error).__name__], number)


def _computed(name: str, given: list[Any], arrays: message.Arrays, limits: tuple[int, int]) -> tuple[int, Any]:
    """The kind of an answer and what it holds."""
    try:
        _prepare(name.partition(":")[0], *limits)
    except ImportError as error:
        return message.MISSING, [error.name or ""]
    function = decoder.FUNCTIONS[name]
    named, _ = message.hints(function.here)
    try:
        args = [message.built(hint, item, arrays) for hint, item in zip(named.values(), given, strict=True)]
        _require_files(function, args)
        return message.VALUE, function.here(*args)
    except errors.DataError as error:
        values = " ".join(str(item) for item in error.values)
        return message.FAULT, [str(error), error.code, values, *map(str, error.faults)]
    except MemoryError:
        return message.MEMORY, []
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and extras.missing(error):
            return message.MISSING, [error.name or ""]
        # Only the kind of the error leaves: its words may quote the file.
        return message.BROKEN, [type(error).__name__]


def _prepare(module: str, memory: int, seconds: int) -> None:
    """Load what the next file is decoded with, and give it its memory and time.

    Raises:
        ImportError: if a library is missing.
    """
    before = _loaded.cache_info().currsize
    _loaded(module)
    if _loaded.cache_info().currsize > before:
        _give_memory(memory)
    _give_time(seconds)


def _require_files(function: decoder.Apart[Any, Any], args: list[Any]) -> None:
    """Refuse a pipe or a device, which is never read to its end.

    Raises:
        DataError: saying so.
    """
    for path in args:
        if isinstance(path, Path) and path.exists() and not (path.is_file() or path.is_dir()):
            where = function.where(tuple(args))
            raise defect.UNREADABLE.error(f"{where}: a pipe, socket or device, no regular file; take it out")
