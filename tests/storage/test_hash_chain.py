"""The append-only file: what was written is read, what was edited is found, what was cut off is mended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvfm import errors
from fedvfm.storage import hash_chain, storage

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
entries = st.dictionaries(
    st.text(min_size=1, max_size=6).filter(lambda key: key not in ("prev", "hash")), values, max_size=3
)


def write(path: Path, rows: list[dict[str, Any]]) -> hash_chain.Chain:
    made = hash_chain.Chain(path)
    for row in rows:
        made.append(row)
    return made


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("prev", "hash")} for row in rows]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    path = tmp_path / "journal.jsonl"
    write(path, [{"round": number, "name": "Zürich"} for number in (1, 2, 3)])
    return path


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(entries, max_size=4))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("chain") / "file.jsonl"
    made = write(path, rows)
    assert plain(hash_chain.read(path)) == rows
    again = hash_chain.Chain(path)
    assert again.head == made.head
    assert again.entries == made.entries


def test_nothing_is_there_yet(tmp_path: Path) -> None:
    made = hash_chain.Chain(tmp_path / "none.jsonl")
    assert made.entries == []
    assert made.head == hash_chain.ZERO
    assert not (tmp_path / "none.jsonl").exists()


def test_every_line_names_the_one_before(three: Path) -> None:
    rows = [json.loads(line) for line in three.read_text().splitlines()]
    assert [row["prev"] for row in rows] == [hash_chain.ZERO, rows[0]["hash"], rows[1]["hash"]]


def test_every_cut_inside_the_last_line_is_mended(three: Path) -> None:
    data = three.read_bytes()
    last = data[:-1].rfind(b"\n") + 1
    for stop in range(last, len(data)):
        three.write_bytes(data[:stop])
        assert [row["round"] for row in hash_chain.recover(three)] == [1, 2]
        assert three.read_bytes() == data[:last]


def test_after_a_mended_cut_the_chain_goes_on(three: Path) -> None:
    data = three.read_bytes()
    three.write_bytes(data[:-5])
    hash_chain.Chain(three).append({"round": 3, "name": "Zürich"})
    assert three.read_bytes() == data


@settings(max_examples=60, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found_or_cuts_the_last_line(
    tmp_path_factory: pytest.TempPathFactory, where: float, bit: int
) -> None:
    path = tmp_path_factory.mktemp("chain") / "file.jsonl"
    whole = plain(write(path, [{"round": number, "name": "Zürich"} for number in (1, 2, 3)]).entries)
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(bytes(data))
    try:
        found = plain(hash_chain.recover(path))
    except errors.CheckpointError:
        return
    assert found in (whole, whole[:2])


def line(path: Path, number: int) -> bytes:
    return path.read_bytes().splitlines(keepends=True)[number]


EDITS: dict[str, Any] = {
    "a value": lambda p: p.read_bytes().replace(b'"round":2', b'"round":7'),
    "a key added": lambda p: p.read_bytes().replace(b'"round":2', b'"round":2,"x":1'),
    "a line taken out": lambda p: line(p, 0) + line(p, 2),
    "the first line taken out": lambda p: line(p, 1) + line(p, 2),
    "two lines swapped": lambda p: line(p, 0) + line(p, 2) + line(p, 1),
    "a line twice": lambda p: line(p, 0) + line(p, 1) + line(p, 1) + line(p, 2),
    "an empty line": lambda p: line(p, 0) + b"\n" + line(p, 1),
    "no JSON": lambda p: line(p, 0) + b"nonsense\n" + line(p, 1),
    "a list": lambda p: b"[]\n",
    "NaN": lambda p: p.read_bytes().replace(b'"round":2', b'"round":NaN'),
    "half a character": lambda p: p.read_bytes().replace("Zürich".encode(), b"\\ud800", 1),
    "no text": lambda p: p.read_bytes().replace(b'"round":2', b"\xff\xfe"),
    "deep": lambda p: b"[" * 100_000 + b"\n" + p.read_bytes(),
    "no hash": lambda p: b'{"round":1}\n',
    "windows line ends": lambda p: (
        p.read_bytes().replace(b'"round":2', b'"round": \r2', 1).replace(b'"prev"', b'"prew"', 1)
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_inner_edits_are_found(three: Path, edit: str) -> None:
    three.write_bytes(EDITS[edit](three))
    for look in (hash_chain.read, hash_chain.recover, hash_chain.Chain):
        with pytest.raises(errors.CheckpointError, match=r"line \d+ does not continue the chain"):
            look(three)


def test_what_json_cannot_say_is_not_written(tmp_path: Path) -> None:
    made = hash_chain.Chain(tmp_path / "file.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        made.append({"loss": float("nan")})
    assert made.entries == []
    assert not made.path.exists()


def test_a_refused_write_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(errors.StorageError, match="cannot write"):
        storage.append_line(tmp_path / "folder.jsonl", "x")


def test_canonical_json_is_one_text_for_one_value() -> None:
    assert hash_chain.canonical({"b": [1, 2.5, None], "a": "ü"}) == '{"a":"ü","b":[1,2.5,null]}'
    assert hash_chain.canonical({"a": 1, "b": 2}) == hash_chain.canonical({"b": 2, "a": 1})
