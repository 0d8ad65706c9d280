"""Functions that decode files of strangers, run in a child process: without the site's keys, with limits.

>>> @decoder.apart
... def read_image(path: Path) -> NDArray[np.float32]: ...
>>> read_image(path)             # in the child: the same value, bit for bit, or the same error
>>> read_image.here(path)        # in this process: for files whose checksum is known

One child decodes many files, one after the other, and lives as long as its parent. One that dies, takes too long or too
much memory is a fault of the file it was at, and a new one is started for the next. A child has no environment but the
language, the site's keys are not in its memory, and it gets no more memory and time than ``[data.limits]`` of the site
allows. One that a file takes over is still a process of the same user: where the kernel has Landlock
(:mod:`.landlock`) it can write, start and reach nothing; elsewhere it is kept from writing bytes to files alone, and
everywhere it can read the files that this user can.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import contextvars
import fcntl
import functools
import inspect
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, TypeVar

from fedvfm import errors
from fedvfm.data import defect
from fedvfm.data.decoding import message
from fedvfm.runtime import extras

if TYPE_CHECKING:
    from fedvfm.config import schema

P = ParamSpec("P")
R = TypeVar("R")

KEPT = ("LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH")
"""Environment variables that a child gets; nothing of them is secret."""
START = "import sys; sys.path[:] = sys.argv[4:]; from fedvfm.data.decoding import worker; worker.main(*sys.argv[1:4])"
PATIENCE = 4
"""Seconds of the clock that a file may take for one second of computing: a disk or a network may be slow."""
START_S = 120.0
END_S = 5.0
AHEAD = 8
"""Requests that wait in the pipe while one is answered, where it holds so many: neither end may wait for the other."""
PAGE = 4096
PIPE_BYTES = 1 << 20
"""What a pipe holds at most where a user has no special right; an image goes through it in one piece."""
ENDED_BY_OTHERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals by which others end a process: the file is tried once more."""

PACKAGE = re.compile(r"\w[\w.]{0,60}", re.ASCII)

FUNCTIONS: dict[str, Apart[Any, Any]] = {}
"""What a child can be asked for, by module and name."""


_here: contextvars.ContextVar[bool] = contextvars.ContextVar("here", default=False)


