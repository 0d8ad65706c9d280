"""The NumPy sites, for every test of the server wing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server import numpy_sites


@pytest.fixture(scope="session")
def sites() -> Any:
    """The module ``numpy_sites`` beside this file."""
    return numpy_sites
