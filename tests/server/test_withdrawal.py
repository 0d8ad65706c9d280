"""A site withdraws: what its updates are part of is listed, it is refused, and a rerun is as if it had never been."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.aggregators import table as rules
from fedvfm.audit import audit
from fedvfm.client import recipe_review
from fedvfm.config import schema
from fedvfm.server import evidence, rerun, state_folder, status, surveys, withdrawal
from fedvfm.server.coordinator import orders
from fedvfm.state import checkpoint
from fedvfm.storage import storage
from fedvfm.survey import answer as survey_answer
from fedvfm.survey import layout
from fedvfm.trust import roster as rosters
from tests.secure_aggregation.study import COUNTS, Killed, Study
from tests.server.test_coordinate import ROUNDS, Town, make  # noqa: F401 - a fixture
from tests.survey import hospital

LATE = 3
"""The round in which the site that withdraws trains first."""
TIMES = ("seconds", "ended", "peak_mib", "prev", "hash", "recipe", "copied", "bytes")


def town_with_late(make: Callable[..., Town], **values: Any) -> Town:  # noqa: F811
    town = make("east", "west")
    if values:
        start_with(town, **values)
    town.when["round", LATE - 1] = lambda: town.add("late")
    town.run()
    assert ["late" in cohort for cohort in town.cohorts(present(town))] == [False, False, True, True]
    return town


def start_with(town: Town, **values: Any) -> None:
    orders.add_recipe(town.server, town.lock(**values), at_once=True)


def present(town: Town) -> str:
    return state_folder.open_state(town.server.folder).about.recipe


def opened(town: Town) -> state_folder.State:
    return state_folder.open_state(town.server.folder)


def told(cli: Any, town: Town, *words: str) -> dict[str, Any]:
    answer = cli("server", "withdraw", "late", *words, "--state", town.server.folder, "--json")
    assert answer.code == 0, answer.err
    found: dict[str, Any] = json.loads(answer.out)
    return found


def lasting(town: Town, recipe: str = "") -> list[dict[str, Any]]:
    rows = town.journal(recipe or present(town))
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def adapter_of(town: Town) -> str:
    return checkpoint.read(opened(town).run_path(present(town)) / "adapter.safetensors")[0].fingerprint


@pytest.mark.parametrize(
    "values",
    [{}, {"aggregation": {"server_optimiser": "adam", "server_learning_rate": 0.1}}, {"codec": "int8"}],
    ids=["mean", "server-state", "coded"],
)
def test_a_rerun_ends_with_the_bytes_of_a_federation_that_never_had_the_site(
    make: Callable[..., Town],  # noqa: F811
    tmp_path: Path,
    cli: Any,
    values: dict[str, Any],
) -> None:
    town = town_with_late(make, **values)
    before = present(town)
    found = told(cli, town, "--rerun")
    coded = values.get("codec") == "int8"
    assert found["rerun_after"] == (0 if coded else LATE - 1), "what coding lost lies at the sites"
    town.run()
    assert present(town) == found["recipe"] != before
    assert town.trained("east") == [1, 2, 3, 4, *([1, 2] if coded else []), 3, 4]
    assert town.trained("late") == [3, 4], "it is asked nothing more"

    (tmp_path / "never").mkdir()
    never = Town(town.sites, tmp_path / "never", ("east", "west"))
    (never.server.folder / "run").mkdir(mode=0o700)
    if values:
        start_with(never, **values)
    never.run()
    assert lasting(town) == lasting(never)
    assert adapter_of(town) == adapter_of(never)
    assert town.journal(present(town))[-1]["bytes"]["up"] > 0


def test_of_a_site_that_was_there_from_the_start_every_round_is_made_again(
    make: Callable[..., Town],  # noqa: F811
    cli: Any,
) -> None:
    town = make("east", "late", "west")
    town.when["round", 3] = lambda: told(cli, town, "--rerun")  # while the rounds run
    town.run(quorum=2)
    first, locked = town.server.about.recipe, opened(town).lock()
    assert (locked.recipe.rerun, locked.recipe.start) == (schema.Rerun(of=first, after=0), None)
    assert (locked.initial, locked.recipe.first_round) == (town.server.lock().initial, 1)
    assert len(town.journal()) == 3, "the round in hand ended"
    assert "late" not in town.journal()[2]["examples"]
    town.run()
    assert town.cohorts(locked.hash) == [["east", "west"]] * ROUNDS
    assert rules.faults(locked.recipe) == []


def test_the_round_in_hand_may_hold_its_update(
    make: Callable[..., Town],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server runs, and the site's first round is not in the journal yet: the rounds before stand, no more."""
    town = make("east", "west")
    town.when["round", LATE - 1] = lambda: town.add("late")
    town.when["round-end", LATE - 1] = lambda: orders.pause(town.server)
    town.when["note", "paused"] = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        town.run()
    monkeypatch.setattr(withdrawal, "_runs", lambda where: True)
    for _ in range(2):  # asked again it says the same
        row = withdrawal.withdraw(opened(town), "late").touched[0]
        assert (row.first, row.last, row.rounds) == (LATE, LATE - 1, ())
    withdrawal.path_of(town.server, "late").unlink()  # as if the first call had been killed before it was written
    assert withdrawal.withdraw(opened(town), "late").touched[0].first == LATE
    monkeypatch.undo()
    assert withdrawal.withdraw(opened(town), "late").touched == (), "the server ended before that round did"


