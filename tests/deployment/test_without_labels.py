"""A hospital with labels and one without, each with its own file, by the real commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedvfm.client.gate import policy
from tests.deployment import two_hospitals

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_left")]


def test_a_hospital_without_labels_waits_trains_and_gets_the_final_adapter_without_a_score(
    tiny: Any, tmp_path: Path, until: Any
) -> None:
    asked = tiny.recipe.replace("input_size = [28, 28]", 'input_size = [28, 28]\naugment = ["flip", "noise"]')
    with two_hospitals.enrolled(tiny, tmp_path, asked + "[unlabelled]\nthreshold = 0.5\n") as two:
        allowed = policy.accepting(policy.Facts.of(two.locked)).replace("units = 10", "units = 1")
        two.settings("east").write_text(tiny.site("east") + allowed)
        two.settings("south").write_text('role = "unlabelled"\n' + tiny.site("south") + allowed)
        two.start_clients()
        server = two.start_server()
        assert until(lambda: server.poll() is not None, 900), two.said()
        assert server.returncode == 0, two.said()
        journal = two.journal()
        assert [line["cohort"] for line in journal] == [["east"], ["east", "south"], ["east", "south"]]
        assert [line.get("without_labels") for line in journal] == [None, ["south"], ["south"]]
        assert all(list(line["validation"]) == ["east"] and not line["refused"] for line in journal)
        assert all(line["norms"]["south"] > 0 for line in journal[1:])
        tested = json.loads((two.run / "evaluation.json").read_text())
        assert tested["last"]["sites"]["south"] == {"num_examples": 0}
        assert tested["acceptance"]["south"] == "pending", "a person decides, without a score"
        codes = {finding["code"] for finding in json.loads((two.run / "summary.json").read_text())["findings"]}
        assert "without-labels" in codes
        entries = two.sites["south"].audit.entries
        assert {name for each in entries for name in each.get("metrics", ())} == {"loss", "seconds", "steps"}
