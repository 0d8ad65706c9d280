"""Hurt real federations in every way of the fault matrix, and write the table of docs/faults.md.

    python benchmarks/fault_table.py [--groups server freeze sites losses surroundings] [--report-only]

Runs the tests of tests/deployment/faults, each of which is one federation of two sites on loopback and writes a line
for every fault, and puts the lines into the page. Takes about twenty minutes on an idle machine. A group that
was not run keeps the rows it has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import block
import psutil

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "faults.md"
RESULTS = ROOT / "docs" / "faults.json"
GROUPS = {
    "server": "the coordinator's machine",
    "freeze": "a coordinator's machine that stands still",
    "sites": "a site's machine, and all machines",
    "losses": "slow sites and full disks",
    "surroundings": "what stands round a site",
}


def hurt(group: str) -> dict[str, Any]:
    """Run one group; its rows, and how busy the machine was before and after it.

    Raises:
        SystemExit: if it failed; a table of half a group would mislead.
    """
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="fedvfm-faults-") as folder:
        rows = Path(folder) / "rows.jsonl"
        test = ROOT / "tests" / "deployment" / "faults" / f"test_{group}.py"
        command = [sys.executable, "-m", "pytest", "-m", "slow", str(test), f"--basetemp={folder}/work"]
        made = subprocess.run(command, cwd=ROOT, env={**os.environ, "FEDVFM_FAULT_ROWS": str(rows)}, check=False)
        if made.returncode != 0:
            raise SystemExit(f"the group '{group}' failed; the page was left as it was")
        lines = [json.loads(line) for line in rows.read_text().splitlines()]
    load = [round(one, 1) for one in (before, os.getloadavg()[0])]
    return {"rows": lines, "load": load, "cores": psutil.cpu_count(), "python": platform.python_version()}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The table as Markdown."""
    yield "| fault | what happened | lost rounds | recovery |"
    yield "|---|---|---|---|"
    for group, title in GROUPS.items():
        if group in found:
            yield f"| **{title}** | | | |"
            yield from map(_line, found[group]["rows"])
    yield ""
    for group, title in GROUPS.items():
        if group in found:
            before, after = found[group]["load"]
            cores = found[group]["cores"]
            yield f"- {title}: measured on {cores} cores with a load of {before:g} before and {after:g} after."


def _line(row: dict[str, Any]) -> str:
    lost = row["lost"] or "none"
    seconds = f"{row['seconds']:.0f} s" if row["seconds"] else ""
    return f"| {row['fault']} | {row['happened']} | {lost} | {seconds} |"


def report(found: dict[str, Any]) -> None:
    """Write the rows, and the block of the page."""
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(lines(found))
    block.write(PAGE, "faults", text)
    print(text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--report-only", action="store_true", help="only write the page from the rows there are")
    given = parser.parse_args(arguments)
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for group in [] if given.report_only else given.groups:
        found[group] = hurt(group)
        report(found)
    report(found)


if __name__ == "__main__":
    main()
