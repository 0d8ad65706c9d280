"""Flower's SuperNode, woken by events where Flower sleeps: loaded by a site's SuperNode process alone.

As :mod:`fedvfm.flower.runtime`, with which it shares the contract test. Flower's loop sleeps 0.5 s between two looks
for the executor's reply and its parts, 3 s after a question for messages that had none, and 1 s where a part of a
message is not there yet; an executor asks for tasks again and again. Here a reply, its parts and a task ring, and who
waits goes on at once. While nothing rings nothing is looked for more often than in Flower.
"""

from __future__ import annotations

import functools
import importlib
import threading
import time
from collections.abc import Callable
from typing import Any

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.supercore.exit import add_exit_handler
from flwr.supercore.inflatable import inflatable_object as trees
from flwr.supercore.inflatable import inflatable_utils as parts
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import main as nodes
from flwr.supernode import start_client_internal as loops

from fedvfm.flower import guards, long_poll

STALL_S = 30.0
"""How long no part of a message may come: the coordinator puts them on its own machine's SuperLink within seconds."""
FROZEN_S = 5.0
"""A question for a part that takes longer was asked of an end that stood still: that time says nothing of the part."""
HAND_OVER_S = 60.0
"""How long no part of a reply may come: as long as Flower takes an executor without a heartbeat for present."""
LOOK_S = 1.0
"""What one look for a part counts at most: longer ones were those of a machine that stood still."""
LOST = Error(ErrorCode.MESSAGE_UNAVAILABLE, "parts of the message did not come")
"""The reply to a message that is given up: the coordinator asks again, where it is still there."""
PART_S = 0.05
"""The first wait for a part that is under way; each further one is twice as long, up to Flower's own 10 s."""
REPLIES, TASKS = "replies", "tasks"
IDLE_S = 3.0
"""How long Flower sleeps after a question for messages that had no answer."""
RINGS = ("push-messages", "push-object", "push-task-output")
"""What an executor says that its SuperNode waits for."""


class WakefulTime:
    """Flower's loop's ``time``: its sleeps end when a reply or a part of it is there.

    A question for messages that was held for longer than the sleep after it is not followed by any.
    """

    def __init__(self, bell: long_poll.Bell) -> None:
        self._bell, self._seen, self._asked = bell, 0, time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Wait, at most so long."""
        if seconds < IDLE_S:
            self._seen = self._bell.sleep(REPLIES, self._seen, seconds)
            return
        time.sleep(max(0.0, self._asked + seconds - time.monotonic()))
        self._asked = time.monotonic()


def with_long_polls(make: Callable[..., Any], bell: long_poll.Bell) -> Callable[..., Any]:
    """Flower's maker of the application that executors reach, of one that holds their questions for tasks."""

    def made(*given: Any, **named: Any) -> long_poll.LongPoll:
        held = {guards.TASK_ROUTE: long_poll.Held(lambda body: TASKS, asks_once=True)}
        rings = {f"/v1/runtime/{name}": None for name in RINGS}
        return long_poll.LongPoll(make(*given, **named), bell, held, rings, (REPLIES,))

    return made


def telling(pull: Callable[..., Any], bell: long_poll.Bell) -> Callable[..., Any]:
    """Flower's fetching of a message's parts, after its task was made; the task rings when they are here.

    A message whose parts come no more is given up: Flower's loop asks nothing else until then.
    """

    @functools.wraps(pull)
    def pulled(object_ids: list[str], *, pull_object_fn: Callable[[str], bytes], **named: Any) -> Any:
        try:
            return pull(object_ids, pull_object_fn=_Coming(pull_object_fn), initial_backoff=PART_S, **named)
        finally:
            bell.ring(TASKS)

    return pulled


