"""ONNX in 8 bits throughout: weights, and what goes into the layers by ranges measured on images (static quantisation).

Every range is the smallest and largest value that was seen (min-max), so nothing that the images showed is cut off; the
graph holds these ranges as QuantizeLinear and DequantizeLinear (QDQ). Softmax, norms and the products of attention stay
in float32, and so do the convolutions of mobile blocks.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedvfm import errors
from fedvfm.data import transforms
from fedvfm.inference import agreement, calibration, delivery, graph, sessions
from fedvfm.model import adapted_model, sliding_window
from fedvfm.storage import storage

LEAST_AGREEMENT = 0.9
"""Dice of the masks with those of the float graph, or share of equal classes: below it nothing is written."""
LEAST_OF_A_CLASS = 0.7
"""The same of each class: a mean over classes hides one that is lost."""
FEWEST = 3
"""Images of a class, where one image has one answer, that are needed to say that it is lost."""
QUANTISED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators whose weights and inputs are in 8 bits."""
FLOAT_OUTPUT = ("Gemm", "MatMul")
"""Of these, operators whose sums stay in float32; convolutions have kernels in whole numbers only with both ends so."""
OF_A_CLASS = {
    "dice": "Dice of its masks with those of the float graph",
    "same_class": "the share of the float graph's answers that are its own",
    "same_side": "the F1 score of its labels beside those of the float graph",
}
TIMED = 8
"""Windows on which the time of both graphs is taken."""
REMEDY = "Nothing was written. Export --format onnx-int8, where only weights are in 8 bits, or --format onnx"


@dataclass(frozen=True)
class Compared:
    """The graph in 8 bits beside the float graph, on the same images.

    Attributes:
        name: what ``agreement`` is: "dice", "same_class", "same_side", or empty where the answers are no classes.
        agreement: 1 for the same.
        classes: the same of each class that was found, see :class:`fedvfm.inference.agreement.Agreement`.
        images: how many images each of these rests on.
        difference: of logits, the largest, in units of the largest.
        seconds: a window, by the float graph and by this one, medians.
    """

    name: str
    agreement: float
    classes: dict[str, float]
    difference: float
    seconds: tuple[float, float]
    images: dict[str, int] = field(default_factory=dict)

    @property
    def judged(self) -> dict[str, float]:
        """The classes that enough images show."""
        least = 1 if self.name == "dice" else FEWEST
        return {name: share for name, share in self.classes.items() if self.images.get(name, least) >= least}


def write(model: adapted_model.AdaptedModel, adapter: Path, folder: Path, calibrate: Path) -> dict[str, Any]:
    """``model.onnx`` in 8 bits, measured on images, and compared with the float graph on the same images.

    Weights are whole numbers of 7 bits, one scale a column, stored in 8: see :func:`fedvfm.inference.graph.write_int8`.

    Args:
        model: what is exported.
        adapter: where it was loaded from.
        folder: where to.
        calibrate: pictures and volumes of the kind that will be predicted, without labels.

    Raises:
        MissingExtra: without onnx, onnxscript and onnxruntime.
        DataError: if the images are too few or cannot be used, or the adapter finds nothing in them.
        ConfigError: if onnxruntime cannot express the graph so.
        CheckpointError: if the graph answers otherwise than the adapter.
    """
    graph.require_runtime()
    graph.require_packages()
    delivery.require_promptless(model, "--format onnx")
    shown = calibration.read(model, calibrate)
    with tempfile.TemporaryDirectory(prefix="fedvfm-onnx-") as beside:
        facts = graph.write(model, adapter, Path(beside))
        whole = sessions.Session(Path(beside), model)
        windows, expected = _windows(model, whole, shown)
        record = {"method": "min-max", "images": len(shown), "windows": len(windows)}
        _quantise(Path(beside) / graph.FILE, folder / graph.FILE, windows, record)
        compared = _compare(model, whole, sessions.Session(folder, model), shown, expected, windows)
        before = sum(path.stat().st_size for path in Path(beside).glob(f"{graph.FILE}*"))
    _require_near(compared)
    after = sum(path.stat().st_size for path in folder.glob(f"{graph.FILE}*"))
    batch = None if facts["batch"] == "free" else int(facts["batch"])
    storage.write_text(
        folder / "README.md",
        graph.card_of(model, batch, _checked(compared, len(shown), before, after), _notes(model, compared)),
    )
    return {
        **facts,
        "checked_with": "onnxruntime",
        "difference": compared.difference,
        "int8": compared.agreement,
        "calibration": {
            **record,
            "compared_by": compared.name or "difference",
            "classes": compared.classes,
            "images_of_classes": compared.images,
            "not_judged": _not_judged(model, compared),
            "limit": LEAST_AGREEMENT if compared.name else graph.FURTHEST,
            "bytes": {"float32": before, "int8": after},
            "seconds": dict(zip(("float32", "int8"), compared.seconds, strict=True)),
        },
    }


