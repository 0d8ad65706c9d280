"""Saved adapters of tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm.config import schema
from fedvfm.inference import export
from fedvfm.model import adapted_model
from fedvfm.state import state

Saver = Callable[..., Path]


def moved(
    backbone: Path | str, task: str | dict[str, Any] = "segmentation", kind: str = "lora", **data: Any
) -> adapted_model.AdaptedModel:
    """A model whose every trainable number is off its start, as after training; three classes unless told."""
    values = {
        "backbone": {"name": str(backbone), "options": {"channels": [4, 8]} if backbone == "unet" else {}},
        "adapter": {"kind": kind, "rank": 2},
        "task": {"kind": task} if isinstance(task, str) else task,
        "data": {"class_names": ["rest", "cell", "wall"], "input_size": [28, 28], **data},
    }
    model = adapted_model.AdaptedModel(schema.parse(schema.Recipe, values, "recipe"))
    rng = np.random.default_rng(1)
    start = model.initial()
    model.write(
        state.AdapterState({name: a + rng.normal(0, 0.1, a.shape).astype(np.float32) for name, a in start.items()})
    )
    return model.eval()


@pytest.fixture(scope="session")
def saved(tiny_dino: Path, tmp_path_factory: pytest.TempPathFactory) -> Saver:
    """``saved(task, kind, **contract)`` -> folder of a saved adapter; the same one for the same words."""
    root, made = tmp_path_factory.mktemp("adapters"), dict[str, Path]()

    def save(
        task: str | dict[str, Any] = "segmentation", kind: str = "lora", backbone: Any = None, **data: Any
    ) -> Path:
        key = repr((task, kind, backbone, sorted(data.items())))
        if key not in made:
            model = moved(backbone or tiny_dino, task, kind, **data)
            made[key] = export.save(model, root / f"adapter-{len(made)}", {})
        return made[key]

    return save
