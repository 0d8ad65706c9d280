"""What a reader must know before the figures: answers that do not depend on the image, tests that say little.

Each finding has a stable code. Those that turn a good figure into nothing are headlines: they stand on top of a report
and in the terminal. Codes:

* ``constant-answer``: one class for all test images of a site, or an empty (or full) mask for all.
* ``one-class-tested``: a site's test images are of one class; balanced accuracy is then that class's recall alone.
* ``class-untested``: a site has no test image of some class; its mean is over the others.
* ``class-never-answered``: a class has test images and was never answered.
* ``few-of-a-class``: under five test units of a class; its recall moves in steps of a fifth or more.
* ``few-units``: under ten independent test units; nothing can be told of the site.
* ``empty-truths``: test images without foreground, on which an empty mask scores 1.
* ``not-above-chance``: the mean over sites is not shown to be above what no look at the image reaches.
* ``baseline-ahead``: an arm that is no federation of adapters scores as high or higher.
* ``metric-missing``: a metric has no value at some sites, as AUROC where one class is tested.
* ``unlike-classes``: sites are scored on unlike classes, each on those it labels.
* ``at-chance``: a real site's score is exactly that of one answer for all (its answers are not known here).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedvfm.report import answers, bootstrap, scores

CONSTANT, ONE_CLASS, UNTESTED, NEVER = "constant-answer", "one-class-tested", "class-untested", "class-never-answered"
FEW_OF_CLASS, FEW_UNITS, EMPTY_TRUTHS = "few-of-a-class", "few-units", "empty-truths"
CHANCE, BASELINE, MISSING, AT_CHANCE = "not-above-chance", "baseline-ahead", "metric-missing", "at-chance"
UNLIKE, WITHOUT_LABELS = "unlike-classes", "without-labels"

HEADLINES = (CONSTANT, ONE_CLASS, CHANCE, BASELINE, AT_CHANCE, UNLIKE, WITHOUT_LABELS)
FEDERATED = "federated"
REFERENCES = ("majority", "zero-shot", "classical", "head-only", "unet", "image-alone", "table-alone")
LEAST_OF_CLASS = 5
SHOWN = 5
EXACT = 1e-9
ALIKE = 1e-3
"""Spread of answers over that of the truths, up to which the answers count as one."""

Table = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know.

    Attributes:
        code: stable, see the module.
        arm: whose results it is about.
        sites: where; empty where it is about the mean over sites.
        text: one sentence.
    """

    code: str
    arm: str
    sites: tuple[str, ...]
    text: str

    @property
    def headline(self) -> bool:
        """Whether it must be read before any figure of the federation."""
        return self.code in HEADLINES and self.arm == FEDERATED

    def row(self) -> dict[str, Any]:
        """As summary.json states it."""
        return {
            "code": self.code,
            "arm": self.arm,
            "sites": list(self.sites),
            "headline": self.headline,
            "text": self.text,
        }


def of_samples(
    arm: str, tables: Mapping[str, Table], class_names: Sequence[str], units: Mapping[str, Sequence[Any]]
) -> list[Finding]:
    """What the values of single test samples show.

    Args:
        arm: its name.
        tables: site -> the columns of a metric set's ``per_sample()``.
        class_names: by class number.
        units: site -> the unit (patient, else sample) of every row.
    """
    own = answers.by_site(tables, class_names)
    findings = [
        *_of_answers(arm, own),
        *_of_classes(arm, tables, class_names, units),
        *_of_masks(arm, tables),
        *_of_boxes(arm, tables),
        *_of_columns(arm, tables, class_names),
    ]
    few = {site: len(set(rows)) for site, rows in units.items() if len(set(rows)) < bootstrap.LEAST_UNITS}
    if few and arm == FEDERATED:
        text = f"under {bootstrap.LEAST_UNITS} independent test units at {_named(few)}: nothing can be told of a site"
        findings.append(Finding(FEW_UNITS, arm, tuple(few), text))
    return findings


