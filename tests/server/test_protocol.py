"""Messages: what is encoded is decoded, and whatever comes over the wire ends in a value or in an error of ours."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedvfm import errors
from fedvfm.flower import internals
from fedvfm.protocol import protocol
from fedvfm.state import state

fuzz = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
names = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)
reals = st.floats(allow_nan=False, allow_infinity=False, width=32)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@pytest.fixture(scope="module", autouse=True)
def server_task() -> None:
    internals.be_server_task(1)


@st.composite
def states(draw: Any) -> state.AdapterState:
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shape_of = draw(st.dictionaries(names, shapes, max_size=4))
    return state.AdapterState(
        {name: np.asarray(rng.standard_normal(shape), dtype=np.float32) for name, shape in shape_of.items()}
    )


def travelled(content: RecordDict) -> RecordDict:
    """The records after a transport."""
    found: RecordDict = internals.parse(internals.serialise(Message(content, 7, "train"))).content
    return found


# -- round trips -----------------------------------------------------------------------------------------------------


@fuzz
@given(
    values=states(),
    number=st.integers(0, 10**6),
    split=st.sampled_from(["", "val", "test"]),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_task_round_trip(
    sites: Any, values: state.AdapterState, number: int, split: str, flags: tuple[bool, bool]
) -> None:
    task = protocol.Task(sites.make_recipe(seed=number), number, values, split, *flags, final=split == "test")
    assert protocol.decode_task(travelled(protocol.encode_task(task))) == task


def test_task_without_an_adapter(sites: Any) -> None:
    task = protocol.Task(sites.make_recipe())
    assert protocol.decode_task(travelled(protocol.encode_task(task))) == task


@fuzz
@given(site=names, rank=st.integers(1, 1024), counts=st.dictionaries(names, st.integers(0, 10**9), max_size=3))
def test_hello_round_trip(site: str, rank: int, counts: dict[str, int]) -> None:
    hello = protocol.Hello(site, "a" * 64, "b" * 64, rank, counts, "c" * 64)
    assert protocol.decode_hello(travelled(protocol.encode_hello(hello))) == hello


@fuzz
@given(
    values=states(),
    count=st.integers(-(2**63), 2**63 - 1),
    number=st.integers(0, 10**6),
    metrics=st.dictionaries(names, reals, max_size=3),
)
def test_update_round_trip(values: state.AdapterState, count: int, number: int, metrics: dict[str, float]) -> None:
    metrics.pop("num_examples", None)
    update = state.SiteUpdate("north", values, count, number, values.fingerprint, metrics=metrics)
    found = protocol.decode_update(travelled(protocol.encode_update(update)))
    assert found == update
    assert found.state.fingerprint == update.state.fingerprint


@fuzz
@given(
    metrics=st.dictionaries(names, reals, max_size=3),
    samples=st.dictionaries(names, st.lists(reals, max_size=3), max_size=3),
    ids=st.lists(names, max_size=3),
    said=st.sampled_from(["", *protocol.ACCEPTANCE]),
)
def test_evaluation_round_trip(
    metrics: dict[str, float], samples: dict[str, list[float]], ids: list[str], said: str
) -> None:
    metrics.pop("num_examples", None)
    answer = protocol.Evaluation("north", 3, 5, metrics, samples, tuple(ids), said)
    assert protocol.decode_evaluation(travelled(protocol.encode_evaluation(answer))) == answer


def test_the_numbers_travel_as_one_plain_npy_that_flower_reads_too() -> None:
    values = state.AdapterState({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.full(2, 9, np.float32)})
    update = state.SiteUpdate("north", values, 1, 0, "x")
    (record,) = travelled(protocol.encode_update(update)).array_records.values()
    (array,) = record.values()
    np.testing.assert_array_equal(array.numpy(), [0, 1, 2, 3, 4, 5, 9, 9])


# -- fuzz ------------------------------------------------------------------------------------------------------------

numbers = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats())
metric_values = st.one_of(numbers, st.lists(st.integers(-9, 9), max_size=3), st.lists(st.floats(), max_size=3))
lists = st.one_of(st.lists(st.text(max_size=3), max_size=3), st.lists(st.booleans(), max_size=3))
nasty = st.sampled_from(['[["a",[3]]]', "[" * 100_000, "{}", "null", "x" * 501, '{"rounds": 1e999}', "north", 10**6])
config_values = st.one_of(metric_values, st.booleans(), st.text(max_size=8), st.binary(max_size=8), lists, nasty)
HEADER_KEYS = [
    "site",
    "round",
    "base_fingerprint",
    "backbone_sha256",
    "backbone_config_sha256",
    "manifest_fingerprint",
    "rank",
    "ids",
    "recipe",
    "recipe_hash",
    "split",
    "layout",
    "final",
    "acceptance",
]
DEEP = "[" * 100_000


def npy(array: Any, **more: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **more)
    return file.getvalue()


def header(text: str, data: bytes = b"") -> bytes:
    body = text.encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body + data


def zipped() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3, np.float32))
    return file.getvalue()


def bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"0" * 100_000)
    return file.getvalue()


class Evil:
    """Would show that a pickle was loaded."""

    def __reduce__(self) -> Any:
        return (exec, ("import builtins; builtins.fedvfm_was_here = True",))


HOSTILE = [
    npy(np.zeros(3)),
    npy(np.zeros(3, np.float16)),
    npy(np.zeros(3, bool)),
    npy(np.zeros(3, np.int64)),
    npy(np.zeros(3, ">f4")),
    npy(np.zeros(3, np.complex64)),
    npy(np.asfortranarray(np.zeros((2, 3), np.float32))),
    npy(np.zeros(3, [("a", "<f4")])),
    npy(np.array([Evil()], dtype=object), allow_pickle=True),
    pickle.dumps(Evil()),
    zipped(),
    bomb(),
    b"",
    b"\x93NUMPY",
    b"\x93NUMPY\x01\x00",
    npy(np.zeros(3, np.float32))[:-1],
    npy(np.zeros(3, np.float32))[:20],
    npy(np.zeros(3, np.float32)) + b"1234",
    npy(np.zeros(3, np.float32)) + b"1",
    header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"),
    header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", b"12345678"),
    header("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 0), }"),
    header("{'descr': '<f4', 'fortran_order': False, 'shape': (True,), }", b"1234"),
    header("{'descr': '<f4', 'fortran_order': False, 'shape': 3, }"),
    header("{'descr': '<f4', 'fortran_order': 0, 'shape': (1,), }", b"1234"),
    header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps(Evil())),
    header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", b"1234"),
    header("{'descr': 'nonsense', 'fortran_order': False, 'shape': (1,), }", b"1234"),
    header("{'descr': ('<f4',), 'fortran_order': False, 'shape': (1,), }", b"1234"),
    header("{'descr': '<f4'}"),
    header("(" * 5000),
    header("-" * 20000 + "1"),
    header("{'''"),
    header("{1L: 2"),
    header("\x00"),
    header("__import__('os').system('true')"),
    b"\x93NUMPY\x02\x00" + b"\xff\xff\xff\xff",
]
array_bytes = st.one_of(
    st.sampled_from(HOSTILE), st.binary(max_size=200), st.binary(max_size=80).map(lambda b: header("", b))
)
arrays = st.builds(
    lambda data, stype, dtype, shape: Array(dtype=dtype, shape=shape, stype=stype, data=data),
    array_bytes,
    st.sampled_from(["numpy.ndarray", "numpy.ndarray", "numpy.ndarray", "torch", ""]),
    st.sampled_from(["float32", "object"]),
    st.sampled_from([(3,), (), (10**9,)]),
)


@st.composite
def records(draw: Any) -> RecordDict:
    """Anything a peer could send under our record names: some of it right, most of it wrong."""
    head = draw(st.dictionaries(st.sampled_from(HEADER_KEYS), config_values))
    if draw(st.booleans()):
        good = {
            "site": "north",
            "round": 1,
            "base_fingerprint": "x",
            "backbone_sha256": "",
            "backbone_config_sha256": "",
            "manifest_fingerprint": "",
            "rank": 1,
            "ids": ["a"],
            "acceptance": "",
            "layout": '[["a",[3]]]',
        }
        head = {**good, **draw(st.fixed_dictionaries({}, optional=dict.fromkeys(good, config_values)))}
    head |= draw(
        st.sampled_from([{"protocol": 1}, {"protocol": 1}, {"protocol": 1}, {"protocol": 2}, {}, {"protocol": "1"}])
    )
    metrics = draw(st.dictionaries(st.sampled_from(["num_examples", "loss", "dice"]), metric_values))
    content: dict[str, Any] = {
        "fedvfm": ConfigRecord(head),
        "metrics": MetricRecord(metrics),
        "samples": MetricRecord(draw(st.dictionaries(st.sampled_from(["dice", "hd95"]), metric_values))),
        "adapter": ArrayRecord(draw(st.dictionaries(st.sampled_from(["adapter", "b"]), arrays))),
    }
    for name in draw(st.sets(st.sampled_from(sorted(content)), max_size=1)):
        content[name] = draw(st.sampled_from([ConfigRecord({"protocol": 1}), MetricRecord({}), ArrayRecord({}), None]))
    return RecordDict({name: record for name, record in content.items() if record is not None})


DECODERS = [protocol.decode_task, protocol.decode_hello, protocol.decode_update, protocol.decode_evaluation]


@settings(fuzz, max_examples=120)
@given(content=records())
def test_whatever_comes_ends_in_a_value_or_an_error_of_ours(content: RecordDict) -> None:
    for decode in DECODERS:
        found: Any
        try:
            found = decode(content)
        except errors.FedvfmError as error:
            found = error
        known = protocol.Task | protocol.Hello | state.SiteUpdate | protocol.Evaluation | errors.FedvfmError
        assert isinstance(found, known)
        assert not isinstance(found, Exception) or len(str(found)) < 2000


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_every_hostile_array_is_refused(data: bytes) -> None:
    import builtins

    update = state.SiteUpdate("north", state.AdapterState({"a": np.zeros(3, np.float32)}), 1, 0, "x")
    content = protocol.encode_update(update)
    protocol.decode_update(content)
    content["adapter"] = ArrayRecord({"adapter": Array(dtype="float32", shape=(3,), stype="numpy.ndarray", data=data)})
    with pytest.raises(errors.ProtocolError):
        protocol.decode_update(content)
    assert not hasattr(builtins, "fedvfm_was_here")


@pytest.mark.parametrize(
    "layout",
    [
        DEEP,
        "",
        "null",
        "[1]",
        '[["a"]]',
        '[["a",[3],1]]',
        "[[1,[3]]]",
        '[["a",[4]]]',
        '[["a",[-3]]]',
        '[["a",[3.0]]]',
        '[["a",[true,3]]]',
        '[["a",[1]],["a",[2]]]',
        '[["a",[99999999999999999999]]]',
        '[["a",3]]',
        " " * 2_000_000 + '[["a",[3]]]',
        b"x",
        7,
    ],
    ids=lambda layout: repr(layout)[:20],
)
def test_a_layout_that_does_not_fit_its_numbers_is_refused(layout: Any) -> None:
    update = state.SiteUpdate("north", state.AdapterState({"a": np.zeros(3, np.float32)}), 1, 0, "x")
    content = protocol.encode_update(update)
    content["fedvfm"] = ConfigRecord({**content.config_records["fedvfm"], "layout": layout})
    with pytest.raises(errors.ProtocolError):
        protocol.decode_update(content)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_the_journal_cannot_hold_do_not_come_in(value: float) -> None:
    """JSON has no NaN: one site's NaN loss must not end the run of all."""
    update = state.SiteUpdate("north", state.AdapterState({}), 1, 0, "x", metrics={"loss": value})
    with pytest.raises(errors.ProtocolError):
        protocol.decode_update(protocol.encode_update(update))
    for answer in (
        protocol.Evaluation("north", 1, 1, {"dice": value}),
        protocol.Evaluation("north", 1, 1, {}, {"dice": [value]}, ("a",)),
    ):
        with pytest.raises(errors.ProtocolError):
            protocol.decode_evaluation(protocol.encode_evaluation(answer))


