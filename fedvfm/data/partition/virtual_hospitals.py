"""Virtual hospitals: a partition with a name, its split into train, val and test, and its scanner's appearance."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors, registry, seeding
from fedvfm.config import schema
from fedvfm.data import bags, channels, defect, partial_labels, unlabelled
from fedvfm.data import sample as data
from fedvfm.data.partition import appearance as appearances
from fedvfm.data.partition import partitioners
from fedvfm.data.partition import splits as splitting

POOLED = "pooled"
RESERVED = (POOLED, "evaluation.json")
"""Names no site may have: that of all sites together, and that of a file which stands where sites have folders."""

SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")
OPTIONS = {kind: ("strength",) if kind == "appearance" else () for kind in (*partitioners.NEEDS_SITES, "natural")}
"""Options by kind; a registered kind checks its own."""


@dataclass(frozen=True)
class Hospital:
    """One virtual hospital.

    Attributes:
        name: the site's name.
        source: where its pixels come from; several hospitals may share one.
        train, val, test: disjoint in samples and, where known, in patients. ``val`` may be empty.
        appearance: what its scanner does to every image, or None.
        seed: the run's seed; noise of a sample is drawn from it, the site's name and the sample's id.
        notes: what a reader of the results must know (classes that are missing, samples left out).
        labelled: names of the classes that are labelled here; empty for all. All its samples say so too.
        lacking: names of the recipe's channels that are not here, as all its images say.
        without_labels: whether nothing is labelled in ``train``, and ``val`` is empty.
    """

    name: str
    source: data.Source
    train: tuple[data.Sample, ...]
    val: tuple[data.Sample, ...]
    test: tuple[data.Sample, ...]
    appearance: appearances.Appearance | None = None
    seed: int = 0
    notes: tuple[str, ...] = ()
    labelled: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    without_labels: bool = False

    @property
    def splits(self) -> dict[str, tuple[data.Sample, ...]]:
        """The samples by the name of their split."""
        return {"train": self.train, "val": self.val, "test": self.test}

    def read(self, sample: data.Sample) -> data.Pixels:
        """Read one sample as this hospital's scanner shows it: the same bits every time.

        Raises:
            DataError: naming the file and the remedy, and for a sample without an image.
        """
        if sample.without_image:
            raise defect.IMAGE_NEEDED.error(f"'{sample.id}' has no image, and one is read; leave it out")
        pixels = self.source.read(sample)
        if self.appearance is None:
            return pixels
        rng = seeding.stream(self.seed, self.name, sample.id, "appearance")
        if sample.whole:  # a scanner's field and noise are of slices
            slices = [self.appearance.apply(pixels.image[:, at], rng) for at in range(pixels.image.shape[1])]
            return dataclasses.replace(pixels, image=np.stack(slices, axis=1))
        return dataclasses.replace(pixels, image=self.appearance.apply(pixels.image, rng))


class Pooled:
    """The source of all hospitals together; each sample is read through its own hospital's appearance."""

    def __init__(self, hospitals: Sequence[Hospital]) -> None:
        self._hospitals = tuple(hospitals)
        self._home: dict[str, Hospital] = {}
        for hospital in self._hospitals:
            for one in (*_all(hospital), *bags.images_of(_all(hospital))):
                other = self._home.setdefault(one.id, hospital)
                if other is not hospital:
                    raise defect.NAME_TWICE.error(
                        f"sample '{one.id}' is at the sites '{other.name}' and '{hospital.name}'; ids must be unique"
                    )

    @property
    def info(self) -> data.SourceInfo:
        """That of the first hospital's source."""
        return self._hospitals[0].source.info

    def samples(self) -> Sequence[data.Sample]:
        """The samples of every hospital, site by site."""
        return tuple(one for hospital in self._hospitals for one in _all(hospital))

    def home(self, sample: data.Sample) -> str:
        """The name of a sample's own hospital."""
        return self._home[sample.id].name

    def read(self, sample: data.Sample) -> data.Pixels:
        """Read a sample as its own hospital does.

        Raises:
            DataError: if no hospital has it, or its file is unreadable.
        """
        if sample.id not in self._home:
            raise defect.NOT_FOUND.error(
                f"sample '{sample.id}' is at none of the sites {', '.join(one.name for one in self._hospitals)}"
            )
        return self._home[sample.id].read(sample)


