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
from fedvfm.config import asynchronous as asynchronous_config
from fedvfm.config import base
from fedvfm.config import batch as batch_config
from fedvfm.config import inputs as inputs_config
from fedvfm.config import licence as licence_config
from fedvfm.config import policy as site_policy
from fedvfm.config import privacy as privacy_config
from fedvfm.config import secure_aggregation as secure_config
from fedvfm.config import server as server_config
from fedvfm.config import slides as slides_config
from fedvfm.config import target as target_config
from fedvfm.config import unlabelled as unlabelled_config
from fedvfm.config import words as words_config
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
ClassCode = Annotated[
    str,
    Field(pattern=r"^((SCT|FMA|DCM|UMLS|NCIt):[A-Za-z0-9.-]{1,16}(\+(SCT|FMA|DCM|UMLS|NCIt):[A-Za-z0-9.-]{1,16})?)?$"),
]
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


def _later(default: Any, **limits: Any) -> Any:
    """A key that came later: written only where it is not the default, so that recipes before it keep their bytes.

    Such a default never changes: in approved recipes that lack the key it would change what is trained under the same
    hash. ``tests/trust/test_signed_bytes.py`` holds them all.
    """
    return Field(default, exclude_if=functools.partial(operator.eq, default), **limits)


class BackboneConfig(Strict):
    """The frozen model. ``name`` is a table name, a Hugging Face name or a local folder."""

    name: Name
    """A name of the table (see README.md), a Hugging Face name, or a folder that is at every site. Change: to adapt
    another model; docs/guide.md says which there are."""
    revision: str | None = None
    """Hugging Face revision of the weights. Change: to pin one state of a Hugging Face repository."""
    sha256: Sha256 | None = None
    """Of the weights; locking fills it in from the weights on the machine that locks. Change: leave it to 'fedvfm
    recipe lock'."""
    options: dict[str, Option] = {}
    """What this backbone takes besides; of SAM gradient_checkpointing: less memory, more time. Change: where memory is
    short, or with a U-Net of other channels."""
    licence: licence_config.Name | None = _later(None)
    """Of the weights, as SPDX calls it (Apache-2.0), or LicenseRef-NAME; sites review it and may refuse it. Change:
    where neither the table nor the import of the weights says it."""
    licence_limits: tuple[licence_config.Limit, ...] = _later((), strict=False)
    """What the licence forbids: no-derivatives, non-commercial, research-only; of a Creative Commons licence the name
    says it. Change: with a licence that is no Creative Commons one."""


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
    """lora, core (LoRA of which a rank x rank matrix alone trains and travels), adaptformer, prompt-tokens,
    medical-sam-adapter, norm, bias, head-only or full. Change: to send less (core, norm, bias, head-only), or to learn
    more."""
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = 8
    """Of LoRA: more can learn more and sends more; core takes more than LoRA. Change: up where the training loss stays
    high, down to send fewer bytes."""
    alpha: Positive | None = None
    """LoRA's scale is alpha / rank; left out, alpha is the rank. Change: keep it at one or two times the rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """(share) Of LoRA's input, in training. Change: to 0.1 where validation falls while the training loss falls too."""
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], _names()] = ()
    """Blocks of the backbone, from 0; empty means all. What lies before the first of them is computed once and kept, so
    late blocks train quickly. Change: to late blocks for speed; to all where images are far from what the model knows.
    """
    targets: Annotated[tuple[Name, ...], _names()] = ("q", "v")
    """Layers inside a block that get LoRA. Change: add k, v or others where the adapter learns too little."""
    parts: Annotated[tuple[Name, ...], Field(strict=False)] | None = None
    """Parts of a mask decoder (SAM) that train besides; left out, what works best there. Change: to [] for LoRA alone.
    """
    factors: Literal["both", "freeze-A", "alternate"] = "both"
    """Which LoRA factor trains: both, freeze-A or alternate; the last two are exact means and better under differential
    privacy. Change: to freeze-A under differential privacy, or to halve what goes up."""
    options: dict[str, Option] = {}
    """What this kind takes besides: count and depth of prompt-tokens, basis of core (a number that chooses its fixed
    factors), residual of lora (rank of what rules residual and stack keep beside it), personal of lora (rank of each
    site's own pair under personal.kind = "dual"), width, scale and depth (true: slices meet their neighbours, with
    data.stack = 3) of medical-sam-adapter. Change: with a kind that has options; a wrong one is refused with the known.
    """

    @property
    def scale(self) -> float:
        """``alpha`` / ``rank``; alpha defaults to the rank."""
        return (self.alpha if self.alpha is not None else float(self.rank)) / self.rank


