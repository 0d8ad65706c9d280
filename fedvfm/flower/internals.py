"""Every Flower *internal* we need, in one place, with a contract test; nobody else touches internals.

Flower moves internals almost every release: when one of these breaks, only this file changes.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives import serialization
from flwr.app import Context, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.common import serde
from flwr.common.serde_utils import metadata_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedvfm import errors
from fedvfm.runtime import logs

TRANSPORT_ERRORS = frozenset({3, 4, 5, 8})
"""Codes of errors that Flower itself puts in place of a reply: message or reply unavailable, node or app gone."""

SERVER_NODE = 1
_CONTENT = bytes([ProtoMessage.DESCRIPTOR.fields_by_name["content"].number << 3 | 2])
"""A field of bytes of known length in Protocol Buffers' wire format: its number and wire type 2."""


def be_server_task(run_id: int) -> None:
    """Let this process make messages: Flower asks which task it is."""
    TaskIdentity.run_id = run_id
    TaskIdentity.task_id = 1
    TaskIdentity.node_id = SERVER_NODE


def empty_run(run_id: int) -> Run:
    """A Run record for a Grid that has no SuperLink."""
    return Run.create_empty(run_id)


def serialise(message: Message) -> bytes:
    """The message as it would travel."""
    data: bytes = serde.message_to_proto(message).SerializeToString()
    return data


def parse(data: bytes) -> Message:
    """The inverse of :func:`serialise`; arrays are new and independent."""
    return serde.message_from_proto(ProtoMessage.FromString(data))


def head(message: Message) -> bytes:
    """A message without its records: ``head(message) + body(message.content)`` is the serialised message."""
    data: bytes = ProtoMessage(metadata=metadata_to_proto(message.metadata)).SerializeToString()
    return data


def records(content: RecordDict) -> bytes:
    """The records of a message, serialised one after the other; see :func:`frame`."""
    data: bytes = serde.recorddict_to_proto(content).SerializeToString()
    return data


def parse_records(data: bytes) -> RecordDict:
    """The inverse of :func:`records`; nothing is unpickled.

    Raises:
        ValueError: if it is not of that form.
    """
    try:
        return serde.recorddict_from_proto(ProtoMessage.FromString(frame(len(data)) + data).content)
    except Exception as error:  # Flower promises no kind of error here
        raise ValueError(f"no records ({type(error).__name__})") from None


def frame(length: int) -> bytes:
    """What stands before the serialised records of a message, by their length."""
    made = bytearray(_CONTENT)
    while length > 0x7F:
        made.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes(made) + bytes([length])


def body(content: RecordDict) -> bytes:
    """The records of a message, which messages to many sites share, serialised."""
    data = records(content)
    return frame(len(data)) + data


def size(message: Message) -> int:
    """Bytes of the serialised message; known already where it was :func:`received`."""
    known = known_size(message)
    return len(serialise(message)) if known is None else known


def known_size(message: Message) -> int | None:
    """Bytes of a message that was :func:`received`; None of any other."""
    known = message.__dict__.get("_fedvfm_size")
    return known if isinstance(known, int) else None


def attach(message: Message, what: object) -> None:
    """Let a message carry, in this process alone, what was made of it."""
    message.__dict__["_fedvfm_attached"] = what


def attached(message: Message) -> object:
    """What :func:`attach` left; None where it left nothing."""
    return message.__dict__.get("_fedvfm_attached")


def received(data: bytes, origin: str = "") -> Message:
    """A message as it arrives after a transport.

    Args:
        data: its bytes.
        origin: which federation a simulation computed it for, where that is another; see :func:`origin`.
    """
    arrived = parse(data)
    arrived.__dict__.update(_fedvfm_size=len(data), _fedvfm_origin=origin)
    return arrived


def origin(message: Message) -> str:
    """Which other federation of a simulation a reply was computed for, empty where it was computed for this one."""
    return str(message.__dict__.get("_fedvfm_origin", ""))


def copy(message: Message) -> Message:
    """The message as it arrives after a transport: serialised and parsed again."""
    return received(serialise(message))


def set_message_id(message: Message, message_id: str) -> None:
    """Give an outgoing message its id, as a SuperLink would."""
    message.metadata.__dict__["_message_id"] = message_id


def set_reply_to(reply: Message, message_id: str) -> None:
    """Let a reply answer another message than the one it was made for."""
    reply.metadata.__dict__["_reply_to_message_id"] = message_id


