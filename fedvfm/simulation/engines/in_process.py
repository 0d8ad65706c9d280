"""The in-process engine: a Flower Grid without network. One frozen backbone in memory, N adapters.

Every message is serialised and parsed again, as a transport would, so sites share nothing and bytes are real. With one
worker the sites of all arms compute in this process, one after another. With several, arms go on side by side, each in
a thread of its own that waits for its sites' replies, and the sites compute in forked workers. Both ways give the same
bits.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import threadpoolctl
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedvfm import errors
from fedvfm.client import app as client_app
from fedvfm.client.gate import held_adapters
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.flower import internals
from fedvfm.model import adapted_model
from fedvfm.protocol import protocol
from fedvfm.report import progress
from fedvfm.server import app as server_app
from fedvfm.server.rounds import federation
from fedvfm.simulation import repeats, run_folder
from fedvfm.simulation.engines import attacked_grid, worker_schedule, workers
from fedvfm.simulation.results import site_errors

RUN_ID = 1
FIRST_NODE = 100
ALARM_S = 20


class Errors:
    """Keeps the last error of a site, so that a simulation can show what a real coordinator never sees."""

    def __init__(self) -> None:
        self.last: errors.FedvfmError | None = None

    def __call__(self, where: str, error: Exception) -> None:
        """Take one."""
        self.last = site_errors.explain(where, error)

    def take(self, error: errors.FedvfmError) -> None:
        """Take one that another process has explained already."""
        self.last = error


class LocalGrid(Grid):
    """What Grids without network share. A subclass answers messages in ``pull_messages``.

    Args:
        nodes: their ids.
    """

    def __init__(self, nodes: Iterable[int]) -> None:
        self._nodes = list(nodes)
        self._numbers = itertools.count(1)
        self._run = internals.empty_run(RUN_ID)
        internals.be_server_task(RUN_ID)

    @property
    def run(self) -> Any:
        """Flower's record of this run."""
        return self._run

    def set_run(self, run: Any) -> None:
        """Take another record."""
        self._run = run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message from the server to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return list(self._nodes)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies at once."""
        return [reply for message_id in self.push_messages(messages) for reply in self.pull_messages([message_id])]

    def _numbered(self, messages: Iterable[Message]) -> list[tuple[str, Message, workers.Body]]:
        """Each message with its new id and its records; those that share records have one body, serialised once."""
        bodies: dict[int, workers.Body] = {}
        rows = []
        for message in messages:
            message_id, content = f"m{next(self._numbers):012d}", id(message.content)
            internals.set_message_id(message, message_id)
            if content not in bodies:
                bodies[content] = workers.Body(internals.body(message.content))
            rows.append((message_id, message, bodies[content]))
        return rows


class InProcessGrid(LocalGrid):
    """Runs each message's ClientApp when its reply is asked for, one at a time, in the order they were pushed.

    Args:
        app: the ClientApp of all nodes.
        nodes: number of nodes; their ids are ``FIRST_NODE`` and up.
        job: the arm whose Grid this is; None where there is no other.
        shared: replies that several arms ask for.
        begin: told of each message before it is answered.
    """

    def __init__(
        self,
        app: ClientApp,
        nodes: int,
        job: federation.Job | None = None,
        shared: repeats.Repeats[Reply] | None = None,
        begin: Callable[[Message], None] = lambda message: None,
    ) -> None:
        self._contexts = contexts(nodes)
        super().__init__(self._contexts)
        self._app, self._job, self._shared, self._begin = app, job, shared, begin
        self._waiting: dict[str, tuple[Message, workers.Body]] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages until their replies are asked for."""
        rows = self._numbered(messages)
        self._waiting |= {message_id: (message, body) for message_id, message, body in rows}
        return [message_id for message_id, _, _ in rows]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the first message of these that still waits; its reply, or nothing."""
        for message_id in message_ids:
            if message_id in self._waiting:
                return [self._deliver(*self._waiting.pop(message_id))]
        return []

    def _deliver(self, message: Message, body: workers.Body) -> Message:
        if self._job is None or self._shared is None:
            return internals.received(self._answer(message, body)[0])
        key = self._shared.key(self._job, message, body.data)
        known = self._shared.find(self._job, key)
        if known is not None:
            return addressed(known, message, self._job)
        data, failed = self._answer(message, body)
        if not failed:
            self._shared.keep(key, Reply(data, self._job.name), len(data))
        return internals.received(data)

    def _answer(self, message: Message, body: workers.Body) -> tuple[bytes, bool]:
        self._begin(message)
        arrived = internals.parse(internals.head(message) + body.data)
        reply = self._app(arrived, self._contexts[message.metadata.dst_node_id])
        return internals.serialise(reply), reply.has_error()


class WorkerGrid(LocalGrid):
    """The Grid of one arm whose messages are answered by workers; used from the arm's own thread.

    Args:
        pool: the workers of the run.
        job: the arm.
        names: of the sites, by node.
        shared: orders that several arms give.
        turns: whose messages go first.
        report: told of the errors of the arm's sites.
        begun: told when its sites have been asked for more than a handshake.
    """

    def __init__(
        self,
        pool: workers.Pool,
        job: federation.Job,
        names: Mapping[int, str],
        shared: repeats.Repeats[workers.Order],
        turns: worker_schedule.Schedule,
        report: Callable[[errors.FedvfmError], None],
        begun: Callable[[], None],
    ) -> None:
        super().__init__(names)
        self._pool, self._job, self._names, self._shared = pool, job, names, shared
        self._turns, self._report, self._begun = turns, report, begun
        self._waiting: dict[str, tuple[Message, workers.Order]] = {}
        self._idle = 0.0
        self.peak_mib = pool.peak_mib

    def clock(self) -> float:
        """Seconds of the monotonic clock, without those in which this arm only waited for turns of others."""
        return time.monotonic() - self._idle

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand the messages to the workers."""
        rows = self._numbered(messages)
        self._waiting |= {message_id: (message, self._order(message, body)) for message_id, message, body in rows}
        if any(message.metadata.message_type != protocol.HANDSHAKE for _, message, _ in rows):
            self._begun()
        return [message_id for message_id, _, _ in rows]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Wait until there are replies to some of these messages; those replies.

        Raises:
            Interrupted: if the run was stopped.
        """
        mine = {key: self._waiting[key][1] for key in message_ids if key in self._waiting}
        with self._pool.changed:
            while mine and not any(order.reply for order in mine.values()):
                self._pool.require_working()
                since, working = time.monotonic(), any(order.running for order in mine.values())
                self._pool.changed.wait()
                self._idle += 0.0 if working else time.monotonic() - since
        ready = [self._waiting.pop(key) for key, order in mine.items() if order.reply]
        return [addressed(Reply(order.reply, str(order.about["arm"])), message, self._job) for message, order in ready]

    def _order(self, message: Message, body: workers.Body) -> workers.Order:
        """The order of another arm that is equal, or a new one."""
        key = self._shared.key(self._job, message, body.data)
        known = self._shared.find(self._job, key)
        if known is not None and not known.failed:
            known.reports.append(self._report)
            return known
        about = message.metadata
        name, number = self._names[about.dst_node_id], int(about.group_id or 0)
        order = workers.Order(
            self._turns.rank(self._job, number, name, about.message_type),
            about.dst_node_id,
            internals.head(message),
            body,
            label(self._job, message, name),
            [self._report],
        )
        self._shared.keep(key, order, len(body.data))
        self._pool.submit(order)
        return order


@dataclass(frozen=True)
class Reply:
    """A serialised reply, and the arm that it was computed for."""

    data: bytes
    arm: str


def addressed(reply: Reply, message: Message, job: federation.Job) -> Message:
    """A reply as it arrives in answer to a message of an arm; it may have been computed for another arm's."""
    arrived = internals.received(reply.data, "" if reply.arm == job.name else reply.arm)
    internals.readdress(arrived, message.metadata.dst_node_id, message.metadata.message_id)
    return arrived


