"""The coordinator's run: waits for sites, drives the rounds on the SuperLink, resumes where an earlier process stopped.

``python -m fedvfm.server.coordinator.coordinator`` is that process. Each start is a new run of Flower's; rounds count
by the hash of the recipe, in the journal. Between two rounds it looks at the orders and at who is there: sites that
came or went are taken in or left out, and it pauses, ends early or makes room for another recipe.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import sys
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context

from fedvfm import errors
from fedvfm.aggregators import table as rules
from fedvfm.config import schema
from fedvfm.data import channels, partial_labels, unlabelled
from fedvfm.flower import runtime
from fedvfm.protocol import protocol
from fedvfm.report import progress
from fedvfm.runtime import logs, processes
from fedvfm.server import app as server_app
from fedvfm.server import state_folder
from fedvfm.server.coordinator import admission_handshakes, status_file, survey_questions, waiting
from fedvfm.server.coordinator import orders as steering
from fedvfm.server.grid import liveness
from fedvfm.server.network import superlink
from fedvfm.server.rounds import cohort, handshake
from fedvfm.server.rounds import federation as strategy
from fedvfm.server.rounds import journal as journals
from fedvfm.storage import storage
from fedvfm.trust import locked_recipe, roster_document, signed_documents
from fedvfm.trust import roster as rosters

LOG = logging.getLogger(__spec__.name)  # this module may run as "__main__"
RUN = status_file.RUN
EXPIRED = "its invite expired"
LOOK_S = 1.0
TRIES = 3
"""How often a round is asked for that misses the quorum before the run stops; whoever answered is not asked twice.

