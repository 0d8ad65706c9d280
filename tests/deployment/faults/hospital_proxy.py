"""A hospital's proxy as its sites know it: CONNECT with a password, everything else refused.

``python hospital_proxy.py PORT LOG`` reads ``user:password`` from standard input and writes a line for each request.
"""

from __future__ import annotations

import asyncio
import base64
import sys
from pathlib import Path

REFUSED = (
    b'HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm="hospital"\r\n'
    b"Content-Length: 0\r\nConnection: close\r\n\r\n"
)


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


class Proxy:
    def __init__(self, pair: str, log: Path) -> None:
        self._right = b"basic " + base64.b64encode(pair.encode())
        self._log = log

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, OSError):
            writer.close()
            return
        lines = head.split(b"\r\n")
        method, target, _ = lines[0].split(b" ")
        shown = [line.partition(b":")[2].strip() for line in lines if line.lower().startswith(b"proxy-authorization:")]
        right = bool(shown) and shown[0][:6].lower() + shown[0][6:] == self._right
        word = "opened" if right and method == b"CONNECT" else "refused"
        with self._log.open("a") as file:
            file.write(f"{word} {method.decode()} {target.decode()}\n")
        if word == "refused":
            writer.write(REFUSED)
            await writer.drain()
            writer.close()
            return
        host, _, port = target.decode().rpartition(":")
        try:
            there, back = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            writer.close()
            return
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(pump(reader, back), pump(there, writer))


async def main() -> None:
    serve = Proxy(sys.stdin.readline().strip(), Path(sys.argv[2]))
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