class TaskConfig(Strict):
    """What is learned: the head, the loss and its weights.

    ``prompt`` tells a promptable backbone where each class is: "box" and "points" from the truth (see
    :mod:`fedvfm.data.prompts`), "auto" from a light head that trains beside the decoder (see
    :mod:`fedvfm.tasks.proposals`) and needs no truth.
    """

    kind: Name = "segmentation"
    """segmentation, detection, classification or case-classification. Change: to what the labels are: masks, of which
    detection learns boxes (docs/detection.md), one class an image, or one class a case of many images (the slices of a
    volume, the pictures of a folder)."""
    head: str | None = None
    """Of the model; left out, what fits the backbone: patch or pyramid (or unet, which looks further around, or
    unet-deep, which has three times its numbers at half the resolution), linear for classification, sam-masks for SAM;
    boxes for detection; for cases attention-mil, or mst, mean, max. Change: to compare heads; to unet-deep with a SAM
    that is told no prompts, and where images are enlarged to input_size; to mst where the order of images counts."""
    prompt: Literal["none", "auto", "box", "points"] = "none"
    """Of SAM: none; auto, boxes and masks that the adapter itself proposes; box or points, drawn from the truth, whose
    scores are called "oracle prompt". Change: to auto to compare with none; to the others only to measure what perfect
    prompts could reach."""
    prompt_jitter: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    """(share of the box's side) How far drawn boxes are moved. Change: up to imitate boxes that people draw in a hurry.
    """
    prompt_points: Annotated[int, Field(ge=1, le=64)] = 1
    """(points) How many points are drawn for a structure. Change: up where one point does not tell which structure is
    meant."""
    ce_weight: NonNegative = 0.2
    """Weight of the cross-entropy in segmentation's loss. Change: together with dice_weight."""
    dice_weight: NonNegative = 0.8
    """Weight of the Dice loss in segmentation's loss. Change: up where structures are small beside the background."""
    dice: Literal["image", "batch"] = _later("image")
    """Whether Dice is of each image or of all images of a batch together (not under privacy at the site). Change: to
    batch where many images, such as slices of volumes, do not show every class; with a batch_size of 8 or more."""
    class_weights: Annotated[tuple[NonNegative, ...], _names()] = ()
    """A weight for each class in the cross-entropy; empty means all alike. Change: where a rare class is missed."""
    partial_labels: bool = _later(False)
    """Whether a site may label some of the classes only and say which (labelled in its file); what it does not label
    is no background there. Change: to true where hospitals label different classes; docs/unequal-hospitals.md."""
    options: dict[str, Option] = {}
    """Of classification: sampling = "uniform" or "balanced" (all classes drawn equally often; not under privacy at the
    site). Of cases also parts = 64, the images of a case that a training step takes at most, and layers = 1 of mst. Of
    segmentation neighbours = 0, the share that each neighbouring slice of a volume has in the answer for a slice,
    smooth = 1e-5, the pixels that are added to both parts of the Dice loss, and with prompt = "auto" passes = 2, how
    often the decoder draws, each time shown its last mask. Of detection threshold = 0.3, the least score of a box that
    is delivered and counts in F1, most = 100 boxes an image, overlap = 0.5 of two boxes of a class of which the surer
    stays, least_pixels = 0 of an object in a mask. Change: sampling to "balanced" where classes are unequal in number;
    parts down where memory is short; neighbours to 0.25 where slices lie close together; smooth to 1e-12 where many
    images do not show every class, so that it teaches nothing of these; passes to 1 to save time; threshold up where
    false alarms cost more than what is missed."""

    @property
    def oracle(self) -> str:
        """What marks every score that was reached with prompts from the truth; empty where there were none."""
        return "oracle prompt" if self.prompt in ("box", "points") else ""


class RecipePersonal(Strict):
    """Which arrays of the adapter stay at each site; see :mod:`fedvfm.state.groups`."""

    kind: Literal["none", "head-local", "norm-local", "share-A", "by-part", "ditto", "dual"] = "none"
    """What each site keeps for itself: none, head-local (head and decoder parts), norm-local (normalisation), share-A
    (B of the pairs), by-part (A of the encoder's pairs), ditto (a whole adapter beside the global one) or dual (a
    second pair beside every pair). Change: where hospitals differ; docs/personal.md compares."""
    proximal: NonNegative = _later(0.1)
    """(strength) Of ditto: lambda, how strongly the personal adapter is pulled to the global one; 0 trains it alone.
    Change: up where a site has few patients, down where it differs much from the others."""

    @pydantic.model_validator(mode="after")
    def _pulls(self) -> RecipePersonal:
        if self.proximal != 0.1 and self.kind != "ditto":
            raise ValueError(f"proximal = {self.proximal:g}: only kind = 'ditto' reads it; leave it out")
        return self


class Rerun(Strict):
    """Rounds of a recipe that are made again because a site withdrew; see :mod:`fedvfm.server.withdrawal`."""

    of: Sha256
    """Hash of the recipe whose later rounds are made again. Change: never; 'fedvfm server withdraw' writes it."""
    after: Annotated[int, Field(ge=0, le=100_000)]
    """(round) The last round that stands, 0 for none. Change: never; 'fedvfm server withdraw' writes it."""


