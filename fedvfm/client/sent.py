"""The last update a site sent, on disk before it leaves: asked again for the same, the site sends the same bytes.

The same means recipe hash, round and fingerprint of the adapter it started from. A coordinator that crashed, or lost a
reply on the way, makes nobody train twice, and gets no second noised copy of what was released once.

The mark of the site's audit log is no part of what is kept: it is put on a reply as it leaves. So a reply that is sent
again has the same records, byte for byte, and carries the mark of the log as it is then: longer than the first one, and
covering the line that says it was sent again. A site's marks never go back; one that does shows a log that was cut.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from flwr.app import Message, RecordDict

from fedvfm import errors, flower, protocol, storage

_SUFFIX = ".reply"


class Sent:
    """The updates kept in a folder: the last one of each recipe.

    Args:
        folder: private; made when needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, task: protocol.Task) -> RecordDict | None:
        """What was sent for this, if it was; a file that is damaged counts as none."""
        return self._read(self._path(task))

    def last(self, recipe: str) -> RecordDict | None:
        """The update that was sent last for a recipe, whatever it was asked for with."""
        kept = sorted(self._folder.glob(f"{recipe}-*{_SUFFIX}"))
        return self._read(kept[-1]) if kept else None

    @staticmethod
    def _read(path: Path) -> RecordDict | None:
        try:
            data = path.read_bytes()
        except OSError:
            return None
        digest, body = data[:64], data[65:]
        if hashlib.sha256(body).hexdigest().encode() != digest:
            return None
        content: RecordDict = flower.parse(body).content
        return content

    def keep(self, task: protocol.Task, reply: Message) -> None:
        """Write an update and wait until it is on disk; the one of the round before is let go.

        Raises:
            StorageError: if the disk refuses; then it must not be sent.
        """
        path = self._path(task)
        body = flower.serialise(reply)
        storage.write_bytes(path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
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

    def _path(self, task: protocol.Task) -> Path:
        if task.state is None:
            raise errors.ProtocolError("a train message without an adapter")
        name = f"{task.recipe.hash}-{task.round:06d}-{task.state.fingerprint[:32]}{_SUFFIX}"
        return self._folder / name
