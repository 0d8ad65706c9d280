"""Who is waited for before rounds begin or go on, and how long: sites that are absent, and people who must decide.

A site that is absent may never come: ``join_timeout_s``. One that is there and waits for its person's approval, or for
its hours, will answer when a human being does: ``approval_timeout_s``, a week unless told otherwise. So with a site
that was invited and whose request nobody approved yet, and with one that was dropped, where the quorum needs them.

How long was waited is kept on disk, so that a run that ends and is started again does not wait for ever.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pydantic

from fedvfm import errors
from fedvfm.config import base, schema
from fedvfm.server.coordinator import admission_handshakes
from fedvfm.storage import storage

INVITED = "invited, not yet approved"
"""Word of a site that is on the roster with its invite alone."""
DROPPED = "dropped, not readmitted"
"""Word of a site that a person dropped and may take in again."""
FOR_PEOPLE = ("approval-pending", "roster-pending", "policy-closed", INVITED, DROPPED)
_PEOPLE = "/people"
FILE = "waiting.json"
KEEP_S = 15.0
"""How often it is written down how long was waited."""
STALE_S = 900.0
"""Who was down for longer begins to wait anew."""


class Waited(pydantic.BaseModel):
    """What ``waiting.json`` says; times are of the machine's clock.

    Attributes:
        recipe, done: what was waited for: the round after this one.
        last: when this was written.
        began: when the waiting began.
        since: since when each site was missed, "site" or "site/people".
        hopeless: since when no quorum could come together; None if one could.
    """

    model_config = base.SETTINGS

    recipe: str
    done: int
    last: float
    began: float
    since: dict[str, float]
    hopeless: float | None = None


class Patience:
    """How long one gathering waits.

    Args:
        server: the limits.
        again: whether rounds were done before; then whoever was there comes back soon or not at all.
        clock: seconds that never go back.
    """

    def __init__(
        self, server: schema.ServerConfig, *, again: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._server, self._clock, self._began = server, clock, clock()
        self._all_s = min(server.join_timeout_s, server.away_timeout_s) if again else server.join_timeout_s
        self._since: dict[tuple[str, bool], float] = {}
        self._hopeless: float | None = None

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
        """Whether sites are waited for though there is a quorum: not for one that nothing mends by itself."""
        waits = any(missing[name] not in admission_handshakes.NOT_WAITED_FOR for name in self.wanted(missing))
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

    def may_hope(self, hope: bool) -> bool:
        """Whether a quorum that cannot come together now may come yet: whoever was taken off may be replaced.

        Args:
            hope: whether it can come together, of who is there and who is missing.
        """
        now = self._clock()
        self._hopeless = None if hope else now if self._hopeless is None else self._hopeless
        return self._hopeless is None or now <= self._hopeless + self._server.join_timeout_s

    def waited(self, recipe: str, done: int, wall: float) -> Waited:
        """How long was waited, to be kept.

        Args:
            recipe: that is waited for.
            done: the round before the one that is.
            wall: the machine's time.
        """
        ago = wall - self._clock()
        since = {name + _PEOPLE * people: ago + moment for (name, people), moment in self._since.items()}
        hopeless = None if self._hopeless is None else ago + self._hopeless
        return Waited(recipe=recipe, done=done, last=wall, began=ago + self._began, since=since, hopeless=hopeless)

    def go_on(self, kept: Waited, wall: float) -> None:
        """Count what an earlier process waited."""
        ago = wall - self._clock()
        self._began = kept.began - ago
        self._since = {
            (name.removesuffix(_PEOPLE), name.endswith(_PEOPLE)): moment - ago for name, moment in kept.since.items()
        }
        self._hopeless = None if kept.hopeless is None else kept.hopeless - ago


class Memory:
    """How long was waited, over restarts of the process.

    Args:
        folder: of the server's processes.
        clock: the machine's time.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock, self._kept = folder / FILE, clock, float("-inf")

    def go_on(self, waits: Patience, recipe: str, done: int) -> None:
        """Count what was waited for the same round until shortly ago; what cannot be read was not waited."""
        with contextlib.suppress(OSError, ValueError):
            kept = Waited.model_validate_json(self._path.read_text(encoding="utf-8"))
            now = self._clock()
            if (kept.recipe, kept.done) == (recipe, done) and kept.began <= kept.last <= now <= kept.last + STALE_S:
                waits.go_on(kept, now)

    def keep(self, waits: Patience, recipe: str, done: int) -> None:
        """Write it down now and then; a full disk is told elsewhere."""
        now = self._clock()
        if not self._kept <= now < self._kept + KEEP_S:
            with contextlib.suppress(errors.StorageError):
                storage.write_text(self._path, waits.waited(recipe, done, now).model_dump_json() + "\n")
            self._kept = now

    def forget(self) -> None:
        """The waiting is over; the next one begins anew."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
        self._kept = float("-inf")
