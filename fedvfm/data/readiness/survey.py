"""One pass over the pixels: a small row a sample, running sums, and a list of what could not be read."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import defect
from fedvfm.data import sample as data
from fedvfm.report import progress

BINS = 64
BLANK = 1e-4

Numbered = tuple[int, data.Sample]


@dataclass(frozen=True, slots=True)
class Row:
    """What is kept of one sample's pixels.

    Attributes:
        number: of the sample, from 1 in the source's order.
        sample: which.
        size: (rows, columns).
        colour: whether its channels differ.
        spacing: (row, column) millimetres of a pixel, or None.
        units: what 0 and 1 stand for in the file's units, or None.
        orientation: to where its file's axes run, where the source says so.
        low, high: smallest and largest value.
        median: of the values.
        pixels: digest of the image.
        mask: digest of the mask, or None.
        classes: class numbers in the mask.
        kept: of those but the background, :func:`~fedvfm.data.transforms.kept_dice` at the recipe's size; empty where
            images keep their own.
        file: digest of its file, where the source has one file for it; else None.
        path: that file; never shown.
    """

    number: int
    sample: data.Sample
    size: tuple[int, int]
    colour: bool
    spacing: tuple[float, ...] | None
    units: tuple[float, float] | None
    orientation: str | None
    low: float
    high: float
    median: float
    pixels: bytes
    mask: bytes | None
    classes: frozenset[int]
    kept: Mapping[int, float]
    file: bytes | None
    path: Path | None

    @property
    def volume(self) -> str | None:
        """The volume it is a slice of: as the source says, else the file."""
        if self.sample.part is not None:
            return self.sample.part.volume
        return None if self.path is None else str(self.path)

    @property
    def blank(self) -> bool:
        """Whether the image shows nothing."""
        return self.high - self.low < BLANK


@dataclass(frozen=True, slots=True)
class Failure:
    """A sample that could not be used: its number, kind and values of the error, and its text (never in a report)."""

    number: int
    code: defect.Kind
    message: str
    values: Sequence[int] = ()


@dataclass
class Survey:
    """What the pass found.

    Attributes:
        rows: of the samples that were read.
        failures: of the others.
        histogram: pixels by intensity, :data:`BINS` equal bins of [0, 1].
        total, squares: sum of the values and of their squares, for mean and standard deviation.
        class_pixels: pixels by class.
        seconds: spent in reading.
    """

    num_classes: int
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    total: float = 0.0
    squares: float = 0.0
    class_pixels: NDArray[np.int64] = field(init=False)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        """One counter a class."""
        self.class_pixels = np.zeros(self.num_classes, dtype=np.int64)

    @property
    def mean(self) -> float:
        """Mean of all values; 0 before any."""
        return self.total / max(1, int(self.histogram.sum()))

    @property
    def std(self) -> float:
        """Standard deviation of all values."""
        return float(max(0.0, self.squares / max(1, int(self.histogram.sum())) - self.mean**2) ** 0.5)

    def percentile(self, share: float) -> float:
        """The value below which a share of all pixels lies, to the width of a bin."""
        reached = np.cumsum(self.histogram)
        at = int(np.searchsorted(reached, share * int(reached[-1]))) if reached[-1] else 0
        return (min(at, BINS - 1) + 0.5) / BINS


def look(
    source: data.Source,
    chosen: Sequence[Numbered],
    observer: progress.Observer = progress.silent,
    *,
    files: data.Source | None = None,
    contract: schema.DataContract | None = None,
) -> Survey:
    """Read every chosen sample once and go on past those that cannot be read.

    Args:
        source: where to read.
        chosen: samples with their numbers, in the source's order so that volumes are opened once.
        observer: told ``check`` (done, total) after every sample.
        files: the source that knows the files, where ``source`` is a wrapper of it.
        contract: what a recipe asks of images; what training would refuse by it is refused here.
    """
    found = Survey(len(source.info.class_names))
    digests = _Digests(files or source)
    for done, (number, one) in enumerate(chosen, 1):
        started = time.monotonic()
        try:
            pixels = source.read(one)
            _refuse_unusable(pixels, found.num_classes, source.info.task)
            if contract is not None:
                _refuse_under(pixels, contract)
            _add(found, number, one, pixels, digests, contract)
        except errors.DecoderError:
            raise  # of no file: nothing can be decoded on this machine
        except errors.FedvfmError as error:
            found.failures.append(Failure(number, defect.of(error), str(error), getattr(error, "values", ())))
        except Exception as error:
            # A source of a third party may fail in any way; the other samples still count.
            found.failures.append(Failure(number, defect.READER_FAILED, f"{type(error).__name__}: {error}"))
        found.seconds += time.monotonic() - started
        observer("check", done=done, total=len(chosen))
    return found


def _refuse_unusable(pixels: data.Pixels, num_classes: int, task: str) -> None:
    """What training would refuse later.

    Raises:
        DataError: with the code of the fault.
    """
    image, mask = pixels.image, pixels.mask
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise defect.CHANNELS.error(f"{image.shape[0] if image.ndim else 0} channels; one or three are needed")
    if min(image.shape[1:]) < 2:
        raise defect.TOO_SMALL.error("fewer pixels, at least 2 x 2 are needed")
    if not np.isfinite(image).all():
        raise defect.NOT_FINITE.error("values that are no finite numbers")
    if task == "segmentation" and mask is None:
        raise defect.MASK_MISSING.error("no mask for this image; add one")
    if mask is None:
        return
    if mask.shape != image.shape[1:]:
        raise defect.MASK_SIZE.error(f"a mask of {mask.shape} pixels for an image of {image.shape[1:]}")
    low, high = int(mask.min()), int(mask.max())
    if low < 0 or high >= num_classes:
        raise defect.MASK_VALUE.error(
            f"a mask with value {low if low < 0 else high}, which is no class", [low if low < 0 else high]
        )


def _refuse_under(pixels: data.Pixels, contract: schema.DataContract) -> None:
    """What training would refuse by the recipe: other channels, and values without units under a window.

    Raises:
        DataError: with the code of the fault.
    """
    have, named = 1 if contract.grey else len(pixels.image) // contract.stack, contract.channels
    if named and have != len(named):
        raise defect.CHANNELS.error(
            f"{have} channels, but recipe.data.channels names {len(named)} ({', '.join(named)}); bring those"
        )
    if contract.limits is not None and pixels.units is None:
        raise defect.VOLUME_NEEDED.error(
            "a picture, but recipe.data.window needs values in units; bring DICOM or NIfTI"
        )


def _add(
    found: Survey,
    number: int,
    one: data.Sample,
    pixels: data.Pixels,
    digests: _Digests,
    contract: schema.DataContract | None,
) -> None:
    """Add one sample to sums and rows."""
    image, mask = pixels.image, pixels.mask
    low, high = float(image.min()), float(image.max())
    for plane in image:
        found.histogram += np.bincount(np.clip(plane * BINS, 0, BINS - 1).astype(np.uint8).ravel(), minlength=BINS)
    found.total += float(image.sum(dtype=np.float64))
    # Sums in float64 without a second copy of the image in it.
    found.squares += float(np.einsum("chw,chw->", image, image, dtype=np.float64))
    counts = np.zeros(0, dtype=np.int64) if mask is None else np.bincount(mask.ravel(), minlength=found.num_classes)
    if mask is not None:
        found.class_pixels += counts
    path, file = digests.of(one)
    row = Row(
        number=number,
        sample=one,
        size=(int(image.shape[1]), int(image.shape[2])),
        colour=image.shape[0] == 3 and not bool((image[0] == image[1]).all() and (image[0] == image[2]).all()),
        spacing=pixels.spacing,
        units=pixels.units,
        orientation=pixels.orientation,
        low=low,
        high=high,
        median=float(np.median(image)),
        pixels=_digest(image),
        mask=None if mask is None else _digest(mask),
        classes=frozenset(int(at) for at in np.flatnonzero(counts)),
        kept=_kept(mask, contract),
        file=file,
        path=path,
    )
    found.rows.append(row)


def _kept(mask: NDArray[np.int64] | None, contract: schema.DataContract | None) -> dict[int, float]:
    if mask is None or contract is None or contract.fit != "resize":
        return {}
    from fedvfm.data import transforms  # torch, without which a coordinator judges no pixels

    return transforms.kept_dice(mask, contract.input_size)


def _digest(array: NDArray[Any]) -> bytes:
    """Of shape and values; a grey image saved as three equal channels is the same image."""
    if array.ndim == 3 and array.shape[0] == 3 and (array[0] == array[1]).all() and (array[0] == array[2]).all():
        array = array[:1]
    made = hashlib.blake2b(str(array.shape).encode(), digest_size=16)
    made.update(np.ascontiguousarray(array).data)
    return made.digest()


class _Digests:
    """Digests of the samples' files, each file read once."""

    def __init__(self, source: data.Source) -> None:
        self._path_of = getattr(source, "path_of", None)
        self._last: tuple[Path | None, bytes | None] = (None, None)

    def of(self, one: data.Sample) -> tuple[Path | None, bytes | None]:
        """A sample's file and its digest; (None, None) where the source knows no file."""
        path = self._path_of(one) if self._path_of is not None else None
        if path is None or not Path(path).is_file():
            return (None if path is None else Path(path)), None
        # Slices of one volume follow each other, so remembering the last file is enough.
        if self._last[0] != path:
            with Path(path).open("rb") as file:
                self._last = (Path(path), hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
        return self._last


def spaced(samples: Sequence[data.Sample], limit: int) -> list[Numbered]:
    """All samples with their numbers, or ``limit`` of them at even distances."""
    numbered = list(enumerate(samples, 1))
    if not limit or limit >= len(numbered):
        return numbered
    return [numbered[int(at)] for at in np.linspace(0, len(numbered) - 1, limit).round()]


def by_code(failures: Iterable[Failure]) -> Mapping[defect.Kind, list[Failure]]:
    """Failures grouped by their kind."""
    grouped: dict[defect.Kind, list[Failure]] = {}
    for one in failures:
        grouped.setdefault(one.code, []).append(one)
    return grouped
