"""What names a backbone: pins, settings, revisions, records; and the verbs that fetch, list and verify."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch

from fedvfm import errors
from fedvfm.backbones import identity, imgfocus, record, safefile, stored, table, weights
from fedvfm.cli import main
from fedvfm.config import schema
from fedvfm.model import adapted_model

CONFIG, WEIGHTS = 2, 4


@pytest.fixture(autouse=True)
def _caches_of_our_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``fedvfm weights ...`` -> exit code, output, errors."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedvfm", "weights", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return int(stop.value.code or 0), said.out, said.err

    return call


def settings(name: str | Path, **more: Any) -> schema.BackboneConfig:
    return schema.BackboneConfig(name=str(name), **more)


def load(name: str | Path, **more: Any) -> Any:
    chosen = settings(name, **more)
    return table.loader(chosen)(chosen)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def copied(tiny_dino: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dino, tmp_path / "copied"))


@pytest.fixture
def embedded(tiny_dino: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model under the embedded one's name and pin, in our cache."""
    folder = Path(shutil.copytree(tiny_dino, weights.own_folder(weights.EMBEDDED)))
    known = weights.Known(
        "",
        "general",
        identity.read_config(folder),
        weights.locate(settings(folder)).sha256,
        wheel="fedvfm.backbones.imgfocus",
    )
    monkeypatch.setitem(weights.KNOWN, weights.EMBEDDED, known)
    return folder


def hub(tmp_path: Path, source: Path, name: str = "someone/tiny") -> Path:
    """Hugging Face's cache layout: blobs by hash, snapshots of links."""
    repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    revision = "a" * 40
    snapshot = repository / "snapshots" / revision
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for file in source.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return snapshot


# -- the settings are part of the backbone -----------------------------------------------------------------------------


def test_settings_that_change_numbers_change_the_identity(copied: Path) -> None:
    before = load(copied)
    edit(copied, transformers_version="9.9", _name_or_path="elsewhere", torch_dtype="float16")
    assert load(copied).config_sha256 == before.config_sha256
    edit(copied, layer_norm_eps=0.5)
    after = load(copied)
    assert after.sha256 == before.sha256
    assert after.config_sha256 != before.config_sha256


def test_a_backbone_in_memory_is_not_taken_for_one_with_other_settings(copied: Path) -> None:
    assert load(copied).model.layernorm.eps != 0.5
    edit(copied, layer_norm_eps=0.5)
    assert load(copied).model.layernorm.eps == 0.5


def test_the_lock_carries_both_hashes(tiny_dino: Path) -> None:
    values = {
        "backbone": {"name": str(tiny_dino)},
        "data": {"class_names": ["background", "cell"], "input_size": [28, 28]},
    }
    recipe = schema.parse(schema.Recipe, values, "recipe")
    locked = adapted_model.AdaptedModel(recipe).locked()
    located = weights.locate(settings(tiny_dino))
    assert (locked.backbone_sha256, locked.backbone_config_sha256) == (located.sha256, located.config_sha256)
    # Without the weights, the settings of a folder are known, and its weights only if they are pinned.
    assert weights.pinned(recipe.backbone) == ("", located.config_sha256)
    assert weights.pinned(settings("dinov2-base", sha256="0" * 64)) == ("0" * 64, "")
    assert weights.pinned(settings(weights.EMBEDDED))[0] == weights.KNOWN[weights.EMBEDDED].sha256


def test_settings_with_numbers_that_are_none(copied: Path) -> None:
    edit(copied, layer_norm_eps=float("nan"))
    with pytest.raises(errors.WeightsError, match=r"config\.json: cannot be read"):
        load(copied)


