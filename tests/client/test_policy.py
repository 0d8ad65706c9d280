"""The policy: nothing is accepted that it does not name, every rule alone can refuse, and only words leave the site."""

from __future__ import annotations

import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.client import recipe_review, site_file
from fedvfm.client.gate import policy
from fedvfm.config import schema
from fedvfm.protocol import protocol
from fedvfm.state import state
from fedvfm.tasks import boxes, detection_metrics, metrics
from fedvfm.trust import locked_recipe

SHA, OTHER = "ab" * 32, "cd" * 32


def make_recipe(**values: Any) -> schema.Recipe:
    base = {"backbone": {"name": "dino", "sha256": SHA}, "data": {"class_names": ["rest", "cell"]}, "rounds": 5}
    return schema.parse(schema.Recipe, {**base, **values}, "recipe")


def facts(**values: Any) -> policy.Facts:
    return policy.Facts(make_recipe(**values), SHA, 1000)


GOOD: dict[str, Any] = {
    "backbones": {"dino": [SHA]},
    "tasks": ["segmentation"],
    "adapters": ["lora"],
    "max_rounds": 5,
    "max_hours": 2.0,
    "max_trainable_parameters": 1000,
    "metrics": list(policy.leaving(make_recipe())),
    "min_units": 4,
    "privacy": {"mechanisms": ["none"]},
}


def make(**values: Any) -> schema.PolicyConfig:
    return schema.parse(schema.PolicyConfig, {**GOOD, **values}, "policy")


def refused(rules: schema.PolicyConfig, what: policy.Facts) -> dict[str, str]:
    return {one.rule: one.reason for one in policy.check(rules, what) if not one.accepted}


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_an_empty_policy_accepts_nothing() -> None:
    for empty in (schema.PolicyConfig(), schema.parse(schema.SiteConfig, SITE, "site").policy):
        assert set(refused(empty, facts())) == {
            "adapters",
            "backbones",
            "max_hours",
            "max_rounds",
            "max_trainable_parameters",
            "metrics",
            "privacy",
            "tasks",
        }


SITE: dict[str, Any] = {"name": "north", "data": {"source": "folder", "path": "x"}}


def test_a_policy_that_names_it_all_accepts() -> None:
    assert refused(make(), facts()) == {}
    policy.require(make(), facts())


RULES: list[tuple[str, dict[str, Any], str]] = [
    ("backbones", {"backbones": {"dino": [OTHER]}}, "policy-backbone"),
    ("backbones", {"backbones": {"other": [SHA]}}, "policy-backbone"),
    ("backbones", {"backbones": {"dino": []}}, "policy-backbone"),
    ("backbones", {"backbones": {"dino": ["scratch"]}}, "policy-backbone"),
    ("licences", {"licences": ["MIT"]}, "policy-licence"),
    ("tasks", {"tasks": ["classification"]}, "policy-task"),
    ("adapters", {"adapters": ["norm", "full"]}, "policy-adapter"),
    ("max_rounds", {"max_rounds": 4}, "policy-rounds"),
    ("max_evaluations", {"max_evaluations": 5}, "policy-evaluations"),
    ("max_hours", {"max_hours": 0.0}, "policy-hours"),
    ("optimisers", {"optimisers": ["sgd"]}, "policy-training"),
    ("min_batch", {"min_batch": 5}, "policy-training"),
    ("min_sites", {"min_sites": 2}, "policy-sites"),
    ("max_trainable_parameters", {"max_trainable_parameters": 999}, "policy-parameters"),
    ("metrics", {"metrics": [name for name in policy.leaving(make_recipe()) if name != "nsd"]}, "policy-metrics"),
    ("metrics", {"metrics": []}, "policy-metrics"),
    ("privacy", {"privacy": {}}, "policy-privacy"),
    ("privacy", {"privacy": {"mechanisms": ["record-level"], "max_epsilon": 8.0}}, "policy-privacy"),
]


