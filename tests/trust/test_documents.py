"""Strict parsing: arbitrary bytes give a document or one clear error, and no error quotes what stands in the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.server import state_folder
from fedvfm.trust import invites, keys, locked_recipe, requests, signed_documents

KINDS = {
    "invite": invites.Invite,
    "request": requests.Request,
    "receipt": audit.Receipt,
    "recipe": locked_recipe.LockedRecipe,
}

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def examples(server: state_folder.State) -> dict[str, dict[str, Any]]:
    invite = signed_documents.read(server.invite_path("north"), invites.Invite, "invite")
    made = {
        "invite": invite,
        "request": requests.make(invite, keys.make(), signed_documents.now()),
        "receipt": server.audit.receipt(keys.read_private(server.key)),
        "recipe": server.lock(),
    }
    return {kind: json.loads(signed_documents.to_text(one)) for kind, one in made.items()}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, make_server: Any) -> dict[str, dict[str, Any]]:
    return examples(make_server(tmp_path_factory.mktemp("good") / "server"))


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(good: Any, kind: str) -> None:
    found = signed_documents.parse(json.dumps(good[kind]).encode(), KINDS[kind], kind)
    assert json.loads(signed_documents.to_text(found)) == good[kind]


@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), data=st.binary(max_size=200) | values.map(lambda v: json.dumps(v).encode()))
def test_noise_is_one_clear_error(kind: str, data: bytes) -> None:
    with pytest.raises(errors.TrustError, match=r"^it: is "):
        signed_documents.parse(data, KINDS[kind], "it")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_changed_document_is_parsed_or_refused(good: Any, data: st.DataObject) -> None:
    """Any value at any place replaced: a document of the form, or a TrustError; never anything else."""
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    made = json.loads(json.dumps(good[kind]))
    place: Any = made
    while True:
        key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        place = inner
    if data.draw(st.booleans()) and isinstance(place, dict):
        del place[key]
    else:
        place[key] = data.draw(values)
    try:
        found = signed_documents.parse(json.dumps(made).encode(), KINDS[kind], "it")
    except errors.TrustError:
        return
    if isinstance(found, signed_documents.Document):
        assert found.signed_bytes()
    if kind == "invite":
        with pytest.raises(errors.TrustError) if found.signed_bytes() != _signed(good) else _nothing():
            invites.check(found, _told(good), signed_documents.now())


def _signed(good: Any) -> bytes:
    return signed_documents.parse(json.dumps(good["invite"]).encode(), invites.Invite, "it").signed_bytes()


def _told(good: Any) -> str:
    from fedvfm.trust import certificates

    return certificates.fingerprint(certificates.read_pem(good["invite"]["authority"], "authority"))


def _nothing() -> Any:
    import contextlib

    return contextlib.suppress(errors.TrustError)  # the signature's own bytes may have been changed


def test_a_token_is_never_in_an_error(good: Any) -> None:
    token = good["invite"]["token"]
    for change in (
        {"token": token + "x"},
        {"token": [token]},
        {"extra": token},
        {token[:40]: 1},
        {"site": "../" + token},
    ):
        with pytest.raises(errors.TrustError) as caught:
            signed_documents.parse(json.dumps({**good["invite"], **change}).encode(), invites.Invite, "invite")
        if token[:40] not in change:
            assert token[:20] not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b"[" * 100_000, b'{"a":1,"a":2}', b'{"format":NaN}', b"\xff\xfe", b'{"a":"\\ud800"}',
     b'{"a":1e999}', b'{"a":' + b"9" * 5000 + b"}", b'{"a":Infinity}'],
    ids=["empty", "null", "list", "deep", "twins", "nan", "not utf-8", "half a character", "overflow", "huge", "inf"],
)  # fmt: skip
def test_json_that_is_not_strict(data: bytes) -> None:
    with pytest.raises(errors.TrustError, match=r"it: is no (strict JSON|JSON object)"):
        signed_documents.parse(data, invites.Invite, "it")


def test_too_large_is_not_parsed(tmp_path: Path) -> None:
    with pytest.raises(errors.TrustError, match=r"it: 2,000,001 bytes; at most 2,000,000 are read"):
        signed_documents.parse(b" " * 2_000_001, invites.Invite, "it")
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(errors.TrustError, match="1,000,000,000,000 bytes"):
        signed_documents.read(path, invites.Invite, "invite")


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, said in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "is no file"),
        (tmp_path / "pipe", "is no file"),
        (Path("/dev/zero"), "is no file"),
        (Path("a\0b"), "not a file name"),
    ):
        with pytest.raises(errors.TrustError, match=said):
            signed_documents.read(path, invites.Invite, "invite")


def test_foreign_text_cannot_move_the_cursor() -> None:
    assert signed_documents.shown("a\x1b[2Jb\r\nc\u202ed\x9be") == r"a\x1b[2Jb\r\nc\u202ed\x9be"
    assert signed_documents.shown("Zürich 3") == "Zürich 3"


def test_no_signature_is_good_for_another_kind_of_document(good: Any) -> None:
    made = {
        kind: signed_documents.parse(json.dumps(good[kind]).encode(), KINDS[kind], kind)
        for kind in ("request", "receipt")
    }
    starts = {one.signed_bytes().split(b"\n")[0] for one in made.values() if isinstance(one, signed_documents.Document)}
    assert starts == {b"fedvfm request", b"fedvfm receipt"}


def test_times() -> None:
    now = signed_documents.now()
    assert signed_documents.moment(signed_documents.stamp(now)) == now
    with pytest.raises(errors.TrustError, match="does not exist"):
        signed_documents.moment("2026-02-31T00:00:00Z")
