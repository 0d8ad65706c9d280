"""Metrics of prognosis from times, events and predicted survival at public points in time; NumPy alone.

Cases weigh in by the inverse of the chance of not being censored (IPCW), which the Kaplan-Meier estimate of the tested
cases themselves gives; a site needs nobody else's times for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.tasks import metrics

Floats = NDArray[np.float64]
Events = NDArray[np.bool_]


class PrognosisScores(metrics.MetricSet):
    """Base of metric sets whose rows begin with time and event.

    Args:
        class_names: of the columns: time and event.
        columns: names of the numbers that were predicted.
    """

    def __init__(self, class_names: Sequence[str], columns: Sequence[str]) -> None:
        super().__init__(class_names, ["time", "event", *columns])

    def _keep(self, sample_id: str, answer: Floats, truth: Sequence[float | None], part: metrics.Part | None) -> None:
        """Score one sample, or keep a slice until its volume is whole: its answer is the mean of its slices'."""
        if len(truth) != 2 or None in truth:
            raise errors.DataError(f"sample '{sample_id}': time and event must be known to score it; leave it out")
        whole = np.concatenate([np.asarray(truth, dtype=np.float64), answer])
        if part is None:
            self._insert(sample_id, whole)
        else:
            self._collect(part, whole)

    def _whole(self, part: metrics.Part, pieces: Sequence[Any]) -> None:
        if any(not np.array_equal(piece[:2], pieces[0][:2]) for piece in pieces):
            raise errors.DataError(f"volume '{part.volume}': its slices have different times; give it one")
        self._insert(part.volume, np.mean(pieces, axis=0))


class SurvivalScores(PrognosisScores):
    """What a prediction of survival at the points of ``bins`` is worth.

    * ``one_minus_ibs``: 1 minus the integrated Brier score over those points that come before the last follow-up; it
      ranks models. Always to say one half gives about 0.75; below 0 is possible in tiny sets.
    * ``c_index``: Harrell's, of the risk 1 minus mean survival over the points; ``c_index_uno``: by IPCW, up to the
      last point. Left out where no two cases can be compared.
    * ``calibration_error``: mean predicted survival at the last usable point minus what Kaplan-Meier observed there.
    * ``event_share``: cases with an event; the rest are censored.

    Args:
        class_names: of the columns: time and event.
        bins: points in time, ascending.

    Raises:
        DataError: by :meth:`value`, where no case is followed up beyond the first point.

    Sources: Graf et al., "Assessment and comparison of prognostic classification schemes for survival data", Statistics
        in Medicine 18, 1999; Harrell et al., "Evaluating the yield of medical tests", JAMA 247, 1982; Uno et al., "On
        the C-statistics for evaluating overall adequacy of risk prediction procedures with censored survival data",
        Statistics in Medicine 30, 2011. Equal to scikit-survival where training and test cases are the same.
    """

    PRIMARY = "one_minus_ibs"

    def __init__(self, class_names: Sequence[str], bins: Sequence[float]) -> None:
        super().__init__(class_names, [f"survival_{k}" for k in range(len(bins))])
        self.bins = np.asarray(bins, dtype=np.float64)

    def add(self, sample_id: str, survival: Floats, truth: Sequence[float | None], part: metrics.Part | None) -> None:
        """Score one sample.

        Shapes: ``survival`` (J,) at the points of ``bins``; ``truth`` is (time, event).

        Raises:
            DataError: if survival is no chance at every point, or time or event is not known.
        """
        row = np.asarray(survival, dtype=np.float64)
        if row.shape != self.bins.shape or not np.isfinite(row).all() or (row < 0).any() or (row > 1).any():
            raise errors.DataError(f"sample '{sample_id}': {row.tolist()} is no survival at {len(self.bins)} points")
        self._keep(sample_id, row, truth, part)

    def _settings(self) -> tuple[Any, ...]:
        return (*super()._settings(), tuple(self.bins.tolist()))

    def per_sample(self) -> dict[str, list[float]]:
        """See MetricSet; first each sample's part of ``one_minus_ibs``, whose mean it is."""
        return {self.PRIMARY: (1 - self._shares()).tolist(), **super().per_sample()}

    def value(self) -> dict[str, float]:
        """one_minus_ibs, [c_index, c_index_uno], calibration_error, event_share."""
        table = self._table()
        time, event, survival = table[:, 0], table[:, 1] > 0, table[:, 2:]
        risk, used = 1 - survival.mean(axis=1), self._used(time)
        values = {self.PRIMARY: float(1 - self._shares().mean())}
        plain, uno = concordance(time, event, risk), concordance(time, event, risk, until=float(self.bins[-1]))
        values |= {} if plain is None else {"c_index": plain}
        values |= {} if uno is None else {"c_index_uno": uno}
        at = float(self.bins[used[-1]])
        values["calibration_error"] = float(survival[:, used[-1]].mean()) - float(kaplan_meier(time, event)(at)[0])
        return values | {"event_share": float(event.mean())}

    def _used(self, time: Floats) -> NDArray[np.int64]:
        """Numbers of the points that come before the last follow-up."""
        used = np.flatnonzero(self.bins < time.max())
        if not len(used):
            raise errors.DataError(
                f"no case of {len(time)} is followed up beyond {self.bins[0]:g}, the first of recipe.target.bins: no "
                "prognosis can be scored; bring longer follow-up, or state earlier bins"
            )
        return used

    def _shares(self) -> Floats:
        """Each case's part of the integrated Brier score. Shapes: (samples,)."""
        table = self._table()
        used = self._used(table[:, 0])
        return brier(table[:, 0], table[:, 1] > 0, table[:, 2 + used], self.bins[used])


