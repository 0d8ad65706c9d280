"""Child processes: logs, pid files, back-off, and that they end with their parent, however it ends."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedvfm import errors
from fedvfm.runtime import processes

SLEEP = (sys.executable, "-SEc", "import time; print('up', flush=True); time.sleep(100)")
STUBBORN = (
    sys.executable,
    "-SEc",
    "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(100)",
)


def wait(true: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def up(folder: Path, name: str) -> bool:
    path = processes.log_path(folder, name)
    return path.exists() and "up" in path.read_text()


def test_a_child_has_a_private_log_a_pid_file_and_a_group_of_its_own(tmp_path: Path) -> None:
    family = processes.Family(tmp_path)
    child = family.start(processes.Program("one", SLEEP, {"MARK": "x"}))
    wait(lambda: up(tmp_path, "one"))
    assert child.process is not None
    pid = child.process.pid
    assert processes.running(processes.pid_path(tmp_path, "one")) == pid
    assert os.getpgid(pid) == pid
    assert psutil.Process(pid).environ()["MARK"] == "x"
    assert psutil.Process(pid).cmdline()[-1] == SLEEP[-1], "the launcher became the program"
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    family.stop()
    assert not psutil.pid_exists(pid)
    assert not processes.pid_path(tmp_path, "one").exists()


def test_one_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    family = processes.Family(tmp_path)
    child = family.start(processes.Program("deaf", STUBBORN, grace_s=0.3))
    wait(lambda: up(tmp_path, "deaf"))
    family.stop()
    assert child.code == -signal.SIGKILL


def test_what_ends_is_started_again_later_and_later_with_its_partner(
    tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    family = processes.Family(tmp_path)
    partner = family.start(processes.Program("partner", SLEEP))
    family.start(processes.Program("short", (sys.executable, "-SEc", "raise SystemExit(3)"), pulls_down=("partner",)))
    short = family.children["short"]
    before = partner.process
    with family.watched():
        wait(lambda: short.failures >= 3, 20)
        wait(lambda: partner.process not in (None, before), 20)
    assert said()[:2] == [
        "short ended (exit code 3); started again in 1 s",
        "short ended (exit code 3); started again in 2 s",
    ]
    assert not list(tmp_path.glob("*.pid")), "the block's end ended all"


def test_a_program_is_started_once_while_others_look_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watching thread used to start a new member a second time, and both wanted one port."""
    started: list[str] = []
    real = processes.Child.start

    def slowly(child: processes.Child) -> None:
        started.append(child.program.name)
        time.sleep(0.5)
        real(child)

    monkeypatch.setattr(processes.Child, "start", slowly)
    monkeypatch.setattr(processes, "POLL_S", 0.01)
    family = processes.Family(tmp_path)
    with family.watched():
        family.start(processes.Program("one", SLEEP))
        family.start(processes.Program("two", SLEEP))
    assert started == ["one", "two"]


def test_a_stale_pid_file_is_no_process(tmp_path: Path) -> None:
    path = tmp_path / "x.pid"
    for text in ("", "{}", "[]", '{"pid": 99999999, "started": 1}', json.dumps({"pid": os.getpid(), "started": 5.0})):
        path.write_text(text)
        assert processes.running(path) is None
        assert not processes.end(path)
        assert not path.exists()
    assert processes.running(tmp_path / "none.pid") is None
    processes.write_pid(path, os.getpid())
    assert processes.running(path) == os.getpid()


def test_what_an_earlier_parent_left_is_ended_before_a_new_start(tmp_path: Path) -> None:
    left = subprocess.Popen(SLEEP, start_new_session=True, stdout=subprocess.DEVNULL)
    processes.write_pid(processes.pid_path(tmp_path, "one"), left.pid)
    family = processes.Family(tmp_path)
    child = family.start(processes.Program("one", SLEEP))
    assert left.wait(5) == -signal.SIGTERM
    assert child.code is None
    family.stop()