class DataContract(Strict):
    """What every site's images must become: part of the recipe, the same everywhere.

    ``class_names[0]`` is the background in segmentation and detection. ``input_size`` is (height, width) in pixels:
    with ``fit = "resize"`` every image is resized to it; with ``fit = "native"`` training takes random crops of it at
    the image's own scale and evaluation sees the whole image. ``views`` > 0 draws that many augmented views of each
    training sample once and goes round them, so that what the frozen blocks compute can be kept; 0 draws afresh every
    epoch. ``intensity``: "percentile" stretches each image, "polarity" also turns bright backgrounds dark.

    ``depth`` > 0 makes each volume one sample, which a network of three dimensions sees in pieces of ``depth`` slices
    of ``input_size``; a third of them have a voxel of a class in the middle. ``spacing`` brings the voxels of all
    volumes to one size before that; masks and scores are on the volume's own grid.

    Of volumes ``plane`` says how they are cut ("acquired": as the scanner did, which may differ from site to site) and
    ``stack = 3`` shows every slice between its two neighbours, one a channel (2.5D). ``window`` is a name of
    :data:`WINDOWS` or (centre, width) in the files' units, Hounsfield units for CT, and takes the place of
    ``intensity``. ``modality`` with a code of DICOM in it ("CT", "MR", ...) refuses DICOM files of another.

    ``channels`` names what is one channel each, in order: ``["FLAIR", "T1w", "T2w"]``. A case then has a file for each
    on one grid, at every site and in prediction; left out, a case is one file.

    ``class_codes`` says by codes what the classes are, in their order and empty where nothing is said:
    ``["", "SCT:108369006", "SCT:64033007+SCT:7771000"]``, a coded type and, where it needs one, its modifier. Masks are
    known by it, and predicted DICOM-SEG objects carry it; common organs have their code of SNOMED CT without it.
    """

    class_names: Annotated[tuple[Name, ...], Field(min_length=1, max_length=256, strict=False)]
    """In segmentation and detection the first is the background; of a target of columns they are the columns. At least
    two, except of a regression. Change: to your classes; their order gives the class numbers."""
    modality: str = "any"
    """With a code of DICOM in it (CT, MR, ...) DICOM files of another are refused. Change: to CT, MR, ... where sites
    have several in one folder."""
    input_size: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)] = (224, 224)
    """(pixels) Height and width that the model sees. Change: up where structures are a few pixels wide; time grows with
    the area."""
    grey: bool = False
    """Whether colours become grey. Change: to true where colour is only the camera's or the stain's."""
    fit: Literal["resize", "native"] = "resize"
    """resize: every image to input_size; native: crops of it at the image's own scale. Change: to native where images
    are large and structures small."""
    views: Annotated[int, Field(ge=0, le=1024)] = 0
    """So many augmented views of each training image are drawn once and kept; 0 draws afresh. Change: to about 4 with
    late layers: what the frozen blocks compute is then kept."""
    intensity: Literal["none", "percentile", "polarity"] = "percentile"
    """none, percentile (stretched), or polarity (bright backgrounds turn dark too). Change: to none where grey values
    have a meaning, to polarity where some sites' images are inverted."""
    window: Annotated[tuple[float, Positive], Field(strict=False)] | Name | None = None
    """(Hounsfield units) CT window in place of intensity: lung, bone, ..., or [centre, width]. Change: for CT; leave it
    out for everything else."""
    plane: Literal["axial", "coronal", "sagittal", "acquired"] = "axial"
    """How volumes are cut: axial, coronal, sagittal, or acquired (as the scanner did). Change: to the plane in which
    the scanner's pixels are finest."""
    depth: Annotated[int, Field(ge=0, le=1024)] = _later(0)
    """(slices) A sample is a whole volume, and training sees pieces of so many slices of input_size; 0: a sample is a
    slice. Needs backbone unet3d and fit = native. Change: to about the depth of the structures, a multiple of 8."""
    spacing: Annotated[tuple[Annotated[float, Field(ge=0.05, le=50.0)], ...], Field(max_length=3, strict=False)] = (
        _later(())
    )
    """(millimetres) Of whole volumes: distance of slices, of rows and of columns that every volume is resampled to;
    left out, voxels keep their size. Change: to about the median of the sites where scanners' voxels differ."""
    stack: Literal[1, 3] = 1
    """(slices) 3 shows each slice between its two neighbours. Change: to 3 where one slice alone does not show the
    structure."""
    channels: Annotated[tuple[Name, ...], _names()] = ()
    """Names of the one or three files of a case that are a channel each. Change: where a case is several sequences."""
    optional_channels: Annotated[tuple[Name, ...], _names()] = _later(())
    """Those of them that a site may lack, in its own file: they are black there. Needs channel-dropout in augment.
    Change: where not every hospital has every sequence."""
    mean: Annotated[tuple[float, float, float], Field(strict=False)] = (0.485, 0.456, 0.406)
    """Subtracted from values of 0 to 1; ImageNet's. Change: only with a backbone that was trained with others."""
    std: Annotated[tuple[Positive, Positive, Positive], Field(strict=False)] = (0.229, 0.224, 0.225)
    """What values are divided by after that; ImageNet's. Change: only with a backbone that was trained with others."""
    augment: Annotated[tuple[Name, ...], _names()] = ()
    """flip, mirror (left and right), rot90, affine, intensity, invert, noise, channel-dropout (of three named channels,
    last in the list). Change: add some where sites have few images; no mirror or flip where left and right matter."""
    class_codes: Annotated[tuple[ClassCode, ...], _names()] = _later(())
    """A code for each class, "" where its name says enough: scheme:code, a modifier after +. Masks are known by it and
    predicted DICOM-SEG carry it. Change: where a class is no common organ, or sites' segmentations call it
    otherwise."""
    slides: slides_config.SlidesConfig | None = _later(None)
    """Which tiles of whole slides are taken; left out, the recipe takes no slides. docs/slides.md."""

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
        if self.spacing and (len(self.spacing) != 3 or not self.depth):
            raise ValueError("spacing: three numbers (slices, rows, columns), of whole volumes: set depth too")
        if self.stack > 1 and self.grey:
            raise ValueError("stack = 3 and grey = true exclude each other: the neighbours would be mixed into one")
        if self.class_codes and (len(self.class_codes) != len(self.class_names) or self.class_codes[0]):
            raise ValueError("class_codes: one for each of class_names is needed, empty for the background")
        if len(set(self.codes.values())) < len(self.codes):
            raise ValueError("class_codes: two classes of one code could not be told apart")
        if "channel-dropout" in self.augment and len(self.channels) != 3:
            raise ValueError("augment = channel-dropout: three names in channels are needed, of a meaning each")
        strange = [name for name in self.optional_channels if name not in self.channels]
        if strange or len(set(self.optional_channels)) < len(self.optional_channels):
            raise ValueError(f"optional_channels: {', '.join(strange) or 'a name is repeated'}; name some of channels")
        if self.optional_channels and "channel-dropout" not in self.augment:
            raise ValueError(
                "optional_channels: a model that never saw a channel black in training is wrong where it is; add "
                "channel-dropout to augment, last"
            )
        if "channel-dropout" in self.augment[:-1]:
            raise ValueError("augment: channel-dropout must be last, or what comes behind it changes what is black")
        if len(self.channels) > 1 and (self.grey or self.stack > 1):
            raise ValueError("three channels exclude grey = true and stack = 3: the model takes three in all")
        return self

    @property
    def patch_size(self) -> tuple[int, ...]:
        """What training sees of a sample: (height, width), of volumes (slices, height, width)."""
        return (self.depth, *self.input_size) if self.depth else self.input_size

    @property
    def codes(self) -> dict[str, str]:
        """Class -> its code, of those that have one."""
        return {name: code for name, code in zip(self.class_names, self.class_codes, strict=False) if code}

    @property
    def limits(self) -> tuple[float, float] | None:
        """The lowest and highest value the window shows, in the files' units: centre minus and plus half the width."""
        if self.window is None:
            return None
        centre, width = WINDOWS[self.window] if isinstance(self.window, str) else self.window
        return centre - width / 2, centre + width / 2