Where sites refused, which takes no time, it does not stop before ``join_timeout_s`` either.
"""
NO_WORD = ("away", "dropped", "revoked", "malformed", "oversized")
"""What stands in place of the answer of a site that is gone or is not understood; every other word of the protocol is
that of a site that refused, and may not for long."""


@dataclasses.dataclass
class _Missed:
    """A round that missed the quorum.

    Attributes:
        done: the round before it.
        since: when it missed it first.
        tries: how often it was asked for.
    """

    done: int
    since: float
    tries: int = 0


class Coordinator:
    """Runs one recipe of a federation to its end.

    Args:
        where: the server's state folder.
        server: quorum, cohort, deadlines.
        observer: told of progress.
    """

    def __init__(self, where: state_folder.State, server: schema.ServerConfig, observer: progress.Observer) -> None:
        self._where, self._server, self._observer = where, server, observer
        self._locked: locked_recipe.LockedRecipe = where.locked()
        self._greetings: admission_handshakes.Greetings | None = None
        self._surveys: survey_questions.Surveys | None = None
        self._standing = status_file.Board(where.folder / RUN)
        self._phase = (status_file.WAITING, "", 0)
        self._memory = waiting.Memory(where.folder / RUN)
        self._began = self._refused = False
        self._missed: _Missed | None = None
        self._document: roster_document.RosterDocument | None = None
        if self._locked.recipe.secure_aggregation is not None and where.roster_document() is None:
            raise errors.ConfigError("server", [strategy.NO_ROSTER])
        wrong = cohort.asynchronous_faults(self._locked.recipe, server)
        if wrong:
            raise errors.ConfigError("server", wrong)
        if self._locked.recipe.secure_aggregation is not None:
            for fault in cohort.idle_clock(server, "under secure aggregation a round has the deadlines of its steps"):
                LOG.warning(fault)

    def look(self) -> None:
        """Greet who came, and ask for statistics; called while answers are waited for."""
        if self._surveys is not None:
            self._surveys.look()
        if self._greetings is not None and self._greetings.look():
            self._stands(*self._phase)

    def _stands(self, phase: str, reason: str = "", number: int = 0) -> None:
        """Show how the run stands to whoever looks from outside."""
        self._phase = (phase, reason, number)
        self._standing.write(phase, reason, number, self._words(self._approved()))

    def run(self, grid: liveness.WatchfulGrid, context: Context) -> None:
        """To the last round and the final test, or until another recipe is the present one.

        Raises:
            QuorumMissed: if too few sites came in time, or answered.
            FedvfmError: what stopped the federation.
        """
        rule = rules.make(self._locked.recipe.aggregation)
        self._catch_up()
        self._surveys = survey_questions.Surveys(grid, self._where)
        while True:
            document = self._where.roster_document() if self._locked.recipe.secure_aggregation is not None else None
            if self._greetings is None or document != self._document:  # with another document all are greeted anew
                text = "" if document is None else signed_documents.to_text(document)
                self._greetings = admission_handshakes.Greetings(grid, self._locked, rule, self._left_out, text)
                self._document = document
            members = self._gather(self._greetings)
            if members is None or self._stretch(members, grid, context):
                return

    # -- between rounds --------------------------------------------------------------------------------------------

    def _gather(self, greetings: admission_handshakes.Greetings) -> dict[str, handshake.Member] | None:
        """The sites to go on with: at first all that are expected, or a quorum when the time is over; later a quorum.

        Returns: None if another recipe is the present one.

        Raises:
            QuorumMissed: if there is none in time.
        """
        waits, said, done = self._patience(), "", self._done()
        self._memory.go_on(waits, self._recipe, done)
        while True:
            greetings.look()
            if self._surveys is not None:
                self._surveys.look()
            if state_folder.open_state(self._where.folder).about.recipe != self._recipe:
                self._memory.forget()
                LOG.info(f"recipe {self._recipe[:12]} is put aside for another one")
                return None
            orders, members, words = steering.read(self._where), self._members(), self._expected()
            missing = {name: word for name, word in words.items() if name not in members}
            if orders.paused is not None:
                waits = self._patience()
                self._memory.forget()
                text, phase = f"paused by {orders.paused.who} since {orders.paused.time}", status_file.PAUSED
            elif waits.enough(members, words) and (self._began or not waits.for_more(missing)):
                self._memory.forget()
                self._require_labels(members)
                without = _listed({**missing, **self._expired()})
                LOG.info(f"sites now: {', '.join(members)}" + (f"; goes on without: {without}" if without else ""))
                return members
            else:
                text, phase = _waiting(waits, members, words), status_file.WAITING
                self._require_hope(waits, members, words, missing, text)
                self._memory.keep(waits, self._recipe, done)
            if text != said:
                LOG.info(text)
                said = text
            self._stands(phase, text)
            time.sleep(LOOK_S)

    def _require_labels(self, members: Mapping[str, handshake.Member]) -> None:
        """Check that every class is labelled at some site that has images to train on.

        Later, when the only site that labels a class has gone, the rounds go on and the log says so: what was learned
        of it stays.

        Raises:
            ClassUnlabelled: if no round is done and a class is labelled nowhere.
        """
        having = {name: member for name, member in members.items() if member.examples.get("train", 1)}
        sites = {name: member.labelled for name, member in having.items() if not member.without_labels}
        fault = partial_labels.said(self._locked.recipe, sites) if sites else ""
        fault = fault or unlabelled.nobody([member.without_labels for member in having.values()])
        if fault and not self._done():
            raise errors.ClassUnlabelled(fault)
        if fault:
            LOG.warning(f"from now on {fault}")
        lacked = {name: member.lacking for name, member in having.items()}
        nowhere = channels.nowhere(self._locked.recipe.data, lacked)
        if nowhere:
            LOG.warning(nowhere)

    def _patience(self) -> waiting.Patience:
        return waiting.Patience(self._server, again=self._done() > 0)

    def _done(self) -> int:
        """Number of the last round of this recipe that is done."""
        path = self._where.run_path(self._recipe) / "journal.jsonl"
        return journals.Journal(path, self._recipe).last_round if path.exists() else 0

    def _expected(self) -> dict[str, str]:
        """Site -> why it takes no part, or that it does: all that are approved.

        Until the federation's first round that is everybody who was invited, so that none is forgotten who is only
        slow; whoever is invited later joins when he comes. Where too few are approved for the quorum, whoever was
        invited or dropped is missed at any time.
        """
        words = self._words(self._approved())
        few = len(words) < (self._server.quorum or 1)
        if few or self._first:
            words |= {name: waiting.INVITED for name, good in self._where.invited().items() if good}
        if few:
            dropped = [name for name, entry in self._where.sites().items() if entry.status == rosters.DROPPED]
            words |= dict.fromkeys(dropped, waiting.DROPPED)
        return dict(sorted(words.items()))

    def _expired(self) -> dict[str, str]:
        """Sites that the first round would have waited for, had their invites not expired."""
        return {name: EXPIRED for name, good in self._where.invited().items() if not good and self._first}

    @property
    def _first(self) -> bool:
        return not self._began and not self._where.begun

    def _require_hope(
        self,
        waits: waiting.Patience,
        members: Collection[str],
        words: Mapping[str, str],
        missing: Mapping[str, str],
        text: str,
    ) -> None:
        """Check that a quorum can come together yet, of who is there and who is still waited for.

        Raises:
            QuorumMissed: if it cannot; where nobody is late, but too few are on the roster, not at once.
        """
        possible = waits.enough({*members, *missing}, words)
        patient, late = waits.may_hope(possible), waits.given_up(missing)
        if (patient and not possible) or waits.enough({*members, *missing} - set(late), words):
            return
        self._memory.forget()
        seconds = max(late.values(), default=self._server.join_timeout_s)
        raise errors.QuorumMissed(
            f"after {seconds:g} s {text}. Mend the sites and start again{_remedies(missing, late, self._server)}"
        )

    def _words(self, approved: set[str]) -> dict[str, str]:
        """Approved site -> why it takes no part, or that it does."""
        known = self._greetings.words() if self._greetings is not None else {}
        return {name: known.get(name, admission_handshakes.ABSENT) for name in sorted(approved)}

    def _approved(self) -> set[str]:
        return {name for name, entry in self._where.sites().items() if entry.status == rosters.APPROVED}

    @property
    def _recipe(self) -> str:
        return self._where.about.recipe

    # -- rounds ----------------------------------------------------------------------------------------------------

    def _stretch(self, members: Mapping[str, handshake.Member], grid: liveness.WatchfulGrid, context: Context) -> bool:
        """Rounds with these sites, until something is to be changed between two of them; whether all is done."""
        job, finished = self._job(members), False
        self._began, self._refused = True, False

        def drive(federation: strategy.Federation) -> None:
            nonlocal finished
            finished = federation.run(members, lambda number: self._leaves(job, members, number))

        try:
            server_app.make_server_app([job], self._told, drive)(grid, context)
        except errors.QuorumMissed as missed:
            steering.untake_finish(self._where, self._recipe)
            self._again(missed)
        return finished

    def _leaves(self, job: strategy.Job, members: Mapping[str, handshake.Member], number: int) -> bool:
        """Whether the rounds are left before this one: paused, another end, another recipe, or other sites."""
        self.look()
        orders, now = steering.read(self._where), self._members()
        self._stands(status_file.ROUND, number=min(number, job.rounds))
        if (
            orders.paused is not None
            or state_folder.open_state(self._where.folder).about.recipe != self._recipe
            or job.last != self._last(number - 1)
            or now != dict(members)
            or (self._document is not None and self._where.roster_document() != self._document)
        ):
            return True
        early = job.last and number > job.rounds  # the final test comes next
        return bool(early) and not steering.take_finish(self._where, self._recipe)

    def _members(self) -> dict[str, handshake.Member]:
        approved = self._approved()
        found = self._greetings.members() if self._greetings is not None else {}
        return {name: member for name, member in found.items() if name in approved}

    def _last(self, done: int) -> int:
        """The round to end with where it was ordered to end early, else 0."""
        return max(1, done) if steering.read(self._where).finishes(self._recipe) else 0

    def _job(self, members: Mapping[str, handshake.Member]) -> strategy.Job:
        folder, sites = self._where.run_path(self._recipe), tuple(sorted(members))
        able = training(members, self._server.quorum)
        most = len(able)
        with storage.guard(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        done = self._done()
        server = self._server.model_copy(
            update={"quorum": min(self._server.quorum, most), "cohort": min(self._server.cohort, most)}
        )
        return strategy.Job(
            "federated",
            self._locked,
            folder,
            able,
            sites,
            server,
            durable=True,
            last=self._last(done),
            least_tests=server.quorum,
            roster=self._document,
        )

    def _again(self, missed: errors.QuorumMissed) -> None:
        """Let a round that missed the quorum be asked for again, a few times.

        Who refused it takes no part until it answers another greeting, which comes after pauses that grow.

        Raises:
            QuorumMissed: if it was asked for often enough.
        """
        done, now = self._done(), time.monotonic()
        if self._missed is None or self._missed.done != done:
            self._missed = _Missed(done, now)
        self._missed.tries += 1
        tried, patient = self._missed.tries, now <= self._missed.since + self._server.join_timeout_s
        if tried >= TRIES and not (self._refused and patient):
            raise missed
        when = "when who refused takes part again" if self._refused else f"({tried} of {TRIES - 1})"
        LOG.info(f"{missed}. It is asked for again {when}")

    def _told(self, event: str, /, **fields: Any) -> None:
        if event == "refused":
            self._doubt(str(fields["site"]), str(fields["reason"]))
        if event == "test":
            self._stands(status_file.TEST, number=int(fields["round"]))
        if event == "round-end":
            self._decided(fields["record"])
        if event == "finished":
            self._accepted(fields["record"])
        self._observer(event, **fields)

    def _doubt(self, site: str, reason: str) -> None:
        """Greet a site again whose answer was none; one that refused takes no part until it answered that."""
        word = reason.removeprefix("site-")
        refused = word != reason and word in protocol.ERROR_CODES and word not in NO_WORD
        self._refused = self._refused or refused
        if self._greetings is not None:
            self._greetings.doubt(site, word if refused else "")

    def _decided(self, line: Any, noted: Collection[tuple[str, str]] = ()) -> None:
        """Note in the audit log whose updates were admitted in a round, and whose not and why; each once."""
        about = {"recipe": self._recipe, "round": int(line["round"]), "kind": "update"}
        for site in line["examples"]:
            if (site, "admitted") not in noted:
                self._where.audit.record("decided", verdict="admitted", peer=site, **about)
        for site, why in line["refused"].items():
            if (site, "refused") not in noted:
                self._where.audit.record("decided", verdict="refused", peer=site, reason=why["reason"], **about)

    def _catch_up(self) -> None:
        """Note of the last round what a process did not that was killed once the round was in the journal."""
        path = self._where.run_path(self._recipe) / "journal.jsonl"
        line = journals.Journal(path, self._recipe).rounds[-1] if self._done() else {}
        if not line or "copied" in line:  # of another recipe's round, before a rerun
            return
        wanted = {"event": "decided", "kind": "update", "recipe": self._recipe, "round": line["round"]}
        noted = [row for row in self._where.audit.scan() if wanted.items() <= row.items()]
        self._decided(line, {(str(row["peer"]), str(row["verdict"])) for row in noted})

    def _left_out(self, site: str, word: str) -> None:
        """Note in the audit log that a site takes no part, for what it answered in the handshake."""
        about = {"recipe": self._recipe, "kind": "handshake", "verdict": "refused", "reason": word}
        self._where.audit.record("decided", peer=site, **about)

    def _accepted(self, result: Any) -> None:
        """Note in the audit log what the final test came to, by its file's hash, and which sites took the adapter."""
        about = {"recipe": self._recipe, "round": int(result["round"]), "fingerprint": result["fingerprint"]}
        digest = hashlib.sha256(strategy.evaluation_text(result).encode()).hexdigest()
        self._where.audit.record("decided", kind=status_file.TEST, verdict="scored", digest=digest, **about)
        for site, word in result["acceptance"].items():
            self._where.audit.record("decided", kind="final-adapter", verdict=word, peer=site, **about)


