"""MedMNIST's two-dimensional classification sets, from their own ``.npz`` files."""

from __future__ import annotations

import functools
import hashlib
import os
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import defect
from fedvfm.data import sample as data
from fedvfm.data.sources import index

SPLITS = ("train", "val", "test")
OPTIONS = ("class_names", "size")
SIZES = (28, 64, 128, 224)
TIMEOUT_S = 60.0


class MedMNIST:
    """``medmnist:NAME`` (``medmnist:pathmnist``), with the splits the authors prescribe.

    The file ``NAME.npz`` (``NAME_64.npz`` for ``size = 64``) is taken from ``path`` (the file, or a folder that holds
    it), else from ``~/.medmnist``; else, where the package ``medmnist`` is installed, it is downloaded there from the
    address and with the checksum the package states. Class names are those of the option ``class_names``, else the
    package's where it is installed, else ``class-0`` and so on.

    Raises:
        ConfigError: for a missing name and wrong options.
        MissingExtra: if there is no file and no package to download it with.
        DataError: if the file is damaged, fails its checksum, has several labels an image or volumes.

    Source: Yang et al., "MedMNIST v2", Scientific Data 2023; https://medmnist.com
    """

    def __init__(self, source: schema.SourceConfig) -> None:
        self._name, size, names = _options(source)
        self._path = find(self._name if size == 28 else f"{self._name}_{size}", self._name, source.path)
        labels = {split: _labels(self._path, split) for split in SPLITS}
        count = 1 + max(int(values.max(initial=0)) for values in labels.values())
        self._classes = (
            names or _package_classes(self._name) or tuple(f"class-{number}" for number in range(max(count, 2)))
        )
        if count > len(self._classes):
            raise defect.CLASS_UNKNOWN.error(
                f"{self._path}: label {count - 1}, but {len(self._classes)} classes ({', '.join(self._classes)}); name "
                "all in data.options.class_names"
            )
        self._samples = tuple(
            data.Sample(id=f"{split}-{number:06d}", label=int(label), split=split)
            for split, values in labels.items()
            for number, label in enumerate(values)
        )

    @property
    def info(self) -> data.SourceInfo:
        """Name, task, classes, licence and note."""
        licence = str(_package_info(self._name).get("license", "see medmnist.com; most sets CC BY 4.0"))
        note = "thumbnails for method work, not for clinical use; no patients known, so patients may be split"
        return data.SourceInfo(f"medmnist:{self._name}", "classification", self._classes, licence, note)

    def samples(self) -> Sequence[data.Sample]:
        """All samples: train, val, test, each in the file's order."""
        return self._samples

    def read(self, sample: data.Sample) -> data.Pixels:
        """Read one thumbnail.

        Raises:
            DataError: if the file is gone or damaged.
        """
        split, _, number = sample.id.partition("-")
        image = _array(self._path, self._path.stat().st_mtime_ns if self._path.is_file() else 0, f"{split}_images")[
            int(number)
        ]
        planes = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
        return data.Pixels(np.ascontiguousarray(planes, dtype=np.float32) / np.float32(255.0))


def _options(source: schema.SourceConfig) -> tuple[str, int, tuple[str, ...]]:
    """Set name, size and class names.

    Raises:
        ConfigError: listing every fault.
    """
    faults = index.unknown_options(source, OPTIONS)
    name = source.source.partition(":")[2]
    if not name.isidentifier():
        faults.append(f"data.source = '{source.source}': write it as medmnist:NAME, for example medmnist:pathmnist")
    size = source.options.get("size", 28)
    if isinstance(size, bool) or size not in SIZES:
        faults.append(f"data.options.size = {size!r}: one of {', '.join(map(str, SIZES))} is needed")
    names = source.options.get("class_names", [])
    if (
        not isinstance(names, list)
        or not all(isinstance(one, str) for one in names)
        or len(set(names)) != len(names)
        or len(names) == 1
    ):
        faults.append(f"data.options.class_names = {names!r}: a list of two or more different names is needed")
    if faults:
        raise errors.ConfigError("data source 'medmnist'", faults)
    return name, int(str(size)), tuple(str(one) for one in names) if isinstance(names, list) else ()


def find(stem: str, name: str, path: str | None) -> Path:
    """The set's file: at ``path``, in ``~/.medmnist``, or downloaded there.

    Raises:
        DataError: if there is none at ``path``, or the download fails.
        MissingExtra: if the package that knows the address is not installed.
    """
    if path:
        given = Path(path).expanduser()
        file = given / f"{stem}.npz" if given.is_dir() else given
        if not file.is_file():
            raise defect.NOT_FOUND.error(
                f"{file}: no such file; set data.path to {stem}.npz or the folder that holds it"
            )
        return file
    file = Path.home() / ".medmnist" / f"{stem}.npz"
    return file if file.is_file() else _download(file, name, stem)


