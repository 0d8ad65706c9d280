"""``--dry-run``: what a run would do, from shapes, the data's index and one image of every site.

Needs neither weights nor network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict

from fedvfm import errors
from fedvfm.aggregators import table as rules
from fedvfm.config import privacy as privacy_config
from fedvfm.config import schema
from fedvfm.data.partition import virtual_hospitals
from fedvfm.flower import internals
from fedvfm.model import adapted_model, feature_counts
from fedvfm.model import device as devices
from fedvfm.model import memory as budget
from fedvfm.protocol import codecs, protocol
from fedvfm.server.rounds import handshake
from fedvfm.server.rounds import summary as summaries
from fedvfm.simulation import baselines, experiment, inspection, run
from fedvfm.simulation.engines import worker_schedule
from fedvfm.simulation.results import simulated_epsilon
from fedvfm.state import control_variates, factors, groups, state
from fedvfm.trust import locked_recipe

METRICS = tuple(f"metric-{number}" for number in range(6))


def plan(
    what: schema.Experiment,
    hospitals: Sequence[virtual_hospitals.Hospital],
    model: adapted_model.AdaptedModel | None = None,
) -> dict[str, Any]:
    """The plan, with the keys of summary.json where they are known before a run.

    ``bytes.up`` and ``down`` are totals of the federated arm, from serialised messages of the real shapes, at most:
    the adapter of the best validated round is tested too only where it is not the last one. ``per_round`` is one
    round of training, the mean over all where they differ, and, where validated, evaluation. ``model`` is that of the
    recipe on the meta device, where it was built before.

    Raises:
        ConfigError: if the recipe of an arm cannot be trained.
        DataError: if training would refuse the first sample of a site.
    """
    model = experiment.examine(what) if model is None else model
    locked = model.locked()
    names = [hospital.name for hospital in hospitals]
    arms = run.arms(what, names)
    trainable = factors.ever(locked.manifest, locked.recipe.adapter.factors)
    shapes = _shapes(what, model, arms)
    workers = _workers(what, arms, model)
    memory = _memory(what, shapes, inspection.inspect(model, hospitals))
    return {
        "experiment": what.name,
        "seed": what.recipe.seed,
        "engine": what.engine,
        "rounds": what.recipe.rounds,
        "backbone": summaries.backbone_of(locked),
        "trainable_parameters": trainable,
        "share": trainable / max(1, locked.backbone_parameters),
        "bytes": {**_bytes(what, locked, hospitals), "full_model": summaries.full_model_bytes(locked)},
        "peak_mib": round(memory.total + (workers - 1) * (memory.activations + worker_schedule.OWN_MIB), 1),
        "cache": _cache(what, memory),
        "threads": worker_schedule.threads(what),
        "workers": workers if what.engine == "in-process" else None,
        "prompt": what.recipe.task.oracle or None,
        "privacy": simulated_epsilon.planned(what.recipe, what.server.cohort or len(hospitals), hospitals),
        "sites": {h.name: {split: len(members) for split, members in h.splits.items()} for h in hospitals},
        "arms": {
            arm.name: {
                "rounds": arm.recipe.rounds if arm.recipe is not None else 0,
                "train_sites": list(arm.train_sites),
                "test_sites": list(arm.test_sites),
            }
            for arm in arms
        },
        "notes": [*_elsewhere(what), *run.notes(what, hospitals), *_cheap(what, model, memory)],
    }


def _elsewhere(what: schema.Experiment) -> list[str]:
    """A word on a device that this machine lacks: the plan is good, a run here would be refused."""
    try:
        devices.choose(what.device)
    except errors.ConfigError as error:
        return [f"a run on this machine would be refused: device = {'; '.join(error.faults)}"]
    return []


def _workers(what: schema.Experiment, arms: Sequence[baselines.Arm], model: adapted_model.AdaptedModel) -> int:
    """How many workers would compute here; 1 for an engine that has none of its own."""
    if what.engine != "in-process":
        return 1
    tasks = sum(worker_schedule.at_a_time(len(arm.train_sites), what.server) for arm in arms if arm.recipe is not None)
    return worker_schedule.count(what, tasks, lambda: model)[0]


def _shapes(
    what: schema.Experiment, model: adapted_model.AdaptedModel, arms: Sequence[baselines.Arm]
) -> list[adapted_model.AdaptedModel]:
    """The model of each recipe that an arm trains, on the meta device; that of the experiment is there."""
    trained = {arm.recipe.model_copy(update={"rounds": 1}).hash: arm for arm in arms if arm.recipe is not None}
    shapes, faults = [], []
    for arm in trained.values():
        built, wrong = (model, []) if arm.recipe in (None, what.recipe) else adapted_model.examine(arm.recipe)
        shapes += [] if built is None else [built]
        faults += [f"arm '{arm.name}': {fault}" for fault in wrong]
    if faults:
        raise errors.ConfigError(f"experiment '{what.name}'", faults)
    return shapes


@dataclass(frozen=True)
class Phase:
    """Bytes of one exchange with one site."""

    up: int = 0
    down: int = 0

    def __add__(self, other: Phase) -> Phase:
        return Phase(self.up + other.up, self.down + other.down)

    def __mul__(self, factor: float) -> Phase:
        return Phase(round(self.up * factor), round(self.down * factor))


def _bytes(
    what: schema.Experiment, locked: locked_recipe.LockedRecipe, hospitals: Sequence[virtual_hospitals.Hospital]
) -> dict[str, Any]:
    """Bytes of the federated arm: handshake, rounds, final test."""
    internals.be_server_task(1)
    recipe = locked.recipe  # what is sent states what the backbone decides
    # The site that pools all others is a node too and answers the handshake.
    total = _handshake(recipe, locked) * (len(hospitals) + 1)
    asked = (what.server.cohort or len(hospitals)) / len(hospitals)
    bases = {hospital.name: _base(what, locked, hospital.name) for hospital in hospitals}
    odd, even, validate, test = Phase(), Phase(), Phase(), Phase()
    every = recipe.evaluation.every
    # Under a codec a site that validates holds the adapter that it then trains from, or tests.
    held = every == 1
    for hospital in hospitals:
        odd += _train(locked, bases[hospital.name], 1, held) * asked
        even += _train(locked, bases[hospital.name], 2, held) * asked
        validate += _evaluate(locked, bases[hospital.name], "val", ()) if hospital.val else Phase()
        test += _evaluate(locked, bases[hospital.name], "test", [sample.id for sample in hospital.test], held=every > 0)
    validated = len({*range(every, recipe.rounds + 1, every), recipe.rounds}) if every else 0
    # With personal arrays in what is scored, those of no round but the last few are kept.
    best = recipe.personal.kind in (groups.NONE, *groups.BESIDE)
    tests = 2 if validated > 1 and validate.up and best else 1
    trained = odd * ((recipe.rounds + 1) // 2) + even * (recipe.rounds // 2)
    total += trained + validate * validated + test * tests
    if recipe.codec != codecs.PLAIN:
        # Nobody holds the first adapter, nor that of the best round, tested after the last one: they come whole.
        usual = [_travels(locked, base, 1, held) for base in bases.values()]
        more = sum(4 * base.parameters for base in bases.values()) - sum(
            len(one.data) for one in usual if one is not None
        )
        total += Phase(0, round(asked * more))
        total += Phase(0, (tests - 1) * sum(4 * base.parameters for base in bases.values()))
    round_ = trained * (1 / recipe.rounds) + (validate if validated else Phase())
    return {"up": total.up, "down": total.down, "per_round": {"up": round_.up, "down": round_.down}}


def _base(what: schema.Experiment, locked: locked_recipe.LockedRecipe, site: str) -> state.AdapterState:
    """The first adapter in the site's own rank."""
    rank = what.site_ranks.get(site, what.recipe.adapter.rank)
    rule = rules.make(what.recipe.aggregation)
    base: state.AdapterState = rule.for_site(locked.adapter, handshake.at_rank(locked.manifest, rank))
    return base


