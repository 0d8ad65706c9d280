"""Blood-cell crops in three classes, grouped by slide."""

from __future__ import annotations

from collections.abc import Sequence

from fedvfm.config import schema
from fedvfm.data import defect, formats
from fedvfm.data import sample as data
from fedvfm.data.decoding import decoder
from fedvfm.data.sources import index

CLASS_NAMES = ("red", "white", "platelet")


class Cells:
    """A folder with ``index.csv`` (columns ``id``, ``label``, ``slide``) and ``images/ID.png``.

    Crops of one slide are near relatives, so the slide stands for the patient. One laboratory: sites come from a
    partitioner.

    Raises:
        DataError: if the folder, the table or files are missing, or a label is unknown (all of them are named).
        ConfigError: for unknown options.

    Source: Shenggan, BCCD_Dataset, MIT licence; 112 x 112 RGB crops of its boxes.
    """

    def __init__(self, source: schema.SourceConfig) -> None:
        index.refuse_options(source, ())
        self._folder = index.locate(source, ("index.csv", "images/"))
        rows = index.read_files(self._folder / "index.csv", ("id", "label", "slide"))
        known = ", ".join(CLASS_NAMES)
        labels = [
            defect.CLASS_UNKNOWN.fault(f"id '{row['id']}' has label '{row['label']}'; known: {known}")
            for row in rows
            if row["label"] not in CLASS_NAMES
        ]
        files = [
            defect.NOT_FOUND.fault(f"images/{row['id']}.png: no such file")
            for row in rows
            if not (self._folder / "images" / f"{row['id']}.png").is_file()
        ]
        if not (self._folder / "images").is_dir():
            files = [defect.OPTIONS.fault("images/: no such folder")]
        index.refuse(self._folder, [*index.duplicates(rows, "id"), *labels, *files])
        self._samples = tuple(
            data.Sample(id=row["id"], label=CLASS_NAMES.index(row["label"]), patient=row["slide"]) for row in rows
        )

    @property
    def info(self) -> data.SourceInfo:
        """Name, task, classes, licence and note."""
        note = "single blood cells cut from one laboratory's pictures; easy classes, no clinical claim"
        return data.SourceInfo("cells", "classification", CLASS_NAMES, "MIT", note)

    def samples(self) -> Sequence[data.Sample]:
        """All samples in the order of the table."""
        return self._samples

    def read(self, sample: data.Sample) -> data.Pixels:
        """Read the crop.

        Raises:
            DataError: if the file is missing or unreadable.
        """
        with decoder.trusted():  # a public set, not files of strangers
            return data.Pixels(formats.read_image(self._folder / "images" / f"{sample.id}.png"))