class OptimiserConfig(Strict):
    """Local training; the optimiser starts afresh every round, the schedule runs over all rounds.

    ``proximal`` is FedProx's mu: the gradient of ``mu / 2 ||w - w0||^2`` is added in every step, w0 the global adapter
    that the round began with; 0 adds nothing. The loss that is told is without it.

    ``control_variates`` takes plain SGD steps without momentum, which the coordinator corrects; see
    :mod:`fedvfm.state.control_variates`.

    ``round_minutes`` lets a site end a round before its ``local_epochs`` are over, after a step at least: it says how
    many of its images it saw (an epoch's worth where there are several), which is its weight by examples. The order of
    images is drawn anew in each round, so that over the rounds all are seen.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw or sgd. Change: to sgd only to repeat others' results; the policy of a site may refuse it."""
    learning_rate: Positive = 1e-3
    """Of the adapter. Change: first of all: halve it where the loss jumps, double it where it barely falls."""
    head_learning_rate: Positive | None = None
    """Of head and decoder parts; left out, the adapter's. Under privacy choose it anew. Change: to several times
    learning_rate where the head begins from nothing."""
    weight_decay: NonNegative = 0.01
    """Pull of the weights towards zero. Change: up where validation falls while the training loss falls too."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 4
    """(images) Of one step. Change: down where memory is short; up under differential privacy."""
    local_epochs: Annotated[int, Field(ge=1, le=10_000)] = 1
    """(passes) Over a site's training images in each round. Change: down where sites are unlike one another, up to save
    rounds."""
    schedule: Literal["constant", "cosine", "poly"] = "cosine"
    """constant, cosine or poly, over all rounds. Change: to constant where rounds may be added later."""
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """(share of all steps) In which the learning rate rises. Change: up where the first steps make the loss jump."""
    clip_norm: NonNegative = 1.0
    """Most that a step's gradient may measure; 0 does not clip. No privacy comes of it. Change: down where single steps
    make the loss jump."""
    proximal: NonNegative = _later(0.0)
    """FedProx's mu: how strongly a step is pulled back to where the round began. Change: to 0.01 or 0.1 where sites are
    unlike and rounds undo one another."""
    control_variates: bool = _later(False)
    """SCAFFOLD: the coordinator corrects every step by how a site's mean gradient differs from that of all. Needs plain
    sgd steps, rule mean, weighting uniform and no privacy mechanism. Change: to true where unlike sites take many local
    steps; twice the bytes go down."""
    round_minutes: NonNegative = _later(0.0)
    """(minutes) The most that a site trains in a round, whatever local_epochs says; 0: no limit. Not with differential
    privacy at the site. Change: where hospitals differ much in size or speed, so that none keeps the others waiting."""


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
    """Which one when: docs/which-rule.md. residual and stack need adapter.options.residual; svd lets sites have
    different ranks. Change: to svd, fair or hetlora for sites of different ranks; to a robust rule where a site may be
    bad."""
    weighting: Literal["examples", "uniform", "loss"] = "examples"
    """examples, uniform (private recipes need it) or loss. Change: to uniform where each hospital shall count the same.
    """
    server_learning_rate: Positive = 1.0
    """How far the adapter goes towards the mean. Change: below 1 where the adapter swings from round to round."""
    server_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """(0 to 1) How much of the last round's step is added. Change: to 0.9 for many rounds with small cohorts."""
    server_optimiser: Literal["momentum", "adam", "yogi"] = _later("momentum")
    """momentum, adam or yogi; the latter two need a server_learning_rate below 1. Change: to compare, in a simulation
    first."""
    server_beta2: float = _later(0.99, ge=0.0, lt=1.0)
    """(0 to 1) How long adam and yogi remember the size of steps. Change: seldom."""
    server_floor: float = _later(1e-3, gt=0.0)
    """Steps far smaller than this are not made larger by adam and yogi. Change: up where the first rounds with adam or
    yogi move too far."""
    options: dict[str, Option] = {}
    """What a rule takes: bad (trimmed-mean, krum), average, bound, smoothing, ridge, shorten (residual, stack). Change:
    with a rule that has options."""

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
    """Whether the test has surface distances (HD95, ASSD, NSD), which cost time. Change: to false where the test of
    volumes takes too long."""
    every: Annotated[int, Field(ge=0, le=1_000_000)] = 1
    """(rounds) How often the sites validate; 0: never. The test comes after the last round. Change: up to save time."""
    nsd_tolerance: Positive = 2.0
    """(pixels, millimetres of volumes) Of the normalised surface distance. Change: to how far two readers of the same
    image differ."""

    def validates(self, number: int, last: int) -> bool:
        """Whether the sites validate after a round, where ``last`` is the last one."""
        return self.every > 0 and (number % self.every == 0 or number == last)


