"""The final adapter at a site: scored on the site's own test split, then kept or not, as its policy says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from fedvfm import config as configs
from fedvfm import errors, factors, protocol, registry
from fedvfm.client import evaluator, joining, sent, spending, verdicts
from fedvfm.client import model as models
from fedvfm.client import site as sites
from fedvfm.trust import documents

LAYOUTS = registry.Table("adapter layout", {"fedvfm": "fedvfm.inference.export:save"})
"""How a kept adapter lies on disk; what writes it stands on a higher floor."""


@dataclass(frozen=True)
class Finals:
    """Decides of every final adapter that comes, and keeps it; see :data:`fedvfm.client.app.Keep`.

    Args:
        where: the site's state folder.
        rules: the policy as it is now.
    """

    where: joining.State
    rules: Callable[[], configs.PolicyConfig]

    def __call__(
        self,
        model: models.AdaptedModel,
        site: sites.Site,
        task: protocol.Task,
        scored: protocol.Evaluation,
        until: float = math.inf,
    ) -> str:
        """The word for the coordinator.

        Raises:
            DeadlinePassed: if ``until``, a time of the monotonic clock, is over before the site's own update is scored.
            StorageError: if the adapter cannot be kept; then nothing is answered.
        """
        if task.state is None:
            raise errors.ProtocolError("a final message without an adapter")
        before = verdicts.find(self.where, task.recipe.hash, task.state.fingerprint)
        if before is not None and before.reason == "person":  # who decided once is not asked again
            return before.verdict
        score = scored.metrics.get(model.task.primary)
        full = (before is None or before.verdict == verdicts.DECLINED) and verdicts.full(self.where)
        word, reason, own = (
            (verdicts.DECLINED, "too-many", None)
            if full
            else verdicts.judge(self.rules().final, score, lambda: self._own(model, site, task, until))
        )
        found = verdicts.Verdict(
            recipe=task.recipe.hash,
            fingerprint=task.state.fingerprint,
            round=task.round,
            verdict=word,
            reason=reason,
            metric=model.task.primary,
            score=score,
            own=own,
            examples=scored.num_examples,
            time=documents.stamp(documents.now()),
        )
        if not full:
            model.write(task.state)  # the own update was in its place
            self._keep(model, found)
        verdicts.record(self.where, found)
        return word

    def _own(self, model: models.AdaptedModel, site: sites.Site, task: protocol.Task, until: float) -> float | None:
        """The score of what this site sent last; None where there is nothing, or it makes no adapter of this rank.

        Under a mechanism one that was kept and never left is nothing: no budget was charged for it, and the word that
        follows from its score leaves.
        """
        updates = sent.Sent(self.where.sent)
        kept = updates.last(task.recipe.hash)
        if (
            kept is None
            or task.state is None
            or (spending.private(task.recipe) and not self._left(protocol.digest(kept)))
        ):
            return None
        base = protocol.base_of(kept)
        start = updates.adapters.find(base) if base else None
        if base and start is None:
            return None
        update = protocol.decode_update(kept, start)
        # What did not train in its last round has not moved since, if that was the federation's last one too.
        trained = model.trained(update.base_round + 1)
        still = set(trained) == set(model.trained(1)) == set(model.trained(2)) or update.base_round + 1 == task.round
        own = factors.completed(update.state, task.state)
        if set(update.state) != set(trained) or not still or not model.manifest.fits(own):
            return None
        plain = dataclasses.replace(task, surface=False, final=False)
        answer = evaluator.evaluate(model, site, own, plain, until)
        return answer.metrics.get(model.task.primary)

    def _left(self, digest: str) -> bool:
        """Whether the site's own log says that it sent these bytes, which it does once they are charged."""
        return any(one["event"] == "sent" and one.get("digest") == digest for one in self.where.audit.entries)

    def _keep(self, model: models.AdaptedModel, found: verdicts.Verdict) -> None:
        folder = verdicts.place(self.where, found)
        verdicts.empty(folder)
        if found.verdict != verdicts.DECLINED:
            made = {"experiment": self.where.about.federation}
            note = f"Final adapter of federation '{self.where.about.federation}', {found.words}"
            LAYOUTS.get("fedvfm")(model, folder, made, note=note)
        documents.write(folder / verdicts.VERDICT, found)
        verdicts.forget_declined(self.where)
