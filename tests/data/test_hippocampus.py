"""Hippocampus: six virtual hospitals of a folder of volumes, and how the folder is brought here."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.client
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import urllib.error
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.cli import main as cli
from fedvfm.config import schema
from fedvfm.data.partition import virtual_hospitals
from fedvfm.data.sources import fetch, hippocampus, index, table
from fedvfm.simulation import experiment
from tests.data import test_index_sources

CASES = 70
CONTRACT = schema.DataContract(class_names=hippocampus.CLASS_NAMES, input_size=(16, 16), stack=3)


def name(number: int) -> str:
    return f"hippocampus_{number:03d}.nii.gz"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it is kept, of volumes of 4 x 5 x 6 voxels with a far outlier each."""
    root, rng = tmp_path_factory.mktemp("hippocampus"), np.random.default_rng(0)
    for number in range(CASES):
        voxels = rng.integers(10, 90, (4, 5, 6)).astype(np.int32)
        voxels[0, 0, 0] = 10_000
        labels = rng.integers(0, 3, voxels.shape).astype(np.uint8)
        for part, values in (("images", voxels), ("labels", labels)):
            (root / part).mkdir(exist_ok=True)
            nibabel.Nifti1Image(values, np.eye(4)).to_filename(root / part / name(number))
    return root


@functools.cache
def source(path: Path, **options: Any) -> Any:
    values = {"source": "hippocampus", "path": str(path), "options": options}
    return table.make(schema.SourceConfig.model_validate(values), CONTRACT)


def test_every_case_is_at_one_hospital_in_one_split(whole: Path) -> None:
    made = source(whole)
    hospitals = virtual_hospitals.make_hospitals(made, schema.PartitionConfig(), 0)
    assert [one.name for one in hospitals] == sorted(hippocampus.SHARES)
    seen = [{sample.unit for sample in part} for one in hospitals for part in one.splits.values()]
    assert sum(map(len, seen)) == len(set().union(*seen)) == CASES
    sizes = {one.name: len({sample.unit for sample in one.train}) for one in hospitals}
    assert sizes["north"] == max(sizes.values()) > 3 * sizes["coast"] == 3 * min(sizes.values())
    assert made.info.note.endswith(f"; {CASES} of its 199 cases")
    names = [f"case {number}" for number in range(CASES)]
    assert hippocampus.deal(names, 0) == hippocampus.deal(names[::-1], 0) != hippocampus.deal(names, 1)


def test_the_published_number_of_cases_gives_the_stated_sizes() -> None:
    homes = hippocampus.deal(list(fetch.cases()), 0)
    counts = {site: dict.fromkeys(splits, 0) for site, splits in hippocampus.SHARES.items()}
    for site, split in homes.values():
        counts[site][split] += 1
    assert counts == hippocampus.SHARES
    assert {min(one["train"] for one in counts.values()), max(one["train"] for one in counts.values())} == {10, 50}


def test_every_nth_slice_is_of_training_alone(whole: Path) -> None:
    every, third = source(whole), source(whole, every=3)
    for split, of in (("train", 3), ("val", 1), ("test", 1)):
        counts = [sum(sample.split == split for sample in made.samples()) for made in (every, third)]
        assert counts[0] == of * counts[1] > 0
    assert {one.part.index % 3 for one in third.samples() if one.split == "train" and one.part} == {0}


def test_a_scanner_is_that_of_the_hospital_and_draws_the_same_each_time(whole: Path) -> None:
    shifted, plain = source(whole), source(whole, appearance=False)
    for site in ("north", "coast"):
        sample = next(one for one in shifted.samples() if one.site == site and one.part and one.part.index == 3)
        image = shifted.read(sample).image
        assert np.array_equal(image, shifted.read(sample).image)
        mask, expected = shifted.read(sample).mask, plain.read(sample).mask
        assert np.array_equal(mask, expected)
        assert image.shape == (3, *mask.shape)
        # The outlier does not press a slice into nothing before noise is added to it.
        assert image.std() > 0.1
    assert plain.read(sample).image.std() < 0.3 * image.std()