def _windows(
    model: adapted_model.AdaptedModel, whole: sessions.Session, shown: Sequence[transforms.Image]
) -> tuple[list[transforms.Image], list[Tensor]]:
    """What the graph is given of the images, and its logits of each image.

    Raises:
        DataError: if an image is of a size that the graph cannot take.
    """
    windows: list[transforms.Image] = []

    def run(parts: Sequence[sliding_window.Window]) -> Tensor:
        windows.extend(part.image for part in parts)
        return whole.run(parts)

    size = model.recipe.data.input_size
    for image in shown:
        shape = image.shape[1:]
        if shape != size and sliding_window.tiling(model, (shape[0], shape[1]))[0] != size:
            raise errors.DataError(
                f"--calibrate: an image of {shape[0]} x {shape[1]} pixels, and the graph takes {size[0]} x {size[1]} "
                "(recipe.data.fit = 'native'); give images that are cut into windows of that size"
            )
    return windows, list(sliding_window.many(model, shown, run, 1))


def kept_in_float(model: Any) -> list[str]:
    """Names of the convolutions that lose too much in 8 bits: none, or those of mobile blocks (TinyViT, MobileNet).

    Where a convolution sees each channel by itself, channels have ranges of their own, which one scale for all of them
    cannot hold; that goes for what the convolutions of one pixel around it give and take, too. All of them together
    hold few numbers.

    Args:
        model: an ONNX ``ModelProto``.
    """
    sizes = {weights.name: list(weights.dims) for weights in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    grouped = {node.name for node in convolutions for given in node.attribute if given.name == "group" and given.i > 1}
    of_a_pixel = {node.name for node in convolutions if set(sizes.get(node.input[1], [0])[2:]) == {1}}
    return sorted(grouped | of_a_pixel) if grouped else []


def _quantise(source: Path, target: Path, windows: Sequence[transforms.Image], record: dict[str, Any]) -> None:
    import onnx
    import onnxruntime
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(windows)

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            image = next(self._left, None)
            return None if image is None else {graph.NAMES[0]: image[None]}

    with storage.guard(target.parent), graph.quiet():
        big = source.with_suffix(".onnx.data").exists()
        ready = source.with_name(f"ready-{source.name}")
        try:
            quantization.quant_pre_process(source, ready, skip_symbolic_shape=True, save_as_external_data=big)
            quantization.quantize_static(
                ready,
                target,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTISED),
                nodes_to_exclude=kept_in_float(onnx.load(ready, load_external_data=False)),
                per_channel=True,
                reduce_range=True,  # as in graph.write_int8
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod.MinMax,
                use_external_data_format=big,
                extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": list(FLOAT_OUTPUT)},
            )
        except (OSError, MemoryError):
            raise
        except Exception as error:  # onnxruntime raises whatever its passes raise
            raise errors.ConfigError(
                "--int8",
                [
                    f"onnxruntime {onnxruntime.__version__} cannot bring this graph to 8 bits "
                    f"({type(error).__name__}). {REMEDY}"
                ],
            ) from error
        given = {entry.key: entry.value for entry in onnx.load(source, load_external_data=False).metadata_props}
        written = onnx.load(target, load_external_data=False)
        del written.metadata_props[:]
        entries = given | graph.INT8 | {"fedvfm.calibration": json.dumps(record)}
        written.metadata_props.extend(
            onnx.StringStringEntryProto(key=key, value=value) for key, value in entries.items()
        )
        onnx.save(written, target)


def _compare(
    model: adapted_model.AdaptedModel,
    whole: sessions.Session,
    small: sessions.Session,
    shown: Sequence[transforms.Image],
    expected: Sequence[Tensor],
    windows: Sequence[transforms.Image],
) -> Compared:
    answers = list(sliding_window.many(model, shown, small.run, 1))
    same = agreement.measure(model, answers, expected, "--calibrate")
    off = max(delivery.difference(own, other) for own, other in zip(answers, expected, strict=True))
    if not all(bool(torch.isfinite(own).all()) for own in answers):
        off = float("nan")
    return Compared(same.name, same.share, same.classes, off, _seconds(whole, small, windows), same.images)


