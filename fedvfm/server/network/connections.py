"""Connections of the public port: whoever showed a known key stays; strangers are few, and stay for a short time.

A stranger is whoever connected and has not shown a key of the roster yet. One that says nothing costs a file and no
memory for TLS. Where there are too many, those that say nothing are closed first, then the one that is there longest:
an honest site needs some milliseconds to show its key, and whoever floods the port drives out his own. Who has just
come may not have been heard yet, and counts as silent only where most are.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import ipaddress
import socket
import ssl
import struct
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import chain
from typing import Any

from fedvfm.runtime import capacity

TLS_S = 10.0
"""How long a stranger may say nothing, and then how long his TLS handshake may take."""
STRANGER_S = 30.0
"""How long a stranger stays whatever he sends."""
PER_ADDRESS, STRANGERS = 256, 1024
"""Strangers of one address, and of all. Whoever has one IPv6 address has a whole /64, which counts as one."""
OF_FILES = 4
"""Strangers take at most one of so many files that the process may open."""
SHARE = 16
"""An address with more strangers than that is cut first where all are too many."""
BEGIN_S = 1.0
"""How long a stranger may say nothing before he counts as silent."""
PER_KEY = 64
"""Connections of one known key; a SuperNode needs a handful."""
BACKLOG = 4096
AT_ONCE = 64
"""Connections that are taken in before anything else is done."""
PAUSE_S = 0.1
NO_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_RESET = struct.pack("ii", 1, 0)

Told = Callable[[str, str], None]
Protocol = Callable[["Guest"], asyncio.Protocol]
"""Makes what speaks with a guest. It calls :meth:`Guest.arrived` once it is connected, and :meth:`Guest.left` last."""


@dataclass(eq=False)
class Guest:
    """One connection.

    Attributes:
        key: the known key it showed; empty for a stranger.
        speaks: whether anything came of it.
        cut: whether it was closed from here.
        transport: since TLS stands.
    """

    door: Door
    sock: socket.socket
    address: str
    began: float
    key: str = ""
    speaks: bool = False
    cut: bool = False
    transport: asyncio.Transport | None = None
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None

    def arrived(self, transport: asyncio.Transport) -> None:
        """TLS stands: from now on only the transport may close the socket, whose number asyncio holds."""
        self.transport = transport
        if self.cut:
            transport.abort()

    @property
    def network(self) -> str:
        """What its address is counted under."""
        return network(self.address)

    def known(self, key: str) -> bool:
        """It showed a key of the roster; False where that one has too many connections."""
        return self.door.let_in(self, key)

    def refused(self, why: str) -> None:
        """Tell of something it sent that is none of what is read here."""
        self.door.tell(self, why)

    def end(self, why: str) -> None:
        """Reset it, and tell why."""
        self.door._cut(self, why)

    def left(self) -> None:
        """It is closed."""
        self.door.forget(self)


class Door:
    """Takes connections in and cuts those of strangers.

    Args:
        told: of what was closed: a word, and the address.
    """

    def __init__(self, told: Told) -> None:
        self._told = told
        self._strangers: dict[str, dict[Guest, None]] = {}  # by network, the longest there first
        self._keys: Counter[str] = Counter()
        self._listening: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def strangers(self) -> int:
        """How many there are now."""
        return sum(map(len, self._strangers.values()))

    def open(self, host: str, port: int, protocol: Protocol, context: ssl.SSLContext) -> None:
        """Listen, in the running event loop.

        Raises:
            OSError: if somebody else does.
        """
        rows = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((row[0], row[4]) for row in rows):
            listening = socket.create_server(address[:2], family=family, backlog=BACKLOG)
            listening.setblocking(False)
            self._listening.append(listening)
            self._keep(self._accept(listening, protocol, context))

    def close(self) -> None:
        """Listen no more; who is connected stays, strangers do not."""
        for task in self._tasks:
            task.cancel()
        for listening in self._listening:
            listening.close()

    def let_in(self, guest: Guest, key: str) -> bool:
        """See :meth:`Guest.known`."""
        if guest.key == key:
            return True
        if self._keys[key] >= PER_KEY:
            return False
        self.forget(guest)
        guest.key = key
        self._keys[key] += 1
        return True

    def forget(self, guest: Guest) -> None:
        """Count a connection no more: it is closed, or counted under a key."""
        if guest.timer is not None:
            guest.timer.cancel()
        if guest.key:
            self._keys[guest.key] -= 1
            self._keys += Counter()  # drops those that are zero
            guest.key = ""
        else:
            mine = self._strangers.get(guest.network, {})
            mine.pop(guest, None)
            if not mine:
                self._strangers.pop(guest.network, None)

    def tell(self, guest: Guest, why: str) -> None:
        """See :meth:`Guest.refused`."""
        self._told(why, guest.address)

    # -- strangers ---------------------------------------------------------------------------------------------------

    def _keep(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, listening: socket.socket, protocol: Protocol, context: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                taken = [await loop.sock_accept(listening)]
                with contextlib.suppress(OSError):  # nobody else waits, or no file is left: these are let in
                    while len(taken) < AT_ONCE:
                        taken.append(listening.accept())
            except OSError as error:
                if error.errno in NO_FILES:
                    self._make_room()
                await asyncio.sleep(PAUSE_S)
                continue
            for sock, peer in taken:
                self._take(sock, str(peer[0]), protocol, context)
            await asyncio.sleep(0)

    def _take(self, sock: socket.socket, address: str, protocol: Protocol, context: ssl.SSLContext) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        guest = Guest(self, sock, address, time.monotonic())
        if len(self._strangers.get(guest.network, ())) >= PER_ADDRESS:
            self._cut_one(self._strangers[guest.network])
        elif self.strangers >= min(STRANGERS, capacity.file_limit() // OF_FILES):
            self._make_room()
        self._strangers.setdefault(guest.network, {})[guest] = None
        guest.timer = asyncio.get_running_loop().call_later(STRANGER_S, self._cut, guest, "slow")
        guest.task = self._keep(self._greet(guest, protocol, context))
        guest.task.add_done_callback(lambda task: self._greeted(guest, task))

    def _make_room(self) -> None:
        """Cut a stranger of the network that has most, where that is more than its share, else of all."""
        if self._strangers:
            most = max(self._strangers.values(), key=len)
            self._cut_one(most if len(most) > SHARE else list(chain(*self._strangers.values())))

    def _cut_one(self, guests: Collection[Guest]) -> None:
        self._cut(_worst(guests), "connections")

    def _cut(self, guest: Guest, why: str) -> None:
        """Reset a connection; a SuperNode takes that, and not an end inside TLS, for a pause."""
        self.forget(guest)
        guest.cut = True
        self._told(why, guest.address)
        with contextlib.suppress(OSError):
            guest.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        if guest.transport is not None:
            guest.transport.abort()
        elif guest.task is not None:
            guest.task.cancel()

    async def _greet(self, guest: Guest, protocol: Protocol, context: ssl.SSLContext) -> None:
        """Speak TLS with who begins to."""
        loop = asyncio.get_running_loop()
        try:
            await asyncio.wait_for(_first_byte(guest.sock), TLS_S)
            guest.speaks = True
            await loop.connect_accepted_socket(
                lambda: protocol(guest), guest.sock, ssl=context, ssl_handshake_timeout=TLS_S
            )
        except (
            TimeoutError,
            ConnectionAbortedError,
        ):  # the second: a handshake took too long
            self._cut(guest, "slow")
        except OSError:  # no TLS, or it is gone
            pass

    def _greeted(self, guest: Guest, task: asyncio.Task[None]) -> None:
        """Close what did not come so far; perhaps its task never began.

        A transport whose task was cancelled would say goodbye first, and asyncio let in nobody else under its number.
        """
        if guest.transport is None:
            self.forget(guest)
            guest.sock.close()
        elif task.cancelled():
            guest.transport.abort()


def _worst(guests: Collection[Guest]) -> Guest:
    """The silent one that is there longest, where it had time to speak or most are silent; else the longest there."""
    silent = [guest for guest in guests if not guest.speaks]
    longest = min(silent or guests, key=_began)
    if _began(longest) < time.monotonic() - BEGIN_S or 2 * len(silent) > len(guests):
        return longest
    return min(guests, key=_began)


def _began(guest: Guest) -> float:
    return guest.began


@functools.lru_cache(4 * STRANGERS)
def network(address: str) -> str:
    """What an address counts as: an IPv4 address itself, of IPv6 the /64."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return address
    return str(ip.ipv4_mapped or ipaddress.IPv6Network((ip, 64), strict=False))


async def _first_byte(sock: socket.socket) -> None:
    """Until something came, or the other end closed."""
    loop, came = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sock, came.set)
    try:
        await came.wait()
    finally:
        loop.remove_reader(sock)
