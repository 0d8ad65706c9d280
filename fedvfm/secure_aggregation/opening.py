"""What the coordinator does at the end of a session: out of the sum of masked numbers the sum itself, and no term.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, figure 4,
    round 4.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fedvfm import errors
from fedvfm.secure_aggregation import masks, participant, round_keys, shamir
from fedvfm.secure_aggregation import session as sessions


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
        SecureAggregationError: ``secure-opening`` if too few answered or a share is false; nothing is guessed.
    """
    after = total.copy()
    for site in sorted(survivors):
        seed = _secret(session, site, {who: own.seeds[site] for who, own in answers.items() if site in own.seeds})
        if participant.commitment(session, site, seed) != commitments.get(site):
            raise _false(site)
        participant.unmask_self(session, site, seed, after)
    for site in sorted(set(dealers) - set(survivors)):
        key = _secret(session, site, {who: own.masks[site] for who, own in answers.items() if site in own.masks})
        if round_keys.public(key) != session.of(site).mask:
            raise _false(site)
        for peer in sorted(survivors):
            # The survivor added the mask if its name is the first of the two, and took it away otherwise.
            masks.apply(after, participant.pair_key(session, key, site, peer), -1 if peer < site else 1)
    return after


def _secret(session: sessions.Session, site: str, shares: Mapping[str, bytes]) -> bytes:
    try:
        return shamir.combine({session.points[who]: share for who, share in shares.items()}, session.threshold)
    except ValueError as error:
        raise errors.SecureAggregationError("secure-opening", f"what hides site '{site}': {error}") from None


def _false(site: str) -> errors.SecureAggregationError:
    return errors.SecureAggregationError(
        "secure-opening",
        f"the shares of what hides site '{site}' do not give back what it announced: a site sent a false one",
    )