def _exchange(kind: str, content: RecordDict, answer: RecordDict) -> Phase:
    sent = Message(content, 1, kind)
    return Phase(len(internals.serialise(Message(answer, reply_to=sent))), len(internals.serialise(sent)))


def _handshake(recipe: schema.Recipe, locked: locked_recipe.LockedRecipe) -> Phase:
    counts = {"train": 1, "val": 1, "test": 1}
    hello = protocol.Hello(
        "site", locked.backbone_sha256 or "0" * 64, locked.manifest.fingerprint, recipe.adapter.rank, counts, "0" * 64
    )
    return _exchange(protocol.HANDSHAKE, protocol.encode_task(protocol.Task(recipe)), protocol.encode_hello(hello))


def _travels(
    locked: locked_recipe.LockedRecipe, base: state.AdapterState, number: int, held: bool
) -> codecs.Difference | None:
    """What takes the place of the adapter on the way down: nothing where it is held, else the step of a round."""
    recipe = locked.recipe
    if recipe.codec == codecs.PLAIN:
        return None
    if held:
        return codecs.Difference(recipe.codec, base.fingerprint, base.fingerprint, {}, b"")
    left = base.select(groups.moving(locked.manifest, recipe, number))
    return dataclasses.replace(codecs.encode(recipe.codec, left, base, {}).difference, target=base.fingerprint)


