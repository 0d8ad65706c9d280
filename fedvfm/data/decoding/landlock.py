"""Landlock of Linux: a process gives up for ever what it never needs, though it is the same user's.

Source: Linux, Documentation/userspace-api/landlock.rst. Files stay readable, as nobody knows which ones will be
asked for; only ``/proc``, where the environment of other processes lies, does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""System calls, the same number on all machines."""
VERSION = PATH_BENEATH = 1
READ_FILE, READ_DIR = 1 << 2, 1 << 3
FILES = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
"""Rights over files that can be given up, by the version that brought them: to write, make, remove, cut, execute."""
NETWORK = {4: 0b11}
"""To listen and to connect by TCP."""
SCOPES = {6: 0b11}
"""Sockets without a file and signals, of processes outside."""


def version() -> int:
    """What this kernel knows of Landlock; 0 without it."""
    return max(_call(CREATE_RULESET, None, 0, VERSION), 0) if sys.platform == "linux" else 0


def give_up() -> None:
    """Keep this process from writing, making and removing files, from programs, from TCP and from other processes.

    A kernel that knows less keeps it from less. ``PR_SET_NO_NEW_PRIVS`` has to be set before.
    """
    known = version()
    if not known:
        return
    files, network, scopes = (
        sum(rights for since, rights in table.items() if since <= known) for table in (FILES, NETWORK, SCOPES)
    )
    given = struct.pack("=QQQ", files, network, scopes)
    size = 8 if known < 4 else 16 if known < 6 else 24
    rules = _call(CREATE_RULESET, given[:size], size, 0)
    if rules < 0:
        return
    for entry in os.scandir("/"):
        if entry.name != "proc":
            _keep_readable(rules, entry)
    _call(RESTRICT_SELF, rules, 0)
    os.close(rules)


def _keep_readable(rules: int, entry: os.DirEntry[str]) -> None:
    with contextlib.suppress(OSError):  # a link to nothing
        place = os.open(entry.path, os.O_PATH)
        rights = READ_FILE | (READ_DIR if entry.is_dir() else 0)
        _call(ADD_RULE, rules, PATH_BENEATH, struct.pack("=Qi", rights, place), 0)
        os.close(place)


def _call(number: int, *args: bytes | int | None) -> int:
    library = ctypes.CDLL(None)
    library.syscall.restype = ctypes.c_long
    wide = [ctypes.c_long(item) if isinstance(item, int) else item for item in args]
    return int(library.syscall(ctypes.c_long(number), *wide))
