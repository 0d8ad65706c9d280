"""Kinds of faults in data: a stable code for each, which faults and errors carry from where they are raised.

>>> raise defect.LINK.error(f"{path}: a link that leads nowhere; bring the file, or remove the link")
>>> faults.append(defect.MASK_MISSING.fault(f"{path}: no mask; add it, or move the image away"))

Texts may hold file names, which in a hospital often are patient numbers; code, problem and values may be shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from fedvfm import errors


class Kind(str):
    """A code; ``problem`` says what it means in words that name no file."""

    problem: str

    def __new__(cls, code: str, problem: str) -> Self:
        """A kind, known by its code from now on."""
        kind = super().__new__(cls, code)
        kind.problem = problem
        KINDS[code] = kind
        return kind

    def fault(self, text: str, values: Sequence[int] = ()) -> errors.Fault:
        """A fault of this kind; ``values`` are the numbers of a mask that it is about."""
        return errors.Fault(text, str(self), values)

    def error(self, text: str, values: Sequence[int] = ()) -> errors.DataError:
        """The same to raise."""
        return errors.DataError(text, code=str(self), values=values)


KINDS: dict[str, Kind] = {}
"""All kinds by their codes; :mod:`fedvfm.data.readiness.catalogue` has why each matters and what to do."""

UNREADABLE = Kind("unreadable", "damaged, cut short or unknown content")
NOT_FOUND = Kind("not-found", "files that do not exist")
TOO_SMALL = Kind("too-small", "images of fewer than 2 x 2 pixels")
TOO_LARGE = Kind("too-large", "files that unpack to more than is read")
DECODING_MEMORY = Kind("decoding-memory", "files that take more memory to decode than is allowed")
DECODING_TIME = Kind("decoding-time", "files that take longer to decode than is allowed")
DECODER_DIED = Kind("decoder-died", "files that their decoder dies of")
SEVERAL_PAGES = Kind("several-pages", "files with several pages")
VALUE_RANGE = Kind("value-range", "values outside the range of their kind of file")
NOT_FINITE = Kind("not-finite", "values that are no finite numbers")
TURNED = Kind("turned", "pictures that say in a doubtful way how they are turned")
MASK_MISSING = Kind("mask-missing", "images without a mask")
IMAGE_MISSING = Kind("image-missing", "masks without an image")
LABEL_MISSING = Kind("label-missing", "images without a label")
LABEL_NOT_DECLARED = Kind("label-not-declared", "images of a class that the site does not label")
MASK_SIZE = Kind("mask-size", "mask and image of different size")
MASK_GEOMETRY = Kind("mask-geometry", "mask and image on different grids")
MASK_VALUE = Kind("mask-value", "mask values that are no class")
MASK_COLOUR = Kind("mask-colour", "masks in colour")
MASK_OVERLAP = Kind("mask-overlap", "segments that overlap, or versions of one structure")
KINDS_MIXED = Kind("kinds-mixed", "pictures and volumes, or DICOM and other files, mixed in one case")
CHANNELS = Kind("channels", "other channels than the model takes")
CHANNELS_MISSING = Kind("channels-missing", "cases whose channel files are not all there")
FOUR_AXES = Kind("four-axes", "volumes with more than three axes")
NO_GEOMETRY = Kind("no-geometry", "volumes that do not say how they lie")
SERIES_MIXED = Kind("series-mixed", "several series in one study")
SLICES_MISSING = Kind("slices-missing", "series with missing, doubled or unevenly spaced slices")
GREY_UNITS = Kind("grey-units", "grey values that are not scaled alike, or not in Hounsfield units")
FRAMES_UNPLACED = Kind("frames-unplaced", "frames that do not say where they lie")
PIXEL_SIZE = Kind("pixel-size", "series without the size of a pixel")
LINK = Kind("link", "links that lead nowhere, to a folder or out of the data")
MODALITY = Kind("modality", "images of another modality")
COMPRESSED = Kind("compressed", "packed in a way that cannot be read here")
ENDING = Kind("ending", "files and folders that are not read")
NAME_TWICE = Kind("name-twice", "two files of one name")
CLASS_UNKNOWN = Kind("class-unknown", "folders or labels that stand for no class")
CLASS_EMPTY = Kind("class-empty", "class folders without images")
SLIDE_SCALE = Kind("slide-scale", "whole slides whose scale is not known, or too coarse")
SLIDE_LEVELS = Kind("slide-levels", "whole slides that cannot be read by region, or have no small level")
SLIDE_NEEDED = Kind("slide-needed", "whole slides where the recipe takes none, or other images where it takes slides")
NO_TISSUE = Kind("no-tissue", "whole slides without tissue")
VOLUME_NEEDED = Kind("volume-needed", "pictures where the recipe needs volumes")
WHOLE_SLIDE = Kind("whole-slide", "whole-slide images")
COLUMN_RANGE = Kind("column-range", "values of a column outside of what the recipe declares")
TABLE = Kind("table", "the table does not fit the files")
DATASET_JSON = Kind("dataset-json", "dataset.json does not say what it must")
OPTIONS = Kind("options", "the folder or its settings do not fit")
NO_SAMPLES = Kind("no-samples", "no samples")
IMAGE_NEEDED = Kind("image-needed", "cases of many images where one image is needed")
CASE_EMPTY = Kind("case-empty", "cases without images")
CASE_MIXED = Kind("case-mixed", "cases whose images differ in label, patient, site or split")
PATIENT_ACROSS_SPLITS = Kind("patient-across-splits", "patients in more than one split")
STRUCTURE = Kind("structure", "other faults")
READER_FAILED = Kind("reader-failed", "the reader broke")


def damaged(where: object, reason: object) -> errors.DataError:
    """A file that cannot be read to its end."""
    return UNREADABLE.error(f"{where}: damaged or cut short ({reason}); copy the file again or remove it")


def of(fault: object) -> Kind:
    """The kind of a fault or an error; :data:`STRUCTURE` for one without, as sources of third parties may have."""
    return KINDS.get(getattr(fault, "code", ""), STRUCTURE)
