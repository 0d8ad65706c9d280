"""docs/files.md says nothing that no test holds."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_made_from_the_tests() -> None:
    spec = importlib.util.spec_from_file_location("make_files", ROOT / "docs" / "make_files.py")
    assert spec is not None
    assert spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.PAGE.read_text(encoding="utf-8") == page.text(), "run: python docs/make_files.py"


def test_rows_of_files_and_what_happens_to_them_are_from_tests_alone() -> None:
    page = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    made = re.sub(r"<!-- rows: \w+ -->.*?<!-- end -->", "", page, flags=re.DOTALL)
    assert not [line for line in made.splitlines() if line.startswith("| kind")]
    assert len(re.findall(r"^\|.*`[\w/]+\.py::\w+` \|$", page, re.MULTILINE)) > 80