def _all(hospital: Hospital) -> Iterable[data.Sample]:
    return (one for split in hospital.splits.values() for one in split)


def pooled(hospitals: Sequence[Hospital]) -> Hospital:
    """One hospital named ``pooled`` with the splits of all, each sample still read through its own scanner.

    Images without labels are not trained on: where all lie in one place, labels are what is learned from.

    Raises:
        DataError: if there is no hospital, or two hold a sample of the same id.
    """
    if not hospitals:
        raise defect.NO_SAMPLES.error("no hospitals to pool; the experiment needs at least one site")
    joined = {
        split: tuple(
            one
            for hospital in hospitals
            if split == "test" or not hospital.without_labels
            for one in hospital.splits[split]
        )
        for split in splitting.SPLITS
    }
    return Hospital(POOLED, Pooled(hospitals), joined["train"], joined["val"], joined["test"], seed=hospitals[0].seed)


def faults(partition: schema.PartitionConfig) -> list[str]:
    """What is wrong with a partition before any data is seen, one sentence each, for a configuration's joined list."""
    if partition.kind not in partitioners.TABLE:
        return ["partition.kind: " + partitioners.TABLE.fault(partition.kind)]
    found = []
    known = list(OPTIONS.get(partition.kind, partition.options))
    for key in partition.options:
        if key not in known:
            names = f"{', '.join(known) or 'none'}{registry.nearest(key, known)}"
            found.append(f"partition.options.{key}: unknown option of '{partition.kind}'; known: {names}")
    if partition.kind == "appearance" and _strength(partition) is None:
        found.append(
            f"partition.options.strength = {partition.options['strength']!r}: a number from 0 (no shift) is needed"
        )
    if partition.kind in partitioners.NEEDS_SITES and partition.sites < 1:
        found.append(f"partition.sites: set the number of virtual hospitals for partition kind '{partition.kind}'")
    if partition.kind == "k-shot" and partition.shots < 1:
        found.append("partition.shots: partition kind 'k-shot' needs the number of training samples a class")
    if partition.val_share + partition.test_share >= 1.0:
        total = partition.val_share + partition.test_share
        found.append(
            f"partition.val_share + partition.test_share = {total:g}: must stay below 1, or nothing is left to train on"
        )
    return found


def _strength(partition: schema.PartitionConfig) -> float | None:
    """How strong the scanners differ, 1 where not given; None where it is no usable number."""
    given = partition.options.get("strength", 1.0)
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < math.inf:
        return None
    return float(given)


def make_hospitals(source: data.Source, partition: schema.PartitionConfig, seed: int) -> list[Hospital]:
    """Divide the samples of ``source`` into virtual hospitals, sorted by name. No pixels are read.

    Natural sites keep their names; the others are called ``hospital-1`` and so on. Draws depend on the seed and the
    site's name only.

    Raises:
        ConfigError: if the partition's settings are wrong.
        PartitionError: if the samples cannot be divided so, or a site has nothing to train or test on.
    """
    wrong = faults(partition)
    if wrong:
        raise errors.ConfigError("partition", wrong)
    chosen = _included(source, partition)
    rows = _rows(chosen)
    divide = partitioners.TABLE.get(partition.kind)
    parts = divide(rows, partition.sites, seeding.stream(seed, "partition", partition.kind), partition)
    names = _names(chosen, parts, partition)
    _check_groups(chosen, parts, names)
    made = [
        _hospital(name, source, [chosen[i] for i in part], partition, seed)
        for name, part in zip(names, parts, strict=True)
    ]
    _check_classes(made)
    return sorted(made, key=lambda hospital: hospital.name)


