"""How unlike the updates of a round are: cosine between sites, drift, and how many directions the aggregate uses.

Measured on a sample where there is much: at most :data:`SITES` sites and :data:`NUMBERS` numbers of each update, chosen
by names alone, so neither memory nor time grows with the sites and no bit depends on who answers first. Nothing is
measured where a mechanism at the server lets no single update stay (:mod:`fedvfm.server.rounds.dp_aggregation`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import seeding
from fedvfm.state import factors, state

SITES = 64
NUMBERS = 1 << 14
"""A cosine is then known to about 0.008."""
PAIRS, LARGEST_RANK = 48, 256
"""Pairs whose effective rank is measured, and up to which rank."""
ROUNDING = 1e-7
"""Singular values and norms below this share of the largest are rounding."""
DIGITS = 6
"""Significant digits that are stated."""

Floats = NDArray[np.float64]


class Divergence:
    """Takes every update once and keeps a sample of what it changed.

    Args:
        asked: names of the sites that were asked.
        manifest: of the global adapter; a site of another rank has other arrays and is left out.
        start: the global adapter that the sites started from; None measures nothing.
    """

    def __init__(self, asked: Sequence[str], manifest: state.Manifest, start: state.AdapterState | None) -> None:
        self._manifest, self._start = manifest, start
        names = sorted(asked)
        drawn = seeding.stream(0, "divergence", "sites", *names).permutation(len(names))[:SITES]
        self._followed = {names[at] for at in drawn}
        self._changes: dict[str, NDArray[np.float32]] = {}
        self._total = sum(spec.size for spec in manifest)
        self._places = _places(tuple((spec.name, spec.size) for spec in manifest)) if start is not None else {}

    def add(self, site: str, after: state.AdapterState, own: state.Manifest) -> None:
        """Take one update in."""
        if self._start is None or site not in self._followed or own.fingerprint != self._manifest.fingerprint:
            return
        parts = [after[name].ravel()[at] - self._start[name].ravel()[at] for name, at in self._places.items()]
        self._changes[site] = np.concatenate(parts)

    def record(self) -> dict[str, Any] | None:
        """What the journal states; None of fewer than two sites.

        ``cosine``: ``mean`` and ``least`` over pairs of sites, ``between`` the two least alike. ``norm``: mean
        Euclidean norm of what a site changed. ``drift``: mean norm of it less the plain mean over sites. ``alignment``:
        each site's cosine with the mean of the others. ``sites``, ``numbers``: how many of each were compared.
        """
        names = sorted(site for site, change in self._changes.items() if change.any())
        if len(names) < 2:
            return None
        changes = np.stack([self._changes[site] for site in names]).astype(np.float64)
        products = changes @ changes.T  # all that follows is made of these
        norms, sums = np.sqrt(products.diagonal()), products.sum(axis=1)
        cosines = products / np.outer(norms, norms)
        first, second = np.triu_indices(len(names), k=1)
        pairs = cosines[first, second].clip(-1.0, 1.0)
        least = int(pairs.argmin())
        others = _root(products.sum() - 2 * sums + norms**2, norms.max())
        drift = _root(norms**2 - 2 * sums / len(names) + products.mean(), norms.max())
        alignment = np.divide(sums - norms**2, norms * others, out=np.zeros_like(norms), where=others > 0)
        scale = float(np.sqrt(self._total / changes.shape[1]))
        return {
            "cosine": {
                "mean": _rounded(pairs.mean()),
                "least": _rounded(pairs[least]),
                "between": [names[first[least]], names[second[least]]],
            },
            "norm": _rounded(scale * norms.mean()),
            "drift": _rounded(scale * drift.mean()),
            "alignment": dict(zip(names, map(_rounded, alignment.clip(-1.0, 1.0)), strict=True)),
            "sites": len(names),
            "numbers": int(changes.shape[1]),
        }


def effective_rank(aggregate: state.AdapterState, manifest: state.Manifest) -> dict[str, float] | None:
    """Of the product B A of every pair: ``mean`` and ``least`` over pairs; None where no product has a direction.

    The exponential of the entropy of the singular values' shares: 1 where one direction holds all, the rank where all
    are equal.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, eq. (4).
    """
    ranks = []
    aggregate = factors.whole(aggregate, manifest)
    for a, b in _few(list(manifest.pairs().values())):
        wide, tall = aggregate[a.name].astype(np.float64), aggregate[b.name].astype(np.float64)
        # The squared singular values of B A are the eigenvalues of (B'B)(A A'), which is r x r.
        values = np.linalg.eigvals((tall.T @ tall) @ (wide @ wide.T)).real.clip(min=0)
        singular = np.sqrt(values)
        singular = singular[singular > ROUNDING * singular.max()]
        if len(singular):
            shares = singular / singular.sum()
            ranks.append(float(np.exp(-(shares * np.log(shares)).sum())))
    return {"mean": _rounded(np.mean(ranks)), "least": _rounded(min(ranks))} if ranks else None


def _few(pairs: list[tuple[state.ArraySpec, state.ArraySpec]]) -> list[tuple[state.ArraySpec, state.ArraySpec]]:
    """At most :data:`PAIRS` pairs at even distances; none of a rank whose decomposition would hold the round up."""
    small = [pair for pair in pairs if pair[0].shape[0] <= LARGEST_RANK]
    return small[:: max(1, -(-len(small) // PAIRS))]


@functools.lru_cache(maxsize=8)
def _places(sizes: tuple[tuple[str, int], ...]) -> dict[str, NDArray[np.int64]]:
    """Which numbers of every array are looked at: all, or an equal share of each.

    Args:
        sizes: name and number of numbers of every array.
    """
    total = sum(size for _, size in sizes)
    if total <= NUMBERS:
        return {name: np.arange(size) for name, size in sizes}
    places = {}
    for name, size in sizes:
        rng = seeding.stream(0, "divergence", "numbers", name)
        count = max(1, round(size * NUMBERS / total))
        places[name] = np.sort(rng.choice(size, size=count, replace=False))
    return places


def _root(squares: Floats, largest: float) -> Floats:
    """Norms from squares that were made of differences: what is rounding beside the largest norm is 0."""
    roots = np.sqrt(squares.clip(min=0.0))
    return np.where(roots > ROUNDING * largest, roots, 0.0)


def _rounded(value: float | np.floating[Any]) -> float:
    return float(f"{float(value):.{DIGITS}g}")
