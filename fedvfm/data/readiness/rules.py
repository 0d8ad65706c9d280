"""Findings about counts, patients, splits and classes; :mod:`appearance` judges images and masks."""

from __future__ import annotations

from collections.abc import Sequence

from fedvfm.data.readiness import finding, looked, survey

FEW_TRAIN = 20
FEW_TEST = 10
FEW_PATIENTS = 5
IMBALANCE = 10.0
RARE = 1e-3

Findings = list[finding.Finding]


def findings(seen: looked.Looked) -> Findings:
    """All findings of this module."""
    if not seen.samples:
        return [finding.make("no-samples", "the data has no samples")]
    return [
        *failures(seen.found.failures),
        *_limited(seen),
        *_splits(seen),
        *_patients(seen),
        *_sites(seen),
        *_classes(seen),
        *_balance(seen),
    ]


def failures(failed: Sequence[survey.Failure]) -> Findings:
    """One finding a kind of error."""
    return [_failure(code, members) for code, members in survey.by_code(failed).items()]


def structure(codes: Sequence[str]) -> Findings:
    """One finding a kind of fault that the source told before any pixel was read."""
    found = []
    for code in dict.fromkeys(codes):
        count = codes.count(code)
        found.append(finding.make(code, f"{PROBLEMS[code]}: {finding.number(count, 'fault')} in the folder", count))
    return found


PROBLEMS = {
    "unreadable": "damaged, cut short or unknown content",
    "not-found": "files that do not exist",
    "too-small": "images of fewer than 2 x 2 pixels",
    "too-large": "files that unpack to more than is read",
    "several-pages": "files with several pages",
    "value-range": "values outside the range of their kind of file",
    "not-finite": "values that are no finite numbers",
    "mask-missing": "images without a mask",
    "image-missing": "masks without an image",
    "label-missing": "images without a label",
    "mask-size": "mask and image of different size",
    "mask-geometry": "mask and image on different grids",
    "mask-value": "mask values that are no class",
    "mask-colour": "masks in colour",
    "channels": "other channels than the model takes",
    "channels-missing": "cases whose channel files are not all there",
    "four-axes": "volumes with more than three axes",
    "no-geometry": "volumes that do not say how they lie",
    "series-mixed": "several series in one study",
    "slices-missing": "series with missing, doubled or unevenly spaced slices",
    "grey-units": "grey values that are not scaled alike, or not in Hounsfield units",
    "frames-unplaced": "frames that do not say where they lie",
    "pixel-size": "series without the size of a pixel",
    "link": "links that lead nowhere, to a folder or out of the data",
    "modality": "images of another modality",
    "compressed": "packed in a way that cannot be read here",
    "ending": "files and folders that are not read",
    "name-twice": "two files of one name",
    "class-unknown": "folders or labels that stand for no class",
    "volume-needed": "pictures where the recipe needs volumes",
    "whole-slide": "whole-slide images",
    "mask-overlap": "segments that overlap",
    "class-empty": "class folders without images",
    "table": "the table does not fit the files",
    "dataset-json": "dataset.json does not say what it must",
    "options": "the folder or its settings do not fit",
    "structure": "other faults",
    "reader-failed": "the reader broke",
    "no-samples": "no samples",
    "patient-across-splits": "patients in more than one split",
}
"""What a kind of fault is, in words that name no file."""


def _failure(code: str, members: Sequence[survey.Failure]) -> finding.Finding:
    problem = f"{PROBLEMS[code]}: {finding.number(len(members), 'sample')}"
    values = sorted({value for one in members if (value := _value(code, one)) is not None})
    if values:
        problem += f", values {', '.join(map(str, values[:8]))}"
    return finding.make(code, problem, len(members), [one.number for one in members])


def _value(code: str, one: survey.Failure) -> int | None:
    from fedvfm.data.readiness import faults

    return faults.value(one.message) if code == "mask-value" else None


def _limited(seen: looked.Looked) -> Findings:
    if not seen.limited:
        return []
    looked_at = len(seen.found.rows) + len(seen.found.failures)
    problem = f"{looked_at:,} of {finding.number(len(seen.samples), 'sample')} were looked at"
    return [finding.make("limited", problem, len(seen.samples) - looked_at)]


