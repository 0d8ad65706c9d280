"""Our executor at a SuperNode: its own loop, stores and HTTP API in this process; the test plays the SuperLink."""

from __future__ import annotations

import datetime
import hashlib
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import uvicorn
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable import inflatable_object as trees
from flwr.supercore.inflatable import inflatable_utils as parts
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supernode import main, start_client_internal
from flwr.supernode.nodestate import NodeStateFactory

from fedvfm import errors
from fedvfm.client.process import executor
from fedvfm.flower import internals, long_poll, runtime, supernode
from fedvfm.flower import node as flower_node
from fedvfm.runtime import processes

SECRET = b"0" * 64
PATIENCE_S = 60.0


class SuperLink:
    """What a SuperNode asks of a SuperLink.

    Attributes:
        over: runs that ended.
        slow: seconds until each part of a message is there.
        frozen: the coordinator stands still: no further part of a message comes.
        errors: codes of replies that are errors.
        replies: run and id of the message, of each reply that arrived.
        receipt: what the receipt of a message meets.
    """

    def __init__(self) -> None:
        self._bundle = runtime.empty_bundle()
        self._waiting: list[tuple[Message, Any]] = []
        self._contents: dict[str, bytes] = {}
        self.over: set[int] = set()
        self.slow = 0.0
        self.most_bytes = 1_000_000
        self.replies: list[tuple[int, str]] = []
        self.errors: list[int] = []
        self.frozen = False
        self.pulled = 0
        self.receipt: Callable[[], None] = lambda: None

    def send(self, run: int) -> str:
        """A handshake of a run; its id."""
        internals.be_server_task(run)
        record = RecordDict({"recipe": ConfigRecord({"text": "the same in every run"})})
        record["adapter"] = ArrayRecord({str(n): Array(np.full(4, n, np.float32)) for n in range(3)})
        message = Message(record, 7, "query.handshake", ttl=600.0, group_id="0")
        message.metadata.__dict__["_message_id"] = message.object_id
        with trees.no_object_id_recompute():
            tree = trees.get_object_tree(message)
            contents = {key: part.deflate() for key, part in trees.get_all_nested_objects(message).items()}
        self._contents.update(contents)
        self._waiting.append((remove_content_from_message(message), tree))
        return str(tree.object_id)

    def send_garbage(self, run: int) -> str:
        """What Flower can take apart and is no message; its id. What it cannot it gives up by itself."""
        self.send(run)
        (head, _), body = self._waiting.pop(), ConfigRecord({"text": "no message"}).deflate()
        key = trees.get_object_id(body)
        head.metadata.__dict__["_message_id"] = key
        self._contents[key] = body
        self._waiting.append((head, ObjectTree(object_id=key)))
        return key

    def receive(self) -> Any:
        return self._waiting.pop(0) if self._waiting else None

    def get_run(self, run_id: int) -> Run:
        run = Run.create_empty(run_id)
        run.fab_hash, run.series_id = hashlib.sha256(self._bundle).hexdigest(), run_id
        return run

    def get_fab(self, fab_hash: str, run_id: int) -> Fab:
        return Fab(fab_hash, self._bundle, {})

    def pull_object(self, run_id: int, object_id: str) -> bytes:
        if run_id in self.over:
            raise RunNotRunningException
        if self.frozen and self.pulled:
            raise parts.ObjectUnavailableError(object_id)
        time.sleep(self.slow)
        self.pulled += 1
        return self._contents[object_id]

    def confirm(self, run_id: int, object_id: str) -> None:
        self.receipt()

    def send_reply(self, message: Message, tree: Any, seconds: float) -> tuple[set[str], str]:
        self.replies.append((message.metadata.run_id, message.metadata.reply_to_message_id))
        self.errors.extend([message.error.code] if message.has_error() else [])
        return {one.object_id for one in trees.iterate_object_tree(tree)}, "session"


