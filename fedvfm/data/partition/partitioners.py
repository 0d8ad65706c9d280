"""Rows of samples to virtual hospitals: disjoint, complete, reproducible; a group (patient, slide) is never split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors, registry
from fedvfm.config import schema

Indices = NDArray[np.int64]

TABLE = registry.Table(
    "partitioner",
    {
        "appearance": "fedvfm.data.partition.partitioners:iid",
        "dirichlet": "fedvfm.data.partition.partitioners:dirichlet",
        "iid": "fedvfm.data.partition.partitioners:iid",
        "k-shot": "fedvfm.data.partition.partitioners:iid",
        "natural": "fedvfm.data.partition.partitioners:natural",
        "quantity": "fedvfm.data.partition.partitioners:quantity",
    },
)
"""``appearance`` and ``k-shot`` divide as ``iid`` does; what makes them special happens inside each hospital."""

NEEDS_SITES = ("appearance", "dirichlet", "iid", "k-shot", "quantity")
"""The kinds that cannot do without ``partition.sites``; a registered one decides for itself."""

LEAST_GROUPS = 3
"""So that train, val and test of a site can each have one."""


@dataclass(frozen=True)
class Rows:
    """What a partitioner may know of the samples: one entry each, no pixels.

    Attributes:
        groups: what must stay together: the patient, or the sample's id where it has none.
        labels: class indices, or None where the samples have none (segmentation).
        sites: the natural site, or None where a sample has none.
    """

    groups: NDArray[np.str_]
    labels: Indices | None = None
    sites: NDArray[np.str_] | None = None

    def __len__(self) -> int:
        return len(self.groups)


def natural(rows: Rows, num_sites: int, rng: np.random.Generator, partition: schema.PartitionConfig) -> list[Indices]:
    """One partition a natural site, in the order of their names; ``num_sites`` above 0 takes only the largest.

    A patient seen at several sites would be split here; who makes hospitals of the result refuses that.

    Raises:
        PartitionError: if the samples have no sites, or fewer than asked.
    """
    if rows.sites is None:
        raise errors.PartitionError(
            "partition kind 'natural': the source does not say where its samples come from; "
            "take 'iid', 'dirichlet', 'quantity' or 'appearance' and set partition.sites, or say it in patients.csv "
            "(id,patient,site) beside the images of a folder"
        )
    names, counts = np.unique(rows.sites, return_counts=True)
    if num_sites > len(names):
        raise errors.PartitionError(
            f"partition.sites = {num_sites}, but the source has {len(names)} natural sites ({', '.join(names)}); "
            "ask for at most that"
        )
    largest = np.argsort(-counts, kind="stable")[: num_sites or len(names)]
    return [np.flatnonzero(rows.sites == name) for name in names[np.sort(largest)]]


def iid(rows: Rows, num_sites: int, rng: np.random.Generator, partition: schema.PartitionConfig) -> list[Indices]:
    """Groups dealt at random, sites of nearly equal size.

    Raises:
        PartitionError: if there are more sites than groups.
    """
    _, members = _groups(rows, num_sites, partition)
    sizes = np.array([[len(member)] for member in members], dtype=np.float64)
    return _gather(
        members, fill(sizes, np.full((1, num_sites), 1.0 / num_sites), rng, _least(num_sites, len(members))), num_sites
    )


def quantity(rows: Rows, num_sites: int, rng: np.random.Generator, partition: schema.PartitionConfig) -> list[Indices]:
    """Sites of different size: shares of all samples drawn from Dirichlet(alpha); the smaller alpha, the more unequal.

    Raises:
        PartitionError: if there are more sites than groups.
    """
    _, members = _groups(rows, num_sites, partition)
    sizes = np.array([[len(member)] for member in members], dtype=np.float64)
    shares = rng.dirichlet(np.full(num_sites, partition.alpha), size=1)
    return _gather(members, fill(sizes, shares, rng, _least(num_sites, len(members))), num_sites)


def dirichlet(rows: Rows, num_sites: int, rng: np.random.Generator, partition: schema.PartitionConfig) -> list[Indices]:
    """Label skew: of every class, the sites' shares are drawn from Dirichlet(alpha).

    Groups of mixed labels go where most of their classes are still missing, so the shares are then only approached.
    A site left with fewer than three groups takes some from the largest.

    Source: Hsu et al., "Measuring the effects of non-identical data distribution for federated visual classification",
        2019.

    Raises:
        PartitionError: if the samples have no labels, or there are more sites than groups.
    """
    if rows.labels is None:
        raise errors.PartitionError(
            "partition kind 'dirichlet' skews labels, and these samples have none (segmentation); take 'quantity' "
            "or 'appearance'"
        )
    _, members = _groups(rows, num_sites, partition)
    classes = np.unique(rows.labels)
    counts = np.array(
        [[np.count_nonzero(rows.labels[member] == one) for one in classes] for member in members], dtype=np.float64
    )
    shares = rng.dirichlet(np.full(num_sites, partition.alpha), size=len(classes))
    return _gather(members, fill(counts, shares, rng, _least(num_sites, len(members))), num_sites)


def fill(counts: NDArray[np.float64], shares: NDArray[np.float64], rng: np.random.Generator, least: int) -> Indices:
    """Deal groups to sites so that every site comes near its share of every class.

    Groups come in random order; each goes to the site that misses most of what it holds. Afterwards sites with fewer
    than ``least`` groups take the smallest groups of the site that has most.

    Shapes: counts (groups, classes), shares (classes, sites), rows sum to 1; the result is (groups,), the site of each.
    """
    totals = counts.sum(axis=0)
    missing = shares * totals[:, None]
    site = np.zeros(len(counts), dtype=np.int64)
    for group in rng.permutation(len(counts)):
        wanted = (counts[group] / totals) @ missing
        site[group] = int(np.argmax(wanted))
        missing[:, site[group]] -= counts[group]
    return _top_up(site, counts.sum(axis=1), shares.shape[1], least)


def _top_up(site: Indices, sizes: NDArray[np.float64], num_sites: int, least: int) -> Indices:
    have = np.bincount(site, minlength=num_sites)
    while have.min() < least:
        poor, rich = int(np.argmin(have)), int(np.argmax(have))
        candidates = np.flatnonzero(site == rich)
        site[candidates[np.argmin(sizes[candidates])]] = poor
        have = np.bincount(site, minlength=num_sites)
    return site


def _least(num_sites: int, num_groups: int) -> int:
    return min(LEAST_GROUPS, num_groups // num_sites)


def _groups(rows: Rows, num_sites: int, partition: schema.PartitionConfig) -> tuple[NDArray[np.str_], list[Indices]]:
    """The groups in sorted order, and the rows of each.

    Raises:
        PartitionError: if no number of sites is given, or it is above the number of groups.
    """
    if num_sites < 1:
        raise errors.PartitionError(
            f"partition kind '{partition.kind}': set partition.sites to the number of virtual hospitals"
        )
    names, inverse = np.unique(rows.groups, return_inverse=True)
    if num_sites > len(names):
        raise errors.PartitionError(
            f"partition.sites = {num_sites}, but there are only {len(rows)} samples in {len(names)} groups "
            "(patients, or samples without one); ask for fewer sites or bring more data"
        )
    order = np.argsort(inverse, kind="stable")
    return names, np.split(order, np.cumsum(np.bincount(inverse))[:-1])


def _gather(members: list[Indices], site: Indices, num_sites: int) -> list[Indices]:
    return [
        np.sort(np.concatenate([members[group] for group in np.flatnonzero(site == number)]))
        for number in range(num_sites)
    ]
