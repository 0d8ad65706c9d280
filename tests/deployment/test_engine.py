"""The deployment engine: real SuperLink, proxy, SuperNodes and executors, the bits of the in-process engine."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.data import test_whole_volumes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_left")]

ALONE = ["--set", "baselines=[]"]
TWO = [*ALONE, "--set", 'partition.include=["east", "south"]']


def rounds(tiny: Any, run: Path) -> list[str]:
    """The fingerprint after every round."""
    return [line["fingerprint"] for line in tiny.lines(run / "journal.jsonl")]


def lines_of_both(tiny: Any, folder: Path, *words: Any) -> list[dict[str, Any]]:
    """The journal of what both engines did alike, to the last bit of every round."""
    for engine in ("in-process", "deployment"):
        answer = tiny.run("simulate", *words, "--engine", engine, "--output", folder / engine)
        assert answer.code == 0, answer.err
    assert tiny.results(folder / "deployment") == tiny.results(folder / "in-process")
    assert rounds(tiny, folder / "deployment") == rounds(tiny, folder / "in-process")
    return list(tiny.lines(folder / "deployment" / "journal.jsonl"))


class Watch(threading.Thread):
    """Looks at a run's processes and files while it runs."""

    def __init__(self, folder: Path, ours: Any) -> None:
        super().__init__(daemon=True)
        self.folder, self.ours, self.over = folder, ours, threading.Event()
        self.words: set[str] = set()
        self.secrets: set[str] = set()
        self.modes: dict[str, int] = {}

    def run(self) -> None:
        while not self.over.wait(0.5):
            for words in self.ours(self.folder).values():
                self.words.update(words)
            with contextlib.suppress(OSError):  # a folder went while it was listed: the next look sees the rest
                for path in (self.folder / "deployment").rglob("*"):
                    self.look(path)

    def look(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            if path.suffix in (".key", ".secret", ".log", ".db", ".json", ".pid"):
                self.modes[path.name] = stat.S_IMODE(path.stat().st_mode)
            if path.suffix == ".secret" and (text := path.read_text()):  # it may be written just now
                self.secrets.add(text)

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


def test_three_sites_give_the_bits_of_the_in_process_engine(tiny: Any, ours: Any, tmp_path: Path) -> None:
    alike = tiny.run("simulate", tiny.experiment, *ALONE, "--output", tmp_path / "in-process")
    assert alike.code == 0, alike.err
    run = tmp_path / "run"
    with Watch(run, ours) as seen:
        answer = tiny.run_anew("simulate", tiny.experiment, *ALONE, "--engine", "deployment", "--output", run)
    assert answer.code == 0, answer.err
    assert tiny.results(run) == tiny.results(tmp_path / "in-process")
    assert rounds(tiny, run) == rounds(tiny, tmp_path / "in-process")
    assert len(rounds(tiny, run)) == 3
    assert not (run / "deployment").exists(), "keys, logs and Flower's database go when all is well"
    # What the machine could see meanwhile.
    programs = " ".join(sorted(seen.words))
    assert "fedvfm.server.network.superlink" in programs
    assert "fedvfm.client.process.supernode" in programs
    assert "flower-superexec" not in programs
    assert len(seen.secrets) == 4
    assert not [secret for secret in seen.secrets if secret in programs]
    assert "0.0.0.0" not in programs
    open_to_others = {name: oct(mode) for name, mode in seen.modes.items() if mode & 0o077}
    assert not open_to_others
    assert {"superlink.log", "executor-site-000.log", "site-002.key", "superlink.key"} <= set(seen.modes)


def test_one_factor_at_a_time_over_a_real_network(tiny: Any, tmp_path: Path) -> None:
    sets = [*TWO, "--set", 'recipe.adapter.factors="alternate"']
    lines_of_both(tiny, tmp_path, tiny.experiment, *sets)
    assert [line["factor_error"] for line in tiny.lines(tmp_path / "deployment" / "journal.jsonl")] == [0.0] * 3


def test_whole_volumes_over_a_real_network(tiny: Any, tmp_path: Path) -> None:
    """A 3D U-Net trained whole: pieces, views and sums are those of the in-process engine."""
    test_whole_volumes.write(tmp_path / "data")
    experiment = tmp_path / "volumes.toml"
    experiment.write_text(
        f"""
name = "volumes"
baselines = []
[data]
source = "folder"
path = "{tmp_path / "data"}"
options = {{ ids = "names", class_names = ["rest", "bright", "dark"], mask_values = [0, 1, 2] }}
[partition]
kind = "iid"
sites = 1
val_share = 0.0
test_share = 0.3
[recipe]
rounds = 2
threads = 1
[recipe.backbone]
name = "unet3d"
options = {{ channels = [4, 8] }}
[recipe.adapter]
kind = "full"
[recipe.data]
class_names = ["rest", "bright", "dark"]
depth = 8
input_size = [16, 16]
fit = "native"
augment = ["flip", "intensity"]
"""
    )
    lines_of_both(tiny, tmp_path, experiment)
    assert "slice " in (tmp_path / "in-process" / "report.html").read_text(), "a picture says which slice it shows"


def test_a_residual_and_rounds_by_time_over_a_real_network(tiny: Any, tmp_path: Path) -> None:
    """What no site sends comes down to all of them; a hospital that is slow says how few images it saw."""
    sets = (
        *TWO[1:],
        'recipe.aggregation.rule="stack"',
        "recipe.adapter.options={residual=16}",
        "recipe.optimiser.batch_size=1",
        "recipe.optimiser.round_minutes=1.0",
        "site_pace={east=2.0}",
    )
    words = [word for one in sets if one != "--set" for word in ("--set", one)]
    lines = lines_of_both(tiny, tmp_path, tiny.experiment, *words)
    assert [line["examples"]["east"] for line in lines] == [2] * 3
    assert all(line["refused"] == {} and line["aggregate_error"] < 1e-5 for line in lines)


def test_asynchronous_rounds_over_a_real_network(tiny: Any, tmp_path: Path) -> None:
    """Who is slow by the counted clock is late by it, and the same bits come of it."""
    sets = (*ALONE[1:], "recipe.asynchronous={buffer_size=2}", "site_times={south=2.5}")
    words = [word for one in sets for word in ("--set", one)]
    lines = lines_of_both(tiny, tmp_path, tiny.experiment, *words)
    assert [line["staleness"] for line in lines] == [{}, {}, {"south": 2}]


def test_a_secure_sum_with_shared_noise_over_a_real_network(tiny: Any, tmp_path: Path) -> None:
    """Virtual hospitals mask nothing from one machine; the whole numbers and their seeded noise are the same ones."""
    sets = (
        *ALONE[1:],
        "recipe.min_sites=3",
        "recipe.secure_aggregation={}",
        'recipe.aggregation.weighting="uniform"',
        'recipe.privacy={mechanism="site-level-shared", clip=1.0, noise_multiplier=0.1, delta=1e-5}',
    )
    words = [word for one in sets for word in ("--set", one)]
    lines = lines_of_both(tiny, tmp_path, tiny.experiment, *words)
    assert [line["secure_aggregation"]["honest"] for line in lines] == [2, 2, 2]


def test_coded_differences_over_a_real_network(tiny: Any, tmp_path: Path) -> None:
    sets = [*TWO, "--set", 'recipe.codec="int8"']
    lines_of_both(tiny, tmp_path, tiny.experiment, *sets)
    plain = tiny.run("simulate", tiny.experiment, *TWO, "--output", tmp_path / "plain")
    assert plain.code == 0, plain.err
    coded, whole = (
        [sum(line["bytes"].values()) for line in tiny.lines(tmp_path / name / "journal.jsonl")[1:]]
        for name in ("in-process", "plain")
    )
    assert all(one < 0.5 * other for one, other in zip(coded, whole, strict=True))
    assert not (tmp_path / "in-process" / "residuals").exists()


def test_two_sites_a_killed_parent_and_the_run_goes_on(tiny: Any, ours: Any, until: Any, tmp_path: Path) -> None:
    alike = tiny.run("simulate", tiny.experiment, *TWO, "--output", tmp_path / "in-process")
    assert alike.code == 0, alike.err
    run = tmp_path / "run"
    process = tiny.start_anew("simulate", tiny.experiment, *TWO, "--engine", "deployment", "--output", run)
    for line in process.stderr:
        if "federated round 1/3" in line:
            break
    assert len(ours(run)) >= 5
    process.kill()
    process.communicate()
    assert until(lambda: not ours(run), 300), f"orphans: {ours(run)}"
    answer = tiny.run("simulate", "--resume", run)
    assert answer.code == 0, answer.err
    assert tiny.results(run) == tiny.results(tmp_path / "in-process")
    assert rounds(tiny, run) == rounds(tiny, tmp_path / "in-process")


def test_a_site_that_cannot_start_is_named_with_its_last_words(tiny: Any, tmp_path: Path) -> None:
    """Every process of it ends, and the log that tells why is kept, for its owner alone."""
    run = tmp_path / "run"
    environment = {"FEDVFM_FAULT_POINT": "executor-starts:1"}
    answer = tiny.run(
        "simulate", tiny.experiment, *TWO, "--engine", "deployment", "--output", run, environment=environment
    )
    said = tiny.one_error(answer, 11, "EngineError", "engine 'deployment': executor-site-00", "ended 3 times")
    assert "SIGKILL" in answer.err
    assert "executor-site-00" in said
    logs = list((run / "deployment").glob("*.log"))
    assert logs
    assert all(stat.S_IMODE(os.stat(path).st_mode) == 0o600 for path in logs)


@pytest.mark.parametrize("kind", ["head-local", "ditto", "dual"])
def test_arrays_that_stay_at_the_sites_over_a_real_network(tiny: Any, tmp_path: Path, kind: str) -> None:
    sets = [*TWO, "--set", f'recipe.personal.kind="{kind}"']
    sets += ["--set", "recipe.adapter.options={personal=2}"] if kind == "dual" else []
    lines_of_both(tiny, tmp_path, tiny.experiment, *sets)
    kept = {
        engine: sorted((tmp_path / engine).rglob("personal/*/*.personal")) for engine in ("in-process", "deployment")
    }
    assert len(kept["deployment"]) == 6, "two sites, three rounds"
    assert [[path.name, path.read_bytes()] for path in kept["deployment"]] == [
        [path.name, path.read_bytes()] for path in kept["in-process"]
    ]
