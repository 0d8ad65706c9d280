"""Finished runs side by side: runs of one experiment that differ in their seed alone are one group.

Intervals are those of :mod:`fedvfm.simulation.results.statistics`, over samples and seeds. The report of a single run
takes its per-sample values from here too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedvfm import errors, seeding
from fedvfm.data.partition import virtual_hospitals
from fedvfm.report import bootstrap
from fedvfm.simulation import run_folder, settings
from fedvfm.simulation.results import statistics
from fedvfm.storage import hash_chain, storage

FEDERATED, LOCAL, ABROAD = "federated", "local-only", "local-only abroad"
GROUPS = "groups.json"
SETTINGS_SHOWN = 8

Patients = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        folder: where it lies.
        summary: its summary.json.
        experiment: its experiment.json.
    """

    folder: run_folder.RunFolder
    summary: Mapping[str, Any]
    experiment: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.summary["seed"])

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting that can change the federated arm, by its dotted path; see :mod:`settings`."""
        return settings.of(self.experiment)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, in order of seeds."""

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """The run with the smallest seed."""
        return self.runs[0]


def compare(paths: Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
    """Load and set side by side: what ``fedvfm compare --json`` prints.

    Raises:
        CheckpointError: if a path is no finished run, nor a parent of such.
    """
    return table(load(paths))


def load(paths: Sequence[str | os.PathLike[str]]) -> list[Group]:
    """Finished runs in groups, in the order given. A folder with ``seed-N`` folders stands for all of them.

    Raises:
        CheckpointError: if a path is no finished run, nor a parent of such.
    """
    if not paths:
        raise errors.CheckpointError("no run to compare. Give the folder of at least one finished run")
    grouped: list[list[Run]] = []
    seen: set[Path] = set()
    for path in paths:
        fresh = [found for found in _expand(Path(path)) if found.resolve() not in seen]
        seen |= {found.resolve() for found in fresh}
        for alike in _alike([_read(found) for found in fresh]):
            _join(grouped, alike)
    return [Group(label, tuple(sorted(runs, key=lambda run: run.seed))) for label, runs in _labelled(grouped)]


def _alike(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of one path, those of one experiment together."""
    grouped: list[list[Run]] = []
    for run in runs:
        _join(grouped, [run])
    return grouped


def _join(grouped: list[list[Run]], alike: list[Run]) -> None:
    """Add runs to the first group of the same experiment that has none of their seeds, or as a new group."""
    seeds = {run.seed for run in alike}
    for members in grouped:
        if _key(members[0]) == _key(alike[0]) and seeds.isdisjoint(run.seed for run in members):
            members.extend(alike)
            return
    grouped.append(alike)


def _key(run: Run) -> tuple[str, dict[str, Any]]:
    return str(run.summary["experiment"]), run.settings


def _expand(path: Path) -> list[Path]:
    """The run folders a path stands for."""
    if (path / "experiment.json").exists() or not path.is_dir():
        return [path]
    children = [child for child in path.glob("seed-*") if child.is_dir()]
    return sorted(children, key=lambda child: (len(child.name), child.name)) or [path]


def _read(path: Path) -> Run:
    run = run_folder.RunFolder(path)
    if not path.is_dir():
        raise errors.CheckpointError(f"{path}: no such folder. Give the folder of a finished run (see --output)")
    experiment = run.read_experiment()
    unfinished = f"{path} is not finished: it has no readable summary.json. Finish it: fedvfm simulate --resume {path}"
    summary = run_folder.read_json(path / "summary.json", unfinished)
    if not {"experiment", "seed", "arms", "bytes", "primary"} <= summary.keys():
        raise errors.CheckpointError(unfinished)
    return Run(run, summary, experiment)


def _labelled(grouped: Sequence[list[Run]]) -> list[tuple[str, list[Run]]]:
    """Experiment names; where two groups share one, the folder's name tells them apart."""
    names = [str(runs[0].summary["experiment"]) for runs in grouped]
    return [
        (name if names.count(name) == 1 else f"{name} ({_folder_name(runs)})", runs)
        for name, runs in zip(names, grouped, strict=True)
    ]


def _folder_name(runs: Sequence[Run]) -> str:
    path = runs[0].folder.path.resolve()
    return path.parent.name if path.name.startswith("seed-") else path.name


# -- per-sample values -------------------------------------------------------------------------------------------------


def write_groups(run: run_folder.RunFolder, hospitals: Sequence[virtual_hospitals.Hospital]) -> None:
    """Keep which test samples belong to one patient, so that intervals can draw whole patients later."""
    found = patients_of(hospitals)
    if found is not None:
        storage.write_text(run.path / GROUPS, hash_chain.canonical(found) + "\n")


def patients_of(hospitals: Sequence[virtual_hospitals.Hospital]) -> dict[str, dict[str, str]] | None:
    """Test sample -> patient, by site; None where no test sample has a patient.

    Patients as digests, the same in every run: another seed may test others, and a number in the order of one run's
    patients would make two of them one.
    """
    tested = {hospital.name: hospital.test for hospital in hospitals}
    if not any(one.patient is not None for members in tested.values() for one in members):
        return None
    found: dict[str, dict[str, str]] = {}
    for site, members in tested.items():
        keys = [(one.patient is not None, one.patient or one.id) for one in members]
        found[site] = {one.unit: _digest(*key) for one, key in zip(members, keys, strict=True)}
    return found


def _digest(known: bool, name: str) -> str:
    return hashlib.sha256(f"{known}:{name}".encode()).hexdigest()[:16]


def scores(
    run: run_folder.RunFolder, made: Mapping[str, Any], patients: Patients | None = None
) -> dict[str, statistics.Scores]:
    """Per-sample test values of every arm of a run.

    ``local-only`` is every site's own model at home, ``local-only abroad`` the mean over the models of the other sites.

    Raises:
        CheckpointError: if an arm's evaluation is damaged.
    """
    if patients is None and (run.path / GROUPS).exists():
        patients = run_folder.read_json(
            run.path / GROUPS, f"{run.path / GROUPS} is damaged; remove it to go without it"
        )
    found = {}
    for arm in made["arms"]:
        tables = samples_of(run, arm)
        if tables:
            found[arm] = _scores(arm, made, tables, patients)
        if arm == LOCAL:
            away = _abroad(run, found.get(arm), made, patients)
            found |= {ABROAD: away} if away else {}
    return found


def _scores(
    arm: str, made: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]], patients: Patients | None
) -> statistics.Scores:
    columns = {
        site: (rows["id"], {name: values for name, values in rows.items() if name != "id"})
        for site, rows in tables.items()
    }
    return statistics.Scores.from_tables(arm, int(made["seed"]), columns, column=made["primary"], patients=patients)


