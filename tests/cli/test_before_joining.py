"""What a hospital does between the invite and the first round: check its data with the invite, get the weights."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.backbones import stored, weights
from fedvfm.client import site_file, state_folder
from fedvfm.client import weights as weights_here
from fedvfm.client.adoption import decisions
from fedvfm.client.process import supervisor
from fedvfm.config import schema
from fedvfm.model import locking
from fedvfm.trust import locked_recipe, recipes, signed_documents

ROOT = Path(__file__).parents[2]
PINNED = "dinov2-small-imgfocus"
PRIVATE = {"mechanism": "record-level", "noise_multiplier": 1.0, "clip": 1.0, "delta": 1e-5}


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any weights."""
    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Joined:
    """One invite, and what a site does with it."""

    def __init__(self, cli: Any, folder: Path, recipe: Path) -> None:
        self.cli, self.folder = cli, folder
        names = ("--name", "trial", "--address", "localhost:8443", "--sites", "north", "--state", folder / "server")
        answer = cli("server", "init", recipe, *names, "--json")
        assert answer.code == 0, answer.err
        made = json.loads(answer.out)
        self.invite, self.fingerprint, self.hash = Path(made["invites"]["north"]), made["fingerprint"], made["recipe"]

    def join(self, *more: Any) -> Any:
        told = ("--fingerprint", self.fingerprint, "--approve", self.hash, "--state", self.folder / "site")
        return self.cli("client", "join", self.invite, *told, *more)

    def start(self, monkeypatch: pytest.MonkeyPatch, *more: Any) -> tuple[Any, list[str]]:
        """``client start`` up to where its processes would run."""
        started: list[str] = []
        monkeypatch.setattr(supervisor, "start", lambda where, site, **_: started.append(str(site)))
        return self.cli("client", "start", "site.toml", "--state", self.folder / "site", *more), started


@pytest.fixture
def pinned(cli: Any, empty_cache: Path, tmp_path: Path) -> Joined:
    """A recipe for a backbone of the table, locked where its weights are not."""
    recipe = recipes.written(ROOT / "simulations" / "experiments" / "brain-mri.toml")
    pin = {"backbone": recipe.backbone.model_copy(update={"sha256": weights.KNOWN[PINNED].sha256})}
    path = locking.write(tmp_path / "recipe.json", locking.make(recipe.model_copy(update=pin)))[0]
    return Joined(cli, tmp_path, path)


@pytest.fixture
def plain(cli: Any, tiny: Any, tmp_path: Path) -> Joined:
    """The tiny recipe, whose backbone is a folder."""
    path = locking.write(tmp_path / "recipe.json", locking.make(recipes.written(tiny.experiment)))[0]
    return Joined(cli, tmp_path, path)


# -- the data ----------------------------------------------------------------------------------------------------------


def test_the_data_is_checked_with_the_invite_itself(plain: Joined, tiny: Any, cli: Any) -> None:
    site = plain.folder / "site.toml"
    site.write_text(tiny.site("north") + "[policy]\nmin_train_units = 1\n")
    answer = cli("data", "check", site, "--recipe", plain.invite, "--json")
    assert answer.code == 0, answer.err + answer.out
    found = json.loads(answer.out)
    assert found["training_step"] is not None, "the invite's recipe was trained for real"
    alone = json.loads(cli("data", "check", site, "--json").out)
    assert alone["training_step"] is None
    # The site's file may name it too, and the planner of privacy takes it.
    site.write_text(f'recipe = "{plain.invite}"\n' + tiny.site("north"))
    assert json.loads(cli("data", "check", site, "--json").out)["training_step"] is not None


def test_an_invite_and_its_lock_hold_the_same_recipe(plain: Joined) -> None:
    assert recipes.read(plain.invite).lock == signed_documents.read(
        plain.folder / "recipe.json", locked_recipe.LockedRecipe, "recipe"
    )
    assert recipes.read(plain.folder / "recipe.json").hash == plain.hash


