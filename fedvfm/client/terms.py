"""A hospital's terms at work: its approvals and policy judge every message, its audit log notes what came of it.

Nothing is built or computed for a recipe that no person here approved. A recipe that arrives for the first time is
kept for review, so that ``fedvfm client review`` can show it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from fedvfm import audit, chain, errors, flower, protocol
from fedvfm import config as configs
from fedvfm import recipe as recipes
from fedvfm.client import joining, own, policy
from fedvfm.client import model as models
from fedvfm.client import site as sites
from fedvfm.data import hospitals as hospital_data
from fedvfm.data import labels
from fedvfm.data.sources import table as sources
from fedvfm.trust import lock as locks

MIB = 1 << 20


def built_here(recipe: configs.Recipe) -> recipes.LockedRecipe:
    """What this site itself makes of a recipe: shapes alone, on the meta device."""
    locked, _ = models.lock(recipe, with_weights=False)
    return dataclasses.replace(locked, backbone_sha256=recipe.backbone.sha256 or "")


def _round(task: protocol.Task) -> int:
    """The round as the log can hold it: whoever asks for one below 0 is refused, and that is what is noted."""
    return max(task.round, 0)


class HospitalTerms:
    """Judges, holds back and records; see :class:`fedvfm.client.gate.Terms`.

    Args:
        where: the site's state folder.
        rules: the policy as it is now; asked for every message.
        build: what the site makes of a recipe, so that the coordinator's word on what trains is never taken.
    """

    def __init__(
        self,
        where: joining.State,
        rules: Callable[[], configs.PolicyConfig],
        build: Callable[[configs.Recipe], recipes.LockedRecipe] = built_here,
    ) -> None:
        self._where, self._rules, self._build_recipe = where, rules, build
        self._audit = where.audit
        self._built: dict[str, locks.Lock] = {}
        self._started = 0.0
        self._accepted = False

    def unread(self, message: Message) -> None:
        """Note that something came which is no message of ours, or of no known form."""
        self._accepted = False
        self._audit.record("received", kind="unknown", **self._came(message))
        self._audit.record("decided", kind="unknown", verdict="refused", reason="unreadable")

    def _came(self, message: Message) -> dict[str, Any]:
        """Of any message: size, sha256, and the mark of the coordinator's log where it carries one."""
        found: dict[str, Any] = {"bytes": flower.size(message), "peer": self._where.about.federation}
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
        self._started, self._accepted = time.monotonic(), False
        recipe, word = task.recipe.hash, protocol.WORDS[kind]
        about = self._came(message) | ({"split": task.split} if task.split in ("val", "test") else {})
        if task.state is not None:
            about["fingerprint"] = task.state.fingerprint
        self._audit.record("received", kind=word, recipe=recipe, round=_round(task), **about)
        try:
            self._judge(kind, task)
        except errors.PolicyRefused as refusal:
            self._audit.record("decided", kind=word, verdict="refused", recipe=recipe, reason=refusal.reason)
            raise
        self._accepted = True
        self._audit.record("decided", kind=word, verdict="accepted", recipe=recipe, round=task.round)

    def _judge(self, kind: str, task: protocol.Task) -> None:
        rules, recipe = self._rules(), task.recipe
        # Before anything is built: a stranger's name fetches nothing.
        if (recipe.backbone.sha256 or policy.SCRATCH) not in rules.backbones.get(recipe.backbone.name, ()):
            raise errors.PolicyRefused("policy-backbone", f"backbone '{recipe.backbone.name}' is not in the policy")
        locked = self._lock(recipe)
        self._where.remember(locked)
        policy.require(rules, policy.Facts.of(locked))
        self._where.approvals.require(recipe.hash)
        policy.check_task(rules, task, kind, audit.usage(self._audit.entries, recipe.hash))

    def _lock(self, recipe: configs.Recipe) -> locks.Lock:
        if recipe.hash not in self._built:
            made = self._build_recipe(recipe)
            if made.recipe.hash != recipe.hash:
                # It would come to the same as an approved one under another hash, and count its rounds afresh.
                raise errors.PolicyRefused("policy-message", "the recipe leaves values open; lock it first")
            self._built[recipe.hash] = locks.of(made)
        return self._built[recipe.hash]

    def release(self, kind: str, task: protocol.Task, content: RecordDict) -> RecordDict:
        """Hold back every metric that the policy does not let out, and note what was computed."""
        seconds = round(time.monotonic() - self._started, 3)
        allowed = self._rules()
        if kind == protocol.TRAIN and task.state is not None:
            update = protocol.decode_update(content)
            free, _ = policy.release(allowed, update.metrics, update.num_examples)
            self._audit.record(
                "trained",
                recipe=task.recipe.hash,
                round=task.round,
                base=task.state.fingerprint,
                fingerprint=update.state.fingerprint,
                numbers=update.state.parameters,
                examples=update.num_examples,
                seconds=seconds,
            )
            return protocol.encode_update(dataclasses.replace(update, metrics=free))
        if kind == protocol.EVALUATE and task.state is not None:
            answer = protocol.decode_evaluation(content)
            free, _ = policy.release(allowed, answer.metrics, answer.num_examples)
            self._audit.record(
                "evaluated",
                recipe=task.recipe.hash,
                round=task.round,
                fingerprint=task.state.fingerprint,
                split=task.split,
                examples=answer.num_examples,
                seconds=seconds,
            )
            return protocol.encode_evaluation(dataclasses.replace(answer, metrics=free, samples={}, ids=()))
        return content

    def again(self, content: RecordDict) -> RecordDict:
        """Hold back of a kept update what a policy that was tightened since does not let out."""
        update = protocol.decode_update(content)
        free, held = policy.release(self._rules(), update.metrics, update.num_examples)
        return protocol.encode_update(dataclasses.replace(update, metrics=free)) if held else content

    def sends(self, kind: str, task: protocol.Task | None, reply: Message) -> None:
        """Note what leaves (its size, its sha256, the names of the metrics in it), then mark it.

        The mark covers the line of the reply itself: whoever holds the reply can show that this site said so.
        """
        about = self._refusal(reply) if reply.has_error() else self._said(kind, task, reply)
        if task is not None:
            about |= {"recipe": task.recipe.hash, "round": _round(task)}
        protocol.put_mark(reply, chain.NOWHERE)  # as long as the one it will carry
        self._audit.record("sent", bytes=flower.size(reply), peer=self._where.about.federation, **about)
        protocol.put_mark(reply, self._audit.mark)

    def _refusal(self, reply: Message) -> dict[str, Any]:
        found: dict[str, Any] = {"kind": "refusal", "reason": protocol.error_word(reply)}
        if self._accepted:  # what broke off was computed too, and counts
            found["seconds"] = round(time.monotonic() - self._started, 3)
        return found

    @staticmethod
    def _said(kind: str, task: protocol.Task | None, reply: Message) -> dict[str, Any]:
        found: dict[str, Any] = {"kind": protocol.WORDS[kind], "digest": protocol.digest(reply.content)}
        if kind == protocol.TRAIN:
            update = protocol.decode_update(reply.content)
            found |= {"fingerprint": update.state.fingerprint, "numbers": update.state.parameters}
            found["metrics"] = sorted(update.metrics)
        elif kind == protocol.EVALUATE and task is not None:
            found |= {"metrics": sorted(protocol.decode_evaluation(reply.content).metrics), "split": task.split}
        return found


