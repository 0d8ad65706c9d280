"""Right messages made wrong: what a site may answer and a server may ask, mutated; a value or a typed refusal, no more.

``test_protocol`` has the records that are hostile from the beginning. Here every example begins as a message that is
taken, so that the fault lies deep: one key, one value, one byte, one array, one record more or less.
"""

from __future__ import annotations

import builtins
import copy
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedvfm import errors
from fedvfm.client.gate import gate, reply_cache
from fedvfm.config import schema
from fedvfm.flower import internals
from fedvfm.protocol import protocol, wire
from fedvfm.server.rounds import admission
from fedvfm.state import state
from fedvfm.storage import hash_chain

fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ROWS = state.Manifest.of([state.ArraySpec("a", (2, 3), "head"), state.ArraySpec("b", (4,), "head")])
BASE = state.AdapterState({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)})
MARK = hash_chain.Mark(7, "ab" * 32)


@pytest.fixture(scope="module", autouse=True)
def server_task() -> None:
    internals.be_server_task(1)


def recipe() -> schema.Recipe:
    return schema.parse(
        schema.Recipe, {"backbone": {"name": "none"}, "data": {"class_names": ["rest", "cell"]}, "rounds": 5}, "recipe"
    )


def update(**changes: Any) -> state.SiteUpdate:
    values = {"site": "north", "state": BASE, "num_examples": 10, "base_round": 0, "base_fingerprint": BASE.fingerprint}
    return state.SiteUpdate(**{**values, "metrics": {"loss": 0.5}, **changes})


GOOD: dict[str, tuple[Callable[[], RecordDict], Callable[[RecordDict], Any]]] = {
    "task": (lambda: protocol.encode_task(protocol.Task(recipe(), 1, BASE, "val")), protocol.decode_task),
    "handshake": (lambda: protocol.encode_task(protocol.Task(recipe())), protocol.decode_task),
    "hello": (
        lambda: protocol.encode_hello(protocol.Hello("north", "a" * 64, "b" * 64, 3, {"train": 9}, "c" * 64)),
        protocol.decode_hello,
    ),
    "update": (lambda: protocol.encode_update(update()), protocol.decode_update),
    "evaluation": (
        lambda: protocol.encode_evaluation(protocol.Evaluation("north", 1, 3, {"dice": 0.5}, {"dice": [0.5]}, ("x",))),
        protocol.decode_evaluation,
    ),
}


def marked(content: RecordDict) -> RecordDict:
    message = Message(content, 7, "train")
    protocol.put_mark(message, MARK)
    return message.content


class Evil:
    """Would show that a pickle was loaded."""

    def __reduce__(self) -> Any:
        return (exec, ("import builtins; builtins.fedvfm_was_here = True",))


PICKLE = pickle.dumps(Evil())
whole = st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, -1, 2**62, 10**12, -(2**63), 2**53, 2**53 + 1]))
real = st.one_of(st.floats(), st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e308, -0.0, 5e-324]))
words = st.one_of(
    st.text(max_size=20),
    st.sampled_from([
        "../../etc/passwd", "a" * 501, "x" * 300_000, "\x00", "\u202e", str(MARK), f"{MARK} ", "[" * 50_000, "9" * 5000,
        '[["a",[0,99999999999999999999]]]', '[["a",[2,3]],["b",[4]]]', '[["a",{}],["b",[4]]]', "{}", '{"a":1}',
        '[["a",[' + "1," * 70 + "1]]]", '[["\\ud800",[2,3]],["b",[4]]]', '[["a",[10]],["b",[0]]]',
    ]),
)  # fmt: skip
lists = st.one_of(
    st.lists(whole, max_size=3), st.lists(real, max_size=3), st.lists(words, max_size=3), st.lists(st.booleans())
)
metric = st.one_of(whole, real, st.lists(whole, max_size=3), st.lists(real, max_size=3))
value = st.one_of(whole, real, words, st.booleans(), st.binary(max_size=20), st.just(PICKLE), lists)


@st.composite
def arrays(draw: Any, good: bytes) -> Array:
    """The right array with other bytes, or under another kind."""
    data = bytearray(good)
    how = draw(st.sampled_from(["flip", "cut", "more", "pickle", "kind", "other", "nan"]))
    if how == "flip" and data:
        data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    elif how == "cut":
        del data[draw(st.integers(0, len(data))) :]
    elif how == "more":
        data += draw(st.binary(min_size=1, max_size=9))
    elif how == "pickle":
        data = bytearray(PICKLE)
    elif how == "nan":
        data[-4:] = np.float32("nan").tobytes()
    stype = draw(st.sampled_from(["torch", "", "pickle"])) if how == "kind" else "numpy.ndarray"
    shape = draw(st.sampled_from([(10,), (10**12,), (), (-1,)])) if how == "other" else (10,)
    return Array(
        dtype=draw(st.sampled_from(["float32", "float64", "object"])), shape=shape, stype=stype, data=bytes(data)
    )


