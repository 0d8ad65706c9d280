"""Prediction: a saved adapter on files as they are, results in the input's own geometry."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.config import slides as slides_config
from fedvfm.data import defect, input_rows, transforms, whole_volumes
from fedvfm.data import sample as samples
from fedvfm.data.decoding import decoder
from fedvfm.data.slides import slide_file, tissue
from fedvfm.data.sources import cases, layouts
from fedvfm.data.sources import slides as slide_cases
from fedvfm.data.volumes import geometry, slices, volumes
from fedvfm.data.volumes import header as headers
from fedvfm.inference import boxes as prompting
from fedvfm.inference import channels as grouping
from fedvfm.inference import (
    delivery,
    drawn_boxes,
    export,
    inputs,
    output,
    propagation,
    results,
    segmentation_object,
    sessions,
)
from fedvfm.inference import images as reading
from fedvfm.model import adapted_model, sliding_window
from fedvfm.model import device as devices
from fedvfm.report import progress
from fedvfm.storage import storage
from fedvfm.tasks import across_slices, case_heads, detection, fusion, segmentation
from fedvfm.tasks import boxes as boxing

FORMS = ("auto", "png", "nifti", "dicom-seg")
SUMMARY = results.SUMMARY
MOST = 4096
NO_TABLE = "none"
"""What is given in place of a table where there is none."""
WITHOUT_ROW = "no value of the table beside the image is known; answered from the image alone"
WITHOUT_IMAGE = "no image, as the table declares; answered from its row alone"
NOT_TAKEN = "no image, as the table declares, and this adapter answers from no row alone; not answered"
HEAT = 0.7
"""How much of its own colour the heaviest tile of a slide gives up for red."""
WHITE_TO_RED = ((255, 255, 255), (255, round(255 * (1 - HEAT)), round(255 * (1 - HEAT))))
"""What the weights of tiles, from 0 to the heaviest, make of a white tile."""
HEAVIEST = 3
"""Images of a case that ``overlays`` shows: those that its answer rests on most."""

Shown = Iterator[tuple[int, str, samples.Pixels]]
"""Number, name and pixels of slices."""


def predict(
    adapter: str | os.PathLike[str],
    input_path: str | os.PathLike[str],
    output_folder: str | os.PathLike[str],
    *,
    form: str = "auto",
    overlays: bool = False,
    series: str = "",
    channels: str = "",
    cases: str | os.PathLike[str] | None = None,
    table: str | os.PathLike[str] | None = None,
    boxes: str | os.PathLike[str] | None = None,
    mpp: float = 0.0,
    propagate: float = 0.0,
    device: str = "cpu",
    batch: int = 0,
    graph: str | os.PathLike[str] | None = None,
    backbone: str | None = None,
    limits: schema.DecodingLimits | None = None,
    observer: progress.Observer = progress.silent,
) -> dict[str, Any]:
    """Predict every picture, volume and DICOM series below ``input_path``; the summary, also in ``summary.json``.

    Args:
        adapter: folder of a saved adapter.
        input_path: a file or a folder.
        output_folder: must not exist or be empty.
        form: of masks: "png" (class numbers), "nifti" or "dicom-seg"; "auto" is that of the input.
        overlays: write pictures with the masks drawn in, too.
        series: which series of a DICOM folder with several, in the words of :mod:`fedvfm.data.volumes.series_selector`;
        DICOM folders
            that hold no such series are passed over and named in ``skipped``.
        channels: "0,1,3" or "0,-,1": which files of a case (``CASE_0000.*``, ...) are the model's channels, in its
            order, and - where one is lacking; left out they must be exactly those the model takes.
        cases: a table that says which inputs are one case; see :func:`fedvfm.inference.inputs.by_table`.
        table: with the columns that the adapter takes beside the images; see :func:`fedvfm.inference.inputs.rows`. Of
            such an adapter it must be given; :data:`NO_TABLE` answers without it.
        boxes: a file that says where each class is (:mod:`fedvfm.inference.boxes`), of an adapter that was trained with
            ``prompt = "box"``.
        mpp: micrometres a pixel of whole slides whose files do not say them.
        propagate: millimetres that a box is followed at most, both ways, from its slice through a volume
            (:mod:`fedvfm.inference.propagation`); 0: not at all.
        device: where to compute: cpu, cuda, cuda:N, mps or auto.
        batch: how many images, slices or windows of one size are computed at a time; 0: one on a CPU, more on a GPU.
        graph: folder of an ONNX export of this adapter, which onnxruntime computes in place of torch, on the CPU.
        backbone: another place of the same backbone (its sha256 is still checked).
        limits: what decoding one file may take; left out, what a site allows where it says nothing.
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
        series=series,
        channels=channels,
        cases=cases,
        table=table,
        boxes=boxes,
        mpp=mpp,
        propagate=propagate,
        device=device,
        batch=batch,
        graph=graph,
        backbone=backbone,
        limits=limits,
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
    others = f"the results of the others are in {summary['output']}" if done else "nothing was predicted"
    raise errors.DataError(f"{len(failed)} of {done + len(failed)} inputs could not be used; {others}{lines}", faults)


