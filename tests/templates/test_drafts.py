"""Files that a person starts from: they parse, explain every key there is, and say the defaults that hold."""

from __future__ import annotations

import csv
import json
import re
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import pytest

from fedvfm import errors
from fedvfm.backbones import table as backbones
from fedvfm.backbones import weights
from fedvfm.client import site_file
from fedvfm.config import policy, privacy, schema
from fedvfm.data.sources import folder, layouts, recognise
from fedvfm.model import locking
from fedvfm.simulation import experiment as experiments
from fedvfm.templates import drafts
from fedvfm.trust import recipes

MODELS: dict[str, type[pydantic.BaseModel]] = {
    "site.toml": schema.SiteConfig,
    "server.toml": schema.ServerConfig,
    "recipe.toml": schema.Recipe,
}
NOTE = re.compile(
    r"# (?P<key>[A-Za-z0-9_]+): (?P<type>[^;]+?)(?: \((?P<unit>[^)]+)\))?; "
    r"(?:default (?P<default>.+?)|(?P<needed>required))\. (?P<meaning>.+)"
)
FREE = {"site.toml": {"labels", "policy.backbones"}}
"""Tables whose keys a person makes up."""
INTERNAL = {"schema_version", "rerun"}
"""What programs alone write."""
NOT_TOGETHER = {"noise_multiplier", "adaptive_quantile", "adaptive_rate", "adaptive_noise", "images_per_patient"}
NOT_TOGETHER |= {"channels", "optional_channels"}
"""Examples that another example of the same file excludes."""


@dataclass(frozen=True)
class Line:
    """One key of a template, and the note before it."""

    table: str
    key: str
    value: Any
    active: bool
    note: re.Match[str] | None

    @property
    def path(self) -> str:
        return f"{self.table}.{self.key}".lstrip(".")


def read(name: str) -> list[Line]:
    lines, table, comment = [], "", list[str]()
    for text in drafts.text(name).splitlines():
        if heading := drafts.TABLE.match(text):
            table, comment = heading[1], []
        elif found := drafts.LINE.match(text):
            value = tomllib.loads(text.removeprefix("#"))[found[1].strip('"')]
            note = NOTE.match(" ".join(part.removeprefix("#  ").strip() for part in comment))
            lines.append(Line(table, found[1], value, not text.startswith("#"), note))
            comment = []
        elif text.startswith("#   ") or text.startswith("# "):
            comment = [*comment, text] if text.startswith("#   ") and comment else [text]
        else:
            comment = []
            assert text == "" or text.startswith("#"), text
    return lines


def model_of(name: str, table: str) -> type[Any] | None:
    """The pydantic model of a table; None where it has none of its own."""
    model: Any = MODELS[name]
    for step in filter(None, table.split(".")):
        found = model.model_fields[step].annotation
        options = typing.get_args(found) if isinstance(found, types.UnionType) else (found,)
        model = next((one for one in options if isinstance(one, type) and issubclass(one, pydantic.BaseModel)), None)
        if model is None:
            return None
    return typing.cast("type[Any]", model)


def keys() -> list[Any]:
    lines = [(name, line) for name in MODELS for line in read(name) if line.table not in FREE.get(name, ())]
    return [pytest.param(name, line, id=f"{name}:{line.path}") for name, line in lines]


# -- the notes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "line"), keys())
def test_every_key_has_a_note_that_is_true(name: str, line: Line) -> None:
    """Type, default, meaning; the default that it says is the model's."""
    assert line.note is not None, f"{line.path}: no note of the form 'key: type (unit); default VALUE. Meaning.'"
    assert line.note["key"] == line.key
    said = line.note["default"]
    default: Any
    if (model := model_of(name, line.table)) is not None:
        field = model.model_fields[line.key]
        if field.is_required():
            assert line.note["needed"], f"{line.path} is required"
            return
        default = json.loads(json.dumps(field.get_default(call_default_factory=True), default=list))
    else:
        assert line.table == "data.options"
        default = json.loads(json.dumps(getattr(layouts.Options(), line.key), default=list))
    assert said is not None, f"{line.path} is not required"
    told = None if said == "none" else tomllib.loads(f"x = {said}")["x"]
    assert (told, type(told)) == (default, type(default)), f"{line.path}: the default is {default!r}"


