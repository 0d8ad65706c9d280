"""Parts that are installed apart: fedvfm alone is a coordinator, which needs no torch; what computes is an extra."""

from __future__ import annotations

import importlib.util

from fedvfm import errors

CLIENT: dict[str, str] = {
    "torch": "torch",
    "PIL": "pillow",
    "gdcm": "python-gdcm",
    "huggingface_hub": "transformers",
    "monai": "monai",
    "nibabel": "nibabel",
    "nrrd": "pynrrd",
    "opacus": "opacus",
    "peft": "peft",
    "pydicom": "pydicom",
    "transformers": "transformers",
}
"""Import name -> the package of the extra ``client`` that brings it."""
SLIDES: dict[str, str] = {"tifffile": "tifffile", "imagecodecs": "imagecodecs"}
"""The same of the extra ``slides``, which whole slides are read with."""


def missing(error: ModuleNotFoundError) -> errors.MissingExtra | None:
    """What to tell a person where an import failed; None where no part of fedvfm is missing, but something broke."""
    name = (error.name or "").partition(".")[0]
    if name in SLIDES:
        return errors.MissingExtra(
            f"whole slides need {SLIDES[name]}, which is not installed here. Run: pip install 'fedvfm[slides]'"
        )
    return _lacking(name) if name in CLIENT else None


def require() -> None:
    """Refuse before anything is begun that needs the extra ``client``, for instance processes of their own.

    Raises:
        MissingExtra: naming a package that is not installed.
    """
    for name in CLIENT:
        if not _installed(name):
            raise _lacking(name)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _lacking(name: str) -> errors.MissingExtra:
    return errors.MissingExtra(
        f"this command needs {CLIENT[name]}, which is not installed here: it trains, predicts or reads images, and a "
        'coordinator alone does none of it. Run: pip install "fedvfm[client]"; on Linux without a GPU install a CPU '
        "build of torch first"
    )