class CoxScores(PrognosisScores):
    """How well a risk orders cases: what a model without a baseline hazard can be asked.

    * ``c_index``: Harrell's; it ranks models. ``c_index_uno``: by IPCW, up to ``horizon``; left out where no two cases
      can be compared before it.
    * ``event_share``: cases with an event; the rest are censored.

    Brier scores and calibration need chances of survival, which a risk alone does not give.

    Args:
        class_names: of the columns: time and event.
        horizon: from which time on events do not count in Uno's C-index.

    Raises:
        DataError: by :meth:`value`, where no two cases can be compared.

    Sources: as of :class:`SurvivalScores`.
    """

    PRIMARY = "c_index"

    def __init__(self, class_names: Sequence[str], horizon: float) -> None:
        super().__init__(class_names, ["log_risk"])
        self.horizon = float(horizon)

    def add(self, sample_id: str, log_risk: Floats, truth: Sequence[float | None], part: metrics.Part | None) -> None:
        """Score one sample.

        Shapes: ``log_risk`` (1,); ``truth`` is (time, event).

        Raises:
            DataError: if the risk is no finite number, or time or event is not known.
        """
        row = np.asarray(log_risk, dtype=np.float64)
        if row.shape != (1,) or not np.isfinite(row).all():
            raise errors.DataError(f"sample '{sample_id}': {row.tolist()} is no logarithm of a risk")
        self._keep(sample_id, row, truth, part)

    def _settings(self) -> tuple[Any, ...]:
        return (*super()._settings(), self.horizon)

    def per_sample(self) -> dict[str, list[float]]:
        """See MetricSet; first each sample's part of ``c_index``, whose mean it is."""
        time, event, risk = self._columns()
        return {self.PRIMARY: concordance_parts(time, event, risk).tolist(), **super().per_sample()}

    def value(self) -> dict[str, float]:
        """c_index, [c_index_uno], event_share."""
        time, event, risk = self._columns()
        uno = concordance(time, event, risk, until=self.horizon)
        values = {self.PRIMARY: float(concordance_parts(time, event, risk).mean())}
        return values | ({} if uno is None else {"c_index_uno": uno}) | {"event_share": float(event.mean())}

    def _columns(self) -> tuple[Floats, Events, Floats]:
        table = self._table()
        return table[:, 0], table[:, 1] > 0, table[:, 2]


class Steps:
    """A step function, 1 before the first step, the value of a step from it on.

    Shapes: at and values (N,).
    """

    def __init__(self, at: Floats, values: Floats) -> None:
        self.at, self.values = at, np.concatenate([[1.0], values])

    def __call__(self, when: float | Floats) -> Floats:
        """Its value at points in time."""
        return np.asarray(self.values[np.searchsorted(self.at, np.atleast_1d(when), side="right")], dtype=np.float64)


