"""The one port that sites reach: TLS, and of the SuperLink behind it nothing but what a SuperNode needs.

Forwards POST of Flower's fleet routes and GET /health, byte for byte; everything else is refused here and never seen
by the SuperLink. HTTP/1.1 is read by uvicorn and h11, which come with Flower; nothing of a body is kept or logged. A
body is read only if its head is signed with a key of the roster, and when there is room for it. Of bodies only the
heads of pushed messages are looked at: a node may speak for itself alone.

A SuperNode asks for messages again as soon as it had an answer. The SuperLink holds that question until there is a
message; where it does not, or very many sites wait, the proxy holds an empty answer back and asks on itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from uvicorn.protocols.http import h11_impl

from fedvfm.flower import guards, long_poll, runtime
from fedvfm.runtime import processes
from fedvfm.server.network import connections, node_keys, refused_requests, turns
from fedvfm.storage import storage

LOG = logging.getLogger(__spec__.name)  # this module may run as "__main__"
MAX_BODY = 32 * 1024 * 1024
"""Bytes of one request that a front before this door lets through."""
MAX_SMALL = 64 * 1024
"""Bytes of requests that push nothing. Flower sends objects in pieces of 5 MiB and everything else in far less."""
MAX_PUSH = 128 * 1024
"""Bytes of the head of a pushed message with the ids of its parts: 442 of them (2 GiB) take 33 KB."""
MAX_PART = 10 * 1024 * 1024
MAX_HEAD = 16 * 1024
HEAD_S, PIECE_S, BODY_S = 10.0, 20.0, 300.0
"""How long a client may take for the head of a request, the next piece of its body, and all of it."""
IDLE_S = 75
UPSTREAM_S = 60.0
STEP_S = 0.25
"""How often a question for messages is asked again that the SuperLink does not hold."""
LONG_POLLS = 200
"""How many questions the SuperLink holds at a time: each takes a connection to it."""
HEALTH_S = 1.0
"""How long an answer to ``GET /health`` is good for others: whoever asks often asks the SuperLink no more often."""

MOST = {guards.PUSH_ROUTE: MAX_PUSH, "/v1/fleet/push-object": MAX_PART}
"""Bytes of a request's body where they may be many."""
LOAD_S = 60.0
"""How long after a site was told to wait the health says so, which is all that other programs of the site see."""
RETRY = (b"retry-after", b"5")
HEALTH, HEARTBEAT = "/health", "/v1/fleet/send-node-heartbeat"

PASSED_ON = frozenset((b"content-type", b"accept", b"x-flwr-client", b"user-agent"))
"""Headers that go on, besides Flower's own."""
OUR_HEADERS = b"flwr-"
CLEAR = PASSED_ON | {b"content-length", b"content-encoding", b"transfer-encoding"}
"""Headers that a request may have once, as Flower's own."""
GUEST = "guest"
"""Under this name a request's state holds the connection it came by."""

AREAS = ("control", "runtime", "responses", "docs", "openapi.json", "redoc")

STRANGERS = (node_keys.UNSIGNED, node_keys.UNKNOWN)
FAULT, ASK_AGAIN = 500, 503
"""What the SuperLink answers where its disk is full, and what a SuperNode takes for a pause: after a 500 its heartbeat
ends for good, and the site is taken for gone until somebody starts it again."""

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Refused = Callable[[str, str], None]
"""Told of every request that was refused: a word, and the client's address."""


@dataclass(frozen=True)
class Settings:
    """What the proxy is told.

    Attributes:
        host, port: where it listens.
        certificate, key: what it shows.
        upstream: the SuperLink, ``host:port``.
        authority: whom the SuperLink's certificate must be from.
        keys: file of the keys that are let in; see :mod:`fedvfm.server.network.node_keys`.
        log: a line of JSON for each refusal, at most one a second for each word.
        hold_s: how long an empty answer to a SuperNode's question for messages is held back; 0 for not at all.
        most_parts: of one pushed message; see :func:`fedvfm.flower.guards.most_parts`.
    """

    host: str
    port: int
    certificate: str
    key: str
    upstream: str
    authority: str
    keys: str
    log: str = ""
    hold_s: float = 10.0
    most_parts: int = guards.most_parts(guards.MAX_REPLY)

    def program(self, path: Path) -> processes.Program:
        """The process; its settings are written to ``path``."""
        storage.write_text(path, json.dumps(asdict(self), indent=2) + "\n")
        return processes.Program("proxy", processes.module(__name__, str(path)))