@pytest.mark.parametrize("settled", [False, True])
def test_masked_numbers_of_the_round_in_hand_go_or_the_round_is_listed(
    make: Callable[..., Town],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settled: bool,
) -> None:
    """The server was killed in a round under secure aggregation; a sum that is settled is opened with the site."""
    town = make("east", "north", "south", "west", min_sites=3, secure_aggregation={"clip_norm": 50.0})
    study = Study(tmp_path / "study")
    study.recipe = town.server.lock().recipe
    folder = town.server.run_path(study.recipe.hash)
    folder.parent.mkdir()
    folder.symlink_to(study.folder / "server")
    left = [1 if settled else len(COUNTS)]

    def die(name: str) -> None:
        left[0] -= name == ("secure-survivors-kept" if settled else "update-kept")
        if left[0] == 0:
            raise Killed(name)

    monkeypatch.setattr(storage, "fault_point", die)
    with pytest.raises(Killed):
        study.run(rounds=1)
    monkeypatch.undo()
    rows = withdrawal.withdraw(opened(town), "west").touched
    assert [(row.first, row.rounds) for row in rows] == [(1, ())] * settled
    assert (orders.read(town.server).paused is not None) is settled
    study.sites = [site for site in study.sites if site.name != "west"]
    study.run(rounds=1)
    assert ("west" in study.journal()[0]["examples"]) is settled
    rows = withdrawal.withdraw(opened(town), "west").touched
    assert [(row.first, row.rounds) for row in rows] == [(1, (1,))] * settled


def test_what_its_updates_are_part_of_is_listed_signed_and_noted(
    make: Callable[..., Town],  # noqa: F811
    cli: Any,
    tmp_path: Path,
) -> None:
    town = town_with_late(make)
    first = present(town)
    evidence.write(town.server, tmp_path / "e")
    orders.extend(town.server, 2)  # goes on from its adapter
    second = present(town)
    town.run()
    kept = {path.stem for path in (town.server.run_path(first) / "checkpoints").iterdir()}
    assert kept == {"round-00002", "round-00003", "round-00004"}, "the round before it came in is kept, as is the last"

    answer = cli("server", "withdraw", "late", "--state", town.server.folder)
    assert answer.code == 0, answer.err
    assert f"recipe {first[:12]}: its updates joined 2 rounds; every adapter from round 3 to 4 has a part" in answer.out
    assert f"makes rounds 3 to 4 of recipe {first[:12]} again without it; then 'fedvfm server extend'" in answer.out
    assert f"--rerun --state {town.server.folder}" in answer.out

    document = withdrawal.read(town.server, "late")
    rows = {row.recipe: row for row in document.touched}
    assert (rows[first].first, rows[first].rounds, rows[second].first) == (3, (3, 4), 0)
    assert rows[second].rounds == (1, 2)
    places = {file.path for file in rows[first].files}
    assert f"runs/{first}/adapter.safetensors" in places
    assert f"runs/{first}/checkpoints/round-00002.safetensors" not in places
    assert f"recipes/{second}.safetensors" in {file.path for file in rows[second].files}
    assert len(document.evidence) == 1
    kinds = [line["kind"] for line in town.server.audit.entries if line["event"] == "steered"]
    assert kinds == ["extend", "recipe", "withdraw"]
    evidence.write(town.server, tmp_path / "f", first)
    page = (tmp_path / "f" / "data-protection.html").read_text()
    assert "Hospitals that withdrew" in page

    path = withdrawal.path_of(town.server, "late")
    assert path.stat().st_mode & 0o077 == 0
    path.write_text(path.read_text().replace('"first": 3', '"first": 4'))
    with pytest.raises(errors.TrustError, match="was changed after this federation's server signed it"):
        withdrawal.read(town.server, "late")

    planned = rerun.plan(opened(town), document)
    assert planned is not None
    assert (planned.of, planned.after, planned.again) == (first, 2, (second,))


