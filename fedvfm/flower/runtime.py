"""Flower's internals for real processes: a SuperLink, its SuperNodes, and the tasks of a coordinator.

As :mod:`fedvfm.flower.internals`, with which it shares the contract test; apart from it because only processes that
talk to a SuperLink or SuperNode need what this loads.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import ssl
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
from cryptography.hazmat.primitives import serialization
from flwr.app import Context
from flwr.common import serde
from flwr.common.constant import SubStatus
from flwr.proto import control_pb2, runtime_pb2
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable import inflatable_utils as parts
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from fedvfm import errors
from fedvfm.flower import guards, internals, long_poll

LEASE_S = 60.0
"""How long a SuperLink takes a SuperNode that vanished for present, and refuses it as already there (code 2004)."""

FLEET_ROUTES = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "confirm-message-received",
        "deactivate-node",
        "get-fab",
        "get-run",
        "pull-messages",
        "pull-object",
        "push-messages",
        "push-object",
        "register-node",
        "send-node-heartbeat",
        "unregister-node",
    )
)
"""All that a SuperNode asks of a SuperLink, each as POST."""

CHILD_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""For every process of Flower's: nothing is reported home, looked up or installed."""

LOOPBACK = ("127.0.0.1", "localhost")


def go_direct_to_loopback() -> None:
    """Let Flower's HTTP client reach this machine past a hospital's proxy, in this process and its children."""
    for name in ("NO_PROXY", "no_proxy"):
        listed = [part for part in os.environ.get(name, "").split(",") if part]
        os.environ[name] = ",".join([*listed, *(one for one in LOOPBACK if one not in listed)])


@dataclass(frozen=True)
class Link:
    """How to reach a SuperLink on loopback: address, the authority of its certificate, the secret of its executors."""

    address: str
    authority: bytes
    secret: bytes


def _final(stop: threading.Event) -> Callable[[Exception], bool]:
    """Whether to ask no more after an error: a refusal, a certificate that is not trusted, or ``stop``."""

    def judge(error: Exception) -> bool:
        if isinstance(error, httpx.HTTPStatusError):
            return stop.is_set() or error.response.status_code not in (502, 503, 504)
        return stop.is_set() or _untrusted(error)

    return judge


def _untrusted(error: BaseException | None) -> bool:
    """Whether OpenSSL refused a certificate, or the other end ours; httpx raises its own errors from OpenSSL's."""
    while error is not None:
        if isinstance(error, ssl.SSLError) and "CERTIFICATE" in (error.reason or ""):
            return True
        error = error.__cause__ or error.__context__
    return False


def patient(stop: threading.Event, seconds: float | None) -> RetryInvoker:
    """Asks again while the other end is away. Flower's own interrupts the whole process on a refusal."""
    return RetryInvoker(
        lambda: exponential(max_delay=5),
        (httpx.TransportError, httpx.HTTPStatusError),
        max_tries=None,
        max_time=seconds,
        should_giveup=_final(stop),
        wait_function=lambda wait: (stop.wait(wait), None)[1],
    )


PARTED = (RunNotRunningException, parts.ObjectPullError, parts.ObjectPushError, parts.ObjectUnavailableError)
"""What Flower raises where the other end gave a task up, perhaps with a part of its message still under way."""


@contextlib.contextmanager
def reached(what: str) -> Iterator[None]:
    """What goes wrong on the way to the other end is one error of ours."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise errors.EngineError(f"{what} answered {error.response.status_code}") from error
    except (httpx.HTTPError, OSError, RuntimeError, *PARTED) as error:
        raise errors.EngineError(f"{what} cannot be reached or ended the task: {type(error).__name__}") from error


class Control:
    """The coordinator's side of a SuperLink on loopback: nodes and runs, for who holds the SuperLink's secret.

    Raises (every method):
        EngineError: if the SuperLink cannot be reached, or refuses.
    """

    def __init__(self, link: Link, patience_s: float = 30.0) -> None:
        go_direct_to_loopback()
        self._client = ControlHttpClient.from_server_address(
            link.address,
            False,
            link.authority,
            [RuntimeVersionHttpInterceptor(component_name="fedvfm"), guards.ShowToken(link.secret)],
            retry_invoker=patient(threading.Event(), patience_s),
        )

    def nodes(self) -> list[internals.Node]:
        """All registered nodes."""
        with reached("the SuperLink"):
            found = self._client.ListNodes(control_pb2.ListNodesRequest())
        return [internals.node_of(info) for info in found.nodes_info if info.status != "unregistered"]

    def register(self, public_key: str, name: str) -> int:
        """Let a node in by its key (in OpenSSH's form); its number."""
        key = serialization.load_ssh_public_key(public_key.encode())
        pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        with reached("the SuperLink"):
            answer = self._client.RegisterNode(control_pb2.RegisterNodeRequest(public_key=pem, name=name))
        return int(answer.node_id)

    def unregister(self, node: int) -> None:
        """Let a node in no more."""
        with reached("the SuperLink"):
            self._client.UnregisterNode(control_pb2.UnregisterNodeRequest(node_id=node))

    def start_run(self) -> int:
        """A new run; nothing happens in it until a process of ours takes its task."""
        bundle = empty_bundle()
        fab = serde.fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {}))
        with reached("the SuperLink"):
            answer = self._client.StartRun(control_pb2.StartRunRequest(fab=fab))
        return int(answer.run_id)

    def stop_run(self, run_id: int) -> None:
        """End a run."""
        with reached("the SuperLink"):
            self._client.StopRun(control_pb2.StopRunRequest(run_id=run_id))

    def close(self) -> None:
        """Let the connection go."""
        self._client.close()