class Losses:
    """Tells the coordinator of a message whose parts come no more.

    Flower's SuperNode forgets it without a word. A coordinator that died needs none, but one that stood still while it
    sent would wait for an answer until its round is over.

    And a message that was given up when it was whole, because its receipt could not be told, may be answered all the
    same. Flower's loop would send that answer in place of the next message's, and be one behind from then on; here it
    goes on sending until the message that it took is answered.

    And a reply of which the parts come no more is given up: an executor whose task ended after the head of its reply
    was there (its machine stood still) may hand over none of them, and Flower would wait for them as long as the node
    runs (``_push_messages``, ``yield_object_contents``). The coordinator takes such a reply for lost, and asks again.
    """

    def __init__(self) -> None:
        self._lost = False
        self._asked = ""

    def noticing(self, pull: Callable[..., Any]) -> Callable[..., Any]:
        """The fetching of a message's parts; what fails there while the run goes on is a loss."""

        @functools.wraps(pull)
        def pulled(*given: Any, **named: Any) -> Any:
            self._lost = False
            try:
                return pull(*given, **named)
            except RunNotRunningException:
                raise
            except Exception:  # Flower's loop gives the message up, whatever it was
                self._lost = True
                raise

        return pulled

    def telling(self, take: Callable[..., int | None]) -> Callable[..., int | None]:
        """Flower's taking of one message; the run of a lost one too, whose reply waits to be sent then."""

        @functools.wraps(take)
        def taken(*, state: Any, object_store: Any, receive: Callable[[], Any], **named: Any) -> int | None:
            heads: list[Message] = []

            def noted() -> Any:
                got = receive()
                heads.extend([] if got is None else got[:1])
                return got

            self._lost = False
            run = take(state=state, object_store=object_store, receive=noted, **named)
            self._asked = heads[0].metadata.message_id if heads else ""
            if not self._lost:
                return run
            loops._insert_message(Message(LOST, reply_to=heads[0]), state, object_store)
            return heads[0].metadata.run_id

        return taken

    def answering(self, push: Callable[..., None]) -> Callable[..., None]:
        """Flower's sending of the replies that are there, until that to the message that was taken is among them."""

        @functools.wraps(push)
        def pushed(*, send: Callable[..., Any], object_store: Any, **named: Any) -> None:
            answered: set[str] = set()
            named["object_store"] = _HandedOver(object_store)

            def noted(reply: Message, *rest: Any) -> Any:
                answered.add(reply.metadata.reply_to_message_id)
                return send(reply, *rest)

            push(send=noted, **named)
            while self._asked and self._asked not in answered:
                push(send=noted, **named)

        return pushed


class _HandedOver:
    """An object store whose missing parts of a reply are asked for until none came for :data:`HAND_OVER_S`.

    Parts come in any order, so all of the reply are counted, once at the end of that time.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._parts: list[str] = []
        self._there, self._waited, self._looked = 0, 0.0, time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get_object_tree(self, object_id: str) -> Any:
        """What a reply is made of, which is sent from now on."""
        tree = self._store.get_object_tree(object_id)
        self._parts = [part.object_id for part in trees.iterate_object_tree(tree)]
        self._there, self._waited = 0, 0.0
        return tree

    def get(self, object_id: str) -> bytes | None:
        """A part; nothing where it is not there yet.

        Raises:
            ObjectPullError: if it can be said to come no more; Flower's loop logs it and goes on.
        """
        part: bytes | None = self._store.get(object_id)
        now = time.monotonic()
        self._waited = self._waited + min(LOOK_S, now - self._looked) if part == b"" else 0.0
        self._looked = now
        if self._waited > HAND_OVER_S:
            there = sum(self._store.get(other) != b"" for other in self._parts)
            if there <= self._there:
                why = f"the executor handed over no part of its reply for {HAND_OVER_S:g} s"
                raise parts.ObjectPullError(object_id, why)
            self._there, self._waited = there, 0.0
        return part


class _Coming:
    """Fetches parts of a message until none came for :data:`STALL_S` and none is under way.

    A coordinator that died after it had announced a message leaves parts that never come, for three minutes or more.
    """

    def __init__(self, pull: Callable[[str], bytes]) -> None:
        self._pull, self._came, self._under_way = pull, time.monotonic(), 0
        self._lock = threading.Lock()

    def __call__(self, part: str) -> bytes:
        with self._lock:
            self._under_way += 1
        came, asked = True, time.monotonic()
        try:
            return self._pull(part)
        except parts.ObjectUnavailableError:
            came = time.monotonic() > asked + FROZEN_S
            raise
        finally:
            self._after(part, came)

    def _after(self, part: str, came: bool) -> None:
        with self._lock:
            self._under_way -= 1
            if came or self._under_way:
                self._came = time.monotonic()
            stalled = time.monotonic() > self._came + STALL_S
        if stalled:
            raise parts.ObjectPullError(part, "no part comes any more")


def run_supernode() -> None:
    """Be ``flower-supernode`` with this process's arguments."""
    # The package's face holds a function of the same name.
    program: Any = importlib.import_module("flwr.supernode.cli.flower_supernode")
    bell, loop, loaded = long_poll.Bell(), program.start_client_internal, vars(loops)
    losses = Losses()
    loaded["time"] = WakefulTime(bell)
    loaded["pull_objects"] = losses.noticing(telling(loaded["pull_objects"], bell))
    loaded["_pull_and_store_message"] = losses.telling(loaded["_pull_and_store_message"])
    loaded["_push_messages"] = losses.answering(loaded["_push_messages"])
    nodes.create_app = with_long_polls(nodes.create_app, bell)

    def begun(**named: Any) -> None:
        add_exit_handler(bell.end)  # called before the application ends, which waits for held questions
        loop(**named)

    program.start_client_internal = begun
    program.flower_supernode()