def _evaluations(run: run_folder.RunFolder, arm: str) -> dict[str, dict[str, Any]]:
    """An arm's evaluations by the site each is named after; one that covers all sites stands under ''."""
    whole = run.evaluation(arm)
    if whole is not None:
        return {"": whole}
    parts = sorted(path.parent.name for path in run.arm(arm).glob("*/evaluation.json"))
    return {site: found for site in parts if (found := run.evaluation(f"{arm}/{site}")) is not None}


def samples_of(run: run_folder.RunFolder, arm: str) -> dict[str, Mapping[str, Any]]:
    """Site -> columns of its test samples. Where an arm has a part a site, that site's own part speaks for it."""
    found: dict[str, Mapping[str, Any]] = {}
    for site, evaluation in _evaluations(run, arm).items():
        samples = {at: rows for at, rows in evaluation["last"].get("samples", {}).items() if rows.get("id")}
        found |= {site: samples[site]} if site in samples else samples if not site else {}
    return found


def _abroad(
    run: run_folder.RunFolder, home: statistics.Scores | None, made: Mapping[str, Any], patients: Patients | None
) -> statistics.Scores | None:
    """Every sample's mean over the local-only models that were not trained at its site."""
    if home is None:
        return None
    values: dict[str, dict[str, list[float]]] = {}
    labels: dict[str, Mapping[str, int]] = {}  # not those at home: a site without labels has no model of its own
    for trained_at, evaluation in _evaluations(run, LOCAL).items():
        others = {site: rows for site, rows in evaluation["last"].get("samples", {}).items() if site != trained_at}
        scored = _scores(LOCAL, made, others, patients) if others else None
        labels |= {} if scored is None else scored.labels or {}
        for site, rows in ({} if scored is None else scored.sites).items():
            for sample, value in rows.items():
                values.setdefault(site, {}).setdefault(sample, []).append(value)
    means = {site: {at: math.fsum(found) / len(found) for at, found in rows.items()} for site, rows in values.items()}
    return statistics.Scores(ABROAD, home.seed, means, labels or None, patients) if means else None


