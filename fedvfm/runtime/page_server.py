"""The live page: a small web server on loopback in a process of its own, which can stop nothing else.

It reads files and writes none. Whoever asks must know the token in the address, must name this machine in the ``Host``
header (a page of a stranger that rebinds its name to 127.0.0.1 does not), and may only read. The token is in a private
file and never in a log or among a command's arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fedvfm import errors
from fedvfm.report import live_page
from fedvfm.runtime import processes
from fedvfm.storage import storage

LOG = logging.getLogger(__name__)
NAME = "page"
FILE = "page.json"
"""Address and token of the page, in the folder of the processes; for their owner alone."""
HOST = "127.0.0.1"
HOSTS = (HOST, "localhost")
"""What a ``Host`` header may name, with any port: an SSH tunnel has one of its own at its other end."""
LOOK_S = 1.0
"""How often files are looked at while somebody has the page open; at other times nothing is."""
LATEST_S = 30.0
"""How often the page is made anew though no file changed: processes end without one."""
BEAT_S = 15.0
MOST_STREAMS = 16
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)

Event = MutableMapping[str, Any]
Look = Callable[[], live_page.Content]
Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Address:
    """Where a page is, and what opens it."""

    port: int
    token: str

    @property
    def url(self) -> str:
        """For a browser of this machine."""
        return f"http://{HOST}:{self.port}/{self.token}/"


def prepare(folder: Path, port: int = 0) -> Address:
    """A new token, and a port that nobody listens at; kept in the folder of the processes.

    Raises:
        EngineError: if the port that was asked for is taken.
        StorageError: if the disk refuses.
    """
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
        except OSError as error:
            raise errors.EngineError(
                f"the page cannot be at {HOST}:{port}: {error.strerror or error}. Give another --page-port, or none"
            ) from None
        address = Address(int(probe.getsockname()[1]), secrets.token_urlsafe(32))
    values = {"url": address.url, "port": address.port, "token": address.token}
    storage.write_text(folder / FILE, json.dumps(values) + "\n")
    return address


def read_address(folder: Path) -> Address:
    """What :func:`prepare` kept.

    Raises:
        EngineError: if it cannot be read.
    """
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return Address(int(values["port"]), str(values["token"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise errors.EngineError(f"{folder / FILE}: cannot be read. Start with --page again") from None


def start(
    begin: Callable[[processes.Program], object], folder: Path, module: str, *arguments: str, port: int = 0
) -> None:
    """Start the page's process, and say where it is.

    Args:
        begin: starts a program whose log and pid file lie in ``folder``. If it ends, none of the others is touched.
        folder: private; takes the address too.
        module: ends in :func:`serve`; its first argument is ``folder``.
        arguments: the others.
        port: on loopback; 0 for any that is free.

    Raises:
        EngineError: if the port is taken.
        StorageError: if the disk refuses.
    """
    address = prepare(folder, port)
    command = processes.module(module, str(folder.absolute()), *arguments)
    begin(processes.Program(NAME, command, grace_s=3.0))
    LOG.info(introduce(folder, address))


def forget(folder: Path) -> None:
    """The page has ended: its address opens nothing any more."""
    (folder / FILE).unlink(missing_ok=True)


def introduce(folder: Path, address: Address) -> str:
    """Where the page is, for people: the address itself on a terminal alone, as anything else may be a log."""
    if sys.stderr.isatty() and sys.stdout.isatty():  # records go to either
        return f"page: {address.url} (this machine alone; whoever has the address can read it)"
    return f"page: its address is the url in {folder / FILE}"


class Source:
    """What is shown, made anew only when a file changed.

    Args:
        look: makes it.
        files: those that it is made of.
    """

    def __init__(self, look: Look, files: Callable[[], Iterable[Path]]) -> None:
        self._look, self._files = look, files
        self._stamp: Stamp | None = None
        self._made, self._looked = float("-inf"), float("-inf")
        self._content = live_page.Content("fedvfm", {})
        self._lock = asyncio.Lock()

    async def now(self) -> live_page.Content:
        """The page as it is now; several who ask at once cost one look."""
        async with self._lock:
            if time.monotonic() >= self._looked + LOOK_S / 2:
                await asyncio.to_thread(self._refresh)
                self._looked = time.monotonic()
            return self._content

    def _refresh(self) -> None:
        stamp: Stamp | None = None
        try:
            stamp = tuple(stamp_of(path) for path in self._files())
            if stamp == self._stamp and time.monotonic() < self._made + LATEST_S:
                return
            self._content = self._look()
        except (OSError, ValueError, KeyError, TypeError, errors.FedvfmError) as error:
            text = (
                str(error)
                if isinstance(error, errors.FedvfmError)
                else f"a file changed its form ({type(error).__name__})"
            )
            note = live_page.heading(self._content.title, "", [f"This cannot be read now: {text}"])
            parts = dict.fromkeys(self._content.parts, "") or {"head": ""}
            self._content = live_page.Content(self._content.title, {**parts, next(iter(parts)): note}, {"error": text})
        self._stamp, self._made = stamp, time.monotonic()


def stamp_of(path: Path) -> tuple[int, int, int]:
    """Tells whether a file was written to or put in another's place."""
    try:
        about = path.stat()
    except OSError:
        return (0, 0, 0)
    return (about.st_ino, about.st_size, about.st_mtime_ns)


