"""The example of a site's file: it parses, accepts nothing as it stands, and explains every key there is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pydantic
import pytest

from fedvfm import config, privacy_config, site_policy
from fedvfm.client import policy

EXAMPLE = Path(__file__).parents[2] / "client" / "site.example.toml"
SHOWN = re.compile(r'# ((?:[a-z_]+|"[^"]+") = .*)')


def uncommented() -> dict[str, Any]:
    """The example with every key that it only mentions."""
    lines = EXAMPLE.read_text().splitlines()
    heads = [re.sub(r"^# (?=\[[a-z.]+\])", "", line) for line in lines]
    return tomllib.loads("\n".join(SHOWN.sub(r"\1", line) if SHOWN.fullmatch(line) else line for line in heads))


def test_as_it_stands_it_accepts_nothing() -> None:
    found = config.parse(config.SiteConfig, config.read_toml(EXAMPLE), "example")
    assert found.policy == config.PolicyConfig()
    assert found.limits == config.LimitsConfig()
    assert found.policy.final.accept == "never"
    assert policy.read(EXAMPLE) == config.PolicyConfig()


def test_what_it_mentions_parses() -> None:
    found = config.parse(config.SiteConfig, uncommented(), "example")
    assert found.policy.max_rounds > 0
    assert found.policy.when is not None
    assert found.policy.final.min_score is not None
    assert found.limits.threads > 0


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ((), config.SiteConfig),
        (("split",), config.SiteSplit),
        (("limits",), config.LimitsConfig),
        (("policy",), config.PolicyConfig),
        (("policy", "privacy"), config.PrivacyPolicy),
        (("policy", "final"), site_policy.FinalPolicy),
        (("privacy",), privacy_config.Budget),
    ],
)
def test_every_key_is_in_it_and_no_other(path: tuple[str, ...], model: type[pydantic.BaseModel]) -> None:
    table = uncommented()
    for step in path:
        table = table[step]
    assert set(table) - set(model.model_fields) == set()
    assert set(model.model_fields) - set(table) <= {"schema_version"}


def test_every_key_of_the_policy_has_its_words() -> None:
    lines = EXAMPLE.read_text().splitlines()
    for line in lines[lines.index("[policy]") :]:
        if SHOWN.fullmatch(line) and "=" in line and not line.startswith('# "'):
            assert "  #" in line, line
