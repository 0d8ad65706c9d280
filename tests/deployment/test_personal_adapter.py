"""``fedvfm client adapter personal``: what a site makes of the final adapter for itself, on real files."""

from __future__ import annotations

import json
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fedvfm
from fedvfm import errors
from fedvfm.client.adoption import decisions
from fedvfm.client.personal import choice, statement
from fedvfm.config import schema
from fedvfm.model import locking
from fedvfm.protocol import protocol
from fedvfm.state import checkpoint, groups, state
from fedvfm.trust import recipes
from tests.deployment.test_site_verbs import Hospital, cli, hospital, joined, locked  # noqa: F401 - fixtures

TRUST, CONFIG = 12, 2


@pytest.fixture
def took(hospital: Hospital) -> Hospital:  # noqa: F811
    """A site that accepted a final adapter, and would train one alone too."""
    hospital.write('accept = "always"')
    text = hospital.settings.read_text()
    hospital.settings.write_text(text + "\n[personal]\nrounds = 1\nlocal_only = true\n")
    assert hospital.finish(hospital.initial) == "accepted"
    return hospital


def arguments(site: Hospital) -> list[str]:
    return ["client", "adapter", "personal", str(site.settings), "--state", str(site.state), "--json"]


def folders(site: Hospital) -> list[Path]:
    return [path for path in (site.state / statement.FOLDER).iterdir() if path.is_dir()]


def personalised(site: Hospital, cli: Any) -> tuple[Path, statement.Statement]:  # noqa: F811
    """What ``client adapter personal`` leaves: its folder, and the statement in it."""
    answer = cli(*arguments(site))
    assert answer.code == 0, answer.err
    (folder,) = folders(site)
    return folder, statement.read(folder / statement.STATEMENT)


def test_a_site_trains_on_chooses_keeps_and_signs(took: Hospital, cli: Any) -> None:  # noqa: F811
    answer = cli(*arguments(took))
    assert answer.code == 0, answer.err
    said = json.loads(answer.out)
    (folder,) = folders(took)
    kept = statement.read(folder / statement.STATEMENT)
    assert said == {**kept.model_dump(mode="json"), "folder": str(folder)}
    assert (kept.site, kept.recipe, kept.fingerprint) == ("east", took.lock.hash, took.initial.fingerprint)
    assert kept.choice in choice.PREFERENCE
    assert set(kept.scores) == {choice.GLOBAL, choice.PERSONAL, choice.ALONE, kept.choice}
    assert kept.minus_local_only is not None
    assert kept.minus_local_only.mean == pytest.approx(kept.scores[kept.choice] - kept.scores[choice.ALONE])
    assert kept.minus_local_only.low is None, "under ten patients there is no interval"
    assert kept.word == (statement.DECLINED if kept.choice == choice.ALONE else statement.TOO_FEW)
    assert not kept.private

    assert fedvfm.load_adapter(folder).read().fingerprint == kept.adapter
    assert kept.choice in (folder / "README.md").read_text()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o600}
    line = took.where.audit.entries[-1]
    assert (line["event"], line["kind"], line["fingerprint"]) == ("decided", "benefit", kept.adapter)

    shown = cli("client", "adapter", took.state)
    assert str(folder) in shown.out
    assert json.loads(cli("client", "adapter", "--state", took.state, "--json").out)["personal"] == [said]
    again = cli(*arguments(took))
    assert again.code == 0, again.err
    assert folders(took) == [folder], "the same seed makes the same adapter"


def test_a_statement_that_was_changed_is_none(took: Hospital, cli: Any) -> None:  # noqa: F811
    assert cli(*arguments(took)).code == 0
    path = folders(took)[0] / statement.STATEMENT
    path.write_text(path.read_text().replace('"choice": "', '"choice": "no '))
    with pytest.raises(errors.TrustError, match="was changed after it was signed"):
        statement.read(path)
    assert statement.kept(took.where) == []


def test_without_an_accepted_adapter_there_is_nothing_to_train_on(hospital: Hospital, cli: Any) -> None:  # noqa: F811
    assert hospital.finish(hospital.initial) == "pending"
    assert cli(*arguments(hospital)).code == TRUST
    assert not (hospital.state / statement.FOLDER).exists()


def test_who_does_not_want_it_is_not_trained(took: Hospital, cli: Any) -> None:  # noqa: F811
    took.settings.write_text(took.settings.read_text() + "enabled = false\n")
    assert cli(*arguments(took)).code == CONFIG


