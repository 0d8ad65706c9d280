"""The final adapter at a site: scored on the site's own test split, then kept or not, as its policy says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from fedvfm import errors
from fedvfm.client import state_folder
from fedvfm.client.adoption import decisions
from fedvfm.client.gate import privacy_charge, reply_cache
from fedvfm.client.training import evaluator
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.inference import export
from fedvfm.model import adapted_model
from fedvfm.protocol import protocol
from fedvfm.state import checkpoint, factors, groups, state
from fedvfm.trust import signed_documents


@dataclass(frozen=True)
class Finals:
    """Decides of every final adapter that comes, and keeps it; see :data:`fedvfm.client.app.Keep`.

    Args:
        where: the site's state folder.
        rules: the policy as it is now.
        left: whether the update of a recipe that is kept left, by its sha256; None looks through the audit log.
    """

    where: state_folder.State
    rules: Callable[[], schema.PolicyConfig]
    left: Callable[[str, str], bool] | None = None

    def __call__(
        self,
        model: adapted_model.AdaptedModel,
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
        before = decisions.find(self.where, task.recipe.hash, task.state.fingerprint)
        if before is not None and before.reason == "person":  # who decided once is not asked again
            return before.verdict
        score = scored.metrics.get(model.task.primary)
        full = (before is None or before.verdict == decisions.DECLINED) and decisions.full(self.where)
        word, reason, own = (
            (decisions.DECLINED, "too-many", None)
            if full
            else decisions.judge(self.rules().final, score, lambda: self._own(model, site, task, until))
        )
        found = decisions.Verdict(
            recipe=task.recipe.hash,
            fingerprint=task.state.fingerprint,
            round=task.round,
            verdict=word,
            reason=reason,
            metric=model.task.primary,
            score=score,
            own=own,
            examples=scored.num_examples,
            time=signed_documents.stamp(signed_documents.now()),
        )
        if not full:
            # The own update was in its place.
            model.write(site.own(model, task.recipe.hash, task.state, task.round + 1))
            beside = model.recipe.personal.kind in groups.BESIDE
            whole = site.beside(model, task.recipe.hash, task.state, task.round + 1) if beside else None
            self._keep(model, found, task.state, whole)
        decisions.record(self.where, found)
        return word

    def _own(
        self, model: adapted_model.AdaptedModel, site: sites.Site, task: protocol.Task, until: float
    ) -> float | None:
        """The score of what this site sent last; None where there is nothing, or it makes no adapter of this rank.

        Under a mechanism one that was kept and never left is nothing: no budget was charged for it, and the word that
        follows from its score leaves.
        """
        updates = reply_cache.Sent(self.where.sent)
        kept = updates.last(task.recipe.hash)
        if (
            kept is None
            or task.state is None
            or (privacy_charge.private(task.recipe) and not self._left(task.recipe.hash, protocol.digest(kept)))
        ):
            return None
        base = protocol.base_of(kept)
        start = updates.adapters.find(base) if base else None
        if base and start is None:
            return None
        update = protocol.decode_update(kept, start)
        # What did not train in its last round has not moved since, if that was the federation's last one too.
        trained = model.leaving(update.base_round + 1)
        still = set(trained) == set(model.leaving(1)) == set(model.leaving(2)) or update.base_round + 1 == task.round
        own = site.own(model, task.recipe.hash, factors.completed(update.state, task.state), update.base_round + 2)
        if set(update.state) != set(trained) or not still or not model.manifest.fits(own):
            return None
        if set(groups.moving(model.manifest, task.recipe, 1)) != set(model.leaving(1)):
            return None  # what it trained beside a residual of then says nothing beside the residual of now
        plain = dataclasses.replace(task, surface=False, final=False)
        answer = evaluator.evaluate(model, site, own, plain, until)
        return answer.metrics.get(model.task.primary)

    def _left(self, recipe: str, digest: str) -> bool:
        """Whether the site's own log says that it sent these bytes, which it does once they are charged."""
        if self.left is not None:
            return self.left(recipe, digest)
        return any(one["event"] == "sent" and one.get("digest") == digest for one in self.where.audit.scan())

    def _keep(
        self,
        model: adapted_model.AdaptedModel,
        found: decisions.Verdict,
        came: state.AdapterState,
        whole: state.AdapterState | None,
    ) -> None:
        folder = decisions.place(self.where, found)
        decisions.empty(folder)
        if found.verdict != decisions.DECLINED:
            made = {"experiment": self.where.about.federation}
            note = f"Final adapter of federation '{self.where.about.federation}', {found.words}"
            if whole is not None:
                note += f". What this site trained beside it ({model.recipe.personal.kind}) is in {decisions.BESIDE}: "
                note += "this folder must not leave the site"
                checkpoint.write(folder / decisions.BESIDE, whole, {"recipe": found.recipe})
            elif model.personal:
                note += f". With this site's own arrays ({model.recipe.personal.kind}): it must not leave the site"
                checkpoint.write(folder / decisions.GLOBAL, came, {"recipe": found.recipe})
                if groups.bare(model.recipe):
                    model, note = model.without_mechanism(), f"{note}. {groups.BARE}"
            export.save(model, folder, made, note=note)
        signed_documents.write(folder / decisions.VERDICT, found)
        decisions.forget_declined(self.where)