def without_labels(
    hospitals: Sequence[Hospital], partition: schema.PartitionConfig, recipe: schema.Recipe
) -> list[Hospital]:
    """The hospitals as ``partition.unlabelled`` says: these have no labels but for their test.

    Raises:
        ConfigError: listing every name that is none, and if the recipe takes no such hospital, or no other is left.
    """
    names, chosen = [hospital.name for hospital in hospitals], partition.unlabelled
    wrong = _unknown("unlabelled", chosen, hospitals)
    wrong += [
        f"partition.unlabelled: '{name}' is in partition.labelled too; leave it out of one of them"
        for name in chosen
        if name in partition.labelled
    ]
    if chosen:
        wrong += [f"partition.unlabelled: {fault}" for fault in unlabelled.faults(recipe)]
        nobody = unlabelled.nobody([name in chosen for name in names])
        wrong += [f"partition.unlabelled: {nobody}"] if nobody else []
    if wrong:
        raise errors.ConfigError("partition", wrong)
    return [_labelless(each) if each.name in chosen else each for each in hospitals]


def _labelless(hospital: Hospital) -> Hospital:
    kept = {image.id for image in (*hospital.test, *bags.images_of(hospital.test))}
    note = (
        f"site '{hospital.name}' has no labels to train or validate with; its test keeps them, which a real hospital "
        "of that kind would not have. It has no local-only and no personal adapter: their means are of fewer sites"
    )
    return dataclasses.replace(
        hospital,
        source=unlabelled.Unlabelled(hospital.source, kept),
        train=tuple(map(unlabelled.bare, hospital.train)),
        val=(),
        notes=(*hospital.notes, note),
        labelled=(),
        without_labels=True,
    )


def _unknown(key: str, chosen: Sequence[str], hospitals: Sequence[Hospital]) -> list[str]:
    """A fault for each name of ``partition.KEY`` that no hospital has."""
    names = [hospital.name for hospital in hospitals]
    return [
        f"partition.{key}: no such hospital '{name}'{registry.nearest(name, names)}"
        for name in chosen
        if name not in names
    ]


def without_table(
    hospitals: Sequence[Hospital], partition: schema.PartitionConfig, recipe: schema.Recipe
) -> list[Hospital]:
    """The hospitals as ``partition.without_table`` says: no sample of these has a row of ``recipe.inputs``.

    Raises:
        ConfigError: listing every name that is none, and if the recipe takes no table.
    """
    wrong = _unknown("without_table", partition.without_table, hospitals)
    if partition.without_table and not recipe.inputs.columns:
        wrong.append("partition.without_table: the recipe takes no table (recipe.inputs); leave it out")
    if wrong:
        raise errors.ConfigError("partition", wrong)
    return [_tableless(each) if each.name in partition.without_table else each for each in hospitals]


def _tableless(hospital: Hospital) -> Hospital:
    def rowless(sample: data.Sample) -> data.Sample:
        return dataclasses.replace(sample, inputs=(), images=tuple(map(rowless, sample.images)))

    kept = {
        split: tuple(rowless(sample) for sample in part if not sample.without_image)
        for split, part in hospital.splits.items()
    }
    return _rest(hospital, kept, lambda sample: sample.without_image, "without an image and, here, without a row")


def without_images(
    hospitals: Sequence[Hospital], partition: schema.PartitionConfig, recipe: schema.Recipe
) -> list[Hospital]:
    """The hospitals as ``partition.without_images`` says: they have no image, and what has no row is left out.

    Raises:
        ConfigError: listing every name that is none, and if the recipe takes no such sample.
        PartitionError: if a hospital has nothing left to train or to test on.
    """
    wrong = _unknown("without_images", partition.without_images, hospitals)
    wrong += [
        f"partition.without_images: '{name}' is in partition.without_table too, and would have nothing; leave it out "
        "of one of them"
        for name in partition.without_images
        if name in partition.without_table
    ]
    if partition.without_images and not recipe.inputs.images_missing:
        wrong.append(
            "partition.without_images: the recipe takes no case without an image; set recipe.inputs.images_missing = "
            "true, or leave it out"
        )
    if wrong:
        raise errors.ConfigError("partition", wrong)
    return [_imageless(each) if each.name in partition.without_images else each for each in hospitals]


