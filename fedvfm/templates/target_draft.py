"""``[target]`` and ``[inputs]`` of a drafted recipe: what a table says of its columns, or examples where there is none.

What is read here is written into a file for its owner to look at. A recipe for several hospitals needs published
constants instead, or those of a survey.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.config import inputs as inputs_config
from fedvfm.config import target as config
from fedvfm.data import columns, defect
from fedvfm.data import sample as data
from fedvfm.report import quantity

KINDS: tuple[str, ...] = get_args(config.TargetConfig.model_fields["kind"].annotation)
DIGITS = 3
"""Of a constant that is computed of a table: it is no more exact than its cases are many."""
MARGIN = 0.25
"""How far a range reaches beyond the values of a table, in parts of their span: other cases lie outside of them."""
MOST_WORDS = 20
"""Different words of a column that is drafted as a category; more are names or notes."""
QUANTILES = (0.25, 0.5, 0.75)
"""Of the times of events: where drafted bins end."""
EXAMPLES: Mapping[str, Any] = {"range": [0.0, 100.0], "centre": 50.0, "scale": 25.0, "bins": [12.0, 24.0, 60.0]}


def required(kind: str, names: Sequence[str]) -> bool:
    """Whether a target is of columns, once it is one that can be drafted.

    Args:
        kind: of the target.
        names: of its columns, or of its grades in their order.

    Raises:
        ConfigError: for a kind that is none, or columns or an order that nobody said.
    """
    if kind not in KINDS:
        raise errors.ConfigError("--target", [f"'{kind}': known are {', '.join(KINDS)}"])
    if kind == "ordinal" and not names:
        raise errors.ConfigError("--target", ["'ordinal': say the grades in their order, as --classes low,middle,high"])
    of_columns = kind in config.OF_COLUMNS
    if (of_columns and not names) or (kind in config.PROGNOSIS and len(names) != 2):
        what = "a time and an event, as --classes months,died" if kind in config.PROGNOSIS else "as --classes age,crp"
        raise errors.ConfigError("--target", [f"'{kind}': say the columns of the table, {what}"])
    return of_columns


def examples(kind: str, names: Sequence[str]) -> dict[str, Any]:
    """Keys of ``recipe.target`` with values that only show their form. Args: see :func:`required`."""
    if kind == "class":
        return {}
    values: dict[str, Any] = {"kind": kind}
    if kind == "regression":
        values |= _lists([EXAMPLES] * len(names))
    return values | ({"bins": EXAMPLES["bins"]} if kind in config.PROGNOSIS else {})


def of_source(source: data.Source, kind: str, names: Sequence[str]) -> dict[str, Any]:
    """Keys of ``recipe.target`` with values that a source's table suggests.

    Args:
        source: of images, with a table where the target is of columns.
        kind: see :func:`required`.
        names: see :func:`required`.

    Raises:
        DataError: if the table lacks a column, or its cells suggest nothing.
    """
    values = examples(kind, names)
    if kind not in config.OF_COLUMNS or not isinstance(source, columns.Tabled):
        return values
    columns.require_columns(source, names, "--classes")
    rows = _rows(source)
    if kind == "regression":
        values |= _lists([_numbers(source, rows, name) for name in names])
    if kind in config.PROGNOSIS:
        values["bins"] = _bins(source, rows, *names)
    return values


def inputs_of_source(source: data.Source, names: Sequence[str], answered: Sequence[str] = ()) -> dict[str, Any]:
    """Keys of ``recipe.inputs`` with values that a source's table suggests: a column is of numbers, or of words.

    Args:
        source: of images, with a table where there are names.
        names: columns; empty: nothing beside the images.
        answered: columns that the target learns.

    Raises:
        ConfigError: for a column that can be no input.
        DataError: if there is no table, it lacks a column, or a column's cells suggest nothing.
    """
    if not names:
        return {}
    if not isinstance(source, columns.Tabled):
        raise defect.TABLE.error(f"{source.info.name}: there is no table of columns; leave --inputs out")
    columns.require_columns(source, names, "--inputs")
    rows = _rows(source)
    words = {name: _words(rows, name) for name in names}
    numbers = [name for name in names if all(map(_is_number, words[name]))]
    values: dict[str, Any] = {}
    if numbers:
        values = {"numbers": numbers} | _lists([_numbers(source, rows, name) for name in numbers])
    categories = {name: words[name] for name in names if name not in numbers}
    for name, held in categories.items():
        if any(_is_number(word) or _is_amount(word) for word in held):
            text = "some cells are no number: write decimals with a point, and no unit; or words in every cell"
            raise defect.TABLE.error(f"{source.info.name}: column '{name}': {text}")
        if not 2 <= len(held) <= MOST_WORDS:
            text = f"{quantity.of(len(held), 'different word')}, and a category has 2 to {MOST_WORDS}"
            raise defect.TABLE.error(f"{source.info.name}: column '{name}': {text}; name another column")
    values |= {"categories": categories} if categories else {}
    if faults := inputs_config.InputsConfig.model_validate(values).faults(tuple(answered)):
        raise errors.ConfigError("--inputs", faults)
    return values


def _lists(constants: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Keys of a recipe -> lists, from the constants of each column of numbers."""
    return {f"{key}s": [each[key] for each in constants] for key in ("range", "centre", "scale")}


