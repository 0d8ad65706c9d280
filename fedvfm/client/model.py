"""The adapted model: a frozen backbone, the adapter put into it, and a head; read and written as an AdapterState."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedvfm import config as configs
from fedvfm import errors, seeding, state
from fedvfm import recipe as recipes
from fedvfm.adapters import base as adapters
from fedvfm.adapters import table as adapter_table
from fedvfm.backbones import base as backbones
from fedvfm.backbones import table as backbone_table
from fedvfm.tasks import base as tasks
from fedvfm.tasks import table as task_table


def validate(recipe: configs.Recipe) -> list[str]:
    """Faults of names and per-kind parameters that need no data, one sentence a fault.

    The model is built on the meta device, so neither weights nor network are needed.
    """
    faults = []
    for table, name, where in (
        (task_table.TABLE, recipe.task.kind, "recipe.task.kind"),
        (adapter_table.TABLE, recipe.adapter.kind, "recipe.adapter.kind"),
    ):
        if name not in table:
            faults.append(f"{where}: {table.fault(name)}")
    try:
        backbone: backbones.Backbone | None = backbone_table.loader(recipe.backbone)(
            recipe.backbone, with_weights=False
        )
    except errors.UnknownName as error:
        faults.append(f"recipe.backbone.name: {error}")
        backbone = None
    except errors.ConfigError as error:
        faults.extend(f"recipe.backbone: {fault}" for fault in error.faults)
        backbone = None
    if recipe.task.kind in task_table.TABLE:
        faults.extend(task_table.TABLE.get(recipe.task.kind)(recipe).faults())
    if backbone is not None:
        faults.extend(backbone.check_size(recipe.data.input_size))
        if recipe.adapter.kind in adapter_table.TABLE:
            faults.extend(adapter_table.TABLE.get(recipe.adapter.kind)().faults(recipe.adapter, backbone))
    return faults


class AdaptedModel(nn.Module):
    """Backbone, adapter and head of one recipe.

    Args:
        recipe: the resolved recipe.
        with_weights: False builds shapes only, on the meta device.
        device: where to compute.
    """

    def __init__(self, recipe: configs.Recipe, *, with_weights: bool = True, device: str = "cpu") -> None:
        super().__init__()
        self.recipe, self.device = recipe, device if with_weights else "meta"
        load = backbone_table.loader(recipe.backbone)
        self.task: tasks.Task = task_table.TABLE.get(recipe.task.kind)(recipe)
        kind: adapters.Adapter = adapter_table.TABLE.get(recipe.adapter.kind)()
        with torch.random.fork_rng(devices=[]):
            # What a backbone from scratch does not train must be the same at every site; nobody uses the other first
            # values.
            torch.manual_seed(seeding.torch_seed(recipe.seed, "initial", "backbone"))
            self.backbone: backbones.Backbone = load(recipe.backbone, with_weights=with_weights, device=device)
            self.backbone_parameters = self.backbone.parameters_total()
            self.injected = kind.inject(recipe.adapter, self.backbone)
            with torch.device(self.device):
                self.head = self.task.head(self.backbone)
        self.to(self.device) if with_weights else None
        self.taps = self.backbone.taps(self.task.grids)
        self._parameters_by_name = self._wire()
        self.frozen_blocks = self._count_frozen()
        self._written: state.AdapterState | None = None

    def _wire(self) -> dict[str, nn.Parameter]:
        wired = dict(self.injected.parameters)
        wired |= {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("head."))
        for parameter in wired.values():
            parameter.requires_grad_(True)
        rows = [*self.injected.specs]
        rows += [state.ArraySpec(name, tuple(p.shape), "head") for name, p in wired.items() if name.startswith("head.")]
        self.manifest = state.Manifest.of(rows)
        return wired

    def _count_frozen(self) -> int:
        """How many leading blocks no trainable parameter touches; 0 where something before them trains."""
        names = list(self.injected.parameters)
        if any(not name.startswith(("block.", "final_norm.")) for name in names):
            return 0
        blocks = [int(name.split(".")[1]) for name in names if name.startswith("block.")]
        return min(blocks, default=self.backbone.depth)

    def initial(self) -> state.AdapterState:
        """The adapter of round 0, seeded by the recipe."""
        arrays = {spec.name: adapters.initial(spec, self.recipe.seed) for spec in self.injected.specs}
        arrays |= {
            name: value.detach().numpy().copy()
            for name, value in self._from_seed().items()
            if name in self._parameters_by_name
        }
        return state.AdapterState(arrays)

    def _from_seed(self) -> Mapping[str, Tensor]:
        """First values that a module makes itself: the head's, and those of a backbone that was not pretrained."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.torch_seed(self.recipe.seed, "initial", "head"))
            found: dict[str, Tensor] = {
                f"head.{name}": p for name, p in self.task.head(self.backbone).named_parameters()
            }
            if not self.backbone.pretrained:
                torch.manual_seed(seeding.torch_seed(self.recipe.seed, "initial", "backbone"))
                made = backbone_table.loader(self.recipe.backbone)(self.recipe.backbone)
                found |= {made.wire_name(name): p for name, p in made.model.named_parameters()}
        return found

    def read(self) -> state.AdapterState:
        """The adapter as it is now."""
        arrays = {}
        for name, parameter in self._parameters_by_name.items():
            value = parameter.detach().cpu()
            if name in self.injected.reference:
                value = self._difference(name, value)
            arrays[name] = value.numpy().copy()
        return state.AdapterState(arrays)

    def _difference(self, name: str, value: Tensor) -> Tensor:
        """From the frozen value; numbers that did not move since ``write`` are those written, not rounded twice."""
        frozen = self.injected.reference[name].cpu()
        if self._written is None:
            return value - frozen
        written = torch.tensor(self._written[name])
        return torch.where(value == written + frozen, written, value - frozen)

    @torch.no_grad()
    def write(self, adapter: state.AdapterState) -> None:
        """Set the adapter.

        Raises:
            CheckpointError: if the arrays are not those of the manifest.
        """
        expected = {spec.name: spec.shape for spec in self.manifest}
        if {name: array.shape for name, array in adapter.items()} != expected:
            raise errors.CheckpointError(
                f"the adapter has {len(adapter)} arrays that do not fit this recipe's {len(expected)}; it "
                f"belongs to another recipe or backbone"
            )
        for name, parameter in self._parameters_by_name.items():
            value = torch.tensor(adapter[name])
            if name in self.injected.reference:
                value = value + self.injected.reference[name].cpu()
            parameter.copy_(value)
        self._written = adapter

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by learning-rate group: "adapter" and "head"."""
        groups: dict[str, list[nn.Parameter]] = {"adapter": [], "head": []}
        for name, parameter in self._parameters_by_name.items():
            groups["head" if name.startswith("head.") else "adapter"].append(parameter)
        return groups

    def forward(self, pixels: Tensor, prefix: backbones.Prefix | None = None) -> Tensor:
        """Logits.

        Shapes: pixels (B, 3, H, W), normalised -> (B, K, H, W) in segmentation, (B, K) in classification.
        """
        with torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            features = self.backbone.features(pixels, self.taps, prefix)
            result: Tensor = self.head(features)
        return result

    @torch.no_grad()
    def frozen_prefix(self, pixels: Tensor) -> backbones.Prefix:
        """What the blocks before the first adapted one compute. Shapes: pixels (B, 3, H, W)."""
        with torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            return self.backbone.prefix(pixels, self.frozen_blocks, self.taps)


def lock(
    recipe: configs.Recipe, *, with_weights: bool = True, device: str = "cpu"
) -> tuple[recipes.LockedRecipe, AdaptedModel]:
    """Build the model of a recipe and lock the recipe to its manifest, initial adapter and backbone sha256."""
    model = AdaptedModel(recipe, with_weights=with_weights, device=device)
    initial = model.initial()
    locked = recipes.LockedRecipe(recipe, model.manifest, initial, model.backbone.sha256, model.backbone_parameters)
    return locked, model
