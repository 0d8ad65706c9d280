"""Milliseconds a round and site of the in-process engine when no site trains.

    python benchmarks/overhead.py [--sites 4 16 64] [--rounds 10]

A real Federation (handshake, admission, mean rule, checkpoint, journal) on the real Grid; the ClientApp sends the
adapter back with one number changed. The adapter has the shapes of LoRA r8 on DINOv2-small with the default
head (203 k numbers). Printed is the median round, from its begin to its line in the journal, divided by the number of
sites. Handshake and final test happen once and are told beside.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedvfm.config import schema
from fedvfm.flower import internals
from fedvfm.protocol import protocol
from fedvfm.server import app as server_app
from fedvfm.server.rounds import federation
from fedvfm.simulation.engines import in_process
from fedvfm.state import state
from fedvfm.trust import locked_recipe

SHA = "0" * 64


def make_locked(rounds: int) -> locked_recipe.LockedRecipe:
    """A locked recipe of real shapes, without torch."""
    rows = []
    for block in range(12):
        for part in ("q", "v"):
            pair = f"block.{block:02d}.{part}"
            rows.append(state.ArraySpec(f"{pair}.A", (8, 384), "lora", "A", pair, 2.0))
            rows.append(state.ArraySpec(f"{pair}.B", (384, 8), "lora", "B", pair, 2.0))
    rows.append(state.ArraySpec("head.weight", (56_000,), "head"))
    manifest = state.Manifest.of(rows)
    values = {
        "rounds": rounds,
        "backbone": {"name": "dinov2-small-imgfocus"},
        "data": {"class_names": ["background", "object"], "input_size": [252, 252]},
        "evaluation": {"every": 0},
    }
    rng = np.random.default_rng(0)
    initial = state.AdapterState({spec.name: rng.standard_normal(spec.shape, dtype=np.float32) for spec in manifest})
    return locked_recipe.LockedRecipe.of(
        schema.parse(schema.Recipe, values, "benchmark"), manifest, initial, SHA, 22_056_576
    )


def make_app(locked: locked_recipe.LockedRecipe, names: list[str]) -> ClientApp:
    """Sites that answer at once."""
    app = ClientApp()

    def name_of(context: Context) -> str:
        return names[int(context.node_config["partition-id"])]

    @app.query("handshake")
    def handshake(message: Message, context: Context) -> Message:
        hello = protocol.Hello(name_of(context), SHA, locked.manifest.fingerprint, 8, {"train": 1, "val": 0, "test": 1})
        return Message(protocol.encode_hello(hello), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        task = protocol.decode_task(message.content)
        arrays: dict[str, Any] = {name: array.copy() for name, array in task.state.items()}
        arrays["head.weight"][0] += 1.0
        update = state.SiteUpdate(
            name_of(context), state.AdapterState(arrays), 10, task.round - 1, task.state.fingerprint
        )
        return Message(protocol.encode_update(update), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        answer = protocol.Evaluation(name_of(context), protocol.decode_task(message.content).round, 1, {"dice": 1.0})
        return Message(protocol.encode_evaluation(answer), reply_to=message)

    return app


def measure(sites: int, rounds: int) -> tuple[float, float]:
    """Seconds of the median round for each site, and seconds of all that is no round."""
    locked = make_locked(rounds)
    names = [f"site-{index:03d}" for index in range(sites)]
    with tempfile.TemporaryDirectory() as folder:
        job = federation.Job("overhead", locked, Path(folder), tuple(names), (names[0],), schema.ServerConfig())
        grid = in_process.InProcessGrid(make_app(locked, names), sites)
        times: dict[str, list[float]] = {}

        def note(event: str, /, **fields: object) -> None:
            times.setdefault(event, []).append(time.perf_counter())

        server = server_app.make_server_app([job], note)
        started = time.perf_counter()
        server(grid, internals.context(1, internals.SERVER_NODE, {}))
        total = time.perf_counter() - started
        each = [end - begin for begin, end in zip(times["round"], times["round-end"], strict=True)]
        return statistics.median(each) / sites, total - sum(each)


def main() -> None:
    """Print one line a number of sites."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    measure(2, 1)
    for sites in arguments.sites:
        each, once = (1000 * seconds for seconds in measure(sites, arguments.rounds))
        print(f"{sites:3d} sites: {each:6.2f} ms a round and site (limit 10); once a run: {once:.0f} ms", flush=True)


if __name__ == "__main__":
    main()
