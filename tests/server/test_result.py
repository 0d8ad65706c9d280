"""What a finished federation leaves at the coordinator, made of journal, final test and adapter alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.flower import internals
from fedvfm.model import adapter_folder
from fedvfm.protocol import protocol
from fedvfm.report import page
from fedvfm.server import app
from fedvfm.server.rounds import result, summary
from fedvfm.simulation.results import compare
from fedvfm.state import checkpoint
from fedvfm.storage import hash_chain
from fedvfm.tasks import metrics
from tests.server import numpy_sites


def finished(folder: Path, *, oracle: bool = False, **changes: Any) -> Any:
    """A federation of two sites at its end; its job."""
    members = [numpy_sites.NumpySite("north", **changes), numpy_sites.NumpySite("west", examples=30)]
    settings = {"task": {"kind": "segmentation", "prompt": "box"}} if oracle else {}
    job = numpy_sites.make_job(folder, members, numpy_sites.make_recipe(**settings), durable=True)
    grid = numpy_sites.LoopGrid(numpy_sites.client_app(members), len(members))
    app.make_server_app([job])(grid, internals.context(1, 1, {}))
    return job


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_everything_that_sites_sent_and_nothing_else(tmp_path: Path) -> None:
    job = finished(tmp_path / "run")
    made = result.write(job.folder, "town", job.locked)
    assert made == json.loads((job.folder / "summary.json").read_text())
    tested = json.loads((job.folder / "evaluation.json").read_text())
    arm = made["arms"]["federated"]
    assert arm["sites"] == tested["last"]["sites"]
    values = [row["dice"] for row in arm["sites"].values()]
    assert arm["macro"] == pytest.approx(sum(values) / 2)
    assert (made["engine"], made["rounds"], made["fingerprint"]) == ("deployment", 3, tested["fingerprint"])
    journal = hash_chain.read(job.folder / "journal.jsonl")
    assert made["bytes"]["up"] == sum(line["bytes"]["up"] for line in journal) + tested["bytes"]["up"]
    table = rows(job.folder / "metrics.csv")
    wanted = {("train", str(n), site) for n in (1, 2, 3) for site in ("north", "west")}
    assert {(row["split"], row["round"], row["site"]) for row in table if row["split"] == "train"} == wanted
    assert [row["value"] for row in table if row["split"] == "test" and row["metric"] == "dice"] == [
        str(value) for value in values
    ]
    page = (job.folder / "report.html").read_text()
    for words in ("Federation town", "north", "west", "Training, round by round", job.locked.recipe.hash):
        assert words in page
    assert made["precision"] == "float32"
    assert "float32; the recipe says auto" in page
    assert not (job.folder / "samples.csv").exists(), "nobody sent values of single images"
    assert {path.stat().st_mode & 0o077 for path in job.folder.rglob("*") if path.is_file()} == {0}
    assert (job.folder / "adapter").stat().st_mode & 0o777 == 0o700


def test_one_of_a_thing_is_no_plural() -> None:
    assert [page.counted(number, "site") for number in (0, 1, 2, 1200)] == [
        "0 sites",
        "1 site",
        "2 sites",
        "1,200 sites",
    ]


def test_what_sites_computed_in_is_told_where_it_differs_and_where_nobody_said() -> None:
    lines = [{"precision": {"north": "bfloat16"}}, {"precision": {"north": "bfloat16", "west": "float32"}}]
    assert summary.precision(lines) == "bfloat16 and float32"
    assert summary.precision([{"round": 1}]) is None


def test_the_adapter_is_saved_as_a_simulation_saves_it_and_says_what_it_is_not(tmp_path: Path) -> None:
    job = finished(tmp_path / "run")
    result.write(job.folder, "town", job.locked)
    folder = job.folder / "adapter"
    adapter, _, marks = checkpoint.read(folder / adapter_folder.STATE)
    about = json.loads((folder / adapter_folder.ABOUT).read_text())
    assert adapter.fingerprint == about["fingerprint"]
    assert marks["recipe"] == about["recipe_hash"] == job.locked.recipe.hash
    assert about["manifest"] == job.locked.manifest.to_json()
    assert about["backbone_sha256"] == numpy_sites.SHA
    card = (folder / "README.md").read_text()
    for words in ("Final adapter of federation 'town'", "--format peft", "| federated |", adapter.fingerprint):
        assert words in card


def test_a_run_of_a_real_federation_can_be_compared(tmp_path: Path) -> None:
    """It has no values of single images, so it has no interval."""
    for name in ("one", "two"):
        job = finished(tmp_path / name)
        result.write(job.folder, name, job.locked)
    found = compare.compare([tmp_path / "one", tmp_path / "two"])
    first, second = (row["arms"]["federated"] for row in found["runs"])
    made = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert first["macro"] == second["macro"] == made["arms"]["federated"]["macro"]
    assert (first["low"], first["high"], found["runs"][1]["settings"]) == (None, None, {})


def test_a_score_of_exactly_nothing_is_read_before_any_figure(tmp_path: Path) -> None:
    def empty(kind: str, number: int, reply: Any) -> Any:
        if not kind.startswith("evaluate"):
            return reply
        return protocol.Evaluation(reply.site, reply.round, reply.num_examples, {"dice": 0.0, "iou": 0.0})

    job = finished(tmp_path / "run", change=empty)
    made = result.write(job.folder, "town", job.locked)
    found = {row["code"]: row for row in made["findings"]}
    assert found["at-chance"]["sites"] == ["north"]
    page = (job.folder / "report.html").read_text()
    assert page.index("Attention: Dice is exactly 0 at north") < page.index("<main>")
    assert "To be read with the figures" in page


def test_a_policy_that_lets_no_score_out_leaves_a_report_without(tmp_path: Path) -> None:
    def silent(kind: str, number: int, reply: Any) -> Any:
        if not kind.startswith("evaluate"):
            return reply
        return protocol.Evaluation(reply.site, reply.round, reply.num_examples, {})

    job = finished(tmp_path / "run", change=silent)
    made = result.write(job.folder, "town", job.locked)
    arm = made["arms"]["federated"]
    assert arm["macro"] == arm["worst"]["value"] == arm["sites"]["west"]["dice"]
    assert "dice" not in arm["sites"]["north"]
    only = {"north": {"num_examples": 2}}
    assert summary.over_sites(only, "dice") == {
        "sites": only, "macro": None, "weighted": None, "worst": None, "gap": None
    }  # fmt: skip
    evaluation = json.loads((job.folder / "evaluation.json").read_text())
    evaluation["last"]["sites"] = only
    (job.folder / "evaluation.json").write_text(json.dumps(evaluation))
    made = result.write(job.folder, "town", job.locked)
    assert made["arms"]["federated"]["macro"] is None
    assert "the policies of the sites let no value out" in (job.folder / "report.html").read_text()
    assert compare.compare([job.folder])["runs"][0]["arms"]["federated"]["macro"] is None


def test_scores_of_an_oracle_are_marked_wherever_they_stand(tmp_path: Path) -> None:
    job = finished(tmp_path / "run", oracle=True)
    made = result.write(job.folder, "town", job.locked)
    assert made["prompt"] == made["arms"]["federated"]["prompt"]
    assert made["prompt"] in (job.folder / "adapter" / "README.md").read_text()
    assert made["prompt"] in (job.folder / "report.html").read_text()


def test_it_is_written_once_and_again_only_where_it_is_not_whole(tmp_path: Path) -> None:
    job = finished(tmp_path / "run")
    where: Any = SimpleNamespace(
        about=SimpleNamespace(recipe=job.locked.recipe.hash, federation="town"),
        run_path=lambda recipe: job.folder,
        finished=lambda recipe: (job.folder / "evaluation.json").exists(),
        locked=lambda: job.locked,
    )
    assert result.ensure(where) == job.folder
    (job.folder / "report.html").write_text("a person wrote here")
    assert result.ensure(where) == job.folder
    assert (job.folder / "report.html").read_text() == "a person wrote here"
    (job.folder / "report.html").unlink()
    result.ensure(where)
    assert "Federation town" in (job.folder / "report.html").read_text()
    (job.folder / "evaluation.json").unlink()
    assert result.ensure(where) is None


def test_an_adapter_that_was_not_tested_and_a_damaged_test_are_refused(tmp_path: Path) -> None:
    job = finished(tmp_path / "run")
    kept = (job.folder / "adapter.safetensors").read_bytes()
    other = numpy_sites.draw(job.locked.manifest, 9)
    checkpoint.write(job.folder / "adapter.safetensors", other, {"recipe": job.locked.recipe.hash})
    with pytest.raises(errors.CheckpointError, match="is not the adapter that was tested"):
        result.write(job.folder, "town", job.locked)
    (job.folder / "adapter.safetensors").write_bytes(kept)
    for text in ("{", "[]", '{"last": {}}'):
        (job.folder / "evaluation.json").write_text(text)
        with pytest.raises(errors.CheckpointError, match="the final test is made again"):
            result.write(job.folder, "town", job.locked)
    assert not (job.folder / "report.html").exists()


def test_the_primary_metric_is_known_without_torch() -> None:
    from fedvfm.tasks import table as tasks

    for kind in metrics.TABLE.names():
        whole = kind in ("segmentation", "detection")  # these have no other target
        for target in ("class",) if whole else ("class", *metrics.TARGETS.names()):
            columns: dict[str, Any] = {"bins": [1.0]} if target == "cox" else {}
            if target == "regression":
                columns = {"ranges": [[0, 1]] * 2, "centres": [0, 0], "scales": [1, 1]}
            values = {
                "backbone": {"name": "unet"},
                "task": {"kind": kind},
                "target": {"kind": target, **columns},
                "data": {"class_names": ["a", "b"]},
            }
            task = tasks.TABLE.get(kind)(schema.parse(schema.Recipe, values, "recipe"))
            assert task.primary == metrics.primary(kind, target) == task.scores(surface=False).PRIMARY
