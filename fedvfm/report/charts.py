"""Charts as inline SVG: no script, no font, no network. Colours come from the page's style sheet by class name.

Every mark has a ``<title>`` (shown on hover, read by screen readers), lines carry their name at their end, and series
differ in dash and marker as well as in colour. All coordinates are in the units of the view box, 440 wide, so that a
chart fills a phone without its text shrinking too far.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedvfm.storage import storage

COLOURS = 6
MANY = 8
WIDTH, HEIGHT = 440.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 104.0, 12.0, 40.0
LABEL_GAP = 15.0
DASHES = ("", "6 3", "2 3")

Point = tuple[float, float]
Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart: its name and its (x, y) points in order of x."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Whisker:
    """One row of a chart of intervals; without an interval ``low`` and ``high`` are None."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map from data to view box."""

    data: Range
    view: Range

    def __call__(self, value: float) -> float:
        """The coordinate of ``value``."""
        low, high = self.data
        share = (value - low) / (high - low) if high > low else 0.5
        return self.view[0] + share * (self.view[1] - self.view[0])


STYLE = (
    "svg{background:#fff;font:12.5px system-ui,sans-serif}text{fill:#1b1f24}.grid{stroke:#d0d7de;stroke-width:.7}"
    ".axis{stroke:#57606a}.line{fill:none;stroke-width:2;stroke-linejoin:round}.leader{fill:none;stroke-width:.8}"
    ".faint{stroke:#57606a;stroke-width:.8;opacity:.45}.dot{stroke:none}"
    + "".join(
        f".c{at}{{stroke:{colour}}}.dot.c{at}{{fill:{colour}}}"
        for at, colour in enumerate(("#0072b2", "#d55e00", "#008a64", "#b0568d", "#a87000", "#2a8cc4"))
    )
)
"""For a chart outside a page of ours, which has none of its colours."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A chart by itself: a notebook shows it, and it can be kept as a file.

    Attributes:
        svg: the chart with its own colours.
    """

    svg: str

    @staticmethod
    def of(svg: str) -> Picture:
        """A chart of this module with what it needs outside a page."""
        opened = svg.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * 1.5:g}" ', 1)
        head, closed, rest = opened.partition(">")
        return Picture(f"{head}{closed}<style>{STYLE}</style>{rest}")

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as an SVG file.

        Raises:
            StorageError: if the disk refuses.
        """
        storage.write_text(Path(path), self.svg)
        return Path(path)


def ticks(low: float, high: float, number: int = 5) -> list[float]:
    """Round numbers inside [low, high], about ``number`` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, number)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(at * step, 12) for at in range(first, last + 1)]


def shorten(name: str, length: int = 14) -> str:
    """A name cut to ``length`` characters, its end kept because numbered sites differ there."""
    if len(name) <= length:
        return name
    tail = (length - 1) // 2
    return f"{name[: length - 1 - tail]}…{name[-tail:]}"


