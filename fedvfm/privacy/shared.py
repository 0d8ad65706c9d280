"""Mechanisms whose noise is the sum of the sites' parts, under secure aggregation.

What the coordinator learns of a round is one sum with the parts of ``honest`` sites or more in it, so the noise
multiplier is that of the sum and a site adds ``1 / sqrt(honest)`` of it. What a site sends alone is hidden by its
masks, not by its part: all of this stands on secure aggregation and on the stated number of honest sites.

``site-level-shared``: neighbours differ by one site's update, which is there or zero; it is clipped as a whole, and
trained as without a mechanism. ``record-level-shared`` and ``patient-level-shared``: neighbours differ by one unit's
gradient. A round is then *one* step of gradients clipped unit by unit. With more steps at a site the later ones start
from what the earlier ones made, without the other sites' noise in it, and no bound on what one unit changes would hold.

Source: Kairouz, Liu, Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
    Aggregation", ICML 2021; the sampling of units: Mironov, Talwar, Zhang, arXiv 1908.10530, sections 3.1 and 3.3,
    which need of the noise that it is symmetric, and of its divergence a bound at every whole order.
"""

from __future__ import annotations

from fedvfm.config import privacy, schema
from fedvfm.privacy import base, example_level
from fedvfm.secure_aggregation import fixed_point, shared_noise

FINEST = 1024
"""Whole numbers that one unit's change must measure at least, or rounding would outweigh it."""


class Shared:
    """One of them.

    Args:
        name: in the table.
    """

    needs_plain_updates = False

    def __init__(self, name: str) -> None:
        self.name, self.unit = name, privacy.UNITS[name]

    def faults(self, recipe: schema.Recipe) -> list[str]:
        """See base."""
        wrong = [] if self.unit == "site" else example_level.Sampled(self.name).faults(recipe)
        if self.unit == "site":
            wrong += self._site_faults(recipe)
        else:
            wrong += self._step_faults(recipe)
        own, secure = recipe.privacy, recipe.secure_aggregation
        if own.noise_multiplier is None:
            wrong.append(
                f"recipe.privacy.epsilon: under '{self.name}' all sites add parts of one noise, so the recipe states "
                "it; give noise_multiplier. 'fedvfm privacy plan --epsilon' finds it"
            )
        if secure is None:
            return [
                *wrong,
                f"recipe.privacy.mechanism = '{self.name}': a site's part of the noise hides nothing alone; add "
                "[secure_aggregation], or take the mechanism without -shared",
            ]
        noise = shared_noise.of(recipe)
        if noise is not None and noise.honest < 2:
            wrong.append(
                f"recipe.min_sites = {recipe.min_sites}: with {secure.colluders} colluders {noise.honest} site's part "
                f"is certain to be in a sum; raise it to {secure.colluders + 2} or more"
            )
        elif noise is not None and noise.bound * 2.0 ** fixed_point.of(recipe).places < FINEST:
            wrong.append(
                f"recipe.privacy.clip = {own.clip:g}: what one {self.unit} changes ({noise.bound:.3g}) is lost in the "
                f"fixed point of updates up to {noise.clip_norm:g}; lower recipe.secure_aggregation.clip_norm"
            )
        return wrong

    def _site_faults(self, recipe: schema.Recipe) -> list[str]:
        own, secure, wrong = recipe.privacy, recipe.secure_aggregation, []
        defaults = type(own).model_fields
        for key in ("microbatch", "images_per_patient"):
            if getattr(own, key) != defaults[key].default:
                wrong.append(f"recipe.privacy.{key}: '{self.name}' does not read it; leave it out")
        if recipe.aggregation.weighting != "uniform":
            wrong.append(
                f"recipe.aggregation.weighting = '{recipe.aggregation.weighting}': under '{self.name}' no site may "
                "weigh more than its clip; use weighting 'uniform'"
            )
        if secure is not None and own.clip is not None and secure.clip_norm < own.clip:
            wrong.append(
                f"recipe.secure_aggregation.clip_norm = {secure.clip_norm:g} is below recipe.privacy.clip = "
                f"{own.clip:g}: updates would be shortened to the one and noised for the other; raise it"
            )
        return wrong

    def _step_faults(self, recipe: schema.Recipe) -> list[str]:
        """A round is one plain step, so that what one unit changes is its clipped gradient times a constant."""
        own = recipe.optimiser
        wanted = {"name": "sgd", "local_epochs": 1, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0}
        return [
            f"recipe.optimiser.{key} = {getattr(own, key)!r}: under '{self.name}' a round is one plain step, whose "
            f"length is the same in every round; use {value!r}. recipe.aggregation.server_optimiser and "
            "server_momentum may make more of the steps"
            for key, value in wanted.items()
            if getattr(own, key) != value
        ]

    def event(
        self, settings: base.Settings, noise_multiplier: float, units: int, batch: int, epochs: int
    ) -> base.PrivacyEvent | None:
        """See base: one step a round. How many sites are honest the recipe says: see :mod:`fedvfm.privacy.events`."""
        rate = 1.0 if self.unit == "site" else base.sample_rate(units, batch)
        return base.PrivacyEvent(self.name, self.unit, noise_multiplier, rate, 1, float(settings.clip or 0.0))

    def site(self) -> base.SitePart | None:
        """Clipped steps without noise; at site level nothing, as the gate clips the whole update."""
        return None if self.unit == "site" else SitePart()

    def server(self) -> None:
        """Nothing: what it opens is private already."""
        return


class SitePart(example_level.SitePart):
    """The part at a site that trains; the noise is added where the update is masked."""

    noised = False

    def longest(self, recipe: schema.Recipe) -> float:
        """See base: what the norm that an update may have leaves to the step."""
        noise = shared_noise.of(recipe)
        if noise is None:
            raise ValueError("no noise is shared")  # a fault of the recipe, told before
        return noise.clip_norm * recipe.optimiser.batch_size / shared_noise.rate(recipe)


def record_level() -> Shared:
    """Protects the presence of one image."""
    return Shared("record-level-shared")


def patient_level() -> Shared:
    """Protects the presence of one patient with all images."""
    return Shared("patient-level-shared")


def site_level() -> Shared:
    """Protects that one hospital's update is in the sum, from the coordinator too."""
    return Shared(privacy.SITE_LEVEL_SHARED)