def _seconds(
    whole: sessions.Session, small: sessions.Session, windows: Sequence[transforms.Image]
) -> tuple[float, float]:
    """Medians of the wall time of a window, both graphs in turns."""
    took: tuple[list[float], list[float]] = ([], [])
    for image in windows[:TIMED]:
        for session, own in zip((whole, small), took, strict=True):
            start = time.perf_counter()
            session.run([sliding_window.Window(0, image, (0, 0))])
            own.append(time.perf_counter() - start)
    return statistics.median(took[0]), statistics.median(took[1])


def _require_near(compared: Compared) -> None:
    """Refuse a graph that answers otherwise.

    Raises:
        CheckpointError: naming the limit.
    """
    if compared.name and not (compared.agreement >= LEAST_AGREEMENT and np.isfinite(compared.difference)):
        what = {"dice": "Dice of its masks with those", "same_class": "share of classes that are those"}
        raise errors.CheckpointError(
            f"the ONNX graph in 8 bits does not answer what the adapter does: {what.get(compared.name, 'share')} of "
            f"the float graph is {compared.agreement:.3f} on the images of --calibrate, {LEAST_AGREEMENT:g} is the "
            f"least. {REMEDY}"
        )
    lost = [f"'{name}' {share:.3f}" for name, share in compared.judged.items() if share < LEAST_OF_A_CLASS]
    if lost:
        raise errors.CheckpointError(
            f"the ONNX graph in 8 bits does not find what the adapter does: {OF_A_CLASS[compared.name]} is "
            f"{', '.join(lost)} on the images of --calibrate, {LEAST_OF_A_CLASS:g} is the least of a class. {REMEDY}"
        )
    if not compared.name and not compared.difference <= graph.FURTHEST:
        raise errors.CheckpointError(
            f"the ONNX graph in 8 bits does not answer what the adapter does: it is off by {compared.difference:.2g} "
            f"of the largest value on the images of --calibrate, {graph.FURTHEST:g} is allowed. {REMEDY}"
        )


def _checked(compared: Compared, count: int, before: int, after: int) -> str:
    """Line of the card: how near it is, how large and how fast."""
    words = {
        "dice": f"Dice of its masks with those of the float graph {compared.agreement:.4f} ("
        + _each_class(compared)
        + ")",
        "same_class": f"{compared.agreement:.2%} of the classes are the same (" + _each_class(compared) + ")",
        "same_side": f"{compared.agreement:.2%} of the labels are on the same side of 0.5 ("
        + _each_class(compared)
        + ")",
    }
    near = words.get(compared.name, "values as near as the difference says")
    least = f", {LEAST_AGREEMENT:g} is the least allowed" if compared.name else ""
    return (
        f"- weights and inputs of its layers in 8 bits; compared by onnxruntime on the {count} images that the ranges "
        f"were measured on (min-max): {near}{least}; off by {compared.difference:.2g} of the largest logit; {after:,} "
        f"bytes beside {before:,}; {compared.seconds[1]:.3g} s beside {compared.seconds[0]:.3g} s a window there"
    )


def _each_class(compared: Compared) -> str:
    return ", ".join(f"{name} {share:.4f}" for name, share in compared.classes.items())


def _not_judged(model: adapted_model.AdaptedModel, compared: Compared) -> list[str]:
    """Classes that too few of the images show to say whether the graph still finds them."""
    names = model.recipe.data.class_names[1 if delivery.dense(model) else 0 :]
    return [name for name in names if name not in compared.judged] if compared.name else []


def _notes(model: adapted_model.AdaptedModel, compared: Compared) -> list[str]:
    unseen = [f"'{name}' ({compared.images.get(name, 0)})" for name in _not_judged(model, compared)]
    few = (
        [
            f"- not judged, as too few of these images show them by the float graph's answers: {', '.join(unseen)}; "
            "calibrate with images that do before this graph is used for them"
        ]
        if unseen
        else []
    )
    private = model.recipe.privacy.mechanism != "none"
    covered = ", and the adapter's epsilon does not cover them" if private else ""
    return [*few, f"- its ranges say how bright the values in its layers became on those images{covered}"]