@st.composite
def mutated(draw: Any, name: str) -> RecordDict:
    """A message that is taken, with one to three faults."""
    content = GOOD[name][0]()
    content = marked(content) if draw(st.booleans()) else content
    for _ in range(draw(st.integers(1, 3))):
        _spoil(draw, content)
    return content


def _spoil(draw: Any, content: RecordDict) -> None:
    names = sorted(content)
    how = draw(st.sampled_from(["key", "key", "key", "array", "record", "extra", "drop"]))
    if how == "record":
        new = draw(st.sampled_from(["fedvfm", "audit", "metrics", "samples", "adapter", "x", "../x"]))
        content.pop(new, None)  # Flower warns where another kind takes a record's place
        content[new] = draw(st.sampled_from([ConfigRecord, MetricRecord, ArrayRecord]))()
    elif how == "drop" and names:
        del content[draw(st.sampled_from(names))]
    elif how == "array" and "adapter" in content.array_records:
        before = content.array_records["adapter"].get("adapter")
        made = draw(arrays(before.data if before is not None else b""))
        del content["adapter"]
        content["adapter"] = ArrayRecord({draw(st.sampled_from(["adapter", "adapter", "adapter", "b"])): made})
    else:
        rows = [name for name in names if isinstance(content[name], ConfigRecord | MetricRecord)]
        if rows:
            name = draw(st.sampled_from(rows))
            record = dict(content[name])
            keys = sorted(record) or ["x"]
            key = draw(words) if how == "extra" else draw(st.sampled_from(keys))
            if draw(st.integers(0, 9)) == 0:
                record.pop(key, None)
            else:
                record[key] = draw(metric if isinstance(content[name], MetricRecord) else value)
            content[name] = type(content[name])(record)


def judged(decode: Callable[[RecordDict], Any], content: RecordDict) -> Any:
    """The value, or the error of ours; any other exception fails the test."""
    found: Any
    try:
        found = decode(content)
    except errors.FedvfmError as error:
        found = error
    assert not isinstance(found, Exception) or len(str(found)) < 2000
    return found


@pytest.mark.parametrize("name", GOOD)
def test_the_messages_that_the_mutations_begin_with_are_taken(name: str) -> None:
    make, decode = GOOD[name]
    assert decode(make()) == decode(marked(make()))
    assert protocol.digest(make()) == protocol.digest(marked(make()))
    arrived = internals.parse(internals.serialise(Message(marked(make()), 7, "train")))
    assert protocol.digest(arrived.content) == protocol.digest(make()), "both ends come to the same sha256"
    assert protocol.find_mark(arrived) == MARK


@pytest.mark.parametrize("name", GOOD)
@fuzz
@given(data=st.data())
def test_a_mutated_message_is_a_value_or_a_typed_refusal(name: str, data: Any) -> None:
    content = data.draw(mutated(name))
    found = judged(GOOD[name][1], content)
    if isinstance(found, state.SiteUpdate):
        assert all(np.isfinite(one) and len(key) <= wire.MAX_NAME for key, one in found.metrics.items())
        terms = admission.Terms("north", 1, BASE, ROWS, schema.AdmissionConfig(max_examples=100, max_update_norm=9.0))
        admitted = judged(lambda _: admission.admit(found, terms), content)
        if admitted is found:  # it is within every bound, whatever was changed
            assert {key: one.shape for key, one in found.state.items()} == {"a": (2, 3), "b": (4,)}
            assert found.state.finite()
            assert 1 <= found.num_examples <= 100
            assert (found.site, found.base_round, found.base_fingerprint) == ("north", 0, BASE.fingerprint)
        else:
            assert isinstance(admitted, errors.Refused)
    elif isinstance(found, protocol.Evaluation):
        assert 0 <= found.num_examples <= 2**53
        assert all(np.isfinite(list(found.metrics.values())))
    elif isinstance(found, protocol.Task) and found.state is not None:
        assert len(found.state.fingerprint) == 64
    for other in GOOD:  # and nobody else's decoder breaks over it
        judged(GOOD[other][1], content)
    assert len(protocol.digest(content)) == 64
    assert not hasattr(builtins, "fedvfm_was_here")


def answer(message: Message, context: Any) -> Message:
    task = protocol.decode_task(message.content)
    if message.metadata.message_type == protocol.TRAIN and task.state is not None:
        return Message(protocol.encode_update(update(base_round=max(task.round, 0) - 1)), reply_to=message)
    return Message(GOOD["hello"][0](), reply_to=message)


