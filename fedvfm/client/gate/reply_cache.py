"""The last update a site sent, and its scores, on disk before they leave: asked again for the same, it sends the same.

The same means recipe hash, round, fingerprint of the adapter that came, and the split that was scored. A coordinator
that crashed, or lost a reply on the way, makes nobody train twice, and gets no second noised copy of what was released
once, nor a second score of it on other data.

The mark of the site's audit log is no part of what is kept: it is put on a reply as it leaves. So a reply that is sent
again has the same records, byte for byte, and carries the mark of the log as it is then: longer than the first one, and
covering the line that says it was sent again. A site's marks never go back; one that does shows a log that was cut.

    <recipe>-<round>-<adapter>.reply   "<sha256 of all after it> <token>", a line's end, the reply; the last update
    <recipe>-<round>-<adapter>.val     the same of scores, all of a recipe; .test of the test

The token is that of the reservation in the ledger under which it was trained; without a mechanism there is none.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from flwr.app import Message, RecordDict

from fedvfm import errors
from fedvfm.client.gate import held_adapters
from fedvfm.flower import internals
from fedvfm.protocol import envelope, protocol
from fedvfm.storage import storage

_SUFFIX = ".reply"


class Sent:
    """The answers kept in a folder: the last update of each recipe, and all its scores.

    Beside them lies what later rounds need: the adapters that came, and of what was sent residuals and personal arrays.

    Args:
        folder: private; made when needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.adapters = held_adapters.Adapters(folder)
        self.residuals = held_adapters.Residuals(folder)
        self.personal = held_adapters.PersonalArrays(folder)

    def find(self, task: protocol.Task, kind: str = protocol.TRAIN) -> RecordDict | None:
        """What was sent for this, if it was; a file that is damaged counts as none."""
        return _content(self._path(task, kind))

    def token(self, task: protocol.Task) -> str:
        """Of the reservation that it was trained under; "" where there is none, or an earlier release kept it."""
        return _parts(self._path(task))[0]

    def last(self, recipe: str) -> RecordDict | None:
        """The update that was sent last for a recipe, whatever it was asked for with."""
        kept = sorted(self._folder.glob(f"{recipe}-*{_SUFFIX}"))
        return _content(kept[-1]) if kept else None

    def last_round(self, recipe: str) -> int:
        """The round of the update that was kept last for a recipe; 0 where none is."""
        kept = sorted(self._folder.glob(f"{recipe}-*{_SUFFIX}"))
        return int(kept[-1].name.split("-")[1]) if kept else 0

    def keep(self, task: protocol.Task, reply: Message, token: str = "") -> None:
        """Write an update and wait until it is on disk; the one of the round before is let go.

        Args:
            task: what it answers.
            reply: the update.
            token: of the reservation that it was trained under, in one file with it: none is without the other.

        Raises:
            StorageError: if the disk refuses; then it must not be sent.
        """
        path = self._path(task)
        body = _body(reply)
        storage.write_bytes(path, _sum(token.encode(), body) + b"\n" + body)
        for old in path.parent.glob(f"{task.recipe.hash}-*{_SUFFIX}"):
            if old != path:
                old.unlink(missing_ok=True)

    def drop(self, task: protocol.Task) -> None:
        """Let go of an update that may not leave.

        Raises:
            StorageError: if the disk refuses.
        """
        path = self._path(task)
        with storage.guard(path):
            path.unlink(missing_ok=True)

    def keep_scores(self, task: protocol.Task, reply: Message) -> None:
        """Write scores and wait until they are on disk; they are small, and none is let go.

        Raises:
            StorageError: if the disk refuses; then they must not be sent.
        """
        body = _body(reply)
        storage.write_bytes(self._path(task, protocol.EVALUATE), _sum(b"", body) + b"\n" + body)

    def _path(self, task: protocol.Task, kind: str = protocol.TRAIN) -> Path:
        if task.state is None or (kind == protocol.EVALUATE and task.split not in ("val", "test")):
            raise errors.ProtocolError("a message without an adapter, or of no split that is scored")
        suffix = f".{task.split}" if kind == protocol.EVALUATE else _SUFFIX
        return self._folder / f"{task.recipe.hash}-{task.round:06d}-{task.state.fingerprint[:32]}{suffix}"


def _body(reply: Message) -> bytes:
    """The reply as it travels, but for its marks."""
    return internals.head(reply) + envelope.of(reply).body


def _sum(token: bytes, body: bytes) -> bytes:
    """The first line of a file. Without a token it is that of earlier releases, with one they take it for damaged."""
    ending = b" " + token if token else b""
    return hashlib.sha256((ending + b"\n" if token else b"") + body).hexdigest().encode() + ending


def _parts(path: Path) -> tuple[str, bytes]:
    """Token and reply of a file; empty where it is gone or damaged."""
    try:
        first, _, body = path.read_bytes().partition(b"\n")
    except OSError:
        return "", b""
    token = first[65:]
    return (token.decode(), body) if _sum(token, body) == first else ("", b"")


def _content(path: Path) -> RecordDict | None:
    body = _parts(path)[1]
    content: RecordDict | None = internals.parse(body).content if body else None
    return content
