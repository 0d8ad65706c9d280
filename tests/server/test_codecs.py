"""Codecs: what a coded difference loses, what hostile bytes come to, and federations that send differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.protocol import codecs, protocol
from fedvfm.simulation.engines import in_process
from fedvfm.state import checkpoint, state
from fedvfm.storage import hash_chain
from tests.server import numpy_sites as sites

LOSSY = ("fp16", "int8", "int4")
HALF_STEP = {"fp16": 2.0**-12, "int8": 0.5 / 127, "int4": 0.5 / 7}
"""The most that a number is off by, as a share of the largest size in its row."""
TINY = float(np.finfo(np.float32).smallest_subnormal)

shapes = arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)
numbers = (
    st.floats(-(2.0**127), 2.0**127, width=32)
    | st.floats(-1, 1, width=32)
    | st.floats(-(2.0**-130), 2.0**-130, width=32)
)


def row_sizes(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The largest size in the row of every number. Shapes: as ``values``."""
    rows, columns, turned = codecs.table_of(values.shape)
    table = np.abs(values.reshape(columns, rows).T if turned else values.reshape(rows, columns))
    wide = np.repeat(table.max(axis=1, initial=0.0)[:, None], columns, axis=1)
    return np.asarray((wide.T if turned else wide).reshape(values.shape))


@pytest.mark.parametrize("name", LOSSY)
@given(values=arrays_of.arrays(np.float32, shapes, elements=numbers))
@settings(max_examples=150, deadline=None)
def test_a_number_is_off_by_half_a_step_of_its_row(name: str, values: Any) -> None:
    codec: codecs.Codec = codecs.TABLE.get(name)()
    wide = values.astype(np.float64)
    data = codec.encode(wide)
    assert len(data) == codec.size(values.shape)
    back = codec.decode(data, values.shape)
    assert back.shape == values.shape
    assert back.dtype == np.float32
    # Half a step, and what float32 itself cannot hold: a scale is rounded, the smallest ones to whole denormals.
    bound = row_sizes(wide) * HALF_STEP[name] * (1 + 1e-4) + row_sizes(wide) * 2.0**-22 + 130 * TINY
    assert (np.abs(back - wide) <= bound).all()


@given(values=arrays_of.arrays(np.float32, shapes, elements=numbers))
@settings(max_examples=30, deadline=None)
def test_float32_is_exact(values: Any) -> None:
    back = codecs.Float32().decode(codecs.Float32().encode(values.astype(np.float64)), values.shape)
    assert back.tobytes() == values.tobytes()


@pytest.mark.parametrize("name", LOSSY)
def test_a_constant_row_and_a_row_of_zeros_are_exact(name: str) -> None:
    values = np.array([[2.0] * 7, [0.0] * 7, [-0.5] * 7])
    codec: codecs.Codec = codecs.TABLE.get(name)()
    np.testing.assert_allclose(codec.decode(codec.encode(values), values.shape), values, rtol=1e-6)


def test_rows_run_along_the_longer_side() -> None:
    assert codecs.table_of((8, 384)) == (8, 384, False)
    assert codecs.table_of((384, 8)) == (8, 384, True)
    assert codecs.table_of((24, 3, 3, 3)) == (24, 27, False)
    assert codecs.table_of((5,)) == (1, 5, False)
    assert codecs.table_of(()) == (1, 1, False)
    assert codecs.int8().size((384, 8)) == 3072 + 8 * 4
    assert codecs.int4().size((384, 8)) == 1536 + 8 * 4
    assert codecs.int4().size((3,)) == 2 + 4


def adapter(seed: int, scale: float = 1.0) -> state.AdapterState:
    return sites.draw(sites.manifest(), seed, scale)