NUMBERS = ("number", "whole number")


@pytest.mark.parametrize(("name", "line"), keys())
def test_the_type_of_a_note_is_that_of_its_value(name: str, line: Line) -> None:
    assert line.note is not None
    kinds: dict[str, Any] = {
        "text": str, "path": str, "sha256": str, "whole number": int, "number": (int, float), "true or false": bool,
        "table": dict,
    }  # fmt: skip
    said = line.note["type"]
    wanted = list if said.startswith("list of") else kinds[said.split(" or list")[0]]
    assert isinstance(line.value, wanted), f"{line.path} = {line.value!r} is no {said}"
    assert isinstance(line.value, bool) == (said == "true or false")


@pytest.mark.parametrize("name", MODELS)
def test_every_key_of_the_models_is_in_it_and_no_other(name: str) -> None:
    tables: dict[str, set[str]] = {}
    for line in read(name):
        tables.setdefault(line.table, set()).add(line.key)
    for table in {"", *tables} - FREE.get(name, set()):
        if (model := model_of(name, table)) is None:
            continue
        inner = {field for field in model.model_fields if model_of(name, f"{table}.{field}".lstrip(".")) is not None}
        inner |= {path.rpartition(".")[2] for path in FREE.get(name, ()) if path.rpartition(".")[0] == table}
        inner |= {"options"} if name == "site.toml" and table == "data" else set()
        assert tables.get(table, set()) == set(model.model_fields) - INTERNAL - inner, table
    if name == "site.toml":
        assert tables["data.options"] <= set(folder.OPTIONS)


def test_every_table_of_the_models_is_in_it() -> None:
    for name, model in MODELS.items():
        headings = {found[1] for line in drafts.text(name).splitlines() if (found := drafts.TABLE.match(line))}
        for field in model.model_fields:
            if field not in INTERNAL and model_of(name, field) is not None:
                assert field in headings, f"{name}: [{field}]"


# -- as they stand, and with every key ---------------------------------------------------------------------------------


def uncommented(name: str) -> dict[str, Any]:
    """A template with every key that it only mentions."""
    lines = drafts.text(name).splitlines()
    kept = []
    for line in lines:
        if found := drafts.LINE.match(line):
            line = line.removeprefix("#") if found[1] not in NOT_TOGETHER else line
        elif drafts.TABLE.match(line):
            line = line.removeprefix("#")
        kept.append(line)
    return tomllib.loads("\n".join(kept))


@pytest.mark.parametrize(("name", "model"), MODELS.items())
def test_it_parses_as_it_stands_and_with_every_example(name: str, model: type[pydantic.BaseModel]) -> None:
    schema.parse(model, tomllib.loads(drafts.text(name)), name)
    values = uncommented(name)
    if name == "recipe.toml":
        values["privacy"]["mechanism"] = "record-level"
    schema.parse(model, values, name)


def test_a_site_as_it_stands_accepts_nothing(tmp_path: Path) -> None:
    path = drafts.write(tmp_path / "site.toml", drafts.text("site.toml"))
    found = schema.parse(schema.SiteConfig, schema.read_toml(path), "site")
    assert found.policy == schema.PolicyConfig() == site_file.read_site(path).policy
    assert found.limits == schema.LimitsConfig()
    assert found.policy.final.accept == "never"
    full = schema.parse(schema.SiteConfig, uncommented("site.toml"), "site")
    assert full.policy.max_rounds > 0
    assert full.policy.when is not None
    assert full.policy.final.min_score is not None
    assert full.limits.threads > 0
    assert isinstance(full.privacy, privacy.Budget)
    assert isinstance(full.policy.final, policy.FinalPolicy)


def test_a_servers_file_is_the_defaults() -> None:
    assert schema.parse(schema.ServerConfig, tomllib.loads(drafts.server()), "server") == schema.ServerConfig()


# -- filling in --------------------------------------------------------------------------------------------------------


