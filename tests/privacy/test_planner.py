"""The planner, the configuration, and that nothing is trained without the privacy a recipe asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedvfm import errors, registry
from fedvfm.client import recipe_review
from fedvfm.client.gate import policy
from fedvfm.config import privacy as privacy_config
from fedvfm.config import schema
from fedvfm.ledger import ledger
from fedvfm.model import adapted_model
from fedvfm.privacy import accountant, base, planner, records, table
from fedvfm.trust import keys, signed_documents
from tests.privacy import releases

RECIPE: dict[str, Any] = {
    "backbone": {"name": "unet"},
    "adapter": {"kind": "full"},
    "data": {"class_names": ["background", "disc"], "input_size": [32, 32]},
    "rounds": 10,
    "optimiser": {"batch_size": 4},
}
PRIVATE = {"mechanism": "record-level", "clip": 1.0, "noise_multiplier": 1.1, "delta": 1e-5}


def recipe(**tables: Any) -> schema.Recipe:
    return schema.parse(schema.Recipe, {**RECIPE, **tables}, "recipe")


# -- configuration -----------------------------------------------------------------------------------------------------


def test_a_recipe_without_privacy_has_the_hash_it_always_had() -> None:
    made = recipe(precision="float32", threads=2)  # the defaults of the release before there were such keys
    assert made.hash == "ea2825da7d4772ee2e029edba1ff54b9a0a3c300bc3dfadf93d3369b63bde9b3"
    assert recipe(privacy={}, precision="float32", threads=2).hash == made.hash
    assert recipe(privacy={"mechanism": "none"}, precision="float32", threads=2).hash == made.hash
    assert schema.parse(schema.Recipe, made.model_dump(mode="json"), "again").hash == made.hash


def test_privacy_is_part_of_a_private_recipe_s_hash() -> None:
    hashes = {recipe(privacy=PRIVATE | more).hash for more in ({}, {"clip": 2.0}, {"delta": 1e-6}, {"microbatch": 2})}
    assert len(hashes | {recipe().hash}) == 5


@pytest.mark.parametrize(
    ("privacy", "said"),
    [
        ({"mechanism": "none", "clip": 1.0}, "clip: mechanism is 'none', nothing is private"),
        ({"microbatch": 2}, "microbatch: mechanism is 'none'"),
        ({"mechanism": "record-level"}, "a mechanism needs clip, delta, and either noise_multiplier or epsilon"),
        ({**PRIVATE, "epsilon": 8.0}, "either noise_multiplier or epsilon"),
        ({**PRIVATE, "delta": 1.0}, "privacy.delta = 1.0"),
        ({**PRIVATE, "sampling": "shuffle"}, "privacy.sampling = 'shuffle'"),
        ({**PRIVATE, "noise": 1.0}, "privacy.noise: unknown key"),
    ],
)
def test_faults_of_a_recipe_s_privacy(privacy: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        recipe(privacy=privacy)
    assert said in str(caught.value)


def test_a_site_s_budget() -> None:
    own = {"data_set": "nuclei", "epsilon": 8.0, "delta": 1e-5, "unit": "patient"}
    site = {"name": "north", "data": {"source": "folder"}}
    made = schema.parse(schema.SiteConfig, {**site, "privacy": own}, "site")
    assert made.privacy is not None
    assert (made.privacy.accountant, made.privacy.ledger) == ("rdp", "fedvfm-ledger")
    assert schema.parse(schema.SiteConfig, site, "site").privacy is None
    for wrong in ({"unit": "scan"}, {"delta": 0.0}, {"epsilon": 0.0}, {"data_set": "Mr Smith"}, {"accountant": "gdp"}):
        with pytest.raises(errors.ConfigError, match=rf"privacy\.{next(iter(wrong))}"):
            schema.parse(schema.SiteConfig, {**site, "privacy": {**own, **wrong}}, "site")


# -- nothing is trained without its mechanism --------------------------------------------------------------------------


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> str:
    """A mechanism that can be planned and not trained with, whichever are built."""
    monkeypatch.setattr(
        table, "TABLE", registry.Table("privacy mechanism", {"none": "fedvfm.privacy.base:NoMechanism"})
    )
    return "record-level"


def test_a_mechanism_that_is_not_there_is_refused_and_never_left_out(unbuilt: str) -> None:
    wanted = recipe(privacy=PRIVATE | {"mechanism": unbuilt})
    (fault,) = adapted_model.examine(wanted)[1]
    assert fault.startswith("recipe.privacy.mechanism = 'record-level': this release can plan it")
    with pytest.raises(errors.ConfigError, match="does not train without what a recipe asks for"):
        adapted_model.AdaptedModel(wanted, with_weights=False)
    assert adapted_model.examine(recipe(privacy=PRIVATE | {"mechanism": "recordlevel"}))[1][0].startswith(
        "recipe.privacy.mechanism: unknown privacy mechanism 'recordlevel'; known: none"
    )
    assert adapted_model.examine(recipe())[1] == []


def test_no_mechanism_does_nothing() -> None:
    made: base.Mechanism = table.TABLE.get("none")()
    assert (made.site(), made.server(), made.event(privacy_config.NONE, 1.0, 10, 2, 1)) == (None, None, None)


def test_the_policy_judges_mechanism_and_epsilon(make_private_lock: Callable[..., Any]) -> None:
    rules = schema.PolicyConfig(privacy={"mechanisms": ["record-level"], "max_epsilon": 8.0})  # type: ignore[arg-type]

    def verdict(units: int | None = None, **privacy: Any) -> policy.Verdict:
        facts = policy.Facts.of(make_private_lock(privacy=privacy), units)
        return next(one for one in policy.check(rules, facts) if one.rule == "privacy")

    assert not verdict().accepted
    wanted = {"mechanism": "record-level", "clip": 1.0, "delta": 1e-5}
    assert verdict(**wanted, epsilon=8.0).accepted
    assert not verdict(**wanted, epsilon=8.1).accepted
    assert not verdict(**wanted | {"mechanism": "site-level"}, epsilon=1.0).accepted
    assert not verdict(**wanted, noise_multiplier=2.0).accepted, "without a count there is no epsilon to accept"
    assert verdict(1000, **wanted, noise_multiplier=2.0).accepted
    said = dict(recipe_review.words(make_private_lock(privacy={**wanted, "epsilon": 8.0})))["privacy"]
    assert said.startswith("record-level: epsilon 8 in all, delta 1e-05, clip 1")
    few = verdict(10, **wanted, noise_multiplier=1.0)
    assert (few.accepted, few.reason) == (False, "policy-privacy")


# -- the planner -------------------------------------------------------------------------------------------------------


def ask(**values: Any) -> planner.Plan:
    given = {"mechanism": "record-level", "unit": "record", "units": 300, "batch": 8, "steps": 500, "delta": 1e-5}
    return planner.plan(planner.Question(**{**given, **values}))


def test_noise_from_epsilon_and_back() -> None:
    made = ask(epsilon=3.5)
    assert made.noise_multiplier == pytest.approx(1.1, abs=0.01)
    assert ask(noise_multiplier=made.noise_multiplier).epsilons["rdp"].value == pytest.approx(3.5, abs=0.02)


def test_six_sites_are_hopeless_and_told() -> None:
    made = ask(
        mechanism="site-level", unit="site", units=6, batch=6, steps=50, epsilon=8.0, numbers={"both factors": 147_456}
    )
    assert made.noise_multiplier == pytest.approx(4.5, abs=0.02)
    assert made.signals[0].step == pytest.approx(289, abs=1)
    assert made.verdict == "hopeless"
    assert any("site-level privacy with 6 sites" in one for one in made.warnings)
    assert any(one.startswith("hopeless: a step's noise is 288.6 clips") for one in made.warnings)


def test_a_small_site_is_warned_and_freezing_a_factor_helps_by_the_root_of_two() -> None:
    ways = {"both factors": 20_000, "freeze-A": 10_000, "alternate": 10_000}
    made = ask(units=40, steps=200, noise_multiplier=1.1, numbers=ways)
    assert made.epsilons["rdp"].value == pytest.approx(19.84, abs=0.01)
    assert any("epsilon 19.84 promises little" in one for one in made.warnings)
    both, frozen, alternate = made.signals
    assert both.step == pytest.approx(1.1 * np.sqrt(20_000) / 8)
    assert both.step / frozen.step == pytest.approx(np.sqrt(2)) == both.step / alternate.step
    assert both.run == pytest.approx(both.step / np.sqrt(200))


def test_a_large_site_is_fair_and_a_large_delta_is_not() -> None:
    made = ask(units=50_000, batch=512, steps=3000, epsilon=8.0, numbers={"all that trains": 5_000})
    assert (made.verdict, made.warnings) == ("fair", ())
    assert "is not below 1 / 300 records" in ask(delta=0.01, epsilon=1.0).warnings[0]


def test_what_cannot_be_reached_is_said() -> None:
    made = ask(epsilon=0.5, before=accountant.steps(0.1, 1.1, 100))
    assert (made.noise_multiplier, made.verdict) == (None, "hopeless")
    assert "no noise reaches epsilon 0.5" in made.warnings[0]
    json.dumps(made.as_json(), allow_nan=False)


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (root / "data" / part).mkdir(parents=True)
    rows = ["id,patient"]
    for number in range(24):
        image = rng.integers(0, 255, (32, 32), dtype=np.uint8)
        Image.fromarray(image).save(root / "data" / "images" / f"i{number:02d}.png")
        Image.fromarray((image > 128).astype(np.uint8)).save(root / "data" / "masks" / f"i{number:02d}.png")
        rows.append(f"i{number:02d},p{number // 2}")
    (root / "data" / "index.csv").write_text("\n".join(rows) + "\n")
    (root / "recipe.toml").write_text(
        'rounds = 10\n[backbone]\nname = "unet"\n[adapter]\nkind = "full"\n[optimiser]\nbatch_size = 4\n'
        '[data]\nclass_names = ["background", "disc"]\ninput_size = [32, 32]\n'
        '[privacy]\nmechanism = "patient-level"\nclip = 1.0\nepsilon = 6.0\ndelta = 1e-4\n'
    )
    (root / "site.toml").write_text(
        'name = "north"\n[data]\nsource = "folder"\npath = "data"\n[data.options]\n'
        'class_names = ["background", "disc"]\nmask_values = [0, 1]\n'
        '[privacy]\ndata_set = "discs"\nepsilon = 8.0\ndelta = 1e-4\nunit = "patient"\n'
    )
    return root


def test_plan_counts_the_site_s_own_patients_and_what_they_spent(files: Path, cli: Any) -> None:
    code, out, err = cli("privacy", "plan", files / "recipe.toml", files / "site.toml", "--json")
    assert code == 0, err
    made = json.loads(out)
    assert (made["mechanism"], made["unit"], made["batch"]) == ("patient-level", "patient", 4)
    assert 4 <= made["units"] < 12
    assert made["epsilons"]["rdp"]["epsilon"] <= 6.0
    assert made["verdict"] == "hopeless"
    assert made["signals"][0]["numbers"] > 10_000
    before = made["noise_multiplier"]
    assert made["epsilons"]["rdp"]["epsilon"] > 5.5
    budget = privacy_config.Budget(data_set="discs", epsilon=8.0, delta=1e-4, unit="patient")
    book = ledger.Ledger(files / "fedvfm-ledger", "north", "patient")
    event = base.PrivacyEvent("patient-level", "patient", 1.5, 0.3, 10, 1.0)
    one = ledger.Claim("ab" * 32, 1, "cd" * 32, event, [f"patient p{number}" for number in range(12)])
    book.charge(one, budget, "ef" * 32)
    code, out, _ = cli("privacy", "plan", files / "recipe.toml", files / "site.toml", "--json")
    assert (code, json.loads(out)["noise_multiplier"] > before) == (0, True)
    code, out, _ = cli("ledger", "show", files / "site.toml")
    assert code == 0
    assert "data set discs: epsilon" in out
    assert "of 8.00 (patient level, delta 0.0001, rdp), 1 release" in out


def test_plan_in_words_without_a_site(files: Path, cli: Any) -> None:
    code, out, _ = cli("privacy", "plan", files / "recipe.toml", "--sites", "6", "--epsilon", "8", "--rounds", "50")
    assert code == 0
    assert "site-level: 6 sites" in out
    assert "warning: site-level privacy with 6 sites" in out
    assert "not covered: metrics" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "recipe.toml"], "how many there are to draw from is not known; give SITE.toml or --samples"),
        (["plan", "recipe.toml", "--samples", "9", "--noise", "1", "--epsilon", "1"], "--epsilon or --noise, not both"),
        (["plan", "recipe.toml", "--samples", "9", "--delta", "2"], "--delta 2: give a number above 0 and below 1"),
        (["plan", "recipe.toml", "--samples", "9", "--mechanism", "dp"], "mechanism 'dp': known: record-level"),
        (["plan", "recipe.toml", "--samples", "9", "--accountant", "gdp"], "'gdp': give rdp, pld or both"),
        (["plan", "nowhere.toml", "--samples", "9"], "cannot be read"),
        (["epsilon", "--noise", "-1", "--samples", "9", "--batch", "3", "--steps", "9", "--delta", "1e-5"], "above 0"),
    ],
)
def test_bad_questions(files: Path, cli: Any, arguments: list[str], said: str) -> None:
    code, _, err = cli("privacy", *[files / one if one.endswith(".toml") else one for one in arguments])
    assert code == 2
    assert said in err


def test_epsilon_of_a_noise(cli: Any) -> None:
    given = ["--noise", "1.1", "--samples", "300", "--batch", "8", "--steps", "500", "--delta", "1e-5"]
    assert "epsilon 3.495 at delta 1e-05 (rdp, rate 0.02667, 500 steps)" in cli("privacy", "epsilon", *given)[1]
    code, out, _ = cli("privacy", "epsilon", *given, "--accountant", "both", "--json")
    found = json.loads(out)["epsilons"]
    assert code == 0
    assert found["pld"]["epsilon"] < found["rdp"]["epsilon"] == pytest.approx(3.495, abs=1e-3)


def test_the_ledger_s_verbs(tmp_path: Path, cli: Any) -> None:
    folder, state = tmp_path / "ledger", tmp_path / "state"
    state.mkdir()
    private = keys.make()
    keys.write_private(state / "site.key", private)
    (state / "site.pub").write_text(keys.public_text(private) + "\n")
    book = ledger.Ledger(folder, "north", "record")
    for number in (1, 2):
        book.charge(releases.claim(number), releases.budget(), f"{number:064d}")
    receipt = tmp_path / "receipt.json"
    code, out, _ = cli("ledger", "receipt", folder, "-o", receipt, "--state", state, "--with-spending", "--json")
    assert (code, json.loads(out)["length"]) == (0, 3)
    assert signed_documents.format_of(receipt.read_bytes()) == "fedvfm-ledger-receipt-1"
    with_key = ["--against", receipt, "--key", state / "site.pub"]
    assert cli("ledger", "verify", folder, *with_key)[0] == 0
    lines = (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_bytes(b"".join(lines[:2]))
    code, _, err = cli("ledger", "verify", folder, *with_key)
    assert (code, "truncated or rolled back" in err) == (14, True)
    assert cli("ledger", "verify", folder)[0] == 16, "it waits"
    assert "nothing is charged" in cli("ledger", "show", folder)[1]
    code, out, _ = cli("ledger", "reconcile", folder, *with_key, "--json")
    assert (code, json.loads(out)["adopted"], json.loads(out)["unknown"]) == (0, 1, False)
    assert "nothing to reconcile" in cli("ledger", "reconcile", folder, *with_key)[1]
    code, out, _ = cli("ledger", "show", folder, "--json")
    assert json.loads(out)["data_sets"][0]["epsilon"] == pytest.approx(releases.AFTER[2], abs=1e-3)
    assert cli("ledger", "show", tmp_path / "nowhere")[0] == 14


def test_names_of_records_stay_when_a_file_is_added_though_numbers_shift(files: Path, tmp_path: Path) -> None:
    """Else every image would be another record, with a fresh budget."""
    import shutil

    from fedvfm.data import labels
    from fedvfm.data.sources import table as sources

    folder = tmp_path / "data"
    shutil.copytree(files / "data", folder)
    settings = schema.SourceConfig(
        source="folder", path=str(folder), options={"class_names": ["background", "disc"], "mask_values": [0, 1]}
    )

    def names(unit: str) -> tuple[set[str], set[str]]:
        source = labels.mapped(sources.make(settings, recipe().data), {}, ("background", "disc"))
        own = source.samples()
        return {one.id for one in own[:5]}, set(records.ids(unit, own, source))

    ids, before = names("record")
    _, patients = names("patient")
    for part in ("images", "masks"):
        shutil.copy(folder / part / "i00.png", folder / part / "a-new-one.png")
    table_file = folder / "index.csv"
    table_file.write_text(table_file.read_text() + "a-new-one,p-new\n")
    assert names("record")[0] == ids, "the numbers are the same, of other images"
    assert names("record")[1] - before == {"sample a-new-one 0"}
    assert names("patient")[1] - patients == {"patient p-new"}
    assert len(patients) == 12
