"""Every internal of Flower that ``fedvfm/flower/internals.py`` stands on, held to what we need of it.

When a release of Flower moves one of these, the test that fails names it, and only ``flower.py`` changes.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common import serde
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore import telemetry
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from fedvfm import errors
from fedvfm.flower import guards, internals, long_poll, runtime
from fedvfm.flower import node as flower_node
from fedvfm.flower import superlink as flower_superlink
from fedvfm.flower import supernode as flower_supernode
from fedvfm.simulation.engines import in_process

# What flower.py takes from below Flower's public faces; a new one needs a test here.
INTERNALS = {
    "flwr.app.user_config",
    "flwr.common",
    "flwr.common.serde_utils",
    "flwr.proto.message_pb2",
    "flwr.supercore",
    "flwr.supercore.run",
    "flwr.supercore.task_identity",
    "flwr.superlink.grid.inmemory_grid",
}
BY_NAME = {"flwr.simulation.run_simulation"}


@pytest.fixture(autouse=True)
def _be_server() -> None:
    internals.be_server_task(1)


def message() -> Message:
    arrays = {
        "block.00.q.A": Array(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "empty": Array(np.zeros((0, 4), np.float32)),
    }
    header = ConfigRecord({"text": "ü", "whole": 2**62, "real": 0.1, "flag": True, "list": ["a", "b"]})
    content = RecordDict(
        {"adapter": ArrayRecord(arrays), "header": header, "metrics": MetricRecord({"loss": 0.5, "values": [1.0, 2.0]})}
    )
    return Message(content, 7, "train", ttl=60.0, group_id="3")


def test_nothing_else_is_used() -> None:
    tree = ast.parse(Path(str(internals.__file__)).read_text())
    found = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("flwr")
    }
    assert found - {"flwr.app", "flwr.clientapp", "flwr.serverapp"} == INTERNALS
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module"
    ]
    assert {ast.literal_eval(call.args[0]) for call in calls} == BY_NAME


def test_the_pinned_release() -> None:
    """Both are held by this file; a later one is tried before it is let in."""
    assert importlib.metadata.version("flwr").rpartition(".")[0] in ("1.41", "1.42")


def test_a_message_needs_to_know_its_task() -> None:
    internals.be_server_task(5)
    assert (TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id) == (5, 1, internals.SERVER_NODE)
    made = message()
    assert made.metadata.run_id == 5
    assert made.metadata.src_node_id == internals.SERVER_NODE
    assert made.metadata.dst_node_id == 7


def test_serde_round_trip_keeps_every_value_and_shares_nothing() -> None:
    assert callable(serde.message_to_proto)
    assert callable(serde.message_from_proto)
    assert hasattr(ProtoMessage, "FromString")
    sent = message()
    got = internals.parse(internals.serialise(sent))
    assert dict(got.content.config_records["header"]) == dict(sent.content.config_records["header"])
    assert dict(got.content.metric_records["metrics"]) == {"loss": 0.5, "values": [1.0, 2.0]}
    for name, array in sent.content.array_records["adapter"].items():
        arrived = got.content.array_records["adapter"][name].numpy()
        assert arrived.dtype == np.float32
        np.testing.assert_array_equal(arrived, array.numpy())
        assert not np.shares_memory(arrived, array.numpy())
    for field in ("run_id", "src_node_id", "dst_node_id", "message_type", "group_id", "ttl"):
        assert getattr(got.metadata, field) == getattr(sent.metadata, field), field


def test_size_and_copy_are_those_of_the_serialised_message() -> None:
    sent = message()
    arrived = internals.copy(sent)
    assert internals.size(sent) == internals.size(arrived) == len(internals.serialise(sent))
    assert arrived is not sent


def test_a_message_is_its_head_and_its_records() -> None:
    """So messages to many sites share what is large of them."""
    sent = message()
    assert internals.head(sent) + internals.body(sent.content) == internals.serialise(sent)
    other = Message(sent.content, 9, "train", ttl=60.0, group_id="3")
    got = internals.received(internals.head(other) + internals.body(sent.content), origin="federated")
    assert got.metadata.dst_node_id == 9
    assert got.content.config_records["header"]["text"] == "ü"
    assert internals.size(got) == len(internals.serialise(got))
    assert (internals.origin(got), internals.origin(sent)) == ("federated", "")
    again = internals.parse_records(internals.records(sent.content))
    assert internals.records(again) == internals.records(sent.content)
    for other_bytes in (b"records", b"\xff" * 40):
        with pytest.raises(ValueError, match="no records"):
            internals.parse_records(other_bytes)


def test_replies_carry_the_id_that_was_set() -> None:
    sent = message()
    internals.set_message_id(sent, "m1")
    assert sent.metadata.message_id == "m1"
    arrived = internals.copy(sent)
    for reply in (Message(RecordDict(), reply_to=arrived), Message(Error(1002, "data"), reply_to=arrived)):
        back = internals.copy(reply)
        assert back.metadata.reply_to_message_id == "m1"
        assert (back.metadata.src_node_id, back.metadata.dst_node_id) == (7, internals.SERVER_NODE)
    assert back.has_error()
    assert (back.error.code, back.error.reason) == (1002, "data")


def test_context_and_run() -> None:
    made = internals.context(1, 100, {"partition-id": 3, "num-partitions": 4})
    assert isinstance(made, Context)
    assert dict(made.node_config) == dict(UserConfig({"partition-id": 3, "num-partitions": 4}))
    assert made.node_config["partition-id"] == 3
    assert (made.run_id, made.node_id) == (1, 100)
    run = internals.empty_run(9)
    assert isinstance(run, Run)
    assert run.run_id == 9


def test_a_reply_can_be_given_another_address() -> None:
    sent = message()
    internals.set_message_id(sent, "m1")
    reply = Message(RecordDict(), reply_to=internals.copy(sent))
    internals.readdress(reply, 12, "m9")
    back = internals.copy(reply)
    assert (back.metadata.src_node_id, back.metadata.reply_to_message_id) == (12, "m9")


def test_the_grid_of_simulations_is_known_and_no_other() -> None:
    simulated = InMemoryGrid.__new__(InMemoryGrid)
    assert internals.is_simulated(simulated)
    assert not internals.is_simulated(in_process.InProcessGrid(ClientApp(), 1))
    assert not internals.in_simulation_actor()


# --- Flower's Simulation Runtime --------------------------------------------------------------------------------------


def test_simulation_runtime_takes_what_we_give_it() -> None:
    module = importlib.import_module("flwr.simulation.run_simulation")
    known = inspect.signature(module._run_simulation).parameters
    assert {"num_supernodes", "exit_event", "server_app", "client_app", "backend_config"} <= set(known)
    assert "PYTHON_API_RUN_SIMULATION_LEAVE" in telemetry.EventType.__members__


def test_flower_reports_nothing_home() -> None:
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert "FLWR_TELEMETRY_ENABLED" in vars(telemetry), (
        "run_on_ray sets it there, for those who imported Flower before us"
    )


def test_actors_call_the_client_app_by_these_words() -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    from flwr.simulation.ray_transport import ray_actor

    from fedvfm.simulation.engines import ray as engine

    assert "app(message=message, context=context)" in inspect.getsource(ray_actor.VirtualClientEngineActor.run)
    assert list(inspect.signature(engine.VirtualNodes.__call__).parameters)[1:] == ["message", "context"]


def test_a_server_app_waits_for_all_nodes_and_a_stopped_one_ends_at_its_next_look() -> None:
    import threading

    class Grid:
        looks = 0
        nodes = 0

        def get_node_ids(self) -> list[int]:
            self.nodes += 1  # registered one after another, while the app already runs
            return list(range(self.nodes))

        def pull_messages(self, message_ids: list[str]) -> list[Message]:
            self.looks += 1
            stop.set()
            return []

    def app(grid: Grid, context: Context) -> None:
        for _ in range(10):
            grid.pull_messages([])

    stop, grid = threading.Event(), Grid()
    with pytest.raises(errors.Interrupted):
        internals._Stoppable(app, stop, 3)(grid, internals.context(1, 0, {}))
    assert (grid.nodes, grid.looks) == (3, 1)
    with pytest.raises(errors.Interrupted):
        internals._Stoppable(app, stop, 9)(Grid(), internals.context(1, 0, {}))
    assert grid.looks == 1


def test_what_breaks_in_ray_is_one_error_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("flwr.simulation.run_simulation")
    seen = []

    def broken(**given: object) -> None:
        seen.append(given)
        os.environ["PYTHONPATH"] = "changed"
        try:
            raise ValueError("ActorPool is empty")
        except ValueError as error:
            raise RuntimeError("An error was encountered. Ending simulation.") from error

    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.setattr(module, "_run_simulation", broken)
    with pytest.raises(errors.EngineError, match="ValueError: ActorPool is empty"):
        internals.run_on_ray(None, None, 2, 1, 0.0)  # type: ignore[arg-type]
    assert seen[0]["num_supernodes"] == 2
    assert os.environ["PYTHONPATH"] == "before"


# --- real processes ---------------------------------------------------------------------------------------------------

RUNTIME_INTERNALS = {
    "flwr.app.message",
    "flwr.common",
    "flwr.common.constant",
    "flwr.proto",
    "flwr.supercore.constant",
    "flwr.supercore.control",
    "flwr.supercore.fab",
    "flwr.supercore.heartbeat",
    "flwr.supercore.inflatable",
    "flwr.supercore.interceptors",
    "flwr.supercore.primitives",
    "flwr.supercore.retry",
    "flwr.supercore.run",
    "flwr.supercore.runtime",
    "flwr.supercore.task_identity",
    "flwr.supernode.fleet_http_client",
    "flwr.supernode.node_auth_http_interceptor",
    "flwr.supernode.runtime",
}


def test_nothing_else_is_used_at_run_time() -> None:
    trees = [ast.parse(Path(str(module.__file__)).read_text()) for module in (runtime, flower_supernode)]
    found = {
        str(node.module)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("flwr")
    }
    assert found - {"flwr.app", "flwr.serverapp"} == RUNTIME_INTERNALS


def test_the_fleet_routes_are_those_of_the_superlink() -> None:
    """The proxy forwards these and no others: a new route is a decision, not an accident."""
    from flwr.superlink.routers.fleet.router import router

    found = {(path, method) for route in router.routes for path, method in _paths(route)}
    assert found == {(path, "POST") for path in runtime.FLEET_ROUTES}
    assert guards.PULL_ROUTE in runtime.FLEET_ROUTES


def _paths(route: object) -> list[tuple[str, str]]:
    return [(route.path, method) for method in route.methods]  # type: ignore[attr-defined]


def test_an_empty_answer_for_messages_has_no_byte() -> None:
    """By that the proxy knows it, and holds it back."""
    from flwr.proto import fleet_pb2

    assert fleet_pb2.PullMessagesResponse().SerializeToString() == b""


# --- events in place of looks -----------------------------------------------------------------------------------------

NODE_INTERNALS = {
    "flwr.app",
    "flwr.common.constant",
    "flwr.supercore.exit",
    "flwr.supercore.inflatable",
    "flwr.supercore.run",
    "flwr.supernode",
}


def test_nothing_else_is_used_by_the_supernode() -> None:
    tree = ast.parse(Path(str(flower_node.__file__)).read_text())
    found = {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in found if name.startswith("flwr")} == NODE_INTERNALS


def test_the_supernodes_loop_sleeps_and_fetches_where_it_can_be_woken() -> None:
    from flwr.supercore.exit import exit_handler
    from flwr.supernode import main as nodes
    from flwr.supernode import start_client_internal as loops

    program = importlib.import_module("flwr.supernode.cli.flower_supernode")
    loop, push = inspect.getsource(loops.start_client_internal), inspect.getsource(loops._push_messages)
    assert f"time.sleep({flower_node.IDLE_S:g})" in loop
    assert push.count("time.sleep(0.5)") == 2, "for the reply, and for each of its parts"
    whole = inspect.getsource(loops)
    assert "time.monotonic" not in whole
    assert "time.time" not in whole
    pull = inspect.getsource(loops._pull_and_store_message)
    assert pull.index("state.create_task(") < pull.index("pull_objects("), "which rings for the task"
    assert {"initial_backoff", "pull_object_fn"} <= set(inspect.signature(loops.pull_objects).parameters)
    assert "pull_object_fn=" in pull
    assert "run_id = _pull_and_store_message(" in loop, "looked up when it is called"
    assert (
        pull.index("except Exception") < pull.index("state.delete_messages(") < pull.index("return None\n\n    except")
    )
    start = inspect.getsource(program.flower_supernode)
    assert start.index("stop_http_server)") < start.index("start_client_internal("), "ours is called before that"
    assert "LIFO" in str(exit_handler.add_exit_handler.__doc__)
    assert "import (" in inspect.getsource(program._start_supernode_http_api), "looked up when it is called"
    assert callable(nodes.create_app)


def test_a_message_whose_parts_come_no_more_is_given_up_and_a_slow_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore.inflatable import inflatable_utils

    monkeypatch.setattr(flower_node, "STALL_S", 0.4)
    pull, rung = flower_node.telling(inflatable_utils.pull_objects, bell := long_poll.Bell()), 0
    came: list[str] = []

    def slowly(part: str) -> bytes:
        if part == "slow":
            time.sleep(1.0)
        elif part == "never" or (part == "late" and "slow" not in came):
            raise inflatable_utils.ObjectUnavailableError(part)
        came.append(part)
        return b"x"

    assert set(pull(["slow", "late"], pull_object_fn=slowly)) == {"slow", "late"}
    assert bell.rung(flower_node.TASKS) == rung + 1
    began = time.monotonic()
    with pytest.raises(inflatable_utils.ObjectPullError):
        pull(["never", "at once"], pull_object_fn=slowly)
    assert time.monotonic() >= began + 0.4
    assert bell.rung(flower_node.TASKS) == rung + 2


def test_time_in_which_the_other_end_stood_still_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first answer after 45 s is that a part is not there yet; the part comes a moment later."""
    from flwr.supercore.inflatable import inflatable_utils

    now = [1000.0]
    monkeypatch.setattr(flower_node.time, "monotonic", lambda: now[0])
    waits = iter([45.0])

    def ask(part: str) -> bytes:
        now[0] += next(waits, 1.0)
        raise inflatable_utils.ObjectUnavailableError(part)

    coming = flower_node._Coming(ask)
    for _ in range(1 + int(flower_node.STALL_S)):
        with pytest.raises(inflatable_utils.ObjectUnavailableError):
            coming("part")
    with pytest.raises(inflatable_utils.ObjectPullError):
        coming("part")


