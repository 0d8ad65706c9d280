"""Workers of the real command line: they end with it, whatever ends it, and any number gives the same run."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedvfm.simulation.engines import worker_schedule

pytestmark = pytest.mark.skipif(not worker_schedule.can_fork(), reason="workers cannot be forked safely here")


def processes_of(process: Any) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def is_decoder(process: psutil.Process) -> bool:
    """Whether a process is the one that opens a site's files for another."""
    return "fedvfm.data.decoding" in " ".join(process.cmdline())


def gone(processes: list[psutil.Process]) -> bool:
    """Whether all have ended; a zombie has."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        alive = [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_the_run_which_goes_on(
    tiny: Any, finished: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    process = tiny.start("simulate", tiny.experiment, "--workers", "2", "--output", run, start_new_session=True)
    seen, children, workers = [], [], 0
    for line in process.stderr:
        seen.append(line)
        if "federated round 1/3" in line:
            children = processes_of(process)
            workers = sum(not is_decoder(child) for child in children)
            # A terminal sends Ctrl-C to the whole group; the others are sent to one process.
            os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)
            break
    _, err = process.communicate(timeout=60)
    assert workers == 2, seen
    assert gone(children), "nor is a decoder of files left"
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert "Traceback" not in "".join(seen) + err
        assert "Go on with: fedvfm simulate --resume" in err
    answer = tiny.run("simulate", "--resume", run, "--workers", "1", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["workers"] in (1, 2), "what was finished before stands as it was"
    assert tiny.results(run) == tiny.results(finished)


def test_one_worker_and_two_give_the_same_run(tiny: Any, finished: Path, tmp_path: Path) -> None:
    for number in ("1", "3"):
        run = tmp_path / number
        answer = tiny.run("simulate", tiny.experiment, "--workers", number, "--output", run, "--json")
        assert answer.code == 0, answer.err
        assert answer.err == ""
        assert tiny.results(run) == tiny.results(finished)
        assert (run / "samples.csv").read_bytes() == (finished / "samples.csv").read_bytes()
        assert {line["workers"] for line in tiny.lines(run / "journal.jsonl")} == {int(number)}


@pytest.mark.parametrize("text", ["0", "-1", "1025", "two", "1.5", ""])
def test_numbers_of_workers_that_cannot_be(cli: Any, tiny: Any, text: str) -> None:
    tiny.one_error(cli("simulate", tiny.experiment, "--workers", text), 2, "--workers", "from 1 to 1024, or auto")
