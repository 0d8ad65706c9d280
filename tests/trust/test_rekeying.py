"""Another key for a site that keeps all else: accepted by the old key's signature and a person, killed at any line."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.audit import audit, cross_check
from fedvfm.client import rekeying as own_rekeying
from fedvfm.client import state_folder as joining
from fedvfm.server import state_folder as enrolment
from fedvfm.server.coordinator import coordinator
from fedvfm.trust import keys, rekeying, roster, signed_documents


@pytest.fixture
def site(tmp_path: Path, server: enrolment.State) -> joining.State:
    invite = joining.read_invite(server.invite_path("north"), server.fingerprint())
    made = joining.join(tmp_path / "north", invite, invite.lock.hash)
    enrolment.approve(server, made.request)
    return made


def public(site: joining.State) -> str:
    return keys.public_text(keys.read_private(site.key))


def events(log: audit.Audit) -> list[str]:
    return [entry["event"] for entry in log.entries]


def test_a_site_goes_on_under_another_key_and_keeps_all_else(site: joining.State, server: enrolment.State) -> None:
    old, before = public(site), site.audit.entries
    receipt = server.folder.parent / "old.json"
    signed_documents.write(receipt, site.audit.receipt(keys.read_private(site.key)))
    asked = own_rekeying.begin(site)
    document = own_rekeying.NewKey(site).document
    assert own_rekeying.begin(site) == asked, "asked again it makes no third key"
    assert document.stat().st_mode & 0o777 == 0o600
    assert public(site) == old, "until the coordinator lets the new one in"
    assert own_rekeying.waiting(site) == keys.spoken(asked.public_key)
    assert not own_rekeying.finish(site, lambda key: False)

    entry = enrolment.rekey(server, document, keys.spoken(asked.public_key))
    assert (entry.site, entry.status, entry.public_key) == ("north", "approved", asked.public_key)
    assert set(coordinator.known_keys(server.sites())) == {asked.public_key}, "the old one is let in no more"
    shown: list[Any] = []
    assert own_rekeying.finish(site, lambda key: bool(shown.append(key)) or True)
    assert [keys.public_text(key) for key in shown] == [asked.public_key]
    assert public(site) == asked.public_key
    assert site.public_key.read_text() == asked.public_key + "\n"
    assert not own_rekeying.NewKey(site).waits
    assert not list(site.folder.glob("*.new"))

    # All else: approvals stand, the log is the same chain, and receipts of both keys fit the coordinator's log.
    assert site.approvals.stand() == [server.about.recipe]
    after = audit.read(site.audit.path)
    assert after[: len(before)] == before
    fingerprints = {"key": keys.fingerprint(asked.public_key), "base": keys.fingerprint(old)}
    for log in (site.audit, server.audit):
        line = log.entries[-1]
        assert line["event"] == "rekeyed"
        assert {name: line[name] for name in fingerprints} == fingerprints
    new = server.folder.parent / "new.json"
    signed_documents.write(new, site.audit.receipt(keys.read_private(site.key)))
    for path in (receipt, new):
        with pytest.raises(errors.NothingCompared):  # its key is known; it says nothing of that log yet
            cross_check.receipt(path, server.audit.entries, "audit.jsonl")
    assert audit.site_keys(server.audit.entries) == {"north": fingerprints["key"]}


def test_done_again_it_changes_nothing(site: joining.State, server: enrolment.State) -> None:
    asked = own_rekeying.begin(site)
    document = own_rekeying.NewKey(site).document
    first = enrolment.rekey(server, document, keys.spoken(asked.public_key))
    size = server.roster_path.stat().st_size
    assert enrolment.rekey(server, document, keys.spoken(asked.public_key)) == first
    assert server.roster_path.stat().st_size == size
    assert events(server.audit).count("rekeyed") == 1


def test_what_a_coordinator_refuses(site: joining.State, server: enrolment.State, tmp_path: Path) -> None:
    old, now = keys.read_private(site.key), signed_documents.now()
    own = own_rekeying.begin(site)
    thief, third = keys.make(), keys.make()

    def asked(federation: str = "trial", name: str = "north", by: Any = old, new: Any = third) -> rekeying.Rekeying:
        return rekeying.make(federation, name, by, new, now)

    other = asked(new=thief)
    wrong = {
        "another federation": asked(federation="other"),
        "another site": asked(name="south"),
        "no site": asked(name="west"),
        "not the key it has": asked(by=thief),
        "the key it has": asked(new=old),
        "changed": own.model_copy(update={"public_key": keys.public_text(thief)}),
        "not held": other.model_copy(update={"signature": own.signature}),
        "not signed by the old": own.model_copy(update={"old_signature": own.signature}),
    }
    before = server.roster_path.read_bytes()
    for name, document in wrong.items():
        path = signed_documents.write(tmp_path / "wrong.json", document)
        with pytest.raises(errors.TrustError):
            enrolment.rekey(server, path)
        assert server.audit.entries[-1]["event"] == "decided", name
        assert server.audit.entries[-1]["kind"] == "rekeying"
    document = own_rekeying.NewKey(site).document
    with pytest.raises(errors.TrustError):
        enrolment.rekey(server, document, keys.spoken(keys.public_text(thief)))
    assert server.roster_path.read_bytes() == before

    enrolment.revoke(server, "north")
    with pytest.raises(errors.TrustError):
        enrolment.rekey(server, document)


def test_an_earlier_file_is_not_good_again(site: joining.State, server: enrolment.State, tmp_path: Path) -> None:
    """Else whoever keeps the file of before leads the site back to a key that was stolen."""
    own_rekeying.begin(site)
    document = own_rekeying.NewKey(site).document
    first = tmp_path / "first.json"
    first.write_bytes(document.read_bytes())
    enrolment.rekey(server, document)
    own_rekeying.finish(site, lambda key: True)
    own_rekeying.begin(site)
    second = enrolment.rekey(server, document)
    with pytest.raises(errors.TrustError):
        enrolment.rekey(server, first)
    assert server.sites()["north"] == second
    assert [entry.status for entry in server.sites().values()] == [roster.APPROVED, roster.INVITED]


def _killed(folder: Path, point: str) -> None:
    os.environ["FEDVFM_FAULT_POINT"] = point
    own_rekeying.finish(joining.open_state(folder), lambda key: True)


@pytest.mark.parametrize("point", ["key-replaced", "file-written", "file-renamed", "line-written", "rekeying-noted"])
def test_killed_anywhere_it_goes_on_there(site: joining.State, server: enrolment.State, point: str) -> None:
    asked = own_rekeying.begin(site)
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(site.folder, point))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    again = joining.open_state(site.folder)
    taken = keys.public_text(keys.read_private(again.key))
    # Whether the coordinator can be asked or not: it let the new key in already.
    assert own_rekeying.finish(again, lambda key: False)
    assert taken == public(again) == asked.public_key
    assert again.public_key.read_text().strip() == asked.public_key
    assert events(again.audit).count("rekeyed") == 1
    assert not own_rekeying.NewKey(again).waits


def test_the_commands(site: joining.State, server: enrolment.State, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from fedvfm.cli import client, main  # noqa: F401
    from fedvfm.cli import server as server_commands

    run = CliRunner()
    said = run.invoke(client.app, ["rekey", "--state", str(site.folder), "--json"])
    told = json.loads(said.stdout)
    bare = run.invoke(server_commands.app, ["rekey", told["rekeying"], "--state", str(server.folder)])
    assert isinstance(bare.exception, errors.ConfigError)
    named = ["rekey", told["rekeying"], "--key", told["key"], "--state", str(server.folder), "--json"]
    done = run.invoke(server_commands.app, named)
    assert json.loads(done.stdout)["status"] == "approved"
    assert server.sites()["north"].public_key == own_rekeying.NewKey(site).asked().public_key