class Guard:
    """Lets through who knows the token, names this machine and only reads; everything else is refused unread.

    Args:
        app: what is behind it.
        token: of the page.
    """

    def __init__(self, app: Callable[..., Any], token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Event, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        status, rest = self._judge(scope)

        async def guarded(event: Event) -> None:
            if event["type"] == "http.response.start":
                event["headers"] = [*event["headers"], *HEADERS]
            await send(event)

        answer: Any = PlainTextResponse(_SAID[status], status) if status != 200 else self._app
        await answer({**scope, "path": rest, "raw_path": rest.encode(), "root_path": ""}, receive, guarded)

    def _judge(self, scope: Event) -> tuple[int, str]:
        """Status, and the path behind the token."""
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or hosts[0].decode("latin-1").rpartition(":")[0] not in HOSTS:
            return 421, ""
        if scope["method"] not in ("GET", "HEAD"):
            return 405, ""
        _, _, whole = str(scope["path"]).partition("/")
        token, slash, rest = whole.partition("/")
        if not hmac.compare_digest(token.encode("utf-8", "surrogateescape"), self._token) or not slash:
            return 404, ""
        return 200, "/" + rest


_SAID = {404: "not found\n", 405: "this page can only be read\n", 421: "this page is at 127.0.0.1 alone\n"}


def application(token: str, source: Source) -> Guard:
    """The page, its style, its script, its changes as they come, and the same for scripts.

    Args:
        token: what opens it.
        source: what it shows.
    """
    streams = 0

    async def whole(request: Request) -> Response:
        return HTMLResponse(live_page.document(await source.now()))

    async def data(request: Request) -> Response:
        return JSONResponse((await source.now()).data)

    async def events(request: Request) -> Response:
        nonlocal streams
        if streams >= MOST_STREAMS:
            return PlainTextResponse("too many look on\n", 503)

        async def changes() -> AsyncIterator[str]:
            nonlocal streams
            streams += 1
            try:
                async for event in _changes(source):
                    yield event
            finally:
                streams -= 1

        return StreamingResponse(changes(), media_type="text/event-stream")

    async def style(request: Request) -> Response:
        return Response(live_page.STYLE, media_type="text/css")

    async def script(request: Request) -> Response:
        return Response(live_page.SCRIPT, media_type="text/javascript")

    paths = {"/": whole, "/status.json": data, "/events": events, "/page.css": style, "/page.js": script}
    return Guard(Starlette(routes=[Route(path, answer, methods=["GET"]) for path, answer in paths.items()]), token)


async def _changes(source: Source) -> AsyncIterator[str]:
    """Server-sent events: the parts that changed; now and then a word, by which one that is gone is noticed."""
    sent: dict[str, str] = {}
    said = time.monotonic()
    while True:
        parts = dict((await source.now()).parts)
        changed = {key: part for key, part in parts.items() if sent.get(key) != part}
        if changed:
            sent, said = parts, time.monotonic()
            yield f"event: parts\ndata: {json.dumps(changed)}\n\n"
        elif time.monotonic() > said + BEAT_S:
            said = time.monotonic()
            yield ": still here\n\n"
        await asyncio.sleep(LOOK_S)


def settings(app: Guard, port: int) -> uvicorn.Config:
    """How it is served: on loopback alone, with no line for a request, which would hold the token."""
    return uvicorn.Config(
        app,
        host=HOST,
        port=port,
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="off",
        limit_concurrency=64,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=1,
    )


def serve(folder: Path, look: Look, files: Callable[[], Iterable[Path]]) -> None:
    """Be the page's process until it is told to end.

    Args:
        folder: of the processes, where :func:`prepare` kept the address.
        look: makes what is shown.
        files: those it is made of.
    """
    with contextlib.suppress(OSError):
        os.nice(10)  # what it looks at comes first
    address = read_address(folder)
    uvicorn.Server(settings(application(address.token, Source(look, files)), address.port)).run()