class SiteTerms(HospitalTerms):
    """The terms of a site that runs: its own file is read again when it changes, so that a policy may be tightened.

    Args:
        where: the site's state folder.
        settings: the site's own file.
        device: where to compute.
    """

    def __init__(self, where: joining.State, settings: Path, device: str) -> None:
        super().__init__(where, lambda: self.config.policy)
        self._settings, self._device = settings, device
        self._read = (0.0, own.read(settings).site)
        self._site: tuple[str, sites.Site] | None = None

    @property
    def config(self) -> configs.SiteConfig:
        """The site's own file as it is now.

        Raises:
            ConfigError: if it has faults; then nothing is answered.
        """
        changed = self._settings.stat().st_mtime
        if changed != self._read[0]:
            found = own.read(self._settings).site
            if found.name != self._where.about.site:
                raise errors.ConfigError(
                    str(self._settings), [f"name = '{found.name}': this site joined as '{self._where.about.site}'"]
                )
            self._read, self._site = (changed, found), None
        return self._read[1]

    def site(self, context: Context) -> sites.Site:
        """The site for the recipe that was received last."""
        if self._site is None:
            raise errors.ProtocolError("no message was judged yet")
        return self._site[1]

    def _judge(self, kind: str, task: protocol.Task) -> None:
        super()._judge(kind, task)
        if self._site is None or self._site[0] != task.recipe.hash:
            self._site = (task.recipe.hash, self._build(self.config, task.recipe))
        left = policy.remaining(self._rules(), audit.usage(self._audit.entries, task.recipe.hash))
        self._site[1].ends = (time.monotonic() + left.seconds, left.reason)

    def _build(self, config: configs.SiteConfig, recipe: configs.Recipe) -> sites.Site:
        raw = sources.make(config.data, recipe.data)
        source = labels.mapped(raw, config.labels, recipe.data.class_names)
        faults = labels.faults(recipe, source.info)
        if faults:
            raise errors.ConfigError("recipe and data", faults)
        parts = own.split(config, own.belonging(config, source.samples())).parts
        train, val, test = (tuple(parts[name]) for name in ("train", "val", "test"))
        hospital = hospital_data.Hospital(config.name, source, train, val, test)
        return sites.Site(config.name, hospital, self._device, config.rank, sites.Memory(config.cache_mib * MIB))
