"""One sum of a round, agreed by all: which lists of dealers and survivors the sites open for.

A coordinator that tells each site a list of its own would get mask keys of some by one list and seeds of others by the
next, and with them one site's numbers. So each survivor signs one text a round, and a mask key leaves only for a text
that ``threshold`` survivors signed. Of ``n`` sites with ``c`` colluders two such texts have ``2 threshold`` signatures,
and honest sites and colluders make ``n + c`` at most: with the least threshold there is one.
Where all dealers survive no mask key leaves, so no signature is needed; that sum is then the site's one text.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, figure 4,
    round 3 (consistency check).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from fedvfm import errors
from fedvfm.secure_aggregation import session as sessions
from fedvfm.storage import hash_chain

Verified = Callable[[str, str, bytes], bool]
"""Whether a site of this name made this signature over this message."""


@dataclass(frozen=True, slots=True)
class Sum:
    """What is to be opened.

    Attributes:
        session: its id.
        dealers: sites whose shares were passed on, sorted.
        survivors: sites whose masked numbers are in the sum, sorted.
    """

    session: str
    dealers: tuple[str, ...]
    survivors: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether nobody dropped out after it dealt shares: then no mask key opens it, and none leaves."""
        return self.dealers == self.survivors

    @property
    def digest(self) -> str:
        """sha256 of what is signed."""
        return hashlib.sha256(self.signed_bytes()).hexdigest()

    def signed_bytes(self) -> bytes:
        """What a survivor signs with its own key."""
        body = {"session": self.session, "dealers": list(self.dealers), "survivors": list(self.survivors)}
        return f"fedvfm secure aggregation sum\n{hash_chain.canonical(body)}".encode()


def of(session: str, dealers: Collection[str], survivors: Collection[str]) -> Sum:
    """A sum by its lists, in any order."""
    return Sum(session, tuple(sorted(dealers)), tuple(sorted(survivors)))


def require(session: sessions.Session, asked: Sum, signatures: Mapping[str, str], verified: Verified) -> None:
    """Check that enough survivors signed for this sum.

    Args:
        session: what was agreed.
        asked: the sum.
        signatures: site -> its signature; of sites that did not survive, and false ones, do not count.
        verified: by the roster document of the session.

    Raises:
        SecureAggregationError: ``secure-agreement``, with both numbers.
    """
    listed = set(asked.survivors) & set(session.points)
    text = asked.signed_bytes()
    signed = [site for site in sorted(listed & set(signatures)) if verified(site, signatures[site], text)]
    if len(signed) < session.threshold:
        raise errors.SecureAggregationError(
            "secure-agreement",
            f"{len(signed)} survivors signed for these lists of dealers and survivors, {session.threshold} are needed; "
            "no mask key leaves",
        )
