"""Virtual hospitals: splits, caps, patients, appearance, notes, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvfm import errors, seeding
from fedvfm.config import schema
from fedvfm.data import sample as data
from fedvfm.data.partition import virtual_hospitals


@dataclass(frozen=True)
class Given:
    """A source of the samples it is given; the pixels of a sample depend on its id alone."""

    given: tuple[data.Sample, ...]
    class_names: tuple[str, ...] = ("red", "white", "platelet")

    @property
    def info(self) -> data.SourceInfo:
        return data.SourceInfo("given", "classification", self.class_names, "none")

    def samples(self) -> Sequence[data.Sample]:
        return self.given

    def read(self, sample: data.Sample) -> data.Pixels:
        image = seeding.stream(0, sample.id).random((1, 24, 32)).astype(np.float32)
        return data.Pixels(image, np.zeros((24, 32), dtype=np.int64))


def plain(size: int, **fields: object) -> Given:
    return Given(tuple(data.Sample(f"s{number:04d}", **fields) for number in range(size)))


def labelled(size: int, labels: Sequence[int] = (0, 1, 2)) -> Given:
    return Given(tuple(data.Sample(f"s{number:04d}", labels[number % len(labels)]) for number in range(size)))


def make(source: Given, seed: int = 0, **partition: object) -> list[virtual_hospitals.Hospital]:
    return virtual_hospitals.make_hospitals(source, schema.PartitionConfig.model_validate(partition), seed)


def sizes(hospital: virtual_hospitals.Hospital) -> tuple[int, ...]:
    return tuple(len(split) for split in hospital.splits.values())


@pytest.mark.parametrize(
    ("size", "caps", "expected"),
    [
        (100, {}, (60, 15, 25)),
        (334, {"train": 20, "val": 5, "test": 60}, (20, 5, 60)),
        (90, {"train": 20, "val": 5}, (20, 5, 65)),
        (38, {"train": 20, "val": 5, "test": 60}, (20, 5, 13)),
        (16, {"train": 20, "val": 5, "test": 60}, (10, 2, 4)),
        (100, {"val": 5, "test": 10}, (85, 5, 10)),
        (100, {"test": 60}, (60, 15, 25)),
        (3, {}, (2, 0, 1)),
        (2, {}, (1, 0, 1)),
    ],
)
def test_caps_and_shares(size: int, caps: dict[str, int], expected: tuple[int, ...]) -> None:
    (site,) = make(plain(size, site="north"), **caps)
    assert site.name == "north"
    assert sizes(site) == expected


@settings(max_examples=60, deadline=None)
@given(
    patients=st.lists(st.integers(0, 30), min_size=12, max_size=120),
    kind=st.sampled_from(["iid", "quantity", "dirichlet", "k-shot"]),
    train=st.sampled_from([0, 5, 50]),
    seed=st.integers(0, 2**62),
)
def test_patients_stay_together_and_splits_are_disjoint(patients: list[int], kind: str, train: int, seed: int) -> None:
    source = Given(tuple(data.Sample(f"s{i:03d}", i % 3, patient=f"p{patient}") for i, patient in enumerate(patients)))
    if len(set(patients)) < 6:
        return
    try:
        made = make(source, seed, kind=kind, sites=2, train=train, shots=4)
    except errors.PartitionError as error:
        # With so few patients all training samples can be of one class; that alone may be refused.
        if "one class" not in str(error):
            raise
        return
    home: dict[str | None, tuple[str, str]] = {}
    seen = []
    for hospital in made:
        for name, split in hospital.splits.items():
            for one in split:
                assert home.setdefault(one.patient, (hospital.name, name)) == (hospital.name, name)
                seen.append(one.id)
    assert len(seen) == len(set(seen))
    if not train and kind != "k-shot":
        assert len(seen) == len(source.given)
    assert make(source, seed, kind=kind, sites=2, train=train, shots=4) == made


def test_classes_are_in_proportion_in_every_split() -> None:
    (site,) = make(labelled(300, (0, 0, 0, 1, 2)), kind="iid", sites=1)
    for split in site.splits.values():
        counts = np.bincount([one.label for one in split], minlength=3) / len(split)
        np.testing.assert_allclose(counts, [0.6, 0.2, 0.2], atol=0.04)
    (capped,) = make(labelled(300, (0, 0, 0, 1, 2)), kind="iid", sites=1, train=25)
    assert np.bincount([one.label for one in capped.train]).tolist() == pytest.approx([15, 5, 5], abs=2)
    assert len(capped.train) == 25


def test_prescribed_splits_are_kept() -> None:
    given_splits = tuple(
        data.Sample(f"s{i}", site="a", split=split) for i, split in enumerate(["train"] * 6 + ["val"] + ["test"] * 5)
    )
    (site,) = make(Given(given_splits), test=3)
    assert {one.split for one in site.train} == {"train"}
    assert sizes(site) == (6, 1, 3)
    assert site.notes == ("site 'a': 2 of 12 samples are not used (caps)",)


def test_a_prescribed_split_takes_the_patient_along_and_is_never_double() -> None:
    own = [data.Sample(f"s{i}", site="a", patient=f"p{i}") for i in range(8)]
    mixed = Given((*own, data.Sample("x", site="a", patient="p1", split="test")))
    (site,) = make(mixed)
    assert {"s1", "x"} <= {one.id for one in site.test}
    double = Given((*own, *(data.Sample(split, site="a", patient="q", split=split) for split in ("train", "test"))))
    with pytest.raises(errors.PartitionError, match="has images in test and train; keep a patient in one split"):
        make(double)
    with pytest.raises(errors.PartitionError, match="unknown split validation; known: train, val, test"):
        make(plain(5, site="a", split="validation"))


def test_names_sort_and_natural_sites_can_be_chosen() -> None:
    names = [site.name for site in make(plain(60), kind="iid", sites=12)]
    assert names == sorted(names)
    assert (names[0], names[-1]) == ("hospital-01", "hospital-12")
    source = Given(tuple(data.Sample(f"{site}{i}", site=site) for site in ("south", "north", "west") for i in range(6)))
    assert [site.name for site in make(source)] == ["north", "south", "west"]
    assert [site.name for site in make(source, include=("west", "north"))] == ["north", "west"]
    with pytest.raises(errors.PartitionError, match=r"no site 'nort'; known: north, south, west; nearest: 'north'"):
        make(source, include=("nort",))
    with pytest.raises(errors.PartitionError, match=r"site names '\.\./x'"):
        make(plain(6, site="../x"))


def test_a_site_draws_its_split_from_its_own_name() -> None:
    """Another hospital joining must not change what this one trains on."""
    north = tuple(data.Sample(f"n{i}", site="north") for i in range(20))
    south = tuple(data.Sample(f"s{i}", site="south") for i in range(20))
    assert make(Given(north))[0].train == make(Given(south + north))[0].train
    assert make(Given(north), seed=1)[0].train != make(Given(north), seed=2)[0].train


def test_k_shot_keeps_k_a_class_and_says_so() -> None:
    for site in make(labelled(120), kind="k-shot", sites=2, shots=4):
        assert np.bincount([one.label for one in site.train]).tolist() == [4, 4, 4]
        assert len(site.test) == 15
        assert any("samples are not used (4 shots a class)" in note for note in site.notes)
    (unlabelled,) = make(plain(40), kind="k-shot", sites=1, shots=5)
    assert len(unlabelled.train) == 5


def test_appearance_differs_by_site_and_is_the_same_every_time() -> None:
    source = plain(30)
    made = make(source, kind="appearance", sites=3)
    assert len({site.appearance for site in made}) == 3
    first = made[0].train[0]
    clean = source.read(first).image
    once, again = made[0].read(first), make(source, kind="appearance", sites=3)[0].read(first)
    np.testing.assert_array_equal(once.image, again.image)
    assert not np.array_equal(once.image, clean)
    assert not np.array_equal(once.image, made[1].read(first).image)
    assert once.mask is not None
    (calm, *_) = make(source, kind="appearance", sites=3, options={"strength": 0.0})
    assert np.abs(calm.read(calm.train[0]).image - source.read(calm.train[0]).image).max() < 0.01


def test_pooled_reads_every_sample_through_its_own_scanner() -> None:
    made = make(plain(30), kind="appearance", sites=3)
    pool = virtual_hospitals.pooled(made)
    assert pool.name == "pooled"
    assert sizes(pool) == tuple(sum(part) for part in zip(*(sizes(site) for site in made), strict=True))
    for site in made:
        for one in (site.train[0], site.test[0]):
            np.testing.assert_array_equal(pool.read(one).image, site.read(one).image)
    assert len(pool.source.samples()) == 30
    with pytest.raises(errors.DataError, match="is at none of the sites"):
        pool.read(data.Sample("stranger"))
    with pytest.raises(errors.DataError, match="ids must be unique"):
        virtual_hospitals.pooled([*make(plain(6, site="a")), *make(plain(6, site="b"))])
    with pytest.raises(errors.DataError, match="at least one site"):
        virtual_hospitals.pooled([])


@pytest.mark.parametrize("name", ["pooled", "Pooled", "evaluation.json"])
def test_names_that_a_run_uses_itself(name: str) -> None:
    given = Given((*plain(12, site="north").given, *(data.Sample(f"t{number}", site=name) for number in range(12))))
    with pytest.raises(errors.PartitionError, match=rf"site names '{name}': reserved in a run; rename them"):
        make(given)
    assert [one.name for one in make(given, include=["north"])] == ["north"]


def test_names_that_differ_in_case_alone() -> None:
    """Folders are named after sites, and not every disk tells them apart."""
    given = Given((*plain(12, site="north").given, *(data.Sample(f"t{number}", site="North") for number in range(12))))
    with pytest.raises(errors.PartitionError, match=r"'(North|north)' and '(north|North)' differ in case alone"):
        make(given)


def test_sites_that_cannot_work() -> None:
    with pytest.raises(errors.PartitionError, match=r"has no samples; check data\.path"):
        make(plain(0), kind="iid", sites=1)
    with pytest.raises(errors.PartitionError, match=r"site 'a' has no test sample: it has 1 train, 0 val, 0 test"):
        make(plain(1, site="a"))
    with pytest.raises(errors.PartitionError, match="site 'a' has no train sample"):
        make(plain(4, site="a", split="test"))
    with pytest.raises(errors.PartitionError, match="patients stay together"):
        make(plain(9, site="a", patient="one"))
    with pytest.raises(errors.PartitionError, match=r"partition\.sites = 9, but there are only 5 samples"):
        make(plain(5), kind="iid", sites=9)
    wanderer = [data.Sample(f"{site}{i}", site=site, patient=f"{site}{i}") for site in "ab" for i in range(4)]
    wanderer.append(data.Sample("x", site="b", patient="a1"))
    with pytest.raises(
        errors.PartitionError, match="sample 'x' at site 'b' has its patient, or itself, at site 'a' too"
    ):
        make(Given(tuple(wanderer)))


def test_one_class_sites() -> None:
    mixed = [data.Sample(f"a{i}", i % 3, site="a") for i in range(12)]
    single = [data.Sample(f"b{i}", 1, site="b") for i in range(12)]
    made = make(Given((*mixed, *single)))
    assert "site 'b': no train sample of red, platelet (one class only)" in made[1].notes
    assert not any("one class only" in note for note in made[0].notes)
    with pytest.raises(errors.PartitionError, match=r"all training samples are of one class \(white\)"):
        make(Given(tuple(single)))
    other = [data.Sample(f"c{i}", 2, site="c") for i in range(12)]
    with pytest.raises(errors.PartitionError, match="each of the 2 sites trains on one class only"):
        make(Given((*single, *other)))


def test_all_faults_of_a_partition_at_once() -> None:
    partition = schema.PartitionConfig(kind="k-shot", options={"strenght": 1}, val_share=0.5, test_share=0.5)
    found = virtual_hospitals.faults(partition)
    assert [fault.split(":")[0] for fault in found] == [
        "partition.options.strenght",
        "partition.sites",
        "partition.shots",
        "partition.val_share + partition.test_share = 1",
    ]
    with pytest.raises(errors.ConfigError, match="partition: 4 faults"):
        virtual_hospitals.make_hospitals(plain(9), partition, 0)
    strange = schema.PartitionConfig(kind="appearance", sites=2, options={"strength": "high", "strenght": 2})
    assert [
        "nearest: 'strength'" in virtual_hospitals.faults(strange)[0],
        "'high'" in virtual_hospitals.faults(strange)[1],
    ] == [True] * 2
    assert "nearest: 'natural'" in virtual_hospitals.faults(schema.PartitionConfig(kind="naturel"))[0]


@pytest.mark.parametrize(("samples", "cap", "trained"), [(100, 80, 60), (100, 60, 60), (100, 30, 30), (20, 50, 12)])
def test_a_cap_never_shrinks_a_site_below_its_share(samples: int, cap: int, trained: int) -> None:
    """Of 100 samples 60 are for training with the default shares."""
    (site,) = make(labelled(samples, (0, 1)), kind="iid", sites=1, train=cap)
    (free,) = make(labelled(samples, (0, 1)), kind="iid", sites=1)
    assert abs(len(site.train) - trained) <= 1
    assert len(site.train) >= min(cap, len(free.train)) - 1