class AdmissionConfig(Strict):
    """Bounds an update must keep.

    From round 2 on its norm is at most ``norm_multiple`` times the median of all norms that were admitted in the rounds
    before, and always at most ``max_update_norm``, which alone holds in round 1.
    """

    max_examples: PositiveInt = 1_000_000
    """(images) Most that a site may say it trained on. Change: down to a little above what the largest site has."""
    max_update_norm: Positive = 1000.0
    """Most that an update may measure (L2 norm). Change: down once the journal shows what norms are usual."""
    norm_multiple: float = _later(100.0, ge=1.0)
    """(times) From round 2 on also at most so many times the median norm admitted in earlier rounds. Change: down where
    a bad site is feared."""


class Recipe(Strict):
    """What is trained, resolved to the last default. Its hash names it.

    ``start`` is the fingerprint of the adapter of an earlier recipe that training goes on from; left out, the adapter
    of round 0 is made from the seed. ``threads`` is for results that must be equal to the last bit on machines of one
    kind: so many CPU threads compute at every site whose own file does not say otherwise. Left out, each machine takes
    its own number, and results differ in the last bits. ``precision`` "auto" and "bfloat16" let each machine compute
    in bfloat16 where it is not slower with it, and in float32 elsewhere; "float32" is strict. ``codec`` is how
    adapters are written on the wire, in both directions: "fp32" as they are, "fp16", "int8" and "int4" as coded
    differences (see :mod:`fedvfm.protocol.codecs`). ``min_sites`` is a promise of the coordinator: no adapter is made
    of fewer sites' updates. ``secure_aggregation`` hides every single update from the coordinator. ``asynchronous``
    lets a round end before slow sites have answered, and folds in what they send later. ``rerun`` says that the first
    rounds are an earlier recipe's, and that the later ones are made again without a site that withdrew.
    """

    schema_version: Literal[1] = 1
    """The form of this file. 1 is all there is. Change: never; programs write it."""
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 10
    """(rounds) Each site trains, the updates are averaged, and so on. Change: up where validation still rises at the
    end, down for a first try."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Of the first adapter and of every draw in training. Change: to repeat a run with other draws."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """(CPU threads) Left out, each machine takes its own number; equal ones give equal last bits. Change: to one number
    where results must agree to the last bit."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto or bfloat16: in bfloat16 where a machine is not slower with it, else in float32. Change: to float32 where
    runs of unlike machines are compared."""
    backbone: BackboneConfig
    """The frozen model that all sites hold."""
    adapter: AdapterConfig = AdapterConfig()
    """The small weights that train and travel."""
    task: TaskConfig = TaskConfig()
    """What is learned."""
    target: target_config.TargetConfig = _later(target_config.TargetConfig())
    """What a classification answers with; left out, one class. docs/targets.md explains each kind."""
    inputs: inputs_config.InputsConfig = _later(inputs_config.InputsConfig())
    """Columns of the hospital's table that the head sees beside the image; left out, the image alone. docs/tables.md.
    """
    words: words_config.WordsConfig | None = _later(None)
    """Sentences that describe the classes, of models with a text tower (CLIP, SigLIP); left out, a head is learned.
    docs/words.md says when."""
    data: DataContract
    """What every site's images must become."""
    optimiser: OptimiserConfig = OptimiserConfig()
    """Training at a site."""
    aggregation: AggregationConfig = AggregationConfig()
    """How the sites' updates become one adapter."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured, and how often."""
    admission: AdmissionConfig = AdmissionConfig()
    """Bounds that an update must keep, or it is refused."""
    privacy: privacy_config.RecipePrivacy = privacy_config.NONE
    """Differential privacy; docs/privacy.md says what it covers and costs."""
    codec: Name = "fp32"
    """How adapters travel: fp32 whole; fp16, int8 or int4 as coded differences, for 2, 4 or 8 times fewer bytes.
    Change: to int8 where the line is slow."""
    start: Sha256 | None = None
    """Fingerprint of an earlier adapter to go on from; 'fedvfm recipe lock --from' writes it. Change: leave it to
    'fedvfm recipe lock --from'."""
    min_sites: int = _later(1, ge=1, le=10_000)
    """(sites) A promise to the sites: no adapter is made of fewer sites' updates. Change: to what the sites' policies
    ask for."""
    secure_aggregation: secure_config.SecureAggregation | None = _later(None)
    """Left out, the coordinator sees every site's update; with it their sum alone. docs/security/secure-aggregation.md
    says what it covers and costs."""

    personal: RecipePersonal = _later(RecipePersonal())
    """What of the adapter stays at each site; left out, all of it is shared. docs/personal.md says when it helps."""
    unlabelled: unlabelled_config.UnlabelledConfig | None = _later(None)
    """Whether and how hospitals without labels take part; left out, they do not. docs/unequal-hospitals.md."""
    asynchronous: asynchronous_config.Asynchronous | None = _later(None)
    """Rounds that end before slow sites have answered, and take their late updates; left out, a round waits for all
    that it asked. docs/unequal-hospitals.md says when."""
    rerun: Rerun | None = _later(None)
    """Rounds of an earlier recipe that are made again without a site that withdrew; left out in all others. Change:
    never; 'fedvfm server withdraw' writes it."""

    @pydantic.model_validator(mode="after")
    def _begins_before_its_end(self) -> Recipe:
        if self.rerun is not None and self.rerun.after >= self.rounds:
            raise ValueError("rerun.after: the last round that stands comes before the last round of the recipe")
        if self.rerun is not None and self.rerun.after and self.start is None:
            raise ValueError("rerun: 'start' names the adapter of the last round that stands")
        return self

    @property
    def first_round(self) -> int:
        """Number of the first round that is made under this recipe; its adapter is the initial one."""
        return 1 if self.rerun is None else self.rerun.after + 1

    @pydantic.model_validator(mode="after")
    def _answers(self) -> Recipe:
        if len(self.data.class_names) < 2 and self.target.kind != "regression":
            raise ValueError("data.class_names: at least two are needed; target.kind = 'regression' alone takes one")
        return self

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of the canonical JSON of every resolved value; computed once of each recipe, and anew of a copy."""
        # A recipe that starts from nothing, or has no mechanism, is named as before there was such a key. What is left
        # out here has one value for ever, whatever the default of the key; of all other keys see _later.
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


class DecodingLimits(Strict):
    """What decoding one file may take, in a process of its own without the site's keys in its memory.

    What takes more is a fault of that file. Of a volume that is not packed the file itself counts as memory.
    """

    memory_mib: Annotated[int, Field(ge=64, le=2**24)] = 4096
    """(MiB) Memory for decoding one file or volume. Change: up for very large volumes, down on a small machine."""
    seconds: Annotated[int, Field(ge=1, le=86_400)] = 300
    """(s) Computing for decoding one file or volume. Change: up for very large volumes."""


class SourceConfig(Strict):
    """Where samples come from.

    ``unreadable = "skip"`` leaves out cases whose files cannot be read, counted and named, where the source is a
    folder; by default one such case stops everything. ``roots`` are folders outside of ``path`` that links in it may
    lead to, and ``limits`` what decoding a file may take; both where the source is a folder.
    """

    source: Name
    """Where samples come from: folder, or the name of a public data set. Change: to folder for your own images."""
    path: str | None = None
    """(path) The folder with the images, relative to this file or absolute. Change: to where the images lie."""
    unreadable: Literal["stop", "skip"] = "stop"
    """"skip" leaves out cases whose files cannot be read, and says which; not with [privacy]. Change: to skip where
    some files are known to be broken."""
    channels: dict[Name, Annotated[int, Field(ge=0, le=1000)] | Name] = _later({})
    """The recipe's channel = yours: its name in your dataset.json, or the number of its file from 0. A channel that is
    not here is lacking: the recipe must allow it. Change: where your files are other channels than the recipe's."""
    roots: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """(list of paths) Folders outside of path that links in it may lead to; other links that leave it are refused.
    Change: where the data folder holds links into an archive."""
    limits: DecodingLimits = DecodingLimits()
    """What decoding one file may take. Change: where a volume is larger, or the machine smaller, than is usual."""
    options: dict[str, Option] = {}
    """What the source takes besides; docs/site.md lists those of a folder. Change: where the layout is not recognised,
    or the classes have other names."""