def _listed(missing: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({word})" for name, word in sorted(missing.items()))


def _waiting(waits: waiting.Patience, members: Collection[str], words: Mapping[str, str]) -> str:
    wanted = waits.wanted(words)
    missing, every = _listed({name: words[name] for name in wanted - set(members)}), wanted | set(members)
    few = waits.least(words) - len(every)
    parts = [f"waiting: {len(members)} of {len(every)} sites are there, the quorum is {waits.least(words)}"]
    parts += [f"missing: {missing}"] if missing else []
    parts += [f"{few} too few are on the roster: fedvfm server invite NAME, or lower the quorum"] if few > 0 else []
    return "; ".join(parts)


def _remedies(missing: Mapping[str, str], late: Collection[str], server: schema.ServerConfig) -> str:
    """What a person can do about sites that he himself holds up."""
    invited = [name for name in late if missing[name] == waiting.INVITED]
    dropped = [name for name in missing if missing[name] == waiting.DROPPED]
    back = [name for name in late if missing[name] == protocol.LEDGER_WENT_BACK]
    parts = [(invited, "who did not join"), (back, "whose privacy ledger went back")]
    found = [f"; or go on without {who}: fedvfm server start --without {','.join(one)}" for one, who in parts if one]
    return ("" if server.quorum else "".join(found)) + "".join(
        f"; or take '{name}' in again: fedvfm server readmit {name}" for name in dropped
    )


def training(members: Mapping[str, handshake.Member], quorum: int) -> tuple[str, ...]:
    """The sites to train: all but those that say they have no image for it, which only test.

    Where those that are left are fewer than the quorum asks for, all: a site that only tests fills no quorum.
    """
    able = sorted(name for name, member in members.items() if member.examples.get("train", 1))
    return tuple(able if able and len(able) >= quorum else sorted(members))


def known_keys(sites: Mapping[str, rosters.Entry]) -> dict[str, str]:
    """Key -> site of those that are approved, or dropped and may come back."""
    return {entry.public_key: name for name, entry in sites.items() if entry.status in rosters.KNOWN}


def sync(control: runtime.Control, sites: dict[str, rosters.Entry]) -> None:
    """Let in the keys of :func:`known_keys` and no others."""
    known = {node.public_key: node.id for node in control.nodes()}
    wanted = known_keys(sites)
    for key, name in wanted.items():
        if key not in known:
            control.register(key, name)
    for key, node in known.items():
        if key not in wanted:
            control.unregister(node)


def say(event: str, /, **fields: object) -> None:
    """Log an event of the rounds."""
    kept = {key: value for key, value in fields.items() if key != "record"}
    LOG.info(kept.get("text", event), extra={} if event == "note" else {"fields": {"event": event, **kept}})


def main(folder: Path, port: int, server: schema.ServerConfig) -> None:
    """Be the coordinator's process until the federation is finished."""
    where = state_folder.open_state(folder)
    state_folder.note_enrolled(where)
    link = superlink.SuperLink(folder / RUN / "superlink", port).link
    control = runtime.Control(link)
    sync(control, where.sites())
    run_id, stop = control.start_run(), threading.Event()
    control.close()
    most_bytes = superlink.largest_reply(where.lock().manifest.parameters)
    with runtime.server_task(link, run_id, stop, most_bytes) as (grid, context):
        run = Coordinator(where, server, say)
        steady = liveness.WatchfulGrid(
            *(grid, where.sites, run.look, where.audit, where.about.recipe), away_s=server.away_timeout_s
        )
        run.run(steady, context)


if __name__ == "__main__":
    with logs.output(as_json=True):
        try:
            main(Path(sys.argv[1]), int(sys.argv[2]), schema.ServerConfig.model_validate_json(sys.argv[3]))
        except errors.FedvfmError as error:
            say("stopped", code=error.code, text=str(error))
            processes.write_failure(error)
            sys.exit(error.exit_code)
