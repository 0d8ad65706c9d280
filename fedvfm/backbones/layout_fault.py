"""What is said where a file's arrays are not those of the layout that it is read as."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fedvfm import errors


@contextlib.contextmanager
def raised(model: str, whose: str = "its") -> Iterator[None]:
    """Around what reads a model's settings off the shapes of its arrays.

    Args:
        model: what it is, for a person.
        whose: of whom the shapes should be.

    Raises:
        WeightsError: if an array is missing, or has not the dimensions that it should have.
    """
    try:
        yield
    except KeyError as error:
        raise errors.WeightsError(f"this is no whole {model}: it lacks {error}. Download it again") from None
    except (IndexError, ValueError, ZeroDivisionError):
        raise errors.WeightsError(
            f"this is no whole {model}: arrays are not of the shapes that {whose} have. Download it again"
        ) from None