@pytest.mark.parametrize("name", [codecs.PLAIN, *LOSSY])
def test_what_a_difference_loses_comes_with_the_next(name: str) -> None:
    """The sum of all that arrived is the sum of all that was sent, but for the last residual."""
    base, residual, wanted = adapter(0), {}, {key: value.astype(np.float64) for key, value in adapter(0).items()}
    for number in range(1, 30):
        move = adapter(number, 0.01)
        coded = codecs.encode(name, base + move, base, residual)
        after = codecs.decode(coded.difference, base)
        assert after == coded.after, "both ends come to the same bits"
        wanted = {key: value + ((base + move)[key].astype(np.float64) - base[key]) for key, value in wanted.items()}
        base, residual = after, coded.residual
        for key in base:
            np.testing.assert_allclose(base[key] + residual[key].astype(np.float64), wanted[key], atol=2e-5)
    assert state.AdapterState(residual).norm() < 0.02, "residuals do not grow"


@pytest.mark.parametrize("name", LOSSY)
def test_arrays_that_do_not_travel_keep_their_residual(name: str) -> None:
    base, moved = adapter(0), adapter(1)
    first = codecs.encode(name, moved.select(["head.bias"]), base, {"head.weight": base["head.weight"]})
    assert set(first.after) == {"head.bias"}
    assert (first.residual["head.weight"] == base["head.weight"]).all()


@pytest.mark.parametrize("shape", [(1, 4), (5, 4)], ids=["fits every shape", "fits none"])
def test_a_residual_of_another_shape_counts_as_none(shape: tuple[int, int]) -> None:
    """A site that changed its rank between two rounds."""
    base = state.AdapterState({"x.A": np.zeros((3, 4), np.float32)})
    target = {"x.A": np.ones((3, 4), np.float32)}
    found = codecs.encode("int8", target, base, {"x.A": np.ones(shape, np.float32)})
    assert found.difference == codecs.encode("int8", target, base, {}).difference
    assert found.residual["x.A"].shape == (3, 4)


def test_what_is_not_finite_is_not_coded() -> None:
    broken = state.AdapterState({**adapter(0), "head.bias": np.float32([np.nan, 1.0])})
    with pytest.raises(ValueError, match=r"head\.bias"):
        codecs.encode("int8", broken, adapter(0), {})


@pytest.mark.parametrize("name", LOSSY)
@given(data=st.binary(max_size=80))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_numbers_of_that_shape_or_refused(name: str, data: bytes) -> None:
    base = state.AdapterState({"x": np.zeros((4, 7), np.float32)})
    size = codecs.TABLE.get(name)().size((4, 7))
    for given_bytes in (data, (data * size)[:size]):
        difference = codecs.Difference(name, base.fingerprint, "", {"x": (4, 7)}, given_bytes)
        try:
            found = codecs.decode(difference, base)
        except ValueError:
            continue
        assert found["x"].shape == (4, 7)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("int8", np.float32([-1.0]).tobytes() + b"\1\1\1"),
        ("int8", np.float32([np.nan]).tobytes() + b"\1\1\1"),
        ("int8", np.float32([1.0]).tobytes() + b"\1\1\x80"),
        ("int4", np.float32([1.0]).tobytes() + b"\x18\1"),
        ("int4", np.float32([1.0]).tobytes() + b"\x11\x11"),
        ("fp16", np.float32([1.0]).tobytes() + np.float16([1.0, 1.0, 1.5]).tobytes()),
        ("fp16", np.float32([1.0]).tobytes() + np.float16([1.0, 1.0, np.nan]).tobytes()),
    ],
    ids=["negative scale", "no scale", "step -128", "step -8", "full last half", "share over 1", "share nan"],
)
def test_bytes_that_no_encoder_writes(name: str, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"scale|step|half|share"):
        codecs.TABLE.get(name)().decode(data, (3,))


def test_a_size_that_is_only_claimed_takes_no_memory() -> None:
    base = state.AdapterState({"x": np.zeros(3, np.float32)})
    for shape in ((1 << 40,), (3, 1 << 50), (1 << 30, 1 << 30)):
        with pytest.raises(ValueError, match="not the bytes"):
            codecs.decode(codecs.Difference("int4", base.fingerprint, "", {"x": shape}, b"123"), base)


