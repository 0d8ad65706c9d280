"""Words: logits equal transformers' own, learned context, what is refused, and what travels."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fedvfm import errors
from fedvfm.client import recipe_review
from fedvfm.client.gate import enforcement
from fedvfm.config import schema
from fedvfm.model import adapted_model, locking
from fedvfm.privacy import gradients
from tests.client import two_numbers
from tests.support import two_towers

NAMES = ("lymphocyte", "monocyte", "round nucleus")
KINDS = ("clip", "siglip")


@pytest.fixture(scope="session")
def saved(tower_folders: dict[str, Path]) -> dict[str, tuple[Path, Any]]:
    """Folder and stock model."""
    stock: Any = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}
    return {kind: (folder, stock[kind].from_pretrained(folder).eval()) for kind, folder in tower_folders.items()}


def recipe(folder: Path, words: dict[str, Any] | None, **more: Any) -> schema.Recipe:
    values: dict[str, Any] = {
        "backbone": {"name": str(folder)},
        "task": {"kind": "classification"},
        "adapter": {"kind": "lora", "rank": 2},
        "data": {"class_names": list(NAMES), "input_size": [32, 32], **two_towers.NORM},
        "precision": "float32",
        "words": words,
    }
    return schema.parse(schema.Recipe, values | more, "recipe")


LEARN = {"mode": "prompt-learning", "templates": ["{}"], "context": 4}
HEAD_ONLY = {"adapter": {"kind": "head-only"}}


def model(folder: Path, words: dict[str, Any], **more: Any) -> adapted_model.AdaptedModel:
    made = adapted_model.AdaptedModel(recipe(folder, words, **more))
    made.write(made.initial())
    return made.eval()


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def expected(folder: Path, stock: Any, sentences: list[str], pixels: torch.Tensor) -> torch.Tensor:
    ids = two_towers.ids(folder, stock.config.model_type, sentences)
    found: torch.Tensor = stock(input_ids=ids, pixel_values=pixels).logits_per_image
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_zero_shot_logits_are_those_of_transformers(saved: Any, kind: str) -> None:
    folder, stock = saved[kind]
    own = model(folder, {"templates": ["a photo of a {}"]})
    assert not [spec.name for spec in own.manifest if spec.group == "head"]
    sentences = [f"a photo of a {name}" for name in NAMES]
    with torch.no_grad():
        torch.testing.assert_close(own(images()), expected(folder, stock, sentences, images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_context_that_learned_nothing_is_the_words_it_begins_as(saved: Any, kind: str) -> None:
    folder, stock = saved[kind]
    own = words_of_four(folder, kind)
    assert bool((own.initial()["head.context"] == 0).all())
    sentences = [f"a photo of a {name}" for name in NAMES]
    with torch.no_grad():
        torch.testing.assert_close(own(images()), expected(folder, stock, sentences, images()), rtol=1e-5, atol=1e-5)


def words_of_four(folder: Path, kind: str, **more: Any) -> adapted_model.AdaptedModel:
    """Prompt-learning from "a photo of a", with as many vectors as the error says that it has tokens."""
    words = {"mode": "prompt-learning", "templates": ["a photo of a {}"], "context": 1, **more}
    with pytest.raises(errors.WordsError, match=r"set context = \d+") as refused:
        model(folder, words, **HEAD_ONLY)
    return model(folder, words | {"context": int(str(refused.value).rsplit("context = ", 1)[1])}, **HEAD_ONLY)


# -- what learns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_context_alone_trains_and_travels(saved: Any, kind: str, per_class: bool) -> None:
    """No number of the towers is in the manifest, and the loss falls by the context alone."""
    own = model(saved[kind][0], LEARN | {"per_class": per_class}, **HEAD_ONLY)
    assert [(spec.name, spec.shape, spec.group) for spec in own.manifest] == [
        ("head.context", (3, 4, 32) if per_class else (4, 32), "head")
    ]
    assert (
        own.initial().fingerprint
        == model(saved[kind][0], LEARN | {"per_class": per_class}, **HEAD_ONLY).read().fingerprint
    )
    frozen = {name: value.clone() for name, value in own.named_parameters() if name != "head.context"}
    target = torch.tensor([0, 1, 2])
    optimiser = torch.optim.Adam([parameter for parameter in own.parameters() if parameter.requires_grad], lr=0.3)
    losses = []
    for _ in range(15):
        loss = own.task.loss(own(images()), target)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss.detach()))
    assert min(losses) < losses[0] - 1e-3
    assert all(torch.equal(value, frozen[name]) for name, value in own.named_parameters() if name in frozen)
    trained = own(images())
    with torch.no_grad():  # nothing kept of an embedding outlives a step
        torch.testing.assert_close(own(images()), trained, rtol=1e-5, atol=1e-5)


def test_kept_embeddings_follow_the_context(saved: Any) -> None:
    own = model(saved["clip"][0], LEARN, **HEAD_ONLY)
    with torch.no_grad():
        before = own(images())
        assert torch.equal(own(images()), before)
        own.head.context.data.add_(torch.linspace(-2, 2, 32))
        assert not torch.allclose(own(images()), before)
    own.write(own.initial())
    with torch.no_grad():
        assert torch.equal(own(images()), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ["head-only", "lora"])
def test_rows_of_gradients_are_those_of_single_images(saved: Any, kind: str, adapter: str) -> None:
    """The row of each image is the gradient of its own loss, whatever stands beside it, and so its clip bounds it."""
    own = model(saved[kind][0], LEARN, adapter={"kind": adapter})
    pixels, target = images(4), torch.tensor([0, 1, 2, 0])
    chosen = [parameter for parameter in own.parameters() if parameter.requires_grad]

    def losses(some: Sequence[int]) -> torch.Tensor:
        return own.task.losses(own(pixels[list(some)]), target[list(some)])

    rows = gradients.Loop(chosen).rows([[0], [1], [2, 3]], losses)
    for number, unit in enumerate([[0], [1], [2, 3]]):
        found = torch.autograd.grad(torch.stack([losses([at])[0] for at in unit]).mean(), chosen, allow_unused=True)
        alone = torch.cat(
            [
                torch.zeros_like(p).reshape(-1) if g is None else g.reshape(-1)
                for g, p in zip(found, chosen, strict=True)
            ]
        )
        torch.testing.assert_close(rows[number], alone, rtol=1e-4, atol=1e-6)
        assert float(alone.abs().max()) > 0


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("clip", {"templates": ["a photo"]}, {}, "must hold {} once"),
    ("clip", {"templates": ["a {} of {}"]}, {}, "must hold {} once"),
    ("clip", {"templates": ["a\nphoto of {}"]}, {}, "single spaces"),
    ("clip", {"templates": ["a {}", "a {}"]}, {}, "two are alike"),
    ("clip", {"names": ["cell"]}, {}, "1 given for 3"),
    ("clip", {"names": ["Cell", "cell", "blood"]}, {}, "the same words"),
    ("clip", {"context": 2}, {}, "reads neither context nor per_class"),
    ("clip", {"mode": "prompt-learning"}, {}, "needs a number of vectors"),
    ("clip", {"mode": "prompt-learning", "context": 2, "templates": ["a {}", "one {}"]}, {}, "takes one, 2 are given"),
    ("clip", {"mode": "prompt-learning", "context": 2, "templates": ["x-{}"]}, {}, "a space must stand before"),
    ("clip", {}, {"task": {"kind": "classification", "head": "linear"}}, "the words take its place"),
    ("clip", {}, {"task": {"kind": "segmentation"}}, "task 'segmentation' does not read it"),
    (
        "clip",
        {},
        {"inputs": {"numbers": ["age"], "units": ["years"], "ranges": [[0.0, 9.0]], "centres": [1.0], "scales": [1.0]}},
        "no place for recipe.inputs",
    ),
    ("clip", {}, {"target": {"kind": "ordinal"}}, "target 'ordinal'"),
    ("clip", {}, {"target": {"kind": "multi-label"}}, "not trained to give"),
    ("clip", {}, HEAD_ONLY, "nothing would train"),
    ("clip", {}, {"data": {"class_names": list(NAMES), "input_size": [32, 32]}}, "ImageNet's"),
]


@pytest.mark.parametrize(("kind", "words", "more", "said"), REFUSED)
def test_recipes_whose_words_do_not_fit_are_refused(
    saved: Any, kind: str, words: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    shapes, faults = adapted_model.examine(recipe(saved[kind][0], words, **more))
    assert shapes is None
    assert any(said in fault for fault in faults), faults


UNREAD: list[tuple[str, dict[str, Any], str]] = [
    ("clip", {"templates": ["a photo <|endoftext|> of {}"]}, "does not know"),
    ("clip", {"templates": ["a photo of " * 10 + "{}"]}, "the model takes 22"),
    ("clip", {"names": ["NK cell", "nk  cell".replace("  ", "\u00a0"), "blood"]}, "single spaces"),
    ("siglip", {"templates": ["A photo of {}"]}, "small letters"),
    ("siglip", {"names": ["x-ray", "blood", "cell"]}, "small letters"),
    ("siglip", {"names": ["\u00e9", "blood", "cell"]}, "does not know"),
    ("siglip", {"pad": 10**6}, "pad = 1000000: the model knows"),
]


@pytest.mark.parametrize(("kind", "words", "said"), UNREAD)
def test_sentences_that_would_be_read_as_others_are_refused(
    saved: Any, kind: str, words: dict[str, Any], said: str
) -> None:
    with pytest.raises(errors.ConfigError) as refused:
        locking.make(recipe(saved[kind][0], words))
    assert said in str(refused.value)


def test_a_model_without_sentences_says_so(tmp_path: Path) -> None:
    _, faults = adapted_model.examine(recipe(Path("dinov2-small"), {}))
    assert any("no text tower" in fault for fault in faults)


# -- the tokenizer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_locking_pins_the_tokenizer_and_a_site_with_another_stops(saved: Any, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(saved[kind][0], folder)
    locked = locking.make(recipe(folder, {}))
    assert locked.recipe.words is not None
    file = folder / "tokenizer.json"
    assert locked.recipe.words.tokenizer_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (locked.recipe.words.pad is None) == (kind == "clip")
    adapted_model.AdaptedModel(locked.recipe)
    file.write_text(file.read_text() + "\n")
    with pytest.raises(errors.TokenizerError, match="the recipe pins"):
        adapted_model.AdaptedModel(locked.recipe)
    file.write_text("{")
    with pytest.raises(errors.TokenizerError, match="cannot be read"):
        adapted_model.AdaptedModel(locked.recipe)
    file.unlink()
    with pytest.raises(errors.TokenizerError, match="is not there") as refused:
        adapted_model.AdaptedModel(locked.recipe)
    assert refused.value.code == "tokenizer"


def test_a_site_takes_no_sentences_without_a_pinned_tokenizer(saved: Any, tmp_path: Path) -> None:
    """Else each site would read them by the tokenizer that it happens to have."""
    joined = two_numbers.join(tmp_path)
    terms = enforcement.HospitalTerms(joined.site, lambda: joined.rules)
    locked = locking.make(recipe(saved["clip"][0], {})).recipe
    assert terms.lock(locked).recipe.hash == locked.hash
    assert locked.words is not None
    loose = locked.model_copy(update={"words": locked.words.model_copy(update={"tokenizer_sha256": None})})
    with pytest.raises(errors.PolicyRefused, match="leaves values open"):
        terms.lock(loose)


def test_without_weights_the_shapes_are_known_and_nothing_is_locked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a name of the table; sentences that nobody has read are in no locked recipe."""
    import huggingface_hub.constants

    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    data = {"class_names": list(NAMES), "input_size": [224, 224], **two_towers.NORM}
    chosen = recipe(Path("clip-vit-base"), LEARN, **HEAD_ONLY, data=data)
    shapes, wrong = adapted_model.examine(chosen)
    assert not wrong
    assert shapes is not None
    assert [spec.shape for spec in shapes.manifest] == [(4, 512)]
    pinned = {"backbone": {"name": "clip-vit-base", "sha256": "0" * 64}, "data": data}
    with pytest.raises(errors.WeightsError):
        locking.make(recipe(Path(""), LEARN, **HEAD_ONLY, **pinned))


