"""The low-rank layer against PEFT's own, and its folded form."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from fedvfm.adapters import lora

RANK, SCALE = 3, 1.5


def layers(dropout: float = 0.0) -> tuple[lora.Layer, nn.Module]:
    """Ours and PEFT's, with equal random numbers."""
    torch.manual_seed(0)
    frozen = nn.Linear(12, 20)
    ours = lora.Layer(frozen, RANK, SCALE, dropout)
    holder: Any = nn.ModuleDict({"q": nn.Linear(12, 20)})
    holder["q"].load_state_dict(frozen.state_dict())
    settings = peft.LoraConfig(r=RANK, lora_alpha=SCALE * RANK, lora_dropout=dropout, target_modules=["q"])  # type: ignore[arg-type]
    peft.inject_adapter_in_model(settings, holder)
    theirs = holder["q"]
    with torch.no_grad():
        for mine, other in ((ours.lora_A, theirs.lora_A), (ours.lora_B, theirs.lora_B)):
            mine.weight.normal_()
            other["default"].weight.copy_(mine.weight)
    return ours, theirs


def answers(layer: nn.Module, precision: torch.dtype) -> list[Tensor]:
    """What leaves, and the gradients of what enters and of both factors."""
    entering = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        leaving = layer(entering)
    leaving.float().square().sum().backward()
    factors = [parameter.grad for name, parameter in layer.named_parameters() if "lora_" in name]
    assert len(factors) == 2
    return [leaving.detach(), entering.grad, *factors]  # type: ignore[list-item]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_it_computes_what_peft_computes_to_the_last_bit(dropout: float, precision: torch.dtype) -> None:
    ours, theirs = layers(dropout)
    for mode in (True, False):
        ours.train(mode), theirs.train(mode)
        ours.zero_grad(), theirs.zero_grad()
        for mine, other in zip(answers(ours, precision), answers(theirs, precision), strict=True):
            assert torch.equal(mine, other)


def test_folding_is_a_plain_layer_that_computes_the_same() -> None:
    ours, _ = layers()
    entering = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    before = ours.base.weight.clone()
    holder = nn.Sequential(ours)
    with torch.no_grad():
        expected = ours(entering)
        lora.fold(holder)
        assert type(holder[0]) is nn.Linear
        torch.testing.assert_close(holder(entering), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.base.weight, before), "the frozen weights are shared, so folding must not write into them"


def test_it_begins_as_the_frozen_layer() -> None:
    frozen = nn.Linear(4, 6)
    layer, entering = lora.Layer(frozen, 2, 1.0, 0.0), torch.randn(3, 4)
    assert torch.equal(layer(entering), frozen(entering))
