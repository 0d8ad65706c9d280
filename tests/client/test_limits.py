"""Limits of the executor, each read off a real process that keeps to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.client.process import limits
from fedvfm.config import schema

ROOT = Path(__file__).parents[2]
ASK = """
import json, os
from fedvfm.config import schema as config
from fedvfm.client.process import limits
limits.apply(config.LimitsConfig(threads=1, nice=7), "cpu")
import threadpoolctl, torch
print(json.dumps({
    "nice": os.getpriority(os.PRIO_PROCESS, 0),
    "torch": torch.get_num_threads(),
    "pools": [pool["num_threads"] for pool in threadpoolctl.threadpool_info()],
    "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
}))
"""


def site(**values: Any) -> schema.SiteConfig:
    data = {"source": "folder", "path": "x"}
    return schema.parse(schema.SiteConfig, {"name": "north", "data": data, **values}, "site")


def test_a_process_keeps_to_them() -> None:
    environment = {**os.environ, **limits.environment(site(limits={"threads": 1})), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["nice"] >= 7
    assert found["torch"] == 1
    assert set(found["pools"]) == {1}
    assert found["gpu"] == ""


def test_what_is_set_before_it_starts() -> None:
    assert limits.environment(site()) == {"CUDA_VISIBLE_DEVICES": ""}
    assert limits.environment(site(device="cuda:1")) == {}
    found = limits.environment(site(device="auto", limits={"threads": 3}))
    assert found == dict.fromkeys(limits.POOLS, "3")


def test_a_site_s_own_number_of_threads_stands_above_the_recipe_s(tiny_dino: Path) -> None:
    import torch

    from fedvfm.client import app

    asked = schema.parse(
        schema.Recipe,
        {
            "threads": 2,
            "backbone": {"name": str(tiny_dino)},
            "data": {"class_names": ["a", "b"], "input_size": [56, 56]},
        },
        "recipe",
    )
    try:
        for cap, used in ((0, 2), (1, 1), (3, 3)):
            app.Models(threads=cap).get(asked, "cpu")
            assert torch.get_num_threads() == used
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    "values", [{"threads": -1}, {"nice": 20}, {"gpu_memory": 0.0}, {"gpu_memory": 1.5}, {"cores": 2}]
)
def test_limits_that_are_none(values: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError, match=f"limits.{next(iter(values))}"):
        site(limits=values)


def test_a_share_of_a_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")
    limits.apply(schema.LimitsConfig(gpu_memory=0.01), "cuda:0")
    total = torch.cuda.get_device_properties(0).total_memory
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(int(0.02 * total), dtype=torch.uint8, device="cuda:0")
