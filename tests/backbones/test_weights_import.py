"""Weights from files: what is converted loads and gives the stock model's numbers, what could harm is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from fedvfm import errors
from fedvfm.backbones import convert, identity, pickled, record, sam_original, table, weights
from fedvfm.cli import main
from fedvfm.config import schema

CONFIG, WEIGHTS, IN_USE, STORAGE = 2, 4, 6, 7


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    import huggingface_hub.constants

    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache" / "weights"


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


def load(name: str, *, with_weights: bool = True, **more: Any) -> Any:
    chosen = schema.BackboneConfig(name=name, **more)
    return table.loader(chosen)(chosen, with_weights=with_weights)


def same(left: Any, right: Any) -> bool:
    theirs = dict(right.model.named_parameters())
    return all(torch.equal(value, theirs[name]) for name, value in left.model.named_parameters())


def arrays_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def save(path: Path, values: Any) -> Path:
    torch.save(values, path)
    return path


def refused(path: Path, match: str, **more: Any) -> None:
    before = sorted(weights.cache().rglob("*"))
    with pytest.raises(errors.WeightsError, match=match) as caught:
        convert.bring(path, more.pop("name", "tiny"), **more)
    assert "\n" not in str(caught.value)
    assert [path for path in weights.cache().rglob("*") if path.is_file()] == [
        path for path in before if path.is_file()
    ]


# -- what is taken -----------------------------------------------------------------------------------------------------


def test_a_folder_is_taken_as_it_is(tiny_dino: Path, cache: Path, run: Any) -> None:
    code, out, _ = run("import", tiny_dino, "--name", "hospital/tiny", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["sha256"] == identity.sha256_of(tiny_dino / "model.safetensors")
    assert Path(found["folder"]) == cache / "hospital--tiny"
    assert {path.name for path in cache.iterdir()} == {"hospital--tiny"}
    assert {path.stat().st_mode & 0o777 for path in (cache / "hospital--tiny").iterdir()} == {0o600}
    assert same(load("hospital/tiny", sha256=found["sha256"]), load(str(tiny_dino)))
    kept = record.read(cache / "hospital--tiny")
    assert kept is not None
    assert kept.files == {
        "config.json": identity.sha256_of(tiny_dino / "config.json"),
        "model.safetensors": found["sha256"],
    }
    assert kept.source == f"{tiny_dino.name}, sha256 {found['sha256']}"
    assert json.loads(run("list", "--json")[1])[0]["origin"] == "imported"
    assert run("verify", "hospital/tiny")[1].startswith("hospital/tiny: good: sha256 ")


def test_a_word_of_your_own_is_a_name_for_recipes(tiny_dino: Path) -> None:
    from fedvfm.simulation import experiment

    assert "unknown backbone" in experiment.name_faults({"recipe": {"backbone": {"name": "tiny"}}})[0]
    convert.bring(tiny_dino / "model.safetensors", "tiny", config=tiny_dino / "config.json")
    assert experiment.name_faults({"recipe": {"backbone": {"name": "tiny"}}}) == []
    assert same(load("tiny"), load(str(tiny_dino)))
    with pytest.raises(errors.ConfigError, match="were imported, and say no revision"):
        load("tiny", revision="main")


WRAPS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda arrays: arrays,
    "wrapped": lambda arrays: {"epoch": 3, "optimizer": {"lr": [0.1]}, "state_dict": arrays},
    "wrapped twice": lambda arrays: {"model": {"state_dict": arrays}, "args": {"depth": 4}},
    "parallel": lambda arrays: {"model": {f"module.{name}": value for name, value in arrays.items()}},
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_a_pickle_of_tensors_is_converted_once(tiny_dino: Path, tmp_path: Path, wrap: str, suffix: str) -> None:
    path = save(tmp_path / f"tiny{suffix}", WRAPS[wrap](arrays_of(tiny_dino)))
    located = convert.bring(path, "tiny", config=tiny_dino / "config.json")
    path.unlink()
    assert same(load("tiny"), load(str(tiny_dino)))
    # The bytes depend on the numbers alone: every site that converts the same tensors can pin the same sha256.
    assert located.sha256 == identity.sha256_of(tiny_dino / "model.safetensors")


def test_old_pickles_folders_of_pickles_and_half_precision(tiny_dino: Path, tmp_path: Path) -> None:
    arrays = {name: value.to(torch.bfloat16) for name, value in arrays_of(tiny_dino).items()}
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(tiny_dino / "config.json", folder)
    torch.save(arrays, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    torch.save({}, folder / "training_args.bin")
    located = convert.bring(folder, "half")
    assert {value.dtype for value in arrays_of(located.folder).values()} == {torch.bfloat16}
    assert all(torch.equal(value, arrays[name]) for name, value in arrays_of(located.folder).items())


def test_rows_of_all_types_read_back(tmp_path: Path) -> None:
    from fedvfm.backbones import safefile

    given = {str(dtype): torch.ones(2, 3).to(dtype) for dtype in pickled.DTYPES}
    given |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "turned": torch.arange(6.0).reshape(2, 3).T}
    safefile.write(tmp_path / "all.safetensors", [pickled.row(name, value) for name, value in given.items()])
    back = safetensors.torch.load_file(tmp_path / "all.safetensors")
    assert set(back) == set(given)
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in given.items())


def test_each_shard_is_held_to_its_own_size(tmp_path: Path) -> None:
    """The last shard is often a small one; all of them together are no more than their files."""
    large, small = tmp_path / "large.safetensors", tmp_path / "small.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1000, 100)}, large)
    safetensors.torch.save_file({"b": torch.zeros(2)}, small)
    assert sorted(convert._read_safetensors([large, small])) == ["a", "b"]


def test_shards_are_taken_as_they_are(tiny_dino: Path, tmp_path: Path) -> None:
    model = transformers.Dinov2Model.from_pretrained(tiny_dino)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    located = convert.bring(tmp_path / "shards", "shards")
    assert located.sha256 == weights.locate(schema.BackboneConfig(name=str(tmp_path / "shards"))).sha256
    assert same(load("shards"), load(str(tiny_dino)))


# -- SAM in its authors' layout ----------------------------------------------------------------------------------------


def original_name(name: str) -> str | None:
    """A name of transformers' SAM as the authors' code has it, written down apart from what is tested."""
    if name == "shared_image_embedding.positional_embedding":
        return "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    if name == "prompt_encoder.shared_embedding.positional_embedding":
        return None
    first, _, rest = name.partition(".")
    if first == "vision_encoder":
        for new, old in (("conv1", "0"), ("layer_norm1", "1"), ("conv2", "2"), ("layer_norm2", "3")):
            rest = rest.replace(f"neck.{new}.", f"neck.{old}.")
        rest = rest.replace("patch_embed.projection", "patch_embed.proj").replace("layers.", "blocks.")
        return "image_encoder." + rest.replace("layer_norm", "norm")
    if first == "prompt_encoder":
        downs = {"conv1": 0, "layer_norm1": 1, "conv2": 3, "layer_norm2": 4, "conv3": 6}
        for new, number in downs.items():
            rest = rest.replace(f"mask_embed.{new}.", f"mask_downscaling.{number}.")
        return "prompt_encoder." + rest.replace("point_embed.", "point_embeddings.", 1 if rest[0] == "p" else 0)
    for new, number in {"upscale_conv1": 0, "upscale_layer_norm": 1, "upscale_conv2": 3}.items():
        rest = rest.replace(f"{new}.", f"output_upscaling.{number}.")
    if re.match(r"output_hypernetworks_mlps|iou_prediction_head", rest):
        rest = rest.replace("layers.0", "layers.1").replace("proj_in", "layers.0").replace("proj_out", "layers.2")
    return "mask_decoder." + rest.replace("layer_norm_final_attn", "norm_final_attn").replace("layer_norm", "norm")


@pytest.fixture(scope="module")
def sam() -> Any:
    """A small random SAM whose every setting differs from the defaults where shapes can tell."""
    shape = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "mlp_dim": 40, "image_size": 96}
    vision = {**shape, "global_attn_indexes": [1], "window_size": 4, "output_channels": 16, "num_pos_feats": 8}
    settings = transformers.SamConfig(
        vision_config=vision,
        prompt_encoder_config={
            "hidden_size": 16,
            "image_size": 96,
            "image_embedding_size": 6,
            "mask_input_channels": 8,
        },
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 24, "num_attention_heads": 8, "iou_head_hidden_dim": 12},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.SamModel(settings).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.shared_image_embedding.positional_embedding.data.normal_()
    return model


def originals(model: Any) -> dict[str, Tensor]:
    found = {original_name(name): value.clone() for name, value in model.state_dict().items()}
    constants = {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    return {name: value for name, value in found.items() if name is not None} | constants


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_sam_in_its_authors_layout_computes_the_same(sam: Any, tmp_path: Path, suffix: str) -> None:
    given = originals(sam)
    assert "image_encoder.blocks.0.attn.qkv.weight" in given
    assert "mask_decoder.transformer.norm_final_attn.weight" in given
    assert "mask_decoder.output_hypernetworks_mlps.3.layers.2.bias" in given
    assert "prompt_encoder.mask_downscaling.6.weight" in given
    path = tmp_path / f"sam{suffix}"
    torch.save(given, path) if suffix == ".pth" else safetensors.torch.save_file(given, path)
    located = convert.bring(path, "authors/sam")
    back, info = transformers.SamModel.from_pretrained(located.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    own = sam.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in back.state_dict().items())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        pixels, points = torch.rand(1, 3, 96, 96), torch.tensor([[[[30.0, 40.0], [60.0, 20.0]]]])
        marks = torch.rand(1, 1, 24, 24)
    labels = torch.tensor([[[1, 0]]])
    with torch.no_grad():
        for prompts in ({"input_points": points, "input_labels": labels}, {"input_masks": marks}):
            ours, stock = back.eval()(pixels, **prompts), sam(pixels, **prompts)
            torch.testing.assert_close(ours.pred_masks, stock.pred_masks)
            torch.testing.assert_close(ours.iou_scores, stock.iou_scores)
    assert load("authors/sam").parameters_total() == sum(p.numel() for p in sam.parameters())


def test_settings_of_the_published_sam_are_read_off_its_shapes() -> None:
    with torch.device("meta"):
        model = transformers.SamModel(transformers.SamConfig())
    shapes = {name: tuple(value.shape) for name, value in originals(model).items()}
    renamed = {sam_original.rename(name): shape for name, shape in shapes.items()}
    medsam: Any = load("medsam", with_weights=False).model
    assert {name: tuple(value.shape) for name, value in medsam.named_parameters() if name not in renamed} == {}
    assert all(renamed[name] == tuple(value.shape) for name, value in medsam.named_parameters())
    made = transformers.SamConfig(**sam_original.settings(shapes)).to_dict()
    stock = transformers.SamConfig().to_dict()
    remarks = ("architectures", "transformers_version")
    for part in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
        assert {k: v for k, v in made[part].items() if k not in remarks} == {
            k: v for k, v in stock[part].items() if k not in remarks
        }


def test_a_sam_that_is_not_whole_or_not_sam(sam: Any, tmp_path: Path) -> None:
    given = originals(sam)
    del given["mask_decoder.mask_tokens.weight"]
    refused(save(tmp_path / "half.pth", given), "no whole SAM: it lacks 'mask_decoder.mask_tokens.weight'")
    given = originals(sam) | {"mask_decoder.hf_token.weight": torch.zeros(1, 16)}
    refused(save(tmp_path / "hq.pth", given), "SAM-HQ in its authors' layout, which is not converted")
    refused(save(tmp_path / "sam.pth", originals(sam)), "is not of the shape of 'sam-vit-base'", name="sam-vit-base")


def test_numbers_of_a_training_script_are_left_behind(tiny_dino: Path, tmp_path: Path) -> None:
    """Losses as NumPy numbers lie beside the weights of published checkpoints; none of NumPy's code makes them."""
    file, arrays = tmp_path / "trained.pth.tar", arrays_of(tiny_dino)
    beside = {"lossMIN": [np.float64(0.5), np.float32(2.0)], "best": np.int64(3), "optimizer": {"state": {}}}
    for new in (True, False):
        torch.save({"state_dict": arrays, **beside}, file, _use_new_zipfile_serialization=new)
        tensors = pickled.read(file)
        assert tensors.keys() == arrays.keys()
        assert all(torch.equal(value, arrays[name]) for name, value in tensors.items())


