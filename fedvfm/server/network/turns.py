"""Bodies that the public port holds, and requests that the SuperLink works on: bounded, each key its share, in order.

A body is read when there is room for it, and passed on whole when it is its turn: who sends slowly keeps nobody
waiting, and the SuperLink's data base has few that write at a time, however many sites send at once.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

WAIT_S = 20.0
"""How long a request waits for room and for its turn; a SuperNode waits 30 s for an answer, then asks anew."""
HELD_BYTES, SHARE = 256 * 1024 * 1024, 8
"""Bytes of bodies that are held over all, and into how many parts they are shared: one key has one part at most."""
AT_ONCE = 8
"""Requests that the SuperLink works on at a time, apart from questions that it holds."""


class Overload(Exception):
    """There was no room, or no turn came, in time: a pause, and then it is asked again."""


class Room:
    """So many bytes are held at a time; who came first has them first, and no key more than its share.

    Args:
        most: bytes.
        share: of one key.
    """

    def __init__(self, most: int = HELD_BYTES, share: int = HELD_BYTES // SHARE) -> None:
        self._most, self._share = most, share
        self._held: Counter[str] = Counter()
        self._waiting: collections.deque[tuple[str, int, asyncio.Future[None]]] = collections.deque()

    @property
    def held(self) -> int:
        """Bytes that are spoken for."""
        return self._held.total()

    @contextlib.asynccontextmanager
    async def take(self, key: str, size: int) -> AsyncIterator[None]:
        """Hold ``size`` bytes for a key while the block runs.

        Raises:
            Overload: if there is no room in time.
        """
        size = min(size, self._share)
        if self._waiting or not self._fits(key, size):
            await self._wait(key, size)
        else:
            self._held[key] += size
        try:
            yield
        finally:
            self._held[key] -= size
            self._held += Counter()
            self._serve()

    def _fits(self, key: str, size: int) -> bool:
        return self.held + size <= self._most and self._held[key] + size <= self._share

    async def _wait(self, key: str, size: int) -> None:
        place = (key, size, asyncio.get_running_loop().create_future())
        self._waiting.append(place)
        self._serve()
        try:
            await asyncio.wait_for(asyncio.shield(place[2]), WAIT_S)
        except (TimeoutError, asyncio.CancelledError) as error:
            if place in self._waiting:
                self._waiting.remove(place)
            else:  # it had been served meanwhile
                self._held[key] -= size
            self._serve()
            if isinstance(error, TimeoutError):
                raise Overload from None
            raise

    def _serve(self) -> None:
        """Give room in the order they came; a key that has its share lets the next one go first."""
        for place in list(self._waiting):
            key, size, future = place
            if self.held + size > self._most:
                return
            if self._fits(key, size):
                self._waiting.remove(place)
                self._held[key] += size
                future.set_result(None)


class Turns:
    """So many requests are worked on at a time, in the order they came."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._free = asyncio.Semaphore(at_once)

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Have a turn while the block runs.

        Raises:
            Overload: if none comes in time.
        """
        try:
            await asyncio.wait_for(self._free.acquire(), WAIT_S)
        except TimeoutError:
            raise Overload from None
        try:
            yield
        finally:
            self._free.release()
