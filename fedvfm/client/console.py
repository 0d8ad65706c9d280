"""What a site does, told to its people on the console of ``client start``: each round in a line, an end, a refusal.

The executor decides in a process of its own and notes everything in the audit log. Here its new lines are read, so
that nobody has to look there to learn how far it is, or why his site takes no part. The same refusal is told once,
until it changes.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedvfm.audit import segments
from fedvfm.client import refusal_words, sentences, state_folder
from fedvfm.protocol import protocol
from fedvfm.runtime import processes

LOG = logging.getLogger(__name__)
EVERY_S = 1.0


class Listener:
    """Tells of rounds, ends and refusals as they come into a site's audit log.

    Args:
        log: the audit log; what is in it already is not told.
        rounds_of: how many rounds a recipe has, by its hash.
    """

    def __init__(self, log: Path, rounds_of: Callable[[str], int] = lambda recipe: 0) -> None:
        self._tail, self._rounds, self._folder = segments.Tail(log), sentences.Rounds(rounds_of), log.parent
        self._asked = ""
        self._standing: dict[tuple[str, str], str] = {}

    def look(self) -> None:
        """Read what is new; what cannot be read now is read the next time."""
        with contextlib.suppress(OSError):
            for line in self._tail.lines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    self._take(json.loads(line))

    def _take(self, entry: Mapping[str, Any]) -> None:
        line = self._rounds.line(entry)
        if line:
            LOG.info(state_folder.named(line, self._folder))
        if entry["event"] == "received" and entry["kind"] in (*protocol.WORDS.values(), "unknown"):
            self._asked = entry["kind"]
        elif entry["event"] == "sent" and entry["kind"] == "refusal":
            self._refused(str(entry.get("recipe", "")), str(entry["reason"]))
        elif entry["event"] == "sent":
            self._standing.pop((str(entry.get("recipe", "")), str(entry["kind"])), None)

    def _refused(self, recipe: str, word: str) -> None:
        known = {reason for (of, _), reason in self._standing.items() if of == recipe}
        self._standing[recipe, self._asked] = word
        if word not in known:
            reason, remedy = refusal_words.why(word, recipe)
            of = f" of recipe {recipe[:12]}" if recipe else ""
            helps = state_folder.named(remedy, self._folder)
            LOG.warning(f"refused: {self._asked}{of}: {word}, {reason}. Remedy: {helps}")


@contextlib.contextmanager
def told(log: Path, rounds_of: Callable[[str], int] = lambda recipe: 0) -> Iterator[None]:
    """Tell of rounds, ends and refusals while the block runs, and of what came last when it is over."""
    listener = Listener(log, rounds_of)
    try:
        with processes.repeated(listener.look, EVERY_S, "fedvfm-console"):
            yield
    finally:
        listener.look()