def empty_bundle() -> bytes:
    """The app bundle a run must have. It holds no code: both ends run the fedvfm that is installed there."""
    text = (
        '[project]\nname = "fedvfm-run"\nversion = "1.0.0"\nlicense = "Apache-2.0"\n[tool.flwr.app]\n'
        'publisher = "fedvfm"\n[tool.flwr.app.components]\nserverapp = "none:app"\nclientapp = "none:app"\n'
        "[tool.flwr.app.config]\n"
    )
    listing = f"pyproject.toml,{hashlib.sha256(text.encode()).hexdigest()},{8 * len(text)}"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as bundle:
        for name, content in (("pyproject.toml", text), (".info/CONTENT", listing)):
            bundle.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), content)
    return file.getvalue()


def executor(link: Link, insecure: bool, hold_s: float = 0.0) -> RuntimeHttpClient:
    """A client that may take tasks: it signs with the secret; ``hold_s``: how long it is content to wait for one."""
    method = "/flwr.proto.Runtime/AcquireTask"
    return RuntimeHttpClient.from_server_address(
        link.address,
        insecure,
        None if insecure else link.authority,
        [
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(master_secret=link.secret, protected_methods={method}),
            long_poll.Hold(guards.TASK_ROUTE, hold_s),
        ],
    )


def beating(client: RuntimeHttpClient, lost: threading.Event) -> HeartbeatSender:
    """Keeps a task ours; ``lost`` is set where it was taken away. Flower's own interrupts the whole process then."""

    def beat() -> bool:
        try:
            kept = client.SendTaskHeartbeat(runtime_pb2.SendTaskHeartbeatRequest()).success
        except httpx.TransportError:
            return False
        except httpx.HTTPStatusError as error:
            if error.response.status_code in (502, 503, 504):
                return False
            kept = False
        if not kept:
            lost.set()
        return True

    return HeartbeatSender(beat)


@contextlib.contextmanager
def server_task(
    link: Link, run_id: int, stop: threading.Event, most_bytes: int = guards.MAX_REPLY
) -> Iterator[tuple[Grid, Context]]:
    """Be the ServerApp's process of a run: its Grid and Context. The bundle is not opened.

    Args:
        link: the SuperLink.
        run_id: the run.
        stop: ends all waiting.
        most_bytes: of one reply; a larger one is refused unread.

    Raises:
        EngineError: if the task of that run cannot be had, or the SuperLink ended it.
    """
    from fedvfm.flower import superlink

    go_direct_to_loopback()
    token = _take_server_task(link, run_id, stop)
    grid = superlink.CarefulGrid(link.address, False, link.authority, token=token)
    grid.most_bytes, grid._retry_invoker = most_bytes, patient(stop, None)
    client, lost, done = grid._runtime_client, threading.Event(), False
    sender = beating(client, lost)
    sender.start()
    try:
        found = client.PullTaskInput(runtime_pb2.PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = found.task_id, found.run.run_id
        TaskIdentity.node_id = found.context.node_id
        grid.set_run(serde.run_from_proto(found.run))
        yield grid, serde.context_from_proto(found.context)
        done = True
    except (httpx.HTTPError, *PARTED) as error:
        raise errors.EngineError(f"the SuperLink ended run {run_id}: {type(error).__name__}") from error
    finally:
        stop.set()
        sender.stop()
        word, why = (SubStatus.COMPLETED, "") if done else (SubStatus.FAILED, "stopped")
        with contextlib.suppress(httpx.HTTPError):
            client.PushTaskOutput(runtime_pb2.PushTaskOutputRequest(sub_status=word, details=why))
        grid.close()


def _take_server_task(link: Link, run_id: int, stop: threading.Event) -> str:
    """The token of a run's task; tasks of runs that nobody drives any more are taken on the way and left to expire."""
    client = executor(link, insecure=False)
    try:
        while not stop.is_set():
            with reached("the SuperLink"):
                answer = client.AcquireTask(runtime_pb2.AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if answer.token and answer.task.run_id == run_id:
                return str(answer.token)
            if not answer.token:
                break
        raise errors.EngineError(f"run {run_id} has no task to take: another process drives it")
    finally:
        client.close()
