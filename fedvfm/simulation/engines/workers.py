"""Workers: processes forked from this one, which hold its frozen backbone, its models and its sites without a copy.

Each answers one message at a time with the same ClientApp that one process would use, so the bits are the same: what a
site computes depends on the message and on streams keyed by its name, never on who computes it.

A fork takes over memory and no thread. So workers are forked before this process computes with several threads, and
each proves that it can compute before it gets a message. They end with this process, however that ends.
"""

from __future__ import annotations

import bisect
import contextlib
import gc
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection as connections
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from fedvfm import errors
from fedvfm.flower import internals
from fedvfm.report import progress
from fedvfm.runtime import processes
from fedvfm.simulation.results import site_errors

READY_S = 60.0
STEP_S = 0.25
"""A worker tells of its steps so often at most."""
MEASURE_S = 2.0
HELD_BYTES = 64 << 20
"""Of records that a worker keeps, because further sites get the same."""


class CannotCompute(errors.EngineError):
    """A worker could not begin; nothing was done yet."""


@dataclass(frozen=True)
class Body:
    """The records of messages, serialised; ``key`` tells those that many messages share."""

    data: bytes
    key: int = field(default_factory=itertools.count().__next__)


@dataclass(eq=False)
class Order:
    """One message that a worker is to answer, and its reply.

    Attributes:
        rank: the order of less rank goes first; those that agree in the first two numbers go in any order.
        node: whose message it is.
        head: the message without its records.
        body: its records.
        about: of its steps: arm, round, phase and site.
        reports: who are told of the site's own errors.
        reply: the serialised reply, empty until it is there.
        failed: whether that is an error.
        running: whether a worker computes it.
    """

    rank: tuple[float, ...]
    node: int
    head: bytes
    body: Body
    about: Mapping[str, Any]
    reports: list[Callable[[errors.FedvfmError], None]]
    reply: bytes = b""
    failed: bool = False
    running: bool = False


@dataclass(eq=False)
class _Worker:
    """One worker as this process sees it."""

    index: int
    process: Any
    line: Connection
    order: Order | None = None
    held: OrderedDict[int, int] = field(default_factory=OrderedDict)
    pss_mib: float = 0.0


