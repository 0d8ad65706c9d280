"""Which node keys the public port lets in: those of a file that the supervisor writes whenever the roster changed."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from pathlib import Path

from fedvfm import errors
from fedvfm.flower import guards
from fedvfm.storage import storage
from fedvfm.trust import keys

UNKNOWN, UNSIGNED = 412, 401
"""What the SuperLink answers to a node that comes online with a key it does not know, and to any other such request."""


APPROVED, DROPPED, STRANGER = "approved", "dropped", "unknown"
"""How the site of a key stands, as it is told when it asks."""


def write(path: Path, public_keys: Iterable[str], dropped: Collection[str] = ()) -> None:
    """Let in these keys (in OpenSSH's form) and no others; those of ``dropped`` sites among them are marked so.

    Raises:
        StorageError: if the disk refuses.
    """
    with storage.guard(path.parent):
        path.parent.mkdir(mode=0o700, exist_ok=True)
    marks = dict.fromkeys(dropped, f" {DROPPED}")
    storage.write_text(path, "".join(f"{key}{marks.get(key, '')}\n" for key in sorted(public_keys)))


class NodeKeys:
    """Judges a request by its headers alone, before a byte of its body is read.

    Args:
        path: of the file; whenever that changed it is read again. Without it nobody is let in.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._as_of = (-1, -1)
        self._keys: dict[bytes, str] = {}
        self._dropped: frozenset[bytes] = frozenset()

    def judge(self, route: str, headers: Iterable[tuple[bytes, bytes]]) -> tuple[str, int]:
        """The fingerprint of the key that signed a request, and 0; or nothing and the status of its refusal."""
        shown = dict(headers)
        key = self._now().get(shown.get(guards.PUBLIC_KEY, b""))
        if key is None:
            return "", UNKNOWN if route == guards.ACTIVATE_ROUTE and guards.PUBLIC_KEY in shown else UNSIGNED
        return (key, 0) if guards.is_signed(shown) else ("", UNSIGNED)

    def standing(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """How the site stands whose key signed a request; empty where nobody says who asks.

        Who has another's public key learns nothing of it without a signature.
        """
        shown = dict(headers)
        if guards.PUBLIC_KEY not in shown:
            return ""
        if self._now().get(shown[guards.PUBLIC_KEY]) is None or not guards.is_signed(shown):
            return STRANGER
        return DROPPED if shown[guards.PUBLIC_KEY] in self._dropped else APPROVED

    def _now(self) -> dict[bytes, str]:
        """How a known key is shown -> its fingerprint. Where the file cannot be read now, as it was before."""
        with contextlib.suppress(OSError, ValueError, errors.FedvfmError):
            about = self._path.stat()
            if (about.st_ino, about.st_mtime_ns) != self._as_of:
                listed = self._path.read_text(encoding="utf-8").splitlines()
                marked = {line.removesuffix(f" {DROPPED}"): line.endswith(f" {DROPPED}") for line in listed}
                self._keys = {guards.shown_key(key): keys.fingerprint(key) for key in marked}
                self._dropped = frozenset(guards.shown_key(key) for key, gone in marked.items() if gone)
                self._as_of = (about.st_ino, about.st_mtime_ns)
        return self._keys
