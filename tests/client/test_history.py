"""The running state of the gate says what the whole log says, and a message reads none of a long one."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvfm.audit import audit, segments
from fedvfm.client import purge, state_folder
from fedvfm.client.gate import enforcement, gate, history, reply_cache, rollback_detection
from fedvfm.flower import internals
from fedvfm.ledger import receipts
from fedvfm.protocol import protocol
from fedvfm.storage import hash_chain
from tests.client import private_site, two_numbers
from tests.deployment import test_marks

SHA = "ab" * 32
Entry = dict[str, Any]

# -- a coordinator that went back: all messages at once, and one after the other ---------------------------------------


def drawn(entry: Mapping[str, Any]) -> int:
    number = int(entry.get("round", 0))
    return {"train": number - 1, "evaluate": number}.get(str(entry["kind"]), 0)


def proved(noted: list[Entry]) -> str:
    """Which proof the messages of a recipe give, looked at all together: by the definition."""
    heads: dict[int, str] = {}
    for one in noted:
        if heads.setdefault(one["peer_length"], one["peer_head"]) != one["peer_head"]:
            return "another one"
    for first, second in itertools.permutations(noted, 2):
        later = first["peer_length"] < second["peer_length"] and second["kind"] == "train"
        if later and 0 < second["round"] <= drawn(first):
            return "asked for"
    runs: dict[str, list[int]] = {}
    for one in noted:
        runs.setdefault(one["run"], []).append(one["peer_length"])
    spans = sorted((min(lengths), max(lengths)) for lengths in runs.values())
    return "started anew" if any(b[0] < a[1] for a, b in itertools.pairwise(spans)) else ""


def longest(noted: Iterable[Entry], message: tuple[Any, ...]) -> tuple[int, set[str]]:
    others = [one for one in noted if tuple(map(one.get, ("recipe", "round", "fingerprint", "kind"))) != message]
    most = max((one.get("peer_length", 0) for one in others), default=0)
    return most, {one["peer_head"] for one in others if one.get("peer_length") == most and "peer_head" in one}


messages = st.fixed_dictionaries(
    {
        "event": st.just("received"),
        "kind": st.sampled_from(["handshake", "train", "evaluate"]),
        "recipe": st.sampled_from([SHA, "cd" * 32]),
        "peer": st.sampled_from(["trial", "other"]),
        "round": st.integers(0, 4),
        "fingerprint": st.sampled_from(["1", "2"]),
        "run": st.sampled_from(["1", "2", "3"]),
    },
    optional={"peer_length": st.integers(1, 12)},
)


@settings(max_examples=400, deadline=None)
@given(st.lists(messages, max_size=14), st.sampled_from(["", "x"]))
def test_one_after_the_other_messages_prove_what_they_prove_together(rows: list[Entry], other_head: str) -> None:
    for at, row in enumerate(rows):
        if "peer_length" in row:
            row["peer_head"] = f"{row['peer_length']}{other_head if at % 5 == 4 else ''}"
    noted = rollback_detection.Coordinators()
    for at, row in enumerate(rows, start=1):
        noted.add(row)
        for peer, recipe in itertools.product(("trial", "other"), (SHA, "cd" * 32)):
            mine = [one for one in rows[:at] if (one["peer"], one["recipe"]) == (peer, recipe) and "peer_head" in one]
            assert bool(noted.proof(peer, recipe)) == bool(proved(mine))
        message = tuple(map(row.get, ("recipe", "round", "fingerprint", "kind")))
        theirs = [one for one in rows[:at] if one["peer"] == row["peer"]]
        assert noted.longest(row["peer"], message) == longest(theirs, message)
        assert noted.drawn(SHA) == max((0, *(drawn(one) for one in rows[:at] if one["recipe"] == SHA)))


# -- the same as the whole log -----------------------------------------------------------------------------------------


def of(entries: Iterable[Mapping[str, Any]]) -> history.History:
    made = history.History()
    for entry in entries:
        made.add(entry)
    return made


def test_rounds_scores_and_marks_of_a_real_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through segments and a second process that writes: what follows the log is what the log says."""
    monkeypatch.setattr(audit.Audit, "most", 5)
    site, start = private_site.Site(tmp_path), private_site.START
    for number in (1, 2, 3):
        reply = site.ask(private_site.train(number, start))
        assert not reply.has_error(), site.faults
        start = protocol.decode_update(reply.content).state
        other = state_folder.open_state(site.where.folder).audit
        other.record("decided", kind="approval", recipe=SHA, verdict="approved")
        assert not site.ask(
            protocol.Task(private_site.make_recipe(), number, start, "val"), protocol.EVALUATE
        ).has_error()
        site.ask(private_site.train(9, start))
    entries, recipe = site.where.audit.entries, private_site.make_recipe().hash
    found = site.terms.history
    assert len(segments.numbers(site.where.audit.path)) > 5
    assert found.usage(recipe) == audit.usage(entries, recipe) != audit.Usage()
    assert found.usage(SHA) == audit.Usage()
    assert found.ledger_marks() == list(receipts.marks(entries, "north", history.OWN))
    assert len(found.ledger_marks()) == 3
    sent = [one["digest"] for one in entries if one["event"] == "sent" and one["kind"] == "train"]
    assert [found.left(recipe, digest) for digest in sent] == [False, False, True]
    assert vars(found.taken(recipe)) == vars(of(entries).taken(recipe))
    assert audit.verify(site.where.audit.path)["length"] == len(entries)