def label(job: federation.Job, message: Message, site: str) -> dict[str, Any]:
    """What the observer is told of a message's steps."""
    about = message.metadata
    phase = protocol.WORDS[about.message_type]
    return {"arm": job.name, "round": int(about.group_id or 0), "phase": phase, "site": site}


def contexts(nodes: int) -> dict[int, Context]:
    """The nodes' contexts, by id."""
    return {
        FIRST_NODE + index: internals.context(
            RUN_ID, FIRST_NODE + index, {"partition-id": index, "num-partitions": nodes}
        )
        for index in range(nodes)
    }


# -- the engine --------------------------------------------------------------------------------------------------------


def run(
    jobs: Sequence[federation.Job],
    members: Sequence[sites.Site],
    observer: progress.Observer,
    experiment: schema.Experiment,
) -> client_app.Models:
    """Run or resume every job with these sites, in this process or in workers forked from it.

    Returns: the models of this process.

    Raises:
        FedvfmError: what stopped a federation; where a site's own error did, that one.
    """
    nodes = {site.name: FIRST_NODE + index for index, site in enumerate(members)}
    team = Team(jobs, members, experiment)
    with threadpoolctl.threadpool_limits(limits=1, user_api="blas"):
        if team.number > 1:
            try:
                SideBySide(team, nodes, observer).run()
                return team.models
            except workers.CannotCompute as error:
                observer("note", text=f"1 worker: {error}")
        elif team.why:
            observer("note", text=team.why)
        _in_turn(team.of(1), nodes, observer)
    return team.models


