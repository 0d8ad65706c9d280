"""Export: a saved adapter in the layout of other tools."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from fedvfm import errors, registry
from fedvfm.backbones import licences
from fedvfm.inference import calibration, card, delivery, export, output, quantised_graph

TABLE = registry.Table(
    "export format",
    {
        "hf": "fedvfm.inference.hub:write",
        "monai": "fedvfm.inference.bundle:write",
        "onnx": "fedvfm.inference.case_graph:write_any",
        "onnx-int8": "fedvfm.inference.graph:write_int8",
        "peft": "fedvfm.inference.hub:copy_peft",
    },
)
"""Format -> ``write(model, adapter, folder)``: writes into the folder and gives further rows of the summary.

``model`` is the adapted model on the CPU, ``adapter`` the folder it was loaded from.
"""
MERGED = ("hf", "onnx", "onnx-int8")
"""Formats that hold the backbone's weights in another form than their publisher's."""


def export_adapter(
    adapter: str | os.PathLike[str],
    output_folder: str | os.PathLike[str],
    form: str = "hf",
    *,
    int8: bool = False,
    calibrate: str | os.PathLike[str] | None = None,
    backbone: str | None = None,
) -> dict[str, Any]:
    """Write an adapter in another tool's layout, and say what was written.

    Args:
        adapter: folder of a saved adapter.
        output_folder: must not exist or be empty; it is whole or not there.
        form: "hf" (merged model of transformers), "onnx", "onnx-int8" (weights in 8 bits), "monai" (bundle) or "peft".
        int8: of "onnx": also what goes into the layers is in 8 bits, by ranges measured on images.
        calibrate: file or folder with these images, at least 32, of the kind that will be predicted; labels are not
            needed.
        backbone: another place of the same backbone (its sha256 is still checked).

    Raises:
        UnknownName: for a format that is not there.
        ConfigError: if the adapter's kind or backbone cannot take this form.
        LicenceForbids: if the backbone's licence forbids a merged model.
        CheckpointError: if the adapter is damaged, or what was written computes something else.
        MissingExtra: if a package is needed that is not installed.
        OutputInUse: if the output folder is not free.
        StorageError: if the disk refuses.
    """
    write = TABLE.get(form)
    measured = _measured_on(form, int8, calibrate)
    folder = Path(output_folder)
    output.require_free(folder)
    model = export.load_adapter(adapter, backbone=backbone)
    if form in MERGED:
        licences.require_derivatives(model.licence, model.recipe.backbone.name, f"--format {form}")
    if form == "peft" and card.holds_weights(model):
        instead = "--format monai, which leaves the weights as they are"
        licences.require_derivatives(model.licence, model.recipe.backbone.name, f"--format {form}", instead)
    if form != "onnx" or measured is not None:
        delivery.require_images(model, f"--format {form}")
        delivery.require_tableless(model, f"--format {form}")
        delivery.require_no_boxes(model, f"--format {form}")
    if measured is not None:
        delivery.require_slices(model, "--int8")
    with output.whole(folder) as made, warnings.catch_warnings():
        # What libraries will rename some day is no business of who exports.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        facts = (
            write(model, Path(adapter), made)
            if measured is None
            else quantised_graph.write(model, Path(adapter), made, measured)
        )
        files = {path.relative_to(made).as_posix(): path.stat().st_size for path in made.rglob("*") if path.is_file()}
    return {
        "format": form,
        "folder": str(folder),
        "files": dict(sorted(files.items())),
        "fingerprint": model.read().fingerprint,
        "backbone": {"name": model.backbone.name, "sha256": model.backbone.sha256},
        **facts,
    }


def _measured_on(form: str, int8: bool, calibrate: str | os.PathLike[str] | None) -> Path | None:
    """Where the images lie that 8 bits are measured on; None where none are.

    Raises:
        ConfigError: for options that do not belong together.
    """
    if int8 and form != "onnx":
        raise errors.ConfigError("--int8", [f"is for --format onnx, not '{form}'; leave it out"])
    if calibrate is not None and not int8:
        raise errors.ConfigError("--calibrate", ["is for --format onnx --int8; add --int8, or leave it out"])
    if int8 and calibrate is None:
        raise errors.ConfigError(
            "--int8",
            [
                f"ranges are measured on at least {calibration.LEAST} images: give --calibrate FOLDER. Without images: "
                "--format onnx-int8, where only weights are in 8 bits"
            ],
        )
    return None if calibrate is None else Path(calibrate)
