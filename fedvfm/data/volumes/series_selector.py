"""Which series of a DICOM folder is meant, in words that name no patient: those the list of series is shown in.

``"3"`` (the series number), ``"CT"``, ``"axial"``, ``"512x512"``, ``"40-images"``, ``"1.25mm"`` from slice to slice,
and ``"most"``: of those that are left the one with the most images. All words must hold: ``"CT axial most"``.
Descriptions of series are text that may name a patient; they are never read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

from fedvfm import errors
from fedvfm.data.volumes import dicom, geometry

MOST = "most"
KNOWN = f"a series number, a modality (CT, MR, ...), {', '.join(geometry.ACROSS)}, 512x512, 40-images, 1.25mm or {MOST}"
SAME_STEP_MM = 0.01

Test = Callable[[dicom.Series], bool]


def faults(text: str) -> list[str]:
    """What is wrong with the words, one sentence each."""
    if not text.split():
        return ["no word that says which series; give " + KNOWN]
    return [f"'{word}' says nothing of a series; give {KNOWN}" for word in text.split() if _test(word) is None]


def require(text: str, what: str) -> None:
    """Refuse words that are not known, before any file is opened.

    Raises:
        ConfigError: naming them.
    """
    wrong = faults(text)
    if wrong:
        raise errors.ConfigError(what, wrong)


def among(found: Sequence[dicom.Series], text: str) -> list[dicom.Series]:
    """The series that all words fit, in their order; without words all of them."""
    words = text.split()
    tests = [_test(word) for word in words]
    left = [one for one in found if all(test is not None and test(one) for test in tests)]
    if MOST not in [word.lower() for word in words] or not left:
        return left
    images = max(len(one.slices) for one in left)
    return [one for one in left if len(one.slices) == images]


def listed(found: Sequence[dicom.Series]) -> str:
    """One line each, for messages."""
    return "".join(f"\n    {one.described}" for one in found)


@functools.lru_cache(maxsize=64)
def _test(word: str) -> Test | None:
    """What a word asks of a series; None for one that is not known."""
    size, images = re.fullmatch(r"(\d{1,6})x(\d{1,6})", word.lower()), re.fullmatch(r"(\d{1,6})-images?", word.lower())
    step = re.fullmatch(r"(\d{1,4}(?:\.\d{1,4})?)mm", word.lower())
    if re.fullmatch(r"\d{1,9}", word):
        return lambda one: one.number == int(word)
    if word.upper() in dicom.MODALITIES:
        return lambda one: one.modality == word.upper()
    if word.lower() in geometry.ACROSS:
        return lambda one: one.plane == word.lower()
    if size is not None:
        asked = (int(size[1]), int(size[2]))
        return lambda one: all((frame.rows, frame.columns) == asked for frame in one.slices)
    if images is not None:
        return lambda one: len(one.slices) == int(images[1])
    if step is not None:
        return lambda one: one.step is not None and abs(one.step - float(step[1])) <= SAME_STEP_MM
    return (lambda one: True) if word.lower() == MOST else None
