"""ONNX: backbone, adapter and head as one graph at the contract's input size."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedvfm import errors
from fedvfm.inference import delivery, export, sessions
from fedvfm.model import adapted_model
from fedvfm.runtime import logs
from fedvfm.storage import storage

FILE = sessions.FILE
NEEDED = ("onnx", "onnxscript")
OPSET = 20
NAMES = ("image", "table")
"""Inputs of the graph; the second one where the recipe takes a table beside the image."""
INT8 = {"fedvfm.weights": "int8"}
FURTHEST = 0.25
"""In units of the largest logit: a graph in 8 bits that is further off is refused."""
ONE_FILE_BYTES = 1_900_000_000
"""Protobuf holds 2 GiB; larger weights lie in a file beside the graph."""


def write(model: adapted_model.AdaptedModel, adapter: Path, folder: Path) -> dict[str, Any]:
    """``model.onnx``: input ``image``, output ``logits``, checked against the model before it counts as written.

    The batch is free where the exporter can keep it so, else it is 1; height and width are those of the contract.

    Raises:
        MissingExtra: without onnx and onnxscript.
        ConfigError: if the exporter cannot express the model, or it needs prompts.
        CheckpointError: if the graph computes something else.
    """
    require_packages()
    delivery.require_promptless(model, "--format onnx")
    plain = delivery.Deliverable(delivery.exact(delivery.folded(model))).eval()
    program, batch = _graph(plain, model)
    _store(program, plain, folder / FILE, model)
    by, off = _check(folder / FILE, plain, model, (1, 3) if batch is None else (batch,))
    storage.write_text(folder / "README.md", card_of(model, batch, _checked(by, off)))
    return {"opset": OPSET, "batch": "free" if batch is None else batch, "checked_with": by, "difference": off}


def require_packages() -> None:
    """Refuse where the exporter is not installed.

    Raises:
        MissingExtra: naming the extra.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise errors.MissingExtra(
            f"export to ONNX needs {' and '.join(missing)}, not installed here. Run: pip install 'fedvfm[onnx]'"
        )


