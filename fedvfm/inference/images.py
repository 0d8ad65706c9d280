"""The images of inputs, read one after the other as a recipe's data contract asks, without any label."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import sample as samples
from fedvfm.data.sources import cases, index, layouts, patients
from fedvfm.data.volumes import header as headers
from fedvfm.data.volumes import patient_id, slices, volumes
from fedvfm.inference import channels as grouping
from fedvfm.inference import inputs

SHOWN = 10
"""Faults that a message lists."""
OF_LABELS = (*layouts.MASK_FOLDERS, "labelstr", "labelsts")
OF_IMAGES = (*layouts.IMAGE_FOLDERS, "imagestr", "imagests", "studies")
"""Names of folders, in small letters: what lies in the first beside one of the second are masks, no images."""


@dataclass(frozen=True, slots=True)
class Place:
    """One image among inputs.

    Attributes:
        name: of the picture, or of the volume and its slice.
        item: the input.
        index: of the slice, 0 of a picture.
        header: of the volume; None for a picture.
    """

    name: str
    item: inputs.Item = field(repr=False)
    index: int = 0
    header: headers.Header | None = field(default=None, repr=False)


class Images:
    """Reads inputs under a contract.

    Args:
        contract: of the recipe.
        series: the series that is taken of a folder of several.
        mpp: micrometres a pixel of whole slides whose files do not say.

    Attributes:
        view: how volumes and slides are looked at.
    """

    def __init__(self, contract: schema.DataContract, series: str = "", mpp: float = 0.0) -> None:
        self.contract, self._mpp = contract, mpp
        self.view = slices.View.of(contract, series)

    def case(self, item: inputs.Item) -> layouts.Case:
        """The input as readers of cases take it."""
        return layouts.Case(item.name, item.files, mpp=self._mpp if item.kind == "slide" else None)

    def seen(self, item: inputs.Item) -> cases.Seen:
        """What the headers of a case say.

        Raises:
            DataError: for what a site could not have trained on under this contract: files that do not fit together,
                another modality, other channels, or a picture where values in units or neighbouring slices are needed.
        """
        if item.more or item.kind == "slide":
            seen = cases.look(item.path.parent, self.case(item), self.view.series)
        elif item.kind == "picture":
            seen = cases.Seen((0, 0))
        else:
            header = volumes.read_header(item.path, self.view.series)
            seen = cases.Seen(header.size("acquired"), header)
        called = layouts.Case(item.name, tuple(Path(item.name) for _ in item.files))
        faults = cases.faults_under(called, seen, Path(), self.contract, item.chosen)
        if faults:
            raise errors.DataError("; ".join(faults), faults)
        return seen

    def picture(self, item: inputs.Item) -> samples.Pixels:
        """The pixels of a picture.

        Raises:
            DataError: as :meth:`seen`, or if they cannot be read.
        """
        return cases.read_image(self.case(item), self.seen(item), 0, self.view, item.chosen)

    def places(self, source: Path, option: str) -> list[Place]:
        """Every picture and slice below a file or folder, in the order of their names; no masks.

        Folders of masks beside folders of images, as sites train from, are left out; so are derivatives of BIDS.

        Args:
            source: what to look through.
            option: what it was given for, for messages.

        Raises:
            DataError: if there is nothing, if cases lack channels that the contract takes, or as :meth:`seen`.
        """
        contract, listed = self.contract, inputs.find(source)
        labels = {folder for item in listed for folder in _below(item.path, source) if _holds_labels(folder)}
        items = [item for item in listed if labels.isdisjoint(_below(item.path, source))]
        if not items:
            raise errors.DataError(f"{option} {source}: holds folders of masks alone; give the folder of the images")
        joined = grouping.join(
            items, contract.channels, (), alone=source.is_file(), optional=contract.optional_channels
        )
        if joined.failed:
            faults = [f"{option} {source}: {name}: {reason}" for name, reason in joined.failed.items()]
            raise errors.DataError("; ".join(faults[:SHOWN]), faults)
        places = []
        for item in joined.items:
            if item.kind == "slide":
                raise errors.DataError(f"{item.name}: a whole slide, and images are taken here; give tiles as pictures")
            header = self.seen(item).header
            names = [] if header is None else slices.names(header, self.view)
            if len(names) < 2:
                places.append(Place(item.name, item, 0, header))
            places += [
                Place(f"{item.name}/{name}", item, at, header) for at, name in enumerate(names) if len(names) > 1
            ]
        return places

    def at(self, place: Place) -> samples.Pixels:
        """The pixels of one image.

        Raises:
            DataError: if they cannot be read.
        """
        header = place.header
        seen = cases.Seen((0, 0)) if header is None else cases.Seen(header.size("acquired"), header)
        return cases.read_image(self.case(place.item), seen, place.index, self.view, place.item.chosen)


def owners(source: Path, places: Sequence[Place]) -> dict[str, str]:
    """Name of each input -> whose it is, of those that say it: nothing that names a patient, and never kept.

    DICOM says it by Patient ID, BIDS by the folder of the subject, and everything by a table of patients beside it
    (:data:`fedvfm.data.sources.patients.TABLES`).

    Args:
        source: what was looked through.
        places: its images.

    Raises:
        DataError: if a table or a DICOM file cannot be read.
    """
    secret, known = secrets.token_bytes(patient_id.KEY_BYTES), dict[str, str]()
    tables = [source / name for name in patients.TABLES if (source / name).is_file()]
    rows = {row["id"]: row.get("patient") for row in (index.read_csv(tables[0], ("id",)) if tables else [])}
    for place in places:
        item, header = place.item, place.header
        if item.name in known:
            continue
        stated = rows.get(item.name) or rows.get(item.name.rpartition("/")[2])
        subjects = [folder.name for folder in _below(item.path, source) if folder.name.startswith("sub-")]
        if stated:
            known[item.name] = f"table {stated}"
        elif header is not None and header.frames:
            keyed = patient_id.keyed(header.frames[0].file, secret)
            known |= {} if keyed is None else {item.name: f"dicom {keyed}"}
        elif subjects:
            known[item.name] = f"subject {subjects[-1]}"
    return known


def evenly(places: Sequence[Place], most: int) -> list[Place]:
    """All places, or of more than ``most`` so many, evenly spaced in their order."""
    count = min(most, len(places))
    return [places[round(at * (len(places) - 1) / max(1, count - 1))] for at in range(count)]


def _below(path: Path, source: Path) -> Iterator[Path]:
    """The folders that a file lies in, up to the source, which is not among them."""
    return (folder for folder in path.parents if folder != source and folder.is_relative_to(source))


def _holds_labels(folder: Path) -> bool:
    """Whether a folder is, by its name and what lies beside it, one of masks."""
    if folder.name == "derivatives":
        return (folder.parent / "dataset_description.json").is_file()
    beside = (other.name.casefold() for other in layouts.folders_in(folder.parent))
    return folder.name.casefold() in OF_LABELS and any(name in OF_IMAGES for name in beside)