def test_only_the_value_of_a_line_changes() -> None:
    before = drafts.text("site.toml")
    after = drafts.fill(before, {"name": 'Saint "Mary"\\', "data.path": "/d\xe4ta", "data.options.layout": "nnunet"})
    found = tomllib.loads(after)
    assert (found["name"], found["data"]["path"]) == ('Saint "Mary"\\', "/d\xe4ta")
    assert found["data"]["options"] == {"layout": "nnunet"}
    changed = [(a, b) for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b]
    assert len(changed) == 3
    with pytest.raises(KeyError, match=r"no line for data\.paths"):
        drafts.fill(before, {"data.paths": "x"})


@pytest.mark.parametrize("value", [True, 0, 1.5e-3, 1e-5, 'a"\\\n\t', "\x7f\u2028\U0001f600", [1, 2], ["a"], []])
def test_a_value_is_written_as_it_is_read(value: Any) -> None:
    assert tomllib.loads(f"x = {drafts.literal(value)}")["x"] == value


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", sorted(backbones.TABLE.names()))
def test_a_recipe_of_every_backbone_validates(backbone: str) -> None:
    recipe = schema.parse(
        schema.Recipe, tomllib.loads(drafts.recipe("segmentation", backbone, ["rest", "lesion"])), "recipe"
    )
    assert recipe.backbone.name == backbone
    assert locking.examine(recipe)[1] == []
    if backbone == "litemedsam":  # what it was trained with, and what its bundled experiments say
        bundled = experiments.load("sam-brain-mri").recipe
        assert (recipe.data.mean, recipe.data.std, recipe.data.input_size) == (
            bundled.data.mean,
            bundled.data.std,
            (256, 256),
        )
        for key in ("learning_rate", "batch_size"):
            assert getattr(recipe.optimiser, key) == getattr(bundled.optimiser, key)
        assert (recipe.task.head, recipe.adapter.kind) == (bundled.task.head, bundled.adapter.kind)
    if backbone.startswith("sam") or backbone == "litemedsam":  # without prompts not SAM's own decoder
        assert (recipe.task.head, recipe.adapter.kind) == ("unet-deep", "head-only")
        assert recipe.optimiser.head_learning_rate == recipe.optimiser.learning_rate


def test_an_image_has_one_class_by_the_encoder_of_a_sam() -> None:
    recipe = schema.parse(schema.Recipe, tomllib.loads(drafts.recipe("classification", "litemedsam", "abc")), "recipe")
    assert (recipe.task.head, recipe.adapter.kind, recipe.adapter.layers) == (None, "lora", (8, 9))
    assert locking.examine(recipe)[1] == []


@pytest.mark.parametrize("backbone", ["dinov2-small-imgfocus", "dinov2-large", "deit-tiny", "clip-vit-base"])
def test_a_recipe_for_classification_validates(backbone: str) -> None:
    recipe = schema.parse(schema.Recipe, tomllib.loads(drafts.recipe("classification", backbone, "abc")), "recipe")
    assert (recipe.task.kind, recipe.data.class_names) == ("classification", ("a", "b", "c"))
    assert (recipe.rounds, recipe.aggregation.server_momentum) == (16, 0.6)
    assert locking.examine(recipe)[1] == []


@pytest.mark.parametrize("task", ["detection", "classification", "case-classification"])
def test_a_recipe_shows_no_key_that_its_task_does_not_read(task: str) -> None:
    from fedvfm.tasks import detection

    unread = detection.OF_MASKS if task == "detection" else ("ce_weight", "dice_weight", "dice")
    text = drafts.recipe(task, weights.EMBEDDED, ["rest", "lesion"])
    shown = {key[1] for line in text.splitlines() if (key := drafts.LINE.match(line))}
    assert not shown & set(unread)
    assert not any(f"# {key}:" in text for key in unread)
    assert {"prompt_points", "options", "prevalence"} <= shown
    recipe = schema.parse(schema.Recipe, tomllib.loads(text), "recipe")
    assert locking.examine(recipe)[1] == []