def require_runtime() -> None:
    """Refuse 8 bits where onnxruntime is not installed.

    Raises:
        MissingExtra: naming the extra.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise errors.MissingExtra("weights in 8 bits need onnxruntime. Run: pip install 'fedvfm[onnx]'")


def write_int8(model: adapted_model.AdaptedModel, adapter: Path, folder: Path) -> dict[str, Any]:
    """The same graph with the weights of its linear layers in whole numbers of 7 bits, one scale a column, stored in 8.

    What goes into these layers is brought to 8 bits as it comes; all else stays in float32. It computes nearly what the
    adapter does, and how near depends on the adapter: the largest difference and the share of equal classes on drawn
    images are stated, and beyond :data:`FURTHEST` nothing is written.

    Raises:
        MissingExtra: without onnx, onnxscript and onnxruntime.
        ConfigError, CheckpointError: as :func:`write`, and if it is too far off.
    """
    require_runtime()
    with tempfile.TemporaryDirectory(prefix="fedvfm-onnx-") as beside:
        facts = write(model, adapter, Path(beside))
        _quantise(Path(beside) / FILE, folder / FILE)
    given = _given(model, 1 if facts["batch"] == 1 else 2)
    with torch.no_grad():
        expected = delivery.Deliverable(delivery.exact(model)).eval()(*given)
    by, found = _run(folder / FILE, given)
    off = delivery.require_same("the ONNX graph in 8 bits", found, expected, FURTHEST)
    same = float((found.argmax(dim=1) == expected.argmax(dim=1)).float().mean())
    batch = None if facts["batch"] == "free" else int(facts["batch"])
    near = f"; weights in 8 bits, {same:.2%} of the classes of drawn images are the same"
    storage.write_text(folder / "README.md", card_of(model, batch, _checked(by, off) + near))
    return {**facts, "checked_with": by, "difference": off, "int8": same}


def _quantise(source: Path, target: Path) -> None:
    import onnx
    from onnxruntime import quantization

    with storage.guard(target.parent), quiet():
        big = source.with_suffix(".onnx.data").exists()
        quantization.quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            # Processors with AVX2 or AVX-512 and no VNNI add pairs of products in 16 bits: with all 8 bits of the
            # weights these would be cut off, and the graph would compute something else there than where it was made.
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
            use_external_data_format=big,
        )
        made = onnx.load(target, load_external_data=False)
        made.metadata_props.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in INT8.items())
        onnx.save(made, target)


def _check(
    path: Path, plain: delivery.Deliverable, model: adapted_model.AdaptedModel, batches: Sequence[int]
) -> tuple[str, float]:
    """What ran the graph, and its largest difference from the model over all batches.

    A batch that the exporter fixed in secret shows with the other number of images only.

    Raises:
        CheckpointError: if they differ.
    """
    by, worst = "", 0.0
    for batch in batches:
        given = _given(model, batch)
        with torch.no_grad():
            expected = plain(*given)
        by, found = _run(path, given)
        pairs = zip(delivery.parts_of(model, found), delivery.parts_of(model, expected), strict=True)
        worst = max(worst, *(delivery.require_same("the ONNX graph", *pair) for pair in pairs))
    return by, worst


def _graph(plain: delivery.Deliverable, model: adapted_model.AdaptedModel) -> tuple[Any, int | None]:
    """The exported program, and its fixed batch size or None."""
    with contextlib.suppress(Exception):  # the exporter raises whatever the traced code raises
        given = _given(model, 2)
        program = _exported(plain, given, ({0: torch.export.Dim.DYNAMIC},) * len(given))
        if not isinstance(program.model.graph.inputs[0].shape[0], int):
            return program, None
    try:
        return _exported(plain, _given(model, 1), None), 1
    except Exception as error:
        raise _inexpressible(model, error) from error


def _given(model: adapted_model.AdaptedModel, batch: int) -> tuple[Tensor, ...]:
    """An image, and a row of the table where the recipe takes one, so many times."""
    return (delivery.example(model, batch), *delivery.example_rows(model, batch))


def save(
    module: torch.nn.Module,
    inputs: tuple[Tensor, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dimensions: Any,
    path: Path,
    model: adapted_model.AdaptedModel,
) -> None:
    """One graph of any module, with what a reader of it must know.

    Raises:
        ConfigError: if the exporter cannot express it.
    """
    try:
        with quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                module,
                inputs,
                input_names=list(input_names),
                output_names=list(output_names),
                dynamic_shapes=dimensions,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever the traced code raises
        raise _inexpressible(model, error) from error
    _store(program, module, path, model)


def _store(program: Any, module: torch.nn.Module, path: Path, model: adapted_model.AdaptedModel) -> None:
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the exporter notes each line of source with this machine's paths
    program.model.metadata_props.update(_facts(model))
    big = sum(value.numel() for value in module.state_dict().values()) * 4 > ONE_FILE_BYTES
    with storage.guard(path.parent), quiet():
        program.save(str(path), external_data=big)


def _inexpressible(model: adapted_model.AdaptedModel, error: Exception) -> errors.ConfigError:
    alone = model.task.bags or delivery.detects(model) or model.recipe.inputs.columns  # no other form holds these
    remedy = "no other form holds this adapter: use 'fedvfm predict'" if alone else "use hf or monai"
    return errors.ConfigError(
        "--format onnx",
        [
            f"torch {torch.__version__} cannot express backbone '{model.backbone.name}' with adapter kind "
            f"'{model.recipe.adapter.kind}' as ONNX ({type(error).__name__}); {remedy}"
        ],
    )


def outputs(path: Path, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """All outputs of a graph, by onnxruntime where it is installed, else by ONNX's own slow reference."""
    feed = {name: value.cpu().numpy() for name, value in inputs.items()}
    if importlib.util.find_spec("onnxruntime") is not None:
        computed = sessions.opened(path).run(None, feed)
    else:
        from onnx import reference

        computed = reference.ReferenceEvaluator(str(path)).run(None, feed)
    return [torch.from_numpy(np.asarray(value)) for value in computed]