@pytest.mark.parametrize("in_turn", [False, True], ids=["Flower's own", "one after another"])
def test_threads_on_one_data_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_turn: bool) -> None:
    """Of Flower's threads those that wait too long for the only writer are told that the data base is locked."""
    import threading

    from flwr.server.superlink.linkstate import sql_linkstate
    from flwr.supercore import sql_mixin
    from sqlalchemy import exc, text

    assert issubclass(sql_linkstate.SqlLinkState, sql_mixin.SqlMixin)
    assert {"busy_timeout": "5000", "journal_mode": "WAL"}.items() <= dict(vars(sql_mixin)["SQLITE_PRAGMAS"]).items()
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", (("busy_timeout", "60"), ("journal_mode", "WAL")))
    monkeypatch.setattr(sql_mixin, "run_migrations", lambda engine: None)
    if in_turn:
        monkeypatch.setattr(sql_mixin.SqlMixin, "session", flower_superlink.in_turn(sql_mixin.SqlMixin.session))
    base = sql_mixin.SqlMixin(str(tmp_path / "state.db"))
    base.initialize()
    base.query("CREATE TABLE t (n INTEGER)")
    base.query("INSERT INTO t VALUES (0)")
    locked: list[str] = []

    def write() -> None:
        try:
            with base.session() as session:
                session.execute(text("UPDATE t SET n = n + 1"))
                base.query("SELECT n FROM t")  # a session in a session
                time.sleep(0.03)
        except exc.OperationalError as error:
            locked.append(str(error.orig))

    threads = [threading.Thread(target=write) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (row,) = base.query("SELECT n FROM t")
    assert row["n"] == 20 - len(locked)
    assert bool(locked) is not in_turn, locked


def test_what_an_executor_says_rings() -> None:
    from flwr.supernode import main as nodes

    paths = {context.route.path for context in _routes(nodes.create_app())}
    assert {f"/v1/runtime/{name}" for name in flower_node.RINGS} | {guards.TASK_ROUTE} <= paths


def test_what_the_superlink_holds_and_what_rings_there() -> None:
    from flwr.proto import fleet_pb2, message_pb2, node_pb2, runtime_pb2
    from flwr.superlink import main as links

    program = importlib.import_module("flwr.superlink.cli.flower_superlink")
    assert "import (" in inspect.getsource(program._run_superlink_http_api), "looked up when it is called"
    assert "uvicorn.run(" in inspect.getsource(program._run_superlink_http_api)
    assert "self.handle_exit" in inspect.getsource(program.uvicorn.Server.capture_signals), "which ours stands before"
    paths = {context.route.path for context in _routes(links.create_app())}
    assert {guards.REPLY_ROUTE, guards.PULL_ROUTE, "/v1/runtime/push-messages"} <= paths
    assert runtime_pb2.PullAppMessagesResponse().SerializeToString() == b""
    asked = fleet_pb2.PullMessagesRequest(node=node_pb2.Node(node_id=7)).SerializeToString()
    pushed = runtime_pb2.PushAppMessagesRequest(
        messages_list=[ProtoMessage(metadata=message_pb2.Metadata(dst_node_id=node)) for node in (7, 8, 7)]
    ).SerializeToString()
    assert flower_superlink._asking_node(asked) == "7"
    assert flower_superlink._addressed_nodes(pushed) == {"7", "8"}
    assert flower_superlink._asking_node(b"\xff" * 9) == ""
    assert flower_superlink._addressed_nodes(b"\xff" * 9) == set()


def _routes(application: object) -> list[Any]:
    from fastapi.routing import APIRoute, iter_route_contexts

    return [one for one in iter_route_contexts(application.routes) if isinstance(one.route, APIRoute)]  # type: ignore[attr-defined]


def test_a_held_question_lives_shorter_than_flowers_client_waits_and_its_signature_counts() -> None:
    from flwr.common.constant import TIMESTAMP_TOLERANCE
    from flwr.supercore.protobuf.client import ProtobufClient

    waits = inspect.signature(ProtobufClient.__init__).parameters["timeout"].default
    assert waits > flower_supernode.HOLD_S
    assert long_poll.MOST_S <= waits < TIMESTAMP_TOLERANCE
    assert flower_supernode.HOLD_S < flower_supernode.HELD_S + 30.0


def test_sleeps_end_when_it_rings_and_no_question_is_asked_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    bell, slept, now = long_poll.Bell(), [], [100.0]
    clock = flower_node.WakefulTime(bell)
    monkeypatch.setattr(flower_node.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(flower_node.time, "sleep", slept.append)
    clock._asked = 100.0
    clock.sleep(3)  # answered at once: the whole pause
    now[0] = 111.0
    clock.sleep(3)  # the question was held: none
    now[0] = 112.0
    clock.sleep(3)  # asked again at once, and answered after one second
    assert slept == [3.0, 0.0, 2.0]
    bell.ring(flower_node.REPLIES)
    clock.sleep(0.5)  # rang while nobody waited: not missed
    bell.ring(flower_node.REPLIES)
    clock.sleep(0.5)
    assert len(slept) == 3


def test_a_task_rings_when_its_parts_were_fetched_and_when_they_could_not_be() -> None:
    bell, seen = long_poll.Bell(), []

    def pull(ids: list[str], *, pull_object_fn: object, initial_backoff: float) -> dict[str, bytes]:
        seen.append((ids, initial_backoff, bell.rung(flower_node.TASKS)))
        if not ids:
            raise ValueError("unreachable")
        return {}

    told = flower_node.telling(pull, bell)
    told(["a"], pull_object_fn=None)
    with pytest.raises(ValueError, match="unreachable"):
        told([], pull_object_fn=None)
    assert seen == [(["a"], flower_node.PART_S, 0), ([], flower_node.PART_S, 1)]
    assert bell.rung(flower_node.TASKS) == 2


def test_errors_that_stand_for_a_lost_reply() -> None:
    from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE, ErrorCode

    lost = {
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
    assert lost == internals.TRANSPORT_ERRORS
    assert HEARTBEAT_DEFAULT_INTERVAL * HEARTBEAT_PATIENCE == runtime.LEASE_S


def test_the_bundle_is_accepted_and_holds_no_code() -> None:
    import io
    import zipfile

    from flwr.common.config import get_fab_config

    bundle = runtime.empty_bundle()
    assert bundle == runtime.empty_bundle()
    assert get_fab_config(bundle)["project"]["name"] == "fedvfm-run"
    assert sorted(zipfile.ZipFile(io.BytesIO(bundle)).namelist()) == [".info/CONTENT", "pyproject.toml"]


def test_programs_take_the_arguments_we_give(tmp_path: Path) -> None:
    from fedvfm.client.process import supernode
    from fedvfm.server.network import superlink

    # The packages' faces hold functions of the same names.
    flower_superlink = importlib.import_module("flwr.superlink.cli.flower_superlink")
    flower_supernode = importlib.import_module("flwr.supernode.cli.flower_supernode")
    server = superlink.SuperLink(tmp_path, 1234)
    made = flower_superlink._parse_args_run_superlink().parse_args(server.program.command[3:])
    assert (made.host, made.port, made.isolation, made.enable_supernode_auth) == ("127.0.0.1", 1234, "process", True)
    assert made.runtime_dependency_install is False
    node = supernode.SuperNode("n", tmp_path, "h:1", tmp_path / "ca", tmp_path / "key", 99)
    found = flower_supernode._parse_args_run_supernode().parse_args(node.program.command[3:])
    assert (found.superlink, found.host, found.port, found.isolation) == ("h:1", "127.0.0.1", 99, "process")
    assert found.superexec_auth_secret_file == str(node.secret)


def test_the_grid_lets_us_choose_how_it_waits() -> None:
    from flwr.superlink.grid import HttpGrid

    grid = HttpGrid("127.0.0.1:1", False, None, token="t")
    assert hasattr(grid, "_retry_invoker")
    assert "_retry_invoker" in inspect.getsource(HttpGrid._connect), "taken when it connects, after we set ours"
    assert isinstance(HttpGrid._runtime_client, property)


def test_a_reply_can_answer_another_message() -> None:
    sent = message()
    internals.set_message_id(sent, "m1")
    reply = Message(RecordDict(), reply_to=sent)
    internals.set_reply_to(reply, "m0")
    assert reply.metadata.reply_to_message_id == "m0"


def test_loopback_is_reached_past_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "hospital.example")
    monkeypatch.delenv("no_proxy", raising=False)
    runtime.go_direct_to_loopback()
    runtime.go_direct_to_loopback()
    assert os.environ["NO_PROXY"] == "hospital.example,127.0.0.1,localhost"
    assert os.environ["no_proxy"] == "127.0.0.1,localhost"
