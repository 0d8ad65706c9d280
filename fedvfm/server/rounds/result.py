"""What a finished federation leaves at the coordinator, beside its journal and final test; needs no torch.

    adapter/         the final adapter, for ``fedvfm predict``, ``export`` and ``load_adapter``
    metrics.csv      every value that sites sent, a row each
    summary.json     the machine's view; ``fedvfm compare`` reads it
    experiment.json  the recipe, as ``fedvfm compare`` looks for it
    report.html      for people; written last

All of it is made of the journal, the final test and the final adapter: what the policies of the sites kept back is in
none of them. Sites send no values of single images, so there is no samples.csv and there are no intervals.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.backbones import licences
from fedvfm.data import prompts
from fedvfm.model import adapter_folder
from fedvfm.privacy import statements
from fedvfm.report import page, rounds, scores
from fedvfm.server import state_folder
from fedvfm.server.rounds import summary
from fedvfm.state import checkpoint
from fedvfm.storage import hash_chain, storage
from fedvfm.tasks import metrics
from fedvfm.trust import locked_recipe

ADAPTER, REPORT, SUMMARY = "adapter", "report.html", "summary.json"


def ensure(where: state_folder.State) -> Path | None:
    """The folder of the present recipe's result, written now where it is not whole; None if it is not finished.

    Raises:
        CheckpointError: if journal, final test or final adapter are damaged.
        StorageError: if the disk refuses.
    """
    recipe = where.about.recipe
    folder = where.run_path(recipe)
    if not where.finished(recipe):
        return None
    if not (folder / REPORT).is_file():
        write(folder, where.about.federation, where.locked())
    return folder


def write(folder: Path, federation: str, locked: locked_recipe.LockedRecipe) -> dict[str, Any]:
    """Write the result of a finished federation; the contents of summary.json.

    Raises:
        CheckpointError: if journal, final test or final adapter are damaged.
        StorageError: if the disk refuses.
    """
    evaluation = _evaluation(folder / "evaluation.json")
    journal = hash_chain.read(folder / "journal.jsonl")
    adapter, _, _ = checkpoint.read(folder / "adapter.safetensors")
    if adapter.fingerprint != evaluation["fingerprint"]:
        raise errors.CheckpointError(
            f"{folder / 'adapter.safetensors'} is not the adapter that was tested. Restore it from a backup"
        )
    made = summary.build(federation, locked, _primary(locked, evaluation), journal, evaluation)
    recipe = locked.recipe
    facts = adapter_folder.Facts(
        recipe,
        recipe.hash,
        locked.manifest,
        locked.backbone_sha256,
        locked.backbone_config_sha256,
        locked.backbone_parameters,
        licences.of(recipe.backbone),
    )
    known = {"experiment": federation, "primary": made["primary"], "arms": made["arms"]}
    note = f"Final adapter of federation '{federation}', saved by its coordinator"
    storage.make_private(folder / ADAPTER)
    adapter_folder.write(folder / ADAPTER, facts, adapter)
    card = adapter_folder.card(facts, adapter, known, note, "fedvfm", _loading())
    storage.write_text(folder / ADAPTER / adapter_folder.CARD, card)
    summary.write_csv(folder / "metrics.csv", summary.COLUMNS, summary.metric_rows(summary.ARM, journal, evaluation))
    experiment = {"name": federation, "engine": "deployment", "recipe": recipe.model_dump(mode="json")}
    storage.write_text(folder / "experiment.json", json.dumps(experiment, indent=2, sort_keys=True) + "\n")
    storage.write_text(folder / SUMMARY, summary.as_json(made) + "\n")
    storage.write_text(
        folder / REPORT, page.document(f"Federation {federation}", body(federation, locked, made, journal))
    )
    return made


def _evaluation(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found["last"]["sites"], dict):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise errors.CheckpointError(
        f"{path}: cannot be read; remove it and start the server: the final test is made again"
    )


def _primary(locked: locked_recipe.LockedRecipe, evaluation: Mapping[str, Any]) -> str:
    """The metric that ranks models of the task; of a task that came with another package the first that was sent."""
    known = metrics.primary(locked.recipe.task.kind, locked.recipe.target.kind)
    if known is not None:
        return known
    sent = (name for row in evaluation["last"]["sites"].values() for name in row if name != "num_examples")
    return next(sent, "score")


def _loading() -> list[str]:
    return [
        "A coordinator holds no backbone, so this is fedvfm's own layout. `fedvfm predict adapter INPUT -o OUTPUT`",
        "takes it; `fedvfm export adapter -o FOLDER --format peft` (or `hf`, `monai`, `onnx`) makes others of it.",
        "",
        *adapter_folder.OWN_WAY,
    ]


# -- the report --------------------------------------------------------------------------------------------------------


def body(
    federation: str, locked: locked_recipe.LockedRecipe, made: Mapping[str, Any], journal: summary.Rounds
) -> list[str]:
    """The page, part by part."""
    arm, recipe = made["arms"][summary.ARM], locked.recipe
    name = scores.shown(scores.metric_name(made["primary"]), arm)
    about = scores.shown("Test metrics of the final adapter, as the sites' policies let them out", arm)
    parts = {
        "sites": ("Final adapter, site by site", scores.by_site(arm["sites"], about, recipe.evaluation.nsd_tolerance)),
        "findings": ("To be read with the figures", scores.findings(made["findings"])),
        "acceptance": ("Who took it", _acceptance(made["acceptance"])),
        "training": ("Training, round by round", rounds.training(journal, made["primary"], name, arm)),
        "privacy": ("Privacy", _privacy(locked, journal)),
        "bytes": ("Bytes moved", rounds.traffic(journal, made)),
        "recipe": ("Recipe", _recipe(locked, made)),
    }
    sections = {key: page.section(key, title, inner) for key, (title, inner) in parts.items() if inner}
    links = "".join(f'<a href="#{key}">{page.text(parts[key][0])}</a>' for key in sections)
    words = (
        f"{recipe.task.kind} over {page.counted(len(arm['sites']), 'site')}, "
        f"{page.counted(made['rounds'], 'round')}, {recipe.adapter.kind} on {made['backbone']['name']}, "
        f"rule {recipe.aggregation.rule}, seed {made['seed']}"
    )
    read_first = [f"Attention: {row['text']}." for row in made["findings"] if row["headline"]]
    marks = [mark for mark in (*read_first, prompts.describe(recipe.task)) if mark]
    return [
        f'<header><h1>{page.text(f"Federation {federation}")}</h1><p class="soft">{page.text(words)}</p>',
        *(f'<p class="note" role="note">{page.text(mark)}</p>' for mark in marks),
        page.cards(_cards(name, arm, journal, made)),
        "</header>",
        f'<nav aria-label="Sections">{links}</nav>',
        "<main>",
        *sections.values(),
        "</main>",
    ]


def _cards(
    name: str, arm: Mapping[str, Any], journal: summary.Rounds, made: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    if arm["macro"] is None:
        first = [(f"Macro {name}", "not sent", "the policies of the sites let no value out")]
    else:
        worst, below = arm["worst"], f"{arm['gap']:.3f} below the best"
        first = [
            (f"Macro {name}", f"{arm['macro']:.3f}", "mean over the sites that sent it"),
            (scores.shown("Worst site", arm), f"{worst['value']:.3f}", f"{worst['site']}, {below}"),
        ]
    return [*first, rounds.traffic_card(journal, made)]


def _acceptance(words: Mapping[str, str]) -> str:
    if not words:
        return ""
    rows: list[list[page.Cell]] = [[site, word] for site, word in sorted(words.items())]
    return page.table(
        ("site", "final adapter"), rows, "What each site's policy decided of the final adapter.", words=(1,)
    )


def _privacy(locked: locked_recipe.LockedRecipe, journal: summary.Rounds) -> str:
    own = statements.sentence(locked.recipe.privacy, None)
    last = journal[-1].get("privacy") if journal else None
    told = f"{own}. After the last round: {statements.so_far(last)}" if last else own
    return page.paragraph(f"Differential privacy: {told}.") + page.paragraph(f"{statements.OUTSIDE}.", "soft")


def _recipe(locked: locked_recipe.LockedRecipe, made: Mapping[str, Any]) -> str:
    def code(value: str) -> page.Markup:
        return page.Markup(f"<code>{page.text(value)}</code>")

    backbone = made["backbone"]
    rows: list[list[page.Cell]] = [
        ["recipe hash", code(locked.recipe.hash)],
        ["adapter fingerprint", code(made["fingerprint"])],
        ["backbone", f"{backbone['name']}, {backbone['parameters']:,} parameters"],
        ["backbone sha256", code(backbone["sha256"]) if backbone["sha256"] else "made from the seed"],
        ["precision", f"{made.get('precision') or 'not recorded'}; the recipe says {locked.recipe.precision}"],
        ["rounds and final test", f"{made['wall_s']:,.0f} s"],
    ]
    values = json.dumps(locked.recipe.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False)
    return page.table(("what", "value"), rows, "What was trained.", words=(1,)) + page.folded(
        "The recipe, every setting resolved", f"<pre>{page.text(values)}</pre>"
    )
