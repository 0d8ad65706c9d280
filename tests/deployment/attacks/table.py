"""Every attack in one row: what fedvfm answered, its audit line, how the others fared, what stock Flower did."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacks import hostile, locals, ours, stock, strangers, updates

NOTHING = "none: nothing was sent to it or taken from it"
WHOLE = "taken once it is whole; the others are heard meanwhile"
HALF = ours.ORDER.index("half") + 1
NO_AUDIT = "none: refused before a byte of it was read"
# What the coordinator's audit log calls a stranger's request.
WORDS = {
    "control-list": "control",
    "control-register": "control",
    "foreign-bundle": "control",
    "runtime": "runtime",
    "docs": "openapi",
    "unknown-key": "key",
    "revoked-key": "key",
    "no-key": "key",
    "silent": "slow",
}
STATUS = {"200": "accepted", "401": "refused", "403": "refused", "404": "refused", "412": "refused"}
# Lies that the public port refuses; the site answers honestly after them.
AT_THE_PORT = ("other-node", "instruction")
COPIED = "whoever copied a hospital's invite and joins under its name"
INSIDERS = {
    "thief": "an approved site that calls itself by another's name",
    "liar": "an approved site with another backbone",
    "stray": "a node that the SuperLink knows and the roster does not",
}


@dataclass(frozen=True)
class Row:
    """One attack.

    Attributes:
        answer: what fedvfm answered the attacker.
        audit: the line of the audit log.
        others: how the honest sites fared.
        stock: what Flower did as it comes.
    """

    title: str
    answer: str = ""
    audit: str = ""
    others: str = ""
    stock: str = ""


@dataclass
class Found:
    """Rows by name, in three tables, and what is to be asserted of all of them.

    Attributes:
        seconds: how long the federation took.
    """

    port: dict[str, Row] = dataclasses.field(default_factory=dict)
    site: dict[str, Row] = dataclasses.field(default_factory=dict)
    local: dict[str, Any] = dataclasses.field(default_factory=dict)
    canary: list[str] = dataclasses.field(default_factory=list)
    open_files: list[str] = dataclasses.field(default_factory=list)
    secrets: list[str] = dataclasses.field(default_factory=list)
    replies: list[bytes] = dataclasses.field(default_factory=list)
    code: int | None = None
    words: str = ""
    seconds: float = 0.0


def attack_ours(folder: Path, tiny: Any, *, as_nobody: bool) -> Found:
    """Run the federation and every attack on it."""
    began, found = time.monotonic(), Found()
    fed = ours.make(folder, tiny)
    asked = {}
    with ours.running(fed) as server:
        if as_nobody:
            found.local = locals.attempt(fed)
        for name, (_, attack) in strangers.STRANGERS.items():
            asked[name] = attack(fed.target)
        until = time.monotonic() + ours.ALL_S
        while server.poll() is None and time.monotonic() < until:
            fed.watch_arguments()
            if set(ours.HONEST) <= set(fed.heard(HALF)):
                fed.release.touch()
            time.sleep(1.0)
        found.code, found.words = server.poll(), fed.words()
        if found.code == 0:
            for name, told in hostile.run(fed).items():
                found.site[name] = Row(hostile.ASKS[name][0], told.word, told.audit, stock="no such check")
                found.replies.append(told.reply)
        fed.watch_arguments()
        found.open_files = locals.open_to_others(fed)
    found.secrets = locals.told_secrets(fed)
    found.canary = [path.name for path in fed.canary.iterdir()]
    found.port = _strangers(fed, asked) | _insiders(fed) | _lies(fed)
    found.seconds = round(time.monotonic() - began)
    return found


def _strangers(fed: ours.Federation, asked: Mapping[str, str]) -> dict[str, Row]:
    counts: dict[str, int] = {}
    for entry in fed.refusals():
        counts[entry["reason"]] = counts.get(entry["reason"], 0) + int(entry.get("count", 1))
    every = all(set(ours.HONEST) <= set(line["examples"]) for line in fed.journal())
    others = f"all {len(fed.journal())} rounds" if every else "LOST ROUNDS"
    found = {}
    for name, answer in asked.items():
        word = WORDS.get(name, "")
        audit = NO_AUDIT if name == "wrong-authority" else f"refused, {word}" if counts.get(word) else "MISSING"
        found[name] = Row(strangers.STRANGERS[name][0], answer, audit, others)
    return found


def _insiders(fed: ours.Federation) -> dict[str, Row]:
    told, found = fed.told(), {}
    entries = fed.server.audit.entries
    for name, title in INSIDERS.items():
        asked = [line for line in told if line["site"] == name and line.get("received") in ("train", "evaluate")]
        lines = [entry for entry in entries if entry.get("peer") == name and entry["event"] == "decided"]
        audit = _line(lines[0]) if lines else NOTHING
        online = any(line["site"] == name and "node" in line for line in told)
        answer = "asked for nothing" if online and not asked else "NOT ONLINE" if not online else "TAKES PART"
        found[name] = Row(title, answer, audit, "all rounds without it")
    lines = [entry for entry in entries if entry["event"] == "decided" and entry.get("kind") == "request"]
    audit = _line(lines[0]) if lines else "MISSING"
    return {"copied-invite": Row(COPIED, fed.copied, audit, "all rounds without it"), **found}


def _line(entry: Mapping[str, Any]) -> str:
    return ", ".join(str(entry[key]) for key in ("event", "kind", "verdict", "reason") if key in entry)


def _lies(fed: ours.Federation) -> dict[str, Row]:
    found, entries = {}, fed.server.audit.entries
    lines = {line["round"]: line for line in fed.journal()}
    got = {line["lie"]: line["got"] for line in fed.told() if line.get("lie")}
    for number, name in enumerate(ours.ORDER, start=1):
        line = lines.get(number)
        if line is None:
            found[name] = Row(updates.LIES[name][0], "NO ROUND")
            continue
        refused = line["refused"].get("mal", {}).get("reason", "")
        audit = [
            _line(entry)
            for entry in entries
            if entry["event"] == "decided" and entry.get("peer") == "mal" and entry.get("round") == number
        ]
        answer = f"refused: {refused}" if refused else "ADMITTED"
        if name == "half":
            answer = WHOLE if _first(fed, number) else "HELD UP THE OTHERS"
        if name in AT_THE_PORT:
            answer = got.get(name, "")
            reasons = {entry["reason"] for entry in fed.refusals()}
            audit = ["refused, foreign-node"] if "foreign-node" in reasons else ["MISSING"]
        others = sorted(set(ours.HONEST) & set(line["examples"]))
        said = f"round {number}: {', '.join(others)}" if len(others) == len(ours.HONEST) else "LOST"
        found[name] = Row(updates.LIES[name][0], answer, audit[0] if audit else "MISSING", said)
    return found


def _first(fed: ours.Federation, number: int) -> bool:
    """Whether the honest sites were heard while the liar held its parts back."""
    times = fed.heard(number)
    return max(times[site] for site in ours.HONEST) <= times["mal"] and fed.release.exists()


def attack_stock(folder: Path) -> dict[str, str]:
    """Run stock Flower and the same attacks on it; what it did, by name."""
    with stock.running(folder) as made:
        found = {row["lie"]: stock.said(made, row) for row in stock.lies(made)}
        for name, status in stock.asked(made).items():
            found[name] = f"{status}: {STATUS[status]}" if status in STATUS else status
        if any(made.canary.iterdir()):
            found["foreign-bundle"] += "; its code ran at the site (canary)"
    found["unknown-key"] += "; it can register itself through the Control API"
    found["copied-invite"] = "no invites: a key is registered by whoever may use the Control API"
    found |= dict.fromkeys(INSIDERS, "hygiene: no such check, every node that is online takes part")
    return found


def markdown(found: Found, other: Mapping[str, str]) -> str:
    """The tables of the page."""
    version = importlib.metadata.version("flwr").rpartition(".")[0]
    lines = [f"| attack | fedvfm answers | audit line | the others | stock Flower {version} |", "|---|---|---|---|---|"]
    for name, row in found.port.items():
        lines.append(_row(row.title, row.answer, row.audit, row.others, other.get(name, "")))
    lines += [
        "",
        "A hospital, asked by a coordinator that was taken over, whose run ships a foreign bundle too. Stock Flower",
    ]
    lines += ["has no such checks at a site: it runs the code of the bundle.", ""]
    lines += ["| what it asks | the site answers | the site's audit line |", "|---|---|---|"]
    lines += [_row(row.title, row.answer, row.audit) for row in found.site.values()]
    if found.local:
        lines += ["", "Another user of the same machine:", "", "| what he tries | answer |", "|---|---|"]
        read = len(found.local["read"])
        lines.append(_row("read the keys, state, logs and data bases of both ends", f"{read} files or folders opened"))
        lines += [_row(name, status) for name, status in found.local["http"].items()]
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
