"""``report.html``: what a run reached and how, in one file that asks the network for nothing.

This module says what was reached (arms, sites, matrix, pictures); :mod:`fedvfm.simulation.results.provenance` says how.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from fedvfm.config import schema
from fedvfm.data import colours, prompts
from fedvfm.data.partition import virtual_hospitals
from fedvfm.privacy import statements
from fedvfm.report import bootstrap, charts, page, rounds, scores
from fedvfm.simulation import attacks, baselines, run_folder
from fedvfm.simulation.results import (
    benefit,
    compare,
    examination,
    pictures,
    prognosis,
    provenance,
    simulated_epsilon,
    statistics,
)
from fedvfm.storage import hash_chain, storage

BELOW_HOME = 0.02
FEW_COLUMNS = 16
SHARE = (0.0, 1.0)
LIGHT, DARK = (0xEE, 0xF5, 0xFB), (0x0A, 0x45, 0x7C)
WHITE_FROM = 0.7  # where black and white text stand out equally, 4.5 to 1


@dataclass(frozen=True)
class Found:
    """What the report is made of.

    Attributes:
        what: the experiment.
        made: its summary.
        scores: per-sample test values by arm.
        journal: the federated arm's rounds.
        tables: of the federated arm, site -> the columns of its test samples.
    """

    what: schema.Experiment
    made: Mapping[str, Any]
    scores: Mapping[str, statistics.Scores]
    journal: Sequence[Mapping[str, Any]]
    tables: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def arms(self) -> Mapping[str, Any]:
        """Arm -> its part of the summary, the federated one first."""
        arms: Mapping[str, Any] = self.made["arms"]
        return arms

    @property
    def federated(self) -> Mapping[str, Any]:
        """The federated arm's part of the summary."""
        part: Mapping[str, Any] = self.arms["federated"]
        return part

    @property
    def primary(self) -> str:
        """The metric that ranks models of this task."""
        return str(self.made["primary"])

    @property
    def name(self) -> str:
        """The same as people write it, marked where the federated arm's scores are an oracle's."""
        return scores.shown(scores.metric_name(self.primary), self.federated)


def write(
    run: run_folder.RunFolder,
    what: schema.Experiment,
    hospitals: Sequence[virtual_hospitals.Hospital],
    made: Mapping[str, Any],
    shown: Sequence[pictures.Picture],
) -> Path:
    """Write the report of a finished run.

    Args:
        run: the folder with the arms' evaluations and the journal; the report goes there.
        what: the experiment as resolved.
        hospitals: its virtual hospitals.
        made: the contents of summary.json.
        shown: sample images with truth and prediction.

    Raises:
        StorageError: if the disk refuses.
        CheckpointError: if journal or evaluations are damaged.
    """
    journal = hash_chain.read(run.arm("federated") / "journal.jsonl")
    tables = compare.samples_of(run, compare.FEDERATED) if what.recipe.target.prognosis else {}
    found = Found(what, made, compare.scores(run, made, compare.patients_of(hospitals)), journal, tables)
    path = run.path / "report.html"
    storage.write_text(path, page.document(what.title or what.name, body(found, hospitals, shown)))
    return path


