"""The check from the site's file to a report: open the data, pass over it once, judge, try a training step."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedvfm import errors
from fedvfm.client import site_file
from fedvfm.client.gate import policy
from fedvfm.client.readiness import offline
from fedvfm.config import schema
from fedvfm.data import bags, defect, labels, partial_labels, unlabelled
from fedvfm.data import sample as samples
from fedvfm.data.partition import splits as splitting
from fedvfm.data.readiness import dataset, duplicates, finding, image_findings, rules, survey
from fedvfm.data.sources import table as sources
from fedvfm.report import progress

if TYPE_CHECKING:
    from fedvfm.model import adapted_model
    from fedvfm.model import memory as budget

OF_LABELS = (
    "no-validation-sample",
    "no-test-sample",
    "few-test-samples",
    "one-class",
    "class-missing",
    "class-missing-in-split",
    "imbalance",
    "foreground-rare",
)
"""What is no finding where nothing is labelled."""


@dataclass
class Checked:
    """All that a check found.

    Attributes:
        own: settings and recipe.
        listed: the hospital's data as the recipe asks for it, where its structure has no fault.
        raw: the hospital's data, or None where it could not be opened.
        source: the same under the recipe's classes.
        fits: whether the recipe's classes are those of the data.
        seen: what the pass found, or None.
        findings: ranked, blockers first.
        facts: parts of the JSON document about this machine and the step.
        told: full texts of errors with the number of their sample (0: none); they may name files and patients.
        limit: samples asked for, 0 for all.
    """

    own: site_file.Own
    limit: int = 0
    listed: samples.Source | None = None
    raw: samples.Source | None = None
    source: samples.Source | None = None
    fits: bool = True
    seen: dataset.Looked | None = None
    findings: list[finding.Finding] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)
    told: list[tuple[int, str, str]] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether no finding is a blocker."""
        return all(one.severity != "blocker" for one in self.findings)

    @property
    def exit_code(self) -> int:
        """0 if ready, else :data:`fedvfm.errors.NOT_READY`."""
        return 0 if self.ready else errors.NOT_READY


def check(
    what: Path | site_file.Own,
    *,
    recipe: Path | None = None,
    limit: int = 0,
    observer: progress.Observer = progress.silent,
) -> Checked:
    """Check one hospital. Uses no network and writes nothing.

    Args:
        what: the site's file, or what was read of it.
        recipe: taken in place of the one the file names.
        limit: look at so many samples only, evenly spaced; 0 for all.
        observer: told of progress.

    Raises:
        ConfigError: if the site's file or the recipe has faults; everything else becomes a finding.
    """
    with offline.closed():
        made = Checked(what if isinstance(what, site_file.Own) else site_file.read(what, recipe), limit)
        raw = _open(made)
        if raw is not None:
            _look(made, raw, observer)
        _machine(made, observer)
    made.findings = finding.ranked(made.findings)
    return made


def _open(made: Checked) -> samples.Source | None:
    """The source of what is usable; its faults become findings."""
    structure: list[str] = []
    raw, recipe = None, made.own.recipe
    try:
        site_file.require_no_skipping(made.own.site, recipe)
        raw = sources.survey(made.own.site.data, structure, None if recipe is None else recipe.data)
    except errors.DataError as error:
        structure += error.faults or ([] if structure else [error.fault()])
    except errors.FedvfmError as error:
        # Settings name no patient, and without their text nobody could correct them.
        made.findings.append(finding.make("options", "; ".join(getattr(error, "faults", ()) or [str(error)])))
    except Exception as error:
        # A source of a third party may fail in any way; the report must still come.
        problem = f"the source could not be opened ({type(error).__name__})"
        made.findings.append(finding.make("reader-failed", problem))
        made.told.append((0, "reader-failed", f"{type(error).__name__}: {error}"))
    made.told += [(0, defect.of(fault), fault) for fault in structure]
    made.findings += rules.structure([defect.of(fault) for fault in structure])
    made.listed = None if structure else raw
    return raw


