"""A command reads recipe and site file once, lists the data once, and builds one model of shapes and one of weights.

The shapes (on the meta device: no weights, no memory) are the check of the recipe, and what it is locked to: whoever
only reviews or plans must not load weights for it. So 1 and 1 is the least that a command which trains can do.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.client import privacy_report, site_file
from fedvfm.client import state_folder as joining
from fedvfm.client.gate import policy
from fedvfm.config import schema
from fedvfm.model import adapted_model, locking
from fedvfm.server import state_folder as enrolment
from fedvfm.trust import recipes

REAL, META = "models", "models of shapes"
MECHANISM = {"mechanism": "record-level", "noise_multiplier": 1.0, "clip": 0.5, "delta": 1e-5}
BUDGET = '\n[privacy]\nledger = "ledger"\ndata_set = "discs"\nepsilon = 1e6\ndelta = 1e-5\nunit = "record"\n'

_counted: Counter[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _counted is not None and event == "open" and isinstance(arguments[0], str | Path):
        _counted[str(arguments[0])] += 1


sys.addaudithook(_note)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each file was opened, by its path, and how many models were built."""
    global _counted
    build = adapted_model.AdaptedModel.__init__
    made: Counter[str] = Counter()

    def count(self: adapted_model.AdaptedModel, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        made[META if self.device == "meta" else REAL] += 1

    monkeypatch.setattr(adapted_model.AdaptedModel, "__init__", count)
    yield made
    _counted = None


def counting(made: Counter[str]) -> None:
    """From now on."""
    global _counted
    made.clear()
    _counted = made


@pytest.fixture(params=["plain", "private"])
def site(request: pytest.FixtureRequest, tiny: Any, tmp_path: Path) -> joining.State:
    """A site that joined, with ``site.toml`` beside its folder."""
    recipe, private = recipes.written(tiny.experiment), request.param == "private"
    if private:
        values = recipe.model_dump(exclude={"privacy", "aggregation"})
        recipe = schema.Recipe.model_validate({**values, "privacy": MECHANISM, "aggregation": {"weighting": "uniform"}})
    locked = locking.make(recipe)
    plan = enrolment.Plan("trial", "127.0.0.1:9", (), ("east",))
    server = enrolment.init(tmp_path / "server", plan, locked)
    invite = joining.read_invite(server.invite_path("east"), server.fingerprint())
    file, text = tmp_path / "site.toml", tiny.site("east")
    file.write_text(text + BUDGET * private)
    rules = policy.accepting(privacy_report.judge(locked, site_file.read_site(file)).facts)
    rules = rules.replace("min_train_units = 10", "min_train_units = 1")
    file.write_text(text + rules + BUDGET * private)
    return joining.join(tmp_path / "east", invite, locked.hash)


@pytest.mark.parametrize("workers", [1, 2])
def test_simulate(tiny: Any, cli: Any, counts: Counter[str], tmp_path: Path, workers: int) -> None:
    counting(counts)
    arguments = ("--set", "baselines=[]", "--rounds", "1", "--workers", workers, "--output", tmp_path / "run")
    answer = cli("simulate", tiny.experiment, *arguments)
    assert answer.code == 0, answer.err
    assert counts[str(tiny.experiment)] == 1
    assert counts[str(tiny.data / "index.csv")] == 1
    assert counts[REAL] == 1, "locked, trained and shown in the report; with two workers forked, not built again"
    # How many workers have room is forecast from the shapes of the model that they share, by an engine that gets none.
    assert counts[META] == workers


def test_rehearse(tiny: Any, cli: Any, site: joining.State, counts: Counter[str], tmp_path: Path) -> None:
    """The recipe is one that came from elsewhere: the site builds its shapes itself."""
    (recipe,) = site.approvals.stand()
    counting(counts)
    answer = cli("client", "rehearse", tmp_path / "site.toml", "--state", site.folder)
    assert answer.code == 0, answer.err
    private = "privacy:" in answer.out
    assert counts[str(site.recipe_path(recipe))] == 1
    assert counts[str(tmp_path / "site.toml")] == 1
    assert counts[str(tiny.data / "index.csv")] == 1
    assert counts[REAL] == 1
    # Under a mechanism layers are looked at before the data is counted, by a person's command; the gate, which judges
    # every message by itself, trusts nothing that came before it.
    assert counts[META] == 1 + private


def test_rehearse_a_recipe_of_ones_own(tiny: Any, cli: Any, site: joining.State, counts: Any, tmp_path: Path) -> None:
    private = "[privacy]" in (tmp_path / "site.toml").read_text()
    counting(counts)
    answer = cli("client", "rehearse", tmp_path / "site.toml", "--recipe", tiny.experiment)
    assert answer.code == (errors.PolicyRefused.exit_code if private else 0), answer.err
    found = [counts[str(path)] for path in (tiny.experiment, tmp_path / "site.toml", tiny.data / "index.csv")]
    # A site that counts privacy refuses a plain recipe before it lists anything.
    assert (*found, counts[META], counts[REAL]) == ((1, 1, 0, 1, 0) if private else (1, 1, 1, 1, 1))


def test_doctor(tiny: Any, cli: Any, site: joining.State, counts: Counter[str], tmp_path: Path) -> None:
    (recipe,) = site.approvals.stand()
    counting(counts)
    answer = cli("doctor", "client", tmp_path / "site.toml", "--state", site.folder, "--json")
    checks = {row["check"]: row["severity"] for row in json.loads(answer.out)["rows"]}
    assert {checks["policy"], checks["backbone"]} == {"ok"}, answer.out
    files = (site.recipe_path(recipe), tmp_path / "site.toml", tiny.data / "index.csv")
    assert [counts[str(path)] for path in files] == [1, 1, 1]
    assert (counts[META], counts[REAL]) == (1, 1)


def test_review_and_join_list_the_data_once(
    tiny: Any, cli: Any, site: joining.State, counts: Counter[str], tmp_path: Path
) -> None:
    (recipe,) = site.approvals.stand()
    private = "[privacy]" in (tmp_path / "site.toml").read_text()
    invite = tmp_path / "server" / "invites" / "east.invite.json"
    fingerprint = enrolment.open_state(tmp_path / "server").fingerprint()
    join = ("client", "join", invite, "--fingerprint", fingerprint, "--approve", recipe, "--state", tmp_path / "again")
    for command, opened in (
        (("client", "review", recipe, "--state", site.folder), site.recipe_path(recipe)),
        (join, invite),
    ):
        counting(counts)
        answer = cli(*command, "--data", tmp_path / "site.toml")
        assert answer.code == 0, answer.err
        assert counts[str(opened)] == counts[str(tmp_path / "site.toml")] == 1
        assert (counts[str(tiny.data / "index.csv")], counts[META], counts[REAL]) == (private, private, 0)
