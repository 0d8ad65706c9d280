"""Child processes: started, watched, restarted with back-off, stopped; used by server, client and simulation.

Each child leads a process group of its own, writes to a private log and leaves a pid file that says which process it
was, so that a later fedvfm never takes a stranger with the same number for it. A child ends when its parent does,
however the parent ends (Linux tells it); elsewhere the next start ends what an earlier one left.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fedvfm import errors
from fedvfm.storage import storage

LOG = logging.getLogger(__name__)
LONGEST_WAIT_S = 30.0
STEADY_S = 60.0
"""A child that ran so long begins with the shortest wait again."""
LOG_BYTES = 20_000_000
ERROR_FILE = "FEDVFM_ERROR_FILE"
"""Environment variable: the file into which a process writes the error it ends with, for whoever started it."""
POLL_S = 0.2

# Lets nobody else read what it will write, sets what the system sends this process when its parent dies (1 is
# PR_SET_PDEATHSIG), then becomes the program.
_LAUNCH = """
import ctypes, os, sys
os.umask(0o077)
try:
    ctypes.CDLL(None).prctl(1, int(sys.argv[2]))
except (OSError, AttributeError):
    pass
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[3], sys.argv[3:])
"""


@dataclass(frozen=True)
class Program:
    """What to run.

    Attributes:
        name: of its pid file and log.
        command: program and arguments; no secret may stand there, everybody on the machine can read it.
        environment: set on top of this process's own.
        last_signal: what it gets when its parent dies.
        grace_s: how long it may take to end when asked.
        restart: whether it is started again when it ends.
        pulls_down: names of children that are restarted too when this one ends by itself.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    last_signal: int = signal.SIGKILL
    grace_s: float = 10.0
    restart: bool = True
    pulls_down: tuple[str, ...] = ()


def end_with(parent: int) -> None:
    """End this process (SIGKILL) when its parent dies, however that dies; Linux alone can tell.

    Args:
        parent: which process that is; where it is dead already, this one ends now.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def console_script(name: str) -> str:
    """The path of a program that was installed with this Python.

    Raises:
        EngineError: if it is not there.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise errors.EngineError(f"program {name} is not installed beside {sys.executable}. Install fedvfm again")
    return found


def module(name: str, *arguments: str) -> tuple[str, ...]:
    """The command that runs a module of this package."""
    return (sys.executable, "-m", name, *arguments)


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pid_path(folder: Path, name: str) -> Path:
    """The pid file of a child."""
    return folder / f"{name}.pid"


def log_path(folder: Path, name: str) -> Path:
    """The log of a child."""
    return folder / f"{name}.log"


def write_pid(path: Path, pid: int) -> None:
    """Note which process this is: its number, and when the system started it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(pid).create_time()
        storage.write_text(path, json.dumps({"pid": pid, "started": started}) + "\n")


def own_pid() -> int:
    """The number of this process."""
    return os.getpid()


def running(path: Path) -> int | None:
    """The number of the process a pid file names, or None if it ended, whoever has the number now."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        process = psutil.Process(int(found["pid"]))
        same = abs(process.create_time() - float(found["started"])) < 1.0
        return process.pid if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None


def started(path: Path) -> float | None:
    """When the process began that a pid file names, in seconds since 1970; None if it ended."""
    pid = running(path)
    with contextlib.suppress(psutil.Error):
        return None if pid is None else psutil.Process(pid).create_time()
    return None


def end(path: Path, grace_s: float = 10.0) -> bool:
    """End the process a pid file names, and its group: first asked, then killed. Whether it ran.

    Raises:
        EngineError: if it cannot be ended.
    """
    pid = running(path)
    if pid is not None:
        try:
            for number, wait in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
                _signal(pid, number)
                deadline = time.monotonic() + wait
                while running(path) is not None and time.monotonic() < deadline:
                    time.sleep(0.05)
                if running(path) is None:
                    break
        except PermissionError:
            raise errors.EngineError(f"process {pid} of {path} is another user's; end it as that user") from None
        if running(path) is not None:
            raise errors.EngineError(f"process {pid} of {path} does not end, even killed. Look at it with: ps {pid}")
    path.unlink(missing_ok=True)
    return pid is not None


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number) if os.getpgid(pid) == pid else os.kill(pid, number)


@dataclass(frozen=True)
class Failure:
    """The error a process ended with, as it wrote it down itself.

    Attributes:
        code: of the error's class.
        exit_code: what the process ended with.
        text: for people.
    """

    code: str
    exit_code: int
    text: str

    def error(self, what: str) -> errors.EngineError:
        """As an error of this process, with the same codes."""
        raised = errors.EngineError(f"{what}: {self.text}")
        if self.exit_code > 0:  # a signal is no exit code of ours
            raised.code, raised.exit_code = self.code, self.exit_code
        return raised