def test_a_file_that_is_neither_is_named(tiny: Any, cli: Any, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(tiny.site("north"))
    wrong = tmp_path / "request.json"
    wrong.write_text('{"format": "fedvfm-request-1"}')
    answer = cli("data", "check", tmp_path / "site.toml", "--recipe", wrong)
    tiny.one_error(answer, 12, "locked recipe", "request.json", "is not of the known form")


# -- its own file ------------------------------------------------------------------------------------------------------


def test_join_writes_a_site_file_that_accepts_this_recipe_and_no_more(plain: Joined, tiny: Any, cli: Any) -> None:
    own = plain.folder / "own.toml"
    joined = plain.join("--path", tiny.data, "--data", own)
    assert joined.code == 0, joined.err
    assert f"{own} will be written with this policy" in joined.err
    assert own.stat().st_mode & 0o777 == 0o600
    assert "everything is" not in own.read_text(), "a draft's word that it refuses everything"
    site = site_file.read_site(own)
    assert (site.name, Path(site.data.path)) == ("north", tiny.data)
    assert cli("client", "review", plain.invite, "--policy", own).code == 0
    longer = tomllib.loads(own.read_text())["policy"]["max_rounds"] + 1
    text = recipes.written(tiny.experiment).model_copy(update={"rounds": longer})
    other = locking.write(plain.folder / "longer.json", locking.make(text))[0]
    refused = cli("client", "review", other, "--policy", own)
    assert (refused.code, "REFUSES  max_rounds" in refused.out) == (13, True)
    assert tomllib.loads(own.read_text())["policy"]["final"]["accept"] == "ask"


def test_join_writes_no_site_file_without_an_approval_or_over_another(plain: Joined, tiny: Any, cli: Any) -> None:
    own = plain.folder / "own.toml"
    words = ("client", "join", plain.invite, "--fingerprint", plain.fingerprint, "--state", plain.folder / "site")
    refused = cli(*words, "--path", tiny.data, "--data", own, "--approve", "0" * 64)
    assert refused.code != 0
    assert not own.exists()
    assert not (plain.folder / "site").exists()
    own.write_text("mine")
    tiny.one_error(plain.join("--path", tiny.data, "--data", own), errors.OutputInUse.exit_code, "is left as it is")
    assert own.read_text() == "mine"
    assert not (plain.folder / "site").exists()


def test_what_data_may_spend_is_for_a_person_to_write(cli: Any, tiny: Any, tmp_path: Path) -> None:
    recipe = recipes.written(tiny.experiment)
    values = recipe.model_dump(mode="json") | {"privacy": PRIVATE, "aggregation": {"weighting": "uniform"}}
    private = schema.parse(schema.Recipe, values, "recipe")
    made = Joined(cli, tmp_path, locking.write(tmp_path / "recipe.json", locking.make(private))[0])
    said = made.join("--path", tiny.data, "--data", tmp_path / "own.toml")
    tiny.one_error(said, errors.ConfigError.exit_code, "'record-level'", "fedvfm client init")
    assert not (tmp_path / "own.toml").exists()


# -- the weights -------------------------------------------------------------------------------------------------------


def test_join_and_start_name_the_command_that_brings_missing_weights(
    pinned: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = f"backbone '{PINNED}' is not on this machine. Run: fedvfm weights fetch {PINNED}"
    joined = pinned.join("--json")
    assert joined.code == 0, joined.err
    assert f"note: {told}" in joined.err.splitlines()
    assert json.loads(joined.out)["approved"] is True, "a site can join before it has the weights"
    answer, started = pinned.start(monkeypatch)
    assert (answer.code, told in answer.err.splitlines()) == (0, True)
    assert started == ["site.toml"], "it waits, and trains once the weights are here"
    said = json.loads(pinned.start(monkeypatch, "--json")[0].out)
    assert said["text"] == told


def test_nothing_is_fetched_unless_a_person_says_so(pinned: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(settings: schema.BackboneConfig, source: Path | None = None) -> None:
        asked.append(settings.name)

    monkeypatch.setattr(stored, "fetch", fetch)
    assert pinned.join().code == 0
    pinned.start(monkeypatch)
    assert asked == []
    pinned.start(monkeypatch, "--fetch-weights")
    assert asked == [PINNED]
    shutil.rmtree(pinned.folder / "site")
    assert pinned.join("--fetch-weights").code == 0
    assert asked == [PINNED] * 2
    shutil.rmtree(pinned.folder / "site")
    refused = pinned.cli(
        "client", "join", pinned.invite, "--fingerprint", pinned.fingerprint, "--approve", "0" * 64,
        "--fetch-weights", "--state", pinned.folder / "site",
    )  # fmt: skip
    assert refused.code == 12
    assert asked == [PINNED] * 2, "what nobody approved brings nothing here"


def test_weights_that_are_here_are_not_mentioned(plain: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = plain.join()
    assert joined.code == 0
    assert "note: backbone" not in joined.err
    answer, _ = plain.start(monkeypatch)
    assert answer.err == ""


def test_other_weights_than_the_recipes_are_told(plain: Joined, tiny: Any, tmp_path: Path) -> None:
    locked = recipes.read(plain.invite).lock
    assert weights_here.fault(locked) is None
    moved = shutil.copytree(tiny.backbone, tmp_path / "backbone")
    settings = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(settings | {"layer_norm_eps": 1e-3}))
    there = locked.recipe.backbone.model_copy(update={"name": str(moved)})
    other = locked.model_copy(update={"recipe": locked.recipe.model_copy(update={"backbone": there})})
    found = weights_here.fault(other)
    assert found is not None
    assert "other settings (config.json) than the recipe is locked to" in found.problem
    shutil.rmtree(moved)
    found = weights_here.fault(other)
    assert found is not None
    assert "It is a folder: bring the same weights to this path" in found.remedy


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"name": "deit-tiny"}, "Run: fedvfm weights fetch deit-tiny"),
        ({"name": "someone/else"}, "Run: fedvfm weights fetch someone/else"),
        (
            {"name": "someone/else", "revision": "0123abc"},
            "Run: fedvfm weights fetch someone/else --revision 0123abc",
        ),
        ({"name": "our-own"}, "Bring its file and run: fedvfm weights import FILE --name our-own"),
        ({"name": "sam-shaped"}, "Run: python benchmarks/sam_shaped.py pretrain (in fedvfm's source tree)"),
    ],
)
def test_the_remedy_is_a_command_that_can_help(settings: dict[str, str], remedy: str) -> None:
    assert weights.remedy(schema.BackboneConfig(**settings)) == remedy


# -- the adapter that comes back ---------------------------------------------------------------------------------------


def test_the_readme_names_the_folder_where_an_adapter_lies(plain: Joined) -> None:
    assert plain.join().code == 0
    where = state_folder.open_state(plain.folder / "site")
    verdict = decisions.Verdict(
        recipe="ab" * 32, fingerprint="cd" * 32, round=3, verdict="accepted", reason="policy", metric="dice",
        score=None, own=None, examples=0, time="2026-01-01T00:00:00Z",
    )  # fmt: skip
    folder = decisions.place(where, verdict).relative_to(where.folder)
    line = next(
        line
        for line in (ROOT / "client" / "README.md").read_text().splitlines()
        if "fedvfm predict fedvfm-site/" in line
    )
    named = line.split()[2].removeprefix("fedvfm-site/")
    assert named.replace("RECIPE", verdict.recipe).replace("FINGERPRINT", verdict.fingerprint) == str(folder)
