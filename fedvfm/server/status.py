"""How the federation stands, from the files of the server's state folder alone: for the terminal, scripts and the page.

Nothing here asks a running process, and nothing is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.audit import follower, today
from fedvfm.config import schema
from fedvfm.privacy import statements
from fedvfm.report import quantity, spans, terminal
from fedvfm.runtime import processes
from fedvfm.server import site_words, state_folder, surveys
from fedvfm.server.coordinator import orders as steering
from fedvfm.server.coordinator import status_file
from fedvfm.server.network import refused_requests
from fedvfm.server.rounds import buffer, result
from fedvfm.storage import hash_chain
from fedvfm.trust import roster, signed_documents

NAME = "server"
CHILDREN = ("superlink", "proxy", "coordinate")
RECENT = 5
"""Rounds whose mean time foretells the others'."""
PENDING = ("approval-pending", "roster-pending")


class Watcher:
    """Looks at one state folder again and again; what it read of the audit log it does not read twice.

    Args:
        folder: the server's state folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = follower.Follower(state_folder.open_state(folder).audit_path)
        self._today = today.Today()
        self._heard: dict[str, str] = {}
        self._answered: dict[str, dict[str, int]] = {}

    def files(self) -> list[Path]:
        """What it is made of."""
        where, run = state_folder.open_state(self._folder), self._folder / status_file.RUN
        arm = where.run_path(where.about.recipe)
        return [
            *(where.audit_path, where.roster_path, steering.path_of(where), self._folder / state_folder.ABOUT),
            *(arm / "journal.jsonl", arm / "evaluation.json", arm / result.REPORT),
            *(run / status_file.FILE, run / refused_requests.FILE),
            *(processes.pid_path(run, name) for name in (NAME, *CHILDREN)),
            *surveys.files(where),
        ]

    def journal(self) -> list[dict[str, Any]]:
        """The present recipe's rounds.

        Raises:
            CheckpointError: if the journal was edited.
        """
        where = state_folder.open_state(self._folder)
        return hash_chain.read(where.run_path(where.about.recipe) / "journal.jsonl")

    def today(self) -> list[dict[str, Any]]:
        """The audit log's entries of what left today."""
        return self._today.rows()

    def now(self) -> dict[str, Any]:
        """How it stands; every time in it is ISO 8601.

        Raises:
            CheckpointError, TrustError: if a file was edited.
        """
        where = state_folder.open_state(self._folder)
        folder, recipe = self._folder / status_file.RUN, where.about.recipe
        done, fault = finished(where)  # first: what an end stands on was written before it
        self._read_log()
        journal = hash_chain.read(where.run_path(recipe) / "journal.jsonl")
        pids = {name: processes.running(processes.pid_path(folder, name)) for name in (NAME, *CHILDREN)}
        stands = status_file.read(folder) if pids["coordinate"] else {}
        phase = "finished" if done else stands.get("phase", "stopped")
        rounds = where.lock().recipe.rounds
        sites = self._sites(where, stands, done, phase)
        if not done:
            add_out(sites, where.lock().recipe, journal, int(stands.get("round", 0)))
        arm = where.run_path(recipe)
        return {
            "federation": where.about.federation,
            "address": where.about.address,
            "certificate": certificate(where),
            "certified_until": signed_documents.stamp(state_folder.certified_until(where)),
            "recipe": recipe,
            "rounds": rounds,
            "finished_rounds": int(journal[-1]["round"]) if journal else 0,
            "finished": bool(done),
            "phase": phase,
            "round": stands.get("round", 0),
            "reason": "" if done else fault or stands.get("reason", ""),
            "since": spans.stamp_of(float(done["ended"])) if "ended" in done else stands.get("since") or None,
            **forecast(journal, rounds, running=phase in (status_file.ROUND, status_file.TEST)),
            **steering.told(steering.read(where), recipe),
            "processes": pids,
            "started": spans.stamp_or_none(processes.started(processes.pid_path(folder, NAME))),
            "refused": refused_requests.lately(folder / refused_requests.FILE),
            "sites": sites,
            "pending": sorted(name for name, row in sites.items() if row["state"] in PENDING),
            "surveys": surveys.standing(where),
            "privacy": journal[-1].get("privacy") if journal else None,
            "bytes": moved([*journal, done] if done else journal),
            "today": self._today.totals(),
            "audit_log_whole": self._log.whole,
            "result": str(arm) if (arm / result.REPORT).is_file() else "",
        }

    def _read_log(self) -> None:
        for entry in self._log.new():
            self._today.add(entry)
            if entry["event"] == "received" and "peer" in entry:
                peer, kind = str(entry["peer"]), str(entry["kind"])
                self._heard[peer] = str(entry["time"])
                if kind == "train" and "round" in entry:
                    self._answered.setdefault(str(entry.get("recipe")), {})[peer] = int(entry["round"])

    def _sites(
        self, where: state_folder.State, stands: Mapping[str, Any], done: Mapping[str, Any], phase: str
    ) -> dict[str, dict[str, Any]]:
        words, since = stands.get("sites", {}), stands.get("sites_since", {})
        answered = self._answered.get(where.about.recipe, {})
        rows = {}
        for name, entry in where.sites().items():
            standing = phase if phase in ("finished", "stopped") else "stopped"
            state = words.get(name, standing) if entry.status == roster.APPROVED else entry.status
            rows[name] = {
                "roster": entry.status,
                "state": state,
                "says": site_words.sentence(state),
                "since": since.get(name, entry.since),
                "remedy": site_words.remedy(state, name, where.about.recipe),
                "heard": self._heard.get(name),
                "answered_round": answered.get(name, 0),
                "out": None,
                "acceptance": done.get("acceptance", {}).get(name, ""),
            }
        return rows