class Apart(Generic[P, R]):
    """A function that runs in the child; ``here`` is the function itself."""

    def __init__(self, function: Callable[P, R]) -> None:
        functools.update_wrapper(self, function)
        self.here = function
        self.name = f"{function.__module__}:{function.__qualname__}"
        self.signature = inspect.signature(function)
        FUNCTIONS[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it in the child, or here where this is the child.

        Raises:
            DataError: as the function does; also for a file that ends the child, or takes too long or too much memory.
            DecoderError: if no child can be started.
            MissingExtra: if a package is needed that is not installed.
        """
        if _state.child or _here.get():
            return self.here(*args, **kwargs)
        given = self.signature.bind(*args, **kwargs)
        given.apply_defaults()
        with _borrowed() as decoder:
            return next(decoder.calls(self, [given.args]))  # type: ignore[no-any-return]

    def each(self, requests: Iterable[tuple[Any, ...]]) -> Iterator[R]:
        """The results for many lists of arguments in their order; the next is computed while one is used.

        Raises:
            DataError, DecoderError: as for one.
        """
        if _state.child or _here.get():
            yield from (self.here(*args) for args in requests)  # type: ignore[call-arg]
            return
        with _borrowed() as decoder:
            yield from decoder.calls(self, requests)

    def where(self, args: tuple[Any, ...]) -> str:
        """How a message calls the file: as the argument ``where`` says, else the path of the first one."""
        names = list(self.signature.parameters)
        chosen = args[names.index("where")] if "where" in names else args[0]
        return str(getattr(chosen, "path", chosen))


def apart(function: Callable[P, R]) -> Apart[P, R]:
    """Have a function run in the child. Its arguments and result are of the types :mod:`.message` knows."""
    return Apart(function)


class _State:
    """What this process decodes with."""

    def __init__(self) -> None:
        self._limits: schema.DecodingLimits | None = None
        self.child = False
        self.idle: list[Decoder] = []
        self.all: set[Decoder] = set()
        # No thread forks while pipes are made or closed: the copy in the new process would keep a child alive.
        self.forking = threading.RLock()

    @property
    def limits(self) -> schema.DecodingLimits:
        """Those of the files that are decoded from now on."""
        if self._limits is None:
            from fedvfm.config import schema  # half of what a child would import, and it decodes without

            self._limits = schema.DecodingLimits()
        return self._limits

    @limits.setter
    def limits(self, limits: schema.DecodingLimits) -> None:
        self._limits = limits


def limit(limits: schema.DecodingLimits) -> None:
    """Give the files that are decoded from now on these limits; each source has its own, set as it reads."""
    if limits != _state.limits:
        _state.limits = limits
        close()


def close() -> None:
    """End the children that have nothing to do."""
    while _state.idle:
        _state.idle.pop().close()


def become_child() -> None:
    """From now on everything is decoded in this process: it is the child."""
    _state.child = True


@contextlib.contextmanager
def trusted() -> Iterator[None]:
    """Decode in this process, for files that are not a stranger's."""
    token = _here.set(True)
    try:
        yield
    finally:
        _here.reset(token)


def may_take(size: int) -> bool:
    """Whether a file may take that many bytes in this process; what runs in the child has the child's own bound."""
    return _state.child or _here.get() or size <= _state.limits.memory_mib << 20


@contextlib.contextmanager
def _borrowed() -> Iterator[Decoder]:
    """A child for one thread and one purpose; afterwards others may have it."""
    limits = _state.limits
    decoder = _living() or Decoder(limits)
    try:
        yield decoder
    finally:
        if decoder.usable and limits == _state.limits:
            _state.idle.append(decoder)
        else:
            decoder.close()


def _living() -> Decoder | None:
    """A child that has nothing to do; those that somebody ended meanwhile are no fault of the next file."""
    while _state.idle:
        with contextlib.suppress(IndexError):  # another thread was first
            decoder = _state.idle.pop()
            if decoder.alive():
                return decoder
            decoder.close()
    return None


def _forget() -> None:
    """After a fork: the children are those of the process before."""
    for decoder in _state.all:
        decoder.forget()
    _state.all.clear()
    _state.idle.clear()
    _state.forking.release()


class _Request(NamedTuple):
    """What is asked, and the bytes of it."""

    number: int
    args: tuple[Any, ...]
    content: list[memoryview]

    def pages(self) -> int:
        """Pages of a pipe that it takes at most."""
        return sum(-(-len(part) // PAGE) for part in self.content)


class Decoder:
    """One child process, from start to end.

    Attributes:
        usable: whether it can be asked again.
    """

    def __init__(self, limits: schema.DecodingLimits) -> None:
        self.limits, self.usable = limits, True
        self._requests = self._answers = -1
        self._again, self._numbers = False, itertools.count(1)
        self._start()

    def _start(self) -> None:
        """Start the process, with a pipe to it and one from it.

        Raises:
            DecoderError: if it cannot be started.
        """
        with _state.forking:
            ends: list[int] = []
            try:
                ends += os.pipe()
                ends += os.pipe()
                self._process = self._launched(ends[0], ends[3])
                os.set_blocking(ends[1], False)
            except BaseException as error:
                for end in ends:
                    os.close(end)
                if not isinstance(error, OSError):
                    raise
                raise errors.DecoderError(_cannot_start(error.strerror)) from None
            os.close(ends[0])
            os.close(ends[3])
            self._requests, self._answers = ends[1:3]
            _state.all.add(self)
        self._greeted, self._loaded = False, set[str]()

    def _launched(self, asked: int, answered: int) -> subprocess.Popen[bytes]:
        with contextlib.suppress(OSError, AttributeError):
            fcntl.fcntl(answered, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        options = ["-X", "utf8"] if sys.flags.utf8_mode else []
        limits = str(self.limits.memory_mib), str(self.limits.seconds), f"{asked},{answered}"
        environment = {key: os.environ[key] for key in KEPT if key in os.environ}
        return subprocess.Popen(
            [sys.executable, "-I", *options, "-c", START, *limits, *(path or os.getcwd() for path in sys.path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(asked, answered),
            # Threads of a library of linear algebra take address space, and nothing here needs them.
            env={**environment, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def calls(self, function: Apart[Any, Any], requests: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """The answers to requests in their order.

        Raises:
            DataError, DecoderError: see :meth:`Apart.__call__`.
        """
        waiting: collections.deque[_Request] = collections.deque()
        source = (self._packed(function, args) for args in requests)
        following = next(source, None)
        try:
            while following or waiting:
                while following and self._has_room(waiting, following):
                    self._ask(waiting, following)
                    following = next(source, None)
                yield self._answer(function, waiting)
        except errors.DataError:
            # Answers that nobody waits for any more. Whoever is interrupted meanwhile leaves a child that is ended.
            while waiting:
                with contextlib.suppress(errors.DataError):
                    self._answer(function, waiting)
            raise

    def _packed(self, function: Apart[Any, Any], args: tuple[Any, ...]) -> _Request:
        number = next(self._numbers)
        return _Request(number, args, message.packed(message.REQUEST, [function.name, list(args)], number))

    def _has_room(self, waiting: collections.deque[_Request], request: _Request) -> bool:
        """Whether a request can be written at once: who writes more waits for a child that waits to be read."""
        taken = sum(item.pages() for item in waiting)
        return not waiting or (len(waiting) < AHEAD and taken + request.pages() <= _pages(self._requests))

    def _ask(self, waiting: collections.deque[_Request], request: _Request) -> None:
        """Send a request; until all are answered the child is of no use to anybody else."""
        self.usable = False
        waiting.append(request)
        self._send(request)

    def _send(self, request: _Request) -> None:
        """Write a request. A child that is dead, or does not read, is found out when its answer is read."""
        with contextlib.suppress(BrokenPipeError, message.Overdue):
            message.send(self._requests, request.content, time.monotonic() + START_S + PATIENCE * self.limits.seconds)

    def _answer(self, function: Apart[Any, Any], waiting: collections.deque[_Request]) -> Any:
        """The answer to the first request that waits.

        Raises:
            DataError: see :meth:`Apart.__call__`.
            DecoderError: if the child does not start.
        """
        first = waiting[0]
        where = function.where(first.args)
        try:
            kind, value = self._received(function, first.number)
        except (message.Ended, message.Overdue, message.Malformed, MemoryError) as error:
            if self._ended_by_others(error):
                self._restart(waiting)
                return self._answer(function, waiting)
            waiting.clear()
            raise self._fault(where, error) from None
        waiting.popleft()
        self._again, self.usable = False, not waiting
        if kind == message.VALUE:
            return value
        raise _fault_of(kind, value, where, self.limits)

    def _received(self, function: Apart[Any, Any], number: int) -> tuple[int, Any]:
        if self._answers < 0:
            raise errors.DecoderError(_cannot_start("the process that asked was forked meanwhile"))
        if not self._greeted:
            message.receive(self._answers, {message.READY: None}, 0, time.monotonic() + START_S)
            self._greeted = True
        kinds = {
            message.VALUE: message.hints(function.here)[1],
            **dict.fromkeys((message.FAULT, message.BROKEN, message.MEMORY, message.MISSING), tuple[str, ...]),
        }
        deadline = time.monotonic() + PATIENCE * self.limits.seconds
        module = function.name.partition(":")[0]
        if module not in self._loaded:
            deadline += START_S  # its libraries are imported first, which is no part of the file's time
        self._loaded.add(module)
        return message.receive(self._answers, kinds, self.limits.memory_mib << 20, deadline, number)

    def _ended_by_others(self, error: Exception) -> bool:
        """Whether somebody else ended the child; a new one is started then, once a file."""
        return isinstance(error, message.Ended) and not self._again and -self._end() in ENDED_BY_OTHERS

    def _restart(self, waiting: collections.deque[_Request]) -> None:
        """Have a new child do what waits.

        Raises:
            DecoderError: if it cannot be started.
        """
        self._again = True
        self._close_pipes()
        self._start()
        for request in waiting:
            self._send(request)

    def _fault(self, where: str, error: Exception) -> errors.FedvfmError:
        """What becomes of a file that the child did not come back from."""
        if not self._greeted:
            return errors.DecoderError(_cannot_start(f"it ended at once, {self._end()}"))
        if isinstance(error, MemoryError):
            return _fault_of(message.MEMORY, (), where, self.limits)
        if isinstance(error, message.Malformed):
            return defect.DECODER_DIED.error(
                f"{where}: its decoder answered what no decoder answers ({error}); the file may be made to harm: take "
                "it out"
            )
        number = None if isinstance(error, message.Overdue) else -self._end()
        if number in (None, signal.SIGXCPU):
            return defect.DECODING_TIME.error(
                f"{where}: not decoded after {self.limits.seconds} s of computing, or {PATIENCE} times that by the "
                "clock; take it out, or allow more: data.limits.seconds of a site, --seconds of predict"
            )
        name = signal.Signals(number).name if number in signal.valid_signals() else f"exit status {-number}"
        return defect.DECODER_DIED.error(
            f"{where}: its decoder died of it ({name}); export or copy the file again, or take it out"
        )

    def _end(self) -> int:
        """How the child ended; it is killed where it does not, and left alone where even that does not end it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(END_S)
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(END_S)
        return -signal.SIGKILL

    def close(self) -> None:
        """End the child: by itself, as nobody can ask it any more, or at once where it was left in between."""
        if not self.usable:
            self._process.kill()
        self.usable = False
        self._close_pipes()
        self._end()
        _state.all.discard(self)

    def forget(self) -> None:
        """Let go of a child that is another process's."""
        self.usable = False
        self._close_pipes()
        self._process.returncode = 0  # nobody waits for it here

    def _close_pipes(self) -> None:
        with _state.forking:
            pipes = self._requests, self._answers
            self._requests = self._answers = -1  # the numbers are soon those of other files
            for pipe in pipes:
                if pipe >= 0:
                    os.close(pipe)


def _pages(pipe: int) -> int:
    """How many pages a pipe holds; of a user with many pipes it is a few, and others may make it smaller."""
    with contextlib.suppress(OSError, AttributeError):
        return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) // PAGE
    return 1


def _cannot_start(reason: str | None) -> str:
    return (
        f"the process that decodes images cannot be started ({reason}); give this user the right to start processes, "
        "and data.limits.memory_mib enough for one image"
    )


def _missing(texts: tuple[str, ...]) -> errors.FedvfmError:
    """A package that a child could not load: no fault of a file."""
    name = texts[0] if texts and PACKAGE.fullmatch(texts[0]) else "a package"
    return extras.missing(ModuleNotFoundError(name=name)) or errors.DecoderError(
        f"{name} cannot be loaded by the process that decodes images; install fedvfm[client] again"
    )


def _fault_of(kind: int, texts: tuple[str, ...], where: str, limits: schema.DecodingLimits) -> errors.FedvfmError:
    """The error that a child tells of: of the function itself, or of what went wrong around it."""
    if kind == message.MEMORY:
        return defect.DECODING_MEMORY.error(
            f"{where}: decoding it takes more than {limits.memory_mib} MiB of memory; take it out, or allow more: "
            "data.limits.memory_mib of a site, --memory-mib of predict"
        )
    if kind == message.MISSING:
        return _missing(texts)
    if kind == message.BROKEN:
        return defect.READER_FAILED.error(
            f"{where}: the reader broke ({', '.join(texts)[:80]}); export or copy the file again, or take it out"
        )
    text, code, values, *faults = texts
    numbers = [int(item) for item in values.split()]
    return errors.DataError(text, [errors.Fault(item, code) for item in faults], code=code, values=numbers)


atexit.register(close)
_state = _State()
os.register_at_fork(before=_state.forking.acquire, after_in_parent=_state.forking.release, after_in_child=_forget)