# -- on the wire -------------------------------------------------------------------------------------------------------


def an_update(codec: str = "int8") -> tuple[Any, state.AdapterState]:
    base = adapter(0)
    coded = codecs.encode(codec, adapter(1), base, {})
    update = state.SiteUpdate("north", coded.after, 9, 0, base.fingerprint, metrics={"loss": 0.5})
    return protocol.encode_update(update, coded.difference), base


def test_an_update_travels_as_a_difference_to_its_base() -> None:
    content, base = an_update()
    found = protocol.decode_update(content, base)
    assert found.state == codecs.encode("int8", adapter(1), base, {}).after
    assert protocol.base_of(content) == base.fingerprint
    free = protocol.with_metrics(content, state.SiteUpdate("north", base, 7, 0, ""))
    assert protocol.decode_update(free, base).state == found.state
    assert (protocol.decode_update(free, base).num_examples, protocol.decode_update(free, base).metrics) == (7, {})
    for wrong in (None, adapter(5)):
        with pytest.raises(errors.ProtocolError):
            protocol.decode_update(content, wrong)
    assert protocol.base_of(protocol.encode_update(found)) == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("codec", "pickle"),
        ("codec", 3),
        ("layout", "[]"),
        ("layout", '[["head.bias",[99999999999]]]'),
        ("layout", '[["../x",[2]]]'),
        ("base_fingerprint", "0" * 64),
    ],
)
def test_a_hostile_update_is_refused(key: str, value: Any) -> None:
    content, base = an_update()
    content["fedvfm"] = ConfigRecord({**content["fedvfm"], key: value})
    with pytest.raises(errors.ProtocolError):
        protocol.decode_update(content, base)


def test_an_update_of_a_codec_that_nobody_agreed_to_is_refused(tmp_path: Path) -> None:
    """Neither whole where differences were agreed to, nor coarser ones."""

    def other(codec: str) -> Any:
        def change(kind: str, number: int, reply: Any) -> Any:
            if kind != "train":
                return reply
            base = state.AdapterState({name: array * 0 for name, array in reply.state.items()})
            update = protocol.encode_update(reply)
            if codec != codecs.PLAIN:
                update = protocol.encode_update(reply, codecs.encode(codec, reply.state, base, {}).difference)
            return update

        return change

    members = [sites.NumpySite(name, change=other(name)) for name in (codecs.PLAIN, "int4")]
    members += [sites.NumpySite("north")]
    found = run(tmp_path / "run", members, stop=1, server=schema.ServerConfig(quorum=1))
    (line,) = journal(found)
    assert list(line["weights"]) == ["north"]
    assert {name: why["reason"] for name, why in line["refused"].items()} == {"fp32": "protocol", "int4": "protocol"}


def test_an_update_of_other_bytes_is_refused() -> None:
    content, base = an_update()
    array = content["adapter"]["adapter"]
    for data in (array.data[:-1], array.data + b"\0", b"", b"\xff" * len(array.data)):
        content["adapter"] = ArrayRecord({"adapter": Array("uint8", (len(data),), array.stype, data)})
        with pytest.raises(errors.ProtocolError):
            protocol.decode_update(content, base)


