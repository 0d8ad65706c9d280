"""Flower's SuperLink and Grid where they trust more than we may: loaded by the coordinator's processes alone.

As :mod:`fedvfm.flower.runtime`, with which it shares the contract test. What stock Flower does without this stands in
``docs/security/attacks.md``.
"""

from __future__ import annotations

import collections
import contextlib
import hmac
import importlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.common import serde_utils
from flwr.common.constant import ACCESS_TOKEN_KEY, ErrorCode, Status
from flwr.proto import fleet_pb2, message_pb2, runtime_pb2
from flwr.supercore import sql_mixin
from flwr.supercore.inflatable import inflatable_object as trees
from flwr.supercore.inflatable import inflatable_protobuf_utils as wire
from flwr.supercore.inflatable import inflatable_utils as parts
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.state.schema.linkstate_models import MessageIns
from flwr.superlink import main as links
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.grid import HttpGrid
from flwr.superlink.servicer.fleet import fleet_handlers

from fedvfm.flower import guards, long_poll

LOG = logging.getLogger(__name__)
WAIT_S = 180.0
"""How long nothing of an announced reply may come before it counts as lost; a slow line may take longer for all."""

FIRST_PAUSE_S = 0.02
"""The first wait for parts of a reply that are under way."""

MOST_AGAIN = 5
"""How often a message is handed out anew to a node that never says it has it."""

MALFORMED, OVERSIZED = Error(1040, "malformed"), Error(1041, "oversized")
"""Stand in place of a reply that cannot be read, or is larger than any that was asked for."""


class OwnerOnly(NoOpControlAuthnPlugin):
    """Flower's stock plugin lets in everybody; this one whoever shows the token."""

    def __init__(self, secret: bytes) -> None:
        self._token = guards.control_token(secret)

    def validate_tokens_in_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> tuple[bool, Any]:
        """Whether the token is among the headers, and the one account there is."""
        shown = str(dict(metadata).get(ACCESS_TOKEN_KEY, ""))
        if not hmac.compare_digest(shown.encode(), self._token.encode()):
            return False, None
        return super().validate_tokens_in_metadata(metadata)


def run_superlink(secret: Path) -> None:
    """Be ``flower-superlink`` with this process's arguments, where it trusts too much held back.

    Its Control API is closed to who cannot read ``secret``, and a node may push only what is its own: the proxy sees to
    that too, but whoever puts another one before the SuperLink is not left without.
    """
    # The package's face holds a function of the same name.
    program: Any = importlib.import_module("flwr.superlink.cli.flower_superlink")
    program.load_control_authn_plugin = lambda: OwnerOnly(secret.read_bytes())
    HandedOut().watch(fleet_handlers)
    fleet_handlers.push_messages = own_pushes(fleet_handlers.push_messages)
    patient_data_base()
    bell, ended = long_poll.Bell(), program.uvicorn.Server.handle_exit

    def end(server: Any, *given: Any) -> None:
        bell.end()  # else it waits for held questions, of up to ten seconds, before it ends
        ended(server, *given)

    links.create_app = with_long_polls(links.create_app, bell)
    program.uvicorn.Server.handle_exit = end
    program.flower_superlink()


BUSY_MS = 60_000


def patient_data_base() -> None:
    """Let threads of this process use Flower's data base one after the other.

    SQLite has one writer at a time. Flower lets up to 40 threads try, each for 5 s; with twenty sites that send at once
    some waited longer, and a round ended with "database is locked".
    """
    named = vars(sql_mixin)
    named["SQLITE_PRAGMAS"] = tuple({**dict(named["SQLITE_PRAGMAS"]), "busy_timeout": str(BUSY_MS)}.items())
    sql_mixin.SqlMixin.session = in_turn(sql_mixin.SqlMixin.session)  # type: ignore[method-assign]


def in_turn(session: Callable[[Any], contextlib.AbstractContextManager[Any]]) -> Any:
    """A session that one thread has at a time; a thread may open another one inside."""
    lock = threading.RLock()

    @contextlib.contextmanager
    def held(self: Any) -> Iterator[Any]:
        with lock, session(self) as opened:
            yield opened

    return held


REPLIES = "replies"


def with_long_polls(make: Callable[..., Any], bell: long_poll.Bell) -> Callable[..., Any]:
    """Flower's maker of its application, of one that holds questions for replies and for messages to a node."""

    def made(*given: Any, **named: Any) -> long_poll.LongPoll:
        held = {
            guards.REPLY_ROUTE: long_poll.Held(lambda body: REPLIES),
            guards.PULL_ROUTE: long_poll.Held(_asking_node),
        }
        rings: dict[str, Callable[[bytes], Iterable[str]] | None] = {
            "/v1/runtime/push-messages": _addressed_nodes,
            "/v1/fleet/push-messages": None,
        }
        return long_poll.LongPoll(make(*given, **named), bell, held, rings, (REPLIES,))

    return made


def _asking_node(body: bytes) -> str:
    with contextlib.suppress(Exception):  # whatever the parser says: Flower refuses it
        return str(fleet_pb2.PullMessagesRequest.FromString(body).node.node_id)
    return ""