def _look(made: Checked, raw: samples.Source, observer: progress.Observer) -> None:
    """Map the classes, split, pass over the pixels, judge."""
    site, recipe = made.own.site, made.own.recipe
    source, contract = _mapped(made.own, raw)
    made.findings += contract
    source = source if contract else _declared(made, _cases(made, source))
    everything = site_file.belonging(site, source.samples())
    split = site_file.split(site, everything, source)
    numbers = {one.id: number for number, one in enumerate(everything, 1)}
    chosen = survey.spaced(everything, made.limit)
    wanted = None if recipe is None or contract else recipe.data
    images = [(number, image) for number, image in _images_of(chosen) if not image.without_image]
    found = survey.look(source, images, observer, files=raw, contract=wanted)
    # Of a table that could not be read, which was told, nothing is known: no row is missing.
    tabled = any(sample.inputs for sample in everything)
    valued = tabled or any(sample.values for sample in everything)
    inputs = recipe.inputs if recipe is not None and recipe.inputs.columns and tabled else None
    made.seen = dataset.Looked(
        info=source.info,
        classes=recipe.data.class_names if recipe is not None and not contract else _shown_names(made.own, source.info),
        samples=everything,
        found=found,
        splits={
            name: [numbers[one.id] for one in members]
            for name, members in site_file.trained_alone(site, split.parts).items()
        },
        torn=[numbers[one.id] for one in split.torn],
        contract=recipe.data if recipe is not None else None,
        names_shown=site.data.options.get("ids") == "names",
        limited=len(chosen) < len(everything),
        inputs=inputs,
        unused_rows=getattr(raw, "unused_rows", 0) if valued else 0,
        not_taken=0
        if recipe is None or recipe.inputs.images_missing
        else sum(sample.without_image for sample in raw.samples()),
    )
    made.told += [(one.number, one.code, one.message) for one in found.failures]
    made.findings += _noted(raw, _images_of(list(enumerate(everything, 1))))
    left: Sequence[str] = getattr(raw, "left", ())
    if left:
        problem = f"{finding.number(len(left), 'file or case is', 'files or cases are')} left out"
        made.findings.append(finding.make("left-out", problem, len(left)))
        made.told += [(0, "left-out", text) for text in left]
    known = {one.code for one in made.findings}
    for one in [*rules.findings(made.seen), *image_findings.findings(made.seen), *duplicates.findings(made.seen)]:
        # Where table and samples tell the same fault, the one that numbers samples says more.
        if one.code == "patient-across-splits" and one.code in known:
            made.findings = [other for other in made.findings if other.code != one.code]
        if site.without_labels and one.code in OF_LABELS:
            continue
        if one.code == "imbalance" and recipe is not None and _balances(recipe):
            continue
        if one.code == "detail-lost" and recipe is not None and recipe.task.kind != "segmentation":
            continue
        made.findings.append(_explained(site, one))
    made.raw, made.source, made.fits = raw, source, not contract
    made.findings += _policy(made.own, made.seen) if made.fits else []


def _policy(own: site_file.Own, seen: dataset.Looked) -> list[finding.Finding]:
    """What the site's own policy will refuse to train on: so few patients, or steps."""
    members = [seen.samples[number - 1] for number in seen.splits.get("train", [])]
    if own.recipe is None or not members:  # a site without any only tests
        return []
    try:
        patients = {sample.subject for sample in members}
        policy.require_enough(own.site.policy, own.recipe, len(patients), len(members))
    except errors.PolicyRefused as refusal:
        return [finding.make("policy-refuses", f"{refusal.detail}: every round will be refused")]
    return []


def _balances(recipe: schema.Recipe) -> bool:
    """Whether a recipe does something about unequal classes already."""
    return bool(recipe.task.class_weights) or recipe.task.options.get("sampling") == "balanced"


def _explained(site: schema.SiteConfig, one: finding.Finding) -> finding.Finding:
    """A finding with the remedy that helps here: no other seed draws a test patient where no share is for testing."""
    if one.code != "no-test-sample" or site.privacy is None or site.split.test_share:
        return one
    problem = f"{one.problem}; split.test_share = 0, and with [privacy] no patient is put into test then"
    return dataclasses.replace(one, problem=problem, remedy=site_file.TEST_SHARE_NEEDED + ".")


def _cases(made: Checked, source: samples.Source) -> samples.Source:
    """The cases of a source, where the recipe is for cases; images by themselves where they do not make any."""
    if made.own.recipe is None:
        return source
    try:
        return bags.of(source, made.own.recipe, table=made.own.site.table == "given")
    except errors.DataError as error:
        faults = error.faults or (error.fault(),)
        made.told += [(0, defect.of(fault), fault) for fault in faults]
        made.findings += rules.structure([defect.of(fault) for fault in faults])
        return source


