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

from fedvfm import audit, config
from fedvfm.client import joining, policy, unfinished
from fedvfm.trust import documents

RECIPE = "ab" * 32


@pytest.fixture
def where(tmp_path: Path) -> joining.State:
    (tmp_path / "run").mkdir()
    about = joining.About(
        federation="trial", address="a.example:1", site="north", fingerprint="A", joined="2026-01-01T00:00:00Z"
    )
    return joining.State(tmp_path, about)


def accept(where: joining.State, number: int = 1, kind: str = "train") -> None:
    where.audit.record("received", kind=kind, bytes=100, recipe=RECIPE, round=number)
    where.audit.record("decided", kind=kind, verdict="accepted", recipe=RECIPE, round=number)


def accept_on_friday(where: joining.State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three days ago."""
    with monkeypatch.context() as then:
        friday = documents.now() - datetime.timedelta(days=3)
        then.setattr(documents, "now", lambda: friday)
        accept(where)


def used(where: joining.State) -> audit.Usage:
    return audit.usage(where.audit.entries, RECIPE)


WORK = """
import sys, time
from pathlib import Path
from fedvfm.client import unfinished
unfinished.EVERY_S = 0.2
with unfinished.working(Path(sys.argv[1])):
    time.sleep(600)
"""


def test_killed_at_work_what_it_worked_is_used_up(where: joining.State) -> None:
    accept(where)
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", WORK, str(unfinished.path_of(where))])
    path = unfinished.path_of(where)
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text() > '{"seconds": 0.6') and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert used(where).seconds == 0, "which is what could be escaped by"
    seconds = unfinished.settle(where)
    assert 0.5 < seconds - unfinished.EVERY_S < time.monotonic() - began
    assert used(where).seconds == seconds
    assert used(where).trained == (), "the round itself may be asked for again"
    last = where.audit.entries[-1]
    assert (last["event"], last["kind"], last["round"]) == ("interrupted", "train", 1)
    assert unfinished.settle(where) == 0, "once"
    assert used(where).seconds == seconds


def test_a_weekend_that_the_machine_was_off_uses_up_nothing(
    where: joining.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_on_friday(where, monkeypatch)
    unfinished.path_of(where).write_text('{"seconds": 40.0}\n')
    assert unfinished.settle(where) == 40.0 + unfinished.EVERY_S
    accept(where)


def test_where_nothing_was_written_down_an_hour_counts_at_most(
    where: joining.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever removes the file gains nothing by it, and loses no more than a round."""
    accept_on_friday(where, monkeypatch)
    unfinished.path_of(where).write_text("{")
    assert unfinished.settle(where) == unfinished.LONGEST_S
    accept(where)
    assert unfinished.settle(where) < unfinished.EVERY_S + 60


def test_a_message_that_brings_the_executor_down_each_time_ends_with_the_hours(where: joining.State) -> None:
    rules = config.PolicyConfig(max_hours=0.01)
    for _ in range(8):
        accept(where)
        unfinished.path_of(where).write_text('{"seconds": 0.0}\n')
        unfinished.settle(where)
    assert policy.remaining(rules, used(where)).seconds == 0.0


@pytest.mark.parametrize(
    ("event", "about"),
    [
        ("sent", {"kind": "refusal", "reason": "training", "bytes": 10, "seconds": 7.0}),
        ("trained", {"round": 1, "base": RECIPE, "fingerprint": RECIPE, "examples": 3, "seconds": 7.0}),
        ("evaluated", {"round": 1, "fingerprint": RECIPE, "split": "val", "examples": 3, "seconds": 7.0}),
    ],
)
def test_what_was_answered_counts_once(where: joining.State, event: str, about: dict[str, Any]) -> None:
    with unfinished.working(unfinished.path_of(where)):
        accept(where)
        assert unfinished.path_of(where).exists()
        where.audit.record(event, recipe=RECIPE, **about)
    assert not unfinished.path_of(where).exists()
    assert unfinished.settle(where) == 0
    assert used(where).seconds == 7.0


def test_what_people_do_meanwhile_is_no_answer(where: joining.State) -> None:
    accept(where)
    where.audit.record("decided", kind="approval", recipe=RECIPE, verdict="approved")
    where.audit.record("decided", kind="final", verdict="accepted", recipe=RECIPE)
    left = audit.unfinished(where.audit.entries)
    assert left is not None
    assert left["kind"] == "train"


def test_refused_before_anything_was_computed(where: joining.State) -> None:
    where.audit.record("decided", kind="train", verdict="refused", recipe=RECIPE, reason="policy-hours")
    unfinished.path_of(where).write_text('{"seconds": 1.0}\n')
    assert unfinished.settle(where) == 0
    assert not unfinished.path_of(where).exists()