# -- statistics --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stated:
    """A macro mean, or a difference of two, with the 95 % interval that may be stated of it.

    Attributes:
        mean: the value.
        low, high: the bounds; None where ``reason`` says why there is no interval.
        reason: empty where there is one.
        over_sites: whether sites were drawn too; see :func:`statistics.basis`.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    reason: str = ""
    over_sites: bool = False

    @classmethod
    def of(cls, found: statistics.Interval | statistics.Difference, over_sites: bool) -> Stated:
        """With its bounds, unless every draw gave the same."""
        if found.high - found.low < bootstrap.NOTHING:
            return cls(found.mean, reason="no spread among the test samples")
        return cls(found.mean, found.low, found.high, over_sites=over_sites)

    def between(self, sign: str = "") -> str:
        """The interval as text; a value that lies outside it is said to."""
        if self.low is None or self.high is None:
            return "no interval"
        outside = not self.low <= self.mean <= self.high
        return f"{self.low:{sign}.3f} to {self.high:{sign}.3f}{', the value itself outside' * outside}"


def interval(runs: Sequence[statistics.Scores]) -> Stated | None:
    """The arm's macro mean with its 95 % interval, if one may be stated; None where the runs tested different sites."""
    try:
        rests = statistics.basis(runs)
        rng = seeding.stream(0, "compare", "interval")
        found = statistics.interval(runs, rng=rng, resample_sites=rests.resample_sites)
    except errors.DataError:
        return None
    return Stated(found.mean, reason=rests.reason) if rests.reason else Stated.of(found, rests.resample_sites)


def difference(first: Sequence[statistics.Scores], second: Sequence[statistics.Scores]) -> tuple[Stated, bool] | None:
    """First minus second, and whether the interval is paired; None where neither kind can be computed.

    Pairs are taken on the seeds both have. Where the samples differ the two intervals are joined as those of
    independent estimates, which is wider than need be if they have samples in common.

    Source: Zou and Donner, "Construction of confidence limits about effect measures", Statistics in Medicine 27, 2008.
    """
    left, right = common(first, second)
    if left:
        try:
            rests = statistics.basis(left)
            rng = seeding.stream(0, "compare", "paired")
            found = statistics.paired(left, right, rng=rng, resample_sites=rests.resample_sites)
        except errors.DataError:
            pass  # other sites or samples: the unpaired form is left
        else:
            stated = Stated.of(found, rests.resample_sites)
            return Stated(found.mean, reason=rests.reason) if rests.reason else stated, True
    ours, theirs = interval(first), interval(second)
    return None if ours is None or theirs is None else (_joined(ours, theirs), False)


def common(
    first: Sequence[statistics.Scores], second: Sequence[statistics.Scores]
) -> tuple[list[statistics.Scores], list[statistics.Scores]]:
    """The runs of the seeds that both arms have."""
    seeds = {run.seed for run in first} & {run.seed for run in second}
    return [run for run in first if run.seed in seeds], [run for run in second if run.seed in seeds]


def at_common_sites(
    first: Sequence[statistics.Scores], second: Sequence[statistics.Scores]
) -> tuple[list[statistics.Scores], list[statistics.Scores]]:
    """The runs with the sites alone that both arms of a run were scored at; as they are where there is no such site.

    A hospital without labels is tested and has no model of its own: means over unlike hospitals have no difference.
    """
    every = [set(run.sites) for run in (*first, *second)]
    shared = set.intersection(*every) if every else set()
    if not shared:
        return list(first), list(second)

    def kept(runs: Sequence[statistics.Scores]) -> list[statistics.Scores]:
        return [
            dataclasses.replace(run, sites={site: rows for site, rows in run.sites.items() if site in shared})
            for run in runs
        ]

    return kept(first), kept(second)


def _joined(ours: Stated, theirs: Stated) -> Stated:
    """The difference of two independent estimates."""
    mean = ours.mean - theirs.mean
    if ours.low is None or ours.high is None or theirs.low is None or theirs.high is None:
        return Stated(mean, reason=ours.reason or theirs.reason)
    low = mean - math.hypot(ours.mean - ours.low, theirs.high - theirs.mean)
    high = mean + math.hypot(ours.high - ours.mean, theirs.mean - theirs.low)
    return Stated(mean, low, high, over_sites=ours.over_sites or theirs.over_sites)


def by_site(first: Sequence[statistics.Scores], second: Sequence[statistics.Scores]) -> dict[str, bootstrap.Difference]:
    """First minus second at every site and on the seeds that both have; empty where no site can be compared."""
    left, right = at_common_sites(*common(first, second))
    if not left:
        return {}
    try:
        return statistics.by_site(left, right, rng=seeding.stream(0, "compare", "by-site"))
    except errors.DataError:
        return {}


