"""Findings about counts, patients, splits and classes; :mod:`appearance` judges images and masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fedvfm.data import defect
from fedvfm.data import sample as data
from fedvfm.data.readiness import dataset, finding, survey

FEW_TRAIN = 20
FEW_TEST = 10
FEW_PATIENTS = 5
IMBALANCE = 10.0
RARE = 1e-3
LEAKS = 0.99
"""AUROC from which on one column of the table is the answer itself."""
TELLS, FEW_CASES = 0.8, 10
"""AUROC from which on the number or the size of a case's images tells its label, and cases of a label it needs."""
MOST_SHOWN = 999_999
"""A larger value of a mask is not shown: it might be a number of a patient."""

Findings = list[finding.Finding]


def findings(seen: dataset.Looked) -> Findings:
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
        *_cases(seen),
        *_values(seen),
        *_inputs(seen),
    ]


def failures(failed: Sequence[survey.Failure]) -> Findings:
    """One finding a kind of error."""
    return [_failure(code, members) for code, members in survey.by_code(failed).items()]


def structure(codes: Sequence[defect.Kind]) -> Findings:
    """One finding a kind of fault that the source told before any pixel was read."""
    found = []
    for code in dict.fromkeys(codes):
        count = codes.count(code)
        found.append(finding.make(code, f"{code.problem}: {finding.number(count, 'fault')} in the folder", count))
    return found


def _failure(code: defect.Kind, members: Sequence[survey.Failure]) -> finding.Finding:
    problem = f"{code.problem}: {finding.number(len(members), 'sample')}"
    values = sorted({value for one in members for value in one.values if abs(value) <= MOST_SHOWN})
    if values:
        problem += f", values {', '.join(map(str, values[:8]))}"
    return finding.make(code, problem, len(members), [one.number for one in members])


def _limited(seen: dataset.Looked) -> Findings:
    if not seen.limited:
        return []
    looked_at = len({row.number for row in seen.found.rows} | {lost.number for lost in seen.found.failures})
    problem = f"{looked_at:,} of {finding.number(len(seen.samples), 'sample')} were looked at"
    return [finding.make("limited", problem, len(seen.samples) - looked_at)]


def _splits(seen: dataset.Looked) -> Findings:
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


def _patients(seen: dataset.Looked) -> Findings:
    known = seen.patients()
    found = []
    if seen.torn:
        torn = {seen.samples[number - 1].patient for number in seen.torn}
        problem = f"{finding.number(len(torn), 'patient')} with images in more than one split"
        found.append(finding.make("patient-across-splits", problem, len(torn), seen.torn))
    volumes = [number for number, one in enumerate(seen.samples, 1) if dataset.assumed(one)]
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


def _sites(seen: dataset.Looked) -> Findings:
    found = []
    sites = {one.site for one in seen.samples}
    if len(sites) > 1:
        problem = f"the data names {finding.number(len(sites), 'site')}"
        found.append(finding.make("several-sites", problem, len(sites)))
    if seen.names_shown:
        found.append(finding.make("names-shown", 'ids = "names" makes file names the ids of samples'))
    return found


def _classes(seen: dataset.Looked) -> Findings:
    counts = seen.class_counts()
    present = [at for at, count in enumerate(counts) if count]
    # Background is no class that one could miss.
    labelled = {number for sample in seen.samples for number in sample.labelled} or set(range(len(counts)))
    wanted = [at for at in range(1 if seen.segmentation else 0, len(counts)) if at in labelled]
    missing = [at for at in wanted if not counts[at]]
    found = []
    if missing and len(missing) < len(wanted):
        among = " among the samples looked at" if seen.limited or seen.segmentation else ""
        problem = f"no sample of {_named(seen, missing)}{among}"
        found.append(finding.make("class-missing", problem, len(missing)))
    if not seen.segmentation and len(present) == 1:
        found.append(finding.make("one-class", f"all samples are of {_named(seen, present)}"))
    return found + _lost(seen, [at for at in wanted if counts[at]])


def _lost(seen: dataset.Looked, wanted: Sequence[int]) -> Findings:
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


def _named(seen: dataset.Looked, numbers: Sequence[int]) -> str:
    return ", ".join(seen.classes[at] for at in numbers)


def _balance(seen: dataset.Looked) -> Findings:
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


def _cases(seen: dataset.Looked) -> Findings:
    """Whether cases have several images, and whether their number or size tells the label by itself."""
    if not any(case.images for case in seen.samples):
        return []
    shown = {number: case for number, case in enumerate(seen.samples, 1) if not case.without_image}
    if shown and all(len(case.images) == 1 for case in shown.values()):
        problem = f"each of {finding.number(len(shown), 'case')} is of one image"
        return [finding.make("cases-of-one", problem, len(shown))]
    areas: dict[int, list[int]] = {}
    for row in seen.found.rows:
        areas.setdefault(row.number, []).append(row.size[0] * row.size[1])
    facts: dict[str, dict[int, float]] = {
        "number of images": {number: len(case.images) for number, case in shown.items()},
        "size of images": {number: sum(own) / len(own) for number, own in areas.items()},
    }
    telling = []
    for what, values in facts.items():
        labels = [seen.samples[number - 1].label for number in values]
        for at, name in enumerate(seen.classes):
            area = _told([label == at for label in labels], list(values.values()))
            if area >= TELLS:
                problem = f"the {what} of a case tells whether it is of {name} (AUROC {area:.2f})"
                telling.append(finding.make("parts-tell-label", problem))
    return telling[:1] if len(seen.classes) == 2 else telling


