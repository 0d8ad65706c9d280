"""A page that stays open while something runs: parts that are sent anew when they change. Knows not what it shows.

The page asks nobody but the process it came from: style and script lie beside it, and the policy that
:mod:`fedvfm.runtime.page_server` sends with it forbids everything else.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedvfm.report import page, spans

SCRIPT = """"use strict";
const state = document.getElementById("connection");
const clock = () => new Date().toLocaleTimeString();
let heard = clock();
function put(id, text) {
  let box = document.getElementById(id);
  if (!box) {  // the page was first sent while a file could not be read
    box = document.body.appendChild(document.createElement("div"));
    box.id = id;
  }
  const open = new Set([...box.querySelectorAll("details[open] > summary")].map(each => each.textContent));
  box.innerHTML = text;
  for (const each of box.querySelectorAll("details > summary"))
    if (open.has(each.textContent)) each.parentElement.open = true;
}
function say(text, lost) {
  state.textContent = text;
  state.classList.toggle("lost", lost);
}
const source = new EventSource("events");
source.addEventListener("open", () => say("live; last change " + heard, false));
source.addEventListener("parts", event => {
  for (const [id, text] of Object.entries(JSON.parse(event.data))) put(id, text);
  heard = clock();
  say("live; last change " + heard, false);
});
source.addEventListener("error", () =>
  say("not connected: what is shown is as of " + heard + "; the program has ended, or will be asked again", true));
"""

STYLE = (
    page.STYLE
    + """
#connection { position: sticky; top: 0; z-index: 1; margin: 0 0 .8rem; padding: .25rem .6rem; background: var(--card);
  border-bottom: 1px solid var(--rule); color: var(--soft); font-size: .88rem; max-width: none; }
#connection.lost { background: var(--note); color: var(--fg); font-weight: 600; }
.bad { color: var(--c1); font-weight: 600; } .good { color: var(--c2); }
ol.messages { padding-left: 0; list-style: none; max-width: 60rem; }
ol.messages li { padding: .25rem 0; border-bottom: 1px solid var(--rule); }
ol.messages time { color: var(--soft); margin-right: .6rem; font-variant-numeric: tabular-nums; }
"""
)


@dataclass(frozen=True)
class Content:
    """What a page shows at one moment.

    Attributes:
        title: of the page.
        parts: id -> HTML; the ids are the same at every moment, a part that has nothing to say is empty.
        data: the same for scripts, as ``--json`` prints it.
    """

    title: str
    parts: Mapping[str, str]
    data: Mapping[str, Any] = field(default_factory=dict)


def document(content: Content) -> str:
    """The whole page as it is first sent."""
    boxes = "\n".join(f'<div id="{html.escape(key, quote=True)}">{part}</div>' for key, part in content.parts.items())
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{html.escape(content.title)}</title>",
            '<link rel="stylesheet" href="page.css"><link rel="icon" href="data:,">',
            "</head><body>",
            '<p id="connection" role="status">not live: this browser runs no script here; load the page again</p>',
            boxes,
            '<script src="page.js"></script></body></html>',
            "",
        ]
    )


def heading(title: str, words: str, notes: Sequence[str] = ()) -> str:
    """The head of a page: its title, a line below it, and what must be read first."""
    marks = "".join(f'<p class="note" role="note">{page.text(note)}</p>' for note in notes if note)
    return f'<header><h1>{page.text(title)}</h1><p class="soft">{page.text(words)}</p>{marks}</header>'


def messages(rows: Sequence[tuple[str, str]]) -> str:
    """Sentences with the time they belong to, the newest first."""
    items = "".join(f"<li>{moment(when)} {page.text(sentence)}</li>" for when, sentence in rows)
    return f'<ol class="messages">{items}</ol>' if rows else page.paragraph("Nothing yet.", "soft")


def moment(stamp: str | None) -> page.Markup:
    """A time as people read it; ``stamp`` is ISO 8601."""
    if not stamp:
        return page.Markup(page.ABSENT)
    return page.Markup(
        f'<time datetime="{html.escape(stamp, quote=True)}">{html.escape(spans.plain_time(stamp))}</time>'
    )
