"""Kill the real process at any moment: ``--resume`` ends with the same adapter and the same scores.

Twenty seeded SIGKILLs: nine inside writes by fault points (one of them loses the end of its last journal line), eleven
at random times, one of which is followed by a second kill during the resume. Two lanes run side by side.
"""

from __future__ import annotations

import concurrent.futures
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow

KILLED = -signal.SIGKILL
SEED = 20261122
POINTS = {
    "file-opened": 20,
    "file-written": 20,
    "file-synced": 20,
    "file-renamed": 20,
    "line-half-written": 6,
    "line-written": 6,
    "between-checkpoint-and-journal": 6,
}
"""Fault point -> how often a run comes there, at least."""


@dataclass(frozen=True)
class Kill:
    """One way to die: at the count-th visit of a fault point, or after a share of an undisturbed run's time.

    Attributes:
        name: of the run's folder.
        point: fault point and count.
        share: of the time of an undisturbed run.
        again: fault point of a second kill, during the resume.
        cut: whether the journal loses the end of its last line.
    """

    name: str
    point: str = ""
    share: float = 0.0
    again: str = ""
    cut: bool = False


def kills() -> list[Kill]:
    rng = np.random.default_rng(SEED)
    visits = {point: int(rng.integers(1, most + 1)) for point, most in POINTS.items()}
    by_point = [Kill(f"{point}-{visit}", f"{point}:{visit}") for point, visit in visits.items()]
    # The first file of all is the experiment: nothing is saved yet, so there is nothing to resume.
    first = Kill("first-file-synced", "file-synced:1")
    shares = rng.uniform(0.02, 0.95, size=10)
    by_time = [Kill(f"time-{number}-{share:.2f}", share=float(share)) for number, share in enumerate(shares)]
    again = Kill("time-then-resume", share=0.65, again="file-renamed:2")
    return [*by_point, first, *by_time, again, Kill("line-cut", "line-written:4", cut=True)]


@dataclass
class Lane:
    """A place to run kills one after another."""

    tiny: Any
    folder: Path
    seconds: float = 0.0

    def measure(self) -> float:
        """Seconds of an undisturbed run."""
        self.tiny.template.wait_ready()
        started = time.monotonic()
        answer = self.tiny.run("simulate", self.tiny.experiment, "--output", self.folder / "whole")
        assert answer.code == 0, answer.err
        self.seconds = time.monotonic() - started
        return self.seconds

    def after(self, seconds: float, *arguments: str | Path) -> Any:
        """Start a call, kill it after some seconds; its answer."""
        process = self.tiny.start(*arguments)
        time.sleep(seconds)
        process.kill()
        return process.answer()

    def die(self, kill: Kill, run: Path) -> None:
        """Run into the kill."""
        call = ["simulate", self.tiny.experiment, "--output", run]
        if kill.point:
            answer = self.tiny.run(*call, environment={"FEDVFM_FAULT_POINT": kill.point})
            assert answer.code == KILLED, f"{kill.name} was never reached: {answer}"
            return
        while self.after(kill.share * self.seconds, *call).code != KILLED:  # it was faster this time
            shutil.rmtree(run)
            self.seconds *= 0.7

    def go_on(self, kill: Kill, run: Path) -> Any:
        """Resume to the end; what never began is started anew in the same folder."""
        answer = self.tiny.run("simulate", "--resume", run)
        if answer.code == 5 and not (run / "experiment.json").exists():
            words = "is no run folder" if not run.exists() else "nothing was saved"
            self.tiny.one_error(answer, 5, words)
            return self.tiny.run("simulate", self.tiny.experiment, "--output", run)
        return answer

    def live_through(self, kill: Kill) -> dict[str, Any]:
        """Die, be damaged, die again, resume; what was found on the way."""
        run = self.folder / kill.name
        self.die(kill, run)
        found: dict[str, Any] = {"run": run, "finished": (run / "summary.json").exists()}
        found["began"] = (run / "experiment.json").exists()
        if kill.cut:
            journal = next(
                path for path in (run / "arms" / "pooled" / "journal.jsonl", run / "journal.jsonl") if path.exists()
            )
            journal.write_bytes(journal.read_bytes()[:-40])
        if kill.again:
            found["again"] = self.tiny.run(
                "simulate", "--resume", run, environment={"FEDVFM_FAULT_POINT": kill.again}
            ).code
        found["answer"] = self.go_on(kill, run)
        return found


@pytest.fixture(scope="module")
def survived(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Kill name -> what was found, from two lanes of the same length."""
    lanes = [Lane(tiny, tmp_path_factory.mktemp("lane")) for _ in range(2)]

    def work(lane: Lane, own: list[Kill]) -> dict[str, dict[str, Any]]:
        lane.measure()
        return {kill.name: lane.live_through(kill) for kill in own}

    everything = kills()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(work, lanes, [everything[::2], everything[1::2]]))
    return {**parts[0], **parts[1]}


def test_there_are_twenty_kills_and_more_than_five_inside_writes() -> None:
    everything = kills()
    assert len({kill.name for kill in everything}) == len(everything)
    assert len(everything) >= 20
    assert sum(bool(kill.point) for kill in everything) >= 5
    assert sum(bool(kill.again) for kill in everything) == 1


@pytest.mark.parametrize("kill", kills(), ids=lambda kill: kill.name)
def test_killed_and_resumed_is_undisturbed(kill: Kill, survived: dict[str, Any], tiny: Any, finished: Path) -> None:
    found = survived[kill.name]
    run = found["run"]
    assert found["answer"].code == 0, found["answer"].err
    assert tiny.results(run) == tiny.results(finished)
    assert (run / "samples.csv").read_bytes() == (finished / "samples.csv").read_bytes()
    assert [row["round"] for row in tiny.lines(run / "journal.jsonl")] == [1, 2, 3]
    fingerprints = [[row["fingerprint"] for row in tiny.lines(one / "journal.jsonl")] for one in (run, finished)]
    assert fingerprints[0] == fingerprints[1]
    assert not list(run.rglob(".*.part")), "what killed writes leave is swept"
    assert {path.name for path in run.iterdir()} == {path.name for path in finished.iterdir()}


def test_the_kills_hit_a_run_at_different_places(survived: dict[str, Any]) -> None:
    assert not survived["first-file-synced"]["began"]
    assert survived["line-cut"]["began"]
    assert survived["time-then-resume"]["again"] == KILLED
    assert any(found["began"] and not found["finished"] for name, found in survived.items() if name.startswith("time-"))


def test_a_fresh_process_resumes_too(tiny: Any, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    killed = tiny.run_anew(
        "simulate",
        tiny.experiment,
        "--output",
        run,
        environment={"FEDVFM_FAULT_POINT": "between-checkpoint-and-journal:2"},
    )
    assert killed.code == KILLED
    answer = tiny.run_anew("simulate", "--resume", run, "--json")
    assert answer.code == 0, answer.err
    assert tiny.results(run) == tiny.results(finished)