@pytest.mark.parametrize(("rule", "change", "reason"), RULES)
def test_every_rule_alone_refuses(rule: str, change: dict[str, Any], reason: str) -> None:
    rules = make(**change)
    assert refused(rules, facts()) == {rule: reason}
    with pytest.raises(errors.PolicyRefused, match=f"{reason}: the policy of this site .*{rule}: asked") as caught:
        policy.require(rules, facts())
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("mechanism", "epsilon", "accepted"),
    [("record-level", 8.0, True), ("record-level", 8.01, False), ("record-level", None, False),
     ("site-level", 1.0, False), ("none", None, False), ("none", 0.0, False)],
)  # fmt: skip
def test_privacy_that_is_demanded(mechanism: str, epsilon: float | None, accepted: bool) -> None:
    rules = make(privacy={"mechanisms": ["record-level"], "max_epsilon": 8.0})
    asked = policy.Facts(make_recipe(), SHA, 1000, mechanism, epsilon)
    assert (refused(rules, asked) == {}) is accepted


def test_privacy_without_a_cap_accepts_no_epsilon() -> None:
    rules = make(privacy={"mechanisms": ["record-level"]})
    assert "privacy" in refused(rules, policy.Facts(make_recipe(), SHA, 1000, "record-level", 0.1))


def test_a_recipe_that_does_not_pin_its_backbone_is_refused() -> None:
    unpinned = policy.Facts(make_recipe(backbone={"name": "dino"}), SHA, 1000)
    assert refused(make(), unpinned) == {"backbones": "policy-backbone"}
    verdict = policy.check(make(), unpinned)[0]
    assert "not pinned by the recipe" in verdict.asked


def test_the_weights_that_are_here_count_and_not_what_the_recipe_says() -> None:
    assert refused(make(), policy.Facts(make_recipe(), OTHER, 1000)) == {"backbones": "policy-backbone"}
    assert refused(make(backbones={"dino": [SHA, OTHER]}), policy.Facts(make_recipe(), OTHER, 1000)) == {
        "backbones": "policy-backbone"
    }


@pytest.mark.parametrize(
    ("name", "stated", "taken"),
    [("dino", "MIT", True), ("dino", "mit", True), ("dino", "CC-BY-NC-4.0", False), ("dino", None, False),
     ("litemedsam", None, False), ("dinov2-small-imgfocus", None, True), ("litemedsam", "MIT", False)],
)  # fmt: skip
def test_licences_that_a_site_takes(name: str, stated: str | None, taken: bool) -> None:
    """What the recipe states and what is known here must both be listed: a statement cannot replace a known one."""
    asked = facts(backbone={"name": name, "sha256": SHA, **({} if stated is None else {"licence": stated})})
    rules = make(licences=["MIT"], backbones={name: [SHA]})
    assert refused(rules, asked) == ({} if taken else {"licences": "policy-licence"})
    assert refused(make(backbones={name: [SHA]}), asked) == {}
    if taken:
        accepted = tomllib.loads(policy.accepting(asked))["policy"]["licences"]
        assert refused(make(licences=accepted, backbones={name: [SHA]}), asked) == {}


def test_weights_from_the_seed_have_no_licence() -> None:
    scratch = policy.Facts(make_recipe(backbone={"name": "unet"}), "", 1000)
    assert refused(make(licences=[], backbones={"unet": ["scratch"]}), scratch) == {}


def test_review_says_who_states_the_licence() -> None:
    sha = {"sha256": SHA, "name": "some/backbone"}

    def said(**backbone: Any) -> str:
        return dict(recipe_review.words(make_lock(backbone=sha | backbone)))["licence"]

    assert said().startswith("neither the recipe nor this machine")
    assert said(licence="CC-BY-ND-4.0") == (
        "CC-BY-ND-4.0 (no-derivatives), says the recipe; nothing is known of it here; "
        "no-derivatives: nothing that is made of the weights may be passed on"
    )
    assert said(name="litemedsam", licence="MIT") == "MIT, says the recipe; Apache-2.0, as known here"