def of_macro(arm: str, own: Mapping[str, answers.Answers], macro: float, low: float | None) -> list[Finding]:
    """Whether a classifier's mean over sites is shown to be above chance.

    Args:
        arm: its name.
        own: its answers, by site.
        macro: its balanced accuracy, mean over sites.
        low: lower bound of the interval, None where there is none.
    """
    if not own or all(site.constant for site in own.values()):
        return []  # a constant answer is told as that
    chance = float(np.mean([site.chance for site in own.values()]))
    if (macro if low is None else low) > chance + EXACT:
        return []
    bound = "" if low is None else f", lower bound {low:.3f}"
    text = (
        f"the mean balanced accuracy of {macro:.3f}{bound} is not shown to be above chance level, which is {chance:.3f}"
    )
    return [Finding(CHANCE, arm, (), text)]


def of_references(macros: Mapping[str, float | None]) -> list[Finding]:
    """Arms without a federation of adapters that reach as much.

    Args:
        macros: arm -> mean over sites of the primary metric.
    """
    own = macros.get(FEDERATED)
    ahead = {arm: value for arm in REFERENCES if (value := macros.get(arm)) is not None and own is not None}
    ahead = {arm: value for arm, value in ahead.items() if own is not None and value >= own}
    if not ahead or own is None:
        return []
    named = ", ".join(f"'{arm}' reaches {value:.3f}" for arm, value in ahead.items())
    return [
        Finding(BASELINE, FEDERATED, (), f"a simple baseline does as well: {named}, the federated adapter {own:.3f}")
    ]


def of_values(arm: str, sites: Mapping[str, Mapping[str, float]], class_names: Sequence[str]) -> list[Finding]:
    """What the values of sites show, where single samples are not known.

    Args:
        arm: its name.
        sites: site -> metric -> value, with ``num_examples``.
        class_names: by class number.
    """
    findings = missing(arm, sites)
    chances = [1 / number for number in range(2, len(class_names) + 1)]
    at = [site for site, row in sites.items() if _is_any(row.get("balanced_accuracy"), chances)]
    if at:
        text = (
            f"balanced accuracy is exactly chance level at {_some(at)}, as where one class is answered for all test "
            "images; ask the site what was answered"
        )
        findings.append(Finding(AT_CHANCE, arm, tuple(at), text))
    empty = [site for site, row in sites.items() if _is_any(row.get("dice"), [0.0])]
    if empty:
        text = f"Dice is exactly 0 at {_some(empty)}, as where all masks are empty; ask the site what was predicted"
        findings.append(Finding(AT_CHANCE, arm, tuple(empty), text))
    few = {site: int(row.get("num_examples", 0)) for site, row in sites.items()}
    few = {site: count for site, count in few.items() if count < bootstrap.LEAST_UNITS}
    if few:
        text = f"under {bootstrap.LEAST_UNITS} test samples at {_named(few)}: nothing can be told of a site"
        findings.append(Finding(FEW_UNITS, arm, tuple(few), text))
    return findings


def of_labels(arm: str, labelled: Mapping[str, Sequence[str]]) -> list[Finding]:
    """Sites whose figures are over unlike classes.

    Args:
        arm: its name.
        labelled: site -> the classes that it labels and is scored on, empty for all.
    """
    if len({frozenset(names) for names in labelled.values()}) < 2:
        return []
    some = {site: names for site, names in labelled.items() if names}
    each = "; ".join(f"{site}: {', '.join(names)}" for site, names in _first(some))
    text = (
        f"sites are scored on unlike classes, each on those it labels ({each}{_rest(some)}): the mean over sites and "
        "the worst site compare unlike tasks; read the scores of each class"
    )
    return [Finding(UNLIKE, arm, tuple(some), text)]


def of_unlabelled(arm: str, sites: Sequence[str]) -> list[Finding]:
    """Sites that trained without labels, so that nothing is known of how the adapter does there.

    Args:
        arm: its name.
        sites: their names.
    """
    if not sites:
        return []
    text = (
        f"{_some(list(sites))} trained without labels: no score comes from there, and whether the adapter is right on "
        "these images nobody knows"
    )
    return [Finding(WITHOUT_LABELS, arm, tuple(sites), text)]


def missing(arm: str, sites: Mapping[str, Mapping[str, float]]) -> list[Finding]:
    """Metrics that some sites have and others not."""
    every = dict.fromkeys(name for row in sites.values() for name in row)
    findings = []
    for name in every:
        without = [site for site, row in sites.items() if name not in row]
        if without:
            text = (
                f"{scores.metric_name(name)} has no value at {_some(without)}; a mean over the others is of fewer sites"
            )
            findings.append(Finding(MISSING, arm, tuple(without), text))
    return findings