# -- the table ---------------------------------------------------------------------------------------------------------


def table(groups: Sequence[Group]) -> dict[str, Any]:
    """Groups side by side as plain values, arm by arm.

    Keys of a group: ``label, paths, seeds, rounds, primary, findings`` (of every seed), ``arms {arm: {macro, low, high,
    no_interval, over_sites, by_seed, prompt}}`` (``prompt`` marks scores of an oracle, else None; bounds are None where
    no interval may be stated, as ``no_interval`` says; ``over_sites``: sites were drawn too), ``difference`` (its
    federated arm minus that of the first group, at the sites that both tested: ``mean, low, high, no_interval,
    over_sites, paired, seeds, sites_left_out``; None for the first, and where metrics or all sites differ),
    ``settings`` (what differs from the first group: ``path: [first, this]``), ``bytes {up, down}``, ``wall_s`` (means
    over seeds) and ``peak_mib`` (the largest).
    """
    samples = [[scores(run.folder, run.summary) for run in group.runs] for group in groups]
    return {
        "level": 0.95,
        "draws": statistics.DRAWS,
        "runs": [
            {**_about(group), "arms": _arms(group, own), **_against(groups[0], samples[0], group, own)}
            for group, own in zip(groups, samples, strict=True)
        ],
    }


def _about(group: Group) -> dict[str, Any]:
    made = [run.summary for run in group.runs]
    return {
        "label": group.label,
        "paths": [str(run.folder.path) for run in group.runs],
        "seeds": [run.seed for run in group.runs],
        "rounds": made[0].get("rounds"),
        "primary": made[0]["primary"],
        "bytes": {way: _mean([one["bytes"][way] for one in made]) for way in ("up", "down")},
        "findings": [row | {"seed": one["seed"]} for one in made for row in one.get("findings", ())],
        "wall_s": _mean([one["wall_s"] for one in made]),
        "peak_mib": max(one["peak_mib"] for one in made),
    }