def test_a_backbone_from_scratch_is_named_so() -> None:
    scratch = policy.Facts(make_recipe(backbone={"name": "unet"}), "", 1000)
    assert refused(make(backbones={"unet": ["scratch"]}), scratch) == {}
    assert refused(make(backbones={"unet": [SHA]}), scratch) == {"backbones": "policy-backbone"}


def test_a_star_stands_for_what_begins_so() -> None:
    many = facts(data={"class_names": ["rest", "grey", "white"]})
    assert "dice_grey" in policy.leaving(many.recipe)
    assert refused(make(), many) == {"metrics": "policy-metrics"}
    assert refused(make(metrics=[*GOOD["metrics"], "dice_*"]), many) == {}
    assert refused(make(metrics=["*"]), many) == {}


@pytest.mark.parametrize("surface", [True, False])
@pytest.mark.parametrize("names", [["rest", "cell"], ["rest", "grey", "white"]])
def test_the_metrics_it_foretells_are_those_a_segmentation_reports(surface: bool, names: list[str]) -> None:
    scores = metrics.SegmentationScores(names, surface=surface)
    scores.add("a", np.zeros((4, 4), np.int64), np.zeros((4, 4), np.int64))
    told = policy.leaving(make_recipe(data={"class_names": names}, evaluation={"surface": surface}))
    assert set(told) == set(scores.value()) | set(policy.TRAINING)


def test_the_metrics_it_foretells_are_those_a_classification_reports() -> None:
    scores = metrics.ClassificationScores(["a", "b"])
    for number, row in enumerate(([0.9, 0.1], [0.2, 0.8])):
        scores.add(str(number), np.array(row), number)
    told = policy.leaving(make_recipe(task={"kind": "classification"}))
    assert set(told) == set(scores.value()) | set(policy.TRAINING)


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c"]])
def test_the_metrics_it_foretells_are_those_a_detection_reports(names: list[str]) -> None:
    scores = detection_metrics.DetectionScores(names, 0.3)
    mask = np.arange(len(names)).repeat(4).reshape(-1, 2).repeat(2, axis=1)
    scores.add("a", boxes.of_mask(mask), boxes.of_mask(mask))
    told = policy.leaving(make_recipe(task={"kind": "detection"}, data={"class_names": names}))
    assert set(told) == set(scores.value()) | set(policy.TRAINING)


@pytest.mark.parametrize("own", [{"name": "sgd"}, {"batch_size": 1}])
def test_plain_steps_that_give_images_back_are_refused_where_nobody_says_otherwise(own: dict[str, Any]) -> None:
    asked = facts(optimiser=own)
    rule = "optimisers" if "name" in own else "min_batch"
    assert refused(make(), asked) == {rule: "policy-training"}
    text = policy.accepting(asked)
    found = schema.parse(schema.PolicyConfig, tomllib.loads(text)["policy"], "policy")
    assert refused(found, asked) == {}, "the printed policy accepts its recipe, for a person to read"
    noised = {"mechanism": "record-level", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}
    private = facts(optimiser=own, privacy=noised, aggregation={"weighting": "uniform"})
    assert {rule for rule in refused(make(), private) if rule != "privacy"} == set()


def test_a_promise_of_sites_is_part_of_the_recipe() -> None:
    asked = facts(min_sites=3)
    assert asked.recipe.hash != make_recipe().hash
    assert refused(make(min_sites=3), asked) == refused(make(), asked) == {}
    assert refused(make(min_sites=4), asked) == {"min_sites": "policy-sites"}
    assert "min_sites" not in make_recipe().model_dump_json(), "one that promises nothing is written as it was"
    assert dict(recipe_review.words(make_lock(min_sites=3)))["sites"].startswith("the coordinator promises")


@pytest.mark.parametrize(
    ("units", "images", "word"),
    [(10, 10, ""), (9, 100, "policy-units"), (1, 12, "policy-units"), (10, 4, "policy-training")],
)
def test_few_patients_or_a_single_step_are_not_trained_on(units: int, images: int, word: str) -> None:
    """Of one image and one plain step the update gives the features back; twelve images of one patient are one."""
    if word:
        with pytest.raises(errors.PolicyRefused) as caught:
            policy.require_enough(make(), make_recipe(), units, images)
        assert caught.value.reason == word
    else:
        policy.require_enough(make(), make_recipe(), units, images)
    policy.require_enough(make(min_train_units=1, min_steps=1), make_recipe(), units, images)