class SuperNode:
    """Flower's loop, turned by hand where the order matters, and its HTTP API for the executor."""

    def __init__(self, link: SuperLink, port: int) -> None:
        factory = NodeStateFactory(ObjectStoreFactory())
        self.state, self.store = factory.state(), factory.objectstore_factory.store()
        self.state.set_node_id(7)
        self._link = link
        application = main.create_app(factory, SECRET)
        self.server = uvicorn.Server(
            uvicorn.Config(application, host="127.0.0.1", port=port, log_level="warning", ws="none")
        )

    def pull(self) -> int | None:
        """One message from the SuperLink; its run, where it came whole."""
        return start_client_internal._pull_and_store_message(
            state=self.state,
            object_store=self.store,
            node_config={},
            receive=self._link.receive,
            get_run=self._link.get_run,
            get_fab=self._link.get_fab,
            pull_object=self._link.pull_object,
            confirm_message_received=self._link.confirm,
            trusted_entities=None,
        )

    def push(self) -> None:
        """Wait for a reply and send it, as Flower does once after each message that came whole."""
        start_client_internal._push_messages(
            state=self.state,
            object_store=self.store,
            send=self._link.send_reply,
            push_object=lambda run_id, session, object_id, content: None,
        )


@pytest.fixture
def link() -> SuperLink:
    return SuperLink()


@pytest.fixture
def node(link: SuperLink) -> Iterator[SuperNode]:
    made = SuperNode(link, processes.free_port())
    thread = threading.Thread(target=made.server.run)
    thread.start()
    until(lambda: made.server.started)
    yield made
    made.server.should_exit = True
    thread.join(PATIENCE_S)


@pytest.fixture
def answered(node: SuperNode, link: SuperLink) -> Iterator[list[int]]:
    """The runs whose messages our executor answered, in order; less than 0 where nothing of it could be read."""
    found: list[int] = []
    stop = threading.Event()

    def answer(message: Message, context: Any) -> Message:
        found.append(message.metadata.run_id if len(message.content) else -message.metadata.run_id)
        return Message(RecordDict(), reply_to=message)

    at = runtime.Link(f"127.0.0.1:{node.server.config.port}", b"", SECRET)
    thread = threading.Thread(target=executor.serve, args=(at, answer, stop, lambda: link.most_bytes))
    thread.start()
    yield found
    stop.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_messages_of_runs_that_ended_hold_up_no_other(node: SuperNode, link: SuperLink, answered: list[int]) -> None:
    """A coordinator that was started again five times left four behind; a site then answered nobody for 20 minutes."""
    link.over = {1, 2, 3, 4}
    for run in sorted(link.over):
        link.send(run)
        assert node.pull() is None
    time.sleep(2 * executor.POLL_S)  # the executor takes the first, and waits for its parts
    asked = link.send(5)
    began = time.monotonic()
    assert node.pull() == 5
    node.push()
    assert link.replies == [(5, asked)], "no reply of another run takes its place"
    assert answered == [5]
    assert time.monotonic() - began < 30.0
    assert len(node.store) == 0, "the parts that came of the others are gone"
    assert {task.status.status for task in node.state.get_tasks()} == {"finished"}


