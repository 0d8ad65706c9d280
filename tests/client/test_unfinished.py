"""Time of an executor that was killed at work counts, neither more nor less than it worked."""

from __future__ import annotations

import datetime
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedvfm.audit import audit
from fedvfm.client import state_folder
from fedvfm.client.gate import compute_time, policy
from fedvfm.config import schema
from fedvfm.trust import signed_documents

RECIPE = "ab" * 32


@pytest.fixture
def where(tmp_path: Path) -> state_folder.State:
    (tmp_path / "run").mkdir()
    about = state_folder.About(
        federation="trial", address="a.example:1", site="north", fingerprint="A", joined="2026-01-01T00:00:00Z"
    )
    return state_folder.State(tmp_path, about)


def accept(where: state_folder.State, number: int = 1, kind: str = "train") -> None:
    where.audit.record("received", kind=kind, bytes=100, recipe=RECIPE, round=number)
    where.audit.record("decided", kind=kind, verdict="accepted", recipe=RECIPE, round=number)


def accept_on_friday(where: state_folder.State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three days ago."""
    with monkeypatch.context() as then:
        friday = signed_documents.now() - datetime.timedelta(days=3)
        then.setattr(signed_documents, "now", lambda: friday)
        accept(where)


def used(where: state_folder.State) -> audit.Usage:
    return audit.usage(where.audit.entries, RECIPE)


WORK = """
import sys, time
from pathlib import Path
from fedvfm.client.gate import compute_time as unfinished
unfinished.EVERY_S = 0.2
with unfinished.working(Path(sys.argv[1])):
    time.sleep(600)
"""


def test_killed_at_work_what_it_worked_is_used_up(where: state_folder.State) -> None:
    accept(where)
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", WORK, str(compute_time.path_of(where))])
    path = compute_time.path_of(where)
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text() > '{"seconds": 0.6') and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert used(where).seconds == 0, "which is what could be escaped by"
    seconds = compute_time.settle(where)
    assert 0.5 < seconds - compute_time.EVERY_S < time.monotonic() - began
    assert used(where).seconds == seconds
    assert used(where).trained == (), "the round itself may be asked for again"
    last = where.audit.entries[-1]
    assert (last["event"], last["kind"], last["round"]) == ("interrupted", "train", 1)
    assert compute_time.settle(where) == 0, "once"
    assert used(where).seconds == seconds


def test_a_weekend_that_the_machine_was_off_uses_up_nothing(
    where: state_folder.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_on_friday(where, monkeypatch)
    compute_time.path_of(where).write_text('{"seconds": 40.0}\n')
    assert compute_time.settle(where) == 40.0 + compute_time.EVERY_S
    accept(where)


def test_where_nothing_was_written_down_an_hour_counts_at_most(
    where: state_folder.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever removes the file gains nothing by it, and loses no more than a round."""
    accept_on_friday(where, monkeypatch)
    compute_time.path_of(where).write_text("{")
    assert compute_time.settle(where) == compute_time.LONGEST_S
    accept(where)
    assert compute_time.settle(where) < compute_time.EVERY_S + 60


def test_a_message_that_brings_the_executor_down_each_time_ends_with_the_hours(where: state_folder.State) -> None:
    rules = schema.PolicyConfig(max_hours=0.01)
    for _ in range(8):
        accept(where)
        compute_time.path_of(where).write_text('{"seconds": 0.0}\n')
        compute_time.settle(where)
    assert policy.remaining(rules, used(where)).seconds == 0.0


@pytest.mark.parametrize(
    ("event", "about"),
    [
        ("sent", {"kind": "refusal", "reason": "training", "bytes": 10, "seconds": 7.0}),
        ("trained", {"round": 1, "base": RECIPE, "fingerprint": RECIPE, "examples": 3, "seconds": 7.0}),
        ("evaluated", {"round": 1, "fingerprint": RECIPE, "split": "val", "examples": 3, "seconds": 7.0}),
    ],
)
def test_what_was_answered_counts_once(where: state_folder.State, event: str, about: dict[str, Any]) -> None:
    with compute_time.working(compute_time.path_of(where)):
        accept(where)
        assert compute_time.path_of(where).exists()
        where.audit.record(event, recipe=RECIPE, **about)
    assert not compute_time.path_of(where).exists()
    assert compute_time.settle(where) == 0
    assert used(where).seconds == 7.0


def test_what_people_do_meanwhile_is_no_answer(where: state_folder.State) -> None:
    accept(where)
    where.audit.record("decided", kind="approval", recipe=RECIPE, verdict="approved")
    where.audit.record("decided", kind="final", verdict="accepted", recipe=RECIPE)
    left = audit.unfinished(where.audit.entries)
    assert left is not None
    assert left["kind"] == "train"


def test_refused_before_anything_was_computed(where: state_folder.State) -> None:
    where.audit.record("decided", kind="train", verdict="refused", recipe=RECIPE, reason="policy-hours")
    compute_time.path_of(where).write_text('{"seconds": 1.0}\n')
    assert compute_time.settle(where) == 0
    assert not compute_time.path_of(where).exists()
