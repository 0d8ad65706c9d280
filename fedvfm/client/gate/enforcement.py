"""A hospital's terms: what every message is held against. The steps that do so are in :mod:`fedvfm.client.gate.steps`.

Nothing is built or computed for a recipe that no person here approved. A recipe that arrives for the first time is
kept for review, so that ``fedvfm client review`` can show it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from flwr.app import Context

from fedvfm import errors
from fedvfm.aggregators import table as rules
from fedvfm.audit import audit
from fedvfm.client import privacy_report, site_file, state_folder
from fedvfm.client.gate import (
    exchange,
    held_adapters,
    history,
    lineage,
    masking,
    policy,
    privacy_charge,
    private_scores,
    reply_cache,
    split_pin,
)
from fedvfm.client.training import site as sites
from fedvfm.config import privacy, schema
from fedvfm.data.partition import virtual_hospitals
from fedvfm.model import adapted_model, device_check, feature_cache, feature_counts, feature_files
from fedvfm.privacy import base, randomness
from fedvfm.protocol import protocol
from fedvfm.state import state
from fedvfm.storage import hash_chain
from fedvfm.trust import keys, locked_recipe

LOG = logging.getLogger(__name__)
MIB = 1 << 20


def built_here(recipe: schema.Recipe) -> locked_recipe.LockedRecipe:
    """What this site itself makes of a recipe: shapes alone, on the meta device.

    Raises:
        ConfigError: if the recipe has faults, those of its aggregation too. A coordinator may look away; with numbers
            that have no sum, or state that stays here without noise, what the ledger says would not be true.
    """
    wrong = rules.faults(recipe)
    if wrong:
        raise errors.ConfigError("recipe", wrong)
    locked = adapted_model.AdaptedModel(recipe, with_weights=False).locked()
    return locked.model_copy(update={"backbone_sha256": recipe.backbone.sha256 or ""})


def number(task: protocol.Task) -> int:
    """The round as the log can hold it: whoever asks for one below 0 is refused, and that is what is noted."""
    return max(task.round, 0)


class HospitalTerms:
    """What a site holds messages against: its approvals, its policy, what it makes of a recipe, its audit log.

    Nothing of a single message is kept here; see :class:`fedvfm.client.gate.exchange.Exchange`.

    Args:
        where: the site's state folder.
        rules: the policy as it is now; asked for every message.
        build: what the site makes of a recipe, so that the coordinator's word on what trains is never taken.

    Attributes:
        audit: the site's audit log.
        masks: whether updates leave masked where the recipe wants it; in a rehearsal nothing leaves.
    """

    masks: ClassVar[bool] = True

    def __init__(
        self,
        where: state_folder.State,
        rules: Callable[[], schema.PolicyConfig],
        build: Callable[[schema.Recipe], locked_recipe.LockedRecipe] = built_here,
    ) -> None:
        self.where, self.rules, self._build_recipe = where, rules, build
        self.audit = where.audit
        self._history = history.History()
        self.audit.follow(self._history.add)
        self._built: dict[str, locked_recipe.LockedRecipe] = {}
        self._sent = reply_cache.Sent(where.sent)

    @property
    def sessions(self) -> masking.Sessions:
        """This site's sessions of secure aggregation."""
        key = functools.partial(keys.read_private, self.where.key)
        return masking.Sessions(self.where.secure, self.where.about.site, key)

    @property
    def history(self) -> history.History:
        """What the audit log says up to now, whoever wrote to it."""
        self.audit.catch_up()
        return self._history

    def note_refused(self, of: exchange.Exchange, refusal: errors.PolicyRefused) -> None:
        """Note that a message is refused, and why."""
        self.audit.record("decided", kind=protocol.WORDS[of.kind], verdict="refused", reason=refusal.reason, **of.about)

    def lock(self, recipe: schema.Recipe) -> locked_recipe.LockedRecipe:
        """What this site makes of a recipe.

        Raises:
            PolicyRefused: if it is another recipe: it would come to the same as an approved one under another hash, and
                count its rounds afresh.
        """
        if recipe.hash not in self._built:
            locked = self._build_recipe(recipe)
            # With sentences that no tokenizer is pinned for, each site would read its own.
            loose = recipe.words is not None and recipe.words.tokenizer_sha256 is None
            if locked.recipe.hash != recipe.hash or loose:
                raise errors.PolicyRefused("policy-message", "the recipe leaves values open; lock it first")
            self._built[recipe.hash] = locked
        return self._built[recipe.hash]

    def usage(self, recipe: schema.Recipe) -> audit.Usage:
        """What the recipe has used up here."""
        return self.history.usage(recipe.hash)

    def lineage(self, recipe: schema.Recipe, held: held_adapters.Adapters) -> lineage.Lineage:
        """The adapters that came with this recipe; ``held`` are those at hand."""
        taken = self.history.taken(recipe.hash)
        return lineage.Lineage(self.lock(recipe), self._manifest(recipe), taken, held, lambda: self.trains(recipe))

    def trains(self, recipe: schema.Recipe) -> bool:
        """Whether there are images to train on here."""
        return True

    def without_labels(self, recipe: schema.Recipe) -> bool:
        """Whether this site trains a recipe without labels."""
        return False

    def _manifest(self, recipe: schema.Recipe) -> state.Manifest:
        """Every array of the adapter as this site is sent it."""
        return self.lock(recipe).manifest

    def patients(self, split: str, examples: int) -> int:
        """How many patients are in a split; ``examples`` is what was computed from."""
        return examples

    def units(self, recipe: schema.Recipe) -> int | None:
        """How many units a mechanism can draw from here; None where there is no mechanism, or no data to count."""
        return None

    def account(self, task: protocol.Task) -> privacy_charge.Account:
        """Where a round of a mechanism is charged.

        Raises:
            PolicyRefused: if nowhere.
        """
        raise errors.LedgerError("these terms keep no ledger, so no recipe with a mechanism is trained under them")

    def noised(
        self, task: protocol.Task, scores: protocol.Evaluation, free: Mapping[str, float]
    ) -> tuple[dict[str, float], hash_chain.Mark | None]:
        """Of scores that may leave those that can be noised, noised and charged; and the mark of the ledger then."""
        return {}, None


