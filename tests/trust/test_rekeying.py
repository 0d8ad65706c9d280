"""Another key for a site that keeps all else: accepted by the old key's signature and a person, killed at any line."""

from __future__ import annotations

import datetime
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


def test_a_site_goes_on_under_another_key_and_keeps_all_else(
    site: joining.State, server: enrolment.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, before = public(site), site.audit.entries
    receipt = server.folder.parent / "old.json"
    with monkeypatch.context() as patch:
        then = signed_documents.now() - datetime.timedelta(seconds=5)
        patch.setattr(signed_documents, "now", lambda: then)
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
    for folder in (site.folder, server.folder):
        (kept,) = (folder / "rekeyed").glob("*")
        assert signed_documents.read(kept, rekeying.Rekeying, "rekeying") == asked
        assert kept.stat().st_mode & 0o777 == 0o600

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


# -- two at once, backups, thieves -------------------------------------------------------------------------------------


def _begun(folder: Path, gate: Any) -> None:
    gate.wait(30)
    own_rekeying.begin(joining.open_state(folder))


def test_two_who_begin_at_once_make_one_key(site: joining.State) -> None:
    """Else the file asks for the key of one, and beside it lies that of the other."""
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        gate = context.Barrier(4)
        processes = [context.Process(target=_begun, args=(site.folder, gate)) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 4
        new = own_rekeying.NewKey(site)
        assert keys.public_text(keys.read_private(new.private)) == new.asked().public_key
        assert own_rekeying.finish(site, lambda key: True)
    made = [entry for entry in site.audit.entries if entry.get("kind") == "rekeying"]
    assert len(made) == 5


@pytest.mark.parametrize("lost", ["another", "gone", "damaged"])
def test_a_file_whose_key_is_not_there_is_made_anew_and_never_taken(
    site: joining.State, server: enrolment.State, lost: str
) -> None:
    first, old = own_rekeying.begin(site), public(site)
    new = own_rekeying.NewKey(site)
    if lost == "another":
        keys.write_private(new.private, keys.make())
    elif lost == "gone":
        new.private.unlink()
    else:
        new.private.write_text("damaged")
    assert own_rekeying.waiting(site) == "damaged", "nobody is to tell that key to the coordinator"
    with pytest.raises(errors.TrustError):
        own_rekeying.finish(site, lambda key: True)
    assert public(site) == old
    second = own_rekeying.begin(site)
    assert second.public_key != first.public_key
    enrolment.rekey(server, new.document, keys.spoken(second.public_key))
    assert own_rekeying.finish(site, lambda key: True)
    assert public(site) == second.public_key


def test_what_was_sent_while_the_coordinator_was_asked_is_not_taken_for_it(site: joining.State) -> None:
    own_rekeying.begin(site)
    new, old = own_rekeying.NewKey(site), public(site)

    def slowly(key: Any) -> bool:
        new.private.unlink()
        own_rekeying.begin(site)
        return True

    assert not own_rekeying.finish(site, slowly)
    assert public(site) == old
    assert new.waits


def test_a_coordinator_that_goes_back_to_a_backup_is_given_the_file_again(
    site: joining.State, server: enrolment.State
) -> None:
    backup = {path: path.read_bytes() for path in (server.roster_path, server.audit.path)}
    first = own_rekeying.begin(site)
    enrolment.rekey(server, own_rekeying.NewKey(site).document)
    own_rekeying.finish(site, lambda key: True)
    for path, data in backup.items():
        path.write_bytes(data)
    again = enrolment.open_state(server.folder)
    assert first.public_key not in set(coordinator.known_keys(again.sites()))
    third = own_rekeying.begin(site)
    with pytest.raises(errors.TrustError):  # it says which file is to be given first
        enrolment.rekey(again, own_rekeying.NewKey(site).document)
    (kept,) = (site.folder / "rekeyed").glob("*")
    enrolment.rekey(again, kept, keys.spoken(first.public_key))
    assert set(coordinator.known_keys(again.sites())) == {first.public_key}
    enrolment.rekey(again, own_rekeying.NewKey(site).document)
    assert set(coordinator.known_keys(again.sites())) == {third.public_key}


def test_a_line_of_the_log_that_a_killed_process_left_out_is_written_before_the_next(
    site: joining.State, server: enrolment.State
) -> None:
    old, document = public(site), own_rekeying.NewKey(site).document
    first = own_rekeying.begin(site)
    server.roster.rekey(first, signed_documents.now())  # and no line in the log
    own_rekeying.finish(site, lambda key: True)
    second = own_rekeying.begin(site)
    for _ in range(2):
        enrolment.rekey(server, document)
    lines = [(line["base"], line["key"]) for line in server.audit.entries if line["event"] == "rekeyed"]
    chain = [keys.fingerprint(key) for key in (old, first.public_key, second.public_key)]
    assert lines == [(chain[0], chain[1]), (chain[1], chain[2])]


def test_a_stolen_key_signs_no_receipt_after_the_next(
    site: joining.State, server: enrolment.State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = keys.read_private(site.key)
    before = site.audit.receipt(old)
    own_rekeying.begin(site)
    enrolment.rekey(server, own_rekeying.NewKey(site).document)
    own_rekeying.finish(site, lambda key: True)
    new = keys.read_private(site.key)
    # The next message shows the log as it is under the new key.
    server.audit.record(
        "received",
        kind="reply",
        bytes=1,
        peer="north",
        peer_length=site.audit.mark.length,
        peer_head=site.audit.mark.head,
    )
    for _ in range(3):
        site.audit.record("sent", kind="scores", bytes=1)

    def fits(document: audit.Receipt, by: keys.Private, ago: int, entries: Any) -> bool:
        then = signed_documents.now() - datetime.timedelta(seconds=ago)
        dated = document.model_copy(update={"time": signed_documents.stamp(then), "signature": "A" * 40})
        dated = dated.model_copy(update={"signature": keys.sign(by, dated.signed_bytes())})
        path = signed_documents.write(tmp_path / "receipt.json", dated)
        try:
            cross_check.receipt(path, entries, "audit.jsonl")
        except errors.TrustError:
            return False
        except errors.NothingCompared:
            pass
        return True

    stolen = site.audit.receipt(old)
    for entries in (server.audit.entries, site.audit.entries):
        assert fits(before, old, 60, entries)
        assert not fits(stolen, old, 0, entries), "later"
        assert not fits(stolen, old, 60, entries), "says it is from before, and is longer than the log was then"
        assert fits(site.audit.receipt(new), new, 0, entries)
        third = keys.make()
        assert not fits(site.audit.receipt(third), third, 60, entries)


def test_the_coordinator_is_asked_less_often_the_longer_a_key_waits(site: joining.State) -> None:
    assert own_rekeying.pause_s(site) == own_rekeying.SHORTEST_S
    own_rekeying.begin(site)
    document = own_rekeying.NewKey(site).document
    pauses = []
    for age in (0, 100, 1000, 100_000, -100_000):
        then = document.stat().st_ctime - age
        os.utime(document, (then, then))
        pauses.append(own_rekeying.pause_s(site))
    assert pauses == pytest.approx([20, 20, 100, 600, 20], abs=1)
