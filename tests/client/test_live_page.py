"""``client status`` and a site's page: rounds and hours used, what waits for a person, and the log in sentences."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedvfm.client import live_page, privacy_report, sentences, status
from fedvfm.client.process import supervisor
from fedvfm.doctor import monitor
from fedvfm.runtime import processes
from tests.deployment.conftest import tiny  # noqa: F401 - fixtures
from tests.deployment.test_site_verbs import Hospital, hospital, locked  # noqa: F401 - fixtures
from tests.server.test_live_page import leaves

RECIPE = "ab" * 32


def line(event: str, **fields: Any) -> dict[str, Any]:
    return {"event": event, "time": "2026-11-03T12:00:00Z", "recipe": RECIPE, **fields}


ROUND_3 = [
    line("received", kind="train", bytes=1_200_000, round=3),
    line("decided", kind="train", verdict="accepted", round=3),
    line("trained", round=3, base="c" * 64, fingerprint="d" * 64, examples=120, seconds=200.4, numbers=5000),
    line("sent", kind="train", bytes=1_300_000, round=3, numbers=5000, metrics=["loss"]),
]


def test_each_round_is_one_line_and_an_end_is_an_end() -> None:
    told = sentences.Rounds({RECIPE: 10}.get)
    assert [text for text in map(told.line, ROUND_3) if text] == [
        "round 3 of 10: trained on 120 images in 3 min 20 s; 5,000 numbers left, 1.3 MB"
    ]
    assert told.line(line("sent", kind="evaluate", split="val", bytes=900, round=3)) == "", "the same round"
    again = told.line(ROUND_3[-1])
    assert again == "round 3 of 10: asked again, the same update left again, 1.3 MB"
    alone = told.line(line("sent", kind="evaluate", split="val", bytes=900, round=4))
    assert alone == "round 4 of 10: scored on validation images alone; 900 B left"
    final = {"kind": "final", "fingerprint": "e" * 64, "examples": 1, "score": 0.83, "round": 10}
    assert told.line(line("decided", verdict="pending", reason="policy", **final)) == (
        "finished; the final adapter waits for your decision, score 0.830 on 1 own test image: "
        "fedvfm client adapter --accept eeeeeeeeeeee, or --decline eeeeeeeeeeee"
    )
    taken = told.line(line("decided", verdict="accepted", reason="person", **final))
    assert taken == "finished; the final adapter was accepted by a person, score 0.830 on 1 own test image"


def test_the_log_in_sentences() -> None:
    assert [sentences.of(entry) for entry in ROUND_3] == [
        "The coordinator asked for round 3 of recipe abababababab (1.2 MB).",
        "",
        "Trained round 3 of recipe abababababab on 120 images in 3 min 20 s.",
        "The update of round 3 of recipe abababababab left: 5,000 numbers, and loss, 1.3 MB.",
    ]
    assert sentences.of(line("decided", kind="approval", verdict="withdrawn")) == (
        "A person here withdrew the approval of recipe abababababab."
    )
    refused = sentences.of(line("sent", kind="refusal", reason="approval-pending", bytes=9))
    assert refused.startswith(
        "Refused a message of recipe abababababab: no person here approved this recipe (approval-pending)."
    )
    assert refused.endswith("What helps: fedvfm client review abababababab, then fedvfm client approve abababababab.")


@pytest.fixture
def trained(hospital: Hospital) -> Hospital:  # noqa: F811
    """A site that trained a round and has a final adapter that waits."""
    hospital.write(max_rounds="5", max_hours="2.0")
    assert not hospital.train(1).has_error()
    assert hospital.finish(hospital.initial) == "pending"
    (hospital.state / status.FOLDER).mkdir(exist_ok=True)
    status.note_settings(hospital.where, hospital.settings)
    return hospital


def test_what_is_used_of_the_policy_and_what_waits(trained: Hospital, cli: Any) -> None:
    now = json.loads(cli("client", "status", "--state", trained.state, "--json").out)
    row = now["recipes"][trained.lock.hash]
    assert (row["round"], row["rounds"], row["rounds_used"], row["max_rounds"]) == (1, 3, 1, 5)
    assert row["max_hours"] == 2.0
    assert 0 <= row["hours_used"] < 0.1
    assert (row["evaluations_used"], row["max_evaluations"]) == (1, 6)
    assert row["ended"]["verdict"] == "pending"
    remedy = f"fedvfm client start SITE.toml --state {trained.state}"
    assert now["now"] == {"says": "the client does not run", "remedy": remedy}
    assert now["today"]["kinds"]["train"]["messages"] == 1
    for path, value in leaves(now):
        if isinstance(value, str):
            assert not value.lstrip().startswith(("{", "[")), f"JSON in JSON at {path}"
        elif isinstance(value, float | int) and not isinstance(value, bool):
            assert value < 1e9, f"an epoch at {path}"
    text = cli("client", "status", "--state", trained.state).out
    assert re.search(r"finished, adapter pending +1 of 3 +1 of 5 +0\.00 of 2 ", text)
    assert "The update of round 1" in text

    trained.settings.write_text(trained.settings.read_text().replace("max_rounds = 5", "max_rounds = -5"))
    now = json.loads(cli("client", "status", "--state", trained.state, "--json").out)
    assert "max_rounds" in now["policy_problem"], "and the rest is said all the same"
    assert now["recipes"][trained.lock.hash]["max_rounds"] is None


def test_the_page_of_a_site(trained: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained.state / status.FOLDER
    processes.write_pid(processes.pid_path(run, status.NAME), processes.own_pid())
    content = live_page.content(status.Watcher(trained.state))
    assert content.title.startswith("east: finished; the final adapter waits for your decision")
    whole = "".join(content.parts.values())
    for words in ("1 of 3", "1 of 5", "Final adapter", "fedvfm client adapter --accept", "What left today", "loss"):
        assert words in whole, words
    assert str(Path(trained.tiny.data)) not in whole, "no path of the data"

    (trained.where.folder / "approvals.jsonl").unlink()
    content = live_page.content(status.Watcher(trained.state))
    short = trained.lock.hash[:12]
    assert content.data["now"]["says"] == f"recipe {short} waits for a person here"
    assert "never leaves" in content.parts["pending"], "the recipe in plain words"
    assert f"fedvfm client approve {short}" in content.parts["pending"]


@pytest.mark.parametrize("word", sorted(status.STANDING))
def test_a_drop_is_a_drop_and_a_revoked_site_reads_so(
    trained: Hospital, word: str, monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    run = trained.state / status.FOLDER
    processes.write_pid(processes.pid_path(run, status.NAME), processes.own_pid())
    monkeypatch.setattr(supervisor.network, "examine", lambda *way: [])
    answers = iter([word, "", "approved", ""])
    monkeypatch.setattr(supervisor.flower_supernode, "standing", lambda *given: next(answers))
    look = monitor.Lookout(lambda: supervisor.look(trained.where))
    assert not look.once()
    problem, remedy = status.STANDING[word]
    assert said() == [f"standing: {problem}. Remedy: {remedy.format(site='east')}"]
    since = status.of(trained.where)["coordinator"]["since"]
    assert not look.once(), "and told once; that nobody answered now changes nothing"
    now = status.of(trained.where)
    assert now["coordinator"] == {"word": word, "since": since}
    assert now["now"]["says"] == problem
    assert html.escape(problem) in live_page.content(status.Watcher(trained.state)).parts["head"]
    assert look.once()
    assert said()[1:] == ["standing: is well again"]
    assert status.of(trained.where)["now"]["says"].startswith("finished")
    assert look.once()


def test_what_privacy_has_spent_is_counted_anew_only_where_the_ledger_changed(
    trained: Hospital, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ledger").mkdir()
    book = tmp_path / "ledger" / "ledger.jsonl"
    book.write_text("a")
    counted: list[int] = []

    def count(where: Any) -> dict[str, Any]:
        counted.append(1)
        kept = {"mechanism": "record-level", "noise_multiplier": 1.0, "units": 3, "unit": "record", "epsilon": 1.0}
        sets = [{"name": "mri", "epsilon": len(counted), "allowed": 8.0, "releases": 1, "scores": 0}]
        return {**kept, "delta": 1e-5, "ledger": str(book.parent), "data_sets": sets, "problem": "", "waiting": False}

    monkeypatch.setattr(privacy_report, "status", count)
    watcher = status.Watcher(trained.state)
    shown = [live_page.content(watcher).parts["figures"] for _ in range(3)]
    assert len(counted) == 1
    assert "1.00 of 8.00" in shown[2]
    assert book in watcher.files()
    os.utime(book, ns=(1, 1))
    assert "2.00 of 8.00" in live_page.content(watcher).parts["figures"]
    assert "of 8.00 spent" in live_page.content(watcher).parts["privacy"]


@pytest.fixture
def reads(trained: Hospital, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """What a site's status says after entries of its log, of a recipe that it knows."""
    run = trained.state / status.FOLDER
    processes.write_pid(processes.pid_path(run, status.NAME), processes.own_pid())

    def read(*entries: dict[str, Any]) -> dict[str, Any]:
        watcher = status.Watcher(trained.state)
        monkeypatch.setattr(watcher._log, "new", lambda: [{**entry, "recipe": trained.lock.hash} for entry in entries])
        now = watcher.now()
        return {**now["recipes"][trained.lock.hash], "says": now["now"]["says"]}

    return read


