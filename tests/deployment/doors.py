"""A door to the network under test, as a client sees it, and a real HTTPS server behind it that notes what comes."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn


@dataclass
class Behind:
    """Stands where the server stands.

    Attributes:
        seen: method, target, headers and size of the body of each request.
    """

    seen: list[tuple[str, str, dict[str, str], int]] = field(default_factory=list)

    def reply(self, path: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """Status and body."""
        return 200, b"pong"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        size, more = 0, True
        while more:
            event = await receive()
            size, more = size + len(event.get("body", b"")), event.get("more_body")
        headers = {key.decode(): value.decode() for key, value in scope["headers"]}
        query = scope["query_string"].decode()
        target = scope["raw_path"].decode() + (f"?{query}" if query else "")
        self.seen.append((scope["method"], target, headers, size))
        status, body = self.reply(scope["path"], headers)
        about = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/protobuf")]
        await send({"type": "http.response.start", "status": status, "headers": about})
        await send({"type": "http.response.body", "body": body})

    def server(self, certificate: Path, key: Path, port: int) -> uvicorn.Server:
        shown = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
        return uvicorn.Server(
            uvicorn.Config(self, port=port, http="h11", lifespan="off", ws="none", log_config=None, **shown)
        )


@contextlib.contextmanager
def serving(server: uvicorn.Server) -> Iterator[None]:
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield
    server.should_exit = True
    thread.join(120)
    assert not thread.is_alive()


@dataclass
class Public:
    """The door."""

    port: int
    behind: Any
    authority: Path
    log: Path

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.authority)

    def client(self) -> httpx.Client:
        return httpx.Client(
            base_url=f"https://127.0.0.1:{self.port}", verify=self.context(), trust_env=False, timeout=120
        )
