"""site-level: the server clips what each site changed, adds noise to the sum, and nobody can tell who took part.

Neighbours differ by one site whose change is put in or left out (as nought). What a round divides by is the number of
sites that were asked, which depends on nobody's records. Sites are drawn from a public seed, so drawing amplifies
nothing: a round is one Gaussian mechanism at rate 1. The sites trust the server, which sees what each of them sends.

Source: McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018, alg. 1 (flat clipping,
    fixed denominator); Andrew et al., "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021, alg. 1
    and theorem 1; "zeroed out" neighbours: Kairouz et al., "Practical and Private (Deep) Learning Without Sampling or
    Shuffling", ICML 2021, definition 1.1.
"""

from __future__ import annotations

import math

import numpy as np

from fedvfm.config import privacy, schema
from fedvfm.privacy import accountant, base, randomness

NAME = privacy.SITE_LEVEL
RATE = 0.2
"""Andrew et al., section 3.1: what they take throughout."""
_SHARE_OF_SITES = 20
_NO_MORE = 1 - 1e-12  # rounding the products brings a norm to the clip, never above it
_WITHIN = "within"


class SiteLevel:
    """Clip and noise at the server; the clip as the recipe says, or following a quantile of the norms."""

    unit = "site"
    needs_plain_updates = True

    def faults(self, recipe: schema.Recipe) -> list[str]:
        """See base. That the rule must be a sum, the table of rules says."""
        own, weighting, sigma = recipe.privacy, recipe.aggregation.weighting, noise_multiplier(recipe)
        found = [
            f"recipe.privacy.{name}: only a mechanism at the sites reads it; leave it out" for name in _unread(own)
        ]
        if weighting != "uniform":
            found.append(
                f"recipe.aggregation.weighting = '{weighting}': under '{NAME}' no site may weigh more than its clip; "
                "use weighting 'uniform'"
            )
        if sigma is None:
            found.append(
                f"recipe.privacy.epsilon = {own.epsilon}: no noise reaches it at delta {own.delta} over "
                f"{recipe.rounds} rounds; raise epsilon or delta"
            )
        elif own.adaptive_noise is not None and 2 * own.adaptive_noise <= sigma:
            found.append(
                f"recipe.privacy.adaptive_noise = {own.adaptive_noise:g}: with it the count of norms alone spends what "
                f"noise multiplier {sigma:g} allows; give more than {sigma / 2:g}, or leave it out"
            )
        return found

    def event(
        self, settings: base.Settings, noise_multiplier: float, units: int, batch: int, epochs: int
    ) -> base.PrivacyEvent | None:
        """A round: one step that every site is in."""
        return base.PrivacyEvent(NAME, self.unit, noise_multiplier, 1.0, 1, float(settings.clip or 0.0))

    def site(self) -> base.SitePart | None:
        """Nothing: a site trains as it would without."""
        return None

    def server(self) -> base.ServerPart | None:
        """Clip and noise."""
        return Server()


class Server:
    """The part at the server; see :class:`base.ServerPart`."""

    def configure(self, recipe: schema.Recipe, sites: int, memory: base.Memory) -> base.Memory:
        """This round's clip, and the noise on the sum and on the count that together are the recipe's."""
        own, sigma = recipe.privacy, noise_multiplier(recipe)
        if sigma is None:
            raise ValueError(f"no noise reaches epsilon {own.epsilon}")  # a fault of the recipe, told before
        clip = float(memory.get("next_clip", own.clip))
        common = {"clip": clip, "noise_multiplier": sigma, "sites": sites}
        if own.adaptive_quantile is None:
            return {**common, "sum_noise": sigma, "next_clip": clip}
        counted = own.adaptive_noise or max(sites / _SHARE_OF_SITES, sigma)
        return {
            **common,
            "sum_noise": noise_on_sum(sigma, counted),
            "quantile": own.adaptive_quantile,
            "rate": own.adaptive_rate or RATE,
            "count_noise": counted,
            _WITHIN: 0.0,
        }

    def on_aggregate(self, change: base.Change, memory: base.Memory) -> tuple[base.Change, base.Memory]:
        """The change, at most the clip long in L2 over all arrays together; whether it was so before is counted."""
        length, clip = norm(change), float(memory["clip"])
        factor = 1.0 if length <= clip else clip / length * _NO_MORE
        clipped = {name: array * factor for name, array in change.items()}
        if _WITHIN not in memory:
            return clipped, memory
        return clipped, {**memory, _WITHIN: memory[_WITHIN] + (0.5 if length <= clip else -0.5)}

    def finish(
        self, total: base.Change, memory: base.Memory, draws: randomness.Draws
    ) -> tuple[base.Change, base.Memory]:
        """Noise on the sum, divided by the sites asked; and the next round's clip, from a count with noise of its own.

        Counts are of +1/2 and -1/2 (0 for a site that is left out), so that one site changes them by 1/2.
        """
        spread, sites = memory["sum_noise"] * memory["clip"], memory["sites"]
        mean = {name: (total[name] + spread * draws.normal(total[name].shape)) / sites for name in sorted(total)}
        if _WITHIN not in memory:
            return mean, memory
        counted = memory[_WITHIN] + memory["count_noise"] * float(draws.normal(1)[0])
        share = min(1.0, max(0.0, counted / sites + 0.5))
        after = memory["clip"] * math.exp(-memory["rate"] * (share - memory["quantile"]))
        told = {name: value for name, value in memory.items() if name != _WITHIN}
        return mean, {**told, "share_within": share, "next_clip": after}


def _unread(own: privacy.RecipePrivacy) -> list[str]:
    fields = type(own).model_fields
    return [name for name in ("microbatch", "images_per_patient") if getattr(own, name) != fields[name].default]


def noise_on_sum(sigma: float, count_noise: float) -> float:
    """The noise multiplier of the sum with which sum and count together are one Gaussian mechanism of ``sigma``.

    Source: Andrew et al., NeurIPS 2021, theorem 1: ``(sigma^-2 - (2 count_noise)^-2)^(-1/2)``.

    Raises:
        ValueError: if the count alone has less noise than that.
    """
    left = sigma**-2 - (2 * count_noise) ** -2
    if not left > 0:
        raise ValueError(f"noise {count_noise} on the count alone spends more than noise multiplier {sigma} allows")
    return float(left**-0.5)


def noise_multiplier(recipe: schema.Recipe) -> float | None:
    """The recipe's, or the least that keeps its epsilon over all its rounds; None where none does."""
    own = recipe.privacy
    if own.noise_multiplier is not None or own.epsilon is None or own.delta is None:
        return own.noise_multiplier
    return accountant.noise(own.epsilon, own.delta, 1.0, recipe.rounds)


def norm(change: base.Change) -> float:
    """L2 norm over all arrays together; of changes whose squares overflow, too."""
    largest = max((float(np.abs(array).max(initial=0.0)) for array in change.values()), default=0.0)
    if largest == 0.0:
        return 0.0
    return largest * math.sqrt(sum(float(np.square(array / largest).sum()) for array in change.values()))
