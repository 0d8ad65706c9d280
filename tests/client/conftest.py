"""A hospital with images and a budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.client import private_site


@pytest.fixture
def site(tmp_path: Path) -> private_site.Site:
    return private_site.Site(tmp_path)