def test_a_review_says_that_boxes_are_made_of_masks() -> None:
    told = dict(recipe_review.words(make_lock(task={"kind": "detection"})))
    assert told["task"] == "detection of boxes around cell, from your masks; the background is rest"


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({}, "2 classes: rest, cell"),
        ({"kind": "ordinal"}, "2 grades, the lowest first: rest, cell"),
        ({"kind": "multi-label"}, "2 labels, each there or not, from your table's columns rest, cell"),
        (
            {"kind": "survival", "bins": [6, 12], "units": ["months", "yes"]},
            "the chance of no event up to 6, 12 months, from your table's columns rest, cell (time, event)",
        ),
        ({"kind": "cox", "bins": [6]}, "a risk that orders cases, from your table's columns rest, cell (time, event)"),
        (
            {"kind": "regression", "ranges": [[0, 9], [1, 2]], "centres": [1, 1], "scales": [1, 1]},
            "numbers, from your table's columns rest (0 to 9), cell (1 to 2)",
        ),
    ],
)
def test_who_approves_is_told_what_is_learned(target: dict[str, Any], said: str) -> None:
    told = dict(recipe_review.words(make_lock(task={"kind": "classification"}, target=target)))
    assert told["task"] == f"classification of {said}"


def test_who_approves_is_told_what_of_the_table_is_used() -> None:
    inputs = {"numbers": ["age"], "units": ["years"], "ranges": [[0, 120]], "centres": [60], "scales": [15]}
    own = make_lock(task={"kind": "classification"}, inputs={**inputs, "categories": {"sex": ["F", "M"]}})
    told = dict(recipe_review.words(own))["what of your table is used"]
    assert told.startswith("columns age (0 to 120 years), sex (F, M), beside each image or case")
    assert "no value and no mean of them leaves" in told
    assert "what of your table is used" not in dict(recipe_review.words(make_lock()))


def test_a_person_is_warned_where_a_step_sees_few_patients() -> None:
    told = dict(recipe_review.words(make_lock(optimiser={"batch_size": 2})))["how it learns"]
    assert told.startswith("adamw, learning rate 0.001, steps of 2 images. A step sees few patients")
    assert "few" not in dict(recipe_review.words(make_lock()))["how it learns"]
    assert "warning" in recipe_review.steps_here(make_recipe(), 3, 40)
    assert recipe_review.steps_here(make_recipe(), 20, 40) == (
        "20 patients, 40 images, 10 steps a round of 4 patients or fewer"
    )


# -- policy files ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    name=st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable() or "\x7f" in text),
    rounds=st.integers(1, 1000),
    kind=st.sampled_from(["segmentation", "classification", "other"]),
)
def test_the_printed_policy_accepts_its_recipe_and_no_other(name: str, rounds: int, kind: str) -> None:
    asked = facts(backbone={"name": name, "sha256": SHA}, rounds=rounds, task={"kind": kind})
    found = schema.parse(schema.PolicyConfig, tomllib.loads(policy.accepting(asked))["policy"], "policy")
    assert refused(found, asked) == {}
    for rule, more in (
        ("backbones", facts(backbone={"name": name + "x", "sha256": SHA}, rounds=rounds, task={"kind": kind})),
        ("max_rounds", facts(backbone={"name": name, "sha256": SHA}, rounds=rounds + 1, task={"kind": kind})),
        ("max_trainable_parameters", policy.Facts(asked.recipe, SHA, 1001)),
    ):
        # Of two names one may be known here, with a licence that the other has not.
        also = {"licences"} if rule == "backbones" else set()
        assert {rule} <= refused(found, more).keys() <= {rule} | also