def _declared(made: Checked, source: samples.Source) -> samples.Source:
    """The source as the site says it is labelled; as it is where that does not fit."""
    site, recipe = made.own.site, made.own.recipe
    try:
        partly = partial_labels.declared(source, site.labelled, recipe)
        partly.samples()
        return partly
    except errors.ConfigError as error:
        made.findings.append(finding.make("contract", "; ".join(error.faults), len(error.faults)))
    except errors.DataError as error:
        made.findings += rules.structure([defect.of(error)])
    return source


def _images_of(chosen: Sequence[survey.Numbered]) -> list[survey.Numbered]:
    """The images of samples, each with its sample's number."""
    return [(number, image) for number, sample in chosen for image in sample.images or (sample,)]


def _noted(raw: samples.Source, images: Sequence[survey.Numbered]) -> list[finding.Finding]:
    """What the headers of volumes leave in doubt, where the source knows; such notes hold no text of a file."""
    notes_of = getattr(raw, "notes_of", None)
    if notes_of is None:
        return []
    noted: dict[str, dict[int, None]] = {}
    for number, image in images:
        for note in notes_of(image):
            noted.setdefault(note, {})[number] = None
    return [
        finding.make("header-noted", f"{note}: {finding.number(len(members), 'sample')}", len(members), list(members))
        for note, members in noted.items()
    ]


def _shown_names(own: site_file.Own, info: samples.SourceInfo) -> tuple[str, ...]:
    """Class names as they may be shown: those somebody wrote into a file of settings, else numbers.

    Folders that were taken for classes may be one a patient.
    """
    known = {*own.site.labels, *own.site.labels.values()} | set(
        own.recipe.data.class_names if own.recipe is not None else ()
    )
    named = own.site.data.options.get("class_names")
    written = info.name != "folder" or info.task != "classification" or isinstance(named, list)
    return tuple(
        name if written or name in known else f"class {number}" for number, name in enumerate(info.class_names, 1)
    )


def _mapped(own: site_file.Own, raw: samples.Source) -> tuple[samples.Source, list[finding.Finding]]:
    """The source under the recipe's classes, or as it is with what keeps it from fitting."""
    if own.site.without_labels:
        wrong = [] if own.recipe is None else unlabelled.faults(own.recipe)
        return unlabelled.Unlabelled(raw), [finding.make("contract", fault) for fault in wrong]
    wanted = own.recipe.data.class_names if own.recipe is not None else ()
    shown = _shown_names(own, raw.info)
    names = ", ".join(shown)
    try:
        source = labels.mapped(raw, own.site.labels, wanted)
    except errors.ConfigError as error:
        problem = f"[labels] does not fit: {'; '.join(error.faults)}; the data has {names}"
        return raw, [finding.make("contract", problem, len(error.faults))]
    if own.recipe is None or not labels.faults(own.recipe, source.info):
        return source, []
    task, theirs = own.recipe.task.kind, f"{len(shown)} classes ({names}) for {source.info.task}"
    problem = f"the recipe is for {task} of {', '.join(wanted)}; the data has {theirs}"
    return source, [finding.make("contract", problem)]


