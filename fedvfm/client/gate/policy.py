"""The site decides: a recipe, and every message, against the hospital's own policy. What it does not name is refused.

A recipe is judged before a person approves it and again before anything is computed; every message and everything that
would leave is judged once more. The coordinator is told a word, never why.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.backbones import licences
from fedvfm.config import privacy as privacy_config
from fedvfm.config import schema
from fedvfm.config import survey as surveys
from fedvfm.data import bags
from fedvfm.state import factors
from fedvfm.tasks import detection_metrics, metrics
from fedvfm.trust import locked_recipe, signed_documents

if TYPE_CHECKING:
    from fedvfm.protocol import protocol

SCRATCH = "scratch"
UNUSED = audit.Usage()
"""Of what nothing was used up."""
NO_PRIVACY = "none"
WITHOUT = "not "
"""What begins so in the counts of classes is how many patients do not have a label."""
TRAINING = ("loss", "seconds", "steps")
"""What a train reply says besides the adapter and the number of examples."""
OF_CLASS = ("dice_", "ap50_", "auprc_", "auroc_", "mae_", "r2_")
"""What begins so is the score of one class, one label, or one column of numbers."""
OVER_CLASSES = (
    "auprc",
    "auroc",
    "balanced_accuracy",
    "c_index",
    "c_index_uno",
    "calibration_error",
    "cpm",
    "event_share",
    *(f"froc_{rate:g}" for rate in detection_metrics.RATES),
    "macro_f1",
    "map10",
    "map50",
    "one_minus_ibs",
    "quadratic_kappa",
)
"""Means over classes, in which the patients of a rare one weigh most; and what rests on few events."""
CLASSIFICATION = ("auprc", "auroc", "balanced_accuracy", "brier", "ece", "macro_f1")
OF_TARGETS = {
    "class": (CLASSIFICATION, ()),
    "ordinal": ((*CLASSIFICATION, "mae", "quadratic_kappa"), ()),
    "multi-label": (("auprc", "auroc", "balanced_accuracy", "one_minus_brier"), ("auprc_", "auroc_")),
    "regression": (("one_minus_nmae",), ("mae_", "r2_")),
    "cox": (("c_index", "c_index_uno", "event_share"), ()),
    "survival": (("c_index", "c_index_uno", "calibration_error", "event_share", "one_minus_ibs"), ()),
}
"""Target of a classification -> its metrics, and what those of each of its columns begin with."""


@dataclass(frozen=True)
class Facts:
    """What a policy judges.

    Attributes:
        recipe: the resolved recipe.
        backbone_sha256: of the weights; empty where they are made from the seed.
        trainable: how many numbers train and leave in a round, at most. Before training take it from the model as the
            site itself built it, not from what the coordinator says.
        mechanism: of privacy, ``"none"`` where the recipe has none.
        epsilon: of the whole run under that mechanism.
    """

    recipe: schema.Recipe
    backbone_sha256: str
    trainable: int
    mechanism: str = NO_PRIVACY
    epsilon: float | None = None

    @staticmethod
    def of(locked: locked_recipe.LockedRecipe, units: int | None = None) -> Facts:
        """The facts of a locked recipe as it says them itself.

        Args:
            locked: the recipe.
            units: records, patients or sites to draw from, for the epsilon of a recipe that states its noise instead;
                where they are not known, neither is the epsilon, and a cap on it refuses.
        """
        from fedvfm.privacy import planner  # SciPy only where a policy judges

        privacy, trainable = locked.recipe.privacy, factors.most(locked.manifest, locked.recipe.adapter.factors)
        epsilon = privacy.epsilon if units is None else planner.run_epsilon(locked.recipe, units)
        return Facts(locked.recipe, locked.backbone_sha256, trainable, privacy.mechanism, epsilon)


@dataclass(frozen=True)
class Verdict:
    """One rule of a policy and what it says of a recipe.

    Attributes:
        rule: the key in ``[policy]``.
        accepted: whether the recipe keeps it.
        asked: what the recipe wants.
        allowed: what the policy allows.
        reason: the word that the coordinator gets where it is not kept.
    """

    rule: str
    accepted: bool
    asked: str
    allowed: str
    reason: str


def leaving(recipe: schema.Recipe) -> tuple[str, ...]:
    """Names of the metrics that leave a site under a recipe: those of training, validation and test.

    Under a mechanism none of training: epsilon covers the update, and nothing else that is computed from its images.
    """
    found = set(TRAINING if recipe.privacy.mechanism == NO_PRIVACY else ())
    if recipe.task.kind == "segmentation":
        found |= set(metrics.SegmentationScores(recipe.data.class_names, surface=recipe.evaluation.surface).columns)
    else:
        # Another task's are not known before it runs; each is held back then unless the policy names it.
        known = recipe.task.kind in ("classification", *bags.LABELS_OF)
        whole, begins = OF_TARGETS[recipe.target.kind] if known else ((), ())
        whole = detection_metrics.names(recipe.data.class_names) if recipe.task.kind == "detection" else whole
        found |= {*whole, *(begin + name for begin in begins for name in recipe.data.class_names)}
    return tuple(sorted(found))


def check(policy: schema.PolicyConfig, facts: Facts) -> list[Verdict]:
    """Every rule of a policy and its verdict."""
    recipe = facts.recipe
    return [
        _backbone(policy, facts),
        *_licences(policy, facts),
        _listed("tasks", recipe.task.kind, policy.tasks, "policy-task"),
        _listed("adapters", recipe.adapter.kind, policy.adapters, "policy-adapter"),
        _capped("max_rounds", recipe.rounds, policy.max_rounds, "policy-rounds"),
        _evaluations(policy, recipe),
        _hours(policy),
        _capped("max_trainable_parameters", facts.trainable, policy.max_trainable_parameters, "policy-parameters"),
        _metrics(policy, recipe),
        *_training(policy, recipe),
        _floor("min_sites", recipe.min_sites, policy.min_sites, "policy-sites"),
        *_secure(policy, recipe),
        _privacy(policy.privacy, facts),
    ]


def require(policy: schema.PolicyConfig, facts: Facts) -> None:
    """Check that every rule is kept.

    Raises:
        PolicyRefused: with the reason of the first rule that is not, and all of them in the detail.
    """
    broken = [verdict for verdict in check(policy, facts) if not verdict.accepted]
    if broken:
        lines = "; ".join(f"{one.rule}: asked {one.asked}, allowed {one.allowed}" for one in broken)
        said = signed_documents.shown(f"the policy of this site does not accept the recipe: {lines}")
        raise errors.PolicyRefused(broken[0].reason, said)


def require_enough(policy: schema.PolicyConfig, recipe: schema.Recipe, units: int, images: int) -> None:
    """Check that a round's update is made of enough patients and steps, so that it is none of a single one.

    Args:
        policy: the site's.
        recipe: what is trained.
        units: patients to train on.
        images: of theirs.

    Raises:
        PolicyRefused: "policy-units" or "policy-training".
    """
    if units < policy.min_train_units:
        told = f"{units} patients to train on; policy.min_train_units = {policy.min_train_units}"
        raise errors.PolicyRefused("policy-units", told)
    taken = steps(recipe, images)
    if _bare(recipe) and taken < policy.min_steps:
        told = f"{taken} steps a round; policy.min_steps = {policy.min_steps}"
        raise errors.PolicyRefused("policy-training", told)


def steps(recipe: schema.Recipe, images: int) -> int:
    """Steps of a round without a mechanism."""
    return math.ceil(images / recipe.optimiser.batch_size) * recipe.optimiser.local_epochs


def _bare(recipe: schema.Recipe) -> bool:
    """Whether an update is made without a bound for each image: without a mechanism, and at site level too."""
    return privacy_config.UNITS.get(recipe.privacy.mechanism, "site") == "site"


def check_task(
    policy: schema.PolicyConfig,
    task: protocol.Task,
    kind: str,
    used: audit.Usage,
    now: datetime | None = None,
    *,
    kept: bool = False,
) -> None:
    """Judge one message of an approved recipe.

    Args:
        policy: the site's.
        task: the message.
        kind: ``protocol.HANDSHAKE``, ``protocol.TRAIN`` or ``protocol.EVALUATE``.
        used: what the recipe has used up here, by the site's own audit log.
        now: default is the time it is.
        kept: whether the answer lies here: it was made before, and its numbers leave again as they are.

    Raises:
        PolicyRefused: if it asks for more than the recipe says, the policy's rounds or hours are used up, or the site
            does not compute at this time of the week.
    """
    recipe = task.recipe
    extra = task.per_sample or (task.surface and not recipe.evaluation.surface)
    if extra or not 0 <= task.round <= recipe.rounds or (kind == "evaluate" and task.split not in ("val", "test")):
        raise errors.PolicyRefused("policy-message", f"{kind} of round {task.round} asks for more than the recipe says")
    if used.seconds >= 3600 * policy.max_hours:
        raise errors.PolicyRefused(
            "policy-hours", f"{used.seconds / 3600:.2f} hours are used; policy.max_hours = {policy.max_hours:g}"
        )
    again = kept and not task.final  # the final adapter is judged anew: a policy may have been tightened
    if not again:  # what was kept is sent again without computing anything
        require_open(policy, now)
    if kind == "train" and (task.round < 1 or not (again or _rounds_left(policy, task, used))):
        told = f"{len(used.trained)} rounds are trained; policy.max_rounds = {policy.max_rounds}"
        raise errors.PolicyRefused("policy-rounds", f"{told}, the recipe has {recipe.rounds}")
    if kind == "evaluate" and not kept:
        _require_unanswered(policy, task, used)


def _rounds_left(policy: schema.PolicyConfig, task: protocol.Task, used: audit.Usage) -> bool:
    """Whether one more may be trained.

    The last one may always: a site that was killed before its update was kept trains it anew. An earlier one, which a
    coordinator asks for that was put back, is none of the recipe's rounds again, but one of the policy's.
    """
    pair = None if task.state is None else (task.round, task.state.fingerprint)
    if used.trained[-1:] == (pair,):
        return True
    different = set(used.trained) | {pair}
    return len(used.trained) < policy.max_rounds and len(different) <= task.recipe.rounds


def _require_unanswered(policy: schema.PolicyConfig, task: protocol.Task, used: audit.Usage) -> None:
    """Check that a score was not given before: one for each round and split, one of the test in all.

    Data may have changed since, and two scores of one adapter differ by the patients that came or went.
    """
    if (task.round, task.split) in used.answered or (task.split == "test" and _tested(used) - {task.round}):
        told = f"a score on {task.split} of round {task.round} left already, or another round was tested"
        raise errors.PolicyRefused("policy-evaluations", told)
    evaluation = task.recipe.evaluation
    if task.split == "val" and not evaluation.every:
        raise errors.PolicyRefused("policy-message", "the recipe never validates")
    # Of round 0 the first adapter is scored, and a coordinator may end with round 1.
    if task.split == "val" and task.round > 1 and not evaluation.validates(task.round, task.recipe.rounds):
        why = f"a score on val of round {task.round} is asked for; the recipe validates after every {evaluation.every} "
        raise errors.PolicyRefused("policy-message", f"{why}rounds")
    asked = (task.round, task.split, "" if task.state is None else task.state.fingerprint)
    if asked not in used.evaluated and len(used.evaluated) >= policy.most_evaluations:
        told = f"{len(used.evaluated)} adapters are scored; policy.max_evaluations = {policy.most_evaluations}"
        raise errors.PolicyRefused("policy-evaluations", told)


def _tested(used: audit.Usage) -> set[int]:
    """Rounds whose adapter's test score left."""
    return {number for number, split in used.answered if split == "test"}


