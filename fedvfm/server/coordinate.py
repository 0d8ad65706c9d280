"""The coordinator's run: waits for sites, drives the rounds on the SuperLink, resumes where an earlier process stopped.

``python -m fedvfm.server.coordinate`` is that process. Each start is a new run of Flower's; rounds count by the hash of
the recipe, in the journal. Sites that came or went are taken in or left out when a round begins.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from fedvfm import config as configs
from fedvfm import errors, flower, flower_runtime, progress, storage
from fedvfm.server import app as server_app
from fedvfm.server import enrolment, presence, strategy, superlink
from fedvfm.trust import roster as rosters

RUN = "run"
LOOK_S = 1.0


class Changed(Exception):
    """Other sites are there than when the federation began; it goes on with those."""


class Coordinator:
    """Runs one recipe of a federation to its end.

    Args:
        where: the server's state folder.
        server: quorum, cohort, deadlines.
        observer: told of progress.
    """

    def __init__(self, where: enrolment.State, server: configs.ServerConfig, observer: progress.Observer) -> None:
        self._where, self._server, self._observer = where, server, observer
        self._sites: tuple[str, ...] = ()
        self._left_out: set[str] = set()

    def run(self, grid: presence.RosterGrid, context: Context) -> None:
        """To the last round and the final test.

        Raises:
            QuorumMissed: if too few sites came in time.
            FedvfmError: what stopped the federation.
        """
        while True:
            self._sites = self._wait(grid)
            try:
                server_app.make_server_app([self._job()], lambda event, /, **fields: self._told(grid, event, fields))(
                    grid, context
                )
                return
            except Changed:
                continue
            except errors.HandshakeRefused as refusal:
                silent = [name for name in self._sites if name not in grid.greeted]
                if not silent or len(self._sites) - len(silent) < self._least():
                    raise
                self._note(f"{refusal}. Goes on without: {', '.join(silent)}")
                self._left_out.update(silent)

    def _told(self, grid: presence.RosterGrid, event: str, fields: dict[str, object]) -> None:
        if event == "round" and self._there(grid) != set(self._sites):
            now = self._there(grid)
            if len(now) >= self._least():
                self._note(f"sites now: {', '.join(sorted(now))}; before: {', '.join(self._sites)}")
                raise Changed
        if event == "round-end" and isinstance(fields.get("record"), dict):
            self._decided(fields["record"])
        self._observer(event, **fields)

    def _decided(self, line: Any) -> None:
        """Note in the audit log whose updates were admitted in a round, and whose not and why."""
        about = {"recipe": self._where.about.recipe, "round": int(line["round"]), "kind": "update"}
        for site in line["examples"]:
            self._where.audit.record("decided", verdict="admitted", peer=site, **about)
        for site, why in line["refused"].items():
            self._where.audit.record("decided", verdict="refused", peer=site, reason=why["reason"], **about)

    def _there(self, grid: presence.RosterGrid) -> set[str]:
        return set(grid.present()) - self._left_out

    def _approved(self) -> set[str]:
        return {name for name, entry in self._where.sites().items() if entry.status == rosters.APPROVED}

    def _least(self) -> int:
        return self._server.quorum or max(1, len(self._approved()))

    def _wait(self, grid: presence.RosterGrid) -> tuple[str, ...]:
        """The sites that are there: all that were approved, or a quorum when the time is over."""
        deadline, said = time.monotonic() + self._server.join_timeout_s, ""
        while True:
            there, wanted = self._there(grid), self._approved() - self._left_out
            late = time.monotonic() > deadline
            if there and (there >= wanted or late) and len(there) >= self._least():
                return tuple(sorted(there))
            text = f"{len(there)} of {len(wanted)} sites are there, the quorum is {self._least()}; missing: " + (
                ", ".join(sorted(wanted - there)) or "none"
            )
            if late:
                raise errors.QuorumMissed(
                    f"after {self._server.join_timeout_s:g} s {text}. Mend the sites and start again"
                )
            if text != said:
                self._note(f"waiting: {text}")
                said = text
            time.sleep(LOOK_S)

    def _job(self) -> strategy.Job:
        locked = self._where.locked()
        folder = self._where.folder / "runs" / locked.recipe.hash
        with storage.guard(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        quorum = min(self._server.quorum or len(self._sites), len(self._sites))
        server = self._server.model_copy(
            update={"quorum": quorum, "cohort": min(self._server.cohort, len(self._sites))}
        )
        return strategy.Job("federated", locked, folder, self._sites, self._sites, server, durable=True)

    def _note(self, text: str) -> None:
        self._observer("note", text=text)


def sync(control: flower_runtime.Control, sites: dict[str, rosters.Entry]) -> None:
    """Let in the keys of approved sites and no others."""
    known = {node.public_key: node.id for node in control.nodes()}
    wanted = {entry.public_key: name for name, entry in sites.items() if entry.status == rosters.APPROVED}
    for key, name in wanted.items():
        if key not in known:
            control.register(key, name)
    for key, node in known.items():
        if key not in wanted:
            control.unregister(node)


def say(event: str, /, **fields: object) -> None:
    """One line of JSON for each event: the process's log, which ``server status`` reads."""
    kept = {key: value for key, value in fields.items() if key != "record"}
    print(json.dumps({"time": int(time.time()), "event": event, **kept}), flush=True)


def main(folder: Path, port: int, server: configs.ServerConfig, observer: Callable[..., None] = say) -> None:
    """Be the coordinator's process until the federation is finished."""
    where = enrolment.open_state(folder)
    link = superlink.SuperLink(folder / RUN / "superlink", port).link
    control = flower_runtime.Control(link)
    sync(control, where.sites())
    run_id, stop = control.start_run(), threading.Event()
    control.close()

    def note(text: str) -> None:
        observer("note", text=text)

    log = where.audit

    def record(event: str, site: str, message: Message) -> None:
        word = "refusal" if message.has_error() else message.metadata.message_type.rpartition(".")[2]
        log.record(event, kind=word, bytes=flower.size(message), peer=site, recipe=where.about.recipe)

    with flower_runtime.server_task(link, run_id, stop) as (grid, context):
        steady = presence.RosterGrid(grid, where.sites, lambda: None, note, record)
        Coordinator(where, server, observer).run(steady, context)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]), configs.ServerConfig.model_validate_json(sys.argv[3]))
    except errors.FedvfmError as error:
        say("stopped", error=type(error).__name__, text=str(error))
        sys.exit(error.exit_code)
