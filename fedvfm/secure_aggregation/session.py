"""A session: what one masking of one round is agreed upon. Its id binds every key, share and mask to all of it.

Sites that were told other peers, another threshold or another adapter have another id, so that what one of them sends
cannot be opened by the other. Who dealt shares and who survived is agreed later: :mod:`consistency`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from fedvfm import errors
from fedvfm.secure_aggregation import round_keys
from fedvfm.storage import hash_chain

LEAST_SITES = 3
MOST_SITES = 64
"""More are asked for by no federation of hospitals; the fixed point leaves room for so many terms."""


@dataclass(frozen=True)
class Session:
    """One masking of one round.

    Attributes:
        recipe: its hash.
        round: from 1.
        base: fingerprint of the adapter that training starts from.
        roster: hash of the roster document.
        threshold: how many sites' shares open what is hidden.
        members: keys of all sites that take part, sorted by name.
    """

    recipe: str
    round: int
    base: str
    roster: str
    threshold: int
    members: tuple[round_keys.Advertised, ...]

    @functools.cached_property
    def id(self) -> str:
        """sha256 of all of it."""
        members = [[keys.site, keys.channel.hex(), keys.mask.hex(), keys.signature] for keys in self.members]
        body = {"recipe": self.recipe, "round": self.round, "base": self.base, "roster": self.roster}
        whole = hash_chain.canonical({**body, "threshold": self.threshold, "members": members})
        return hashlib.sha256(f"fedvfm secure aggregation session\n{whole}".encode()).hexdigest()

    @functools.cached_property
    def points(self) -> Mapping[str, int]:
        """Site -> the point at which its shares are taken."""
        return {keys.site: number for number, keys in enumerate(self.members, start=1)}

    def of(self, site: str) -> round_keys.Advertised:
        """The keys of a member."""
        return self.members[self.points[site] - 1]

    def words(self, purpose: str, first: str, second: str, *more: str) -> bytes:
        """What a key of two members is derived with; their names tell no more than these two."""
        return hash_chain.canonical([f"fedvfm secure aggregation {purpose}", self.id, first, second, *more]).encode()


def digest(names: Collection[str]) -> str:
    """sha256 of names in any order."""
    return hashlib.sha256(hash_chain.canonical(sorted(names)).encode()).hexdigest()


def least_threshold(members: int, colluders: int) -> int:
    """The smallest threshold at which both secrets of one site, or two sums of a round, cannot be opened.

    The coordinator may tell some sites that a peer dropped out and others that it did not. Of ``members`` sites
    ``colluders`` give it both shares of that peer and each other one gives one of the two: together
    ``members + colluders`` shares. With ``2 threshold`` above that, both secrets cannot be opened. Nor can two lists of
    survivors have ``threshold`` signatures each (:mod:`consistency`), which the secrets of several sites stand on.

    Source: Bonawitz et al., CCS 2017, section 6.2 (active adversaries).
    """
    return (members + colluders) // 2 + 1


def require(
    session: Session, least_sites: int, colluders: int, roster: Collection[str], *, single: bool = False
) -> None:
    """Check what a site is asked to take part in, or what a coordinator is about to ask.

    Args:
        session: as it was told.
        least_sites: fewest sites that a sum is opened of.
        colluders: sites that may work together with the coordinator.
        roster: names that may take part.
        single: whether one sum of a round may be opened among *all* of these, in whatever sessions: a site signs and
            opens one, so a threshold by their number lets two not come about. Shared noise stands on it, as two sums
            with one site's update in them could have less noise between them than one.

    Raises:
        SecureAggregationError: ``secure-session``.
    """
    names = [keys.site for keys in session.members]
    least = least_threshold(len(roster) if single else len(names), colluders)
    strangers = sorted(set(names) - set(roster))
    if names != sorted(set(names)) or strangers:
        raise errors.SecureAggregationError("secure-session", f"{len(strangers)} members are not on the roster")
    if not max(LEAST_SITES, least_sites) <= len(names) <= MOST_SITES:
        raise errors.SecureAggregationError(
            "secure-session",
            f"{len(names)} sites take part; {max(LEAST_SITES, least_sites)} to {MOST_SITES} are needed",
        )
    if not least <= session.threshold <= len(names):
        raise errors.SecureAggregationError(
            "secure-session",
            f"the threshold is {session.threshold}; with {len(names)} sites{f' of {len(roster)}' if single else ''}, "
            f"{colluders} of which may work together with the coordinator, {least} to {len(names)} is needed",
        )
    halves = [half for keys in session.members for half in (keys.channel, keys.mask)]
    if len(set(halves)) < len(halves) or not all(
        len(half) == round_keys.SIZE and round_keys.usable(half) for half in halves
    ):
        raise errors.SecureAggregationError("secure-session", "two keys are the same, or one is no X25519 key")


def require_signed(session: Session, verified: Callable[[str, str, bytes], bool]) -> None:
    """Check that every member's keys are signed by the site that the roster names.

    Args:
        session: as it was told.
        verified: whether a site of this name made this signature over this message.

    Raises:
        SecureAggregationError: ``secure-session``.
    """
    for keys in session.members:
        if not verified(keys.site, keys.signature, round_keys.signed_bytes(keys, session.recipe)):
            raise errors.SecureAggregationError(
                "secure-session", f"the keys of site '{keys.site}' are not signed with its key on the roster"
            )
