"""A site: its name, its samples, its device, and what it keeps in memory between messages."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedvfm import errors, seeding
from fedvfm.backbones import base as backbones
from fedvfm.client.gate import held_adapters
from fedvfm.config import privacy, schema
from fedvfm.data import augmentation, transforms
from fedvfm.data import prompts as simulator
from fedvfm.data import sample as samples
from fedvfm.data.partition import virtual_hospitals
from fedvfm.model import adapted_model, feature_cache, precision, sliding_window
from fedvfm.privacy import records
from fedvfm.state import groups, state
from fedvfm.tasks import base as tasks
from fedvfm.tasks import case_classification, case_heads, fusion


@dataclass(frozen=True)
class Example:
    """One sample as the model takes it.

    Attributes:
        sample: which.
        prepared: image (3, h, w) in [0, 1], mask and truth.
        prefix: what the frozen blocks compute of it, with a batch axis of 1; None where it is not kept.
        prompts: drawn from its mask; None where the recipe asks for none.
        view: where it is augmented on the device; ``prepared`` is then what it was made from.
        images: of a case those of its images that were drawn, where the backbone trains; ``prepared`` is then
            :data:`NO_IMAGE`.
        vectors: of a case what the frozen backbone makes of those images. Shapes: (S, D).
        places: of a case the places of those images in it, ascending.
        hidden: whether it is shown without its row of the table. Where it is shown without its image, its sample says
            that there is none.
    """

    sample: samples.Sample
    prepared: transforms.Prepared
    prefix: backbones.Prefix | None
    prompts: simulator.Simulated | None = None
    view: augmentation.View | None = None
    images: tuple[Example, ...] = ()
    vectors: Tensor | None = None
    places: tuple[int, ...] = ()
    hidden: bool = False


NO_IMAGE = transforms.Prepared(np.zeros((3, 1, 1), dtype=np.float32), None, None, None)
"""What stands for the pixels of a case, which has none of its own."""


@dataclass
class Site:
    """One hospital's node.

    Attributes:
        name: the site's name.
        hospital: its samples.
        device: where it computes.
        rank: the LoRA rank it chose, or 0 for the recipe's.
        cache: shared with the other virtual sites of this process.
        ends: when its own terms end what it computes, by the monotonic clock; and with which word.
        simulated: whether it is a virtual hospital: its privacy may be seeded, and protects nobody.
        units: the public number that a private round is made from; 0 for as many as there are. See
            :func:`fedvfm.privacy.events.counted`.
        residuals: what coding its updates lost.
        personal: the arrays that it keeps for itself.
        pace: images a minute that a virtual hospital trains on; 0 for as many as there are.
        least_steps: that a round has here, where its time would be over before.
        least_units: patients that an update is made of here, or nothing was trained.
        pseudo_masks: of a site without labels, sample -> what the round's adapter is sure of, in place of a mask.
        spare_devices: where it computes in a round for which ``device`` has too little memory free.
        gpu_share: of a GPU's memory, the most that it takes.
    """

    name: str
    hospital: virtual_hospitals.Hospital
    device: str = "cpu"
    rank: int = 0
    cache: feature_cache.FeatureCache = field(default_factory=feature_cache.FeatureCache)
    ends: tuple[float, str] = (math.inf, "")
    simulated: bool = False
    units: int = 0
    residuals: held_adapters.Residuals = field(default_factory=held_adapters.Residuals)
    personal: held_adapters.PersonalArrays = field(default_factory=held_adapters.PersonalArrays)
    pace: float = 0.0
    least_steps: int = 1
    least_units: int = 1
    pseudo_masks: Mapping[str, transforms.Mask] | None = None
    spare_devices: tuple[str, ...] = ()
    gpu_share: float = 1.0

    @property
    def without_labels(self) -> bool:
        """Whether it trains without labels."""
        return getattr(self.hospital, "without_labels", False)

    @property
    def labelled(self) -> tuple[str, ...]:
        """Names of the classes that it labels; empty for all."""
        return getattr(self.hospital, "labelled", ())

    @property
    def lacking(self) -> tuple[str, ...]:
        """Names of the recipe's channels that it lacks."""
        return getattr(self.hospital, "lacking", ())

    def recipe(self, recipe: schema.Recipe) -> schema.Recipe:
        """The recipe with this site's own rank; alpha stays, so the scale follows.

        Raises:
            ConfigError: if the rank is over the recipe's.
        """
        return at_rank(recipe, self.rank, self.name)

    def own(
        self, model: adapted_model.AdaptedModel, recipe: str, adapter: state.AdapterState, number: int
    ) -> state.AdapterState:
        """The adapter as this site trains and scores it: with its personal arrays of the last round before ``number``.

        Under a kind whose arrays train *beside* it (:mod:`fedvfm.state.groups`), it is the adapter as it came.

        Args:
            model: of the recipe, in the site's rank.
            recipe: hash of the recipe as it came.
            adapter: as it came.
            number: of the round that would train next.

        Raises:
            CheckpointError: if its personal arrays are damaged, or not of this model.
        """
        if not model.personal or model.recipe.personal.kind in groups.BESIDE:
            return adapter
        return self.beside(model, recipe, adapter, number)

    def beside(
        self, model: adapted_model.AdaptedModel, recipe: str, adapter: state.AdapterState, number: int
    ) -> state.AdapterState:
        """The adapter with all that this site keeps for itself, which under kinds *beside* has no part in its updates.

        Args:
            model: of the recipe, in the site's rank.
            recipe: hash of the recipe as it came.
            adapter: as it came.
            number: of the round that would train next.

        Raises:
            CheckpointError: as above.
        """
        if model.recipe.personal.kind == groups.NONE:
            return adapter
        kept = self.personal.before(recipe, self.name, number)
        try:
            return groups.joined(adapter, kept, model.manifest, model.recipe.personal.kind)
        except ValueError as error:
            raise errors.CheckpointError(
                f"site '{self.name}': the personal arrays of recipe {recipe[:12]} are not this model's: {error}. "
                "Restore them from a backup, or bring back the rank that the recipe began with here"
            ) from None

    def split(self, name: str) -> tuple[samples.Sample, ...]:
        """The samples of a split: "train", "val" or "test"."""
        splits = {"train": self.hospital.train, "val": self.hospital.val, "test": self.hospital.test}
        if name not in splits:
            raise errors.ProtocolError(f"split '{name}' is none of train, val, test")
        return splits[name]

    def example(
        self, model: adapted_model.AdaptedModel, sample: samples.Sample, view: int, words: Sequence[str | int] = ()
    ) -> Example:
        """One training sample as ``model`` takes it.

        Args:
            model: decides contract, classes and how much of the backbone is frozen.
            sample: which.
            view: number of a fixed view, or -1 for an augmentation drawn afresh under ``words``.
            words: key of the draw.

        Of a case at most as many images as the task takes in a step, drawn under ``words`` too, as is whether its row
        of the table is hidden, or its image, of which nothing is let through then.
        """
        example = self._case(model, sample, view, words) if sample.bag else self._image(model, sample, view, words)
        row, image = self._hides(model.recipe, sample, words)
        return dataclasses.replace(example, hidden=row, sample=dataclasses.replace(sample, without_image=image))

    def _image(
        self, model: adapted_model.AdaptedModel, sample: samples.Sample, view: int, words: Sequence[str | int]
    ) -> Example:
        if view == -1 and augments_there(model):
            base = self._base(model, sample)
            rng = seeding.stream(model.recipe.seed, "augment", self._word(model.recipe, sample), *words)
            made = augmentation.training_view(base, model.recipe.data, rng, model.device)
            return Example(sample, base, None, view=made)
        if view == -1:
            fresh = self._augmented(model, sample, words)
            return Example(sample, fresh, None, self._prompts(model, sample, fresh.mask, words))
        if self.pseudo_masks is not None:  # which are of this round alone; the image of the view is the same
            fresh = self._augmented(model, sample, ("view", view))
            return Example(sample, fresh, self._prefix(model, fresh.image))
        # Arms of a run share the cache, and under a mechanism the same view is drawn otherwise.
        key = (*_key(model, sample), self._word(model.recipe, sample), view)
        prepared = self._kept((*key, "image"), lambda: self._augmented(model, sample, ("view", view)))
        drawn = self._prompts(model, sample, prepared.mask, ("view", view))
        return Example(sample, prepared, self._prefix(model, prepared.image), drawn)

    def _case(
        self, model: adapted_model.AdaptedModel, sample: samples.Sample, view: int, words: Sequence[str | int]
    ) -> Example:
        task = model.task
        if not isinstance(task, case_classification.CaseClassification):
            raise ValueError(f"task '{model.recipe.task.kind}' takes no cases")
        rng = seeding.stream(model.recipe.seed, "parts", self._word(model.recipe, sample), *words)
        places = task.drawn(len(sample.images), rng)
        chosen = [sample.images[at] for at in places]
        if not model.frozen_whole:
            images = tuple(self._image(model, image, view, words) for image in chosen)
            return Example(sample, NO_IMAGE, None, images=images, places=places)
        if view == -1:  # drawn afresh: of those that are not chosen nothing is computed
            drawn = self._computed(model, [(image, words) for image in chosen])
            return Example(sample, NO_IMAGE, None, vectors=drawn, places=places)
        kept = self.vectors(model, sample, view)[list(places)]
        return Example(sample, NO_IMAGE, None, vectors=kept, places=places)

    def _hides(self, recipe: schema.Recipe, sample: samples.Sample, words: Sequence[str | int]) -> tuple[bool, bool]:
        """Whether a training step shows a sample without its row, and without its image.

        Of its own draw, whoever is beside it; and never without both.
        """
        share = recipe.inputs.dropout
        if not (sample.inputs and share) or sample.without_image:
            return False, sample.without_image
        drawn = seeding.stream(recipe.seed, "row hidden", self._word(recipe, sample), *words).random()
        return bool(drawn < share), recipe.inputs.images_missing and bool(share <= drawn < 2 * share)

    def vectors(self, model: adapted_model.AdaptedModel, sample: samples.Sample, view: int | None = None) -> Tensor:
        """What the backbone makes of every image of a case, without gradients.

        Where it is frozen, the vectors are kept for as long as there is room, in half precision; they have the same
        bits then as when they are computed anew, since half precision is what is computed.

        Args:
            model: the model.
            sample: a case.
            view: number of a fixed view; None for the images as they are.

        Shapes: (S, D), float32.
        """
        words = None if view is None else ("view", view)
        pairs = [(image, words) for image in sample.images]
        if not model.frozen_whole:
            return self._computed(model, pairs)
        key = (*_key(model, sample), self._word(model.recipe, sample), view, "vectors", *self._frozen(model))
        kept = self.cache.image(key, lambda vectors: vectors.nbytes, lambda: self._computed(model, pairs).half())
        result: Tensor = kept.float()
        return result

    @torch.no_grad()
    def _computed(
        self, model: adapted_model.AdaptedModel, pairs: Sequence[tuple[samples.Sample, Sequence[str | int] | None]]
    ) -> Tensor:
        """Vectors of images, so many at a time as evaluation computes; each with the words of its augmentation."""
        vectors, batch = [], sliding_window.batch_of(model)
        for start in range(0, len(pairs), batch):
            shown = []
            for image, words in pairs[start : start + batch]:
                # Where vectors are kept, nothing is read twice.
                prepared = self._evaluated(model, image) if model.frozen_whole else self.whole(model, image)
                if words is not None:
                    rng = seeding.stream(model.recipe.seed, "augment", self._word(model.recipe, image), *words)
                    prepared = transforms.training_view(prepared, model.recipe.data, rng)
                prefix = None if model.frozen_whole else self._prefix(model, prepared.image)
                shown.append(Example(image, prepared, prefix))
            pixels, prefix = _pixels(shown, model)
            vectors.append(model.vectors(pixels, prefix).cpu())
        return torch.cat(vectors)

    def whole(self, model: adapted_model.AdaptedModel, sample: samples.Sample) -> transforms.Prepared:
        """One sample for evaluation: the whole image, not augmented."""
        return self._kept((*_key(model, sample), "image"), lambda: self._evaluated(model, sample))

    def tile(
        self,
        model: adapted_model.AdaptedModel,
        sample: samples.Sample,
        image: transforms.Image,
        corner: tuple[int, ...],
        mask: transforms.Mask | None = None,
    ) -> Example:
        """A window of an image in evaluation.

        Shapes: image (3, h, w) and mask (h, w), cut from the whole ones at ``corner``; prompts are drawn from the mask.
        """
        prepared = transforms.Prepared(image, None, None, None)
        return Example(
            sample, prepared, self._prefix(model, image), self._prompts(model, sample, mask, ("tile", *corner))
        )

    def _prompts(
        self,
        model: adapted_model.AdaptedModel,
        sample: samples.Sample,
        mask: transforms.Mask | None,
        words: Sequence[str | int],
    ) -> simulator.Simulated | None:
        """The same for a sample wherever and whenever it is asked for: arms and rounds see the same prompts."""
        settings = model.recipe.task
        if not settings.oracle:
            return None
        with self._naming(sample):
            rng = seeding.stream(model.recipe.seed, "prompts", self._word(model.recipe, sample), *words)
            return simulator.draw(mask, len(model.recipe.data.class_names), settings, rng)

    def _kept(self, key: Hashable, make: Callable[[], transforms.Prepared]) -> transforms.Prepared:
        return _unpack(self.cache.image(key, _image_bytes, lambda: _pack(make())))

    @contextlib.contextmanager
    def _naming(self, sample: samples.Sample) -> Iterator[None]:
        """Say of a fault which site and sample it is; once, so nothing below says it too."""
        try:
            yield
        except errors.DataError as error:
            home = getattr(getattr(self.hospital, "source", None), "home", None)
            name = home(sample) if home is not None else self.name  # of the site that pools all, whose sample it is
            raise error.at(f"site '{name}', sample '{sample.id}'") from error

    def _evaluated(self, model: adapted_model.AdaptedModel, sample: samples.Sample) -> transforms.Prepared:
        contract, classes = model.recipe.data, len(model.recipe.data.class_names)
        if sample.without_image and model.recipe.inputs.images_missing:
            return transforms.blank(contract)  # of which the fusion lets nothing through
        with self._naming(sample):
            return transforms.prepare(self.hospital.read(sample), contract, classes, multiple=model.backbone.patch)

    def _augmented(
        self, model: adapted_model.AdaptedModel, sample: samples.Sample, words: Sequence[str | int]
    ) -> transforms.Prepared:
        rng = seeding.stream(model.recipe.seed, "augment", self._word(model.recipe, sample), *words)
        return transforms.training_view(self._base(model, sample), model.recipe.data, rng)

    def _base(self, model: adapted_model.AdaptedModel, sample: samples.Sample) -> transforms.Prepared:
        """The image that views are made of, with its mask or what stands for one; what that lacks nobody is sure of."""
        whole = self.whole(model, sample)
        if self.pseudo_masks is None:
            return whole
        mask = self.pseudo_masks.get(sample.id)
        mask = np.full(whole.image.shape[1:], tasks.UNSURE, dtype=np.int64) if mask is None else mask
        return dataclasses.replace(whole, mask=mask)

    def _word(self, recipe: schema.Recipe, sample: samples.Sample) -> str:
        """What draws for a sample are keyed by.

        Under a mechanism it is a name that stays: a number shifts when a file is added, and one image more would give
        every later one another view.
        """
        if recipe.privacy.mechanism == privacy.NO_MECHANISM:
            return sample.id
        return records.stable(sample, getattr(self.hospital, "source", None))[0]

    def _prefix(self, model: adapted_model.AdaptedModel, image: transforms.Image) -> backbones.Prefix | None:
        """Kept only where it saves work: some blocks are frozen and the cache may hold something."""
        if model.frozen_blocks == 0 or not self.cache.enabled:
            return None
        stop, taps = model.frozen_blocks, tuple(tap for tap in model.taps if tap <= model.frozen_blocks)

        def compute() -> backbones.Prefix:
            pixels = torch.from_numpy(transforms.normalise(image[None], model.recipe.data)).to(self.device)
            dtype = torch.bfloat16 if model.precision == precision.BFLOAT16 else torch.float32
            found = model.frozen_prefix(pixels)
            taken = {tap: tokens.to(dtype) for tap, tokens in found.taken.items()}
            hidden = taken[stop] if stop in taken else found.hidden.to(dtype)
            return backbones.Prefix(found.stop, hidden, taken)

        return self.cache.features(image, (*self._frozen(model), stop, taps), compute)

    def _frozen(self, model: adapted_model.AdaptedModel) -> tuple[Hashable, ...]:
        """All that what frozen blocks make of an image depends on, beside the image and their number."""
        recipe, backbone = model.recipe, model.backbone
        # A backbone from scratch is told by its name, options and seed.
        frozen = (backbone.sha256, backbone.config_sha256, recipe.backbone.model_dump_json(), recipe.seed)
        slices = (backbone.slices,) if backbone.slices > 1 else ()
        return (*frozen, *slices, recipe.data.mean, recipe.data.std, model.precision, self.device.partition(":")[0])


