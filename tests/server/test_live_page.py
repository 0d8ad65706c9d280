"""``server status`` and the coordinator's page: made of the state folder's files, with what helps where one waits."""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fedvfm.audit import audit, follower
from fedvfm.protocol import protocol
from fedvfm.report import spans
from fedvfm.runtime import processes
from fedvfm.server import live_page, site_words, status
from fedvfm.server import state_folder as enrolment
from fedvfm.server.coordinator import coordinator, status_file
from tests.server.test_coordinate import ROUNDS, Town, make  # noqa: F401 - a fixture

ISO = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a document that holds no other."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from leaves(inner, f"{path}.{key}")
    else:
        yield path, value


def shown(town: Town) -> live_page.live_page.Content:
    return live_page.content(status.Watcher(town.server.folder), town.server.lock())


def test_while_it_runs_and_at_its_end(make: Callable[..., Town]) -> None:  # noqa: F811
    town = make("east", "west")
    folder = town.server.folder / coordinator.RUN
    processes.write_pid(processes.pid_path(folder, "coordinate"), os.getpid())
    seen: list[tuple[dict[str, Any], Any]] = []

    def look() -> None:
        town.server.audit.record(
            "received", kind="train", bytes=900, recipe=town.server.about.recipe, round=3, peer="west"
        )
        town.server.audit.record(
            "sent", kind="train", bytes=1200, recipe=town.server.about.recipe, round=3, peer="west"
        )
        seen.append((status.of(town.server), shown(town)))

    town.when["round", 1] = lambda: town.refuses.update(west="policy-hours")
    town.when["round", 2] = lambda: town.refuses.clear()
    town.when["round", 3] = look
    town.run(quorum=1)
    now, content = seen[0]
    assert (now["phase"], now["round"], now["rounds"], now["finished_rounds"]) == ("round", 3, ROUNDS, 2)
    assert ISO.fullmatch(now["since"])
    assert ISO.fullmatch(now["eta"])
    assert ISO.fullmatch(now["sites"]["west"]["heard"])
    assert now["sites"]["west"]["answered_round"] == 3
    assert now["today"]["kinds"] == {"train": {"messages": 1, "bytes": 1200}}
    assert content.title == f"town: round 3 of {ROUNDS}"
    whole = "".join(content.parts.values())
    for words in (
        "Training loss",
        "Validation Dice",
        "Seconds a round",
        "1.2 kB",
        "Every round (2)",
        "takes part",
        "its policy does not",
    ):
        assert words in whole
    text = "\n".join(status.lines(now))
    assert f"now: round 3 of {ROUNDS} since {now['since']}, a round takes " in text
    assert f"ends about {now['eta']}" in text

    done, content = status.of(town.server), shown(town)
    assert (done["phase"], done["finished"], done["eta"]) == ("finished", True, None)
    assert ISO.fullmatch(done["since"])
    assert f"now: finished after round {ROUNDS} of {ROUNDS}" in "\n".join(status.lines(done))
    assert content.title == f"town: finished after round {ROUNDS} of {ROUNDS}"


def test_scripts_read_iso_times_and_structure_alone(make: Callable[..., Town]) -> None:  # noqa: F811
    town = make()
    town.run()
    now = json.loads(json.dumps(status.of(town.server)))
    for path, value in leaves(now):
        if isinstance(value, str):
            assert not value.lstrip().startswith(("{", "[")), f"JSON in JSON at {path}"
        elif isinstance(value, float | int) and not isinstance(value, bool):
            assert value < 1e9, f"an epoch at {path}"


def test_a_site_that_waits_says_what_helps(make: Callable[..., Town]) -> None:  # noqa: F811
    town = make()
    folder = town.server.folder / coordinator.RUN
    processes.write_pid(processes.pid_path(folder, "coordinate"), os.getpid())
    board = status_file.Board(folder)
    board.write(status_file.WAITING, "waiting: 1 of 2 sites", 0, {"east": "takes-part", "west": "approval-pending"})
    now = status.of(town.server)
    short = town.server.about.recipe[:12]
    assert now["pending"] == ["west"]
    assert now["sites"]["west"]["remedy"] == f"there: fedvfm client review {short}, then fedvfm client approve {short}"
    assert now["sites"]["east"]["remedy"] == ""
    content = "".join(shown(town).parts.values())
    assert "waits for a person&#x27;s approval of the recipe" in content
    assert "west waits" in content
    enrolment.revoke(town.server, "west")
    assert status.of(town.server)["sites"]["west"]["state"] == "revoked"


def test_since_when_changes_with_what_it_is_of_alone(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    day = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    moments = (day + datetime.timedelta(seconds=number) for number in clock)
    monkeypatch.setattr(status_file.signed_documents, "now", lambda: next(moments))
    board = status_file.Board(tmp_path)

    def written(*said: Any) -> dict[str, Any]:
        board.write(*said)
        return status_file.read(tmp_path)

    first = written(status_file.WAITING, "a", 0, {"east": "asked"})
    assert first["since"] == first["sites_since"]["east"] == "2026-01-01T00:00:00Z"
    assert written(status_file.WAITING, "b", 0, {"east": "asked"})["since"] == first["since"], "only the reason changed"
    third = written(status_file.ROUND, "", 1, {"east": "asked", "west": "takes-part"})
    assert (third["since"], third["sites_since"]["east"]) == ("2026-01-01T00:00:02Z", first["since"])
    assert third["sites_since"]["west"] == "2026-01-01T00:00:02Z"


def test_every_word_of_a_site_has_a_sentence() -> None:
    for word in (*protocol.ERROR_CODES, "takes-part", "not-connected", "asked", "nobody-knows-it"):
        assert site_words.sentence(word)
        assert "{" not in site_words.remedy(word, "north", "ab" * 32)
    assert site_words.refused("site-policy-hours") == "the site refuses: its policy does not accept this"
    assert site_words.refused("norm").startswith("the update is far longer")
    assert site_words.refused("some-rule") == "some rule"


def test_a_forecast_counts_the_last_rounds() -> None:
    journal = [{"seconds": 100.0, "ended": 0.0}] + [{"seconds": 10.0, "ended": 4e9 + 10.0 * n} for n in range(5)]
    found = status.forecast(journal, 8, running=True)
    assert found == {"round_seconds": 10.0, "eta": spans.stamp_of(4e9 + 40 + 20)}
    assert status.forecast(journal, 8, running=False)["eta"] is None
    assert status.forecast([], 8, running=True) == {"round_seconds": None, "eta": None}


def test_a_log_is_followed_over_segments_and_an_edited_one_is_said(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit.Audit, "most", 3)
    log = audit.Audit(tmp_path / "audit.jsonl", "town", "server")
    seen = follower.Follower(log.path)
    entries = []
    for number in range(8):
        log.record("sent", kind="train", bytes=number)
        if number % 3 == 1:
            entries += seen.new()
    entries += seen.new()
    assert [one["bytes"] for one in entries if one["event"] == "sent"] == list(range(8))
    assert seen.new() == []
    assert seen.whole
    log.record("sent", kind="train", bytes=8)
    log.path.write_text(log.path.read_text().replace('"bytes":8', '"bytes":9'))
    assert [entry["event"] for entry in seen.new()] == ["continued"], "and no line after the edit"
    assert not seen.whole


def test_the_page_of_an_edited_log_says_so(make: Callable[..., Town]) -> None:  # noqa: F811
    town = make()
    path = town.server.audit_path
    path.write_text(path.read_text().replace('"site":"west"', '"site":"vest"'))
    assert not status.of(town.server)["audit_log_whole"]
    assert "The audit log was edited" in shown(town).parts["head"]
