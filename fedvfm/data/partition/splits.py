"""One site's samples into train, val and test: patients stay together, classes in proportion, then the caps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors, seeding
from fedvfm.config import schema
from fedvfm.data import defect
from fedvfm.data import sample as data

SPLITS = ("train", "val", "test")


def group_of(one: data.Sample) -> str:
    """What must stay together; the prefix keeps a patient apart from a sample of the same name."""
    return f"patient {one.patient}" if one.patient is not None else f"sample {one.id}"


def split(
    site: str, own: Sequence[data.Sample], partition: schema.PartitionConfig, rng: np.random.Generator
) -> dict[str, list[data.Sample]]:
    """Train, val and test of one site: as the source prescribes, else drawn by groups, classes in proportion.

    Raises:
        PartitionError: if the source prescribes two splits for one patient.
    """
    splits, free = _prescribed(site, own)
    for name, drawn in _draw(free, partition, rng).items():
        splits[name].extend(drawn)
    return splits


def split_alone(
    site: str,
    own: Sequence[data.Sample],
    partition: schema.PartitionConfig,
    seed: int,
    name_of: Callable[[data.Sample], str],
) -> dict[str, list[data.Sample]]:
    """The same with every group drawn by itself, from the seed and its own name: no other one moves when one comes.

    So one patient more changes what a site trains on by that patient alone, which is what privacy counts with. Shares
    hold about, classes are not spread, and with few groups a split may be empty.

    Args:
        site: its name, for what is said of faults.
        own: the samples.
        partition: whose shares are taken; caps are not.
        seed: of the draw.
        name_of: what a sample's group is called, whatever others there are.

    Raises:
        PartitionError: if the source prescribes two splits for one patient.
    """
    splits, free = _prescribed(site, own)
    for members in free:
        place = seeding.key(seed, "split", name_of(members[0])) / 2**64
        tested = place < partition.test_share
        name = "test" if tested else "val" if place < partition.test_share + partition.val_share else "train"
        splits[name].extend(members)
    return splits


def _prescribed(site: str, own: Sequence[data.Sample]) -> tuple[dict[str, list[data.Sample]], list[list[data.Sample]]]:
    """The splits as far as the source prescribes them, and the groups for which it does not."""
    groups: dict[str, list[data.Sample]] = {}
    for one in own:
        groups.setdefault(group_of(one), []).append(one)
    splits: dict[str, list[data.Sample]] = {name: [] for name in SPLITS}
    free = []
    for members in groups.values():
        given = sorted({one.split for one in members if one.split is not None})
        if len(given) > 1:
            raise errors.PartitionError(
                f"site '{site}': the patient of sample '{members[0].id}' has images in {' and '.join(given)}; keep a "
                "patient in one split",
                code=defect.PATIENT_ACROSS_SPLITS,
            )
        # A patient whose split is prescribed for some images takes the others along.
        if given:
            splits[given[0]].extend(members)
        else:
            free.append(members)
    return splits, free


def _draw(
    groups: list[list[data.Sample]], partition: schema.PartitionConfig, rng: np.random.Generator
) -> dict[str, list[data.Sample]]:
    """Cut the groups, in an order that spreads the classes evenly, where the wanted numbers of samples are reached."""
    if not groups:
        return {}
    majority = np.array([_majority(members) for members in groups])
    ordered = [groups[i] for i in _spread(majority, rng)]
    train, val = _wanted(sum(map(len, groups)), partition)
    reached = np.cumsum([len(members) for members in ordered])
    last = len(ordered)
    keep_val = 1 if val and last >= 3 else 0
    first = int(np.clip(np.searchsorted(reached, train) + 1, 1, max(last - 1 - keep_val, 1)))
    second = first
    if keep_val:
        second = int(np.clip(np.searchsorted(reached, reached[first - 1] + val) + 1, first + 1, last - 1))
    cuts = {"train": ordered[:first], "val": ordered[first:second], "test": ordered[second:]}
    return {name: [one for members in part for one in members] for name, part in cuts.items()}


def _majority(members: Sequence[data.Sample]) -> int:
    labels = [one.label for one in members if one.label is not None]
    return int(np.bincount(labels).argmax()) if labels else 0


def _spread(labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """A random order in which every stretch has the classes in about the proportion of the whole."""
    place = np.zeros(len(labels))
    for label in np.unique(labels):
        of_class = rng.permutation(np.flatnonzero(labels == label))
        place[of_class] = (np.arange(len(of_class)) + rng.random(len(of_class))) / len(of_class)
    return np.argsort(place, kind="stable")


def _wanted(total: int, partition: schema.PartitionConfig) -> tuple[int, int]:
    """How many samples of ``total`` to train and validate on; the rest is for testing.

    What caps take from val and test goes to training. With a cap on training, everything beyond train and val becomes
    test, for a sharper estimate; a site too small for the cap trains on its share.
    """
    val = math.floor(total * partition.val_share + 0.5)
    test = math.floor(total * partition.test_share + 0.5)
    val = min(val, partition.val) if partition.val else val
    if not partition.train:
        return total - val - (min(test, partition.test) if partition.test else test), val
    room = total - val - test
    return max(min(partition.train, room), 1), val


def cap(
    splits: dict[str, list[data.Sample]], partition: schema.PartitionConfig, rng: np.random.Generator
) -> dict[str, tuple[data.Sample, ...]]:
    """At most the configured number of samples a split, classes in proportion; sorted by id.

    Volumes are scored whole, so that of val and test whole volumes are kept, at least one.
    """
    caps = {"train": partition.train, "val": partition.val, "test": partition.test}
    kept = {}
    for name in SPLITS:
        members = sorted(splits[name], key=lambda one: one.id)
        order = _spread(np.array([one.label or 0 for one in members], dtype=np.int64), rng)
        if name == "train" and partition.kind == "k-shot":
            order = _shots(members, order, partition.shots)
        limit = caps[name] or len(members)
        chosen = order[:limit] if name == "train" else _whole_volumes(members, order, limit)
        kept[name] = tuple(members[i] for i in sorted(chosen))
    return kept


def _whole_volumes(
    members: Sequence[data.Sample], order: NDArray[np.int64], limit: int
) -> NDArray[np.int64] | list[int]:
    """The first samples in the given order, each slice with all others of its volume, up to about ``limit``."""
    if all(one.part is None for one in members):
        return order[:limit]
    units: dict[str, list[int]] = {}
    for i in order:
        units.setdefault(members[i].unit, []).append(int(i))
    chosen: list[int] = []
    for unit in units.values():
        if not chosen or len(chosen) + len(unit) <= limit:
            chosen += unit
    return chosen


def _shots(members: Sequence[data.Sample], order: NDArray[np.int64], shots: int) -> NDArray[np.int64]:
    """The first ``shots`` of every class in the given order."""
    seen: dict[int | None, int] = {}
    chosen = []
    for i in order:
        label = members[i].label
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= shots:
            chosen.append(i)
    return np.array(chosen, dtype=np.int64)
