"""Errors of sources, sorted by kind. Their text may hold file names, so only the kind and bare numbers go on.

File names and folders in a hospital often are patient numbers. What an error says in full goes into the list of
affected files alone, which the hospital asks for by name.
"""

from __future__ import annotations

import re

KINDS: tuple[tuple[str, str], ...] = (
    (r"no such folder|no known layout", "options"),
    (r"a patient with images in|the patient of sample", "patient-across-splits"),
    (r"label .* stands for no class|no class of data\.options", "class-unknown"),
    (r"no such file|download failed", "not-found"),
    (r"same name as|listed twice|of this name is there|masks in derivatives|its mask in", "name-twice"),
    (r"recipe\.data\.channels", "channels"),
    (r"\.(csv|tsv): |no row for image|has no image; remove|has no (patient|split|site);|in the column", "table"),
    (r"channels \d.*names \d|no channel number", "channels-missing"),
    (r"dataset\.json|datalist|numTraining", "dataset-json"),
    (r": no (mask|label)\b|no mask for|no segmentation", "mask-missing"),
    (r": no (DICOM )?image\b", "image-missing"),
    (r"ending '.*' is not read|a folder inside|outside of a study", "ending"),
    (r"a picture, but recipe|no volume; these", "volume-needed"),
    (r"whole-slide", "whole-slide"),
    (r"how their values are scaled|several units|not in Hounsfield", "grey-units"),
    (r"a mosaic, many|projections of a tomography|nor that they are moments|how far apart", "frames-unplaced"),
    (r"how large a pixel is", "pixel-size"),
    (r"link (that|to)", "link"),
    (r"slices? (is |are )?missing|unevenly spaced|images at \d+ places|do not lie on one line", "slices-missing"),
    (r"\d+ series( that fit .*)?, one|no series fits|in different directions|in one .*series", "series-mixed"),
    (r"modality \S+, but", "modality"),
    (r"pixels packed as|packed in a way|transfer syntax", "compressed"),
    (r"segments overlap", "mask-overlap"),
    (r"differ in size, spacing or place|another grid|lies elsewhere|made on other images|shown with", "mask-geometry"),
    (r"pixels for an image of|is turned by EXIF|pixels, .* is \d+ x \d+|its label \d+ x", "mask-size"),
    (r"is no class\b|no whole numbers|a mask with value", "mask-value"),
    (r"mask in colour|another colour for number|numbers have one colour", "mask-colour"),
    (r"are read at most|more than the \d+ bytes|larger than", "too-large"),
    (r"no finite numbers", "not-finite"),
    (r"holds \d+ pages", "several-pages"),
    (r"values from .* (float|16-bit) picture", "value-range"),
    (r"\d+ channels|channels = |samples a pixel|(colour|complex) voxels|in colour|has channels of its own", "channels"),
    (r"; one volume of (two or )?three axes", "four-axes"),
    (r"how the axes lie|right angles|where they lie|affines disagree|no image and no position", "no-geometry"),
    (r"pixels, at least", "too-small"),
    (r"/: no images", "class-empty"),
    (r"no images; these are read|no samples", "no-samples"),
    (r"data\.options|class folder", "options"),
    (r"unreadable|damaged|cut short|cannot be read|no DICOM", "unreadable"),
)
"""Pattern and code, in the order they are tried, on a text from which file names were taken."""

_NAMES = re.compile(r"^.*?\.(png|jpe?g|tiff?|bmp|nii|nii\.gz|nrrd|dcm)(?=[: ])|'[^']*'|\S+/\S*[^:\s/]")
_VALUE = re.compile(r"\bvalue (-?\d{1,6})\b")


def kind(message: str) -> str:
    """The code of an error's text; "structure" for one that fits no kind."""
    # A file called "series" must not decide.
    plain = _NAMES.sub("''", message)
    return next((code for pattern, code in KINDS if re.search(pattern, plain)), "structure")


def value(message: str) -> int | None:
    """The mask value an error complains of: a bare number, safe to show."""
    found = _VALUE.search(message)
    return int(found[1]) if found else None