class Unfit(Exception):
    """A body over the limit, one that comes too slowly, is not clear, or speaks for another: the status says which."""

    def __init__(self, status: int) -> None:
        self.status = status


@dataclass(frozen=True)
class _Request:
    """A request whose head was judged.

    Attributes:
        key: fingerprint of the key that signed it.
        headers: those that go on.
        most: bytes its body may have.
        size: bytes it says its body has, or may have.
    """

    route: str
    key: str
    headers: list[tuple[bytes, bytes]]
    most: int
    size: int


@dataclass
class _Health:
    """The SuperLink's health, asked for once in :data:`HEALTH_S` however many want to know."""

    client: httpx.AsyncClient
    url: str
    at: float = float("-inf")
    said: tuple[int, bytes] = (502, b"")
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def now(self) -> tuple[int, bytes]:
        """Status and body."""
        async with self.lock:
            if time.monotonic() > self.at + HEALTH_S:
                try:
                    response = await self.client.get(self.url)
                    self.said = response.status_code, response.content
                except httpx.HTTPError:
                    self.said = 502, b""
                self.at = time.monotonic()
            return self.said


class Proxy:
    """The ASGI application.

    Args:
        client: reaches the SuperLink.
        settings: see :class:`Settings`.
        refused: told of refusals.
    """

    def __init__(self, client: httpx.AsyncClient, settings: Settings, refused: Refused) -> None:
        self._client, self._settings, self._refused = client, settings, refused
        self._base = f"https://{settings.upstream}"
        self._keys = node_keys.NodeKeys(Path(settings.keys))
        self._room, self._turns = turns.Room(), turns.Turns()
        self._health = _Health(client, self._base + HEALTH)
        self._held = 0
        self._paused = float("-inf")  # when a site was told to wait, last

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        route, address = bytes(scope["raw_path"]).decode("latin-1"), (scope.get("client") or ("",))[0]
        try:
            request = self._let_in(scope, route)
            await self._forward(request, receive, send, address)
            return
        except Unfit as error:
            status = error.status
        except turns.Overload:
            status, self._paused = ASK_AGAIN, time.monotonic()
        except httpx.HTTPError:
            await _say(send, 502)  # a SuperNode asks again
            return
        except TimeoutError:  # the site does not take its answer
            status = 408
        except Exception:  # uvicorn would say 500; see FAULT
            LOG.exception("a request could not be answered")
            self._refused("fault", address)
            await _say(send, ASK_AGAIN)
            return
        self._refused(word(status, route), address)
        await _say(send, status)

    async def _live(self, receive: Receive, send: Send) -> None:
        """Until the server ends; then let the connections go."""
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await self._client.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    def _let_in(self, scope: Event, route: str) -> _Request:
        """What goes on, judged by its head alone.

        Raises:
            Unfit: if it does not.
            Overload: if its key has too many connections.
        """
        status = judge(scope["method"], route, bytes(scope["query_string"]))
        if status != 200:
            raise Unfit(status)
        headers, most = scope["headers"], MOST.get(route, MAX_SMALL)
        length = _length(headers, most)
        kept = [(k, v) for k, v in headers if k in PASSED_ON or k.startswith(OUR_HEADERS)]
        if route == HEALTH:
            return _Request(route, "", kept, 0, 0)
        key, status = self._keys.judge(route, headers)
        if status:
            raise Unfit(status)
        guest: connections.Guest = scope["state"][GUEST]
        if not guest.known(key):
            raise turns.Overload
        return _Request(route, key, kept, most, most if length is None else length)

    async def _forward(self, request: _Request, receive: Receive, send: Send, address: str) -> None:
        if request.route == HEALTH:
            status, body = await self._health.now()
            standing = self._keys.standing(request.headers)
            await _answer(send, status, body, time.monotonic() < self._paused + LOAD_S, standing)
            return
        async with self._room.take(request.key, request.size):
            body = await _whole(receive, request.most)
            if request.route == guards.PUSH_ROUTE and (fault := guards.push_fault(body, self._settings.most_parts)):
                raise Unfit(fault)
            if request.route != guards.PULL_ROUTE:
                await self._pass_on(request, body, send, address)
                return
        await self._pull(request, body, receive, send, address)

    async def _pass_on(self, request: _Request, body: bytes, send: Send, address: str) -> None:
        url = self._base + request.route
        asked = self._client.build_request("POST", url, headers=request.headers, content=body)
        # A node is taken for gone whose heartbeat waits behind what others push.
        turn = contextlib.nullcontext() if request.route == HEARTBEAT else self._turns.take()
        async with turn:
            response = await self._client.send(asked, stream=True)
        try:
            self._judged(response, address)
            await _start(send, response)
            async for piece in response.aiter_raw():
                await _patiently(send, {"type": "http.response.body", "body": piece, "more_body": True})
            await _patiently(send, {"type": "http.response.body", "body": b""})
        finally:
            await response.aclose()

    def _judged(self, response: httpx.Response, address: str) -> None:
        """Tell of a key that the SuperLink does not let in, and of a fault of its own."""
        if response.status_code in STRANGERS:
            self._refused("key", address)
        elif response.status_code == FAULT:
            self._refused("fault", address)

    async def _pull(self, request: _Request, body: bytes, receive: Receive, send: Send, address: str) -> None:
        """Ask for messages until there is one, the time is over, or the site hung up."""
        gone = asyncio.ensure_future(_hang_up(receive))
        until = time.monotonic() + self._settings.hold_s
        self._held += 1
        try:
            while True:
                left = until - time.monotonic() if self._held <= LONG_POLLS else 0.0
                response = await self._asked(request.headers, body, max(0.0, left), gone)
                if response is None:
                    return
                if response.status_code != 200 or response.content or time.monotonic() >= until:
                    break
                # Many sites that wait together ask less often each.
                await asyncio.wait([gone], timeout=max(STEP_S, 0.02 * self._held))
                if gone.done():
                    return
        finally:
            self._held -= 1
            gone.cancel()
        self._judged(response, address)
        await _start(send, response)
        await _patiently(send, {"type": "http.response.body", "body": response.content})

    async def _asked(
        self, headers: list[tuple[bytes, bytes]], body: bytes, hold_s: float, gone: asyncio.Future[None]
    ) -> httpx.Response | None:
        """The SuperLink's answer; None where the site hung up before: no message is to be handed out to it."""
        hold = (long_poll.HEADER, f"{hold_s:g}".encode())
        url = self._base + guards.PULL_ROUTE
        asking = asyncio.ensure_future(self._client.post(url, headers=[*headers, hold], content=body))
        try:
            either: set[asyncio.Future[Any]] = {gone, asking}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return asking.result() if asking.done() else None
        finally:
            asking.cancel()


