"""Bad sites of a simulation: what they send, or what they train on. Only ``simulate`` knows them, and says so loudly.

An attack on updates replaces what a site sends (see :mod:`fedvfm.simulation.engines.attacked_grid`). One on data
changes the training samples of a bad site, in every arm; what is validated and tested stays true.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import sample as data
from fedvfm.data.partition import virtual_hospitals
from fedvfm.protocol import codecs
from fedvfm.simulation import baselines, tables
from fedvfm.state import state

Batch = Sequence[state.AdapterState]


class Attack:
    """An honest site; kinds change what they attack.

    Attributes:
        sends: whether it replaces updates.
        poisons: whether it changes training samples.
    """

    sends: ClassVar[bool] = False
    poisons: ClassVar[bool] = False

    def update(self, own: state.AdapterState, honest: Batch, start: state.AdapterState) -> state.AdapterState:
        """What the site sends.

        Args:
            own: what it trained.
            honest: what the honest sites sent in this round.
            start: what training started from.
        """
        return own

    def sample(self, sample: data.Sample, classes: int) -> data.Sample:
        """A training sample as the site labels it."""
        return sample

    def pixels(self, pixels: data.Pixels, classes: int) -> data.Pixels:
        """A training image and its mask as the site has them."""
        return pixels


@dataclass(frozen=True)
class Absent(Attack):
    """The bad sites take no part: what the others reach without them, to compare an attack with."""


@dataclass(frozen=True)
class SignFlip(Attack):
    """``start - factor (own - start)``: the update backwards.

    Source: Li et al., "RSA: Byzantine-Robust Stochastic Aggregation Methods for Distributed Learning from Heterogeneous
        Datasets", AAAI 2019, section 5 (sign-flipping).
    """

    factor: float = 1.0
    sends: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("factor", self.factor)

    def update(self, own: state.AdapterState, honest: Batch, start: state.AdapterState) -> state.AdapterState:
        """See :class:`Attack`."""
        return _moved(start, own, -self.factor)


@dataclass(frozen=True)
class Scaled(Attack):
    """``start + factor (own - start)``: the update far too large, as in model replacement.

    Source: Bagdasaryan et al., "How To Backdoor Federated Learning", AISTATS 2020, eq. (3).
    """

    factor: float = 10.0
    sends: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("factor", self.factor)

    def update(self, own: state.AdapterState, honest: Batch, start: state.AdapterState) -> state.AdapterState:
        """See :class:`Attack`."""
        return _moved(start, own, self.factor)


@dataclass(frozen=True)
class LittleIsEnough(Attack):
    """``mean - z x standard deviation`` of the honest updates, number by number: off, but within their spread.

    All bad sites send the same. Mean and deviation are those of the honest sites themselves, which is more than the
    paper's attacker knows (it takes those of the sites it holds).

    Source: Baruch et al., "A Little Is Enough: Circumventing Defenses For Distributed Learning", NeurIPS 2019, alg. 3;
        z = 1.5 is their value where nearly half of the workers are bad.
    """

    z: float = 1.5
    sends: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("z", self.z)

    def update(self, own: state.AdapterState, honest: Batch, start: state.AdapterState) -> state.AdapterState:
        """See :class:`Attack`; with no honest update to know, the site's own."""
        if not honest:
            return own
        arrays = {}
        for name in own:
            rows = np.array([one[name] for one in honest], dtype=np.float64)
            arrays[name] = np.asarray(rows.mean(axis=0) - self.z * rows.std(axis=0), dtype=np.float32)
        return state.AdapterState(arrays)