def _machine(made: Checked, observer: progress.Observer) -> None:
    """Device, memory, disk and the training step, where a recipe says what is needed."""
    if made.own.recipe is None:
        made.findings.append(finding.make("no-recipe", "no recipe was given"))
        return
    observer("note", text="trying a training step")
    # Only a check with a recipe pays for loading torch.
    from fedvfm.backbones import weights
    from fedvfm.client.readiness import resources, step
    from fedvfm.client.training import site as sites
    from fedvfm.model import adapted_model, precision
    from fedvfm.model import memory as budget

    site, recipe = made.own.site, made.own.recipe
    try:
        recipe = sites.at_rank(recipe, site.rank, site.name)
    except errors.ConfigError as error:
        made.findings.append(finding.make("rank-too-high", error.faults[0]))
    found, wrong = resources.look(site.device)
    made.findings += wrong
    try:
        shapes = (recipe is made.own.recipe and made.own.shapes) or adapted_model.AdaptedModel(
            recipe, with_weights=False
        )
    except errors.WeightsError as error:
        remedy = weights.remedy(recipe.backbone)
        made.findings.append(finding.make("weights-missing", str(error), remedy=remedy))
        made.findings.append(finding.make("step-skipped", "the backbone is not on this machine"))
        return
    lost = step.missing_weights(recipe, shapes)
    places = budget.Places(site.cache_mib, site.cache_disk_mib)
    memory = budget.memory(shapes, _images(made, shapes), places, found.device)
    disk = budget.disk_mib(shapes, with_backbone=bool(lost))
    short = resources.judge(found, memory, disk)
    made.findings += [*lost, *short]
    if precision.of(recipe.precision, found.device) == precision.FLOAT32 != recipe.precision:
        made.findings.append(finding.make("bfloat16-slow", precision.words(recipe.precision, found.device)))
    made.facts["machine"] = {
        "device": found.device,
        "device_name": found.device_name,
        "precision": precision.words(recipe.precision, found.device),
        "memory_mib": {"needed": round(memory.total, 1), "available": round(found.memory, 1)},
        "gpu_memory_mib": None if found.gpu_memory is None else {"available": round(found.gpu_memory, 1)},
        "disk_mib": {"needed": round(disk, 1), "available": round(found.disk, 1)},
    }
    _try(made, recipe, found.device, blocked=bool(wrong or lost) or any(one.severity == "blocker" for one in short))


def _images(made: Checked, model: adapted_model.AdaptedModel) -> list[budget.Images]:
    """The samples by size and colour; those that were not looked at are taken to be like the others."""
    from fedvfm.data import transforms
    from fedvfm.model import memory as budget

    if made.seen is None:
        return []
    contract, rows, number_of = model.recipe.data, made.seen.found.rows, made.seen.split_of
    view = math.prod(contract.patch_size)
    counts: Counter[tuple[tuple[int, ...], tuple[float, ...] | None, bool, bool]] = Counter()
    samples_of, whole = made.seen.samples, contract.depth > 0
    if whole:  # a row is a slice, and what is prepared is its volume
        rows = list({row.number: row for row in rows}.values())
    for row in rows:
        size: tuple[int, ...] = row.size
        spacing: tuple[float, ...] | None = None
        if whole:
            slices = samples_of[row.number - 1].images
            size, part = (len(slices), *row.size), slices[0].part
            spacing = None if part is None or row.spacing is None else (part.step, *row.spacing)
        counts[(size, spacing, row.colour and not contract.grey, number_of.get(row.number) == "train")] += 1
    found = []
    for (truth, spacing, colour, trained), seen in counts.items():
        prepared = transforms.size_of(truth, spacing, contract, model.backbone.patch)
        a_pixel = 13 if colour else 5
        nbytes = a_pixel * math.prod(prepared) + math.prod(truth)
        count = round(seen * len(bags.read_of(samples_of)) / len(rows))
        found.append(budget.Images(prepared, nbytes, a_pixel * view, count * trained, count * (not trained)))
    return found


def _try(made: Checked, recipe: schema.Recipe, device: str, *, blocked: bool) -> None:
    """The training step, unless it is known to fail."""
    from fedvfm.client.readiness import step

    usable = _usable(made)
    if blocked or made.seen is None or made.source is None or not made.fits or not usable["train"]:
        made.findings.append(finding.make("step-skipped", "a blocker stands in the way of a training step"))
        return
    counts = {name: len(members) for name, members in made.seen.splits.items()}
    timing, found, text = step.measure(recipe, made.own.site, made.source, usable, counts, device)
    made.findings += found
    if text:
        made.told.append((0, "step-failed", text))
    made.facts["training_step"] = None if timing is None else timing.as_json()


def _usable(made: Checked) -> Mapping[str, list[samples.Sample]]:
    """Samples by split that were read."""
    if made.seen is None:
        return {}
    read, lost = ({row.number for row in rows} for rows in (made.seen.found.rows, made.seen.found.failures))
    bare = {number for number, sample in enumerate(made.seen.samples, 1) if sample.without_image}
    whole = sorted((read | bare) - lost)
    return {
        name: [made.seen.samples[number - 1] for number in whole if made.seen.split_of.get(number) == name]
        for name in splitting.SPLITS
    }
