"""The tasks of a SuperNode, for an executor of ours: each holds one message to answer.

As :mod:`fedvfm.flower.runtime`, with which it shares the contract test; only a hospital's executor loads it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx
from flwr.app import Context, Message, RecordDict
from flwr.app.message import make_message
from flwr.common import serde, serde_utils
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, SubStatus
from flwr.proto import fleet_pb2, message_pb2, runtime_pb2
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable import inflatable_utils as parts
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.primitives import asymmetric
from flwr.supercore.runtime import RuntimeHttpClient

from fedvfm.flower import guards, runtime

LOG = logging.getLogger(__name__)
STANDING_S = 15.0
"""How long a coordinator may take to say how a site stands."""
ASK_S = 0.5
"""The longest pause between two questions for a part that is under way; so often a task behind it is asked for."""

STALL_S = 60.0
"""How long the next part of a message may be under way, of at most 5 MiB, where another task waits."""

FIRST_ASK_S = 0.02
"""The first wait for a part that is under way; each further one is twice as long, up to ``ASK_S``."""

HOLD_S = 10.0
"""How long a question for a task may be held by a SuperNode that has none."""

HELD_S = 20.0
"""How long a task that was taken ahead stays ours; a SuperNode offers it again 30 s after it was taken."""


@dataclass
class ClientTask:
    """One message of a SuperNode's, and the way to answer it.

    Attributes:
        lost: set where the SuperNode gave the task up.
    """

    message: Message
    context: Context
    lost: threading.Event
    _client: RuntimeHttpClient
    _sender: HeartbeatSender

    def answer(self, reply: Message) -> None:
        """Hand the reply to the SuperNode, which sends it.

        Raises:
            EngineError: if the SuperNode is gone or gave the task up.
        """
        from flwr.supernode.runtime import run_clientapp

        with runtime.reached("the SuperNode"):
            run_clientapp.push_message(self._client, reply, self.context)
            self._client.PushTaskOutput(runtime_pb2.PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details=""))

    def close(self) -> None:
        """End the heartbeat and the connection."""
        if self._sender.is_running:
            self._sender.stop()
        self._client.close()


class _Unreadable(ValueError):
    """A message that is not read to its end."""


class _Dead(parts.ObjectPullError):
    """A message whose missing parts never come."""


class _Offer(NamedTuple):
    """A task that is ours ``until`` (monotonic clock) with no heartbeat; ``made`` by the SuperNode's clock, in text."""

    made: str
    token: str
    until: float