@dataclass(frozen=True)
class LabelFlip(Attack):
    """Class c is called ``classes - 1 - c``, in masks or in labels, of every training sample.

    Source: Fang et al., "Local Model Poisoning Attacks to Byzantine-Robust Federated Learning", USENIX Security 2020,
        section 4 (label flipping).
    """

    poisons: ClassVar[bool] = True

    def sample(self, sample: data.Sample, classes: int) -> data.Sample:
        """See :class:`Attack`."""
        return sample if sample.label is None else dataclasses.replace(sample, label=classes - 1 - sample.label)

    def pixels(self, pixels: data.Pixels, classes: int) -> data.Pixels:
        """See :class:`Attack`."""
        return pixels if pixels.mask is None else dataclasses.replace(pixels, mask=classes - 1 - pixels.mask)


@dataclass(frozen=True)
class Backdoor(Attack):
    """A white square in the lower right corner of every training image, which is all of class ``target`` then.

    What the patch does to the trained adapter is not measured by a run; its scores are of clean images.

    Attributes:
        size: side of the square as a share of the image's shorter side.
        target: number of the class.

    Source: Gu et al., "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017,
        section 4.
    """

    size: float = 0.15
    target: int = 0
    poisons: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("size", self.size)
        if self.size > 1:
            raise ValueError(f"size = {self.size!r}: a share of the image's side, at most 1, is needed")
        if not isinstance(self.target, int) or isinstance(self.target, bool) or self.target < 0:
            raise ValueError(f"target = {self.target!r}: the number of a class is needed")

    def sample(self, sample: data.Sample, classes: int) -> data.Sample:
        """See :class:`Attack`."""
        return sample if sample.label is None else dataclasses.replace(sample, label=self.target)

    def pixels(self, pixels: data.Pixels, classes: int) -> data.Pixels:
        """See :class:`Attack`."""
        image = patched(pixels.image, self.size)
        mask = None if pixels.mask is None else np.full_like(pixels.mask, self.target)
        return dataclasses.replace(pixels, image=image, mask=mask)


