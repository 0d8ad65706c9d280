"""A hospital's terms at work: its approvals and policy judge every message, its audit log notes what came of it.

Nothing is built or computed for a recipe that no person here approved. A recipe that arrives for the first time is
kept for review, so that ``fedvfm client review`` can show it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from fedvfm import audit, errors, flower, protocol
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
_WORDS = {protocol.HANDSHAKE: "handshake", protocol.TRAIN: "train", protocol.EVALUATE: "evaluate"}


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

    def received(self, kind: str, task: protocol.Task, size: int) -> None:
        """Note what came, then judge it.

        Raises:
            PolicyRefused: if no person here approved the recipe, or the policy does not accept it.
        """
        self._started = time.monotonic()
        recipe, word = task.recipe.hash, _WORDS[kind]
        about = {"split": task.split} if task.split in ("val", "test") else {}
        if task.state is not None:
            about["fingerprint"] = task.state.fingerprint
        self._audit.record("received", kind=word, bytes=size, recipe=recipe, round=_round(task), **about)
        try:
            self._judge(kind, task)
        except errors.PolicyRefused as refusal:
            self._audit.record("decided", kind=word, verdict="refused", recipe=recipe, reason=refusal.reason)
            raise
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

    def sends(self, kind: str, task: protocol.Task, reply: Message) -> None:
        """Note what leaves: its size, and the names of the metrics in it."""
        about: dict[str, object] = {"recipe": task.recipe.hash, "round": _round(task), "bytes": flower.size(reply)}
        if reply.has_error():
            about["reason"] = protocol.error_word(reply)
        elif kind == protocol.TRAIN:
            update = protocol.decode_update(reply.content)
            about |= {"fingerprint": update.state.fingerprint, "numbers": update.state.parameters}
            about["metrics"] = sorted(update.metrics)
        elif kind == protocol.EVALUATE:
            about |= {"metrics": sorted(protocol.decode_evaluation(reply.content).metrics), "split": task.split}
        self._audit.record("sent", kind="refusal" if reply.has_error() else _WORDS[kind], **about)


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