def test_too_few_cases_and_wrong_options_are_one_clear_error(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(errors.DataError, match=r"40 cases are too few for 6 hospitals.*bring all 199"):
        hippocampus.deal([str(number) for number in range(40)], 0)
    with pytest.raises(errors.ConfigError, match=r"(?s)every = 0.*seed = -1"):
        source(whole, every=0, seed=-1)
    with pytest.raises(errors.ConfigError, match=r"options\.evry: unknown option.*'every'"):
        source(whole, evry=2)
    with pytest.raises(errors.DataError, match=r"fedvfm data fetch hippocampus"):
        source(tmp_path / "nowhere")


def test_a_run_keeps_the_folder_that_was_found_by_name(monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    monkeypatch.setenv("FEDVFM_DATA", str(whole.parent))
    assert index.resolve(schema.SourceConfig(source=whole.name)).path == str(whole)


@pytest.mark.parametrize("bundled", ["sam-hippocampus", "sam-brain-mri"])
def test_the_bundled_recipes_have_no_fault_and_a_small_payload(bundled: str) -> None:
    model = experiment.examine(experiment.load(bundled))
    numbers = sum(parameter.numel() for group in model.trainable().values() for parameter in group)
    assert numbers < 0.08 * model.backbone_parameters
    assert model.frozen_blocks >= 8  # what lies before is computed once


# -- fetching ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, whole: Path) -> Path:
    """The small set is what is known, and an empty folder is where it goes; that folder."""
    digests = {}
    for number in range(CASES):
        parts = (gzip.decompress((whole / part / name(number)).read_bytes()) for part in ("images", "labels"))
        digests[name(number).removesuffix(".nii.gz")] = hashlib.sha256(b"".join(parts)).hexdigest()
    monkeypatch.setattr(fetch, "cases", lambda: digests)
    monkeypatch.setenv("FEDVFM_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "hippocampus"


def archive(whole: Path, leave: int = -1) -> bytes:
    """A tar as it is published, with what such archives hold besides, and members that would leave the folder."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:

        def add(path: str, content: bytes, **more: Any) -> None:
            member = tarfile.TarInfo(path)
            member.size = len(content)
            for key, value in more.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content))

        add("Task04_Hippocampus/dataset.json", b"{}")
        add("../../escape.nii.gz", b"x")
        add("Task04_Hippocampus/imagesTr/hippocampus_000.nii.gz", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        for number in range(CASES):
            for part in ("images", "labels"):
                add(f"Task04_Hippocampus/{part}Tr/._{name(number)}", b"mac")
                if number != leave:
                    content = (whole / part / name(number)).read_bytes()
                    add(f"Task04_Hippocampus/{part}Tr/{name(number)}", content)
    return stream.getvalue()


def test_a_download_is_checked_and_only_known_files_are_written(
    monkeypatch: pytest.MonkeyPatch, known: Path, whole: Path
) -> None:
    content, asked = archive(whole), []

    def answer(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(content)

    monkeypatch.setattr(fetch.urllib.request, "urlopen", answer)
    with pytest.raises(errors.DataError, match="published is 9d24dba7"):
        fetch.fetch("hippocampus")
    assert not known.exists()
    right = hashlib.md5(content, usedforsecurity=False).hexdigest()
    monkeypatch.setitem(fetch.KNOWN, "hippocampus", fetch.Known("files", "somewhere", "https://example.org/x", right))
    done = fetch.fetch("hippocampus")
    assert (done.samples, done.written, done.folder) == (CASES, 2 * CASES, str(known))
    assert len([path for path in known.parent.parent.rglob("*") if path.is_file()]) == 2 * CASES
    # What is here and whole is not asked for again; what was damaged is.
    assert fetch.fetch("hippocampus").written == 0
    assert len(asked) == 2
    (known / "labels" / name(3)).write_bytes(b"cut short")
    assert fetch.fetch("hippocampus").written == 2


def test_files_that_are_here_already_take_the_networks_place(known: Path, whole: Path, tmp_path: Path) -> None:
    tar = tmp_path / "part.tar"
    tar.write_bytes(archive(whole, leave=5))
    with pytest.raises(errors.DataError, match=r"1 of 70 cases could not be taken \(1 are not in it, 0 differ.*_005"):
        fetch.fetch("hippocampus", tar)
    assert fetch.fetch("hippocampus", whole).written == 2
    (known / "images" / name(1)).unlink()
    # Damaged behind its first member.
    noise, stream = np.random.default_rng(0).bytes(300_000), io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as two:
        for member in (tarfile.TarInfo("a"), tarfile.TarInfo("b")):
            member.size = len(noise)
            two.addfile(member, io.BytesIO(noise[::-1] if member.name == "a" else noise))
    packed = bytearray(lzma.compress(stream.getvalue(), preset=0))
    packed[200_000:200_400] = bytes(400)
    for content in (b"no tar", bytes(packed)):
        (tmp_path / "no.tar").write_bytes(content)
        with pytest.raises(errors.DataError, match=r"cannot be read as a folder or a tar archive"):
            fetch.fetch("hippocampus", tmp_path / "no.tar")
    with pytest.raises(errors.DataError, match=r"nowhere: there is no such file or folder"):
        fetch.fetch("hippocampus", tmp_path / "nowhere")


def test_another_file_under_a_known_name_is_refused(known: Path, whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for part in ("images", "labels"):
        (other / part).mkdir(parents=True)
        content = gzip.compress(b"another volume" if part == "images" else b"labels")
        (other / part / name(2)).write_bytes(content)
    for more in (b"", gzip.compress(b"hidden behind the right content")):
        if more:
            for part in ("images", "labels"):
                (other / part / name(2)).write_bytes((whole / part / name(2)).read_bytes() + more)
        with pytest.raises(errors.DataError, match=r"69 are not in it, 1 differ"):
            fetch.fetch("hippocampus", other)
    assert not list(known.rglob("*.nii.gz"))


@pytest.mark.parametrize(
    "fault",
    [urllib.error.URLError("no network"), http.client.BadStatusLine("a proxy's page")],
    ids=["network", "proxy"],
)
def test_without_a_network_it_is_said_where_the_files_go(
    monkeypatch: pytest.MonkeyPatch, known: Path, fault: Exception
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(fetch.urllib.request, "urlopen", refuse)
    for one in fetch.KNOWN:
        with pytest.raises(errors.DataError) as caught:
            fetch.fetch(one)
        text = str(caught.value)
        assert str(known.parent / one) in text
        assert fetch.KNOWN[one].needs in text
        assert f"fedvfm data fetch {one} --from" in text
    with pytest.raises(errors.UnknownName, match="nearest: 'nuclei'"):
        fetch.fetch("nucleus")


def test_a_set_with_a_table_is_checked_and_copied(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDVFM_DATA", str(tmp_path / "data"))
    given = test_index_sources.small_nuclei(tmp_path / "given")
    monkeypatch.setattr("sys.argv", ["fedvfm", "data", "fetch", "nuclei", "--from", str(given), "--json"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    row = json.loads(capsys.readouterr().out)
    assert (row["samples"], row["written"], row["folder"]) == (6, 13, str(tmp_path / "data" / "nuclei"))
    assert fetch.fetch("nuclei").written == 0
    (given / "labels" / "n1.png").unlink()
    with pytest.raises(errors.DataError, match=r"labels/n1\.png: no such file"):
        fetch.fetch("nuclei", given)


@pytest.mark.parametrize(
    ("point", "kept"), [("file-renamed:4", True), ("set-replaced:1", False), ("set-replaced:7", False)]
)
def test_a_set_that_was_not_replaced_to_the_end_is_the_old_one_or_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, point: str, kept: bool
) -> None:
    monkeypatch.setenv("FEDVFM_DATA", str(tmp_path / "data"))
    given, folder = test_index_sources.small_nuclei(tmp_path / "given"), tmp_path / "data" / "nuclei"
    fetch.fetch("nuclei", given)
    old = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in (given / "images").iterdir():
        Image.fromarray(np.full((20, 24), 200, dtype=np.uint8)).save(path)
    rows = (given / "index.csv").read_text()
    (given / "index.csv").write_text(rows.replace("bright", "elsewhere"))
    code = "import sys; from pathlib import Path; from fedvfm.data.sources import fetch; "
    code += "fetch.fetch('nuclei', Path(sys.argv[1]))"
    call, environment = [sys.executable, "-c", code, str(given)], {**os.environ, "FEDVFM_FAULT_POINT": point}
    assert subprocess.run(call, env=environment, check=False, timeout=120).returncode == -signal.SIGKILL
    if kept:
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == old
    else:
        with pytest.raises(errors.DataError, match=r"index\.csv"):
            table.make(schema.SourceConfig(source="nuclei", path=str(folder)))
    assert fetch.fetch("nuclei", given).written > 0
    for path in given.rglob("*.*"):
        assert (folder / path.relative_to(given)).read_bytes() == path.read_bytes()
    assert {path.name for path in folder.parent.iterdir()} == {"nuclei"}


@pytest.mark.slow
def test_the_real_set_is_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = test_index_sources.SHARED / "hippocampus"
    if not (real / "images").is_dir():
        pytest.skip("needs the data set 'hippocampus': set FEDVFM_DATA to the folder that holds it")
    monkeypatch.setenv("FEDVFM_DATA", str(tmp_path))
    done = fetch.fetch("hippocampus", real)
    assert (done.samples, done.written) == (199, 398)
