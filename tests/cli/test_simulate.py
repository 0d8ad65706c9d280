"""The main job by the real command line: what it prints, what it leaves, and that it does the same twice."""

from __future__ import annotations

import csv
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fedvfm

SITES = ("east", "north", "south")

# The machine's view of a run, stable: simulations/README.md documents these keys.
TOP = {
    "features",
    "precision",
    "threads",
    "workers",
    "experiment",
    "seed",
    "engine",
    "rounds",
    "fingerprint",
    "backbone",
    "trainable_parameters",
    "bytes",
    "wall_s",
    "peak_mib",
    "primary",
    "prompt",
    "privacy",
    "arms",
    "attack",
    "findings",
}
BACKBONE = {"name", "sha256", "parameters"}
BYTES = {"up", "down", "full_model"}
ARM = {"sites", "macro", "weighted", "worst", "gap", "rounds"}
MORE = {"federated": {"best"}, "local-only": {"matrix", "abroad"}, "classical": {"rule"}}
FILES = {
    "experiment.json",
    "setup.json",
    "journal.jsonl",
    "metrics.csv",
    "samples.csv",
    "evaluation.json",
    "adapter.safetensors",
    "summary.json",
    "report.html",
    "checkpoints",
    "arms",
    "adapter",
}
ADAPTER = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "fedvfm.json",
    "fedvfm_adapter.safetensors",
    "head.safetensors",
}
QUICK = """
import sys
sys.argv = ["fedvfm", "experiments", "--json"]
from fedvfm.cli import main as cli
try:
    cli.main()
finally:
    print(sorted({"torch", "flwr", "transformers", "monai"} & set(sys.modules)), file=sys.stderr)
"""
EVERY = ["classical", "head-only", "leave-one-out", "local-only", "pooled", "pooled-2x", "unet"]