def test_a_coordinator_that_stood_still_while_it_sent_is_told_that_its_message_was_given_up(
    node: SuperNode, link: SuperLink, answered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait until its round is over; told, it asks again."""
    losses, loop = flower_node.Losses(), vars(start_client_internal)
    fetching = losses.noticing(flower_node.telling(loop["pull_objects"], long_poll.Bell()))
    monkeypatch.setitem(loop, "pull_objects", fetching)
    monkeypatch.setitem(loop, "_pull_and_store_message", losses.telling(loop["_pull_and_store_message"]))
    monkeypatch.setattr(flower_node, "STALL_S", 0.5)
    link.frozen = True
    lost = link.send(1)
    assert node.pull() == 1
    node.push()
    assert (link.replies, link.errors, answered) == ([(1, lost)], [ErrorCode.MESSAGE_UNAVAILABLE], [])
    link.frozen = False
    link.over = {2}
    link.send(2)
    assert node.pull() is None, "of a run that ended nobody is told"
    asked = link.send(3)
    assert node.pull() == 3
    node.push()
    assert (link.replies[1:], answered) == ([(3, asked)], [3])
    assert len(node.store) == 0


def test_the_answer_to_a_message_that_was_given_up_takes_no_others_place(
    node: SuperNode, link: SuperLink, answered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its receipt could not be told, and was answered by then: the node would be one answer behind from then on."""
    losses, loop = flower_node.Losses(), vars(start_client_internal)
    monkeypatch.setitem(loop, "_pull_and_store_message", losses.telling(loop["_pull_and_store_message"]))
    monkeypatch.setitem(loop, "_push_messages", losses.answering(loop["_push_messages"]))

    def deaf() -> None:  # its answer is whole by now: one that comes later is refused with its task
        until(lambda: {task.status.status for task in node.state.get_tasks()} == {"finished"})
        raise ConnectionError("the handshake operation timed out")

    link.receipt = deaf
    given_up = link.send(1)
    assert node.pull() is None
    link.receipt = lambda: None
    asked = link.send(2)
    assert node.pull() == 2
    node.push()
    assert link.replies == [(1, given_up), (2, asked)]
    assert answered == [1, 2]


def test_a_reply_whose_parts_come_no_more_is_given_up(
    node: SuperNode, link: SuperLink, answered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that stood still ended the task between the head of the reply and its parts; the executor runs on."""
    losses, loop, store = flower_node.Losses(), vars(start_client_internal), node.state.store_message_and_object_tree
    monkeypatch.setitem(loop, "_pull_and_store_message", losses.telling(loop["_pull_and_store_message"]))
    monkeypatch.setitem(loop, "_push_messages", losses.answering(loop["_push_messages"]))
    monkeypatch.setattr(flower_node, "HAND_OVER_S", 1.0)

    def cut_off(*given: Any) -> Any:
        stored = store(*given)
        for record in node.state.task_token_store.values():  # type: ignore[attr-defined]
            record.active_until = datetime.datetime.min.replace(tzinfo=datetime.UTC)
        return stored

    node.state.store_message_and_object_tree = cut_off  # type: ignore[method-assign]
    cut = link.send(1)
    assert node.pull() == 1
    sending = threading.Thread(target=node.push, daemon=True)  # Flower's own never ends
    sending.start()
    sending.join(PATIENCE_S)
    assert not sending.is_alive()
    assert len(node.store) == 0
    node.state.store_message_and_object_tree = store  # type: ignore[method-assign]
    asked = link.send(1)  # again: the coordinator took the reply for lost
    assert node.pull() == 1
    node.push()
    assert (link.replies, link.errors, answered) == ([(1, cut), (1, asked)], [], [1, 1])
    assert len(node.store) == 0


def test_parts_that_come_slowly_or_in_another_order_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(flower_node.time, "monotonic", lambda: now[0])
    tree = ObjectTree(object_id="c", children=[ObjectTree(object_id="a"), ObjectTree(object_id="b")])
    contents = {"a": b"", "b": b"", "c": b""}
    store: Any = types.SimpleNamespace(get=contents.get, get_object_tree=lambda key: tree)
    handed = flower_node._HandedOver(store)

    def look(key: str, seconds: int) -> None:
        for _ in range(2 * seconds):
            now[0] += 0.5
            assert handed.get(key) == b""

    handed.get_object_tree("c")
    look("a", 59)
    now[0] += 3600.0  # the machine stood still
    assert handed.get("a") == b""
    contents["b"] = b"1"
    look("a", 59)
    contents["a"] = b"1"
    assert handed.get("a") == b"1"
    look("c", 59)
    with pytest.raises(parts.ObjectPullError, match="handed over no part of its reply for 60 s"):
        look("c", 130)


def test_a_slow_line_loses_no_message(
    node: SuperNode, link: SuperLink, answered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While parts are under way nothing else can be there; how long they take is then of no account."""
    monkeypatch.setattr(supernode, "STALL_S", 0.05)
    link.slow = 0.15
    for run in (1, 2):
        asked = link.send(run)
        assert node.pull() == run
        node.push()
        assert link.replies.pop() == (run, asked)
    assert answered == [1, 2]


def test_a_task_that_is_there_before_its_message(node: SuperNode, link: SuperLink, answered: list[int]) -> None:
    """A SuperNode makes the task first; who was quick found no message, and the SuperNode waited for its reply."""
    store = node.state.store_message

    def late(message: Message) -> str | None:
        time.sleep(4 * executor.POLL_S)
        return store(message)

    node.state.store_message = late  # type: ignore[method-assign]
    asked = link.send(1)
    assert node.pull() == 1
    node.push()
    assert (link.replies, answered) == ([(1, asked)], [1])


def test_an_older_task_that_is_offered_again_ends_no_message(
    node: SuperNode, link: SuperLink, answered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An executor that was killed leaves a task which comes back after newer ones."""
    link.over = {1}
    link.send(1)
    (claimed,) = [node.pull()]
    assert claimed is None
    (old,) = node.state.get_tasks()
    until(lambda: node.state.task_store[old.task_id].status.status == "running")  # type: ignore[attr-defined]
    link.slow = 0.3
    asked = link.send(2)
    real = link.pull_object

    def pull(run_id: int, object_id: str) -> bytes:
        if link.pulled == 1:  # the second is half there: the first one is offered once more
            node.state.create_task(task_type=TaskType.CLIENT_APP, run_id=1, fab_hash=old.fab_hash)
            made = max(node.state.get_tasks(run_ids=[1]), key=lambda task: task.pending_at)
            node.state.task_store[made.task_id].pending_at = old.pending_at  # type: ignore[attr-defined]
        return real(run_id, object_id)

    monkeypatch.setattr(link, "pull_object", pull)
    assert node.pull() == 2
    node.push()
    assert link.replies == [(2, asked)]


def test_an_executor_that_is_stopped_waits_for_no_part(node: SuperNode, link: SuperLink) -> None:
    link.over = {1}
    link.send(1)
    assert node.pull() is None
    stop = threading.Event()
    at = runtime.Link(f"127.0.0.1:{node.server.config.port}", b"", SECRET)
    tasks = supernode.NodeTasks(at, stop)
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(errors.EngineError, match="ObjectPullError"):
        tasks.take()
    tasks.close()


def test_a_part_that_is_late_while_another_task_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where clocks do not tell which of two is the later, patience decides, and the task is left to end by itself."""
    now = [0.0]
    monkeypatch.setattr(supernode.time, "monotonic", lambda: now[0])
    tasks = supernode.NodeTasks(runtime.Link("127.0.0.1:9", b"", SECRET), threading.Event())
    monkeypatch.setattr(tasks, "_take_ahead", lambda finder: None)
    tasks._held = [supernode._Offer("2020-01-01", "token", 1e9)]
    assert tasks._over("2020-01-02", 0.0) is None
    now[0] = supernode.STALL_S + 1.0
    assert tasks._over("2020-01-02", 0.0) is parts.ObjectPullError
    assert tasks._over("2019-12-31", now[0]) is supernode._Dead
    tasks.close()


def test_a_message_that_cannot_be_read_or_is_too_large_ends_nothing(
    node: SuperNode, link: SuperLink, answered: list[int]
) -> None:
    """Who answers is given it without content, and refuses that; the next message is answered as ever."""
    asked = [link.send_garbage(1)]
    assert node.pull() == 1
    node.push()
    link.most_bytes = 100
    asked.append(link.send(2))
    assert node.pull() == 2
    node.push()
    link.most_bytes = 1_000_000
    asked.append(link.send(3))
    assert node.pull() == 3
    node.push()
    assert answered == [-1, -2, 3]
    assert link.replies == list(zip((1, 2, 3), asked, strict=True))
    assert {task.status.sub_status for task in node.state.get_tasks()} == {"completed"}
    assert len(node.store) == 0
