"""Import weights from files: safetensors as they are; pickled state dicts converted once, their code never run."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
from torch import Tensor

from fedvfm import errors
from fedvfm.backbones import (
    base,
    identity,
    monai_bundle,
    open_clip_original,
    pickled,
    record,
    safefile,
    sam2_original,
    sam_original,
    swin_original,
    table,
    tinyvit_original,
    towers,
    vit_original,
    weights,
)
from fedvfm.config import licence, schema
from fedvfm.storage import storage

STAGING = ".import."
STALE_S = 86_400.0
ORIGINALS: tuple[ModuleType, ...] = (
    sam_original,
    sam2_original,
    tinyvit_original,
    swin_original,
    open_clip_original,
    vit_original,
)
"""Layouts of the models' authors: each recognises its array names, reads settings off shapes, and converts arrays.

Of those that say ``EXACT`` every array that they give must be one of the model's: transformers passes over others
without a word, and a part that was left out would make the model compute something else.
"""


@dataclass(frozen=True)
class Given:
    """What the user gave.

    Attributes:
        path: the file or folder.
        files: that make the weights.
        config: ``config.json``, if any.
        settings: its content, where it was made from a configuration of another form.
        key: the set of weights that is meant, where a pickle holds several.
        open_clip: ``open_clip_config.json``, if any.
    """

    path: Path
    files: tuple[Path, ...]
    config: Path | None
    settings: bytes = b""
    key: str = ""
    open_clip: Path | None = None

    @property
    def pickled(self) -> bool:
        """Whether the weights are a pickle."""
        return self.files[0].suffix in pickled.SUFFIXES


def bring(
    path: Path,
    name: str,
    *,
    config: Path | None = None,
    sha256: str | None = None,
    replace: bool = False,
    terms: licence.Licence | None = None,
    key: str = "",
) -> weights.Located:
    """Put weights into our cache under a name that recipes can use, with a record of what they were.

    Args:
        path: a ``.safetensors``, ``.bin``, ``.pth`` or ``.pt`` file, a folder in Hugging Face's layout, or a MONAI
            bundle.
        name: a name of the table, ``owner/model`` or a word of your own.
        config: ``config.json``, where ``path`` is a file; SAM in its authors' layout needs none.
        sha256: what the publisher says of the file; checked before anything in it is read.
        replace: put it in place of what bears the name already.
        key: the set of weights that is meant, of a pickle that holds several (Ark's "teacher" and "state_dict").
        terms: the licence of the weights, one name at most; recipes that are locked here state it.

    Raises:
        ConfigError: if the name cannot be used.
        OutputInUse: if the name is taken and ``replace`` is false.
        WeightsError: if the files are not what they must be, or do not load.
        StorageError: if the disk refuses.
    """
    _check_name(name)
    given = dataclasses.replace(_look(path, config), key=key)
    found = identity.of_weights(identity.hash_files(given.files))
    if sha256 is not None and found != sha256.lower():
        raise errors.WeightsError(
            f"{path}: sha256 is {found[:16]}..., expected {sha256[:16]}.... It is cut short or another file; download "
            "it again"
        )
    source = f"{path.name}, sha256 {found}" + (f", {key}" if key else "")
    if weights.in_cache(name) and not replace:
        return _as_before(name, source, given, terms)
    with _room(given) as staging:
        layout = _fill(staging, given)
        _bring_tokenizer(staging, given)
        made = dataclasses.replace(_record(staging, name, source), **_stated(terms))
        loaded = _check_loads(staging, path, name)
        if layout is open_clip_original:
            towers.require_whole(staging, path)
        if getattr(layout, "EXACT", False):
            _require_used(staging, path, loaded)
        record.write(staging, made)
        with storage.exclusive(weights.cache() / "weights"):
            if weights.in_cache(name) and not replace:  # another import of this name came first
                return _as_before(name, source, given, terms)
            _install(staging, weights.own_folder(name))
    return weights.locate(schema.BackboneConfig(name=name), download=False)


def _check_name(name: str) -> None:
    if not weights.NAME.fullmatch(name) or "--" in name or len(name) > 100:
        raise errors.ConfigError(
            "weights import",
            [f"--name '{name}': letters, digits, '.', '_', '-', and one '/' (owner/model) are allowed"],
        )
    known = weights.KNOWN.get(name)
    if (name in table.TABLE and known is None) or (known is not None and known.sha256):
        raise errors.ConfigError("weights import", [f"--name '{name}': is kept for another backbone; choose another"])


def _stated(terms: licence.Licence | None) -> dict[str, Any]:
    return {} if terms is None else {"licence": "".join(terms.names[:1]), "limits": list(terms.limits)}


def _as_before(name: str, source: str, given: Given, terms: licence.Licence | None) -> weights.Located:
    """What bears the name already, if it was made from the same file and settings.

    Raises:
        OutputInUse: if it was made from others.
        WeightsError: if it is damaged.
    """
    kept = record.read(weights.own_folder(name))
    settings = "" if given.config is None else identity.of_settings(identity.read_json(given.config))
    settings = identity.of_settings(json.loads(given.settings)) if given.settings else settings
    if kept is None or kept.source != source or settings not in ("", kept.config_sha256):
        raise errors.OutputInUse(
            f"'{name}' is on this machine already, made from {kept.source if kept else 'another file'}. Choose another "
            "--name, or put the new one in its place with --replace"
        )
    if terms is not None and terms != licence.Licence.of(kept.licence, kept.limits):
        before = licence.Licence.of(kept.licence, kept.limits)
        raise errors.OutputInUse(
            f"'{name}' is on this machine already, with licence {before}, not {terms}. Import it with --replace to "
            "state another"
        )
    return weights.locate(schema.BackboneConfig(name=name), download=False)


# -- what was given ----------------------------------------------------------------------------------------------------


def _look(path: Path, config: Path | None) -> Given:
    if config is not None and "model_cfg" in identity.read_json(config):
        return dataclasses.replace(_look(path, None), config=None, open_clip=config)
    if path.is_dir() and monai_bundle.is_bundle(path):
        if config is not None:
            raise errors.ConfigError("weights import", ["--config: a MONAI bundle has its own; leave it out"])
        return Given(path, (monai_bundle.weights_of(path),), None, monai_bundle.settings_of(path))
    if path.is_dir():
        own = path / identity.CONFIG
        # timm's says nothing that the arrays do not.
        usable = own.is_file() and "model_type" in identity.read_json(own)
        beside = open_clip_original.stated(path)
        return Given(path, _in_folder(path), config or (own if usable else None), open_clip=beside)
    if not path.is_file():
        raise errors.WeightsError(f"{path}: there is no such file or folder")
    if path.suffix not in (".safetensors", *pickled.SUFFIXES):
        known = ", ".join((".safetensors", *pickled.SUFFIXES))
        raise errors.WeightsError(f"{path}: the suffix '{path.suffix}' is none of {known}; other formats are not read")
    return Given(path, (path,), config)


def _in_folder(folder: Path) -> tuple[Path, ...]:
    if any((folder / name).is_file() for name in (identity.SINGLE, identity.INDEX)):
        return identity.weight_files(folder)
    if (folder / "pytorch_model.bin").is_file():
        return (folder / "pytorch_model.bin",)
    found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", *pickled.SUFFIXES))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:5]) or "none"
        raise errors.WeightsError(
            f"{folder}: holds no {identity.SINGLE}, and not one single file of weights (found: {names}). Name the file "
            "itself; a sharded .bin is not read, take its safetensors"
        )
    return (found[0],)


# -- reading -----------------------------------------------------------------------------------------------------------


def _fill(staging: Path, given: Given) -> ModuleType | None:
    """Weights and ``config.json`` into the staging folder; the layout they came in, where it is an original one."""
    if given.pickled:
        tensors = pickled.read(given.files[0], given.key)
        names = set(tensors)
    else:
        tensors = {}
        names = {name for file in given.files if file.suffix == ".safetensors" for name in safefile.names(file)}
    original = None if given.settings else next((layout for layout in ORIGINALS if layout.recognise(names)), None)
    if given.config is None and original is None and not given.settings:
        raise errors.WeightsError(
            f"{given.path}: comes without config.json, which says how the weights are used. Give the one of the "
            "model's page with --config"
        )
    if original is not None and not given.pickled:
        tensors = _read_safetensors(given.files)
    text = given.config.read_bytes() if given.config is not None else given.settings
    if original is not None and given.config is None:
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        clip = original is open_clip_original
        settings = open_clip_original.settings_of(given.open_clip, shapes) if clip else original.settings(shapes)
        text = (json.dumps(settings, indent=2) + "\n").encode()
    storage.write_bytes(staging / identity.CONFIG, text)
    identity.read_config(staging)
    if original is not None:
        tensors = original.convert(tensors)
    if tensors:
        safefile.write(staging / identity.SINGLE, [pickled.row(name, value) for name, value in tensors.items()])
        return original
    for file in given.files:
        _copy(file, staging / (file.name if len(given.files) > 1 else identity.SINGLE))
    return None


def _bring_tokenizer(staging: Path, given: Given) -> None:
    """What reads sentences for the model, where it lies beside its weights; a recipe with words needs it."""
    beside = given.path if given.path.is_dir() else given.path.parent
    if identity.read_config(staging).get("model_type") not in towers.MODELS:
        return
    for name in identity.TOKENIZER:
        if (beside / name).is_file():
            _copy(beside / name, staging / name)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        storage.write_file(target, lambda out: shutil.copyfileobj(file, out, 1 << 20))


def _read_safetensors(files: Sequence[Path]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in files:
        if path.suffix == ".safetensors":
            part = safetensors.torch.load_file(path)
            pickled.require_plain(path, part)
            found |= part
    return found


# -- keeping -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _room(given: Given) -> Iterator[Path]:
    """A new folder beside where the weights go, on a disk that has room for them; gone if anything fails."""
    place = weights.cache() / "weights"
    staging = None
    with safefile.guard(place):
        try:
            place.mkdir(parents=True, exist_ok=True)
            _sweep(place)
            need, free = sum(file.stat().st_size for file in given.files) + (1 << 20), shutil.disk_usage(place).free
            if need > free:
                raise OSError(errno.ENOSPC, f"{need:,} bytes are needed, {free:,} are free", str(place))
            staging = Path(tempfile.mkdtemp(prefix=STAGING, suffix=storage.PART, dir=place))
            yield staging
        finally:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)


def _sweep(place: Path) -> None:
    """Remove what killed imports left, once nobody can be writing there any more."""
    for folder in place.glob(f"{STAGING}*"):
        if time.time() - folder.stat().st_mtime > STALE_S:
            shutil.rmtree(folder, ignore_errors=True)


def _record(staging: Path, name: str, source: str) -> record.Record:
    files = identity.weight_files(staging)
    hashes = identity.hash_files(files)
    config = identity.hash_files(
        [staging / name for name in (identity.CONFIG, *identity.TOKENIZER) if (staging / name).is_file()]
    )
    settings = identity.of_settings(identity.read_config(staging))
    return record.Record(name, "imported", identity.of_weights(hashes), settings, {**hashes, **config}, source=source)


def _check_loads(staging: Path, path: Path, name: str) -> base.Backbone:
    """Load it as a run would; a name of the table must bear a model of the table's shape.

    Raises:
        WeightsError: if it does not load.
    """
    settings = schema.BackboneConfig.model_construct(name=str(staging))
    try:
        made: base.Backbone = table.loader(settings)(settings)
    except errors.FedvfmError as error:
        said = str(error).replace(str(staging), str(path)).replace("\n", " ")
        raise errors.WeightsError(f"{path}: does not load with its config.json: {said}") from None
    if name in weights.KNOWN:
        known = schema.BackboneConfig(name=name)
        wanted: base.Backbone = table.loader(known)(known, with_weights=False)
        if _shapes(wanted) != _shapes(made):
            raise errors.WeightsError(
                f"{path}: is not of the shape of '{name}' ({made.parameters_total():,} parameters, not "
                f"{wanted.parameters_total():,}). Choose another --name"
            )
    return made


def _require_used(staging: Path, path: Path, loaded: base.Backbone) -> None:
    """Check that the model has a place for every array.

    Raises:
        WeightsError: naming one for which it has none.
    """
    left = sorted(set(safefile.names(staging / identity.SINGLE)) - set(loaded.model.state_dict()))
    if left:
        raise errors.WeightsError(
            f"{path}: has {len(left)} arrays that this model has no place for (first: {ascii(left[0][:80])[1:-1]}), so "
            "it would compute something else than its authors' code. Take weights of the published model, or import "
            "them in the layout of transformers"
        )


def _shapes(backbone: base.Backbone) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in backbone.model.named_parameters()}


def _install(staging: Path, place: Path) -> None:
    """One rename; what stood there before is removed after it."""
    old = staging.with_name(f"{staging.name}.old")
    if place.exists():
        os.rename(place, old)
    os.rename(staging, place)
    shutil.rmtree(old, ignore_errors=True)
