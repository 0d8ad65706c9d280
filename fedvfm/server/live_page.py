"""The coordinator's live page: ``python -m fedvfm.server.live_page RUN STATE`` is its process; it reads files alone.

What it shows of a site is what the site sent: what the sites' policies hold back never came here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvfm.privacy import statements
from fedvfm.report import live_page, page, quantity, rounds, scores, spans
from fedvfm.runtime import page_server
from fedvfm.server import site_words, state_folder, status
from fedvfm.tasks import metrics
from fedvfm.trust import locked_recipe

Now = Mapping[str, Any]
Journal = Sequence[Mapping[str, Any]]


def content(watcher: status.Watcher, locked: locked_recipe.LockedRecipe) -> live_page.Content:
    """The page as it is now.

    Args:
        watcher: of the state folder.
        locked: the present recipe.
    """
    now, journal = watcher.now(), watcher.journal()
    primary = primary_of(locked.recipe.task.kind, locked.recipe.target.kind)
    name = scores.shown(scores.metric_name(primary), {"prompt": locked.recipe.task.oracle})
    parts = {
        "head": live_page.heading(f"Federation {now['federation']}", _words(now), _notes(now)),
        "figures": page.cards(_cards(now, journal)),
        "sites": page.section("sites-now", "Sites", _sites(now, journal, primary, name)),
        "learning": learning(journal, primary, name),
        "refused": page.section("refusals-now", "What was refused", _refusals(now, journal)),
        "today": page.section("today-now", "What left today", _today(now)),
        "rounds": all_rounds(journal, primary, name),
        "server": page.section("server-now", "The server", _server(now)),
    }
    return live_page.Content(f"{now['federation']}: {status.progress(now)}", parts, now)


def primary_of(kind: str, target: str) -> str:
    """The metric that ranks models of a task and its target."""
    return metrics.primary(kind, target) or "score"


def _words(now: Now) -> str:
    since = f" since {spans.plain_time(now['since'])}" if now["since"] else ""
    return f"{status.progress(now)}{since}; recipe {now['recipe'][:12]}, {now['address']}"


def _notes(now: Now) -> list[str]:
    return [
        *([now["reason"]] if now["reason"] else []),
        *status.orders(now),
        *(f"{line}." for line in status.survey_lines(now)),
        *([] if now["audit_log_whole"] else ["The audit log was edited. Run: fedvfm audit verify"]),
    ]


def _cards(now: Now, journal: Journal) -> list[tuple[str, str, str]]:
    there = sum(row["state"] == "takes-part" for row in now["sites"].values())
    approved = sum(row["roster"] == "approved" for row in now["sites"].values())
    ends = f"ends about {spans.plain_time(now['eta'])}" if now["eta"] else ""
    pace = "no round is done yet" if now["round_seconds"] is None else spans.span(now["round_seconds"])
    both = now["bytes"]["up"] + now["bytes"]["down"]
    rows = [
        ("Rounds done", f"{now['finished_rounds']} of {now['rounds']}", ends),
        ("Sites that take part", f"{there} of {approved}", ", ".join(f"{name} waits" for name in now["pending"])),
        ("A round takes", pace, f"mean of the last {min(len(journal), status.RECENT)}" if journal else ""),
        ("Bytes moved", rounds.size(both), f"{rounds.size(now['bytes']['up'])} up"),
    ]
    if now["privacy"]:
        spent = now["privacy"]["epsilon"]
        shown = "not bounded" if spent is None else f"{spent:.3g}"
        rows.append(("Epsilon so far", shown, statements.so_far(now["privacy"])))
    return rows


def _sites(now: Now, journal: Journal, primary: str, name: str) -> str:
    last: Mapping[str, Any] = journal[-1] if journal else {"train": {}, "validation": {}}
    scored: Mapping[str, Any] = next((row["validation"] for row in reversed(journal) if row["validation"]), {})
    rows: list[list[page.Cell]] = []
    for site, row in now["sites"].items():
        words = f"{row['says']}; final adapter {row['acceptance']}" if row["acceptance"] else row["says"]
        rows.append(
            [
                site,
                _coloured(words, row),
                live_page.moment(row["since"]),
                live_page.moment(row["heard"]),
                row["answered_round"] or None,
                last["train"].get(site, {}).get("loss"),
                scored.get(site, {}).get(primary),
                row["remedy"] or None,
            ]
        )
    head = ("site", "how it stands", "since", "last heard", "last round answered", "loss", f"val {name}", "what helps")
    return page.table(head, rows, "Every site of the roster.", words=(1, 2, 3, 7))


def _coloured(words: str, row: Mapping[str, Any]) -> page.Markup:
    kind = "good" if row["state"] in ("takes-part", "finished") else "bad" if row["roster"] == "approved" else "soft"
    return page.Markup(f'<span class="{kind}">{page.text(words)}</span>')


def learning(journal: Journal, primary: str, name: str) -> str:
    """Curves of every site, and how long rounds took."""
    if not journal:
        return ""
    figures = "".join([*rounds.learning(journal, primary, name), rounds.pace(journal)])
    return page.section("learning-now", "Learning", f'<div class="charts">{figures}</div>')


def _refusals(now: Now, journal: Journal) -> str:
    strangers = ", ".join(f"{word} {count}" for word, count in now["refused"].items())
    knocked = f"Requests that the public port refused in the last 10 minutes: {strangers}."
    return refusals(journal) + (page.paragraph(knocked) if strangers else "")


def refusals(journal: Journal) -> str:
    """The updates that were not admitted, in words, the latest first."""
    rows: list[list[page.Cell]] = [
        [row["round"], site, site_words.refused(why["reason"]), why["reason"]]
        for row in reversed(journal)
        for site, why in row.get("refused", {}).items()
    ]
    if not rows:
        return page.paragraph("Every update so far was admitted.", "soft")
    return page.table(("round", "site", "why", "word"), rows, "Updates that were not admitted.", words=(1, 2, 3))


def _today(now: Now) -> str:
    totals = now["today"]
    rows: list[list[page.Cell]] = [
        [kind, row["messages"], rounds.size(row["bytes"])] for kind, row in totals["kinds"].items()
    ]
    if not rows:
        return page.paragraph(f"Nothing left on {totals['day']} (UTC).", "soft")
    number, moved = quantity.of(totals["messages"], "message"), rounds.size(totals["bytes"])
    caption = f"{number} to sites on {totals['day']} (UTC), {moved}."
    return page.table(("kind", "messages", "bytes"), rows, caption)


def all_rounds(journal: Journal, primary: str, name: str) -> str:
    """Every round as a table, folded."""
    if not journal:
        return ""
    return page.folded(f"Every round ({len(journal)})", rounds.every_round(journal, primary, name))


def _server(now: Now) -> str:
    rows: list[list[page.Cell]] = [
        [name, f"process {pid}" if pid else "not running"] for name, pid in now["processes"].items()
    ]
    rows += [["certificate", now["certificate"]], ["started", live_page.moment(now["started"])]]
    rows += [["result", now["result"]]] if now["result"] else []
    return page.table(("what", "how it stands"), rows, "Processes and certificate.", words=(1,))


def serve(run: Path, folder: Path) -> None:
    """Be the page's process until it is told to end."""
    watcher = status.Watcher(folder)

    def look() -> live_page.Content:
        return content(watcher, state_folder.open_state(folder).lock())

    page_server.serve(run, look, watcher.files)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