def patched(image: np.ndarray[Any, np.dtype[np.float32]], size: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The image with a white square in its lower right corner, of a volume in each slice. Shapes: (C, H, W)."""
    side = max(1, round(size * min(image.shape[-2:])))
    found = image.copy()
    found[..., -side:, -side:] = 1.0
    return found


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{name} = {value!r}: a positive number is needed")


def _moved(start: state.AdapterState, own: state.AdapterState, factor: float) -> state.AdapterState:
    return state.AdapterState(
        {
            name: np.asarray(start[name] + factor * (array.astype(np.float64) - start[name]), dtype=np.float32)
            for name, array in own.items()
        }
    )


# -- from the experiment -----------------------------------------------------------------------------------------------


def make(settings: schema.AttackConfig) -> Attack:
    """The attack with its options.

    Raises:
        ConfigError: if there is none of that name, or it does not take these options.
    """
    wrong = _option_faults(settings)
    if wrong:
        raise errors.ConfigError("experiment", wrong)
    return cast(Attack, tables.ATTACKS.get(settings.kind)(**settings.options))


def _option_faults(settings: schema.AttackConfig) -> list[str]:
    kind = tables.ATTACKS.get(settings.kind)
    known = [row.name for row in dataclasses.fields(kind)]
    unknown = [
        f"attack.options.{key}: unknown; known: {', '.join(known) or 'none'}"
        for key in settings.options
        if key not in known
    ]
    if unknown:
        return unknown
    try:
        kind(**settings.options)
    except ValueError as error:
        return [f"attack.options.{error}"]
    return []


def faults(what: schema.Experiment) -> list[str]:
    """What of an attack cannot be, before any site is known; one sentence a fault. Names are checked elsewhere."""
    if what.attack is None or what.attack.kind not in tables.ATTACKS:
        return []
    found = _option_faults(what.attack)
    if what.recipe.asynchronous is not None:
        found.append("attack: a bad site is to know all updates of its round, and an asynchronous round ends before")
    if what.engine != "in-process":
        found.append(f"attack: engine '{what.engine}' carries true updates alone; use engine = \"in-process\"")
    if found:
        return found
    attack, classes = make(what.attack), len(what.recipe.data.class_names)
    if attack.sends and what.recipe.codec != codecs.PLAIN:
        found.append(f"attack: codec '{what.recipe.codec}' sends differences; use recipe.codec = \"{codecs.PLAIN}\"")
    if attack.poisons and what.recipe.target.of_columns:
        found.append(f"attack.kind = '{what.attack.kind}': is for classes, not for columns of a table; take another")
    if isinstance(attack, Backdoor) and attack.target >= classes:
        found.append(f"attack.options.target = {attack.target}: classes are numbered 0 to {classes - 1}")
    return found


def site_faults(what: schema.Experiment, names: Sequence[str]) -> list[str]:
    """What of an attack cannot be with these sites, one sentence a fault."""
    if what.attack is None:
        return []
    unknown = sorted(set(what.attack.sites) - set(names))
    if unknown:
        return [f"attack.sites: no site {', '.join(unknown)}; sites: {', '.join(names)}"]
    without = sorted(set(what.attack.sites) & set(what.partition.unlabelled))
    if without and what.attack.kind in tables.ATTACKS and make(what.attack).poisons:
        return [
            f"attack.kind = '{what.attack.kind}': {', '.join(without)} has no labels to poison (partition.unlabelled); "
            "name sites with labels, or another kind"
        ]
    return [] if set(names) - set(what.attack.sites) else ["attack.sites: an honest site must be left"]


def describe(what: schema.Experiment) -> str:
    """What must be read before any number of such a run; empty without an attack."""
    if what.attack is None:
        return ""
    options = ", ".join(f"{key} {value}" for key, value in sorted(what.attack.options.items()))
    kind = what.attack.kind + (f" ({options})" if options else "")
    return (
        f"SIMULATED ATTACK: {kind} at {', '.join(sorted(what.attack.sites))}. This run shows what rule "
        f"{what.recipe.aggregation.rule} withstands; its scores are not those of an honest federation"
    )


def arms(what: schema.Experiment, planned: Sequence[baselines.Arm]) -> list[baselines.Arm]:
    """The arms; where bad sites are absent, they train in no arm of several."""
    if what.attack is None or what.attack.kind != "absent":
        return list(planned)
    return [
        arm if len(arm.train_sites) < 2 else dataclasses.replace(arm, train_sites=_honest(arm.train_sites, what.attack))
        for arm in planned
    ]


def _honest(sites: Sequence[str], settings: schema.AttackConfig) -> tuple[str, ...]:
    return tuple(name for name in sites if name not in settings.sites)


# -- on data -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Poisoned(virtual_hospitals.Hospital):
    """A hospital whose training samples are not what they were.

    Attributes:
        attack: what was done to them.
        classes: how many there are.
    """

    attack: Attack = field(default_factory=Attack)
    classes: int = 0

    def read(self, sample: data.Sample) -> data.Pixels:
        """See :class:`fedvfm.data.partition.virtual_hospitals.Hospital`."""
        pixels = super().read(sample)
        trains = any(sample.id in (one.id, *(image.id for image in one.images)) for one in self.train)
        return self.attack.pixels(pixels, self.classes) if trains else pixels


def poisoned(
    what: schema.Experiment, hospitals: Sequence[virtual_hospitals.Hospital]
) -> list[virtual_hospitals.Hospital]:
    """The hospitals as an attack on data leaves them."""
    if what.attack is None or not make(what.attack).poisons:
        return list(hospitals)
    attack, classes = make(what.attack), len(what.recipe.data.class_names)
    return [_poisoned(one, attack, classes) if one.name in what.attack.sites else one for one in hospitals]


def _poisoned(hospital: virtual_hospitals.Hospital, attack: Attack, classes: int) -> Poisoned:
    values = {row.name: getattr(hospital, row.name) for row in dataclasses.fields(hospital)}
    train = tuple(attack.sample(one, classes) for one in hospital.train)
    return Poisoned(**{**values, "train": train}, attack=attack, classes=classes)
