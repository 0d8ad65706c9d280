"""The adapted model: a frozen backbone, the adapter put into it, and a head; read and written as an AdapterState."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedvfm import errors, registry, seeding
from fedvfm.adapters import base as adapters
from fedvfm.adapters import decoder
from fedvfm.adapters import table as adapter_table
from fedvfm.backbones import base as backbones
from fedvfm.backbones import contract, licences, tokens, towers, weights
from fedvfm.backbones import table as backbone_table
from fedvfm.config import privacy, schema
from fedvfm.model import precision as precisions
from fedvfm.privacy import gradients
from fedvfm.privacy import table as mechanisms
from fedvfm.state import factors, groups, state
from fedvfm.tasks import base as tasks
from fedvfm.tasks import case_classification, case_heads, words
from fedvfm.tasks import table as task_table
from fedvfm.trust import locked_recipe


def examine(recipe: schema.Recipe) -> tuple[AdaptedModel | None, list[str]]:
    """The recipe's model on the meta device, and the faults of names and parameters for which there is none.

    Needs neither weights nor network, nor data. Only the whole model tells whether one image's, or patient's, part can
    be bounded: a backbone, an adapter kind or a head may bring layers that tie images together.

    Raises:
        WeightsError: if the backbone's shapes are not known on this machine.
    """
    faults = _option_faults(recipe) + mechanisms.faults(recipe)
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
    if backbone is not None and (wrong := contract.kind_faults(recipe.backbone.name, backbone)):
        faults.extend(f"recipe.backbone: {fault}" for fault in wrong)
        backbone = None
    recipe = recipe if backbone is None else resolve(recipe, backbone)
    if recipe.task.kind in task_table.TABLE:
        task: tasks.Task = task_table.TABLE.get(recipe.task.kind)(recipe)
        faults.extend(task.faults())
        faults.extend(task.partial_faults())
        faults.extend(task.unlabelled_faults())
        faults.extend(task.private_faults() if _bounds_units(recipe) else [])
        faults.extend(_input_faults(recipe, task))
        faults.extend(_slide_faults(recipe, task))
        faults.extend([] if backbone is None else _mask_faults(recipe, task, backbone))
        faults.extend([] if backbone is None else _volume_faults(recipe, backbone))
        faults.extend(_depth_faults(recipe))
        faults.extend([] if backbone is None else _prompt_faults(recipe, task, backbone))
    if backbone is not None:
        faults.extend(backbone.check_size(recipe.data.input_size))
        if recipe.adapter.kind in adapter_table.TABLE:
            faults.extend(adapter_table.TABLE.get(recipe.adapter.kind)().faults(recipe.adapter, backbone))
    faults += _factor_faults(recipe) + _word_faults(recipe)
    if faults or backbone is None:
        return None, faults
    try:
        return AdaptedModel(recipe, with_weights=False, backbone=backbone), []
    except errors.ConfigError as error:
        return None, list(error.faults)


def _slide_faults(recipe: schema.Recipe, task: tasks.Task) -> list[str]:
    """Why the recipe cannot take whole slides, one sentence a fault."""
    if recipe.data.slides is None:
        return []
    wrong = []
    if not task.bags:
        wrong.append(
            f"recipe.data.slides: a slide has one answer of many tiles, and task '{recipe.task.kind}' answers for "
            "single images; use case-classification"
        )
    for key, given in (
        ("stack", recipe.data.stack > 1),
        ("window", recipe.data.window),
        ("channels", recipe.data.channels),
    ):
        if given:
            wrong.append(f"recipe.data.{key}: is not for whole slides (recipe.data.slides); leave one of them out")
    return wrong


def _bounds_units(recipe: schema.Recipe) -> bool:
    """Whether the mechanism clips what one record or patient adds, at the site."""
    return recipe.privacy.mechanism in mechanisms.TABLE and mechanisms.get(recipe.privacy).site() is not None


def resolve(recipe: schema.Recipe, backbone: backbones.Backbone) -> schema.Recipe:
    """The recipe with what its backbone decides stated: the head, and the decoder parts that train."""
    task, adapter = recipe.task, recipe.adapter
    if task.head is None and task.kind in task_table.TABLE:
        task = task.model_copy(update={"head": task_table.TABLE.get(task.kind).head_for(backbone)})
    if adapter.parts is None:
        masks = task.kind in task_table.TABLE and task_table.TABLE.get(task.kind).takes_masks(task.head)
        parts = backbone.default_parts if masks and adapter.kind != "full" else ()
        adapter = adapter.model_copy(update={"parts": parts})
    return recipe.model_copy(update={"task": task, "adapter": adapter})


def _mask_faults(recipe: schema.Recipe, task: tasks.Task, backbone: backbones.Backbone) -> list[str]:
    """Faults of a head that takes masks, and of decoder parts."""
    found = decoder.faults(recipe.adapter.parts or (), backbone, recipe.adapter.kind, masks=task.masks)
    if task.masks and not backbone.mask_tokens:
        found.append(
            f"recipe.task.head = '{recipe.task.head}': backbone '{backbone.name}' has no mask decoder; use another head"
        )
    if task.masks and recipe.adapter.kind == "head-only" and not recipe.adapter.parts:
        found.append(
            f"recipe.adapter: nothing would train: head '{recipe.task.head}' has no parameters, kind 'head-only' "
            f"trains none of the backbone's and parts is empty. Name parts: {', '.join(backbone.default_parts)}"
        )
    return found


def _volume_faults(recipe: schema.Recipe, backbone: backbones.Backbone) -> list[str]:
    """Faults of whole volumes: what takes slices is given none, and the other way round."""
    depth, head, name = recipe.data.depth, recipe.task.head, backbone.name
    if not depth and backbone.volumetric:
        return [
            f"recipe.data.depth: missing; backbone '{name}' takes whole volumes. Give the slices of a piece that it "
            'sees in training, such as 32, with fit = "native"'
        ]
    if not depth:
        wrong = "recipe.task.head = 'voxel': is for whole volumes (backbone 'unet3d'); use another head"
        return [wrong] if head == "voxel" else []
    where, dense = f"recipe.data.depth = {depth}", recipe.task.kind == "segmentation"
    faults = {
        f"{where}: backbone '{name}' takes slices; use 'unet3d', or leave depth out": not backbone.volumetric,
        f"{where}: task '{recipe.task.kind}' takes slices; leave depth out": not dense,
        f"recipe.task.head = '{head}': backbone '{name}' takes volumes; use 'voxel', or leave it out": (
            backbone.volumetric and dense and head != "voxel"
        ),
        f'{where}: volumes are not resized, pieces are cut from them; use fit = "native"': (
            recipe.data.fit != "native"
        ),
        f"{where}: recipe.data.stack = {recipe.data.stack} is for slices; leave it out": recipe.data.stack > 1,
        f"{where}: recipe.unlabelled is for slices; leave one of them out": recipe.unlabelled is not None,
    }
    return [fault for fault, holds in faults.items() if holds]


def _depth_faults(recipe: schema.Recipe) -> list[str]:
    """Faults of a branch over depth where the neighbours of a slice are not shown."""
    if recipe.adapter.options.get("depth") is not True or recipe.data.stack > 1:
        return []
    return [
        "recipe.adapter.options.depth: joins a slice with its neighbours, which recipe.data.stack = 1 does not show; "
        "set stack = 3, or leave depth out"
    ]


def _input_faults(recipe: schema.Recipe, task: tasks.Task) -> list[str]:
    """Faults of a table beside the images."""
    if recipe.inputs.columns and not task.tabular:
        return [f"recipe.inputs: task '{recipe.task.kind}' takes no table beside the image; leave it out"]
    wrong = recipe.inputs.faults(recipe.data.class_names if recipe.target.of_columns else ())
    if recipe.inputs.images_missing and recipe.data.fit != "resize":
        wrong.append(
            f"recipe.inputs.images_missing: with recipe.data.fit = '{recipe.data.fit}' nobody can say how large an "
            "image is that is not there; use 'resize', or leave it out"
        )
    return wrong


def _prompt_faults(recipe: schema.Recipe, task: tasks.Task, backbone: backbones.Backbone) -> list[str]:
    """Faults of prompts: settings that nothing reads, and models that take none."""
    chosen, fields = recipe.task, schema.TaskConfig.model_fields
    found = [
        f"recipe.task.{key} = {getattr(chosen, key)}: only prompt = '{reader}' reads it; leave it out"
        for key, reader in (("prompt_jitter", "box"), ("prompt_points", "points"))
        if chosen.prompt != reader and getattr(chosen, key) != fields[key].default
    ]
    if chosen.prompt == "none":
        return found
    where, without = f"recipe.task.prompt = '{chosen.prompt}'", "or leave prompt out"
    if chosen.kind != "segmentation":
        found.append(f"{where}: task '{chosen.kind}' takes no prompts; leave prompt out")
    elif not backbone.promptable:
        found.append(f"{where}: backbone '{backbone.name}' takes no prompts; use a SAM such as sam-vit-base, {without}")
    elif not task.masks:
        found.append(f"{where}: head '{chosen.head}' takes no prompts; use 'sam-masks', {without}")
    return found


def _factor_faults(recipe: schema.Recipe) -> list[str]:
    """A choice of factors where the adapter has none."""
    kind, way = recipe.adapter.kind, recipe.adapter.factors
    if (
        way == factors.BOTH
        or kind not in adapter_table.TABLE
        or getattr(adapter_table.TABLE.get(kind)(), "pairs", False)
    ):
        return []
    return [
        f"recipe.adapter.factors = '{way}': adapter kind '{kind}' has no pairs of factors; use kind 'lora', or leave "
        "factors out"
    ]


def _word_faults(recipe: schema.Recipe) -> list[str]:
    """Faults of sentences, as far as they are known without the tokenizer."""
    if recipe.words is None:
        return []
    why, bias = "", None
    with contextlib.suppress(errors.FedvfmError):  # told where the backbone is asked for
        values = weights.describe(recipe.backbone)
        why, bias = towers.refused(values), values.get("model_type") == tokens.SIGLIP
    wrong = [f"recipe.words: backbone '{recipe.backbone.name}': {why}"] if why else []
    return wrong + words.faults(recipe, bias=None if why else bias)


def _option_faults(recipe: schema.Recipe) -> list[str]:
    """Options that the named backbone, adapter kind or task does not read: each table entry states its own."""
    rows: list[tuple[str, str, Mapping[str, Any], Any]] = []
    with contextlib.suppress(errors.ConfigError):  # told by validate
        chosen = recipe.backbone
        rows.append(("backbone", chosen.name, chosen.options, backbone_table.loader(chosen)))
    if recipe.adapter.kind in adapter_table.TABLE:
        kind = adapter_table.TABLE.get(recipe.adapter.kind)()
        rows.append(("adapter", recipe.adapter.kind, recipe.adapter.options, kind))
    if recipe.task.kind in task_table.TABLE:
        rows.append(("task", recipe.task.kind, recipe.task.options, task_table.TABLE.get(recipe.task.kind)))
    found = []
    for part, name, given, entry in rows:
        known = [str(key) for key in getattr(entry, "known_options", ())]
        found += [
            f"recipe.{part}.options.{key}: unknown option of '{name}'; known: {', '.join(known) or 'none'}"
            f"{registry.nearest(key, known)}"
            for key in given
            if key not in known
        ]
    return found


class AdaptedModel(nn.Module):
    """Backbone, adapter and head of one recipe.

    Args:
        recipe: the resolved recipe.
        with_weights: False builds shapes only, on the meta device.
        device: where to compute.
        backbone: already built, and in no other model; left out, it is loaded.

    Attributes:
        precision: "float32" or "bfloat16": what it computes in, as recipe and machine allow.
        frozen_whole: whether nothing of the backbone trains, so that of an image one vector is all that is needed.
        recipe_hash: of the recipe that the adapter was trained with: the backbone may lie elsewhere since.
        licence: of the backbone's weights, as far as anybody says it.
        alone: names of the arrays that train, and no others; empty for those of the round.
    """

    alone: frozenset[str] = frozenset()

    def __init__(
        self,
        recipe: schema.Recipe,
        *,
        with_weights: bool = True,
        device: str = "cpu",
        backbone: backbones.Backbone | None = None,
    ) -> None:
        super().__init__()
        # Whoever gets here past every check still trains nothing without the privacy that the recipe asks for.
        mechanisms.require(recipe)
        self.device = device if with_weights else "meta"
        self.precision = precisions.of(recipe.precision, device) if with_weights else precisions.FLOAT32
        load = backbone_table.loader(recipe.backbone)
        kind: adapters.Adapter = adapter_table.TABLE.get(recipe.adapter.kind)()
        with torch.random.fork_rng(devices=[]):
            # What a backbone from scratch does not train must be the same at every site; nobody uses the other first
            # values.
            torch.manual_seed(seeding.torch_seed(recipe.seed, "initial", "backbone"))
            if backbone is None:
                backbone = load(recipe.backbone, with_weights=with_weights, device=device)
            self.backbone: backbones.Backbone = backbone
            self.backbone_parameters = self.backbone.parameters_total()
            self.recipe = recipe = resolve(recipe, self.backbone)
            self.recipe_hash = recipe.hash
            self.licence = licences.of(recipe.backbone)
            self.task: tasks.Task = task_table.TABLE.get(recipe.task.kind)(recipe)
            if recipe.words is not None:
                self.backbone.words = towers.open_towers(recipe, with_weights=with_weights, device=device)
            if self.task.masks:
                # With prompts the background needs no token.
                prompted = recipe.task.prompt != "none"
                self.backbone.open_masks(len(recipe.data.class_names) - prompted, recipe.seed)
            # The parts come first: what a kind puts into the decoder is no part of the pretrained one.
            parts = decoder.inject(recipe.adapter, self.backbone)
            self.injected = adapters.joined(kind.inject(recipe.adapter, self.backbone), parts)
            with torch.device(self.device):
                self.head = self.task.head(self.backbone)
        wrong = self.task.private_faults() + gradients.faults(self) if _bounds_units(recipe) else []
        if wrong:
            raise errors.ConfigError("recipe", wrong)
        self.to(self.device) if with_weights else None
        self.taps = self.backbone.taps(self.task.grids)
        if with_weights and contract.is_own(self.backbone):
            wrong = contract.faults(self.backbone, recipe.data.input_size, self.taps, self.device)
            if wrong:
                raise errors.ConfigError(f"backbone '{recipe.backbone.name}'", wrong)
        self._parameters_by_name = self._wire()
        self.frozen_blocks = self._count_frozen()
        self.frozen_whole = not self.injected.parameters
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
        if not rows:
            raise errors.ConfigError(
                "recipe", [f"nothing would train: adapter kind '{self.recipe.adapter.kind}', no decoder parts, no head"]
            )
        wrong = groups.faults(self.manifest, self.recipe)
        if wrong:
            raise errors.ConfigError("recipe", wrong)
        return wired

    def _count_frozen(self) -> int:
        """How many leading blocks, and the neck behind them, no trainable parameter touches.

        0 where something before them trains.
        """
        names = list(self.injected.parameters)
        if any(not name.startswith(("block.", "final_norm.", "neck.", "decoder.", "prompt.")) for name in names):
            return 0
        blocks = [int(name.split(".")[1]) for name in names if name.startswith("block.")]
        touched = any(name.startswith(("final_norm.", "neck.")) for name in names)
        return min(blocks, default=self.backbone.depth + (0 if touched else self.backbone.behind))

    def initial(self) -> state.AdapterState:
        """The adapter of round 0, seeded by the recipe."""
        bounds = self.injected.bounds
        arrays = {
            spec.name: adapters.initial(spec, self.recipe.seed, bounds.get(spec.name, 0.0))
            for spec in self.injected.specs
        }
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
        if not self.manifest.fits(adapter):
            raise errors.CheckpointError(
                f"the adapter has {len(adapter)} arrays that do not fit this recipe's {len(self.manifest)}; it "
                f"belongs to another recipe or backbone"
            )
        for name, parameter in self._parameters_by_name.items():
            value = torch.tensor(adapter[name])
            if name in self.injected.reference:
                value = value + self.injected.reference[name].cpu()
            parameter.copy_(value)
        self._written = adapter

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of an array of the manifest."""
        return self._parameters_by_name[name]

    def trained(self, round_number: int) -> tuple[str, ...]:
        """Names of the arrays that train in a round."""
        if self.alone:
            return tuple(spec.name for spec in self.manifest if spec.name in self.alone)
        return factors.trained(self.manifest, self.recipe.adapter.factors, round_number)

    def leaving(self, round_number: int) -> tuple[str, ...]:
        """Names of the arrays that leave a site after a round: those that train and are shared."""
        return groups.leaving(self.manifest, self.recipe, round_number)

    @property
    def personal(self) -> frozenset[str]:
        """Names of the arrays that never leave a site."""
        return groups.personal(self.manifest, self.recipe.personal.kind)

    def trainable(self, round_number: int | None = None) -> dict[str, list[nn.Parameter]]:
        """Parameters by learning-rate group: "adapter", and "head" with the decoder parts.

        Args:
            round_number: those that train in it; None for all of the adapter's.
        """
        groups: dict[str, list[nn.Parameter]] = {"adapter": [], "head": []}
        fast = {spec.name for spec in self.manifest if spec.group in ("head", decoder.GROUP)}
        chosen = set(self._parameters_by_name if round_number is None else self.trained(round_number))
        for name, parameter in self._parameters_by_name.items():
            if name in chosen:
                groups["head" if name in fast else "adapter"].append(parameter)
        return groups

    def leaves(self, round_number: int) -> list[bool]:
        """Whether each parameter of :meth:`trainable`, group after group, leaves a site after a round."""
        sent = {id(self._parameters_by_name[name]) for name in self.leaving(round_number)}
        return [id(parameter) in sent for group in self.trainable(round_number).values() for parameter in group]

    def select(self, round_number: int) -> None:
        """Before a round: what trains in it requires a gradient, and nothing else does."""
        chosen = set(self.trained(round_number))
        for name, parameter in self._parameters_by_name.items():
            parameter.requires_grad_(name in chosen)
            parameter.grad = None

    def _computing(self) -> torch.autocast:
        """In this, the model computes in its precision."""
        return torch.autocast(
            self.device.partition(":")[0], torch.bfloat16, enabled=self.precision == precisions.BFLOAT16
        )

    def forward(
        self,
        pixels: Tensor,
        prefix: backbones.Prefix | None = None,
        prompts: Sequence[backbones.Prompts] | backbones.Propose | None = None,
        parts: case_heads.Parts | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Logits. ``prompts`` are one for each foreground class, where the recipe trains with prompts, or draw masks.

        Of cases ``parts`` says which images are whose: pixels are those of all of them, and not looked at where their
        vectors are given. ``rows`` are those of the table, where the recipe takes one (:mod:`fedvfm.tasks.fusion`).

        Shapes: pixels (B, 3, H, W), normalised -> (B, K, H, W) in segmentation, (B, K) in classification; of cases
            pixels (N, 3, H, W) -> (B, K); rows (B, C), where images may be missing (B, C + 1).
        """
        beside = (rows,) if self.recipe.inputs.columns else ()
        if parts is not None:
            return self._of_cases(pixels, prefix, parts, beside)
        if (prompts is not None) != bool(self.recipe.task.oracle):
            told = "none were" if prompts is None else "some were"
            raise ValueError(f"recipe.task.prompt = '{self.recipe.task.prompt}', but {told} given")
        with self._computing():
            result: Tensor = self.head(self.features(pixels, prefix, prompts), *beside)
        return result

    def features(
        self,
        pixels: Tensor,
        prefix: backbones.Prefix | None = None,
        prompts: Sequence[backbones.Prompts] | backbones.Propose | None = None,
    ) -> backbones.Features:
        """What the head sees; automatic prompts are the head's own."""
        prefix = self._middle(pixels, prefix)
        if self.recipe.task.prompt == "auto":
            propose: backbones.Propose = self.head.propose
            return self.backbone.proposed(pixels, self.taps, prefix, propose)
        if prompts is None:
            return self.backbone.features(pixels, self.taps, prefix)
        if callable(prompts):
            return self.backbone.proposed(pixels, self.taps, prefix, prompts)
        return self.backbone.prompted(pixels, self.taps, prefix, prompts)

    def _of_cases(
        self, pixels: Tensor, prefix: backbones.Prefix | None, parts: case_heads.Parts, beside: Sequence[Tensor | None]
    ) -> Tensor:
        vectors = self.vectors(pixels, prefix) if parts.vectors is None else parts.vectors
        with self._computing():
            result: Tensor = self.head(case_heads.bags(vectors, parts.places), *beside)
        return result

    def vectors(self, pixels: Tensor, prefix: backbones.Prefix | None = None) -> Tensor:
        """What a head of cases is given of each image.

        Shapes: pixels (N, 3, H, W), normalised -> (N, D), float32.
        """
        with self._computing():
            pooled = self.features(pixels, prefix).pooled
        return case_classification.frozen(pooled) if self.frozen_whole else pooled.float()

    @torch.no_grad()
    def attention(self, parts: case_heads.Parts) -> Tensor:
        """How much the answer for one case rests on each of its images, which have vectors. Shapes: (S,), sum 1."""
        if parts.vectors is None:
            raise ValueError("attention is asked for images whose vectors are not known")
        with self._computing():
            weights: Tensor = self.head.weights(case_heads.bags(parts.vectors, parts.places))
        return weights[0].float().cpu()

    @torch.no_grad()
    def frozen_prefix(self, pixels: Tensor) -> backbones.Prefix:
        """What the blocks before the first adapted one compute. Shapes: pixels (B, 3, H, W)."""
        with self._computing():
            return self.begun(pixels, self.frozen_blocks)

    def begun(self, pixels: Tensor, stop: int) -> backbones.Prefix:
        """What the first ``stop`` blocks compute; of a stack, for every slice of it.

        Shapes: pixels (B, 3, H, W) -> tokens of B images, or of B * 3 slices where they meet in depth branches.
        """
        return self.backbone.prefix(self._slices(pixels), stop, self.taps)

    def _slices(self, pixels: Tensor) -> Tensor:
        """Each slice of a stack as a grey image of its own, where they meet in depth branches.

        Shapes: (B, 3, H, W) -> (B * 3, 3, H, W).
        """
        if self.backbone.slices == 1:
            return pixels
        contract = self.recipe.data
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (contract.mean, contract.std))
        grey = (pixels * std + mean).flatten(0, 1)[:, None]
        return (grey - mean) / std

    def _middle(self, pixels: Tensor, prefix: backbones.Prefix | None) -> backbones.Prefix | None:
        """The middle slice behind the last depth branch; ``prefix`` as it is where there is none."""
        slices = self.backbone.slices
        if slices == 1:
            return prefix
        prefix = self.begun(pixels, 0) if prefix is None else prefix
        done = self.backbone.advanced(prefix, self.backbone.joined, self.taps)
        taken = {tap: tokens[slices // 2 :: slices] for tap, tokens in done.taken.items()}
        return backbones.Prefix(done.stop, done.hidden[slices // 2 :: slices], taken)

    def under(self, recipe: schema.Recipe) -> AdaptedModel:
        """The same modules, sharing every number, under a recipe that differs only in how they are trained."""
        made = copy.copy(self)
        made.recipe = recipe
        return made

    def without_mechanism(self) -> AdaptedModel:
        """The same for saving what was trained without noise: its card claims no guarantee of the recipe."""
        bare = self.under(self.recipe.model_copy(update={"privacy": privacy.NONE}))
        bare.recipe_hash = bare.recipe.hash
        return bare

    def locked(self) -> locked_recipe.LockedRecipe:
        """The recipe, locked to this model's manifest, initial adapter and backbone."""
        backbone = self.backbone
        parts = (self.manifest, self.initial(), backbone.sha256, self.backbone_parameters, backbone.config_sha256)
        return locked_recipe.LockedRecipe.of(self.recipe, *parts)
