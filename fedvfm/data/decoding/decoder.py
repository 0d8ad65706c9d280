"""Functions that decode files of strangers, run in a child process: without the site's keys, with limits.

>>> @decoder.apart
... def read_image(path: Path) -> NDArray[np.float32]: ...
>>> read_image(path)             # in the child: the same value, bit for bit, or the same error
>>> read_image.here(path)        # in this process: for files whose checksum is known

One child decodes many files, one after the other, and lives as long as its parent. One that dies, takes too long or too
much memory is a fault of the file it was at, and a new one is started for the next. A child has no environment but the
language, no writable file, no other process, and no more memory and time than ``[data.limits]`` of the site allows.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import contextvars
import fcntl
import functools
import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, ParamSpec, TypeVar

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import defect
from fedvfm.data.decoding import message

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
"""Requests that wait in the pipe while one is answered; small, so that neither end waits for the other for ever."""
SMALL = 4096
PIPE_BYTES = 1 << 20
"""What a pipe holds at most where a user has no special right; an image goes through it in one piece."""
ENDED_BY_OTHERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals by which others end a process: the file is tried once more."""

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
        self.limits = schema.DecodingLimits()
        self.child = False
        self.idle: list[Decoder] = []
        self.all: set[Decoder] = set()


def limit(limits: schema.DecodingLimits) -> None:
    """Give the files that are decoded from now on these limits."""
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


@contextlib.contextmanager
def _borrowed() -> Iterator[Decoder]:
    """A child for one thread and one purpose; afterwards others may have it."""
    limits = _state.limits
    try:
        decoder = _state.idle.pop()
    except IndexError:
        decoder = Decoder(limits)
    try:
        yield decoder
    finally:
        if decoder.usable and limits == _state.limits:
            _state.idle.append(decoder)
        else:
            decoder.close()


def _forget() -> None:
    """After a fork: the children are those of the process before."""
    for decoder in _state.all:
        decoder.forget()
    _state.all.clear()
    _state.idle.clear()