def test_it_is_refused_from_then_on(make: Callable[..., Town], cli: Any) -> None:  # noqa: F811
    town = make("east", "late", "west")
    town.when["round-end", 1] = lambda: withdrawal.withdraw(town.server, "late")
    town.when["note", "paused"] = lambda: orders.resume(town.server)
    town.run(quorum=2)
    assert town.cohorts() == [["east", "late", "west"], *[["east", "west"]] * (ROUNDS - 1)]
    where = town.server
    assert where.sites()["late"].status == rosters.WITHDRAWN
    assert state_folder.revoke(where, "late").status == rosters.WITHDRAWN, "a revoked site could be invited again"
    for do in (state_folder.invite, orders.readmit):
        with pytest.raises(errors.TrustError, match=r"withdrew at|is withdrawn, not dropped"):
            do(where, "late")
    assert status.of(where)["sites"]["late"]["state"] == "withdrawn"
    state_folder.invite(where, "other")
    answer = cli("server", "withdraw", "other", "--state", where.folder)
    assert (answer.code, "never took part" in answer.err) == (errors.TrustError.exit_code, True)


def test_what_it_is_part_of_can_be_removed_once_the_rerun_is_the_present_recipe(
    make: Callable[..., Town],  # noqa: F811
    cli: Any,
) -> None:
    town = town_with_late(make)
    first, asked = present(town), hospital.ask(statistics=["patients"])
    surveys.publish(town.server, asked)
    for site in ("east", "late"):
        values = {"patients": (40 * layout.WHOLE,)}
        reply = survey_answer.Answer(survey=asked.hash, site=site, least=10, values=dict(values))
        surveys.keep(town.server, asked, site, survey_answer.text(reply))
    tracked = town.server.run_path(first) / "track-mlflow-0.json"
    tracked.write_text("{}")
    answer = cli("server", "withdraw", "late", "--purge", "--state", town.server.folder)
    assert (answer.code, "the present one, has a part of 'late'" in answer.err) == (errors.ConfigError.exit_code, True)
    assert list(surveys.answers(town.server, asked)) == ["east"], "an answer of a site that withdrew counts no more"
    assert len(surveys.answer_paths(town.server, "late")) == 1
    assert told(cli, town, "--rerun", "--purge")["removed"] >= 4
    assert surveys.answer_paths(town.server, "late") == []
    assert tracked.exists(), "else the tracker would take all rounds once more"
    left = {str(path.relative_to(town.server.run_path(first))) for path in town.server.run_path(first).rglob("*.*")}
    assert {one for one in left if not one.startswith(".")} >= {"journal.jsonl", "evaluation.json"}
    assert not any("round-00003" in one or "round-00004" in one or one == "adapter.safetensors" for one in left)
    assert audit.read(town.server.audit_path)[-1]["event"] == "purged"
    town.run()
    assert town.cohorts(present(town)) == [["east", "west"]] * ROUNDS, "the rounds that stand are copied"
    assert withdrawal.withdraw(opened(town), "late").touched[0].files == ()
    assert rerun.plan(opened(town), withdrawal.read(opened(town), "late")) is None


def test_two_sites_withdraw_one_after_the_other(make: Callable[..., Town], cli: Any) -> None:  # noqa: F811
    town = make("east", "west")
    town.when["round", 1] = lambda: town.add("next")
    town.when["round", LATE - 1] = lambda: town.add("late")
    town.run()
    assert told(cli, town, "--rerun")["rerun_after"] == 2
    town.run()
    answer = cli("server", "withdraw", "next", "--rerun", "--state", town.server.folder, "--json")
    assert json.loads(answer.out)["rerun_after"] == 1, answer.err
    town.run()
    assert town.cohorts(present(town)) == [["east", "west"]] * ROUNDS
    assert town.journal(present(town))[0]["fingerprint"] == town.journal()[0]["fingerprint"]


def test_a_site_reads_what_a_rerun_is_and_a_rerun_of_ones_own_is_refused(
    make: Callable[..., Town],  # noqa: F811
    cli: Any,
) -> None:
    town = town_with_late(make)
    told(cli, town, "--rerun")
    words = dict(recipe_review.words(opened(town).lock()))["starts from"]
    assert f"a hospital withdrew from recipe {town.server.about.recipe[:12]}; rounds 3 to 4 are made again" in words
    assert "late" not in words
    other = town.lock(rerun={"of": "ab" * 32, "after": 2}, start="cd" * 32)
    state_folder.keep_recipe(town.server, other)
    orders._turn_to(opened(town), other.hash)
    with pytest.raises(errors.ConfigError, match="rounds 1 to 2 are not here"):
        town.run()
    for wrong in ({"of": "ab" * 32, "after": ROUNDS}, {"of": "ab" * 32, "after": 1}):
        with pytest.raises(errors.ConfigError, match="rerun"):
            town.sites.make_recipe(rounds=ROUNDS, rerun=wrong)