# -- what is refused ---------------------------------------------------------------------------------------------------


class Payload:
    """What a hostile pickle runs."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".pt"])
def test_code_in_a_pickle_never_runs(tiny_dino: Path, tmp_path: Path, run: Any, suffix: str, new: bool) -> None:
    mark = tmp_path / "ran"
    path = tmp_path / f"hostile{suffix}"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "x": Payload(mark)}, path, _use_new_zipfile_serialization=new)
    code, _, said = run("import", path, "--name", "tiny", "--config", tiny_dino / "config.json")
    assert code == WEIGHTS
    assert "refused (UnpicklingError)" in said
    assert len(said.splitlines()) == 1
    assert not mark.exists()
    assert list(weights.cache().rglob("*.safetensors")) == []
    with path.open("rb") as file:  # the pickle does run where nothing guards it
        torch.load(file, weights_only=False)
    assert mark.exists()


def test_bare_pickles_modules_and_containers(tiny_dino: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Payload(mark)))
    config = tiny_dino / "config.json"
    refused(tmp_path / "bare.pth", r"refused \(", config=config)
    assert not mark.exists()
    refused(save(tmp_path / "module.pth", torch.nn.Linear(2, 2)), r"refused \(UnpicklingError", config=config)
    refused(save(tmp_path / "list.pth", [torch.zeros(1)]), "holds no tensors", config=config)
    refused(save(tmp_path / "none.pth", {}), "holds no tensors", config=config)
    refused(
        save(tmp_path / "mixed.pth", {"a": torch.zeros(1), "epoch": 3}), "'epoch' is no plain tensor", config=config
    )
    refused(save(tmp_path / "odd.pth", {"a": torch.zeros(1).to_sparse()}), "'a' is no plain tensor", config=config)
    number = {"a": torch.zeros(1), "b": np.float64(1.0)}
    refused(save(tmp_path / "number.pth", number), "'b' is no plain tensor", config=config)
    array = {"model": {"a": torch.zeros(1)}, "history": np.zeros(3)}
    refused(save(tmp_path / "array.pth", array), r"refused \(UnpicklingError", config=config)
    with tarfile.open(tmp_path / "real.pth.tar", "w") as archive:
        archive.add(tiny_dino / "config.json")
    refused(tmp_path / "real.pth.tar", r"refused \(", config=config)
    looped: dict[str, Any] = {}
    looped["model"] = looped
    refused(save(tmp_path / "looped.pth", looped), "'model' is no plain tensor", config=config)


def test_damaged_and_strange_files(tiny_dino: Path, tmp_path: Path) -> None:
    config, data = tiny_dino / "config.json", (tiny_dino / "model.safetensors").read_bytes()
    for stop in (0, 5, 200, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:stop])
        refused(tmp_path / "cut.safetensors", "no whole safetensors file", config=config)
    path = save(tmp_path / "cut.pth", arrays_of(tiny_dino))
    path.write_bytes(path.read_bytes()[:2000])
    refused(path, r"refused \(", config=config)
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    refused(tmp_path / "model.onnx", r"the suffix '\.onnx' is none of \.safetensors, \.bin, \.pth, \.pt")
    refused(tmp_path / "absent.pth", "no such file or folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "not one single file of weights .found: none")
    torch.save({}, empty / "a.bin")
    torch.save({}, empty / "b.bin")
    refused(empty, r"found: a\.bin, b\.bin")


def test_wrong_sha256_is_found_before_anything_is_read(tiny_dino: Path, tmp_path: Path, run: Any) -> None:
    path = tmp_path / "tiny.pth"
    torch.save(Payload(tmp_path / "ran"), path)
    code, _, said = run("import", path, "--name", "tiny", "--sha256", "0" * 64)
    assert (code, "expected 0000000000000000" in said) == (WEIGHTS, True)
    digest = identity.sha256_of(tiny_dino / "model.safetensors").upper()
    assert run("import", tiny_dino, "--name", "tiny", "--sha256", digest)[0] == 0


def test_settings_that_are_missing_or_do_not_fit(tiny_dino: Path, tmp_path: Path) -> None:
    file = tiny_dino / "model.safetensors"
    refused(file, r"comes without config\.json.*--config")
    refused(file, r"nowhere\.json: cannot be read", config=tmp_path / "nowhere.json")
    values = json.loads((tiny_dino / "config.json").read_text())
    for changes, match in (
        ({"model_type": "swinv2"}, "model type 'swinv2' is not supported"),
        ({"num_hidden_layers": 5}, r"does not load with its config\.json: .*lack"),
        ({"hidden_size": 64}, r"does not load with its config\.json: "),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
        refused(file, match, config=tmp_path / "config.json")


@pytest.mark.parametrize(
    "name", ["", "../x", "/etc/x", "a/b/c", "a--b", ".hidden", "unet", weights.EMBEDDED, "x" * 101]
)
def test_names_that_cannot_be_used(tiny_dino: Path, name: str) -> None:
    with pytest.raises(errors.ConfigError, match=re.escape(f"--name '{name}'")):
        convert.bring(tiny_dino, name)


def test_a_name_that_is_taken(tiny_dino: Path, tmp_path: Path, run: Any) -> None:
    assert run("import", tiny_dino, "--name", "tiny")[0] == 0
    assert run("import", tiny_dino, "--name", "tiny")[0] == 0
    arrays = {name: value + 1 for name, value in arrays_of(tiny_dino).items()}
    words = ("import", save(tmp_path / "other.pth", arrays), "--name", "tiny", "--config", tiny_dino / "config.json")
    code, _, said = run(*words)
    assert (code, "'tiny' is on this machine already, made from tiny-dino, sha256 " in said) == (IN_USE, True)
    before = load("tiny")
    assert run(*words, "--replace")[0] == 0
    assert not same(load("tiny"), before)
    assert {path.name for path in weights.own_folder("tiny").parent.iterdir()} == {"tiny"}


def test_damage_after_the_import_is_found(tiny_dino: Path, run: Any) -> None:
    located = convert.bring(tiny_dino, "tiny")
    file = located.folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(errors.WeightsError, match=r"imported were .*fedvfm weights import FILE --name tiny --replace"):
        load("tiny")
    code, out, said = run("verify")
    assert (code, "tiny: damaged: changed or missing: model.safetensors" in out) == (WEIGHTS, True)
    assert "1 of 1 damaged: tiny" in said
    code, _, said = run("fetch", "tiny")
    assert (code, "fedvfm weights import FILE --name tiny --replace" in said) == (WEIGHTS, True)
    assert run("import", tiny_dino, "--name", "tiny", "--replace")[0] == 0
    assert run("verify")[0] == 0
    values = json.loads((located.folder / "config.json").read_text())
    (located.folder / "config.json").write_text(json.dumps({**values, "layer_norm_eps": 0.5}))
    code, out, _ = run("verify", "tiny")
    assert (code, "changed or missing: config.json" in out) == (WEIGHTS, True)


# -- the disk ----------------------------------------------------------------------------------------------------------


def test_too_little_room_is_said_before_anything_is_written(
    tiny_dino: Path, run: Any, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, _, said = run("import", tiny_dino, "--name", "tiny")
    assert code == STORAGE
    assert "1,000 are free" in said
    assert "FEDVFM_CACHE" in said
    assert list(cache.iterdir()) == []


def test_a_disk_that_is_full(tiny_dino: Path, cache: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    command = [sys.executable, "-m", "fedvfm.cli", "weights", "import", str(tiny_dino), "--name", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == STORAGE
    (line,) = done.stderr.strip().splitlines()
    assert "cannot write weights" in line
    assert "set FEDVFM_CACHE to a folder on another disk" in line
    assert list(cache.iterdir()) == []


def test_what_a_killed_import_left_goes_with_the_next_old_enough(tiny_dino: Path, cache: Path) -> None:
    for name, age in (("old", 2 * convert.STALE_S), ("new", 0)):
        folder = cache / f".import.{name}.part"
        folder.mkdir(parents=True)
        os.utime(folder, (folder.stat().st_atime, folder.stat().st_mtime - age))
    convert.bring(tiny_dino, "tiny")
    assert {path.name for path in cache.iterdir()} == {".import.new.part", "tiny"}


# -- what lies about itself --------------------------------------------------------------------------------------------


def zipped(path: Path, to: Path, how: int) -> Path:
    """The same members, written again."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w", how) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    return to