def line(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    bounds: Range = (-math.inf, math.inf),
    from_edge: bool = False,
) -> str:
    """Lines over whole-numbered x. More than :data:`MANY` become faint, with their mean in front.

    Args:
        series: at least one with a point.
        title: what the chart shows, for those who cannot see it.
        x_label: name of the horizontal axis.
        y_label: name of the vertical axis.
        bounds: values the y axis never goes beyond (0 and 1 for a share).
        from_edge: the y axis starts at the lower bound, wherever the values lie.
    """
    shown = [each for each in series if each.points]
    xs = [x for each in shown for x, _ in each.points]
    ys = [y for each in shown for _, y in each.points]
    x_scale = Scale((min(xs), max(xs)), (LEFT, WIDTH - RIGHT))
    y_scale = Scale(_padded(ys + [bounds[0]] * from_edge, bounds), (HEIGHT - BOTTOM, TOP))
    marks = _frame(x_scale, y_scale, x_label, y_label)
    if len(shown) > MANY:
        marks += [_path(each, x_scale, y_scale, "faint", "") for each in shown]
        shown = [_mean(shown)]
    for at, each in enumerate(shown):
        marks.append(_path(each, x_scale, y_scale, f"c{at % COLOURS}", DASHES[at // COLOURS % len(DASHES)]))
        marks += _dots(each, x_scale, y_scale, at, x_label)
    marks += _end_labels(shown, x_scale, y_scale)
    return _svg(WIDTH, HEIGHT, title, marks)


def _padded(values: Sequence[float], bounds: Range) -> Range:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    return max(low - margin, bounds[0]), min(high + margin, bounds[1])


def _mean(series: Sequence[Series]) -> Series:
    """The mean over all series at every x that one of them has."""
    columns: dict[float, list[float]] = {}
    for each in series:
        for x, y in each.points:
            columns.setdefault(x, []).append(y)
    return Series(f"mean of {len(series)}", [(x, sum(ys) / len(ys)) for x, ys in sorted(columns.items())])


def _frame(x_scale: Scale, y_scale: Scale, x_label: str, y_label: str) -> list[str]:
    left, right = x_scale.view
    bottom, top = y_scale.view
    marks = []
    for value in ticks(*y_scale.data):
        y = y_scale(value)
        marks.append(f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(_text(left - 6, y + 4, f"{value:g}", "end"))
    for value in (tick for tick in ticks(*x_scale.data) if tick == int(tick)):
        marks.append(_text(x_scale(value), bottom + 16, f"{value:g}", "middle"))
    marks.append(f'<line class="axis" x1="{left:.1f}" x2="{right:.1f}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>')
    marks.append(_text((left + right) / 2, bottom + 34, x_label, "middle"))
    middle = (bottom + top) / 2
    marks.append(f'<g transform="rotate(-90 11 {middle:.1f})">{_text(11, middle + 3, y_label, "middle")}</g>')
    return marks


def _path(series: Series, x_scale: Scale, y_scale: Scale, colour: str, dash: str) -> str:
    points = " ".join(f"{x_scale(x):.1f},{y_scale(y):.1f}" for x, y in series.points)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    last = f"{series.name}: {series.points[-1][1]:.4g} at the end"
    return f'<polyline class="line {colour}" points="{points}"{dashes}><title>{html.escape(last)}</title></polyline>'


def _dots(series: Series, x_scale: Scale, y_scale: Scale, at: int, x_label: str) -> list[str]:
    """A marker a point; its shape tells series apart where colour does not."""
    radius = 3.4 if len(series.points) <= 20 else 2.0
    return [
        _marker(x_scale(x), y_scale(y), radius, at, f"{series.name}, {x_label} {x:g}: {y:.4g}")
        for x, y in series.points
    ]


def _marker(x: float, y: float, radius: float, at: int, name: str) -> str:
    title, colour = f"<title>{html.escape(name)}</title>", f"c{at % COLOURS}"
    if at % 3 == 0:
        return f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}">{title}</circle>'
    if at % 3 == 1:
        side, turn = 1.8 * radius, ""
    else:
        side, turn = 1.8 * radius, f' transform="rotate(45 {x:.1f} {y:.1f})"'
    corner = f'x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side:.1f}" height="{side:.1f}"'
    return f'<rect class="dot {colour}" {corner}{turn}>{title}</rect>'


def _end_labels(shown: Sequence[Series], x_scale: Scale, y_scale: Scale) -> list[str]:
    """Names at the right edge, moved apart where lines end together, with a thin line back to their own."""
    right = x_scale.view[1]
    ends = [y_scale(series.points[-1][1]) for series in shown]
    marks = []
    for at, (series, end, y) in enumerate(zip(shown, ends, spread(ends, LABEL_GAP, TOP, HEIGHT - BOTTOM), strict=True)):
        x = x_scale(series.points[-1][0])
        marks.append(f'<polyline class="leader c{at % COLOURS}" points="{x:.1f},{end:.1f} {right + 9:.1f},{y:.1f}"/>')
        label = f"<title>{html.escape(series.name)}</title>{html.escape(shorten(series.name))}"
        marks.append(f'<text x="{right + 12:.1f}" y="{y + 4:.1f}">{label}</text>')
    return marks


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved as little as needed to be ``gap`` apart and inside [low, high] while there is room."""
    order = sorted(range(len(positions)), key=lambda at: positions[at])
    moved = [0.0] * len(positions)
    floor = low
    for at in order:
        moved[at] = max(positions[at], floor)
        floor = moved[at] + gap
    ceiling = high
    for at in reversed(order):
        moved[at] = min(moved[at], ceiling)
        ceiling = moved[at] - gap
    return moved


def whiskers(rows: Sequence[Whisker], *, title: str, x_label: str, bounds: Range = (-math.inf, math.inf)) -> str:
    """Dots with intervals, a row each, the first one coloured: it is the one the others are compared with."""
    values = [value for row in rows for value in (row.value, row.low, row.high) if value is not None]
    left, right, height = 136.0, WIDTH - 52.0, 24.0 * len(rows) + 46.0
    scale = Scale(_padded(values, bounds), (left, right))
    bottom = height - 40.0
    marks = []
    for value in ticks(*scale.data, 4):
        x = scale(value)
        marks.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{bottom:.1f}"/>')
        marks.append(_text(x, bottom + 16, f"{value:g}", "middle"))
    reference = scale(rows[0].value)
    marks.append(f'<line class="reference" x1="{reference:.1f}" x2="{reference:.1f}" y1="4" y2="{bottom:.1f}"/>')
    for at, row in enumerate(rows):
        marks += _whisker(row, scale, 16.0 + 24.0 * at, "c0" if at == 0 else "plain")
    marks.append(_text((left + right) / 2, bottom + 34, x_label, "middle"))
    return _svg(WIDTH, height, title, marks)


def _whisker(row: Whisker, scale: Scale, y: float, colour: str) -> list[str]:
    marks = [_text(128, y + 4, shorten(row.name, 19), "end"), _text(WIDTH - 4, y + 4, f"{row.value:.3f}", "end")]
    name = f"{row.name}: {row.value:.3f}"
    if row.low is not None and row.high is not None:
        name += f", 95 % interval {row.low:.3f} to {row.high:.3f}"
        ends = f'x1="{scale(row.low):.1f}" x2="{scale(row.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
        marks.append(f'<line class="whisker {colour}" {ends}/>')
    title = f"<title>{html.escape(name)}</title>"
    return [*marks, f'<circle class="dot {colour}" cx="{scale(row.value):.1f}" cy="{y:.1f}" r="4.5">{title}</circle>']


def bars(rows: Sequence[tuple[str, float, str]], *, title: str) -> str:
    """Horizontal bars from zero on a linear scale: (name, value, what stands behind the bar)."""
    left, right, height = 136.0, WIDTH - 92.0, 30.0 * len(rows) + 6.0
    scale = Scale((0.0, max([value for _, value, _ in rows] + [1e-12])), (left, right))
    marks = []
    for at, (name, value, label) in enumerate(rows):
        y, width = 4.0 + 30.0 * at, max(1.0, scale(value) - left)
        marks.append(_text(128, y + 16, shorten(name, 19), "end"))
        hover = f"<title>{html.escape(f'{name}: {label}')}</title>"
        colour = "c0" if at == 0 else "plain"
        marks.append(f'<rect class="bar {colour}" x="{left}" y="{y}" width="{width:.1f}" height="22">{hover}</rect>')
        marks.append(_text(left + width + 6, y + 16, label, "start"))
    return _svg(WIDTH, height, title, marks)


def heat(rows: Sequence[tuple[str, Sequence[tuple[str, float, str] | None]]], *, title: str) -> str:
    """A field of coloured cells without numbers, for more sites than a table can show.

    Args:
        rows: row name and its cells: (column name, value, fill colour), or None for one that stays empty.
        title: what the chart shows.
    """
    side = WIDTH / max(len(cells) for _, cells in rows)
    marks = []
    for down, (name, cells) in enumerate(rows):
        for across, cell in enumerate(cells):
            if cell is None:
                continue
            column, value, fill = cell
            hover = f"<title>{html.escape(f'{name} at {column}: {value:.3f}')}</title>"
            place = f'x="{across * side:.2f}" y="{down * side:.2f}" width="{side:.2f}" height="{side:.2f}"'
            marks.append(f'<rect {place} fill="{fill}">{hover}</rect>')
    return _svg(WIDTH, side * len(rows), title, marks)


def _text(x: float, y: float, value: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(value)}</text>'


def _svg(width: float, height: float, title: str, marks: Sequence[str]) -> str:
    name = html.escape(title, quote=True)
    view = f'viewBox="0 0 {width:g} {height:g}"'
    return f'<svg {view} role="img" aria-label="{name}"><title>{name}</title>{"".join(marks)}</svg>'