def _values(seen: dataset.Looked) -> Findings:
    """How many samples have no value in each column of the recipe's target."""
    counts = {
        name: [number for number, sample in enumerate(seen.samples, 1) if sample.values and sample.values[at] is None]
        for at, name in enumerate(seen.classes)
    }
    missing = {name: numbers for name, numbers in counts.items() if numbers}
    if not missing:
        return []
    problem = "no value in " + ", ".join(
        f"{name} of {finding.number(len(numbers), 'sample')}" for name, numbers in missing.items()
    )
    every = sorted({number for numbers in missing.values() for number in numbers})
    return [finding.make("values-missing", problem, len(every), every)]


def _inputs(seen: dataset.Looked) -> Findings:
    """The table beside the images: missing rows, values and images, constant columns, and what is the answer itself."""
    findings = []
    if seen.not_taken:
        problem = f"{finding.number(seen.not_taken, 'case')} without an image left out"
        findings.append(finding.make("images-not-taken", problem, seen.not_taken))
    bare = [number for number, sample in enumerate(seen.samples, 1) if sample.without_image]
    if bare:
        problem = f"{len(bare):,} of {finding.number(len(seen.samples), 'sample')} without an image"
        findings.append(finding.make("images-missing", problem, len(bare), bare))
    if seen.unused_rows:
        problem = f"{finding.number(seen.unused_rows, 'row')} of the tables of nothing that is here"
        findings.append(finding.make("rows-unused", problem, seen.unused_rows))
    if seen.inputs is None:
        return findings
    without = [number for number, sample in enumerate(seen.samples, 1) if not sample.inputs]
    if without:
        problem = f"{len(without):,} of {finding.number(len(seen.samples), 'sample')} without a row of the table"
        findings.append(finding.make("rows-missing", problem, len(without), without))
    known = {name: _known(seen, at) for at, name in enumerate(seen.inputs.columns)}
    gaps = {name: len(seen.samples) - len(without) - len(values) for name, values in known.items()}
    if any(gaps.values()):
        listed = ", ".join(f"{name} of {finding.number(count, 'sample')}" for name, count in gaps.items() if count)
        findings.append(finding.make("input-missing", f"no value in {listed}", sum(gaps.values())))
    constant = [name for name, values in known.items() if len(set(values.values())) < 2]
    if constant:
        problem = f"no two values differ in {', '.join(constant)}"
        findings.append(finding.make("input-constant", problem, len(constant)))
    every = range(1, len(seen.samples) + 1)
    telling = list[tuple[str, str, Mapping[int, float]]]()
    # The head sees whether a value is missing: a measurement of the sick alone is the answer too. So is an image.
    gone = {name: set(every) - values.keys() for name, values in known.items()} | {"the image": set(bare)}
    for name, numbers in gone.items():
        telling += [(f"column {name} tells", name, known[name])] if name in known else []
        telling.append((f"whether {name} is missing tells", "", {at: float(at in numbers) for at in every}))
    for what, column, values in telling:
        area, answer = max(_leaks(seen, column, values), default=(0.0, ""))
        if area >= LEAKS:
            problem = f"{what} {answer} by itself (AUROC {area:.3f})"
            findings.append(finding.make("input-tells-label", problem))
    return findings


def _known(seen: dataset.Looked, column: int) -> dict[int, float]:
    """Values of a column of the inputs by the number of their samples, those that are missing left out."""
    rows = ((number, sample.inputs) for number, sample in enumerate(seen.samples, 1))
    return {number: value for number, row in rows if row and (value := row[column]) is not None}


def _leaks(seen: dataset.Looked, column: str, values: Mapping[int, float]) -> Iterator[tuple[float, str]]:
    """AUROC of numbers, or of each word of a column of words, for each answer that is yes or no."""
    words = len(seen.inputs.categories.get(column, ())) if seen.inputs is not None else 0
    views = [[float(value == word) for value in values.values()] for word in range(words)] or [list(values.values())]
    for at, name in enumerate(seen.classes):
        answers = [_answer(seen.samples[number - 1], at) for number in values]
        some = [(answer > 0, number) for number, answer in enumerate(answers) if answer is not None]
        if set(answers) <= {0.0, 1.0, None}:
            for view in views:
                yield _told([truth for truth, _ in some], [view[number] for _, number in some]), name


def _answer(sample: data.Sample, at: int) -> float | None:
    """Whether a sample is of a class (1, else 0), or its value of a column; None where nobody says."""
    if sample.values:
        return sample.values[at]
    return None if sample.label is None else float(sample.label == at)


def _told(positive: Sequence[bool], values: Sequence[float]) -> float:
    """AUROC of a number for a label in the better direction; 0 where there are too few cases to say."""
    truth, numbers = np.asarray(positive, dtype=np.bool_), np.asarray(values, dtype=np.float64)
    with_label, others = numbers[truth], numbers[~truth]
    if min(len(with_label), len(others)) < FEW_CASES:
        return 0.0
    above = (with_label[:, None] > others).mean() + 0.5 * (with_label[:, None] == others).mean()
    return float(max(above, 1 - above))