def test_a_compressed_or_damaged_zip_is_not_taken_for_numbers(tiny_dino: Path, tmp_path: Path) -> None:
    # torch maps the members as they lie: compressed bytes, or bytes that rotted, would be weights.
    config, whole = tiny_dino / "config.json", save(tmp_path / "whole.pth", arrays_of(tiny_dino))
    refused(
        zipped(whole, tmp_path / "packed.pth", zipfile.ZIP_DEFLATED),
        "it is a compressed zip file, which torch does not write",
        config=config,
    )
    rotten = bytearray(whole.read_bytes())
    rotten[len(rotten) // 2] ^= 1
    (tmp_path / "rotten.pth").write_bytes(rotten)
    refused(tmp_path / "rotten.pth", "a check sum in it is wrong", config=config)
    convert.bring(zipped(whole, tmp_path / "again.pth", zipfile.ZIP_STORED), "tiny", config=config)
    assert same(load("tiny"), load(str(tiny_dino)))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (lambda: {"x": torch.zeros(1).expand(10**6, 10**6)}, "would take 4,000,000,000,000 bytes, the file has"),
        (lambda: {str(n): torch.zeros(1).expand(4096) for n in range(40)}, "refused: its tensors would take"),
        (lambda: {"a\ud800": torch.zeros(1)}, r"'a\\ud800' is no plain tensor"),
        (lambda: {"a\nb": torch.zeros(1)}, r"'a\\nb' is no plain tensor"),
        (lambda: {"x": torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)])}, "'x' is no plain tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_more_or_other_than_they_seem(
    tiny_dino: Path, tmp_path: Path, values: Callable[[], Any], match: str
) -> None:
    refused(save(tmp_path / "odd.pth", values()), match, config=tiny_dino / "config.json")


