"""A site's live page: ``python -m fedvfm.client.live_page RUN STATE`` is its process; it reads files alone.

It is for the people of this hospital, on this machine: nothing of it leaves.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvfm.client import privacy_report, recipe_review, state_folder, status
from fedvfm.report import live_page, page, quantity, rounds, spans
from fedvfm.runtime import page_server

Now = Mapping[str, Any]


def content(watcher: status.Watcher) -> live_page.Content:
    """The page as it is now."""
    now = watcher.now()
    remedy = f" What helps: {now['now']['remedy']}." if now["now"]["remedy"] else ""
    notes = [f"{now['now']['says']}.{remedy}"] if remedy else []
    notes += [] if now["audit_log_whole"] else ["The audit log was edited. Run: fedvfm audit verify"]
    words = f"{now['now']['says']}; federation {now['federation']} at {now['address']}"
    parts = {
        "head": live_page.heading(f"Site {now['site']}", words, notes),
        "figures": page.cards(_cards(now)),
        "pending": page.section("pending-now", "Waits for your decision", _pending(watcher, now)),
        "recipes": page.section("recipes-now", "Recipes", _recipes(now)),
        "messages": page.section("messages-now", "Last messages", _messages(now)),
        "refused": page.section("refusals-now", "What was refused", _refused(now)),
        "today": page.section("today-now", "What left today", _today(now, watcher.today())),
        "privacy": page.section("privacy-now", "Privacy budget", _privacy(now)),
        "adapters": page.section("adapters-now", "Final adapters", _adapters(now)),
        "client": page.section("client-now", "The client", _client(now)),
    }
    return live_page.Content(f"{now['site']}: {now['now']['says']}", parts, now)


def _active(now: Now) -> Mapping[str, Any] | None:
    """The recipe that was trained last, else one that is approved."""
    rows = [row for row in now["recipes"].values() if row["approved"]] or list(now["recipes"].values())
    return max(rows, key=lambda row: row["last"] or "", default=None)


def _cards(now: Now) -> list[tuple[str, str, str]]:
    row, left = _active(now), now["today"]
    cards = []
    if row is not None:
        ends = f"ends about {spans.plain_time(row['eta'])}" if row["eta"] else status.recipe_words(row)
        cards = [
            ("Round", f"{row['round']} of {row['rounds']}", ends),
            ("Rounds used", status.used(row["rounds_used"], row["max_rounds"]), "of what your policy allows"),
            ("Hours used", status.used(row["hours_used"], row["max_hours"]), "computing time, of your policy's"),
        ]
    for data_set in now["privacy"]["data_sets"] if now["privacy"] else ():
        spent = "infinity" if data_set["epsilon"] is None else f"{data_set['epsilon']:.2f}"
        cards.append(("Epsilon used", f"{spent} of {data_set['allowed']:.2f}", f"data set {data_set['name']}"))
    return [*cards, ("Left today", rounds.size(left["bytes"]), quantity.of(left["messages"], "message"))]


def _pending(watcher: status.Watcher, now: Now) -> str:
    parts = []
    for recipe in now["waiting"]:
        rows: list[list[page.Cell]] = [[*row] for row in recipe_review.words(watcher.recipe(recipe))]
        command = f"fedvfm client review {recipe[:12]} --policy SITE.toml, then fedvfm client approve {recipe[:12]}"
        command = state_folder.named(command, watcher.where.folder)
        parts.append(page.paragraph(f"Recipe {recipe[:12]} was asked for and nobody here approved it. {command}."))
        table = page.table(("what", "in words"), rows, "The recipe in plain words.", words=(1,))
        parts.append(page.folded(f"What recipe {recipe[:12]} does", table))
    for row in now["adapters"]:
        if row["verdict"] == "pending":
            short = row["fingerprint"][:12]
            score = "not scored" if row["score"] is None else f"{row['metric']} {row['score']:.4f}"
            about = f"Final adapter {short} of recipe {row['recipe'][:12]}: {score}"
            about += f" on {quantity.of(row['examples'], 'own test image')}."
            command = f"fedvfm client adapter --accept {short}, or --decline {short}"
            parts.append(page.paragraph(f"{about} {state_folder.named(command, watcher.where.folder)}."))
    return "".join(parts)


def _recipes(now: Now) -> str:
    rows: list[list[page.Cell]] = [
        [
            recipe[:12],
            status.recipe_words(row),
            f"{row['round']} of {row['rounds']}",
            status.used(row["rounds_used"], row["max_rounds"]),
            status.used(row["hours_used"], row["max_hours"]),
            status.used(row["evaluations_used"], row["max_evaluations"]),
            live_page.moment(row["since"]),
            live_page.moment(row["eta"]),
        ]
        for recipe, row in now["recipes"].items()
    ]
    head = ("recipe", "how it stands", "round", "rounds used", "hours used", "adapters scored", "since", "ends about")
    return page.table(head, rows, "Recipes that were asked for here; what is used up is counted by recipe.", words=(1,))


def _messages(now: Now) -> str:
    return live_page.messages([(row["time"], row["says"]) for row in now["messages"]])


def _refused(now: Now) -> str:
    rows: list[list[page.Cell]] = [
        [recipe[:12], live_page.moment(why["time"]), f"{why['says']} ({why['word']})", why["remedy"]]
        for recipe, row in now["recipes"].items()
        if (why := row["refused"])
    ]
    caption = "What the last answer to a recipe was, where it was a refusal; the coordinator is told the word alone."
    return page.table(("recipe", "when", "why", "what helps"), rows, caption, words=(2, 3)) if rows else ""


def _today(now: Now, left: Sequence[Mapping[str, Any]]) -> str:
    if not left:
        return page.paragraph(f"Nothing left on {now['today']['day']} (UTC).", "soft")
    rows: list[list[page.Cell]] = [
        [
            live_page.moment(entry["time"]),
            entry["kind"],
            entry.get("round"),
            rounds.size(entry["bytes"]),
            f"{entry['numbers']:,}" if "numbers" in entry else None,
            ", ".join(entry.get("metrics", ())) or entry.get("reason"),
        ]
        for entry in reversed(left)
    ]
    total = f"{quantity.of(len(left), 'message')}, {rounds.size(now['today']['bytes'])} on {now['today']['day']} (UTC)"
    caption = f"{total}: kinds, sizes and names of metrics; no value and no patient is in the log."
    head = ("when", "kind", "round", "size", "numbers", "metrics, or word")
    return page.table(head, rows[: status.MESSAGES], caption, words=(5,))


def _privacy(now: Now) -> str:
    if now["privacy"] is None:
        return ""
    return "".join(page.paragraph(line.strip()) for line in privacy_report.status_lines(now["privacy"]))


def _adapters(now: Now) -> str:
    rows: list[list[page.Cell]] = [
        [row["fingerprint"][:12], row["recipe"][:12], row["verdict"], row["reason"], row["score"], row["examples"]]
        for row in now["adapters"]
    ]
    head = ("adapter", "recipe", "verdict", "why", "score", "own test images")
    return page.table(head, rows, "Scores are of this site's own test images.", words=(1, 2, 3)) if rows else ""


def _client(now: Now) -> str:
    rows: list[list[page.Cell]] = [
        [name, f"process {pid}" if pid else "not running"] for name, pid in now["processes"].items()
    ]
    rows += [["started", live_page.moment(now["started"])], ["key", now["key"]]]
    rows += [["policy", f"cannot be read: {now['policy_problem']}"]] if now["policy_problem"] else []
    return page.table(("what", "how it stands"), rows, "Processes and key.", words=(1,))


def serve(run: Path, folder: Path) -> None:
    """Be the page's process until it is told to end."""
    watcher = status.Watcher(folder)
    page_server.serve(run, lambda: content(watcher), watcher.files)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