def body(found: Found, hospitals: Sequence[virtual_hospitals.Hospital], shown: Sequence[pictures.Picture]) -> list[str]:
    """The page, part by part."""
    name = found.name
    parts = {
        "benefit": ("Does joining pay?", benefit.section(found.made.get("benefit"), name)),
        "home": ("The global adapter alone: does each hospital gain?", _home(found)),
        "arms": ("Arms compared", _arms(found)),
        "findings": ("To be read with the figures", scores.findings(found.made.get("findings", ()))),
        "sites": ("Federated adapter, site by site", _sites(found)),
        "answers": ("Answers, class by class", _answers(found)),
        "prognosis": ("Survival by predicted risk", _prognosis(found)),
        "samples": ("Sample images", _samples(found, shown)),
        "matrix": (f"Trained here, tested there: {name}", _matrix(found)),
        "training": (
            "Training, round by round",
            rounds.training(found.journal, found.primary, name, found.federated),
        ),
        "privacy": ("Privacy: simulated", simulated_epsilon.section(found.made.get("privacy"))),
        "bytes": ("Bytes moved", rounds.traffic(found.journal, found.made)),
        "hospitals": ("Hospitals", provenance.hospitals(hospitals, found.what)),
        "environment": ("Environment and settings", provenance.environment(found.what, found.made)),
    }
    sections = {key: page.section(key, title, inner) for key, (title, inner) in parts.items() if inner}
    links = "".join(f'<a href="#{key}">{page.text(parts[key][0])}</a>' for key in sections)
    return [
        *_head(found),
        f'<nav aria-label="Sections">{links}</nav>',
        "<main>",
        *sections.values(),
        "</main>",
    ]


def below_home(arms: Mapping[str, Any], primary: str) -> list[tuple[str, float, float]]:
    """Sites where the federated adapter is more than 0.02 below their own local-only model: (site, federated, own)."""
    own, federated = arms.get("local-only", {}).get("sites", {}), arms["federated"]["sites"]
    pairs = [(site, federated[site][primary], row[primary]) for site, row in own.items() if site in federated]
    return [(site, ours, theirs) for site, ours, theirs in pairs if theirs - ours > BELOW_HOME]


# -- head and arms -----------------------------------------------------------------------------------------------------


def _head(found: Found) -> list[str]:
    what, made = found.what, found.made
    recipe = what.recipe
    about = (
        f"{what.name}: {recipe.task.kind} over {_number(len(found.federated['sites']), 'site')}, "
        f"{_number(made['rounds'], 'round')}, {recipe.adapter.kind} on {_short_name(made['backbone']['name'])}, "
        f"rule {recipe.aggregation.rule}, seed {made['seed']}"
    )
    return [
        f'<header><h1>{page.text(what.title or what.name)}</h1><p class="soft">{page.text(about)}</p>',
        *(f'<p class="note" role="note">{page.text(note)}</p>' for note in _notes(found)),
        page.cards(_cards(found)),
        "</header>",
    ]


def _notes(found: Found) -> list[str]:
    """What must be read before any number."""
    told = [attacks.describe(found.what), *(f"Attention: {text}." for text in examination.headlines(found.made))]
    slow = baselines.slow_sites(found.what, sorted(found.federated["sites"]))
    told += [slow, found.what.note, prompts.describe(found.what.recipe.task)]
    bound = found.made.get("privacy")
    told += [f"{statements.bound(bound)}; {statements.SIMULATED}"] if bound else []
    return [note for note in told if note]


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _short_name(backbone: str) -> str:
    """A backbone's name; of a local folder its last part."""
    path = PurePath(backbone)
    return path.name if path.is_absolute() else backbone


def _cards(found: Found) -> list[tuple[str, str, str]]:
    name, federated, marked = found.name, found.federated, scores.shown
    bounds = _interval(found, "federated")
    between = f"95 % interval {bounds.between()}" if bounds and not bounds.reason else "no interval"
    rows = benefit.cards(found.made.get("benefit"))
    rows.append((f"Federated, macro {name}", f"{federated['macro']:.3f}", between))
    worst, below = federated["worst"], f"{federated['gap']:.3f} below the best"
    rows.append((marked("Worst site", federated), f"{worst['value']:.3f}", f"{worst['site']}, {below}"))
    pooled, local = found.arms.get("pooled"), found.arms.get("local-only")
    if pooled:
        rows.append((marked("Pooled", pooled), f"{pooled['macro']:.3f}", "one model from all images in one place"))
    if local:
        away = "" if local.get("abroad") is None else f", {local['abroad']:.3f} at the other sites"
        rows.append((marked("Local-only", local), f"{local['macro']:.3f}", f"at home{away}"))
    return [*rows, rounds.traffic_card(found.journal, found.made)]


