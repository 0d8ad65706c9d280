"""How unlike the updates of a round are: cosine between sites, drift, and how many directions the aggregate uses.

Measured on a sample where there is much: at most :data:`SITES` sites and :data:`NUMBERS` numbers of each update, chosen
by names alone, so neither memory nor time grows with the sites and no bit depends on who answers first. Nothing is
measured where a mechanism at the server lets no single update stay (:mod:`fedvfm.server.rounds.dp_aggregation`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import seeding
from fedvfm.state import state

SITES = 64
NUMBERS = 1 << 16
PAIRS, LARGEST_RANK = 48, 256
"""Pairs whose effective rank is measured, and up to which rank."""
ROUNDING = 1e-7
"""Singular values below this share of the largest are rounding."""
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
        self._places = _places(manifest) if start is not None else {}

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
        cosines = _cosines(changes, changes)
        first, second = np.triu_indices(len(names), k=1)
        pairs = cosines[first, second]
        least = int(pairs.argmin())
        scale = float(np.sqrt(self._total / changes.shape[1]))
        drift = np.linalg.norm(changes - changes.mean(axis=0), axis=1)
        others = (changes.sum(axis=0) - changes) / (len(names) - 1)
        return {
            "cosine": {
                "mean": _rounded(pairs.mean()),
                "least": _rounded(pairs[least]),
                "between": [names[first[least]], names[second[least]]],
            },
            "norm": _rounded(scale * np.linalg.norm(changes, axis=1).mean()),
            "drift": _rounded(scale * drift.mean()),
            "alignment": {
                site: _rounded(_cosines(change[None], rest[None])[0, 0])
                for site, change, rest in zip(names, changes, others, strict=True)
            },
            "sites": len(names),
            "numbers": int(changes.shape[1]),
        }


def effective_rank(aggregate: Mapping[str, state.Array], manifest: state.Manifest) -> dict[str, float] | None:
    """Of the product B A of every pair: ``mean`` and ``least`` over pairs; None where no product has a direction.

    The exponential of the entropy of the singular values' shares: 1 where one direction holds all, the rank where all
    are equal.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, eq. (4).
    """
    ranks = []
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


def _places(manifest: state.Manifest) -> dict[str, NDArray[np.int64]]:
    """Which numbers of every array are looked at: all, or an equal share of each."""
    total = sum(spec.size for spec in manifest)
    if total <= NUMBERS:
        return {spec.name: np.arange(spec.size) for spec in manifest}
    places = {}
    for spec in manifest:
        rng = seeding.stream(0, "divergence", "numbers", spec.name)
        count = max(1, round(spec.size * NUMBERS / total))
        places[spec.name] = np.sort(rng.choice(spec.size, size=count, replace=False))
    return places


def _cosines(first: Floats, second: Floats) -> Floats:
    """Shapes: (N, S) and (M, S) -> (N, M); 0 where a row is 0."""
    norms = np.linalg.norm(first, axis=1)[:, None] * np.linalg.norm(second, axis=1)
    return np.asarray(np.divide(first @ second.T, norms, out=np.zeros_like(norms), where=norms > 0), dtype=np.float64)


def _rounded(value: float | np.floating[Any]) -> float:
    return float(f"{float(value):.{DIGITS}g}")
