"""How a site stands, from the files of its state folder alone: for the terminal, scripts and the page.

Nothing here asks a running process, and nothing is written. It stays at the site.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.audit import audit, follower, today
from fedvfm.client import refusal_words, rekeying, sentences, site_file, state_folder
from fedvfm.client.adoption import decisions
from fedvfm.config import schema
from fedvfm.report import quantity, spans, terminal
from fedvfm.runtime import processes
from fedvfm.storage import storage
from fedvfm.trust import locked_recipe, signed_documents

NAME, FOLDER = "client", "run"
CHILDREN = ("supernode", "executor")
SETTINGS = "settings.json"
"""Where the site's own file is, in the folder of the processes."""
COORDINATOR = "standing.json"
"""How the coordinator says that this site stands, in the same folder."""
STANDING = {
    "dropped": (
        "the coordinator dropped this site: it is asked nothing more",
        "ask the coordinator's people, who take it in again with: fedvfm server readmit {site}",
    ),
    "unknown": (
        "the coordinator does not let this site's key in: it was revoked, or the request is not approved yet",
        "ask the coordinator's people; a site that was revoked joins anew, with a new invite",
    ),
}
"""What it may say, in words, and what helps."""
MESSAGES = 30
_SHOWN = ("time", "kind", "verdict", "reason", "recipe", "round", "bytes")


def note_settings(where: state_folder.State, settings: Path) -> None:
    """Keep where the site's own file is, for whoever asks what the policy has left."""
    storage.write_text(where.folder / FOLDER / SETTINGS, json.dumps({"settings": str(settings.absolute())}) + "\n")


def note_standing(where: state_folder.State, word: str) -> None:
    """Keep how the coordinator says that this site stands, and since when; an empty word forgets it."""
    path = where.folder / FOLDER / COORDINATOR
    if not word:
        path.unlink(missing_ok=True)
    elif (standing_of(where) or {}).get("word") != word:
        now = signed_documents.stamp(signed_documents.now())
        storage.write_text(path, json.dumps({"word": word, "since": now}) + "\n")