def require_survey(policy: schema.PolicyConfig, survey: surveys.Survey) -> None:
    """Check that the policy names every statistic that a survey asks for.

    Raises:
        PolicyRefused: "policy-survey".
    """
    others = [name for name in survey.statistics if name not in policy.surveys]
    if others:
        allowed = ", ".join(policy.surveys) or "none"
        detail = f"the survey asks for {', '.join(others)}; policy.surveys = {allowed}"
        raise errors.PolicyRefused("policy-survey", signed_documents.shown(detail))


def require_open(policy: schema.PolicyConfig, now: datetime | None = None) -> None:
    """Check that the site computes at this time of the week.

    Raises:
        PolicyRefused: "policy-closed".
    """
    when, now = policy.when, now or datetime.now(UTC)
    if when is not None and when.closes(now) is None:
        opens = when.opens(now)
        again = "never" if opens is None else f"{opens.astimezone(when.zone):%a %H:%M} ({when.zone.key})"
        raise errors.PolicyRefused("policy-closed", f"outside policy.hours; open again: {again}")


@dataclass(frozen=True)
class Remaining:
    """How long the policy lets a message be worked on.

    Attributes:
        seconds: from now on; infinite where nothing ends it.
        reason: what ends it.
    """

    seconds: float = math.inf
    reason: str = ""


