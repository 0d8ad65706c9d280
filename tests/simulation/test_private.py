"""Private runs of the real ``simulate``: seeded noise, so that they repeat; nothing but adapters leaves a site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.simulation import run

PRIVACY = {"mechanism": "record-level", "clip": 1.0, "noise_multiplier": 0.8, "delta": 1e-5}


def values(tiny: Any, privacy: dict[str, Any], folder: Path | None = None, **adapter: Any) -> dict[str, Any]:
    own = {**tiny.values["recipe"], "privacy": privacy, "aggregation": {"weighting": "uniform"}}
    own["adapter"] = {**own["adapter"], **adapter}
    if folder is not None:
        own |= {"backbone": {"name": str(folder)}, "data": {**own["data"], "input_size": [64, 64]}}
    return {**tiny.values, "baselines": [], "recipe": own}


def fingerprint(path: Path) -> str:
    about = json.loads((path / "adapter" / "fedvfm.json").read_text())
    found: str = about["fingerprint"]
    return found


@pytest.mark.parametrize("mechanism", ["record-level", "patient-level"])
def test_a_seeded_private_run_repeats_to_the_last_bit(tiny: Any, tmp_path: Path, mechanism: str) -> None:
    what = values(tiny, {**PRIVACY, "mechanism": mechanism})
    found = {fingerprint(run.simulate(what, output=tmp_path / name).path) for name in ("one", "two")}
    assert len(found) == 1
    what["recipe"]["seed"] = 1
    assert fingerprint(run.simulate(what, output=tmp_path / "three").path) not in found


def test_a_private_federation_of_sam(tiny: Any, sam_folders: dict[str, Path], tmp_path: Path) -> None:
    """LoRA in windows and in global attention, the mask decoder's parts and the mask tokens, clipped together."""
    what = values(tiny, PRIVACY, sam_folders["sam"], layers=[])
    result = run.simulate(what, output=tmp_path / "run")
    assert result.summary["trainable_parameters"] == 4 * 4 * 2 * 32 + 2678
    assert fingerprint(result.path)


def test_weights_by_examples_are_refused(tiny: Any, tmp_path: Path) -> None:
    what = values(tiny, PRIVACY)
    what["recipe"]["aggregation"] = {}
    with pytest.raises(errors.ConfigError, match="use weighting 'uniform'"):
        run.simulate(what, output=tmp_path / "run")