def _rows(source: columns.Tabled) -> dict[str, Mapping[str, str]]:
    """Each row once, by its case, volume or image."""
    return {sample.case or sample.unit: source.row(sample) for sample in source.samples()}


def _words(rows: Mapping[str, Mapping[str, str]], name: str) -> list[str]:
    """What stands in a column, each word once, whatever its capitals; without missing cells."""
    held: dict[str, str] = {}
    for cell in (row.get(name, "").strip() for row in rows.values()):
        if columns.number(cell) is not None:
            held.setdefault(cell.casefold(), cell)
    return sorted(held.values())


def _is_number(word: str) -> bool:
    return math.isfinite(columns.number(word) or 0.0)


def _is_amount(word: str) -> bool:
    """Whether this was meant as a number: 5,3 or <5."""
    return any(letter.isdigit() for letter in word) and not any(letter.isalpha() for letter in word)


def _column(rows: Mapping[str, Mapping[str, str]], name: str) -> NDArray[np.float64]:
    """A column, NaN where a cell is missing or no number. Shapes: (cases,)."""
    cells = [columns.number(row.get(name, "")) for row in rows.values()]
    return np.array([math.nan if cell is None or not math.isfinite(cell) else cell for cell in cells])


def _numbers(source: data.Source, rows: Mapping[str, Mapping[str, str]], name: str) -> dict[str, Any]:
    """Range, centre and scale of a column of numbers."""
    held = _column(rows, name)
    held = held[np.isfinite(held)]
    if len(held) == 0 or held.min() == held.max():
        text = f"column '{name}': {'no value' if len(held) == 0 else 'all values are alike'}; name another column"
        raise defect.TABLE.error(f"{source.info.name}: {text}")
    low, high = float(held.min()), float(held.max())
    span = high - low
    least = low - MARGIN * span if low < 0 else max(0.0, low - MARGIN * span)
    return {
        "range": [_rounded(least, span), _rounded(high + MARGIN * span, span)],
        "centre": _rounded(float(held.mean()), span),
        "scale": _rounded(float(held.std()), span),
    }


def _bins(source: data.Source, rows: Mapping[str, Mapping[str, str]], time: str, event: str) -> list[float]:
    """Ends of intervals in which about as many events fall each."""
    times = _column(rows, time)[_column(rows, event) == 1.0]
    times = times[np.isfinite(times) & (times > 0)]
    ends = {_rounded(float(end), float(end)) for end in np.quantile(times, QUANTILES)} if len(times) else set()
    if len(ends) < 2:
        raise defect.TABLE.error(
            f"{source.info.name}: columns '{time}', '{event}': {len(times)} cases with an event (1) after time 0, too "
            "few or too much alike for bins; name other columns"
        )
    return sorted(ends)


def _rounded(value: float, size: float) -> float:
    """To as many places as a number of this size has of DIGITS digits."""
    return round(value, DIGITS - 1 - math.floor(math.log10(size)))
