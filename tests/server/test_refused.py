"""Refused requests: a file that does not grow without end, and few lines of the audit log however many there were."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedvfm.audit import audit
from fedvfm.server.network import refused_requests


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("time.monotonic", made)
    return made


def entries(log: audit.Audit) -> list[tuple[str, str, int]]:
    return [(e["reason"], e["address"], e["count"]) for e in audit.read(log.path) if e["event"] == "refused"]


@pytest.fixture
def log(tmp_path: Path) -> audit.Audit:
    return audit.Audit(tmp_path / "audit.jsonl", "trial", "server")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_client_is_counted_for_itself_and_many_are_others(tmp_path: Path, clock: Clock) -> None:
    made = refused_requests.Refusals(str(tmp_path / "refused.jsonl"))
    made("control", "10.0.0.1")
    for number in range(20):
        made("control", f"10.0.1.{number}")
        made("control", "10.0.1.0")
    assert len(rows(tmp_path / "refused.jsonl")) == 1, "at once, then not before a second is over"
    clock.now += 1
    made("control", "10.0.1.1")
    found = rows(tmp_path / "refused.jsonl")[1:]
    assert sum(row["count"] for row in found) == 41
    assert len(found) == refused_requests.MOST_ADDRESSES + 1
    assert next(row["count"] for row in found if row["client"] == audit.OTHERS) == 12
    made("key", "10.0.0.1")
    made("key", "10.0.0.2")
    made.flush()
    assert [row["client"] for row in rows(tmp_path / "refused.jsonl")[-2:]] == ["10.0.0.1", "10.0.0.2"]
    refused_requests.Refusals("")("control", "10.0.0.1")  # a proxy without a file


def test_the_file_begins_anew_and_nothing_is_missed_or_told_twice(
    tmp_path: Path, log: audit.Audit, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refused_requests, "MAX_BYTES", 500)
    path = tmp_path / "refused.jsonl"
    made, collector = refused_requests.Refusals(str(path)), refused_requests.Collector(path, log, clock)
    for number in range(1, 41):
        clock.now += 2
        made("runtime", f"10.0.0.{number % 3}")
        if number % 3 == 0:
            collector.look()
        if number == 20:  # the server starts again
            collector.write()
            collector = refused_requests.Collector(path, log, clock)
    collector.write()
    assert sum(count for _, _, count in entries(log)) == 40
    assert path.stat().st_size + refused_requests.aside(path).stat().st_size < 1500
    assert path.stat().st_mode & 0o777 == 0o600
    refused_requests.Collector(path, log, clock).write()
    assert sum(count for _, _, count in entries(log)) == 40


def test_an_attack_of_days_is_few_lines(tmp_path: Path, log: audit.Audit, clock: Clock) -> None:
    """Other addresses every time, all day long: the first lines come at once, then at most 16 an hour."""
    path = tmp_path / "refused.jsonl"
    collector = refused_requests.Collector(path, log, clock)

    def add(*lines: dict[str, Any]) -> None:
        clock.now += 60
        with path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        collector.look()

    minutes = 6 * 60
    for number in range(minutes):
        stranger = [{"refused": "control", "client": f"2001:db8::{number:x}:{n:x}", "count": 50} for n in range(20)]
        add(*stranger, {"refused": "key", "client": "10.0.0.1", "count": 1})
    collector.write()
    found = entries(log)
    assert sum(count for _, _, count in found) == minutes * (20 * 50 + 1)
    assert len(found) <= (6 + 8) * refused_requests.MOST_LINES
    assert sum(count for word, _, count in found if word == "key") == minutes
    clock.now += 3 * refused_requests.LONGEST_S  # quiet again: the next one is told soon
    collector.look()
    add({"refused": "docs", "client": "10.0.0.9", "count": 1})
    assert entries(log)[-1] == ("docs", "10.0.0.9", 1)


def test_what_is_no_refusal_is_left_out(tmp_path: Path, log: audit.Audit, clock: Clock) -> None:
    path = tmp_path / "refused.jsonl"
    good = {"refused": "docs", "client": "10.0.0.1", "count": 1}
    strange = [
        {**good, "refused": "patient Smith"}, {**good, "count": -1}, {**good, "count": "1"}, {"refused": "docs"}, [], 7,
        {**good, "client": "patient Smith"}, {**good, "client": ""}, {**good, "client": "FE80::1%eth0"}, good,
    ]  # fmt: skip
    path.write_text("\xff\n{\n" + "".join(json.dumps(line) + "\n" for line in strange) + '{"refused": "unfin')
    refused_requests.Collector(path, log, clock).write()
    assert sorted(entries(log)) == [
        ("docs", "10.0.0.1", 1),
        ("docs", "fe80::1", 1),
        ("docs", audit.UNKNOWN, 2),
    ]


def test_a_log_that_cannot_be_written_stops_nothing(
    tmp_path: Path, log: audit.Audit, said: Callable[[], list[str]]
) -> None:
    path = tmp_path / "refused.jsonl"
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-9] + b"\n")
    with refused_requests.collected(path, log):
        refused_requests.Refusals(str(path))("docs", "10.0.0.1")
        deadline = time.monotonic() + 60
        while not said() and time.monotonic() < deadline:
            time.sleep(0.05)
        log.path.write_bytes(whole)
    assert "refused requests are not in the audit log" in said()[0]
    assert entries(log) == [("docs", "10.0.0.1", 1)]