def test_the_tokenizer_of_another_model_is_refused(saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved["clip"][0], tmp_path / "own")
    shutil.copy(saved["siglip"][0] / "tokenizer.json", tmp_path / "own")
    with pytest.raises(errors.TokenizerError, match="a begin and an end token"):
        locking.make(recipe(tmp_path / "own", {}))


def test_siglip_fills_up_with_what_its_tokenizer_says(saved: Any, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(saved["siglip"][0], folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "<unk>"}}))
    locked = locking.make(recipe(folder, {}))
    assert locked.recipe.words is not None
    assert locked.recipe.words.pad == 0
    (folder / "tokenizer_config.json").unlink()  # what was locked holds everywhere
    with torch.no_grad():
        pinned = adapted_model.AdaptedModel(locked.recipe).eval()(images())
        assert not torch.allclose(pinned, model(folder, {})(images()))


# -- what stays as it was ----------------------------------------------------------------------------------------------


def test_a_recipe_without_words_has_the_bytes_it_had(saved: Any) -> None:
    plain = recipe(saved["clip"][0], None)
    assert "words" not in plain.model_dump(mode="json")
    assert recipe(saved["clip"][0], {}).hash != plain.hash


def test_a_reviewer_reads_the_sentences(saved: Any) -> None:
    words = {"templates": ["a photo of {}", "a cell of {}"], "names": ["a lymphocyte", "a monocyte", "no cell"]}
    said = dict(recipe_review.words(locking.make(recipe(saved["clip"][0], words))))["sentences"]
    assert "'a photo of a lymphocyte'; 'a photo of a monocyte'; 'a photo of no cell'" in said
    assert "'a cell of {}'" in said
    learned = locking.make(recipe(saved["clip"][0], LEARN, **HEAD_ONLY))
    said = dict(recipe_review.words(learned))["sentences"]
    assert "4 learned vectors, the same for all classes, stand before the class" in said
