"""A refusal is one line on the site's console: the word, why, and what to do; the same one once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedvfm.audit import audit
from fedvfm.cli import client as client_commands
from fedvfm.client import console as consoles
from fedvfm.client import refusal_words, state_folder
from fedvfm.protocol import protocol

RECIPE, OTHER = "ab" * 32, "cd" * 32
OF_THE_COORDINATOR = {"away", "dropped", "revoked", "ledger-went-back", "malformed", "oversized"}


class Console:
    def __init__(self, folder: Path, said: Callable[[], list[str]]) -> None:
        self.log, self._said = audit.Audit(folder / "audit.jsonl", "north", "site"), said
        self.listener = consoles.Listener(self.log.path)

    def answer(self, kind: str, word: str = "", recipe: str = RECIPE) -> list[str]:
        """A message of this kind is answered, or refused with a word; what is told."""
        about: dict[str, Any] = {"recipe": recipe} if recipe else {}
        self.log.record("received", kind=kind, bytes=9, **about)
        said = {"kind": "refusal", "reason": word} if word else {"kind": kind}
        self.log.record("sent", bytes=9, **about, **said)
        return self.look()

    def look(self) -> list[str]:
        """What is told now."""
        before = len(self._said())
        self.listener.look()
        return self._said()[before:]


@pytest.fixture
def console(tmp_path: Path, said: Callable[[], list[str]]) -> Console:
    return Console(tmp_path, said)


def test_every_word_has_its_reason_and_remedy() -> None:
    assert set(refusal_words.WORDS) == set(protocol.ERROR_CODES) - OF_THE_COORDINATOR


def test_a_refusal_is_one_line_with_what_to_do(console: Console) -> None:
    state = f" --state {console.log.path.parent}"
    assert console.answer("handshake", "approval-pending") == [
        "refused: handshake of recipe abababababab: approval-pending, no person here approved this recipe. Remedy: "
        f"fedvfm client review abababababab{state}, then fedvfm client approve abababababab{state}"
    ]


@pytest.mark.parametrize("word", ["policy-rounds", "policy-hours"])
def test_a_limit_that_the_recipe_alone_goes_beyond_is_not_called_used_up(console: Console, word: str) -> None:
    """A site that had trained nothing was told that its rounds were trained."""
    limit = f"max_{word[7:]}"
    (line,) = console.answer("handshake", word)
    assert f"are, or would be, more than policy.{limit}. Remedy: fedvfm client review abababababab " in line
    assert line.endswith(f"says which; raise {limit}, or leave it at that")


def test_commands_name_a_state_folder_that_they_would_not_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = "fedvfm client adapter --accept ab12, or --decline ab12; fedvfm client adapter personal SITE.toml"
    assert state_folder.named(said, Path("fedvfm-site")) == said
    assert state_folder.named(said, tmp_path / "a b") == said.replace("ab12,", f"ab12 --state '{tmp_path}/a b',")
    assert state_folder.named("fedvfm client start SITE.toml", Path("x")).endswith(f"SITE.toml --state {tmp_path}/x")
    assert client_commands.STATE == state_folder.DEFAULT


def test_the_same_refusal_is_told_once_until_it_changes(console: Console) -> None:
    assert len(console.answer("handshake", "approval-pending")) == 1
    assert console.answer("handshake", "approval-pending") == []
    assert console.answer("train", "approval-pending") == [], "another message, the same reason"
    assert len(console.answer("handshake", "policy-hours")) == 1
    assert len(console.answer("handshake", "approval-pending", OTHER)) == 1, "another recipe"
    assert console.answer("handshake") == []
    assert len(console.answer("handshake", "policy-hours")) == 1, "it was well in between"


def test_a_round_refused_each_time_while_the_rest_is_answered_is_told_once(console: Console) -> None:
    assert len(console.answer("train", "policy-rounds")) == 1
    for _ in range(3):
        assert (
            console.answer("handshake") == console.answer("evaluate") == console.answer("train", "policy-rounds") == []
        )


def test_what_cannot_be_read_is_told_of(console: Console) -> None:
    (line,) = console.answer("unknown", "refused", recipe="")
    assert line.startswith("refused: unknown: refused, the message cannot be read")


def test_what_was_refused_before_the_start_is_not_told(console: Console) -> None:
    console.answer("train", "policy-rounds")
    console.listener = consoles.Listener(console.log.path)
    assert console.look() == []


def test_half_a_line_waits_for_its_other_half(console: Console) -> None:
    console.answer("handshake")
    line = '{"event": "sent", "kind": "refusal", "reason": "storage"}\n'
    with console.log.path.open("a") as file:
        file.write(line[:20])
    assert console.look() == []
    with console.log.path.open("a") as file:
        file.write(line[20:])
    assert [one.split(",")[0] for one in console.look()] == ["refused: handshake: storage"]


def test_they_are_told_while_the_site_runs(
    console: Console, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(consoles, "EVERY_S", 0.02)
    deadline = time.monotonic() + 60
    with consoles.told(console.log.path):
        console.log.record("sent", kind="refusal", reason="data", bytes=9)
        while not said() and time.monotonic() < deadline:
            time.sleep(0.02)
    assert ": data, an image or a label cannot be used. Remedy" in said()[0]


def test_what_came_last_is_told_though_the_site_ends(
    console: Console, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(consoles, "EVERY_S", 600.0)
    with consoles.told(console.log.path):
        console.log.record("sent", kind="refusal", reason="data", bytes=9)
        assert said() == []
    (line,) = said()
    assert ": data, an image or a label cannot be used. Remedy" in line
