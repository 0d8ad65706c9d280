"""Invite, join, approve, revoke between a server's and a site's state folder, and every way it must not go."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.client import state_folder as joining
from fedvfm.server import state_folder as enrolment
from fedvfm.storage import hash_chain, storage
from fedvfm.trust import certificates, invites, keys, locked_recipe, requests, roster, signed_documents

MakeServer = Any


def told(server: enrolment.State) -> str:
    return server.fingerprint()


def joined(folder: Path, server: enrolment.State, site: str) -> joining.State:
    found = joining.read_invite(server.invite_path(site), told(server))
    return joining.join(folder, found, found.lock.hash)


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


# -- the way it goes ---------------------------------------------------------------------------------------------------


def test_two_sites_join_and_one_comes_later(tmp_path: Path, server: enrolment.State) -> None:
    for site in ("north", "south"):
        made = joined(tmp_path / site, server, site)
        entry, current = enrolment.approve(server, made.request)
        assert current
        assert entry.public_key + "\n" == made.public_key.read_text()
        assert made.approvals.stand() == [server.about.recipe]
        assert not server.invite_path(site).exists(), "a used invite is of no use to a thief"
    enrolment.invite(server, "late")
    enrolment.approve(server, joined(tmp_path / "late", server, "late").request)
    assert {name: entry.status for name, entry in server.sites().items()} == dict.fromkeys(
        ("late", "north", "south"), "approved"
    )


def test_everything_is_its_owners_alone_under_a_lax_umask(tmp_path: Path, make_server: MakeServer) -> None:
    before = os.umask(0)
    try:
        server = make_server(tmp_path / "server", "north")
        site = joined(tmp_path / "site", server, "north")
        enrolment.approve(server, site.request)
    finally:
        os.umask(before)
    for folder in (server.folder, site.folder):
        assert modes(folder) == {0o600}
        inner = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        assert {stat.S_IMODE(path.stat().st_mode) for path in inner} == {0o700}


def test_no_private_key_and_no_token_leaves_its_place(tmp_path: Path, server: enrolment.State) -> None:
    invite = signed_documents.read(server.invite_path("north"), invites.Invite, "invite")
    site = joined(tmp_path / "site", server, "north")
    enrolment.approve(server, site.request)
    secret = site.key.read_text().splitlines()[2]
    for path in (path for folder in (server.folder, site.folder) for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        assert invite.token.encode() not in data, path
        assert secret.encode() not in data or path == site.key


def test_the_server_gives_the_round_loop_what_it_needs(server: enrolment.State, make_lock: Any) -> None:
    expected = make_lock()
    locked = enrolment.open_state(server.folder).locked()
    assert locked.adapter == expected.adapter
    assert locked.recipe.hash == expected.hash == server.about.recipe
    assert locked.manifest.fingerprint == expected.manifest.fingerprint
    path = server.recipe_path(expected.hash).with_suffix(".safetensors")
    shutil.copy(path, path.with_suffix(".copy"))
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(errors.CheckpointError, match="the file was changed or is damaged"):
        server.locked()


def test_a_recipe_that_arrives_later_waits_for_its_own_approval(tmp_path: Path, server: Any, make_lock: Any) -> None:
    site = joined(tmp_path / "site", server, "north")
    other = make_lock(rounds=4)
    assert site.remember(other)
    assert not site.remember(other), "seen before"
    with pytest.raises(errors.PolicyRefused, match="waits for a person here") as caught:
        site.approvals.require(other.hash)
    assert caught.value.reason == "approval-pending"
    assert site.find(other.hash[:12]).hash == other.hash
    joining.approve(site, other)
    site.approvals.require(other.hash)
    joining.withdraw(site, other.hash)
    with pytest.raises(errors.PolicyRefused):
        site.approvals.require(other.hash)
    with pytest.raises(errors.TrustError, match="is not approved, so there is nothing to withdraw"):
        joining.withdraw(site, other.hash)
    for wrong in (other.hash[:11], "", "../site", "f" * 64):
        with pytest.raises(errors.TrustError, match="is not one this site was asked"):
            site.find(wrong)


# -- invites -----------------------------------------------------------------------------------------------------------


def test_a_wrong_fingerprint(server: enrolment.State, tmp_path: Path, make_server: MakeServer) -> None:
    other = make_server(tmp_path / "other")
    for wrong in (told(other), told(server)[:-1], "", "A" * 32):
        with pytest.raises(errors.TrustError, match=r"does not have the fingerprint you were told. Do not join"):
            joining.read_invite(server.invite_path("north"), wrong)


CHANGES: dict[str, Any] = {
    "address": "evil.example:8443",
    "site": "south",
    "federation": "other",
    "token": "A" * 43,
    "expires": "2099-01-01T00:00:00Z",
    "created": "2020-01-01T00:00:00Z",
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_invite(server: enrolment.State, tmp_path: Path, key: str) -> None:
    values = json.loads(server.invite_path("north").read_text())
    (tmp_path / "i.json").write_text(json.dumps({**values, key: CHANGES[key]}))
    with pytest.raises(errors.TrustError, match="was changed after the coordinator signed it"):
        joining.read_invite(tmp_path / "i.json", told(server))


def test_a_recipe_changed_inside_an_invite(server: enrolment.State, tmp_path: Path, make_lock: Any) -> None:
    values = json.loads(server.invite_path("north").read_text())
    values["lock"]["recipe"]["rounds"] = 1000
    (tmp_path / "i.json").write_text(json.dumps(values))
    with pytest.raises(errors.TrustError, match="the recipe is not the one its hash names"):
        joining.read_invite(tmp_path / "i.json", told(server))
    values["lock"] = json.loads(signed_documents.to_text(make_lock(rounds=1000)))
    (tmp_path / "i.json").write_text(json.dumps(values))
    with pytest.raises(errors.TrustError, match="was changed after the coordinator signed it"):
        joining.read_invite(tmp_path / "i.json", told(server))


def test_another_authority_in_an_invite(server: enrolment.State, invite: invites.Invite) -> None:
    """Who signs with an authority of his own fails at the fingerprint; with the right one, at the signature."""
    key, authority = certificates.make_authority("trial", signed_documents.now())
    forged = invite.model_copy(update={"authority": certificates.to_pem(authority)})
    forged = forged.model_copy(update={"signature": keys.sign(key, forged.signed_bytes())})
    with pytest.raises(errors.TrustError, match="fingerprint"):
        invites.check(forged, told(server), signed_documents.now())
    with pytest.raises(errors.TrustError, match="was changed"):
        invites.check(invite.model_copy(update={"signature": forged.signature}), told(server), signed_documents.now())


def test_an_expired_invite_is_refused_at_both_ends(tmp_path: Path, server: enrolment.State, invite: Any) -> None:
    late = signed_documents.now() + datetime.timedelta(days=31)
    with pytest.raises(errors.TrustError, match=r"the invite expired at .*; it is .* here. .* this\s?machine's clock"):
        invites.check(invite, told(server), late)
    site = joined(tmp_path / "site", server, "north")
    request = signed_documents.read(site.request, requests.Request, "request")
    with pytest.raises(errors.TrustError, match="its invite expired"):
        server.roster.approve(request, late)
    assert server.sites()["north"].status == "invited"


def test_a_renamed_invite_is_for_the_site_it_names(tmp_path: Path, server: enrolment.State) -> None:
    shutil.copy(server.invite_path("north"), tmp_path / "south.invite.json")
    assert joining.read_invite(tmp_path / "south.invite.json", told(server)).site == "north"


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_token_is_good_once(tmp_path: Path, server: enrolment.State) -> None:
    """Two joins with one stolen invite: the first is approved, the second refused, whoever came first."""
    first, second = (joined(tmp_path / name, server, "north") for name in ("a", "b"))
    enrolment.approve(server, first.request)
    for again in (first, second):
        with pytest.raises(errors.TrustError, match="approved already and its invite used up"):
            enrolment.approve(server, again.request)
    assert server.sites()["north"].public_key + "\n" == first.public_key.read_text()


@pytest.mark.parametrize("again", ["approve", "start"])
def test_an_approval_that_was_killed_before_it_was_noted_is_noted(
    tmp_path: Path, server: enrolment.State, again: str
) -> None:
    site = joined(tmp_path / "a", server, "north")
    request = signed_documents.read(site.request, requests.Request, "request")
    entry = server.roster.approve(request, signed_documents.now())  # as far as the killed process came
    assert [line["event"] for line in server.audit.entries] == ["opened", "invited", "invited"]
    if again == "approve":
        assert enrolment.approve(server, site.request, site.spoken_key) == (entry, True)
    else:
        enrolment.note_enrolled(server)
        enrolment.note_enrolled(server)
    line = server.audit.entries[-1]
    assert (line["event"], line["key"], line.get("reason")) == (
        "enrolled",
        entry.key_fingerprint,
        None if again == "approve" else "unchecked",
    )
    assert len(server.audit.entries) == 4
    assert not server.invite_path("north").exists()
    with pytest.raises(errors.TrustError, match="approved already and its invite used up"):
        enrolment.approve(server, site.request)


def _approve(folder: Path, request: Path, found: Any) -> None:
    try:
        enrolment.approve(enrolment.open_state(folder), request)
        found.put("approved")
    except errors.TrustError:
        found.put("refused")


def test_a_token_is_good_once_even_at_the_same_moment(tmp_path: Path, server: enrolment.State) -> None:
    made = [joined(tmp_path / str(number), server, "north") for number in range(4)]
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    workers = [context.Process(target=_approve, args=(server.folder, site.request, found)) for site in made]
    for worker in workers:
        worker.start()
    answers = sorted(found.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
    assert answers == ["approved", "refused", "refused", "refused"]
    assert [row["event"] for row in hash_chain.read(server.roster_path)] == ["invited", "invited", "approved"]


def forge(request: requests.Request, **change: Any) -> requests.Request:
    return request.model_copy(update=change)


def test_a_stolen_token_under_another_name(tmp_path: Path, server: enrolment.State, invite: invites.Invite) -> None:
    """The thief holds the token of 'north' and calls himself 'south': signed anew with all he has, it is refused."""
    key = keys.make()
    stolen = requests.make(invite.model_copy(update={"site": "south"}), key, signed_documents.now())
    with pytest.raises(errors.TrustError, match="does not come from the holder of this site's invite"):
        server.roster.approve(stolen, signed_documents.now())
    other = requests.make(invite.model_copy(update={"site": "west"}), key, signed_documents.now())
    with pytest.raises(errors.TrustError, match="no such site was invited; invited were: north, south"):
        server.roster.approve(other, signed_documents.now())
    assert {entry.status for entry in server.sites().values()} == {"invited"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"site": "south"}, "does not come from the holder"),
        ({"site": "west"}, "no such site was invited"),
        ({"federation": "other"}, "is for federation 'other'; this one is 'trial'"),
        ({"recipe": "f" * 64}, "does not come from the holder"),
        ({"version": "9.9"}, "does not come from the holder"),
        ({"created": "2020-01-01T00:00:00Z"}, "does not come from the holder"),
        ({"token_proof": "A" * 86 + "=="}, "does not come from the holder"),
        ({"signature": "A" * 40}, "is not signed with the key it brings"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_changed_request(server: enrolment.State, invite: Any, change: dict[str, Any], said: str) -> None:
    request = requests.make(invite, keys.make(), signed_documents.now())
    with pytest.raises(errors.TrustError, match=said):
        server.roster.approve(forge(request, **change), signed_documents.now())
    server.roster.approve(request, signed_documents.now())


def test_somebody_elses_key_in_a_request(server: enrolment.State, invite: invites.Invite) -> None:
    """Who holds the token but not the key's private half cannot bring that key."""
    key, other = keys.make(), keys.make()
    request = forge(requests.make(invite, key, signed_documents.now()), public_key=keys.public_text(other))
    proof = requests.tokens.prove(invite.token, "trial", "north", request.signed_bytes())
    with pytest.raises(errors.TrustError, match="is not signed with the key it brings"):
        server.roster.approve(forge(request, token_proof=proof), signed_documents.now())


