"""The documents as a site: every page is there, every link leads somewhere, code has the form of code, no network."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")

ROOT = Path(__file__).parents[2]
WALKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
"""Elements that a browser loads by itself, and the attribute with the address."""


class Addresses(HTMLParser):
    """What a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in LOADED and values.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(values.get(LOADED[tag]) or "")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as its command builds it: a link that leads nowhere, or a page that is left out, stops it."""
    to = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(to)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return to


def test_every_document_is_a_page(built: Path) -> None:
    own = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    own = own - {Path("README.html")} | {Path("tutorials") / f"{path.stem}.html" for path in WALKS}
    assert {str(path) for path in own if not (built / path).is_file()} == set()
    assert "fedvfm.simulate" in (built / "api.html").read_text()


def test_no_page_asks_the_network(built: Path) -> None:
    for path in built.rglob("*.html"):
        page = Addresses()
        page.feed(path.read_text())
        outside = [address for address in page.loaded if re.match(r"(https?:)?//", address)]
        assert not outside, path.name


def test_python_in_the_pages_is_python() -> None:
    blocks = {
        f"{path.name} {number}": block
        for path in sorted((ROOT / "docs").rglob("*.md"))
        for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.M | re.S))
    }
    assert blocks
    for name, block in blocks.items():
        ast.parse(block, name)


@pytest.mark.slow
@pytest.mark.parametrize("path", WALKS, ids=lambda path: path.stem)
def test_a_walk_can_be_walked(path: Path, tiny_dino: Path, tmp_path: Path) -> None:
    """All cells of a notebook in a process and a folder of its own, with a small backbone."""
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "walk.py").write_text("\n".join(cells))
    environment = {**os.environ, "FEDVFM_TUTORIAL_BACKBONE": str(tiny_dino), "PYTHONPATH": str(ROOT)}
    environment |= {"FLWR_HOME": str(tmp_path / "flwr")}
    done = subprocess.run(
        [sys.executable, "walk.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    left = {"researcher": "runs/rank-4/report.html", "coordinator": "receipt.json", "dicom": "runs/balls/report.html"}
    assert (tmp_path / left[path.stem]).is_file()