class SiteTerms(HospitalTerms):
    """The terms of a site that runs: its own file is read again when it changes, so that a policy may be tightened.

    Args:
        where: the site's state folder.
        settings: the site's own file; or what it says, where it is not looked at again.
        device: where to compute.
        build: as above.

    Attributes:
        judged: the site's file as the message that is worked on was judged by it.
        basis: what the split of the site that stands follows from.
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
        self.basis: split_pin.Basis | None = None
        self._sha256 = ""
        # As the policy was last read from it: a message is worked on by what it was judged by.
        self.judged = settings if isinstance(settings, schema.SiteConfig) else self.config

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
                self.judged, self._site = site_file.read_site(self._settings, self.where.about.site, data), None
                self._sha256 = sha256
        return self.judged

    def site(self, context: Context) -> sites.Site:
        """The site for the recipe that was received last."""
        if self._site is None:
            raise errors.ProtocolError("no message was judged yet")
        return self._site[1]

    def prepared(self, recipe: schema.Recipe) -> sites.Site:
        """The site for a recipe: as the data are now if the file or the recipe was another one before."""
        if self._site is None or self._site[0] != recipe.hash:
            basis = self.require_split(recipe)
            self._site, self._counted = (recipe.hash, self._build(self.judged, recipe)), feature_counts.Counts()
            self.basis = basis  # of the site that stands: one that cannot be built leaves the one before
            self._site[1].ends = self.ends(recipe)  # whenever it is built, it has an end
        return self._site[1]

    def require_split(self, recipe: schema.Recipe) -> split_pin.Basis:
        """What the split follows from as the file was last read, and followed from when the recipe began here."""
        basis = split_pin.of(recipe.hash, self.judged)
        split_pin.require(self.where, basis)
        return basis

    def features_counted(self) -> feature_counts.Counts | None:
        """What was computed of the images' features since the last time; None where they were not asked for."""
        if self._site is None:
            return None
        now = self._site[1].cache.counts
        new, self._counted = now - self._counted, now
        return new if new.asked else None

    def ends(self, recipe: schema.Recipe) -> tuple[float, str]:
        """When the policy ends work on a message that is begun now, by the monotonic clock; and with which word."""
        left = policy.remaining(self.judged.policy, self.usage(recipe))
        return time.monotonic() + left.seconds, left.reason

    def _manifest(self, recipe: schema.Recipe) -> state.Manifest:
        smaller = sites.at_rank(recipe, self.judged.rank, self.judged.name)
        if smaller is recipe:
            return super()._manifest(recipe)
        if smaller.hash not in self._built:
            self._built[smaller.hash] = self._build_recipe(smaller)
        return self._built[smaller.hash].manifest

    def patients(self, split: str, examples: int) -> int:
        """See above; as the site's files say."""
        if self._site is None:
            return examples
        return len({sample.subject for sample in self._site[1].split(split)})

    def trains(self, recipe: schema.Recipe) -> bool:
        """See above; as the site's files say."""
        return bool(self.prepared(recipe).split("train"))

    def without_labels(self, recipe: schema.Recipe) -> bool:
        """See above; as the site's file says."""
        return recipe.unlabelled is not None and self.prepared(recipe).without_labels

    def _hospital(self, config: schema.SiteConfig, recipe: schema.Recipe) -> virtual_hospitals.Hospital:
        return site_file.hospital(config, recipe)

    def _build(self, config: schema.SiteConfig, recipe: schema.Recipe) -> sites.Site:
        hospital = self._hospital(config, recipe)
        files = feature_files.of_recipe(self.where.features, recipe.hash, config.cache_disk_mib * MIB)
        cache, budget = feature_cache.FeatureCache(config.cache_mib * MIB, files), config.privacy
        units = 0 if budget is None else budget.units or 0
        return sites.Site(
            config.name,
            hospital,
            self._device,
            config.rank,
            cache,
            units=units,
            residuals=self._sent.residuals,
            personal=self._sent.personal,
            least_steps=config.policy.min_steps,
            least_units=config.policy.min_train_units,
            spare_devices=device_check.after((config.device, *config.spare_devices), self._device),
            gpu_share=config.limits.gpu_memory,
        )

    def units(self, recipe: schema.Recipe) -> int | None:
        """See above; as the site's files say."""
        if not privacy_charge.private(recipe):
            return None
        return privacy_charge.counted(recipe, self.prepared(recipe).hospital, self.judged.privacy) or None

    def state_privacy(self, recipe: schema.Recipe, budget: privacy.Budget) -> None:
        """Keep what it comes to here for ``client status``; a ledger that cannot be read is told of by training."""
        hospital = self.prepared(recipe).hospital
        with contextlib.suppress(errors.LedgerError, errors.AuditError):
            cost = privacy_report.look(recipe, hospital, budget)
            if cost is not None:
                privacy_report.note(self.where, recipe.hash, cost)

    def noised(
        self, task: protocol.Task, scores: protocol.Evaluation, free: Mapping[str, float]
    ) -> tuple[dict[str, float], hash_chain.Mark | None]:
        """See above; where they cannot be charged nothing of them leaves, and its people are told why."""
        config, own = self.judged, private_scores.names(free, scores.patients)
        if config.privacy is None or config.policy.metrics_epsilon is None or not own:
            return {}, None
        spent = private_scores.event(config.policy.metrics_epsilon, config.privacy, len(own))
        means, units = {name: scores.patients[name] for name in own}, self.patients(task.split, scores.num_examples)
        try:
            account = self.score_account(task, spent, config.privacy)
            with account.hold() as hold:
                drawn = private_scores.noised(means, units, spent, randomness.System())
                hold.charge(hashlib.sha256(hash_chain.canonical(drawn).encode()).hexdigest())
            return drawn, account.mark
        except (errors.BudgetExceeded, errors.LedgerError) as error:
            LOG.warning(f"no score on {task.split} of round {task.round} leaves: {error}")
            return {}, None

    def score_account(
        self, task: protocol.Task, spent: base.PrivacyEvent, budget: privacy.Budget
    ) -> privacy_charge.Account:
        """Where scores are charged."""
        hospital = self.prepared(task.recipe).hospital
        return privacy_charge.of_scores(task, spent, hospital, budget, self.history.ledger_marks())

    def account(self, task: protocol.Task) -> privacy_charge.Account:
        """See above; the ledger of the site's file."""
        recipe, budget = task.recipe, privacy_charge.require(task.recipe, self.judged.privacy)
        if budget is None or task.state is None:
            raise errors.ProtocolError("a train message without a mechanism or an adapter is charged to nobody")
        hospital = self.prepared(recipe).hospital
        marks = self.history.ledger_marks()
        return privacy_charge.account(recipe, task.round, task.state.fingerprint, hospital, budget, marks)