def _arms(group: Group, samples: Sequence[Mapping[str, statistics.Scores]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    whole = [arm for run in group.runs for arm in run.summary["arms"] if arm != LOCAL]  # a federation has no samples
    for arm in dict.fromkeys([*(arm for own in samples for arm in own), *whole]):
        runs = [own[arm] for own in samples if arm in own]
        by_seed = {
            str(run.seed): _macro(arm, run.summary) for run in group.runs if _macro(arm, run.summary) is not None
        }
        bounds = interval(runs) if runs else None
        found[arm] = {
            "macro": _mean([value for value in by_seed.values() if value is not None]),
            "low": bounds.low if bounds else None,
            "high": bounds.high if bounds else None,
            "no_interval": bounds.reason if bounds else "its runs have no common values of single test samples",
            "over_sites": bounds is not None and bounds.over_sites,
            "by_seed": by_seed,
            "prompt": group.first.summary["arms"].get(LOCAL if arm == ABROAD else arm, {}).get("prompt"),
        }
    return found


def _macro(arm: str, made: Mapping[str, Any]) -> float | None:
    group, key = (LOCAL, "abroad") if arm == ABROAD else (arm, "macro")
    value = made["arms"].get(group, {}).get(key)
    return None if value is None else float(value)


def _against(
    first: Group,
    first_samples: Sequence[Mapping[str, statistics.Scores]],
    group: Group,
    samples: Sequence[Mapping[str, statistics.Scores]],
) -> dict[str, Any]:
    """How a group differs from the first: in its federated arm and in its settings."""
    if group is first:
        return {"difference": None, "settings": {}}
    ours, theirs = group.first.settings, first.first.settings
    changed = {
        path: [theirs.get(path), ours.get(path)]
        for path in sorted(ours.keys() | theirs.keys())
        if ours.get(path) != theirs.get(path)
    }
    found: tuple[Stated, bool] | None = None
    own, other = ([one[FEDERATED] for one in many if FEDERATED in one] for many in (samples, first_samples))
    tested = [set(run.sites) for run in (*own, *other)]
    shared = tested[0].intersection(*tested) if tested else set()
    if group.first.summary["primary"] == first.first.summary["primary"] and shared:
        found = difference(*at_common_sites(own, other))
    if found is None:
        return {"difference": None, "settings": changed}
    value, paired = found
    alone = sorted(tested[0].union(*tested) - shared)
    seeds = sorted({run.seed for run in group.runs} & {run.seed for run in first.runs}) if paired else []
    bounds = {"mean": value.mean, "low": value.low, "high": value.high, "no_interval": value.reason}
    row = {**bounds, "over_sites": value.over_sites, "paired": paired, "seeds": seeds, "sites_left_out": alone}
    return {"difference": row, "settings": changed}


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print what :func:`compare` found: an arm a row, a group a column, and what differs below."""
    rows = found["runs"]
    console.print(rich_table(found))
    for row in rows[1:]:
        console.print(f"{row['label']}: {_settings_text(row['settings'])}", highlight=False, markup=False)
    several = any(len(row["seeds"]) > 1 for row in rows)
    one = "samples; one seed, so the spread between seeds is not in them"
    over = "samples and seeds (few seeds understate their spread)" if several else one
    if any(part["over_sites"] for row in rows for part in _stated(row)):
        over += "; where sites have few test units the sites are drawn too"
    console.print(
        f"Intervals: 95 %, bootstrap over {over}. Bytes and seconds are means over seeds, peak memory is the largest.",
        highlight=False,
    )
    for row in rows:
        for finding in row["findings"]:
            if finding["headline"]:
                where = f"{row['label']}, seed {finding['seed']}"
                console.print(f"Attention, {where}: {finding['text']}.", highlight=False, markup=False)
    for row in rows[1:]:
        if row["difference"] and (out := row["difference"]["sites_left_out"]):
            words = f"{row['label']}: the difference is without {', '.join(out)}, which not every run tested."
            console.print(words, highlight=False, markup=False)
    for reason in dict.fromkeys(_reasons(rows)):
        console.print(f"No interval: {reason}.", highlight=False, markup=False)


def _reasons(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Why intervals are missing."""
    for row in rows:
        yield from (part["no_interval"] for part in _stated(row) if part["no_interval"])


def _stated(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Its macro means and its difference."""
    return [*row["arms"].values(), *([row["difference"]] if row["difference"] else [])]


def rich_table(found: Mapping[str, Any]) -> Table:
    """The comparison as a table for a terminal."""
    rows = found["runs"]
    made = Table(
        title=f"macro {rows[0]['primary']}, 95 % interval" if len({row["primary"] for row in rows}) == 1 else None
    )
    made.add_column("")
    for row in rows:
        made.add_column(Text(row["label"]), justify="right")
    for arm in dict.fromkeys(arm for row in rows for arm in row["arms"]):
        made.add_row(arm, *(_bounds_text(row["arms"].get(arm), len(row["seeds"])) for row in rows))
    made.add_section()
    made.add_row("federated minus first", *(_difference_text(row) for row in rows))
    made.add_section()
    made.add_row("seeds", *(", ".join(map(str, row["seeds"])) for row in rows))
    made.add_row("rounds", *(str(row["rounds"]) for row in rows))
    made.add_row("MB up, down", *(f"{row['bytes']['up'] / 1e6:.2f}, {row['bytes']['down'] / 1e6:.2f}" for row in rows))
    made.add_row("seconds", *(f"{row['wall_s']:.0f}" for row in rows))
    made.add_row("peak MiB", *(f"{row['peak_mib']:.0f}" for row in rows))
    return made


def _bounds_text(row: Mapping[str, Any] | None, seeds: int) -> str:
    if row is None or row["macro"] is None:
        return "-"
    few = "" if len(row["by_seed"]) == seeds else f", {len(row['by_seed'])} of {seeds} seeds"
    between = "no interval" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
    return f"{row['macro']:.3f} ({between}{few}) {row['prompt'] or ''}".rstrip()


def _difference_text(row: Mapping[str, Any]) -> str:
    found = row["difference"]
    if found is None:
        return "-"
    kind = "" if found["paired"] else ", unpaired: other samples"
    if found["paired"] and found["seeds"] != row["seeds"]:
        kind = f", seeds {', '.join(map(str, found['seeds']))}"
    between = "no interval" if found["low"] is None else f"{found['low']:+.3f} to {found['high']:+.3f}"
    bounds, mark = f"({between}{kind})", row["arms"][FEDERATED]["prompt"] or ""
    return f"{found['mean']:+.3f} {bounds} {mark}".rstrip()


def _settings_text(changed: Mapping[str, Sequence[Any]]) -> str:
    if not changed:
        return "same settings as the first"
    shown = [f"{path}: {json.dumps(a)} -> {json.dumps(b)}" for path, (a, b) in list(changed.items())[:SETTINGS_SHOWN]]
    more = f" and {len(changed) - SETTINGS_SHOWN} more" if len(changed) > SETTINGS_SHOWN else ""
    return "; ".join(shown) + more
