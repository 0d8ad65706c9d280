"""The Ray engine: the same bits as in-process where threads match, quiet, and nothing left behind."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from tests.support import forks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra 'ray' is not installed"),
]

# Ray gives its workers the lowest priority, which starves them on a busy machine.
ENVIRONMENT = {"RAY_worker_niceness": "0"}
MARK = "TEST_OF_RAY"


def ours(mark: str) -> dict[int, list[str]]:
    """Processes that a test started, or one of these, whoever is their parent now: they carry its mark.

    Others of the machine are nobody's business here: Ray or a SuperLink may run for another test beside this one.
    """
    found = {}
    for process in psutil.process_iter(["cmdline", "status"]):
        with contextlib.suppress(psutil.Error):
            alive = process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid()
            if alive and process.environ().get(MARK) == mark:
                found[process.pid] = process.info["cmdline"] or []
    return found


@pytest.fixture(autouse=True)
def _nothing_left_behind(monkeypatch: pytest.MonkeyPatch, template: forks.Template) -> Iterator[None]:
    template.begin()  # of the whole session, so before the mark is there
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)  # which every process inherits from the one that starts it
    yield
    deadline = time.monotonic() + 600
    while ours(mark) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not ours(mark)


def test_only_what_this_test_started_is_counted() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(600)  # superlink raylet"]
    stranger = subprocess.Popen(sleep, env={key: word for key, word in os.environ.items() if key != MARK})
    between = [sys.executable, "-c", f"import subprocess as s; print(s.Popen({sleep!r}, stdout=s.DEVNULL).pid)"]
    orphan = int(subprocess.run(between, stdout=subprocess.PIPE, check=True).stdout)
    try:
        assert set(ours(os.environ[MARK])) == {orphan}
    finally:
        os.kill(orphan, signal.SIGKILL)
        stranger.kill()
        stranger.wait()


def test_ray_gives_the_same_bits_as_in_process(tiny: Any, finished: Path, tmp_path: Path) -> None:
    call = ["simulate", tiny.experiment, "--engine", "ray", "--output", tmp_path / "run", "--json"]
    answer = tiny.run(*call, environment=ENVIRONMENT)
    assert answer.code == 0, answer.err
    assert answer.err == "", "neither Ray nor Flower talks"
    made = json.loads(answer.out)
    assert made["engine"] == "ray"
    # Equal threads (one): not close, but the same, over both arms.
    assert tiny.results(tmp_path / "run") == tiny.results(finished)
    last = [tiny.lines(run / "journal.jsonl")[-1]["bytes"] for run in (tmp_path / "run", finished)]
    assert last[0]["up"] == pytest.approx(last[1]["up"], rel=0.01)
    assert last[0]["down"] == pytest.approx(last[1]["down"], rel=0.01)


SHARED_STEPS = (
    "recipe.min_sites=3",
    "recipe.secure_aggregation={}",
    'recipe.optimiser={name="sgd", schedule="constant", warmup=0.0, weight_decay=0.0, learning_rate=0.1}',
)


def on_both_engines(tiny: Any, folder: Path, *changed: str) -> None:
    """Run the federated arm with settings changed, in-process and on Ray, and compare what they end with."""
    sets = [word for value in ("baselines=[]", *changed) for word in ("--set", value)]
    for engine in ("in-process", "ray"):
        answer = tiny.run(
            "simulate", tiny.experiment, *sets,
            "--engine", engine, "--output", folder / engine, environment=ENVIRONMENT,
        )  # fmt: skip
        assert answer.code == 0, answer.err
    assert tiny.results(folder / "ray") == tiny.results(folder / "in-process")


def test_one_factor_at_a_time_gives_the_same_bits_too(tiny: Any, tmp_path: Path) -> None:
    on_both_engines(tiny, tmp_path, 'recipe.adapter.factors="alternate"')
    assert [line["factor_error"] for line in tiny.lines(tmp_path / "ray" / "journal.jsonl")] == [0.0] * 3


def test_asynchronous_rounds_give_the_same_bits_too(tiny: Any, tmp_path: Path) -> None:
    """Also where hospitals share a node, and one of them is waited for by nobody."""
    on_both_engines(tiny, tmp_path, "recipe.asynchronous={buffer_size=2}", "site_times={south=2.5}")
    assert tiny.lines(tmp_path / "ray" / "journal.jsonl")[-1]["staleness"] == {"south": 2}


def test_arrays_that_stay_at_the_sites_give_the_same_bits_too(tiny: Any, tmp_path: Path) -> None:
    on_both_engines(tiny, tmp_path, 'recipe.personal.kind="share-A"')
    kept = {engine: sorted((tmp_path / engine).rglob("*.personal")) for engine in ("in-process", "ray")}
    assert [path.read_bytes() for path in kept["ray"]] == [path.read_bytes() for path in kept["in-process"]]
    assert kept["ray"]


def test_coded_differences_give_the_same_bits_too(tiny: Any, tmp_path: Path) -> None:
    on_both_engines(tiny, tmp_path, 'recipe.codec="int8"')


@pytest.mark.parametrize("mechanism", ["patient-level", "site-level", "patient-level-shared"])
def test_noise_of_a_run_s_seed_gives_the_same_bits_too(tiny: Any, cli: Any, tmp_path: Path, mechanism: str) -> None:
    """Drawn at the sites, in other processes, or at the server; or shared, on the whole numbers of a secure sum."""
    data = tiny.with_patients(tmp_path / "data")
    privacy = f'{{mechanism="{mechanism}", clip=1.0, noise_multiplier=0.8, delta=1e-5}}'
    sets = (
        f'data.path="{data}"',
        "baselines=[]",
        'recipe.aggregation.weighting="uniform"',
        f"recipe.privacy={privacy}",
        *(SHARED_STEPS if mechanism.endswith("-shared") else ()),
    )
    call = ["simulate", tiny.experiment, *(word for one in sets for word in ("--set", one))]
    alike = cli(*call, "--output", tmp_path / "in-process")
    assert alike.code == 0, alike.err
    answer = tiny.run(*call, "--engine", "ray", "--output", tmp_path / "ray", environment=ENVIRONMENT)
    assert answer.code == 0, answer.err
    assert tiny.results(tmp_path / "ray") == tiny.results(tmp_path / "in-process")
    found = [tiny.lines(tmp_path / engine / "journal.jsonl") for engine in ("ray", "in-process")]
    assert all(("secure_aggregation" in line) == mechanism.endswith("-shared") for line in found[0])
    for mine, theirs in zip(*found, strict=True):
        assert mine["fingerprint"] == theirs["fingerprint"]
        assert mine.get("privacy") == theirs.get("privacy")
        assert mine.get("secure_aggregation") == theirs.get("secure_aggregation")
    drawn = [line["privacy"]["simulated"] for line in found[0] if "privacy" in line]
    assert drawn == ([True] * 3 if mechanism == "site-level" else []), "the server's draws"


def test_a_sites_own_words_reach_the_researcher(tiny: Any, tmp_path: Path) -> None:
    import shutil

    data = shutil.copytree(tiny.data, tmp_path / "data")
    Image.new("L", (28, 28), 7).save(data / "masks" / "east-01.png")
    sets = ["--set", f'data.path="{data}"', "--set", "baselines=[]"]
    answer = tiny.run(
        "simulate", tiny.experiment, "--engine", "ray", *sets, "--output", tmp_path / "run", environment=ENVIRONMENT
    )
    said = tiny.one_error(answer, 3, "DataError", "site 'east'", "east-01.png", "value 7")
    assert all(line.startswith(("[", "DataError")) for line in said.splitlines()), said


def test_ctrl_c_ends_ray_and_the_run_goes_on_in_process(tiny: Any, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    call = ["simulate", tiny.experiment, "--engine", "ray", "--output", run]
    process = tiny.start(*call, environment=ENVIRONMENT, start_new_session=True)
    seen = []
    for line in process.stderr:
        seen.append(line)
        if "federated round 2 site" in line:
            os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
            break
    _, err = process.communicate(timeout=600)
    said = "".join(seen) + err
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "Go on with: fedvfm simulate --resume" in said
    experiment = run / "experiment.json"
    experiment.write_text(experiment.read_text().replace('"engine": "ray"', '"engine": "in-process"'))
    assert tiny.run("simulate", "--resume", run).code == 0
    assert tiny.results(run) == tiny.results(finished)