@pytest.mark.parametrize("rank", [0, -1, 10**9])
def test_a_rank_that_no_adapter_has(rank: int) -> None:
    with pytest.raises(errors.ProtocolError):
        protocol.decode_hello(protocol.encode_hello(protocol.Hello("north", "", "", rank, {})))


@pytest.mark.parametrize(
    "change",
    [
        {"round": float("inf")},
        {"round": "x"},
        {"recipe": "[" * 100_000},
        {"recipe": "[1]"},
        {"recipe": 7},
        {"recipe": b"\xff"},
        {"final": 1},
        {"final": "yes"},
        {"final": True},
    ],
)
def test_a_task_of_no_known_form(sites: Any, change: dict[str, Any]) -> None:
    content = protocol.encode_task(protocol.Task(sites.make_recipe()))
    content["fedvfm"] = ConfigRecord({**content.config_records["fedvfm"], **change})
    with pytest.raises(errors.ProtocolError, match="not of the known form"):
        protocol.decode_task(content)


@pytest.mark.parametrize("word", ["Accepted", "Jane Doe", "a" * 10_000, True, 1, ["accepted"], b"accepted"])
def test_acceptance_is_one_of_three_words(word: Any) -> None:
    content = protocol.encode_evaluation(protocol.Evaluation("north", 1, 1, {"dice": 0.5}))
    content["fedvfm"] = ConfigRecord({**content.config_records["fedvfm"], "acceptance": word})
    with pytest.raises(errors.ProtocolError, match="not of the known form"):
        protocol.decode_evaluation(content)


