"""Every attack against one real federation: what the attacker got, the audit line, the others' round, no canary."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from attacks import hostile, ours, strangers, table, updates

from fedvfm.protocol import protocol

pytestmark = pytest.mark.slow

REASONS = {
    "nan": "not-finite",
    "wrong-shape": "manifest",
    "huge-norm": "norm",
    "many-examples": "examples",
    "more-than-greeted": "examples",
    "extra-arrays": "manifest",
    "extra-metrics": "protocol",
    "nan-metric": "protocol",
    "path-in-name": "manifest",
    "pickled-array": "protocol",
    "pickled-reply": "site-malformed",
    "hundredfold": "site-oversized",
    "other-name": "site-name",
    "other-node-inside": "site-name",
    "stale": "stale",
    "free-text": "site-unknown",
}
ANSWERS = {
    "tampered": {"refused"},
    "replayed": {"approval-pending"},
    "more-rounds": {"policy-rounds"},
    "traversal-backbone": {"policy-backbone"},
    "one-image-batch": {"policy-training"},
    "forbidden-metric": {"policy-metrics"},
    "forbidden-values": {"policy-message"},
    "traversal-split": {"refused"},
    "no-such-round": {"policy-message"},
    "other-run": {"policy-rounds"},
    "own-adapter": {"policy-evaluations"},
    "own-adapter-validated": {"policy-message"},
    "second-test": {"policy-evaluations"},
    "unknown-kind": {"refused"},
    "empty": {"refused"},
    "pickle": {"refused"},
}


@pytest.fixture(scope="module")
def found(tiny: Any) -> Iterator[table.Found]:
    # Not below pytest's own folder, which other users cannot enter: what guards the state must be the state itself.
    folder = Path(tempfile.mkdtemp(prefix="fedvfm-attacks-"))
    yield table.attack_ours(folder, tiny, as_nobody=os.getuid() == 0)
    shutil.rmtree(folder)


def test_the_honest_sites_finished(found: table.Found) -> None:
    assert found.code == 0, found.words
    assert [row.others for name, row in found.port.items() if name in updates.LIES] == [
        f"round {number}: {', '.join(ours.HONEST)}" for number in range(1, len(ours.ORDER) + 1)
    ]


def test_no_code_of_an_attacker_ran(found: table.Found) -> None:
    assert found.canary == []


@pytest.mark.parametrize("name", strangers.STRANGERS)
def test_a_stranger_is_refused_and_noted(found: table.Found, name: str) -> None:
    row = found.port[name]
    wanted = {
        "unknown-key": "412",
        "revoked-key": "412",
        "no-key": "401",
        "wrong-authority": "TLS: certificate refused",
        "silent": strangers.CUT,
    }
    assert row.answer == wanted.get(name, "403")
    assert row.audit == (table.NO_AUDIT if name == "wrong-authority" else f"refused, {table.WORDS[name]}")
    assert row.others == f"all {len(ours.ORDER)} rounds"


@pytest.mark.parametrize("name", table.INSIDERS)
def test_who_is_not_what_he_says_takes_no_part(found: table.Found, name: str) -> None:
    assert found.port[name].answer == "asked for nothing"
    words = {"thief": "decided, handshake, refused, other-name", "liar": "decided, handshake, refused, refused"}
    assert found.port[name].audit == words.get(name, table.NOTHING)


def test_a_copied_invite_enrols_nobody(found: table.Found) -> None:
    row = found.port["copied-invite"]
    assert (row.answer, row.audit) == ("refused: trust", "decided, request, refused")


@pytest.mark.parametrize("name", updates.LIES)
def test_a_lie_is_refused_with_its_reason_and_the_others_round_completes(found: table.Found, name: str) -> None:
    row = found.port[name]
    if name in table.AT_THE_PORT:
        assert row.answer == "403"
        assert row.audit == "refused, foreign-node"
    elif name == "half":
        assert row.answer == table.WHOLE
        assert row.audit == "decided, update, admitted"
    else:
        assert row.answer == f"refused: {REASONS[name]}"
        assert row.audit == f"decided, update, refused, {REASONS[name]}"


@pytest.mark.parametrize("name", hostile.ASKS)
def test_a_hospital_answers_a_hostile_coordinator_with_a_word(found: table.Found, name: str) -> None:
    row = found.site[name]
    assert row.answer in ANSWERS.get(name, set(protocol.ERROR_CODES)), row
    assert "refus" in row.audit, row


def test_no_free_text_comes_back(found: table.Found) -> None:
    for reply in found.replies:
        for text in (b"/tmp", b"/home", b"/root", b".py", b".png", b"Traceback", b"east", b"Error"):
            assert text not in reply, reply


def test_another_user_reads_nothing_and_no_door_opens(found: table.Found) -> None:
    if not found.local:
        pytest.skip("only root can become another user")
    assert found.local["uid"] != 0
    assert found.local["read"] == []
    opened = {name for name, status in found.local["http"].items() if status not in ("401", "403")}
    assert opened == {"documentation", "health"}


def test_files_are_their_owners_alone(found: table.Found) -> None:
    assert found.open_files == []


def test_secrets_stand_in_no_argument_log_or_journal(found: table.Found) -> None:
    assert found.secrets == []
