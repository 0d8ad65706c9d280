"""``fedvfm client adapter personal``: a site trains on from the final adapter, chooses, and signs what it gained.

    personal/<recipe>-<chosen>/   the chosen adapter in the usual layout, and statement.json, written last

It is a person's doing at the site, on the site's own images and for the site alone: nothing is sent and no budget is
charged. A folder without a statement is what a killed run left, and the next run removes it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvfm import errors, seeding
from fedvfm.client import app as client_app
from fedvfm.client import site_file, state_folder
from fedvfm.client.adoption import decisions
from fedvfm.client.gate import split_pin
from fedvfm.client.personal import choice, statement, tuning
from fedvfm.client.process import limits
from fedvfm.client.training import site as sites
from fedvfm.config import privacy, schema
from fedvfm.inference import export
from fedvfm.model import adapted_model, adapter_folder, device, feature_cache
from fedvfm.protocol import protocol
from fedvfm.report import bootstrap, progress
from fedvfm.state import checkpoint, groups, state
from fedvfm.storage import storage
from fedvfm.trust import keys, signed_documents

MIB = 1 << 20


def taken(where: state_folder.State, asked: str | None) -> tuple[decisions.Verdict, Path]:
    """The final adapter to train on from: the newest that was accepted, or the one that is asked for.

    Raises:
        TrustError: if there is none.
    """
    accepted = [pair for pair in decisions.kept(where) if pair[0].verdict == decisions.ACCEPTED]
    fits = [pair for pair in accepted if asked is None or (len(asked) >= 12 and pair[0].fingerprint.startswith(asked))]
    if not fits:
        known = ", ".join(verdict.fingerprint[:12] for verdict, _ in accepted) or "none"
        raise errors.TrustError(
            f"no such final adapter was accepted here; accepted: {known}. 'fedvfm client adapter' shows what came; one "
            "that waits is accepted with --accept"
        )
    return fits[-1]


def run(
    where: state_folder.State,
    site: schema.SiteConfig,
    asked: str | None = None,
    on_step: progress.Step = progress.no_step,
) -> statement.Kept:
    """Train on, choose, keep and sign.

    Args:
        where: the site's state folder.
        site: the site's own file.
        asked: fingerprint of the final adapter; None for the newest that was accepted.
        on_step: told of the steps of training on.

    Raises:
        ConfigError: if the site's file turns it off, or says that nothing is labelled here.
        TrustError: if no final adapter was accepted here.
        DataError, TrainingError, WeightsError: as a round would.
        DeadlinePassed: if ``personal.minutes`` are over; nothing is kept then.
    """
    if site.personal.enabled is False:
        raise errors.ConfigError(f"site '{site.name}'", ["personal.enabled = false: set it to true, or leave it out"])
    if site.without_labels:
        raise errors.ConfigError(
            f"site '{site.name}'",
            [
                "role = 'unlabelled': without labels nothing can be trained on or chosen by here; use the final "
                "adapter as it is, or label some patients and say role = 'train'"
            ],
        )
    verdict, folder = taken(where, asked)
    os.environ["HF_HUB_OFFLINE"] = "1"
    recipe = where.find(verdict.recipe).recipe
    split_pin.require(where, split_pin.of(verdict.recipe, site))
    limits.apply(site.limits, device.choose(site.device))
    with storage.exclusive(where.folder / statement.FOLDER):
        work = _Work(where, site, recipe, verdict, _node(site, recipe), _deadline(site), on_step)
        return work.run(*_adapters(folder, recipe))


def _node(site: schema.SiteConfig, recipe: schema.Recipe) -> sites.Site:
    """The site as a round has it, with what is kept of images in memory alone."""
    hospital, cache = site_file.hospital(site, recipe), feature_cache.FeatureCache(site.cache_mib * MIB)
    return sites.Site(site.name, hospital, device.choose(site.device), site.rank, cache)


def _adapters(folder: Path, recipe: schema.Recipe) -> tuple[state.AdapterState, state.AdapterState | None]:
    """The global adapter as it came; and with this site's own arrays, where the recipe has personal ones.

    Raises:
        CheckpointError: if one of them is missing or damaged.
    """
    used = checkpoint.read(folder / adapter_folder.STATE)[0]
    if recipe.personal.kind == groups.NONE:
        return used, None
    if recipe.personal.kind in groups.BESIDE:
        return used, checkpoint.read(folder / decisions.BESIDE)[0]
    return checkpoint.read(folder / decisions.GLOBAL)[0], used


def _gap(scores: Mapping[str, bootstrap.SiteScores], first: str, second: str) -> bootstrap.Difference | None:
    """One adapter minus another on the test split; None where one of them was not tested."""
    if first not in scores or second not in scores:
        return None
    return bootstrap.difference([scores[first]], [scores[second]], rng=seeding.stream(0, "benefit"))


def _deadline(site: schema.SiteConfig) -> float:
    minutes = site.personal.minutes
    return time.monotonic() + 60 * minutes if minutes else math.inf


@dataclass(frozen=True)
class _Work:
    """One run; see :func:`run`."""

    where: state_folder.State
    site: schema.SiteConfig
    recipe: schema.Recipe
    verdict: decisions.Verdict
    node: sites.Site
    deadline: float
    on_step: progress.Step

    def run(self, shared: state.AdapterState, partial: state.AdapterState | None) -> statement.Kept:
        """From the final adapter, and the same with this site's own arrays, to what is kept."""
        built = client_app.Models(threads=self.site.limits.threads)
        model = built.get(self.node.recipe(self.recipe), self.node.device)
        settings, after = self.site.personal, self.recipe.rounds
        try:
            start = shared if partial is None else partial
            trained = tuning.train(model, self.node, start, settings, after, self.deadline, self.on_step)
            alone = tuning.alone(model, self.node, self.deadline) if settings.local_only else None
            beside = self.recipe.personal.kind in groups.BESIDE
            offered = tuning.candidates(shared, trained.adapter, alone, partial, beside=beside)
            chosen = tuning.choose(model, self.node, offered, self.deadline)
            tests = self._tests(model, offered, chosen)
        except errors.DeadlinePassed as late:
            raise errors.DeadlinePassed(
                f"site '{self.site.name}': personal.minutes = {settings.minutes} were over before the personal adapter "
                "was made. Raise them, lower personal.rounds, or set local_only = false; nothing was kept"
            ) from late
        return self._keep(
            model, chosen, statement.signed(self._values(chosen, tests, model), keys.read_private(self.where.key))
        )

    def _tests(
        self, model: adapted_model.AdaptedModel, offered: Mapping[str, state.AdapterState], chosen: tuning.Chosen
    ) -> dict[str, protocol.Evaluation]:
        """The test of what a statement names; none where the site has no test sample."""
        names = (choice.GLOBAL, choice.PARTIAL, choice.PERSONAL, choice.ALONE, chosen.choice.name)
        wanted = [name for name in dict.fromkeys(names) if name in offered]
        if not self.node.split("test"):
            return {}
        return {name: tuning.evaluate(model, self.node, offered[name], "test", self.deadline) for name in wanted}

    def _values(
        self, chosen: tuning.Chosen, tests: Mapping[str, protocol.Evaluation], model: adapted_model.AdaptedModel
    ) -> dict[str, Any]:
        primary, name = model.task.primary, chosen.choice.name
        scores = {kind: self._scores(answer, primary) for kind, answer in tests.items()}
        over, alone = _gap(scores, name, choice.GLOBAL), _gap(scores, name, choice.ALONE)
        alike = _gap(scores, choice.GLOBAL, choice.ALONE)
        return {
            "site": self.site.name,
            "recipe": self.verdict.recipe,
            "fingerprint": self.verdict.fingerprint,
            "adapter": chosen.adapter.fingerprint,
            "choice": name,
            "reason": chosen.choice.reason,
            "validation_units": chosen.choice.units,
            "test_units": 0 if over is None else over.units,
            "metric": primary,
            "scores": {kind: float(answer.metrics[primary]) for kind, answer in tests.items()},
            "minus_global": None if over is None else statement.Gap.of(over),
            "minus_local_only": None if alone is None else statement.Gap.of(alone),
            "global_minus_local_only": None if alike is None else statement.Gap.of(alike),
            "word": None if alone is None else statement.word(name, alone),
            "private": self._bare(name),
        }

    def _scores(self, answer: protocol.Evaluation, primary: str) -> bootstrap.SiteScores:
        patients = {sample.unit: sample.patient or sample.unit for sample in self.node.split("test")}
        return bootstrap.SiteScores.from_table(answer.ids, answer.samples, primary, patients)

    def _bare(self, name: str) -> bool:
        """Whether an adapter of a recipe with a mechanism holds what was learned without it.

        A site's own arrays may be such, see :func:`fedvfm.state.groups.bare`.
        """
        covered = (choice.GLOBAL,) if groups.bare(self.recipe) else (choice.GLOBAL, choice.PARTIAL)
        return self.recipe.privacy.mechanism != privacy.NO_MECHANISM and name not in covered

    def _keep(
        self, model: adapted_model.AdaptedModel, chosen: tuning.Chosen, said: statement.Statement
    ) -> statement.Kept:
        """Write the folder, its statement last; then note it, and let the folders of earlier runs go."""
        place = self.where.folder / statement.FOLDER / f"{self.verdict.recipe}-{said.adapter}"
        storage.make_private(place.parent)
        decisions.empty(place)
        adapted = model.without_mechanism() if said.private else model
        adapted.write(chosen.adapter)
        about = {"experiment": self.where.about.federation}
        export.save(adapted, place, about, note=self._note(said))
        signed_documents.write(place / statement.STATEMENT, said)
        self._record(said)
        for other in place.parent.iterdir():
            if other != place and other.is_dir() and self._replaced(other):
                storage.remove_folder(other)
        return statement.Kept(said, place)

    def _replaced(self, other: Path) -> bool:
        """Whether a folder is of the same final adapter, or was never finished."""
        if not (other / statement.STATEMENT).exists():
            return True
        return any(
            row.folder == other and row.statement.fingerprint == self.verdict.fingerprint
            for row in statement.kept(self.where)
        )

    def _note(self, said: statement.Statement) -> str:
        chosen = f"Chosen at site '{self.site.name}' of federation '{self.where.about.federation}': {said.choice}"
        if said.private:
            return f"{chosen}. Trained on without noise: no differential privacy. It must not leave the site"
        return f"{chosen}. Made for this site's own patients"

    def _record(self, said: statement.Statement) -> None:
        score = said.scores.get(said.choice)
        about: dict[str, Any] = {} if score is None or not math.isfinite(score) else {"score": round(score, 6)}
        self.where.audit.record(
            "decided",
            kind="benefit",
            verdict=(said.word or "kept").replace(" ", "-"),
            reason=said.reason,
            recipe=said.recipe,
            fingerprint=said.adapter,
            examples=said.test_units,
            **about,
        )