class Team:
    """Who computes.

    Args:
        jobs: the arms.
        members: the sites.
        what: the experiment.

    Attributes:
        number: of workers.
        why: it is only one, where that deserves a word.
    """

    def __init__(self, jobs: Sequence[federation.Job], members: Sequence[sites.Site], what: schema.Experiment) -> None:
        self.members, self.what = members, what
        self._shared_folder = run_folder.RunFolder(run_folder.of_arm(jobs[0].folder)).residuals
        self.threads = worker_schedule.threads(what)
        recipes = {job.locked.recipe.hash: job.locked.recipe for job in jobs}
        self.models = client_app.Models(threads=1, recipes=len(recipes))
        self.number, self.why = worker_schedule.count(
            what, worker_schedule.side_by_side(jobs), self._build(list(recipes.values()))
        )
        self.jobs = self._marked(jobs, self.number)

    def _build(self, recipes: Sequence[schema.Recipe]) -> Callable[[], adapted_model.AdaptedModel]:
        """What builds the models before processes are forked, so that all share them; the first one."""

        def build() -> adapted_model.AdaptedModel:
            ranks = {site.rank: site for site in self.members}
            every = [self.models.get(site.recipe(recipe), "cpu") for recipe in recipes for site in ranks.values()]
            return every[0]

        return build

    @staticmethod
    def _marked(jobs: Sequence[federation.Job], number: int) -> list[federation.Job]:
        return [dataclasses.replace(job, machine={**job.machine, "workers": number}) for job in jobs]

    def of(self, number: int) -> Team:
        """The same with another number of workers."""
        self.number, self.jobs = number, self._marked(self.jobs, number)
        return self

    def app(self, report: client_app.Report, on_step: progress.Step) -> ClientApp:
        """The ClientApp of all sites."""

        def site_of(context: Context) -> sites.Site:
            return self.members[int(context.node_config["partition-id"])]

        # A codec sends differences to an adapter that came before, maybe to another worker.
        adapters = held_adapters.Adapters(self._shared_folder if self.number > 1 else None, held_adapters.ADAPTERS)
        return client_app.make_client_app(site_of, self.models, report, on_step=on_step, adapters=adapters)

    def prepare(self, index: int) -> None:
        """Called in a worker before its first message."""
        become_worker(self.members, self.models, self.what, self.number, index)


def become_worker(
    members: Sequence[sites.Site], built: client_app.Models, what: schema.Experiment, number: int, index: int
) -> None:
    """Make a forked process a worker: its threads, its share of what is kept of images, its GPU.

    Args:
        members: the sites.
        built: the models.
        what: the experiment.
        number: of workers.
        index: of this one, from 0.
    """
    threads = worker_schedule.threads(what)
    built.threads = threads
    torch.set_num_threads(threads)
    for kept in {id(site.cache): site.cache for site in members}.values():
        kept.divide(number)
    if what.device == "cuda":
        for site in members:
            site.device = f"cuda:{index}"
        torch.zeros(1, device=f"cuda:{index}")
    if threads > 1:
        # Where threads computed before the fork, these are waited for and never come; the system ends us then.
        signal.alarm(ALARM_S)
        torch.ones(1 << 20).sum()
        signal.alarm(0)


def _in_turn(team: Team, nodes: Mapping[str, int], observer: progress.Observer) -> None:
    """All arms one after another, all sites in this process."""
    seen, steps = Errors(), Steps(observer)
    team.models.threads, team.models.recipes = team.threads, 1
    torch.set_num_threads(team.threads)  # models that were built for workers are not built again
    app = team.app(seen, steps)
    shared: repeats.Repeats[Reply] = repeats.Repeats(team.jobs, nodes)
    names = {node: name for name, node in nodes.items()}
    for place, job in enumerate(team.jobs):

        def begin(message: Message, job: federation.Job = job) -> None:
            steps.about = label(job, message, names[message.metadata.dst_node_id])

        grid = InProcessGrid(app, len(nodes), job, shared, begin)
        carried = attacked_grid.between(grid, job, team.what, names)
        _drive(job, carried, seen, _numbered(observer, place, len(team.jobs)))