def augments_there(model: adapted_model.AdaptedModel) -> bool:
    """Whether images are augmented on the device: on a GPU, unless prompts must be drawn from the augmented mask.

    Volumes are not: pieces are cut from them.
    """
    recipe = model.recipe
    there = model.device != "cpu" and not recipe.data.depth
    return there and not recipe.task.oracle and augmentation.known(recipe.data.augment)


def at_rank(recipe: schema.Recipe, rank: int, site: str) -> schema.Recipe:
    """The recipe with the rank a site chose (0: the recipe's); alpha stays, so the scale follows.

    Raises:
        ConfigError: if the rank is over the recipe's.
    """
    own = rank or recipe.adapter.rank
    if own == recipe.adapter.rank or recipe.adapter.kind != "lora":
        return recipe
    if own > recipe.adapter.rank:
        raise errors.ConfigError(f"site '{site}'", [f"rank {own} is over the recipe's {recipe.adapter.rank}"])
    alpha = recipe.adapter.scale * recipe.adapter.rank
    return recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"rank": own, "alpha": alpha})})


def _key(model: adapted_model.AdaptedModel, sample: samples.Sample) -> tuple[Hashable, ...]:
    return (sample.id, model.recipe.data, model.backbone.patch, model.recipe.seed)


def _pack(prepared: transforms.Prepared) -> transforms.Prepared:
    """A smaller form to keep: masks in a byte a pixel (there are at most 256 classes), grey images in one channel."""
    mask, truth = (None if array is None else array.astype(np.uint8) for array in (prepared.mask, prepared.truth))
    image = prepared.image
    grey = bool((image[0] == image[1]).all() and (image[0] == image[2]).all())
    kept = image[:1].copy() if grey else image
    parts = (prepared.spacing, prepared.part, prepared.absent)
    return transforms.Prepared(kept, mask, truth, *parts)  # type: ignore[arg-type]


