"""A federation in this process of which everything is kept that its coordinator sees: for ``fedvfm privacy audit``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import threadpoolctl
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedvfm import errors
from fedvfm.client import app as client_app
from fedvfm.client.training import site as sites
from fedvfm.flower import internals
from fedvfm.protocol import envelope, protocol
from fedvfm.report import progress
from fedvfm.server import app as server_app
from fedvfm.server.rounds import federation
from fedvfm.simulation.engines import in_process, workers
from fedvfm.simulation.results import site_errors
from fedvfm.state import checkpoint, state


@dataclass(frozen=True)
class Exchange:
    """A train message and its answer, as the coordinator has them.

    Attributes:
        round: from 1.
        site: that trained.
        base: the adapter it was sent.
        update: the adapter it came to: ``base`` with the arrays that it sent.
    """

    round: int
    site: str
    base: state.AdapterState
    update: state.AdapterState


class ObservedGrid(in_process.InProcessGrid):
    """Keeps what was asked and answered in training.

    Args:
        app: of all nodes.
        names: of the sites, node by node.
    """

    def __init__(self, app: ClientApp, names: Sequence[str]) -> None:
        super().__init__(app, len(names))
        self._names = names
        self.exchanges: list[Exchange] = []

    def _deliver(self, message: Message, body: workers.Body) -> Message:
        reply = super()._deliver(message, body)
        if message.metadata.message_type == protocol.TRAIN and not reply.has_error():
            task, update = envelope.of(message).task, envelope.of(reply).update
            if task.state is None:
                raise errors.ProtocolError("a train message came without an adapter")
            whole = state.AdapterState({**task.state, **update.state})
            site = self._names[message.metadata.dst_node_id - in_process.FIRST_NODE]
            self.exchanges.append(Exchange(task.round, site, task.state, whole))
        return reply


def run(
    job: federation.Job, members: Sequence[sites.Site], built: client_app.Models, observer: progress.Observer
) -> tuple[list[Exchange], list[state.AdapterState]]:
    """Train a federation, without tests.

    Args:
        job: what to run, in a folder of its own; its codec is the plain one.
        members: the sites.
        built: the models.
        observer: told of progress.

    Returns: what travelled, in order; and the global adapter before the first round and after each one.

    Raises:
        FedvfmError: what stopped the federation; where a site's own error did, that one.
    """
    seen = in_process.Errors()

    def site_of(context: Context) -> sites.Site:
        return members[int(context.node_config["partition-id"])]

    adapters = [job.locked.adapter]

    def watch(event: str, /, **fields: object) -> None:
        observer(event, **fields)
        if event == "round-end":
            adapters.append(checkpoint.read(checkpoint.path_of(job.folder / "checkpoints", len(adapters)))[0])

    def drive(one_run: federation.Federation) -> None:
        one_run.run(leave=lambda number: number > job.rounds)

    grid = ObservedGrid(client_app.make_client_app(site_of, built, seen), [site.name for site in members])
    server = server_app.make_server_app([dataclasses.replace(job, test_sites=())], watch, drive)
    with threadpoolctl.threadpool_limits(limits=1, user_api="blas"), site_errors.shown(lambda: seen.last):
        server(grid, internals.context(in_process.RUN_ID, internals.SERVER_NODE, {}))
    return grid.exchanges, adapters
