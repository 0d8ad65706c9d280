"""A small SAM-shaped model (not SAM), pretrained outside the federation, and what of it must travel.

    python benchmarks/sam_shaped.py pretrain [--steps 1200] [--device cpu]
    python benchmarks/sam_shaped.py ablate [--model litemedsam] [--arms default deep] [--seeds 0] [--output runs/MODEL]

``pretrain`` makes a model of SAM's architecture at 256 px: its encoder is the first half of DINOv2-small, laid over
into SAM's form and kept; neck, prompt encoder and mask decoder learn to segment the object that a box or points show,
on the images of ``drawn_shapes.py``. It goes into the weights cache as ``sam-shaped``. ``ablate`` runs the bundled
experiment ``sam-nuclei`` as each of :data:`ARMS` differs from it, and writes the table of simulations/README.md and
``simulations/results/sam_shaped.json``; with ``--model litemedsam`` on that real SAM (``fedvfm weights fetch
litemedsam``), a table and a file of its own. Both go on where they were stopped; arms whose runs are no longer there
keep their rows. ``--quick`` tries everything once,
tiny, and writes neither.

What it shows is about these models. SAM itself knows far more; FLAP-SAM reports for it Dice 36.9 with LoRA alone, 60.5
with LoRA and the decoder's output layers (Fed-KiTS).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import block
import drawn_shapes
import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fedvfm import errors, seeding
from fedvfm.backbones import base, convert, sam, stock, stored, vit, weights
from fedvfm.config import rates, schema
from fedvfm.data import prompts, transforms
from fedvfm.simulation.results import compare

ROOT = Path(__file__).parents[1]
NAME, EXPERIMENT = "sam-shaped", "sam-nuclei"
SEED, IMAGES, OBJECTS, KEEP_EVERY, HELD_OUT = 0, 600, 6, 50, 32
MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMISER = schema.OptimiserConfig(learning_rate=1e-3, weight_decay=0.05, schedule="cosine")
ASKED = (
    schema.TaskConfig(prompt="box"),
    schema.TaskConfig(prompt="points", prompt_points=1),
    schema.TaskConfig(prompt="points", prompt_points=3),
)
THEIRS = {
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
    "attn.proj": "attention.o_proj",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.lin1": "mlp.fc1",
    "mlp.lin2": "mlp.fc2",
}
"""Where DINOv2 has what SAM's block calls so."""

SCALED = {"attn.proj": "layer_scale1", "mlp.lin2": "layer_scale2"}

DEEP = ('recipe.task.head="unet-deep"', "recipe.optimiser.head_learning_rate=3e-3")
ARMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "default": ("LoRA on q, v + upscale + hypernetworks + mask tokens (the default)", ()),
    "lora-only": ("LoRA on q, v alone", ("recipe.adapter.parts=[]",)),
    "parts-only": ("upscale + hypernetworks + mask tokens alone", ('recipe.adapter.kind="head-only"',)),
    "decoder": ("the whole decoder alone", ('recipe.adapter.kind="head-only"', 'recipe.adapter.parts=["decoder"]')),
    "deep": ("head unet-deep on the frozen encoder, no decoder", ('recipe.adapter.kind="head-only"', *DEEP)),
    "deep-lora": ("LoRA on q, v + head unet-deep, no decoder", DEEP),
}
LITEMEDSAM = (
    'recipe.backbone.name="litemedsam"',
    "recipe.data.input_size=[112, 112]",
    "recipe.data.mean=[0, 0, 0]",
    "recipe.data.std=[1, 1, 1]",
)
"""What makes the experiment one of LiteMedSAM, whose embedding of 112 pixels is finer than the other's of 256."""
MODELS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "sam-shaped": ("SAM-shaped, not SAM", ()),
    "litemedsam": ("LiteMedSAM, crops of 112 pixels", LITEMEDSAM),
}
TINY = ("recipe.rounds=1", "partition.train=2", "partition.val=1", "partition.test=1")


# -- pretraining -------------------------------------------------------------------------------------------------------


