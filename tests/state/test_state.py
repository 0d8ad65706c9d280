"""AdapterState and Manifest: immutable, ordered, named by their bytes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvfm import errors
from fedvfm.state import state

quick = settings(max_examples=60, deadline=None)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
layouts = st.dictionaries(
    st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=12), shapes, max_size=5
)


def make(layout: dict[str, tuple[int, ...]], seed: int) -> state.AdapterState:
    rng = np.random.default_rng(seed)
    return state.AdapterState(
        {name: np.asarray(rng.standard_normal(shape), dtype=np.float32) for name, shape in layout.items()}
    )


@quick
@given(layout=layouts, seed=st.integers(0, 9), factor=st.floats(-4, 4, width=32))
def test_vector_arithmetic(layout: dict[str, tuple[int, ...]], seed: int, factor: float) -> None:
    one, other = make(layout, seed), make(layout, seed + 1)
    for name in layout:
        np.testing.assert_array_equal((one + other)[name], one[name] + other[name])
        np.testing.assert_array_equal((one - other)[name], one[name] - other[name])
        np.testing.assert_array_equal((factor * one)[name], np.float32(factor) * one[name])
    assert one + other == other + one
    assert factor * one == one * factor
    flat = np.concatenate([np.ravel(value) for value in one.values()] or [np.zeros(0, np.float32)]).astype(np.float64)
    assert one.norm() == pytest.approx(np.linalg.norm(flat), rel=1e-12)
    assert one.parameters == flat.size
    assert {value.dtype for value in (one - other).values()} <= {np.dtype(np.float32)}


@quick
@given(layout=layouts, seed=st.integers(0, 9))
def test_the_fingerprint_knows_names_shapes_and_bytes_but_not_order(
    layout: dict[str, tuple[int, ...]], seed: int
) -> None:
    one = make(layout, seed)
    backwards = state.AdapterState(dict(reversed(list(one.items()))))
    assert list(backwards) == sorted(layout)
    assert backwards == one
    assert hash(backwards) == hash(one)
    fortran = state.AdapterState({name: np.asarray(value, order="F") for name, value in one.items()})
    assert fortran.fingerprint == one.fingerprint
    for name, value in one.items():
        assert state.AdapterState({**one, name: value[..., None]}) != one
        renamed = {key: array for key, array in one.items() if key != name} | {name + "'": value}
        if name + "'" not in one:
            assert state.AdapterState(renamed) != one
        if value.size:
            touched = value.copy()
            touched.flat[-1] = np.nextafter(touched.flat[-1], np.float32(9))
            assert state.AdapterState({**one, name: touched}) != one


def test_the_fingerprint_is_a_promise() -> None:
    """Golden: journals and cards of earlier releases carry it."""
    values = state.AdapterState(
        {"block.00.q.A": np.arange(6, dtype=np.float32).reshape(2, 3), "head.bias": np.array([-1.5], np.float32)}
    )
    assert values.fingerprint == "1c20785cbfebecc9e90895b337b1c0c75f570df0ec5f8fcc508a6aa79c3c13d9"


def test_arrays_cannot_be_written_to() -> None:
    one = make({"a": (2, 2)}, 0)
    before = one.fingerprint
    with pytest.raises(ValueError, match="read-only"):
        one["a"][0, 0] = 1
    with pytest.raises(TypeError):
        one["a"] = np.zeros(1, np.float32)  # type: ignore[index]
    for made in (one + one, 2.0 * one, one.select(["a"])):
        assert not made["a"].flags.writeable
    assert one.fingerprint == before


def test_the_callers_array_stays_writable() -> None:
    array = np.zeros(3, np.float32)
    state.AdapterState({"a": array})
    array[0] = 1


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, bool, object])
def test_only_float32_travels(dtype: Any) -> None:
    with pytest.raises(errors.ProtocolError, match=r"array 'a' is .*only float32 travels"):
        state.AdapterState({"a": np.zeros(2, dtype)})


def test_states_of_other_names_do_not_add_up() -> None:
    with pytest.raises(errors.ProtocolError, match="do not hold the same arrays"):
        make({"a": (2,)}, 0) + make({"b": (2,)}, 0)


def test_finite() -> None:
    assert make({"a": (2,)}, 0).finite()
    assert state.AdapterState({}).finite()
    for value in (np.nan, np.inf, -np.inf):
        assert not state.AdapterState({"a": np.array([0, value], np.float32)}).finite()


# -- manifest --------------------------------------------------------------------------------------------------------


def rows(rank: int = 2) -> list[state.ArraySpec]:
    return [
        state.ArraySpec("head.bias", (3,), "head"),
        state.ArraySpec("block.00.q.B", (5, rank), "lora", "B", "block.00.q", 2.0),
        state.ArraySpec("block.00.q.A", (rank, 4), "lora", "A", "block.00.q", 2.0),
    ]


def test_a_manifest_is_sorted_and_counts() -> None:
    manifest = state.Manifest.of(rows())
    assert [spec.name for spec in manifest] == ["block.00.q.A", "block.00.q.B", "head.bias"]
    assert len(manifest) == 3
    assert manifest.parameters == 8 + 10 + 3
    assert manifest.nbytes == 4 * 21
    ((a, b),) = manifest.pairs().values()
    assert (a.role, b.role) == ("A", "B")
    assert state.Manifest.of(reversed(rows())) == manifest


@pytest.mark.parametrize(
    "change",
    [{"name": "x"}, {"shape": (4, 2)}, {"group": "x"}, {"role": "dense"}, {"pair": "block.00.k"}, {"scale": 1.0}],
    ids=lambda change: next(iter(change)),
)
def test_every_field_is_in_the_manifests_fingerprint(change: dict[str, Any]) -> None:
    manifest = state.Manifest.of(rows())
    first, *others = manifest
    assert state.Manifest((dataclasses.replace(first, **change), *others)).fingerprint != manifest.fingerprint


def test_the_manifests_fingerprint_is_a_promise() -> None:
    """Golden: the handshake compares it between machines and releases."""
    assert state.Manifest.of(rows()).fingerprint == "8992bb5c2295651fb46a33988d2f15975b64b4d8c62d4f73547bcf67f564bfb9"


@pytest.mark.parametrize("bad", [{}, {"name": "x", "role": "C"}, {"name": "x", "dtype": "float16"}])
def test_a_bad_manifest_is_a_protocol_error(bad: Any) -> None:
    first = rows()[0]
    with pytest.raises(errors.ProtocolError, match="manifest"):
        state.Manifest.of([first, dataclasses.replace(first, **bad)])


def test_state_needs_no_torch() -> None:
    script = "import sys; import fedvfm.state.state; print('torch' in sys.modules, 'flwr' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
