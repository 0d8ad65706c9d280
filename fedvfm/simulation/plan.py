"""``--dry-run``: what a run would do, from shapes and the data's index. Needs neither weights nor network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedvfm import config as configs
from fedvfm import flower, protocol
from fedvfm.client import model as models
from fedvfm.data import hospitals as hospital_data
from fedvfm.simulation import run, summary

BASE_MIB = 450.0
"""Memory of the imports alone (torch, transformers, peft, MONAI, flwr); see ``benchmarks/``."""

with flower.warnings.catch_warnings():
    flower.warnings.simplefilter("ignore", DeprecationWarning)
    from flwr.app import Message


def plan(what: configs.Experiment, hospitals: Sequence[hospital_data.Hospital]) -> dict[str, Any]:
    """The plan, with the keys of summary.json where they are known before a run.

    ``bytes.up`` and ``down`` are totals of the federated arm, from serialised messages of the real shapes; ``per_round`` is one
    round of training and, where validated, evaluation.
    """
    locked, model = models.lock(what.recipe, with_weights=False)
    names = [hospital.name for hospital in hospitals]
    up, down = _round_bytes(what, locked.initial)
    validated = len(range(what.recipe.evaluation.every, what.recipe.rounds + 1, what.recipe.evaluation.every)) if what.recipe.evaluation.every else 0
    sites, rounds = len(hospitals), what.recipe.rounds
    return {
        "experiment": what.name,
        "seed": what.recipe.seed,
        "engine": what.engine,
        "rounds": rounds,
        "backbone": summary.backbone_of(locked),
        "trainable_parameters": locked.manifest.parameters,
        "share": locked.manifest.parameters / max(1, locked.backbone_parameters),
        "bytes": {
            "up": sites * rounds * up,
            "down": sites * (rounds + validated + 1) * down,
            "full_model": summary.full_model_bytes(locked),
            "per_round": {"up": sites * up, "down": sites * down * (2 if validated else 1)},
        },
        "peak_mib": _memory(what, model),
        "sites": {h.name: {split: len(members) for split, members in h.splits.items()} for h in hospitals},
        "arms": {arm.name: {"train_sites": list(arm.train_sites), "test_sites": list(arm.test_sites)} for arm in run.arms(what, names)},
        "notes": [note for hospital in hospitals for note in hospital.notes],
    }


def _round_bytes(what: configs.Experiment, initial: Any) -> tuple[int, int]:
    """Bytes of one train message up and down, serialised."""
    from fedvfm import state

    flower.be_server_task(1)
    sent = Message(protocol.encode_task(protocol.Task(what.recipe, 1, initial)), 1, protocol.TRAIN)
    update = state.SiteUpdate("site", initial, 1, 0, initial.fingerprint, metrics={"loss": 0.0, "seconds": 0.0, "steps": 0.0})
    answer = Message(protocol.encode_update(update), reply_to=sent)
    return len(flower.serialise(answer)), len(flower.serialise(sent))


def _memory(what: configs.Experiment, model: models.AdaptedModel) -> float:
    """Expected peak: imports, one backbone, activations of one batch with their gradients, and what may be kept."""
    height, width = what.recipe.data.input_size
    tokens = (height // model.backbone.patch) * (width // model.backbone.patch)
    # About 34 floats a token and channel are kept for the backward pass of a transformer block (Korthikanti et al., 2022).
    activations = 4 * 34 * tokens * model.backbone.width * max(model.backbone.depth, 1) * what.recipe.optimiser.batch_size
    weights = 4 * model.backbone_parameters
    kept = what.cache_mib * run.MIB if what.recipe.data.views else 0
    return round(BASE_MIB + (activations + weights + kept) / run.MIB, 1)