def test_a_folder_that_holds_an_adapter_is_refused(copied: Path) -> None:
    (copied / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    with pytest.raises(errors.WeightsError, match=r"holds an adapter .*loaded in place of the weights"):
        load(copied)


def test_an_adapter_is_not_put_on_the_same_weights_with_other_settings(copied: Path, tmp_path: Path) -> None:
    from fedvfm.inference import export

    values = {
        "backbone": {"name": str(copied)},
        "adapter": {"kind": "head-only"},
        "data": {"class_names": ["background", "cell"], "input_size": [28, 28]},
    }
    model = adapted_model.AdaptedModel(schema.parse(schema.Recipe, values, "recipe"))
    folder = export.save(model, tmp_path / "adapter", {})
    assert export.load_adapter(folder).backbone.config_sha256 == model.backbone.config_sha256
    edit(copied, layer_norm_eps=0.5)
    with pytest.raises(errors.WeightsError, match=r"config\.json has other settings .* was trained with"):
        export.load_adapter(folder)
    about = json.loads((folder / export.ABOUT).read_text())
    del about["backbone_config_sha256"]  # an adapter of an earlier release says nothing of settings
    (folder / export.ABOUT).write_text(json.dumps(about))
    assert export.load_adapter(folder).backbone.sha256 == model.backbone.sha256


# -- pins --------------------------------------------------------------------------------------------------------------


def test_the_embedded_backbone_is_pinned(tiny_dino: Path) -> None:
    # Other bytes under its name are refused without any pin in the recipe.
    shutil.copytree(tiny_dino, weights.own_folder(weights.EMBEDDED))
    with pytest.raises(errors.WeightsError, match=r"this release pins 8b38fc0f3652d5a3.*fedvfm weights fetch"):
        weights.locate(settings(weights.EMBEDDED))


def test_the_pinned_settings_are_checked_too(embedded: Path) -> None:
    assert weights.locate(settings(weights.EMBEDDED)).folder == embedded
    edit(embedded, layer_norm_eps=0.5)
    with pytest.raises(errors.WeightsError, match=r"config\.json has other settings than this release pins"):
        weights.locate(settings(weights.EMBEDDED))


@pytest.mark.parametrize("damage", ["weights", "settings", "cut settings", "no weights"])
def test_fetch_replaces_a_damaged_cache(
    embedded: Path, tiny_dino: Path, run: Any, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    file = embedded / ("model.safetensors" if "weights" in damage else "config.json")
    data = file.read_bytes()
    fetched = []

    def fetch(source: Path | None = None) -> Path:
        fetched.append(source)
        return Path(shutil.copytree(tiny_dino, embedded, dirs_exist_ok=True))

    monkeypatch.setattr(imgfocus, "fetch", fetch)
    assert run("fetch", weights.EMBEDDED)[0] == 0
    assert fetched == []
    if damage == "no weights":
        file.unlink()
    elif damage == "settings":
        edit(embedded, num_attention_heads=4)
    else:
        file.write_bytes(data[: len(data) // 2])
    code, out, _ = run("verify", weights.EMBEDDED)
    assert (code, out.startswith(f"{weights.EMBEDDED}: damaged")) == (WEIGHTS, True)
    code, out, _ = run("fetch", weights.EMBEDDED, "--json")
    assert (code, json.loads(out)["sha256"]) == (0, weights.KNOWN[weights.EMBEDDED].sha256)
    assert fetched == [None]
    assert file.read_bytes() == data


def test_a_file_of_our_own_making_is_the_library_s(tmp_path: Path) -> None:
    # The pin of the embedded weights rests on it: same arrays, same bytes.
    rng = np.random.default_rng(0)
    arrays = {f"layer.{index}.é": rng.random((index + 1, 3), np.float32) for index in range(12)}
    rows = [safefile.Row(name, "F32", value.shape, memoryview(value.data).cast("B")) for name, value in arrays.items()]
    safefile.write(tmp_path / "own.safetensors", list(reversed(rows)))
    assert (tmp_path / "own.safetensors").read_bytes() == safetensors.numpy.save(arrays, metadata={"format": "pt"})
    assert safefile.names(tmp_path / "own.safetensors") == sorted(arrays)


@pytest.mark.parametrize("pin", [{"sha256": "0" * 64}, {"revision": "main"}])
def test_nothing_is_pinned_where_there_are_no_weights(pin: dict[str, str]) -> None:
    values = {
        "backbone": {"name": "unet", **pin},
        "adapter": {"kind": "full"},
        "data": {"class_names": ["background", "cell"], "input_size": [32, 32]},
    }
    (fault,) = adapted_model.examine(schema.parse(schema.Recipe, values, "recipe"))[1]
    assert "trained from scratch, there are no weights to pin" in fault


# -- revisions ---------------------------------------------------------------------------------------------------------


def test_a_revision_where_there_are_none(tiny_dino: Path, run: Any) -> None:
    for name, why in (
        (tiny_dino, "a local folder has no revisions"),
        (weights.EMBEDDED, "a package of a fixed version"),
    ):
        with pytest.raises(errors.ConfigError, match=rf"revision = 'main': .*{why}.*pin sha256"):
            weights.locate(settings(name, revision="main"))
        values = {
            "backbone": {"name": str(name), "revision": "main"},
            "data": {"class_names": ["background", "cell"], "input_size": [28, 28]},
        }
        (fault,) = adapted_model.examine(schema.parse(schema.Recipe, values, "recipe"))[1]
        assert fault.startswith("recipe.backbone: revision = 'main'")
    code, _, said = run("fetch", weights.EMBEDDED, "--revision", "main")
    assert (code, "fixed version" in said) == (CONFIG, True)


def test_from_where_it_has_no_meaning(run: Any, tmp_path: Path) -> None:
    code, _, said = run("fetch", "dinov2-small", "--from", tmp_path)
    assert code == CONFIG
    assert "--from is for dinov2-small-imgfocus" in said
    assert "fedvfm weights import FILE" in said
    for verb in ("fetch", "verify"):
        code, _, said = run(verb, "unet")
        assert (code, "is trained from scratch" in said) == (CONFIG, True)
    assert run("fetch", "")[0] == CONFIG


# -- shards ------------------------------------------------------------------------------------------------------------


def shard(folder: Path) -> None:
    """Two files and an index in place of one."""
    arrays = safetensors.torch.load_file(folder / "model.safetensors")
    names = sorted(arrays)
    parts = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, own in parts.items():
        safetensors.torch.save_file({name: arrays[name] for name in own}, folder / file, {"format": "pt"})
    where = {name: file for file, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "model.safetensors").unlink()


def test_sharded_weights_load_and_have_one_hash(tiny_dino: Path, copied: Path) -> None:
    import torch

    shard(copied)
    backbone, whole = load(copied), load(tiny_dino)
    pixels = torch.rand(1, 3, 28, 28)
    torch.testing.assert_close(backbone.features(pixels, (4,)).grids[0], whole.features(pixels, (4,)).grids[0])
    files = sorted(path.name for path in copied.iterdir() if path.name != "config.json")
    lines = "".join(f"{hashlib.sha256((copied / name).read_bytes()).hexdigest()}  {name}\n" for name in files)
    assert backbone.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert load(copied, sha256=backbone.sha256).sha256 == backbone.sha256


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({"a": "model-00003-of-00002.safetensors"}, r"1 of 1 shards are missing \(first: model-00003"),
        ({"a": "../secret.safetensors"}, r"shards are missing \(first: \.\./secret"),
        ({}, "it names no shard"),
        (["a"], "it names no shard"),
    ],
)
def test_a_wrong_index_of_shards(copied: Path, weight_map: Any, match: str) -> None:
    shard(copied)
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(errors.WeightsError, match=match):
        load(copied)


# -- Hugging Face's cache, records, list and verify --------------------------------------------------------------------


def test_fetch_from_the_cache_of_hugging_face_keeps_a_record(tiny_dino: Path, tmp_path: Path, run: Any) -> None:
    snapshot = hub(tmp_path, tiny_dino)
    code, out, _ = run("fetch", "someone/tiny", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["folder"] == str(snapshot)
    kept = record.read(weights.own_folder("someone/tiny"))
    assert kept is not None
    assert (kept.origin, kept.sha256, kept.source) == ("hub", found["sha256"], f"revision {'a' * 40}")
    assert (weights.own_folder("someone/tiny") / record.FILE).stat().st_mode & 0o777 == 0o600
    (row,) = json.loads(run("list", "--json")[1])
    assert row == {
        "name": "someone/tiny",
        "origin": "hub",
        "folder": str(snapshot),
        "bytes": (tiny_dino / "model.safetensors").stat().st_size,
        "sha256": found["sha256"],
        "kind": "dinov2",
        "licence": "not stated",
    }
    assert "someone/tiny" in run("list")[1]
    assert json.loads(run("verify", "--json")[1])[0]["state"] == "good"


def test_damage_in_the_cache_of_hugging_face(tiny_dino: Path, tmp_path: Path, run: Any) -> None:
    file = hub(tmp_path, tiny_dino) / "model.safetensors"
    load("someone/tiny")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.resolve().write_bytes(data)
    with pytest.raises(errors.WeightsError, match=r"sha256 is .*, downloaded were .*Fetch it again"):
        load("someone/tiny")
    # It would be downloaded again, were there a network.
    code, _, said = run("fetch", "someone/tiny")
    assert (code, "is damaged in Hugging Face's cache and cannot be downloaded again" in said) == (WEIGHTS, True)


def test_list_knows_what_others_downloaded(tiny_dino: Path, tmp_path: Path) -> None:
    hub(tmp_path, tiny_dino, "facebook/dinov2-small")
    (row,) = stored.rows()
    assert (row.name, row.origin, row.sha256) == ("dinov2-small", "hub", "")


def test_verify_says_what_there_is_to_say(tiny_dino: Path, tmp_path: Path, run: Any) -> None:
    assert run("verify")[0] == WEIGHTS
    code, out, _ = run("verify", tiny_dino)
    assert (code, f"{tiny_dino}: unrecorded: sha256 " in out) == (0, True)
    code, _, said = run("verify", "someone/else")
    assert (code, "'someone/else' is not on this machine" in said) == (WEIGHTS, True)
    hub(tmp_path, tiny_dino)
    run("fetch", "someone/tiny")
    kept = weights.own_folder("someone/tiny") / record.FILE
    kept.write_text("{")
    code, out, said = run("verify")
    assert (code, "fedvfm-weights.json: cannot be read" in out) == (WEIGHTS, True)
    assert "1 of 1 damaged: someone/tiny" in said
    assert run("list")[0] == 0


def test_nothing_is_good_that_was_compared_with_nothing(tiny_dino: Path, tmp_path: Path, run: Any) -> None:
    snapshot = hub(tmp_path, tiny_dino)
    run("fetch", "someone/tiny")
    repository = snapshot.parent.parent
    # A newer revision, whose weights no name of a blob vouches for: the record is of the older one.
    newer = Path(shutil.copytree(snapshot, repository / "snapshots" / ("b" * 40)))
    (repository / "refs" / "main").write_text("b" * 40)
    assert run("verify", "someone/tiny")[1].startswith("someone/tiny: unrecorded: ")
    (repository / "blobs" / ("c" * 40)).write_bytes((newer / "model.safetensors").read_bytes())
    (newer / "model.safetensors").unlink()
    (newer / "model.safetensors").symlink_to(repository / "blobs" / ("c" * 40))
    assert run("verify", "someone/tiny")[1].startswith("someone/tiny: unrecorded: ")
    run("fetch", "someone/tiny")
    assert run("verify", "someone/tiny")[1].startswith("someone/tiny: good: ")


@pytest.mark.parametrize("lost", ["model-00002-of-00002.safetensors", "config.json"])
def test_a_download_that_was_cut_off_is_gone_on_with(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    import huggingface_hub

    shard(copied)
    snapshot, asked = hub(tmp_path, copied), []
    (snapshot / lost).unlink()
    local = huggingface_hub.snapshot_download

    def download(name: str, *, local_files_only: bool, **more: Any) -> str:
        asked.append(local_files_only)
        if not local_files_only:
            shutil.copy(copied / lost, snapshot / lost)
        return str(local(name, local_files_only=True, **more))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert stored.fetch(settings("someone/tiny")).folder == snapshot
    assert asked[-1] is False


@pytest.mark.parametrize("online", [True, False])
def test_a_tokenizer_that_an_earlier_download_left_out_is_fetched(
    tower_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, online: bool
) -> None:
    import huggingface_hub

    snapshot = hub(tmp_path, tower_folders["clip"])
    (snapshot / "tokenizer.json").unlink()
    local = huggingface_hub.snapshot_download

    def download(name: str, *, local_files_only: bool, allow_patterns: list[str], **more: Any) -> str:
        if not local_files_only:
            assert "tokenizer.json" in allow_patterns
            if not online:
                raise OSError("no network")
            shutil.copy(tower_folders["clip"] / "tokenizer.json", snapshot)
        return str(local(name, local_files_only=True, allow_patterns=allow_patterns))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert stored.fetch(settings("someone/tiny")).folder == snapshot
    assert (snapshot / "tokenizer.json").is_file() == online


def test_what_a_strangers_adapter_names_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever hands an adapter over may name any repository; loading it must open no connection."""
    import huggingface_hub

    asked: list[bool] = []

    def download(*_: Any, local_files_only: bool, **__: Any) -> str:
        asked.append(local_files_only)
        raise OSError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    stranger = schema.BackboneConfig(name="stranger/backbone")
    with pytest.raises(
        errors.WeightsError, match=r"nothing is fetched here\. Run: fedvfm weights fetch stranger/backbone"
    ):
        weights.require_here(stranger)
    assert asked == [True]
    weights.require_here(schema.BackboneConfig(name="unet"))