FINAL = line("decided", kind="final", verdict="accepted", reason="policy", fingerprint="e" * 64, examples=4, round=3)
SCORES = line("sent", kind="evaluate", split="test", bytes=900, round=3, metrics=["dice"])
GREETED = [line("received", kind="handshake", bytes=90), line("sent", kind="handshake", bytes=90)]
BROKE_OFF = [
    line("received", kind="evaluate", bytes=900, round=3, split="test"),
    line("sent", kind="refusal", reason="storage", bytes=90, round=3),
]


def test_a_site_has_finished_once_its_scores_have_left(reads: Callable[..., dict[str, Any]]) -> None:
    row = reads(*ROUND_3, FINAL)
    assert (row["ended"], row["judged"]["verdict"]) == (None, "accepted")
    assert row["says"] == "the final adapter is judged here; its scores have not left yet"
    assert status.recipe_words(row) == "judged, scores have not left"
    assert row["eta"] is None
    row = reads(*ROUND_3, FINAL, SCORES)
    assert (row["judged"], row["ended"]["verdict"]) == (None, "accepted")
    assert status.recipe_words(row) == "finished, adapter accepted"
    earlier = {**SCORES, "round": 0}
    assert reads(*ROUND_3, earlier, FINAL)["ended"] is None, "the scores of another round"


def test_a_greeting_does_not_undo_a_refusal_of_work(reads: Callable[..., dict[str, Any]]) -> None:
    assert reads(*ROUND_3, FINAL, *BROKE_OFF, *GREETED)["refused"]["word"] == "storage"
    assert reads(*ROUND_3, FINAL, *BROKE_OFF, *GREETED, SCORES)["refused"] is None
    turned_away = [GREETED[0], line("sent", kind="refusal", reason="busy", bytes=90)]
    assert reads(*turned_away)["refused"]["word"] == "busy"
    assert reads(*turned_away, *GREETED)["refused"] is None
    waits = [GREETED[0], line("sent", kind="refusal", reason="approval-pending", bytes=90)]
    assert reads(*waits, line("decided", kind="approval", verdict="approved"))["refused"] is None