def _of_answers(arm: str, own: Mapping[str, answers.Answers]) -> Iterator[Finding]:
    constant = {site: given.commonest[0] for site, given in own.items() if given.constant and given.chance < 1}
    if constant:
        each = "; ".join(f"{site}: '{answer}' for all {own[site].tested}" for site, answer in _first(constant))
        text = f"one answer for every test image at {_count(constant, own)} ({each}{_rest(constant)}): chance level"
        yield Finding(CONSTANT, arm, tuple(constant), text)
    single = [site for site, given in own.items() if given.chance == 1]
    if single:
        text = (
            f"the test images are of one class at {_some(single)}: balanced accuracy is the recall of that class alone"
        )
        yield Finding(ONE_CLASS, arm, tuple(single), text)
    never = {site: given.never for site, given in own.items() if given.never and not given.constant}
    if never:
        each = "; ".join(f"{site}: {', '.join(classes)}" for site, classes in _first(never))
        yield Finding(
            NEVER, arm, tuple(never), f"classes with test images that were never answered: {each}{_rest(never)}"
        )


def _of_classes(
    arm: str, tables: Mapping[str, Table], class_names: Sequence[str], units: Mapping[str, Sequence[Any]]
) -> Iterator[Finding]:
    """Of how many units each class's recall is; the same for every arm, so told of the federated one."""
    if arm != FEDERATED:
        return
    counts = {
        site: _units_of_classes(table, class_names, units[site]) for site, table in tables.items() if "label" in table
    }
    rows: list[tuple[str, Callable[[int], bool], str]] = [
        (UNTESTED, lambda count: count == 0, "no test image of some classes, so the mean is over the others"),
        (
            FEW_OF_CLASS,
            lambda count: 0 < count < LEAST_OF_CLASS,
            f"under {LEAST_OF_CLASS} test units of a class, whose recall then moves in large steps",
        ),
    ]
    for code, is_so, text in rows:
        where = {site: [name for name, count in own.items() if is_so(count)] for site, own in counts.items()}
        where = {site: names for site, names in where.items() if names}
        if where:
            each = "; ".join(f"{site}: {', '.join(names)}" for site, names in _first(where))
            yield Finding(code, arm, tuple(where), f"{text} ({each}{_rest(where)})")


def _units_of_classes(table: Table, class_names: Sequence[str], units: Sequence[Any]) -> dict[str, int]:
    labels = np.asarray(table["label"], dtype=np.int64)
    return {
        name: len({unit for unit, label in zip(units, labels, strict=True) if label == at})
        for at, name in enumerate(class_names)
    }


def _of_masks(arm: str, tables: Mapping[str, Table]) -> Iterator[Finding]:
    own = {site: table for site, table in tables.items() if "foreground" in table}
    kinds = {site: _all_alike(table["foreground"], table["true_foreground"]) for site, table in own.items()}
    for kind in ("empty", "full"):
        alike = [site for site, answer in kinds.items() if answer == kind]
        if alike:
            text = f"the predicted mask is {kind} for every test image at {_count(alike, own)} ({_some(alike)})"
            yield Finding(CONSTANT, arm, tuple(alike), text)
    if arm == FEDERATED and (blank := _blank(own, "true_foreground")):
        each = "; ".join(_without_blank(site, own[site], count) for site, count in _first(blank))
        text = f"test images without foreground, on which an empty mask scores Dice 1: {each}{_rest(blank)}"
        yield Finding(EMPTY_TRUTHS, arm, tuple(blank), text)


def _blank(tables: Mapping[str, Table], column: str) -> dict[str, int]:
    """At how many images of each site nothing was to be found; sites without such an image are left out."""
    counts = {site: sum(value == 0 for value in table[column]) for site, table in tables.items()}
    return {site: count for site, count in counts.items() if count}