def test_a_refused_request_is_in_the_audit_log(tmp_path: Path, server: enrolment.State, invite: Any) -> None:
    request = requests.make(invite.model_copy(update={"site": "south"}), keys.make(), signed_documents.now())
    path = signed_documents.write(tmp_path / "r.json", request)
    with pytest.raises(errors.TrustError):
        enrolment.approve(server, path)
    last = server.audit.entries[-1]
    assert (last["event"], last["verdict"], last["peer"]) == ("decided", "refused", "south")


# -- the roster --------------------------------------------------------------------------------------------------------


def test_revoked_keys_never_come_back(tmp_path: Path, server: enrolment.State) -> None:
    site = joined(tmp_path / "site", server, "north")
    enrolment.approve(server, site.request)
    with pytest.raises(
        errors.TrustError, match=r"site 'north': is approved. To give it a new key: fedvfm server revoke"
    ):
        enrolment.invite(server, "north")
    assert enrolment.revoke(server, "north").status == "revoked"
    assert enrolment.revoke(server, "north").status == "revoked"
    with pytest.raises(errors.TrustError, match=r"the site was revoked at .*. It needs a new invite"):
        enrolment.approve(server, site.request)
    again = joining.read_invite(enrolment.invite(server, "north"), told(server))
    old = requests.make(again, keys.read_private(site.key), signed_documents.now())
    with pytest.raises(
        errors.TrustError, match=r"its key was on the roster before\. The site must join with a new key"
    ):
        server.roster.approve(old, signed_documents.now())
    enrolment.approve(server, joining.join(tmp_path / "new", again, again.lock.hash).request)
    assert server.sites()["south"].status == "invited", "the others are not touched"


