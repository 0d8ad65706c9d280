"""What a machine computes with: the rule, the timing, and models that follow it."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.model import adapted_model, precision

WITHOUT = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
"""In a process of its own, kernels of a processor without instructions for bfloat16."""


@pytest.mark.parametrize(
    ("asked", "ratio", "expected"),
    [
        ("auto", 0.5, "bfloat16"),
        ("auto", 1.2, "bfloat16"),
        ("auto", 1.21, "float32"),
        ("auto", 8.5, "float32"),
        ("auto", math.inf, "float32"),
        ("bfloat16", 0.5, "bfloat16"),
        ("bfloat16", 8.5, "float32"),
        ("float32", 0.5, "float32"),
        ("float32", 8.5, "float32"),
    ],
)
def test_bfloat16_is_what_a_machine_may_and_float32_what_it_must(asked: str, ratio: float, expected: str) -> None:
    with precision.taken("cuda:1", ratio):
        assert precision.of(asked, "cuda:0") == expected
        assert expected in precision.words(asked, "cuda:0")


def test_the_reason_is_told() -> None:
    with precision.taken("cpu", 8.52):
        told = "this CPU emulates bfloat16 (8.5 times the time of float32 here): computing in float32"
        assert precision.words("auto", "cpu") == told
        assert precision.words("float32", "cpu") == "float32, as the recipe says"
    with precision.taken("mps", math.inf):
        assert precision.words("bfloat16", "mps") == "this GPU has no bfloat16: computing in float32"
    with precision.taken("cpu", 0.482):
        assert precision.words("auto", "cpu") == "bfloat16 (0.48 times the time of float32 here)"


def test_what_was_decided_for_a_while_is_forgotten_again(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = iter([3.0])
    monkeypatch.setattr(precision, "measure", lambda device: next(timed))
    with precision.taken("cuda", 0.5), precision.taken("cuda:3", 7.0):
        assert precision.ratio("cuda") == 7.0
    monkeypatch.setitem(precision._ratios, "cuda", 1.0)  # taken back by the fixture after the test
    del precision._ratios["cuda"]
    assert [precision.ratio("cuda"), precision.ratio("cuda:1")] == [3.0, 3.0]


@pytest.mark.parametrize("ratio", [0.5, math.inf])
def test_a_decision_reaches_another_process_as_it_is(ratio: float, tmp_path: Path) -> None:
    with precision.taken("cpu", ratio):
        precision.write(tmp_path / "kept.json", "cpu")
    assert precision.read(tmp_path / "kept.json") == ratio
    assert (tmp_path / "kept.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"bfloat16_over_float32": "quick"}', '{"bfloat16_over_float32": -1}']
)
def test_a_damaged_decision_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "kept.json").write_text(text)
    with pytest.raises(errors.CheckpointError, match="is damaged"):
        precision.read(tmp_path / "kept.json")


# -- timing ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that each linear layer moves on by the next of these seconds; float32 and bfloat16 take turns."""
    told: dict[str, Any] = {"now": 0.0, "layers": 0, "seconds": lambda number: 1.0}

    def linear(pixels: Any, weight: Any) -> None:
        told["now"] += told["seconds"](told["layers"])
        told["layers"] += 1

    monkeypatch.setattr(precision.time, "perf_counter", lambda: told["now"])
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    return told


def test_a_clear_ratio_needs_few_layers(clock: Any) -> None:
    clock["seconds"] = lambda number: 8.0 if number % 2 else 1.0
    assert precision.measure("cpu") == 8.0
    assert clock["layers"] == 2 * (1 + precision.TIMED)


def test_a_busy_machine_does_not_turn_the_decision(clock: Any) -> None:
    """Whatever else it does slows most layers of one kind down; one that was let alone is enough."""
    clock["seconds"] = lambda number: 0.5 if number == 29 else 1.5 if number % 2 else 1.0
    assert precision.measure("cpu") == 0.5
    assert clock["layers"] > 2 * (1 + precision.TIMED)


def test_kinds_that_are_alike_are_timed_longest(clock: Any) -> None:
    assert precision.measure("cpu") == 1.0
    assert clock["layers"] == 2 * (1 + precision.MOST)


def test_a_child_times_and_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a GPU, which a process must not use before it forks."""
    here = os.getpid()
    monkeypatch.setattr(precision, "_measured", _told_by_another)
    assert precision._apart("cpu") not in (0.0, float(here))


def _told_by_another(device: str) -> float:
    return float(os.getpid())


def test_a_child_that_ends_is_an_error_and_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_measured", _ended)
    with pytest.raises(errors.EngineError, match="was ended"):
        precision._apart("cpu")


def _ended(device: str) -> float:
    os._exit(3)


@pytest.mark.parametrize("fault", [RuntimeError("not implemented for BFloat16"), TypeError("no BFloat16 on MPS")])
def test_a_device_without_bfloat16_computes_in_float32(fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.nn.functional.linear

    def linear(pixels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if pixels.dtype == torch.bfloat16:
            raise fault
        return real(pixels, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert precision.measure("cpu") == math.inf
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the variables are of x86 processors")
def test_a_processor_without_instructions_for_bfloat16_computes_in_float32() -> None:
    """The real timing with the kernels of such a processor, whatever this one is."""
    script = (
        "import json; from fedvfm.model import precision; "
        "print(json.dumps([precision.ratio('cpu'), precision.of('bfloat16', 'cpu'), precision.words('auto', 'cpu')]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **WITHOUT}, capture_output=True, text=True, check=True
    )
    ratio, computed, told = json.loads(answer.stdout)
    assert ratio > 2
    assert computed == "float32"
    assert told.startswith("this CPU emulates bfloat16")


# -- models ------------------------------------------------------------------------------------------------------------


def logits(tiny_dino: Path, asked: str, ratio: float) -> tuple[str, torch.Tensor, torch.Tensor]:
    """What a model computes in, its logits, and the gradient of its head."""
    contract = {"class_names": ["background", "box"], "input_size": [28, 28]}
    values = {"backbone": {"name": str(tiny_dino)}, "adapter": {"rank": 2}, "data": contract, "precision": asked}
    with precision.taken("cpu", ratio):
        model = adapted_model.AdaptedModel(schema.parse(schema.Recipe, values, "recipe"))
    model.write(model.initial())
    model.eval()
    found = model(torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28))
    found.square().mean().backward()
    return model.precision, found.detach(), next(p.grad for p in model.head.parameters() if p.grad is not None)


def test_a_model_computes_in_what_was_decided_when_it_was_built(tiny_dino: Path) -> None:
    full = logits(tiny_dino, "float32", 0.5)
    half = logits(tiny_dino, "auto", 0.5)
    assert (full[0], half[0]) == ("float32", "bfloat16")
    assert half[1].dtype == torch.bfloat16
    for asked, ratio, expected in (("auto", 8.0, full), ("bfloat16", 8.0, full), ("bfloat16", 0.5, half)):
        found = logits(tiny_dino, asked, ratio)
        assert found[0] == expected[0]
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[2], expected[2])


def test_shapes_alone_are_not_timed(tiny_dino: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "ratio", lambda device: pytest.fail("timed"))
    contract = {"class_names": ["background", "box"], "input_size": [28, 28]}
    values = {"backbone": {"name": str(tiny_dino)}, "data": contract}
    adapted_model.AdaptedModel(schema.parse(schema.Recipe, values, "recipe"), with_weights=False)
