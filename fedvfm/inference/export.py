"""Save an adapter where others can load it: PEFT's own layout where PEFT has the kind, ours for every kind."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
from torch import Tensor, nn

from fedvfm import errors
from fedvfm.adapters import base as adapters
from fedvfm.adapters import decoder, fused, lora
from fedvfm.adapters import table as adapter_table
from fedvfm.backbones import base as backbones
from fedvfm.backbones import licences, weights
from fedvfm.backbones import table as backbone_table
from fedvfm.config import licence, schema
from fedvfm.inference import card
from fedvfm.model import adapted_model, adapter_folder
from fedvfm.state import checkpoint, groups, state
from fedvfm.storage import hash_chain, storage
from fedvfm.tasks import words

if TYPE_CHECKING:
    import peft

STATE, ABOUT = adapter_folder.STATE, adapter_folder.ABOUT
HEAD = "head.safetensors"
DISTILLED = "distilled.json"
FILES = (
    adapter_folder.STATE,
    adapter_folder.ABOUT,
    adapter_folder.CARD,
    HEAD,
    "adapter_config.json",
    "adapter_model.safetensors",
    DISTILLED,
)
"""All that a saved adapter may hold; whatever else lies in its folder is of the machine that it lies on."""
MARK = f"fedvfm.{adapter_folder.LICENCE}"


def save(model: adapted_model.AdaptedModel, folder: Path, made: Mapping[str, Any], *, note: str = "") -> Path:
    """Write the model's adapter, its head and a model card.

    ``fedvfm_adapter.safetensors`` holds every array under its wire name (:func:`load_adapter` reads it). For LoRA and
    norm tuning
    ``adapter_config.json`` and ``adapter_model.safetensors`` are what ``PeftModel.from_pretrained`` loads into the
    stock backbone.

    Raises:
        StorageError: if the disk refuses.
    """
    adapter = model.read()
    adapter_folder.write(folder, card.facts(model), adapter)
    write_head(model, folder)
    for_peft = _peft(model)
    if for_peft is not None:
        settings, tensors = for_peft
        storage.write_text(folder / "adapter_config.json", _as_json(settings))
        storage.write_bytes(folder / "adapter_model.safetensors", safetensors.torch.save(tensors, marks(model)))
    storage.write_text(
        folder / adapter_folder.CARD, card.text(model, adapter, made, note, with_peft=for_peft is not None)
    )
    return folder


def copy_files(adapter: Path, folder: Path) -> None:
    """Copy a saved adapter into a new folder that may be given away: its own files, and nothing that lies beside them.

    Beside them may lie what a site keeps for itself: its personal arrays, its scores, a statement with its name.

    Raises:
        StorageError: if the disk refuses.
    """
    with storage.guard(folder):
        folder.mkdir()
        for name in FILES:
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, folder / name)


def marks(model: adapted_model.AdaptedModel) -> dict[str, str]:
    """Metadata of a file of weights: what transformers wants, and the terms of use of the backbone."""
    return {"format": "pt"} | ({MARK: str(model.licence)} if model.licence else {})


def write_head(model: adapted_model.AdaptedModel, folder: Path) -> None:
    """The head's numbers under its own names; of sentences also what they come to, so that no text tower is needed.

    Raises:
        StorageError: if the disk refuses.
    """
    numbers = {name: value.detach().cpu().contiguous() for name, value in model.head.named_parameters()}
    if isinstance(model.head, words.Words):
        numbers |= {name: value.cpu().contiguous() for name, value in words.Folded(model.head).matrix().items()}
    storage.write_bytes(folder / HEAD, safetensors.torch.save(numbers))


def load_adapter(
    folder: str | os.PathLike[str], *, device: str = "cpu", backbone: str | None = None
) -> adapted_model.AdaptedModel:
    """The adapted model of a saved adapter, of any kind, ready for evaluation.

    Args:
        folder: what :func:`save` wrote.
        device: where to compute.
        backbone: another place of the same backbone (its sha256 is still checked).

    Raises:
        CheckpointError: if the folder is damaged or the adapter does not fit.
        WeightsError: if the backbone is not here or not the same bytes; it is never fetched.
    """
    path = Path(folder)
    about = _about(path)
    adapter, _, marks = checkpoint.read(path / STATE)
    about.require_of(path, adapter, marks)
    chosen = about.recipe.backbone.model_copy(update={"sha256": about.sha256 or None})
    if backbone is not None:  # a revision is one of the place the recipe names
        chosen = chosen.model_copy(update={"name": backbone, "revision": None})
    weights.require_here(chosen)
    model = adapted_model.AdaptedModel(about.recipe.model_copy(update={"backbone": chosen}), device=device)
    if about.settings and model.backbone.config_sha256 != about.settings:
        raise errors.WeightsError(
            f"backbone '{chosen.name}': its config.json has other settings ({model.backbone.config_sha256[:12]}) than "
            f"{path} was trained with ({about.settings[:12]}); the adapter would compute something else. Bring "
            "config.json and weights here as they were"
        )
    _require_head(path, model, adapter)
    model.write(adapter)
    model.recipe_hash = about.trained
    model.licence = licences.of(about.recipe.backbone) + about.licence + model.licence
    model.eval()
    return model


def _require_head(path: Path, model: adapted_model.AdaptedModel, adapter: state.AdapterState) -> None:
    """A head that no site's training ever moved predicts nothing: it stays at the sites.

    Raises:
        CheckpointError: if this is the global adapter of a recipe whose head is personal.
    """
    if model.recipe.personal.kind != groups.HEAD_LOCAL:
        return
    first = model.initial()
    # Two machines draw the same first values up to rounding.
    if all(np.allclose(adapter[name], first[name], 1e-4, 1e-6) for name in model.personal):
        raise errors.CheckpointError(
            f"{path}: the head of this adapter was never trained, since recipe.personal.kind = '{groups.HEAD_LOCAL}' "
            "keeps heads at the sites. Take the adapter of one site: sites/NAME of a simulation, or at a hospital the "
            "folder that 'fedvfm client adapter' names"
        )


def recipe_of(folder: Path) -> schema.Recipe:
    """The recipe of a saved adapter, without its numbers.

    Raises:
        CheckpointError: if there is none.
    """
    return _about(folder).recipe


@dataclass(frozen=True)
class _About:
    """What ``fedvfm.json`` says.

    Attributes:
        recipe: with the backbone where it lay when this was saved.
        hashes: of the recipe as it stands in the file, and as this release resolves it: keys that came since and say
            nothing leave its name as it was.
        trained: hash of the recipe of training.
        sha256: of the backbone's weights.
        settings: sha256 of the backbone's settings; empty in older adapters.
        fingerprint: of the adapter.
        licence: of the backbone's weights, as known where this was saved.
    """

    recipe: schema.Recipe
    hashes: tuple[str, str]
    trained: str
    sha256: str
    settings: str
    fingerprint: str
    licence: licence.Licence

    def require_of(self, path: Path, adapter: state.AdapterState, marks: Mapping[str, str]) -> None:
        """Refuse what is not of this adapter.

        Raises:
            CheckpointError: saying which.
        """
        if adapter.fingerprint != self.fingerprint:
            raise errors.CheckpointError(f"{path}: {STATE} and {ABOUT} are not of the same adapter. Export it again")
        if marks.get("recipe") not in self.hashes:
            raise errors.CheckpointError(
                f"{path}: the recipe in {ABOUT} is not the one that {STATE} was made with, so the adapter would "
                "compute something else. Take both files as they were saved"
            )


def _about(path: Path) -> _About:
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        recipe = schema.parse(schema.Recipe, about["recipe"], str(path / ABOUT))
        found = hashlib.sha256(hash_chain.canonical(about["recipe"]).encode()).hexdigest()
        return _About(
            recipe,
            (recipe.hash, found),
            str(about.get("recipe_hash", recipe.hash)),
            str(about["backbone_sha256"]),
            str(about.get("backbone_config_sha256", "")),
            str(about["fingerprint"]),
            licence.Licence.read(about.get(adapter_folder.LICENCE)),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError, errors.ConfigError) as error:
        raise errors.CheckpointError(
            f"{path} is no adapter of this fedvfm: {ABOUT} cannot be read ({type(error).__name__}). Export it again"
        ) from None


def merge(model: adapted_model.AdaptedModel) -> nn.Module:
    """The stock model with the adapter folded into its weights; it shares nothing with ``model`` and has no head.

    Of the kinds that PEFT does not have, those that train the weights themselves are merged by a copy.

    Raises:
        ConfigError: if the kind adds layers or tokens, which no stock weights can hold.
        LicenceForbids: if nothing made of the weights may be passed on.
    """
    licences.require_derivatives(model.licence, model.recipe.backbone.name, "merge")
    kind: adapters.Adapter = adapter_table.TABLE.get(model.recipe.adapter.kind)()
    if not kind.foldable:
        raise errors.ConfigError(
            "merge",
            [
                f"adapter kind '{model.recipe.adapter.kind}' adds parts that the stock model has no weights for; "
                f"load the adapter with fedvfm.load_adapter"
            ],
        )
    for_peft = _peft(model)
    if for_peft is None:
        folded = copy.deepcopy(model.backbone.model)
        lora.fold(folded)
        return model.backbone.stock(folded)
    import peft

    settings, tensors = for_peft
    chosen = model.recipe.backbone
    # Merging writes into the weights, and those of a loaded backbone are shared.
    stock = model.backbone.stock(copy.deepcopy(backbone_table.loader(chosen)(chosen, device=model.device).model))
    tuned: Any = peft.PeftModel(stock, settings)
    peft.set_peft_model_state_dict(tuned, tensors)
    merged: nn.Module = tuned.merge_and_unload()
    return merged


def _as_json(settings: peft.PeftConfig) -> str:
    written = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.to_dict().items()}
    return json.dumps(written, indent=2, sort_keys=True) + "\n"


def _peft(model: adapted_model.AdaptedModel) -> tuple[peft.PeftConfig, dict[str, Tensor]] | None:
    """PEFT's configuration and tensors of the same adapter, or None where PEFT has no such kind."""
    kind, recipe = model.recipe.adapter.kind, model.recipe
    if kind not in ("lora", "core", "norm") or not model.injected.parameters:
        return None
    if card.holds_weights(model) and licence.NO_DERIVATIVES in model.licence.limits:
        return None
    if recipe.task.prompt == "auto":
        return None  # the stock model would be told nothing, and give other masks
    if model.backbone.mask_tokens > model.backbone.stock_mask_tokens or model.backbone.stock_differs:
        return None  # the stock model has no place for further mask tokens, or would compute something else
    fresh: backbones.Backbone = backbone_table.loader(recipe.backbone)(recipe.backbone, with_weights=False)
    settings: Any = _norm_config(model, fresh) if kind == "norm" else lora.peft_config(recipe.adapter, fresh)
    settings.modules_to_save = decoder.paths(recipe.adapter.parts or (), fresh) or None
    settings.inference_mode = True
    settings.base_model_name_or_path = recipe.backbone.name
    return settings, _peft_tensors(model)


