"""What the supervisor does between two recipes; without processes."""

from __future__ import annotations

import datetime
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.runtime import processes
from fedvfm.server import state_folder, status, supervisor
from fedvfm.server.coordinator import coordinator, orders
from fedvfm.server.network import node_keys, superlink
from fedvfm.server.rounds import result
from fedvfm.trust import signed_documents


def test_a_full_disk_between_two_recipes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    """What follows is written down when there is room; the server and its sites stay up, and it is told once."""
    roster = tmp_path / "roster.jsonl"
    roster.touch()
    where: Any = SimpleNamespace(
        roster_path=roster, sites=dict, about=SimpleNamespace(recipe="a" * 64), finished=lambda recipe: True
    )
    control: Any = SimpleNamespace(nodes=list)
    left = [2]

    def settle(given: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise errors.StorageError("cannot write steering.json: No space left on device")
        return given

    monkeypatch.setattr(orders, "settle", settle)
    monkeypatch.setattr(result, "ensure", lambda given: tmp_path)
    monkeypatch.setattr(status, "evaluation", lambda given: {"round": 3})
    run: Any = SimpleNamespace(process=object(), code=0)
    assert supervisor._until_done(where, run, control, threading.Event(), False) == {"round": 3}
    assert said() == [
        f"recipe {'a' * 12} is finished: adapter and report lie in {tmp_path}",
        "what follows cannot be written down yet: cannot write steering.json: No space left on device",
    ]


def test_where_the_proxy_cannot_be_told_the_superlink_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk a revoked site would stay in for as long as that lasts."""

    def no_room(*given: Any) -> None:
        raise errors.StorageError("no space left")

    roster, synced = tmp_path / "roster.jsonl", []
    roster.touch()
    where: Any = SimpleNamespace(roster_path=roster, sites=dict)
    monkeypatch.setattr(coordinator, "sync", lambda control, sites: synced.append(sites))
    with monkeypatch.context() as full:
        full.setattr(node_keys.storage, "write_text", no_room)
        assert supervisor._synced(where, None, 0) == 0, "it is tried again"  # type: ignore[arg-type]
    assert synced == [{}]
    assert supervisor._synced(where, None, 0) == roster.stat().st_mtime_ns  # type: ignore[arg-type]
    assert (tmp_path / "run" / supervisor.KEYS).is_file()


def test_a_damaged_evaluation_is_told_in_a_sentence(tmp_path: Path) -> None:
    """`server status` ended with a traceback."""
    where: Any = SimpleNamespace(
        run_path=lambda recipe: tmp_path, about=SimpleNamespace(recipe="a" * 64), finished=lambda recipe: True
    )
    for text in ("{", "[1]", "[]", '"x"'):
        (tmp_path / "evaluation.json").write_text(text)
        done, why = status.finished(where)
        assert done == {}
        assert why.endswith("cannot be read; remove it and start the server: the final test is made again")
    (tmp_path / "evaluation.json").write_text('{"round": 3}')
    assert status.finished(where) == ({"round": 3}, "")


def test_a_server_that_is_told_to_end_while_it_starts_does(tmp_path: Path) -> None:
    """It went on waiting for a SuperLink for two minutes; `server stop` kills after half of one."""
    over = threading.Event()
    threading.Timer(0.5, over.set).start()
    child = processes.Child(processes.Program("superlink", ()), tmp_path)
    link = superlink.prepare(tmp_path / "superlink")  # nobody listens at its port
    began = time.monotonic()
    superlink.wait_ready(link, child, over=over)
    supervisor._wait_listening(("127.0.0.1", link.port), child, over)
    assert time.monotonic() - began < supervisor.READY_S


def test_a_run_that_stopped_for_good_ends_the_server_with_its_own_code(tmp_path: Path) -> None:
    """And with its sentence, not with the line of its log; systemd does not start it again then."""
    roster = tmp_path / "roster.jsonl"
    roster.touch()
    where: Any = SimpleNamespace(roster_path=roster, sites=dict)
    control: Any = SimpleNamespace(nodes=list)
    raised = "processes.write_failure(errors.QuorumMissed('after 3600 s waiting: 1 of 2 sites'))"
    ended = f"import sys; from fedvfm import errors; from fedvfm.runtime import processes; {raised}; sys.exit(8)"
    run = processes.Child(processes.Program("coordinate", (sys.executable, "-c", ended), restart=False), tmp_path)
    run.start()
    with pytest.raises(errors.EngineError, match=r"^the run stopped: after 3600 s waiting: 1 of 2 sites$") as told:
        supervisor._until_done(where, run, control, threading.Event(), False)
    assert (told.value.code, told.value.exit_code) == ("quorum-missed", errors.QuorumMissed.exit_code)
    assert stat.S_IMODE(processes.error_path(tmp_path, "coordinate").stat().st_mode) == 0o600
    run = processes.Child(processes.Program("coordinate", (sys.executable, "-c", "exit(8)"), restart=False), tmp_path)
    run.start()  # what the process before it wrote is not its error
    with pytest.raises(errors.EngineError, match="it ended with exit code 8 and left no error") as told:
        supervisor._until_done(where, run, control, threading.Event(), False)
    assert told.value.exit_code == errors.QuorumMissed.exit_code


def test_a_recipe_that_follows_is_started_again_where_the_disk_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    roster = tmp_path / "roster.jsonl"
    roster.touch()
    done: list[bool] = []
    where: Any = SimpleNamespace(
        roster_path=roster, sites=dict, about=SimpleNamespace(recipe="a" * 64), finished=lambda recipe: bool(done)
    )
    control: Any = SimpleNamespace(nodes=list)
    run = processes.Child(processes.Program("coordinate", ("true",)), tmp_path)
    run.process = subprocess.Popen(["true"])
    run.process.wait()
    full = [True]

    def start() -> None:
        if full.pop() if full else False:
            raise errors.StorageError("cannot write coordinate.log: No space left on device")
        done.append(True)
        run.process = subprocess.Popen(["true"])
        run.process.wait()

    monkeypatch.setattr(run, "start", start)
    monkeypatch.setattr(result, "ensure", lambda given: None)
    monkeypatch.setattr(orders, "settle", lambda given: given)
    monkeypatch.setattr(status, "evaluation", lambda given: {"round": 3})
    assert supervisor._until_done(where, run, control, threading.Event(), False) == {"round": 3}
    assert said() == [
        "recipe aaaaaaaaaaaa begins",
        "coordinate cannot be started now: cannot write coordinate.log: No space left on device",
    ]


@pytest.mark.parametrize(("days", "word"), [(300, "good until"), (20, "renews"), (-1, "expired at")])
def test_status_tells_how_the_certificate_stands(monkeypatch: pytest.MonkeyPatch, days: int, word: str) -> None:
    ends = signed_documents.now() + datetime.timedelta(days=days, hours=1)
    monkeypatch.setattr(state_folder, "certified_until", lambda where: ends)
    assert word in status.certificate(SimpleNamespace())  # type: ignore[arg-type]


def test_a_certificate_is_renewed_while_the_server_runs_and_its_port_starts_again(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    ends, ended = [signed_documents.now()], list[str]()

    def renew(where: Any) -> str:
        ends.append(ends[-1] + datetime.timedelta(days=len(ends) % 2))
        return "a new one" if len(ends) % 2 == 0 else ""

    monkeypatch.setattr(state_folder, "certified_until", lambda where: ends[-1])
    monkeypatch.setattr(state_folder, "renew", renew)
    where: Any = SimpleNamespace(folder=Path("server"))
    monkeypatch.setattr(state_folder, "open_state", lambda folder: where)
    door: Any = SimpleNamespace(process=SimpleNamespace(terminate=lambda: ended.append("terminated")))
    supervisor._renew(where, door)
    assert (ended, said()) == (["terminated"], ["a new one"])
    supervisor._renew(where, door)
    assert ended == ["terminated"], "where nothing was to be done it goes on"
