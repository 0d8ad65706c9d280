"""Record level and patient level: differentially private SGD on the adapter, at the site, before anything leaves.

Each step draws every unit by itself with the same chance, clips the gradient of each to ``clip``, sums them, adds
normal noise of ``noise_multiplier`` clips and divides by the recipe's batch.

Source: Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, algorithm 1, with a lot as a Poisson sample.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from fedvfm.config import privacy, schema
from fedvfm.privacy import base, randomness
from fedvfm.state import state


class Sampled:
    """DP-SGD whose neighbours differ by one unit.

    Args:
        name: in the table.
    """

    needs_plain_updates = False

    def __init__(self, name: str) -> None:
        self.name, self.unit = name, privacy.UNITS[name]

    def faults(self, recipe: schema.Recipe) -> list[str]:
        """See base."""
        weighting, own = recipe.aggregation.weighting, recipe.privacy
        found = []
        if weighting != "uniform":
            found.append(
                f"recipe.aggregation.weighting = '{weighting}': under '{self.name}' neither the number of images nor a "
                "loss may leave a site; use weighting 'uniform'"
            )
        if self.unit == "record" and recipe.data.stack > 1:
            found.append(
                f"recipe.data.stack = {recipe.data.stack}: a slice is seen beside its neighbours, so one image is in "
                f"several gradients and '{self.name}' hides none; use mechanism 'patient-level', or leave stack out"
            )
        if self.unit != "patient" and own.images_per_patient != privacy.IMAGES_PER_PATIENT:
            found.append(
                f"recipe.privacy.images_per_patient = {own.images_per_patient}: only 'patient-level' reads it; leave "
                "it out"
            )
        return found

    def event(
        self, settings: base.Settings, noise_multiplier: float, units: int, batch: int, epochs: int
    ) -> base.PrivacyEvent | None:
        """See base."""
        if settings.clip is None:
            raise ValueError(f"mechanism '{self.name}' has no clip")
        rate, steps = base.sample_rate(units, batch), base.steps(units, batch, epochs)
        return base.PrivacyEvent(self.name, self.unit, noise_multiplier, rate, steps, settings.clip)

    def site(self) -> SitePart:
        """See base."""
        return SitePart()

    def server(self) -> None:
        """Nothing: what arrives is private already."""
        return


class SitePart:
    """The part at the site; torch is loaded when it trains."""

    noised = True

    def prepare(
        self, work: base.Work, recipe: schema.Recipe, event: base.PrivacyEvent, draws: randomness.Draws
    ) -> AbstractContextManager[base.Steps]:
        """See base."""
        from fedvfm.privacy import dpsgd

        steps: AbstractContextManager[base.Steps] = dpsgd.opened(
            work, recipe, event, draws, longest=self.longest(recipe)
        )
        return steps

    def longest(self, recipe: schema.Recipe) -> float | None:
        """Most that the sum of clipped gradients may measure, where noise is added later than here."""
        return None

    def on_update(self, update: state.SiteUpdate) -> state.SiteUpdate:
        """See base."""
        return base.bare(update)


def record_level() -> Sampled:
    """Protects the presence of one image."""
    return Sampled("record-level")


def patient_level() -> Sampled:
    """Protects the presence of one patient with all images: the gradient of a patient is the mean over some of them."""
    return Sampled("patient-level")
