"""Handshakes of a running federation: sites are greeted as they come, and none holds up the others.

A site takes part once it has answered as it should. One that waits for a person's approval, is closed for the day or
was left with the wrong weights is asked again, ever more rarely; why it does not take part is kept in one word.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import Message

from fedvfm import errors
from fedvfm.aggregators import base
from fedvfm.protocol import protocol
from fedvfm.server.grid import roster
from fedvfm.server.rounds import handshake
from fedvfm.trust import locked_recipe

LOG = logging.getLogger(__name__)
ANSWER_S = 600.0
"""How long a greeting lives: a site may have to hash large weights, or be at work on an old round."""
SILENCE_S = 30.0
"""Until a site that is there and silent is greeted once more, doubled each time: it may be at work, or what was sent
got lost on the way."""
LOOK_S = 1.0
FIRST_S, LONGEST_S = 5.0, 60.0
"""Pause before a site is asked again, doubled each time."""

WRONG = ("other-name", "other-settings", "refused", "malformed", "oversized")
"""Words of a site that is there and answered, but not as it should."""
NOT_WAITED_FOR = (*WRONG, protocol.LEDGER_WENT_BACK)
"""Words of a site that nobody waits for where there is a quorum without it."""
ABSENT, GREETED, ASKED = "not-connected", "takes-part", "asked"


@dataclass
class _Site:
    """What is known of one site.

    Attributes:
        node: the node it is.
        word: why it does not take part, or that it does.
        messages: the greetings it has not answered, and until when each lives.
        silence: how long after the last of them the next one is sent.
        asked: when that was sent.
        due: when it may be asked again.
        pause: how long the next pause is.
        refused: when it last refused something after a good answer.
        hello, member: of its answer, once it was good.
    """

    node: int
    word: str = ASKED
    messages: dict[str, float] = field(default_factory=dict)
    silence: float = field(default_factory=lambda: SILENCE_S)
    asked: float = 0.0
    due: float = 0.0
    pause: float = field(default_factory=lambda: FIRST_S)
    refused: float = float("-inf")
    hello: protocol.Hello | None = None
    member: handshake.Member | None = None


class Greetings:
    """Greets every approved site that is there; the log has what each answered.

    Args:
        grid: where the sites are.
        locked: recipe, manifest and first adapter.
        rule: the aggregation rule; says whether it takes a site's rank.
        refused: told the site and the word, once, where it takes no part for what it answered.
        document: the roster document as its file, under secure aggregation.
    """

    def __init__(
        self,
        grid: roster.RosterGrid,
        locked: locked_recipe.LockedRecipe,
        rule: base.Aggregator,
        refused: Callable[[str, str], None] = lambda site, word: None,
        document: str = "",
    ) -> None:
        self._grid, self._locked, self._rule, self._refused = grid, locked, rule, refused
        self._sites: dict[str, _Site] = {}
        self._there: dict[str, int] = {}
        self._content = protocol.encode_task(protocol.Task(locked.recipe, roster=document))
        self._looked, self._busy = float("-inf"), False

    def look(self) -> bool:
        """Take the answers that came and greet who is new; waits for nobody.

        Returns: whether it looked: it does at most once a second.
        """
        if self._busy or time.monotonic() < self._looked + LOOK_S:
            return False
        self._busy = True
        try:
            self._there = self._grid.present()
            for name in [name for name, site in self._sites.items() if self._there.get(name, site.node) != site.node]:
                del self._sites[name]  # another node: the site was enrolled anew
            self._take()
            for name, node in sorted(self._there.items()):
                self._greet(name, self._sites.setdefault(name, _Site(node)))
        finally:
            self._busy, self._looked = False, time.monotonic()
        return True

    def members(self) -> dict[str, handshake.Member]:
        """The sites that are there and answered as they should, by name."""
        found = {name: site.member for name, site in self._sites.items() if name in self._there}
        return {name: member for name, member in sorted(found.items()) if member is not None}

    def words(self) -> dict[str, str]:
        """Why a site does not take part, or that it does, by name; in a word."""
        return {name: site.word if name in self._there else ABSENT for name, site in sorted(self._sites.items())}

    def doubt(self, name: str, word: str = "") -> None:
        """Greet a site again, as what it is may have changed; with a word it takes no part until it answered."""
        site = self._sites.get(name)
        if site is None:
            return
        if word:
            site.member, site.hello, site.word, site.refused = None, None, word, time.monotonic()
        if not site.messages:
            site.due = time.monotonic() + (site.pause if word else 0.0)
            site.pause = min(2 * site.pause, LONGEST_S) if word else site.pause
            site.hello = None

    def _greet(self, name: str, site: _Site) -> None:
        now = time.monotonic()
        site.messages = {message: until for message, until in site.messages.items() if now < until}
        if site.hello is not None or now < (site.asked + site.silence if site.messages else site.due):
            return
        site.silence = 2 * site.silence if site.messages else SILENCE_S
        message = Message(self._content, site.node, protocol.HANDSHAKE, ttl=ANSWER_S, group_id="0")
        (sent,) = self._grid.push_messages([message])
        site.messages[sent], site.asked = now + ANSWER_S, now

    def _take(self) -> None:
        by_message = {message: name for name, site in self._sites.items() for message in site.messages}
        for reply in self._grid.pull_messages(sorted(by_message)) if by_message else ():
            name = by_message[reply.metadata.reply_to_message_id]
            site = self._sites[name]
            if reply.metadata.reply_to_message_id not in site.messages:
                continue  # the answer to another one came with it
            site.messages.clear()
            before, word = site.word, self._answer(name, site, reply)
            site.word = word or GREETED
            if word:
                site.member, site.hello = None, None
                lasting = word == protocol.LEDGER_WENT_BACK  # nothing of this recipe mends it
                site.due = float("inf") if lasting else time.monotonic() + site.pause
                site.pause = min(2 * site.pause, LONGEST_S)
            elif time.monotonic() > site.refused + 2 * LONGEST_S:  # else it answers well and refuses the work
                site.pause = FIRST_S
            if word == "approval-pending" and before != word:
                LOG.info(f"site '{name}' waits for a person's approval of the recipe; it is asked again")
            elif word == "roster-pending" and before != word:
                LOG.info(f"site '{name}' waits for a person's approval of the roster document; it is asked again")
            elif word and before != word and word != protocol.LEDGER_WENT_BACK:  # the grid told more of that
                LOG.warning(f"site '{name}' takes no part: {word}; it is asked again")
            if word in WRONG and before != word:
                self._refused(name, word)

    def _answer(self, name: str, site: _Site, reply: Message) -> str:
        """Make a member of who answered as he should; else why not, in a word."""
        if reply.has_error():
            return protocol.error_word(reply)
        try:
            hello = protocol.decode_hello(reply.content)
            if hello.site != name:
                return "other-name"
            member = handshake.member(self._locked, self._rule, site.node, hello)
        except errors.FedvfmError as error:
            LOG.warning(f"site '{name}': {error}")
            return "refused"
        settings = {other.hello.backbone_config_sha256: at for at, other in self._sites.items() if other.hello}
        if name not in settings.values() and settings and hello.backbone_config_sha256 not in settings:
            LOG.warning(
                f"sites '{name}' and '{next(iter(settings.values()))}' hold the backbone with different settings "
                "(config.json). Fetch weights and config.json again at these sites"
            )
            return "other-settings"
        site.hello, site.member = hello, member
        return ""
