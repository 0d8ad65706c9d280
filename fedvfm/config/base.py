"""What every config stands on: strict types, no unknown keys, and the kinds of values that several of them have."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from pydantic import Field

Name = Annotated[str, Field(min_length=1, max_length=200)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def names() -> Any:
    """The field of a list of names that may be left out."""
    return Field(default=(), strict=False)


SETTINGS = pydantic.ConfigDict(
    strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
)
"""Of all configs: strict types, no unknown keys, immutable, no NaN.

The text below a field is its reference (:mod:`fedvfm.config.reference`): ``(unit) Meaning. Change: when.``
"""