@pytest.fixture(scope="module")
def every(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run with every baseline, two rounds."""
    folder = tmp_path_factory.mktemp("every")
    sets = [
        "--set",
        f"baselines={json.dumps(EVERY)}",
        "--set",
        "baseline.unet_channels=[4, 8]",
        "--rounds",
        "2",
        "--json",
    ]
    answer = tiny.run("simulate", tiny.experiment, "--output", folder / "run", *sets)
    assert answer.code == 0, answer.err
    return folder / "run", answer


def check_keys(made: dict[str, Any]) -> None:
    assert set(made) == TOP | ({"home", "benefit"} if "local-only" in made["arms"] else set())
    assert set(made["backbone"]) == BACKBONE
    assert set(made["bytes"]) == BYTES
    for name, arm in made["arms"].items():
        assert set(arm) == ARM | MORE.get(name, set()), name
        assert set(arm["worst"]) == {"site", "value"}
        assert arm["worst"]["value"] == min(row[made["primary"]] for row in arm["sites"].values())
        assert all({made["primary"], "num_examples"} <= set(row) for row in arm["sites"].values())


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_a_run_leaves_every_file_with_the_documented_keys(finished: Path, tiny: Any) -> None:
    assert {path.name for path in finished.iterdir()} == FILES
    assert {path.name for path in (finished / "adapter").iterdir()} == ADAPTER
    made = tiny.summary(finished)
    check_keys(made)
    assert list(made["arms"]) == ["federated", "pooled"]
    assert set(made["arms"]["federated"]["sites"]) == set(SITES)
    assert made["experiment"] == "tiny"
    assert (made["seed"], made["rounds"], made["engine"]) == (0, 3, "in-process")
    assert len(made["fingerprint"]) == len(made["backbone"]["sha256"]) == 64
    assert made["arms"]["federated"]["macro"] > 0.6, "the discs are easy"
    assert fedvfm.load_experiment(str(tiny.experiment)).recipe.rounds == 3
    assert json.loads((finished / "experiment.json").read_text())["recipe"]["optimiser"]["schedule"] == "cosine"


def test_every_arm_has_its_part_of_the_summary(every: tuple[Path, Any], tiny: Any) -> None:
    made = tiny.summary(every[0])
    check_keys(made)
    assert set(made["arms"]) == {"federated", *EVERY, "personal"}
    assert set(made["benefit"]["sites"]) == set(SITES)
    matrix = made["arms"]["local-only"]["matrix"]
    assert set(matrix) == set(SITES)
    assert all(set(row) == set(SITES) for row in matrix.values())
    home = {site: made["arms"]["local-only"]["sites"][site]["dice"] for site in SITES}
    assert home == {site: matrix[site][site] for site in SITES}
    assert set(made["arms"]["leave-one-out"]["sites"]) == set(SITES)


def test_json_prints_summary_json_and_nothing_else(every: tuple[Path, Any], tiny: Any) -> None:
    run, answer = every
    assert json.loads(answer.out) == tiny.summary(run)
    assert answer.err == ""


def test_equal_gradient_steps_per_sample_in_all_trained_arms(every: tuple[Path, Any], tiny: Any) -> None:
    steps = {}
    for path in sorted(every[0].rglob("journal.jsonl")):
        found = tiny.lines(path)
        per_example = {
            sum(row["train"][s]["steps"] for s in row["train"]) / sum(row["examples"].values()) for row in found
        }
        steps[str(path.parent.relative_to(every[0]))] = (len(found), max(per_example))
    double = steps.pop("arms/pooled-2x")
    steps = {name: row for name, row in steps.items() if not name.startswith("arms/personal/")}  # more, by intent
    # The last batch of a site may be smaller: 5 samples in batches of 3 are 2 steps, 15 are 5.
    assert {rounds for rounds, _ in steps.values()} == {2}
    assert all(1 / 3 <= share <= 2 / 5 for _, share in steps.values()), steps
    assert double[1] == pytest.approx(2 * steps["arms/pooled"][1])


def test_journal_is_one_chained_line_a_round(finished: Path, tiny: Any) -> None:
    found = tiny.lines(finished / "journal.jsonl")
    assert [row["round"] for row in found] == [1, 2, 3]
    assert [row["prev"] for row in found[1:]] == [row["hash"] for row in found[:-1]]
    assert found[-1]["fingerprint"] == tiny.summary(finished)["fingerprint"]
    assert all(set(row["train"]) == set(SITES) and row["refused"] == {} for row in found)
    assert all(0 <= row["factor_error"] < 1 for row in found)


def test_tables_say_what_the_summary_says(finished: Path, tiny: Any) -> None:
    with (finished / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test" and row["metric"] == "dice"]
    arms = tiny.summary(finished)["arms"]
    assert {(row["arm"], row["site"]): float(row["value"]) for row in rows} == {
        (name, site): values["dice"] for name, arm in arms.items() for site, values in arm["sites"].items()
    }
    with (finished / "samples.csv").open(newline="") as file:
        dice = [
            float(row["value"])
            for row in csv.DictReader(file)
            if (row["arm"], row["site"], row["metric"]) == ("federated", "east", "dice")
        ]
    assert sum(dice) / len(dice) == pytest.approx(arms["federated"]["sites"]["east"]["dice"])


def test_report_is_one_file_that_asks_no_network(finished: Path, tiny: Any) -> None:
    page = (finished / "report.html").read_text()
    assert "<script src" not in page
    assert "<link" not in page
    assert 'src="http' not in page
    assert tiny.summary(finished)["fingerprint"][:12] in page


# --- what a person sees -----------------------------------------------------------------------------------------------


def test_plain_lines_where_there_is_no_terminal(finished: Path, tiny: Any) -> None:
    err, out = (tiny.root / "finished.err").read_text(), (tiny.root / "finished.out").read_text()
    assert "\x1b" not in err + out
    assert "\r" not in err
    for words in (
        "arm 1/2 federated: 3 sites, 3 rounds",
        "federated round 2 site north: loss",
        "federated round 3/3: loss",
        "s left in this arm",
        "report:",
    ):
        assert words in err, words
    assert all(line.startswith("[") for line in err.splitlines()), err
    assert "federated" in out
    assert "worst site" in out


def _until_closed(terminal: int) -> Iterator[bytes]:
    """What the other end writes."""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how Linux says that nobody holds the other end
            piece = b""
        if not piece:
            os.close(terminal)
            return
        yield piece


def test_a_terminal_gets_a_live_display(tiny: Any, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    call = ["simulate", tiny.experiment, "--rounds", "1", "--set", "baselines=[]", "--output", tmp_path / "run"]
    process = tiny.start(*call, environment={"TERM": "xterm"}, terminal=follower)
    os.close(follower)
    shown = b"".join(_until_closed(leader))
    assert process.answer(60).code == 0, shown
    assert b"\x1b[" in shown
    assert b"federated round 1: loss" in shown


def test_quiet_prints_only_the_result(tiny: Any, tmp_path: Path) -> None:
    answer = tiny.run("simulate", tiny.experiment, "--rounds", "1", "--quiet", "--output", tmp_path / "run")
    assert answer.code == 0
    assert answer.err == ""
    assert "worst site" in answer.out
    assert str(tmp_path / "run" / "adapter") in answer.out


def test_set_and_seeds(tiny: Any, tmp_path: Path) -> None:
    sets = ["--set", "recipe.adapter.rank=3", "--set", "baselines=[]", "--rounds", "1", "--seeds", "4,7", "--json"]
    answer = tiny.run("simulate", tiny.experiment, *sets, "--output", tmp_path / "runs")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)["runs"]
    assert [made["seed"] for made in found] == [4, 7]
    assert [tiny.summary(tmp_path / "runs" / f"seed-{seed}") for seed in (4, 7)] == found
    assert found[0]["fingerprint"] != found[1]["fingerprint"]
    assert {made["rounds"] for made in found} == {1}
    assert json.loads((tmp_path / "runs" / "seed-4" / "experiment.json").read_text())["recipe"]["adapter"]["rank"] == 3


def test_one_seed_is_a_list_too(tiny: Any, tmp_path: Path) -> None:
    """Whoever reads the output need not count the seeds first; and what goes on prints the same form."""
    sets = ["--set", "baselines=[]", "--rounds", "1", "--seeds", "4", "--json"]
    answer = tiny.run("simulate", tiny.experiment, *sets, "--output", tmp_path / "runs")
    assert answer.code == 0, answer.err
    made = json.loads(answer.out)
    assert [row["seed"] for row in made["runs"]] == [4]
    again = tiny.run("simulate", "--resume", tmp_path / "runs", "--json")
    assert json.loads(again.out) == made
    assert answer.err == again.err == ""
    single = tiny.run("simulate", "--resume", tmp_path / "runs" / "seed-4", "--json")
    assert json.loads(single.out)["fingerprint"] == made["runs"][0]["fingerprint"]


def test_every_verb_prints_one_json_document(cli: Any, tiny: Any, finished: Path) -> None:
    calls = [
        ["experiments", "--json"],
        ["simulate", tiny.experiment, "--dry-run", "--json"],
        ["compare", finished, "--json"],
        ["weights", "fetch", tiny.backbone, "--json"],
    ]
    for call in calls:
        answer = cli(*call)
        assert answer.code == 0, answer.err
        assert json.loads(answer.out), call


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_plan_needs_neither_weights_nor_network(tiny: Any) -> None:
    sets = ["--set", 'recipe.backbone.name="dinov2-small-imgfocus"', "--set", "recipe.adapter.rank=8"]
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    answer = tiny.run("simulate", tiny.experiment, "--dry-run", "--json", *sets, environment=nowhere)
    assert answer.code == 0, answer.err
    made = json.loads(answer.out)
    assert set(made) - {"share", "sites", "notes", "cache"} == TOP - {
        "features",
        "fingerprint",
        "precision",
        "wall_s",
        "primary",
        "attack",
        "findings",
    }
    assert set(made["backbone"]) == BACKBONE
    assert set(made["bytes"]) == BYTES | {"per_round"}
    assert made["backbone"]["parameters"] > 21_000_000
    assert made["share"] == made["trainable_parameters"] / made["backbone"]["parameters"]
    assert set(made["arms"]) == {"federated", "pooled"}
    assert not (tiny.root / "no-cache").exists()


def test_plan_for_people(cli: Any, tiny: Any) -> None:
    answer = cli("simulate", tiny.experiment, "--dry-run")
    assert answer.code == 0, answer.err
    for words in (
        "plan of tiny",
        "north",
        "trainable",
        "bytes a round",
        "expected peak memory",
        "arms: federated, pooled",
    ):
        assert words in answer.out, words


def test_planned_bytes_are_those_of_the_run(cli: Any, finished: Path, tiny: Any) -> None:
    planned = json.loads(cli("simulate", tiny.experiment, "--dry-run", "--json").out)
    made, rows = tiny.summary(finished), tiny.lines(finished / "journal.jsonl")
    for way in ("up", "down"):
        assert planned["bytes"]["per_round"][way] == pytest.approx(rows[-1]["bytes"][way], rel=0.02)
        # The plan is an upper bound: the best validated round is tested too only where it is not the last.
        if made["arms"]["federated"]["best"]["round"] != made["rounds"]:
            assert planned["bytes"][way] == pytest.approx(made["bytes"][way], rel=0.02)
        else:
            assert planned["bytes"][way] > 0.98 * made["bytes"][way]
    assert planned["bytes"]["full_model"] == made["bytes"]["full_model"]
    assert planned["trainable_parameters"] == made["trainable_parameters"]
    assert planned["backbone"]["parameters"] == made["backbone"]["parameters"]
    assert {name: row["test"] for name, row in planned["sites"].items()} == {
        name: row["num_examples"] for name, row in made["arms"]["federated"]["sites"].items()
    }


# --- determinism ------------------------------------------------------------------------------------------------------


def test_same_fingerprint_twice_in_one_process_and_in_a_fresh_one(finished: Path, tiny: Any, tmp_path: Path) -> None:
    import torch

    what = fedvfm.load_experiment(str(tiny.experiment), ["baselines=[]"])
    first = fedvfm.simulate(what, output=tmp_path / "first")
    torch.manual_seed(99)  # the caller's own random state must not matter
    second = fedvfm.simulate(what, output=tmp_path / "second")
    assert first.summary["fingerprint"] == second.summary["fingerprint"] == tiny.summary(finished)["fingerprint"]
    assert first.summary["arms"]["federated"] == tiny.summary(finished)["arms"]["federated"]
    assert "<table>" in first._repr_html_()


def test_resuming_a_finished_run_changes_nothing(copy: Path, finished: Path, tmp_path: Path, tiny: Any) -> None:
    answer = tiny.run("simulate", "--resume", copy, "--json")
    assert answer.code == 0, answer.err
    assert tiny.results(copy) == tiny.results(finished)
    assert (copy / "journal.jsonl").read_bytes() == (finished / "journal.jsonl").read_bytes()
    assert (copy / "samples.csv").read_bytes() == (finished / "samples.csv").read_bytes()


# --- the other verbs --------------------------------------------------------------------------------------------------


def test_version_and_experiments_are_quick(cli: Any, tiny: Any) -> None:
    started = time.monotonic()
    code = QUICK
    done = subprocess.run(
        [sys.executable, "-c", code], env=tiny.environment(), capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == "[]", done.stderr
    assert "brain-mri" in json.loads(done.stdout)
    assert time.monotonic() - started < 30
    assert cli("--version").out == f"fedvfm {fedvfm.__version__}\n"
    shown = cli("experiments")
    assert shown.code == 0
    assert "brain-mri" in shown.out


def test_compare_two_runs(cli: Any, finished: Path, every: tuple[Path, Any]) -> None:
    shown = cli("compare", finished, every[0])
    assert shown.code == 0, shown.err
    assert "federated" in shown.out
    found = cli("compare", finished, every[0], "--json")
    assert found.code == 0
    assert json.loads(found.out)