def _interval(found: Found, arm: str) -> compare.Stated | None:
    return compare.interval([found.scores[arm]]) if arm in found.scores else None


def _arms(found: Found) -> str:
    rows, whiskers = [], []
    for arm, part in found.arms.items():
        bounds = _interval(found, arm)
        label = scores.shown("local-only, at home" if arm == compare.LOCAL else arm, part)
        rows.append(_arm_row(found, arm, label, part, bounds))
        whiskers.append(_whisker(label, part["macro"], bounds))
        if arm == compare.LOCAL and part.get("abroad") is not None:
            bounds = _interval(found, compare.ABROAD)
            values, label = {"macro": part["abroad"]}, scores.shown("local-only, abroad", part)
            rows.append(_arm_row(found, compare.ABROAD, label, values, bounds))
            whiskers.append(_whisker(label, part["abroad"], bounds))
    name = scores.metric_name(found.primary)
    head = ("arm", f"macro {name}", "95 % interval", "weighted", "worst site", "gap", "minus federated (95 % interval)")
    caption = (
        f"Macro: mean over sites of the site's test {name}. Weighted: by test samples. Gap: best minus worst site. "
        "Minus federated: over the sites that both were scored at."
    )
    title = f"Macro {name} of every arm with its 95 % interval"
    chart = charts.whiskers(whiskers, title=title, x_label=f"macro {name}", bounds=SHARE)
    return (
        f'<div class="charts">{page.figure(chart, title + "; the dashed line marks the federated arm.")}</div>'
        + page.table(head, rows, caption)
        + _below_home_text(found)
        + _rounds_text(found)
        + page.paragraph(_interval_text(found), "soft")
        + _rules(found)
    )


def _whisker(label: str, value: float, bounds: compare.Stated | None) -> charts.Whisker:
    return charts.Whisker(label, value, bounds.low if bounds else None, bounds.high if bounds else None)


def _arm_row(
    found: Found, arm: str, label: str, part: Mapping[str, Any], bounds: compare.Stated | None
) -> list[page.Cell]:
    worst = part.get("worst")
    return [
        label,
        part["macro"],
        bounds.between() if bounds else None,
        part.get("weighted"),
        f"{worst['site']} {worst['value']:.3f}" if worst else None,
        part.get("gap"),
        _against_federated(found, arm),
    ]


def _against_federated(found: Found, arm: str) -> str | None:
    if arm == "federated" or not {arm, "federated"} <= found.scores.keys():
        return None
    own, federated = compare.at_common_sites([found.scores[arm]], [found.scores["federated"]])
    result = compare.difference(own, federated)
    if result is None:
        return None
    value, paired = result
    sites, every = len(federated[0].sites), len(found.scores["federated"].sites)
    kind = f"{'' if paired else ', unpaired'}{f', at {sites} of {every} sites' * (sites < every)}"
    return f"{value.mean:+.3f} ({value.between('+')}{kind})"


def _rounds_text(found: Found) -> str:
    rounds = {arm: int(part.get("rounds", 0)) for arm, part in found.arms.items()}
    said = baselines.fewer_rounds(rounds, found.what, len(found.federated["sites"]))
    return page.paragraph(f"Here {said}.", "soft") if said else ""


def _below_home_text(found: Found) -> str:
    if "local-only" not in found.arms:
        return ""
    lower = below_home(found.arms, found.primary)
    if not lower:
        return page.paragraph(f"No site scores more than {BELOW_HOME} below its own local-only model at home.")
    named = "; ".join(f"{site} ({ours:.3f} against {own:.3f})" for site, ours, own in lower)
    number = "1 site scores" if len(lower) == 1 else f"{len(lower)} sites score"
    strong = f"<strong>{number} more than {BELOW_HOME} below the site's own local-only model at home:</strong> "
    return page.paragraph(page.Markup(strong + page.text(named) + "."))


