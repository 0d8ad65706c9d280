"""The federation: our own round loop on a Flower Grid.

handshake -> (configure -> train -> admit -> aggregate -> checkpoint -> evaluate -> journal) x rounds -> test.

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

import threadpoolctl
from flwr.app import Message
from flwr.serverapp import Grid

from fedvfm import chain, errors, flower, progress, protocol, state, storage
from fedvfm import config as configs
from fedvfm import recipe as recipes
from fedvfm.server import admission, checkpoint, cohort, handshake, journal, optimiser, received
from fedvfm.server.aggregators import base, svd
from fedvfm.server.aggregators import table as rules

POLL_S = 0.5


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
    """

    name: str
    locked: recipes.LockedRecipe
    folder: Path
    train_sites: tuple[str, ...]
    test_sites: tuple[str, ...]
    server: configs.ServerConfig
    per_sample: bool = False
    test_best: bool = False
    primary: str = "dice"
    durable: bool = False


@dataclass
class Traffic:
    """Bytes of serialised messages, both ways."""

    down: int = 0
    up: int = 0


class Federation:
    """Runs one Job on a Grid; everything it knows between rounds is on disk.

    Args:
        job: what to run.
        grid: Flower's Grid; any engine's.
        observer: told about rounds and replies.
    """

    def __init__(self, job: Job, grid: Grid, observer: progress.Observer = progress.silent) -> None:
        self.job, self.grid, self.observer = job, grid, observer
        self.recipe = job.locked.recipe
        self.rule: base.Aggregator = rules.TABLE.get(self.recipe.aggregation.rule)(**self.recipe.aggregation.options)
        self.checkpoints = job.folder / "checkpoints"
        self.journal = journal.Journal(job.folder / "journal.jsonl", self.recipe.hash)
        self.traffic = Traffic()
        self._recorded = Traffic()
        self._kept: dict[str, state.Array] = {}

    @property
    def evaluation_path(self) -> Path:
        """The file whose presence says that this federation is finished."""
        return self.job.folder / "evaluation.json"

    def run(self) -> None:
        """Run or resume to the end.

        Raises:
            ConfigError: if cohort or quorum cannot be with the sites that train.
            HandshakeRefused, QuorumMissed, CheckpointError, StorageError: see there.
        """
        if self.evaluation_path.exists():
            return
        wrong = cohort.faults(len(self.job.train_sites), self.job.server)
        if wrong:
            raise errors.ConfigError(f"federation '{self.job.name}'", wrong)
        members = self._handshake()
        adapter, self._kept = self._restore()
        for number in range(self.journal.last_round + 1, self.recipe.rounds + 1):
            adapter = self._round(number, adapter, members)
        self._test(adapter, members)

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
        nodes = {node: str(node) for node in self.grid.get_node_ids()}
        for node, message in self._ask(nodes, protocol.HANDSHAKE, lambda _: content, 0):
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
            return self.job.locked.initial, {}
        adapter, kept, _ = checkpoint.read(checkpoint.path_of(self.checkpoints, last))
        if adapter.fingerprint != self.journal.rounds[-1]["fingerprint"]:
            raise errors.CheckpointError(
                f"{checkpoint.path_of(self.checkpoints, last)} is not the adapter the journal names "
                f"for round {last}. Restore it from a backup"
            )
        return adapter, kept

    # -- one round -------------------------------------------------------------------------------------------------

    def _round(
        self, number: int, adapter: state.AdapterState, members: Mapping[str, handshake.Member]
    ) -> state.AdapterState:
        started = time.monotonic()
        asked = cohort.choose(self.job.train_sites, self.job.server, self.recipe.seed, number)
        self.observer("round", arm=self.job.name, round=number, rounds=self.recipe.rounds, sites=asked)
        updates, refused = self._train(number, adapter, [members[name] for name in asked])
        why = ", ".join(f"{name}: {row['reason']}" for name, row in refused.items()) or "no refusals"
        cohort.require(list(updates), asked, self.job.server, number, why)
        aggregate, kept, record = self._aggregate(updates, members)
        adapter, velocity = optimiser.step(adapter, aggregate, self._kept, self.recipe.aggregation)
        self._kept = {**kept, **velocity}
        checkpoint.save(self.checkpoints, number, adapter, self._kept, self.recipe.hash)
        storage.fault_point("between-checkpoint-and-journal")
        every = self.recipe.evaluation.every
        validation = (
            self._validate(number, adapter, members)
            if every and (number % every == 0 or number == self.recipe.rounds)
            else {}
        )
        self._keep_best(number, adapter, validation)
        line = {
            "round": number,
            "fingerprint": adapter.fingerprint,
            "cohort": asked,
            "refused": refused,
            **record,
            "validation": validation,
            **self._mark,
            "bytes": self._new_traffic(),
            "seconds": round(time.monotonic() - started, 3),
            "peak_mib": journal.peak_mib(),
        }
        self.observer("round-end", arm=self.job.name, round=number, record=self.journal.append(line))
        # The checkpoint before is kept: should this line be lost with the disk's cache, the round can be run again.
        checkpoint.prune(self.checkpoints, number - 1)
        if self.job.durable:
            received.Received(self.job.folder / "received").clear()
        return adapter

    def _train(
        self, number: int, adapter: state.AdapterState, members: Sequence[handshake.Member]
    ) -> tuple[dict[str, state.SiteUpdate], dict[str, dict[str, str]]]:
        """Updates admitted and sites refused, by name in sorted order."""
        bases = {member.name: self.rule.for_site(adapter, member.manifest) for member in members}
        by_node = {member.node: member for member in members}

        # Sites of one rank get the same records: made once, serialised for each.
        content = self._contents(lambda member: protocol.Task(self.recipe, number, bases[member.name]), by_node)

        kept = received.Received(self.job.folder / "received")
        updates = kept.find(number, bases) if self.job.durable else {}
        refused: dict[str, dict[str, str]] = {}
        asked = {m.node: m.name for m in members if m.name not in updates}
        for node, message in self._ask(asked, protocol.TRAIN, content, number):
            member = by_node[node]
            terms = admission.Terms(
                member.name,
                number,
                bases[member.name],
                member.manifest,
                self.recipe.admission,
                self.recipe.aggregation.weighting,
            )
            try:
                if message.has_error():
                    raise errors.Refused("site-" + protocol.error_word(message), "the site answered with an error")
                update = admission.admit(protocol.decode_update(message.content), terms)
                if self.job.durable:
                    kept.keep(update, number)
                    storage.fault_point("update-kept")
                updates[member.name] = update
            except errors.Refused as refusal:
                refused[member.name] = {"reason": refusal.reason, "detail": refusal.detail}
            except errors.ProtocolError as error:
                refused[member.name] = {"reason": "protocol", "detail": str(error)}
            loss = updates[member.name].metrics.get("loss") if member.name in updates else None
            self.observer("reply", arm=self.job.name, round=number, phase="train", site=member.name, loss=loss)
        for member in members:
            if member.name not in updates and member.name not in refused:
                refused[member.name] = {
                    "reason": "no-answer",
                    "detail": f"no reply within {self.job.server.round_timeout_s:g} s",
                }
        return dict(sorted(updates.items())), dict(sorted(refused.items()))

    def _aggregate(
        self, updates: Mapping[str, state.SiteUpdate], members: Mapping[str, handshake.Member]
    ) -> tuple[state.AdapterState, dict[str, state.Array], dict[str, Any]]:
        weights = {name: _weight(update, self.recipe.aggregation.weighting) for name, update in updates.items()}
        total = sum(weights.values())
        contributions = [
            base.Contribution(weights[name], update.state, members[name].manifest) for name, update in updates.items()
        ]
        with _blas().limit(limits=1, user_api="blas"):
            acc = self.rule.init(self.job.locked.manifest, self._kept)
            for contribution in contributions:
                acc = self.rule.fold(acc, contribution)
            aggregate, kept = self.rule.finish(acc)
            error = svd.factor_error(contributions)
            # Factors of different ranks have no mean; what the rule itself loses can still be told.
            mixed = len({one.manifest.fingerprint for one in contributions}) > 1
            lost = svd.aggregate_error(contributions, aggregate, self.job.locked.manifest) if mixed else None
        record = {
            "examples": {name: update.num_examples for name, update in updates.items()},
            "weights": {name: weight / total for name, weight in weights.items()},
            "train": {name: dict(update.metrics) for name, update in updates.items()},
            "factor_error": error,
            "aggregate_error": lost,
        }
        return aggregate, kept, record

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
        sites = [members[name] for name in self.job.train_sites if members[name].examples.get("val", 0)]
        answers = self._evaluate(number, adapter, sites, split="val", full=False)
        return {name: {"num_examples": answer.num_examples, **answer.metrics} for name, answer in answers.items()}

    def _test(self, adapter: state.AdapterState, members: Mapping[str, handshake.Member]) -> None:
        sites = [members[name] for name in self.job.test_sites]
        rounds = self.recipe.rounds
        result: dict[str, Any] = {"round": rounds, "fingerprint": adapter.fingerprint, "recipe": self.recipe.hash}
        result |= self._mark
        started = time.monotonic()
        result["last"] = self._tested(rounds, adapter, sites)
        best = self.checkpoints / "best.safetensors"
        if self.job.test_best and best.exists():
            chosen, _, marks = checkpoint.read(best)
            same = chosen.fingerprint == adapter.fingerprint
            scores = result["last"] if same else self._tested(int(marks["round"]), chosen, sites)
            result["best"] = {"round": int(marks["round"]), "fingerprint": chosen.fingerprint, "sites": scores["sites"]}
        result["bytes"] = self._new_traffic()
        result["seconds"] = round(time.monotonic() - started, 3)
        result["peak_mib"] = journal.peak_mib()
        checkpoint.write(
            self.job.folder / "adapter.safetensors", adapter, {"round": str(rounds), "recipe": self.recipe.hash}
        )
        storage.write_text(self.evaluation_path, chain.canonical(result) + "\n")

    def _tested(self, number: int, adapter: state.AdapterState, sites: Sequence[handshake.Member]) -> dict[str, Any]:
        answers = self._evaluate(number, adapter, sites, split="test", full=True)
        return {
            "sites": {
                name: {"num_examples": answer.num_examples, **answer.metrics} for name, answer in answers.items()
            },
            "samples": {name: {"id": list(answer.ids), **answer.samples} for name, answer in answers.items()},
        }

    def _evaluate(
        self, number: int, adapter: state.AdapterState, sites: Sequence[handshake.Member], *, split: str, full: bool
    ) -> dict[str, protocol.Evaluation]:
        by_node = {member.node: member for member in sites}
        per_sample = full and self.job.per_sample
        surface = full and self.recipe.evaluation.surface

        def task(member: handshake.Member) -> protocol.Task:
            own = self.rule.for_site(adapter, member.manifest)
            return protocol.Task(self.recipe, number, own, split, surface, per_sample)

        content = self._contents(task, by_node)

        answers: dict[str, protocol.Evaluation] = {}
        for node, message in self._ask({m.node: m.name for m in sites}, protocol.EVALUATE, content, number):
            name = by_node[node].name
            self.observer("reply", arm=self.job.name, round=number, phase=split, site=name, loss=None)
            if message.has_error():
                self.observer("note", text=f"site '{name}' did not evaluate: {protocol.error_word(message)}")
                continue
            try:
                answer = protocol.decode_evaluation(message.content)
            except errors.ProtocolError as error:
                self.observer("note", text=f"site '{name}' did not evaluate: {error}")
                continue
            if answer.site == name and answer.round == number:
                answers[name] = answer
        if full and len(answers) < len(sites):
            missing = ", ".join(sorted({member.name for member in sites} - set(answers)))
            raise errors.QuorumMissed(f"the final test is missing from: {missing}. Mend the sites and resume")
        return dict(sorted(answers.items()))

    @staticmethod
    def _contents(
        task_of: Callable[[handshake.Member], protocol.Task], by_node: Mapping[int, handshake.Member]
    ) -> Callable[[int], Any]:
        made: dict[str, Any] = {}

        def content(node: int) -> Any:
            member = by_node[node]
            key = member.manifest.fingerprint
            if key not in made:
                made[key] = protocol.encode_task(task_of(member))
            return made[key]

        return content

    def _new_traffic(self) -> dict[str, int]:
        """Bytes since the last record; those of the handshake fall to the first record after it."""
        new = {"up": self.traffic.up - self._recorded.up, "down": self.traffic.down - self._recorded.down}
        self._recorded = dataclasses.replace(self.traffic)
        return new

    # -- messages --------------------------------------------------------------------------------------------------

    def _ask(
        self, nodes: Mapping[int, str], kind: str, content: Callable[[int], Any], number: int
    ) -> Iterator[tuple[int, Message]]:
        """Send one message to each node in order of name; yield replies as they come, until all or the deadline."""
        timeout = self.job.server.round_timeout_s
        ordered = sorted(nodes, key=lambda node: nodes[node])
        messages = [Message(content(node), node, kind, ttl=timeout, group_id=str(number)) for node in ordered]
        self.traffic.down += _sizes(messages)
        outstanding = set(self.grid.push_messages(messages))
        del messages
        deadline = time.monotonic() + timeout
        while outstanding and time.monotonic() < deadline:
            replies = list(self.grid.pull_messages(sorted(outstanding)))
            for message in replies:
                outstanding.discard(message.metadata.reply_to_message_id)
                self.traffic.up += flower.size(message)
                if message.metadata.src_node_id in nodes:
                    yield message.metadata.src_node_id, message
            if not replies:
                time.sleep(POLL_S)


def _weight(update: state.SiteUpdate, weighting: str) -> float:
    """The site's unnormalised weight; admission has bounded the number it rests on."""
    if weighting == "loss":
        return update.metrics["loss"]
    return float(update.num_examples) if weighting == "examples" else 1.0


def _sizes(messages: Sequence[Message]) -> int:
    """Bytes of all messages; those that share their records are serialised once."""
    by_content: dict[int, int] = {}
    for message in messages:
        if id(message.content) not in by_content:
            by_content[id(message.content)] = flower.size(message)
    return sum(by_content[id(message.content)] for message in messages)


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    """Handle on NumPy's BLAS. One thread: small products are faster so, and the same bits on any number of cores."""
    return threadpoolctl.ThreadpoolController()


def macro(sites: Mapping[str, Mapping[str, float]], metric: str) -> float:
    """Plain mean over the sites that report ``metric``."""
    values = [row[metric] for row in sites.values() if metric in row]
    return sum(values) / len(values) if values else float("nan")
