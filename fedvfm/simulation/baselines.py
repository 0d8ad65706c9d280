"""What the federated adapter is compared with. Every trained arm is a federation of its own on the same code path.

A baseline is a function from the experiment and the hospitals' names to its arms. Equal gradient steps per sample in
all trained arms: same rounds, same local epochs, same batch size ("pooled-2x" doubles the epochs to show convergence).

Where ``server.cohort`` asks only some of the sites in a round, a sample is trained on in that share of the rounds. Arms
that are federations ask a cohort of the same size; an arm whose sites are asked more often than the federation's (one
site alone, all data pooled, one site left out) has fewer rounds by the same factor, to the nearest whole one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedvfm import seeding
from fedvfm.aggregators import table as rules
from fedvfm.config import inputs as inputs_config
from fedvfm.config import privacy as privacy_config
from fedvfm.config import schema
from fedvfm.data.partition import virtual_hospitals
from fedvfm.protocol import codecs
from fedvfm.state import groups


@dataclass(frozen=True)
class Arm:
    """One training of an experiment.

    Attributes:
        name: unique; also its folder below ``arms/`` ("federated" has the run's own folder).
        group: the arm of the summary it belongs to.
        recipe: what is trained; None for an arm that no federation trains.
        train_sites, test_sites: names of sites; ``pooled`` is the site that holds everything.
        test_best: whether the adapter of the best validation round is tested too.
    """

    name: str
    group: str
    recipe: schema.Recipe | None
    train_sites: tuple[str, ...]
    test_sites: tuple[str, ...]
    test_best: bool = False


def equal_steps(arm: Arm, server: schema.ServerConfig, sites: int) -> Arm:
    """The arm with as many rounds as bring each sample the federation's expected number of gradient steps.

    Args:
        arm: any.
        server: the federation's; ``server_of`` says what of it the arm has.
        sites: of the federation.
    """
    if not server.cohort or arm.recipe is None or not arm.train_sites:
        return arm
    own = len(arm.train_sites)
    share, own_share = server.cohort / sites, min(server.cohort, own) / own
    rounds = max(1, math.floor(arm.recipe.rounds * share / own_share + 0.5))
    return dataclasses.replace(arm, recipe=arm.recipe.model_copy(update={"rounds": rounds}))


def server_of(arm: Arm, server: schema.ServerConfig) -> schema.ServerConfig:
    """The federation's cohort and quorum, or all of an arm's sites where it has fewer."""
    own = len(arm.train_sites)
    asked = min(server.cohort or own, own)
    return server.model_copy(update={"cohort": min(server.cohort, own), "quorum": min(server.quorum, asked)})


def fewer_rounds(rounds: Mapping[str, int], what: schema.Experiment, sites: int) -> str:
    """The sentence about arms whose rounds are not the recipe's, empty where there is none.

    Args:
        rounds: of every arm, 0 where nothing is trained.
        what: the experiment.
        sites: of the federation.
    """
    other = [f"{name} {number}" for name, number in rounds.items() if number not in (0, what.recipe.rounds)]
    if not other:
        return ""
    return (
        f"a round asks {what.server.cohort} of {sites} sites; arms whose sites are asked more often have fewer than "
        f"{what.recipe.rounds} rounds, for equal gradient steps per sample: {', '.join(other)}"
    )


def slow_sites(what: schema.Experiment, names: Sequence[str]) -> str:
    """The sentence about asynchronous rounds and the clock that they count, empty where there are none."""
    if what.recipe.asynchronous is None:
        return ""
    times = ", ".join(f"{name} {what.site_times.get(name, 1.0):g}" for name in names)
    return (
        f"asynchronous rounds: {what.recipe.asynchronous.said}. Counted times of a round's training: {times}. A slow "
        "hospital trains in fewer rounds than the others; the baselines train in all, and wait for nobody"
    )


def whole(arm: Arm) -> Arm:
    """The arm without a codec: what a baseline sends is nobody's bytes, and no two arms may share a residual.

    Nor is there anybody whose update could be hidden among others; and all arrays are shared, as no two arms may share
    what a site keeps either. Rounds wait for all that they ask: a baseline is not slow.
    """
    plain: dict[str, Any] = {"codec": codecs.PLAIN, "secure_aggregation": None, "personal": schema.RecipePersonal()}
    plain["asynchronous"] = None
    if arm.recipe is not None and "personal" in arm.recipe.adapter.options:
        shared = {key: value for key, value in arm.recipe.adapter.options.items() if key != "personal"}
        plain["adapter"] = arm.recipe.adapter.model_copy(update={"options": shared})
    if arm.recipe is None or all(getattr(arm.recipe, key) == value for key, value in plain.items()):
        return arm
    plain["privacy"] = own_noise(arm.recipe.privacy)
    return dataclasses.replace(arm, recipe=arm.recipe.model_copy(update=plain))


def federated(experiment: schema.Experiment, sites: Sequence[str]) -> list[Arm]:
    """The federation itself."""
    return [Arm("federated", "federated", experiment.recipe, tuple(sites), tuple(sites), test_best=True)]


def alone(recipe: schema.Recipe) -> schema.Recipe:
    """The recipe of an arm that trains at one site: nothing is averaged, so the server takes no step of its own.

    A robust rule has no other updates to hold against this one, and nothing can hide whether the site took part.
    """
    changes: dict[str, Any] = {"server_momentum": 0.0, "server_learning_rate": 1.0, "server_optimiser": "momentum"}
    if rules.robust(rules.make(recipe.aggregation)):
        changes |= {"rule": "mean", "options": {}}
    plain = recipe.aggregation.model_copy(update=changes)
    return recipe.model_copy(update={"aggregation": plain, "privacy": own_noise(recipe.privacy, alone=True)})


def own_noise(privacy: privacy_config.RecipePrivacy, *, alone: bool = False) -> privacy_config.RecipePrivacy:
    """The mechanism where nobody shares a noise: the whole of it is one's own.

    Args:
        privacy: the recipe's.
        alone: whether one site trains. Nothing can hide then whether it takes part.
    """
    own = privacy_config.SHARED.get(privacy.mechanism, privacy.mechanism)
    if alone and own == privacy_config.SITE_LEVEL:
        return privacy_config.NONE
    return privacy.model_copy(update={"mechanism": own})


def local_only(experiment: schema.Experiment, sites: Sequence[str]) -> list[Arm]:
    """Every site alone, tested at all sites or at a sample of them: the rows of the K x K matrix."""
    recipe, tested = alone(experiment.recipe), tested_at(experiment, sites)
    return [
        Arm(f"local-only/{site}", "local-only", recipe, (site,), tested[site]) for site in labelled(experiment, sites)
    ]


def labelled(experiment: schema.Experiment, sites: Sequence[str]) -> list[str]:
    """The sites that can learn alone: those with labels."""
    return [site for site in sites if site not in experiment.partition.unlabelled]


def tested_at(experiment: schema.Experiment, sites: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Where each site's own model is tested: everywhere, or at ``baseline.matrix_sites`` sites where there are more.

    The sites stand in a circle whose order is drawn from the seed; each model is tested at home and at the sites that
    come next. So every site tests equally many models of others, and tests grow with the sites and not their square.
    """
    most = experiment.baseline.matrix_sites
    if len(sites) <= most:
        return dict.fromkeys(sites, tuple(sites))
    circle = [str(name) for name in seeding.stream(experiment.recipe.seed, "matrix").permutation(sorted(sites))]
    return {
        home: tuple(sorted(circle[(place + step) % len(circle)] for step in range(most)))
        for place, home in enumerate(circle)
    }


def fewer_tests(experiment: schema.Experiment, sites: int) -> str:
    """The sentence about cells of the K x K matrix that are not computed, empty where all are.

    Args:
        experiment: with its baselines.
        sites: how many there are.
    """
    most = experiment.baseline.matrix_sites
    if "local-only" not in experiment.baselines or sites <= most:
        return ""
    where = f"at home and at {most - 1} of {sites - 1} other sites" if most > 1 else "at home alone"
    return f"each local-only model is tested {where}, drawn from the seed (baseline.matrix_sites = {most})"


def pooled(experiment: schema.Experiment, sites: Sequence[str]) -> list[Arm]:
    """One site with all training images: the bound that needs images to move."""
    return [Arm("pooled", "pooled", alone(experiment.recipe), (virtual_hospitals.POOLED,), tuple(sites))]


def pooled_twice(experiment: schema.Experiment, sites: Sequence[str]) -> list[Arm]:
    """Pooled with twice the epochs: if it gains little, the pooled arm has converged."""
    optimiser = experiment.recipe.optimiser
    longer = optimiser.model_copy(update={"local_epochs": 2 * optimiser.local_epochs})
    recipe = alone(experiment.recipe).model_copy(update={"optimiser": longer})
    return [Arm("pooled-2x", "pooled-2x", recipe, (virtual_hospitals.POOLED,), tuple(sites))]


def frozen(recipe: schema.Recipe) -> schema.Recipe:
    """The recipe with the backbone wholly frozen: the head alone trains, and all of it is shared."""
    adapter = recipe.adapter.model_copy(update={"kind": "head-only", "options": {}, "factors": "both"})
    rule = recipe.aggregation
    if "residual" in recipe.adapter.options:  # a rule that fills one has nothing to fill
        rule = rule.model_copy(update={"rule": "mean", "options": {}})
    return recipe.model_copy(update={"adapter": adapter, "aggregation": rule, "personal": schema.RecipePersonal()})


def head_only(experiment: schema.Experiment, sites: Sequence[str]) -> list[Arm]:
    """Federated, with the backbone wholly frozen: what the pretrained features give by themselves."""
    return [Arm("head-only", "head-only", frozen(experiment.recipe), tuple(sites), tuple(sites))]


def image_alone(experiment: schema.Experiment, sites: Sequence[str]) -> list[Arm]:
    """Federated, without the table beside the images: what the images give by themselves."""
    recipe = experiment.recipe.model_copy(update={"inputs": inputs_config.InputsConfig()})
    return [Arm("image-alone", "image-alone", recipe, tuple(sites), tuple(sites))]


def table_alone(experiment: schema.Experiment, sites: Sequence[str]) -> list[Arm]:
    """Federated, the same head on the table without the images: what the table gives by itself."""
    recipe = frozen(experiment.recipe)
    recipe = recipe.model_copy(update={"inputs": recipe.inputs.model_copy(update={"images": False, "dropout": 0.0})})
    return [Arm("table-alone", "table-alone", recipe, tuple(sites), tuple(sites))]


def leave_one_out(experiment: schema.Experiment, sites: Sequence[str]) -> list[Arm]:
    """Federated without one site, tested there: how the adapter does at a hospital it has never seen."""
    recipe = experiment.recipe if len(sites) > 2 else alone(experiment.recipe)
    return [
        Arm(f"leave-one-out/{site}", "leave-one-out", recipe, tuple(s for s in sites if s != site), (site,))
        for site in sites
        if len(sites) > 1
    ]


def unet(experiment: schema.Experiment, sites: Sequence[str]) -> list[Arm]:
    """A small U-Net from scratch in the same federation: foundation models do not always win."""
    recipe, settings, fields = experiment.recipe, experiment.baseline, schema.TaskConfig.model_fields
    without_prompts = {key: fields[key].default for key in ("prompt", "prompt_jitter", "prompt_points")}
    without_prompts["options"] = {key: value for key, value in recipe.task.options.items() if key != "passes"}
    changes = {
        "backbone": schema.BackboneConfig(name="unet", options={"channels": list(settings.unet_channels)}),
        "adapter": schema.AdapterConfig(kind="full"),
        "task": recipe.task.model_copy(update={"head": None, **without_prompts}),
        "optimiser": recipe.optimiser.model_copy(
            update={"learning_rate": settings.unet_learning_rate, "head_learning_rate": settings.unet_learning_rate}
        ),
        "aggregation": recipe.aggregation.model_copy(update={"rule": "mean", "options": {}}),
        "precision": "float32",
    }
    return [Arm("unet", "unet", recipe.model_copy(update=changes), tuple(sites), tuple(sites))]


def classical_arm(experiment: schema.Experiment, sites: Sequence[str]) -> list[Arm]:
    """What no adapter gives: thresholds, or a logistic regression on frozen features; of prognosis Cox's."""
    return [Arm("classical", "classical", None, tuple(sites), tuple(sites))]


def majority(experiment: schema.Experiment, sites: Sequence[str]) -> list[Arm]:
    """The commonest class, or the usual values of columns, for every image: what looking at none gives."""
    return [Arm("majority", "majority", None, tuple(sites), tuple(sites))]


def zero_shot(experiment: schema.Experiment, sites: Sequence[str]) -> list[Arm]:
    """The recipe's sentences as they are: what backbone and words give without training."""
    return [Arm("zero-shot", "zero-shot", None, tuple(sites), tuple(sites))]


def personal(experiment: schema.Experiment, site: str) -> Arm:
    """What a site makes of the federated adapter for itself, without a mechanism: :mod:`fedvfm.simulation.personal`."""
    recipe = experiment.recipe.model_copy(update={"privacy": privacy_config.NONE})
    return Arm(f"personal/{site}", "personal", recipe, (site,), (site,))


def faults(experiment: schema.Experiment) -> list[str]:
    """Baselines that do not fit the task, or what the recipe keeps at the sites."""
    kind, own = experiment.recipe.task.kind, experiment.recipe.personal.kind
    masks = ("majority", "classification")
    other = {"segmentation": masks, "detection": masks}.get(kind, ("unet", "segmentation"))
    wrong = [f"baselines: '{other[0]}' is for {other[1]}"] if other[0] in experiment.baselines else []
    if kind == "detection" and "classical" in experiment.baselines:
        wrong.append("baselines: 'classical' is of masks or classes, and this recipe answers with boxes; leave it out")
    if not experiment.recipe.inputs.columns:
        wrong += [
            f"baselines: '{name}' is for a table beside the images (recipe.inputs), which this recipe does not take"
            for name in ("image-alone", "table-alone")
            if name in experiment.baselines
        ]
    if experiment.recipe.inputs.images_missing:
        wrong += [
            f"baselines: '{name}' has no answer for cases without an image, which recipe.inputs.images_missing takes; "
            "leave it out"
            for name in ("image-alone", "classical")
            if name in experiment.baselines
        ]
    if experiment.recipe.data.depth:
        wrong += [
            f"baselines: '{name}' is of slices, and recipe.data.depth makes samples of whole volumes; leave it out"
            for name in ("unet", "classical")
            if name in experiment.baselines
        ]
    target = experiment.recipe.target
    if target.of_columns and not target.prognosis and "classical" in experiment.baselines:
        wrong.append(
            "baselines: 'classical' is for one class a sample or a prognosis, not for target "
            f"'{target.kind}'; leave it out"
        )
    words = experiment.recipe.words
    if words is None and "zero-shot" in experiment.baselines:
        wrong.append("baselines: 'zero-shot' needs sentences: give recipe.words, or leave it out")
    if words is not None and not words.learned and "head-only" in experiment.baselines:
        wrong.append(
            "baselines: 'head-only' has nothing to train where recipe.words.mode = 'zero-shot'; use 'zero-shot', which "
            "is the same without training"
        )
    if own not in (groups.NONE, *groups.BESIDE) and "leave-one-out" in experiment.baselines:
        wrong.append(
            f"baselines: 'leave-one-out' has no meaning with recipe.personal.kind = '{own}': a hospital that was in no "
            "round has no arrays of its own; leave it out"
        )
    return wrong
