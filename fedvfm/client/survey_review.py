"""A survey in plain words, for the person who answers for a hospital's data; and what it would tell from here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedvfm import errors
from fedvfm.client import site_file
from fedvfm.client.gate import policy, survey_steps
from fedvfm.config import schema
from fedvfm.config import survey as surveys
from fedvfm.survey import answer, collection, layout, noise
from fedvfm.trust import signed_documents

COLUMNS = (
    "; of a column nothing where so few have a value, or one that differs from what many have; where so few have none, "
    "they count as the mean of the others"
)
NEVER = (
    "images, masks, names of files or patients, the values of any single patient, anything of the test split, and what "
    "the policy does not name; they stay on this machine"
)


def words(survey: surveys.Survey, answered: int = 0) -> list[tuple[str, str]]:
    """Heading and sentence, row by row. Foreign text is shown with its control characters escaped.

    Args:
        survey: that is asked.
        answered: how many surveys left this site before.
    """
    rows = [
        ("survey", survey.hash),
        ("title", survey.title),
        *((("purpose", survey.purpose),) if survey.purpose else ()),
        ("task", f"{survey.task} of {', '.join(survey.class_names)}"),
        ("looks at", _looks(survey)),
        *(("leaves", f"{surveys.STATISTICS[name]}, in {_bins(survey, name)}") for name in survey.statistics),
        *((("columns", _columns(survey)),) if survey.columns else ()),
        ("withheld", _withheld(survey)),
        ("noise", _noise(survey)),
        ("never leaves", NEVER),
        ("how often", "once: asked again, the same bytes leave, whatever the data are by then"),
    ]
    if answered:
        times = "one survey was" if answered == 1 else f"{answered} surveys were"
        rows.append(
            (
                "attention",
                f"{times} answered here before: what differs between two answers tells of the patients that do",
            )
        )
    return [(heading, signed_documents.shown(text)) for heading, text in rows]


def _columns(survey: surveys.Survey) -> str:
    own = [group for group in layout.groups(survey) if group.span is not None]
    return "of your table: " + ", ".join(
        f"{name} ({group.span[0]:g} to {group.span[1]:g}{group.unit and ' '}{group.unit})"
        for name, group in zip(survey.columns, own, strict=True)
        if group.span is not None
    )


def _looks(survey: surveys.Survey) -> str:
    return (
        f"at most {survey.images_per_patient} images of each patient of the train and validation splits; every patient "
        "counts alike"
    )


def _bins(survey: surveys.Survey, name: str) -> str:
    own = [group for group in layout.groups(survey) if group.statistic == name]
    numbers = sum(len(group.labels) for group in own)
    return "one number" if numbers == 1 else f"{numbers} numbers"


def _withheld(survey: surveys.Survey) -> str:
    if survey.privacy is not None:
        return f"the whole answer where there are fewer than {survey.least_patients} patients (or policy.min_units)"
    return (
        f"every number that fewer than {survey.least_patients} patients (or policy.min_units, if that is more) have a "
        "part in, and those from which one could be worked out" + COLUMNS * bool(survey.columns)
    )


def _noise(survey: surveys.Survey) -> str:
    own = survey.privacy
    if own is None:
        return "none: the numbers that leave are exact"
    event = noise.event(survey)
    if event is None:
        return "none"
    sizes = noise.sigmas(layout.groups(survey), event.noise_multiplier)
    group = layout.groups(survey)[0]
    return (
        f"on every number, for whole patients: epsilon {own.epsilon:g} at delta {own.delta:g}, charged to [privacy] of "
        f"this site; a standard deviation of {sizes[group.name] / layout.WHOLE:.1f} patients"
    )


def judge(survey: surveys.Survey, config: schema.SiteConfig | schema.PolicyConfig | None) -> list[str]:
    """What of a site's file refuses a survey, a sentence each; empty where nothing does, or no file was given."""
    if config is None:
        return []
    site = config if isinstance(config, schema.SiteConfig) else None
    rules = config.policy if isinstance(config, schema.SiteConfig) else config
    refusals = []
    try:
        policy.require_survey(rules, survey)
    except errors.PolicyRefused as refusal:
        refusals.append(str(refusal))
    try:
        if site is not None:
            survey_steps.require_budget(survey, site.privacy)
    except errors.PolicyRefused as refusal:
        refusals.append(str(refusal))
    return refusals


def tell(survey: surveys.Survey, site: schema.SiteConfig) -> Mapping[str, Sequence[int | None]]:
    """What this site would tell as its data are now, without noise; nothing is kept, charged or sent.

    Raises:
        PolicyRefused: "policy-units" if there are too few patients.
        ConfigError, DataError: if survey and data do not go together.
    """
    source, own_samples = site_file.surveyed(site, survey)
    grouped = collection.patients(own_samples, source)
    least = max(survey.least_patients, site.policy.min_units)
    answer.require_enough(len(grouped), least)
    return answer.of_totals(survey, site.name, collection.totals(survey, grouped, source.read), least).values


def told_lines(survey: surveys.Survey, values: Mapping[str, Sequence[int | None]]) -> list[str]:
    """The same for a terminal: bins that have a number, in patients."""
    rows = []
    for group in layout.groups(survey):
        row = values[group.name]
        if seen := layout.moments(group, row):
            sentence = (
                f"{seen.count / layout.WHOLE:g} patients, mean {seen.mean:.4g}, standard deviation {seen.deviation:.4g}"
            )
            rows.append(f"  {group.name}: {sentence}{group.unit and ' '}{group.unit}")
            continue
        shown = [
            f"{label}: {value / layout.WHOLE:.2f}".removesuffix(".00")
            for label, value in zip(group.labels, row, strict=True)
            if value is not None
        ]
        rows.append(f"  {group.name}: {'; '.join(shown) if shown else 'all of it is withheld'}")
    return rows


def to_json(survey: surveys.Survey, refusals: Sequence[str], answered: int) -> dict[str, Any]:
    """The review for scripts."""
    return {
        "survey": survey.hash,
        "words": words(survey, answered),
        "accepted": not refusals,
        "refusals": list(refusals),
    }