def test_the_policy_of_a_file(tmp_path: Path) -> None:
    def rules(path: Path) -> schema.PolicyConfig:
        found = site_file.read_policy(path)
        return found.policy if isinstance(found, schema.SiteConfig) else found

    path, text = tmp_path / "site.toml", policy.accepting(facts())
    site = '[data]\nsource = "folder"\npath = "x"\n'
    for values in (text, f'name = "north"\n{site}{text}'):
        path.write_text(values)
        assert refused(rules(path), facts()) == {}
    path.write_text(f'name = "north"\n{site}')
    assert len(refused(rules(path), facts())) == 8
    path.write_text("policy = 3")
    with pytest.raises(errors.ConfigError, match=r"policy: must be a table"):
        site_file.read_policy(path)
    path.write_text("[policy]\nmax_round = 3\ntasks = 'all'\nmin_units = 0")
    with pytest.raises(errors.ConfigError, match=r"3 faults(.|\n)*max_round: unknown key.*nearest: 'max_rounds'"):
        site_file.read_policy(path)


# -- messages ----------------------------------------------------------------------------------------------------------


def adapter(value: float) -> state.AdapterState:
    return state.AdapterState({"a": np.full(2, value, np.float32)})


def task(number: int = 1, **values: Any) -> protocol.Task:
    return protocol.Task(make_recipe(evaluation={"surface": False}), number, adapter(number), **values)


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        (protocol.TRAIN, task(6)),
        (protocol.TRAIN, task(-1)),
        (protocol.EVALUATE, task(1, split="val", per_sample=True)),
        (protocol.EVALUATE, task(1, split="val", surface=True)),
        (protocol.EVALUATE, task(1, split="train")),
        (protocol.EVALUATE, task(1, split="../..")),
        (protocol.EVALUATE, task(6, split="test")),
        (protocol.HANDSHAKE, task(0, per_sample=True)),
    ],
)
def test_a_message_that_asks_for_more_than_its_recipe(kind: str, asked: protocol.Task) -> None:
    with pytest.raises(errors.PolicyRefused) as caught:
        policy.check_task(make(), asked, kind, audit.Usage())
    assert caught.value.reason == "policy-message"


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        (protocol.HANDSHAKE, task(0)),
        (protocol.TRAIN, task(1)),
        (protocol.TRAIN, task(5)),
        (protocol.EVALUATE, task(5, split="val")),
        (protocol.EVALUATE, task(5, split="test")),
    ],
)
def test_messages_within_the_recipe(kind: str, asked: protocol.Task) -> None:
    policy.check_task(make(), asked, kind, audit.Usage())


def test_rounds_are_counted_by_recipe_and_base_not_by_run() -> None:
    """The same round from another base is another training; what was kept is none, nor what was trained last."""
    used = audit.Usage(tuple((1, adapter(value).fingerprint) for value in (2.0, 3.0, 4.0, 5.0, 1.0)))
    policy.check_task(make(), task(1), protocol.TRAIN, used)
    early = protocol.Task(make_recipe(), 1, adapter(2.0))
    policy.check_task(make(), early, protocol.TRAIN, used, kept=True)
    with pytest.raises(errors.PolicyRefused, match="policy-rounds: 5 rounds are trained"):
        policy.check_task(make(), early, protocol.TRAIN, used)
    policy.check_task(make(max_rounds=6), early, protocol.TRAIN, used)  # as after a restored backup, where they let it
    with pytest.raises(errors.PolicyRefused, match=r"policy.max_rounds = 6, the recipe has 5"):
        policy.check_task(make(max_rounds=6), task(2), protocol.TRAIN, used)
    for asked in (task(2), protocol.Task(make_recipe(), 1, adapter(9.0)), protocol.Task(make_recipe(), 1)):
        with pytest.raises(errors.PolicyRefused, match=r"5 rounds are trained; policy.max_rounds = 5") as caught:
            policy.check_task(make(), asked, protocol.TRAIN, used)
        assert caught.value.reason == "policy-rounds"
    with pytest.raises(errors.PolicyRefused, match="policy-rounds"):
        policy.check_task(make(), task(0), protocol.TRAIN, audit.Usage())


