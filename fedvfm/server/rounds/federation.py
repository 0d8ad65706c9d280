"""The federation: our own round loop on a Flower Grid.

handshake -> (configure -> train -> admit -> aggregate -> checkpoint -> evaluate -> journal) x rounds -> test.
Between rounds whoever steers may take it off the loop, change the sites or the last round, and put it on again.

Flower's own ``Strategy.start`` cannot resume, uses every connected node and admits anything; this loop does what it
does not. NumPy only, never torch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedvfm import errors
from fedvfm.aggregators import base
from fedvfm.aggregators import table as rules
from fedvfm.config import schema
from fedvfm.data import unlabelled
from fedvfm.flower import internals
from fedvfm.privacy import base as mechanisms
from fedvfm.privacy import statements
from fedvfm.protocol import codecs, envelope, protocol
from fedvfm.report import progress
from fedvfm.server.rounds import (
    admission,
    aggregation,
    broadcast,
    buffer,
    cohort,
    controls,
    dp_aggregation,
    handshake,
    journal,
    messaging,
    secure_round,
    secure_sum,
    server_optimiser,
    update_store,
)
from fedvfm.state import checkpoint, control_variates, groups, state
from fedvfm.storage import hash_chain, storage
from fedvfm.trust import locked_recipe, roster_document


@dataclass(frozen=True)
class Job:
    """One federation to run: what, who, where its state lies.

    Attributes:
        name: shown in progress ("federated", "local-only/north", ...).
        locked: recipe, manifest and initial adapter.
        folder: journal, checkpoints and evaluation of this federation.
        train_sites: sites that train.
        test_sites: sites that test the final adapter.
        server: quorum, cohort size, deadline.
        per_sample: ask sites for per-sample test values (simulation only).
        test_best: also test the adapter of the best validation round.
        durable: an admitted update is on disk before it counts, and none is asked for twice.
        last: the last round, where it is to end before the recipe's; 0 for the recipe's.
        least_tests: how many sites must test the final adapter; 0 for all.
        simulated: whether noise that this server adds for privacy comes from the seed (simulation only).
        machine: what each line of the journal states of how all sites compute (simulation only).
        site_times: how long single sites train, by the clock that asynchronous rounds count (simulation only).
        roster: who may be in a sum, under secure aggregation.
    """

    name: str
    locked: locked_recipe.LockedRecipe
    folder: Path
    train_sites: tuple[str, ...]
    test_sites: tuple[str, ...]
    server: schema.ServerConfig
    per_sample: bool = False
    test_best: bool = False
    primary: str = "dice"
    durable: bool = False
    last: int = 0
    least_tests: int = 0
    simulated: bool = False
    machine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    site_times: Mapping[str, float] = dataclasses.field(default_factory=dict)
    roster: roster_document.RosterDocument | None = None

    @property
    def rounds(self) -> int:
        """Number of the last round."""
        return min(self.last or self.locked.recipe.rounds, self.locked.recipe.rounds)


@dataclass(frozen=True, slots=True)
class Start:
    """Where a site's update starts.

    Attributes:
        round: that the site was asked for; an earlier one than runs where it is still training.
        adapter: in the site's own shapes.
    """

    round: int
    adapter: state.AdapterState


NO_ROSTER = (
    "recipe.secure_aggregation: there is no roster document, and no site is asked for an update that is not hidden. "
    "Run: fedvfm server publish-roster, and let every site approve it"
)


AWAY = "away"
"""The word that stands in place of the answer of a site that is not connected."""

LEAST_S = 60.0
"""A round waits at least so long, however quickly the sites have answered so far."""


def _stay(number: int) -> bool:
    return False


class Federation:
    """Runs one Job on a Grid; everything it knows between rounds is on disk.

    Args:
        job: what to run.
        grid: Flower's Grid; any engine's.
        observer: told about rounds and replies.

    Raises:
        ConfigError: if the recipe asks for a privacy that is not to be had here.
    """

    def __init__(self, job: Job, grid: Grid, observer: progress.Observer = progress.silent) -> None:
        self.job, self.observer = job, observer
        self.asker = messaging.Asker(grid, job.server.round_timeout_s)
        self.recipe = job.locked.recipe
        self.rule: base.Aggregator = rules.make(self.recipe.aggregation)
        self.checkpoints = job.folder / "checkpoints"
        self.journal = journal.Journal(job.folder / "journal.jsonl", self.recipe.hash)
        self._kept: dict[str, state.Array] = {}
        self._buffer: buffer.Buffer | None = None
        self._given_up: dict[str, dict[str, str]] = {}
        self._broadcast = broadcast.Broadcast(self.recipe.codec, job.locked.manifest)
        self._controls = (
            controls.Controls(self.recipe, job.locked.manifest, job.train_sites)
            if control_variates.used(self.recipe)
            else None
        )
        self._same_as: dict[str, str] = {}
        self._norms: dict[str, float] = {}
        self._answered: dict[str, float] = {}
        # A Grid whose sites compute in processes of their own knows what all of them take.
        self._peak_mib: Callable[[], float] = getattr(grid, "peak_mib", journal.peak_mib)
        self._private = dp_aggregation.of(job.locked, self.rule, job.folder, simulated=job.simulated)
        self._secure = (
            secure_round.SecureRounds(job.locked, job.roster, job.folder)
            if self.recipe.secure_aggregation is not None and job.roster is not None and not job.simulated
            else None
        )

    @property
    def evaluation_path(self) -> Path:
        """The file whose presence says that this federation is finished."""
        return self.job.folder / "evaluation.json"

    def run(self, members: Mapping[str, handshake.Member] | None = None, leave: Callable[[int], bool] = _stay) -> bool:
        """Run or resume to the end, or until told to leave between two rounds.

        Args:
            members: the sites as a handshake found them; None to hold one now.
            leave: asked before each round, and before the final test, with the number of the round that would come;
                True to leave with what is done.

        Returns: whether it is finished.

        Raises:
            ConfigError: if cohort or quorum cannot be with the sites that train.
            HandshakeRefused, QuorumMissed, CheckpointError, StorageError: see there.
        """
        if self.evaluation_path.exists():
            return True
        sites, server = len(self.job.train_sites), self.job.server
        wrong = cohort.faults(sites, server) + rules.faults(self.recipe)
        wrong += cohort.asynchronous_faults(self.recipe, server)
        self._buffer = self._restored_buffer()
        least = cohort.quorum(server.cohort or sites, server)
        least = least if self._buffer is None else self._least(self._buffer)
        wrong += rules.site_faults(self.recipe, least)
        wrong += (
            [] if self.job.simulated else cohort.promise_faults(least, self.recipe)
        )  # one virtual site may train alone
        if self.recipe.secure_aggregation is not None and not self.job.simulated and self._secure is None:
            wrong.append(NO_ROSTER)
        if self.journal.last_round < self.recipe.first_round - 1:
            wrong.append(
                f"recipe.rerun: rounds 1 to {self.recipe.first_round - 1} are not here. 'fedvfm server withdraw SITE "
                "--rerun' puts them where they belong; leave 'rerun' out of a recipe of your own"
            )
        if wrong:
            raise errors.ConfigError(f"federation '{self.job.name}'", wrong)
        members = self._handshake() if members is None else members
        self._require_labels(members, least)
        adapter, self._kept = self._restore()
        for number in range(self.journal.last_round + 1, self.job.rounds + 1):
            if leave(number):
                return False
            adapter = self._round(number, adapter, members)
        if leave(self.journal.last_round + 1):
            return False
        self._test(adapter, members)
        return True

    def _without_labels(self, members: Mapping[str, handshake.Member]) -> list[str]:
        """The sites that train without labels."""
        return sorted(n for n in self.job.train_sites if n in members and members[n].without_labels)

    def _ready(self, number: int, members: Mapping[str, handshake.Member]) -> list[str]:
        """The sites that may be asked to train in a round: in the warm-up those with labels."""
        own = self.recipe.unlabelled
        waiting = self._without_labels(members) if own is not None and number <= own.warmup_rounds else ()
        return [name for name in self.job.train_sites if name not in waiting]

    def _require_labels(self, members: Mapping[str, handshake.Member], least: int) -> None:
        """Check that sites with labels are there, and enough of them for the rounds that are theirs alone.

        Raises:
            ClassUnlabelled: if no site has labels.
            ConfigError: if the warm-up cannot be with those that have.
        """
        without = self._without_labels(members)
        nobody = unlabelled.nobody([name in without for name in self.job.train_sites])
        if nobody:
            raise errors.ClassUnlabelled(nobody)
        number = self.journal.last_round + 1
        ready = self._ready(number, members)
        if len(ready) < len(self.job.train_sites) and number <= self.job.rounds:
            asked = min(self.job.server.cohort or len(ready), len(ready))
            wrong = rules.site_faults(self.recipe, min(least, asked))
            wrong += cohort.warmup_faults(asked, self.job.server, self.recipe, simulated=self.job.simulated)
            if wrong:
                what = f"federation '{self.job.name}', rounds of the {len(ready)} sites with labels alone"
                raise errors.ConfigError(what, wrong)

    # -- handshake -------------------------------------------------------------------------------------------------

    def _handshake(self) -> dict[str, handshake.Member]:
        """Ask every node who it is and whether it holds the same backbone and manifest.

        A node that does not answer as it should is left out; whether it was a wanted site shows in who is absent then.

        Raises:
            HandshakeRefused: if a wanted site is absent, appears twice, or differs.
        """
        content = protocol.encode_task(protocol.Task(self.recipe))
        wanted = set(self.job.train_sites) | set(self.job.test_sites)
        call = handshake.RollCall(self.job.locked, self.rule, wanted)
        nodes = {node: str(node) for node in self.asker.grid.get_node_ids()}
        for node, message in self.asker.ask(nodes, protocol.HANDSHAKE, lambda _: content, 0):
            if message.has_error():
                call.leave_out(node, f"refused the handshake: {protocol.error_word(message)}")
                continue
            try:
                hello = protocol.decode_hello(message.content)
            except errors.ProtocolError as error:
                call.leave_out(node, f"cannot be understood: {error}")
            else:
                call.take(node, hello)
        members = call.members()
        for text in call.left_out:
            self.observer("note", text=f"{text}; no site of '{self.job.name}' is missing")
        return members

    # -- state -----------------------------------------------------------------------------------------------------

    def _restore(self) -> tuple[state.AdapterState, dict[str, state.Array]]:
        """The adapter of the last journalled round, checked against its journal line, and what the server kept."""
        last = self.journal.last_round
        if last == 0:
            return self.job.locked.adapter, {}
        adapter, kept, _ = checkpoint.read(checkpoint.path_of(self.checkpoints, last))
        if adapter.fingerprint != self.journal.rounds[-1]["fingerprint"]:
            raise errors.CheckpointError(
                f"{checkpoint.path_of(self.checkpoints, last)} is not the adapter the journal names "
                f"for round {last}. Restore it from a backup"
            )
        return adapter, kept

    def _restored_buffer(self) -> buffer.Buffer | None:
        """Who was out as the last round ended; None where every round waits for all that it asked."""
        settings, lines = self.recipe.asynchronous, self.journal.rounds
        if settings is None:
            return None
        times = self.job.site_times if self.job.simulated else None
        return buffer.Buffer(settings, times, lines[-1] if lines else None, self.recipe.first_round)

    def _began_with(self, number: int) -> state.AdapterState:
        """The adapter that an earlier round began with.

        Raises:
            CheckpointError: if it is gone, or is not the one that the journal names.
        """
        if number == self.recipe.first_round:
            return self.job.locked.adapter
        path = checkpoint.path_of(self.checkpoints, number - 1)
        adapter, _, _ = checkpoint.read(path)
        line = next(line for line in self.journal.rounds if int(line["round"]) == number - 1)
        if adapter.fingerprint != line["fingerprint"]:
            raise errors.CheckpointError(
                f"{path} is not the adapter the journal names for round {number - 1}, with which a site still trains. "
                "Restore it from a backup"
            )
        return adapter

    # -- one round -------------------------------------------------------------------------------------------------

    def _round(
        self, number: int, adapter: state.AdapterState, members: Mapping[str, handshake.Member]
    ) -> state.AdapterState:
        started = time.monotonic()
        ready, without = self._ready(number, members), self._without_labels(members)
        if self._buffer is not None:
            ready = self._free(number, [members[name] for name in ready], self._buffer)
        asked = cohort.choose(ready, self.job.server, self.recipe.seed, number, without)
        waited = asked if self._buffer is None else self._out(self._buffer)
        self.observer("round", arm=self.job.name, round=number, rounds=self.job.rounds, sites=waited)
        if self._controls is not None:
            self._controls.begin(number, self._kept)
        joined = self._private.found(number, adapter, self._kept) if self._private is not None else None
        if self._secure is not None:
            joined = self._hidden(self._secure, number, adapter, [members[name] for name in asked])
        joined = joined or self._joined(number, adapter, members, asked)
        trained = groups.moving(self.job.locked.manifest, self.recipe, number)
        goal, velocity = server_optimiser.step(adapter, joined.adapter, self._kept, self.recipe.aggregation, trained)
        adapter, lost = self._broadcast.moved(adapter, goal, self._kept, trained)
        corrected = {} if self._controls is None else self._controls.kept()
        self._kept = {**joined.kept, **velocity, **lost, **corrected}
        checkpoint.save(self.checkpoints, number, adapter, self._kept, self.recipe.hash)
        storage.fault_point("between-checkpoint-and-journal")
        validates = self.recipe.evaluation.validates(number, self.job.rounds)
        validation = self._validate(number, adapter, members) if validates else {}
        self._keep_best(number, adapter, validation)
        line = {
            "round": number,
            "fingerprint": adapter.fingerprint,
            **joined.record,
            "precision": {name: members[name].precision for name in asked if name in members},
            **_labelled(members, asked),
            "validation": validation,
            **self._mark,
            **({"same_as": self._same_as} if self._same_as else {}),
            **({journal.DRAWN_FROM: sorted(ready)} if self._draws(asked, ready) else {}),
            **({} if self._buffer is None else self._buffer.record()),
            **self.job.machine,
            "bytes": self.asker.new_traffic(),
            **_times(started),
            "peak_mib": self._peak_mib(),
        }
        self.observer("round-end", arm=self.job.name, round=number, record=self.journal.append(line))
        if self._private is not None and not self.job.simulated:
            self.observer("note", text=f"round {number}: {statements.so_far(line[dp_aggregation.ENTRY])}")
        # The checkpoint before is kept: should this line be lost with the disk's cache, the round can be run again.
        # So are those that a federation would go on from, should a site withdraw.
        stay = journal.bases(self.journal.rounds) if self.job.durable else set()
        stay |= set() if self._buffer is None else self._buffer.bases()
        checkpoint.prune(self.checkpoints, number - 1, stay)
        if self.job.durable:
            update_store.Received(self.job.folder / "received").clear()
        if self._secure is not None:
            self._secure.clear()
        return adapter

    def _free(self, number: int, ready: Sequence[handshake.Member], own: buffer.Buffer) -> list[str]:
        """Of the sites that may be asked those that are not training; from now on they are."""
        since = {site: row.round for site, row in own.out.items()}
        self._given_up = given_up = own.give_up(number)
        for site, why in given_up.items():
            self._refused(number, site, why["reason"])
        if not self._waits and self.recipe.codec != codecs.PLAIN:
            self._let_train([member for member in ready if member.name in given_up], since, own)
        own.messages.forget({member.node for member in ready if member.name in given_up})
        # Who is given up is asked again in the next round; where the others are too few for this one, at once.
        few = sum(member.name not in given_up for member in ready) < self._least(own)
        free = [member.name for member in ready if member.name not in {*own.out, *(() if few else given_up)}]
        own.ask(number, free)
        return free

    def _let_train(self, members: Sequence[handshake.Member], since: Mapping[str, int], own: buffer.Buffer) -> None:
        """In a simulation let sites that are given up end their work, whose updates nobody takes.

        What coding them lost goes into their next ones. Else it would depend on the engine whether they had trained.
        """
        nodes = {member.node: since[member.name] for member in members}
        sent = {key: row for key, row in own.messages.sent.items() if row[0] in nodes}
        standing = messaging.Standing(sent, next_of=lambda asked: asked)

        def task(member: handshake.Member) -> protocol.Task:
            began = own.adapter(since[member.name], self._began_with)
            return protocol.Task(self.recipe, since[member.name], self.rule.for_site(began, member.manifest))

        for _ in self._ask(members, protocol.TRAIN, task, nodes, standing=standing):
            pass

    def _least(self, own: buffer.Buffer) -> int:
        """So many updates a round needs: of all that train here, however few of them it may wait for."""
        return own.quorum(len(self.job.train_sites), self.job.server)

    def _out(self, own: buffer.Buffer) -> list[str]:
        """The sites of this job that are training, in sorted order; another one is asked when it is there again."""
        return sorted(set(self.job.train_sites) & set(own.out))

    def _draws(self, asked: Sequence[str], ready: Sequence[str]) -> bool:
        """Whether the cohort is a draw, so that who might have been drawn had a part in it."""
        return self.job.durable and len(asked) < len(ready)

    def _hidden(
        self,
        secure: secure_round.SecureRounds,
        number: int,
        adapter: state.AdapterState,
        members: Sequence[handshake.Member],
    ) -> aggregation.Joined:
        """What the cohort's masked updates came to; no single one is ever seen."""
        nodes = {member.name: member.node for member in members}

        def ask(
            some: Sequence[handshake.Member], kind: str, task: Callable[[str], protocol.Task]
        ) -> Iterator[tuple[str, Message]]:
            names, answered = {nodes[member.name]: member.name for member in some}, set()
            for node, message in self.asker.ask(
                names, kind, lambda node: protocol.encode_task(task(names[node])), number
            ):
                if node not in answered:  # a second answer of a site counts no more than the first
                    answered.add(node)
                    self.observer(
                        "reply",
                        arm=self.job.name,
                        round=number,
                        phase=protocol.WORDS[kind],
                        site=names[node],
                        loss=None,
                    )
                    yield names[node], message

        least = cohort.quorum(len(members), self.job.server)
        tell = functools.partial(self._refused, number)
        mean, sites, refused = secure.run(number, adapter, members, least, ask, tell)
        return secure_sum.joined(mean, sites, {"cohort": sorted(nodes), "refused": refused}, self.recipe)

    def _joined(
        self,
        number: int,
        adapter: state.AdapterState,
        members: Mapping[str, handshake.Member],
        asked: list[str],
    ) -> aggregation.Joined:
        """What the cohort's updates came to, and what the journal states of it."""
        kept, own = update_store.Received(self.job.folder / "received"), self._buffer
        waited = asked if own is None else self._out(own)
        starts = self._starts(number, adapter, [members[name] for name in waited])
        intake = self._intake(number, adapter, members, starts, kept)
        # An answer to a round that is asked for again says not how long its site takes: it may have lain there.
        again = self._measures and self.job.durable and kept.asked_before(number)
        refused = self._train(number, starts, [members[name] for name in waited], intake, kept)
        if own is not None:
            refused = dict(sorted({**self._given_up, **refused}.items()))
        missing = dict.fromkeys(sorted({*waited} - {*intake.sites} - refused.keys()), AWAY)
        missing |= {name: row["reason"] for name, row in refused.items()}
        why = ", ".join(f"{name}: {reason}" for name, reason in missing.items()) or "no refusals"
        least = cohort.quorum(len(asked), self.job.server) if own is None else self._least(own)
        cohort.require(list(intake.sites), waited, least, number, why)
        cohort.require_labels(list(intake.sites), self._without_labels(members), number)
        # At site level an update is not private before the sum is noised, and neither is its norm.
        hidden = self._private is not None or self.recipe.secure_aggregation is not None
        norms = {} if hidden else {"norms": dict(sorted(self._norms.items()))}
        pace = {"answered": dict(sorted(self._answered.items()))} if self._measures and not again else {}
        made = intake.finish({"cohort": asked, "refused": refused, **norms, **pace})
        if self._private is not None:
            kept.clear()  # what is not private stays no longer than it must
        return made

    def _intake(
        self,
        number: int,
        adapter: state.AdapterState,
        members: Mapping[str, handshake.Member],
        starts: Mapping[str, Start],
        kept: update_store.Received,
    ) -> aggregation.Intake:
        asked = sorted(starts)
        if self.recipe.secure_aggregation is not None:  # a simulation; else no plain update is asked for
            without = self._without_labels(members)
            return secure_sum.PlainSum(self.recipe, adapter, self.job.locked.manifest, number, without)
        if self._private is not None:
            return self._private.intake(number, adapter, len(asked), self._kept, self.journal.rounds)
        weighting, manifest = self.recipe.aggregation.weighting, self.job.locked.manifest
        stored = functools.partial(kept.read, number) if self.job.durable else None
        kept_of_rule, own = self._kept, self.recipe.unlabelled
        if self.recipe.asynchronous is not None:
            bases = {name: start.adapter for name, start in starts.items()}
            settings = (self.rule, members, weighting, manifest, kept_of_rule, adapter)
            return buffer.BufferedFold(self.recipe.asynchronous, number, bases, *settings)
        return aggregation.Fold(self.rule, asked, members, weighting, manifest, kept_of_rule, adapter, stored, own)

    def _starts(
        self, number: int, adapter: state.AdapterState, members: Sequence[handshake.Member]
    ) -> dict[str, Start]:
        """Where each site's update starts: at the round's adapter, but for sites that are out since an earlier one."""
        own, starts = self._buffer, {}
        for member in members:
            at = number if own is None else own.out[member.name].round
            begin = adapter if own is None or at == number else own.adapter(at, self._began_with)
            starts[member.name] = Start(at, self.rule.for_site(begin, member.manifest))
        return starts

    def _train(
        self,
        number: int,
        starts: Mapping[str, Start],
        members: Sequence[handshake.Member],
        intake: aggregation.Intake,
        kept: update_store.Received,
    ) -> dict[str, dict[str, str]]:
        """Let every admitted update be taken, once it is on disk where it must; sites refused, in sorted order."""
        bases = {name: start.adapter for name, start in starts.items()}
        by_node = {member.node: member for member in members}
        own, standing = self._buffer, None

        usual = admission.usual(self.journal.rounds)
        self._norms = {}
        taken: set[str] = set()
        away: set[str] = set()
        refused: dict[str, dict[str, str]] = {}
        self._same_as = {}
        if self.job.durable:
            for update in kept.find(number, bases):
                self._take(update, bases[update.site], intake)
                taken.add(update.site)
                self._norms[update.site] = admission.norm_of(update.state, bases[update.site])
        limit, enough = self._limit(), cohort.quorum(len(members), self.job.server)
        self._answered = {}
        grace = self.job.server.grace_s if self._waits else 0.0
        if own is not None:
            standing, enough = own.messages, own.enough(len(members), last=number == self.job.rounds)
            standing.next_of = own.turns({member.node: member.name for member in members})
        if grace and len(taken) >= enough:
            limit.seconds = min(limit.seconds, grace)
        ended = own is not None and len(taken) >= enough  # an earlier process took all, and was ended before the round
        if own is not None and self._waits and number < self.job.rounds:  # the last round asks whom it can
            away |= own.resting([member.name for member in members], number, enough, time.monotonic()) - taken
        asked = [] if ended else [member for member in members if member.name not in taken | away]
        for node, message in self._ask(
            asked,
            protocol.TRAIN,
            lambda member: protocol.Task(
                self.recipe,
                starts[member.name].round,
                bases[member.name],
                correction=None if self._controls is None else self._controls.correction(member.name),
            ),
            {member.node: starts[member.name].round for member in asked},
            limit,
            standing,
        ):
            member = by_node[node]
            if member.name in taken or member.name in refused:
                continue  # a second answer of a site counts no more than the first
            if own is not None and message.has_error() and protocol.error_word(message) == AWAY:
                away.add(member.name)  # it may have trained: when it is there again it is asked for the same round
                own.was_away(member.name, time.monotonic())
                continue
            if internals.origin(message):
                self._same_as[member.name] = internals.origin(message)
            terms = admission.Terms(
                member.name,
                starts[member.name].round,
                bases[member.name],
                member.manifest,
                self.recipe.admission,
                self.recipe.aggregation.weighting,
                self.recipe.adapter.factors,
                self.recipe.personal.kind,
                # Under secure aggregation a site greets with whether it has any, and not with how many.
                member.examples.get("train") if self.recipe.secure_aggregation is None else None,
                usual,
                all_steps=self._controls is not None,
            )
            loss = None
            try:
                if message.has_error():
                    raise errors.Refused("site-" + protocol.error_word(message), "the site answered with an error")
                update = envelope.of(message).update_on(terms.base, self.recipe.codec)
                update = admission.admit(update, terms)
                update = update if self._private is None else mechanisms.bare(update)  # the rest is not private
                if self.job.durable:
                    kept.keep(update, number)
                    storage.fault_point("update-kept")
                self._take(update, terms.base, intake)
                taken.add(member.name)
                self._answered[member.name] = round(limit.now - limit.began, 3)
                if (grace or own is not None) and len(taken) >= enough:
                    limit.until = min(limit.until, limit.now + grace)
                self._norms[member.name] = admission.norm_of(update.state, terms.base)
                loss = update.metrics.get("loss")
            except errors.Refused as refusal:
                refused[member.name] = {"reason": refusal.reason, "detail": refusal.detail}
            except errors.ProtocolError as error:
                refused[member.name] = {"reason": "protocol", "detail": str(error)}
            if member.name in refused:
                self._refused(number, member.name, refused[member.name]["reason"])
                intake.go_without(member.name)
            self.observer("reply", arm=self.job.name, round=number, phase="train", site=member.name, loss=loss)
        out = away if standing is None else away | {by_node[node].name for node in standing.nodes}
        out |= {member.name for member in members} if ended else set()
        for member in members:
            if member.name in taken or member.name in refused or member.name in out:
                continue
            seconds = self.asker.timeout_s if own is not None else min(self.asker.timeout_s, limit.lasts)
            detail = f"no reply within {round(seconds, 1):g} s"
            refused[member.name] = {"reason": "no-answer", "detail": detail}
            self._refused(number, member.name, "no-answer")
            intake.go_without(member.name)
        if own is not None:
            own.back(taken | refused.keys())
        return dict(sorted(refused.items()))

    def _take(self, update: state.SiteUpdate, start: state.AdapterState, intake: aggregation.Intake) -> None:
        """Take an admitted update, whose site began with ``start``."""
        intake.take(update)
        if self._controls is not None:
            self._controls.take(update, start)

    def _limit(self) -> messaging.Limit:
        """How long a round waits, by what the answers so far took."""
        times = [seconds for line in self.journal.rounds for seconds in line.get("answered", {}).values()]
        if not (self._measures and times):
            return messaging.Limit()
        return messaging.Limit(max(LEAST_S, self.job.server.patience * max(times)))

    @property
    def _waits(self) -> bool:
        """Whether it looks at the clock: in a simulation nobody is late, and results are the same again."""
        return not self.job.simulated

    @property
    def _measures(self) -> bool:
        """Whether the journal says how long answers took."""
        return self._waits and self.job.server.patience > 0

    def _refused(self, number: int, site: str, reason: str) -> None:
        self.observer("refused", arm=self.job.name, round=number, site=site, reason=reason)

    def _keep_best(self, number: int, adapter: state.AdapterState, validation: Mapping[str, Any]) -> None:
        if not (self.job.test_best and validation):
            return
        scores = [macro(row["validation"], self.job.primary) for row in self.journal.rounds if row["validation"]]
        earlier = [score for score in scores if math.isfinite(score)]
        if macro(validation, self.job.primary) > max(earlier, default=float("-inf")):
            checkpoint.write(
                self.checkpoints / "best.safetensors", adapter, {"round": str(number), "recipe": self.recipe.hash}
            )

    # -- evaluation ------------------------------------------------------------------------------------------------

    @property
    def _mark(self) -> dict[str, str]:
        """What a record of scores must say of them."""
        return {"prompt": self.recipe.task.oracle} if self.recipe.task.oracle else {}

    def _validate(
        self, number: int, adapter: state.AdapterState, members: Mapping[str, handshake.Member]
    ) -> dict[str, dict[str, float]]:
        # In a simulation nobody is busy, whatever the counted clock says, and all are asked.
        # Who was given up in this round trains yet, and would hold up everybody who waits for its scores.
        busy = {*self._buffer.out, *self._given_up} if self._buffer is not None and self._waits else ()
        sites = [
            members[name] for name in self.job.train_sites if name not in busy and members[name].examples.get("val", 0)
        ]
        answers = self._evaluate(number, adapter, sites, split="val", full=False)
        return {name: {"num_examples": answer.num_examples, **answer.metrics} for name, answer in answers.items()}

    def _test(self, adapter: state.AdapterState, members: Mapping[str, handshake.Member]) -> None:
        sites = [members[name] for name in self.job.test_sites]
        rounds = self.journal.last_round
        result: dict[str, Any] = {"round": rounds, "fingerprint": adapter.fingerprint, "recipe": self.recipe.hash}
        result |= self._mark
        started = time.monotonic()
        self.observer("test", arm=self.job.name, round=rounds, sites=sorted(self.job.test_sites))
        answers = self._evaluate(rounds, adapter, sites, split="test", full=True, final=True)
        result["last"] = as_record(answers)
        if self.job.durable:
            result["acceptance"] = {name: answer.acceptance for name, answer in answers.items() if answer.acceptance}
        best = self.checkpoints / "best.safetensors"
        if self.job.test_best and best.exists():
            chosen, _, marks = checkpoint.read(best)
            same = chosen.fingerprint == adapter.fingerprint
            scores = result["last"] if same else self._tested(int(marks["round"]), chosen, sites)
            result["best"] = {"round": int(marks["round"]), "fingerprint": chosen.fingerprint, "sites": scores["sites"]}
        result["bytes"] = self.asker.new_traffic()
        result |= {**self.job.machine, **_times(started), "peak_mib": self._peak_mib()}
        checkpoint.write(
            self.job.folder / "adapter.safetensors", adapter, {"round": str(rounds), "recipe": self.recipe.hash}
        )
        self.observer("finished", arm=self.job.name, round=rounds, record=result)
        storage.write_text(self.evaluation_path, evaluation_text(result))

    def _tested(self, number: int, adapter: state.AdapterState, sites: Sequence[handshake.Member]) -> dict[str, Any]:
        return as_record(self._evaluate(number, adapter, sites, split="test", full=True))

    def _evaluate(
        self,
        number: int,
        adapter: state.AdapterState,
        sites: Sequence[handshake.Member],
        *,
        split: str,
        full: bool,
        final: bool = False,
    ) -> dict[str, protocol.Evaluation]:
        by_node = {member.node: member for member in sites}
        per_sample = full and self.job.per_sample
        surface = full and self.recipe.evaluation.surface

        def task(member: handshake.Member) -> protocol.Task:
            own = self.rule.for_site(adapter, member.manifest)
            return protocol.Task(self.recipe, number, own, split, surface, per_sample, final)

        answers: dict[str, protocol.Evaluation] = {}
        for node, message in self._ask(sites, protocol.EVALUATE, task, number):
            name = by_node[node].name
            self.observer("reply", arm=self.job.name, round=number, phase=split, site=name, loss=None)
            if message.has_error():
                word = protocol.error_word(message)
                self.observer("note", text=f"site '{name}' did not evaluate: {word}")
                self._refused(number, name, f"site-{word}")
                continue
            try:
                answer = envelope.of(message).evaluation
            except errors.ProtocolError as error:
                self.observer("note", text=f"site '{name}' did not evaluate: {error}")
                continue
            if answer.site == name and answer.round == number:
                # Values of single samples that nobody asked for are neither kept nor shown.
                answers[name] = answer if per_sample else dataclasses.replace(answer, samples={}, ids=())
        if full and len(answers) < (self.job.least_tests or len(sites)):
            missing = ", ".join(sorted({member.name for member in sites} - set(answers)))
            raise errors.QuorumMissed(f"the final test is missing from: {missing}. Mend the sites and resume")
        return dict(sorted(answers.items()))

    def _ask(
        self,
        members: Sequence[handshake.Member],
        kind: str,
        task_of: Callable[[handshake.Member], protocol.Task],
        number: int | Mapping[int, int],
        limit: messaging.Limit | None = None,
        standing: messaging.Standing | None = None,
    ) -> Iterator[tuple[int, Message]]:
        """Ask these sites; one that does not hold what a difference is to is asked again with the whole adapter.

        See :meth:`fedvfm.server.rounds.messaging.Asker.ask`.
        """
        by_node = {member.node: member for member in members}
        adapters: dict[int, str] = {}
        lacking: set[int] = set()

        def lacks(node: int, message: Message) -> bool:
            first = node not in lacking and message.has_error() and protocol.error_word(message) == protocol.MISSING
            if first:
                lacking.add(node)
                self._broadcast.forget(by_node[node].name)
            return first

        nodes = {member.node: member.name for member in members}
        rounds = number if isinstance(number, Mapping) else dict.fromkeys(nodes, number)
        content = self._contents(task_of, by_node, adapters, rounds)
        for node, message in self.asker.ask(nodes, kind, content, rounds, lacks, limit, standing):
            if message.has_error() or node not in adapters:  # asked in an earlier round: another adapter came since
                self._broadcast.forget(nodes[node])
            else:
                self._broadcast.holds(nodes[node], adapters[node])
            yield node, message

    def _contents(
        self,
        task_of: Callable[[handshake.Member], protocol.Task],
        by_node: Mapping[int, handshake.Member],
        adapters: dict[int, str],
        rounds: Mapping[int, int],
    ) -> Callable[[int], Any]:
        """The records for a node; sites of one rank that hold the same get the same: made once, serialised for each.

        Args:
            task_of: what is asked of a site.
            by_node: the sites.
            adapters: takes the fingerprint of each node's adapter.
            rounds: of each node's message.
        """
        made: dict[tuple[str, str | None], Any] = {}
        tasks: dict[str, protocol.Task] = {}

        def content(node: int) -> Any:
            member = by_node[node]
            kind = f"{member.manifest.fingerprint} {rounds[node]}"
            if self._controls is not None:  # each site has a correction of its own
                kind += f" {member.name}"
            task = tasks[kind] if kind in tasks else tasks.setdefault(kind, task_of(member))
            difference = None
            if task.state is not None:
                adapters[node] = task.state.fingerprint
                difference = self._broadcast.difference(member, task.state)
            key = (kind, None if difference is None else difference.base)
            if key not in made:
                made[key] = protocol.encode_task(task, difference)
            return made[key]

        return content