def _imageless(hospital: Hospital) -> Hospital:
    def hidden(sample: data.Sample) -> data.Sample:
        images = tuple(dataclasses.replace(image, without_image=True) for image in sample.images[:1])
        return dataclasses.replace(sample, part=None, images=images, without_image=True)

    kept = {}
    for split, part in hospital.splits.items():
        units = dict[str, data.Sample]()  # of a volume whose slices are samples one is left: its row is said once
        for sample in part:
            if sample.inputs:
                units.setdefault(sample.unit, hidden(sample))
        kept[split] = tuple(units.values())
    return _rest(hospital, kept, lambda sample: not sample.inputs, "without a row and, here, without an image")


def _rest(
    hospital: Hospital, kept: Mapping[str, tuple[data.Sample, ...]], empty: Callable[[data.Sample], bool], why: str
) -> Hospital:
    """The hospital with the samples that are left, and a note on how many are ``empty``.

    Raises:
        PartitionError: if a hospital has nothing left to train or to test on.
    """
    _check_needed(hospital.name, hospital.splits, kept)
    gone = sum(map(empty, _all(hospital)))
    note = (f"site '{hospital.name}': {gone} samples are left out, {why}",) if gone else ()
    notes = (*hospital.notes, *note)
    return dataclasses.replace(hospital, train=kept["train"], val=kept["val"], test=kept["test"], notes=notes)


def without_channels(
    hospitals: Sequence[Hospital], partition: schema.PartitionConfig, contract: schema.DataContract
) -> list[Hospital]:
    """The hospitals as ``partition.lacking`` says: these channels are black there.

    Raises:
        ConfigError: listing every name that is none, and channels that the recipe needs or every hospital lacks.
    """
    names = [hospital.name for hospital in hospitals]
    wrong = [
        f"partition.lacking.{name}: no such hospital{registry.nearest(name, names)}"
        for name in partition.lacking
        if name not in names
    ]
    wrong += [
        f"partition.lacking.{name}: {fault}"
        for name, lacked in partition.lacking.items()
        for fault in channels.lacking_faults(lacked, contract)
    ]
    nobody = channels.nowhere(contract, {name: partition.lacking.get(name, ()) for name in names})
    if wrong or nobody:
        raise errors.ConfigError("partition", wrong or [f"partition.lacking: {nobody}"])
    return [_without(hospital, partition.lacking.get(hospital.name, ()), contract) for hospital in hospitals]


def _without(hospital: Hospital, names: Sequence[str], contract: schema.DataContract) -> Hospital:
    if not names:
        return hospital
    numbers = [contract.channels.index(name) for name in names]
    note = f"site '{hospital.name}' lacks channel {', '.join(names)}: it is black there"
    source, notes = channels.Lacking(hospital.source, numbers), (*hospital.notes, note)
    return dataclasses.replace(hospital, source=source, notes=notes, lacking=tuple(names))


def partly_labelled(
    hospitals: Sequence[Hospital], partition: schema.PartitionConfig, recipe: schema.Recipe
) -> list[Hospital]:
    """The hospitals as ``partition.labelled`` says: of the other classes nothing is labelled there.

    Images of a class that a hospital does not label are left out, in segmentation their pixels count as not labelled.

    Raises:
        ConfigError: listing every name that is none, and classes that no hospital labels.
        PartitionError: if a hospital has nothing left to train or to test on.
    """
    names = {hospital.name: partition.labelled.get(hospital.name, ()) for hospital in hospitals}
    wrong = [
        f"partition.labelled.{name}: no such hospital{registry.nearest(name, list(names))}"
        for name in partition.labelled
        if name not in names
    ]
    for name, classes in names.items():
        if classes:
            wrong += [f"partition.labelled.{name}: {fault}" for fault in partial_labels.faults(classes, recipe)]
    if not wrong and partition.labelled:
        nobody = partial_labels.said(recipe, names)
        wrong += [f"partition.labelled: {nobody}"] if nobody else []
    if wrong:
        raise errors.ConfigError("partition", wrong)
    return [_partly(hospital, names[hospital.name], recipe) for hospital in hospitals]