def judge(method: str, route: str, query: bytes) -> int:
    """200 where a request goes on, else the status of its refusal."""
    if query:
        return 404
    if route in runtime.FLEET_ROUTES:
        return 200 if method == "POST" else 405
    if route == "/health":
        return 200 if method == "GET" else 405
    return 403 if _area(route) else 404


def _area(route: str) -> str:
    parts = [part for part in route.split("/") if part and part != "v1"]
    return parts[0] if parts and parts[0] in AREAS else ""


def word(status: int, route: str) -> str:
    """What a refusal is called in the audit log."""
    by_status = {400: "framing", 405: "method", 408: "slow", 413: "size", ASK_AGAIN: "load"}
    by_status |= dict.fromkeys(STRANGERS, "key")
    area = _area(route)
    if status == 403 and not area:
        return "foreign-node"
    return by_status.get(status, area.removesuffix(".json") if area else "unknown-route")


def _length(headers: list[tuple[bytes, bytes]], most: int) -> int | None:
    """The announced length of the body, if any.

    Raises:
        Unfit: if it is over the limit, or the head is, or says its length or anything that goes on twice: who reads it
            next may take the other one.
    """
    if sum(len(name) + len(value) for name, value in headers) > MAX_HEAD:
        raise Unfit(400)  # h11 counts a head only while it waits for the rest of it
    names = [name for name, _ in headers if name in CLEAR or name.startswith(OUR_HEADERS)]
    if len(names) != len(set(names)) or {b"content-length", b"transfer-encoding"} <= set(names):
        raise Unfit(400)
    for name, value in headers:
        if name == b"content-length":
            if not value.isdigit() or len(value) > 12 or int(value) > most:
                raise Unfit(413)
            return int(value)
        if name == b"content-encoding":
            raise Unfit(413)  # Flower sends none; what it would unfold to is not known
    return None


async def _whole(receive: Receive, most: int) -> bytes:
    return b"".join([piece async for piece in _pieces(receive, most)])


