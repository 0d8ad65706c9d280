"""Orders of the coordinator in the state folder: what may be ordered, what outlasts, and what it leaves."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.client import recipe_review
from fedvfm.client import state_folder as joining
from fedvfm.client.gate import policy
from fedvfm.server import state_folder as enrolment
from fedvfm.server.coordinator import orders as steering
from fedvfm.state import checkpoint, state
from fedvfm.trust import invites, locked_recipe, signed_documents
from fedvfm.trust import roster as rosters


def finish_run(server: enrolment.State, value: float = 2.0) -> state.AdapterState:
    """As the round loop leaves it."""
    shapes = {row.name: row.shape for row in server.lock().manifest}
    last = state.AdapterState({name: np.full(shape, value, np.float32) for name, shape in shapes.items()})
    folder = server.run_path(server.about.recipe)
    checkpoint.write(folder / "adapter.safetensors", last, {"round": "3", "recipe": server.about.recipe})
    (folder / "evaluation.json").write_text("{}")
    return last


def steered(server: enrolment.State) -> list[str]:
    return [entry["kind"] for entry in server.audit.entries if entry["event"] == "steered"]


def test_pause_stands_until_resumed_and_is_private(server: enrolment.State) -> None:
    assert steering.read(server) == steering.Orders()
    first = steering.pause(server)
    assert steering.pause(server) == first, "who paused first is kept"
    path = steering.path_of(server)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert steering.read(enrolment.open_state(server.folder)).paused == first
    assert steering.resume(server) is True
    assert steering.resume(server) is False
    assert steering.read(server).paused is None
    assert steered(server) == ["pause", "resume"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"format": "fedvfm-steering-2"}', '{"format": "fedvfm-steering-1", "paused": true}', '{"x": 1}'],
)
def test_orders_that_were_written_over_are_not_guessed_at(server: enrolment.State, text: str) -> None:
    steering.path_of(server).write_text(text)
    with pytest.raises(errors.TrustError, match=r"orders .*steering\.json: is"):
        steering.read(server)


def test_finish_names_the_recipe_and_ends_a_pause(server: enrolment.State) -> None:
    steering.pause(server)
    order = steering.finish(server)
    assert steering.finish(server) == order
    orders = steering.read(server)
    assert (orders.paused, orders.finishes(server.about.recipe), orders.finishes("0" * 64)) == (None, True, False)
    finish_run(server)
    with pytest.raises(errors.ConfigError, match="is finished already"):
        steering.finish(server)


# -- more rounds -------------------------------------------------------------------------------------------------------


def test_a_finished_recipe_is_extended_at_once(server: enrolment.State) -> None:
    before, last = server.lock(), finish_run(server)
    made = steering.extend(server, 5)
    after = enrolment.open_state(server.folder)
    locked = after.locked()
    assert after.about.recipe == made == locked.recipe.hash != before.hash
    assert locked.adapter == last
    changed = {"rounds": 5, "start": last.fingerprint}
    assert locked.recipe == before.recipe.model_copy(update=changed)
    assert after.lock().manifest == before.manifest
    assert steering.read(after).extend is None


def test_a_running_recipe_is_extended_when_it_is_finished(server: enrolment.State) -> None:
    first = server.about.recipe
    assert steering.extend(server, 2) == ""
    assert steering.settle(server).about.recipe == first, "not before"
    last = finish_run(server)
    after = steering.settle(server)
    assert (after.lock().recipe.rounds, after.lock().initial) == (2, last.fingerprint)
    assert steering.settle(server).about == after.about, "once"
    assert steered(server) == ["extend", "recipe"]


@pytest.mark.parametrize("crash", ["file-renamed:1", "file-renamed:2", "file-renamed:3"])
def test_a_crash_between_the_files_of_an_extension_changes_nothing(
    server: enrolment.State, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    """Whatever was written before: done again it comes to the same end."""
    from fedvfm.storage import storage

    steering.extend(server, 2)
    finish_run(server)
    left = [int(crash.partition(":")[2])]

    def fall(name: str) -> None:
        if name == "file-renamed":
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(storage, "fault_point", fall)
        with pytest.raises(KeyboardInterrupt):
            steering.settle(server)
    after = steering.settle(server)
    assert after.lock().recipe.rounds == 2
    assert after.locked().adapter.fingerprint == after.lock().recipe.start
    assert steering.settle(server).about == after.about


@pytest.mark.parametrize("rounds", [0, -1, 100_001])
def test_no_such_number_of_rounds(server: enrolment.State, rounds: int) -> None:
    with pytest.raises(errors.ConfigError, match=f"--rounds {rounds}: from 1 to 100000"):
        steering.extend(server, rounds)


def test_an_extension_needs_an_approval_of_its_own_and_says_what_it_starts_from(
    server: enrolment.State, invite: invites.Invite, tmp_path: Path
) -> None:
    site = joining.join(tmp_path / "north", invite, invite.lock.hash)
    last = finish_run(server)
    made = steering.extend(server, 5)
    with pytest.raises(errors.PolicyRefused, match="approval-pending"):
        site.approvals.require(made)
    words = dict(recipe_review.words(enrolment.open_state(server.folder).lock()))
    assert words["starts from"].startswith(f"what an earlier recipe trained: adapter {last.fingerprint}; round 1 is ")
    assert dict(recipe_review.words(server.lock()))["starts from"] == "the seed"
    few = policy.Facts.of(enrolment.open_state(server.folder).lock())
    assert few.recipe.rounds == 5


def test_a_recipe_that_starts_from_nothing_keeps_its_name(make_lock: Any) -> None:
    """Recipes that were approved before there was ``start`` are approved still."""
    recipe = make_lock(precision="float32", threads=2).recipe  # the defaults then
    assert recipe.hash == "94e6ffed5cd853ac9040b328a5ccdbd72b17a23021100dbc7535fccf241b63c7"
    assert make_lock(precision="float32", threads=2, start="f" * 64).hash != recipe.hash


# -- further recipes ---------------------------------------------------------------------------------------------------


def parted(locked: locked_recipe.LockedRecipe) -> locked_recipe.LockedRecipe:
    """As its file alone gives it, without the initial adapter."""
    return signed_documents.parse(signed_documents.to_text(locked).encode(), locked_recipe.LockedRecipe, "recipe")


def test_a_further_recipe_follows_the_present_one(server: enrolment.State, make_lock: Any) -> None:
    first = server.about.recipe
    second, third = make_lock(seed=2), make_lock(seed=3)
    for one in (second, third, second):
        assert steering.add_recipe(server, one) is False
    assert steering.read(server).following == (second.hash, third.hash)
    assert enrolment.open_state(server.folder).about.recipe == first
    for expected in (second, third, third):
        finish_run(enrolment.open_state(server.folder))
        assert steering.settle(server).about.recipe == expected.hash
    assert steering.read(server).following == ()


def test_a_further_recipe_is_taken_up_where_the_present_one_is_finished(
    server: enrolment.State, make_lock: Any
) -> None:
    finish_run(server)
    locked = make_lock(seed=2)
    assert steering.add_recipe(server, locked) is True
    after = enrolment.open_state(server.folder)
    assert (after.about.recipe, after.locked().adapter) == (locked.hash, locked.adapter)
    assert {stat.S_IMODE(path.stat().st_mode) for path in after.folder.rglob("recipes/*")} == {0o600}


def test_at_once_and_back_again(server: enrolment.State, make_lock: Any) -> None:
    first, other = make_lock(), make_lock(seed=2)
    steering.add_recipe(server, other)
    assert steering.add_recipe(server, other, at_once=True) is True
    assert steering.read(server).following == ()
    assert enrolment.open_state(server.folder).about.recipe == other.hash
    assert steering.add_recipe(server, parted(first), at_once=True) is True, "its adapter is here"
    assert enrolment.open_state(server.folder).about == server.about


def test_recipes_that_cannot_be_added(server: enrolment.State, make_lock: Any) -> None:
    locked = make_lock(seed=2)
    with pytest.raises(errors.CheckpointError, match=r"initial adapter \(\.safetensors\) must lie beside it"):
        steering.add_recipe(server, parted(locked))
    wrong: locked_recipe.LockedRecipe
    wrong = make_lock(start="f" * 64)
    with pytest.raises(errors.CheckpointError, match="starts from another adapter than the one it names"):
        steering.add_recipe(server, wrong)
    finish_run(server)
    with pytest.raises(errors.ConfigError, match=r"is finished\. To go on from it: fedvfm server extend"):
        steering.add_recipe(server, make_lock())


# -- sites -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def north(server: enrolment.State, invite: invites.Invite, tmp_path: Path) -> joining.State:
    joined = joining.join(tmp_path / "north", invite, invite.lock.hash)
    enrolment.approve(server, joined.request)
    return joined


def test_dropped_readmitted_and_revoked(server: enrolment.State, north: joining.State) -> None:
    before = server.sites()["north"]
    for _ in range(2):
        entry = steering.drop(server, "north")
    assert (entry.status, entry.public_key, entry.recipe) == (rosters.DROPPED, before.public_key, before.recipe)
    assert server.sites()["north"] == entry
    with pytest.raises(errors.TrustError, match=r"the site was dropped at .* fedvfm server readmit"):
        enrolment.approve(server, north.request)
    with pytest.raises(errors.TrustError, match=r"'north': is dropped\. To give it a new key"):
        enrolment.invite(server, "north")
    assert steering.readmit(server, "north").status == rosters.APPROVED
    assert server.sites()["north"].public_key == before.public_key
    steering.drop(server, "north")
    assert enrolment.revoke(server, "north").status == rosters.REVOKED
    with pytest.raises(errors.TrustError, match="'north': is revoked, not dropped"):
        steering.readmit(server, "north")
    assert steered(server) == ["drop", "drop", "readmit", "drop"]


def test_only_an_approved_site_can_be_dropped(server: enrolment.State) -> None:
    with pytest.raises(errors.TrustError, match="'south': is invited, not approved"):
        steering.drop(server, "south")
    with pytest.raises(errors.TrustError, match=r"'no\\x1bbody': is not on the roster. See: fedvfm server roster"):
        steering.drop(server, "no\x1bbody")


def test_what_status_says_of_orders(server: enrolment.State, make_lock: Any) -> None:
    steering.extend(server, 4)
    steering.finish(server)
    steering.pause(server)
    steering.add_recipe(server, make_lock(seed=2))
    told = steering.told(steering.read(server), server.about.recipe)
    assert json.loads(json.dumps(told)) == told
    assert (told["finishing"], told["extended_by"], len(told["following"])) == (True, 4, 1)
    assert set(told["paused"]) == {"who", "time"}