# -- a site of before --------------------------------------------------------------------------------------------------

BEFORE = Path(__file__).parent / "site_before_segments"


@pytest.fixture
def before(tmp_path: Path) -> private_site.Site:
    """A site that trained and scored round 1 under an earlier version, as that left its files."""
    for path in BEFORE.iterdir():
        if path.is_dir():
            shutil.copytree(path, tmp_path / path.name)
    text = (BEFORE / "north.toml").read_text().replace("FOLDER", str(tmp_path))
    (tmp_path / "north.toml").write_text(text)
    private_site.write_images(tmp_path / "data")
    (tmp_path / "fedvfm-ledger" / "ledger.key").chmod(0o600)
    return private_site.Site(tmp_path)


def test_the_files_of_an_earlier_version_open_and_go_on(before: private_site.Site, monkeypatch: Any) -> None:
    monkeypatch.setattr(audit.Audit, "most", 10)  # what is there is longer
    entries = before.where.audit.entries
    sent = [one for one in entries if one["event"] == "sent" and "digest" in one]
    reply = before.ask(private_site.train())
    assert not reply.has_error(), before.faults
    assert (protocol.digest(reply.content), before.app.asked) == (sent[0]["digest"], []), "the same bytes leave"
    after = protocol.decode_update(reply.content).state
    task = protocol.Task(private_site.make_recipe(), 1, after, "val")
    scores = before.ask(task, protocol.EVALUATE)
    assert (protocol.digest(scores.content), before.app.asked) == (sent[1]["digest"], [])
    assert len(before.charged()) == 1
    assert not before.ask(private_site.train(2, after)).has_error(), before.faults
    assert len(before.charged()) == 2
    found = audit.read(before.where.audit.path)
    assert found[: len(entries)] == entries
    assert segments.numbers(before.where.audit.path) == [1, 2]


def test_a_purge_takes_every_segment_and_begins_anew(before: private_site.Site, monkeypatch: Any) -> None:
    monkeypatch.setattr(audit.Audit, "most", 4)
    for _ in range(3):
        before.ask(private_site.train())
    log = before.where.audit.path
    assert len(segments.numbers(log)) > 1
    row = next(one for one in purge.found(before.where, with_audit=True) if one.kind == "audit")
    assert row.files == 1 + len(segments.numbers(log))
    purge.run(before.where, with_audit=True)
    assert not segments.folder(log).exists()
    assert [entry["event"] for entry in audit.read(log)][:2] == ["opened", "purged"]
    assert before.where.approvals.stand() == [], "rounds would be counted afresh"


# -- a long log --------------------------------------------------------------------------------------------------------


def lengthen(path: Path, number: int) -> None:
    """So many entries more of one coordinator that asks and is refused, in one file, as logs were before segments."""
    head = str(hash_chain.read(path)[-1]["hash"])
    with path.open("a") as file:
        for at in range(number):
            kind = f'"kind":"train","peer":"trial","peer_head":"{at:064x}","peer_length":{at + 1}'
            rest = f'{kind},"prev":"{head}","recipe":"{SHA}","round":1,"run":"1","time":"2026-01-01T00:00:00Z"}}'
            begin = '{"bytes":1,"event":"received",'
            head = hashlib.sha256((begin + rest).encode()).hexdigest()
            file.write(f'{begin}"hash":"{head}",{rest}\n')


def test_a_message_reads_nothing_of_a_long_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = two_numbers.join(tmp_path)
    lengthen(joined.site.audit.path, 200_000)
    own = enforcement.HospitalTerms(joined.site, lambda: joined.rules, two_numbers.build)
    internals.be_server_task(1)
    seen: Counter[str] = Counter()
    real = hash_chain.parse
    monkeypatch.setattr(hash_chain, "parse", lambda line: (seen.update(["parsed"]), real(line))[1])
    door = gate.Gate(test_marks.app, reply_cache.Sent(joined.site.sent), own, lambda at, error: None)

    def ask(number: int, value: float) -> int:
        task = protocol.Task(two_numbers.make_recipe(), number, two_numbers.adapter(value))
        message = Message(protocol.encode_task(task), 5, protocol.TRAIN, ttl=60.0)
        seen.clear()
        assert not door(message, test_marks.CONTEXT).has_error()
        return seen["parsed"]

    first = ask(1, 0.0)  # seals what was there
    assert first < 50
    assert segments.sealed(joined.site.audit.path, 1).exists()
    assert ask(2, 1.0) < 50
    assert len(own.audit._open().entries) < 100, "what is held of the log is its last segment"
    own.where.audit.record("decided", kind="approval", recipe=SHA, verdict="approved")
    assert ask(3, 2.0) < 100, "another writer's entries, and the last segment"
    assert own.audit.mark.length > 200_000
