"""A hospital's terms at work: its approvals and policy judge every message, its audit log notes what came of it.

Nothing is built or computed for a recipe that no person here approved. A recipe that arrives for the first time is
kept for review, so that ``fedvfm client review`` can show it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.client import privacy_report, site_file, state_folder
from fedvfm.client.gate import gate, lineage, policy, privacy_charge, reply_cache, rollback_detection, split_pin
from fedvfm.client.training import site as sites
from fedvfm.config import privacy, schema
from fedvfm.data.partition import virtual_hospitals
from fedvfm.flower import internals
from fedvfm.model import adapted_model, feature_cache, feature_counts, feature_files
from fedvfm.protocol import protocol
from fedvfm.state import factors, state
from fedvfm.storage import hash_chain, storage
from fedvfm.trust import locked_recipe

LOG = logging.getLogger(__name__)
MIB = 1 << 20


def built_here(recipe: schema.Recipe) -> locked_recipe.LockedRecipe:
    """What this site itself makes of a recipe: shapes alone, on the meta device."""
    locked = adapted_model.AdaptedModel(recipe, with_weights=False).locked()
    return locked.model_copy(update={"backbone_sha256": recipe.backbone.sha256 or ""})


def _round(task: protocol.Task) -> int:
    """The round as the log can hold it: whoever asks for one below 0 is refused, and that is what is noted."""
    return max(task.round, 0)


class HospitalTerms:
    """Judges, holds back and records; see :class:`fedvfm.client.gate.gate.Terms`.

    Args:
        where: the site's state folder.
        rules: the policy as it is now; asked for every message.
        build: what the site makes of a recipe, so that the coordinator's word on what trains is never taken.
    """

    def __init__(
        self,
        where: state_folder.State,
        rules: Callable[[], schema.PolicyConfig],
        build: Callable[[schema.Recipe], locked_recipe.LockedRecipe] = built_here,
    ) -> None:
        self._where, self._rules, self._build_recipe = where, rules, build
        self._audit = where.audit
        self._built: dict[str, locked_recipe.LockedRecipe] = {}
        self._started = 0.0
        self._accepted = False
        self._ledger: hash_chain.Mark | None = None
        self._sent = reply_cache.Sent(where.sent)
        self._came_with: dict[str, Any] = {}
        self._as_kept = False

    def unread(self, message: Message) -> None:
        """Note that something came which is no message of ours, or of no known form."""
        self._accepted, self._ledger = False, None
        self._audit.record("received", kind="unknown", **self._came(message))
        self._audit.record("decided", kind="unknown", verdict="refused", reason="unreadable")

    def _came(self, message: Message) -> dict[str, Any]:
        """Of any message: size, sha256, its run, and the mark of the coordinator's log where it carries one."""
        found: dict[str, Any] = {"bytes": internals.size(message), "peer": self._where.about.federation}
        found["run"] = str(message.metadata.run_id % 2**64)
        if message.has_content():
            found["digest"] = protocol.digest(message.content)
        with contextlib.suppress(errors.ProtocolError):
            mark = protocol.find_mark(message)
            found |= {} if mark is None else {"peer_length": mark.length, "peer_head": mark.head}
        return found

    def received(self, kind: str, task: protocol.Task, message: Message) -> None:
        """Note what came, then judge it.

        Raises:
            PolicyRefused: if no person here approved the recipe, or the policy does not accept it.
        """
        self._started, self._accepted, self._ledger = time.monotonic(), False, None
        recipe, word = task.recipe.hash, protocol.WORDS[kind]
        self._came_with = self._came(message)
        about = self._came_with | ({"split": task.split} if task.split in ("val", "test") else {})
        if task.state is not None:
            about["fingerprint"] = task.state.fingerprint
        self._audit.record("received", kind=word, recipe=recipe, round=_round(task), **about)
        try:
            self._judge(kind, task)
        except errors.PolicyRefused as refusal:
            self._refuse(kind, task, refusal)
            raise
        self._accepted = True
        self._audit.record("decided", kind=word, verdict="accepted", recipe=recipe, round=task.round)

    def _refuse(self, kind: str, task: protocol.Task, refusal: errors.PolicyRefused) -> None:
        about = {"recipe": task.recipe.hash, "reason": refusal.reason}
        self._audit.record("decided", kind=protocol.WORDS[kind], verdict="refused", **about)

    def _judge(self, kind: str, task: protocol.Task) -> None:
        rules, recipe = self._rules(), task.recipe
        # Before anything is built: a stranger's name fetches nothing.
        if (recipe.backbone.sha256 or policy.SCRATCH) not in rules.backbones.get(recipe.backbone.name, ()):
            raise errors.PolicyRefused("policy-backbone", f"backbone '{recipe.backbone.name}' is not in the policy")
        locked = self._lock(recipe)
        self._where.remember(locked)
        if privacy_charge.private(recipe):  # what it comes to depends on the data, which is not listed for a stranger
            self._where.approvals.require(recipe.hash)
        policy.require(rules, policy.Facts.of(locked, self._units(recipe)))
        self._where.approvals.require(recipe.hash)
        entries = self._audit.entries
        kept = self._kept(kind, task) is not None
        self._as_kept = kept and kind == protocol.TRAIN
        used = audit.usage(entries, recipe.hash)
        policy.check_task(rules, task, kind, used, kept=kept)
        self.lineage(recipe).require(kind, task, rules.max_step)
        if task.state is not None:
            self._sent.adapters.keep(recipe.hash, task.state)
        rollback_detection.require_onward(kind, task, self._came_with, entries)

    def _require_as_new(self, kind: str, task: protocol.Task) -> None:
        """Judge a message again that was accepted for its kept update, where that may not leave: it is work after all.

        Raises:
            PolicyRefused: if the policy's rounds are used up, or the site does not compute at this time of the week.
        """
        if self._as_kept:
            used = audit.usage(self._audit.entries, task.recipe.hash)
            policy.check_task(self._rules(), task, kind, used)
            self._as_kept = False

    def _kept(self, kind: str, task: protocol.Task) -> RecordDict | None:
        """The answer that was made for this before, if it lies here."""
        asked = kind == protocol.TRAIN or (kind == protocol.EVALUATE and task.split in ("val", "test"))
        return self._sent.find(task, kind) if asked and task.state is not None else None

    def lineage(self, recipe: schema.Recipe) -> lineage.Lineage:
        """The adapters that came with this recipe."""
        entries = [entry for entry in self._audit.entries if entry.get("recipe") == recipe.hash]
        return lineage.Lineage(self._lock(recipe), self._manifest(recipe), entries, self._sent.adapters)

    def _manifest(self, recipe: schema.Recipe) -> state.Manifest:
        """Every array of the adapter as this site is sent it."""
        return self._lock(recipe).manifest

    def _subjects(self, split: str, examples: int) -> int:
        """How many patients are in a split; ``examples`` is what was computed from."""
        return examples

    def _units(self, recipe: schema.Recipe) -> int | None:
        """How many units a mechanism can draw from here; None where there is no mechanism, or no data to count."""
        return None

    def _account(self, task: protocol.Task) -> privacy_charge.Account:
        """Where a round of a mechanism is charged.

        Raises:
            PolicyRefused: if nowhere.
        """
        raise errors.LedgerError("these terms keep no ledger, so no recipe with a mechanism is trained under them")

    @contextlib.contextmanager
    def reserving(self, kind: str, task: protocol.Task) -> Iterator[gate.Reserved]:
        """Reserve what a round spends while it trains; what is given charges it by the digest of what leaves."""
        with contextlib.ExitStack() as held:
            with self._noting(kind, task):
                self._require_as_new(kind, task)
                account = (
                    self._account(task) if kind == protocol.TRAIN and privacy_charge.private(task.recipe) else None
                )
                hold = None if account is None else held.enter_context(account.hold())
            if account is None or hold is None:
                yield gate.Reserved()
                return

            def charge(content: RecordDict) -> None:
                hold.charge(protocol.digest(content))
                self._ledger = account.book.mark

            yield gate.Reserved(charge, hold.token)

    @contextlib.contextmanager
    def _noting(self, kind: str, task: protocol.Task) -> Iterator[None]:
        """A message that was accepted and is refused after all, before anything was computed, is noted as refused."""
        try:
            yield
        except errors.PolicyRefused as refusal:
            self._accepted = False
            self._refuse(kind, task, refusal)
            raise

    def _lock(self, recipe: schema.Recipe) -> locked_recipe.LockedRecipe:
        if recipe.hash not in self._built:
            made = self._build_recipe(recipe)
            if made.recipe.hash != recipe.hash:
                # It would come to the same as an approved one under another hash, and count its rounds afresh.
                raise errors.PolicyRefused("policy-message", "the recipe leaves values open; lock it first")
            self._built[recipe.hash] = made
        return self._built[recipe.hash]

    def release(self, kind: str, task: protocol.Task, content: RecordDict) -> RecordDict:
        """Hold back every metric that the policy does not let out, and note what was computed."""
        seconds = round(time.monotonic() - self._started, 3)
        allowed = self._rules()
        if kind == protocol.TRAIN and task.state is not None:
            update = protocol.decode_update(content, task.state)
            if privacy_charge.private(task.recipe):  # whatever computed it: nothing but the adapter is covered
                update = dataclasses.replace(update, metrics={}, num_examples=1)
            free, _ = policy.release(allowed, update.metrics, self._subjects("train", update.num_examples))
            whole = factors.completed(update.state, task.state)
            self._audit.record(
                "trained",
                recipe=task.recipe.hash,
                round=task.round,
                base=task.state.fingerprint,
                fingerprint=update.state.fingerprint,
                numbers=update.state.parameters,
                examples=update.num_examples,
                seconds=seconds,
                norm=self.lineage(task.recipe).moved(task.state, whole),
            )
            self._started = time.monotonic()  # what is noted counts once, also where it is refused after all
            return protocol.with_metrics(content, dataclasses.replace(update, metrics=free))
        if kind == protocol.EVALUATE and task.state is not None:
            answer = protocol.decode_evaluation(content, inside=True)
            units = self._subjects(task.split, answer.num_examples)
            free = policy.release_scores(allowed, answer.metrics, units, answer.classes)
            self._audit.record(
                "evaluated",
                recipe=task.recipe.hash,
                round=task.round,
                fingerprint=task.state.fingerprint,
                split=task.split,
                examples=answer.num_examples,
                seconds=seconds,
            )
            self._started = time.monotonic()  # what is noted counts once, also where it is refused after all
            leaving = dataclasses.replace(answer, metrics=free, samples={}, ids=(), classes={})
            before = self._given(task)
            if before is not None:  # the same numbers as before, whatever was computed now
                leaving = dataclasses.replace(before, acceptance=answer.acceptance)
            return protocol.encode_evaluation(leaving)
        return content

    def _given(self, task: protocol.Task) -> protocol.Evaluation | None:
        """The scores that were given for this before, but for what a policy that was tightened since holds back."""
        kept = self._kept(protocol.EVALUATE, task)
        if kept is None:
            return None
        answer = protocol.decode_evaluation(kept)
        free, _ = policy.release(self._rules(), answer.metrics, self._subjects(task.split, answer.num_examples))
        return dataclasses.replace(answer, metrics=free)

    def scored(self, task: protocol.Task) -> RecordDict | None:
        """See above; the final adapter is judged anew, since a person or a policy may say otherwise by now."""
        before = None if task.final else self._given(task)
        return None if before is None else protocol.encode_evaluation(before)

    def again(self, task: protocol.Task, content: RecordDict, token: str) -> RecordDict | None:
        """Hold back of a kept update what a policy that was tightened since does not let out; charge it if it was not.

        Returns: None where a site was killed before it charged the update and its data is another since.
        """
        update = protocol.decode_update(content, task.state)
        units = self._subjects("train", update.num_examples)
        free, held = policy.release(self._rules(), update.metrics, units)
        released = protocol.with_metrics(content, dataclasses.replace(update, metrics=free)) if held else content
        if not privacy_charge.private(task.recipe):
            return released
        with self._noting(protocol.TRAIN, task):
            account = self._account(task)
            charged = account.again(protocol.digest(released), token)
        self._ledger = account.book.mark if charged else None
        return released if charged else None

    def sends(self, kind: str, task: protocol.Task | None, reply: Message) -> None:
        """Note what leaves (its size, its sha256, the names of the metrics in it), then mark it.

        The mark covers the line of the reply itself: whoever holds the reply can show that this site said so. An update
        that was charged carries the mark of the ledger too, so that a ledger that is cut later shows at both ends; so
        does a greeting under a mechanism, so that it shows before anything more is charged.

        Raises:
            LedgerError: if an update under a mechanism would leave uncharged.
        """
        about = self._refusal(reply) if reply.has_error() else self._said(kind, task, reply)
        if kind == protocol.EVALUATE and task is not None and not reply.has_error():
            self._sent.keep_scores(task, reply)
        ledger = None if reply.has_error() else self._ledger
        if (
            kind == protocol.TRAIN
            and not reply.has_error()
            and task is not None
            and privacy_charge.private(task.recipe)
        ):
            if ledger is None:
                raise errors.LedgerError(f"round {task.round}: the update was not charged, so it does not leave")
            about["ledger"] = str(ledger)
        if task is not None:
            about |= {"recipe": task.recipe.hash, "round": _round(task)}
        protocol.put_mark(reply, hash_chain.NOWHERE, ledger)  # as long as the one it will carry
        self._audit.record("sent", bytes=internals.size(reply), peer=self._where.about.federation, **about)
        protocol.put_mark(reply, self._audit.mark, ledger)

    def _refusal(self, reply: Message) -> dict[str, Any]:
        found: dict[str, Any] = {"kind": "refusal", "reason": protocol.error_word(reply)}
        if self._accepted:  # what broke off was computed too, and counts
            found["seconds"] = round(time.monotonic() - self._started, 3)
        return found

    @staticmethod
    def _said(kind: str, task: protocol.Task | None, reply: Message) -> dict[str, Any]:
        found: dict[str, Any] = {"kind": protocol.WORDS[kind], "digest": protocol.digest(reply.content)}
        if kind == protocol.TRAIN:
            update = protocol.decode_update(reply.content, None if task is None else task.state)
            found |= {"fingerprint": update.state.fingerprint, "numbers": update.state.parameters}
            found["metrics"] = sorted(update.metrics)
        elif kind == protocol.EVALUATE and task is not None:
            found |= {"metrics": sorted(protocol.decode_evaluation(reply.content).metrics), "split": task.split}
        return found