def _unpack(packed: transforms.Prepared) -> transforms.Prepared:
    image = transforms.in_three(packed.image) if len(packed.image) == 1 else packed.image
    mask, truth = (None if array is None else array.astype(np.int64) for array in (packed.mask, packed.truth))
    return transforms.Prepared(image, mask, truth, packed.spacing, packed.part, packed.absent)


def kept_bytes(prepared: transforms.Prepared) -> int:
    """Bytes that a prepared image takes in the cache."""
    return _image_bytes(_pack(prepared))


def _image_bytes(prepared: transforms.Prepared) -> int:
    arrays = (prepared.image, prepared.mask, prepared.truth)
    return sum(array.nbytes for array in arrays if array is not None)


Taken = tuple[
    Tensor, backbones.Prefix | None, tuple[backbones.Prompts, ...] | None, case_heads.Parts | None, Tensor | None
]
"""What the model takes: pixels, prefixes, prompts, of cases whose images they are, and rows of the table."""


def collate(examples: Sequence[Example], model: adapted_model.AdaptedModel) -> Taken:
    """What the model takes: normalised pixels (B, 3, h, w), the prefixes and the prompts joined along the batch axis.

    Prefixes only if every example has one; prompts are one for each foreground class. Of cases the pixels are those of
    all their images, or none where their vectors are known.
    """
    table = rows([None if example.hidden else example.sample for example in examples], model)
    places = tuple(example.places for example in examples)
    vectors = [example.vectors for example in examples if example.vectors is not None]
    if vectors:
        joined = torch.cat(vectors).to(model.device)
        return torch.empty(0, device=model.device), None, None, case_heads.Parts(places, joined), table
    if any(places):
        pixels, prefix = _pixels([image for example in examples for image in example.images], model)
        return pixels, prefix, None, case_heads.Parts(places), table
    pixels, prefix = _pixels(examples, model)
    prompts = _joined_prompts([example.prompts for example in examples if example.prompts is not None], model.device)
    return pixels, prefix, prompts, None, table


