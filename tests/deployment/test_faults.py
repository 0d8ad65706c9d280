"""What makes faults short and clear, without a federation: the look-out, a start on a full disk, a task given up."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from flwr.supercore.inflatable import inflatable_utils as parts

from fedvfm import errors
from fedvfm.client import site_file
from fedvfm.config import schema
from fedvfm.data import sample as samples
from fedvfm.doctor import monitor
from fedvfm.flower import runtime
from fedvfm.report import finding

WAY = finding.blocker("reach", "h:1: nobody listens there (12 s)", "ask the coordinator")
CLOCK = finding.blocker("clock", "this clock is 61 s ahead", "set it")


Said = Callable[[], list[str]]


def test_a_lookout_tells_what_is_wrong_once_and_when_it_is_over(said: Said) -> None:
    rows = [WAY, finding.warning("disk", "little", "watch it")]
    seen = monitor.Lookout(lambda: rows)
    assert not seen.once()
    rows[0] = finding.blocker("reach", "h:1: nobody listens there (19 s)", WAY.remedy)
    assert not seen.once()
    assert said() == ["reach: h:1: nobody listens there (12 s). Remedy: ask the coordinator"]
    rows[:] = [CLOCK]
    seen.once()
    assert said()[1:] == ["clock: this clock is 61 s ahead. Remedy: set it", "reach: is well again"]
    rows.clear()
    assert seen.once()
    assert seen.once()
    assert said()[3:] == ["clock: is well again"]


def test_a_look_that_fails_is_told_too_and_the_thread_looks_on(monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    often = threading.Semaphore(0)

    def look() -> list[finding.Row]:
        often.release()
        raise errors.TrustError("the authority's file is damaged")

    monkeypatch.setattr(monitor, "FIRST_S", 0.01)
    monkeypatch.setattr(monitor, "AGAIN_S", 0.01)
    with monitor.Lookout(look).watched():
        assert all(often.acquire(timeout=10) for _ in range(3))
    assert [text for text in said() if "the authority's file is damaged" in text] == said()[:1]
    assert said()


SCRIPT = """
import json, resource, sys, time
from pathlib import Path
from fedvfm.runtime import logs, processes
folder = Path(sys.argv[1])
child = processes.Child(processes.Program("one", (sys.executable, "-SEc", "import time; time.sleep(100)")), folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
with logs.output(as_json=True):
    child.try_start()
full = [child.process is None, processes.running(processes.pid_path(folder, "one")), processes.due(child)]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
while not processes.due(child):
    time.sleep(0.05)
child.try_start()
well = processes.running(processes.pid_path(folder, "one")) == child.process.pid
child.stop()
print(json.dumps({"full": full, "well": well}))
"""


def test_on_a_full_disk_a_child_waits_and_starts_when_there_is_room(tmp_path: Path) -> None:
    """Its pid file could not be written: unseen by later commands it must not run."""
    answer = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True, check=True)
    found = json.loads(answer.stdout)
    assert found["full"] == [True, None, False]
    assert found["well"]
    record = json.loads(answer.stderr)
    assert (record["logger"], record["level"]) == ("fedvfm.runtime.processes", "error")
    assert record["text"].startswith(
        f"one cannot be started now: cannot write {tmp_path / 'one.pid'}: File too large. Free space"
    )


@pytest.mark.parametrize(
    "error",
    [
        parts.ObjectPushError("id", 1, "session"),
        parts.ObjectPullError("id", "gone"),
        parts.ObjectUnavailableError("id"),
        httpx.ReadError("gone"),
    ],
)
def test_a_task_given_up_with_a_part_under_way_is_an_error_of_ours(error: Exception) -> None:
    """An executor that handed a reply to a SuperNode which let the run go ended with a traceback."""
    with pytest.raises(errors.EngineError, match=f"the SuperNode cannot .* {type(error).__name__}"), _reached():
        raise error


def _reached() -> object:
    return runtime.reached("the SuperNode")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_log_that_takes_nothing_more_stops_no_answer(stream: str) -> None:
    script = (
        "import os, sys; from fedvfm.runtime import logs; from fedvfm.client.process import executor\n"
        f"sys.{stream} = open('/dev/full', 'w')\n"
        f"with logs.output(as_json=True, stream='{stream}'): executor.LOG.warning('x')\n"
        "os.write(1, b'goes on'); os._exit(0)"
    )
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"goes on", b"")


def test_a_hospital_trains_in_the_order_of_a_simulation() -> None:
    """It drew the same split and trained it in the order of the draw: another order, other last bits."""
    site = schema.parse(schema.SiteConfig, {"name": "east", "data": {"source": "folder"}}, "site")
    found = site_file.split(site, [samples.Sample(f"image-{number:02d}", number % 2) for number in range(40)]).parts
    assert {name: len(part) for name, part in found.items()} == {"train": 24, "val": 6, "test": 10}
    assert all([one.id for one in part] == sorted(one.id for one in part) for part in found.values())