class SiteTerms(HospitalTerms):
    """The terms of a site that runs: its own file is read again when it changes, so that a policy may be tightened.

    Args:
        where: the site's state folder.
        settings: the site's own file; or what it says, where it is not looked at again.
        device: where to compute.
        build: as above.
    """

    def __init__(
        self,
        where: state_folder.State,
        settings: Path | schema.SiteConfig,
        device: str,
        build: Callable[[schema.Recipe], locked_recipe.LockedRecipe] = built_here,
    ) -> None:
        super().__init__(where, lambda: self.config.policy, build)
        self._settings, self._device = settings, device
        self._counted = feature_counts.Counts()
        self._site: tuple[str, sites.Site] | None = None
        self._basis: split_pin.Basis | None = None
        self._sha256 = ""
        # As the policy was last read from it: a message is worked on by what it was judged by.
        self._judged = settings if isinstance(settings, schema.SiteConfig) else self.config

    @property
    def config(self) -> schema.SiteConfig:
        """The site's own file as it is now.

        Raises:
            ConfigError: if it has faults; then nothing is answered.
        """
        if isinstance(self._settings, Path):
            # By its content: an editor, a copy or a restored backup may leave any time on it.
            data = self._settings.read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            if sha256 != self._sha256:
                self._judged, self._site = site_file.read_site(self._settings, self._where.about.site, data), None
                self._sha256 = sha256
        return self._judged

    def site(self, context: Context) -> sites.Site:
        """The site for the recipe that was received last."""
        if self._site is None:
            raise errors.ProtocolError("no message was judged yet")
        return self._site[1]

    def _judge(self, kind: str, task: protocol.Task) -> None:
        super()._judge(kind, task)
        self._require_split(task.recipe)  # before the budget: where [privacy] came or went, this says more
        budget, site = privacy_charge.require(task.recipe, self._judged.privacy), self._prepared(task.recipe)
        if kind == protocol.TRAIN and not self._as_kept:
            images = site.split("train")
            policy.require_enough(
                self._judged.policy, task.recipe, len({sample.subject for sample in images}), len(images)
            )
        if budget is not None and kind != protocol.EVALUATE:
            self._note(task.recipe, site, budget)
        if budget is not None and kind == protocol.HANDSHAKE:
            self._ledger = privacy_charge.shown(budget, self._judged.name, self._audit.entries)
        site.ends = self._ends(task.recipe)

    def _prepared(self, recipe: schema.Recipe) -> sites.Site:
        """The site for a recipe: as the data are now if the file or the recipe was another one before."""
        if self._site is None or self._site[0] != recipe.hash:
            basis = self._require_split(recipe)
            self._site, self._counted = (recipe.hash, self._build(self._judged, recipe)), feature_counts.Counts()
            self._basis = basis  # of the site that stands: one that cannot be built leaves the one before
            self._site[1].ends = self._ends(recipe)  # whenever it is built, it has an end
        return self._site[1]

    def _require_split(self, recipe: schema.Recipe) -> split_pin.Basis:
        """What the split follows from as the file was last read, and followed from when the recipe began here."""
        found = split_pin.of(recipe.hash, self._judged)
        split_pin.require(self._where, found)
        return found

    def release(self, kind: str, task: protocol.Task, content: RecordDict) -> RecordDict:
        """See above; before the first answer of a recipe leaves, what its split follows from is kept."""
        if kind != protocol.HANDSHAKE and self._basis is not None:
            split_pin.keep(self._where, self._basis)
        if kind == protocol.TRAIN and self._site is not None:
            now = self._site[1].cache.counts
            found, self._counted = now - self._counted, now
            if found.asked:  # for the people here; it never leaves
                LOG.info(f"round {task.round}: features of the frozen blocks: {found}")
        return super().release(kind, task, content)

    def _ends(self, recipe: schema.Recipe) -> tuple[float, str]:
        left = policy.remaining(self._judged.policy, audit.usage(self._audit.entries, recipe.hash))
        return time.monotonic() + left.seconds, left.reason

    def _manifest(self, recipe: schema.Recipe) -> state.Manifest:
        smaller = sites.at_rank(recipe, self._judged.rank, self._judged.name)
        if smaller is recipe:
            return super()._manifest(recipe)
        if smaller.hash not in self._built:
            self._built[smaller.hash] = self._build_recipe(smaller)
        return self._built[smaller.hash].manifest

    def _subjects(self, split: str, examples: int) -> int:
        if self._site is None:
            return examples
        return len({sample.subject for sample in self._site[1].split(split)})

    def _hospital(self, config: schema.SiteConfig, recipe: schema.Recipe) -> virtual_hospitals.Hospital:
        return site_file.hospital(config, recipe)

    def _build(self, config: schema.SiteConfig, recipe: schema.Recipe) -> sites.Site:
        hospital = self._hospital(config, recipe)
        files = feature_files.of_recipe(self._where.features, recipe.hash, config.cache_disk_mib * MIB)
        cache, budget = feature_cache.FeatureCache(config.cache_mib * MIB, files), config.privacy
        units = 0 if budget is None else budget.units or 0
        return sites.Site(
            config.name, hospital, self._device, config.rank, cache, units=units, residuals=self._sent.residuals
        )

    def sends(self, kind: str, task: protocol.Task | None, reply: Message) -> None:
        """See above; with the final adapter the recipe ends, and what was kept of the images' features goes."""
        super().sends(kind, task, reply)
        if task is not None and task.final and not reply.has_error():
            storage.remove_folder(self._where.features)

    def _units(self, recipe: schema.Recipe) -> int | None:
        if not privacy_charge.private(recipe):
            return None
        return privacy_charge.counted(recipe, self._prepared(recipe).hospital, self._judged.privacy) or None

    def _note(self, recipe: schema.Recipe, site: sites.Site, budget: privacy.Budget) -> None:
        """Keep what it comes to here for ``client status``; a ledger that cannot be read is told of by training."""
        with contextlib.suppress(errors.LedgerError, errors.AuditError):
            found = privacy_report.look(recipe, site.hospital, budget)
            if found is not None:
                privacy_report.note(self._where, recipe.hash, found)

    def _account(self, task: protocol.Task) -> privacy_charge.Account:
        recipe, budget = task.recipe, privacy_charge.require(task.recipe, self._judged.privacy)
        if budget is None or task.state is None:
            raise errors.ProtocolError("a train message without a mechanism or an adapter is charged to nobody")
        hospital = self._prepared(recipe).hospital
        return privacy_charge.account(recipe, task.round, task.state.fingerprint, hospital, budget, self._audit.entries)
