"""Microscopy nuclei of several laboratories: Data Science Bowl 2018, stage 1, with the community's corrected masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import defect, formats, instances
from fedvfm.data import sample as data
from fedvfm.data.decoding import decoder
from fedvfm.data.sources import index

CLASS_NAMES = ("background", "nucleus")


class Nuclei:
    """A folder with ``index.csv`` (columns ``id`` and ``site``), ``images/ID.png`` and ``labels/ID.png``.

    A label picture is a uint16 map of instances, 0 is background; here every instance is class 1. With the option
    ``instances`` those that touch are drawn apart (:mod:`fedvfm.data.instances`), to be detected one by one. Sites are
    the natural ones, inferred from picture size and stain; they are microscopes and tissues, not patients.

    Raises:
        DataError: if the folder, the table or files are missing (all of them are named).
        ConfigError: for unknown options.

    Source: Caicedo et al., "Nucleus segmentation across imaging experiments: the 2018 Data Science Bowl",
        Nature Methods 2019; image set BBBC038, CC0.
    """

    def __init__(self, source: schema.SourceConfig) -> None:
        index.refuse_options(source, ("instances",))
        self._instances = source.options.get("instances", False)
        if not isinstance(self._instances, bool):
            fault = f"data.options.instances = {self._instances!r}: true or false is needed"
            raise errors.ConfigError("data source 'nuclei'", [fault])
        self._folder = index.locate(source, ("index.csv", "images/", "labels/"))
        rows = index.read_files(self._folder / "index.csv", ("id", "site"))
        ids = [row["id"] for row in rows]
        parts = [part for part in ("images", "labels") if (self._folder / part).is_dir()]
        missing = [
            defect.OPTIONS.fault(f"{part}/: no such folder") for part in ("images", "labels") if part not in parts
        ]
        missing += [
            defect.NOT_FOUND.fault(f"{part}/{name}.png: no such file")
            for part in parts
            for name in ids
            if not (self._folder / part / f"{name}.png").is_file()
        ]
        index.refuse(self._folder, [*index.duplicates(rows, "id"), *missing])
        self._samples = tuple(data.Sample(id=row["id"], site=row["site"]) for row in rows)

    @property
    def info(self) -> data.SourceInfo:
        """Name, task, classes, licence and note."""
        note = "sites inferred from picture size and stain; cultured cells and tissue sections, not patients"
        return data.SourceInfo("nuclei", "segmentation", CLASS_NAMES, "CC0-1.0", note)

    def samples(self) -> Sequence[data.Sample]:
        """All samples in the order of the table."""
        return self._samples

    def read(self, sample: data.Sample) -> data.Pixels:
        """Read picture and mask.

        Raises:
            DataError: if a file is unreadable or both differ in size.
        """
        with decoder.trusted():  # a public set, not files of strangers
            image = formats.read_image(self._folder / "images" / f"{sample.id}.png")
            labels = formats.read_mask(self._folder / "labels" / f"{sample.id}.png")
        if image.shape[1:] != labels.shape:
            raise defect.MASK_SIZE.error(
                f"{self._folder}: images/{sample.id}.png is {image.shape[1]} x {image.shape[2]} pixels, its label "
                f"{labels.shape[0]} x {labels.shape[1]}; remove the pair or repair it"
            )
        mask = instances.apart(labels) if self._instances else (labels > 0).astype(np.int64)
        return data.Pixels(image, mask)