def test_hours_run_out() -> None:
    policy.check_task(make(), task(1), protocol.TRAIN, audit.Usage(seconds=7199.0))
    with pytest.raises(errors.PolicyRefused, match=r"2.00 hours are used; policy.max_hours = 2") as caught:
        policy.check_task(make(), task(1), protocol.TRAIN, audit.Usage(seconds=7200.0))
    assert caught.value.reason == "policy-hours"


NIGHTS = {"hours": ["mon-fri 19:00-06:00"], "time_zone": "UTC"}
MONDAY_NOON, MONDAY_NIGHT = (datetime(2026, 11, 23, hour, tzinfo=UTC) for hour in (12, 23))


@pytest.mark.parametrize(
    ("kind", "asked"),
    [(protocol.HANDSHAKE, task(0)), (protocol.TRAIN, task(1)), (protocol.EVALUATE, task(1, split="val"))],
)
def test_outside_its_hours_a_site_computes_nothing(kind: str, asked: protocol.Task) -> None:
    policy.check_task(make(**NIGHTS), asked, kind, audit.Usage(), MONDAY_NIGHT)
    for hours in (NIGHTS, {"hours": [], "time_zone": "UTC"}):
        with pytest.raises(
            errors.PolicyRefused, match=r"outside policy.hours; open again: (Mon 19:00|never)"
        ) as caught:
            policy.check_task(make(**hours), asked, kind, audit.Usage(), MONDAY_NOON)
        assert caught.value.reason == "policy-closed"


def test_outside_its_hours_a_site_still_repeats_itself() -> None:
    used = audit.Usage(((1, adapter(1).fingerprint),))
    policy.check_task(make(**NIGHTS), task(1), protocol.TRAIN, used, MONDAY_NOON, kept=True)
    with pytest.raises(errors.PolicyRefused, match="policy-closed"):  # killed before it was kept: it would be trained
        policy.check_task(make(**NIGHTS), task(1), protocol.TRAIN, used, MONDAY_NOON)


def test_one_score_for_each_round_and_split_and_one_test_in_all() -> None:
    val, test = task(2, split="val"), task(5, split="test")
    given = audit.Usage(evaluated=((2, "val", val.state.fingerprint),), answered=frozenset({(2, "val")}))  # type: ignore[union-attr]
    policy.check_task(make(), val, protocol.EVALUATE, given, kept=True)
    policy.check_task(make(), task(2, split="test"), protocol.EVALUATE, given)
    other = protocol.Task(make_recipe(evaluation={"surface": False}), 2, adapter(9.0), split="val")
    for asked in (val, other):
        with pytest.raises(errors.PolicyRefused, match="policy-evaluations: a score on val of round 2 left already"):
            policy.check_task(make(), asked, protocol.EVALUATE, given)
    tested = audit.Usage(answered=frozenset({(4, "test")}))
    with pytest.raises(errors.PolicyRefused, match="or another round was tested"):
        policy.check_task(make(), test, protocol.EVALUATE, tested)
    never = protocol.Task(make_recipe(evaluation={"surface": False, "every": 0}), 2, adapter(2), split="val")
    with pytest.raises(errors.PolicyRefused, match="policy-message: the recipe never validates"):
        policy.check_task(make(), never, protocol.EVALUATE, audit.Usage())


def test_scores_are_counted_by_adapter() -> None:
    scored = audit.Usage(evaluated=((1, "val", adapter(1.0).fingerprint), (2, "val", adapter(2.0).fingerprint)))
    policy.check_task(make(), task(3, split="val"), protocol.EVALUATE, scored)
    policy.check_task(make(max_evaluations=2), task(2, split="val"), protocol.EVALUATE, scored)  # killed before it left
    with pytest.raises(errors.PolicyRefused, match=r"2 adapters are scored; policy.max_evaluations = 2") as caught:
        policy.check_task(make(max_evaluations=2), task(3, split="val"), protocol.EVALUATE, scored)
    assert caught.value.reason == "policy-evaluations"
    assert make().most_evaluations == 6, "one more than rounds: the test"
    assert policy.evaluations(make_recipe(evaluation={"every": 2})) == 4
    rare = make_recipe(rounds=10, evaluation={"surface": False, "every": 4})
    for number in (1, 4, 8, 10):  # the first one too: it is the last where a coordinator ends there
        asked = protocol.Task(rare, number, adapter(number), split="val")
        policy.check_task(make(), asked, protocol.EVALUATE, audit.Usage())
    for number in (2, 3, 5, 9):
        asked = protocol.Task(rare, number, adapter(number), split="val")
        with pytest.raises(errors.PolicyRefused, match="validates after every 4 rounds") as caught:
            policy.check_task(make(), asked, protocol.EVALUATE, audit.Usage())
        assert caught.value.reason == "policy-message"
    assert policy.evaluations(make_recipe(evaluation={"every": 0})) == 1


