"""Who is waited for before rounds begin or go on, and how long: sites that are absent, and people who must decide.

A site that is absent may never come: ``join_timeout_s``. One that is there and waits for its person's approval, or for
its hours, will answer when a human being does: ``approval_timeout_s``, a week unless told otherwise. So with a site
that was invited and whose request nobody approved yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from fedvfm import config as configs
from fedvfm.server import greeting

INVITED = "invited, not yet approved"
"""Word of a site that is on the roster with its invite alone."""
FOR_PEOPLE = ("approval-pending", "policy-closed", INVITED)


class Patience:
    """How long one gathering waits.

    Args:
        server: the limits.
        again: whether rounds were done before; then whoever was there comes back soon or not at all.
        clock: seconds that never go back.
    """

    def __init__(
        self, server: configs.ServerConfig, *, again: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._server, self._clock, self._began = server, clock, clock()
        self._all_s = min(server.join_timeout_s, server.away_timeout_s) if again else server.join_timeout_s
        self._since: dict[tuple[str, bool], float] = {}

    def wanted(self, expected: Collection[str]) -> set[str]:
        """Of the sites that are expected those that somebody waits for."""
        return set(expected) - set(self._server.without)

    def least(self, expected: Collection[str]) -> int:
        """The quorum as a number."""
        return self._server.quorum or max(1, len(self.wanted(expected)))

    def enough(self, there: Collection[str], expected: Collection[str]) -> bool:
        """Whether rounds can be run with these sites: a quorum, or all that are waited for."""
        if self._server.quorum:
            return len(there) >= self._server.quorum
        return bool(there) and self.wanted(expected) <= set(there)

    def for_more(self, missing: Mapping[str, str]) -> bool:
        """Whether sites are waited for though there is a quorum: not for one that answered as no honest site does."""
        waits = any(word not in greeting.WRONG for name, word in missing.items() if name in self.wanted(missing))
        return waits and self._clock() <= self._began + self._all_s

    def given_up(self, missing: Mapping[str, str]) -> dict[str, float]:
        """Of the missing sites those that are waited for no more, and how long they were, in seconds.

        Args:
            missing: site -> why it takes no part.
        """
        now, server = self._clock(), self._server
        keys = [(name, word in FOR_PEOPLE) for name, word in missing.items()]
        self._since = {key: self._since.get(key, now) for key in keys}
        found = {}
        for (name, people), since in self._since.items():
            limit = server.approval_timeout_s if people else server.join_timeout_s
            longest = max(server.approval_timeout_s, server.join_timeout_s)  # for one that comes and goes all the time
            if now > since + limit or now > self._began + longest:
                found[name] = limit if now > since + limit else longest
        return found
