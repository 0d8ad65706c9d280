"""Who holds as many connections of a port open as he can, says nothing or dribbles, and comes back when he is cut."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

BODY = b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n"
KINDS = {
    "silent": (False, b"", b""),
    "half a greeting": (False, b"\x16\x03\x01\x00\xc8\x01", b""),
    "dribbled greeting": (False, b"\x16\x03\x01\x02\x00\x01", b"\x00"),
    "silent in TLS": (True, b"", b""),
    "dribbled head": (True, b"POST /v1/fleet/push-object HTTP/1.1\r\n", b"X-A: b\r\n"),
    "dribbled body": (True, BODY, b"x" * 1000),
    "health again and again": (True, b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"),
}
"""Whether TLS is spoken, what is said at first, and then every second."""


BACK_S = 10.0
"""After so long one who was cut comes back."""
CONTEXT = ssl._create_unverified_context()
"""An attacker trusts anybody."""


@contextlib.contextmanager
def going_on(host: str, port: int, count: int, told: Path) -> Iterator[Callable[[], dict[str, int]]]:
    """Attack from a process of its own while the block runs; asked, it says how often each kind connected."""
    command = [sys.executable, __file__, host, str(port), str(count)]
    with told.open("w") as words, subprocess.Popen(command, stdout=words) as process:
        try:
            yield lambda: json.loads(["{}", *told.read_text().split("\n")[:-1]][-1])
        finally:
            process.kill()


async def _all(host: str, port: int, count: int) -> None:
    began: Counter[str] = Counter()
    kinds = [list(KINDS)[number % len(KINDS)] for number in range(count)]
    tasks = [
        asyncio.create_task(_attack(host, port, kind, began, 3 * number / count)) for number, kind in enumerate(kinds)
    ]
    while tasks:
        print(json.dumps(began), flush=True)
        await asyncio.sleep(1.0)


async def _attack(host: str, port: int, kind: str, began: Counter[str], after_s: float) -> None:
    await asyncio.sleep(after_s)
    while True:
        with contextlib.suppress(OSError, EOFError):
            await _hold(host, port, kind, began)
        await asyncio.sleep(BACK_S)


async def _hold(host: str, port: int, kind: str, began: Counter[str]) -> None:
    tls, first, then = KINDS[kind]
    reader, writer = await asyncio.open_connection(host, port, ssl=CONTEXT if tls else None)
    began[kind] += 1
    try:
        writer.write(first)
        while not reader.at_eof():
            with contextlib.suppress(asyncio.TimeoutError):
                if not await asyncio.wait_for(reader.read(4096), 1.0):
                    return
            writer.write(then)
    finally:
        writer.transport.abort()


if __name__ == "__main__":
    asyncio.run(_all(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
