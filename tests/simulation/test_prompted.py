"""Prompts from the truth, from recipe to report: what the model is told, and that every score says so."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console

import fedvfm
from fedvfm import errors
from fedvfm.backbones import base, promptable
from fedvfm.backbones import table as backbones
from fedvfm.cli import main
from fedvfm.client.training import evaluator, trainer
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data import sample as samples
from fedvfm.inference import forms
from fedvfm.inference import predict as predicting
from fedvfm.model import adapted_model, feature_cache, feature_counts
from fedvfm.simulation import experiment, run
from fedvfm.simulation.engines import live
from fedvfm.simulation.results import compare, summary

MARK = "oracle prompt"
NAMES = ("background", "box", "bar", "dot")
FAMILIES = ("sam", "sam_hq", "sam2", "sam3")


class Drawn:
    """Three samples of 64 x 64 pixels: with classes 1 and 2, with class 2 alone, and a wide one with class 1 twice."""

    name = "here"

    def __init__(self) -> None:
        self.train = tuple(samples.Sample(f"image-{n}") for n in range(3))
        self.val: tuple[samples.Sample, ...] = ()
        self.test = self.train

    def read(self, sample: samples.Sample) -> samples.Pixels:
        rng, number = np.random.default_rng(int(sample.id[-1])), int(sample.id[-1])
        mask = np.zeros((64, 192 if number == 2 else 64), dtype=np.int64)
        mask[8:20, 10:40] = 0 if number == 1 else 1
        mask[40:50, 5:60] = 0 if number == 2 else 2
        if number == 2:
            mask[30:60, 150:180] = 1
        image = np.clip(0.3 * mask + 0.1 * rng.random(mask.shape), 0, 1).astype(np.float32)
        return samples.Pixels(image[None], mask)


def recipe(folder: Path | str, prompt: str = "box", *, size: int = 64, **more: Any) -> schema.Recipe:
    values = {
        "rounds": 1,
        "threads": 1,
        "backbone": {"name": str(folder)},
        "adapter": {"rank": 2, **more.pop("adapter", {})},
        "task": {"prompt": prompt, **more.pop("task", {})},
        "data": {"class_names": list(NAMES), "input_size": [size, size], **more.pop("data", {})},
        "optimiser": {"learning_rate": 1e-2, "batch_size": 3},
        **more,
    }
    return schema.parse(schema.Recipe, values, "recipe")


def site(limit: int = 1 << 24) -> sites.Site:
    return sites.Site("here", Drawn(), cache=feature_cache.FeatureCache(limit))


def told(model: adapted_model.AdaptedModel, place: sites.Site, number: int) -> sites.Example:
    return place.example(model, place.hospital.train[number], 0)


# -- what the model is told --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sam", "sam2", "sam3"])
@torch.no_grad()
def test_a_class_is_the_stock_models_mask_for_its_box(sam_folders: dict[str, Path], family: str) -> None:
    """Round 0: class k is what the stock model gives for the box of class k, the background is its threshold 0."""
    side = 56 if family == "sam3" else 64
    model = adapted_model.AdaptedModel(recipe(sam_folders[family], size=side)).eval()
    model.write(model.initial())
    pixels, prefix, prompts, *_ = sites.collate([told(model, site(), 0)], model)
    assert prompts is not None
    assert [bool(one.present) for one in prompts] == [True, True, False]
    logits = model(pixels, prefix, prompts)
    assert logits.shape == (1, 4, side, side)
    assert not logits[:, 0].any()
    torch.testing.assert_close(logits[:, 3], torch.full_like(logits[:, 3], promptable.ABSENT))
    kinds = {"sam": "SamModel", "sam2": "Sam2Model", "sam3": "Sam3TrackerModel"}
    stock = getattr(transformers, kinds[family]).from_pretrained(sam_folders[family]).eval()
    if family != "sam":
        stock.mask_decoder.dynamic_multimask_via_stability = False
    for index, several in ((0, False), (1, True)):
        boxes = prompts[index].boxes
        assert boxes is not None
        expected = stock(pixels, input_boxes=boxes[:, None], multimask_output=several).pred_masks[:, 0, :1]
        torch.testing.assert_close(
            logits[:, index + 1 : index + 2], base.resize(expected, (side, side)), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", ["box", "points"])
def test_a_training_step_moves_the_adapter_by_what_the_prompts_say(
    sam_folders: dict[str, Path], family: str, prompt: str
) -> None:
    side = 56 if family == "sam3" else 64
    contract = {"fit": "native"} if family == "sam" else {}
    model, place = adapted_model.AdaptedModel(recipe(sam_folders[family], prompt, size=side, data=contract)), site()
    before = model.initial()
    after = trainer.train(model, place, before, 1).state
    moved = {name: float(np.abs(after[name] - before[name]).max()) for name in after}
    for name in ("block.00.q.B", "decoder.upscale_conv1.weight", "decoder.mask_tokens.weight"):
        assert moved[name] > 0
    first, second, third, last = (moved[f"decoder.output_hypernetworks_mlps.{k}.proj_in.weight"] for k in range(4))
    # Class 3 is nowhere, and a fourth foreground class there is none: weight decay alone moves what is left.
    assert 20 * max(third, last) < min(first, second)


@torch.no_grad()
def test_another_box_gives_other_logits_and_the_same_one_the_same(sam_folders: dict[str, Path]) -> None:
    model, place = adapted_model.AdaptedModel(recipe(sam_folders["sam"])).eval(), site()
    model.write(model.initial())
    batch = sites.collate([told(model, place, 0), told(model, place, 1)], model)
    again = sites.collate([told(model, site(), 0), told(model, site(), 1)], model)
    torch.testing.assert_close(model(*batch), model(*again), rtol=0, atol=0)
    pixels, prefix, prompts, _, _ = batch
    assert prompts is not None
    assert torch.stack([one.present for one in prompts if one.present is not None]).tolist() == [
        [True, False],
        [True, True],
        [False, False],
    ]
    moved = tuple(base.Prompts(boxes=one.boxes + 5, present=one.present) for one in prompts if one.boxes is not None)
    assert not torch.allclose(model(pixels, prefix, moved), model(*batch), atol=1e-3)


def test_five_classes_need_no_new_token(sam_folders: dict[str, Path]) -> None:
    names = ["background", "a", "b", "c", "d"]
    prompted = adapted_model.AdaptedModel(recipe(sam_folders["sam"], data={"class_names": names}))
    plain = adapted_model.AdaptedModel(recipe(sam_folders["sam"], "none", data={"class_names": names}))
    assert (prompted.backbone.mask_tokens, plain.backbone.mask_tokens) == (4, 5)


@torch.no_grad()
def test_in_bfloat16_a_box_keeps_its_place(sam_folders: dict[str, Path]) -> None:
    chosen = schema.BackboneConfig(name=str(sam_folders["sam"]))
    backbone: Any = backbones.loader(chosen)(chosen)
    boxes = base.Prompts(boxes=torch.tensor([[700.0, 650.0, 1001.0, 999.0]]))
    exact = backbone._sparse(boxes, (1024, 1024))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(backbone._sparse(boxes, (1024, 1024)), exact, rtol=0, atol=0)


# -- windows and the memory --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_windows_are_told_of_what_they_show(sam_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, place = adapted_model.AdaptedModel(recipe(sam_folders["sam"], data={"fit": "native"})).eval(), site()
    model.write(model.initial())
    seen: dict[tuple[int, int], Any] = {}
    tile = sites.Site.tile

    def watched(self: sites.Site, *words: Any) -> sites.Example:
        made = tile(self, *words)
        seen[words[3]] = made.prompts
        return made

    monkeypatch.setattr(sites.Site, "tile", watched)
    wide = place.hospital.test[2]
    prepared = place.whole(model, wide)
    logits = evaluator.logits(model, place, wide, prepared)
    assert logits.shape == (4, 64, 192)
    assert prepared.mask is not None
    assert len(seen) >= 3
    for (top, left), drawn in seen.items():
        shown = prepared.mask[top : top + 64, left : left + 64]
        assert drawn.present.tolist() == [bool((shown == number).any()) for number in (1, 2, 3)]
        assert (drawn.boxes[0] <= 63).all()
    present = [bool(drawn.present[0]) for drawn in seen.values()]
    assert set(present) == {True, False}
    predicted = logits.argmax(dim=0)
    assert not (predicted >= 2).any(), "classes without a prompt are background"


@torch.no_grad()
def test_prompts_leave_the_frozen_prefix_as_it_is(sam_folders: dict[str, Path]) -> None:
    """They enter the decoder alone: with what was kept of the frozen blocks the logits are the same."""
    kept, fresh = site(), site(0)
    for prompt in ("box", "points"):
        model = adapted_model.AdaptedModel(
            recipe(sam_folders["sam"], prompt, adapter={"layers": [3]}, data={"views": 2})
        ).eval()
        assert model.frozen_blocks == 3
        model.write(model.initial())
        with_memory, without = told(model, kept, 0), told(model, fresh, 0)
        assert with_memory.prefix is not None
        assert without.prefix is None
        ours, theirs = (model(*sites.collate([one], model)) for one in (with_memory, without))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert kept.cache.counts == feature_counts.Counts(computed=1, memory=1), "one for both kinds of prompt"


# -- faults ------------------------------------------------------------------------------------------------------------


def test_faults(sam_folders: dict[str, Path], tiny_dino: Path) -> None:
    sam, dino = sam_folders["sam"], {"input_size": [56, 56]}
    cases = [
        (recipe(tiny_dino, data=dino), "takes no prompts; use a SAM such as sam-vit-base, or leave prompt out"),
        (recipe(sam, task={"head": "patch"}), "head 'patch' takes no prompts; use 'sam-masks'"),
        (recipe(sam, task={"kind": "classification"}), "task 'classification' takes no prompts"),
        (recipe(sam, "points", task={"prompt_jitter": 0.2}), "prompt_jitter = 0.2: only prompt = 'box' reads it"),
        (recipe(sam, "none", task={"prompt_points": 3}), "prompt_points = 3: only prompt = 'points' reads it"),
    ]
    for chosen, said in cases:
        (found,) = adapted_model.examine(chosen)[1]
        assert said in found
    assert (
        adapted_model.examine(recipe(sam))[1]
        == adapted_model.examine(recipe(sam, "points", task={"prompt_points": 4}))[1]
        == []
    )


def test_a_model_is_never_asked_without_its_prompts(sam_folders: dict[str, Path]) -> None:
    model = adapted_model.AdaptedModel(recipe(sam_folders["sam"]))
    with pytest.raises(ValueError, match="'box', but none were given"):
        model(torch.zeros(1, 3, 64, 64))
    plain = adapted_model.AdaptedModel(recipe(sam_folders["sam"], "none"))
    with pytest.raises(ValueError, match="'none', but some were given"):
        plain(torch.zeros(1, 3, 64, 64), None, ())


# -- every score says so -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def values(tiny: Any, sam_folders: dict[str, Path]) -> dict[str, Any]:
    """The tiny experiment with a box for its class."""
    own = {**tiny.values["recipe"], "backbone": {"name": str(sam_folders["sam"])}, "adapter": {"rank": 2}, "rounds": 1}
    own["data"] = {**own["data"], "input_size": [64, 64]}
    own["task"] = {"prompt": "box", "prompt_jitter": 0.2}
    return {**tiny.values, "name": "prompted", "baselines": ["local-only", "unet", "classical"], "recipe": own}


@pytest.fixture(scope="module")
def prompted(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> run.Result:
    """A finished run of it."""
    return run.simulate(values, output=tmp_path_factory.mktemp("runs") / "prompted")


def test_the_summary_marks_the_arms_that_were_told(prompted: run.Result) -> None:
    made = json.loads((prompted.path / "summary.json").read_text())
    assert made["prompt"] == MARK
    assert {name: arm.get("prompt") for name, arm in made["arms"].items()} == {
        "federated": MARK,
        "personal": MARK,
        "local-only": MARK,
        "unet": None,
        "classical": None,
    }
    assert f"federated ({MARK})" in summary.as_html(made)
    assert "<td>unet</td>" in summary.as_html(made)


def test_records_and_tables_are_marked_line_by_line(prompted: run.Result) -> None:
    path = prompted.path
    for arm, mark in ((path, MARK), (path / "arms" / "local-only" / "east", MARK), (path / "arms" / "unet", None)):
        lines = [json.loads(line) for line in (arm / "journal.jsonl").read_text().splitlines()]
        assert [line.get("prompt") for line in lines] == [mark]
        assert json.loads((arm / "evaluation.json").read_text()).get("prompt") == mark
    for file in ("metrics.csv", "samples.csv"):
        with (path / file).open(newline="") as opened:
            rows = list(csv.DictReader(opened))
        marks = {row["arm"].partition("/")[0]: row["prompt"] for row in rows}
        assert marks == {"federated": MARK, "personal": MARK, "local-only": MARK, "unet": "none", "classical": "none"}


def test_the_report_is_marked_before_any_number(prompted: run.Result) -> None:
    page = (prompted.path / "report.html").read_text()
    note = page.index("the model is told one box for each class")
    assert note < page.index("Federated, macro Dice")
    for said in (
        f"Federated, macro Dice ({MARK})",
        f"Worst site ({MARK})",
        f"Local-only ({MARK})",
        f"federated ({MARK})",
        f"local-only, at home ({MARK})",
        f"local-only, abroad ({MARK})",
        f"after the last round ({MARK})",
        f"Trained here, tested there: Dice ({MARK})",
        f"Validation Dice ({MARK})",
    ):
        assert said in page, said
    assert "unet (" not in page
    captions = re.findall(r"Dice [01]\.\d{3}(.*?)</figcaption>", page)
    assert captions
    assert set(captions) == {f" ({MARK})"}


def test_the_model_card_is_marked(prompted: run.Result) -> None:
    card = (prompted.path / "adapter" / "README.md").read_text()
    assert f"| federated ({MARK}) |" in card
    assert "| unet |" in card
    assert "each side moved by up to 0.2 of the box's width or height" in card
    assert "class k, from 1 to 1, is mask token k - 1 under its own prompt" in card


def test_terminal_and_comparison_are_marked(
    prompted: run.Result, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {**values, "baselines": [], "recipe": {**values["recipe"], "task": {}}}
    other = run.simulate(plain, output=tmp_path / "plain")
    assert other.summary["prompt"] is None
    assert "prompt" not in other.summary["arms"]["federated"]
    assert "prompt" not in (tmp_path / "plain" / "metrics.csv").read_text().splitlines()[0]
    assert MARK not in (tmp_path / "plain" / "report.html").read_text()
    found = compare.compare([prompted.path, other.path])
    first, second = found["runs"]
    marks = {arm: row["prompt"] for arm, row in first["arms"].items()}
    assert marks == {
        "federated": MARK,
        "personal": MARK,
        "local-only": MARK,
        "local-only abroad": MARK,
        "unet": None,
        "classical": None,
    }
    assert second["arms"]["federated"]["prompt"] is None
    console = Console(width=200, record=True)
    compare.show(found, console)
    text = console.export_text()
    row = next(line for line in text.splitlines() if "federated " in line)
    assert row.count(MARK) == 1
    capsys.readouterr()
    main._show([prompted], False, many=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "prompt)" in said


def test_what_a_person_sees_while_it_runs_is_marked() -> None:
    record = {"train": {"a": {"loss": 1.0}}, "validation": {"a": {"dice": 0.5}}, "prompt": MARK}
    assert live._scores(record) == f"loss 1.000, val dice 0.500 ({MARK})"


def test_the_plan_says_it_too(values: dict[str, Any]) -> None:
    what = experiment.parse(values, "experiment")
    assert any(MARK in note for note in run.notes(what, experiment.hospitals(what)))


# -- what an adapter with prompts is for -------------------------------------------------------------------------------


def test_prediction_and_graphs_are_refused_with_the_remedy(prompted: run.Result, tiny: Any, tmp_path: Path) -> None:
    adapter = prompted.path / "adapter"
    with pytest.raises(errors.ConfigError, match=r"(?s)predict: .*trained with prompts.*Train with prompt = 'none'"):
        predicting.predict(adapter, tiny.data / "images", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for form in ("onnx", "monai"):
        if form == "onnx" and importlib.util.find_spec("onnxscript") is None:
            continue
        with pytest.raises(errors.ConfigError, match=rf"(?s)--format {form}: .*export --format hf"):
            forms.export_adapter(adapter, tmp_path / form, form)
        assert not (tmp_path / form).exists()


@torch.no_grad()
def test_the_merged_model_answers_a_box_as_the_adapter_does(prompted: run.Result, tmp_path: Path) -> None:
    made = forms.export_adapter(prompted.path / "adapter", tmp_path / "hf", "hf")
    assert made["difference"] < 1e-4
    stock = transformers.SamModel.from_pretrained(tmp_path / "hf").eval()
    model = fedvfm.load_adapter(prompted.path / "adapter")
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[10.0, 12.0, 50.0, 40.0]])
    ours = model(pixels, None, (base.Prompts(boxes=boxes),))[:, 1:]
    theirs = stock(pixels, input_boxes=boxes[:, None], multimask_output=False).pred_masks[:, 0]
    torch.testing.assert_close(ours, base.resize(theirs, (64, 64)), rtol=1e-4, atol=1e-4)
    assert "multimask_output=False" in (tmp_path / "hf" / "README.md").read_text()
