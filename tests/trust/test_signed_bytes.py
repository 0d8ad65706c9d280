"""What is signed, hashed or kept at both ends is the same bytes as when the golden file was written.

A site that joined keeps these files for years, and its signatures and approvals are of these bytes: if a case differs,
the code is wrong, not the golden file.
"""

from __future__ import annotations

import datetime
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
from pydantic_core import to_jsonable_python

from fedvfm.config import schema
from fedvfm.simulation import experiment
from fedvfm.trust import approvals, invites, locked_recipe, requests, roster, signed_documents

GOLDEN = Path(__file__).parent / "golden_signed_bytes.json"
LEFT_OUT = Path(__file__).parent / "golden_left_out.json"
"""Key of a recipe that is written only where it has another value -> what it means where it is not written."""
NOW = datetime.datetime(2026, 11, 3, 12, tzinfo=datetime.UTC)
KEY = "ecdsa-sha2-nistp384 " + "A" * 160
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "start": {"start": "cd" * 32},
    "codec": {"codec": "int8"},
    "channels": {"data": {"class_names": ["rest", "cell"], "channels": ["T1w", "T2w", "FLAIR"]}},
    "factors": {"adapter": {"factors": "freeze-A", "rank": 4}},
    "privacy": {"privacy": {"mechanism": "record-level", "noise_multiplier": 1.0, "clip": 0.5, "delta": 1e-5}},
    "options": {"backbone": {"name": "some/backbone", "sha256": "ab" * 32, "options": {"b": [1, 2.5, "x"], "a": True}}},
}


def written(make_lock: Any, folder: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    """Every text by its name."""
    patch.setattr(signed_documents, "now", lambda: NOW)
    texts: dict[str, str] = {}
    for name in experiment.bundled():
        values = schema.read_toml(experiment.bundled()[name])
        texts[f"hash of {name}"] = schema.parse(schema.Recipe, values["recipe"], name).hash
    for name, values in VARIANTS.items():
        locked = make_lock(**values)
        initial = locked.adapter
        locked = locked.model_copy(update={"version": "0.1.0"})
        texts[f"lock {name}"] = signed_documents.to_text(locked)
        texts[f"manifest {name}"] = locked.manifest.fingerprint
        texts[f"initial {name}"] = initial.fingerprint
        invite = invites.Invite(
            federation="trial",
            address="server.example:8443",
            site="north",
            authority="a certificate",
            token="t" * 43,
            created=signed_documents.stamp(NOW),
            expires=signed_documents.stamp(NOW + datetime.timedelta(days=30)),
            lock=locked,
            signature="A" * 40,
        )
        texts[f"invite {name}"] = invite.signed_bytes().decode()
        request = requests.Request(
            federation="trial",
            site="north",
            public_key=KEY,
            recipe=locked.hash,
            version=locked.version,
            created=signed_documents.stamp(NOW),
            token_proof="A" * 40,
            signature="A" * 40,
        )
        texts[f"request {name}"] = request.signed_bytes().decode()
    patch.setattr(requests, "has_token", lambda *_: True)
    patch.setattr(requests, "signed_by_its_key", lambda *_: True)
    rows = roster.Roster(folder / "roster.jsonl", "trial")
    rows.invite("north", "ef" * 32, signed_documents.stamp(NOW + datetime.timedelta(days=30)), NOW)
    rows.approve(request, NOW)
    rows.drop("north", NOW)
    rows.readmit("north", NOW)
    texts["roster"] = rows.path.read_text()
    persons = approvals.Approvals(folder / "approvals.jsonl", "north")
    persons.approve(locked.hash, "doctor")
    persons.withdraw(locked.hash, "doctor")
    texts["approvals"] = (folder / "approvals.jsonl").read_text()
    return texts


def test_signed_bytes_and_hashes_are_as_ever(make_lock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden, now = json.loads(GOLDEN.read_text()), written(make_lock, tmp_path, monkeypatch)
    assert sorted(now) == sorted(golden)
    assert {name for name in golden if now[name] != golden[name]} == set()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_locked_recipe_written_before_opens_and_is_written_again_as_it_was(name: str, make_lock: Any) -> None:
    text = json.loads(GOLDEN.read_text())[f"lock {name}"]
    opened = signed_documents.parse(text.encode(), locked_recipe.LockedRecipe, "locked recipe")
    assert signed_documents.to_text(opened) == text
    assert opened == make_lock(**VARIANTS[name]).model_copy(update={"version": "0.1.0"})


def left_out(model: type[pydantic.BaseModel]) -> dict[str, Any]:
    """What is meant by each key that may be left out of a recipe's bytes, here and in all that is inside."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if field.exclude_if is not None:
            meant = field.get_default(call_default_factory=True)
            assert field.exclude_if(meant), f"{name}: its default is written, and something else is left out"
            found[f"{model.__name__}.{name}"] = to_jsonable_python(meant)
        for inner in models_in(field.annotation):
            found |= left_out(inner)
    return found


def models_in(hint: Any) -> Iterator[type[pydantic.BaseModel]]:
    if isinstance(hint, type) and issubclass(hint, pydantic.BaseModel):
        yield hint
    for one in typing.get_args(hint):
        yield from models_in(one)


def test_a_key_that_is_left_out_means_what_it_ever_meant() -> None:
    """Another default would train otherwise what was approved under the same hash. A new key is added to the file."""
    assert left_out(schema.Recipe) == json.loads(LEFT_OUT.read_text())


def test_a_default_that_is_left_out_and_its_value_in_words_are_one_recipe() -> None:
    base = schema.read_toml(experiment.bundled()["nuclei"])["recipe"]

    def made(**personal: Any) -> schema.Recipe:
        return schema.parse(schema.Recipe, {**base, "personal": {"kind": "ditto", **personal}}, "recipe")

    assert made() == made(proximal=0.1)
    assert made().hash == made(proximal=0.1).hash
    assert len({made(proximal=value).hash for value in (0.0, 0.1, 0.1000001, 1.0)}) == 4