class Decoder:
    """One child process, from start to end.

    Attributes:
        usable: whether it can be asked again.
    """

    def __init__(self, limits: schema.DecodingLimits) -> None:
        self.limits, self.usable = limits, True
        self._process, self._requests, self._answers = self._started()
        self._greeted = self._again = False
        _state.all.add(self)

    def _started(self) -> tuple[subprocess.Popen[bytes], int, int]:
        """The process, the pipe to it and the pipe from it.

        Raises:
            DecoderError: if it cannot be started.
        """
        asked, requests = os.pipe()
        answers, answered = os.pipe()
        with contextlib.suppress(OSError, AttributeError):
            fcntl.fcntl(answered, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        options = ["-X", "utf8"] if sys.flags.utf8_mode else []
        limits = str(self.limits.memory_mib), str(self.limits.seconds), f"{asked},{answered}"
        environment = {key: os.environ[key] for key in KEPT if key in os.environ}
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", *options, "-c", START, *limits, *(path or os.getcwd() for path in sys.path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(asked, answered),
                # Threads of a library of linear algebra take address space, and nothing here needs them.
                env={**environment, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        except OSError as error:
            os.close(requests)
            os.close(answers)
            raise errors.DecoderError(_cannot_start(error.strerror)) from None
        finally:
            os.close(asked)
            os.close(answered)
        return process, requests, answers

    def calls(self, function: Apart[Any, Any], requests: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """The answers to requests in their order.

        Raises:
            DataError: see :meth:`Apart.__call__`.
        """
        waiting: collections.deque[tuple[Any, ...]] = collections.deque()
        source, small = iter(requests), True
        try:
            while True:
                while (small and len(waiting) < AHEAD) or not waiting:
                    args = next(source, None)
                    if args is None:
                        break
                    waiting.append(args)
                    small = self._ask(function, args)
                if not waiting:
                    return
                yield self._answer(function, waiting)
                small = True
        finally:
            # Whoever stops in between leaves answers in the pipe that nobody waits for.
            with contextlib.suppress(errors.FedvfmError):
                while waiting and self.usable:
                    with contextlib.suppress(errors.DataError):
                        self._answer(function, waiting)

    def _ask(self, function: Apart[Any, Any], args: tuple[Any, ...]) -> bool:
        """Send a request; whether it was small. A child that is dead is found out when its answer is read."""
        try:
            return message.send(self._requests, message.REQUEST, [function.name, list(args)]) <= SMALL
        except BrokenPipeError:
            return False

    def _answer(self, function: Apart[Any, Any], waiting: collections.deque[tuple[Any, ...]]) -> Any:
        """The answer to the first request that waits.

        Raises:
            DataError: see :meth:`Apart.__call__`.
            DecoderError: if the child does not start.
        """
        try:
            kind, value = self._received(function)
        except (message.Ended, message.Overdue, message.Malformed) as error:
            where = function.where(waiting[0])
            if self._ended_by_others(error):
                for args in waiting:
                    self._ask(function, args)
                return self._answer(function, waiting)
            self.usable = False
            raise self._fault(where, error) from None
        where = function.where(waiting.popleft())
        if kind == message.VALUE:
            return value
        raise _fault_of(kind, value, where, self.limits)

    def _received(self, function: Apart[Any, Any]) -> tuple[int, Any]:
        if not self._greeted:
            try:
                message.receive(self._answers, {message.READY: None}, 0, time.monotonic() + START_S)
            except (message.Ended, message.Overdue, message.Malformed):
                self.usable = False
                raise errors.DecoderError(_cannot_start(f"it ended at once, {self._end()}")) from None
            self._greeted = True
        kinds = {
            message.VALUE: message.hints(function.here)[1],
            **dict.fromkeys((message.FAULT, message.BROKEN, message.MEMORY), tuple[str, ...]),
        }
        deadline = time.monotonic() + PATIENCE * self.limits.seconds
        return message.receive(self._answers, kinds, self.limits.memory_mib << 20, deadline)

    def _ended_by_others(self, error: Exception) -> bool:
        """Whether somebody else ended the child; a new one is started then, once."""
        if not isinstance(error, message.Ended) or self._again or -self._end() not in ENDED_BY_OTHERS:
            return False
        self._close_pipes()
        self._process, self._requests, self._answers = self._started()
        self._greeted, self._again = False, True
        return True

    def _fault(self, where: str, error: Exception) -> errors.DataError:
        """What becomes of a file that the child did not come back from."""
        if isinstance(error, message.Malformed):
            self._process.kill()
            return defect.DECODER_DIED.error(
                f"{where}: its decoder answered what no decoder answers ({error}); the file may be made to harm: take "
                "it out"
            )
        number = None if isinstance(error, message.Overdue) else -self._end()
        if number in (None, signal.SIGXCPU):
            self._process.kill()
            return defect.DECODING_TIME.error(
                f"{where}: not decoded after {self.limits.seconds} s of computing, or {PATIENCE} times that by the "
                "clock; take it out, or allow more with data.limits.seconds"
            )
        name = signal.Signals(number).name if number in signal.valid_signals() else f"exit status {-number}"
        return defect.DECODER_DIED.error(
            f"{where}: its decoder died of it ({name}); export or copy the file again, or take it out"
        )

    def _end(self) -> int:
        """How the child ended; it is killed where it does not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(END_S)
        self._process.kill()
        return self._process.wait()

    def close(self) -> None:
        """End the child: it ends by itself when nobody can ask it any more."""
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
        for pipe in (self._requests, self._answers):
            with contextlib.suppress(OSError):
                os.close(pipe)


def _cannot_start(reason: str | None) -> str:
    return (
        f"the process that decodes images cannot be started ({reason}); give this user the right to start processes, "
        "and data.limits.memory_mib enough for one image"
    )


def _fault_of(kind: int, texts: tuple[str, ...], where: str, limits: schema.DecodingLimits) -> errors.FedvfmError:
    """The error that a child tells of: of the function itself, or of what went wrong around it."""
    if kind == message.MEMORY:
        return defect.DECODING_MEMORY.error(
            f"{where}: decoding it takes more than {limits.memory_mib} MiB of memory; take it out, or allow more with "
            "data.limits.memory_mib"
        )
    if kind == message.BROKEN:
        return defect.READER_FAILED.error(
            f"{where}: the reader broke ({', '.join(texts)[:80]}); export or copy the file again, or take it out"
        )
    text, code, values, *faults = texts
    numbers = [int(item) for item in values.split()]
    return errors.DataError(text, [errors.Fault(item, code) for item in faults], code=code, values=numbers)


atexit.register(close)
os.register_at_fork(after_in_child=_forget)
_state = _State()
