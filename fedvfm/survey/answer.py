"""A site's answer as it travels and lies on disk, and the answers of all sites as one result. NumPy alone.

JSON of a fixed form: a number or null for each bin that the survey names, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.config import survey as surveys
from fedvfm.survey import layout, statistics
from fedvfm.trust import signed_documents

MOST = 2**53
LEAST_SITES = 3
"""From so many on, one that tells another story than the others can be told from them."""
BELOW = 0.999
"""Of the patients of all others: a little less than half of all is no median."""
MAX_TEXT = 1_000_000
Number = Annotated[int, Field(ge=-MOST, le=MOST)]


class Answer(schema.Strict):
    """What one site tells.

    Attributes:
        survey: hash of the survey it answers.
        site: whose it is.
        least: patients that a number has a part of at least, where there is no noise.
        values: numbers of each group in units of :data:`fedvfm.survey.layout.WHOLE` a patient; null is withheld.
        sigmas: standard deviation of the noise of each group in the same units; empty without noise.
    """

    format: Literal["fedvfm-survey-answer-1"] = "fedvfm-survey-answer-1"
    survey: schema.Sha256
    site: schema.SiteName
    least: Annotated[int, Field(ge=2, le=10_000)]
    values: dict[str, Annotated[tuple[Number | None, ...], Field(strict=False)]]
    sigmas: dict[str, Annotated[int, Field(ge=1, le=MOST)]] = Field(default_factory=dict)


def text(answer: Answer) -> str:
    """As it travels: compact JSON in ASCII."""
    return answer.model_dump_json()


def parse(data: str, survey: surveys.Survey, site: str) -> Answer:
    """An answer that came, held against what was asked.

    Raises:
        ProtocolError: if it is of another survey or site, holds more or less than was asked, or numbers that no data
            could have.
    """
    try:
        answer = signed_documents.parse(data.encode(), Answer, "answer to a survey")
    except errors.TrustError as error:
        raise errors.ProtocolError(str(error)) from None
    wrong = faults(answer, survey, site)
    if wrong:
        raise errors.ProtocolError(f"answer to survey {survey.hash[:12]}: {wrong[0]}")
    return answer


def faults(answer: Answer, survey: surveys.Survey, site: str) -> list[str]:
    """What is wrong with an answer; a sentence each."""
    groups = layout.groups(survey)
    if (answer.survey, answer.site) != (survey.hash, site):
        return ["it is of another survey or site than was asked"]
    asked = {group.name: len(group.labels) for group in groups}
    if {name: len(row) for name, row in answer.values.items()} != asked:
        return ["it holds other groups or bins than were asked for"]
    if set(answer.sigmas) != (set(asked) if survey.privacy is not None else set()):
        return ["its noise is not what was asked for"]
    if answer.least < survey.least_patients:
        return [f"it counts from {answer.least} patients on; the survey asks for {survey.least_patients} at least"]
    if answer.sigmas:
        return [] if all(None not in row for row in answer.values.values()) else ["a number with noise is left out"]
    every = [value for row in answer.values.values() for value in row if value is not None]
    if any(value < 0 for value in every):
        return ["a number is below nought, and it has no noise"]
    for group in groups:
        row = answer.values[group.name]
        if group.span is not None and set(row) != {None} and (None in row or list(row) != sorted(row, reverse=True)):  # type: ignore[type-var]
            return ["the sums of a column are none that values could have"]
    patients = answer.values.get("patients", (None,))[0]
    most = MOST if patients is None else patients
    sums = [
        max(known) if group.several else sum(known)
        for group in groups
        if (known := [value for value in answer.values[group.name] if value is not None])
    ]
    return ["a group has more patients than there are"] if any(total > most for total in sums) else []


@dataclass(frozen=True)
class Merged:
    """The answers of several sites together.

    Attributes:
        survey: what was asked.
        sites: who answered, by name.
        values: sum of what the sites tell, in patients; None where every site withholds it.
        withheld: how many sites withhold a bin.
        noise: standard deviation of the noise on each number of a group, in patients; empty without noise.
        least: the largest least number of patients that a site went by.
    """

    survey: surveys.Survey
    sites: tuple[str, ...]
    values: Mapping[str, tuple[float | None, ...]]
    withheld: Mapping[str, tuple[int, ...]]
    noise: Mapping[str, float]
    least: int

    def group(self, name: str) -> layout.Group | None:
        """The layout of a group; None where it was not asked for."""
        return next((group for group in layout.groups(self.survey) if group.name == name), None)

    @property
    def patients(self) -> float | None:
        """How many there are; None where that was not asked for."""
        return self.values["patients"][0] if "patients" in self.values else None


def patients(survey: surveys.Survey, answer: Answer) -> float:
    """The patients that an answer can count for: what it says, or the most that a group of it has, whichever is more.

    With noise nothing holds a group to the patients that are said, and a number below nought moves a median as one
    above does: both count.
    """
    sizes = [0]
    for group in layout.groups(survey):
        row = [abs(value) for value in answer.values[group.name] if value is not None]
        sizes += [max(row) if group.several else sum(row)] if row else []
    return max(sizes) / layout.WHOLE


def weights(survey: surveys.Survey, answers: Sequence[Answer]) -> dict[str, float]:
    """Site -> what its patients are multiplied by where it would count for more than all others together; mostly none.

    Nobody can check how many patients a site says that it has. With this bound one site of three or more has less than
    half of the weight, and a median stays within what the others tell. Of two sites none can be told from the other.
    """
    if len(answers) < LEAST_SITES:
        return {}
    sizes = {answer.site: patients(survey, answer) for answer in answers}
    others = {site: sum(sizes.values()) - size for site, size in sizes.items()}
    return {site: BELOW * others[site] / size for site, size in sizes.items() if 0 < BELOW * others[site] < size}


def merged(survey: surveys.Survey, answers: Sequence[Answer], weight: Mapping[str, float] | None = None) -> Merged:
    """All answers as one result: exact sums of whole numbers, so that their order does not matter.

    Args:
        survey: what was asked.
        answers: of the sites.
        weight: as :func:`weights` gave them; none for the sums themselves.

    Raises:
        ConfigError: if there is none.
    """
    if not answers:
        raise errors.ConfigError("survey", [f"no site has answered survey {survey.hash[:12]} yet"])
    ordered, factors = sorted(answers, key=lambda answer: answer.site), weight or {}
    values: dict[str, tuple[float | None, ...]] = {}
    hidden: dict[str, tuple[int, ...]] = {}
    noise: dict[str, float] = {}
    for group in layout.groups(survey):
        columns = list(zip(*(answer.values[group.name] for answer in ordered), strict=True))
        known = [
            [value * factors.get(own.site, 1) for own, value in zip(ordered, column, strict=True) if value is not None]
            for column in columns
        ]
        values[group.name] = tuple(sum(column) / layout.WHOLE if column else None for column in known)
        hidden[group.name] = tuple(sum(value is None for value in column) for column in columns)
        variance = sum((factors.get(own.site, 1) * own.sigmas.get(group.name, 0)) ** 2 for own in ordered)
        if variance:
            noise[group.name] = math.sqrt(variance) / layout.WHOLE
    least = max(answer.least for answer in ordered)
    return Merged(survey, tuple(answer.site for answer in ordered), values, hidden, noise, least)


def of_totals(survey: surveys.Survey, site: str, totals: statistics.Totals, least: int) -> Answer:
    """An answer without noise.

    Raises:
        PolicyRefused: "policy-units" if there are fewer patients than the least.
    """
    require_enough(totals.patients, least)
    return Answer(survey=survey.hash, site=site, least=least, values=totals.shown(layout.groups(survey), least))


def require_enough(patients: int, least: int) -> None:
    """Check that there are patients enough for any answer.

    Raises:
        PolicyRefused: "policy-units".
    """
    if patients < least:
        detail = f"{patients} patients for a survey; at least {least} are asked for, so nothing is told of them"
        raise errors.PolicyRefused("policy-units", detail)


def to_json(result: Merged) -> dict[str, Any]:
    """The result for scripts: every group with its bins, patients in each, and at how many sites it is withheld."""
    return {
        "format": "fedvfm-survey-1",
        "survey": result.survey.hash,
        "asked": result.survey.model_dump(mode="json"),
        "sites": list(result.sites),
        "patients": result.patients,
        "least_patients": result.least,
        "groups": {
            group.name: {
                "statistic": group.statistic,
                "unit": group.unit,
                "edges": list(group.edges),
                **_column(group, result.values[group.name]),
                "bins": list(group.labels),
                "patients": list(result.values[group.name]),
                "withheld_at": list(result.withheld[group.name]),
                "noise": result.noise.get(group.name),
            }
            for group in layout.groups(result.survey)
        },
    }


def _column(group: layout.Group, row: Sequence[float | None]) -> dict[str, Any]:
    """Of a column of a table its range, mean and standard deviation."""
    if group.span is None:
        return {}
    seen = layout.moments(group, row)
    values = {"mean": None, "deviation": None} if seen is None else {"mean": seen.mean, "deviation": seen.deviation}
    return {"range": list(group.span), **values}
