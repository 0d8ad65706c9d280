"""``flwr run .`` in a clone: the doors' apps simulate a bundled experiment in Flower's Simulation Runtime.

The runtime makes as many nodes as it was told, two by default, and an experiment has its own number of virtual
hospitals. So the Grid here lets each node be several of them, one after another: results do not depend on the number.

These doors are for simulation alone. A real site never opens them: its SuperNode hands messages to our own executor,
which stands behind the site's policy. Started by a stock SuperNode or SuperLink, they refuse whatever they are told;
what they would run anywhere is a bundled experiment on public data, never a file that a message or a setting names.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.flower import internals
from fedvfm.model import precision
from fedvfm.protocol import protocol
from fedvfm.server import app as server_app
from fedvfm.server.rounds import federation
from fedvfm.simulation import experiment as experiments
from fedvfm.simulation.engines import worker_schedule
from fedvfm.simulation.results import site_errors

PRECISION = "precision.json"

LOG = logging.getLogger("flwr")
"""Flower's own, so that ``flwr run . --stream`` and ``flwr log`` show the lines."""

WHO = "fedvfm.virtual-hospital"
INSTALLED_ANEW = (
    "note: Flower installed torch and all else anew for this. FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 before "
    "the local SuperLink starts takes what is installed"
)
FIRST = 1000
PATIENCE_S = 60.0
PULL_S = 0.1

Settings = Mapping[str, Any]


def chosen(settings: Settings) -> schema.Experiment:
    """The experiment that a run's configuration names; both ends read it from there.

    Raises:
        ConfigError: unless it is a bundled one: no file that a setting names is read, no data but public data.
    """
    name, rounds = settings.get("experiment", ""), settings.get("rounds", 0)
    faults = []
    if name not in experiments.bundled():
        faults.append(f"experiment = {str(name)[:64]!r}: give one of {', '.join(experiments.bundled())}")
    if type(rounds) is not int or not 0 <= rounds <= 100_000:
        faults.append(f"rounds = {str(rounds)[:64]!r}: give a whole number; 0 takes the experiment's")
    if faults:
        raise errors.ConfigError("run config", faults)
    sets = [] if settings.get("baselines") is True else ["baselines=[]"]
    return experiments.load(str(name), sets, rounds=rounds or None, engine="ray")


# -- the client's door -------------------------------------------------------------------------------------------------


class Door(ClientApp):
    """The ClientApp of all nodes: answers as the virtual hospital that a message is for.

    Args:
        simulated: whether Flower's Simulation Runtime is the caller.
    """

    def __init__(self, simulated: Callable[[], bool] = internals.in_simulation_actor) -> None:
        super().__init__()
        self._simulated = simulated

    def __call__(self, message: Message, context: Context) -> Message:
        """The reply; a typed refusal, without a text, to whoever is no simulation."""
        try:
            index = self._index(message, context)
            app = _app(chosen(context.run_config).model_dump_json(), str(_faults(context.run_id)))
        except errors.FedvfmError as error:
            return Message(protocol.refusal(error), reply_to=message)
        before = context.node_config["partition-id"]
        context.node_config["partition-id"] = index
        try:
            reply: Message = app(message, context)
        finally:
            context.node_config["partition-id"] = before
        return reply

    def _index(self, message: Message, context: Context) -> int:
        if not self._simulated() or "partition-id" not in context.node_config:
            raise errors.ConfigError(
                "client", ["this app is for 'flwr run' on one machine; a site runs: fedvfm client"]
            )
        who = message.content.pop(WHO, None) if message.has_content() else None
        index = who.get("index") if isinstance(who, ConfigRecord) else None
        if not isinstance(index, int) or index < 0:
            raise errors.ProtocolError("a message for no virtual hospital")
        return index


@functools.lru_cache(maxsize=1)
def _app(experiment: str, faults: str) -> ClientApp:
    """The real ClientApp of one process: sites and models are built once and kept between messages.

    It computes in what the run began with, where it is on the run's machine.
    """
    from fedvfm.client import app as client_app
    from fedvfm.client.training import site as sites
    from fedvfm.model import device
    from fedvfm.simulation import run as runs

    what = schema.Experiment.model_validate_json(experiment)
    here = _private(Path(faults))
    if here:
        precision.take(device.choose(what.device), precision.read(Path(faults) / PRECISION))
    members = runs.members(what, experiments.hospitals(what), run=Path(faults) if here else None)

    def site_of(context: Context) -> sites.Site:
        index = int(str(context.node_config["partition-id"]))
        if index >= len(members):
            raise errors.ProtocolError("a message for no virtual hospital")
        return members[index]

    def report(where: str, error: Exception) -> None:
        if _private(Path(faults)):
            site_errors.leave(Path(faults), where, error)

    return client_app.make_client_app(site_of, client_app.Models(threads=worker_schedule.threads(what)), report)


def make_client_app() -> ClientApp:
    """What ``client/app.py`` hands to Flower."""
    return Door()


# -- the server's door -------------------------------------------------------------------------------------------------