def test_an_original_sam_of_wrong_shapes_or_types(tmp_path: Path) -> None:
    flat = {"image_encoder.pos_embed": torch.zeros(1, 2, 2, 4), "image_encoder.patch_embed.proj.weight": torch.zeros(3)}
    given = {"image_encoder.blocks.0.attn.qkv.weight": torch.zeros(3), **flat}
    refused(save(tmp_path / "flat.pth", given), "arrays are not of the shapes that SAM's have")
    eight = {name: value.to(torch.float8_e4m3fn) for name, value in given.items()}
    safetensors.torch.save_file(eight, tmp_path / "eight.safetensors")
    refused(tmp_path / "eight.safetensors", "is no plain tensor")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_size": "32"}, "does not describe a model .StrictDataclassFieldValidationError"),
        ({"hidden_size": None}, "does not describe a model"),
        ({"num_attention_heads": 0}, r"cannot be read into Dinov2Model \(ZeroDivisionError\)"),
        ({"hidden_act": "os.system"}, r"cannot be read into Dinov2Model \(KeyError\)"),
        ({"num_hidden_layers": 0}, "does not describe a model"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "'quantization_config' asks for quantised weights"),
        ({"transformers_weights": "other.safetensors"}, "'transformers_weights' names another file of weights"),
        ({"vision_config": {"transformers_weights": "other.safetensors"}}, "'transformers_weights' names another"),
    ],
)
def test_wrong_settings_are_one_error(tiny_dino: Path, tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads((tiny_dino / "config.json").read_text()), **changes}))
    refused(tiny_dino / "model.safetensors", match, config=config)