class PartitionConfig(Strict):
    """How samples become virtual hospitals, and how each hospital splits its own."""

    kind: Name = "natural"
    """How samples become virtual hospitals: natural (as the data says), iid, dirichlet (unlike in classes), quantity
    (unlike in size), k-shot (few training samples), appearance (each with a scanner's look). Change: to see what a
    method makes of unlike hospitals."""
    sites: Annotated[int, Field(ge=0, le=10_000)] = 0
    """(hospitals) How many virtual hospitals; natural takes the largest, 0 takes all of them. The other kinds need a
    number. Change: up to see how a method scales."""
    include: Annotated[tuple[Name, ...], _names()] = ()
    """Natural sites of the data that take part; empty means all. Change: to leave hospitals out."""
    alpha: Positive = 0.5
    """(Dirichlet's concentration) Of dirichlet and quantity: the smaller, the more unlike the hospitals. Change: to 0.1
    for hospitals that hardly share a class, to 100 for nearly equal ones."""
    shots: Annotated[int, Field(ge=0)] = 0
    """(samples a class) Of k-shot: how many training samples each hospital has. Change: to see how few are enough."""
    train: Annotated[int, Field(ge=0)] = 0
    """(samples) The most a hospital trains on; 0: no limit. Change: down for a quick try."""
    val: Annotated[int, Field(ge=0)] = 0
    """(samples) The most a hospital validates on; 0: no limit. Change: down for a quick try."""
    test: Annotated[int, Field(ge=0)] = 0
    """(samples) The most a hospital is tested on; 0: no limit. Change: down for a quick try; intervals get wider."""
    val_share: Fraction = 0.15
    """(share of the samples) For validation, where the data does not say. Change: up where a hospital's validation
    scores jump."""
    test_share: Fraction = 0.25
    """(share of the samples) For the test, where the data does not say; with val_share below 1. Change: up for narrower
    intervals."""
    options: dict[str, Option] = {}
    """Of appearance: strength, from 0 (no shift). Change: to make the scanners more or less unlike."""
    labelled: dict[Name, Annotated[tuple[Name, ...], Field(min_length=1, strict=False)]] = _later({})
    """Virtual hospital = the classes that it labels; the others are hidden there. Needs recipe.task.partial_labels.
    Change: to try hospitals that label different classes."""
    unlabelled: Annotated[tuple[Name, ...], _names()] = _later(())
    """Virtual hospitals whose labels are hidden in training and validation; they are tested with them. Needs
    recipe.unlabelled. Change: to try what hospitals without labels add."""
    without_table: Annotated[tuple[Name, ...], Field(strict=False)] = _later(())
    """Virtual hospitals that have none of the columns of recipe.inputs. Change: to try hospitals without a table."""
    without_images: Annotated[tuple[Name, ...], _names()] = _later(())
    """Virtual hospitals whose images are hidden, so that rows of recipe.inputs are all they have. Needs
    recipe.inputs.images_missing. Change: to try hospitals without images."""
    lacking: dict[Name, Annotated[tuple[Name, ...], Field(min_length=1, strict=False)]] = _later({})
    """Virtual hospital = the recipe's channels that it lacks; they are black there. Needs optional_channels of the
    recipe. Change: to try hospitals without some sequences."""


