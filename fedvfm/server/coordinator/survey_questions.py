"""Asks the sites of a running federation for statistics, beside the rounds: each survey, each site, until it answers.

A site that waits for a person's approval, or is closed for the day, is asked again, ever more rarely. Nobody waits for
an answer: rounds go on, and a survey is asked while the server waits for sites or is paused too.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from flwr.app import Message

from fedvfm import errors
from fedvfm.protocol import protocol
from fedvfm.server import site_words, state_folder, surveys
from fedvfm.server.grid import roster
from fedvfm.trust import signed_documents

LOG = logging.getLogger(__name__)
ANSWER_S = 6 * 3600.0
"""How long a question lives: a site opens all its patients' images for it."""
LOOK_S = 1.0
FIRST_S, LONGEST_S = 5.0, 300.0
"""Pause before a site is asked again, doubled each time."""


@dataclass
class _Asked:
    """One survey and one site.

    Attributes:
        node: the node it was.
        message: the question that is not answered; "" where none is out.
        until: when that question's life ends.
        due: when the site may be asked again.
        pause: how long the next pause is.
        word: why it has not answered.
    """

    node: int
    message: str = ""
    until: float = 0.0
    due: float = 0.0
    pause: float = field(default_factory=lambda: FIRST_S)
    word: str = "asked"


class Surveys:
    """The questions of one run.

    Args:
        grid: where the sites are.
        where: the server's state folder, which holds surveys and answers.
    """

    def __init__(self, grid: roster.RosterGrid, where: state_folder.State) -> None:
        self._grid, self._where = grid, where
        self._asked: dict[tuple[str, str], _Asked] = {}
        self._looked, self._busy = float("-inf"), False

    def look(self) -> None:
        """Take the answers that came and ask who is there; waits for nobody."""
        if self._busy or time.monotonic() < self._looked + LOOK_S:
            return
        self._busy = True
        try:
            self._take()
            self._ask()
        finally:
            self._busy, self._looked = False, time.monotonic()

    def _ask(self) -> None:
        known = {key: survey for key, survey in surveys.every(self._where).items() if surveys.is_open(self._where, key)}
        there = self._grid.present() if known else {}
        for key, survey in known.items():
            done = surveys.answered(self._where, key)
            for name, node in sorted(there.items()):
                if name in done:
                    continue
                state = self._asked.setdefault((key, name), _Asked(node))
                now = time.monotonic()
                if state.node != node:  # enrolled anew
                    state = self._asked[key, name] = _Asked(node)
                if (state.message and now < state.until) or now < state.due:
                    continue
                content = protocol.encode_survey(signed_documents.to_text(survey))
                message = Message(content, node, protocol.SURVEY, ttl=ANSWER_S, group_id=key)
                (state.message,) = self._grid.push_messages([message])
                state.until = now + ANSWER_S
                self._note(key)

    def _take(self) -> None:
        by_message = {state.message: pair for pair, state in self._asked.items() if state.message}
        for reply in self._grid.pull_messages(sorted(by_message)) if by_message else ():
            pair = by_message[reply.metadata.reply_to_message_id]
            state, (key, name) = self._asked[pair], pair
            state.message, before = "", state.word
            state.word = self._answer(key, name, reply)
            state.due = time.monotonic() + state.pause
            state.pause = min(2 * state.pause, LONGEST_S)
            if not state.word:
                LOG.info(f"site '{name}' answered survey {key[:12]}")
                del self._asked[pair]
            elif state.word != before:
                LOG.info(f"site '{name}', survey {key[:12]}: {site_words.sentence(state.word)} ({state.word})")
            self._note(key)

    def _answer(self, key: str, name: str, reply: Message) -> str:
        """Keep an answer; else why there is none, in a word."""
        if reply.has_error():
            return protocol.error_word(reply)
        try:
            site, text = protocol.decode_answer(reply.content)
            if site != name:
                return "other-name"
            surveys.keep(self._where, surveys.find(self._where, key), name, text)
        except errors.ProtocolError as error:
            LOG.warning(f"site '{name}', survey {key[:12]}: {error}")
            about = {"kind": "survey", "verdict": "refused", "reason": "malformed", "fingerprint": key}
            self._where.audit.record("decided", peer=name, **about)
            return "malformed"
        return ""

    def _note(self, key: str) -> None:
        words = {name: state.word for (of, name), state in self._asked.items() if of == key}
        surveys.note_words(self._where, key, words)