def _interval_text(found: Found) -> str:
    federated = found.scores.get("federated")
    drawn = "whole patients" if federated and federated.patients else "single test samples"
    classes = ", class by class" if federated and federated.labels else ""
    stated = [bounds for arm in found.scores if (bounds := _interval(found, arm)) is not None]
    over = any(bounds.over_sites for bounds in stated)
    sites = "sites are drawn too, since some have few test units" if over else "the sites are fixed"
    reasons = "".join(
        f" No interval: {why}." for why in dict.fromkeys(bounds.reason for bounds in stated if bounds.reason)
    )
    return (
        f"Intervals: percentile bootstrap, {statistics.DRAWS} draws of {drawn} inside each site{classes}; {sites}, "
        "and one seed shows nothing of the spread between seeds. Differences are paired, sample by sample, unless "
        f"marked unpaired.{reasons}"
    )


def _rules(found: Found) -> str:
    rules = [(arm, part["rule"]) for arm, part in found.arms.items() if "rule" in part]
    return "".join(f"<h3>Rule of the arm {page.text(arm)}</h3>{page.paragraph(str(rule))}" for arm, rule in rules)


# -- each hospital against itself --------------------------------------------------------------------------------------


def _home(found: Found) -> str:
    """Federated minus local-only at home, site by site."""
    changes = examination.home(found.scores)
    if not changes:
        return ""
    rows: list[list[page.Cell]] = [
        [site, change.units, change.first, change.second, f"{change.mean:+.3f}", change_text(change), change.word]
        for site, change in changes.items()
    ]
    units = "patients" if found.scores[compare.FEDERATED].patients else "samples"
    head = ("site", f"test {units}", "federated", "local-only", "difference", "95 % interval", "this hospital")
    caption = (
        f"Test {found.name} of the federated adapter minus that of the site's own local-only model at home. Each "
        f"interval is of its site alone and needs {bootstrap.LEAST_UNITS} independent {units}; without one nothing "
        "can be told."
    )
    made = page.table(head, rows, caption, words=(5, 6))
    return page.paragraph(home_text(changes)) + (
        made if len(rows) <= scores.FEW_ROWS else page.folded(f"All {len(rows)} sites", made)
    )


def home_text(changes: Mapping[str, bootstrap.Difference]) -> str:
    """How many hospitals gain, lose and cannot tell."""
    words = [change.word for change in changes.values()]
    gain, lose, unknown = (words.count(word) for word in (bootstrap.GAINS, bootstrap.LOSES, bootstrap.UNKNOWN))
    return (
        f"Against its own local-only model at home: {_number(gain, 'hospital')} of {len(words)} gain"
        f"{'s' * (gain == 1)}, {lose} lose{'s' * (lose == 1)}, {unknown} cannot tell."
    )


def change_text(change: bootstrap.Difference) -> str:
    """The interval of one site's difference, or why it has none."""
    if change.low is None or change.high is None:
        return f"none: {change.reason}"
    return f"{change.low:+.3f} to {change.high:+.3f}"


# -- answers -----------------------------------------------------------------------------------------------------------


def _answers(found: Found) -> str:
    """A classifier's confusion matrix over all sites, and the recall of every class at every site."""
    own = found.made.get("answers")
    if not own:
        return ""
    names, every = list(found.what.recipe.data.class_names), own["all"]
    commonest = every["commonest"]
    text = (
        f"The commonest answer is '{commonest['class']}', {commonest['share']:.1%} of all. An answer that looks at no "
        f"image reaches a balanced accuracy of {every['chance']:.3f} (chance level)."
    )
    matrix = page.table(
        ("true class", *(f"answered {name}" for name in names)),
        [[name, *row] for name, row in zip(names, every["confusion"], strict=True)],
        "Test samples of all sites by their class and the federated adapter's answer.",
    )
    rows = [
        [
            site,
            *(part["recall"][name] for name in names),
            f"{part['commonest']['class']} {part['commonest']['share']:.0%}",
            part["chance"],
        ]
        for site, part in [("all", every), *own["sites"].items()]
    ]
    head = ("site", *(f"recall {name}" for name in names), "commonest answer", "chance level")
    caption = "Recall: share of a class's test samples that was answered right; a dash where it has none."
    recalls = page.table(head, rows, caption, words=(len(names) + 1,))
    return (
        page.paragraph(text)
        + matrix
        + (recalls if len(rows) <= scores.FEW_ROWS else page.folded(f"Recall at {len(rows) - 1} sites", recalls))
    )