def _partly(hospital: Hospital, names: Sequence[str], recipe: schema.Recipe) -> Hospital:
    source = partial_labels.declared(hospital.source, names, recipe)
    if not isinstance(source, partial_labels.PartlyLabelled):
        return hospital
    kept = {
        split: tuple(source.marked(sample) for sample in part if sample.label is None or sample.label in source.numbers)
        for split, part in hospital.splits.items()
    }
    _check_needed(hospital.name, hospital.splits, kept)
    gone = sum(len(part) - len(kept[split]) for split, part in hospital.splits.items())
    own = sorted(set(names) & set(partial_labels.required(recipe)))
    less = f"; {gone} samples of other classes are left out" if gone else ""
    note = f"site '{hospital.name}' labels only {', '.join(own)}: it is trained and scored on these alone{less}"
    return dataclasses.replace(
        hospital,
        source=source,
        train=kept["train"],
        val=kept["val"],
        test=kept["test"],
        notes=(*hospital.notes, note),
        labelled=tuple(own),
    )


def _included(source: data.Source, partition: schema.PartitionConfig) -> list[data.Sample]:
    """The samples of the sites in ``partition.include``, or all.

    Raises:
        PartitionError: for an empty source or unknown sites.
    """
    everything = list(source.samples())
    if not everything:
        raise errors.PartitionError(
            f"data source '{source.info.name}' has no samples; check data.path", code=defect.NO_SAMPLES
        )
    strange = sorted({one.split for one in everything if one.split is not None} - set(splitting.SPLITS))
    if strange:
        raise errors.PartitionError(
            f"data source '{source.info.name}': unknown split {', '.join(strange)}; known: "
            f"{', '.join(splitting.SPLITS)}"
        )
    if not partition.include:
        return everything
    known = sorted({one.site for one in everything if one.site is not None})
    wrong = [
        f"partition.include: no site '{name}'; known: {', '.join(known) or 'none'}{registry.nearest(name, known)}"
        for name in partition.include
        if name not in known
    ]
    if wrong:
        raise errors.PartitionError("\n".join(wrong))
    return [one for one in everything if one.site in partition.include]


def _rows(chosen: Sequence[data.Sample]) -> partitioners.Rows:
    groups = np.array([splitting.group_of(one) for one in chosen])
    labels = sites = None
    if all(one.label is not None for one in chosen):
        labels = np.array([one.label for one in chosen], dtype=np.int64)
    if all(one.site is not None for one in chosen):
        sites = np.array([one.site for one in chosen])
    return partitioners.Rows(groups, labels, sites)


def _check_groups(chosen: Sequence[data.Sample], parts: Sequence[NDArray[np.int64]], names: Sequence[str]) -> None:
    """Refuse a sample or a patient at two sites: one would be trained on where the other is tested.

    Raises:
        PartitionError: naming the first such sample.
    """
    home: dict[str, str] = {}
    for name, part in zip(names, parts, strict=True):
        for i in part:
            other = home.setdefault(splitting.group_of(chosen[i]), name)
            if other != name:
                raise errors.PartitionError(
                    f"sample '{chosen[i].id}' at site '{name}' has its patient, or itself, at site '{other}' too; "
                    "remove it from one, or divide by another partition kind than 'natural'"
                )


def _names(
    chosen: Sequence[data.Sample], parts: Sequence[NDArray[np.int64]], partition: schema.PartitionConfig
) -> list[str]:
    """Site names: the natural ones, or numbers padded so that they sort.

    Raises:
        PartitionError: if a natural site's name cannot be used for files, or stands for something else.
    """
    if partition.kind != "natural":
        return [f"hospital-{number:0{len(str(len(parts)))}d}" for number in range(1, len(parts) + 1)]
    names = [str(chosen[int(part[0])].site) for part in parts]
    wrong = [name for name in names if not SITE_NAME.fullmatch(name)]
    if wrong:
        raise errors.PartitionError(
            f"site names {', '.join(repr(name) for name in wrong)}: allowed are up to 64 letters, digits, blanks, '.', "
            "'_' and '-', a letter or digit first; rename them in the table of the data"
        )
    _check_clashes(names)
    return names


