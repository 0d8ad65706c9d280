"""Nuclei and cells: on small folders of the same layout, and on the real ones where they are."""

from __future__ import annotations

import collections
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data.partition import virtual_hospitals
from fedvfm.data.sources import cells, index, nuclei, table

SHARED = Path(os.environ.get("FEDVFM_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def real(name: str) -> schema.SourceConfig:
    if not (SHARED / name / "index.csv").is_file():
        pytest.skip(f"needs the data set '{name}': set FEDVFM_DATA to the folder that holds it")
    return schema.SourceConfig(source=name, path=str(SHARED / name))


def small_nuclei(path: Path) -> Path:
    instances = np.zeros((20, 24), dtype=np.uint16)
    instances[2:6, 3:9], instances[10:15, 10:20] = 1, 700
    lines = ["id,site,width"]
    for part in ("images", "labels"):
        (path / part).mkdir(parents=True)
    for number in range(6):
        Image.fromarray(np.full((20, 24), 10 * number, dtype=np.uint8)).save(path / "images" / f"n{number}.png")
        Image.fromarray(instances).save(path / "labels" / f"n{number}.png")
        lines.append(f"n{number},{'dark' if number % 2 else 'bright'},24")
    (path / "index.csv").write_text("\n".join(lines))
    return path


def small_cells(path: Path) -> Path:
    (path / "images").mkdir(parents=True)
    lines = ["id,label,slide"]
    for number, label in enumerate(["red", "white", "platelet", "red"]):
        Image.fromarray(np.full((12, 12, 3), 40 * number, dtype=np.uint8)).save(path / "images" / f"c{number}.png")
        lines.append(f"c{number},{label},slide{number // 2}")
    (path / "index.csv").write_text("\n".join(lines))
    return path


def test_nuclei_layout(tmp_path: Path) -> None:
    source = nuclei.Nuclei(schema.SourceConfig(source="nuclei", path=str(small_nuclei(tmp_path))))
    assert [one.site for one in source.samples()] == ["bright", "dark"] * 3
    pixels = source.read(source.samples()[2])
    assert pixels.image.shape == (1, 20, 24)
    assert pixels.mask is not None
    assert pixels.mask.dtype == np.int64
    assert (pixels.mask.sum(), pixels.mask.max()) == (4 * 6 + 5 * 10, 1)


def test_nuclei_faults(tmp_path: Path) -> None:
    given = schema.SourceConfig(source="nuclei", path=str(small_nuclei(tmp_path)))
    (tmp_path / "images" / "n1.png").unlink()
    (tmp_path / "labels" / "n4.png").unlink()
    with pytest.raises(
        errors.DataError, match=r"(?s)2 faults.*images/n1\.png: no such file.*labels/n4\.png: no such file"
    ):
        nuclei.Nuclei(given)
    (tmp_path / "index.csv").write_text("id,site\nn0,a\nn0,a\n")
    with pytest.raises(errors.DataError, match="id 'n0' stands in 2 rows"):
        nuclei.Nuclei(given)
    (tmp_path / "index.csv").write_text("id,site\nn0,\n")
    with pytest.raises(errors.DataError, match="line 2: no value for 'site'"):
        nuclei.Nuclei(given)
    (tmp_path / "index.csv").write_text('id,site\n\nn0,a\n\n"n\n1",b\nn2,\n')
    with pytest.raises(errors.DataError, match="line 7: no value for 'site'"):  # as an editor counts them
        nuclei.Nuclei(given)
    (tmp_path / "index.csv").write_text("id,site\nn0,a\n")
    Image.fromarray(np.zeros((5, 5), dtype=np.uint16)).save(tmp_path / "labels" / "n0.png")
    source = nuclei.Nuclei(given)
    with pytest.raises(errors.DataError, match=r"images/n0\.png is 20 x 24 pixels, its label 5 x 5"):
        source.read(source.samples()[0])


def test_cells_layout_and_faults(tmp_path: Path) -> None:
    given = schema.SourceConfig(source="cells", path=str(small_cells(tmp_path)))
    source = cells.Cells(given)
    assert [(one.label, one.patient) for one in source.samples()] == [
        (0, "slide0"),
        (1, "slide0"),
        (2, "slide1"),
        (0, "slide1"),
    ]
    pixels = source.read(source.samples()[1])
    assert (pixels.image.shape, pixels.mask) == ((3, 12, 12), None)
    (tmp_path / "images" / "c2.png").unlink()
    (tmp_path / "index.csv").write_text("id,label,slide\nc0,blue,s\nc2,red,s\n")
    with pytest.raises(
        errors.DataError, match=r"(?s)'blue'; known: red, white, platelet.*images/c2\.png: no such file"
    ):
        cells.Cells(given)


@pytest.mark.parametrize("name", ["nuclei", "cells"])
def test_where_a_data_set_is_looked_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    {"nuclei": small_nuclei, "cells": small_cells}[name](tmp_path / "data" / name)
    monkeypatch.setenv("FEDVFM_DATA", str(tmp_path / "data"))
    assert len(table.make(schema.SourceConfig(source=name)).samples()) > 3
    monkeypatch.setenv("FEDVFM_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(
        errors.DataError,
        match=rf"no folder at .*elsewhere/{name}; set data\.path .* or the environment variable FEDVFM_DATA",
    ):
        table.make(schema.SourceConfig(source=name))
    with pytest.raises(errors.ConfigError, match=r"data\.options\.sise: unknown option"):
        table.make(schema.SourceConfig(source=name, options={"sise": 1}))


def test_data_below_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_cells(tmp_path / "desk" / "data" / "cells")
    small_cells(tmp_path / "shared" / "data" / "nuclei")
    monkeypatch.delenv("FEDVFM_DATA", raising=False)
    monkeypatch.chdir(tmp_path / "desk")
    assert len(table.make(schema.SourceConfig(source="cells")).samples()) == 4
    with pytest.raises(errors.DataError, match=rf"no folder at {tmp_path}/desk/data/nuclei; set data\.path"):
        table.make(schema.SourceConfig(source="nuclei"))


def test_a_set_found_by_its_name_is_resolved_to_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_cells(tmp_path / "data" / "cells")
    monkeypatch.setenv("FEDVFM_DATA", str(tmp_path / "data"))
    found = index.resolve(schema.SourceConfig(source="cells"))
    assert found.path == str(tmp_path / "data" / "cells")
    monkeypatch.setenv("FEDVFM_DATA", str(tmp_path / "elsewhere"))
    assert len(table.make(found).samples()) == 4
    monkeypatch.chdir(tmp_path)
    assert index.resolve(schema.SourceConfig(source="folder", path="mine")).path == str(tmp_path / "mine")
    assert index.resolve(schema.SourceConfig(source="brain-mri")).path is None


def test_empty_rows_below_a_table_are_no_rows(tmp_path: Path) -> None:
    """Spreadsheets write them as commas alone, with more of them than there are columns where a cell was once used."""
    path = tmp_path / "t.csv"
    path.write_text("id,label\na,x\n,\n , \n,,,\nb,y\n")
    rows = index.read_csv(path, ("id", "label"))
    assert [(row["id"], row["label"], row.line) for row in rows] == [("a", "x", 2), ("b", "y", 6)]
    path.write_text("id,label\na,x\n,y\n")
    with pytest.raises(errors.DataError, match="line 3: no value for 'id'"):
        index.read_csv(path, ("id", "label"))


def test_unknown_source() -> None:
    with pytest.raises(errors.UnknownName, match=r"unknown data source 'nuclai'; known: .*nearest: 'nuclei'"):
        table.make(schema.SourceConfig(source="nuclai"))


def test_a_source_of_one_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three lines in a notebook: a function of the configuration, a name, and it can be used."""
    made = nuclei.Nuclei(schema.SourceConfig(source="nuclei", path=str(small_nuclei(tmp_path))))
    monkeypatch.setattr(table.TABLE, "_entries", dict(table.TABLE._entries))  # gone with the test
    table.TABLE.add("test-own", lambda given: made if given.source == "test-own:x" else None, replace=True)
    assert table.make(schema.SourceConfig(source="test-own:x")) is made


def test_hospitals_travel_to_other_processes(tmp_path: Path) -> None:
    source = nuclei.Nuclei(schema.SourceConfig(source="nuclei", path=str(small_nuclei(tmp_path))))
    for site in virtual_hospitals.make_hospitals(source, schema.PartitionConfig(), 0):
        copy = pickle.loads(pickle.dumps(site))
        np.testing.assert_array_equal(copy.read(copy.test[0]).image, site.read(site.test[0]).image)


def test_real_nuclei() -> None:
    source = nuclei.Nuclei(real("nuclei"))
    counts = collections.Counter(one.site for one in source.samples())
    assert len(source.samples()) == 664
    assert (counts["fluo256"], counts["brightfield1024"]) == (334, 16)
    for site in counts:
        pixels = source.read(next(one for one in source.samples() if one.site == site))
        assert pixels.mask is not None
        assert pixels.mask.shape == pixels.image.shape[1:]
        assert 0 < pixels.mask.mean() < 0.8
    usable = ("brightfield1024", "fluo256", "fluo360", "fluo696", "he_white320", "purple320")
    partition = schema.PartitionConfig(include=usable, train=20, val=5, test=60)
    made = {site.name: site for site in virtual_hospitals.make_hospitals(source, partition, 0)}
    assert tuple(made) == usable
    assert {name: len(site.train) for name, site in made.items()} == dict.fromkeys(usable, 20) | {"brightfield1024": 10}
    assert len(made["fluo360"].test) == 60


def test_real_cells_slides_stay_together() -> None:
    source = cells.Cells(real("cells"))
    assert collections.Counter(one.label for one in source.samples()) == {0: 698, 1: 372, 2: 361}
    assert source.read(source.samples()[0]).image.shape == (3, 112, 112)
    made = virtual_hospitals.make_hospitals(source, schema.PartitionConfig(kind="dirichlet", sites=4, alpha=0.3), 0)
    home: dict[str | None, tuple[str, str]] = {}
    for site in made:
        for split, members in site.splits.items():
            for one in members:
                assert home.setdefault(one.patient, (site.name, split)) == (site.name, split)
    assert sum(len(members) for site in made for members in site.splits.values()) == 1431


@pytest.mark.parametrize("name", ["../outside", ".hidden", "a/b", "a\\b"])
def test_an_id_that_leaves_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "index.csv").write_text(f"id,site\n{name},north\n")
    with pytest.raises(errors.DataError, match="no plain file name"):
        index.read_files(tmp_path / "index.csv", ("id", "site"))
