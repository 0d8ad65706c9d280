"""The whole way from a recipe to a roster through the real command line: a server's folder and two sites' folders."""

from __future__ import annotations

import io
import json
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

CONFIG, WEIGHTS, CHECKPOINT, IN_USE, TRUST, POLICY, AUDIT, SILENT = 2, 4, 5, 6, 12, 13, 14, 17

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "transformers", "peft", "monai", "flwr"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

sys.meta_path.insert(0, Blocker())
sys.argv = ["fedvfm", *sys.argv[1:]]
from fedvfm.cli import main as cli
cli.main()
"""


@pytest.fixture(scope="module")
def locked(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny experiment's recipe, locked once."""
    from fedvfm.model import locking
    from fedvfm.trust import recipes

    folder = tmp_path_factory.mktemp("locked")
    return locking.write(folder / "recipe.json", locking.make(recipes.written(tiny.experiment)))[0]


class Trial:
    """A federation in the making."""

    def __init__(self, cli: Any, root: Path, recipe: Path) -> None:
        self.cli, self.root, self.recipe = cli, root, recipe
        self.server = root / "server"

    def good(self, *arguments: Any) -> dict[str, Any]:
        answer = self.cli(*arguments, "--json")
        assert answer.code == 0, answer.err
        found: dict[str, Any] = json.loads(answer.out)
        return found

    def init(self, *more: str) -> dict[str, Any]:
        names = ("--name", "trial", "--address", "localhost:8443", "--san", "127.0.0.1", "--sites", "north, south")
        return self.good("server", "init", self.recipe, *names, "--state", self.server, *more)

    def join(self, site: str, made: dict[str, Any], *more: Any) -> dict[str, Any]:
        told = ("--fingerprint", made["fingerprint"], "--approve", made["recipe"], "--state", self.root / site)
        return self.good("client", "join", made["invites"][site], *told, *more)

    def approve(self, site: str) -> dict[str, Any]:
        key = self.good("client", "status", "--state", self.root / site)["key"]
        return self.good("server", "approve", self.root / site / "request.json", "--key", key, "--state", self.server)


@pytest.fixture
def trial(cli: Any, tmp_path: Path, locked: Path) -> Trial:
    return Trial(cli, tmp_path, locked)


def test_from_a_recipe_to_a_roster(trial: Trial, tmp_path: Path) -> None:
    made = trial.init()
    policy = trial.cli("client", "review", made["invites"]["north"], "--print-policy").out
    assert tomllib.loads(policy)["policy"]["max_rounds"] == 3
    (tmp_path / "site.toml").write_text(policy)
    for site, more in (("north", ("--data", tmp_path / "site.toml")), ("south", ())):
        assert trial.join(site, made, *more)["approved"] is True
        entry = trial.approve(site)
        assert entry["status"] == "approved"
        assert entry["approved_current_recipe"] is True
        assert entry["public_key"] == (tmp_path / site / "site.pub").read_text().strip()
    roster = trial.good("server", "roster", "--state", trial.server)
    assert {row["site"]: row["status"] for row in roster["sites"]} == {"north": "approved", "south": "approved"}
    assert roster["fingerprint"] == made["fingerprint"]
    assert not list((trial.server / "invites").iterdir())

    late = trial.good("server", "invite", "late", "--state", trial.server)
    trial.join("late", {**made, "invites": {"late": late["invite"]}})
    trial.approve("late")
    assert trial.good("server", "revoke", "north", "--state", trial.server)["status"] == "revoked"
    shown = trial.cli("server", "roster", "--state", trial.server).out
    assert [line.split()[:2] for line in shown.splitlines()[2:]] == [
        ["late", "approved"],
        ["north", "revoked"],
        ["south", "approved"],
    ]

    events = [row["event"] for row in json.loads(trial.cli("audit", "show", trial.server, "--json").out)]
    assert events == ["opened", *["invited"] * 2, *["enrolled"] * 2, "invited", "enrolled", "revoked"]
    for folder in (trial.server, tmp_path / "north", tmp_path / "south", tmp_path / "late"):
        assert trial.good("audit", "verify", folder)["whole"] is True
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {0o600}


