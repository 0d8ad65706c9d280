"""Options of backbone, adapter kind and task: every table entry states those it reads, others are refused."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from fedvfm import registry
from fedvfm.adapters import dense
from fedvfm.adapters import table as adapter_table
from fedvfm.backbones import base as backbones
from fedvfm.backbones import table as backbone_table
from fedvfm.backbones import unet
from fedvfm.config import schema
from fedvfm.model import adapted_model
from fedvfm.tasks import table as task_table


def faults(**parts: dict[str, Any]) -> list[str]:
    values = {
        "backbone": {"name": "unet"},
        "adapter": {"kind": "full"},
        "data": {"class_names": ["background", "nucleus"], "input_size": [32, 32]},
        **parts,
    }
    return adapted_model.examine(schema.parse(schema.Recipe, values, "recipe"))[1]


def test_known_options_pass() -> None:
    assert faults(backbone={"name": "unet", "options": {"channels": [4, 8]}}) == []


def test_unknown_options_are_named_all_at_once() -> None:
    found = faults(
        backbone={"name": "unet", "options": {"chanels": [4, 8]}},
        adapter={"kind": "full", "options": {"width": 4}},
        task={"kind": "segmentation", "options": {"los": "x"}},
    )
    assert "recipe.backbone.options.chanels: unknown option of 'unet'; known: channels; nearest: 'channels'" in found
    assert any(fault.startswith("recipe.adapter.options.width: unknown option of 'full'; known: ") for fault in found)
    assert any(fault.startswith("recipe.task.options.los: unknown option of 'segmentation'") for fault in found)
    assert len(found) == 3


def test_options_of_unknown_names_wait_for_the_name() -> None:
    (found,) = faults(backbone={"name": "unett", "options": {"channels": [4, 8]}})
    assert found.startswith("recipe.backbone.name: unknown backbone 'unett'")


def test_registered_entries_state_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (adapter_table.TABLE, backbone_table.TABLE):
        monkeypatch.setattr(table, "_entries", dict(table._entries))

    class Scaled(dense.HeadOnly):
        known_options: ClassVar[tuple[str, ...]] = ("factor",)

    @backbones.takes("channels", "strength")
    def loader(settings: schema.BackboneConfig, *, with_weights: bool = True, device: str = "cpu") -> unet.UNet:
        plain = settings.model_copy(update={"options": {}})
        return unet.load(plain, with_weights=with_weights, device=device)

    registry.register_adapter("scaled", Scaled)
    registry.register_backbone("mine", loader)
    parts: dict[str, dict[str, Any]] = {
        "backbone": {"name": "mine", "options": {"strength": 2}},
        "adapter": {"kind": "scaled", "options": {"factor": 2}},
        "task": {"kind": "segmentation", "head": "patch"},
    }
    assert faults(**parts) == []
    parts["backbone"]["options"]["strenght"] = 3
    (found,) = faults(**parts)
    assert found == (
        "recipe.backbone.options.strenght: unknown option of 'mine'; known: channels, strength; nearest: 'strength'"
    )


@pytest.mark.parametrize("table", [adapter_table.TABLE, task_table.TABLE], ids=["adapter", "task"])
def test_every_entry_says_what_it_knows(table: Any) -> None:
    for name in table.names():
        known = table.get(name).known_options if table is task_table.TABLE else table.get(name)().known_options
        assert isinstance(known, tuple), name
        assert all(isinstance(key, str) for key in known), name
