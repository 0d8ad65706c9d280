"""``site.toml``, ``server.toml``, ``recipe.toml``, an experiment as a person starts from them: a template, filled in.

A template is TOML that can be read as it stands. Filling it in changes the values of some lines and nothing else, and
what comes out is checked as if a person had written it.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.backbones import table as backbones
from fedvfm.backbones import weights
from fedvfm.config import schema
from fedvfm.config import target as target_config
from fedvfm.data import bags
from fedvfm.storage import storage

LINE = re.compile(r'^#?([A-Za-z0-9_]+|"[^"]+") = (.*)$')
"""A line with a key and its value; with ``#`` before it the key is left out."""
TABLE = re.compile(r"^#?\[([a-z_.]+)\]$")

_DATA_OF = {**bags.LABELS_OF, **bags.MASKS_OF}
HOSPITALS, PATIENTS = 4, 3
"""Virtual hospitals of an experiment that was told no number, and the fewest patients of each."""
EXPERIMENT_HEAD = """\
# An experiment: the images of one folder as several virtual hospitals, on this machine.
#   fedvfm simulate FILE --dry-run       sites, sizes, bytes, memory; opens one image of every site
#   fedvfm simulate FILE                 federated beside each hospital alone and all images pooled, with a report
#
# Each note reads:  key: type (unit); default, or required. Meaning.  A key with # before it has its default."""

_SEGMENTATION = {"optimiser.learning_rate": 1.5e-3, "optimiser.head_learning_rate": 6e-3, "optimiser.batch_size": 2}
_CLASSIFICATION = {"optimiser.learning_rate": 2e-3, "optimiser.head_learning_rate": 5e-3, "optimiser.batch_size": 8}
_OF_MASKS = ("task.ce_weight", "task.dice_weight", "task.dice")
_UNREAD = {
    "detection": (*_OF_MASKS, "task.class_weights", "task.partial_labels"),
    "classification": _OF_MASKS,
    **dict.fromkeys(bags.LABELS_OF, _OF_MASKS),
}
"""Keys that a task does not read: a recipe that is drafted for it does not show them."""
_FEDERATION = {"rounds": 16, "aggregation.server_momentum": 0.6}
"""Short rounds, and steps of the server that go on: a mean of steps is shorter than what many sites together need."""
_CASES = {
    "optimiser.learning_rate": 1e-3,
    "optimiser.batch_size": 8,
    "optimiser.local_epochs": 4,
    "adapter.kind": "head-only",
}
"""Of cases the head alone: a step through the backbone computes every image of eight cases. What it makes of them is
kept, so that more epochs cost next to nothing, and a hospital of a dozen cases has more than two steps a round."""
_COX = {"optimiser.batch_size": 32}
"""Its loss compares the cases of a step with each other."""
_ANSWERED = ("classification", *bags.LABELS_OF)
"""Tasks that a target is of."""
_SAM = {"optimiser.learning_rate": 8e-4, "optimiser.head_learning_rate": 8e-4, "optimiser.batch_size": 2}
_SAM_UNPROMPTED = {
    "task.head": "unet-deep",
    "adapter.kind": "head-only",
    "optimiser.learning_rate": 3e-3,
    "optimiser.head_learning_rate": 3e-3,
    "optimiser.batch_size": 2,
}
"""SAM's own decoder was trained to be told where to look: without prompts it finds little of small structures, and a
U-Net of the image that sees the embedding finds more for a fraction of the time (simulations/README.md)."""
_SCRATCH = {"optimiser.learning_rate": 2e-3, "optimiser.head_learning_rate": 2e-3, "adapter.kind": "full"}
_PIECE = (32, 96, 96)
_WHOLE_VOLUMES = {
    "data.depth": _PIECE[0],
    "data.input_size": list(_PIECE[1:]),
    "data.fit": "native",
    "optimiser.batch_size": 2,
}
_STAGES: dict[str, dict[str, Any]] = {"dinov3_convnext": {"adapter.targets": ["fc1", "fc2"]}}
"""Models of stages whose blocks have no attention."""
_NORMS: dict[str, dict[str, Any]] = {
    "clip": {
        "data.mean": [0.48145466, 0.4578275, 0.40821073],
        "data.std": [0.26862954, 0.26130258, 0.27577711],
    },
    "siglip": {"data.mean": [0.5, 0.5, 0.5], "data.std": [0.5, 0.5, 0.5]},
}
"""What models of images and words were trained with: OpenAI's and Google's own."""
_SAM_SIDE, _SAM3_SIDE = 1024, 1008
_LIGHT_SIDE = 256
_AS_THEY_ARE = {"data.mean": [0.0, 0.0, 0.0], "data.std": [1.0, 1.0, 1.0]}
"""LiteMedSAM knows values from 0 to 1; MobileSAM those of SAM."""