def remaining(policy: schema.PolicyConfig, used: audit.Usage, now: datetime | None = None) -> Remaining:
    """Until ``max_hours`` are used up or the allowed hours are over, whichever is first."""
    now, when = now or datetime.now(UTC), policy.when
    left = Remaining(max(0.0, 3600 * policy.max_hours - used.seconds), "policy-hours")
    if when is None:
        return left
    closes = when.closes(now)
    open_for = 0.0 if closes is None else (closes - now).total_seconds()
    return Remaining(open_for, "policy-closed") if open_for < left.seconds else left


def release(
    policy: schema.PolicyConfig, values: Mapping[str, float], units: int
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Of metrics computed from the images of ``units`` patients those that may leave, and the names of the others."""
    enough = units >= policy.min_units
    free = {name: value for name, value in values.items() if enough and _may_leave(policy, name)}
    return free, tuple(sorted(set(values) - set(free)))


def release_scores(
    policy: schema.PolicyConfig, values: Mapping[str, float], units: int, classes: Mapping[str, int]
) -> dict[str, float]:
    """Of scores those that may leave, rounded; see :func:`release` and :func:`rounded`.

    A class that fewer than ``min_units`` patients have would tell of each of them: neither its own score leaves nor a
    mean over classes that counts it in. Nor does that of a column of which fewer patients have a value.

    Args:
        policy: the site's.
        values: the scores.
        units: patients that they were computed from.
        classes: how many of them have each class, or a value in each column of numbers; nothing that depends on
            classes or columns leaves where this is not known.
    """
    free, _ = release(policy, values, units)
    few = {name for name, count in classes.items() if 0 < count < policy.min_units}
    whole = {
        name: value
        for name, value in free.items()
        if (name not in OVER_CLASSES or (classes and not few))
        and (not name.startswith(OF_CLASS) or _enough(classes, name.partition("_")[2], policy.min_units))
    }
    return {name: rounded(value, units) for name, value in whole.items()}


def _enough(classes: Mapping[str, int], name: str, least: int) -> bool:
    """Whether enough patients have a class and, of a label, enough do not have it."""
    return min(classes.get(name, 0), classes.get(f"{WITHOUT}{name}", least)) >= least


def rounded(value: float, units: int) -> float:
    """A score to the nearest multiple of s / (2 n): n patients, s the least power of two that is no less than it, or 1.

    One patient moves a mean of n scores between 0 and 1 by at most 1 / n, so single images and pixels do not show.
    """
    if not math.isfinite(value):
        return value
    step = 2.0 ** max(0, math.ceil(math.log2(abs(value)) if value else 0)) / (2 * max(1, units))
    return round(value / step) * step


def evaluations(recipe: schema.Recipe) -> int:
    """How many adapters a recipe has a site score: after every ``every`` rounds and the last one, and the test."""
    every = recipe.evaluation.every
    return 1 + (math.ceil(recipe.rounds / every) if every else 0)


def accepting(facts: Facts) -> str:
    """``[policy]`` in TOML that accepts this recipe and no more, for a person to read and paste."""
    recipe = facts.recipe
    return "\n".join(
        [
            "[policy]",
            f"tasks = {_toml([recipe.task.kind])}",
            f"adapters = {_toml([recipe.adapter.kind])}",
            *_licence_lines(facts),
            f"max_rounds = {recipe.rounds}",
            "max_hours = 24.0                 # computing time for this recipe at this site",
            f"max_trainable_parameters = {facts.trainable}",
            f"metrics = {_toml(list(leaving(recipe)))}",
            "min_units = 10                   # patients; no metric leaves that was computed from fewer",
            "min_train_units = 10             # patients; nothing is trained on fewer",
            f"min_sites = {recipe.min_sites}                    # the least that the recipe promises to join",
            *_training_lines(recipe),
            *(["require_secure = true            # no plain update leaves"] if recipe.secure_aggregation else []),
            "",
            "[policy.backbones]",
            f"{_toml(recipe.backbone.name)} = {_toml([facts.backbone_sha256 or SCRATCH])}",
            "",
            "[policy.privacy]",
            f"mechanisms = {_toml([facts.mechanism])}",
            *_epsilon(facts),
            "",
            "[policy.final]",
            'accept = "ask"                   # a person looks at the score and decides',
            "",
        ]
    )


def _licence_lines(facts: Facts) -> list[str]:
    """Of weights whose licence nobody states a list would refuse the recipe."""
    names = licences.of(facts.recipe.backbone).names if facts.backbone_sha256 else ()
    return [f"licences = {_toml(list(names))}  # of the backbone's weights"] if names else []


def _epsilon(facts: Facts) -> list[str]:
    if facts.mechanism == NO_PRIVACY:
        return ["max_epsilon = 0.0"]
    unit = privacy_config.UNITS.get(facts.mechanism, "record")
    unknown = "; what the recipe's noise comes to follows from the data: name the whole site file with --policy"
    return [
        f"max_epsilon = {facts.epsilon or 0.0}  # of the whole run{unknown if facts.epsilon is None else ''}",
        f'# Its rounds are charged to a budget: [privacy] with data_set, epsilon, delta and unit = "{unit}"',
    ]


def _training_lines(recipe: schema.Recipe) -> list[str]:
    if not _bare(recipe):
        return []
    own, least = recipe.optimiser, schema.PolicyConfig().min_batch
    return [f"optimisers = {_toml([own.name])}", f"min_batch = {min(own.batch_size, least)}"]


def _toml(value: str | list[str]) -> str:
    """A TOML string or list of strings; JSON's escapes are TOML's, but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _backbone(policy: schema.PolicyConfig, facts: Facts) -> Verdict:
    name, sha256 = facts.recipe.backbone.name, facts.backbone_sha256 or SCRATCH
    allowed = policy.backbones.get(name, ())
    # Unpinned, the same recipe would run on other weights tomorrow.
    pinned = (facts.recipe.backbone.sha256 or SCRATCH) == sha256
    shown = ", ".join(
        f"{known} ({', '.join(one[:12] for one in hashes)})" for known, hashes in policy.backbones.items()
    )
    asked = f"{name} ({sha256[:12]}{'' if pinned else ', not pinned by the recipe'})"
    return Verdict("backbones", pinned and sha256 in allowed, asked, shown or "none", "policy-backbone")


def _licences(policy: schema.PolicyConfig, facts: Facts) -> list[Verdict]:
    """Only where the policy lists licences. What the recipe states and what is known here must both be on the list."""
    if policy.licences is None or not facts.backbone_sha256:
        return []
    terms = licences.of(facts.recipe.backbone)
    allowed = ", ".join(policy.licences) or "none"
    return [Verdict("licences", terms.taken_by(policy.licences), str(terms), allowed, "policy-licence")]


def _listed(rule: str, asked: str, allowed: tuple[str, ...], reason: str) -> Verdict:
    return Verdict(rule, asked in allowed, asked, ", ".join(allowed) or "none", reason)


def _capped(rule: str, asked: int, most: int, reason: str) -> Verdict:
    return Verdict(rule, asked <= most, f"{asked:,}", f"at most {most:,}" if most else "none", reason)


def _evaluations(policy: schema.PolicyConfig, recipe: schema.Recipe) -> Verdict:
    if policy.max_evaluations is None:
        return Verdict("max_evaluations", True, f"{evaluations(recipe):,}", "one more than max_rounds", "")
    return _capped("max_evaluations", evaluations(recipe), policy.max_evaluations, "policy-evaluations")


def _floor(rule: str, asked: int, least: int, reason: str) -> Verdict:
    return Verdict(rule, asked >= least, f"{asked:,}", f"at least {least:,}", reason)


def _training(policy: schema.PolicyConfig, recipe: schema.Recipe) -> list[Verdict]:
    """How an update is made; under a mechanism that noises it here, however."""
    own = recipe.optimiser
    if not _bare(recipe):
        return []
    return [
        _listed("optimisers", own.name, policy.optimisers, "policy-training"),
        _floor("min_batch", own.batch_size, policy.min_batch, "policy-training"),
    ]


def _secure(policy: schema.PolicyConfig, recipe: schema.Recipe) -> list[Verdict]:
    """Only where the policy asks for it: it adds a line to no review but that of a site which wants it."""
    if not policy.require_secure:
        return []
    asked = "plain updates" if recipe.secure_aggregation is None else "secure aggregation"
    return [
        Verdict("require_secure", recipe.secure_aggregation is not None, asked, "secure aggregation", "policy-secure")
    ]


def _hours(policy: schema.PolicyConfig) -> Verdict:
    allowed = f"stops after {policy.max_hours:g}" if policy.max_hours else "none"
    return Verdict("max_hours", policy.max_hours > 0, "counted while it runs", allowed, "policy-hours")


def _metrics(policy: schema.PolicyConfig, recipe: schema.Recipe) -> Verdict:
    wanted = leaving(recipe)
    over = [name for name in wanted if not _may_leave(policy, name)]
    allowed = ", ".join(policy.metrics) or "none"
    asked = ", ".join(wanted) + (f" (not allowed: {', '.join(over)})" if over else "")
    noise = "" if policy.metrics_epsilon is None else f"; noised, epsilon {policy.metrics_epsilon:g} a score"
    permitted = f"{allowed}; from {policy.min_units} patients on{noise}"
    return Verdict("metrics", not over, asked, permitted, "policy-metrics")


def _may_leave(policy: schema.PolicyConfig, name: str) -> bool:
    return any(name.startswith(one[:-1]) if one.endswith("*") else name == one for one in policy.metrics)


def _privacy(policy: schema.PrivacyPolicy, facts: Facts) -> Verdict:
    plain = facts.mechanism == NO_PRIVACY
    within = plain or (facts.epsilon is not None and facts.epsilon <= policy.max_epsilon)
    asked = facts.mechanism + ("" if facts.epsilon is None else f", epsilon {facts.epsilon:g}")
    allowed = ", ".join(policy.mechanisms) or "no mechanism"
    if any(one != NO_PRIVACY for one in policy.mechanisms):
        allowed += f"; epsilon at most {policy.max_epsilon:g}"
    return Verdict("privacy", within and facts.mechanism in policy.mechanisms, asked, allowed, "policy-privacy")
