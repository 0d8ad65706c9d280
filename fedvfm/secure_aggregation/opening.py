"""What the coordinator does at the end of a session: out of the sum of masked numbers the sum itself.

That no term comes out stands on the sites: they reveal for one list of survivors, which they agreed on
(:mod:`consistency`).

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, figure 4,
    round 4.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from fedvfm import errors
from fedvfm.secure_aggregation import masks, participant, round_keys, shamir
from fedvfm.secure_aggregation import session as sessions

MOST_FALSE = 2
"""Sites whose shares are false and are found and left out, where enough others answered."""


def opened(
    session: sessions.Session,
    dealers: Collection[str],
    survivors: Collection[str],
    total: masks.Numbers,
    answers: Mapping[str, participant.Revealed],
    commitments: Mapping[str, str],
) -> masks.Numbers:
    """The sum of the survivors' numbers, modulo 2^64.

    The own mask of each survivor is taken out by its seed. Masks of two survivors cancel; one that a survivor has with
    a site that dealt shares and sent no numbers is taken out by that site's mask key.

    Args:
        session: what was agreed.
        dealers: sites whose shares were passed on.
        survivors: sites whose masked numbers are in ``total``.
        total: (n,), their sum.
        answers: site -> what it revealed; the threshold's number of them is needed.
        commitments: site -> what it said of its seed.

    Raises:
        SecureAggregationError: ``secure-opening`` if too few answered, or so many shares are false that
                what the sites announced does not come back; nothing is guessed.
    """
    after = total.copy()
    for site in sorted(survivors):

        def is_seed(seed: bytes, site: str = site) -> bool:
            return participant.commitment(session, site, seed) == commitments.get(site)

        seed = _secret(session, site, {who: own.seeds[site] for who, own in answers.items()}, is_seed)
        participant.unmask_self(session, site, seed, after)
    for site in sorted(set(dealers) - set(survivors)):

        def is_key(key: bytes, site: str = site) -> bool:
            return round_keys.public(key) == session.of(site).mask

        key = _secret(session, site, {who: own.masks[site] for who, own in answers.items()}, is_key)
        for peer in sorted(survivors):
            # The survivor added the mask if its name is the first of the two, and took it away otherwise.
            masks.apply(after, participant.pair_key(session, key, site, peer, dealers), -1 if peer < site else 1)
    return after


def _secret(session: sessions.Session, site: str, shares: Mapping[str, bytes], right: Callable[[bytes], bool]) -> bytes:
    """What hides a site, of the shares of any sites that give back what it announced."""
    if len(shares) < session.threshold:
        raise _closed(f"{len(shares)} shares of what hides site '{site}' came and {session.threshold} are needed")
    for chosen in _choices(sorted(shares), session.threshold):
        with contextlib.suppress(ValueError):
            secret = shamir.combine({session.points[who]: shares[who] for who in chosen}, session.threshold)
            if right(secret):
                return secret
    raise _closed(f"the shares of what hides site '{site}' do not give back what it announced: some are false")


def _choices(names: Sequence[str], threshold: int) -> Iterator[Sequence[str]]:
    """So many of the names, without any one of them, then without any two."""
    for false in range(MOST_FALSE + 1):
        for left_out in itertools.combinations(names, false):
            rest = [name for name in names if name not in left_out]
            if len(rest) >= threshold:
                yield rest[:threshold]


def _closed(why: str) -> errors.SecureAggregationError:
    return errors.SecureAggregationError("secure-opening", f"{why}. Nothing was opened")