def _drive(job: federation.Job, grid: Grid, seen: Errors, observer: progress.Observer) -> None:
    """Run or resume one arm; where a site's error stopped it, that error is raised."""

    def watch(event: str, /, **fields: object) -> None:
        if event in ("arm", "round"):
            seen.last = None
        observer(event, **fields)

    server = server_app.make_server_app([job], watch)
    with site_errors.shown(lambda: seen.last):
        server(grid, internals.context(RUN_ID, internals.SERVER_NODE, {}))


def _numbered(observer: progress.Observer, place: int, count: int) -> progress.Observer:
    """The observer of one arm of several."""

    def watch(event: str, /, **fields: object) -> None:
        observer(event, **(fields | {"index": place, "count": count} if event == "arm" else fields))

    return watch


class Steps:
    """Tells the observer of steps, a few times a second at most."""

    def __init__(self, observer: progress.Observer) -> None:
        self.about: dict[str, Any] = {}
        self._observer, self._last = observer, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Take one."""
        if time.monotonic() - self._last >= workers.STEP_S:
            self._last = time.monotonic()
            self._observer("step", **self.about, done=done, total=total)


class SideBySide:
    """All arms at once, as many as keep the workers busy; each is driven from a thread of its own.

    Args:
        team: who computes.
        nodes: name of a site -> its node.
        observer: told of progress, by one thread at a time.
    """

    def __init__(self, team: Team, nodes: Mapping[str, int], observer: progress.Observer) -> None:
        self._team, self._names = team, {node: name for name, node in nodes.items()}
        self._lock, self._told = threading.RLock(), observer
        self._pool = workers.Pool(team.number, team.prepare, team.app, contexts(len(nodes)), self._observe)
        self._shared: repeats.Repeats[workers.Order] = repeats.Repeats(team.jobs, nodes)
        self._turns = worker_schedule.Schedule(team.jobs, team.members)
        self._waiting = collections.deque(self._turns.jobs)
        self._threads: list[threading.Thread] = []
        self._running: set[str] = set()
        self._beginning = ""
        self._failed: list[BaseException] = []

    def run(self) -> None:
        """Run or resume all arms.

        Raises:
            CannotCompute: if a worker cannot; nothing was done then.
            FedvfmError: what stopped an arm.
        """
        try:
            with self._pool.working():
                threads = f"{self._team.threads} thread{'s' * (self._team.threads > 1)} each"
                self._observe("note", text=f"{self._team.number} workers of {threads}")
                self._pool.serve(self._finished)
        finally:
            for thread in self._threads:
                thread.join()
        if self._failed:
            raise self._failed[0]

    def _observe(self, event: str, /, **fields: object) -> None:
        with self._lock:
            self._told(event, **fields)

    def _finished(self) -> bool:
        """Whether all is over; begins arms while there is room.

        One after another, so that the federation's first round is there when the sites alone ask for the same.
        """
        room = len(self._running) <= self._team.number and not self._beginning
        if self._waiting and not self._failed and room:
            job = self._waiting.popleft()
            self._beginning = job.name
            self._running.add(job.name)
            thread = threading.Thread(target=self._arm, args=(job,), name=f"fedvfm-arm-{job.name}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return bool(self._failed) or not (self._running or self._waiting)

    def _arm(self, job: federation.Job) -> None:
        try:
            seen, place = Errors(), [other.name for other in self._team.jobs].index(job.name)

            def begun() -> None:
                self._has_begun(job)

            grid = WorkerGrid(self._pool, job, self._names, self._shared, self._turns, seen.take, begun)
            carried = attacked_grid.between(grid, job, self._team.what, self._names)
            _drive(job, carried, seen, _numbered(self._observe, place, len(self._team.jobs)))
        except BaseException as error:
            self._failed.append(error)
        finally:
            self._has_begun(job)
            self._running.discard(job.name)
            self._pool.ring()

    def _has_begun(self, job: federation.Job) -> None:
        if self._beginning == job.name:
            self._beginning = ""
            self._pool.ring()