def test_how_long_a_message_may_be_worked_on() -> None:
    none, some = audit.Usage(), audit.Usage(seconds=7000.0)
    assert policy.remaining(make(), some) == policy.Remaining(200.0, "policy-hours")
    assert policy.remaining(make(**NIGHTS), none, MONDAY_NOON) == policy.Remaining(0.0, "policy-closed")
    assert policy.remaining(make(**NIGHTS), some, MONDAY_NIGHT) == policy.Remaining(200.0, "policy-hours")
    late = datetime(2026, 11, 24, 5, 59, tzinfo=UTC)
    assert policy.remaining(make(**NIGHTS), none, late) == policy.Remaining(60.0, "policy-closed")
    assert policy.remaining(make(max_hours=0.0), none).seconds == 0.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hours": ["mon 01:00-02:00"]}, r'state the zone of the hours: time_zone = "Europe/Berlin"'),
        ({"hours": ["night"], "time_zone": "UTC"}, "'night': write days and times as"),
        ({"time_zone": "UTC"}, "time_zone is that of hours, which are not given"),
        ({"final": {"accept": "score"}}, "goes with min_score, max_drop or both"),
        ({"final": {"accept": "always", "min_score": 0.5}}, "and they with no other"),
        ({"final": {"accept": "score", "min_score": 1.5}}, "min_score = 1.5"),
        ({"final": {"min_scor": 1}}, "nearest: 'min_score'"),
    ],
)
def test_hours_and_final_of_a_form_that_is_none(values: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.ConfigError, match=words):
        make(**values)


def test_usage_comes_from_the_audit_log(tmp_path: Path) -> None:
    log = audit.Audit(tmp_path / "audit.jsonl", "north", "site")
    base = {"recipe": SHA, "fingerprint": OTHER, "examples": 3, "seconds": 2.5}
    for number, start in ((1, SHA), (1, SHA), (1, OTHER), (2, SHA)):
        log.record("trained", round=number, base=start, **base)
    log.record("evaluated", round=1, split="val", **base)
    log.record("trained", round=1, base=SHA, **{**base, "recipe": OTHER})
    log.record("sent", kind="refusal", recipe=SHA, bytes=3, reason="deadline", seconds=100.0)
    used = audit.usage(log.entries, SHA)
    assert used.trained == ((1, SHA), (1, OTHER), (2, SHA))
    log.record("trained", round=1, base=SHA, **base)
    assert len(audit.usage(log.entries, SHA).trained) == 4, "an earlier one trained anew is one more"
    assert used.seconds == 112.5, "what broke off at the coordinator's deadline was computed too"
    assert (used.evaluated, used.answered) == (((1, "val", OTHER),), frozenset())
    log.record("sent", kind="evaluate", recipe=SHA, bytes=3, split="val", round=1)
    assert audit.usage(log.entries, SHA).answered == {(1, "val")}


def test_only_what_the_policy_names_leaves_and_not_from_few_patients() -> None:
    values = {"dice": 0.5, "secret": 1.0, "dice_tumour": 0.4}
    assert policy.release(make(), values, 4) == ({"dice": 0.5}, ("dice_tumour", "secret"))
    assert policy.release(make(), values, 3) == ({}, ("dice", "dice_tumour", "secret"))
    assert policy.release(schema.PolicyConfig(), values, 1000)[0] == {}