# -- sites -------------------------------------------------------------------------------------------------------------


def _sites(found: Found) -> str:
    sites, about = found.federated["sites"], "Test metrics of the federated adapter after the last round"
    return scores.by_site(sites, scores.shown(about, found.federated), found.what.recipe.evaluation.nsd_tolerance)


def _prognosis(reached: Found) -> str:
    target = reached.what.recipe.target
    if not target.prognosis:
        return ""
    return prognosis.section(reached.tables, target.bins, target.units[0] if target.units else "")


def _samples(found: Found, shown: Sequence[pictures.Picture]) -> str:
    if not shown:
        return ""
    mark = scores.shown("", found.federated)
    key = _class_key(found.what.recipe.data.class_names) if shown[0].truth is not None else ""
    by = "Dice" if shown[0].dice is not None else "the probability of the true class"
    by = by if shown[0].f1 is None else "F1 of the boxes"
    by = by if shown[0].values is None else "how well the answer fits the truth"
    by = by if found.what.recipe.target.kind != "cox" else "name"
    parts = [
        ("The worst of each site", f"No test sample of its site scores lower; sorted by {by}.", True),
        ("Drawn at random", f"Not chosen: what is usual; sorted by {by}.", False),
    ]
    made = ""
    for title, about, worst in parts:
        group = sorted((one for one in shown if one.worst is worst), key=lambda one: (one.score, one.site, one.sample))
        if group:
            inner = "".join(_sample(one, mark) for one in group)
            made += f'<h3>{title}</h3>{page.paragraph(about, "soft")}<div class="samples">{inner}</div>'
    return page.paragraph("Predicted with the federated adapter.", "soft") + key + made


def _class_key(names: Sequence[str]) -> str:
    inner = "".join(
        f'<span style="background:{colours.of(number)}"></span>{page.text(name)}'
        for number, name in enumerate(names[1:], start=1)
    )
    return f'<p class="key">Classes:{inner}</p>'


def _sample(one: pictures.Picture, mark: str) -> str:
    where = f"sample {one.sample} of site {one.site}"
    panels = [(one.image, one.part or "image"), (one.truth, "truth"), (one.prediction, "prediction")]
    pictured = [
        f"<span>{page.image(png, f'{kind}: {where}')}<small>{page.text(kind)}</small></span>"
        for png, kind in panels
        if png is not None
    ]
    score = "" if one.dice is None else f", Dice {one.dice:.3f}{mark}"
    score = score if one.f1 is None else f", F1 {one.f1:.3f}"
    caption = f"<figcaption>{page.text(one.site)}: {page.text(charts.shorten(one.sample, 28))}{score}</figcaption>"
    if one.values is not None:
        answered = f"<span>{page.text(one.values[0])}</span>"
        return f'<figure class="sample">{caption}<div class="one">{"".join(pictured)}{answered}</div></figure>'
    if one.probabilities is None:
        return f'<figure class="sample">{caption}<div>{"".join(pictured)}</div></figure>'
    return f'<figure class="sample">{caption}<div class="one">{"".join(pictured)}{_chances(one)}</div></figure>'


