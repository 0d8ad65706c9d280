"""Prediction: a saved adapter on files as they are, results in the input's own geometry."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedvfm import errors, progress, storage
from fedvfm.client import devices, windows
from fedvfm.client import model as models
from fedvfm.data import formats, slices, transforms, volumes
from fedvfm.data import header as headers
from fedvfm.data import sample as samples
from fedvfm.data.sources import cases, layouts
from fedvfm.inference import delivery, export, inputs, output, results, segmentation_object
from fedvfm.tasks import segmentation

FORMS = ("auto", "png", "nifti", "dicom-seg")
SUMMARY = "summary.json"


def predict(
    adapter: str | os.PathLike[str],
    input_path: str | os.PathLike[str],
    output_folder: str | os.PathLike[str],
    *,
    form: str = "auto",
    overlays: bool = False,
    device: str = "cpu",
    backbone: str | None = None,
    observer: progress.Observer = progress.silent,
) -> dict[str, Any]:
    """Predict every picture, volume and DICOM series below ``input_path``; the summary, also in ``summary.json``.

    Args:
        adapter: folder of a saved adapter.
        input_path: a file or a folder.
        output_folder: must not exist or be empty.
        form: of masks: "png" (class numbers), "nifti" or "dicom-seg"; "auto" is that of the input.
        overlays: write pictures with the masks drawn in, too.
        device: where to compute: cpu, cuda, cuda:N, mps or auto.
        backbone: another place of the same backbone (its sha256 is still checked).
        observer: told of every input.

    Raises:
        DataError: after all inputs were tried, if some could not be used; their reasons are in its message and in
            the summary. Also if there is nothing to predict.
        CheckpointError, WeightsError: if the adapter or its backbone cannot be used.
        OutputInUse: if the output folder is not free.
    """
    summary = run(
        adapter,
        input_path,
        output_folder,
        form=form,
        overlays=overlays,
        device=device,
        backbone=backbone,
        observer=observer,
    )
    require_all(summary)
    return summary


def require_all(summary: Mapping[str, Any]) -> None:
    """Raise for the inputs that could not be used.

    Raises:
        DataError: naming each with its reason.
    """
    failed: Mapping[str, str] = summary["failed"]
    if not failed:
        return
    faults = [f"{name}: {reason}" for name, reason in failed.items()]
    done = len(summary["inputs"])
    lines = "".join(f"\n  - {fault}" for fault in faults)
    raise errors.DataError(
        f"{len(failed)} of {done + len(failed)} inputs could not be used; the results of the others are in "
        f"{summary['output']}{lines}",
        faults,
    )


def run(
    adapter: str | os.PathLike[str],
    input_path: str | os.PathLike[str],
    output_folder: str | os.PathLike[str],
    *,
    form: str = "auto",
    overlays: bool = False,
    device: str = "cpu",
    backbone: str | None = None,
    observer: progress.Observer = progress.silent,
) -> dict[str, Any]:
    """:func:`predict` that tells of inputs that could not be used in ``failed`` alone."""
    start = time.monotonic()
    if form not in FORMS:
        raise errors.ConfigError("--as", [f"'{form}': give one of {', '.join(FORMS)}"])
    source, folder = Path(input_path), Path(output_folder)
    _require_apart(source, folder)
    found = inputs.find(source)
    model = export.load_adapter(adapter, device=devices.choose(device), backbone=backbone)
    delivery.require_promptless(model, "predict")
    if delivery.dense(model) and form in ("auto", "dicom-seg") and any(item.kind == "dicom" for item in found):
        segmentation_object.require_installed()
    predictor = Predictor(model, folder, form, overlays, observer)
    rows, failed = [], {}
    for index, item in enumerate(found):
        observer("input", name=item.name, index=index, count=len(found))
        try:
            rows.append(predictor.item(item))
        except errors.DataError as error:
            predictor.discard()
            # DICOM folders are often named after patients; sources.csv alone says which one it is.
            failed[item.name] = str(error).replace(str(item.path), item.name) if item.kind == "dicom" else str(error)
        except MemoryError:
            predictor.discard()
            failed[item.name] = "does not fit into the memory of this machine; crop it, or use a larger one"
    summary = {
        "adapter": {"fingerprint": predictor.fingerprint, "recipe": model.recipe_hash},
        "task": model.recipe.task.kind,
        "class_names": list(model.recipe.data.class_names),
        "device": model.device,
        "output": str(folder),
        "inputs": [row for part in rows for row in part],
        "failed": failed,
        "wall_s": round(time.monotonic() - start, 3),
    }
    results.write_tables(folder, summary, [item for item in found if item.kind == "dicom"])
    storage.write_text(folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def _require_apart(source: Path, folder: Path) -> None:
    """The output must be free, and not lie where it would be an input of the next run.

    Raises:
        OutputInUse: if it is not so.
    """
    output.require_free(folder)
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise errors.OutputInUse(
            f"output folder {folder} lies inside the input {source}: its masks would be predicted next time. Choose "
            "another --output"
        )


class Predictor:
    """A loaded model that predicts one input after the other.

    Args:
        model: the adapted model.
        folder: where results go.
        form: of masks, see :func:`predict`.
        overlays: write pictures with the masks drawn in.
        observer: told of every slice.
    """

    def __init__(
        self,
        model: models.AdaptedModel,
        folder: Path,
        form: str = "auto",
        overlays: bool = False,
        observer: progress.Observer = progress.silent,
    ) -> None:
        self.model, self.form, self.overlays, self.observer = model, form, overlays, observer
        self.place = results.Place(folder)
        self.names, self.fingerprint = model.recipe.data.class_names, model.read().fingerprint
        self.view = slices.View.of(model.recipe.data)
        self.model.eval()

    def logits(self, pixels: samples.Pixels) -> Tensor:
        """Logits of one image or slice, computed as in evaluation.

        Shapes: pixels.image (1 or 3, H, W) -> (K, h, w) in segmentation, (K,) in classification.

        Raises:
            DataError: if the contract cannot take the image.
        """
        contract = self.model.recipe.data
        prepared = transforms.prepare(pixels, contract, len(contract.class_names), multiple=self.model.backbone.patch)
        try:
            return windows.logits(self.model, prepared.image, windows.alone(self.model))
        except torch.OutOfMemoryError:
            height, width = prepared.image.shape[1:]
            raise errors.DataError(
                f"{height} x {width} pixels do not fit into the memory of {self.model.device}; use --device cpu"
            ) from None

    def discard(self) -> None:
        """Remove what was written of the input that failed."""
        self.place.discard()

    def item(self, item: inputs.Item) -> list[dict[str, Any]]:
        """Predict one input and write its results; its rows of the summary.

        Raises:
            DataError: if it cannot be used.
        """
        self.place.begin()
        dense = delivery.dense(self.model)
        chosen = results.form_of(item, self.form) if dense else "csv"
        if item.kind == "picture":
            self._require_fit(item, None)
            pixels = samples.Pixels(formats.read_image(item.path))
            return [self._picture(item, pixels, chosen)] if dense else [self._class(item.name, self._chances(pixels))]
        header = volumes.read_header(item.path)
        self._require_fit(item, header)
        return [self._volume(item, header, chosen)] if dense else self._classes(item, header)

    def _require_fit(self, item: inputs.Item, header: headers.Header | None) -> None:
        """Refuse what a site could not have trained on under this contract.

        Raises:
            DataError: for another modality, or a picture where values in units or neighbouring slices are needed.
        """
        case = layouts.Case(item.name, (Path(item.name),))
        faults = cases.faults_under(case, cases.Seen((0, 0), header), Path(), self.model.recipe.data)
        if faults:
            raise errors.DataError("; ".join(faults))

    def _slices(self, item: inputs.Item, header: headers.Header) -> Iterator[tuple[int, str, samples.Pixels]]:
        """Number, name and pixels of every slice, cut as the recipe asks; a single one has the input's own name."""
        names = slices.names(header, self.view)
        for at, name in enumerate(names):
            self.observer("slice", name=item.name, index=at, count=len(names))
            shown = item.name if len(names) == 1 else f"{item.name}/{name}"
            yield at, shown, slices.read([item.path], at, self.view)

    def _classes(self, item: inputs.Item, header: headers.Header) -> list[dict[str, Any]]:
        """A row for every slice, and before them one of the volume, as it is scored: the mean of its slices."""
        found = [(name, self._chances(pixels)) for _, name, pixels in self._slices(item, header)]
        whole = slices.part_of(header, item.name, 0, self.view) is not None
        mean = [(item.name, torch.stack([chances for _, chances in found]).mean(dim=0))] if whole else []
        return [self._class(name, chances) for name, chances in (*mean, *found)]

    def _chances(self, pixels: samples.Pixels) -> Tensor:
        """Probability of every class. Shapes: (K,), float64."""
        return self.logits(pixels).double().softmax(dim=0)

    def _class(self, name: str, chances: Tensor) -> dict[str, Any]:
        shown = {one: round(float(chance), 6) for one, chance in zip(self.names, chances, strict=True)}
        return {"id": name, "class": self.names[int(chances.argmax())], "probabilities": shown}

    def _mask(self, pixels: samples.Pixels) -> results.Labels:
        found = segmentation.classes_at(self.logits(pixels), pixels.image.shape[1:])
        return found.astype(np.uint8)  # a contract has 256 classes at most

    def _picture(self, item: inputs.Item, pixels: samples.Pixels, form: str) -> dict[str, Any]:
        mask = self._mask(pixels)
        self.place.picture(item.name, mask)
        if self.overlays:
            self.place.overlay(item.name, pixels.image, mask)
        return self._row(item, form, mask.shape, results.counts(mask, self.names))

    def _volume(self, item: inputs.Item, header: headers.Header, form: str) -> dict[str, Any]:
        masks = {}
        for at, name, pixels in self._slices(item, header):
            masks[at] = self._mask(pixels)
            if self.overlays and masks[at].any():
                self.place.overlay(name, _middle(pixels.image, self.view), masks[at])
            if form == "png":
                self.place.picture(name, masks[at])
        labels = volumes.place_back(masks, header, slices.plane_of(header, self.view))
        if form == "nifti":
            self.place.nifti(item.name, labels, header)
        elif form == "dicom-seg":
            self.place.dicom_seg(item.name, labels, header, self.names, self.fingerprint)
        return self._row(item, form, header.stored.shape, results.counts(labels, self.names, header), header.notes)

    def _row(
        self, item: inputs.Item, form: str, size: Sequence[int], counts: Mapping[str, Any], notes: Sequence[str] = ()
    ) -> dict[str, Any]:
        row = {"id": item.name, "kind": item.kind, "form": form, "size": list(size), "files": self.place.files}
        return {**row, "classes": counts, "notes": list(notes)}


def _middle(image: NDArray[np.float32], view: slices.View) -> NDArray[np.float32]:
    """The slice itself, of a stack with its neighbours. Shapes: (C, H, W)."""
    return image[1:2] if view.stack > 1 else image
