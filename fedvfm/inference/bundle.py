"""A MONAI bundle: the adapter and its backbone with a ``network_def`` and a ``run`` that MONAI finds and starts.

Weights stay safetensors. A bundle usually carries ``models/model.pt`` or ``model.ts``: the first is a pickle, the
second a program; neither is written here, because nobody should have to run a file to look at weights. MONAI's format
does not need them: ``configs/inference.json`` names what builds the network, and here that is this package, which reads
the adapter by its fingerprint and the backbone by its sha256.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedvfm import errors
from fedvfm.backbones import identity, weights
from fedvfm.config import schema
from fedvfm.inference import channels as grouping
from fedvfm.inference import delivery, export, inputs, predict
from fedvfm.model import adapted_model, adapter_folder
from fedvfm.storage import storage

VERSION = "0.1.0"
"""Of the layout of the bundle, not of the weights."""
ADAPTER, BACKBONE = "models/adapter", "models/backbone"
PACKAGES = ("fedvfm", "peft", "safetensors", "transformers")
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
LICENCE = """No licence has been chosen for this adapter yet.

Who trained it decides: put the terms of use in place of this text. The terms of use of the backbone hold besides.
"""


def network(folder: str | os.PathLike[str], device: str = "cpu") -> delivery.Deliverable:
    """The network of a bundle: prepared images in [0, 1] to logits.

    Args:
        folder: the bundle's root.
        device: where to compute.

    Raises:
        CheckpointError, WeightsError: if adapter or backbone are damaged or not those of each other.
    """
    root = Path(folder)
    return delivery.Deliverable(export.load_adapter(root / ADAPTER, device=device, backbone=_backbone(root))).eval()


@dataclass(frozen=True)
class Evaluator:
    """What MONAI calls a bundle's inference engine: prediction of a file or folder, see :func:`fedvfm.predict`.

    Attributes:
        folder: the bundle's root.
        dataset_dir: file or folder to predict.
        output_dir: must not exist or be empty.
        device: where to compute.
        form: of masks.
        series: which series of a DICOM folder, see :func:`fedvfm.predict`.
        channels: which files of a case are the model's channels, see there.
    """

    folder: str
    dataset_dir: str
    output_dir: str
    device: str = "cpu"
    form: str = "auto"
    series: str = ""
    channels: str = ""

    def run(self) -> dict[str, Any]:
        """The summary.

        Raises:
            FedvfmError: see :func:`fedvfm.predict`.
        """
        root = Path(self.folder)
        return predict.predict(
            root / ADAPTER,
            self.dataset_dir,
            self.output_dir,
            form=self.form,
            series=self.series,
            channels=self.channels,
            device=self.device,
            backbone=_backbone(root),
        )


def dataset(folder: str, dataset_dir: str, series: str = "", channels: str = "") -> list[str]:
    """Names of what would be predicted: the channels of a case are one, as the adapter takes them.

    Raises:
        FedvfmError: see :func:`fedvfm.predict`.
    """
    where = Path(dataset_dir)
    found, wanted = inputs.find(where, series), export.recipe_of(Path(folder) / ADAPTER).data
    passed = inputs.meant(found, series) if series else {}
    left = [item for item in found if item.name not in passed]
    joined = grouping.join(
        left,
        wanted.channels,
        grouping.read_numbers(channels),
        alone=where.is_file(),
        optional=wanted.optional_channels,
    )
    return [item.name for item in joined.items]


def _backbone(root: Path) -> str | None:
    return str(root / BACKBONE) if (root / BACKBONE).is_dir() else None


def write(model: adapted_model.AdaptedModel, adapter: Path, folder: Path) -> dict[str, Any]:
    """The bundle, and a check that its network computes the same logits.

    Raises:
        CheckpointError: if it does not.
        ConfigError: if the adapter needs prompts.
        WeightsError: if the backbone has gone meanwhile.
    """
    delivery.require_promptless(model, "--format monai")
    with storage.guard(folder):
        (folder / "models").mkdir()
        export.copy_files(adapter, folder / ADAPTER)
        if model.backbone.sha256:
            _copy_backbone(model, folder / BACKBONE)
    terms = "".join(f"{line[2:]}.\n" for line in delivery.licence_line(model))
    storage.write_text(folder / "LICENSE", LICENCE + terms)
    storage.write_text(folder / "configs" / "metadata.json", _json(_metadata(model)))
    storage.write_text(folder / "configs" / "inference.json", _json(_inference()))
    storage.write_text(folder / "docs" / "README.md", _card(model))
    image = delivery.example(model)
    with torch.no_grad():
        found, expected = (one(image) for one in (network(folder), delivery.Deliverable(model)))
    return {"difference": delivery.require_same("the bundle", found, expected, 0.0)}


def _copy_backbone(model: adapted_model.AdaptedModel, to: Path) -> None:
    located = weights.locate(model.recipe.backbone, download=False)
    if located.sha256 != model.backbone.sha256:
        raise errors.WeightsError(f"{located.folder}: changed while it was read. Export again")
    to.mkdir()
    beside = identity.TOKENIZER if model.recipe.words is not None else ()
    read = [located.folder / name for name in beside if (located.folder / name).is_file()]
    for file in (located.folder / identity.CONFIG, *read, *identity.weight_files(located.folder)):
        shutil.copyfile(file, to / file.name)


def _inference() -> dict[str, Any]:
    """What MONAI reads: expressions begin with ``$``, references with ``@``."""
    return {
        "imports": ["$import os"],
        "bundle_root": ".",
        "device": "cpu",
        "dataset_dir": "$os.path.join(@bundle_root, 'input')",
        "output_dir": "$os.path.join(@bundle_root, 'output')",
        "form": "auto",
        "series": "",
        "channels": "",
        "network_def": {"_target_": "fedvfm.inference.bundle.network", "folder": "@bundle_root", "device": "@device"},
        "inferer": {"_target_": "monai.inferers.SimpleInferer"},
        "dataset": {
            "_target_": "fedvfm.inference.bundle.dataset",
            "folder": "@bundle_root",
            "dataset_dir": "@dataset_dir",
            "series": "@series",
            "channels": "@channels",
        },
        "evaluator": {
            "_target_": "fedvfm.inference.bundle.Evaluator",
            "folder": "@bundle_root",
            "dataset_dir": "@dataset_dir",
            "output_dir": "@output_dir",
            "device": "@device",
            "form": "@form",
            "series": "@series",
            "channels": "@channels",
        },
        "run": ["$@evaluator.run()"],
    }


def _metadata(model: adapted_model.AdaptedModel) -> dict[str, Any]:
    recipe, installed = model.recipe, importlib.metadata.version
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "changelog": {VERSION: "exported by fedvfm"},
        "monai_version": installed("monai"),
        "pytorch_version": installed("torch").partition("+")[0],
        "numpy_version": installed("numpy"),
        "required_packages_version": {name: installed(name) for name in PACKAGES},
        "name": f"{recipe.adapter.kind} on {Path(recipe.backbone.name).name}",
        "task": f"{recipe.task.kind} of {', '.join(recipe.data.class_names)}",
        "description": "a frozen foundation model with an adapter trained over several sites without moving images",
        "authors": "those who trained the adapter",
        "copyright": "those who trained the adapter; the backbone is its authors'",
        "intended_use": "research; not a medical device",
        "data_type": "png, jpeg, tiff, nifti, dicom",
        "image_classes": "images of the contract in the model card",
        "fedvfm": {
            "fingerprint": model.read().fingerprint,
            "recipe_hash": model.recipe_hash,
            "backbone_sha256": model.backbone.sha256,
            **({adapter_folder.LICENCE: model.licence.to_json()} if model.licence else {}),
        },
        "network_data_format": {"inputs": {"image": _image(model)}, "outputs": {"pred": _logits(model)}},
    }


def _image(model: adapted_model.AdaptedModel) -> dict[str, Any]:
    contract = model.recipe.data
    return {
        "type": "image",
        "format": "magnitude",
        "modality": contract.modality,
        "num_channels": 3,
        "spatial_shape": list(contract.patch_size),
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": contract.fit == "native",
        "channel_def": _channel_names(contract),
    }


def _channel_names(contract: schema.DataContract) -> dict[str, str]:
    if contract.grey or len(contract.channels) == 1:
        return {"0": contract.channels[0] if contract.channels else "image"}
    return {str(number): name for number, name in enumerate(contract.channels or ("red", "green", "blue"))}


def _logits(model: adapted_model.AdaptedModel) -> dict[str, Any]:
    contract, dense, names = model.recipe.data, delivery.dense(model), delivery.outputs(model)
    return {
        "type": "image" if dense else "probabilities",
        "format": "segmentation" if dense else "classes",
        "num_channels": len(names),
        "spatial_shape": list(contract.patch_size) if dense else [],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": contract.fit == "native",
        "channel_def": {str(number): name for number, name in enumerate(names)},
    }


def _card(model: adapted_model.AdaptedModel) -> str:
    lines = [
        "# MONAI bundle of a federated adapter",
        "",
        "Not a medical device. Trained for research; check it on your own data before any use.",
        "",
        "```bash",
        "python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json \\",
        "    --bundle_root . --dataset_dir IMAGES --output_dir MASKS",
        "```",
        "",
        "It needs fedvfm beside MONAI. `network_def` is the network alone: prepared images in [0, 1] to logits.",
        "There is no `model.pt` and no `model.ts`: weights are safetensors under `models/`, nothing is unpickled.",
        "`evaluator` is fedvfm's `predict`, not an engine of MONAI: it reads, prepares and writes images, so that what",
        "was scored in training is what is delivered.",
        "",
        "## What goes in",
        "",
        *delivery.what_is_prepared(model),
    ]
    return "\n".join(lines) + "\n"


def _json(values: Any) -> str:
    return json.dumps(values, indent=2) + "\n"
