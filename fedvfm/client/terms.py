"""A hospital's terms at work: its approvals and policy judge every message, its audit log notes what came of it.

Nothing is built or computed for a recipe that no person here approved. A recipe that arrives for the first time is
kept for review, so that ``fedvfm client review`` can show it.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from fedvfm import audit, errors, flower, protocol
from fedvfm import config as configs
from fedvfm.client import joining, own, policy
from fedvfm.client import model as models
from fedvfm.client import site as sites
from fedvfm.data import hospitals as hospital_data
from fedvfm.data import labels
from fedvfm.data.sources import table as sources
from fedvfm.trust import lock as locks

MIB = 1 << 20
_WORDS = {protocol.HANDSHAKE: "handshake", protocol.TRAIN: "train", protocol.EVALUATE: "evaluate"}


class SiteTerms:
    """The terms of one site; see :class:`fedvfm.client.gate.Terms`.

    Args:
        where: the site's state folder.
        settings: its own file, which is read again when it changes: the policy may be tightened while it runs.
        device: where to compute.
    """

    def __init__(self, where: joining.State, settings: Path, device: str) -> None:
        self._where, self._settings, self._device = where, settings, device
        self._audit = where.audit
        self._read = (0.0, own.read(settings).site)
        self._site: tuple[str, sites.Site] | None = None
        self._started = 0.0

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

    def received(self, kind: str, task: protocol.Task, size: int) -> None:
        """Note what came, then judge it.

        Raises:
            PolicyRefused: if no person here approved the recipe, or the policy does not accept it.
        """
        self._started = time.monotonic()
        recipe, word = task.recipe.hash, _WORDS[kind]
        about = {"recipe": recipe, "round": task.round, **({"split": task.split} if task.split else {})}
        if task.state is not None:
            about["fingerprint"] = task.state.fingerprint
        self._audit.record("received", kind=word, bytes=size, **about)
        try:
            self._judge(kind, task)
        except errors.PolicyRefused as refusal:
            self._audit.record("decided", kind=word, verdict="refused", recipe=recipe, reason=refusal.reason)
            raise
        self._audit.record("decided", kind=word, verdict="accepted", recipe=recipe, round=task.round)

    def _judge(self, kind: str, task: protocol.Task) -> None:
        config = self.config
        if task.recipe.hash not in self._where.approvals.stand():
            self._keep_for_review(task.recipe, config.policy)
        self._where.approvals.require(task.recipe.hash)
        policy.require(config.policy, policy.Facts.of(self._where.find(task.recipe.hash)))
        policy.check_task(config.policy, task, kind, audit.usage(self._audit.entries, task.recipe.hash))
        if self._site is None or self._site[0] != task.recipe.hash:
            self._site = (task.recipe.hash, self._build(config, task.recipe))

    def _keep_for_review(self, recipe: configs.Recipe, allowed: configs.PolicyConfig) -> None:
        """Shapes alone are built, and only of a backbone that the policy names: a stranger's name fetches nothing."""
        if recipe.hash in self._where.seen():
            return
        if recipe.backbone.name not in allowed.backbones:
            raise errors.PolicyRefused("policy-backbone", f"backbone '{recipe.backbone.name}' is not in the policy")
        locked, _ = models.lock(recipe, with_weights=False)
        pinned = dataclasses.replace(locked, recipe=recipe, backbone_sha256=recipe.backbone.sha256 or "")
        self._where.remember(locks.of(pinned))

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

    def release(self, kind: str, task: protocol.Task, content: RecordDict) -> RecordDict:
        """Hold back every metric that the policy does not let out, and note what was computed."""
        seconds = round(time.monotonic() - self._started, 3)
        allowed = self.config.policy
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
        about: dict[str, object] = {"recipe": task.recipe.hash, "round": task.round, "bytes": flower.size(reply)}
        if not reply.has_error():
            if kind == protocol.TRAIN:
                update = protocol.decode_update(reply.content)
                about |= {"fingerprint": update.state.fingerprint, "numbers": update.state.parameters}
                about["metrics"] = sorted(update.metrics)
            elif kind == protocol.EVALUATE:
                about |= {"metrics": sorted(protocol.decode_evaluation(reply.content).metrics), "split": task.split}
        self._audit.record("sent", kind="refusal" if reply.has_error() else _WORDS[kind], **about)