def _package() -> dict[str, Any]:
    """The package's table of sets, empty where it is not installed."""
    try:
        from medmnist import INFO  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return {}
    return dict(INFO)


def _package_info(name: str) -> dict[str, Any]:
    return dict(_package().get(name, {}))


def _package_classes(name: str) -> tuple[str, ...]:
    labels = _package_info(name).get("label", {})
    return tuple(str(labels[key]) for key in sorted(labels, key=int))


def _download(file: Path, name: str, stem: str) -> Path:
    """Fetch the file, check it, and put it in its place in one step.

    Raises:
        MissingExtra: if the package is not installed.
        DataError: for an unknown set, no network, or a wrong checksum.
    """
    known = _package()
    if not known:
        raise errors.MissingExtra(
            f"{file}: no such file, and the package 'medmnist' that knows where to get it is not installed; pip "
            f"install medmnist, or download {stem}.npz from medmnist.com and set data.path"
        )
    suffix = stem[len(name) :]
    if name not in known or f"url{suffix}" not in known[name]:
        raise defect.OPTIONS.error(f"medmnist has no set '{stem}'; it has {', '.join(sorted(known))}")
    url, md5 = str(known[name][f"url{suffix}"]), str(known[name][f"MD5{suffix}"])
    if not url.startswith(("https://", "http://")):
        raise defect.NOT_FOUND.error(
            f"medmnist names '{url}' for '{stem}', which is no web address; update the package"
        )
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        found = _fetch(url, part)
        if found != md5:
            raise defect.UNREADABLE.error(
                f"{url}: md5 {found}, the package states {md5}; try again later, or update the package"
            )
        part.replace(file)
    except (OSError, urllib.error.URLError) as error:
        raise defect.NOT_FOUND.error(
            f"{url}: download failed ({error}); fetch {stem}.npz elsewhere and set data.path"
        ) from None
    finally:
        part.unlink(missing_ok=True)
    return file


def _fetch(url: str, part: Path) -> str:
    """Download to ``part`` and return its md5, the checksum the package states; it finds damage, not malice."""
    digest = hashlib.md5(usedforsecurity=False)
    answer = urllib.request.urlopen(url, timeout=TIMEOUT_S)  # noqa: S310  the caller has checked the scheme
    with answer, part.open("wb") as out:
        while block := answer.read(1 << 20):
            digest.update(block)
            out.write(block)
    return digest.hexdigest()


@functools.lru_cache(maxsize=6)
def _array(path: Path, changed_ns: int, key: str) -> NDArray[Any]:
    """One array of the file; ``changed_ns`` makes a changed file a new key. Pickled objects are refused.

    Raises:
        DataError: if the file is damaged or has no such array.
    """
    try:
        # Opened here: np.load leaves a file open that is no archive.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            array: NDArray[Any] = file[key]
    except KeyError:
        raise defect.UNREADABLE.error(
            f"{path}: no array '{key}'; this is no MedMNIST file, download it again"
        ) from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise defect.UNREADABLE.error(f"{path}: unreadable ({error}); download it again") from None
    return array


def _labels(path: Path, split: str) -> NDArray[np.int64]:
    """The labels of one split.

    The images are looked at too, so that a set of volumes is refused before a run starts; they stay in memory.

    Raises:
        DataError: for several labels an image, labels below 0, counts that differ, images that are no 8-bit pictures.
    """
    changed = path.stat().st_mtime_ns
    labels, images = _array(path, changed, f"{split}_labels"), _array(path, changed, f"{split}_images")
    flat = labels.reshape(len(labels), -1)
    if flat.shape[1] != 1:
        raise defect.OPTIONS.error(
            f"{path}: {flat.shape[1]} labels an image; only sets with one are read, not multi-label"
        )
    if flat.dtype.kind not in "iu" or (flat.size and int(flat.min()) < 0):
        raise defect.UNREADABLE.error(f"{path}: {split}_labels are no whole numbers from 0; download it again")
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
        raise defect.OPTIONS.error(
            f"{path}: {split}_images of shape {images.shape} and type {images.dtype}; only 8-bit grey or RGB pictures "
            "are read, no volumes"
        )
    if len(images) != len(flat):
        raise defect.UNREADABLE.error(f"{path}: {len(flat)} {split} labels for {len(images)} images; download it again")
    return np.asarray(flat[:, 0], dtype=np.int64)
