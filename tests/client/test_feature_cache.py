"""What is kept of images: what came first stays, files are shared and checked, and kept bits are those of new ones."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Hashable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedvfm import errors
from fedvfm.backbones import base as backbones
from fedvfm.model import feature_cache, feature_counts, feature_files

TOKENS = (1, 10, 4)
BYTES = 2 * 4 * 10 * 4
"""Of one prefix: the tap before the last block and the hidden tokens."""


def image(number: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.full((3, 4, 4), number, dtype=np.float32)


def prefix(number: int, *, dtype: torch.dtype = torch.float32, same: bool = False) -> backbones.Prefix:
    rng = torch.Generator().manual_seed(number)
    hidden = torch.randn(TOKENS, generator=rng).to(dtype)
    taken = {3: hidden} if same else {2: torch.randn(TOKENS, generator=rng).to(dtype)}
    return backbones.Prefix(3, hidden, taken)


def ask(cache: feature_cache.FeatureCache, number: int, about: Hashable = "arm") -> backbones.Prefix:
    return cache.features(image(number), about, lambda: prefix(number))


def computed(cache: feature_cache.FeatureCache, work: Callable[[], object]) -> int:
    before = cache.counts
    work()
    return (cache.counts - before).computed


def files_at(folder: Path, limit: int = 1 << 20) -> feature_files.FeatureFiles:
    made = feature_files.FeatureFiles(folder, limit)
    made.prepare()
    return made


def test_a_full_memory_keeps_what_came_first() -> None:
    """Of four views that go round, three fit: one is computed anew each round, not all four."""
    cache = feature_cache.FeatureCache(3 * BYTES)
    assert computed(cache, lambda: [ask(cache, n) for n in range(4)]) == 4
    for _ in range(5):
        assert computed(cache, lambda: [ask(cache, n) for n in range(4)]) == 1
    assert cache.counts == feature_counts.Counts(computed=9, again=5, memory=15, files=0)


def test_what_nobody_asks_for_makes_room() -> None:
    """The features of an arm that is over give way to those of the next; of two that alternate neither does."""
    cache = feature_cache.FeatureCache(4 * BYTES)
    for _ in range(3):
        for about in ("one", "two"):
            for n in range(4):
                ask(cache, n, about)
    assert computed(cache, lambda: [ask(cache, n, "one") for n in range(4)]) == 0
    for _ in range(3):
        for n in range(4):
            ask(cache, n, "two")
    assert computed(cache, lambda: [ask(cache, n, "two") for n in range(4)]) == 0


def test_images_and_features_share_the_bound() -> None:
    cache = feature_cache.FeatureCache(BYTES + 10)
    made = []

    def make() -> str:
        made.append(1)
        return "pixels"

    assert [cache.image("a", lambda _: 10, make) for _ in range(3)] == ["pixels"] * 3
    assert len(made) == 1
    ask(cache, 0)
    assert computed(cache, lambda: ask(cache, 0)) == 0
    assert cache.image("b", lambda _: 1, make) == cache.image("b", lambda _: 1, make) == "pixels"
    assert len(made) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("same", [False, True], ids=["apart", "hidden-tapped"])
def test_files_give_the_same_bits(tmp_path: Path, dtype: torch.dtype, same: bool) -> None:
    """What another process finds in the files is what the first one computed; one tensor in two places stays one."""
    made = prefix(1, dtype=dtype, same=same)
    first = feature_cache.FeatureCache(0, files_at(tmp_path / "f"), files_first=True)
    first.features(image(1), "arm", lambda: made)
    other = feature_cache.FeatureCache(0, feature_files.FeatureFiles(tmp_path / "f", 1 << 20))
    found = other.features(image(1), "arm", lambda: pytest.fail("computed again"))
    assert other.counts == feature_counts.Counts(files=1)
    assert found.stop == made.stop
    assert found.hidden.dtype == dtype
    assert torch.equal(found.hidden, made.hidden)
    assert found.taken.keys() == made.taken.keys()
    assert all(torch.equal(found.taken[tap], made.taken[tap]) for tap in made.taken)
    assert (found.taken.get(3) is found.hidden) == same
    assert feature_cache.nbytes(found) == feature_cache.nbytes(made)


def test_another_image_or_other_settings_are_another_entry(tmp_path: Path) -> None:
    cache = feature_cache.FeatureCache(1 << 20, files_at(tmp_path / "f"))
    assert computed(cache, lambda: (ask(cache, 1, ("a", 8)), ask(cache, 2, ("a", 8)), ask(cache, 1, ("a", 9)))) == 3
    wide = np.full((3, 2, 8), 1, dtype=np.float32)
    assert computed(cache, lambda: cache.features(wide, ("a", 8), lambda: prefix(7))) == 1


def test_threads_are_part_of_the_key(tmp_path: Path) -> None:
    """One and two threads differ in the last bits of a sum."""
    cache, before = feature_cache.FeatureCache(0, files_at(tmp_path / "f")), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        ask(cache, 1)
        torch.set_num_threads(2)
        assert computed(cache, lambda: ask(cache, 1)) == 1
    finally:
        torch.set_num_threads(before)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-7],
    "in-the-checksum": lambda data: data[:20],
    "a-bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "longer": lambda data: data + b"\0",
    "pickle": lambda data: b"\x80\x04c__builtin__\neval\n.",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_computed_anew(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    cache = feature_cache.FeatureCache(0, files_at(tmp_path / "f"))
    ask(cache, 1)
    (path,) = (tmp_path / "f").glob("*.features")
    path.write_bytes(damage(path.read_bytes()))
    assert computed(cache, lambda: ask(cache, 1)) == 1
    assert computed(cache, lambda: ask(cache, 1)) == 0
    assert torch.equal(ask(cache, 1).hidden, prefix(1).hidden)


def test_a_file_under_another_name_is_not_used(tmp_path: Path) -> None:
    cache = feature_cache.FeatureCache(0, files_at(tmp_path / "f"))
    ask(cache, 1)
    (first,) = (tmp_path / "f").glob("*.features")
    ask(cache, 2)
    (second,) = set((tmp_path / "f").glob("*.features")) - {first}
    second.write_bytes(first.read_bytes())
    assert torch.equal(ask(cache, 2).hidden, prefix(2).hidden)


def test_files_are_private_and_bounded(tmp_path: Path) -> None:
    """Two processes that share the folder share its bound, and neither writes beyond it."""
    before = os.umask(0)
    try:
        files = files_at(tmp_path / "f", 3 * (BYTES + 400))
        other = feature_files.FeatureFiles(tmp_path / "f", 3 * (BYTES + 400))
        caches = [feature_cache.FeatureCache(0, one) for one in (files, other)]
        for number in range(8):
            ask(caches[number % 2], number)
    finally:
        os.umask(before)
    found = list((tmp_path / "f").iterdir())
    assert len([path for path in found if path.suffix == ".features"]) == 3
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in found} == {0o600}
    assert computed(caches[0], lambda: [ask(caches[0], n) for n in range(8)]) == 5


def test_what_is_there_counts_after_a_new_start(tmp_path: Path) -> None:
    limit = 2 * (BYTES + 400)
    cache = feature_cache.FeatureCache(0, files_at(tmp_path / "f", limit))
    for number in range(2):
        ask(cache, number)
    (tmp_path / "f" / ".x.features.abc.part").write_bytes(b"left by a kill")
    again = feature_cache.FeatureCache(0, files_at(tmp_path / "f", limit))
    assert not list((tmp_path / "f").glob("*.part"))
    assert computed(again, lambda: [ask(again, n) for n in range(3)]) == 1
    assert computed(again, lambda: ask(again, 2)) == 1  # there was no room for it


def test_a_disk_that_is_nearly_full_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_files, "RESERVE", 1 << 62)
    cache = feature_cache.FeatureCache(0, files_at(tmp_path / "f"))
    ask(cache, 1)
    assert not list((tmp_path / "f").glob("*.features"))


def test_a_folder_that_went_away_ends_nothing(tmp_path: Path) -> None:
    """Removed under a running process, or never there (an actor on another machine): features are computed."""
    cache = feature_cache.FeatureCache(0, feature_files.FeatureFiles(tmp_path / "none", 1 << 20))
    assert computed(cache, lambda: [ask(cache, 1), ask(cache, 1)]) == 2
    assert not (tmp_path / "none").exists()


def test_the_order_of_the_places(tmp_path: Path) -> None:
    """At a site nothing is written while memory is enough; in a simulation files come first, so that workers share."""
    site = feature_cache.FeatureCache(2 * BYTES, files_at(tmp_path / "s"))
    run = feature_cache.FeatureCache(2 * BYTES, files_at(tmp_path / "r"), files_first=True)
    for number in range(3):
        ask(site, number)
        ask(run, number)
    assert len(list((tmp_path / "s").glob("*.features"))) == 1
    assert len(list((tmp_path / "r").glob("*.features"))) == 3


def test_processes_divide_the_memory() -> None:
    cache = feature_cache.FeatureCache(4 * BYTES)
    cache.divide(2)
    for number in range(4):
        ask(cache, number)
    assert computed(cache, lambda: [ask(cache, n) for n in range(4)]) == 2


WRITER = """
import sys
from pathlib import Path
from tests.client import test_feature_cache as t
from fedvfm.model import feature_cache, feature_counts, feature_files
cache = feature_cache.FeatureCache(0, feature_files.FeatureFiles(Path(sys.argv[1]), 1 << 20))
for _ in range(3):
    for number in range(40):
        assert t.torch.equal(t.ask(cache, number).hidden, t.prefix(number).hidden)
