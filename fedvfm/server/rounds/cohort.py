"""Which sites are asked in a round."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fedvfm import errors, seeding
from fedvfm.config import schema


def faults(sites: int, server: schema.ServerConfig) -> list[str]:
    """What of ``cohort`` and ``quorum`` cannot be with this many sites that train, one sentence a fault."""
    found = []
    number = "1 site" if sites == 1 else f"{sites} sites"
    if server.cohort > sites:
        found.append(f"server.cohort = {server.cohort}: {number} can train; give at most {sites}, or 0 for all")
    asked = min(server.cohort or sites, sites)
    if server.quorum > asked:
        why = f"a round asks {asked} of {number}" if asked < sites else f"{number} can train"
        found.append(f"server.quorum = {server.quorum}: {why}; give at most {asked}, or 0 for all that are asked")
    return found


def idle_clock(server: schema.ServerConfig, why: str) -> list[str]:
    """The keys that end a round by the clock, where no round is ended so, one sentence each.

    Args:
        server: the settings.
        why: no round is.
    """
    keys = {"grace_s": server.grace_s, "patience": server.patience}
    return [
        f"server.{key} = {value:g}: {why}, so that it does nothing; leave it out"
        for key, value in keys.items()
        if value
    ]


def asynchronous_faults(recipe: schema.Recipe, server: schema.ServerConfig) -> list[str]:
    """What of the server's settings cannot be with asynchronous rounds, one sentence a fault."""
    if recipe.asynchronous is None:
        return []
    size, wrong = recipe.asynchronous.buffer_size, []
    if server.cohort:
        wrong.append(
            f"server.cohort = {server.cohort}: with recipe.asynchronous a round asks every site that is not training; "
            "leave it out"
        )
    if server.quorum > size:
        wrong.append(
            f"server.quorum = {server.quorum}: with recipe.asynchronous a round ends with buffer_size = {size} "
            f"updates; give at most {size}, or 0 for that many"
        )
    return wrong + idle_clock(server, "with recipe.asynchronous no round waits for slow sites")


def promise_faults(quorum: int, recipe: schema.Recipe) -> list[str]:
    """Where a round may go on with fewer sites than the recipe promises, one sentence."""
    if quorum >= recipe.min_sites:
        return []
    return [
        f"recipe.min_sites = {recipe.min_sites}: a round may go on with {quorum}, and the sites were promised more. "
        "Raise server.quorum, or bring more sites"
    ]


def choose(
    sites: Sequence[str],
    server: schema.ServerConfig,
    seed: int,
    round_number: int,
    without_labels: Collection[str] = (),
) -> list[str]:
    """The cohort of a round, sorted by name: all sites, or a seeded sample of ``server.cohort``.

    A sample of none but sites without labels has the place of its last one taken by one with labels, drawn too.
    """
    ordered = sorted(sites)
    if not server.cohort or server.cohort >= len(ordered):
        return ordered
    rng = seeding.stream(seed, "cohort", round_number)
    drawn = [str(name) for name in rng.choice(ordered, size=server.cohort, replace=False)]
    if set(drawn) <= set(without_labels):
        drawn[-1] = str(rng.choice([name for name in ordered if name not in without_labels]))
    return sorted(drawn)


def quorum(asked: int, server: schema.ServerConfig) -> int:
    """The least number of sites that must be admitted: ``server.quorum``, or all that were asked."""
    return server.quorum or asked


def warmup_faults(asked: int, server: schema.ServerConfig, recipe: schema.Recipe, *, simulated: bool) -> list[str]:
    """Why the first rounds, in which so many sites with labels are asked alone, cannot be, one sentence a fault."""
    if server.quorum > asked:
        return [
            f"server.quorum = {server.quorum}: in the first rounds (recipe.unlabelled.warmup_rounds) {asked} sites "
            f"with labels are asked; give at most {asked}, or 0 for all that are asked"
        ]
    return [] if simulated else promise_faults(quorum(asked, server), recipe)


def require_labels(admitted: Sequence[str], without_labels: Collection[str], round_number: int) -> None:
    """Check that a round is not of sites without labels alone: nothing would hold them to the truth.

    Raises:
        QuorumMissed: saying so.
    """
    if without_labels and set(admitted) <= set(without_labels):
        raise errors.QuorumMissed(
            f"round {round_number}: {len(admitted)} sites were admitted, all without labels. Mend a site that has some"
        )


def require(admitted: Sequence[str], asked: Sequence[str], needed: int, round_number: int, why: str) -> None:
    """Check the quorum.

    Args:
        admitted: sites whose updates were taken.
        asked: those that were waited for.
        needed: how many must be admitted.
        round_number: the round.
        why: the others were not.

    Raises:
        QuorumMissed: with who answered and why the others did not.
    """
    if len(admitted) < needed:
        raise errors.QuorumMissed(
            f"round {round_number}: {len(admitted)} of {len(asked)} sites were admitted, the quorum "
            f"is {needed} ({why}). "
            "Mend the sites or lower server.quorum"
        )