class SiteSplit(Strict):
    """How a hospital splits its own samples where its data does not say.

    ``seed`` is the site's own and not the recipe's: a patient who is tested once is never trained on in a later run.
    """

    val_share: Fraction = 0.15
    """(share of the patients) For validation. Change: before the first round only: another split is refused later."""
    test_share: Fraction = 0.25
    """(share of the patients) For the test; with val_share below 1. Change: before the first round only: another split
    is refused later."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Keep it: a patient who is tested once is never trained on later. Change: never after the first round."""

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
    """Whether a personal adapter is made. Left out: a site makes one, an experiment only where local-only is a
    baseline. Change: to false to save its time."""
    rounds: Annotated[int, Field(ge=0, le=10_000)] = 0
    """(rounds) How long it trains on; 0: as many rounds as the recipe has. Change: down to save time; the choice among
    the adapters shows whether it was enough."""
    learning_rate: Positive = 0.5
    """(share of the recipe's) Where its rate begins; it falls to none. Change: down where a site has few patients."""


class SitePersonal(PersonalConfig):
    """The same of a site's own file, for ``fedvfm client adapter personal``.

    ``local_only`` trains an adapter at the site alone too, with as many steps as in the federation, to choose and to
    compare with; ``minutes`` is the time that all of it may take (0: no limit).
    """

    local_only: bool = False
    """Train an adapter here alone too, to choose and to compare with: about as long again. Change: to true to know
    whether joining was worth it."""
    minutes: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """(minutes) The most that all of it may take; 0: no limit. Change: to what the machine can spare."""