def _check_clashes(names: Sequence[str]) -> None:
    """Refuse names that a run uses itself, and names that would share a folder where case does not count.

    Raises:
        PartitionError: naming them.
    """
    reserved = [name for name in names if name.casefold() in RESERVED]
    if reserved:
        raise errors.PartitionError(
            f"site names {', '.join(repr(name) for name in reserved)}: reserved in a run; rename them in the table of "
            "the data"
        )
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise errors.PartitionError(
                f"site names '{other}' and '{name}' differ in case alone, and folders are named after sites; rename "
                "one in the table of the data, or join them"
            )


def _hospital(
    name: str, source: data.Source, own: Sequence[data.Sample], partition: schema.PartitionConfig, seed: int
) -> Hospital:
    """Split one site's samples, apply the caps, draw its scanner.

    Raises:
        PartitionError: if the site has nothing to train or to test on.
    """
    if not own:
        raise errors.PartitionError(f"site '{name}' has no samples; leave it out or ask for fewer sites")
    splits = splitting.split(name, own, partition, seeding.stream(seed, name, "split"))
    kept = splitting.cap(splits, partition, seeding.stream(seed, name, "caps"))
    _check_needed(name, splits, kept)
    look = None
    if partition.kind == "appearance":
        look = appearances.Appearance.draw(seeding.stream(seed, name, "scanner"), _strength(partition) or 0.0)
    return Hospital(
        name,
        source,
        kept["train"],
        kept["val"],
        kept["test"],
        look,
        seed,
        tuple(_notes(name, source, own, kept, partition)),
    )


def _check_needed(
    name: str, splits: Mapping[str, Sequence[data.Sample]], kept: Mapping[str, Sequence[data.Sample]]
) -> None:
    """Refuse a site with nothing to train or to test on.

    Raises:
        PartitionError: with the numbers.
    """
    for needed in ("train", "test"):
        if not kept[needed]:
            sizes = ", ".join(f"{len(splits[split])} {split}" for split in splitting.SPLITS)
            raise errors.PartitionError(
                f"site '{name}' has no {needed} sample: it has {sizes} before any cap (patients stay together); leave "
                "it out, ask for fewer sites or bring more data"
            )


def _classes(members: Iterable[data.Sample]) -> set[int]:
    return {one.label for one in members if one.label is not None}


def _notes(
    name: str,
    source: data.Source,
    own: Sequence[data.Sample],
    kept: dict[str, tuple[data.Sample, ...]],
    partition: schema.PartitionConfig,
) -> list[str]:
    """Sentences a reader of the results must know."""
    notes = []
    unused = len(own) - sum(map(len, kept.values()))
    if unused:
        why = f"{partition.shots} shots a class" if partition.kind == "k-shot" else "caps"
        notes.append(f"site '{name}': {unused} of {len(own)} samples are not used ({why})")
    if not kept["val"]:
        notes.append(f"site '{name}': no validation sample")
    classes = source.info.class_names
    for split in ("train", "test"):
        present = _classes(kept[split])
        missing = [class_name for number, class_name in enumerate(classes) if number not in present]
        if present and missing:
            only = " (one class only)" if len(present) == 1 else ""
            notes.append(f"site '{name}': no {split} sample of {', '.join(missing)}{only}")
    return notes


def _check_classes(made: Sequence[Hospital]) -> None:
    """Refuse a classification in which no site, or not even all together, can learn to tell classes apart.

    Raises:
        PartitionError: naming the class and the remedy.
    """
    per_site = [_classes(hospital.train) for hospital in made]
    present = set().union(*per_site)
    if not present or any(len(classes) > 1 for classes in per_site):
        return
    names = made[0].source.info.class_names
    if len(present) == 1:
        raise errors.PartitionError(
            f"all training samples are of one class ({names[present.pop()]}); there is nothing to tell apart, check "
            "labels and sites"
        )
    raise errors.PartitionError(
        f"each of the {len(made)} sites trains on one class only; raise partition.alpha, ask for fewer sites or bring "
        "more data"
    )