def write_failure(error: errors.FedvfmError) -> None:
    """Leave the error this process ends with for whoever started it, where that asked for it."""
    path = os.environ.get(ERROR_FILE, "")
    values = {"pid": own_pid(), "code": error.code, "exit_code": error.exit_code, "text": str(error)}
    if path:
        with contextlib.suppress(errors.StorageError):  # a full disk: the exit code has to do
            storage.write_text(Path(path), json.dumps(values) + "\n")


def read_failure(path: Path, pid: int, code: int) -> Failure:
    """The error a process ended with.

    Args:
        path: where it was asked to write it.
        pid: the process; what another one wrote is not its error.
        code: its exit code; negative for a signal.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["pid"] == pid and values["exit_code"] == code:
            return Failure(str(values["code"]), code, str(values["text"]))
    return Failure(errors.FedvfmError.code, code, f"it ended with {_ending(code)} and left no error")


def error_path(folder: Path, name: str) -> Path:
    """Where a child writes the error it ends with."""
    return folder / f"{name}.error.json"


@contextlib.contextmanager
def repeated(work: Callable[[], float | None], wait_s: float, name: str, *, patient: bool = True) -> Iterator[None]:
    """Do work again and again in a thread while the block runs.

    Args:
        work: what is done; may return how long to wait after it, in seconds. Lets no exception out.
        wait_s: before the first time, and after each that returned nothing.
        name: of the thread.
        patient: whether work that is in hand when the block ends is waited for.
    """
    over = threading.Event()

    def run() -> None:
        wait: float | None = None
        while not over.wait(wait_s if wait is None else wait):
            wait = work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        if patient:
            thread.join()


@contextlib.contextmanager
def alone(folder: Path, name: str, what: str) -> Iterator[None]:
    """Be the only process of this name that works in a folder, which is made where there is none; known by a pid file.

    Args:
        folder: of the processes; private.
        name: of the pid file.
        what: this process in words, for who starts a second one.

    Raises:
        OutputInUse: if there is one already.
        StorageError: if the folder or the pid file cannot be made.
    """
    with storage.guard(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        handle = os.open(folder / f".{name}.lock", os.O_WRONLY | os.O_CREAT, 0o600)
    mine = pid_path(folder, name)
    try:
        if not _only(handle) or running(mine) is not None:  # the lock for two at once, the number for who has none
            pid = running(mine)
            raise errors.OutputInUse(f"{what} runs already ({f'process {pid}' if pid else 'it starts just now'})")
        write_pid(mine, own_pid())
        try:
            yield
        finally:
            mine.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _only(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: the pid file has to do
        return True
    return True


ASKED_TO_END = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def _handled(numbers: Iterable[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """These signals have another handler while the block runs."""
    before: dict[int, Any] = {}
    try:
        for number in numbers:
            before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextlib.contextmanager
def told_to_end() -> Iterator[threading.Event]:
    """Set when this process is asked to end (SIGTERM, Ctrl-C), which does nothing else while the block runs."""
    over = threading.Event()
    with _handled(ASKED_TO_END, lambda *_: over.set()):
        yield over


@contextlib.contextmanager
def signals_held_back(tell: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """What asks this process to end calls ``tell`` alone while the block runs, and its own handler later.

    A handler that raises may strike while a lock is being taken or given back, which then stays taken: every other
    thread that needs it waits for ever. In any thread but the main one, which no signal interrupts, nothing changes.

    Args:
        tell: called in the main thread, between any two of its steps; must neither raise nor wait for a lock.

    Yields: what runs the handlers of the signals that came; to be called where no lock is held, and called once more at
        the end of a block that raised nothing.
    """
    came: list[int] = []
    theirs = {number: signal.getsignal(number) for number in ASKED_TO_END}
    # What the system does by itself, or nothing, stays so.
    own = {int(number): handler for number, handler in theirs.items() if callable(handler)}

    def note(number: int, _frame: object) -> None:
        came.append(number)
        tell()

    def let_through() -> None:
        while came:
            number = came.pop(0)
            own[number](number, None)

    with _handled(own if threading.current_thread() is threading.main_thread() else (), note):
        yield let_through
    let_through()


def open_log(path: Path) -> int:
    """A file descriptor to append to a private log; one that has grown large is put aside first."""
    with storage.guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > LOG_BYTES:
            os.replace(path, path.with_suffix(".log.1"))
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


class Child:
    """One program and the process it is now.

    Args:
        program: what to run.
        folder: of pid file and log.
    """

    def __init__(self, program: Program, folder: Path) -> None:
        self.program, self.folder = program, folder
        self.process: subprocess.Popen[bytes] | None = None
        self.failures = 0
        self.due = 0.0
        self._began = 0.0

    def start(self) -> None:
        """Start it; one that an earlier parent left is ended first.

        Raises:
            StorageError: if its log or pid file cannot be written; it does not run then.
        """
        name = self.program.name
        end(pid_path(self.folder, name), 2.0)
        launch = (sys.executable, "-SEc", _LAUNCH, str(os.getpid()), str(int(self.program.last_signal)))
        log = open_log(log_path(self.folder, name))
        try:
            self.process = subprocess.Popen(
                [*launch, *self.program.command],
                env={**os.environ, **self.program.environment, ERROR_FILE: str(error_path(self.folder, name))},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        finally:
            os.close(log)
        self._began = time.monotonic()
        try:
            write_pid(pid_path(self.folder, name), self.process.pid)
        except errors.StorageError:
            self.stop(0.0)  # nobody could find and end it later
            self.process = None
            raise

    def try_start(self) -> None:
        """Start it; where the disk takes neither log nor pid file, say so and wait as if it had ended."""
        try:
            self.start()
        except errors.StorageError as error:
            LOG.error(f"{self.program.name} cannot be started now: {error}")
            self.postpone()

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs or was not started."""
        return None if self.process is None else self.process.poll()

    def failure(self) -> Failure:
        """The error it ended with; called when it has ended."""
        if self.process is None:
            raise errors.EngineError(f"{self.program.name} was not started")
        path = error_path(self.folder, self.program.name)
        return read_failure(path, self.process.pid, self.process.wait())

    def postpone(self) -> float:
        """Note that it ended by itself, and until when it waits: 1 s, doubled each time it did not run long."""
        self.failures = 1 if time.monotonic() - self._began > STEADY_S else self.failures + 1
        wait = min(2.0 ** (self.failures - 1), LONGEST_WAIT_S)
        self.due = time.monotonic() + wait
        self.process = None
        return wait

    def stop(self, patience_s: float | None = None) -> None:
        """End it, asked first; it may have ended already."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                _signal(self.process.pid, signal.SIGTERM) if self.process.poll() is None else None
                self.process.wait(self.program.grace_s if patience_s is None else patience_s)
            if self.process.poll() is None:
                _signal(self.process.pid, signal.SIGKILL)
            self.process.wait()
        pid_path(self.folder, self.program.name).unlink(missing_ok=True)

    def last_words(self, lines: int = 5) -> str:
        """The end of its log."""
        try:
            with log_path(self.folder, self.program.name).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
                found = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(found[-lines:])


def due(child: Child) -> bool:
    """Whether its wait is over."""
    return time.monotonic() >= child.due


class Family:
    """Children that live and end together; the log has when one ended and is started again.

    Args:
        folder: of their pid files and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.children: dict[str, Child] = {}
        self._lock = threading.RLock()

    def start(self, program: Program) -> Child:
        """Start a program as a new member."""
        with self._lock:  # else a watching thread would start it a second time
            child = Child(program, self.folder)
            self.children[program.name] = child
            child.start()
            return child

    def tick(self) -> None:
        """Look after all: what ended by itself is started again when its wait is over."""
        with self._lock:
            for name, child in self.children.items():
                self._look(name, child)

    def _look(self, name: str, child: Child) -> None:
        code = child.code
        if code is not None and child.program.restart:
            wait = child.postpone()
            LOG.warning(f"{name} ended ({_ending(code)}); started again in {wait:g} s")
            for other in child.program.pulls_down:
                self._pull_down(other)
        if child.process is None and child.program.restart and due(child):
            child.try_start()

    def _pull_down(self, name: str) -> None:
        child = self.children.get(name)
        if child is not None and child.code is None and child.process is not None:
            child.stop()
            child.process, child.due = None, time.monotonic()

    def stop(self) -> None:
        """End all, the last started first."""
        with self._lock:
            ending = list(reversed(self.children.values()))
            for child in ending:
                if child.process is not None and child.code is None:
                    _signal(child.process.pid, signal.SIGTERM)
            for child in ending:
                child.stop()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look after all in a thread; end all when the block ends, however it ends."""

        def watch() -> None:
            try:
                self.tick()
            except errors.FedvfmError as error:  # the others are looked after still
                LOG.error(str(error))

        try:
            with repeated(watch, POLL_S, "fedvfm-watch"):
                yield
        finally:
            self.stop()


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