def rows(shown: Sequence[samples.Sample | None], model: adapted_model.AdaptedModel) -> Tensor | None:
    """Rows of the table as :mod:`fedvfm.tasks.fusion` takes them; None where the recipe takes no table.

    Args:
        shown: samples; None for one that is shown without its row.
        model: of the recipe.

    Shapes: (B, C), where images may be missing (B, C + 1).
    """
    imageless = [sample is not None and sample.without_image for sample in shown]
    own = [() if sample is None else sample.inputs for sample in shown]
    table = fusion.stacked(own, model.recipe.inputs, imageless)
    return None if table is None else table.to(model.device)


def _pixels(examples: Sequence[Example], model: adapted_model.AdaptedModel) -> tuple[Tensor, backbones.Prefix | None]:
    """Normalised pixels of images, and their prefixes where every one has one."""
    views = [example.view.image for example in examples if example.view is not None]
    if views:
        return augmentation.normalise(torch.stack(views), model.recipe.data), None
    images = np.stack([example.prepared.image for example in examples])
    pixels = torch.from_numpy(transforms.normalise(images, model.recipe.data)).to(model.device)
    prefixes = [example.prefix for example in examples if example.prefix is not None]
    if len(prefixes) < len(examples):
        return pixels, None
    return pixels, feature_cache.joined(prefixes, model.device)