@dataclass(frozen=True)
class Node:
    """A registered SuperNode as its SuperLink knows it; ``public_key`` is in OpenSSH's form."""

    id: int
    public_key: str
    online: bool
    activated: str


def node_of(info: Any) -> Node:
    """A node as Flower's API tells it."""
    key = serialization.load_pem_public_key(info.public_key)
    text = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    return Node(info.node_id, text, info.status == "online", info.last_activated_at)


def nodes(grid: Grid) -> list[Node]:
    """The nodes a run can reach now, with their keys."""
    return [node_of(info) for info in grid.get_nodes()]


def context(run_id: int, node_id: int, node_config: dict[str, Any]) -> Context:
    """An empty Context for an app."""
    return Context(
        run_id=run_id, node_id=node_id, node_config=UserConfig(node_config), state=RecordDict(), run_config=UserConfig()
    )


class _Stoppable:
    """A ServerApp that begins when all nodes are there and ends at its next look for replies once ``stop`` is set.

    Flower runs it in a thread of its own: it starts before the nodes are registered, and would else wait for sites that
    nobody runs any more.
    """

    def __init__(self, app: ServerApp, stop: threading.Event, nodes: int) -> None:
        self._app, self._stop, self._nodes = app, stop, nodes

    def __call__(self, grid: Any, context: Context) -> None:
        """Run the app."""
        while len(list(grid.get_node_ids())) < self._nodes:
            if self._stop.wait(0.05):
                raise errors.Interrupted("stopped")
        pull = grid.pull_messages

        def pull_or_end(message_ids: Iterable[str]) -> Iterable[Message]:
            if self._stop.is_set():
                raise errors.Interrupted("stopped")
            found: Iterable[Message] = pull(message_ids)
            return found

        grid.pull_messages = pull_or_end
        self._app(grid, context)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No log of Flower's unless FLWR_LOG_LEVEL asks for it: what matters is raised.

    PYTHONPATH, which Flower changes, is restored.
    """
    path = os.environ.get("PYTHONPATH")
    try:
        with logs.limited(logging.CRITICAL, *([] if "FLWR_LOG_LEVEL" in os.environ else ["flwr"])):
            yield
    finally:
        if path is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = path


def run_on_ray(
    server_app: ServerApp, client_app: Callable[[Message, Context], Message], nodes: int, cpus: int, gpus: float
) -> None:
    """Run both apps in Flower's Simulation Runtime on Ray, in this process.

    ``run_simulation`` is the same call behind a deprecation warning; ``flwr run`` would leave a SuperLink running.

    Args:
        server_app: its errors are raised here.
        client_app: called in the actors; must be small, it travels with every message.
        nodes: number of virtual nodes.
        cpus: cores of one actor.
        gpus: GPUs of one actor.

    Raises:
        EngineError: if Ray cannot be started or breaks.
    """
    from flwr.supercore import telemetry

    # The package's face holds a function of the same name.
    module = importlib.import_module("flwr.simulation.run_simulation")

    telemetry.FLWR_TELEMETRY_ENABLED = os.environ["FLWR_TELEMETRY_ENABLED"]  # it read this when it was imported
    backend = {
        "init_args": {"logging_level": logging.ERROR, "log_to_driver": False},
        "client_resources": {"num_cpus": cpus, "num_gpus": gpus},
    }
    stop = threading.Event()
    try:
        with _silence():
            module._run_simulation(
                num_supernodes=nodes,
                exit_event=telemetry.EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
                server_app=_Stoppable(server_app, stop, nodes),
                client_app=client_app,
                backend_config=backend,
            )
    except RuntimeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise errors.EngineError(
            f"engine 'ray': {type(cause).__name__}: {cause}. Use --engine in-process, or mend Ray"
        ) from error
    finally:
        stop.set()


def readdress(reply: Message, node_id: int, message_id: str) -> None:
    """Let a reply be another node's, to another message than the one it was made for."""
    reply.metadata.__dict__["_src_node_id"] = node_id
    reply.metadata.__dict__["_reply_to_message_id"] = message_id


def is_simulated(grid: Any) -> bool:
    """Whether a Grid is that of Flower's Simulation Runtime, which reaches no other machine."""
    from flwr.superlink.grid.inmemory_grid import InMemoryGrid

    return isinstance(grid, InMemoryGrid)


def in_simulation_actor() -> bool:
    """Whether this process is an actor of Flower's Simulation Runtime on Ray; no SuperNode's process ever is."""
    ray = sys.modules.get("ray")
    return bool(ray is not None and ray.is_initialized() and ray.get_runtime_context().get_actor_id())