def text(name: str) -> str:
    """A template as it stands in the package: ``site.toml``, ``server.toml`` or ``recipe.toml``."""
    return resources.files("fedvfm.templates").joinpath(name).read_text(encoding="utf-8")


def headed(name: str, content: str) -> str:
    """The content below a line that tells editors where the JSON schema of such a file lies on this machine."""
    place = resources.files("fedvfm.templates").joinpath(f"{name}.schema.json")
    return f"#:schema {place.as_uri()}\n{content}" if isinstance(place, Path) else content


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The template with these values in place of those that stand there; a key that was left out is no longer.

    Args:
        template: TOML.
        values: dotted key, as ``"data.path"`` -> value.

    Raises:
        KeyError: for a key that has no line.
    """
    lines, at, done = template.splitlines(), "", set()
    for number, line in enumerate(lines):
        if heading := TABLE.match(line):
            at = f"{heading[1]}."
        elif (found := LINE.match(line)) and at + found[1] in values:
            lines[number] = f"{found[1]} = {literal(values[at + found[1]])}"
            done.add(at + found[1])
    if missing := set(values) - done:
        raise KeyError(f"no line for {', '.join(sorted(missing))}")
    return "\n".join(lines) + "\n"


def without(template: str, keys: Sequence[str]) -> str:
    """The template without the lines of these keys and the notes above them.

    Args:
        template: TOML.
        keys: dotted, as ``"task.dice"``.
    """
    kept: list[str] = []
    at = ""
    for line in template.splitlines():
        if heading := TABLE.match(line):
            at = f"{heading[1]}."
        elif (key := LINE.match(line)) and at + key[1] in keys:
            while not kept.pop().startswith(f"# {key[1]}: "):
                pass
            continue
        kept.append(line)
    return "\n".join(kept) + "\n"


def literal(value: bool | int | float | str | Sequence[Any] | Mapping[str, Any]) -> str:
    """A value as TOML writes it."""
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {literal(each)}' for key, each in value.items())} }}"
    if isinstance(value, bool | int | float | str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(literal(each) for each in value)}]"


def server() -> str:
    """A coordinator's file; every value in it is the default."""
    return headed("server", text("server.toml"))


def site(name: str, path: str | None = None, layout: str | None = None) -> str:
    """A hospital's file.

    Args:
        name: of the hospital in the federation.
        path: folder with its images; None leaves the template's example.
        layout: of that folder; None writes down what is recognised there, if anything is.

    Raises:
        ConfigError: listing every fault of what was given.
    """
    from fedvfm.data.sources import recognise  # what reads images; a coordinator has none of it

    if layout is not None and layout not in recognise.KINDS:
        raise errors.ConfigError("--layout", [f"'{layout}': known layouts: {', '.join(recognise.KINDS)}"])
    values: dict[str, Any] = {"name": name} | ({} if path is None else {"data.path": path})
    kind = layout if layout is not None else recognised(path)
    found = fill(text("site.toml"), values | ({} if kind is None else {"data.options.layout": kind}))
    schema.parse(schema.SiteConfig, tomllib.loads(found), "site.toml")
    return headed("site", found)


def recognised(path: str | None) -> str | None:
    """The layout of a folder; None where there is no such folder, or none is known."""
    from fedvfm.data.sources import recognise

    if path is None:
        return None
    try:
        return recognise.kind_of(Path(path).expanduser())
    except (errors.DataError, OSError):
        return None