def _chances(one: pictures.Picture) -> str:
    """The most probable classes as small bars, the true one named."""
    ranked = sorted((one.probabilities or {}).items(), key=lambda item: -item[1])
    bars = "".join(
        f'<span class="meter"><span>{page.text(name)}</span><i style="width:{100 * value:.1f}%"></i>{value:.2f}</span>'
        for name, value in ranked[:5]
    )
    verdict = "right" if ranked and ranked[0][0] == one.label else "wrong"
    truth = "" if one.label is None else f"<span>truth: <b>{page.text(one.label)}</b> (prediction {verdict})</span>"
    return f"<span>{truth}{bars}</span>"


# -- the matrix --------------------------------------------------------------------------------------------------------


def _matrix(found: Found) -> str:
    matrix = found.arms.get("local-only", {}).get("matrix")
    if not matrix:
        return ""
    rows = [(site, row, True) for site, row in matrix.items()]
    for arm in ("federated", "pooled"):
        if arm in found.arms:
            values = {site: row[found.primary] for site, row in found.arms[arm]["sites"].items()}
            rows.append((arm, values, False))
    columns = list(found.federated["sites"])
    name, sampled = found.name, baselines.fewer_tests(found.what, len(columns))
    everything = [value for _, row, _ in rows for value in row.values()]
    limits = (min(everything), max(everything))
    if len(columns) > FEW_COLUMNS:
        return _heat(rows, columns, limits, name, sampled)
    caption = (
        f"{name} of each site's own model (rows: trained at) on every site's test images (columns: tested at); "
        "framed: at home. Below, for comparison, the models that learned from all sites."
    )
    caption += f" {sampled[0].upper()}{sampled[1:]}." if sampled else ""
    head = "".join(f'<th scope="col">{page.text(site)}</th>' for site in columns)
    body_rows = "".join(_matrix_row(row, columns, limits, first=at == len(matrix)) for at, row in enumerate(rows))
    top = f'<thead><tr><th scope="col">trained at</th>{head}</tr></thead>'
    named = f"<caption><span>{page.text(caption)}</span></caption>"
    return page.scrolling(f'<table class="matrix">{named}{top}<tbody>{body_rows}</tbody></table>')


def _matrix_row(
    row: tuple[str, Mapping[str, float], bool], columns: Sequence[str], limits: tuple[float, float], *, first: bool
) -> str:
    name, values, is_site = row
    cells = ""
    for site in columns:
        if site not in values:
            cells += f"<td>{page.ABSENT}</td>"
            continue
        back, front = shade(values[site], limits)
        home = ' class="home"' if is_site and site == name else ""
        cells += f'<td{home} style="background:{back};color:{front}">{values[site]:.3f}</td>'
    return f'<tr{" class=apart" if first else ""}><th scope="row">{page.text(name)}</th>{cells}</tr>'


def _heat(
    rows: Sequence[tuple[str, Mapping[str, float], bool]],
    columns: Sequence[str],
    limits: tuple[float, float],
    name: str,
    sampled: str,
) -> str:
    field = [
        (row, [(site, values[site], shade(values[site], limits)[0]) if site in values else None for site in columns])
        for row, values, _ in rows
    ]
    title = f"{name}: rows trained at, columns tested at, {limits[0]:.3f} (light) to {limits[1]:.3f} (dark)"
    last = ", ".join(row for row, _, is_site in rows if not is_site)
    empty = f" {sampled[0].upper()}{sampled[1:]}." if sampled else ""
    caption = (
        f"{title}. Sites in the order of their names; last rows: {last}. Point at a cell for its value; all are in "
        f"metrics.csv.{empty}"
    )
    return f'<div class="charts">{page.figure(charts.heat(field, title=title), caption)}</div>'


def shade(value: float, limits: tuple[float, float]) -> tuple[str, str]:
    """(background, text) of a cell: light blue at the lowest value, dark blue at the highest, text that stands out."""
    low, high = limits
    share = (value - low) / (high - low) if high > low else 0.5
    mixed = [round(a + share * (b - a)) for a, b in zip(LIGHT, DARK, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed), "#000000" if share < WHITE_FROM else "#ffffff"