@settings(fuzz, max_examples=80)
@given(data=st.data(), kind=st.sampled_from([protocol.HANDSHAKE, protocol.TRAIN, protocol.EVALUATE, "query.other"]))
def test_a_gate_answers_every_message_with_a_reply_or_one_of_our_words(
    tmp_path_factory: pytest.TempPathFactory, data: Any, kind: str
) -> None:
    seen: list[Exception] = []
    kept = reply_cache.Sent(tmp_path_factory.getbasetemp() / "fuzz-sent")
    door = gate.Gate(answer, kept, gate.NoTerms(), lambda where, error: seen.append(error))
    message = Message(data.draw(mutated(data.draw(st.sampled_from(["task", "handshake"])))), 7, kind, ttl=60.0)
    internals.set_message_id(message, "m1")
    reply = door(message, internals.context(1, 7, {}))
    assert reply.metadata.reply_to_message_id == "m1"
    if reply.has_error():
        assert reply.error.reason in protocol.ERROR_CODES
        assert isinstance(seen[0], errors.FedvfmError), "typed where it was found, not only as it left"
    for path in kept._folder.glob("*"):
        assert path.parent == kept._folder


@fuzz
@given(reason=st.one_of(words, st.sampled_from([*protocol.ERROR_CODES]).map(lambda word: f"{word} {MARK}")), code=whole)
def test_a_refusal_is_one_of_our_words_or_unknown(reason: str, code: int) -> None:
    asked = Message(RecordDict(), 7, "train")
    internals.set_message_id(asked, "m1")
    reply = Message(Error(code=code % 2**31, reason=reason), reply_to=asked)
    assert protocol.error_word(reply) in {*protocol.ERROR_CODES, "unknown"}
    assert judged(lambda _: protocol.find_mark(reply), RecordDict()) in (None, MARK)


# -- sizes -------------------------------------------------------------------------------------------------------------


def with_header(content: RecordDict, **values: Any) -> RecordDict:
    content["fedvfm"] = ConfigRecord({**content.config_records["fedvfm"], **values})
    return content


HUGE: dict[str, Callable[[], tuple[str, RecordDict]]] = {
    "a layout of many arrays": lambda: (
        "update",
        with_header(GOOD["update"][0](), layout=str([[f"a{n}", [0]] for n in range(21_000)]).replace("'", '"')),
    ),
    "a layout that claims a terabyte": lambda: (
        "update",
        with_header(GOOD["update"][0](), layout='[["a",[1000000,1000000]]]'),
    ),
    "metrics without end": lambda: ("update", _metrics("update", {f"m{n}": 1.0 for n in range(5000)})),
    "a metric's name": lambda: ("update", _metrics("update", {"m" * 1000: 1.0})),
    "scores without end": lambda: ("evaluation", _metrics("evaluation", {f"m{n}": 1.0 for n in range(5000)})),
    "examples": lambda: ("evaluation", _metrics("evaluation", {"num_examples": 2**60})),
    "fewer than no examples": lambda: ("evaluation", _metrics("evaluation", {"num_examples": -1})),
    "counts of a greeting": lambda: ("hello", _metrics("hello", {"train": -5})),
    "a recipe": lambda: ("task", with_header(GOOD["task"][0](), recipe=" " * 1_000_000 + "{}")),
    "ids": lambda: ("evaluation", with_header(GOOD["evaluation"][0](), ids=["x" * 501])),
    "ids that are none": lambda: ("evaluation", with_header(GOOD["evaluation"][0](), ids="x")),
}


def _metrics(name: str, more: dict[str, Any]) -> RecordDict:
    content = GOOD[name][0]()
    content["metrics"] = MetricRecord({**content.metric_records["metrics"], **more})
    return content


@pytest.mark.parametrize("what", HUGE)
def test_what_is_too_large_is_refused_and_takes_little_memory(what: str) -> None:
    name, content = HUGE[what]()
    tracemalloc.start()
    with pytest.raises(errors.ProtocolError):
        GOOD[name][1](content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 1024 * 1024


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("where", ["header", "record", "adapter", "mark"])
def test_what_is_not_known_is_refused(name: str, where: str) -> None:
    """Deny by default: one key or record more than the form has is no message of ours."""
    make, decode = GOOD[name]
    content = marked(make())
    if where == "header":
        with_header(content, patient="Smith")
    elif where == "record":
        content["more"] = MetricRecord({"x": 1.0})
    elif where == "mark":
        content["audit"] = ConfigRecord({"mark": str(MARK), "patient": "Smith"})
    elif "adapter" in content:
        both = {one: copy.copy(content.array_records["adapter"]["adapter"]) for one in ("adapter", "more")}
        content["adapter"] = ArrayRecord(both)
    else:
        content["adapter"] = ArrayRecord({})
    with pytest.raises(errors.ProtocolError) as refused:
        decode(content)
    assert "Smith" not in str(refused.value)
    assert "patient" not in str(refused.value)


def test_a_path_is_no_place(tmp_path: Path) -> None:
    """Names of sites and arrays are never parts of a path: what is kept lies in its folder, whatever they are."""
    from fedvfm.server.rounds import update_store

    kept = update_store.Received(tmp_path / "received")
    name = "../../../etc/passwd"
    kept.keep(update(site=name, state=state.AdapterState({name: np.ones(2, np.float32)})), 1)
    assert [path.parent for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "received"]
