"""What a site does in a session, step by step: deal shares, mask its numbers, reveal what opens the sum.

Pure functions over explicit state. Who calls them keeps that state on disk and sees to it that a session masks one
vector and no second one, and that a site reveals shares for one list of survivors in a round and no second list; that
the sites' lists are the same one is what :mod:`consistency` checks.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, figure 4.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedvfm import errors
from fedvfm.secure_aggregation import masks, round_keys, shamir
from fedvfm.secure_aggregation import session as sessions

ENVELOPE = round_keys.NONCE_SIZE + 2 * shamir.SHARE_SIZE + round_keys.TAG_SIZE
"""Bytes of what one site sends another through the coordinator."""


@dataclass(frozen=True, slots=True)
class Shares:
    """What a site holds of a peer: a share of each of its two secrets. At most one of the two ever leaves."""

    seed: bytes = field(repr=False)
    mask: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Dealt:
    """What a site made when the session began.

    Attributes:
        seed: of its own mask, 32 bytes; a secret.
        own: its own shares of its own secrets.
        outbox: peer -> sealed shares for it.
        commitment: sha256 that tells a false seed from the true one.
    """

    seed: bytes = field(repr=False)
    own: Shares = field(repr=False)
    outbox: Mapping[str, bytes]
    commitment: str


@dataclass(frozen=True, slots=True)
class Revealed:
    """What opens the sum, of one site: shares of the seeds of those who sent, of the mask keys of those who did not."""

    seeds: Mapping[str, bytes]
    masks: Mapping[str, bytes]


def commitment(session: sessions.Session, site: str, seed: bytes) -> str:
    """What everyone may know of a seed."""
    return hashlib.sha256(session.words("commitment", site, site) + seed).hexdigest()


def deal(session: sessions.Session, site: str, keys: round_keys.Secrets) -> Dealt:
    """Share the seed of the own mask and the secret mask key among all members.

    Called once in a session; it draws the seed and the polynomials from the operating system.
    """
    seed = secrets.token_bytes(masks.KEY_SIZE)
    points = session.points
    parts = [shamir.split(secret, session.threshold, list(points.values())) for secret in (seed, keys.mask)]
    shares = {name: Shares(parts[0][point], parts[1][point]) for name, point in points.items()}
    outbox = {
        peer: round_keys.sealed(
            _channel(session, keys, site, peer, site),
            secrets.token_bytes(round_keys.NONCE_SIZE),
            held.seed + held.mask,
            session.words("shares", site, peer),
        )
        for peer, held in shares.items()
        if peer != site
    }
    return Dealt(seed, shares[site], outbox, commitment(session, site, seed))


def received(
    session: sessions.Session, site: str, keys: round_keys.Secrets, dealt: Dealt, inbox: Mapping[str, bytes]
) -> dict[str, Shares]:
    """Sender -> the shares it sent here, the site's own among them.

    Only who has the sender's secret channel key of this session could have sealed them: keys of an earlier session,
    whose mask keys may have been opened since, are of no use to a coordinator that plays them again.

    Raises:
        SecureAggregationError: ``secure-shares`` if one is not of this session, was changed, or is of no member.
    """
    held = {site: dealt.own}
    for peer, data in sorted(inbox.items()):
        if peer == site or peer not in session.points or len(data) != ENVELOPE:
            raise errors.SecureAggregationError("secure-shares", "shares of no member of the session, or of no form")
        try:
            key = _channel(session, keys, site, peer, peer)
            text = round_keys.unsealed(key, data, session.words("shares", peer, site))
        except ValueError as error:
            raise errors.SecureAggregationError("secure-shares", f"shares of site '{peer}': {error}") from None
        held[peer] = Shares(text[: shamir.SHARE_SIZE], text[shamir.SHARE_SIZE :])
    return dict(sorted(held.items()))


def masked(
    session: sessions.Session,
    site: str,
    keys: round_keys.Secrets,
    dealt: Dealt,
    dealers: Collection[str],
    numbers: masks.Numbers,
    least_sites: int,
) -> masks.Numbers:
    """The numbers under the site's own mask and one mask with every peer that dealt shares.

    Args:
        session: what was agreed.
        site: who masks.
        keys: its secrets of this session.
        dealt: what it dealt.
        dealers: who dealt, the site among them: the keys of :func:`received`.
        numbers: (n,), whole numbers modulo 2^64.
        least_sites: fewest sites that a sum is opened of.

    Raises:
        SecureAggregationError: ``secure-shares`` if so few dealt that no sum could be opened.
    """
    least = max(session.threshold, least_sites)
    if len(dealers) < least:
        raise errors.SecureAggregationError("secure-shares", f"{len(dealers)} sites dealt shares, {least} are needed")
    after = numbers.astype(np.uint64, copy=True)
    masks.apply(after, _self_key(session, site, dealt.seed), 1)
    for peer in sorted(set(dealers) - {site}):
        masks.apply(after, pair_key(session, keys.mask, site, peer, dealers), 1 if site < peer else -1)
    return after


def revealed(
    session: sessions.Session,
    site: str,
    held: Mapping[str, Shares],
    survivors: Collection[str],
    least_sites: int,
) -> Revealed:
    """The shares that open the sum of the survivors: of each dealer one of the two, never both.

    Args:
        session: what was agreed.
        site: who is asked; it must be a survivor itself.
        held: what it holds of each dealer.
        survivors: whose masked numbers are in the sum.
        least_sites: fewest sites that a sum is opened of.

    Raises:
        SecureAggregationError: ``secure-survivors`` if the list is none that anything is opened for.
    """
    require_list(session, site, held, survivors, least_sites)
    names = set(survivors)
    seeds = {peer: held[peer].seed for peer in sorted(names)}
    return Revealed(seeds, {peer: held[peer].mask for peer in sorted(set(held) - names)})


def require_list(
    session: sessions.Session,
    site: str,
    held: Collection[str],
    survivors: Collection[str],
    least_sites: int,
) -> None:
    """Check that a list of survivors is one that a site may sign or open for; arguments as of :func:`revealed`.

    Raises:
        SecureAggregationError: ``secure-survivors``.
    """
    names, least = set(survivors), max(session.threshold, least_sites)
    if len(names) < len(survivors) or not names <= set(held) or site not in names:
        raise errors.SecureAggregationError("secure-survivors", "the list repeats a site, or has one that dealt none")
    if len(names) < least:
        raise errors.SecureAggregationError("secure-survivors", f"{len(names)} sites are left, {least} are needed")


def pair_key(session: sessions.Session, secret: bytes, site: str, peer: str, dealers: Collection[str]) -> bytes:
    """The key of the mask that two members share; the same at both where both were passed the same dealers' shares.

    Masks of sites that were passed unlike ones do not cancel: their sum is no sum, and that is seen.

    Args:
        session: what was agreed.
        secret: the mask secret of ``site``.
        site: whose secret it is.
        peer: the other one.
        dealers: who dealt, both of them among these.
    """
    first, second = sorted((site, peer))
    words = session.words("pair", first, second, sessions.digest(dealers))
    return round_keys.agreed(secret, session.of(peer).mask, words)


def _self_key(session: sessions.Session, site: str, seed: bytes) -> bytes:
    return hashlib.sha256(session.words("self", site, site) + seed).digest()


def unmask_self(session: sessions.Session, site: str, seed: bytes, total: masks.Numbers) -> None:
    """Take a survivor's own mask out of a sum, in place."""
    masks.apply(total, _self_key(session, site, seed), -1)


def _channel(session: sessions.Session, keys: round_keys.Secrets, site: str, peer: str, sender: str) -> bytes:
    """The key that ``sender`` seals with for the other of the two; each direction has its own."""
    other = peer if sender == site else site
    return round_keys.agreed(keys.channel, session.of(peer).channel, session.words("channel", sender, other))
