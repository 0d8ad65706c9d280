"""``server.toml``: what cannot be is refused as it is read, in sentences."""

from __future__ import annotations

from typing import Any

import pytest

from fedvfm import errors
from fedvfm.config import schema


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        (
            {"quorum": 3, "cohort": 2},
            r"cohort = 2: no round could reach quorum = 3; give at least 3, or 0 for all sites",
        ),
        ({"without": "north"}, r'without = \'north\': give a list of names, as without = \["north"\]'),
    ],
)
def test_what_cannot_be_is_refused_at_reading(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(errors.ConfigError, match=fault):
        schema.parse(schema.ServerConfig, values, "server.toml")


@pytest.mark.parametrize(
    "values", [{"quorum": 3}, {"cohort": 2}, {"quorum": 2, "cohort": 2}, {"without": ["north"]}, {}]
)
def test_what_can_be_is_taken_and_travels_as_json(values: dict[str, Any]) -> None:
    read = schema.parse(schema.ServerConfig, values, "server.toml")
    assert schema.ServerConfig.model_validate_json(read.model_dump_json()) == read
