"""Every Flower *internal* we need, in one place, with a contract test; nobody else touches internals.

Flower moves internals almost every release: when one of these breaks, only this file changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

with warnings.catch_warnings():
    # flwr 1.41 imports typer 0.20, which uses names that click 8.5 deprecates: nothing we can mend.
    warnings.simplefilter("ignore", DeprecationWarning)
    from flwr.app import Context, Message
    from flwr.app.user_config import UserConfig
    from flwr.clientapp import ClientApp
    from flwr.common import serde
    from flwr.proto.message_pb2 import Message as ProtoMessage
    from flwr.serverapp import ServerApp
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE = 1


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


def set_message_id(message: Message, message_id: str) -> None:
    """Give an outgoing message its id, as a SuperLink would."""
    message.metadata.__dict__["_message_id"] = message_id


def context(run_id: int, node_id: int, node_config: dict[str, Any]) -> Context:
    """An empty Context for an app."""
    from flwr.app import RecordDict

    return Context(run_id=run_id, node_id=node_id, node_config=UserConfig(node_config), state=RecordDict(), run_config=UserConfig())


def run_on_ray(server_app: ServerApp, client_app: Callable[[], ClientApp], nodes: int, cpus: int, gpus: float) -> None:
    """Run both apps in Flower's Simulation Runtime on Ray, in this process.

    ``run_simulation`` is the same call behind a deprecation warning; ``flwr run`` would leave a SuperLink running.
    """
    from flwr.simulation import run_simulation as module
    from flwr.supercore.telemetry import EventType

    backend = {"client_resources": {"num_cpus": cpus, "num_gpus": gpus}}
    module._run_simulation(
        num_supernodes=nodes,
        exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
        server_app=server_app,
        client_app=client_app,
        backend_config=backend,
    )