class Learner:
    """The model in training, with what is needed to go on after a stop.

    Args:
        steps: of the whole training.
        batch: images a step, each with :data:`OBJECTS` prompted objects.
        device: where to compute.
        dino: the DINOv2 whose first blocks become the encoder.
        brains: whether slices of ICBM152 are among the images.
    """

    def __init__(self, steps: int, batch: int, device: str, dino: nn.Module, *, brains: bool = True) -> None:
        self.steps, self.batch, self.device, self.done = steps, batch, device, 0
        torch.manual_seed(seeding.torch_seed(SEED, "initial"))
        kind, settings = sam.shape(weights.KNOWN[NAME].config)
        self.stock: Any = stock.transformers_class(kind)(settings)
        self.stock.apply(_fresh)
        _places_meet(self.stock)
        lay_over(dino, self.stock.vision_encoder)
        self.stock.to(device)
        self.model = sam.SegmentAnything(NAME, self.stock, "")
        self.model.open_masks(self.model.stock_mask_tokens, SEED)
        self.named = {name: value for name, value in self.stock.named_parameters() if _learns(name)}
        for value in self.named.values():
            value.requires_grad_(True)
        rate, decay = OPTIMISER.learning_rate, OPTIMISER.weight_decay
        self.optimiser = torch.optim.AdamW(self.named.values(), lr=rate, weight_decay=decay)
        self.images = drawn_shapes.Drawn(SEED, brains=brains)
        self.seen: dict[int, tuple[Tensor, np.ndarray]] = {}

    def step(self) -> float:
        """One step; its loss."""
        first = self.done * self.batch
        hidden, labels = self.read([number % IMAGES for number in range(first, first + self.batch)])
        rng = seeding.stream(SEED, "asked", self.done)
        logits = self.answers(hidden, labels, [ASKED[int(rng.integers(len(ASKED)))] for _ in range(OBJECTS)], rng)
        loss = torch.stack([_loss(masks, truth, task) for masks, truth, task in logits]).mean()
        for group in self.optimiser.param_groups:
            group["lr"] = OPTIMISER.learning_rate * rates.factor(OPTIMISER, self.done / self.steps)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        self.optimiser.step()
        self.done += 1
        return float(loss.detach())

    def read(self, numbers: Sequence[int]) -> tuple[Tensor, np.ndarray]:
        """What the frozen encoder makes of images (B, h, w, D), kept as float16, and object numbers (B, H, W)."""
        for number in numbers:
            if number not in self.seen:
                image, labels = self.images.image(number)
                contract = schema.DataContract(class_names=("rest", "object"))
                pixels = torch.from_numpy(transforms.normalise(image[None], contract)).to(self.device)
                with torch.no_grad():
                    self.seen[number] = self.model.prefix(pixels, self.model.depth, ()).hidden.half(), labels
        found = [self.seen[number] for number in numbers]
        return torch.cat([hidden for hidden, _ in found]).float(), np.stack([labels for _, labels in found])

    def answers(
        self, hidden: Tensor, labels: np.ndarray, asked: Sequence[schema.TaskConfig], rng: np.random.Generator
    ) -> Iterator[tuple[Tensor, Tensor, schema.TaskConfig]]:
        """Low-resolution masks of every token, the truth, how it was shown; the neck runs once for all objects."""
        embedding, size = self.model.neck(hidden), labels.shape[-2:]
        for task in asked:
            truth = np.stack([_one_object(row, rng) for row in labels])
            drawn = [prompts.draw(row, 2, task, rng) for row in truth]
            masks = self.model.decode(embedding, {}, _told(drawn, self.device), size)
            wanted = torch.from_numpy(truth).to(self.device).float()
            yield masks, wanted, task

    @torch.no_grad()
    def iou(self, task: schema.TaskConfig, number: int = HELD_OUT) -> float:
        """Mean IoU of the first mask on images that were not trained on."""
        found = []
        for index in range(number):
            hidden, labels = self.read([-1 - index])
            masks, truth, _ = next(self.answers(hidden, labels, [task], seeding.stream(SEED, "held out", index)))
            ours, theirs = base.resize(masks, truth.shape[-2:])[:, 0] > 0, truth > 0
            found.append(float((ours & theirs).sum() / (ours | theirs).sum().clamp(min=1)))
        return mean(found)

    def save(self, path: Path) -> None:
        """Weights and the optimiser's moments, without pickle."""
        rows = {name: value.detach() for name, value in self.named.items()}
        for name, value in self.named.items():
            kept = self.optimiser.state.get(value, {})  # the head that predicts IoU is never trained
            rows |= {f"{key}:{name}": kept[key] for key in MOMENTS if key in kept}
        part = path.with_suffix(".part")
        safetensors.torch.save_file(
            {name: value.contiguous().cpu() for name, value in rows.items()},
            part,
            {"done": str(self.done), "steps": str(self.steps), "batch": str(self.batch)},
        )
        part.replace(path)

    def load(self, path: Path) -> None:
        """Go on where ``save`` was; the images are keyed by their number, so nothing else is needed.

        Raises:
            CheckpointError: if it was another training.
        """
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata()
            if (about["steps"], about["batch"]) != (str(self.steps), str(self.batch)):
                raise errors.CheckpointError(f"{path} is of {about['steps']} steps of {about['batch']}; remove it")
            for name, value in self.named.items():
                value.data.copy_(file.get_tensor(name))
                if f"{MOMENTS[0]}:{name}" in file.keys():  # noqa: SIM118 (it is no mapping)
                    moments = {key: file.get_tensor(f"{key}:{name}").to(value) for key in MOMENTS}
                    self.optimiser.state[value] = {"step": torch.tensor(float(about["done"])), **moments}
        self.done = int(about["done"])


