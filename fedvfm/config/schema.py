"""Recipe, SiteConfig, ServerConfig and Experiment: what a user writes in TOML, checked for form, all faults at once.

This module checks *form* (keys, types, ranges). Names in tables and per-kind parameters are checked by the wings, which
add their faults to the same list. Every value that decides a result is in the Recipe, resolved to the last default.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import operator
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field

from fedvfm import errors
from fedvfm.config import base
from fedvfm.config import policy as site_policy
from fedvfm.config import privacy as privacy_config
from fedvfm.config import server as server_config
from fedvfm.storage import hash_chain

SCHEMA_VERSION = 1
MAX_RANK = 1024
COMPUTED_IN = ("float32", "bfloat16")
"""What a site may compute in; a recipe's "auto" is decided by each machine."""

Scalar = bool | int | float | str
Option = Scalar | list[Scalar]
Name = base.Name
PositiveInt = Annotated[int, Field(ge=1, le=1_000_000)]
Fraction = base.Fraction
Positive = base.Positive
NonNegative = base.NonNegative
Sha256 = base.Sha256
Device = Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?|mps|auto)$")]
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]


WINDOWS: dict[str, tuple[float, float]] = {
    "abdomen": (40.0, 400.0),
    "angio": (300.0, 600.0),
    "bone": (400.0, 1800.0),
    "brain": (40.0, 80.0),
    "liver": (30.0, 150.0),
    "lung": (-600.0, 1500.0),
    "mediastinum": (50.0, 350.0),
    "soft-tissue": (50.0, 400.0),
    "stroke": (40.0, 40.0),
    "subdural": (75.0, 215.0),
}
"""CT windows by name: (centre, width) in Hounsfield units, as radiologists commonly set them."""


class Strict(pydantic.BaseModel):
    """Base of all configs: strict types, no unknown keys, immutable, no NaN."""

    model_config = base.SETTINGS


PrivacyPolicy = site_policy.PrivacyPolicy
PolicyConfig = site_policy.PolicyConfig
LimitsConfig = site_policy.LimitsConfig
ServerConfig = server_config.ServerConfig
_names = base.names


class BackboneConfig(Strict):
    """The frozen model. ``name`` is a table name, a Hugging Face name or a local folder."""

    name: Name
    revision: str | None = None
    sha256: Sha256 | None = None
    options: dict[str, Option] = {}


class AdapterConfig(Strict):
    """The small trainable weights. ``layers`` are block numbers from 0; empty means all.

    ``parts`` of a mask decoder train beside them, by name. Left out, they are the backbone's default, which the
    resolved recipe states; an empty list means none.

    ``factors`` says which of the two factors of a ``lora`` pair train (see :mod:`fedvfm.state.factors`): "both";
    "freeze-A", only B, so that their mean is exact, half the bytes go up and half the numbers are noised under a
    privacy mechanism; "alternate", B in odd and A in even rounds, exact too and with A learned. The aggregation rule
    must be a sum.
    """

    kind: Name = "lora"
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = 8
    alpha: Positive | None = None
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], _names()] = ()
    targets: Annotated[tuple[Name, ...], _names()] = ("q", "v")
    parts: Annotated[tuple[Name, ...], Field(strict=False)] | None = None
    factors: Literal["both", "freeze-A", "alternate"] = "both"
    options: dict[str, Option] = {}

    @property
    def scale(self) -> float:
        """``alpha`` / ``rank``; alpha defaults to the rank."""
        return (self.alpha if self.alpha is not None else float(self.rank)) / self.rank


class TaskConfig(Strict):
    """What is learned: the head, the loss and its weights.

    ``prompt`` tells a promptable backbone where each class is, from the truth (see :mod:`fedvfm.data.prompts`).
    """

    kind: Name = "segmentation"
    head: str | None = None
    prompt: Literal["none", "box", "points"] = "none"
    prompt_jitter: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    prompt_points: Annotated[int, Field(ge=1, le=64)] = 1
    ce_weight: NonNegative = 0.2
    dice_weight: NonNegative = 0.8
    class_weights: Annotated[tuple[NonNegative, ...], _names()] = ()
    options: dict[str, Option] = {}

    @property
    def oracle(self) -> str:
        """What marks every score that was reached with prompts from the truth; empty where there were none."""
        return "" if self.prompt == "none" else "oracle prompt"


