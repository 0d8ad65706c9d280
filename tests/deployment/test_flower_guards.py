"""What our SuperLink and Grid hold to where Flower's trust more, each against Flower's own parts."""

from __future__ import annotations

import ast
import importlib
import inspect
import threading
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import HTTPException
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, message_pb2, node_pb2, runtime_pb2
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree

from fedvfm.flower import guards, internals, superlink
from fedvfm.protocol import protocol
from fedvfm.server.grid import retrying
from fedvfm.server.network import proxy

SECRET = b"s" * 64
INTERNALS = {
    "flwr.app.message",
    "flwr.common",
    "flwr.common.constant",
    "flwr.proto",
    "flwr.supercore",
    "flwr.supercore.constant",
    "flwr.supercore.inflatable",
    "flwr.supercore.interceptors",
    "flwr.supercore.object_store",
    "flwr.supercore.primitives",
    "flwr.supercore.runtime",
    "flwr.supercore.state.schema.linkstate_models",
    "flwr.superlink",
    "flwr.superlink.auth_plugin",
    "flwr.superlink.grid",
    "flwr.superlink.servicer.fleet",
}


@pytest.fixture(autouse=True)
def _be_server() -> None:
    internals.be_server_task(1)


def test_nothing_else_of_flower_is_used() -> None:
    found = set()
    for module in (guards, superlink):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        found |= {str(name) for name in names if str(name).startswith("flwr")}
    assert found - {"flwr.app"} == INTERNALS


# --- what a node pushes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
def test_of_a_push_of_many_parts_few_are_looked_at(monkeypatch: pytest.MonkeyPatch, deep: bool) -> None:
    walk, looked = guards.trees.iterate_object_tree, []

    def counted(tree: Any) -> Any:
        for part in walk(tree):
            looked.append(part)
            yield part

    monkeypatch.setattr(guards.trees, "iterate_object_tree", counted)
    tree = message_pb2.ObjectTree(children=[message_pb2.ObjectTree() for _ in range(5000)])
    if deep:
        tree = message_pb2.ObjectTree(children=[tree, tree])
    pushed = fleet_pb2.PushMessagesRequest(message_object_trees=[tree])
    assert guards.request_fault(pushed, 40) == 413
    assert len(looked) <= 41 * 3  # counted once a level


def test_a_node_pushes_one_message_at_a_time() -> None:
    tree, message = message_pb2.ObjectTree(), message_pb2.Message()
    for pushed in (
        fleet_pb2.PushMessagesRequest(message_object_trees=[tree, tree]),
        fleet_pb2.PushMessagesRequest(messages_list=[message, message]),
    ):
        assert guards.push_fault(pushed.SerializeToString(), 40) == 413


def test_the_parts_of_the_largest_reply_fit_into_the_head_of_a_push() -> None:
    parts = [message_pb2.ObjectTree(object_id="a" * 64)] * guards.most_parts(guards.MAX_REPLY)
    assert message_pb2.ObjectTree(children=parts).ByteSize() < proxy.MAX_PUSH / 2


# --- the Control API --------------------------------------------------------------------------------------------------


def test_only_who_shows_the_token_is_let_in() -> None:
    plugin = superlink.OwnerOnly(SECRET)
    token = guards.control_token(SECRET)
    let_in, account = plugin.validate_tokens_in_metadata([("flwr-oidc-access-token", token)])
    assert let_in
    assert account.account_name
    for wrong in ([], [("flwr-oidc-access-token", token[:-1])], [("flwr-oidc-access-token", "ü")], [("other", token)]):
        assert plugin.validate_tokens_in_metadata(wrong) == (False, None)
    assert SECRET.decode() not in token


def test_flower_asks_the_plugin_it_is_given() -> None:
    program = importlib.import_module("flwr.superlink.cli.flower_superlink")
    source = inspect.getsource(program._parse_superlink_lifespan_config)
    assert "authn_plugin = load_control_authn_plugin()" in source
    assert callable(program.flower_superlink)