def run(
    adapter: str | os.PathLike[str],
    input_path: str | os.PathLike[str],
    output_folder: str | os.PathLike[str],
    *,
    form: str = "auto",
    overlays: bool = False,
    series: str = "",
    channels: str = "",
    cases: str | os.PathLike[str] | None = None,
    table: str | os.PathLike[str] | None = None,
    boxes: str | os.PathLike[str] | None = None,
    mpp: float = 0.0,
    propagate: float = 0.0,
    device: str = "cpu",
    batch: int = 0,
    graph: str | os.PathLike[str] | None = None,
    backbone: str | None = None,
    limits: schema.DecodingLimits | None = None,
    observer: progress.Observer = progress.silent,
) -> dict[str, Any]:
    """:func:`predict` that tells of inputs that could not be used in ``failed`` alone."""
    start = time.monotonic()
    if form not in FORMS:
        raise errors.ConfigError("--as", [f"'{form}': give one of {', '.join(FORMS)}"])
    if not 0 <= batch <= MOST:
        raise errors.ConfigError("--batch", [f"{batch}: give a number from 1 to {MOST}, or 0 for what fits the device"])
    if graph is not None and device not in ("cpu", "auto"):
        raise errors.ConfigError("--graph", [f"onnxruntime computes on the CPU here; leave --device {device} out"])
    _check_reach(propagate, boxes is not None)
    decoder.limit(limits or schema.DecodingLimits())
    source, folder, chosen = Path(input_path), Path(output_folder), grouping.read_numbers(channels)
    _require_apart(source, folder)
    slides_taken = export.recipe_of(Path(adapter)).data.slides is not None
    if mpp and not (slides_taken and slides_config.FINEST <= mpp <= slides_config.COARSEST):
        fault = f"{mpp:g}: give it {slides_config.SCALES}, with an adapter for whole slides alone"
        raise errors.ConfigError("--mpp", [fault])
    rows_of = None if table is None or str(table) == NO_TABLE else Path(table)
    bare = rows_of is not None and export.recipe_of(Path(adapter)).inputs.images_missing
    found = inputs.find(source, series, whole_slides=slides_taken, needed=not bare)
    skipped = inputs.meant(found, series) if series else {}
    place = "cpu" if graph is not None else devices.choose(device)
    model = export.load_adapter(adapter, device=place, backbone=backbone)
    delivery.require_boxes(model, boxes is not None)
    if graph is not None:
        delivery.require_images(model, "--graph")
        delivery.require_promptless(model, "--graph")
    numbered = [item for item in found if item.kind == "dicom"]
    if delivery.detects(model) and form != "auto":
        raise errors.ConfigError("--as", ["this adapter answers with boxes, which are written as JSON; leave it out"])
    if delivery.dense(model) and form in ("auto", "dicom-seg") and numbered:
        segmentation_object.require_installed()
    asked = [item for item in found if item.name not in skipped]
    wanted = model.recipe.data
    joined = grouping.join(asked, wanted.channels, chosen, alone=source.is_file(), optional=wanted.optional_channels)
    items = _together(model, source, joined.items, cases)
    if bare and rows_of is not None:
        items = [*items, *inputs.imageless(source, items, rows_of)]
        if not items:
            raise defect.NO_SAMPLES.error(f"{source}: no image, and {table} has no row without one; nothing to predict")
    beside, rowless = _beside(model, source, items, table)
    session = None if graph is None else sessions.Session(Path(graph), model)
    prompts = (
        None
        if boxes is None
        else drawn_boxes.read(Path(boxes), items, wanted)
        if drawn_boxes.holds(Path(boxes))
        else prompting.read(Path(boxes), source, items, wanted.class_names, {*skipped, *joined.failed})
    )
    predictor = Predictor(
        model,
        folder,
        form,
        overlays,
        observer,
        series=series,
        batch=batch,
        session=session,
        rows=beside,
        prompts=prompts,
        mpp=mpp,
        propagate=propagate,
    )
    unseen = [item.name for item in items if item.kind == "row"]
    noted = {WITHOUT_ROW: [name for name in rowless if name not in {*unseen}]}
    noted[WITHOUT_IMAGE] = [name for name in unseen if name not in {*rowless}]
    noted[NOT_TAKEN] = [] if bare or rows_of is None else inputs.not_answered(source, items, rows_of)
    predictor.notes |= {note: names for note, names in noted.items() if names}
    rows, failed, full = _each(predictor, items)
    summary = {
        "adapter": {"fingerprint": predictor.fingerprint, "recipe": model.recipe_hash},
        "task": model.recipe.task.kind,
        "class_names": list(model.recipe.data.class_names),
        "device": model.device,
        "precision": model.precision if session is None else session.precision,
        "computed_by": "torch" if session is None else session.name,
        **({} if prompts is None else {"prompts": dict(prompts.source)}),
        "output": str(folder),
        "inputs": rows,
        "failed": joined.failed | failed,
        "skipped": skipped,
        "unread": inputs.unread(source, found),
        "notes": predictor.notes,
        "wall_s": round(time.monotonic() - start, 3),
    }
    results.write_tables(folder, summary, numbered)
    storage.write_text(folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    if full is not None:
        raise full
    return summary


def _together(
    model: adapted_model.AdaptedModel, source: Path, items: Sequence[inputs.Item], cases: str | os.PathLike[str] | None
) -> Sequence[inputs.Item]:
    """The items, or the cases that they are put together to."""
    if cases is not None and not model.task.bags:
        raise errors.ConfigError(
            "--cases", [f"this adapter answers for single images (task '{model.recipe.task.kind}'); leave it out"]
        )
    if cases is not None:
        return inputs.by_table(source, items, Path(cases))
    return inputs.by_case(source, items) if model.task.bags else items


def _beside(
    model: adapted_model.AdaptedModel,
    source: Path,
    items: Sequence[inputs.Item],
    table: str | os.PathLike[str] | None,
) -> tuple[dict[str, input_rows.Row], list[str]]:
    """Rows of the table by the names of their items, and the names of items without one.

    Raises:
        ConfigError: for a table that this adapter does not take, and for none where it takes one.
    """
    columns = model.recipe.inputs.columns
    if not columns:
        if table is not None:
            raise errors.ConfigError("--table", ["this adapter takes no table beside the image; leave it out"])
        return {}, []
    if table is None:
        raise errors.ConfigError(
            "--table",
            [
                f"this adapter takes a table beside the image, with the columns {', '.join(columns)}; give it, or "
                f"--table {NO_TABLE} to answer from the images alone"
            ],
        )
    if str(table) == NO_TABLE:
        return {}, [item.name for item in items]
    return inputs.rows(source, items, Path(table), model.recipe.inputs)


def _each(
    predictor: Predictor, items: Sequence[inputs.Item]
) -> tuple[list[dict[str, Any]], dict[str, str], errors.FedvfmError | None]:
    """Rows of the inputs that could be used, why the others could not, by name, and what ended all."""
    rows, failed = [], dict[str, str]()
    for index, item in enumerate(items):
        predictor.ahead(items[index : index + predictor.batch])
        predictor.observer("input", name=item.name, index=index, count=len(items))
        try:
            rows += predictor.item(item)
        except errors.DataError as error:
            predictor.discard()
            # DICOM folders are often named after patients; sources.csv alone says which one it is.
            reason = str(error)
            for part in (item.parts or (item,)) if item.kind == "dicom" else ():
                reason = reason.replace(str(part.path), part.name)
            failed[item.name] = reason.removeprefix(f"{item.name}: ")
        except MemoryError:
            predictor.discard()
            failed[item.name] = "does not fit into the memory of this machine; crop it, or use a larger one"
        except errors.FedvfmError as error:
            predictor.discard()
            failed[item.name] = str(error)
            if not isinstance(error, errors.StorageError) or not _writes(predictor.place.folder):
                return rows, failed | {left.name: f"not reached: {error}" for left in items[index + 1 :]}, error
        except Exception as error:
            # Whatever a reader does with one file, the others get their results. Its words may quote the file.
            predictor.discard()
            failed[item.name] = (
                f"the reader broke ({type(error).__name__}); if the file is sound, report the kind of error"
            )
    return rows, failed, None


def _writes(folder: Path) -> bool:
    """Whether the disk takes anything at all: one result may only have too long a name."""
    try:
        storage.write_text(folder / SUMMARY, "{}\n")  # the real one follows
    except errors.StorageError:
        return False
    return True


def _check_reach(propagate: float, boxes: bool) -> None:
    """Refuse a reach that is none, or without boxes.

    Raises:
        ConfigError: if so.
    """
    if not 0 <= propagate < math.inf:
        raise errors.ConfigError("--propagate", [f"{propagate:g}: give millimetres, or 0 to follow no box"])
    if propagate and not boxes:
        raise errors.ConfigError("--propagate", ["follows boxes from slice to slice; give --boxes, or leave it out"])


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
        series: which series of a DICOM folder, see :func:`predict`.
        batch: images, slices or windows at a time; 0 for what fits the device.
        session: computes in place of the model.
        rows: of the table beside the images, by the names of the items.
        prompts: boxes of the inputs, of an adapter that takes them.
        mpp: of whole slides, see :func:`predict`.
        propagate: millimetres that they are followed through volumes.

    Attributes:
        notes: what reading left in doubt, one sentence each -> the inputs it is said of.
    """

    def __init__(
        self,
        model: adapted_model.AdaptedModel,
        folder: Path,
        form: str = "auto",
        overlays: bool = False,
        observer: progress.Observer = progress.silent,
        *,
        series: str = "",
        batch: int = 0,
        session: sessions.Session | None = None,
        rows: Mapping[str, input_rows.Row] | None = None,
        prompts: prompting.Prompts | None = None,
        mpp: float = 0.0,
        propagate: float = 0.0,
    ) -> None:
        self.model, self.form, self.overlays, self.observer = model, form, overlays, observer
        self.place = results.Place(folder)
        self.names, self.fingerprint = model.recipe.data.class_names, model.read().fingerprint
        self.images = reading.Images(model.recipe.data, series, mpp)
        self.view = self.images.view
        self.notes: dict[str, list[str]] = {}
        self.model.eval()
        self.batch = batch or sliding_window.batch_of(model)
        self._run: sliding_window.WithRows = sliding_window.alone(model) if session is None else session.run
        self._rows, self._prompts = rows or {}, prompts
        self._propagate = propagate
        self._ready: dict[str, tuple[samples.Pixels, Tensor]] = {}

    def logits(
        self,
        shown: Sequence[samples.Pixels],
        names: Sequence[str],
        boxes: Sequence[sliding_window.Boxes] | None = None,
    ) -> list[Tensor]:
        """Logits of images or slices, computed as in evaluation.

        Args:
            shown: their pixels.
            names: of the items that each is of.
            boxes: of each, on its own pixels, where the adapter takes boxes.

        Shapes: pixels.image (1 or 3, H, W) -> (K, h, w) in segmentation, (K,) in classification; of whole volumes
            (1 or 3, D, H, W) -> (K, d, h, w).

        Raises:
            DataError: if the contract cannot take an image.
        """
        contract, patch = self.model.recipe.data, self.model.backbone.patch
        ready = [transforms.prepare(one, contract, len(contract.class_names), multiple=patch).image for one in shown]
        try:
            table = self._table(names)
            run = self._run if table is None else functools.partial(self._run, table=table)
            if boxes is not None:
                of_each = zip(boxes, shown, ready, strict=True)
                sized = [prompting.scaled(own, seen.image.shape[1:], image.shape[1:]) for own, seen, image in of_each]
                run = functools.partial(run, boxes=sized)
            return list(sliding_window.many(self.model, ready, run, self.batch))
        except torch.OutOfMemoryError:
            size = " x ".join(map(str, max(image.shape[1:] for image in ready)))
            raise errors.DataError(
                f"{size} pixels do not fit into the memory of {self.model.device}; use --device cpu"
            ) from None

    def _table(self, names: Sequence[str]) -> Tensor | None:
        """Rows of items with an image; None where the adapter takes no table. Shapes: (B, C), or (B, C + 1)."""
        rows = [self._rows.get(name, ()) for name in names]
        return fusion.stacked(rows, self.model.recipe.inputs, [False] * len(names))

    @torch.no_grad()
    def _of_row(self, item: inputs.Item) -> dict[str, Any]:
        """The answer for a row that is declared to be without an image.

        Raises:
            DataError: if it has no value in any column.
        """
        if not self._rows.get(item.name):
            raise defect.CASE_EMPTY.error("neither an image nor a value in any column of recipe.inputs; fill one in")
        image = transforms.blank(self.model.recipe.data).image
        table = fusion.stacked([self._rows[item.name]], self.model.recipe.inputs, [True])
        if self.model.task.bags and table is not None:
            whole = case_heads.Parts(((0,),), torch.zeros(1, self.model.backbone.width, device=self.model.device))
            (logits,) = self.model(torch.empty(0), None, None, whole, table.to(self.model.device)).float().cpu()
        else:
            run = functools.partial(self._run, table=table)
            (logits,) = sliding_window.many(self.model, [image], run, self.batch)
        return {**self._answer(item.name, self.model.task.answers(logits)), "image": "none"}

    def ahead(self, items: Sequence[inputs.Item]) -> None:
        """Compute pictures together that come next; whatever fails is left to :meth:`item`, which says why."""
        if (
            self.model.task.bags
            or self.batch == 1
            or items[0].name in self._ready
            or items[0].kind != "picture"
            or items[0].more
        ):
            return
        shown: dict[str, samples.Pixels] = {}
        for item in itertools.takewhile(lambda one: one.kind == "picture" and not one.more, items):
            with contextlib.suppress(Exception):
                shown[item.name] = self.images.picture(item)
        with contextlib.suppress(Exception):
            boxes = self._told({item.name: item for item in items}, shown)
            logits = self.logits(list(shown.values()), list(shown), boxes)
            self._ready = dict(zip(shown, zip(shown.values(), logits, strict=True), strict=True))

    def discard(self) -> None:
        """Remove what was written of the input that failed."""
        self.place.discard()

    def item(self, item: inputs.Item) -> list[dict[str, Any]]:
        """Predict one input and write its results; its rows of the summary.

        Raises:
            DataError: if it cannot be used.
        """
        self.place.begin()
        if item.kind == "row":
            return [self._of_row(item)]
        if self.model.task.bags:
            return self._case(item)
        if isinstance(self.model.task, detection.Detection):
            return [self._detected(item, self.model.task)]
        dense = delivery.dense(self.model)
        chosen = results.form_of(item, self.form) if dense else "csv"
        case, seen = self.images.case(item), self.images.seen(item)
        if seen.header is None:
            pixels, found = self._ready.pop(item.name) if item.name in self._ready else self._alone(item)
            rows = (
                [self._picture(item, pixels, found, chosen)]
                if dense
                else [self._answer(item.name, self.model.task.answers(found))]
            )
        else:
            if self.form == "auto" and chosen == "dicom-seg" and not segmentation_object.holds(seen.header):
                chosen = "png"  # a film: no object holds its frames together
            boxes = None if self._prompts is None else self._prompts.of_slices(item, seen.header, self.view)
            shown = self._slices(case, seen.header, item.chosen, boxes)
            part = slices.part_of(seen.header, item.name, 0, self.view)
            if not dense:
                rows = self._classes(item, seen.header, shown)
            elif boxes is not None and self._propagate and part is not None:
                rows = [self._propagated(item, case, seen.header, part, chosen, boxes)]
            else:
                computed = self._computed(shown, item.name, seen.header, boxes)
                placed = (
                    ((at, name, pixels), part and dataclasses.replace(part, index=at), logits)
                    for at, name, pixels, logits in computed
                )
                together = across_slices.mixed(placed, self.model.task.neighbours)
                drawn = ((at, name, pixels, _mask(logits, pixels)) for (at, name, pixels), logits in together)
                rows = [self._volume(item, seen.header, drawn, chosen, boxes)]
        for note in self._noted(item, chosen):
            self.notes.setdefault(note, []).append(item.name)
        return rows

    def _detected(self, item: inputs.Item, task: detection.Detection) -> dict[str, Any]:
        """Boxes of a picture, or of every slice of a volume, in a file of their own."""
        header, own = self.images.seen(item).header, list[results.Detected]()
        if header is None:
            pixels, found = self._ready.pop(item.name) if item.name in self._ready else self._alone(item)
            answered: Iterator[tuple[int, str, samples.Pixels, Tensor]] = iter([(0, item.name, pixels, found)])
        else:
            shown = self._slices(self.images.case(item), header, item.chosen)
            answered = self._computed(shown, item.name, header)
        for at, name, pixels, values in answered:
            boxes = task.delivered(values, _size(pixels))
            own.append(_placed(results.Detected(name, None, _size(pixels), boxes), header, at, self.view))
            if self.overlays and (len(boxes) or header is None):
                self.place.overlay(
                    name, _middle(pixels.image, self.view), boxing.framed(boxes, _size(pixels)).astype(np.uint8)
                )
        self.place.boxes(item.name, own, self.names)
        for note in self._noted(item, "json"):
            self.notes.setdefault(note, []).append(item.name)
        numbers = np.concatenate([each.boxes.classes for each in own])
        counts = {name: {"boxes": int((numbers == at).sum())} for at, name in enumerate(self.names) if at}
        row = self._row(item, "json", own[0].size if header is None else header.stored.shape, counts)
        return {**row, "boxes": [line for each in own for line in each.rows(self.names)]}

    def _case(self, item: inputs.Item) -> list[dict[str, Any]]:
        """A case of many images: one row, with the weight of each image in its answer."""
        parts = item.parts or (item,)
        header = None if item.kind in ("picture", "slide") or item.parts else self._header(item)
        names, vectors, shown = list[str](), list[Tensor](), self._images(item, header)
        while some := list(itertools.islice(shown, self.batch)):
            names += [name for name, _ in some]
            vectors.append(self.vectors([pixels for _, pixels in some]))
        whole = case_heads.Parts((tuple(range(len(names))),), torch.cat(vectors).to(self.model.device))
        table = self._table([item.name])
        table = None if table is None else table.to(self.model.device)
        with torch.no_grad():
            (values,) = self.model(torch.empty(0), None, None, whole, table).float().cpu()
        weights = [float(weight) for weight in self.model.attention(whole)]
        if self.overlays:
            # Read a second time: of a case with thousands of images none but these is held.
            heaviest = [int(at) for at in np.argsort(weights)[::-1][:HEAVIEST]]
            painted = None if header is None or header.moments else header
            for at, (name, pixels) in enumerate(itertools.islice(self._images(item, header), max(heaviest) + 1)):
                if at in heaviest:
                    lines = _weighed(weights, at, heaviest.index(at) + 1, painted=painted is not None)
                    self.place.shown(name, _middle(pixels.image, self.view), lines)
            if painted is not None:
                self.place.nifti(f"{results.OVERLAYS}/{item.name}", self._painted(weights, painted), painted)
        if self.overlays and item.kind == "slide" and not item.parts:
            lines = [f"weight of each of {len(weights)} tiles, 1 in all", f"left: 0, right: {max(weights):.3g}"]
            self.place.shown(item.name, self._heat(item, weights), lines, WHITE_TO_RED)
        for note in dict.fromkeys(note for part in parts for note in self._noted(part, "csv")):
            self.notes.setdefault(note, []).append(item.name)
        parts_row = [{"id": name, "weight": round(weight, 6)} for name, weight in zip(names, weights, strict=True)]
        return [
            {**self._answer(item.name, self.model.task.answers(values)), "parts": parts_row, "files": self.place.files}
        ]

    def _images(self, item: inputs.Item, header: headers.Header | None) -> Iterator[tuple[str, samples.Pixels]]:
        """Name and pixels of every image of a case, one after the other; ``header`` that of a volume."""
        parts = item.parts or (item,)
        if item.kind == "picture":
            return ((part.name, self.images.picture(part)) for part in parts)
        if item.kind == "slide":
            return itertools.chain.from_iterable(self._tiles(part) for part in parts)
        return itertools.chain.from_iterable(self._shown(part, header) for part in parts)

    def _tiles(self, item: inputs.Item) -> Iterator[tuple[str, samples.Pixels]]:
        """Name and pixels of every tile of a slide; a name has its upper left corner, in pixels of the slide."""
        case, seen = self.images.case(item), self.images.seen(item)
        names = slide_cases.names(_slide(seen), self.view.slides)
        for at, name in enumerate(names):
            self.observer("slice", name=item.name, index=at, count=len(names))
            yield f"{item.name}/{name}", cases.read_image(case, seen, at, self.view, ())

    def _heat(self, item: inputs.Item, weights: Sequence[float]) -> NDArray[np.float32]:
        """The slide, small, with its tiles the redder the heavier they are. Shapes: (3, h, w)."""
        slide = _slide(self.images.seen(item))
        shown = tissue.small(slide).astype(np.float32) / np.float32(255.0)
        scale = max(shown.shape[:2]) / max(slide.levels[0])
        for tile, weight in zip(slide_cases.tiles(slide, self.view.slides), weights, strict=True):
            top, left, bottom, right = (
                round(scale * edge) for edge in (tile.top, tile.left, tile.top + tile.side, tile.left + tile.side)
            )
            share = np.float32(HEAT * weight / max(weights))
            part = shown[top : max(bottom, top + 1), left : max(right, left + 1)]
            part += share * (np.array([1.0, 0.0, 0.0], dtype=np.float32) - part)
        return shown.transpose(2, 0, 1)

    def _header(self, item: inputs.Item) -> headers.Header:
        """Of a volume, a series, or a film.

        Raises:
            DataError: as :meth:`images.Images.seen`.
        """
        header = self.images.seen(item).header
        if header is None:
            raise errors.DataError(f"{item.name}: neither a picture nor a volume")
        return header

    def _shown(self, item: inputs.Item, header: headers.Header | None) -> Iterator[tuple[str, samples.Pixels]]:
        """Name and pixels of every slice, cut as the recipe asks; ``header`` where it was read before."""
        case = self.images.case(item)
        return ((name, pixels) for _, name, pixels in self._slices(case, header or self._header(item), item.chosen))

    def _painted(self, weights: Sequence[float], header: headers.Header) -> NDArray[Any]:
        """The weight of every slice in all of its voxels, 255 for the heaviest one, on the input's own grid."""
        plane = slices.plane_of(header, self.view)
        numbers = _levels(weights)
        painted = {at: np.full(header.size(plane), number, dtype=np.uint8) for at, number in enumerate(numbers)}
        return volumes.place_back(painted, header, plane)

    @torch.no_grad()
    def vectors(self, shown: Sequence[samples.Pixels]) -> Tensor:
        """What a head of cases is given of images, computed as in evaluation. Shapes: (N, D)."""
        contract, patch = self.model.recipe.data, self.model.backbone.patch
        ready = [transforms.prepare(each, contract, len(self.names), multiple=patch).image for each in shown]
        pixels = torch.from_numpy(transforms.normalise(np.stack(ready), contract)).to(self.model.device)
        return self.model.vectors(pixels).cpu()

    def _alone(self, item: inputs.Item) -> tuple[samples.Pixels, Tensor]:
        pixels = self.images.picture(item)
        (found,) = self.logits([pixels], [item.name], self._told({item.name: item}, {item.name: pixels}))
        return pixels, found

    def _told(
        self, items: Mapping[str, inputs.Item], shown: Mapping[str, samples.Pixels]
    ) -> list[sliding_window.Boxes] | None:
        """Boxes of pictures; None where the adapter takes none."""
        if self._prompts is None:
            return None
        return [self._prompts.of_picture(items[name], _size(pixels)) for name, pixels in shown.items()]

    def _noted(self, item: inputs.Item, form: str) -> list[str]:
        """What the headers of all files of a case, or the form of its mask, leave in doubt, without text of files."""
        prompted = [] if self._prompts is None else [prompting.NOTE]
        if item.kind in ("picture", "slide"):
            return prompted
        read = [volumes.read_header(file, self.view.series) for file in item.files]
        prompted += [propagation.NOTE] if self._follows(read[0]) else []
        notes = [note for header in read for note in header.notes]
        prompted += [] if self._prompts is None else self._prompts.notes(read[0])
        if form == "dicom-seg" and not read[0].stored.placed:
            notes.append(segmentation_object.NO_PLANE)
        return list(dict.fromkeys([*notes, *prompted]))

    def _follows(self, header: headers.Header) -> bool:
        """Whether boxes are followed through it: slices that are no places of one volume do not lie beside another."""
        return bool(self._propagate) and slices.part_of(header, "", 0, self.view) is not None

    def _slices(
        self,
        case: layouts.Case,
        header: headers.Header,
        chosen: Sequence[int] = (),
        only: Container[int] | None = None,
    ) -> Shown:
        """Number, name and pixels of every slice, or of some, cut as the recipe asks.

        A single one has the input's own name.
        """
        names, seen = slices.names(header, self.view), cases.Seen(header.size("acquired"), header)
        for at, name in enumerate(names):
            if only is not None and at not in only:
                continue
            self.observer("slice", name=case.name, index=at, count=len(names))
            shown = case.name if len(names) == 1 else f"{case.name}/{name}"
            yield at, shown, cases.read_image(case, seen, at, self.view, chosen)

    def _classes(self, item: inputs.Item, header: headers.Header, shown: Shown) -> list[dict[str, Any]]:
        """A row for every slice, and before them one of the volume, as it is scored: the mean of its slices."""
        found = [
            (name, self.model.task.answers(values)) for _, name, _, values in self._computed(shown, item.name, header)
        ]
        whole = slices.part_of(header, item.name, 0, self.view) is not None
        mean = [(item.name, torch.stack([chances for _, chances in found]).mean(dim=0))] if whole else []
        return [self._answer(name, chances) for name, chances in (*mean, *found)]

    def _computed(
        self,
        shown: Shown,
        name: str,
        header: headers.Header,
        boxes: Mapping[int, sliding_window.Boxes] | None = None,
    ) -> Iterator[tuple[int, str, samples.Pixels, Tensor]]:
        """Slices of one item with their logits, so many at a time as are computed together; of a whole volume all."""
        if self.model.recipe.data.depth:
            yield from self._at_once(list(shown), name, header)
            return
        while part := list(itertools.islice(shown, self.batch)):
            own = None if boxes is None else [boxes[at] for at, _, _ in part]
            logits = self.logits([pixels for _, _, pixels in part], [name] * len(part), own)
            for numbered, values in zip(part, logits, strict=True):
                yield (*numbered, values)

    def _at_once(
        self, shown: Sequence[tuple[int, str, samples.Pixels]], name: str, header: headers.Header
    ) -> Iterator[tuple[int, str, samples.Pixels, Tensor]]:
        """Slices of one volume with their logits, computed as in evaluation, where the volume is one sample.

        Raises:
            DataError: for one slice, or moments of a film.
        """
        part = slices.part_of(header, name, 0, self.view)
        if part is None:
            raise defect.VOLUME_NEEDED.error(
                f"{len(shown)} slices that make no volume, and this adapter takes whole volumes; bring a volume"
            )
        whole = whole_volumes.joined([pixels for _, _, pixels in shown], part)
        (logits,) = self.logits([whole], [name])
        logits = segmentation.resized(logits, whole.image.shape[1:])
        for number, numbered in enumerate(shown):
            yield (*numbered, logits[:, number])

    def _answer(self, name: str, answers: Tensor) -> dict[str, Any]:
        return {"id": name, **self.model.task.row(answers)}

    def _picture(self, item: inputs.Item, pixels: samples.Pixels, found: Tensor, form: str) -> dict[str, Any]:
        mask = _mask(found, pixels)
        self.place.picture(item.name, mask, len(self.names))
        if self.overlays:
            self.place.overlay(item.name, pixels.image, mask)
        row = self._row(item, form, mask.shape, results.counts(mask, self.names))
        if self._prompts is None:
            return row
        return row | self._counted([self._prompts.of_picture(item, _size(pixels))])

    def _counted(self, boxes: Sequence[sliding_window.Boxes]) -> dict[str, Any]:
        """What a row says of the boxes that its mask was drawn from."""
        return {"prompts": {"from": "file", "boxes": prompting.counted(self.names, boxes)}}

    def _propagated(
        self,
        item: inputs.Item,
        case: layouts.Case,
        header: headers.Header,
        part: samples.Part,
        form: str,
        given: Mapping[int, sliding_window.Boxes],
    ) -> dict[str, Any]:
        """A volume whose boxes are followed from slice to slice: its row also says how far."""
        steps = math.floor(self._propagate / part.step + 1e-6)

        def draw(prompts: Mapping[int, sliding_window.Boxes]) -> dict[int, results.Labels]:
            shown = self._slices(case, header, item.chosen, prompts)
            computed = self._computed(shown, item.name, header, prompts)
            return {at: _mask(logits, pixels) for at, _, pixels, logits in computed}

        boxes, masks = propagation.follow(given, part.of, steps, draw)
        again = self._slices(case, header, item.chosen, masks)
        drawn = ((at, name, pixels, masks[at]) for at, name, pixels in again)
        row = self._volume(item, header, drawn, form, boxes)
        reached = {
            "mm": self._propagate,
            "slices_given": len(given),
            "slices_reached": len(boxes) - len(given),
            "slices_between": len(propagation.between(given, steps)) - len(given),
        }
        return row | self._counted(list(given.values())) | {"propagated": reached}

    def _volume(
        self,
        item: inputs.Item,
        header: headers.Header,
        drawn: Iterator[tuple[int, str, samples.Pixels, results.Labels]],
        form: str,
        boxes: Mapping[int, sliding_window.Boxes] | None,
    ) -> dict[str, Any]:
        masks = {}
        for at, name, pixels, mask in drawn:
            masks[at] = mask
            if self.overlays and masks[at].any():
                self.place.overlay(name, _middle(pixels.image, self.view), masks[at])
            if form == "png":
                self.place.picture(name, masks[at], len(self.names))
        plane, names = slices.plane_of(header, self.view), slices.names(header, self.view)
        for at in () if form != "png" or boxes is None else sorted(set(range(len(names))) - set(masks)):
            empty = np.zeros(header.size(plane), dtype=np.uint8)  # no box, so nothing was computed
            self.place.picture(f"{item.name}/{names[at]}", empty, len(self.names))
        labels = volumes.place_back(masks, header, plane)
        if form == "nifti":
            self.place.nifti(item.name, labels, header)
        elif form == "dicom-seg":
            helped = "" if self._prompts is None else f"boxes from a file, sha256 {self._prompts.source['sha256']}"
            helped += f", followed up to {self._propagate:g} mm" if helped and self._follows(header) else ""
            self.place.dicom_seg(item.name, labels, header, self.model.recipe.data, self.fingerprint, helped)
        row = self._row(item, form, header.stored.shape, results.counts(labels, self.names, header))
        return row if boxes is None else row | self._counted(list(boxes.values()))

    def _row(self, item: inputs.Item, form: str, size: Sequence[int], counts: Mapping[str, Any]) -> dict[str, Any]:
        row = {"id": item.name, "kind": item.kind, "form": form, "size": list(size), "files": self.place.files}
        return {**row, "classes": counts, "notes": self._noted(item, form)}


def _slide(seen: cases.Seen) -> slide_file.Slide:
    if seen.slide is None:
        raise errors.DataError("no whole slide, where one was looked for; report it")
    return seen.slide


def _size(pixels: samples.Pixels) -> tuple[int, int]:
    """Height and width."""
    height, width = pixels.image.shape[1:]
    return height, width


def _placed(detected: results.Detected, header: headers.Header | None, at: int, view: slices.View) -> results.Detected:
    """The same with its slice and its place in the file's own axes; of a picture as it is."""
    if header is None:
        return detected
    axis = header.axis(slices.plane_of(header, view))
    voxels = geometry.box_back(detected.boxes.edges, header.stored, axis, at)
    return dataclasses.replace(detected, slice=at, voxels=voxels)


def _mask(found: Tensor, pixels: samples.Pixels) -> results.Labels:
    """Class numbers on the image's own pixels. Shapes: (K, h, w) -> (H, W)."""
    return segmentation.classes_at(found, pixels.image.shape[1:]).astype(np.uint8)  # at most 256 classes


def _levels(weights: Sequence[float]) -> NDArray[np.uint8]:
    """Weights as voxels have them: 255 for the heaviest. Shapes: (N,)."""
    return np.round(255 * np.asarray(weights) / max(weights)).astype(np.uint8)


def _weighed(weights: Sequence[float], at: int, rank: int, *, painted: bool) -> list[str]:
    """Lines of text of an image of a case: its weight, and how that compares.

    Args:
        weights: of all images of the case.
        at: number of the image, from 0.
        rank: 1 for the heaviest.
        painted: whether a NIfTI has the weights too.
    """
    lines = [f"weight {weights[at]:.3g} (all images: 1)", f"image {at + 1} of {len(weights)}; rank {rank} by weight"]
    return [*lines, f"value {_levels(weights)[at]} in the NIfTI of weights"] if painted else lines


def _middle(image: NDArray[np.float32], view: slices.View) -> NDArray[np.float32]:
    """The slice itself, of a stack with its neighbours. Shapes: (C, H, W)."""
    return image[1:2] if view.stack > 1 else image