class Pool:
    """The workers of a run.

    Args:
        count: how many.
        prepare: called in each worker first, with its number; what it computes must be safe there.
        app: makes the app that answers all messages, given who is told of a site's errors and of its steps.
        contexts: by node.
        observer: told of steps.
    """

    def __init__(
        self,
        count: int,
        prepare: Callable[[int], None],
        app: Callable[[Callable[[str, Exception], None], progress.Step], Callable[[Message, Context], Message]],
        contexts: Mapping[int, Context],
        observer: progress.Observer,
    ) -> None:
        self._count, self._prepare, self._app, self._contexts = count, prepare, app, contexts
        self._observer = observer
        self.changed = threading.Condition()
        self._bell, self._button = multiprocessing.Pipe(duplex=False)
        self._workers: list[_Worker] = []
        self._queue: list[Order] = []
        self._homes: dict[int, int] = {}
        self._stopped = False

    # -- a worker's life -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Workers that answer, until the block ends, however it ends.

        Raises:
            CannotCompute: if one of them cannot.
        """
        try:
            self._fork()
            self._wait_ready()
            yield
        finally:
            self.stop()
            for worker in self._workers:
                worker.process.kill()
            for worker in self._workers:
                worker.process.join()
                worker.line.close()
            self._bell.close()
            self._button.close()

    def _fork(self) -> None:
        forks = multiprocessing.get_context("fork")
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # what is not written yet must not be written twice
                stream.flush()
        gc.collect()
        gc.freeze()  # what is there already is not looked at again, so its pages stay shared
        try:
            for index in range(self._count):
                ours, theirs = forks.Pipe()
                others = [*(worker.line for worker in self._workers), ours, self._bell, self._button]
                arguments = (index, theirs, others, os.getpid())
                name = f"fedvfm-worker-{index + 1}"
                process = forks.Process(target=self._be_worker, args=arguments, name=name, daemon=True)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads: see above
                    try:
                        process.start()
                    except (AssertionError, OSError) as error:  # a daemon may have no children; no room for another
                        raise CannotCompute(f"worker {index + 1} of {self._count} cannot start: {error}") from error
                theirs.close()
                self._workers.append(_Worker(index, process, ours))
        finally:
            gc.unfreeze()

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        for worker in self._workers:
            said: Any = None
            with contextlib.suppress(EOFError, OSError):
                if worker.line.poll(max(0.0, deadline - time.monotonic())):
                    said = worker.line.recv()
            if said == ("ready",):
                continue
            why = str(said[1][1]) if said else f"it ended or did not answer in {READY_S:g} s"
            raise CannotCompute(f"worker {worker.index + 1} of {self._count} cannot compute: {why}")

    def _be_worker(self, index: int, line: Connection, others: Sequence[Connection], parent: int) -> None:
        """Be a worker; returns when this process is no longer wanted."""
        for other in others:
            other.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        processes.end_with(parent)
        # A display of the parent's may hold the streams, and their locks at the time of the fork.
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        with contextlib.suppress(EOFError, OSError):
            try:
                self._prepare(index)
            except Exception as error:
                line.send(("raised", site_errors.pack(f"worker {index + 1}", error)))
                return
            line.send(("ready",))
            self._answer_all(line)

    def _answer_all(self, line: Connection) -> None:
        told = measured = 0.0
        bodies: dict[int, bytes] = {}

        def report(where: str, error: Exception) -> None:
            line.send(("error", site_errors.pack(where, error)))

        def step(done: int, total: int) -> None:
            nonlocal told
            if time.monotonic() - told >= STEP_S:
                told = time.monotonic()
                line.send(("step", done, total))

        app = self._app(report, step)
        while True:
            node, head, key, body, dropped = line.recv()
            for old in dropped:
                bodies.pop(old, None)
            if body is not None:
                bodies[key] = body
            told = time.monotonic()
            try:
                reply = app(internals.parse(head + bodies[key]), self._contexts[node])
                content = internals.serialise(reply)
            except BaseException as error:
                known = error if isinstance(error, Exception) else errors.Interrupted(type(error).__name__)
                line.send(("raised", site_errors.pack("a worker", known)))
                continue
            if time.monotonic() - measured > MEASURE_S:
                measured = time.monotonic()
                line.send(("memory", pss_mib()))
            line.send(("reply", reply.has_error(), content))

    # -- the parent's side ---------------------------------------------------------------------------------------------

    def submit(self, order: Order) -> None:
        """Put an order in the queue; :attr:`changed` tells when it runs and when its reply is there."""
        with self.changed:
            bisect.insort(self._queue, order, key=lambda one: one.rank)
        self.ring()

    def ring(self) -> None:
        """Let :meth:`serve` look whether it is finished, and at the queue."""
        with contextlib.suppress(OSError):  # it may be over already
            self._button.send_bytes(b"!")

    def stop(self) -> None:
        """Let nobody wait for a reply any more."""
        with self.changed:
            self._stopped = True
            self.changed.notify_all()

    def require_working(self) -> None:
        """Called by whoever waits for a reply.

        Raises:
            Interrupted: if none will come.
        """
        if self._stopped:
            raise errors.Interrupted("stopped")

    def serve(self, finished: Callable[[], bool]) -> None:
        """Hand out orders and take replies until ``finished``, which is asked after each :meth:`ring`.

        Raises:
            EngineError: if a worker ends.
            KeyboardInterrupt: if this process is asked to end; :attr:`changed`, for which others wait, is free then.
        """
        lines = {worker.line: worker for worker in self._workers}
        with processes.signals_held_back(self.ring) as let_signals_through:
            while not finished():
                self._hand_out()
                for ready in connections.wait([*lines, self._bell]):
                    if ready is self._bell:
                        while self._bell.poll():
                            self._bell.recv_bytes()
                    else:
                        self._hear(lines[ready])  # type: ignore[index]
                let_signals_through()

    def _hand_out(self) -> None:
        for worker in self._workers:
            with self.changed:
                if worker.order is None and self._queue:
                    order = self._queue.pop(self._choice(worker.index))
                    order.running, worker.order = True, order
                    self._homes[order.node] = worker.index
                    self.changed.notify_all()
                    self._send(worker, order)

    def _choice(self, index: int) -> int:
        """Of the orders that go first, one of a site this worker served last; else one of a new site; else the first.

        So a site sticks to a worker, which holds its images already, and no worker waits where another has work left.
        """
        alike, new = self._queue[0].rank[:2], None
        for at, order in enumerate(self._queue):
            if order.rank[:2] != alike:
                break
            home = self._homes.get(order.node)
            if home == index:
                return at
            new = at if new is None and home is None else new
        return new or 0

    def _send(self, worker: _Worker, order: Order) -> None:
        body, dropped = None, []
        if order.body.key not in worker.held:
            body = order.body.data
            worker.held[order.body.key] = len(body)
            while len(worker.held) > 1 and sum(worker.held.values()) > HELD_BYTES:
                dropped.append(worker.held.popitem(last=False)[0])
        worker.held.move_to_end(order.body.key)
        with contextlib.suppress(OSError):  # it ended: its line says so next
            worker.line.send((order.node, order.head, order.body.key, body, dropped))

    def _hear(self, worker: _Worker) -> None:
        try:
            kind, *said = worker.line.recv()
        except (EOFError, OSError):
            raise self._lost(worker) from None
        order = worker.order
        if kind == "memory":
            worker.pss_mib = max(worker.pss_mib, said[0])
        elif order is None:
            raise errors.EngineError(f"worker {worker.index + 1} answered what nobody asked")
        elif kind == "step":
            self._observer("step", **order.about, done=said[0], total=said[1])
        elif kind == "error":
            for report in order.reports:
                report(site_errors.unpack(said[0]))
        elif kind == "raised":
            raise site_errors.unpack(said[0])
        else:
            with self.changed:
                order.failed, order.reply = said
                order.running, worker.order = False, None
                self.changed.notify_all()

    def _lost(self, worker: _Worker) -> errors.EngineError:
        worker.process.join(5.0)
        code, at = worker.process.exitcode, worker.order.about if worker.order else {}
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        doing = f" during {at['phase']} of round {at['round']} at site '{at['site']}', arm '{at['arm']}'" if at else ""
        return errors.EngineError(
            f"worker {worker.index + 1} of {self._count} (process {worker.process.pid}) ended with {how}{doing}; it "
            f"had used {worker.pss_mib:,.0f} MiB. If the system ended it for want of memory, take fewer: --workers 1. "
            "What was finished before is kept, go on with --resume"
        )

    def peak_mib(self) -> float:
        """Peak memory of this process and all workers, what they share counted once, in MiB."""
        return round(pss_mib() + sum(worker.pss_mib for worker in self._workers), 1)


def pss_mib() -> float:
    """Peak memory of this process in MiB, as if its share in memory of several processes had not changed since."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with contextlib.suppress(OSError, ValueError, KeyError):
        rows = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
        size = {row[0]: float(row[1]) / 1024 for row in rows}
        return max(0.0, peak - size["Rss:"] + size["Pss:"])
    return peak