def test_wrong_settings_of_a_sam_are_one_error(sam_folders: dict[str, Path], tmp_path: Path) -> None:
    values = json.loads((sam_folders["sam"] / "config.json").read_text())
    folder = Path(shutil.copytree(sam_folders["sam"], tmp_path / "sam"))
    for vision in ({"hidden_size": "32"}, {"num_attention_heads": 0}, 3):
        changed = {**values["vision_config"], **vision} if isinstance(vision, dict) else vision
        (folder / "config.json").write_text(json.dumps({**values, "vision_config": changed}))
        for with_weights in (True, False):
            with pytest.raises(errors.WeightsError, match=r"does not describe a model|cannot be read into SamModel"):
                load(str(folder), with_weights=with_weights)


def test_the_weights_that_are_hashed_are_those_that_are_read(tiny_dino: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_dino, tmp_path / "pinned"))
    others = {name: value + 1 for name, value in arrays_of(tiny_dino).items()}
    safetensors.torch.save_file(others, folder / "other.safetensors", {"format": "pt"})
    values = {**json.loads((folder / "config.json").read_text()), "transformers_weights": "other.safetensors"}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(errors.WeightsError, match="names another file of weights than the one that is hashed"):
        load(str(folder), sha256=identity.sha256_of(folder / "model.safetensors"))


