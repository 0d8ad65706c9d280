"""The Ray engine: the same bits as in-process where threads match, quiet, and nothing left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra 'ray' is not installed"),
]

# Ray gives its workers the lowest priority, which starves them on a busy machine.
ENVIRONMENT = {"RAY_worker_niceness": "0"}


def ours() -> set[int]:
    """Processes of Ray or of a SuperLink."""
    words = ("ray::", "raylet", "gcs_server", "plasma_store", "default_worker.py", "superlink", "ray/dashboard")
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        if any(word in " ".join(process.info["cmdline"] or []) for word in words):
            found.add(process.pid)
    return found


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    before = ours()
    yield
    deadline = time.monotonic() + 60
    while ours() - before and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not ours() - before


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


def test_ctrl_c_ends_ray_and_the_run_goes_on_in_process(tiny: Any, forks: Any, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    call = ["simulate", tiny.experiment, "--engine", "ray", "--output", run]
    process = tiny.start(*call, environment=ENVIRONMENT, start_new_session=True)
    seen = []
    for line in process.stderr:
        seen.append(line)
        if "federated round 2 site" in line:
            os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
            break
    _, err = process.communicate(timeout=120)
    said = "".join(seen) + err
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "Go on with: fedvfm simulate --resume" in said
    experiment = run / "experiment.json"
    experiment.write_text(experiment.read_text().replace('"engine": "ray"', '"engine": "in-process"'))
    assert forks.run(tmp_path, "simulate", "--resume", run).code == 0
    assert tiny.results(run) == tiny.results(finished)
