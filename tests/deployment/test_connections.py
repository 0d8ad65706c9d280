"""Who is let in at the public port, and who is cut: the door alone, on the event loops that it may run in."""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop

from fedvfm.server.network import connections
from fedvfm.trust import certificates, keys, signed_documents

Loop = Callable[[], asyncio.AbstractEventLoop]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    folder, now = tmp_path_factory.mktemp("tls"), signed_documents.now()
    authority_key, authority = certificates.make_authority("test", now)
    key, certificate = certificates.make_server(authority_key, authority, ("127.0.0.1",), now)
    (folder / "server.pem").write_text(certificates.to_pem(certificate))
    keys.write_private(folder / "server.key", key, pem=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    return context


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Coroutine[Any, Any, None]], None]]:
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner.run


class Echo(asyncio.Protocol):
    """Says what it hears."""

    def __init__(self, guest: connections.Guest) -> None:
        self.guest = guest

    def connection_made(self, transport: Any) -> None:
        self.guest.arrived(transport)

    def data_received(self, data: bytes) -> None:
        assert self.guest.transport is not None
        self.guest.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.guest.left()


def opened(protocol: connections.Protocol, context: ssl.SSLContext) -> tuple[connections.Door, int, list[str]]:
    """The door, its port, and what it told."""
    told: list[str] = []
    door = connections.Door(lambda what, address: told.append(what))
    door.open("127.0.0.1", 0, protocol, context)
    return door, door._listening[0].getsockname()[1], told


CLIENT = """
import socket, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
def connected():
    return context.wrap_socket(socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=5))
first = connected()
try:
    assert first.recv(1) == b""
except ConnectionError:
    pass
for _ in range(3):
    with connected() as later:
        later.sendall(b"x")
        assert later.recv(1) == b"x"
"""
"""In a process of its own, so that the numbers of closed files go to the door's end of the next connection."""


@pytest.mark.parametrize("turn", ["as TLS ends", "just after"])
def test_a_stranger_cut_in_the_turn_in_which_tls_ends_takes_nobody_with_him(
    run: Any, shown: ssl.SSLContext, turn: str
) -> None:
    """Else asyncio holds his socket's number for 30 s, and whoever is given that number dies."""
    cut: list[connections.Guest] = []

    class CutFirst(Echo):
        def connection_made(self, transport: Any) -> None:
            if cut:
                return super().connection_made(transport)
            cut.append(self.guest)
            if turn == "as TLS ends":
                self.guest.door._cut(self.guest, "connections")
            else:
                asyncio.get_running_loop().call_soon(self.guest.door._cut, self.guest, "connections")
            return super().connection_made(transport)

    async def scene() -> None:
        door, port, told = opened(CutFirst, shown)
        client = await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, str(port))
        assert await asyncio.wait_for(client.wait(), 20) == 0
        assert told == ["connections"]
        assert cut[0].transport is not None
        assert cut[0].transport.is_closing()
        door.close()

    run(scene())