def targets(examples: Sequence[Example], model: adapted_model.AdaptedModel) -> Tensor:
    """What each example's loss is computed against, on the device. Shapes: (B, h, w) in segmentation, (B,) else."""
    made = []
    for one in examples:
        found = model.task.target(one.prepared, one.sample.truth)
        turned = one.view.mask if one.view is not None and found is one.prepared.mask else None
        made.append(torch.as_tensor(found) if turned is None else turned)
    return torch.stack(made).to(model.device)


def known(sample: samples.Sample) -> tuple[Sequence[int], ...]:
    """Which classes are labelled in a sample, as the last argument of a task's score; nothing where all are."""
    return (sample.labelled,) if sample.labelled else ()


def labelled(examples: Sequence[Example], model: adapted_model.AdaptedModel) -> tuple[Tensor, ...]:
    """Which classes are labelled in each example, as the last argument of a task's loss; nothing where all are.

    Shapes: (B, K).
    """
    if not any(example.sample.labelled for example in examples):
        return ()
    rows = torch.zeros(len(examples), len(model.recipe.data.class_names), dtype=torch.bool)
    for row, example in zip(rows, examples, strict=True):
        row[list(example.sample.labelled) or slice(None)] = True
    return (rows.to(model.device),)


def _joined_prompts(drawn: Sequence[simulator.Simulated], device: str) -> tuple[backbones.Prompts, ...] | None:
    if not drawn:
        return None
    boxes = [one.boxes for one in drawn if one.boxes is not None]
    points = [one.points for one in drawn if one.points is not None]
    joined: list[Tensor | None] = [
        torch.from_numpy(np.stack(arrays)).to(device) if arrays else None
        for arrays in (points, boxes, [one.present for one in drawn])
    ]
    number = len(drawn[0].present)
    rows = [[None if whole is None else whole[:, index] for whole in joined] for index in range(number)]
    return tuple(backbones.Prompts(own, None, box, present) for own, box, present in rows)