def recipe(
    task: str,
    backbone: str,
    classes: Sequence[str],
    target: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> str:
    """A recipe's file: what trains well with this backbone, as the bundled experiments do.

    It has its form; whether its names and numbers go together is for :func:`fedvfm.model.adapted_model.validate`, which
    needs torch.

    Args:
        task: segmentation, classification or case-classification.
        backbone: a name of the table, a Hugging Face name or a folder.
        classes: their names; in segmentation the background first; of a target of columns these.
        target: keys of ``recipe.target`` -> value, as :mod:`fedvfm.templates.target_draft` has them; None: one class.
        inputs: keys of ``recipe.inputs`` -> value, as the same module has them; None: no table beside the images.

    Raises:
        ConfigError: listing every fault of form.
        UnknownName: for a backbone that nobody knows.
    """
    settings = schema.parse(schema.BackboneConfig, {"name": backbone}, "--backbone")
    if backbone not in backbones.TABLE and not backbones.elsewhere(backbone):
        raise errors.UnknownName(f"--backbone: {backbones.TABLE.fault(backbone)}; or owner/model, or a folder")
    values: dict[str, Any] = {"task.kind": task, "backbone.name": backbone, "data.class_names": list(classes)}
    values |= {"data.augment": ["mirror", "intensity"]}
    answers = target or {}
    values |= {f"target.{key}": value for key, value in answers.items()}
    values |= {f"inputs.{key}": value for key, value in (inputs or {}).items()}
    classed = answers.get("kind") not in target_config.OF_COLUMNS
    # Plain cross entropy on unequal classes may end in one answer for all.
    values |= {"task.options": {"sampling": "balanced"}} if classed and task in _ANSWERED else {}
    known, shape = weights.KNOWN.get(backbone), _shape(settings)
    if known is not None and known.sha256:
        values["backbone.sha256"] = known.sha256
    kind, vision = str(shape.get("model_type", "")), shape.get("vision_config", shape)
    if backbone in backbones.TABLE and known is None:
        values |= _SCRATCH | (_WHOLE_VOLUMES if piece(backbone) else {})
    elif kind.startswith("sam"):
        side = int(shape.get("vision_config", {}).get("image_size", _SAM_SIDE))
        values |= {"data.input_size": [min(side, _SAM3_SIDE if kind.startswith("sam3") else _SAM_SIDE)] * 2}
        values |= _SAM_UNPROMPTED if task == "segmentation" else _SAM
    elif kind == "tinyvit_sam":
        side, depth = int(vision["image_size"]), sum(vision["depths"][1:])  # the first stage is no attention
        values |= {"data.input_size": [side, side], "data.views": 4}
        values |= _SAM_UNPROMPTED if task == "segmentation" else _SAM | {"adapter.layers": [depth - 2, depth - 1]}
        values |= _AS_THEY_ARE if side == _LIGHT_SIDE else {}
    else:
        depth = sum(shape["depths"]) if "depths" in shape else int(vision.get("num_hidden_layers", 0))
        layers: dict[str, Any] = {"adapter.layers": list(range(depth - depth // 3, depth))}
        layers |= (
            _STAGES.get(kind, {})
            | _NORMS.get(kind.removesuffix("_vision_model"), {})
            | ({"data.input_size": [_side(shape)] * 2} if kind == "swin" else {})
        )
        kinds = {
            "segmentation": _SEGMENTATION | layers,
            "detection": _SEGMENTATION | layers,
            "classification": _CLASSIFICATION | layers,
        }
        values |= {"data.views": 4, **kinds.get(task, _CASES if task in bags.LABELS_OF else kinds["classification"])}
    values |= {} if (backbone in backbones.TABLE and known is None) or task in bags.LABELS_OF else _FEDERATION
    values |= _COX if answers.get("kind") == "cox" else {}
    found = fill(without(text("recipe.toml"), _UNREAD.get(task, ())), values)
    schema.parse(schema.Recipe, tomllib.loads(found), "recipe")
    return headed("recipe", found)


def _side(shape: Mapping[str, Any]) -> int:
    """Side of the squares that a Swin was made for: what its last stage needs is no more."""
    return int(shape.get("image_size", 224))


def sides(backbone: str) -> tuple[int, bool]:
    """A backbone's side in pixels, as far as is known here, and which one that is.

    True: that of the squares it was trained on, as every SAM. False: that of a patch, of which an input's sides are
    multiples; of a model that is not on this machine, 16, and locking a recipe says what is wrong.
    """
    shape = _shape(schema.parse(schema.BackboneConfig, {"name": backbone}, "--backbone"))
    kind = str(shape.get("model_type", ""))
    if kind == "swin":
        return _side(shape), True
    if kind in _STAGES:
        return 32, False
    if kind.startswith("sam") or kind == "tinyvit_sam":
        size: int = tomllib.loads(recipe("segmentation", backbone, ["background", "lesion"]))["data"]["input_size"][0]
        return size, True
    return int(shape.get("vision_config", shape).get("patch_size", 16)), False


def piece(backbone: str) -> tuple[int, ...]:
    """What a drafted recipe shows of a volume to a backbone of whole volumes; empty for a backbone of slices.

    Units: voxels, (slices, height, width).
    """
    return _PIECE if backbone == "unet3d" else ()


def _shape(settings: schema.BackboneConfig) -> Mapping[str, Any]:
    """What ``config.json`` says, as far as it is known here; of a model that is not on this machine, nothing."""
    if settings.name in backbones.TABLE and settings.name not in weights.KNOWN:
        return {}
    try:
        return weights.describe(settings)
    except (errors.WeightsError, ModuleNotFoundError):  # a coordinator may lack what reads Hugging Face's cache
        return {}


@dataclass(frozen=True, slots=True)
class Study:
    """A folder of images as an experiment takes it.

    Attributes:
        task: segmentation or classification, of cases where the folder says which images are one; or as was said.
        classes: as the folder names them, or as was said.
        named: whether the folder, or the caller, names them; else they are a guess.
        samples: pictures and slices.
        patients: who is never in two splits.
        sites: hospitals that the folder tells apart; fewer than two where it does not.
        target: keys of ``recipe.target`` -> value; empty: one class.
        inputs: keys of ``recipe.inputs`` -> value; empty: no table beside the images.
    """

    task: str
    classes: tuple[str, ...]
    named: bool
    samples: int
    patients: int
    sites: int
    target: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)


def study(
    path: Path,
    classes: Sequence[str] = (),
    task: str | None = None,
    target: str = "class",
    inputs: Sequence[str] = (),
) -> Study:
    """Look at a folder: headers and tables, no pixels.

    Args:
        path: the folder.
        classes: their names where the folder does not say them; the columns of a target of columns, and the grades of
            "ordinal" in their order.
        task: what is learned of it; None takes what the folder looks like.
        target: kind of what is answered.
        inputs: columns of its table that are seen beside the images.

    Raises:
        DataError: with every fault of the folder, and where its table lacks a column.
        ConfigError: if the folder is not for that task or target, or nobody said which columns or which order.
    """
    from fedvfm.data.sources import table as sources
    from fedvfm.templates import target_draft  # what reads tables

    columns = target_draft.required(target, classes)
    known = {"class_names": list(classes)} if classes and not columns else {}
    values = {"source": "folder", "path": str(path), "options": known}
    source = sources.make(schema.parse(schema.SourceConfig, values, "--classes"))
    info, samples = source.info, source.samples()
    if target != "class" and info.task != "classification":
        raise errors.ConfigError("--target", [f"'{target}': {path} holds masks; leave it out"])
    if inputs and info.task != "classification":
        raise errors.ConfigError("--inputs", [f"{path} holds masks, and a table is for classes; leave it out"])
    if info.task == "classification" and not columns and all(sample.label is None for sample in samples):
        fault = (
            f"{path}: its table has no column 'label' with a class. For columns of yes and no, numbers, or a time and "
            "an event say --target multi-label, regression or survival, and --classes with the columns"
        )
        raise errors.ConfigError("experiments new", [fault])
    if task is not None and bags.data_of(task) != info.task:
        takes = ", ".join(sorted({info.task} | {kind for kind, data in _DATA_OF.items() if data == info.task}))
        raise errors.ConfigError("--task", [f"'{task}': {path} holds what {takes} can learn from; choose of these"])
    whole = info.task == "classification" and any(sample.case for sample in samples)
    return Study(
        task or (next(kind for kind, labels in bags.LABELS_OF.items() if labels == info.task) if whole else info.task),
        tuple(classes) if columns else info.class_names,
        info.named or bool(classes) or info.task == "classification",
        len(samples),
        len({sample.subject for sample in samples}),
        len({sample.site for sample in samples if sample.site}),
        target_draft.of_source(source, target, classes),
        target_draft.inputs_of_source(source, inputs, classes if columns else ()),
    )


def experiment(path: Path, seen: Study, *, backbone: str, sites: int = 0) -> str:
    """An experiment's file for a folder of images: its hospitals where it has several, else ``sites`` virtual ones.

    Args:
        path: the folder, as the file will name it.
        seen: what lies in it.
        backbone: a name of the table, a Hugging Face name or a folder.
        sites: virtual hospitals that get the patients at random; 0 takes those of the folder, or four.

    Raises:
        ConfigError: listing every fault of form, and where there are fewer patients than three a hospital.
        UnknownName: for a backbone that nobody knows.
    """
    if sites == 1:
        raise errors.ConfigError("experiments new", ["--sites 1: a federation has two hospitals or more"])
    natural = not sites and seen.sites > 1
    number = seen.sites if natural else sites or min(HOSPITALS, seen.patients // PATIENTS)
    if number < 2 or seen.patients < PATIENTS * number:
        fault = (
            f"{path}: {seen.patients} patients for {max(number, 2)} hospitals; each needs {PATIENTS} or more, to "
            "train, to validate and to test. Bring more images, or name fewer --sites"
        )
        raise errors.ConfigError("experiments new", [fault])
    of_columns = seen.target.get("kind") in target_config.OF_COLUMNS
    options = {"class_names": list(seen.classes)} if seen.named and not of_columns else {}
    values = [
        f"name = {literal(_plain(path.name))}",
        f"baselines = {literal(['local-only', 'pooled', *(['table-alone'] if seen.inputs else [])])}",
        "",
        "[data]",
        'source = "folder"',
        f"path = {literal(str(path))}",
        *([f"options = {literal(options)}"] if options else []),
        "",
        "# natural: the hospitals that the data tells apart; iid: patients at random to virtual ones.",
        "# To see what unlike hospitals do: appearance, dirichlet or quantity (fedvfm explain partitions).",
        "[partition]",
        f"kind = {literal('natural' if natural else 'iid')}",
        *([] if natural else [f"sites = {number}"]),
        "",
        "[recipe]",
    ]
    lines = recipe(seen.task, backbone, seen.classes, seen.target, seen.inputs).splitlines()
    inner = [TABLE.sub(lambda heading: heading[0].replace("[", "[recipe."), line) for line in lines]
    first = next(at for at, line in enumerate(inner) if line.startswith("# rounds:"))
    text = "\n".join([EXPERIMENT_HEAD, *values, *inner[first:]]) + "\n"
    if recognised(str(path)) == "slides":
        text = text.replace("#[recipe.data.slides]", "[recipe.data.slides]")
    schema.parse(schema.Experiment, tomllib.loads(text), "experiment")
    return headed("experiment", text)


def _plain(name: str) -> str:
    """A name for a run's folder out of that of a folder of images."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_").lower()[:40] or "mine"


def require_free(path: Path) -> None:
    """Check that there is nothing at a path.

    Raises:
        OutputInUse: if there is.
    """
    if os.path.lexists(path):
        raise errors.OutputInUse(f"{path} exists and is left as it is. Choose another --output, or move it away")


def write(path: Path, content: str) -> Path:
    """Write a draft for its owner alone (0600); nothing is overwritten.

    Raises:
        OutputInUse: if there is anything at the path.
        ConfigError: if what a person gave is no text, as the name of a folder may be.
        StorageError: if it cannot be written.
    """
    require_free(path)
    try:
        content.encode()
    except UnicodeEncodeError as error:
        wrong = ascii(content[max(0, error.start - 40) : error.end])
        raise errors.ConfigError(
            str(path),
            [f"{wrong} ends in a byte that is no UTF-8, as the file must be. Rename the folder and try again"],
        ) from None
    storage.write_text(path, content)
    return path
