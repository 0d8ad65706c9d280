"""The in-process engine: a Flower Grid without network. One frozen backbone in memory, N adapters.

Every message is serialised and parsed again, as a transport would, so sites share nothing and bytes are real.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedvfm import config as configs
from fedvfm import errors, flower, progress
from fedvfm.client import app as client_app
from fedvfm.client import site as sites
from fedvfm.server import app as server_app
from fedvfm.server import strategy
from fedvfm.simulation import site_errors

RUN_ID = 1
FIRST_NODE = 100


class InProcessGrid(Grid):
    """Runs each message's ClientApp when its reply is asked for, one at a time, in the order they were pushed.

    Args:
        app: the ClientApp of all nodes.
        nodes: number of nodes; their ids are ``FIRST_NODE`` and up.
    """

    def __init__(self, app: ClientApp, nodes: int) -> None:
        self._app = app
        self._contexts = {
            FIRST_NODE + index: flower.context(
                RUN_ID, FIRST_NODE + index, {"partition-id": index, "num-partitions": nodes}
            )
            for index in range(nodes)
        }
        self._waiting: dict[str, Message] = {}
        self._pushed = 0
        self._run = flower.empty_run(RUN_ID)
        flower.be_server_task(RUN_ID)

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
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages until their replies are asked for."""
        ids = []
        for message in messages:
            self._pushed += 1
            flower.set_message_id(message, f"m{self._pushed:012d}")
            self._waiting[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the first message of these that still waits; its reply, or nothing."""
        for message_id in message_ids:
            message = self._waiting.pop(message_id, None)
            if message is not None:
                return [self._deliver(message)]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies at once."""
        return [reply for message_id in self.push_messages(messages) for reply in self.pull_messages([message_id])]

    def _deliver(self, message: Message) -> Message:
        reply = self._app(flower.copy(message), self._contexts[message.metadata.dst_node_id])
        return flower.copy(reply)


class Errors:
    """Keeps the last error of a site, so that a simulation can show what a real coordinator never sees."""

    def __init__(self) -> None:
        self.last: errors.FedvfmError | None = None

    def __call__(self, where: str, error: Exception) -> None:
        """Take one."""
        self.last = site_errors.explain(where, error)


def run(
    jobs: Sequence[strategy.Job],
    members: Sequence[sites.Site],
    observer: progress.Observer,
    experiment: configs.Experiment,
) -> None:
    """Run or resume every job with these sites in this process.

    Raises:
        FedvfmError: what stopped the federation; where a site's own error did, that one.
    """
    seen = Errors()

    def site_of(context: Context) -> sites.Site:
        return members[int(context.node_config["partition-id"])]

    def watch(event: str, /, **fields: object) -> None:
        if event in ("arm", "round"):
            seen.last = None
        observer(event, **fields)

    app = client_app.make_client_app(site_of, report=seen)
    grid = InProcessGrid(app, len(members))
    server = server_app.make_server_app(jobs, watch)
    with site_errors.shown(lambda: seen.last):
        server(grid, flower.context(RUN_ID, flower.SERVER_NODE, {}))
