"""The plan's forecast of memory beside what runs used: ``simulate --dry-run`` and the same experiment, shortened.

    python benchmarks/memory_forecast.py [--only brain-mri]

Used is the peak of the proportional set size (pages that processes share count once) over all processes of a run,
looked at every 50 ms. Data of nuclei and cells: see simulations/README.md (FEDVFM_DATA); what is not here is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

TWO = ("--rounds", "2", "--set", "baselines=[]")
FEW = ("--set", "partition.train=8", "--set", "partition.val=2", "--set", "partition.test=6")
NO_FILES = ("--set", "cache_disk_mib=0")
CASES: dict[str, tuple[str, ...]] = {
    "brain-mri": ("brain-mri", *TWO),
    "brain-mri, all arms, no files": ("brain-mri", "--rounds", "2", *NO_FILES),
    "brain-mri, batch 8": ("brain-mri", *TWO, "--set", "recipe.optimiser.batch_size=8"),
    "brain-mri, batch 8, all blocks": (
        *("brain-mri", *TWO, "--set", "recipe.optimiser.batch_size=8"),
        *("--set", "recipe.adapter.layers=[]", "--set", "partition.train=4"),
    ),
    "nuclei": ("nuclei", *TWO, *FEW),
    "nuclei, no files": ("nuclei", *TWO, *FEW, *NO_FILES),
    "nuclei, U-Net": ("nuclei", "--rounds", "1", "--set", 'baselines=["unet"]', *FEW),
    "nuclei, 16 views, no files": ("nuclei", "--rounds", "8", "--set", "baselines=[]", *FEW, *NO_FILES),
    "cells": ("cells", *TWO),
    "sam-nuclei": ("sam-nuclei", "--rounds", "1", "--set", "baselines=[]", *FEW),
}


def forecast(arguments: tuple[str, ...]) -> float | None:
    """MiB of the plan; None where it cannot be made here."""
    command = [sys.executable, "-m", "fedvfm.cli", "simulate", *arguments, "--dry-run", "--json"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(json.loads(made.stdout)["peak_mib"]) if made.returncode == 0 else None


def used(arguments: tuple[str, ...], folder: Path) -> float | None:
    """MiB of the run; None where it failed."""
    command = [sys.executable, "-m", "fedvfm.cli", "simulate", *arguments, "--output", str(folder), "--quiet"]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):  # one that ended just now
            peak = max(peak, sum(one.memory_full_info().pss for one in (process, *process.children(recursive=True))))
        time.sleep(0.05)
    if process.returncode:
        print(process.stderr.read() if process.stderr else "", file=sys.stderr)
        return None
    return peak / (1 << 20)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    wanted = parser.parse_args().only
    print(f"{'case':<32}  forecast MiB  used MiB  forecast / used")
    with tempfile.TemporaryDirectory(prefix="fedvfm-forecast-") as name:
        for number, (case, arguments) in enumerate(CASES.items()):
            if wanted not in case:
                continue
            expected = forecast(arguments)
            peak = None if expected is None else used(arguments, Path(name) / str(number))
            if expected is None or peak is None:
                print(f"{case:<32}  cannot be run here")
            else:
                print(f"{case:<32}  {expected:12,.0f}  {peak:8,.0f}  {expected / peak:15.2f}", flush=True)


if __name__ == "__main__":
    main()