def _exported(plain: delivery.Deliverable, given: tuple[Tensor, ...], dimensions: Any) -> Any:
    with quiet(), torch.no_grad():
        return torch.onnx.export(
            plain,
            given,
            input_names=list(NAMES[: len(given)]),
            output_names=["logits"],
            dynamic_shapes=dimensions,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )


def _run(path: Path, given: tuple[Tensor, ...]) -> tuple[str, Tensor]:
    """(what ran it, logits): onnxruntime where it is installed, else ONNX's own slow reference."""
    by = "onnxruntime" if importlib.util.find_spec("onnxruntime") is not None else "onnx.reference"
    return by, outputs(path, dict(zip(NAMES, given, strict=False)))[0]


def _facts(model: adapted_model.AdaptedModel) -> dict[str, str]:
    """What a reader of the graph must know, as text beside it."""
    contract = model.recipe.data
    return {
        "fedvfm.task": model.recipe.task.kind,
        "fedvfm.target": model.recipe.target.kind,
        "fedvfm.class_names": json.dumps(list(contract.class_names)),
        "fedvfm.input": json.dumps(
            {"range": [0, 1], "size": list(contract.patch_size), "intensity": contract.intensity}
        ),
        "fedvfm.adapter_fingerprint": model.read().fingerprint,
        "fedvfm.backbone_sha256": model.backbone.sha256,
        "fedvfm.recipe_hash": model.recipe_hash,
        "fedvfm.note": "not a medical device",
        **({export.MARK: str(model.licence)} if model.licence else {}),
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's notes on packages that are not needed."""
    # onnxruntime's quantization says what it has to say to the root.
    with logs.limited(logging.ERROR, "", "torch.onnx", "onnxscript", "onnx_ir"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _checked(by: str, off: float) -> str:
    return f"- checked with {by}: off by {off:.1g} of the largest logit"


def card_of(model: adapted_model.AdaptedModel, batch: int | None, checked: str, notes: Sequence[str] = ()) -> str:
    """The card beside the graph of a whole model.

    Args:
        model: what was exported.
        batch: images at a time; None where any number goes.
        checked: line on how it was checked.
        notes: further lines.
    """
    sides = ", ".join(map(str, model.recipe.data.patch_size))
    classes = model.task.width
    size = "B" if batch is None else str(batch)
    shape = (
        f"({size}, {classes}, {sides})" if delivery.dense(model) or delivery.detects(model) else f"({size}, {classes})"
    )
    columns = model.recipe.inputs.numbers_a_row
    table = ', "table": table' if columns else ""
    usage = [
        "import onnxruntime",
        f'session = onnxruntime.InferenceSession("{FILE}")',
        f'(logits,) = session.run(["logits"], {{"image": image{table}}})',
    ]
    facts = [
        f"- `image`: float32 ({size}, 3, {sides}), prepared as below; the graph itself normalises",
        *([f"- `table`: float32 ({size}, {columns}), NaN where a value is missing"] if columns else []),
        *delivery.table_lines(model),
        f"- `logits`: float32 {shape}{delivery.what_comes_out(model)}",
        checked,
        *notes,
    ]
    return card(model, usage, facts)


def card(model: adapted_model.AdaptedModel, usage: Sequence[str], facts: Sequence[str]) -> str:
    """The card beside a graph.

    Args:
        model: what was exported.
        usage: lines of Python that compute it.
        facts: lines on what goes in and comes out, and how it was checked.
    """
    lines = [
        f"# {model.recipe.task.kind} with {model.recipe.backbone.name}, as ONNX",
        "",
        "Not a medical device. Trained for research; check it on your own data before any use. The terms of use of the",
        "backbone still hold.",
        "",
        "```python",
        *usage,
        "```",
        "",
        *facts,
        "",
        "## What goes in",
        "",
        *delivery.what_is_prepared(model),
        "",
        "## Where it comes from",
        "",
        f"- adapter: kind `{model.recipe.adapter.kind}`, fingerprint `{model.read().fingerprint}`",
        f"- backbone sha256: `{model.backbone.sha256 or 'made from the seed'}`",
        *delivery.licence_line(model),
    ]
    return "\n".join(lines) + "\n"