def test_flower_looks_its_handler_up_when_it_is_called_and_ours_lets_a_node_speak_for_itself_alone() -> None:
    from flwr.superlink.routers.fleet import router

    assert "return fleet_handlers.push_messages(request=request, state=state)" in inspect.getsource(router)
    seen: list[Any] = []
    handler = superlink.own_pushes(lambda request, state: seen.append(state))
    message = message_to_proto(reply(7))
    handler(fleet_pb2.PushMessagesRequest(node=node_pb2.Node(node_id=7), messages_list=[message]), "state")
    assert seen == ["state"]
    with pytest.raises(HTTPException) as refused:
        handler(fleet_pb2.PushMessagesRequest(node=node_pb2.Node(node_id=8), messages_list=[message]), "state")
    assert refused.value.status_code == 403
    assert seen == ["state"]


# --- what a node takes ------------------------------------------------------------------------------------------------


@dataclass
class Link:
    """Flower's handlers of a node's requests on its own data base, one node and a run that goes on."""

    state: Any
    node: int
    run: int
    handlers: Any

    def send(self, word: str) -> str:
        """A message to the node; its id."""
        internals.be_server_task(self.run)
        sent = Message(RecordDict({"a": ConfigRecord({"x": word})}), self.node, "train", ttl=600.0, group_id="1")
        sent.metadata.__dict__["_message_id"] = key = sent.object_id
        self.state.object_store.preregister(self.run, get_object_tree(sent))
        assert self.state.store_message_ins(remove_content_from_message(sent)) == key
        return key

    def take(self) -> list[str]:
        """What the node gets that asks for messages."""
        asked = fleet_pb2.PullMessagesRequest(node=node_pb2.Node(node_id=self.node))
        answer = self.handlers.pull_messages(request=asked, state=self.state, store=self.state.object_store)
        return [one.metadata.message_id for one in answer.messages_list]

    def confirm(self, key: str) -> None:
        """The node has it whole."""
        asked = message_pb2.ConfirmMessageReceivedRequest(
            node=node_pb2.Node(node_id=self.node), run_id=self.run, message_object_id=key
        )
        self.handlers.confirm_message_received(request=asked, state=self.state, store=self.state.object_store)


