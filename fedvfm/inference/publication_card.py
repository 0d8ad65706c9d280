"""The card of what is published: its head for Hugging Face, and code that runs where it is pasted."""

from __future__ import annotations

import re
from pathlib import Path

from fedvfm.backbones import weights
from fedvfm.config import schema
from fedvfm.inference import case_graph, sessions

REFERENCE = "LicenseRef-"
STOCK = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}
"""Kinds of backbones of which only the image tower is adapted -> its class in transformers."""
_HEAD = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
_CODE = re.compile(r"```python\n.*?```\n+", re.DOTALL)
_LOADING = re.compile(r"^## Load it\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
_SECTION = re.compile(r"^## ", re.MULTILINE)


def text(before: str, folder: Path, repository: str, form: str, recipe: schema.Recipe, licence: str) -> str:
    """The whole card.

    Args:
        before: the card that lies beside the files on this machine.
        folder: with these files.
        repository: "OWNER/NAME".
        form: see :func:`fedvfm.inference.publication.push_to_hub`.
        recipe: of the adapter.
        licence: of what is published; empty where none was chosen.
    """
    head = _HEAD.match(before)
    rows = head[1].splitlines() if head else ["library_name: monai", "tags: [federated-learning, fedvfm]"]
    rows = [row for row in rows if not row.startswith("base_model:")]
    # What Hugging Face shows as the model this one is made from must be one that it has.
    hub = _hub(recipe)
    rows += [f"base_model: {hub}", f"base_model_relation: {_relation(form)}"] if hub else []
    rows += _licence_rows(licence)
    body = before[head.end() :] if head else before
    body = _CODE.sub("", _LOADING.sub("", body))
    use = "\n".join(["## Use it", "", *_usage(folder, repository, form, recipe), ""])
    section = _SECTION.search(body)
    at = section.start() if section else len(body)
    body = f"{body[:at].rstrip()}\n\n{use}\n{body[at:]}"
    return "\n".join(["---", *rows, "---", body.strip("\n")]) + "\n"


def _relation(form: str) -> str:
    """Hugging Face's word for how a model came out of another."""
    return {"adapter": "adapter", "peft": "adapter", "onnx-int8": "quantized"}.get(form, "finetune")


def _licence_rows(licence: str) -> list[str]:
    if licence.startswith(REFERENCE):
        return ["license: other", f"license_name: {licence.removeprefix(REFERENCE).lower()}"]
    return [f"license: {licence.lower()}"] if licence else []


def _hub(recipe: schema.Recipe) -> str:
    """The name of the backbone on Hugging Face; empty where it is not from there."""
    name = recipe.backbone.name
    if name in weights.KNOWN:
        return weights.KNOWN[name].hub
    return name if "/" in name and not weights.in_cache(name) else ""


def _usage(folder: Path, repository: str, form: str, recipe: schema.Recipe) -> list[str]:
    """What to run first, and then in Python."""
    if form == "hf":
        stock = re.search(r"^from transformers import (\w+)\n.*?(add_pooling_layer=False)?\)\n", _card(folder), re.M)
        name, option = (stock[1], stock[2]) if stock else ("AutoModel", None)
        return _python(
            f"from transformers import {name}",
            "",
            f'model = {name}.from_pretrained("{repository}"{f", {option}" if option else ""})',
        )
    if form.startswith("onnx"):
        return _onnx(folder, repository, recipe)
    with_peft = (folder / "adapter_config.json").is_file()
    if form == "peft":
        return _peft(repository, recipe)
    if form == "monai":
        code = [
            "from huggingface_hub import snapshot_download",
            "",
            "from fedvfm.inference import bundle",
            "",
            f'network = bundle.network(snapshot_download("{repository}"))  # prepared images in [0, 1] to logits',
        ]
        return ["With `fedvfm[client]` installed:", "", *_python(*code)]
    first = ["```bash", 'pip install "fedvfm[client]"', *_fetching(recipe), "```", ""]
    code = [
        "import fedvfm",
        "from huggingface_hub import snapshot_download",
        "",
        f'adapter = snapshot_download("{repository}")',
        "model = fedvfm.load_adapter(adapter)  # backbone, adapter and head",
        '# fedvfm.predict(adapter, "images", "predicted")  # a picture, a volume, or a folder of them',
    ]
    return [*first, *_python(*code), *(["With PEFT into the stock backbone:", ""] if with_peft else [])] + (
        _peft(repository, recipe) if with_peft else []
    )


def _card(folder: Path) -> str:
    path = folder / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _fetching(recipe: schema.Recipe) -> list[str]:
    """The command that brings the backbone, where it is not made from a seed."""
    if recipe.backbone.name == "unet":
        return []
    return [weights.remedy(recipe.backbone).removeprefix("Run: ").removeprefix("Bring its file and run: ")]


def _peft(repository: str, recipe: schema.Recipe) -> list[str]:
    stock = STOCK.get(str(weights.describe(recipe.backbone).get("model_type", "")).partition("_")[0], "AutoModel")
    hub, own = _hub(recipe), recipe.backbone.name
    place = f'"{hub}"' if hub else f'weights.own_folder("{own}")'
    return _python(
        "from peft import PeftModel",
        f"from transformers import {stock}",
        *([] if hub else ["", "from fedvfm.backbones import weights"]),
        "",
        f"backbone = {stock}.from_pretrained({place})",
        f'model = PeftModel.from_pretrained(backbone, "{repository}")',
    )


def _onnx(folder: Path, repository: str, recipe: schema.Recipe) -> list[str]:
    sides, columns = ", ".join(map(str, recipe.data.patch_size)), recipe.inputs.numbers_a_row
    start = [
        "import numpy as np",
        "import onnxruntime",
        "from huggingface_hub import snapshot_download",
        "",
        f'folder = snapshot_download("{repository}")',
    ]
    table = ', "table": table' if columns else ""
    if (folder / case_graph.HEAD).is_file():
        rows = [f"table = np.full({columns}, np.nan, np.float32)  # its row of the table"] if columns else []
        return _python(
            *start,
            f'encoder = onnxruntime.InferenceSession(f"{{folder}}/{case_graph.ENCODER}")',
            f'head = onnxruntime.InferenceSession(f"{{folder}}/{case_graph.HEAD}")',
            f"images = np.zeros((5, 3, {sides}), np.float32)  # of one case, prepared as below",
            *rows,
            'vectors = np.concatenate([encoder.run(None, {"image": image[None]})[0] for image in images])',
            f'logits, shares = head.run(None, {{"vectors": vectors, "places": np.arange(len(images)){table}}})',
        )
    rows = [f"table = np.full((1, {columns}), np.nan, np.float32)  # its row of the table"] if columns else []
    return _python(
        *start,
        f'session = onnxruntime.InferenceSession(f"{{folder}}/{sessions.FILE}")',
        f"image = np.zeros((1, 3, {sides}), np.float32)  # yours, prepared as below",
        *rows,
        f'(logits,) = session.run(["logits"], {{"image": image{table}}})',
    )


def _python(*lines: str) -> list[str]:
    return ["```python", *lines, "```", ""]