"""


def test_processes_write_and_read_at_once(tmp_path: Path) -> None:
    files_at(tmp_path / "f")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", WRITER, str(tmp_path / "f")]
    running = [subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert len(list((tmp_path / "f").glob("*.features"))) == 40


def test_files_of_a_run_stay_for_a_resume_and_go_at_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "f"

    def stopped() -> None:
        with feature_files.of_run(folder, 1 << 20) as files:
            ask(feature_cache.FeatureCache(0, files), 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert list(folder.glob("*.features"))
    with feature_files.of_run(folder, 1 << 20) as files:
        cache = feature_cache.FeatureCache(0, files)
        assert computed(cache, lambda: ask(cache, 1)) == 0
    assert not folder.exists()
    with feature_files.of_run(folder, 0) as files:
        assert files is None
    assert not folder.exists()


def test_files_of_another_recipe_go(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    assert feature_files.of_recipe(folder, "aa", 1 << 20) is not None
    assert feature_files.of_recipe(folder, "bb", 1 << 20) is not None
    assert [path.name for path in folder.iterdir()] == ["bb"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert feature_files.of_recipe(folder, "bb", 0) is None
    assert not list(folder.iterdir())


def test_a_disk_that_takes_nothing_leaves_a_site_without_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.open

    def full(path: object, *arguments: int) -> int:
        if str(path).endswith(".bytes"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return really(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", full)
    assert feature_files.of_recipe(tmp_path / "f", "aa", 1 << 20) is None
    with pytest.raises(errors.StorageError, match="No space left"):
        files_at(tmp_path / "run")