@pytest.fixture
def link(tmp_path: Path) -> Link:
    from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
    from flwr.server.superlink.linkstate import LinkStateFactory
    from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.superlink.federation import NoOpFederationManager
    from flwr.superlink.servicer.fleet import fleet_handlers as flowers

    base = str(tmp_path / "state.db")
    state: Any = LinkStateFactory(base, NoOpFederationManager(), ObjectStoreFactory(base)).state()
    node = state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, b"key", 30)
    state.activate_node(node, 30)
    run = state.create_run("a/b", "1", "c", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
    (task,) = state.get_tasks(run_ids=[run])
    state.claim_task(task.task_id)
    state.activate_task(task.task_id)
    names = ("pull_messages", "push_messages", "confirm_message_received", "activate_node")
    handlers = types.SimpleNamespace(**{name: getattr(flowers, name) for name in names})
    return Link(state, node, run, handlers)


def test_a_message_whose_answer_was_lost_is_handed_out_again_until_the_node_has_it(link: Link) -> None:
    """A coordinator that stood still for over 30 s finds questions that nobody waits for, and answers them first."""
    first = link.send("one")
    assert (link.take(), link.take()) == ([first], []), "Flower's own: a lost one is never seen again"
    source = inspect.getsource(importlib.import_module("flwr.superlink.routers.fleet.router"))
    superlink.HandedOut().watch(link.handlers)
    assert all(f"return fleet_handlers.{name}(" in source for name in vars(link.handlers)), "looked up when called"
    second, third = link.send("two"), link.send("three")
    assert [link.take(), link.take()] == [[second], [second]]
    link.confirm(second)
    assert link.take() == [third]
    link.handlers.push_messages(
        request=fleet_pb2.PushMessagesRequest(
            node=node_pb2.Node(node_id=link.node),
            messages_list=[message_to_proto(_answer(link, third))],
            message_object_trees=[get_object_tree(_answer(link, third))],
        ),
        state=link.state,
    )
    assert link.take() == [], "who answered has had it"


def test_a_receipt_while_its_message_is_looked_for_loses_nothing(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question that waited long is answered while the node, which has the message, says so: one after the other."""
    superlink.HandedOut().watch(link.handlers)
    first = link.send("one")
    assert link.take() == [first]
    find, receipts = link.state.object_store.get_object_tree, list[threading.Thread]()

    def found(key: str) -> Any:
        tree = find(key)
        if not receipts:
            receipts.append(threading.Thread(target=link.confirm, args=(first,)))
            receipts[0].start()
            receipts[0].join(0.2)
        return tree

    monkeypatch.setattr(link.state.object_store, "get_object_tree", found)
    assert link.take() == [first], "it is still whole"
    receipts[0].join()
    assert link.take() == [], "it has it now, and may answer"
    with link.state.session() as session:
        assert session.get(superlink.MessageIns, first) is not None, (
            "Flower deletes one that it finds without its parts"
        )


def test_a_message_is_not_handed_out_for_ever_nor_after_its_run(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    superlink.HandedOut().watch(link.handlers)
    monkeypatch.setattr(superlink, "MOST_AGAIN", 3)
    first = link.send("one")
    assert [link.take() for _ in range(6)] == [[first]] * 4 + [[]] * 2
    second = link.send("two")
    assert link.take() == [second]
    link.handlers.activate_node(
        request=fleet_pb2.ActivateNodeRequest(public_key=b"key", heartbeat_interval=30), state=_offline(link)
    )
    assert link.take() == [], "a node that began anew is asked anew by the grid"
    third = link.send("three")
    assert link.take() == [third]
    (task,) = link.state.get_tasks(run_ids=[link.run])
    link.state.finish_task(task.task_id, "stopped", "")
    assert link.take() == []


def _offline(link: Link) -> Any:
    link.state.deactivate_node(link.node)
    return link.state


def _answer(link: Link, to: str) -> Message:
    asked = Message(RecordDict(), link.node, "train", ttl=60.0, group_id="1")
    internals.set_message_id(asked, to)
    answer = Message(Error(3, "lost"), reply_to=asked)
    answer.metadata.__dict__["_message_id"] = answer.object_id
    return answer


def test_our_client_shows_the_token() -> None:
    seen: list[Any] = []

    class Context:
        request = httpx.Request("POST", "https://127.0.0.1/v1/control/list-nodes")

    guards.ShowToken(SECRET).intercept(Context(), lambda context: seen.append(context))  # type: ignore[arg-type, return-value]
    assert seen[0].request.headers["authorization"] == f"Bearer {guards.control_token(SECRET)}"


# --- replies ----------------------------------------------------------------------------------------------------------


class Store:
    """Stands where the SuperLink stands: announced replies, and the parts of them that came."""

    def __init__(self) -> None:
        self.announced: list[tuple[Any, Any]] = []
        self.parts: dict[str, bytes] = {}
        self.confirmed: list[str] = []
        self.asked: list[list[str]] = []

    def PullMessages(self, request: Any) -> Any:
        self.asked.append(list(request.message_ids))
        mine = [pair for pair in self.announced if pair[0].metadata.reply_to_message_id in request.message_ids]
        self.announced = [pair for pair in self.announced if pair not in mine]
        return runtime_pb2.PullAppMessagesResponse(
            messages_list=[pair[0] for pair in mine], message_object_trees=[pair[1] for pair in mine]
        )

    def PullObject(self, request: Any) -> Any:
        data = self.parts.get(request.object_id)
        return message_pb2.PullObjectResponse(
            object_found=data != b"gone", object_available=data is not None, object_content=data or b""
        )

    def ConfirmMessageReceived(self, request: Any) -> Any:
        self.confirmed.append(request.message_object_id)
        return message_pb2.ConfirmMessageReceivedResponse()

    def announce(self, reply: Message, parts: dict[str, bytes] | None = None, root: str = "") -> None:
        proto = message_to_proto(reply)
        proto.ClearField("content")
        objects = {key: one.deflate() for key, one in get_all_nested_objects(reply).items()}
        proto.metadata.message_id = root or reply.object_id
        tree = get_object_tree(reply)
        if root:
            tree = message_pb2.ObjectTree(object_id=root)
        self.announced.append((proto, tree))
        self.parts |= objects if parts is None else parts


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store()
    monkeypatch.setattr(superlink.CarefulGrid, "_runtime_client", made)
    return made


@pytest.fixture
def grid(store: Store) -> superlink.CarefulGrid:
    made = superlink.CarefulGrid("127.0.0.1:1", False, None, token="t")
    made.set_run(internals.empty_run(1))
    return made


def reply(node: int = 7, to: str = "m1", size: int = 3) -> Message:
    asked = Message(RecordDict(), node, "train", ttl=60.0, group_id="1")
    internals.set_message_id(asked, to)
    return Message(RecordDict({"a": ConfigRecord({"x": "y" * size})}), reply_to=asked)


def test_a_reply_comes_as_it_was_sent(store: Store, grid: superlink.CarefulGrid) -> None:
    sent = reply()
    store.announce(sent)
    store.announce(reply(8, "m2"))
    (first, second) = grid.pull_messages(["m1", "m2"])
    assert first.content["a"]["x"] == "yyy"
    assert first.metadata.src_node_id == 7
    assert second.metadata.reply_to_message_id == "m2"
    assert store.confirmed == [first.metadata.message_id, second.metadata.message_id]
    assert grid.pull_messages(["m3"]) == []


def test_a_reply_whose_parts_do_not_come_holds_up_nobody(
    store: Store, grid: superlink.CarefulGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = reply(7, "m1")
    store.announce(slow, parts={})
    store.announce(reply(8, "m2"))
    (other,) = grid.pull_messages(["m1", "m2"])
    assert other.metadata.src_node_id == 8
    assert grid.pull_messages(["m1"]) == []
    assert grid.pull_messages(["m7"]) == []
    assert store.asked.pop() == ["m7"]
    assert store.asked == [["m1", "m2"]], "the SuperLink has forgotten m1: asked again it would say so"
    store.parts |= {key: one.deflate() for key, one in get_all_nested_objects(slow).items()}
    assert grid.pull_messages(["m7"]) == [], "who asks for another's reply does not get this one"
    (late,) = grid.pull_messages(["m1"])
    assert late.content["a"]["x"] == "yyy"
    # One that never comes is as lost, and asked for again.
    monkeypatch.setattr(superlink, "WAIT_S", 0.0)
    store.announce(reply(9, "m4", 5), parts={})
    (lost,) = grid.pull_messages(["m4"])
    assert lost.error.code in internals.TRANSPORT_ERRORS
    assert retrying.SteadyGrid._lost(lost)


def test_a_large_reply_over_a_slow_line_is_not_lost_while_parts_still_come(
    store: Store, grid: superlink.CarefulGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 MB at 2 Mbit/s take four minutes; only a line on which nothing comes gives a reply up."""
    now = 1000.0
    monkeypatch.setattr(superlink.time, "monotonic", lambda: now)
    slow = reply(7, "m1")
    store.announce(slow, parts={})
    assert grid.pull_messages(["m1"]) == []
    parts = {key: one.deflate() for key, one in get_all_nested_objects(slow).items()}
    assert len(parts) > 2
    for number, (key, data) in enumerate(parts.items(), start=1):
        now += 0.9 * superlink.WAIT_S
        store.parts[key] = data
        found = list(grid.pull_messages(["m1"]))
        assert bool(found) == (number == len(parts))
    assert found[0].content["a"]["x"] == "yyy"
    # Some of it and then nothing more is lost after all.
    store.announce(reply(7, "m2", 9), parts={})
    assert grid.pull_messages(["m2"]) == []
    now += superlink.WAIT_S + 1
    (lost,) = grid.pull_messages(["m2"])
    assert lost.error.code in internals.TRANSPORT_ERRORS


def test_the_grid_waits_at_the_superlink_and_for_parts_ever_longer(
    store: Store, grid: superlink.CarefulGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(superlink.time, "sleep", slept.append)
    monkeypatch.setattr(superlink.CarefulGrid, "_held", lambda self, seconds: store)
    grid.wait(["m1", "m2"], 0.5)
    assert (store.asked, slept) == ([["m1", "m2"]], []), "the SuperLink holds the question"
    slow = reply(7, "m1")
    store.announce(slow, parts={})
    grid.wait(["m1", "m2"], 0.5)
    assert (len(store.asked), slept) == (2, [])
    for _ in range(7):
        grid.wait(["m1", "m2"], 0.5)
    assert (len(store.asked), slept) == (2, [0.02, 0.04, 0.08, 0.16, 0.32, 0.5, 0.5])
    store.parts |= {key: one.deflate() for key, one in get_all_nested_objects(slow).items()}
    (found,) = grid.pull_messages(["m1"])
    assert found.content["a"]["x"] == "yyy"


def test_the_held_question_is_asked_by_a_client_of_its_own() -> None:
    grid = superlink.CarefulGrid("127.0.0.1:1", True, None, token="t")
    client = grid._held(0.5)
    assert grid._held(0.5) is client
    assert client._retry_invoker is grid._retry_invoker
    grid.close()
    assert client._client.is_closed


def test_parts_that_make_no_message_are_a_word(store: Store, grid: superlink.CarefulGrid) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return (exec, ("raise SystemExit('unpickled')",))

    content = reply(3, "m5").content
    bodies = [
        pickle.dumps(Bomb()),
        b"Message  5\x00abcde",
        b"Nothing  0\x00",
        b"Message " + b"0" * 64 + b" 0\x00",
        content.deflate(),  # a record where the message should be
        b"",
    ]
    for number, body in enumerate(bodies):
        store.announce(reply(number + 2, f"b{number}"), {get_object_id(body): body or b" "}, get_object_id(body))
    store.announce(reply(99, "m9"))
    found = {one.metadata.src_node_id: one for one in grid.pull_messages([f"b{n}" for n in range(6)] + ["m9"])}
    assert found.pop(99).content["a"]["x"] == "yyy"
    assert sorted(found) == list(range(2, 8))
    for one in found.values():
        assert (one.error.code, one.error.reason) == (1040, "malformed")
        assert protocol.error_word(one) == "malformed"
        assert one.error.code not in internals.TRANSPORT_ERRORS


def test_the_head_is_what_the_superlink_checked_not_what_the_reply_says(
    store: Store, grid: superlink.CarefulGrid
) -> None:
    inner = reply(8, "m2")  # what another site would have answered
    outer = reply(7, "m1")
    proto = message_to_proto(outer)
    proto.ClearField("content")
    proto.metadata.message_id = inner.object_id
    store.announced.append((proto, get_object_tree(inner)))
    store.parts |= {key: one.deflate() for key, one in get_all_nested_objects(inner).items()}
    (found,) = grid.pull_messages(["m1", "m2"])
    assert (found.metadata.src_node_id, found.metadata.reply_to_message_id) == (7, "m1")
    assert found.metadata.dst_node_id == SUPERLINK_NODE_ID


def test_a_reply_over_the_limit_is_not_read_to_its_end(
    store: Store, grid: superlink.CarefulGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superlink.CarefulGrid, "most_bytes", 10_000)
    store.announce(reply(7, "m1", 50_000))
    store.announce(reply(8, "m2", 500))
    found = {one.metadata.src_node_id: one for one in grid.pull_messages(["m1", "m2"])}
    assert protocol.error_word(found[7]) == "oversized"
    assert not found[8].has_error()


def test_an_error_of_a_site_stays_its_own_words(store: Store, grid: superlink.CarefulGrid) -> None:
    asked = Message(RecordDict(), 7, "train", ttl=60.0, group_id="1")
    internals.set_message_id(asked, "m1")
    store.announce(Message(Error(1005, "refused"), reply_to=asked))
    (found,) = grid.pull_messages(["m1"])
    assert (found.error.code, found.error.reason) == (1005, "refused")