def test_the_words_a_person_reads(trial: Trial, tmp_path: Path) -> None:
    names = ("--name", "trial", "--address", "localhost:8443", "--sites", "north")
    out = trial.cli("server", "init", trial.recipe, *names, "--state", trial.server).out
    assert "Tell it to every site by telephone or in person" in out
    fingerprint = next(line.split()[1] for line in out.splitlines() if line.startswith("fingerprint:"))
    invite = trial.server / "invites" / "north.invite.json"
    text = trial.cli("client", "review", invite)
    assert "fedvfm client join' checks it" in text.err
    for words in ("3 rounds of 1 pass", "dice, iou, loss", "never leaves:", "No policy was given"):
        assert words in text.out
    joined = trial.cli("client", "join", invite, "--fingerprint", fingerprint.lower(), "--approve", "0" * 64)
    assert joined.code == TRUST
    assert "invite of federation 'trial' at localhost:8443 for site 'north'" in joined.err


# -- approval by a person ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["n\n", "\n", "", "yess\n", "Y E S\n"])
def test_whoever_does_not_say_yes_joins_nothing(trial: Trial, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    made = trial.init()
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    told = ("--fingerprint", made["fingerprint"], "--state", trial.root / "north")
    said = trial.cli("client", "join", made["invites"]["north"], *told)
    assert said.code == POLICY
    assert f"Approve recipe {made['recipe']}?" in said.err
    assert "nothing was written and no key was made" in said.err
    assert not (trial.root / "north").exists()


def test_yes(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trial.init()
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    told = ("--fingerprint", made["fingerprint"], "--state", trial.root / "north")
    said = trial.cli("client", "join", made["invites"]["north"], *told)
    assert said.code == 0, said.err
    assert f"send this file to the coordinator: {trial.root / 'north' / 'request.json'}\nkey: " in said.out


def test_nobody_is_asked_where_a_script_reads(trial: Trial) -> None:
    made = trial.init()
    told = ("--fingerprint", made["fingerprint"], "--state", trial.root / "north", "--json")
    said = trial.cli("client", "join", made["invites"]["north"], *told)
    assert said.code == POLICY
    assert f"give --approve {made['recipe']}" in said.err


def test_approve_withdraw_and_list(trial: Trial, tmp_path: Path) -> None:
    made = trial.init()
    trial.join("north", made)
    state = ("--state", tmp_path / "north")
    found = trial.good("client", "approvals", *state)
    assert (found["approved"], found["seen"]) == ([made["recipe"]], [made["recipe"]])
    assert trial.good("client", "withdraw", made["recipe"][:12], *state)["event"] == "withdrawn"
    assert trial.good("client", "approvals", *state)["approved"] == []
    line = trial.good("client", "approve", made["recipe"], *state)
    assert line["event"] == "approved"
    assert line["who"]
    rows = trial.good("client", "approvals", *state)["lines"]
    assert [row["event"] for row in rows] == ["approved", "withdrawn", "approved"]
    assert "not approved" not in trial.cli("client", "approvals", *state).out
    assert trial.good("client", "review", made["recipe"], *state)["recipe"] == made["recipe"]
    said = trial.cli("client", "approve", "f" * 64, *state)
    assert said.code == TRUST
    assert "is not one this site was asked to take part in" in said.err


def test_a_policy_stops_join_and_approve(trial: Trial, tmp_path: Path) -> None:
    made = trial.init()
    trial.join("south", made)
    path = tmp_path / "site.toml"
    policy = trial.cli("client", "review", trial.recipe, "--print-policy").out
    for text in ("", policy.replace("max_rounds = 3", "max_rounds = 2")):
        path.write_text(text)
        told = ("--fingerprint", made["fingerprint"], "--approve", made["recipe"], "--state", tmp_path / "north")
        for arguments in (
            ("client", "join", made["invites"]["north"], *told, "--data", path),
            ("client", "approve", made["recipe"], "--state", tmp_path / "south", "--data", path),
        ):
            said = trial.cli(*arguments)
            assert said.code == POLICY
            assert "the policy of this site does not accept the recipe" in said.err
        assert not (tmp_path / "north").exists()
        review = trial.cli("client", "review", trial.recipe, "--policy", path, "--json")
        assert review.code == POLICY
        assert json.loads(review.out)["accepted"] is False
    assert (
        "REFUSES  max_rounds: asked 3; allowed at most 2"
        in trial.cli("client", "review", trial.recipe, "--data", path).out
    )
    path.write_text(policy)
    assert trial.good("client", "review", trial.recipe, "--policy", path)["accepted"] is True


# -- attacks -----------------------------------------------------------------------------------------------------------


def test_attacks_at_the_door(trial: Trial, tmp_path: Path) -> None:
    """Each is refused with one clear error, nothing is written, and the roster stays as it was."""
    made = trial.init()
    trial.join("north", made)
    trial.approve("north")
    before = (trial.server / "roster.jsonl").read_bytes()
    invite, request = Path(made["invites"]["south"]), tmp_path / "north" / "request.json"

    def attempt(code: int, words: str, *arguments: Any) -> None:
        said = trial.cli(*arguments)
        assert said.code == code, said.err
        assert words in said.err
        assert "Traceback" not in said.err
        assert not (tmp_path / "thief").exists()
        assert (trial.server / "roster.jsonl").read_bytes() == before

    def changed(path: Path, **change: Any) -> Path:
        (tmp_path / "changed.json").write_text(json.dumps({**json.loads(path.read_text()), **change}))
        return tmp_path / "changed.json"

    def join(path: Path, fingerprint: str = made["fingerprint"]) -> tuple[Any, ...]:
        told = ("--fingerprint", fingerprint, "--approve", made["recipe"], "--state", tmp_path / "thief")
        return ("client", "join", path, *told)

    approve = ("server", "approve", "--unchecked", "--state", trial.server)
    attempt(TRUST, "does not have the fingerprint you were told", *join(invite, "AAAA-" * 8))
    attempt(TRUST, "was changed after the coordinator signed it", *join(changed(invite, address="evil.example:8443")))
    attempt(TRUST, "extra inputs are not permitted", *join(changed(invite, extra=1)))
    attempt(TRUST, "site: string should match pattern", *join(changed(invite, site="../../etc")))
    attempt(TRUST, "is no strict JSON", *join(trial.recipe.with_suffix(".safetensors")))
    attempt(TRUST, "cannot be read: No such file", *join(tmp_path / "none.json"))
    attempt(TRUST, "approved already and its invite used up", *approve, request)
    attempt(TRUST, "approved already", *approve, shutil.copy(request, tmp_path / "renamed.json"))
    attempt(TRUST, "does not come from the holder of this site's invite", *approve, changed(request, site="south"))
    attempt(TRUST, "no such site was invited", *approve, changed(request, site="west"))
    attempt(TRUST, "is not of the known form", *approve, invite)
    attempt(IN_USE, "not empty and is left as it is", *join(invite)[:-1], tmp_path / "north")
    attempt(TRUST, "is no server's state folder", "server", "roster", "--state", tmp_path / "north")
    attempt(TRUST, "is no site's state folder", "client", "approvals", "--state", trial.server)
    attempt(CONFIG, "'../x', 30 days: a name is letters", "server", "invite", "../x", "--state", trial.server)


def test_init_faults(trial: Trial, tmp_path: Path, tiny: Any) -> None:
    def init(*more: Any, recipe: Path = trial.recipe, sites: str = "a", address: str = "a:1") -> Any:
        names = ("--name", "trial", "--address", address, "--sites", sites, "--state", trial.server)
        return trial.cli("server", "init", recipe, *names, *more)

    tiny.one_error(
        *(init("--days", "0", address="nowhere", sites="a,A"), CONFIG),
        *("3 faults", "--address 'nowhere': write it as host:port", "--days 0", "a name is given twice"),
    )
    tiny.one_error(init("--san", "*.x", sites="a,../b,A"), CONFIG, "3 faults", "'../b'", "given twice")
    tiny.one_error(init(sites=" , "), CONFIG, "--sites: 0 given")
    alone = shutil.copy(trial.recipe, tmp_path / "alone.json")
    tiny.one_error(init(recipe=alone), CHECKPOINT, "must lie beside its .json")
    shutil.copy(trial.recipe.with_suffix(".safetensors"), tmp_path / "alone.safetensors")
    values = json.loads(alone.read_text())
    alone.write_text(json.dumps({**values, "initial": "0" * 64}))
    tiny.one_error(init(recipe=alone), CHECKPOINT, "is not the initial adapter of recipe")
    values["recipe"]["seed"] = 9
    alone.write_text(json.dumps(values))
    tiny.one_error(init(recipe=alone), TRUST, "the recipe is not the one its hash names")
    assert not trial.server.exists()
    trial.init()
    tiny.one_error(init(), IN_USE, "is left as it is")


def test_no_secret_in_what_is_printed(trial: Trial) -> None:
    made = trial.init()
    token = json.loads(Path(made["invites"]["north"]).read_text())["token"]
    joined = trial.join("north", made)
    entry = trial.approve("north")
    for found in (made, joined, entry, trial.good("server", "roster", "--state", trial.server)):
        text = json.dumps(found)
        assert token not in text
        assert "verifier" not in text
        assert "PRIVATE" not in text


# -- audit -------------------------------------------------------------------------------------------------------------


def test_receipts_and_faults_of_the_log(trial: Trial, tmp_path: Path, tiny: Any) -> None:
    made = trial.init()
    trial.join("north", made)
    state, paper = tmp_path / "north", tmp_path / "receipt.json"
    log = state / "audit.jsonl"
    assert trial.good("audit", "receipt", state, "-o", paper)["length"] == 4
    tiny.one_error(trial.cli("audit", "receipt", state, "-o", paper), IN_USE, "is left as it is")
    checked = ("audit", "verify", state, "--against", paper, "--key", state / "site.pub")
    assert trial.good(*checked)["checked"] == 1
    assert "1 notes agree" in trial.cli(*checked).out
    assert "a cut at the end or a rewritten file does not show" in trial.cli("audit", "verify", state).out
    assert len(trial.cli("audit", "show", log, "--last", "2").out.splitlines()) == 2
    other = trial.server / "audit.jsonl"
    tiny.one_error(trial.cli("audit", "verify", other, "--against", paper), SILENT, "is of the log of site 'north'")
    tiny.one_error(trial.cli("audit", "verify", state, "--against", other), SILENT, "notes nothing of this log")
    key = trial.server / "server.pem"
    tiny.one_error(trial.cli("audit", "verify", state, "--against", paper, "--key", key), TRUST, "public key")

    whole = log.read_bytes()
    rows = whole.splitlines(keepends=True)
    log.write_bytes(b"".join(rows[:-1]))
    tiny.one_error(trial.cli("audit", "verify", state), 0)
    tiny.one_error(trial.cli(*checked), AUDIT, "has 3 entries, but had 4", "truncated or rolled back")
    log.write_bytes(b"".join([rows[0], rows[2], rows[1], rows[3]]))
    tiny.one_error(trial.cli("audit", "verify", state), AUDIT, "line 2 does not continue the chain")
    log.write_bytes(whole[:-9])
    said = trial.cli("audit", "verify", state)
    assert said.code == 0
    assert "of a line that a crash cut short are left out" in said.err
    tiny.one_error(trial.cli("audit", "show", tmp_path / "nothing"), AUDIT, "there is no audit log")


# -- locking -----------------------------------------------------------------------------------------------------------


def test_a_lock_without_weights_is_the_lock_with_them(tiny: Any, locked: Path) -> None:
    from fedvfm.model import adapted_model, locking
    from fedvfm.trust import locked_recipe, recipes, signed_documents

    found = signed_documents.read(locked, locked_recipe.LockedRecipe, "recipe")
    full = adapted_model.AdaptedModel(found.recipe).locked()
    assert full.initial == found.initial
    assert full.manifest.fingerprint == found.manifest.fingerprint
    assert (full.backbone_sha256, full.backbone_config_sha256) == (found.backbone_sha256, found.backbone_config_sha256)
    assert full.backbone_parameters == found.backbone_parameters
    assert found.recipe.backbone.sha256 == found.backbone_sha256 != ""
    again = locking.make(recipes.written(tiny.experiment))
    assert again == found
    assert locking.open_recipe(locked).adapter == again.adapter


def test_lock_says_where_it_wrote_and_what_a_site_cannot_find(
    tiny: Any, locked: Path, cli: Any, tmp_path: Path
) -> None:
    answer = cli("recipe", "lock", tiny.experiment, "-o", tmp_path / "recipe.json", "--json")
    assert answer.code == 0, answer.err
    assert "every site needs the same weights at this path" in answer.err
    found = json.loads(answer.out)
    assert found["files"] == [str(tmp_path / "recipe.json"), str(tmp_path / "recipe.safetensors")]
    assert (tmp_path / "recipe.json").read_bytes() == locked.read_bytes()


def test_a_backbone_from_scratch_is_locked_too(tmp_path: Path, cli: Any, tiny: Any) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[backbone]\nname = "unet"\n[backbone.options]\nchannels = [4, 8]\n[adapter]\nkind = "full"\n'
        '[data]\nclass_names = ["a", "b"]\ninput_size = [28, 28]\n'
    )
    answer = cli("recipe", "lock", path, "-o", tmp_path / "made.json", "--json")
    assert answer.code == 0, answer.err
    assert 'unet" = ["scratch"]' in cli("client", "review", tmp_path / "made.json", "--print-policy").out
    tiny.one_error(cli("recipe", "lock", path, "-o", tmp_path / "made.json"), IN_USE, "is left as it is")


def test_recipes_that_cannot_be_locked(tmp_path: Path, cli: Any, tiny: Any) -> None:
    path = tmp_path / "recipe.toml"
    rest = '[data]\nclass_names = ["a", "b"]\ninput_size = [28, 28]\naugment = ["flp"]\n[aggregation]\nrule = "maen"\n'
    path.write_text(f'[backbone]\nname = "{tiny.backbone}"\n{rest}')
    said = cli("recipe", "lock", path)
    tiny.one_error(said, CONFIG, "unknown augmentation 'flp'", "unknown aggregation rule 'maen'")
    path.write_text('[backbone]\nname = "dinov2-small"\n[data]\nclass_names = ["a", "b"]\ninput_size = [28, 28]\n')
    said = cli("recipe", "lock", path, "-o", tmp_path / "made.json")
    tiny.one_error(said, WEIGHTS, "write the sha256 of its weights into the recipe (backbone.sha256)")
    path.write_text(path.read_text().replace('small"\n', f'small"\nsha256 = "{"ab" * 32}"\n'))
    assert cli("recipe", "lock", path, "-o", tmp_path / "made.json").code == 0
    assert json.loads((tmp_path / "made.json").read_text())["backbone_sha256"] == "ab" * 32


def test_a_coordinator_without_torch(locked: Path, tiny: Any, tmp_path: Path) -> None:
    """Real processes with torch, transformers and Flower blocked: init, join, review, approve, roster, audit."""

    def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", BLOCKED, *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=tiny.environment(), capture_output=True, text=True, check=False, timeout=120
        )

    names = ("--name", "trial", "--address", "a:1", "--sites", "north", "--state", tmp_path / "server", "--json")
    done = run("server", "init", locked, *names)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    told = ("--fingerprint", made["fingerprint"], "--approve", made["recipe"], "--state", tmp_path / "north")
    assert run("client", "join", made["invites"]["north"], *told).returncode == 0
    assert (
        run(
            "server", "approve", tmp_path / "north" / "request.json", "--unchecked", "--state", tmp_path / "server"
        ).returncode
        == 0
    )
    refused = run("server", "init", tiny.experiment, *names[:-2], tmp_path / "other")
    assert refused.returncode == 10
    assert "locking a recipe needs torch, which is not installed here" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_whoever_copies_an_invite_is_not_enrolled_as_the_hospital(trial: Trial, tmp_path: Path, tiny: Any) -> None:
    """The thief's request is whole and proves the token; only what the hospital's people say tells it apart."""
    from fedvfm.audit import audit

    made = trial.init()
    own = trial.join("north", made)["key"]
    told = ("--fingerprint", made["fingerprint"], "--approve", made["recipe"], "--state", tmp_path / "thief")
    thief = trial.good("client", "join", made["invites"]["north"], *told)
    approve = ("server", "approve", tmp_path / "thief" / "request.json", "--state", trial.server)
    tiny.one_error(trial.cli(*approve, "--key", own), TRUST, "its key is not the one you were told", "by telephone")
    tiny.one_error(trial.cli(*approve, "--key", own[:9]), TRUST, "its key is not the one you were told")
    for neither in ((), ("--key", own, "--unchecked")):
        tiny.one_error(trial.cli(*approve, *neither), CONFIG, "give --key ABCD-...")
    log = audit.read(trial.server / "audit.jsonl")
    assert [(row["verdict"], row["peer"]) for row in log if row["event"] == "decided"] == [("refused", "north")] * 2
    assert trial.good("client", "status", "--state", tmp_path / "thief")["key"] == thief["key"] != own
    assert trial.approve("north")["status"] == "approved"
    trial.join("south", made)
    trial.good("server", "approve", tmp_path / "south" / "request.json", "--unchecked", "--state", trial.server)
    log = audit.read(trial.server / "audit.jsonl")
    assert [row.get("reason") for row in log if row["event"] == "enrolled"] == [None, "unchecked"]