def test_another_version_says_what_to_do(sites: Any) -> None:
    content = protocol.encode_task(protocol.Task(sites.make_recipe()))
    content.config_records["fedvfm"]["protocol"] = 2
    with pytest.raises(
        errors.ProtocolError, match=r"version 2; this is version 1\. Install the same fedvfm at both ends"
    ):
        protocol.decode_task(content)


def test_an_edited_recipe_is_not_the_one_its_hash_names(sites: Any) -> None:
    content = protocol.encode_task(protocol.Task(sites.make_recipe()))
    header = content.config_records["fedvfm"]
    header["recipe"] = str(header["recipe"]).replace('"rounds":3', '"rounds":4')
    with pytest.raises(errors.ProtocolError, match="not the one its hash names"):
        protocol.decode_task(content)


# -- refusals --------------------------------------------------------------------------------------------------------

SECRET = "/data/patients/Jane Doe 1970-01-01.dcm"


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (errors.DataError(SECRET), "data"),
        (errors.PartitionError(SECRET), "data"),
        (errors.WeightsError(SECRET), "weights"),
        (errors.TrainingError(SECRET), "training"),
        (errors.ProtocolError(SECRET), "refused"),
        (errors.Refused(SECRET, SECRET), "refused"),
        (errors.ConfigError(SECRET, [SECRET]), "config"),
        (errors.CheckpointError(SECRET), "adapter"),
        (errors.StorageError(SECRET), "storage"),
        (errors.AuditError(SECRET), "error"),
        (ValueError(SECRET), "error"),
        (KeyError(SECRET), "error"),
    ],
)
def test_a_refusal_never_carries_text_of_the_exception(error: Exception, word: str) -> None:
    asked = Message(RecordDict(), 7, "train")
    internals.set_message_id(asked, "m1")
    data = internals.serialise(Message(protocol.refusal(error), reply_to=asked))
    assert b"Jane" not in data
    assert b"patients" not in data
    reply = internals.parse(data)
    assert reply.has_error()
    assert protocol.error_word(reply) == word


def test_a_foreign_error_is_unknown() -> None:
    from flwr.app import Error

    asked = Message(RecordDict(), 7, "train")
    internals.set_message_id(asked, "m1")
    assert protocol.error_word(Message(Error(code=3, reason=SECRET), reply_to=asked)) == "unknown"