def _splits(seen: looked.Looked) -> Findings:
    sizes = {name: len(seen.splits.get(name, ())) for name in ("train", "val", "test")}
    shown = f"{sizes['train']} train, {sizes['val']} val, {sizes['test']} test"
    found = []
    for name, noun, few in (("train", "training", FEW_TRAIN), ("test", "test", FEW_TEST)):
        if not sizes[name]:
            found.append(finding.make(f"no-{noun}-sample", f"no {noun} sample ({shown}); patients stay together", 0))
        elif sizes[name] < few:
            problem = f"{finding.number(sizes[name], f'{noun} sample')} ({shown}); fewer than {few}"
            found.append(finding.make(f"few-{noun}-samples", problem, sizes[name]))
    if not sizes["val"]:
        found.append(finding.make("no-validation-sample", f"no validation sample ({shown})", 0))
    return found


def _patients(seen: looked.Looked) -> Findings:
    known = seen.patients()
    found = []
    if seen.torn:
        torn = {seen.samples[number - 1].patient for number in seen.torn}
        problem = f"{finding.number(len(torn), 'patient')} with images in more than one split"
        found.append(finding.make("patient-across-splits", problem, len(torn), seen.torn))
    volumes = [number for number, one in enumerate(seen.samples, 1) if looked.assumed(one)]
    unknown = [number for number, one in enumerate(seen.samples, 1) if one.patient is None]
    units = {seen.samples[number - 1].unit for number in (*volumes, *unknown)}
    if len(known) + len(units) > 1 and units:
        problem = f"{finding.number(len(volumes) + len(unknown), 'sample')} of {len(seen.samples):,} without a patient"
        problem += "; each volume was taken for a patient of its own" if volumes else ""
        found.append(finding.make("patients-unknown", problem, len(volumes) + len(unknown)))
    most = len(known) + len(units)
    if most < FEW_PATIENTS and (not unknown or len(seen.samples) == 1):
        problem = f"{'at most ' if units else ''}{finding.number(most, 'patient')}; fewer than {FEW_PATIENTS}"
        found.append(finding.make("few-patients", problem, most))
    return found


def _sites(seen: looked.Looked) -> Findings:
    found = []
    sites = {one.site for one in seen.samples}
    if len(sites) > 1:
        problem = f"the data names {finding.number(len(sites), 'site')}"
        found.append(finding.make("several-sites", problem, len(sites)))
    if seen.names_shown:
        found.append(finding.make("names-shown", 'ids = "names" makes file names the ids of samples'))
    return found


def _classes(seen: looked.Looked) -> Findings:
    counts = seen.class_counts()
    present = [at for at, count in enumerate(counts) if count]
    # Background is no class that one could miss.
    wanted = range(1 if seen.segmentation else 0, len(counts))
    missing = [at for at in wanted if not counts[at]]
    found = []
    if missing and len(missing) < len(wanted):
        among = " among the samples looked at" if seen.limited or seen.segmentation else ""
        problem = f"no sample of {_named(seen, missing)}{among}"
        found.append(finding.make("class-missing", problem, len(missing)))
    if not seen.segmentation and len(present) == 1:
        found.append(finding.make("one-class", f"all samples are of {_named(seen, present)}"))
    return found + _lost(seen, [at for at in wanted if counts[at]])


def _lost(seen: looked.Looked, wanted: Sequence[int]) -> Findings:
    """Classes that are there, but not to train on or not to test."""
    lost = {
        split: [at for at in wanted if at not in seen.classes_in(split)]
        for split in ("train", "test")
        if seen.splits.get(split)
    }
    if not any(lost.values()):
        return []
    among = " looked at" if seen.limited else ""
    told = [f"no {split} sample{among} of {_named(seen, members)}" for split, members in lost.items() if members]
    return [finding.make("class-missing-in-split", "; ".join(told), len(set().union(*lost.values())))]


def _named(seen: looked.Looked, numbers: Sequence[int]) -> str:
    return ", ".join(seen.classes[at] for at in numbers)


def _balance(seen: looked.Looked) -> Findings:
    if not seen.segmentation:
        counts = {at: count for at, count in enumerate(seen.class_counts()) if count}
        if len(counts) < 2 or max(counts.values()) < IMBALANCE * min(counts.values()):
            return []
        least, most = min(counts, key=lambda at: counts[at]), max(counts, key=lambda at: counts[at])
        problem = f"{counts[most]:,} samples of {seen.classes[most]}, {counts[least]:,} of {seen.classes[least]}"
        return [finding.make("imbalance", problem, counts[least])]
    pixels = seen.found.class_pixels
    total = int(pixels.sum())
    rare = [at for at in range(1, len(pixels)) if 0 < int(pixels[at]) < RARE * total]
    if not rare:
        return []
    shares = ", ".join(f"{seen.classes[at]} {int(pixels[at]) / total:.2g}" for at in rare)
    return [finding.make("foreground-rare", f"share of all pixels: {shares}", len(rare))]