def _learns(name: str) -> bool:
    return not name.startswith("vision_encoder.") or name.startswith("vision_encoder.neck.")


def _fresh(module: nn.Module) -> None:
    """PyTorch's own initial values, as SAM's authors have them; those of transformers are made to be loaded over."""
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()


@torch.no_grad()
def _places_meet(model: Any) -> None:
    """A head start for minutes of training: a prompt and what is seen at its place attend to each other.

    Position frequencies as SAM's authors draw them (transformers' scale makes neighbours strangers); the decoder's
    attention between tokens and image begins with the same projection on both sides.
    """
    model.shared_image_embedding.positional_embedding.normal_()
    decoder = model.mask_decoder.transformer
    for layer in (*decoder.layers, decoder):
        for name in ("cross_attn_token_to_image", "cross_attn_image_to_token", "final_attn_token_to_image"):
            if hasattr(layer, name):
                attention = getattr(layer, name)
                attention.q_proj.weight.mul_(2.0)
                attention.k_proj.load_state_dict(attention.q_proj.state_dict())


@torch.no_grad()
def lay_over(dino: Any, encoder: Any) -> None:
    """The first blocks of a DINOv2 as those of a SAM encoder of the same width.

    Patch kernels and positions are resampled, LayerScale is folded into the layer before it, the class token is left
    out, relative positions stay zero.
    """
    patch, kernel = dino.embeddings.patch_embeddings.projection, encoder.patch_embed.projection
    ratio = (patch.kernel_size[0] / kernel.kernel_size[0]) ** 2
    kernel.weight.copy_(ratio * _resampled(patch.weight, kernel.kernel_size))
    kernel.bias.copy_(patch.bias)
    side = encoder.pos_embed.shape[1]
    places = dino.embeddings.position_embeddings[0, 1:]
    grid = places.reshape(round(len(places) ** 0.5), -1, places.shape[-1]).permute(2, 0, 1)[None]
    encoder.pos_embed.copy_(_resampled(grid, (side, side)).permute(0, 2, 3, 1))
    for theirs, ours in zip(dino.encoder.layer, encoder.layers, strict=False):
        for name in ("weight", "bias"):
            source = {key: getattr(theirs.get_submodule(path), name) for key, path in THEIRS.items()}
            parts = [source.pop(key) for key in ("q", "k", "v")]
            getattr(ours.attn.qkv, name).copy_(torch.cat(parts))
            for key, value in source.items():
                scale = theirs.get_submodule(SCALED[key]).lambda1 if key in SCALED else torch.ones(())
                folded = scale[:, None] * value if value.ndim == 2 and key in SCALED else scale * value
                getattr(ours.get_submodule(key), name).copy_(folded)


def _resampled(values: Tensor, size: Sequence[int]) -> Tensor:
    return nn.functional.interpolate(values, tuple(size), mode="bicubic", antialias=True)