@pytest.mark.parametrize("point", ["file-opened:2", "file-renamed:1"])
def test_a_kill_leaves_no_half_adapter_and_the_next_run_makes_it(
    took: Hospital,
    tiny: Any,
    cli: Any,  # noqa: F811
    point: str,
) -> None:
    command = [sys.executable, "-m", "fedvfm.cli.main", *arguments(took)]
    environment = {**tiny.environment(), "FEDVFM_FAULT_POINT": point}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert statement.kept(took.where) == []
    assert cli("client", "adapter", took.state).code == 0
    assert cli(*arguments(took)).code == 0
    (folder,) = folders(took)
    assert [row.folder for row in statement.kept(took.where)] == [folder]
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.fixture
def keeping(tiny: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Hospital:
    """A hospital of a federation whose heads stay at the sites; it trained round 1 and accepts the final adapter."""
    chosen = recipes.written(tiny.experiment)
    kind = getattr(request, "param", "head-local")
    options = {"personal": 2} if kind == "dual" else {}
    changes = {
        "personal": schema.RecipePersonal(kind=kind),
        "adapter": chosen.adapter.model_copy(update={"options": options}),
    }
    kept = chosen.model_copy(update=changes)
    site = joined(tiny, locking.make(kept), tmp_path)
    site.write('accept = "always"')
    site.settings.write_text(site.settings.read_text() + "\n[personal]\nrounds = 1\n")
    return site


def test_what_stays_is_in_what_the_hospital_accepts_predicts_with_and_chooses(
    keeping: Hospital,
    cli: Any,  # noqa: F811
) -> None:
    reply = keeping.train()
    assert not reply.has_error(), reply.error
    update = protocol.decode_update(reply.content, keeping.initial).state
    own = groups.personal(keeping.lock.manifest, "head-local")
    assert own
    assert not own & set(update)
    final = state.AdapterState({**keeping.initial, **update})
    assert keeping.finish(final) == "accepted"

    (accepted,) = (path for path in (keeping.state / "adapters").iterdir() if path.is_dir())
    used = fedvfm.load_adapter(accepted).read()
    assert checkpoint.read(accepted / decisions.GLOBAL)[0] == final
    assert {name for name in used if used[name].tobytes() != final[name].tobytes()} == own
    assert "it must not leave the site" in (accepted / "README.md").read_text()

    _, said = personalised(keeping, cli)
    assert said.fingerprint == final.fingerprint
    assert {choice.GLOBAL, choice.PARTIAL, choice.PERSONAL} <= set(said.scores)
    private = [path for part in ("sent", "adapters", "personal") for path in (keeping.state / part).rglob("*")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in private if path.is_file()} == {0o600}


@pytest.mark.parametrize("keeping", groups.BESIDE, indirect=True)
def test_what_was_trained_beside_is_kept_with_what_the_hospital_accepts_and_chosen_from(
    keeping: Hospital,
    cli: Any,  # noqa: F811
) -> None:
    reply = keeping.train()
    assert not reply.has_error(), reply.error
    update = protocol.decode_update(reply.content, keeping.initial).state
    final = state.AdapterState({**keeping.initial, **update})
    assert keeping.finish(final) == "accepted"

    (accepted,) = (path for path in (keeping.state / "adapters").iterdir() if path.is_dir())
    assert fedvfm.load_adapter(accepted).read() == final, "what was scored and accepted is the global adapter"
    kind = keeping.lock.recipe.personal.kind
    beside = checkpoint.read(accepted / decisions.BESIDE)[0]
    moved = {name for name in beside if (beside[name] != final[name]).any()}
    assert moved
    assert moved <= groups.kept(keeping.lock.manifest, kind)
    assert "this folder must not leave the site" in (accepted / "README.md").read_text()

    shutil.rmtree(keeping.where.sent)  # what was accepted stands by itself
    folder, said = personalised(keeping, cli)
    assert {choice.GLOBAL, choice.PARTIAL, choice.PERSONAL} <= set(said.scores)
    assert fedvfm.load_adapter(folder).read().fingerprint == said.adapter
    private = [path for part in ("adapters", "personal") for path in (keeping.state / part).rglob("*")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in private if path.is_file()} == {0o600}


def test_a_hospital_whose_arrays_were_purged_does_not_go_on_unseen(keeping: Hospital) -> None:
    assert not keeping.train().has_error()
    shutil.rmtree(keeping.where.sent)
    reply = keeping.train(2)
    assert protocol.error_word(reply) == "adapter"
