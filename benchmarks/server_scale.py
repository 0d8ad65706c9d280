"""What the coordinator needs to join many updates: time and memory, beside another checkout.

    python benchmarks/server_scale.py [--before CHECKOUT] [--updates 1000] [--sites 100] [--pairs 48] [--runs 1]

Updates of 2 M numbers (48 pairs of rank 16 at width 1024, and a head), from the seed, one after another, as a round
hands them over; rule ``mean`` with weights by examples, then rule ``svd``. What a round calls is called: fold, finish,
and the error of averaging the factors. Decoding and admission are not in it. Each figure is a process of its own, BLAS
on one thread; ``--before`` names another checkout with its own ``.venv``, and the runs of both are interleaved. Prints
one line of JSON a run and the ratios of the medians. A checkout that holds all updates runs with as many as
``--most-mib`` takes; its figures are scaled up, and marked ``scaled``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIDTH, RANK, NUMBERS = 1024, 16, 2_000_000
FIGURES = ("wall_s", "cpu_s", "extra_mib")


def rows(pairs: int) -> Any:
    from fedvfm.state import state

    found = [state.ArraySpec("head.weight", (NUMBERS - pairs * 2 * RANK * WIDTH,), "head")]
    for number in range(pairs):
        name = f"block.{number:02d}.q"
        found.append(state.ArraySpec(f"{name}.A", (RANK, WIDTH), "lora", "A", name, 2.0))
        found.append(state.ArraySpec(f"{name}.B", (WIDTH, RANK), "lora", "B", name, 2.0))
    return state.Manifest.of(found)


def updates(manifest: Any, count: int) -> Iterator[Any]:
    """Each from its number alone; what it costs to make them is not counted."""
    import numpy as np

    from fedvfm.state import state

    for number in range(count):
        rng = np.random.default_rng(number)
        arrays = {spec.name: rng.standard_normal(spec.shape, dtype=np.float32) * np.float32(0.02) for spec in manifest}
        yield state.SiteUpdate(f"site-{number:04d}", state.AdapterState(arrays), 10 + number % 90, 0, "")


class Clock:
    """Seconds of the blocks it is opened for."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0
        self._began = (0.0, 0.0)

    def __enter__(self) -> None:
        self._began = (time.perf_counter(), time.process_time())

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._began[0]
        self.processor += time.process_time() - self._began[1]


def work(rule_name: str, count: int, pairs: int) -> dict[str, Any]:
    """One run in this process, whichever checkout it is."""
    import resource

    from fedvfm.aggregators import table
    from fedvfm.server.rounds import aggregation, handshake

    manifest, rule = rows(pairs), table.TABLE.get(rule_name)()
    names = [f"site-{number:04d}" for number in range(count)]
    members = {name: handshake.Member(name, at, manifest, {}) for at, name in enumerate(names)}
    next(updates(manifest, 1))
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    clock = Clock()
    if hasattr(aggregation, "Fold"):
        intake = aggregation.Fold(rule, names, members, "examples", manifest, {})
        for update in updates(manifest, count):
            with clock:
                intake.take(update)
        with clock:
            made = intake.finish({})
    else:
        held = {update.site: update for update in updates(manifest, count)}
        with clock:
            made = aggregation.join(rule, held, members, "examples", manifest, {})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "rule": rule_name,
        "updates": count,
        "wall_s": round(clock.wall, 2),
        "cpu_s": round(clock.processor, 2),
        "extra_mib": round(peak - base),
        "factor_error": made.record["factor_error"],
    }


def run(checkout: Path, rule: str, count: int, options: argparse.Namespace) -> dict[str, Any]:
    environment = os.environ | dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"], "1")
    environment["PYTHONPATH"] = str(checkout)
    holds = not (checkout / "fedvfm" / "aggregators" / "exact_sum.py").exists()
    fewer = min(count, int(options.most_mib / 8)) if holds and rule == "mean" else count
    command = [str(checkout / ".venv/bin/python"), str(Path(__file__).resolve()), "--work", rule]
    command += ["--updates", str(fewer), "--pairs", str(options.pairs)]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if fewer < count:
        found |= {key: round(found[key] * count / fewer, 2) for key in FIGURES}
        found["scaled"] = f"{fewer} updates were run"
    return {"checkout": checkout.name, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="another checkout, with its own .venv")
    parser.add_argument("--updates", type=int, default=1000, help="of rule mean")
    parser.add_argument("--sites", type=int, default=100, help="of rule svd")
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--most-mib", type=float, default=1600, help="that updates may take in a run that holds them")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(options.work, options.updates, options.pairs)))
        return
    here = Path(__file__).resolve().parent.parent
    checkouts = [here] if options.before is None else [here, options.before.resolve()]
    for rule, count in (("mean", options.updates), ("svd", options.sites)):
        figures: dict[Path, list[dict[str, Any]]] = {checkout: [] for checkout in checkouts}
        for _ in range(options.runs):
            for checkout in checkouts:
                figures[checkout].append(run(checkout, rule, count, options))
                print(json.dumps(figures[checkout][-1]), flush=True)
        if options.before is not None:
            now, before = (
                {key: statistics.median(one[key] for one in figures[checkout]) for key in FIGURES}
                for checkout in checkouts
            )
            ratios = {key: round(now[key] / before[key], 3) for key in now}
            print(json.dumps({"rule": rule, "now / before": ratios}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