class SharedNodes(Grid):
    """Virtual hospitals on fewer nodes: each node is asked as one of its hospitals, then as the next.

    Args:
        grid: Flower's.
        members: number of virtual hospitals; their node ids here are ``FIRST`` and up.
    """

    def __init__(self, grid: Grid, members: int) -> None:
        self._grid, self._members = grid, members
        self._nodes = self._wait()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, list[tuple[str, Message]]] = {node: [] for node in self._nodes}
        self._asked: dict[str, tuple[int, str, int]] = {}
        self._came: dict[str, Message] = {}

    def _wait(self) -> list[int]:
        """Flower starts a ServerApp while it still registers the nodes."""
        deadline, before = time.monotonic() + PATIENCE_S, [-1]
        while (found := sorted(self._grid.get_node_ids())) != before or not found:
            if time.monotonic() > deadline:
                raise errors.EngineError(f"no node came in {PATIENCE_S:g} s; give num-supernodes of 1 or more")
            before = found
            time.sleep(0.5)
        return found

    @property
    def run(self) -> Any:
        """Flower's record of this run."""
        return self._grid.run

    def set_run(self, run: Any) -> None:
        """Take another record."""
        self._grid.set_run(run)

    def create_message(
        self, content: Any, message_type: str, dst_node_id: int, group_id: str, ttl: Any = None
    ) -> Message:
        """A message from the server to a virtual hospital."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All virtual hospitals."""
        return range(FIRST, FIRST + self._members)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Put each in the queue of its node."""
        ids = []
        for message in messages:
            ids.append(f"v{next(self._numbers):012d}")
            node = self._nodes[(message.metadata.dst_node_id - FIRST) % len(self._nodes)]
            self._waiting[node].append((ids[-1], message))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that came; a node that has replied gets its next message, and its reply waits until it is wanted."""
        self._advance()
        for reply in list(self._grid.pull_messages(list(self._asked))) if self._asked else ():
            _, own, hospital = self._asked.pop(reply.metadata.reply_to_message_id)
            internals.readdress(reply, hospital, own)
            self._came[own] = reply
        self._advance()
        return [self._came.pop(key) for key in message_ids if key in self._came]

    def _advance(self) -> None:
        busy = {node for node, _, _ in self._asked.values()}
        for node, queue in self._waiting.items():
            if queue and node not in busy:
                own, message = queue.pop(0)
                for real in self._grid.push_messages([self._for_node(message, node)]):
                    self._asked[real] = (node, own, message.metadata.dst_node_id)

    @staticmethod
    def _for_node(message: Message, node: int) -> Message:
        about, content = message.metadata, message.content.copy()
        content[WHO] = ConfigRecord({"index": about.dst_node_id - FIRST})
        return Message(content, node, about.message_type, ttl=about.ttl, group_id=about.group_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push and wait for all replies, or until ``timeout``."""
        outstanding = set(self.push_messages(messages))
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        found: list[Message] = []
        while outstanding and time.monotonic() < deadline:
            for reply in self.pull_messages(outstanding):
                outstanding.discard(reply.metadata.reply_to_message_id)
                found.append(reply)
            time.sleep(PULL_S)
        return found


def make_server_app(simulated: Callable[[Any], bool] = internals.is_simulated) -> ServerApp:
    """What ``server/app.py`` hands to Flower: runs the experiment to its report.

    Args:
        simulated: whether a Grid is that of Flower's Simulation Runtime.

    Raises (when run):
        ConfigError: if it is not, or the run's configuration names no bundled experiment.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        if not simulated(grid):
            raise errors.ConfigError("server", ["this app is for 'flwr run' on one machine; use: fedvfm server start"])
        _simulate(grid, context)

    return app


def _simulate(grid: Grid, context: Context) -> None:
    from fedvfm.simulation import run as runs

    what = chosen(context.run_config)
    if "runtime-envs" in Path(os.environ.get("VIRTUAL_ENV", "")).parts:
        LOG.info(INSTALLED_ANEW)
    told = str(context.run_config.get("output") or "")
    output = Path(told) if told else runs.default_output(what.name)
    with _faults_of(context.run_id) as faults:

        def engine(jobs: Sequence[federation.Job], members: Sequence[Any], observer: Any, what: Any) -> None:
            precision.write(faults / PRECISION, what.device)
            with site_errors.shown(lambda: site_errors.last(faults)):
                server_app.make_server_app(jobs, observer)(SharedNodes(grid, len(members)), context)

        made = runs.simulate(what, output=output, observer=_say, engine=engine)
    LOG.info("adapter: %s   report: %s", (made.path / "adapter").absolute(), (made.path / "report.html").absolute())


def _say(event: str, /, **fields: Any) -> None:
    """Progress as lines of Flower's log."""
    if event == "round":
        LOG.info("%s round %s/%s: %s", fields["arm"], fields["round"], fields["rounds"], ", ".join(fields["sites"]))
    elif event == "note":
        LOG.info("%s", fields["text"])


# -- what a simulation may see of its sites' errors, and a coordinator never does --------------------------------------


def _faults(run_id: int) -> Path:
    return Path(tempfile.gettempdir()) / f"fedvfm-run-{os.getuid()}-{run_id}"


@contextmanager
def _faults_of(run_id: int) -> Iterator[Path]:
    """A folder for the sites' errors while a run lasts."""
    import shutil

    folder = _faults(run_id)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _private(folder):
        raise errors.StorageError(f"{folder} is another's; remove it")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _private(folder: Path) -> bool:
    """Whether it is a real folder of this user's alone."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
