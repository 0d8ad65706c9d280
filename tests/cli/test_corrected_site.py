"""A site that joins a recipe with control variates: what its people read, what it refuses, and a rehearsal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedvfm.client import privacy_report, site_file
from fedvfm.client import state_folder as joining
from fedvfm.client.gate import policy
from fedvfm.config import schema
from fedvfm.model import locking
from fedvfm.server import state_folder as enrolment
from fedvfm.trust import recipes

pytestmark = pytest.mark.slow


def test_a_site_is_told_of_the_correction_and_rehearses_a_round_of_it(tiny: Any, cli: Any, tmp_path: Path) -> None:
    values = recipes.written(tiny.experiment).model_dump(exclude={"aggregation", "optimiser"})
    optimiser = {"name": "sgd", "learning_rate": 1e-2, "batch_size": 4, "control_variates": True}
    more = {"aggregation": {"weighting": "uniform"}, "optimiser": optimiser}
    locked = locking.make(schema.Recipe.model_validate({**values, **more}))
    server = enrolment.init(tmp_path / "server", enrolment.Plan("trial", "127.0.0.1:9", (), ("east",)), locked)
    file, text = tmp_path / "site.toml", tiny.site("east")
    file.write_text(text)
    rules = policy.accepting(privacy_report.judge(locked, site_file.read_site(file)).facts)
    file.write_text(text + rules.replace("min_train_units = 10", "min_train_units = 1"))
    invite = joining.read_invite(server.invite_path("east"), server.fingerprint())
    site = joining.join(tmp_path / "east", invite, locked.hash)
    review = cli("client", "review", locked.hash, "--state", site.folder)
    assert "corrected by the coordinator (SCAFFOLD)" in " ".join(review.out.split()), review.err
    answer = cli("client", "rehearse", file, "--state", site.folder)
    assert answer.code == 0, answer.err
    assert "update, every round" in answer.out
    file.write_text(file.read_text().replace('optimisers = ["sgd"]', 'optimisers = ["adamw"]'))
    refused = cli("client", "rehearse", file, "--state", site.folder)
    assert refused.code != 0
    assert "sgd" in refused.err