def kaplan_meier(time: Floats, event: Events, *, censoring: bool = False) -> Steps:
    """Chance of no event up to a time; with ``censoring`` that of not being censored.

    Of an event and a censoring at one time the event comes first. Shapes: (samples,).
    """
    at = np.unique(time)
    left = np.array([(time >= when).sum() for when in at], dtype=np.float64)
    happened = np.array([(event & (time == when)).sum() for when in at], dtype=np.float64)
    ended = np.array([(time == when).sum() for when in at], dtype=np.float64) - happened
    base, steps = (left - happened, ended) if censoring else (left, happened)
    return Steps(at, np.cumprod(1 - np.divide(steps, base, out=np.zeros_like(base), where=base > 0)))


def brier(time: Floats, event: Events, survival: Floats, points: Floats) -> Floats:
    """Each case's part of the integrated Brier score: the mean over cases is the score.

    Shapes: time, event (N,); survival (N, J) at ``points`` (J,), ascending; the result (N,).
    """
    uncensored = kaplan_meier(time, event, censoring=True)
    at_point, at_time = uncensored(points), uncensored(time)
    died = (time[:, None] <= points) & event[:, None]
    alive = time[:, None] > points
    by_time = np.divide(1.0, at_time, out=np.zeros_like(at_time), where=at_time > 0)[:, None]
    by_point = np.divide(1.0, at_point, out=np.zeros_like(at_point), where=at_point > 0)
    squares = np.square(survival) * died * by_time + np.square(1 - survival) * alive * by_point
    if len(points) == 1:
        return np.asarray(squares[:, 0], dtype=np.float64)
    area: Floats = np.trapezoid(squares, points, axis=1) / (points[-1] - points[0])
    return area


def concordance(time: Floats, event: Events, risk: Floats, until: float = math.inf) -> float | None:
    """Of pairs whose order in time is known, the share in which who had the event first has the higher risk.

    Ties of the risk count half. With ``until`` pairs are weighed by IPCW and events from then on are left out (Uno's),
    else all count alike (Harrell's). None where no pair can be compared. Shapes: (N,).
    """
    weights = np.ones(len(time))
    if math.isfinite(until):
        chance = kaplan_meier(time, event, censoring=True)(time)
        weights = np.divide(1.0, np.square(chance), out=np.zeros_like(chance), where=chance > 0)
    total = agreeing = 0.0
    for first in np.flatnonzero(event & (time < until)):
        later = (time > time[first]) | ((time == time[first]) & ~event)
        higher = (risk[first] > risk[later]).sum() + 0.5 * (risk[first] == risk[later]).sum()
        total += weights[first] * later.sum()
        agreeing += weights[first] * float(higher)
    return float(agreeing / total) if total else None


def concordance_parts(time: Floats, event: Events, risk: Floats) -> Floats:
    """Each case's part of Harrell's C-index: the mean over cases is the index.

    A part is the index plus the case's influence on it, so the spread of the parts is that of the index to first order:
    means of drawn cases make its interval. Parts of single cases may lie outside of 0 to 1.

    Shapes: (N,) -> (N,).
    Source: Efron, "The Jackknife, the Bootstrap and Other Resampling Plans", SIAM 1982, chapter 6 (the infinitesimal
        jackknife), for the ratio of two U-statistics.

    Raises:
        DataError: where no two cases can be compared.
    """
    pairs, agreeing = np.zeros(len(time)), np.zeros(len(time))
    for first in np.flatnonzero(event):
        later = (time > time[first]) | ((time == time[first]) & ~event)
        higher = later * ((risk[first] > risk) + 0.5 * (risk[first] == risk))
        pairs += later
        agreeing += higher
        pairs[first] += later.sum()
        agreeing[first] += higher.sum()
    total = pairs.sum() / 2
    if not total:
        raise errors.DataError(
            f"no two of {len(time)} cases can be compared, as nobody was followed up beyond a case with an event: no "
            "C-index can be computed; bring more cases or longer follow-up"
        )
    index = agreeing.sum() / 2 / total
    return np.asarray(index + len(time) / total * (agreeing - index * pairs), dtype=np.float64)
