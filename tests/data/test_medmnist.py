"""MedMNIST files: the layout of the package's own .npz, the download, and what is refused."""

from __future__ import annotations

import functools
import hashlib
import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data.partition import virtual_hospitals
from fedvfm.data.sources import medmnist, table


def npz(path: Path, colour: bool = False, **changes: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for split, size in (("train", 12), ("val", 3), ("test", 6)):
        shape = (size, 28, 28, 3) if colour else (size, 28, 28)
        arrays[f"{split}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(size) % 3).astype(np.uint8)[:, None]
    arrays.update(changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path


def make(name: str, path: Path | None, **options: object) -> medmnist.MedMNIST:
    values = {"source": f"medmnist:{name}", "path": str(path) if path else None, "options": options}
    source = table.make(schema.SourceConfig.model_validate(values))
    assert isinstance(source, medmnist.MedMNIST)
    return source


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, so that neither the user's files nor an installed package decide."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "medmnist", None)
    return tmp_path / "home"


def test_grey_and_colour(tmp_path: Path) -> None:
    for colour, channels in ((False, 1), (True, 3)):
        file = npz(tmp_path / f"{channels}" / "toymnist.npz", colour)
        source = make("toymnist", file)
        assert [one.split for one in source.samples()] == ["train"] * 12 + ["val"] * 3 + ["test"] * 6
        pixels = source.read(source.samples()[13])
        assert pixels.image.shape == (channels, 28, 28)
        with np.load(file) as stored:
            expected = stored["val_images"][1] / 255.0
        np.testing.assert_allclose(pixels.image, expected.transpose(2, 0, 1) if colour else expected[None], rtol=1e-6)
        assert source.samples()[13].label == 1


def test_found_in_the_package_s_folder_and_by_size(home: Path) -> None:
    npz(home / ".medmnist" / "toymnist.npz")
    npz(home / ".medmnist" / "toymnist_64.npz", val_labels=np.array([[0], [0], [4]], dtype=np.uint8))
    assert make("toymnist", None).info.class_names == ("class-0", "class-1", "class-2")
    assert len(make("toymnist", home / ".medmnist", size=64).info.class_names) == 5
    assert make("toymnist", None, class_names=["a", "b", "c"]).info.class_names == ("a", "b", "c")
    with pytest.raises(errors.DataError, match=r"label 2, but 2 classes \(a, b\)"):
        make("toymnist", None, class_names=["a", "b"])


def test_prescribed_splits_reach_the_hospitals(tmp_path: Path) -> None:
    source = make("toymnist", npz(tmp_path / "toymnist.npz"))
    made = virtual_hospitals.make_hospitals(source, schema.PartitionConfig(kind="iid", sites=2), 3)
    for site in made:
        assert all(one.split == split for split, members in site.splits.items() for one in members)


def test_without_file_or_package() -> None:
    with pytest.raises(errors.MissingExtra, match=r"pip install medmnist, or download toymnist\.npz .* set data\.path"):
        make("toymnist", None)


def test_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        table.make(schema.SourceConfig(source="medmnist", options={"size": 30, "class_names": ["one"], "sise": 1}))
    assert len(caught.value.faults) == 4
    assert "write it as medmnist:NAME" in str(caught.value)
    assert "nearest: 'size'" in str(caught.value)
    with pytest.raises(errors.DataError, match=r"none\.npz: no such file; set data\.path to toymnist\.npz"):
        make("toymnist", tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train_labels": np.zeros((12, 14), dtype=np.uint8)}, "14 labels an image"),
        ({"train_labels": np.full((12, 1), -1)}, "no whole numbers from 0"),
        ({"train_labels": np.zeros((11, 1), dtype=np.uint8)}, "11 train labels for 12 images"),
        ({"val_images": np.zeros((3, 28, 28, 28), dtype=np.uint8)}, r"val_images of shape \(3, 28, 28, 28\)"),
        ({"test_images": np.zeros((6, 28, 28))}, "test_images of .* float64"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, changes: dict[str, np.ndarray], expected: str) -> None:
    with pytest.raises(errors.DataError, match=expected):
        make("toymnist", npz(tmp_path / "toymnist.npz", **changes))


def test_damaged_and_pickled_files(tmp_path: Path) -> None:
    whole = npz(tmp_path / "whole.npz").read_bytes()
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(errors.DataError, match=r"cut\.npz: unreadable"):
        make("toymnist", cut)
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, train_labels=np.array([{"a": 1}], dtype=object))
    with pytest.raises(errors.DataError, match=r"pickled\.npz: unreadable .*allow_pickle=False"):
        make("toymnist", pickled)
    other = tmp_path / "other.npz"
    np.savez(other, x=np.zeros(3))
    with pytest.raises(errors.DataError, match="no array 'train_"):
        make("toymnist", other)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A web server on this machine with one set."""
    npz(tmp_path / "web" / "toymnist.npz")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def package(folder: Path, url: str, md5: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the real one's form: a module with the table INFO."""
    entry = {"url": url, "MD5": md5, "label": {"0": "benign", "1": "malignant", "2": "other"}, "license": "CC BY 4.0"}
    folder.mkdir()
    (folder / "medmnist.py").write_text(f"INFO = {{'toymnist': {entry!r}}}\n")
    monkeypatch.delitem(sys.modules, "medmnist", raising=False)
    monkeypatch.syspath_prepend(str(folder))


def test_download(tmp_path: Path, home: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    md5 = hashlib.md5((tmp_path / "web" / "toymnist.npz").read_bytes()).hexdigest()
    package(tmp_path / "site", f"{address}/toymnist.npz", md5, monkeypatch)
    source = make("toymnist", None)
    assert source.info.class_names == ("benign", "malignant", "other")
    assert source.info.licence == "CC BY 4.0"
    assert [path.name for path in (home / ".medmnist").iterdir()] == ["toymnist.npz"]
    with pytest.raises(errors.DataError, match="medmnist has no set 'tinymnist'; it has toymnist"):
        make("tinymnist", None)


@pytest.mark.parametrize(
    ("file", "expected"), [("toymnist.npz", "md5 .*, the package states 0000"), ("gone.npz", "download failed .*404")]
)
def test_download_that_fails_leaves_nothing(
    tmp_path: Path, home: Path, address: str, monkeypatch: pytest.MonkeyPatch, file: str, expected: str
) -> None:
    package(tmp_path / "site", f"{address}/{file}", "0000", monkeypatch)
    with pytest.raises(errors.DataError, match=expected):
        make("toymnist", None)
    assert list((home / ".medmnist").iterdir()) == []


def test_a_package_that_names_a_local_file_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path / "site", "file:///etc/passwd", "0000", monkeypatch)
    with pytest.raises(errors.DataError, match="which is no web address"):
        make("toymnist", None)
