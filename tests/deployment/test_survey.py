"""A survey over a real server and two real hospitals, before any round."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedvfm.audit import audit, cross_check
from fedvfm.client import state_folder
from fedvfm.server import surveys
from tests.cli import conftest as cli
from tests.deployment import two_hospitals

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_left")]
TERMS = '[policy]\nsurveys = ["patients", "sizes", "class-shares"]\nmax_hours = 1.0\n'
SECONDS = 600.0


def test_two_hospitals_answer_a_paused_federation(tiny: Any, tmp_path: Path, until: Callable[..., bool]) -> None:
    data = cli.write_data(tmp_path / "data", two_hospitals.SITES, 20)
    (tmp_path / "survey.toml").write_text(
        'title = "discs"\ntask = "segmentation"\nclass_names = ["background", "disc"]\n'
        'statistics = ["patients", "sizes", "class-shares"]\nleast_patients = 5\n'
    )
    with two_hospitals.enrolled(tiny, tmp_path, tiny.recipe) as two:
        for site in two.names:
            two.settings(site).write_text(tiny.site(site, data) + TERMS)

        def server(*words: str | Path) -> dict[str, Any]:
            done = tiny.run("server", *words, "--state", two.server.folder, "--json")
            assert done.code == 0, done.err
            values: dict[str, Any] = json.loads(done.out)
            return values

        server("pause")
        two.start_server()
        two.start_clients()
        survey = server("survey", tmp_path / "survey.toml")["survey"]
        pending = dict.fromkeys(two.names, "approval-pending")
        assert until(lambda: surveys.words(two.server, survey) == pending, SECONDS), two.said()
        for site, where in two.sites.items():
            seen = where.find_survey(survey)
            assert seen is not None
            state_folder.approve_survey(where, seen)
            assert until(lambda site=site: site in surveys.answered(two.server, survey), SECONDS), two.said()
        out = tmp_path / "out"
        server("survey", "--output", out)
        values = json.loads((out / "survey.json").read_text())
        assert values["sites"] == list(two.names)
        assert 20 <= values["patients"] < 40
        assert values["groups"]["rows"]["patients"][0] == values["patients"]  # all are 28 pixels high
        assert not list(two.server.folder.glob("runs/*/journal.jsonl"))
        two.end()
    for where in two.sites.values():
        entries = audit.read(where.audit_path)
        assert cross_check.log(two.server.audit_path, entries, str(where.audit_path)).agreed > 0
        sent = [entry for entry in entries if entry["event"] == "sent" and entry["kind"] == "survey"]
        assert [entry["metrics"] for entry in sent] == [["patients", "sizes", "class-shares"]]