def _of_boxes(arm: str, tables: Mapping[str, Table]) -> Iterator[Finding]:
    """Sites where nothing was detected in any image, and images without an object."""
    own = {site: table for site, table in tables.items() if "false_alarms" in table}
    none = [
        site
        for site, table in own.items()
        if len(table["hits"]) > 1
        and not any(table["hits"])
        and not any(table["false_alarms"])
        and any(table["objects"])
    ]
    if none:
        text = f"no box is sure enough to be delivered in any test image at {_count(none, own)} ({_some(none)})"
        yield Finding(CONSTANT, arm, tuple(none), text)
    if arm == FEDERATED and (blank := _blank(own, "objects")):
        each = "; ".join(_without_blank(site, own[site], count, "f1", "objects") for site, count in _first(blank))
        text = f"test images without an object, on which no box scores F1 1: {each}{_rest(blank)}"
        yield Finding(EMPTY_TRUTHS, arm, tuple(blank), text)


def _of_columns(arm: str, tables: Mapping[str, Table], class_names: Sequence[str]) -> Iterator[Finding]:
    """Columns of which all answers are alike though the truths are not: whoever looks at no image does as well."""
    yield from _of_prognosis(arm, {site: table for site, table in tables.items() if "event" in table})
    own = {site: table for site, table in tables.items() if "known_0" in table}
    for at, name in enumerate(class_names if own else ()):
        alike = []
        for site, table in own.items():
            known = [number for number, is_known in enumerate(table[f"known_{at}"]) if is_known]
            truths, answered = (np.array([table[f"{what}_{at}"][i] for i in known]) for what in ("truth", "answer"))
            if len(known) > 1 and np.ptp(truths) > 0 and np.ptp(answered) <= ALIKE * np.ptp(truths):
                alike.append(site)
        if alike:
            text = f"one answer for every test sample in {name} at {_count(alike, own)} ({_some(alike)})"
            yield Finding(CONSTANT, arm, tuple(alike), text)


def _of_prognosis(arm: str, own: Mapping[str, Table]) -> Iterator[Finding]:
    """Predicted survival or risk that does not tell cases apart, and sites where hardly an event was tested."""
    columns = {
        site: [np.array(table[name]) for name in table if name.startswith(("survival_", "log_risk"))]
        for site, table in own.items()
    }
    alike = [site for site, each in columns.items() if len(each[0]) > 1 and max(map(np.ptp, each)) <= ALIKE]
    if alike:
        text = f"one prognosis for every test case at {_count(alike, own)} ({_some(alike)})"
        yield Finding(CONSTANT, arm, tuple(alike), text)
    few = {site: int(sum(table["event"])) for site, table in own.items() if sum(table["event"]) < LEAST_OF_CLASS}
    if few and arm == FEDERATED:
        text = (
            f"under {LEAST_OF_CLASS} test cases with an event, the rest censored, at {_named(few)}: ranks of few cases"
        )
        yield Finding(FEW_OF_CLASS, arm, tuple(few), text)


def _all_alike(predicted: Sequence[float], truth: Sequence[float]) -> str:
    """Whether all masks of several images are "empty" or "full" though the truth is not; else ""."""
    if len(predicted) < 2:
        return ""
    for share, name in ((0.0, "empty"), (1.0, "full")):
        if all(value == share for value in predicted) and any(value != share for value in truth):
            return name
    return ""


def _without_blank(site: str, table: Table, count: int, metric: str = "dice", there: str = "true_foreground") -> str:
    rest = [score for score, share in zip(table[metric], table[there], strict=True) if share > 0]
    without = f"{scores.metric_name(metric)} {np.mean(rest):.3f} without them" if rest else "there are no others"
    return f"{site} {count} of {len(table[metric])}, {without}"


def _is_any(value: float | None, targets: Sequence[float]) -> bool:
    return value is not None and any(abs(value - target) < EXACT for target in targets)


def _first(where: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list(where.items())[:SHOWN]


def _rest(where: Mapping[str, Any] | Sequence[str]) -> str:
    return f" and {len(where) - SHOWN} more" if len(where) > SHOWN else ""


def _some(sites: Sequence[str]) -> str:
    return ", ".join(sites[:SHOWN]) + _rest(sites)


def _named(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{site} ({count})" for site, count in _first(counts)) + _rest(counts)


def _count(some: Mapping[str, Any] | Sequence[str], every: Mapping[str, Any]) -> str:
    if len(some) == len(every) > 1:
        return f"all {len(every)} sites"
    return f"{len(some)} of {len(every)} sites" if len(every) > 1 else "the site"