def _norm_config(model: adapted_model.AdaptedModel, fresh: backbones.Backbone) -> peft.LNTuningConfig:
    import peft

    paths = {
        name.rpartition(".")[0]
        for name, _ in fresh.model.named_parameters()
        if fresh.wire_name(name) in {spec.name for spec in model.injected.specs if spec.group == "norm"}
    }
    return peft.LNTuningConfig(target_modules=sorted(paths))


def _peft_tensors(model: adapted_model.AdaptedModel) -> dict[str, Tensor]:
    """Under PEFT's names: stock paths with ``lora_A`` / ``lora_B`` or ``ln_tuning_layers``; decoder parts as they are.

    Pairs on slices of a fused layer go in as one pair of the whole layer, and a core is multiplied into B.
    """
    found: dict[str, Tensor] = {}
    groups = {id(model.injected.parameters[spec.name]): spec.group for spec in model.injected.specs}
    for path, module in model.backbone.model.named_modules():
        if isinstance(module, fused.Fused | lora.Layer):
            down, up = module.block_form()
            found |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
    for name, parameter in model.backbone.model.named_parameters():
        path, _, last = name.rpartition(".")
        group = groups.get(id(parameter), "")
        if group == "norm":
            found[f"{path}.ln_tuning_layers.{last}"] = parameter
        elif group == decoder.GROUP:
            found[name] = parameter
    return {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in found.items()}
