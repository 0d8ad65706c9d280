"""Which sites are asked in a round."""

from __future__ import annotations

from collections.abc import Sequence

from fedvfm import config, errors, seeding


def choose(sites: Sequence[str], server: config.ServerConfig, seed: int, round_number: int) -> list[str]:
    """The cohort of a round, sorted by name: all sites, or a seeded sample of ``server.cohort``."""
    ordered = sorted(sites)
    if server.cohort == 0 or server.cohort >= len(ordered):
        return ordered
    rng = seeding.stream(seed, "cohort", round_number)
    return sorted(str(name) for name in rng.choice(ordered, size=server.cohort, replace=False))


def quorum(asked: int, server: config.ServerConfig) -> int:
    """The least number of sites that must be admitted: ``server.quorum``, or all that were asked."""
    return min(server.quorum, asked) if server.quorum else asked


def require(
    admitted: Sequence[str], asked: Sequence[str], server: config.ServerConfig, round_number: int, why: str
) -> None:
    """Check the quorum.

    Raises:
        QuorumMissed: with who answered and why the others did not.
    """
    needed = quorum(len(asked), server)
    if len(admitted) < needed:
        raise errors.QuorumMissed(
            f"round {round_number}: {len(admitted)} of {len(asked)} sites were admitted, the quorum "
            f"is {needed} ({why}). "
            "Mend the sites or lower server.quorum"
        )
