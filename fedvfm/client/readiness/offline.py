"""A guard for what must not use the network: connections of this process are refused while it is closed."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from typing import Any

SWITCH = "HF_HUB_OFFLINE"


@contextlib.contextmanager
def closed() -> Iterator[None]:
    """Refuse every connection and every look-up of a name; sockets of this machine's file system stay.

    Hugging Face's own switch is set too: its library would try again and again.
    """
    before = os.environ.get(SWITCH)
    connect, connect_ex, look_up = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def refuse(own: socket.socket, address: Any, /) -> None:
        if own.family != getattr(socket, "AF_UNIX", None):
            raise OSError(errno.ENETUNREACH, "the check uses no network")
        connect(own, address)

    def refuse_ex(own: socket.socket, address: Any, /) -> int:
        return errno.ENETUNREACH if own.family != getattr(socket, "AF_UNIX", None) else connect_ex(own, address)

    def no_name(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_FAIL, "the check uses no network")

    socket.socket.connect = refuse  # type: ignore[method-assign, assignment]
    socket.socket.connect_ex = refuse_ex  # type: ignore[method-assign, assignment]
    socket.getaddrinfo = no_name
    os.environ[SWITCH] = "1"
    try:
        yield
    finally:
        socket.socket.connect, socket.socket.connect_ex = connect, connect_ex  # type: ignore[method-assign]
        socket.getaddrinfo = look_up
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before