class DataContract(Strict):
    """What every site's images must become: part of the recipe, the same everywhere.

    ``class_names[0]`` is the background in segmentation. ``input_size`` is (height, width) in pixels: with
    ``fit = "resize"`` every image is resized to it; with ``fit = "native"`` training takes random crops of it at the
    image's own scale and evaluation sees the whole image. ``views`` > 0 draws that many augmented views of each
    training sample once and goes round them, so that what the frozen blocks compute can be kept; 0 draws afresh every
    epoch. ``intensity``: "percentile" stretches each image, "polarity" also turns bright backgrounds dark.

    Of volumes ``plane`` says how they are cut ("acquired": as the scanner did, which may differ from site to site) and
    ``stack = 3`` shows every slice between its two neighbours, one a channel (2.5D). ``window`` is a name of
    :data:`WINDOWS` or (centre, width) in the files' units, Hounsfield units for CT, and takes the place of
    ``intensity``. ``modality`` with a code of DICOM in it ("CT", "MR", ...) refuses DICOM files of another.

    ``channels`` names what is one channel each, in order: ``["FLAIR", "T1w", "T2w"]``. A case then has a file for each
    on one grid, at every site and in prediction; left out, a case is one file.
    """

    class_names: Annotated[tuple[Name, ...], Field(min_length=2, max_length=256, strict=False)]
    modality: str = "any"
    input_size: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)] = (224, 224)
    grey: bool = False
    fit: Literal["resize", "native"] = "resize"
    views: Annotated[int, Field(ge=0, le=1024)] = 0
    intensity: Literal["none", "percentile", "polarity"] = "percentile"
    window: Annotated[tuple[float, Positive], Field(strict=False)] | Name | None = None
    plane: Literal["axial", "coronal", "sagittal", "acquired"] = "axial"
    stack: Literal[1, 3] = 1
    channels: Annotated[tuple[Name, ...], _names()] = ()
    mean: Annotated[tuple[float, float, float], Field(strict=False)] = (0.485, 0.456, 0.406)
    std: Annotated[tuple[Positive, Positive, Positive], Field(strict=False)] = (0.229, 0.224, 0.225)
    augment: Annotated[tuple[Name, ...], _names()] = ()

    @pydantic.field_validator("class_names")
    @classmethod
    def _differ(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError("class names must differ")
        return names

    @pydantic.field_validator("window")
    @classmethod
    def _known(cls, window: tuple[float, float] | str | None) -> tuple[float, float] | str | None:
        if isinstance(window, str) and window not in WINDOWS:
            raise ValueError(f"known windows: {', '.join(WINDOWS)}; or [centre, width]")
        return window

    @pydantic.field_validator("channels")
    @classmethod
    def _countable(cls, channels: tuple[str, ...]) -> tuple[str, ...]:
        if len(channels) not in (0, 1, 3) or len({name.casefold() for name in channels}) < len(channels):
            raise ValueError("one name, or three different ones, are needed: a backbone takes one channel or three")
        return channels

    @pydantic.model_validator(mode="after")
    def _agree(self) -> DataContract:
        if self.window is not None and self.intensity == "polarity":
            raise ValueError('window and intensity = "polarity" exclude each other: a window fixes what is dark')
        if self.stack > 1 and self.grey:
            raise ValueError("stack = 3 and grey = true exclude each other: the neighbours would be mixed into one")
        if len(self.channels) > 1 and (self.grey or self.stack > 1):
            raise ValueError("three channels exclude grey = true and stack = 3: the model takes three in all")
        return self

    @property
    def limits(self) -> tuple[float, float] | None:
        """The lowest and highest value the window shows, in the files' units: centre minus and plus half the width."""
        if self.window is None:
            return None
        centre, width = WINDOWS[self.window] if isinstance(self.window, str) else self.window
        return centre - width / 2, centre + width / 2


def _later(default: Any, **limits: Any) -> Any:
    """A key that came later: written only where it is not the default, so that recipes before it keep their bytes."""
    return Field(default, exclude_if=functools.partial(operator.eq, default), **limits)


class OptimiserConfig(Strict):
    """Local training; the optimiser starts afresh every round, the schedule runs over all rounds.

    ``proximal`` is FedProx's mu: the gradient of ``mu / 2 ||w - w0||^2`` is added in every step, w0 the global adapter
    that the round began with; 0 adds nothing. The loss that is told is without it.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Positive = 1e-3
    head_learning_rate: Positive | None = None
    weight_decay: NonNegative = 0.01
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 4
    local_epochs: Annotated[int, Field(ge=1, le=10_000)] = 1
    schedule: Literal["constant", "cosine", "poly"] = "cosine"
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    clip_norm: NonNegative = 1.0
    proximal: NonNegative = _later(0.0)


class AggregationConfig(Strict):
    """The rule that joins the sites' updates.

    ``weighting``: by number of training examples, uniform, or by the site's mean training loss of the round, so that
    a site that is served worst pulls hardest (q-FFL with q = 1; Li et al., "Fair Resource Allocation in Federated
    Learning", ICLR 2020).

    ``server_optimiser`` makes the server's step out of what the rule made of the updates: "momentum" (FedAvgM), "adam"
    or "yogi"; the latter two take ``server_momentum`` as beta1, ``server_beta2``, and ``server_floor``, which is added
    to the root of the second moment (tau). With them a number moves by about ``server_learning_rate`` a round.
    """

    rule: Name = "mean"
    weighting: Literal["examples", "uniform", "loss"] = "examples"
    server_learning_rate: Positive = 1.0
    server_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    server_optimiser: Literal["momentum", "adam", "yogi"] = _later("momentum")
    server_beta2: float = _later(0.99, ge=0.0, lt=1.0)
    server_floor: float = _later(1e-3, gt=0.0)
    options: dict[str, Option] = {}

    @property
    def moves(self) -> bool:
        """Whether the server takes a step of its own, and the new adapter is not the aggregate itself."""
        plain = self.server_momentum == 0.0 and self.server_learning_rate == 1.0
        return not plain or self.server_optimiser != "momentum"


class EvaluationConfig(Strict):
    """How often the sites validate (0: never). Every run is tested after the last round.

    ``surface`` adds HD95, ASSD and NSD to the test, which cost some milliseconds a class of an image and up to half a
    second a class of a volume.
    """

    surface: bool = True
    every: Annotated[int, Field(ge=0, le=1_000_000)] = 1
    nsd_tolerance: Positive = 2.0


class AdmissionConfig(Strict):
    """Bounds an update must keep.

    From round 2 on its norm is at most ``norm_multiple`` times the median of all norms that were admitted in the rounds
    before, and always at most ``max_update_norm``, which alone holds in round 1.
    """

    max_examples: PositiveInt = 1_000_000
    max_update_norm: Positive = 1000.0
    norm_multiple: float = _later(100.0, ge=1.0)


class Recipe(Strict):
    """What is trained, resolved to the last default. Its hash names it.

    ``start`` is the fingerprint of the adapter of an earlier recipe that training goes on from; left out, the adapter
    of round 0 is made from the seed. ``threads`` is for results that must be equal to the last bit on machines of one
    kind: so many CPU threads compute at every site whose own file does not say otherwise. Left out, each machine takes
    its own number, and results differ in the last bits. ``precision`` "auto" and "bfloat16" let each machine compute
    in bfloat16 where it is not slower with it, and in float32 elsewhere; "float32" is strict. ``codec`` is how
    adapters are written on the wire, in both directions: "fp32" as they are, "fp16", "int8" and "int4" as coded
    differences (see :mod:`fedvfm.protocol.codecs`). ``min_sites`` is a promise of the coordinator: no adapter is made
    of fewer sites' updates.
    """

    schema_version: Literal[1] = 1
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 10
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    backbone: BackboneConfig
    adapter: AdapterConfig = AdapterConfig()
    task: TaskConfig = TaskConfig()
    data: DataContract
    optimiser: OptimiserConfig = OptimiserConfig()
    aggregation: AggregationConfig = AggregationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    admission: AdmissionConfig = AdmissionConfig()
    privacy: privacy_config.RecipePrivacy = privacy_config.NONE
    codec: Name = "fp32"
    start: Sha256 | None = None
    min_sites: int = _later(1, ge=1, le=10_000)

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of the canonical JSON of every resolved value; computed once of each recipe, and anew of a copy."""
        # A recipe that starts from nothing, or has no mechanism, is named as before there was such a key.
        left_out: dict[str, Any] = {"start": True} if self.start is None else {}
        left_out |= {"privacy": True} if self.privacy == privacy_config.NONE else {}
        left_out |= {"codec": True} if self.codec == "fp32" else {}
        left_out |= {} if self.data.channels else {"data": {"channels"}}
        left_out |= {} if self.adapter.factors != "both" else {"adapter": {"factors"}}
        return hashlib.sha256(hash_chain.canonical(self.model_dump(mode="json", exclude=left_out)).encode()).hexdigest()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Recipe:
        """A copy, which may have other values and so another hash."""
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop("hash", None)
        return copy


class SourceConfig(Strict):
    """Where samples come from.

    ``unreadable = "skip"`` leaves out cases whose files cannot be read, counted and named, where the source is a
    folder; by default one such case stops everything.
    """

    source: Name
    path: str | None = None
    unreadable: Literal["stop", "skip"] = "stop"
    options: dict[str, Option] = {}


class PartitionConfig(Strict):
    """How samples become virtual hospitals, and how each hospital splits its own.

    ``train``, ``val``, ``test`` cap the samples of a hospital (0: no cap); ``val_share`` and ``test_share`` apply
    where a sample has no split of its own.
    """

    kind: Name = "natural"
    sites: Annotated[int, Field(ge=0, le=10_000)] = 0
    include: Annotated[tuple[Name, ...], _names()] = ()
    alpha: Positive = 0.5
    shots: Annotated[int, Field(ge=0)] = 0
    train: Annotated[int, Field(ge=0)] = 0
    val: Annotated[int, Field(ge=0)] = 0
    test: Annotated[int, Field(ge=0)] = 0
    val_share: Fraction = 0.15
    test_share: Fraction = 0.25
    options: dict[str, Option] = {}


class SiteSplit(Strict):
    """How a hospital splits its own samples where its data does not say.

    ``seed`` is the site's own and not the recipe's: a patient who is tested once is never trained on in a later run.
    """

    val_share: Fraction = 0.15
    test_share: Fraction = 0.25
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0

    @pydantic.model_validator(mode="after")
    def _leave_training(self) -> SiteSplit:
        if self.val_share + self.test_share >= 1.0:
            raise ValueError("val_share + test_share must stay below 1, or nothing is left to train on")
        return self


class PersonalConfig(Strict):
    """What a site does for itself after the last round; no part of a recipe, since nothing of it travels.

    It trains on from the final adapter for ``rounds`` rounds of the recipe's local epochs (0: as many as the recipe
    has), from ``learning_rate`` times the recipe's rate down to none, and chooses; see
    :mod:`fedvfm.client.personal.tuning`. An experiment that does not say ``enabled`` has them where
    local-only is among its baselines.
    """

    enabled: bool | None = None
    rounds: Annotated[int, Field(ge=0, le=10_000)] = 0
    learning_rate: Positive = 0.5


class SitePersonal(PersonalConfig):
    """The same of a site's own file, for ``fedvfm client adapter personal``.

    ``local_only`` trains an adapter at the site alone too, with as many steps as in the federation, to choose and to
    compare with; ``minutes`` is the time that all of it may take (0: no limit).
    """

    local_only: bool = False
    minutes: Annotated[int, Field(ge=0, le=1_000_000)] = 0


class SiteConfig(Strict):
    """The hospital's own file; it never leaves the site.

    ``labels`` maps the class names of the hospital's data to those of the recipe (several may become one). ``device``
    is all it may compute on: where it is "cpu" the executor sees no GPU. ``rank`` 0 means the recipe's.
    ``cache_mib`` bounds what is kept of images in memory; what the frozen blocks compute and does not fit there goes to
    private files in the state folder, at most ``cache_disk_mib``, until the recipe ends (0: never).
    ``recipe`` and ``data.path`` may be relative to this file. ``include`` names the natural sites of the source that
    are this hospital's; empty means all.
    """

    schema_version: Literal[1] = 1
    name: SiteName
    recipe: str | None = None
    device: Device = "cpu"
    rank: Annotated[int, Field(ge=0, le=MAX_RANK)] = 0
    cache_mib: Annotated[int, Field(ge=0)] = 2048
    cache_disk_mib: Annotated[int, Field(ge=0)] = 4096
    data: SourceConfig
    include: Annotated[tuple[Name, ...], _names()] = ()
    labels: dict[Name, Name] = {}
    split: SiteSplit = SiteSplit()
    limits: LimitsConfig = LimitsConfig()
    policy: PolicyConfig = PolicyConfig()
    privacy: privacy_config.Budget | None = None
    personal: SitePersonal = SitePersonal()


class BaselineConfig(Strict):
    """Settings of the baselines that are not those of the recipe.

    ``matrix_sites`` is at how many sites, its own among them, a local-only model is tested; where there are more, which
    ones is drawn from the seed (see :func:`fedvfm.simulation.baselines.tested_at`).
    """

    matrix_sites: PositiveInt = 16
    unet_learning_rate: Positive = 2e-3
    unet_channels: Annotated[tuple[PositiveInt, ...], Field(min_length=2, max_length=6, strict=False)] = (
        16,
        32,
        64,
        128,
    )


class AttackConfig(Strict):
    """Bad sites of a simulation: which they are and what they do (see :mod:`fedvfm.simulation.attacks`)."""

    kind: Name
    sites: Annotated[tuple[Name, ...], Field(min_length=1, strict=False)]
    options: dict[str, Option] = {}


Workers = Annotated[int, Field(ge=1, le=1024)] | Literal["auto"]


class Experiment(Strict):
    """A simulation file: recipe, data, partition, engine and baselines.

    ``cache_mib`` bounds what is kept of images in memory, over all processes of a run; ``cache_disk_mib`` what the
    frozen blocks compute and is kept in files of the run folder until the run is finished (0: none).
    ``workers`` is how many processes the in-process engine computes in: "auto" goes by the cores, the GPUs and the
    memory that are free. The results are the same with any number. ``threads`` is how many CPU threads each of them
    computes with, whatever the recipe says (0: the recipe's, else
    :func:`fedvfm.simulation.engines.worker_schedule.threads`); results with another number differ in the last bits.
    ``attack`` makes some of the sites bad, to see what a rule withstands; a simulation has no other bad sites, and
    nothing but a simulation can have these.
    """

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    title: str = ""
    note: str = ""
    engine: Name = "in-process"
    device: Device = "cpu"
    baselines: Annotated[tuple[Name, ...], _names()] = ("local-only", "pooled")
    workers: Workers = "auto"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    site_ranks: dict[Name, Annotated[int, Field(ge=1, le=MAX_RANK)]] = {}
    cache_mib: Annotated[int, Field(ge=0)] = 2048
    cache_disk_mib: Annotated[int, Field(ge=0)] = 4096
    recipe: Recipe
    data: SourceConfig
    partition: PartitionConfig = PartitionConfig()
    server: ServerConfig = ServerConfig()
    baseline: BaselineConfig = BaselineConfig()
    attack: AttackConfig | None = None
    personal: PersonalConfig = PersonalConfig()

    def with_seed(self, seed: int) -> Experiment:
        """The same experiment under another seed."""
        return self.model_copy(update={"recipe": self.recipe.model_copy(update={"seed": seed})})


Model = TypeVar("Model", bound=pydantic.BaseModel)


def _known_keys(model: type[pydantic.BaseModel], location: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for step in location:
        field = current.model_fields.get(step) if isinstance(step, str) else None
        if (
            field is None
            or not isinstance(field.annotation, type)
            or not issubclass(field.annotation, pydantic.BaseModel)
        ):
            return []
        current = field.annotation
    return list(current.model_fields)


def _sentence(model: type[pydantic.BaseModel], fault: Mapping[str, Any]) -> str:
    where = ".".join(str(step) for step in fault["loc"]) or "(top level)"
    if fault["type"] == "extra_forbidden":
        known = _known_keys(model, tuple(fault["loc"][:-1]))
        close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"; nearest: '{close[0]}'" if close else ""
        return f"{where}: unknown key; known here: {', '.join(known)}{hint}" if known else f"{where}: unknown key"
    if fault["type"] == "missing":
        return f"{where}: required, but not given"
    shown = repr(fault["input"])
    # What our own checks say is said as it is: a zone's name is no longer one in small letters.
    said = str(fault["ctx"]["error"]) if fault["type"] == "value_error" else fault["msg"].lower()
    return f"{where} = {shown[:80]}: {said}"


def parse(model: type[Model], values: Mapping[str, Any], what: str) -> Model:
    """Check ``values`` against ``model``.

    Raises:
        ConfigError: listing every fault with its path.
    """
    try:
        return model.model_validate(dict(values))
    except pydantic.ValidationError as error:
        faults = [_sentence(model, fault) for fault in error.errors()]
        raise errors.ConfigError(what, list(dict.fromkeys(faults))) from None


def read_toml(path: Path, data: bytes | None = None) -> dict[str, Any]:
    """The tables of a TOML file; of its content where that was read before.

    Raises:
        ConfigError: if the file is missing or no TOML.
    """
    try:
        return tomllib.loads((path.read_bytes() if data is None else data).decode())
    except OSError as error:
        raise errors.ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise errors.ConfigError(str(path), [f"is not TOML: {error}"]) from None