def add_out(
    sites: Mapping[str, dict[str, Any]], recipe: schema.Recipe, journal: Sequence[Mapping[str, Any]], number: int
) -> None:
    """Of asynchronous rounds say which sites still train an earlier one, and for how many rounds that counts.

    Args:
        sites: rows by name; ``out`` is then {"since": a round, "stale_in": rounds}.
        recipe: the present one.
        journal: the rounds that are done.
        number: the round in hand; 0 where none is.
    """
    if recipe.asynchronous is None or not journal:
        return
    number = max(number, int(journal[-1]["round"]) + 1)
    for name, entry in journal[-1].get(buffer.OUT, {}).items():
        since = int(entry["round"])
        if name not in sites or sites[name]["answered_round"] >= since or since < recipe.first_round:
            continue
        left = max(0, since + recipe.asynchronous.staleness_limit + 1 - number)
        sites[name]["out"] = {"since": since, "stale_in": left}
        stale = f"stale in {quantity.of(left, 'round')}" if left else "stale"
        sites[name]["says"] += f"; out since round {since}, {stale}"


def forecast(journal: Sequence[Mapping[str, Any]], rounds: int, *, running: bool) -> dict[str, Any]:
    """Mean seconds of the last rounds, and when the last one of the recipe would end at that pace.

    Args:
        journal: the rounds that are done.
        rounds: how many there are to be.
        running: whether a round is in hand; else nothing is foretold.
    """
    recent = [float(line["seconds"]) for line in journal[-RECENT:]]
    mean = sum(recent) / len(recent) if recent else None
    left = rounds - len(journal)
    ends = None
    if running and mean is not None and left > 0:
        ends = spans.stamp_of(max(float(journal[-1]["ended"]) + mean * left, time.time()))
    return {"round_seconds": None if mean is None else round(mean, 1), "eta": ends}