def _labelled(members: Mapping[str, handshake.Member], asked: Sequence[str]) -> dict[str, Any]:
    """Of the cohort the sites that label nothing or not all classes, or lack channels; nothing where all are alike."""
    there = [members[name] for name in asked if name in members]
    labelled = {member.name: list(member.labelled) for member in there if member.labelled}
    lacking = {member.name: list(member.lacking) for member in there if member.lacking}
    without = [member.name for member in there if member.without_labels]
    rows = {"labelled": labelled, "lacking": lacking, "without_labels": without}
    return {key: sites for key, sites in rows.items() if sites}


def _times(started: float) -> dict[str, float]:
    """Seconds since ``started`` on the monotonic clock, and the time of day (Unix time) that it is now."""
    return {"seconds": round(time.monotonic() - started, 3), "ended": round(time.time(), 3)}


def evaluation_text(result: Mapping[str, Any]) -> str:
    """The file of a final test, byte for byte."""
    return hash_chain.canonical(result) + "\n"


def as_record(answers: Mapping[str, protocol.Evaluation]) -> dict[str, Any]:
    """Site values and per-sample values, by site."""
    return {
        "sites": {name: {"num_examples": answer.num_examples, **answer.metrics} for name, answer in answers.items()},
        "samples": {name: {"id": list(answer.ids), **answer.samples} for name, answer in answers.items()},
    }


def macro(sites: Mapping[str, Mapping[str, float]], metric: str) -> float:
    """Plain mean over the sites that report ``metric``."""
    values = [row[metric] for row in sites.values() if metric in row]
    return sum(values) / len(values) if values else float("nan")
