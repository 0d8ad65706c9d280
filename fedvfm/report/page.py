"""The shell of a report: one HTML file with its style inside, and the few pieces it is built from.

The page forbids itself every request (Content-Security-Policy), so that opening it in a hospital tells nobody.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

STYLE = """
:root { color-scheme: light dark; --bg: #ffffff; --fg: #1b1f24; --soft: #57606a; --rule: #d0d7de; --card: #f6f8fa;
  --note: #fff6dd; --note-rule: #b77e00; --link: #0060a0; --c0: #0072b2; --c1: #d55e00; --c2: #008a64; --c3: #b0568d;
  --c4: #a87000; --c5: #2a8cc4; --plain: #57606a; }
@media (prefers-color-scheme: dark) { :root { --bg: #14181d; --fg: #e6e9ec; --soft: #a5adb6; --rule: #3a424b;
  --card: #1d232a; --note: #33290f; --note-rule: #e6a817; --link: #7cc4ff; --c0: #56a8e8; --c1: #ff8a3d; --c2: #2cc79a;
  --c3: #e39cc5; --c4: #f0b73a; --c5: #a5dcff; --plain: #a5adb6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.2rem; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p, ul { margin: .4rem 0 .8rem; max-width: 46rem; }
a { color: var(--link); }
nav { margin: .8rem 0; } nav a { margin-right: .9rem; white-space: nowrap; }
code, pre { font: .86em/1.45 ui-monospace, SFMono-Regular, Consolas, "Liberation Mono", monospace; }
pre { padding: .8rem; background: var(--card); overflow-x: auto; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
.note { margin: 1rem 0; padding: .7rem 1rem; border-left: 5px solid var(--note-rule); background: var(--note);
  font-weight: 600; max-width: 46rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .8rem; margin: 1rem 0; }
.card { padding: .7rem .9rem; background: var(--card); border: 1px solid var(--rule); border-radius: 6px; }
.card b { display: block; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1.2rem; }
figure { margin: .6rem 0; } .charts figure { max-width: 40rem; }
svg { display: block; width: 100%; height: auto; font: 12.5px system-ui, sans-serif; }
svg text { fill: var(--fg); }
.grid { stroke: var(--rule); stroke-width: .7; } .axis { stroke: var(--soft); stroke-width: 1; }
.reference { stroke: var(--c0); stroke-width: 1; stroke-dasharray: 3 3; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .whisker { stroke-width: 3; }
.leader { fill: none; stroke-width: .8; } .faint { stroke: var(--plain); stroke-width: .8; opacity: .45; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); }
.c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); } .plain { stroke: var(--plain); }
.dot, .bar { stroke: none; } .dot.c0, .bar.c0 { fill: var(--c0); } .dot.c1 { fill: var(--c1); }
.dot.c2 { fill: var(--c2); } .dot.c3 { fill: var(--c3); } .dot.c4 { fill: var(--c4); } .dot.c5 { fill: var(--c5); }
.dot.plain, .bar.plain { fill: var(--plain); }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; min-width: min(100%, 34rem); font-variant-numeric: tabular-nums; font-size: .93rem; }
caption { text-align: left; padding-bottom: .3rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: min(46rem, calc(100vw - 2.6rem)); }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top; }
th:first-child, td.t, th.t { text-align: left; } td, tbody th { white-space: nowrap; }
td.t { white-space: normal; overflow-wrap: anywhere; }
thead th { border-bottom: 2px solid var(--soft); vertical-align: bottom; } tbody th { font-weight: 500; }
.matrix td { min-width: 3.6rem; border: 2px solid var(--bg); text-align: center; }
td.home { outline: 2px solid var(--fg);
  outline-offset: -4px; } tr.apart th, tr.apart td { border-top: 8px solid var(--bg); }
.samples { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1.2rem; }
.sample { margin: 0; } .sample div { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .4rem; }
.sample div.one { grid-template-columns: minmax(0, 15rem) minmax(0, 1fr); }
.sample img { width: 100%; height: auto; display: block; border-radius: 3px; }
.sample small { color: var(--soft); }
.key span { display: inline-block; width: .9em; height: .9em; margin: 0 .35em 0 .9em; vertical-align: -.08em;
  border: 1px solid var(--soft); }
.meter { display: grid; grid-template-columns: minmax(0, 7rem) 1fr 3rem; gap: .4rem; align-items: center;
  font-size: .88rem; } .meter i { display: block; height: .8rem; background: var(--c0); }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--link); }
@media (max-width: 40rem) { body { padding: .8rem; } th, td { padding: .3rem .4rem; } h1 { font-size: 1.4rem; } }
@media print { :root { color-scheme: light; --bg: #fff; --fg: #000; --soft: #444; --card: #fff; --rule: #bbb; }
  body { max-width: none; padding: 0; font-size: 11pt; } nav, summary { display: none; }
  details::details-content { content-visibility: visible; block-size: auto; }
  .scroll { overflow: visible; } figure, tr, .card { break-inside: avoid; } h2, h3 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


class Markup(str):
    """Text that is HTML already; everything else is escaped."""

    __slots__ = ()


ABSENT = "\N{EN DASH}"

Cell = str | float | int | None


def text(value: Cell) -> str:
    """A cell as HTML: numbers with three decimals, None as a dash."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return ABSENT
    if isinstance(value, float):
        return f"{value:.3f}"
    return html.escape(str(value))


def document(title: str, body: Sequence[str]) -> str:
    """The whole file."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
            *body,
            "</body></html>",
            "",
        ]
    )


def section(name: str, title: str, *parts: str) -> str:
    """A section with a heading that a link can name; nothing at all where it has no content."""
    if not any(parts):
        return ""
    heading = f'<h2 id="{name}-title">{html.escape(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{heading}{"".join(parts)}</section>'


def counted(number: int, noun: str) -> str:
    """``1 site``, ``2 sites``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def paragraph(value: Cell, kind: str = "") -> str:
    """A paragraph; ``kind`` is a class of the style sheet."""
    return f"<p{_class(kind)}>{text(value)}</p>"


def figure(svg: str, caption: str) -> str:
    """A chart with its caption."""
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str, *, words: Sequence[int] = ()) -> str:
    """A table whose first column names its rows.

    Args:
        head: column names.
        rows: cells, as many as columns.
        caption: what the table shows.
        words: numbers of columns with words, which are set to the left.
    """
    kinds = ["t" if at in words else "" for at in range(len(head))]
    top = "".join(f'<th scope="col"{_class(kind)}>{text(name)}</th>' for name, kind in zip(head, kinds, strict=True))
    body = "".join(
        f'<tr><th scope="row">{text(row[0])}</th>'
        + "".join(f"<td{_class(kind)}>{text(cell)}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    return scrolling(
        f"<table><caption><span>{text(caption)}</span></caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    )


def scrolling(inner: str) -> str:
    """A box that scrolls sideways by itself, so that a wide table never widens the page."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="table">{inner}</div>'


def folded(summary: str, inner: str, *, open_: bool = False) -> str:
    """A part that is opened on demand."""
    return f"<details{' open' if open_ else ''}><summary>{html.escape(summary)}</summary>{inner}</details>"


def cards(rows: Sequence[tuple[str, str, str]]) -> str:
    """A few large figures: (name, figure, what it says)."""
    inner = "".join(
        f'<div class="card">{text(name)}<b>{text(value)}</b><span class="soft">{text(more)}</span></div>'
        for name, value, more in rows
    )
    return f'<div class="cards">{inner}</div>'


def image(png: bytes, alternative: str) -> str:
    """A picture inside the page."""
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alternative, quote=True)}">'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