def test_one_key_is_not_two_sites(server: enrolment.State) -> None:
    key = keys.make()
    for site in ("north", "south"):
        found = signed_documents.read(server.invite_path(site), invites.Invite, "invite")
        request = requests.make(found, key, signed_documents.now())
        if site == "north":
            server.roster.approve(request, signed_documents.now())
    with pytest.raises(errors.TrustError, match="its key was on the roster before"):
        server.roster.approve(request, signed_documents.now())


def test_a_new_invite_voids_the_open_one(tmp_path: Path, server: enrolment.State) -> None:
    old = joined(tmp_path / "old", server, "north")
    enrolment.invite(server, "north")
    with pytest.raises(errors.TrustError, match="does not come from the holder of this site's invite"):
        enrolment.approve(server, old.request)
    enrolment.approve(server, joined(tmp_path / "new", server, "north").request)


def test_revoking_an_open_invite(tmp_path: Path, server: enrolment.State) -> None:
    site = joined(tmp_path / "site", server, "north")
    enrolment.revoke(server, "north")
    assert not server.invite_path("north").exists()
    with pytest.raises(errors.TrustError, match="was revoked"):
        enrolment.approve(server, site.request)
    with pytest.raises(errors.TrustError, match="site 'west': is not on the roster: north, south"):
        enrolment.revoke(server, "west")


