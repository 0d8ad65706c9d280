"""``server start --detach``: told of when it listens, or with the error it ended with; on small programs."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import psutil
import pytest

from fedvfm import errors
from fedvfm.runtime import processes
from fedvfm.server import daemon

LISTENS = """
import json, os, pathlib, sys, time
print("a note", file=sys.stderr, flush=True)
time.sleep(0.3)
pathlib.Path(sys.argv[1], "listening.json").write_text(json.dumps({"pid": os.getpid(), "address": "127.0.0.1:1"}))
time.sleep(600)
"""
FAILS = """
import sys
from fedvfm import errors
from fedvfm.runtime import processes
print("listening soon\\nOutputInUse: of something else", file=sys.stderr)
processes.write_failure(errors.ConfigError("server.toml", ["one", "two"]))
sys.exit(2)
"""


def python(text: str, folder: Path) -> tuple[str, ...]:
    return (sys.executable, "-c", text, str(folder))


def test_it_returns_when_it_listens_and_the_server_goes_on(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "listening.json").write_text('{"pid": 1, "address": "of another"}')
    told = daemon.launch(tmp_path / "run", python(LISTENS, tmp_path / "run"))
    server = psutil.Process(told["pid"])
    try:
        assert (told["address"], told["finished"]) == ("127.0.0.1:1", False)
        assert os.getsid(server.pid) == server.pid, "a session of its own"
        log = Path(told["log"])
        assert log.read_text() == "a note\n"
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
    finally:
        server.kill()
        server.wait(10)


def test_the_error_it_ended_with_is_told_whole(tmp_path: Path) -> None:
    for _ in range(2):  # the log of the first is not taken for the second's
        with pytest.raises(errors.EngineError, match=r"\(log: .*\): server\.toml: 2 faults\n  - one\n  - two$") as told:
            daemon.launch(tmp_path / "run", python(FAILS, tmp_path))
        assert told.value.exit_code == errors.ConfigError.exit_code, "as in the foreground"
        assert told.value.code == "config"
    with pytest.raises(errors.EngineError, match=r"server\.log\): it ended with exit code 1 and left no error"):
        daemon.launch(tmp_path / "run", (sys.executable, "-c", "raise SystemExit(1)"))


def test_a_server_that_has_nothing_to_do(tmp_path: Path) -> None:
    assert daemon.launch(tmp_path / "run", (sys.executable, "-c", ""))["finished"] is True


def test_one_that_never_listens_is_ended(tmp_path: Path) -> None:
    command = (sys.executable, "-c", f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
               "time.sleep(600)")  # fmt: skip
    with pytest.raises(errors.EngineError, match="does not listen after 3 s and was ended") as told:
        daemon.launch(tmp_path / "run", command, patience_s=3.0)
    assert told.value.exit_code == errors.EngineError.exit_code
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_the_mark_is_of_the_process_that_listens(tmp_path: Path) -> None:
    daemon.announce(tmp_path, "127.0.0.1:9")
    assert daemon._listens(tmp_path, processes.own_pid()) == "127.0.0.1:9"
    assert daemon._listens(tmp_path, 1) is None
    daemon.silence(tmp_path)
    daemon.silence(tmp_path)
    assert daemon._listens(tmp_path, processes.own_pid()) is None
