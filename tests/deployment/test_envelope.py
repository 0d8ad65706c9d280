"""One envelope a message: nothing is decoded, digested or serialised twice, at a site nor at the coordinator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict

from fedvfm.flower import internals
from fedvfm.model import locking
from fedvfm.protocol import codecs, envelope, protocol
from fedvfm.server.rounds import messaging
from fedvfm.state import state
from fedvfm.storage import hash_chain
from fedvfm.trust import recipes
from tests.client.two_numbers import adapter, make_recipe
from tests.deployment import test_marks, test_site_verbs

SHA = "ab" * 32


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the records of a message were decoded, digested and serialised; marks alone are none."""
    made: Counter[str] = Counter()

    def counted(module: Any, name: str, what: str) -> None:
        real = getattr(module, name)

        def count(content: RecordDict, *more: Any, **named: Any) -> Any:
            made[what] += bool(set(content) - {"audit"})
            return real(content, *more, **named)

        monkeypatch.setattr(module, name, count)

    for name in ("decode_task", "decode_update", "decode_evaluation"):
        counted(protocol, name, name)
    counted(protocol, "digest", "digest")
    counted(internals.serde, "recorddict_to_proto", "serialise")
    return made


def arrived(kind: str, task: protocol.Task, run_id: int = 1) -> Message:
    """A message as Flower hands it over: nobody knows its size."""
    internals.be_server_task(run_id)
    message = Message(protocol.encode_task(task), 1, kind, ttl=600.0)
    internals.set_message_id(message, "m1")
    protocol.put_mark(message, hash_chain.Mark(3, SHA))
    return internals.parse(internals.serialise(message))


def test_a_site_reads_a_message_once_and_writes_its_reply_once(tiny: Any, tmp_path: Path, counts: Counter[str]) -> None:
    """With the real ClientApp: 2 decodes, 3 digests and 3 serialisations of a train message before."""
    site = test_site_verbs.joined(tiny, locking.make(recipes.written(tiny.experiment)), tmp_path)
    site.open()
    assert site.door is not None

    def ask(kind: str, task: protocol.Task) -> tuple[Message, Counter[str]]:
        message = arrived(kind, task)
        counts.clear()
        reply = site.door(message, internals.context(1, 1, {}))  # type: ignore[misc]
        assert not reply.has_error(), reply.error
        return reply, Counter(counts)

    reply, seen = ask(protocol.TRAIN, protocol.Task(site.lock.recipe, 1, site.initial))
    both = {"digest": 2, "serialise": 2}  # of the message and of the reply
    assert seen == {"decode_task": 1, "decode_update": 1, **both}
    after = protocol.decode_update(reply.content).state
    _, seen = ask(protocol.EVALUATE, protocol.Task(site.lock.recipe, 1, after, "val"))
    assert seen == {"decode_task": 1, "decode_evaluation": 1, **both}


def test_the_log_says_the_true_sizes_and_digests(tiny: Any, tmp_path: Path) -> None:
    site = test_site_verbs.joined(tiny, locking.make(recipes.written(tiny.experiment)), tmp_path)
    site.open()
    assert site.door is not None
    message = arrived(protocol.TRAIN, protocol.Task(site.lock.recipe, 1, site.initial))
    reply = site.door(message, internals.context(1, 1, {}))
    received, sent = [row for row in site.where.audit.entries if row["event"] in ("received", "sent")][-2:]
    for row, one in ((received, message), (sent, reply)):
        assert (row["bytes"], row["digest"]) == (len(internals.serialise(one)), protocol.digest(one.content))


def test_the_coordinator_reads_a_reply_once(
    tmp_path: Path, counts: Counter[str], said: Callable[[], list[str]]
) -> None:
    trial = test_marks.Trial(tmp_path, said)

    def at_the_coordinator(reply: Message) -> None:
        reply.__dict__.pop("_fedvfm_size")  # as Flower hands it over
        counts.clear()

    trial.wire.tamper = at_the_coordinator
    asker = messaging.Asker(trial.grid, 60.0)
    content = protocol.encode_task(protocol.Task(make_recipe(), 1, adapter(0.0)))
    ((_, reply),) = asker.ask({7: "north"}, protocol.TRAIN, lambda _: content, 1)
    update = envelope.of(reply).update_on(adapter(0.0), codecs.PLAIN)
    assert update.state == adapter(1.0)
    assert counts == {"decode_update": 1, "digest": 1, "serialise": 1}
    received = [row for row in trial.server.audit.entries if row["event"] == "received"][-1]
    assert received["bytes"] == asker.traffic.up == len(internals.serialise(reply))


def test_messages_to_many_sites_share_what_is_made_of_their_records(counts: Counter[str]) -> None:
    internals.be_server_task(1)
    content = protocol.encode_task(protocol.Task(make_recipe(), 1, adapter(0.0)))
    messages = [Message(content, node, protocol.TRAIN, ttl=60.0) for node in (1, 300, 2**60)]
    envelope.share(messages)
    sizes = [envelope.size(message) for message in messages]
    for message in messages:
        protocol.put_mark(message, hash_chain.Mark(3, SHA))
    marked = [envelope.size(message) for message in messages]
    assert {envelope.of(message).digest for message in messages} == {envelope.of(messages[0]).digest}
    assert counts == {"digest": 1, "serialise": 1}
    assert marked == [len(internals.serialise(message)) for message in messages]
    assert sizes == [internals.size(Message(content, node, protocol.TRAIN, ttl=60.0)) for node in (1, 300, 2**60)]


@pytest.mark.parametrize("numbers", [1, 30, 31, 32, 4000, 4096, 600_000])
def test_sizes_are_exact_at_every_length(numbers: int) -> None:
    """The length of the records stands before them, in one byte more from 128, 16,384 and 2,097,152 bytes on."""
    internals.be_server_task(1)
    values = state.AdapterState({"head.bias": np.zeros(numbers, np.float32)})
    for content in (protocol.encode_task(protocol.Task(make_recipe(), 1, values)), RecordDict()):
        message = Message(content, 7, protocol.TRAIN, ttl=60.0)
        assert envelope.size(message) == len(internals.serialise(message))
        assert internals.head(message) + envelope.of(message).body == internals.serialise(message)
        protocol.put_mark(message, hash_chain.Mark(3, SHA), hash_chain.Mark(4, SHA))
        assert envelope.size(message) == len(internals.serialise(message))
    refused = Message(Error(1005, "refused"), reply_to=message)
    assert envelope.size(refused) == len(internals.serialise(refused))


def test_other_records_are_another_envelope() -> None:
    """Whoever puts other records into a message is not answered with what was made of the first ones."""
    internals.be_server_task(1)
    message = Message(protocol.encode_task(protocol.Task(make_recipe(), 1, adapter(0.0))), 7, protocol.TRAIN)
    first = envelope.of(message)
    assert first.task.state == adapter(0.0)
    protocol.put_mark(message, hash_chain.Mark(3, SHA))
    assert envelope.of(message) is first
    message.content = protocol.encode_task(protocol.Task(make_recipe(), 1, adapter(5.0)))
    assert envelope.of(message).task.state == adapter(5.0)
    inner = message.content
    inner["fedvfm"] = protocol.encode_task(protocol.Task(make_recipe(seed=7), 1, adapter(5.0)))["fedvfm"]
    assert envelope.of(message).task.recipe.seed == 7