def test_the_embedded_backbone_is_pinned_and_locks_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path / "nothing"))
    text = drafts.recipe("segmentation", weights.EMBEDDED, ["background", "lesion"])
    path = drafts.write(tmp_path / "recipe.toml", text)
    locked = locking.make(recipes.written(path))
    assert locked.backbone_sha256 == weights.KNOWN[weights.EMBEDDED].sha256
    assert locked.adapter.fingerprint == locked.initial
    assert locked.recipe.adapter.layers == (8, 9, 10, 11)


# -- the verbs ---------------------------------------------------------------------------------------------------------


def test_what_was_given_stands_in_the_site_file(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study" / "images").mkdir(parents=True)
    answer = cli("client", "init", "--name", "south", "--path", "study", "--json")
    assert (answer.code, json.loads(answer.out)["layout"]) == (0, "pairs")
    found = schema.parse(schema.SiteConfig, schema.read_toml(tmp_path / "site.toml"), "site.toml")
    assert (found.name, found.data.path, found.data.options["layout"]) == ("south", "study", "pairs")
    assert (tmp_path / "site.toml").stat().st_mode & 0o777 == 0o600
    again = cli("client", "init", "--name", "another-one")
    assert (again.code, "is left as it is" in again.err) == (errors.OutputInUse.exit_code, True)
    assert "another-one" not in (tmp_path / "site.toml").read_text()

    other = cli("client", "init", "--path", "study", "--layout", "bids", "-o", "elsewhere/site.toml")
    assert other.code == 0
    found = schema.parse(schema.SiteConfig, schema.read_toml(tmp_path / "elsewhere" / "site.toml"), "site.toml")
    assert (found.data.path, found.data.options["layout"]) == (str(tmp_path / "study"), "bids")
    for words, said in (
        (("--name", "../x", "-o", "a.toml"), "name = '../x'"),
        (("--layout", "nnunet2", "-o", "a.toml"), "known layouts: pairs, classes"),
    ):
        wrong = cli("client", "init", *words)
        assert (wrong.code, said in wrong.err) == (errors.ConfigError.exit_code, True), wrong.err
    assert not (tmp_path / "a.toml").exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("images", "pairs"), ("imagesTr", "nnunet"), ("studies", "studies"), ("nothing", None), ("", None)],
)
def test_the_layout_is_recognised(cli: Any, tmp_path: Path, name: str, kind: str | None) -> None:
    data = tmp_path / "data"
    if name:
        (data / name).mkdir(parents=True)
    answer = cli("client", "init", "--path", data, "-o", tmp_path / "site.toml", "--json")
    assert (answer.code, json.loads(answer.out)["layout"]) == (0, kind)
    assert ("note:" in answer.err) == (kind is None)
    assert kind is None or kind in recognise.KINDS


def test_a_folder_whose_name_is_no_text_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match=r"(?s)site\.toml.*udcff.* no UTF-8.*Rename the folder"):
        drafts.write(tmp_path / "site.toml", drafts.site("north", f"{tmp_path}/\udcff", "pairs"))
    assert not (tmp_path / "site.toml").exists()


