"""What several arms would compute alike is computed once: the handshake, and the first round of a site's training.

Round 1 of a site alone is round 1 of that site in the federation: same recipe, base, site and seed. Messages are the
same where their bytes are; the journal says for which arm a reply was computed (``same_as``).
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

from flwr.app import Message

from fedvfm.protocol import protocol
from fedvfm.server.rounds import federation

LIMIT = 256 << 20
"""Bytes of replies that are kept for arms to come; further ones are computed again."""

Key = tuple[int, str, str]
"""Node, kind of message, and sha256 of its records."""

Kept = TypeVar("Kept")


class Repeats(Generic[Kept]):
    """Answers, or what will become them, that are asked for more than once in a run.

    Args:
        jobs: the arms.
        nodes: name of a site -> its node.
    """

    def __init__(self, jobs: Sequence[federation.Job], nodes: Mapping[str, int]) -> None:
        self._left = Counter((job.locked.recipe.hash, nodes[name]) for job in jobs for name in job.train_sites)
        self._kept: dict[Key, tuple[Kept, int]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def key(self, job: federation.Job, message: Message, body: bytes) -> Key | None:
        """What tells equal messages; None for one that no other arm sends.

        Args:
            job: the arm that sends it.
            message: as it goes to the node.
            body: its records, serialised.
        """
        about = message.metadata
        first = about.message_type == protocol.TRAIN and about.group_id == "1"
        if about.message_type != protocol.HANDSHAKE and not (first and self._left[_mark(job, about.dst_node_id)] > 1):
            return None
        return about.dst_node_id, about.message_type, hashlib.sha256(body).hexdigest()

    def find(self, job: federation.Job, key: Key | None) -> Kept | None:
        """What is kept for an equal message; an arm asks once for each of its own."""
        with self._lock:
            if key is None or key not in self._kept:
                return None
            found, size = self._kept[key]
            mark = _mark(job, key[0])
            self._left[mark] -= key[1] == protocol.TRAIN
            if self._left[mark] <= 1 and key[1] == protocol.TRAIN:
                del self._kept[key]
                self._bytes -= size
            return found

    def keep(self, key: Key | None, value: Kept, size: int) -> None:
        """Keep an answer of about ``size`` bytes for other arms, if there is room."""
        with self._lock:
            if key is not None and key not in self._kept and self._bytes + size <= LIMIT:
                self._kept[key] = (value, size)
                self._bytes += size


def _mark(job: federation.Job, node: int) -> tuple[str, int]:
    return job.locked.recipe.hash, node