def test_an_edited_roster_is_found(tmp_path: Path, server: enrolment.State) -> None:
    site = joined(tmp_path / "site", server, "north")
    enrolment.approve(server, site.request)
    text = server.roster_path.read_text()
    server.roster_path.write_text(
        text.replace(keys.public_text(keys.read_private(site.key)), keys.public_text(keys.make()))
    )
    with pytest.raises(errors.CheckpointError, match="line 3 does not continue the chain"):
        server.sites()
    with pytest.raises(errors.CheckpointError):
        enrolment.revoke(server, "north")


def test_a_roster_of_another_form_is_named(tmp_path: Path) -> None:
    hash_chain.Chain(tmp_path / "roster.jsonl").append({"event": "revoked", "site": "x", "time": "t"})
    with pytest.raises(errors.CheckpointError, match="roster: line 1 is not of the known form"):
        roster.read(tmp_path / "roster.jsonl")


# -- names and folders -------------------------------------------------------------------------------------------------

BAD = [
    "../evil",
    "a/b",
    "..",
    ".",
    "",
    "a\0b",
    "a\nb",
    "Zürich",
    "a\u202eb",
    "-a",
    " a",
    "a.",
    "a ",
    "x" * 65,
    "~",
    "C:\\x",
]


@pytest.mark.parametrize("name", BAD)
def test_names_that_are_no_file_names(tmp_path: Path, server: enrolment.State, name: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(errors.ConfigError, match="letters, digits") as caught:
        enrolment.invite(server, name)
    assert "\n" not in str(caught.value).removeprefix("server invite: 1 fault\n")
    plan = enrolment.Plan("trial", "a:1", (), (name,))
    with pytest.raises(errors.ConfigError, match="--sites"):
        plan.check()
    assert sorted(tmp_path.rglob("*")) == before


def test_names_in_invites_and_requests_are_checked_too(server: enrolment.State, invite: Any, tmp_path: Path) -> None:
    request = requests.make(invite, keys.make(), signed_documents.now())
    for document, what in ((invite, invites.Invite), (request, requests.Request)):
        for name in BAD:
            if name in ("a.", "a "):
                continue
            values = {**json.loads(signed_documents.to_text(document)), "site": name}
            with pytest.raises(errors.TrustError, match="site: string should match pattern"):
                signed_documents.parse(json.dumps(values).encode(), what, "it")
    for name in ("a.", "a "):
        with pytest.raises(errors.TrustError, match="must end in a letter"):
            invites.check_name(name)


def test_names_that_differ_in_case_alone(server: enrolment.State) -> None:
    with pytest.raises(errors.TrustError, match="site 'NORTH': differs from 'north' in case alone"):
        enrolment.invite(server, "NORTH")


def test_all_faults_of_a_plan_at_once() -> None:
    plan = enrolment.Plan("no/name", "a:1", ("*.example", "a b"), ("x", "X", "a/b"), 0)
    with pytest.raises(errors.ConfigError, match="server init: 6 faults"):
        plan.check()


def test_state_is_never_overwritten(tmp_path: Path, server: enrolment.State, make_server: MakeServer) -> None:
    with pytest.raises(errors.OutputInUse, match="is not empty and is left as it is"):
        make_server(server.folder)
    joined(tmp_path / "site", server, "north")
    before = {path: path.read_bytes() for path in (tmp_path / "site").rglob("*") if path.is_file()}
    with pytest.raises(errors.OutputInUse, match="Choose another --state"):
        joined(tmp_path / "site", server, "north")
    assert {path: path.read_bytes() for path in (tmp_path / "site").rglob("*") if path.is_file()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.OutputInUse):
        joined(tmp_path / "file", server, "north")
    with pytest.raises(errors.StorageError):
        make_server(tmp_path / "file")


def test_an_empty_folder_is_taken_and_closed(tmp_path: Path, make_server: MakeServer) -> None:
    (tmp_path / "mounted").mkdir(mode=0o755)
    assert stat.S_IMODE(make_server(tmp_path / "mounted").folder.stat().st_mode) == 0o700


def test_a_folder_that_was_never_finished_is_not_used(tmp_path: Path, server: enrolment.State) -> None:
    (server.folder / enrolment.ABOUT).unlink()
    with pytest.raises(errors.TrustError, match="if 'server init' was interrupted, remove the folder"):
        enrolment.open_state(server.folder)
    with pytest.raises(errors.TrustError, match="is no site's state folder"):
        joining.open_state(tmp_path)


def test_join_needs_the_approval_of_this_very_recipe(tmp_path: Path, server: enrolment.State, make_lock: Any) -> None:
    found = joining.read_invite(server.invite_path("north"), told(server))
    for wrong in (make_lock(rounds=4).hash, found.lock.hash[:12], "", found.lock.hash.upper()):
        with pytest.raises(errors.TrustError, match="another recipe needs another approval"):
            joining.join(tmp_path / "site", found, wrong)
    assert not (tmp_path / "site").exists()


def test_a_swapped_recipe_file_is_found(tmp_path: Path, server: enrolment.State, make_lock: Any) -> None:
    site, other = joined(tmp_path / "site", server, "north"), make_lock(rounds=4)
    signed_documents.write(site.recipe_path(server.about.recipe), other)
    with pytest.raises(errors.TrustError, match="holds another recipe than its name says"):
        site.find(server.about.recipe)


def test_certify_keeps_the_fingerprint_and_adds_names(server: enrolment.State) -> None:
    before, key = told(server), server.key.read_bytes()
    assert enrolment.recertify(server, ["new.example"]) == ["server.example", "127.0.0.1", "new.example"]
    again = enrolment.open_state(server.folder)
    assert again.about.names[-1] == "new.example"
    assert told(again) == before
    assert again.key.read_bytes() != key
    made = certificates.read_pem(again.certificate.read_text(), "server")
    assert certificates.names_of(made) == ["server.example", "127.0.0.1", "new.example"]
    with pytest.raises(errors.ConfigError, match="neither a host name nor an address"):
        enrolment.recertify(again, ["*.example"])


def test_a_certificate_is_renewed_in_time_and_an_expired_one_refused(
    server: enrolment.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert enrolment.renew(server) == ""
    ends, now = enrolment.certified_until(server), signed_documents.now()
    kept = server.authority_key.read_bytes()
    server.authority_key.unlink()
    for days, said in ((59, "expires in 59 days"), (-1, "")):
        at = ends - datetime.timedelta(days=days)
        monkeypatch.setattr(signed_documents, "now", lambda at=at: at)
        if said:
            assert said in enrolment.renew(server)
        else:
            with pytest.raises(errors.TrustError, match=r"expired at .*fedvfm server certify"):
                enrolment.renew(server)
    storage.write_bytes(server.authority_key, kept)
    assert "a new one is good until" in enrolment.renew(server)
    assert enrolment.certified_until(server) > ends > now
    assert [row["event"] for row in server.audit.entries][-1] == "certified"


def test_init_without_the_initial_adapter(tmp_path: Path, make_lock: Any) -> None:
    plan = enrolment.Plan("trial", "a:1", (), ("north",))
    alone = signed_documents.parse(signed_documents.to_text(make_lock()).encode(), locked_recipe.LockedRecipe, "recipe")
    with pytest.raises(errors.CheckpointError, match="must lie beside"):
        enrolment.init(tmp_path / "server", plan, alone)
    assert not (tmp_path / "server").exists()


# -- locks and approvals -----------------------------------------------------------------------------------------------


def test_a_lock_must_pin_its_backbone(make_lock: Any) -> None:
    values = json.loads(signed_documents.to_text(make_lock()))
    for change in ({"backbone_sha256": "cd" * 32}, {"backbone_sha256": ""}):
        with pytest.raises(errors.TrustError, match="does not pin the backbone it is locked to"):
            signed_documents.parse(json.dumps({**values, **change}).encode(), locked_recipe.LockedRecipe, "recipe")
    for rows in (values["manifest"][::-1], values["manifest"] + values["manifest"][-1:]):
        with pytest.raises(errors.TrustError, match="repeats a name or is not sorted"):
            signed_documents.parse(
                json.dumps({**values, "manifest": rows}).encode(), locked_recipe.LockedRecipe, "recipe"
            )


@pytest.mark.parametrize(
    "bad",
    [
        lambda r: [{**r[0], "role": "C"}],
        lambda r: [{**r[0], "dtype": "float16"}],
        lambda r: [{key: value for key, value in r[0].items() if key != "shape"}],
        lambda r: [{key: value for key, value in r[2].items() if key != "role"}],
        lambda r: [{**r[0], "shape": 3}],
        lambda r: [{**r[0], "shape": [-1]}],
        lambda r: [{**r[0], "shape": ["3"]}],
        lambda r: [{**r[0], "scale": "big"}],
        lambda r: [{**r[0], "scale": True}],
        lambda r: [{**r[0], "more": 1}],
        lambda r: ["block"],
        lambda r: 7,
    ],
)
def test_a_manifest_of_another_form(make_lock: Any, bad: Any) -> None:
    values = json.loads(signed_documents.to_text(make_lock()))
    text = json.dumps({**values, "manifest": bad(values["manifest"])})
    with pytest.raises(errors.TrustError, match="is not of the known form: manifest"):
        signed_documents.parse(text.encode(), locked_recipe.LockedRecipe, "recipe")


def test_another_initial_adapter(make_lock: Any) -> None:
    locked = make_lock()
    initial = locked.adapter
    assert locked.with_adapter(initial).adapter == initial
    with pytest.raises(errors.CheckpointError, match="is not the initial adapter of recipe"):
        locked.with_adapter(initial * 2.0)


def test_a_replayed_approval(tmp_path: Path, server: enrolment.State, make_lock: Any) -> None:
    """Approvals copied from another site, or lines copied from elsewhere, count for nothing."""
    north, south = (joined(tmp_path / site, server, site) for site in ("north", "south"))
    shutil.copy(south.approvals.path, north.approvals.path)
    with pytest.raises(errors.TrustError, match=r"line 1 is no approval of site 'north'. Nothing counts as approved"):
        north.approvals.require(server.about.recipe)
    with pytest.raises(errors.TrustError, match="no approval of site 'north'"):
        north.approvals.approve(make_lock(rounds=4).hash)
    lines = south.approvals.path.read_text()
    south.approvals.path.write_text(lines.replace(server.about.recipe, make_lock(rounds=4).hash))
    with pytest.raises(errors.TrustError, match=r"does not continue the chain.* Nothing counts as approved"):
        south.approvals.stand()
    with pytest.raises(errors.TrustError, match="Restore the file from a backup"):
        south.approvals.approve(server.about.recipe)


def test_approvals_say_who_and_when_and_count_once(
    tmp_path: Path, server: enrolment.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pwd

    monkeypatch.setenv("LOGNAME", "somebody else")
    site = joined(tmp_path / "site", server, "north")
    site.approvals.approve(server.about.recipe)
    (row,) = site.approvals.rows()
    assert row["who"] == pwd.getpwuid(os.getuid()).pw_name
    assert abs(signed_documents.moment(row["time"]) - signed_documents.now()) < datetime.timedelta(seconds=60)


def test_a_crash_in_the_middle_of_an_approval(tmp_path: Path, server: enrolment.State, make_lock: Any) -> None:
    site, other = joined(tmp_path / "site", server, "north"), make_lock(rounds=4)
    joining.approve(site, other)
    site.approvals.path.write_bytes(site.approvals.path.read_bytes()[:-7])
    assert site.approvals.stand() == [server.about.recipe], "a line that was never finished approves nothing"
    joining.approve(site, other)
    assert site.approvals.stand() == [server.about.recipe, other.hash]


def test_exclusive_is_released_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(ZeroDivisionError), storage.exclusive(path):
        _ = 1 / 0
    with storage.exclusive(path):
        assert stat.S_IMODE((tmp_path / ".file.lock").stat().st_mode) == 0o600