async def _pieces(receive: Receive, most: int) -> AsyncIterator[bytes]:
    """The body as it comes, bounded in size and time."""
    total, until = 0, time.monotonic() + BODY_S
    while True:
        try:
            event = await asyncio.wait_for(receive(), min(PIECE_S, max(0.0, until - time.monotonic())))
        except TimeoutError:
            raise Unfit(408) from None
        if event["type"] == "http.disconnect":
            raise httpx.ReadError("the site hung up")
        piece = event.get("body", b"")
        total += len(piece)
        if total > most:
            raise Unfit(413)
        if piece:
            yield piece
        if not event.get("more_body"):
            return


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send: Send, response: httpx.Response) -> None:
    dropped = ("connection", "transfer-encoding", "keep-alive", "server", "date")
    headers = [(k, v) for k, v in response.headers.raw if k.decode("latin-1").lower() not in dropped]
    status = ASK_AGAIN if response.status_code == FAULT else response.status_code
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _patiently(send: Send, event: Event) -> None:
    """Send a piece to a client that may be slow, but not endlessly."""
    await asyncio.wait_for(send(event), BODY_S)


async def _answer(send: Send, status: int, body: bytes, loaded: bool, standing: str) -> None:
    headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
    headers += [RETRY] * loaded
    headers += [(guards.STANDING, standing.encode())] if standing else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await _patiently(send, {"type": "http.response.body", "body": body})


async def _say(send: Send, status: int) -> None:
    """An answer of our own: no body, and the connection ends."""
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    headers += [RETRY] * (status == ASK_AGAIN)
    with contextlib.suppress(RuntimeError):  # where the answer had begun
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


class Impatient(h11_impl.H11Protocol):
    """uvicorn's connection, which here ends if the head of a request does not come in time."""

    _timer: asyncio.TimerHandle | None = None
    guest: connections.Guest

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected."""
        super().connection_made(transport)
        self.guest.arrived(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Some bytes came: of a head, which must be whole in time, or of a body, which :func:`_pieces` times."""
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._wait()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._let()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left."""
        self._let()
        self.guest.left()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """An answer is out; uvicorn times the pause until the next request begins."""
        self._let()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self.guest.refused("framing")
        super().send_400_response(msg)

    def _wait(self) -> None:
        self._timer = self.loop.call_later(HEAD_S, self.guest.end, "slow")

    def _let(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Server(uvicorn.Server):
    """uvicorn's server, whose connections come through a :class:`fedvfm.server.network.connections.Door`."""

    def __init__(self, config: uvicorn.Config, refused: Refused) -> None:
        super().__init__(config)
        self._door = connections.Door(refused)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        if self.config.ssl is None:
            raise ValueError("the public port speaks TLS alone")
        try:
            self._door.open(self.config.host, self.config.port, self._protocol, self.config.ssl)
        except OSError as error:
            LOG.error(f"cannot listen at {self.config.host}:{self.config.port}: {error}")
            sys.exit(1)
        await super().startup(sockets=[])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen no more, and end."""
        self._door.close()
        await super().shutdown(sockets=[])

    def _protocol(self, guest: connections.Guest) -> asyncio.Protocol:
        state = {**self.lifespan.state, GUEST: guest}
        connection = Impatient(config=self.config, server_state=self.server_state, app_state=state)
        connection.guest = guest
        return connection


def server(settings: Settings, refused: Refused) -> uvicorn.Server:
    """The server, ready to run."""
    context = ssl.create_default_context(cafile=settings.authority)
    client = httpx.AsyncClient(
        verify=context,
        trust_env=False,
        timeout=UPSTREAM_S,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=3.0),
    )
    config = uvicorn.Config(
        Proxy(client, settings, refused),
        host=settings.host,
        port=settings.port,
        http=Impatient,
        ws="none",
        lifespan="on",
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.key,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=MAX_HEAD,
    )
    config.load()
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    return Server(config, refused)


def main(path: str) -> None:
    """Be the proxy until told to end."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    for name in (
        "httpx",
        "uvicorn.error",
    ):  # the second warns of every piece of garbage
        logging.getLogger(name).setLevel(logging.ERROR)
    settings = Settings(**json.loads(Path(path).read_text(encoding="utf-8")))
    log = refused_requests.Refusals(settings.log)
    try:
        server(settings, log).run()
    finally:
        log.flush()


if __name__ == "__main__":
    main(sys.argv[1])