def test_no_score_tells_of_a_class_that_few_patients_have() -> None:
    rules = make(metrics=["*"])
    values = {"dice": 0.5, "dice_tumour": 0.5, "dice_edema": 0.5, "balanced_accuracy": 0.5, "brier": 0.5}
    known = policy.release_scores(rules, values, 10, {"tumour": 4, "edema": 3})
    assert set(known) == {"dice", "dice_tumour", "brier"}
    assert set(policy.release_scores(rules, values, 10, {"tumour": 4, "edema": 4})) == set(values)
    assert set(policy.release_scores(rules, values, 10, {})) == {"dice", "brier"}, "unknown, it counts as rare"


@pytest.mark.parametrize(
    ("value", "units", "told"),
    [(0.5123, 10, 0.5), (0.53, 10, 0.55), (0.0, 10, 0.0), (1.0, 10, 1.0), (0.999, 10, 1.0), (13.2, 10, 12.8),
     (1.3, 4, 1.25), (-0.26, 2, -0.25), (0.51234567, 500, 0.512)],
)  # fmt: skip
def test_scores_are_rounded_by_the_number_of_patients(value: float, units: int, told: float) -> None:
    assert policy.rounded(value, units) == pytest.approx(told, abs=1e-12)
    assert policy.rounded(policy.rounded(value, units), units) == policy.rounded(value, units)


# -- what the coordinator learns ---------------------------------------------------------------------------------------


def test_a_refusal_is_a_word_and_a_code() -> None:
    words = {reason for _, _, reason in RULES} | {"policy-message", "approval-pending", "policy-units"}
    assert words <= set(protocol.ERROR_CODES)
    assert len(set(protocol.ERROR_CODES.values())) == len(protocol.ERROR_CODES)
    for word in words:
        answer = protocol.refusal(errors.PolicyRefused(word, "patient Smith, /data/smith.png"))
        assert (answer.code, answer.reason) == (protocol.ERROR_CODES[word], word)
    assert protocol.refusal(errors.PolicyRefused("patient Smith", "x")).reason == "refused"


def make_lock(**values: Any) -> locked_recipe.LockedRecipe:
    rows = state.Manifest.of([state.ArraySpec("a", (10, 100), "lora"), state.ArraySpec("head.b", (2,), "head")])
    initial = state.AdapterState({spec.name: np.zeros(spec.shape, np.float32) for spec in rows})
    return locked_recipe.LockedRecipe.of(make_recipe(**values), rows, initial, SHA, 12345)


def test_the_plain_words_say_what_leaves() -> None:
    told = dict(recipe_review.words(make_lock()))
    assert told["leaves each round"].startswith("1,002 trained numbers (0.00 MB)")
    assert told["what trains"] == "adapter 'lora' and head: 1,002 numbers (2 in head, 1,000 in lora)"
    assert "dice" in told["metrics that leave"]
    assert told["privacy"].startswith("none: no differential privacy")
    assert "12,345 frozen numbers" in told["backbone"]
    assert told["how long"].startswith("5 rounds of 1 pass over")


def test_foreign_names_cannot_dress_up_the_review() -> None:
    evil = make_lock(data={"class_names": ["rest", "x\x1b[2K\raccepts everything\u202e"], "modality": "\n  accepts"})
    text = "".join(sentence for _, sentence in recipe_review.words(evil))
    assert text.isprintable()
    with pytest.raises(errors.PolicyRefused) as caught:
        policy.require(make(), policy.Facts(make_recipe(backbone={"name": "a\x1b[2J", "sha256": SHA}), SHA, 1))
    assert str(caught.value).isprintable()


def test_facts_of_a_lock() -> None:
    found = policy.Facts.of(make_lock())
    assert (found.backbone_sha256, found.trainable, found.mechanism, found.epsilon) == (SHA, 1002, "none", None)
    assert recipe_review.to_json(make_lock(), None)["accepted"] is None
    assert recipe_review.to_json(make_lock(), policy.check(make(), found))["accepted"] is False
