"""Which factors of the low-rank pairs train in a round: ``recipe.adapter.factors``. Both ends stand on it; no torch.

A pair changes a layer by ``scale B A``. Averaging both factors is inexact: mean(B) mean(A) is not mean(B A). Where one
factor is the same at all sites it is exact, and only the other one travels up:

- ``freeze-A``: A stays as it is in the first adapter and B trains.
- ``alternate``: odd rounds train B, even rounds A.

What is no factor (head, decoder parts, biases) trains in every round.

Source: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024 (FFA-LoRA: freeze-A);
    Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", NeurIPS 2025 (RoLoRA).
"""

from __future__ import annotations

import numpy as np

from fedvfm.state import state

RESIDUAL = "residual"
"""Group of the arrays that a rule of aggregation fills: a second pair beside a pair, which no site trains or sends."""
OWN = "own"
"""Group of the arrays of a second pair beside a pair that each site keeps for itself (``recipe.personal``: dual)."""
STILL = (RESIDUAL, OWN)
"""Groups of arrays that do not train with the others."""
BOTH, FREEZE_A, ALTERNATE = "both", "freeze-A", "alternate"
WAYS = {BOTH: "both factors", FREEZE_A: FREEZE_A, ALTERNATE: ALTERNATE}
"""Way -> what people read."""


def idle(way: str, round_number: int) -> str:
    """The role that does not train in a round: ``"A"``, ``"B"``, or empty where both do.

    Raises:
        ValueError: if the way is none of :data:`WAYS`; nothing trains or leaves by a way that is not known.
    """
    if way not in WAYS:
        raise ValueError(f"factors '{way}': known: {', '.join(WAYS)}")
    if way == ALTERNATE:
        return "A" if round_number % 2 else "B"
    return "A" if way == FREEZE_A else ""


def trained(manifest: state.Manifest, way: str, round_number: int) -> tuple[str, ...]:
    """Names of the arrays that train in a round; sorted as in the manifest. Which of them leave: ``state.groups``.

    Args:
        manifest: every array of the adapter.
        way: ``recipe.adapter.factors``.
        round_number: from 1.
    """
    still = idle(way, round_number)
    return tuple(spec.name for spec in manifest if spec.group not in STILL and (not still or spec.role != still))


def residual_names(pair: str) -> tuple[str, str]:
    """Of the residual of a pair: the array beside A, and the one beside B."""
    return f"{pair}.residual.A", f"{pair}.residual.B"


def own_names(pair: str) -> tuple[str, str]:
    """Of a site's own pair beside a pair: A and B."""
    return f"{pair}.own.A", f"{pair}.own.B"


def whole(
    adapter: state.AdapterState, manifest: state.Manifest, less: state.AdapterState | None = None
) -> state.AdapterState:
    """The adapter with each pair's factors joined to those of its residual, whose product is all that it changes.

    Shapes: A (r + residual, d_in), B (d_out, r + residual); with ``less`` once more the residual.

    Args:
        adapter: any.
        manifest: of it.
        less: an adapter whose residual is taken off the product.
    """
    arrays = {spec.name: adapter[spec.name] for spec in manifest if spec.group != RESIDUAL}
    for pair, (a, b) in manifest.pairs().items():
        down, up = residual_names(pair)
        if down in adapter:
            more = ((adapter[down], adapter[up]), *(() if less is None else ((less[down], -less[up]),)))
            arrays[a.name] = np.concatenate([arrays[a.name], *(wide for wide, _ in more)])
            arrays[b.name] = np.concatenate([arrays[b.name], *(tall for _, tall in more)], axis=1)
    return state.AdapterState(arrays)


def numbers(manifest: state.Manifest, way: str, round_number: int) -> int:
    """How many numbers train in a round."""
    chosen = set(trained(manifest, way, round_number))
    return sum(spec.size for spec in manifest if spec.name in chosen)


def most(manifest: state.Manifest, way: str) -> int:
    """How many numbers train in a round, at most: of alternate that is the round of the larger factor."""
    return max(numbers(manifest, way, round_number) for round_number in (1, 2))


def ever(manifest: state.Manifest, way: str) -> int:
    """How many numbers train in some round; the others stay as they are in the first adapter."""
    chosen = {name for round_number in (1, 2) for name in trained(manifest, way, round_number)}
    return sum(spec.size for spec in manifest if spec.name in chosen)


def completed(update: state.AdapterState, base: state.AdapterState) -> state.AdapterState:
    """The whole adapter: what trained, and beside it what did not, as in the adapter that training started from."""
    return update if len(update) == len(base) else state.AdapterState({**base, **update})


def describe(way: str) -> str:
    """What does not train, for people; empty where all of the adapter does."""
    if way == ALTERNATE:
        return "B of every pair trains in odd rounds and A in even ones"
    return "A of every pair stays as it is in the first adapter, B trains" if way == FREEZE_A else ""