def test_children_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from fedvfm.runtime import processes\n"
        "family = processes.Family(Path(sys.argv[1]))\n"
        f"command = {STUBBORN!r}\n"
        "[family.start(processes.Program(name, command)) for name in ('a', 'b')]\n"
        "with family.watched(): time.sleep(100)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    wait(lambda: up(tmp_path, "a") and up(tmp_path, "b"), 20)
    pids = [processes.running(processes.pid_path(tmp_path, name)) for name in "ab"]
    assert all(pids)
    parent.kill()
    parent.wait()
    wait(lambda: not any(psutil.pid_exists(pid) for pid in pids if pid), 5)


def test_a_large_log_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOG_BYTES", 10)
    path = processes.log_path(tmp_path, "x")
    path.write_text("old " * 10)
    os.close(processes.open_log(path))
    assert path.read_text() == ""
    assert path.with_suffix(".log.1").read_text() == "old " * 10


def test_a_program_that_is_not_installed_is_named() -> None:
    assert Path(processes.console_script("flower-superlink")).is_file()
    with pytest.raises(errors.EngineError, match="program flower-nothing is not installed beside"):
        processes.console_script("flower-nothing")


# -- what a command that stays is made of ------------------------------------------------------------------------------


def test_work_is_repeated_until_the_block_ends() -> None:
    done: list[float] = []
    waits = iter([None, 0.01, 0.01])
    with processes.repeated(lambda: (done.append(time.monotonic()), next(waits, 100.0))[1], 0.02, "test"):
        wait(lambda: len(done) == 4, 60)
    time.sleep(0.05)
    assert len(done) == 4
    assert "test" not in {thread.name for thread in threading.enumerate()}


def test_the_block_ends_after_work_in_hand_or_without_it() -> None:
    begun, go_on, over = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(60)
        over.set()

    with processes.repeated(work, 0.0, "test", patient=False):
        assert begun.wait(60)
    assert not over.is_set()
    go_on.set()
    begun.clear()
    with processes.repeated(work, 0.0, "test"):
        assert begun.wait(60)
    assert over.wait(60)


def test_one_process_of_a_name_works_in_a_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with processes.alone(run, "server", "the server of x"):
        assert stat.S_IMODE(run.stat().st_mode) == 0o700
        with (
            pytest.raises(errors.OutputInUse, match=rf"the server of x runs already \(process {os.getpid()}\)"),
            processes.alone(run, "server", "the server of x"),
        ):
            pass
        assert processes.running(processes.pid_path(run, "server")) == os.getpid()
        with processes.alone(run, "client", "another"):
            pass
    assert not list(run.glob("*.pid"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_and_then_means_what_it_did(number: signal.Signals) -> None:
    """However the block ended: a client that failed kept the handlers, and Ctrl-C did nothing any more."""
    before = [signal.getsignal(one) for one in processes.ASKED_TO_END]

    def fail() -> None:
        with processes.told_to_end() as over:
            os.kill(os.getpid(), number)
            assert over.wait(60)
            raise errors.EngineError("the SuperNode is not installed")

    with pytest.raises(errors.EngineError):
        fail()
    assert [signal.getsignal(one) for one in processes.ASKED_TO_END] == before


def test_of_two_that_start_together_one_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both looked for a pid file before either had written one."""
    with processes.alone(tmp_path, "client", "the client"):
        monkeypatch.setattr(processes, "running", lambda path: None)
        with (
            pytest.raises(errors.OutputInUse, match=r"the client runs already \(it starts just now\)"),
            processes.alone(tmp_path, "client", "the client"),
        ):
            pass
    with processes.alone(tmp_path, "client", "the client"):
        assert processes.pid_path(tmp_path, "client").exists()


def test_one_that_was_killed_stands_in_nobodys_way(tmp_path: Path) -> None:
    words = "import pathlib, sys, time; from fedvfm.runtime import processes\n"
    words += "with processes.alone(pathlib.Path(sys.argv[1]), 'client', 'x'): print('in', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", words, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(errors.OutputInUse, match=str(other.pid)), processes.alone(tmp_path, "client", "x"):
            pass
        other.kill()
    with processes.alone(tmp_path, "client", "x"):
        pass
