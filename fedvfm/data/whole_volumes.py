"""Whole volumes as samples: a source whose samples are the volumes of another source's slices, each read as one.

Where a recipe has ``data.depth``, a network sees three dimensions. Files are read, cut, scaled and checked slice by
slice as for every other recipe; here the slices of a volume are put together again. Splits, privacy, minimum counts and
scores then count volumes, since these are the samples; the privacy ledger also knows their slices
(:func:`fedvfm.privacy.records.charged`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedvfm import errors
from fedvfm.data import defect
from fedvfm.data import sample as data
from fedvfm.data.sources import index


class WholeVolumes(data.Wrapped):
    """A source of volumes; each has another stable name than any of its slices.

    Args:
        source: of slices. Volumes are in the order of their first slice.

    Raises:
        DataError: listing what is no slice of a volume, and volumes of which slices are missing.
    """

    def __init__(self, source: data.Source) -> None:
        super().__init__(source)
        volumes: dict[str, dict[int, data.Sample]] = {}
        faults: list[errors.Fault] = []
        for slice_ in source.samples():
            if slice_.part is None:
                faults.append(
                    defect.VOLUME_NEEDED.fault(
                        f"sample '{slice_.id}': no slice of a volume, but recipe.data.depth asks for whole volumes; "
                        "bring volumes of two slices or more, or leave depth out of the recipe"
                    )
                )
                continue
            volumes.setdefault(slice_.part.volume, {})[slice_.part.index] = slice_
        for name, slices in volumes.items():
            of = max(slice_.part.of for slice_ in slices.values() if slice_.part is not None)
            if len(slices) < of:
                faults.append(
                    defect.VOLUME_NEEDED.fault(
                        f"volume '{name}': {len(slices)} of its {of} slices are samples, but recipe.data.depth asks "
                        "for whole volumes; let the source give all slices (data.options.every = 1), or leave depth "
                        "out of the recipe"
                    )
                )
        index.refuse(Path(source.info.name), faults)
        self._volumes = tuple(_volume(slices) for slices in volumes.values())

    def samples(self) -> Sequence[data.Sample]:
        """All volumes."""
        return self._volumes

    def stable(self, sample: data.Sample) -> tuple[str, str | None]:
        """The names of the first slice, marked as those of a volume; a slice has its own."""
        name, patient = super().stable(sample.images[0] if sample.whole else sample)
        return (f"volume {name}" if sample.whole else name), patient

    def read(self, sample: data.Sample) -> data.Pixels:
        """Read a volume whole, or one slice.

        Shapes: image (C, D, H, W) and mask (D, H, W) of a volume.

        Raises:
            DataError: as the source does, and for slices of unlike shape.
        """
        if not sample.whole:
            return self._source.read(sample)
        slices = [self._source.read(slice_) for slice_ in sample.images]
        if len({pixels.image.shape for pixels in slices}) > 1:
            raise defect.MASK_SIZE.error(f"volume '{sample.id}': its slices are of unlike shape; repair the file")
        return joined(slices, sample.images[0].part)


def joined(slices: Sequence[data.Pixels], part: data.Part | None) -> data.Pixels:
    """Slices of one shape, in their order, as one volume.

    Args:
        slices: all of a volume.
        part: the place of any of them: how far they lie apart.

    Shapes: images (C, H, W) -> (C, D, H, W).
    """
    first = slices[0]
    masks = [pixels.mask for pixels in slices if pixels.mask is not None]
    dark = [
        np.zeros(pixels.image.shape[1:], dtype=np.bool_) if pixels.padded is None else pixels.padded
        for pixels in slices
    ]
    return dataclasses.replace(
        first,
        image=np.stack([pixels.image for pixels in slices], axis=1),
        mask=np.stack(masks) if len(masks) == len(slices) else None,
        spacing=None if first.spacing is None or part is None else (part.step, *first.spacing),
        units=first.units if len({pixels.units for pixels in slices}) == 1 else None,
        part=None,
        padded=np.stack(dark) if any(pixels.padded is not None for pixels in slices) else None,
    )


def _volume(slices: dict[int, data.Sample]) -> data.Sample:
    members = tuple(slices[at] for at in sorted(slices))
    return dataclasses.replace(members[0], id=members[0].unit, part=None, case=None, images=members, whole=True)
