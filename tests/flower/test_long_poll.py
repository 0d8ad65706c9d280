"""Held requests: one answer each, as soon as there is one, and nothing asked in a loop meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from fedvfm.flower import long_poll

PATIENCE_S = 20.0
ASKED, ONCE, PUSH = "/asked", "/once", "/push"


class Application:
    """Answers with what was pushed for the body it is asked with; a push says for whom, then what.

    Attributes:
        asked: bodies of questions, in order.
        status: of every answer.
    """

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.status = 200
        self.there: dict[bytes, bytes] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        answer = b""
        if scope["path"] == PUSH:
            who, _, what = body.partition(b" ")
            self.there[who] = what
        else:
            self.asked.append(body)
            answer = self.there.pop(body, b"")
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": answer})


class Client:
    """One request, as a server would hand it on."""

    def __init__(self, poll: long_poll.LongPoll, route: str, body: bytes, hold_s: float = 0.0) -> None:
        self.gone, self._events, self.status = asyncio.Event(), [{"type": "http.request", "body": body}], 0
        self.answer: bytes | None = None
        headers = [(long_poll.HEADER, str(hold_s).encode())] if hold_s else []
        scope = {"type": "http", "path": route, "headers": headers}
        self.done = asyncio.ensure_future(poll(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._events:
            return self._events.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, event: Any) -> None:
        self.status = event.get("status", self.status)
        self.answer = event.get("body", self.answer)


@pytest.fixture
def application() -> Application:
    return Application()


@pytest.fixture
def bell() -> long_poll.Bell:
    return long_poll.Bell()


@pytest.fixture
def poll(application: Application, bell: long_poll.Bell) -> long_poll.LongPoll:
    held = {
        ASKED: long_poll.Held(lambda body: body.decode()),
        ONCE: long_poll.Held(lambda body: "once", asks_once=True),
    }
    rings: dict[str, Any] = {PUSH: lambda body: {body.partition(b" ")[0].decode()}, "/rings": None}
    return long_poll.LongPoll(application, bell, held, rings, ("a", "once"))


def run(scene: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(scene(), PATIENCE_S))


def test_a_question_is_answered_when_there_is_something_for_who_asks(
    poll: long_poll.LongPoll, application: Application
) -> None:
    async def scene() -> None:
        first, other = Client(poll, ASKED, b"a", PATIENCE_S), Client(poll, ASKED, b"b", PATIENCE_S)
        await asyncio.sleep(0.05)
        assert first.answer is None
        await Client(poll, PUSH, b"b news").done
        await other.done
        assert other.answer == b"news"
        assert not first.done.done()
        await Client(poll, PUSH, b"a more").done
        await first.done
        assert first.answer == b"more"
        assert application.asked == [b"a", b"b", b"b", b"a"], "each was asked at first and when it rang, never between"

    run(scene)


def test_a_question_without_the_header_and_one_whose_time_is_over_get_the_empty_answer(
    poll: long_poll.LongPoll, application: Application
) -> None:
    async def scene() -> None:
        for hold_s, most in ((0.0, 1), (0.05, 2)):
            asked = Client(poll, ASKED, b"a", hold_s)
            await asked.done
            assert (asked.status, asked.answer) == (200, b"")
            assert len(application.asked) <= most
            application.asked.clear()

    run(scene)


def test_what_is_refused_is_not_held(poll: long_poll.LongPoll, application: Application, bell: long_poll.Bell) -> None:
    async def scene() -> None:
        application.status = 401
        for route in (ASKED, ONCE):
            asked = Client(poll, route, b"a", PATIENCE_S)
            await asked.done
            assert asked.status == 401
        await Client(poll, PUSH, b"a news").done
        assert bell.rung("a") == 0, "a push that was refused wakes nobody"

    run(scene)


def test_who_hung_up_gets_nothing_that_another_could_have(poll: long_poll.LongPoll, application: Application) -> None:
    async def scene() -> None:
        asked = Client(poll, ASKED, b"a", PATIENCE_S)
        await asyncio.sleep(0.05)
        asked.gone.set()
        await asked.done
        assert asked.answer is None
        await Client(poll, PUSH, b"a news").done
        assert application.there == {b"a": b"news"}

    run(scene)


def test_a_question_that_can_be_asked_once_waits_before_it_is(
    poll: long_poll.LongPoll, application: Application, bell: long_poll.Bell
) -> None:
    async def scene() -> None:
        await Client(poll, ONCE, b"", PATIENCE_S).done  # who asks first may have come late
        assert len(application.asked) == 1
        asked = Client(poll, ONCE, b"", PATIENCE_S)
        await asyncio.sleep(0.05)
        assert len(application.asked) == 1
        application.there[b""] = b"a task"
        bell.ring("once")
        await asked.done
        assert asked.answer == b"a task"
        bell.ring("once")  # while nobody waits: not missed
        await Client(poll, ONCE, b"", PATIENCE_S).done
        assert len(application.asked) == 3

    run(scene)


def test_a_refused_question_takes_no_ring_from_the_next(
    poll: long_poll.LongPoll, application: Application, bell: long_poll.Bell
) -> None:
    async def scene() -> None:
        await Client(poll, ONCE, b"", PATIENCE_S).done
        bell.ring("once")
        application.status = 401
        await Client(poll, ONCE, b"", PATIENCE_S).done
        application.status = 200
        await Client(poll, ONCE, b"", PATIENCE_S).done  # would wait for its whole time, had the other taken the ring
        assert len(application.asked) == 3

    run(scene)


def test_a_bell_wakes_a_thread_and_an_event_loop_and_is_quick_where_it_rang_before(bell: long_poll.Bell) -> None:
    async def scene() -> None:
        threading.Timer(0.05, bell.ring, ("a",)).start()
        await bell.wait("a", 0, PATIENCE_S)
        assert bell.rung("a") == 1

    run(scene)
    began = time.monotonic()
    assert bell.sleep("a", 0, PATIENCE_S) == 1
    assert bell.sleep("a", 1, 0.01) == 1
    threading.Timer(0.05, bell.ring, ("b", "a")).start()
    assert bell.sleep("a", 1, PATIENCE_S) == 2
    assert time.monotonic() < began + PATIENCE_S / 2
    assert not bell._waiting, "nobody is left behind"


def test_after_its_end_questions_are_answered_at_once(
    poll: long_poll.LongPoll, application: Application, bell: long_poll.Bell
) -> None:
    async def scene() -> None:
        asked = Client(poll, ASKED, b"a", PATIENCE_S)
        await asyncio.sleep(0.05)
        bell.end()
        await asked.done
        await Client(poll, ASKED, b"a", PATIENCE_S).done
        assert (asked.status, asked.answer) == (200, b"")
        assert len(application.asked) <= 3

    run(scene)


def test_after_its_end_nobody_waits(bell: long_poll.Bell) -> None:
    threading.Timer(0.05, bell.end).start()
    began = time.monotonic()
    bell.sleep("a", 0, PATIENCE_S)
    bell.sleep("a", bell.rung("a"), PATIENCE_S)
    assert time.monotonic() < began + PATIENCE_S / 2


@pytest.mark.parametrize(
    ("text", "seconds"), [(b"2.5", 2.5), (b"-1", 0.0), (b"many", 0.0), (b"9e9", 30.0), (b"nan", 0.0)]
)
def test_how_long_may_be_held(text: bytes, seconds: float) -> None:
    assert long_poll._seconds([(b"accept", b"x"), (long_poll.HEADER, text)]) == seconds