class SiteConfig(Strict):
    """The hospital's own file; it never leaves the site.

    ``cache_mib`` bounds what is kept of images in memory; what the frozen blocks compute and does not fit there goes to
    private files in the state folder, at most ``cache_disk_mib``, until the recipe ends.
    """

    schema_version: Literal[1] = 1
    """The form of this file. 1 is all there is. Change: never; programs write it."""
    name: SiteName
    """This hospital's name in the federation, as its invite says it. Change: to the name in your invite."""
    recipe: str | None = None
    """(path) The coordinator's recipe or invite, relative to this file. With it the check knows classes, image size and
    backbone, and makes real training steps. Change: to your invite, before the first check."""
    device: Device = "cpu"
    """All it may compute on: cpu, cuda, cuda:N, mps or auto. With cpu the client sees no GPU. Change: to auto or cuda
    where there is a GPU for it."""
    spare_devices: Annotated[tuple[Device, ...], Field(strict=False, max_length=64)] = ()
    """(list of devices) Used in this order where device is not there, fails the check before a round, or has too little
    memory free for a step; one at a time.
    Change: where the machine has several GPUs."""
    rank: Annotated[int, Field(ge=0, le=MAX_RANK)] = 0
    """LoRA rank of this site, at most the recipe's; 0 takes the recipe's. Change: down where memory is short and the
    recipe's rule allows it."""
    cache_mib: Annotated[int, Field(ge=0)] = 2048
    """(MiB) Memory for prepared images, and for what the frozen part of the model computes. Change: down where memory
    is short, up where images are read again and again."""
    cache_disk_mib: Annotated[int, Field(ge=0)] = 4096
    """(MiB) What does not fit there lies in private files of the state folder until the recipe ends; 0: never. Change:
    to 0 where nothing derived from images may lie on the disk."""
    data: SourceConfig
    """Where this hospital's images are."""
    include: Annotated[tuple[Name, ...], _names()] = ()
    """The natural sites in the data that are this hospital's; empty means all. Change: where one folder holds several
    hospitals."""
    role: Literal["train", "unlabelled"] = "train"
    """unlabelled: this site has images and no labels, and trains on what the round's adapter is sure of; no score comes
    from it. Change: to unlabelled where nobody labels your images and the recipe takes such sites."""
    labelled: Annotated[tuple[Name, ...], _names()] = ()
    """The recipe's classes that are labelled in your images; empty means all. What is not labelled is then no
    background here. The coordinator is told. Change: where you label fewer classes than the recipe has."""
    table: Literal["given", "absent"] = "given"
    """absent: this site has none of the columns that recipe.inputs names, and takes part with its images alone. Change:
    to absent where you have no such table; the coordinator is not told."""
    labels: dict[Name, Name] = {}
    """Your class names = the recipe's; several may become one. Change: where they differ."""
    split: SiteSplit = SiteSplit()
    """How patients are divided into training, validation and test, where the data does not say."""
    limits: LimitsConfig = LimitsConfig()
    """How much of this machine the client takes; read when it starts."""
    batch: batch_config.BatchConfig | None = None
    """Training in jobs of a cluster (Slurm); left out, the client computes on its own machine. docs/sites-it.md says
    how."""
    policy: PolicyConfig = PolicyConfig()
    """What this site accepts; whatever is not named is refused."""
    privacy: privacy_config.Budget | None = None
    """What these images may spend of differential privacy; without it no private round is trained."""
    personal: SitePersonal = SitePersonal()
    """What this site makes of the final adapter for itself."""

    @property
    def without_labels(self) -> bool:
        """Whether it trains without labels."""
        return self.role == unlabelled_config.ROLE

    @pydantic.model_validator(mode="after")
    def _label_nothing(self) -> SiteConfig:
        given = {"labelled": self.labelled, "labels": self.labels}
        wrong = [key for key, value in given.items() if value]
        if self.without_labels and wrong:
            raise ValueError(
                f"role = 'unlabelled' and {' and '.join(wrong)} exclude each other: the first says that nothing is "
                "labelled here. Leave one of them out"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _charge_scores(self) -> SiteConfig:
        if self.policy.metrics_epsilon is not None and (self.privacy is None or self.privacy.unit == "site"):
            raise ValueError(
                "policy.metrics_epsilon: noised scores are charged to a budget: give [privacy] with unit = 'record' or "
                "'patient'"
            )
        return self


class BaselineConfig(Strict):
    """Settings of the baselines that are not those of the recipe.

    Which sites a local-only model is tested at: :func:`fedvfm.simulation.baselines.tested_at`.
    """

    matrix_sites: PositiveInt = 16
    """(sites) At how many sites, its own among them, a local-only model is tested; which ones is drawn from the seed.
    Change: up for the whole matrix, down to save time."""
    unet_learning_rate: Positive = 2e-3
    """Of the baseline unet. Change: where its loss jumps or barely falls."""
    unet_channels: Annotated[tuple[PositiveInt, ...], Field(min_length=2, max_length=6, strict=False)] = (
        16,
        32,
        64,
        128,
    )
    """(channels) Of the baseline unet, level by level. Change: up for larger images."""


class AttackConfig(Strict):
    """Bad sites of a simulation: which they are and what they do (see :mod:`fedvfm.simulation.attacks`)."""

    kind: Name
    """What the bad sites do: sign-flip, scaled, little-is-enough (updates), label-flip, backdoor (training samples), or
    absent. Change: to try a rule against another attack."""
    sites: Annotated[tuple[Name, ...], Field(min_length=1, strict=False)]
    """Which sites are bad. Change: to see how many a rule withstands."""
    options: dict[str, Option] = {}
    """What this attack takes besides; an unknown one is refused with the known. Change: to make it stronger or weaker.
    """


Workers = Annotated[int, Field(ge=1, le=1024)] | Literal["auto"]


class Experiment(Strict):
    """A simulation file: recipe, data, partition, engine and baselines.

    Results with another number of ``threads`` differ in the last bits (left out, see
    :func:`fedvfm.simulation.engines.worker_schedule.threads`).
    """

    schema_version: Literal[1] = 1
    """The form of this file. 1 is all there is. Change: never; programs write it."""
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    """Of the experiment: small letters, digits, dot, dash and underscore. Change: in a copy, so that run folders
    differ."""
    title: str = ""
    """One line for the list of experiments and the report. Change: freely."""
    note: str = ""
    """What a reader of the report must know of the data. Change: freely."""
    engine: Name = "in-process"
    """in-process (quickest), ray, or deployment (real processes over TLS on this machine). Change: to deployment to try
    what real hospitals run."""
    device: Device = "cpu"
    """What it computes on: cpu, cuda, cuda:N, mps or auto. Change: to auto where there is a GPU."""
    baselines: Annotated[tuple[Name, ...], _names()] = ("local-only", "pooled")
    """What the federation is compared with: local-only, pooled, pooled-2x, head-only, leave-one-out, unet, classical,
    majority, zero-shot; with recipe.inputs also image-alone and table-alone. Change: to [] for a quick try."""
    workers: Workers = "auto"
    """(processes) Of the in-process engine: a number, or auto (cores, GPUs and free memory decide). Results are the
    same with any. Change: to 1 where memory is short."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """(CPU threads) Of each process, whatever the recipe says; 0 takes the recipe's, else a share of the cores. Change:
    to repeat another run to the last bit."""
    site_ranks: dict[Name, Annotated[int, Field(ge=1, le=MAX_RANK)]] = {}
    """LoRA rank of single sites, at most the recipe's: site = rank. Change: to see what small machines would do; with
    rule svd or hetlora."""
    site_pace: dict[Name, Positive] = {}
    """(images a minute) How quickly single sites train, for recipe.optimiser.round_minutes: site = pace. The others
    train all they have: no clock is looked at, so that results are the same again. Change: to see what slow or large
    hospitals would do."""
    site_times: dict[Name, Positive] = _later({})
    """(rounds) How long single sites train, on a clock that is only counted, for recipe.asynchronous: site = time. The
    others take 1. Change: to see what slow hospitals would do."""
    cache_mib: Annotated[int, Field(ge=0)] = 2048
    """(MiB) Memory for images and what the frozen part of the model computes, over all processes. Change: down where
    memory is short."""
    cache_disk_mib: Annotated[int, Field(ge=0)] = 4096
    """(MiB) What does not fit there lies in files of the run folder until the run is finished; 0: none. Change: up for
    large data sets, 0 where the disk is small."""
    recipe: Recipe
    """What is trained: see recipe."""
    data: SourceConfig
    """Where the samples come from."""
    partition: PartitionConfig = PartitionConfig()
    """How they become virtual hospitals."""
    server: ServerConfig = ServerConfig()
    """How the rounds are run: see server."""
    baseline: BaselineConfig = BaselineConfig()
    """Settings of the baselines that are not the recipe's."""
    attack: AttackConfig | None = None
    """Bad sites, to see what a rule withstands; a simulation has no other."""
    personal: PersonalConfig = PersonalConfig()
    """What each virtual hospital makes of the final adapter for itself."""

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
    # Names of zones, of kinds and in patterns are none in small letters: the first letter alone is made one.
    said = str(fault["ctx"]["error"]) if fault["type"] == "value_error" else fault["msg"][:1].lower() + fault["msg"][1:]
    # What concerns several tables names its key itself.
    return f"{where} = {shown[:80]}: {said}" if fault["loc"] else said


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