def test_an_imported_name_is_not_a_folder_that_happens_to_lie_here(
    tiny_dino: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    located = convert.bring(tiny_dino, "tiny")
    monkeypatch.chdir(tmp_path)
    other = Path(shutil.copytree(tiny_dino, tmp_path / "tiny"))
    safetensors.torch.save_file(
        {name: value + 1 for name, value in arrays_of(tiny_dino).items()}, other / "model.safetensors", {"format": "pt"}
    )
    assert weights.locate(schema.BackboneConfig(name="tiny")) == located
    assert same(load("tiny"), load(str(tiny_dino)))
    assert not same(load("./tiny"), load(str(tiny_dino)))


def test_of_two_imports_at_once_the_second_sees_the_first(
    tiny_dino: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file(
        {name: value + 1 for name, value in arrays_of(tiny_dino).items()}, other, {"format": "pt"}
    )
    check = convert._check_loads

    def meanwhile(staging: Path, path: Path, name: str) -> None:
        check(staging, path, name)
        monkeypatch.setattr(convert, "_check_loads", check)
        convert.bring(tiny_dino, "tiny")

    monkeypatch.setattr(convert, "_check_loads", meanwhile)
    with pytest.raises(errors.OutputInUse, match="'tiny' is on this machine already"):
        convert.bring(other, "tiny", config=tiny_dino / "config.json")
    assert same(load("tiny"), load(str(tiny_dino)))
    assert [path.name for path in (weights.cache() / "weights").iterdir()] == ["tiny"]
