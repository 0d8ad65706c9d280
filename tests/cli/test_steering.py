"""The coordinator's orders through the real command line, without a server that runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedvfm.server import state_folder
from fedvfm.state import checkpoint


class Server:
    """A state folder, and the verbs upon it."""

    def __init__(self, cli: Any, tiny: Any, folder: Path) -> None:
        self.cli, self.tiny, self.folder, self.state = cli, tiny, folder, folder / "server"
        names = ("--name", "trial", "--address", "localhost:8443", "--sites", "north")
        self.made = self.good("init", tiny.experiment, *names)

    def good(self, verb: str, *words: Any) -> dict[str, Any]:
        answer = self.cli("server", verb, *words, "--state", self.state, "--json")
        assert answer.code == 0, answer.err
        found: dict[str, Any] = json.loads(answer.out)
        return found

    def said(self, verb: str, *words: Any) -> str:
        answer = self.cli("server", verb, *words, "--state", self.state)
        assert answer.code == 0, answer.err
        return str(answer.out)

    def recipe(self, name: str, *lines: str) -> Path:
        path = self.folder / f"{name}.toml"
        path.write_text(self.tiny.recipe.replace("rounds = 3\n", "".join(f"{line}\n" for line in lines), 1))
        return path

    def finish(self) -> Path:
        """As a run leaves it; the final adapter."""
        where = state_folder.open_state(self.state)
        folder = where.run_path(where.about.recipe)
        adapter = folder / "adapter.safetensors"
        checkpoint.write(adapter, 1.5 * where.locked().adapter, {"round": "3", "recipe": where.about.recipe})
        result = {"round": 3, "fingerprint": "f" * 64, "acceptance": {"north": "accepted"}}
        (folder / "evaluation.json").write_text(json.dumps(result))
        return adapter


@pytest.fixture
def server(cli: Any, tiny: Any, tmp_path: Path) -> Server:
    return Server(cli, tiny, tmp_path)


def test_orders_show_in_status(server: Server) -> None:
    assert set(server.good("pause")["paused"]) == {"who", "time"}
    assert server.good("extend", "--rounds", "2") == {"recipe": "", "rounds": 2}
    found = server.good("status")
    assert (found["phase"], found["finishing"], found["extended_by"], found["pending"]) == ("stopped", False, 2, [])
    text = server.said("status")
    assert "order: paused by " in text
    assert "order: to be extended by 2 rounds" in text
    assert server.good("resume") == {"resumed": True}
    assert server.said("resume") == "it was not paused\n"
    assert server.good("finish")["finishing"]["recipe"] == server.made["recipe"]
    assert "order: to be finished after the round in hand" in server.said("status")
    assert server.good("finish", "--undo") == {"undone": True}
    assert "order: to be finished" not in server.said("status")
    assert server.said("finish", "--undo") == "no finish was ordered\n"


def test_a_finished_recipe_is_extended_and_another_added(server: Server) -> None:
    adapter = server.finish()
    text = server.said("status")
    assert "now: finished" in text
    assert "final adapter accepted" in text
    longer = server.good("extend", "--rounds", "2")["recipe"]
    assert server.good("status")["recipe"] == longer != server.made["recipe"]

    other = server.good("recipe", server.recipe("other", "rounds = 1", "seed = 3"))
    assert other["current"] is False
    assert server.good("status")["following"] == [other["recipe"]]
    assert f"order: recipe {other['recipe'][:12]} follows" in server.said("status")
    assert server.good("recipe", server.recipe("other", "rounds = 1", "seed = 3"), "--now")["current"] is True

    onwards = server.good("recipe", server.recipe("onwards", "rounds = 1"), "--from", adapter, "--now")["recipe"]
    where = state_folder.open_state(server.state)
    start = checkpoint.read(adapter)[0].fingerprint
    assert (where.about.recipe, where.lock().recipe.start, where.locked().adapter.fingerprint) == (
        onwards,
        start,
        start,
    )


def test_a_recipe_that_names_an_adapter_needs_it(server: Server, tmp_path: Path) -> None:
    named = server.recipe("named", "rounds = 1", f'start = "{"a" * 64}"')
    server.tiny.one_error(
        server.cli("server", "recipe", named, "--state", server.state),
        2,
        "recipe.start: give the adapter aaaaaaaaaaaa with --from ADAPTER.safetensors",
    )
    wider = server.recipe("wider", "rounds = 1")
    wider.write_text(wider.read_text().replace("rank = 2", "rank = 3"))
    answer = server.cli("recipe", "lock", wider, "--from", server.finish(), "-o", tmp_path / "wider.json")
    server.tiny.one_error(answer, 5, "the adapter to start from has", "Same backbone, kind and rank?")
    answer = server.cli(
        "simulate", server.tiny.experiment, "--set", f'recipe.start="{"a" * 64}"', "--output", tmp_path / "run"
    )
    server.tiny.one_error(answer, 2, "recipe.start: only a server goes on from an earlier adapter; leave it out")


def test_sites_that_cannot_be_dropped(server: Server) -> None:
    for verb, words in (("drop", "'north': is invited, not approved"), ("readmit", "'north': is invited, not dropped")):
        answer = server.cli("server", verb, "north", "--state", server.state, "--json")
        server.tiny.one_error(answer, 12, words)


@pytest.mark.parametrize("verb", ["pause", "resume", "finish", "drop north", "readmit north", "extend --rounds 1"])
def test_no_state_folder(server: Server, tmp_path: Path, verb: str) -> None:
    answer = server.cli("server", *verb.split(), "--state", tmp_path / "nothing", "--json")
    server.tiny.one_error(answer, 12, "is no server's state folder")
    assert not (tmp_path / "nothing").exists()


def test_a_new_certificate_is_in_the_audit_log(server: Server) -> None:
    from fedvfm.trust import keys

    where = state_folder.open_state(server.state)
    before = where.certificate.read_text()
    server.good("certify", "--san", "other.example")
    assert where.certificate.read_text() != before
    last = where.audit.entries[-1]
    key = keys.read_private(where.key)
    assert (last["event"], last["key"]) == ("certified", keys.fingerprint(keys.public_text(key)))
    assert last["expires"] > last["time"]


def test_sites_to_go_on_without_must_be_on_the_roster(server: Server) -> None:
    answer = server.cli("server", "start", "--state", server.state, "--without", "nroth,north")
    server.tiny.one_error(answer, 2, "without 'nroth': is not on the roster: north")


def test_a_port_that_is_taken_is_told_of(server: Server) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = server.cli("server", "start", "--state", server.state, "--listen", f"127.0.0.1:{port}")
    server.tiny.one_error(answer, 11, f"cannot listen at 127.0.0.1:{port}: Address already in use", "--listen")