def test_a_servers_file_is_written_once(cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    assert cli("server", "init-config", "-o", path).code == 0
    path.write_text("quorum = 2\n")
    assert cli("server", "init-config", "-o", path).code == errors.OutputInUse.exit_code
    assert path.read_text() == "quorum = 2\n"


def test_a_recipe_is_written_checked_and_once(cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    new = ("recipe", "new", "-o", path)
    for words, said in (
        (("--classes", "background"), "data.class_names"),
        (("--classes", "a,b", "--task", "regression"), "recipe.task.kind"),
        (("--classes", "a,b", "--backbone", "dinov2-smal"), "nearest: 'dinov2-small'"),
        (("--classes", "a,a"), "class names must differ"),
    ):
        wrong = cli(*new, *words)
        assert (wrong.code, said in wrong.err) == (errors.ConfigError.exit_code, True), wrong.err
        assert not path.exists()
    answer = cli(*new, "--classes", "background, lesion")
    assert answer.code == 0, answer.err
    assert "the background is 'background'" in answer.out
    assert cli(*new, "--classes", "a,b").code == errors.OutputInUse.exit_code
    assert cli("recipe", "lock", path, "-o", tmp_path / "recipe.json").code == 0


@pytest.mark.parametrize("task", ["segmentation", "classification", "case-classification"])
def test_a_recipe_without_classes_is_told_that_its_classes_are_examples(cli: Any, tmp_path: Path, task: str) -> None:
    path = tmp_path / "recipe.toml"
    answer = cli("recipe", "new", "--task", task, "-o", path)
    assert (answer.code, "are examples" in answer.err) == (0, True), answer.err
    assert path.read_text().startswith("#:schema file:")
    made = schema.parse(schema.Recipe, schema.read_toml(path), "recipe")
    assert (made.task.kind, len(made.data.class_names)) == (task, 2)


def test_a_backbone_that_is_not_here_is_written_with_a_note(cli: Any, tmp_path: Path) -> None:
    answer = cli("recipe", "new", "--classes", "a,b", "--backbone", "someone/else", "-o", tmp_path / "r.toml", "--json")
    assert (answer.code, json.loads(answer.out)["checked"]) == (0, False), answer.err
    assert "fedvfm weights fetch someone/else" in answer.err


def pictures(folder: Path, cases: int) -> Path:
    """Images, and masks of 0 and 255."""
    from PIL import Image

    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
        for number in range(cases):
            Image.new("L", (28, 28), 255 if part == "masks" and number else 7 * number).save(
                folder / part / f"{number}.png"
            )
    return folder


def experiment_of(path: Path) -> schema.Experiment:
    return schema.parse(schema.Experiment, schema.read_toml(path), "experiment")


def test_an_experiment_of_ones_own_folder(cli: Any, tmp_path: Path) -> None:
    folder, path = pictures(tmp_path / "My study!", 9), tmp_path / "mine.toml"
    answer = cli("experiments", "new", folder, "-o", path, "--classes", "rest,lesion", "--json")
    assert answer.code == 0, answer.err
    told = {"task": "segmentation", "classes": ["rest", "lesion"], "samples": 9, "patients": 9, "sites": 3}
    assert json.loads(answer.out) == {"file": str(path), **told, "partition": "iid"}
    what = experiment_of(path)
    assert (what.name, what.data.path, what.recipe.data.class_names) == ("my-study", str(folder), ("rest", "lesion"))
    assert what.recipe == schema.parse(
        schema.Recipe, tomllib.loads(drafts.recipe("segmentation", weights.EMBEDDED, ["rest", "lesion"])), "recipe"
    )
    assert cli("simulate", path, "--dry-run").code == 0
    assert cli("experiments", "new", folder, "-o", path).code == errors.OutputInUse.exit_code

    guessed = cli("experiments", "new", folder, "-o", tmp_path / "guess.toml")
    assert "'background, foreground' are a guess" in guessed.err
    few = cli("experiments", "new", folder, "-o", tmp_path / "few.toml", "--sites", "4")
    assert (few.code, "9 patients for 4 hospitals" in few.err) == (errors.ConfigError.exit_code, True), few.err
    single = cli("experiments", "new", folder, "-o", tmp_path / "few.toml", "--sites", "1")
    assert (single.code, "two hospitals or more" in single.err) == (errors.ConfigError.exit_code, True), single.err
    nothing = cli("experiments", "new", tmp_path / "nowhere", "-o", tmp_path / "few.toml")
    assert (nothing.code, "no such folder" in nothing.err) == (errors.DataError.exit_code, True)
    assert not (tmp_path / "few.toml").exists()


def test_an_experiment_of_boxes_and_of_what_a_folder_does_not_hold(cli: Any, tmp_path: Path) -> None:
    folder, path = pictures(tmp_path / "study", 9), tmp_path / "mine.toml"
    new = ("experiments", "new", folder, "-o", path, "--classes", "rest,lesion")
    wrong = cli(*new, "--task", "case-classification")
    assert (wrong.code, "detection, segmentation" in wrong.err) == (errors.ConfigError.exit_code, True), wrong.err
    answer = cli(*new, "--task", "detection")
    assert answer.code == 0, answer.err
    assert experiment_of(path).recipe.task.kind == "detection"

    (folder / "masks").rename(tmp_path / "masks")
    (folder / "labels.csv").write_text("id,months,died\n" + "".join(f"{n},{n}.5,1\n" for n in range(9)))
    wrong = cli("experiments", "new", folder, "-o", tmp_path / "columns.toml")
    assert (wrong.code, "--target multi-label" in wrong.err) == (errors.ConfigError.exit_code, True), wrong.err


def test_an_experiment_of_slides_says_which_tiles_are_taken(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "a.tif").touch()
    (tmp_path / "labels.csv").write_text("id,label\na,no\n")
    seen = drafts.Study("case-classification", ("no", "yes"), True, 90, 9, 0)
    text = drafts.experiment(tmp_path, seen, backbone=weights.EMBEDDED)
    slides = schema.parse(schema.Experiment, tomllib.loads(text), "experiment").recipe.data.slides
    assert slides is not None
    assert slides.tile == 224


def test_an_experiment_numbers_classes_as_they_were_said(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("ape", "zebra"):
        (pictures(tmp_path / name, 9) / "images").rename(tmp_path / "mine" / name)
    answer = cli("experiments", "new", tmp_path / "mine", "-o", tmp_path / "a.toml", "--classes", "zebra,ape")
    assert answer.code == 0, answer.err
    assert experiment_of(tmp_path / "a.toml").recipe.data.class_names == ("zebra", "ape")
    assert cli("simulate", tmp_path / "a.toml", "--dry-run").code == 0


def test_an_experiment_takes_the_hospitals_that_the_folder_tells_apart(cli: Any, tmp_path: Path) -> None:
    folder, path = pictures(tmp_path / "study", 6), tmp_path / "mine.toml"
    rows = [f"{number},{'ab'[number % 2]}" for number in range(6)]
    (folder / "patients.csv").write_text("\n".join(["id,site", *rows]) + "\n")
    answer = cli("experiments", "new", folder, "-o", path)
    assert "2 hospitals, natural" in answer.out, answer.err
    assert experiment_of(path).partition == schema.PartitionConfig(kind="natural")


def test_a_folder_of_cases_gets_a_recipe_of_cases(cli: Any, tmp_path: Path) -> None:
    from tests.simulation import drawn_cases

    folder, path = drawn_cases.pictures(tmp_path / "study", ("east", "west"), images=2), tmp_path / "mine.toml"
    answer = cli("experiments", "new", folder, "-o", path, "--json")
    assert json.loads(answer.out)["task"] == "case-classification", answer.err
    recipe = experiment_of(path).recipe
    assert (recipe.task.kind, recipe.adapter.kind) == ("case-classification", "head-only")
    assert recipe.optimiser.local_epochs > 1, "few cases a hospital are few steps a round"
    dry = cli("simulate", path, "--dry-run", "--json")
    assert dry.code == 0, dry.err
    assert json.loads(dry.out)["sites"]["east"]["train"] < 8, "cases are counted"


NAMES = {"survival": "months,died", "cox": "months,died", "multi-label": "died,none", "regression": "score,months"}


def columns_of_cases(folder: Path, sites: tuple[str, ...] = ("east", "west")) -> Path:
    """Pictures of eight cases a site, whose table has columns and no class."""
    from tests.simulation import drawn_cases

    drawn_cases.pictures(folder, sites, images=1)
    (table,) = folder.glob("*.csv")
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    for number, row in enumerate(rows):
        row.update(months=f"{number + 1}.5", died=str(1 - number % 2), none=str(int(number % 3 == 0)))
        row["score"] = "" if number == 1 else f"{1000 + number % 4 / 4}"
        row.update(sex=("F", "M", "f", "")[number % 4], dose=f"{number},5", note=f"came {number}", place="north wing")
        del row["label"]
    table.unlink()
    drawn_cases.table(folder / "labels.csv", rows)
    return folder


@pytest.mark.parametrize("kind", NAMES)
def test_an_experiment_of_columns_takes_its_constants_of_the_table(cli: Any, tmp_path: Path, kind: str) -> None:
    folder, path = columns_of_cases(tmp_path / "study"), tmp_path / "mine.toml"
    new = ("experiments", "new", folder, "-o", path)
    answer = cli(*new, "--target", kind, "--classes", NAMES[kind])
    assert (answer.code, "come from this folder's table" in answer.err) == (0, kind != "multi-label"), answer.err
    recipe = experiment_of(path).recipe
    assert (recipe.target.kind, ",".join(recipe.data.class_names)) == (kind, NAMES[kind])
    if kind == "regression":
        (low, high), centre, scale = (recipe.target.ranges[0], recipe.target.centres[0], recipe.target.scales[0])
        assert (low < 1000 <= centre <= 1000.75 < high, 0.2 < scale < 0.4) == (True, True), "however narrow a column"
    if recipe.target.prognosis:
        assert len(recipe.target.bins) == 3
    if kind == "survival":
        dry = cli("simulate", path, "--dry-run")
        assert dry.code == 0, dry.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--target", "survival", "--classes", "months"), "a time and an event"),
        (("--target", "multi-label"), "say the columns"),
        (("--target", "ordinal"), "in their order"),
        (("--target", "grade", "--classes", "a,b"), "known are"),
        (("--target", "regression", "--classes", "site_"), "no column site_"),
    ],
)
def test_a_target_that_cannot_be_drafted_is_one_clear_error(
    cli: Any, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    answer = cli("experiments", "new", columns_of_cases(tmp_path / "study"), "-o", tmp_path / "mine.toml", *words)
    assert (answer.code != 0, said in answer.err) == (True, True), answer.err
    assert not (tmp_path / "mine.toml").exists()


def test_columns_beside_the_images_are_numbers_or_words(cli: Any, tmp_path: Path) -> None:
    folder, path = columns_of_cases(tmp_path / "study"), tmp_path / "mine.toml"
    new = ("experiments", "new", folder, "--target", "multi-label", "--classes", "died,none")
    answer = cli(*new, "--inputs", "score,sex,months", "-o", path)
    assert (answer.code, "inputs.ranges, inputs.centres" in answer.err) == (0, True), answer.err
    assert experiment_of(path).baselines == ("local-only", "pooled", "table-alone")
    inputs = experiment_of(path).recipe.inputs
    assert (inputs.columns, inputs.categories) == (("score", "months", "sex"), {"sex": ("F", "M")})
    assert inputs.ranges[1][0] < 1.5 < inputs.centres[1] < inputs.ranges[1][1]
    dry = cli("simulate", path, "--dry-run")
    assert dry.code == 0, dry.err


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("crp", "no column crp"),
        ("died", "column 'died' is what the target learns"),
        ("dose", "column 'dose': some cells are no number: write decimals with a point"),
        ("note", "column 'note': 24 different words, and a category has 2 to 20"),
        ("place", "column 'place': 1 different word, and a category has 2 to 20"),
    ],
)
def test_a_column_that_suggests_no_input_is_one_clear_error(cli: Any, tmp_path: Path, column: str, said: str) -> None:
    folder, path = columns_of_cases(tmp_path / "study", ("east", "north", "west")), tmp_path / "mine.toml"
    new = ("experiments", "new", folder, "--target", "multi-label", "--classes", "died,none")
    answer = cli(*new, "--inputs", column, "-o", path)
    assert (answer.code != 0, said in answer.err) == (True, True), answer.err
    assert not path.exists()


@pytest.mark.parametrize("kind", ["ordinal", *NAMES])
def test_a_recipe_of_a_target_says_that_its_constants_are_examples(cli: Any, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "recipe.toml"
    words = ("--task", "case-classification", "--target", kind, "--classes", NAMES.get(kind, "low,high"))
    answer = cli("recipe", "new", *words, "-o", path)
    examples = kind not in ("ordinal", "multi-label")
    assert (answer.code, "are examples" in answer.err) == (0, examples), answer.err
    assert schema.parse(schema.Recipe, schema.read_toml(path), "recipe").target.kind == kind