def _train(locked: locked_recipe.LockedRecipe, base: state.AdapterState, number: int, held: bool) -> Phase:
    recipe = locked.recipe
    # Under a mechanism nothing that is made of training records leaves beside the adapter.
    plain = recipe.privacy.mechanism == privacy_config.NO_MECHANISM
    counted = feature_counts.METRICS.values() if recipe.data.views else ()
    metrics = dict.fromkeys(("loss", "seconds", "steps", *counted), 0.0) if plain else {}
    left = base.select(groups.leaving(locked.manifest, recipe, number))
    update = state.SiteUpdate("site", left, 1, 0, base.fingerprint, metrics=metrics)
    up = None if recipe.codec == codecs.PLAIN else codecs.encode(recipe.codec, left, base, {}).difference
    asked = protocol.Task(recipe, 1, base, correction=control_variates.first(locked.manifest, recipe, number))
    task = protocol.encode_task(asked, _travels(locked, base, number, held))
    return _exchange(protocol.TRAIN, task, protocol.encode_update(update, up))


def _evaluate(
    locked: locked_recipe.LockedRecipe, base: state.AdapterState, split: str, ids: Sequence[str], held: bool = False
) -> Phase:
    recipe = locked.recipe
    values = {name: [0.5] * len(ids) for name in METRICS} if ids else {}
    answer = protocol.Evaluation("site", 1, 1, dict.fromkeys(METRICS, 0.5), values, tuple(ids))
    task = protocol.Task(recipe, 1, base, split)
    content = protocol.encode_task(task, _travels(locked, base, recipe.rounds, held))
    return _exchange(protocol.EVALUATE, content, protocol.encode_evaluation(answer))


def _memory(
    what: schema.Experiment, shapes: Sequence[adapted_model.AdaptedModel], seen: Sequence[budget.Images]
) -> budget.Memory:
    """The largest of all arms, which share one cache."""
    places = budget.Places(what.cache_mib, what.cache_disk_mib, files_first=True)
    try:
        device = devices.choose(what.device)
    except errors.FedvfmError:  # planned here, run elsewhere
        device = "cpu"
    return budget.largest([budget.memory(one, seen, places, device) for one in shapes], places)


def _cache(what: schema.Experiment, memory: budget.Memory) -> dict[str, float]:
    """What all images and features take, and what there is for them."""
    return {
        "images_mib": round(memory.images, 1),
        "features_mib": round(memory.features, 1),
        "memory_mib": what.cache_mib,
        "files_mib": what.cache_disk_mib,
    }


def _cheap(what: schema.Experiment, model: adapted_model.AdaptedModel, memory: budget.Memory) -> list[str]:
    """Which epochs compute the adapted blocks alone, and what a cache that is too small would have to hold."""
    views = what.recipe.data.views
    if not (memory.features and views and model.frozen_blocks):
        return []
    epochs, a_round = what.recipe.rounds * what.recipe.optimiser.local_epochs, what.recipe.optimiser.local_epochs
    first, depth, frozen = min(views, epochs), model.backbone.depth, model.frozen_blocks
    rest = f"the last {depth - frozen}" if frozen < depth else "head and decoder"
    told = [
        f"epochs 1 to {first} of {epochs} (rounds 1 to {-(-first // a_round)}) see each view for the first time and "
        f"compute all {depth} blocks" + (f"; later epochs compute only {rest}" if epochs > first else "")
    ]
    need, room = memory.images + memory.features, what.cache_mib + what.cache_disk_mib
    if need > room:
        told.append(
            f"the cache holds {room / need:.0%} of what is needed, the rest is computed again every time: raise "
            f"cache_mib + cache_disk_mib from {room:,} to {need:,.0f}"
        )
    return told
