"""A MONAI bundle on disk: which file says what its network is, and which holds its weights. Nothing of it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.backbones import identity

CONFIGS = ("inference.json", "train.json")
KEYS = ("network_def", "network")
WEIGHTS = ("model.safetensors", "model.pt")


def is_bundle(folder: Path) -> bool:
    """Whether a folder is laid out as a bundle."""
    return (folder / "configs" / "metadata.json").is_file()


def weights_of(folder: Path) -> Path:
    """Its file of weights.

    Raises:
        WeightsError: if there is none that can be read.
    """
    for name in WEIGHTS:
        if (folder / "models" / name).is_file():
            return folder / "models" / name
    raise errors.WeightsError(f"{folder}: a MONAI bundle without models/model.safetensors or models/model.pt")


def settings_of(folder: Path) -> bytes:
    """``config.json`` of our cache: what its network is, checked.

    Raises:
        WeightsError: if its configuration says none, or one that is refused.
    """
    from fedvfm.backbones import monai_network

    for name in CONFIGS:
        path = folder / "configs" / name
        values: Any = identity.read_json(path) if path.is_file() else {}
        for key in KEYS:
            if isinstance(values.get(key), dict):
                network = monai_network.checked(values[key], str(path))
                monai_network.built(network, str(path))
                content = {"model_type": monai_network.MODEL_TYPE, "network": network}
                return (json.dumps(content, indent=2) + "\n").encode()
    raise errors.WeightsError(
        f"{folder}: none of configs/{' and configs/'.join(CONFIGS)} has a table 'network_def'; YAML is not read, and "
        "references are not followed"
    )
