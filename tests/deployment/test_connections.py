"""Who is let in at the public port, and who is cut: the door alone, on the event loops that it may run in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import ssl
import sys
import time
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
    words: list[str] = []
    door = connections.Door(lambda what, address: words.append(what))
    door.open("127.0.0.1", 0, protocol, context)
    return door, door._listening[0].getsockname()[1], words


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
        door, port, words = opened(CutFirst, shown)
        client = await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, str(port))
        assert await asyncio.wait_for(client.wait(), 20) == 0
        assert words == ["connections"]
        assert cut[0].transport is not None
        assert cut[0].transport.is_closing()
        door.close()

    run(scene())


# -- who is cut --------------------------------------------------------------------------------------------------------


class Crowd:
    """A door with strangers on sockets that nobody else holds; ``cut`` has the addresses of those who were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def never(*given: Any) -> None:
            await asyncio.sleep(60)

        monkeypatch.setattr(connections.Door, "_greet", never)
        self.cut: list[str] = []
        self.door = connections.Door(lambda what, address: self.cut.append(address))
        self.kept: list[socket.socket] = []

    def comes(self, address: str, speaks: bool = False, ago: float = 0.0) -> connections.Guest:
        mine, theirs = socket.socketpair()
        self.kept.append(theirs)
        self.door._take(mine, address, Echo, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        guest = list(self.door._strangers[connections.network(address)])[-1]
        guest.speaks, guest.began = speaks, guest.began - ago
        return guest

    async def close(self) -> None:
        self.door.close()
        await asyncio.sleep(0)
        for each in self.kept:
            each.close()


def test_an_ipv6_network_counts_as_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "PER_ADDRESS", 20)

    async def scene() -> None:
        crowd = Crowd(monkeypatch)
        for number in range(40):
            crowd.comes(f"2001:db8::{number:x}")
        assert crowd.cut == [f"2001:db8::{number:x}" for number in range(20)]
        for address in ("2001:db8:0:1::1", "192.0.2.7", "::ffff:192.0.2.7"):
            crowd.comes(address)
        assert len(crowd.cut) == 20
        assert connections.network("fe80::1%eth0") == connections.network("fe80::2") == "fe80::/64"
        assert connections.network("::ffff:192.0.2.7") == "192.0.2.7"
        await crowd.close()

    asyncio.run(scene())


@pytest.mark.parametrize("size", [1, connections.SHARE, connections.SHARE + 1])
def test_a_hospital_that_speaks_stays_however_many_addresses_the_silent_have(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(connections, "STRANGERS", 120)

    async def scene() -> None:
        crowd = Crowd(monkeypatch)
        honest = [crowd.comes("192.0.2.7", speaks=True, ago=2) for _ in range(3)]
        for number in range(117):
            crowd.comes(f"198.51.100.{number // size}", ago=1)
        assert crowd.cut == []
        for number in range(30):
            crowd.comes(f"203.0.113.{number}")
        assert len(crowd.cut) == 30
        assert all(address.startswith("198.51.100.") for address in crowd.cut)
        assert not any(guest.cut for guest in honest)
        assert crowd.door.strangers == 120
        await crowd.close()

    asyncio.run(scene())


def test_who_was_not_heard_yet_stays_where_most_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    """His first bytes may wait to be read, behind those of everybody who came with him."""
    monkeypatch.setattr(connections, "PER_ADDRESS", 50)

    async def scene() -> None:
        crowd = Crowd(monkeypatch)
        first = [crowd.comes("192.0.2.7", speaks=True) for _ in range(50)]
        honest = crowd.comes("192.0.2.7")
        for _ in range(10):
            crowd.comes("192.0.2.7", speaks=True)
        assert not honest.cut
        assert [guest.cut for guest in first] == [True] * 11 + [False] * 39
        honest.began -= 2 * connections.BEGIN_S
        crowd.comes("192.0.2.7")
        assert honest.cut, "he had time"
        await crowd.close()

    asyncio.run(scene())


def test_strangers_take_a_share_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections.capacity, "file_limit", lambda: 80)

    async def scene() -> None:
        crowd = Crowd(monkeypatch)
        for number in range(30):
            crowd.comes(f"198.51.100.{number}")
        assert crowd.door.strangers == 80 // connections.OF_FILES
        await crowd.close()

    asyncio.run(scene())


def test_who_was_accepted_before_no_file_was_left_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def scene() -> None:
        taken: list[socket.socket] = []
        monkeypatch.setattr(connections.Door, "_take", lambda self, sock, *given: taken.append(sock))
        door, port, _ = opened(Echo, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(10)]
        filled: list[int] = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 8, hard))
            with contextlib.suppress(OSError):
                while True:
                    filled.append(os.dup(0))
            for _ in range(4):
                os.close(filled.pop())
            deadline = time.monotonic() + 5
            while len(taken) < 4 and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for number in filled:
                os.close(number)
        assert len(taken) == 4
        assert all(each.fileno() >= 0 for each in taken)
        door.close()
        for each in [*clients, *taken]:
            each.close()

    asyncio.run(scene())


def test_half_a_handshake_is_told_as_slow(run: Any, shown: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "TLS_S", 0.3)

    async def scene() -> None:
        door, port, words = opened(Echo, shown)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\x16\x03\x01")
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        assert words == ["slow"]
        assert door.strangers == 0
        writer.transport.abort()
        door.close()

    run(scene())