class _Waiting:
    """A client of one task that asks for what is not there yet until that can be said to come no more.

    A SuperNode offers a message while its parts are under way. Where its run ends meanwhile they never come, nobody is
    told, and Flower asks for them for over an hour, in which the site answers nobody.

    Args:
        client: of the task.
        over: given since when nothing came: what to raise where a part is missing still.
        stop: ends the waiting.
        most_bytes: of a message; the rest of a larger one is not fetched.
    """

    def __init__(
        self,
        client: RuntimeHttpClient,
        over: Callable[[float], type[parts.ObjectPullError] | None],
        stop: threading.Event,
        most_bytes: int,
    ) -> None:
        self._client, self._over, self._stop, self._came = client, over, stop, time.monotonic()
        self._left, self._lock = most_bytes, threading.Lock()
        self._message, self._head, self._context = (
            "",
            message_pb2.Message(),
            runtime_pb2.PullTaskInputResponse().context,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def PullTaskInput(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        """Ask what the task is."""
        answer = self._client.PullTaskInput(request)
        self._context = answer.context
        return answer

    def PullMessages(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        """Ask for the message: its task is there a moment before it."""
        answer = self._until(lambda: self._client.PullMessages(request), lambda got: bool(got.messages_list), "message")
        self._message, self._head = answer.message_object_trees[0].object_id, answer.messages_list[0]
        return answer

    def PullObject(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        """Ask for a part."""
        answer = self._until(
            lambda: self._client.PullObject(request),
            lambda got: got.object_available or not got.object_found,
            request.object_id,
        )
        self._came = time.monotonic()
        with self._lock:
            self._left -= len(answer.object_content)
            if self._left < 0:
                raise _Unreadable("larger than any message of an approved recipe")
        return answer

    def hollow(self) -> tuple[Message, Context]:
        """The message under the head that the SuperLink checked, without what cannot be read of it, and its context."""
        self._confirm()
        head = serde_utils.metadata_from_proto(self._head.metadata)
        return make_message(head, content=RecordDict()), serde.context_from_proto(self._context)

    def _until(self, ask: Callable[[], Any], there: Callable[[Any], bool], what: str) -> Any:
        over, pause = None, FIRST_ASK_S
        while not there(answer := ask()):  # once more after it was judged: what came until then is not lost
            if over is not None:
                raise over(what, "no part comes any more")
            over = self._over(self._came)
            if over is None and self._stop.wait(pause):
                raise parts.ObjectPullError(what, "stopped")
            pause = min(2 * pause, ASK_S)
        return answer

    def bury(self) -> None:
        """End the task without a word to the coordinator, whose run is over.

        Else the SuperNode puts an error in place of the reply and sends that where the next message's reply is due,
        which then stays with it until one more message comes.
        """
        self._confirm()
        details = "the parts of its message never came"
        self._client.PushTaskOutput(runtime_pb2.PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=details))

    def _confirm(self) -> None:
        if self._message:
            self._client.ConfirmMessageReceived(
                message_pb2.ConfirmMessageReceivedRequest(message_object_id=self._message)
            )


def is_let_in(address: str, authority: bytes, key: Any) -> bool:
    """Whether a coordinator lets a node with this key come online; it leaves again at once.

    Args:
        address: ``host:port``.
        authority: PEM of whom its certificate must be from.
        key: the private key.

    Returns: False where it does not, or cannot be reached.
    """
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    signing = NodeAuthHttpInterceptor(key, key.public_key())
    client = FleetHttpClient.from_server_address(
        address, False, authority, [RuntimeVersionHttpInterceptor(component_name="SuperNode"), signing]
    )
    public = asymmetric.public_key_to_bytes(key.public_key())
    try:
        asked = fleet_pb2.ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        node = client.ActivateNode(asked).node_id
        with contextlib.suppress(httpx.HTTPError):
            client.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=node))
        return True
    except (httpx.HTTPError, RuntimeError, OSError):
        return False
    finally:
        client.close()


def standing(address: str, authority: bytes, key: Any) -> str:
    """How a coordinator says that the site of this key stands: ``approved``, ``dropped`` or ``unknown``.

    Args:
        address: ``host:port``.
        authority: PEM of whom its certificate must be from.
        key: the private key.

    Returns: empty where it cannot be reached, or does not say (an earlier release).
    """
    context = ssl.create_default_context(cadata=authority.decode("ascii"))
    try:
        with httpx.Client(verify=context, timeout=STANDING_S) as client:
            answer = client.get(f"https://{address}/health", headers=guards.signed_headers(key))
    except (httpx.HTTPError, OSError):
        return ""
    word = answer.headers.get(guards.STANDING.decode(), "")
    return word if word in ("approved", "dropped", "unknown") else ""


class NodeTasks:
    """The tasks of one SuperNode on loopback, for an executor of ours. The bundle it hands over is never opened.

    Args:
        link: the SuperNode's address and secret; its loopback port has no TLS.
        stop: ends all waiting.
        most_bytes: asked for each message: how large it may be.
    """

    def __init__(
        self, link: runtime.Link, stop: threading.Event, most_bytes: Callable[[], int] = lambda: guards.MAX_REPLY
    ) -> None:
        runtime.go_direct_to_loopback()
        self._link, self._stop, self._most_bytes = link, stop, most_bytes
        self._finder = runtime.executor(link, insecure=True)
        self._patient = runtime.executor(link, insecure=True, hold_s=HOLD_S)
        self._lock, self._asked = threading.Lock(), float("-inf")
        self._held: list[_Offer] = []

    def take(self) -> ClientTask | None:
        """The next task, or None where there is none.

        Raises:
            EngineError: if the SuperNode is gone or refuses.
        """
        with runtime.reached("the SuperNode"):
            while (offer := self._oldest()) is not None:
                task = self._open(offer)
                if task is not None:
                    return task
        return None

    def _oldest(self) -> _Offer | None:
        with self._lock:
            self._held = [offer for offer in self._held if offer.until > time.monotonic()]
            if not self._held:
                self._take_ahead(self._patient)
            return self._held.pop(0) if self._held else None

    def _take_ahead(self, finder: RuntimeHttpClient) -> None:
        answer = finder.AcquireTask(runtime_pb2.AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if answer.token:
            offer = _Offer(answer.task.pending_at, answer.token, time.monotonic() + HELD_S)
            self._held = sorted([*self._held, offer])

    def _over(self, made: str, came: float) -> type[parts.ObjectPullError] | None:
        """What to raise for a message that is not whole: a SuperNode does one after the other, so none with a later."""
        with self._lock:
            now = time.monotonic()
            self._held = [offer for offer in self._held if offer.until > now]
            if now >= self._asked + ASK_S:
                self._asked = now
                self._take_ahead(self._finder)
            if any(offer.made > made for offer in self._held):
                return _Dead
            return parts.ObjectPullError if self._held and now > came + STALL_S else None

    def _open(self, offer: _Offer) -> ClientTask | None:
        from flwr.supernode.runtime import run_clientapp

        with contextlib.ExitStack() as held:
            client = RuntimeHttpClient.from_server_address(
                self._link.address,
                True,
                None,
                [
                    RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
                    RuntimeTokenHttpInterceptor(offer.token),
                ],
                retry_invoker=runtime.patient(self._stop, 20.0),
            )
            held.callback(client.close)
            lost = threading.Event()
            sender = runtime.beating(client, lost)
            sender.start()
            held.callback(sender.stop)
            over = functools.partial(self._over, offer.made)
            waiting: Any = _Waiting(client, over, self._stop, self._most_bytes())
            try:
                message, context, _, _ = run_clientapp.pull_task_input(waiting)
            except _Dead:
                waiting.bury()
                return None
            except (httpx.HTTPError, OSError, RuntimeError, *runtime.PARTED):
                raise
            except Exception as error:  # it is the coordinator's, and may be anything: who answers refuses it
                LOG.warning(f"a message cannot be read ({type(error).__name__}); it is answered with a refusal")
                message, context = waiting.hollow()
            held.pop_all()
            return ClientTask(message, context, lost, client, sender)

    def close(self) -> None:
        """Let the connection go."""
        self._finder.close()
        self._patient.close()
