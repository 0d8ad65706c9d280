"""What decoding in a child process costs `fedvfm data check`, and what that takes beside another checkout.

    python benchmarks/reading.py [--slices 1000] [--volumes 300] [--repeats 3] [--before CHECKOUT]

Two folders are made: DICOM studies of 100 slices (512 x 512, 16 bits), and NIfTI volumes of 40 MB (512 x 512 x 80, 16
bits), every second one packed with gzip. Each is read as a site's folder and looked through once, headers and all
pixels, in turns: "here" decodes in the process that asks, "apart" in its child. With `--before` the whole command runs
in both checkouts instead, "before" and "now". Every turn is a process of its own. Printed are medians of wall and
processor seconds (all processes together), and ratios to the first arm.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDE, DEPTH, STUDY = 512, 80, 100
NOT_READY = 20
COMMAND = """
try:
    from fedvfm.cli.main import main
except ImportError:  # where releases before had it
    from fedvfm.cli import main
main()
"""


def values(seed: int, depth: int) -> NDArray[np.int16]:
    """Smooth tissue with noise, as scanners make it. Shapes: (columns, rows, depth)."""
    rng = np.random.default_rng(seed)
    tissue = np.add.outer(np.sin(np.arange(SIDE) / 40), np.cos(np.arange(SIDE) / 60)) * 300
    noise = rng.integers(-40, 40, (SIDE, SIDE, 8), dtype=np.int16)
    return np.ascontiguousarray(tissue[..., None].astype(np.int16) + noise[..., np.arange(depth) % 8])


def make_slices(folder: Path, count: int) -> None:
    """``studies/`` with a table of labels, and studies of up to 100 files."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.data import dicom_writer

    numbers = range(0, count, STUDY)
    for number in numbers:
        depth = min(STUDY, count - number)
        dicom_writer.series(folder / "studies" / f"s{number}", values(number, depth), np.diag([0.7, 0.7, 2.5, 1.0]))
    rows = [f"s{number},{'ab'[at % 2]}" for at, number in enumerate(numbers)]
    (folder / "labels.csv").write_text("\n".join(["id,label", *rows]) + "\n")


def make_volumes(folder: Path, count: int) -> None:
    """``a/`` and ``b/`` with volumes."""
    import nibabel

    for number in range(count):
        path = folder / "ab"[number % 4 // 2] / f"v{number}.nii"
        path.parent.mkdir(exist_ok=True)
        image = nibabel.Nifti1Image(values(number, DEPTH), np.diag([0.7, 0.7, 2.5, 1.0]))
        content = image.to_bytes()
        if number % 2:
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content, 1))
        else:
            path.write_bytes(content)


def look(folder: Path, arm: str) -> dict[str, Any]:
    """One pass over a folder: seconds, and what says whether the same was read."""
    from fedvfm.config import schema
    from fedvfm.data.decoding import decoder
    from fedvfm.data.readiness import survey
    from fedvfm.data.sources import table

    started = time.perf_counter()
    with decoder.trusted() if arm == "here" else contextlib.nullcontext():
        source = table.make(schema.SourceConfig(source="folder", path=str(folder)))
        seen = survey.look(source, survey.spaced(source.samples(), 0))
    wall = time.perf_counter() - started
    decoder.close()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in used)
    return {"wall": wall, "cpu": cpu, "same": [len(seen.rows), len(seen.failures), seen.squares]}


def turn(folder: Path, arm: str, checkout: Path) -> dict[str, Any]:
    """:func:`look` in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--look", str(folder), "--arm", arm]
    return json.loads(_run(command, checkout))  # type: ignore[no-any-return]


def check(folder: Path, arm: str, checkout: Path) -> dict[str, Any]:
    """The command `fedvfm data check` of a checkout, which must find so many samples and be able to read all."""
    site = folder / "site.toml"
    site.write_text(f'name = "north"\ndevice = "cpu"\n\n[data]\nsource = "folder"\npath = "{folder}"\n')
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads(_run([sys.executable, "-c", COMMAND, "data", "check", str(site), "--json"], checkout))
    wall, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return {"wall": wall, "cpu": cpu, "same": [report["data"]["samples"], report["data"]["read"]]}


def _run(command: list[str], checkout: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=checkout, env=environment)
    if done.returncode not in (0, NOT_READY):
        sys.exit(f"{command}: exit code {done.returncode}")
    return done.stdout


def compare(name: str, folder: Path, arms: dict[str, Path], repeats: int) -> None:
    """Print medians of the arms, run in turns, and whether they read the same."""
    run = check if "before" in arms else turn
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for _ in range(repeats):
        for arm, checkout in arms.items():
            results[arm].append(run(folder, arm, checkout))
    same = {tuple(row["same"]) for rows in results.values() for row in rows}
    first = next(iter(results))
    for key in ("wall", "cpu"):
        middle = {arm: statistics.median(row[key] for row in rows) for arm, rows in results.items()}
        ratios = ", ".join(f"{arm} {value:.2f} s ({value / middle[first]:.3f})" for arm, value in middle.items())
        print(f"{name}, {key}: {ratios}")
    print(f"{name}: {'the same was read' if len(same) == 1 else f'NOT THE SAME: {same}'}", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=1000)
    parser.add_argument("--volumes", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--look", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.look is not None:
        print(json.dumps(look(given.look, given.arm)))
        return
    here = Path(__file__).resolve().parents[1]
    arms = {"before": given.before.resolve(), "now": here} if given.before else {"here": here, "apart": here}
    for name, count, make in (("slices", given.slices, make_slices), ("volumes", given.volumes, make_volumes)):
        if count:
            with tempfile.TemporaryDirectory() as folder:
                make(Path(folder), count)
                compare(f"{count} {name}", Path(folder), arms, given.repeats)


if __name__ == "__main__":
    main()