def test_a_task_travels_as_a_difference_to_what_the_site_holds() -> None:
    recipe = sites.make_recipe(codec="int8")
    base = adapter(0)
    coded = codecs.encode("int8", adapter(1).select(["head.bias"]), base, {})
    target = state.AdapterState({**base, **coded.after})
    difference = codecs.Difference("int8", base.fingerprint, target.fingerprint, coded.difference.shapes,
                                   coded.difference.data)  # fmt: skip
    content = protocol.encode_task(protocol.Task(recipe, 2, target), difference)
    assert protocol.decode_task(content, {base.fingerprint: base}.get).state == target
    same = codecs.Difference("int8", base.fingerprint, base.fingerprint, {}, b"")
    content_same = protocol.encode_task(protocol.Task(recipe, 2, base), same)
    assert protocol.decode_task(content_same, {base.fingerprint: base}.get).state == base
    with pytest.raises(errors.AdapterMissing):
        protocol.decode_task(content)
    lying = codecs.Difference("int8", base.fingerprint, "0" * 64, coded.difference.shapes, coded.difference.data)
    with pytest.raises(errors.AdapterMissing, match="does not lead"):
        protocol.decode_task(protocol.encode_task(protocol.Task(recipe, 2, target), lying), lambda _: base)
    plain = sites.make_recipe()
    with pytest.raises(errors.ProtocolError):
        protocol.decode_task(protocol.encode_task(protocol.Task(plain, 2, target), difference), lambda _: base)
    assert protocol.refusal(errors.AdapterMissing("x")).reason == protocol.MISSING


def test_the_default_codec_leaves_hashes_and_messages_as_they_were() -> None:
    assert sites.make_recipe().hash == sites.make_recipe(codec="fp32").hash != sites.make_recipe(codec="int8").hash
    hello = protocol.Hello("north", "", "", 3, {})
    assert "codec" not in protocol.encode_hello(hello)["fedvfm"]
    assert "codec" not in protocol.encode_task(protocol.Task(sites.make_recipe(), 1, adapter(0)))["fedvfm"]


# -- federations -------------------------------------------------------------------------------------------------------


def journal(folder: Path) -> list[dict[str, Any]]:
    return hash_chain.read(folder / "journal.jsonl")


def fingerprints(folder: Path) -> list[str]:
    return [line["fingerprint"] for line in journal(folder)] + [
        json.loads((folder / "evaluation.json").read_text())["fingerprint"]
    ]


def three(**more: Any) -> list[Any]:
    return [sites.NumpySite(name, examples=n, **more) for name, n in (("east", 10), ("north", 20), ("west", 70))]


def run(folder: Path, members: list[Any] | None = None, stop: int = 0, **more: Any) -> Path:
    members = members or three()
    chosen = sites.make_recipe(**{"rounds": 4, "codec": "int8", **more.pop("recipe", {})})
    grid = in_process.InProcessGrid(sites.client_app(members), len(members))
    job = sites.make_job(folder, members, chosen, **more)
    return sites.run(job, members, stop=sites.after(stop), grid=grid)


RULES: dict[str, dict[str, Any]] = {
    "mean": {},
    "svd": {"aggregation": {"rule": "svd"}},
    "freeze-A": {"adapter": {"rank": 3, "alpha": 6.0, "factors": "freeze-A"}},
    "alternate": {"adapter": {"rank": 3, "alpha": 6.0, "factors": "alternate"}},
    "momentum": {"aggregation": {"server_momentum": 0.5, "server_learning_rate": 0.8}},
    "site-level": {
        "aggregation": {"weighting": "uniform"},
        "privacy": {"mechanism": "site-level", "clip": 1.0, "noise_multiplier": 0.1, "delta": 1e-5},
    },
}


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_federation_ends_with_the_same_bits(tmp_path: Path, codec: str, rule: str) -> None:
    more: dict[str, Any] = {"recipe": {"codec": codec, **RULES[rule]}, "simulated": True}
    whole = run(tmp_path / "whole", **more)
    members = three()
    for stop in (1, 3):
        run(tmp_path / "parts", members, stop, **more)
    assert fingerprints(run(tmp_path / "parts", members, **more)) == fingerprints(whole)
    final = checkpoint.read(whole / "adapter.safetensors")[0]
    plain = run(tmp_path / "plain", recipe={**more["recipe"], "codec": "fp32"}, simulated=True)
    exact = checkpoint.read(plain / "adapter.safetensors")[0]
    # Differences of random factors are as large as the factors; svd turns them, so products are not compared here.
    bound = {"fp16": 0.01, "int8": 0.05, "int4": 0.6}[codec]
    if rule != "svd":
        assert (final - exact).norm() < bound * exact.norm()
    assert (final - exact).norm() > 0