def standing_of(where: state_folder.State) -> dict[str, str] | None:
    """What was kept; None where nothing was."""
    try:
        kept = json.loads((where.folder / FOLDER / COORDINATOR).read_text(encoding="utf-8"))
        return {"word": str(kept["word"]), "since": str(kept["since"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def policy_of(where: state_folder.State) -> tuple[schema.PolicyConfig | None, str]:
    """The policy as the site's file has it now, and why not; both empty where no client was started yet."""
    try:
        path = Path(json.loads((where.folder / FOLDER / SETTINGS).read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, ""
    try:
        own = site_file.read_policy(path)
    except errors.FedvfmError as error:
        return None, str(error)
    return (own.policy if isinstance(own, schema.SiteConfig) else own), ""


class Watcher:
    """Looks at one state folder again and again; what it read of the audit log it does not read twice.

    Args:
        folder: the site's state folder.
    """

    def __init__(self, folder: Path) -> None:
        self._where = state_folder.open_state(folder)
        self._log = follower.Follower(self._where.audit_path)
        self._privacy: tuple[object, dict[str, Any] | None] = (None, None)
        self._today = today.Today()
        self._tallies: dict[str, audit.Tally] = {}
        self._times: dict[str, list[str]] = {}
        self._last: dict[str, dict[str, Any]] = {}
        self._messages: list[dict[str, str]] = []
        self._asked = ""
        self._refused: dict[str, dict[str, str]] = {}
        self._verdicts: dict[str, dict[str, Any]] = {}
        self._scored: set[tuple[str, int]] = set()
        self._recipes: dict[str, locked_recipe.LockedRecipe] = {}
        self._answered: set[str] = set()

    @property
    def where(self) -> state_folder.State:
        """The state folder."""
        return self._where

    def files(self) -> list[Path]:
        """What it is made of."""
        folder, run = self._where.folder, self._where.folder / FOLDER
        kept = [run / SETTINGS, run / COORDINATOR, *(processes.pid_path(run, name) for name in (NAME, *CHILDREN))]
        folders = [folder / "recipes", folder / "rosters", self._where.surveys, folder / decisions.FOLDER]
        return [
            self._where.audit_path,
            *self._ledger(),
            self._where.approvals.path,
            self._where.survey_approvals.path,
            folder / "site.key.new",
            *folders,
            *kept,
        ]

    def recipe(self, recipe: str) -> locked_recipe.LockedRecipe:
        """A recipe that was seen here; its file never changes."""
        if recipe not in self._recipes:
            self._recipes[recipe] = self._where.find(recipe)
        return self._recipes[recipe]

    def today(self) -> list[dict[str, Any]]:
        """The audit log's entries of what left today."""
        return self._today.rows()

    def now(self) -> dict[str, Any]:
        """How it stands; every time in it is ISO 8601.

        Raises:
            TrustError: if a file was edited.
        """
        where, folder = self._where, self._where.folder / FOLDER
        self._read_log()
        pids = {name: processes.running(processes.pid_path(folder, name)) for name in (NAME, *CHILDREN)}
        approved = where.approvals.stand()
        rules, problem = policy_of(where)
        values: dict[str, Any] = {
            "site": where.about.site,
            "federation": where.about.federation,
            "address": where.about.address,
            "key": where.spoken_key,
            "new_key": rekeying.waiting(where),
            "processes": pids,
            "started": spans.stamp_or_none(processes.started(processes.pid_path(folder, NAME))),
            "approved": approved,
            "waiting": [recipe for recipe in where.seen() if recipe not in approved],
            "surveys": self._surveys(),
            "recipes": {recipe: self._of_recipe(recipe, rules, approved) for recipe in where.seen()},
            "policy_problem": problem,
            "coordinator": standing_of(where) if pids[NAME] is not None else None,
            "adapters": decisions.to_json(where),
            "damaged": decisions.damaged(where),
            "privacy": self._of_privacy(),
            "today": self._today.totals(),
            "messages": self._messages[::-1],
            "audit_log_whole": self._log.whole,
            "last": self._last,
        }
        now = {key: state_folder.named(text, where.folder) for key, text in standing(values).items()}
        return {**values, "now": now}

    def _ledger(self) -> list[Path]:
        """Files that the privacy follows from."""
        from fedvfm.client import privacy_report
        from fedvfm.ledger import entries

        kept = self._privacy[1] or {}
        note = self._where.folder / FOLDER / privacy_report.FILE
        return [note, Path(kept["ledger"]) / entries.FILE] if kept.get("ledger") else [note]

    def _of_privacy(self) -> dict[str, Any] | None:
        """What was spent; counted anew only where the ledger changed, as that takes its time."""
        from fedvfm.client import privacy_report  # SciPy only where privacy is counted

        before = [path.stat().st_mtime_ns for path in self._ledger() if path.exists()]
        if self._privacy[0] != before:
            values = privacy_report.status(self._where)
            self._privacy = (None, values)
            self._privacy = ([path.stat().st_mtime_ns for path in self._ledger() if path.exists()], values)
        return self._privacy[1]

    def _read_log(self) -> None:
        for entry in self._log.new():
            recipe, event = str(entry.get("recipe", "")), str(entry["event"])
            self._today.add(entry)
            self._last[event] = {key: entry[key] for key in _SHOWN if key in entry}
            if event in audit.COUNTED:
                self._tallies.setdefault(recipe, audit.Tally()).add(entry)
            if event == "trained":
                self._times.setdefault(recipe, []).append(str(entry["time"]))
            if event == "decided" and entry["kind"] == "final":
                about = {"time": entry["time"], "says": sentences.end(entry), "verdict": entry["verdict"]}
                self._verdicts[recipe] = {**about, "round": int(entry["round"])}
            self._refusals(entry, recipe)
            if event == "sent" and entry["kind"] == "evaluate" and entry.get("split") == "test":
                self._scored.add((recipe, int(entry["round"])))
            if event == "surveyed":
                self._answered.add(str(entry["fingerprint"]))
            sentence = sentences.of(entry)
            if sentence:
                self._messages = [*self._messages, {"time": str(entry["time"]), "says": sentence}][-MESSAGES:]

    def _refusals(self, entry: Mapping[str, Any], recipe: str) -> None:
        """What was refused of a recipe and is not mended; that the site greets again does not mend a round."""
        event, kind, refused = entry["event"], entry.get("kind"), self._refused.get(recipe)
        if event == "received":
            self._asked = str(kind)
        elif event == "sent" and kind == "refusal":
            word = str(entry["reason"])
            why, remedy = refusal_words.why(word, recipe)
            about = {"word": word, "says": why, "remedy": remedy, "time": str(entry["time"]), "kind": self._asked}
            self._refused[recipe] = about
        elif refused is not None:
            answered = event == "sent" and (kind != "handshake" or refused["kind"] == "handshake")
            approved = event == "decided" and kind == "approval" and refused["word"] == "approval-pending"
            if answered or approved:
                del self._refused[recipe]

    def _surveys(self) -> dict[str, dict[str, bool]]:
        """The surveys that arrived: whether a person here approved each, and whether it was answered."""
        approved = self._where.survey_approvals.stand()
        return {
            survey: {"approved": survey in approved, "answered": survey in self._answered}
            for survey in self._where.surveys_seen()
        }

    def _of_recipe(self, recipe: str, rules: schema.PolicyConfig | None, approved: list[str]) -> dict[str, Any]:
        used = self._tallies[recipe].usage() if recipe in self._tallies else audit.Usage()
        rounds, times = self.recipe(recipe).recipe.rounds, self._times.get(recipe, [])
        number = max((number for number, _ in used.trained), default=0)
        verdict = self._verdicts.get(recipe)
        left = verdict is not None and (recipe, verdict["round"]) in self._scored
        ended = verdict if left else None
        pace = _pace(times)
        ends = None
        if recipe in approved and verdict is None and pace is not None and number < rounds:
            ends = spans.stamp_of(
                max(signed_documents.moment(times[-1]).timestamp() + pace * (rounds - number), time.time())
            )
        return {
            "approved": recipe in approved,
            "round": number,
            "rounds": rounds,
            "rounds_used": len(used.trained),
            "max_rounds": None if rules is None else rules.max_rounds,
            "hours_used": round(used.seconds / 3600, 4),
            "max_hours": None if rules is None else rules.max_hours,
            "evaluations_used": len(used.evaluated),
            "max_evaluations": None if rules is None else rules.most_evaluations,
            "since": times[0] if times else None,
            "last": times[-1] if times else None,
            "round_seconds": None if pace is None else round(pace, 1),
            "eta": ends,
            "refused": self._refused.get(recipe),
            "judged": None if left else verdict,
            "ended": ended,
        }


def _pace(times: list[str], recent: int = 5) -> float | None:
    """Mean seconds from one training to the next, of the last few."""
    moments = [signed_documents.moment(stamp).timestamp() for stamp in times[-recent - 1 :]]
    return (moments[-1] - moments[0]) / (len(moments) - 1) if len(moments) > 1 else None


def standing(values: Mapping[str, Any]) -> dict[str, str]:
    """The one thing that a person here should know first, and what helps."""
    if values["processes"][NAME] is None:
        return {"says": "the client does not run", "remedy": "fedvfm client start SITE.toml"}
    word = (values["coordinator"] or {}).get("word", "")
    if word in STANDING:
        says, remedy = STANDING[word]
        return {"says": says, "remedy": remedy.format(site=values["site"])}
    if values["waiting"]:
        recipe = values["waiting"][0][:12]
        remedy = f"fedvfm client review {recipe}, then fedvfm client approve {recipe}, or leave it"
        return {"says": f"recipe {recipe} waits for a person here", "remedy": remedy}
    unread = [survey for survey, row in values["surveys"].items() if not (row["approved"] or row["answered"])]
    if unread:
        survey = unread[0][:12]
        remedy = f"fedvfm client review {survey}, then fedvfm client approve {survey}, or leave it"
        return {"says": f"survey {survey} waits for a person here", "remedy": remedy}
    active = max(values["recipes"].values(), key=lambda row: row["last"] or "", default=None)
    refusing = [row["refused"] for row in values["recipes"].values() if row["refused"]]
    if refusing:
        latest = max(refusing, key=lambda row: row["time"])
        return {"says": f"refused: {latest['says']} ({latest['word']})", "remedy": latest["remedy"]}
    if active is not None and active["ended"]:
        return {"says": active["ended"]["says"], "remedy": ""}
    if active is not None and active["judged"]:
        return {"says": "the final adapter is judged here; its scores have not left yet", "remedy": ""}
    if active is not None and active["round"]:
        return {"says": f"round {active['round']} of {active['rounds']} is done here; waits for the next", "remedy": ""}
    return {"says": "waits for the coordinator's first message", "remedy": ""}


def of(where: state_folder.State) -> dict[str, Any]:
    """How it stands, looked at once.

    Raises:
        AuditError: if the audit log was edited; it says where.
    """
    values = Watcher(where.folder).now()
    if not values["audit_log_whole"]:
        for _ in where.audit.scan():
            pass
    return values


def lines(now: Mapping[str, Any]) -> list[str]:
    """The same for a terminal."""
    from fedvfm.client import privacy_report

    remedy = f". What helps: {now['now']['remedy']}" if now["now"]["remedy"] else ""
    started = f", started {now['started']}" if now["started"] else ""
    today = now["today"]
    return [
        f"site {now['site']} of federation {now['federation']} at {now['address']}, key {now['key']}",
        f"now: {now['now']['says']}{remedy}",
        *(
            [f"new key {now['new_key']} waits for the coordinator: fedvfm server rekey FILE --key KEY"]
            if now["new_key"]
            else []
        ),
        f"left today: {quantity.of(today['messages'], 'message')}, {today['bytes']:,} bytes{started}",
        *([f"the policy cannot be read: {now['policy_problem']}"] if now["policy_problem"] else []),
        *(f"damaged: {text}" for text in now["damaged"]),
        *([] if now["privacy"] is None else privacy_report.status_lines(now["privacy"])),
        "",
        *terminal.table(
            ("process", "runs"),
            [(name, f"process {pid}" if pid else "not running") for name, pid in now["processes"].items()],
        ),
        "",
        *terminal.table(
            ("recipe", "how it stands", "round", "rounds used", "hours used", "since", "ends about"),
            [_row(recipe, row) for recipe, row in now["recipes"].items()],
        ),
        *(f"survey {survey[:12]}: {survey_words(row)}" for survey, row in now["surveys"].items()),
        "",
        *(f"{row['time']}  {row['says']}" for row in now["messages"][:10]),
    ]


def _row(recipe: str, row: Mapping[str, Any]) -> list[str]:
    return [
        recipe[:12],
        recipe_words(row),
        f"{row['round']} of {row['rounds']}",
        used(row["rounds_used"], row["max_rounds"]),
        used(row["hours_used"], row["max_hours"]),
        row["since"] or "-",
        row["eta"] or "-",
    ]


def survey_words(row: Mapping[str, bool]) -> str:
    """How a survey stands, in a few words."""
    if row["answered"]:
        return "answered"
    return "approved" if row["approved"] else "waits for a person"


def recipe_words(row: Mapping[str, Any]) -> str:
    """How a recipe stands, in a few words."""
    if not row["approved"]:
        return "waits for a person"
    if row["refused"]:
        return f"refused: {row['refused']['word']}"
    if row["ended"]:
        return f"finished, adapter {row['ended']['verdict']}"
    if row["judged"]:
        return "judged, scores have not left"
    return "approved" if not row["round"] else "goes on"


def used(number: float, most: float | None) -> str:
    """How much is used up of what the policy allows."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:.2f}"
    return shown if most is None else f"{shown} of {most:,g}"