def _addressed_nodes(body: bytes) -> set[str]:
    with contextlib.suppress(Exception):
        pushed = runtime_pb2.PushAppMessagesRequest.FromString(body)
        return {str(message.metadata.dst_node_id) for message in pushed.messages_list}
    return set()


def own_pushes(push: Callable[..., Any]) -> Callable[..., Any]:
    """Flower's handler of pushed messages, for those in which a node speaks for itself."""

    def guarded(request: Any, state: Any) -> Any:
        status = guards.request_fault(request, guards.most_parts(guards.MAX_REPLY))
        if status:
            raise HTTPException(status)
        return push(request=request, state=state)

    return guarded


class HandedOut:
    """Messages that a node took and neither had whole nor answered: asking for another, it gets that one again.

    A SuperNode does one message after the other, so one that asks has not got the last. The answer that held it went
    to a question of which nobody waited any more: a machine that stood still finds those of half a minute waiting.
    Flower takes it for delivered, and the site would say nothing until its round is over.

    Requests of one node are answered one after the other: of two questions at once the later would cover up what the
    earlier took, and a receipt between looking for a message and handing it out again would lose the node's answer.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: collections.defaultdict[int, threading.Lock] = collections.defaultdict(threading.Lock)
        self._with: dict[int, list[tuple[int, str]]] = {}
        self._again: collections.Counter[str] = collections.Counter()

    def watch(self, handlers: Any) -> None:
        """Put this round Flower's handlers of a node's requests, which its routes look up when they are called."""
        handlers.pull_messages = self._pulling(handlers.pull_messages)
        handlers.push_messages = self._ending(
            handlers.push_messages, lambda asked: {sent.metadata.reply_to_message_id for sent in asked.messages_list}
        )
        handlers.confirm_message_received = self._ending(
            handlers.confirm_message_received, lambda asked: {asked.message_object_id}
        )
        handlers.activate_node = self._activating(handlers.activate_node)

    def _turn(self, node: int) -> threading.Lock:
        with self._lock:
            return self._turns[node]

    def _pulling(self, pull: Callable[..., Any]) -> Callable[..., Any]:
        def pulled(request: Any, state: Any, store: Any) -> Any:
            node = request.node.node_id
            with self._turn(node):
                with self._lock:
                    lost = self._with.pop(node, [])
                self._give_back(lost, state, store)
                answer = pull(request=request, state=state, store=store)
                taken = [(sent.metadata.run_id, sent.metadata.message_id) for sent in answer.messages_list]
                if taken:
                    with self._lock:
                        self._with[node] = taken
                return answer

        return pulled

    def _ending(self, handler: Callable[..., Any], had: Callable[[Any], set[str]]) -> Callable[..., Any]:
        """With a receipt or an answer a node has had these messages; what else it took may still be lost."""

        def handled(*, request: Any, **named: Any) -> Any:
            node = request.node.node_id
            with self._turn(node):
                answer = handler(request=request, **named)
                self._forget(node, had(request))
                return answer

        return handled

    def _activating(self, activate: Callable[..., Any]) -> Callable[..., Any]:
        """A node that began anew has nothing of before, and is asked again by the grid."""

        def activated(*, request: Any, **named: Any) -> Any:
            answer = activate(request=request, **named)
            with self._turn(answer.node_id), self._lock:
                gone = {message for _, message in self._with.get(answer.node_id, [])}
            self._forget(answer.node_id, gone)
            return answer

        return activated

    def _forget(self, node: int, messages: set[str]) -> None:
        with self._lock:
            left = [(run, message) for run, message in self._with.pop(node, []) if message not in messages]
            if left:
                self._with[node] = left
            for message in messages:
                self._again.pop(message, None)

    def _give_back(self, lost: Iterable[tuple[int, str]], state: Any, store: Any) -> None:
        """Let messages of runs that go on be handed out once more, a few times at most."""
        for run, message in lost:
            with self._lock:
                self._again[message] += 1
                often = self._again[message] > MOST_AGAIN
            try:
                store.get_object_tree(message)
            except NoObjectInStoreError:  # it was taken away, or its receipt was confirmed meanwhile
                often = True
            if often or state.get_run_status({run})[run].status != Status.RUNNING:
                self._again.pop(message, None)
                continue
            with state.session() as session:
                kept = session.get(MessageIns, message)
                if kept is not None:
                    kept.delivered_at = ""
                    LOG.warning("a node asks for messages and has not got its last one; it is handed out again")


@dataclass
class _Coming:
    """A reply that was announced.

    Attributes:
        announced: as the SuperLink stored and checked it.
        missing: ids of its parts that have not come.
        until: when it counts as lost if no further part came, by this process's clock.
        came: parts that have.
    """

    announced: Any
    missing: list[str]
    until: float
    came: dict[str, bytes] = field(default_factory=dict)

    @property
    def answers(self) -> str:
        """The message it is a reply to."""
        return str(self.announced.metadata.reply_to_message_id)

    def message(self, inner: Message | None, error: Error | None = None) -> Message:
        """The reply under the head that the SuperLink checked, whatever the site wrote inside."""
        head = serde_utils.metadata_from_proto(self.announced.metadata)
        if inner is not None and inner.has_error():
            error = inner.error
        if error is not None:
            return make_message(head, error=error)
        return make_message(head, content=inner.content if inner else None)


class CarefulGrid(HttpGrid):
    """Flower's grid, on which a reply harms nobody but its sender.

    Flower's own waits for minutes for parts that a site announced and does not send, and nobody else is heard
    meanwhile; it ends the run over a reply that cannot be parsed; it believes what a reply says of its sender.

    Attributes:
        most_bytes: of one reply; a larger one is not read to its end.
    """

    most_bytes = guards.MAX_REPLY

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._coming: dict[str, _Coming] = {}
        self._patient: RuntimeHttpClient | None = None
        self._pause = FIRST_PAUSE_S

    def wait(self, message_ids: Iterable[str], seconds: float) -> None:
        """Until one of these has a reply, or a part of one that is under way may have come; at most so long.

        While nothing is under way the SuperLink holds the question. Parts are asked for again after growing pauses.
        """
        wanted = set(message_ids)
        if any(one.answers in wanted for one in self._coming.values()):
            time.sleep(min(self._pause, seconds))
            self._pause = min(2 * self._pause, seconds)
            return
        self._announced(
            self._held(seconds).PullMessages(runtime_pb2.PullAppMessagesRequest(message_ids=sorted(wanted)))
        )

    def _held(self, seconds: float) -> RuntimeHttpClient:
        if self._patient is None:
            self._patient = RuntimeHttpClient.from_server_address(
                self._addr,
                self._insecure,
                self._cert,
                [
                    RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"),
                    RuntimeTokenHttpInterceptor(token=self._token),
                    long_poll.Hold(guards.REPLY_ROUTE, seconds),
                ],
                retry_invoker=self._retry_invoker,
            )
        return self._patient

    def close(self) -> None:
        """Let the connections go."""
        if self._patient is not None:
            self._patient.close()
        super().close()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to these that are there whole; a part that is under way is asked for at the next call."""
        wanted = set(message_ids)
        known = {one.answers for one in self._coming.values()}
        ids = sorted(wanted - known)
        if ids:
            self._announced(self._runtime_client.PullMessages(runtime_pb2.PullAppMessagesRequest(message_ids=ids)))
        found = []
        for key, coming in list(self._coming.items()):
            reply = self._look(key, coming) if coming.answers in wanted else None
            if reply is not None:
                del self._coming[key]
                found.append(reply)
        return found

    def _announced(self, answer: Any) -> None:
        for message, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            ids = dict.fromkeys(one.object_id for one in trees.iterate_object_tree(tree))
            self._coming[message.metadata.message_id] = _Coming(message, list(ids), time.monotonic() + WAIT_S)
            self._pause = FIRST_PAUSE_S

    def _look(self, key: str, coming: _Coming) -> Message | None:
        try:
            self._fetch(coming)
        except parts.ObjectPullError:
            return self._lost(coming)
        if sum(map(len, coming.came.values())) > self.most_bytes:
            self._confirm(key)
            return coming.message(None, OVERSIZED)
        if coming.missing:
            return self._lost(coming) if time.monotonic() > coming.until else None
        self._confirm(key)
        return _parsed(key, coming)

    def _fetch(self, coming: _Coming) -> None:
        """Get the parts that are there, until there are too many bytes of them."""
        pull = wire.make_pull_object_fn_protobuf(
            self._runtime_client.PullObject, self.node, coming.announced.metadata.run_id
        )

        def now_or_later(part: str) -> bytes:
            with contextlib.suppress(parts.ObjectUnavailableError):
                return pull(part)
            return b""

        for some in _few(coming.missing):
            found = parts.pull_objects(some, now_or_later)
            coming.came |= {part: data for part, data in found.items() if data}
            if sum(map(len, coming.came.values())) > self.most_bytes:
                break
        left = [part for part in coming.missing if part not in coming.came]
        if len(left) < len(coming.missing):
            coming.until = time.monotonic() + WAIT_S
        coming.missing = left

    def _confirm(self, key: str) -> None:
        self._runtime_client.ConfirmMessageReceived(
            message_pb2.ConfirmMessageReceivedRequest(node=self.node, run_id=self.run.run_id, message_object_id=key)
        )

    @staticmethod
    def _lost(coming: _Coming) -> Message:
        return coming.message(None, Error(ErrorCode.MESSAGE_UNAVAILABLE, "parts of the reply did not come"))


def _few(ids: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(ids), 16):
        yield ids[start : start + 16]


def _parsed(key: str, coming: _Coming) -> Message:
    """The reply, or in its place a word where the parts are not what a message is made of."""
    try:
        inner = parts.inflate_object_from_contents(key, coming.came)
        if isinstance(inner, Message):
            return coming.message(inner)
    except Exception:  # noqa: S110 - it is the site's, and it may be anything
        pass
    return coming.message(None, MALFORMED)