def test_sites_of_ranks_of_their_own_get_whole_adapters_and_send_differences(tmp_path: Path) -> None:
    def members() -> list[Any]:
        return [sites.NumpySite(name, rank=rank) for name, rank in (("east", 1), ("north", 2), ("west", 3))]

    more: dict[str, Any] = {"recipe": {"aggregation": {"rule": "svd"}}}
    whole = run(tmp_path / "whole", members(), **more)
    kept = members()
    run(tmp_path / "parts", kept, 2, **more)
    assert fingerprints(run(tmp_path / "parts", kept, **more)) == fingerprints(whole)
    assert all(line["refused"] == {} for line in journal(whole))


def test_a_site_that_lost_its_adapter_is_sent_the_whole_one(tmp_path: Path) -> None:
    reference = run(tmp_path / "reference")
    members = three()
    forgetful = members[1]

    class Lost:
        def find(self, fingerprint: str) -> None:
            return None

        def keep(self, recipe: str, adapter: state.AdapterState) -> None:
            pass

    forgetful.adapters = Lost()
    found = run(tmp_path / "lost", members)
    assert fingerprints(found) == fingerprints(reference)
    assert all(line["refused"] == {} and len(line["weights"]) == 3 for line in journal(found))
    assert sum(row["bytes"]["down"] for row in journal(found)) > sum(row["bytes"]["down"] for row in journal(reference))


def test_a_site_that_missed_rounds_comes_back(tmp_path: Path) -> None:
    def fail(kind: str, number: int, reply: Any) -> Any:
        if number == 2 and kind in ("train", "evaluate val"):
            raise errors.DataError("no")
        return reply

    members = [sites.NumpySite("east", change=fail), *three()[1:]]
    found = run(tmp_path / "run", members, server=schema.ServerConfig(quorum=2))
    assert [sorted(line["weights"]) for line in journal(found)] == [
        ["east", "north", "west"], ["north", "west"], ["east", "north", "west"], ["east", "north", "west"],
    ]  # fmt: skip
    assert all("protocol" not in str(line["refused"]) for line in journal(found))


@pytest.mark.parametrize(("codec", "most"), [("fp16", 0.51), ("int8", 0.27), ("int4", 0.14)])
def test_bytes_of_the_arrays(codec: str, most: float) -> None:
    """A real adapter's shapes: rank 8 at width 384, and a head."""
    coder: codecs.Codec = codecs.TABLE.get(codec)()
    rows = [(8, 384), (384, 8)] * 16 + [(24, 384, 3, 3), (24,), (2, 24, 1, 1), (2,)]
    assert sum(coder.size(one) for one in rows) < most * sum(codecs.Float32().size(one) for one in rows)


def test_a_site_of_another_codec_is_refused(tmp_path: Path) -> None:
    import dataclasses

    def other(kind: str, number: int, reply: Any) -> Any:
        return dataclasses.replace(reply, codec="fp32") if kind == "hello" else reply

    with pytest.raises(errors.HandshakeRefused, match="agrees to codec 'fp32', the recipe says 'int8'"):
        run(tmp_path / "run", three(change=other))


def test_what_the_servers_step_lost_is_in_the_checkpoint(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", three(), 2)
    _, kept, _ = checkpoint.read(folder / "checkpoints" / "round-00002.safetensors")
    lost = {name.removeprefix("codec."): array for name, array in kept.items() if name.startswith("codec.")}
    assert set(lost) == {spec.name for spec in sites.manifest()}
    assert all(np.abs(array).max() > 0 for array in lost.values())