def _one_object(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mask of one object of the image, drawn; of the whole foreground where all are too small."""
    known = drawn_shapes.objects(labels)
    chosen = known[int(rng.integers(len(known)))] if known else 0
    return np.asarray(labels == chosen if chosen else labels > 0).astype(np.int64)


def _told(drawn: Sequence[prompts.Simulated], device: str) -> base.Prompts:
    points, boxes = (
        torch.from_numpy(np.stack([getattr(one, name)[0] for one in drawn])).to(device)
        if getattr(drawn[0], name) is not None
        else None
        for name in ("points", "boxes")
    )
    return base.Prompts(points, None, boxes)


def _loss(masks: Tensor, truth: Tensor, task: schema.TaskConfig) -> Tensor:
    """Of the first mask; after one point, which may mean several objects, also of the best of the other three."""
    truth = nn.functional.adaptive_avg_pool2d(truth[:, None], masks.shape[-2:])[:, 0]
    each = torch.stack([_mask_loss(masks[:, index], truth) for index in range(masks.shape[1])], dim=1)
    ambiguous = task.prompt == "points" and task.prompt_points == 1
    return each[:, 0].mean() + (each[:, 1:].min(dim=1).values.mean() if ambiguous else 0.0)


def _mask_loss(mask: Tensor, truth: Tensor) -> Tensor:
    """Cross entropy + soft Dice, one number an image."""
    entropy = nn.functional.binary_cross_entropy_with_logits(mask, truth, reduction="none").mean(dim=(1, 2))
    chance = mask.sigmoid()
    both, sizes = (chance * truth).sum(dim=(1, 2)), chance.sum(dim=(1, 2)) + truth.sum(dim=(1, 2))
    return entropy + 1 - (2 * both + 1) / (sizes + 1)


def pretrain(steps: int, batch: int, device: str, work: Path, *, quick: bool) -> dict[str, Any]:
    """Train or go on, put the model into the weights cache, and say how well it segments what it is shown."""
    started, cpu = time.monotonic(), time.process_time()
    torch.set_num_threads(1)
    dino = vit.load(schema.BackboneConfig(name=weights.EMBEDDED)).model
    learner = Learner(steps, batch, device, dino, brains=not quick)
    work.mkdir(parents=True, exist_ok=True)
    state, losses = work / "pretraining.safetensors", []
    if state.exists():
        learner.load(state)
    while learner.done < steps:
        losses.append(learner.step())
        if learner.done % KEEP_EVERY == 0 or learner.done == steps:
            learner.save(state)
            cost = (time.process_time() - cpu) / len(losses)
            print(f"step {learner.done}/{steps}: loss {mean(losses[-KEEP_EVERY:]):.3f}, {cost:.2f} CPU s a step")
    number = 2 if quick else HELD_OUT
    found = {"box": learner.iou(ASKED[0], number), "one point": learner.iou(ASKED[1], number)}
    made: dict[str, Any] = {"steps": steps, "batch": batch, "iou": found, "seconds": time.monotonic() - started}
    if not quick:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            with stock.quiet():
                learner.stock.save_pretrained(folder)
            made["sha256"] = convert.bring(Path(folder), NAME, replace=True).sha256
        print(*(f"{row.name}: {row.state}, {row.detail}" for row in stored.verify(NAME)))
    (work / "pretraining.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(made))
    return made


# -- ablation ----------------------------------------------------------------------------------------------------------


def ablate(arms: Sequence[str], seeds: Sequence[int], output: Path, sets: Sequence[str], *, baselines: bool) -> None:
    """Run or resume these arms of every seed; the first seed of the default arm has the experiment's baselines."""
    for arm in arms:
        for seed in seeds:
            folder = output / arm / f"seed-{seed}"
            chosen = [f"recipe.seed={seed}", *ARMS[arm][1], *sets]
            if not (baselines and arm == "default" and seed == seeds[0]):
                chosen.append("baselines=[]")
            fresh = [EXPERIMENT, "--output", str(folder), *(word for one in chosen for word in ("--set", one))]
            if (folder / "summary.json").exists():
                continue
            arguments = ["--resume", str(folder)] if (folder / "experiment.json").exists() else fresh
            subprocess.run([sys.executable, "-m", "fedvfm.cli", "simulate", *arguments], check=True)


def collect(output: Path, results: Path | None = None) -> dict[str, Any]:
    """The figures of all finished arms; those of arms that are not there stay as they are in ``results``."""
    kept = json.loads(results.read_text()) if results and results.exists() else {}
    done = [arm for arm in ARMS if any((output / arm).glob("seed-*/summary.json"))]
    folders = {arm: [output / name for name in dict.fromkeys(("default", arm)) if name in done] for arm in done}
    rows = {arm: compare.table(compare.load(pair))["runs"][-1] for arm, pair in folders.items()}
    runs = {arm: json.loads(sorted((output / arm).glob("seed-*/summary.json"))[0].read_text()) for arm in done}
    pretraining = output / "pretraining.json"
    figures: dict[str, Any] = {"pretraining": kept.get("pretraining")}
    if pretraining.exists():
        figures["pretraining"] = json.loads(pretraining.read_text())
    for key, own in (("arms", rows), ("runs", runs)):
        merged = {**kept.get(key, {}), **own}
        figures[key] = {arm: merged[arm] for arm in ARMS if arm in merged}
    return figures


def lines(figures: Mapping[str, Any], title: str) -> Iterator[str]:
    """The table as Markdown."""
    rows, runs, pretraining = figures["arms"], figures["runs"], figures["pretraining"]
    first = rows["default"]
    about = f"{runs['default']['rounds']} rounds, seeds {', '.join(map(str, first['seeds']))}, no prompts"
    yield f"{title}: `{EXPERIMENT}`, {about}. Macro Dice over the sites' test images, 95 % bootstrap"
    yield "intervals, differences paired. MB: serialised messages of the federation, both ways, whole run."
    yield ""
    yield "| what trains | numbers | share | MB | macro Dice | 95 % interval | minus the default | worst site |"
    yield "|---|---|---|---|---|---|---|---|"
    for arm, row in rows.items():
        made, score, gap = runs[arm], row["arms"]["federated"], row["difference"]
        numbers, moved = made["trainable_parameters"], (made["bytes"]["up"] + made["bytes"]["down"]) / 1e6
        shown = f"{gap['mean']:+.3f} ({block.interval(gap, '+.3f')})" if gap and arm != "default" else ""
        worst = made["arms"]["federated"]["worst"]
        yield (
            f"| {ARMS[arm][0]} | {numbers:,} | {numbers / made['backbone']['parameters']:.2%} | {moved:.1f} | "
            f"{score['macro']:.3f} | {block.interval(score, '.3f')} | {shown} | "
            f"{worst['site']} {worst['value']:.3f} |"
        )
    yield ""
    others = {name: row for name, row in first["arms"].items() if name != "federated"}
    if others:
        yield "Beside the default: " + ", ".join(f"{name} {row['macro']:.3f}" for name, row in others.items()) + "."
        yield ""
    yield _verdict(rows)
    if pretraining:
        iou = ", ".join(f"{value:.2f} after {kind}" for kind, value in pretraining["iou"].items())
        yield ""
        yield (
            f"Pretraining: {pretraining['steps']} steps of {pretraining['batch']} images, {OBJECTS} objects each; IoU "
            f"of a held-out drawn object {iou}."
        )


def _verdict(rows: Mapping[str, Any]) -> str:
    """LoRA alone against the default, as it came out."""
    gap = rows["lora-only"]["difference"] if "lora-only" in rows else None
    if gap is None:
        return "LoRA alone was not run."
    if gap["high"] is None:
        return f"LoRA alone minus the default: {gap['mean']:+.3f}, of too few cases for an interval."
    if gap["high"] < 0:
        return f"LoRA alone falls {-gap['mean']:.3f} short of the default here, as is reported for SAM."
    return (
        f"LoRA alone does not fall short of the default on this model ({gap['mean']:+.3f}); for SAM it is reported to."
    )


def named(model: str) -> tuple[str, Path]:
    """A model's block in ``simulations/README.md`` and its file: ``simulations/results/sam_shaped.json`` or its own."""
    name = model if model == NAME else f"{NAME}-{model}"
    return name, ROOT / "simulations" / "results" / f"{name.replace('-', '_')}.json"


def write(model: str, figures: Mapping[str, Any], text: str) -> None:
    """See :func:`named`."""
    name, results = named(model)
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    block.write(ROOT / "simulations" / "README.md", name, text)


def main(words: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pretrain", "ablate", "report"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--model", choices=tuple(MODELS), default=NAME, help="of ablate and report")
    parser.add_argument("--output", type=Path, help="runs/MODEL if left out")
    parser.add_argument("--set", action="append", default=[], help="a setting of the experiment, as in fedvfm simulate")
    parser.add_argument(
        "--quick", action="store_true", help="try everything once, tiny; write neither page nor results"
    )
    asked = parser.parse_args(words)
    output = asked.output or Path("runs") / asked.model
    if asked.what == "pretrain":
        steps, batch = (2, 2) if asked.quick else (asked.steps, asked.batch)
        pretrain(steps, batch, asked.device, output, quick=asked.quick)
        return
    title, own = MODELS[asked.model]
    if asked.what == "ablate":
        sets = [*own, *asked.set, *(TINY if asked.quick else ())]
        ablate(asked.arms, asked.seeds, output, sets, baselines=not asked.quick and asked.model == NAME)
    figures = collect(output, None if asked.quick else named(asked.model)[1])
    text = "\n".join(lines(figures, title))
    print(text)
    if not asked.quick:
        write(asked.model, figures, text)


if __name__ == "__main__":
    main()