def moved(lines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Bytes both ways."""
    return {way: sum(int(line.get("bytes", {}).get(way, 0)) for line in lines) for way in ("up", "down")}


def evaluation(where: state_folder.State) -> dict[str, Any]:
    """The final test of the present recipe.

    Raises:
        CheckpointError: if it cannot be read.
    """
    path = where.run_path(where.about.recipe) / "evaluation.json"
    try:
        tested = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        tested = None
    if not isinstance(tested, dict):
        why = "cannot be read; remove it and start the server: the final test is made again"
        raise errors.CheckpointError(f"{path}: {why}")
    return tested


def finished(where: state_folder.State) -> tuple[dict[str, Any], str]:
    """The final test, empty where there is none; and why, where it is damaged."""
    try:
        return (evaluation(where) if where.finished(where.about.recipe) else {}), ""
    except errors.CheckpointError as error:
        return {}, str(error)


def certificate(where: state_folder.State) -> str:
    """How the server's certificate stands, for people."""
    ends, now = state_folder.certified_until(where), signed_documents.now()
    until = signed_documents.stamp(ends)
    if ends <= now:
        return f"expired at {until}: every site refuses it. Run: fedvfm server certify"
    days = (ends - now).days
    soon = f", {days} days: 'server start' renews it" if days < state_folder.RENEWED_DAYS else ""
    return f"good until {until}{soon}"


def of(where: state_folder.State) -> dict[str, Any]:
    """How it stands, looked at once."""
    return Watcher(where.folder).now()


def progress(now: Mapping[str, Any]) -> str:
    """How far the rounds are, in a few words."""
    if now["finished"]:
        return f"finished after round {now['finished_rounds']} of {now['rounds']}"
    if now["phase"] == status_file.ROUND:
        return f"round {now['round']} of {now['rounds']}"
    if now["phase"] == status_file.TEST:
        return f"final test after round {now['finished_rounds']} of {now['rounds']}"
    return f"{now['phase']} after round {now['finished_rounds']} of {now['rounds']}"


def orders(now: Mapping[str, Any]) -> list[str]:
    """What was ordered and not done yet, in sentences."""
    lines = [f"paused by {now['paused']['who']} since {now['paused']['time']}"] if now["paused"] else []
    lines += ["to be finished after the round in hand"] if now["finishing"] else []
    lines += [f"to be extended by {quantity.of(now['extended_by'], 'round')}"] if now["extended_by"] else []
    return lines + [f"recipe {following[:12]} follows" for following in now["following"]]


def survey_lines(now: Mapping[str, Any]) -> list[str]:
    """The surveys that are open: who answered each, and what the others wait for."""
    said = []
    for key, row in now["surveys"].items():
        rest = ", ".join(f"{name} {site_words.survey_sentence(word)}" for name, word in row["waiting"].items())
        said += [site_words.survey(key, row) + (f"; {rest}" if rest else "")] if row["open"] else []
    return said


def lines(now: Mapping[str, Any]) -> list[str]:
    """The same for a terminal."""
    since = f" since {now['since']}" if now["since"] else ""
    pace = "" if now["round_seconds"] is None else f", a round takes {spans.span(now['round_seconds'])}"
    ends = f", ends about {now['eta']}" if now["eta"] else ""
    refused = [f"{word} {count}" for word, count in now["refused"].items()]
    today = now["today"]
    return [
        f"federation {now['federation']} at {now['address']}, recipe {now['recipe'][:12]}",
        f"now: {progress(now)}{since}{pace}{ends}",
        *([f"     {now['reason']}"] if now["reason"] else []),
        *(f"order: {order}" for order in orders(now)),
        *survey_lines(now),
        *([f"privacy: {statements.so_far(now['privacy'])}"] if now["privacy"] else []),
        f"left today: {quantity.of(today['messages'], 'message')}, {today['bytes']:,} bytes",
        f"certificate: {now['certificate']}",
        *(["the audit log was edited: fedvfm audit verify"] if not now["audit_log_whole"] else []),
        *([f"refused in 10 minutes: {', '.join(refused)}"] if refused else []),
        "",
        *terminal.table(
            ("process", "runs"),
            [(name, f"process {pid}" if pid else "not running") for name, pid in now["processes"].items()],
        ),
        "",
        *terminal.table(
            ("site", "how it stands", "since", "last heard", "round", "what helps"),
            [_row(name, row) for name, row in now["sites"].items()],
        ),
        *(["", f"result: {now['result']} (adapter/, report.html, summary.json, metrics.csv)"] if now["result"] else []),
    ]


def _row(name: str, row: Mapping[str, Any]) -> list[str]:
    stands = f"{row['says']}; final adapter {row['acceptance']}" if row["acceptance"] else row["says"]
    return [name, stands, row["since"] or "-", row["heard"] or "-", str(row["answered_round"] or "-"), row["remedy"]]
