"""The floor of a round: what a federation of real processes costs where the sites do nothing.

    python benchmarks/deployment_floor.py --sites 2 --rounds 5 [--megabytes 1] [--hold 0] [--idle 60]

Real SuperLink, proxy, SuperNodes and executors on loopback; the executors send back what they got. ``--hold 0`` lets
the proxy answer a SuperNode's question for messages at once, as a stock proxy would, so that Flower's pause of 3 s can
be seen. Prints one line of JSON, medians in seconds; ``processor_s`` is the processor time of a round, all processes
together. ``--idle SECONDS`` also lets everything wait for so long and prints what each kind of process takes of a core,
in per cent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

from fedvfm.client.process import executor, supernode
from fedvfm.flower import runtime
from fedvfm.runtime import processes
from fedvfm.server.grid import retrying
from fedvfm.server.network import node_keys, proxy, superlink
from fedvfm.server.rounds import messaging
from fedvfm.trust import keys


def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


def start_sites(folder: Path, front: proxy.Settings, link: superlink.SuperLink, count: int, family: processes.Family,
                control: runtime.Control) -> None:  # fmt: skip
    known = [keys.make() for _ in range(count)]
    node_keys.write(Path(front.keys), map(keys.public_text, known))
    for number, key in enumerate(known):
        keys.write_private(folder / f"{number}.key", key)
        control.register(keys.public_text(key), f"site-{number}")
        server = f"{front.host}:{front.port}"
        node = supernode.SuperNode(f"supernode-{number}", folder, server, link.authority, folder / f"{number}.key",
                                   processes.free_port())  # fmt: skip
        node.prepare()
        family.start(node.program)
        command = (sys.executable, __file__, "--executor", str(node.port), str(node.secret))
        family.start(processes.Program(f"executor-{number}", command, runtime.CHILD_ENVIRONMENT))


def phases(grid: retrying.SteadyGrid, rounds: int, megabytes: float) -> dict[str, list[float]]:
    """Seconds of every train and evaluate phase; new random numbers each time, for equal ones travel once."""
    rng, found = np.random.default_rng(0), {"train": [], "evaluate": []}
    for number in range(rounds):
        for kind, taken in found.items():
            values = rng.random(max(1, int(megabytes * 250_000)), dtype=np.float32)
            content = RecordDict({"a": ArrayRecord({"x": Array(values)})})
            started = time.monotonic()
            messages = [Message(content, node, kind, ttl=300.0, group_id=str(number)) for node in grid.get_node_ids()]
            outstanding = set(grid.push_messages(messages))
            while outstanding:
                replies = {one.metadata.reply_to_message_id for one in grid.pull_messages(sorted(outstanding))}
                outstanding -= replies
                if outstanding and not replies:
                    grid.wait(outstanding, messaging.POLL_S)
            taken.append(time.monotonic() - started)
    return found


def processor_seconds(family: processes.Family) -> float:
    """Of all processes so far: what a busy machine does not change."""
    own = [psutil.Process()] + [psutil.Process(one.process.pid) for one in family.children.values() if one.process]
    return sum(sum(one.cpu_times()[:2]) for one in own)


def by_kind(family: processes.Family) -> dict[str, float]:
    """Processor seconds so far, the mean of each kind of process."""
    found: dict[str, list[float]] = {}
    for name, one in family.children.items():
        if one.process:
            found.setdefault(name.partition("-")[0], []).append(sum(psutil.Process(one.process.pid).cpu_times()[:2]))
    return {kind: statistics.mean(taken) for kind, taken in found.items()}


def idle(family: processes.Family, seconds: float) -> dict[str, float]:
    """Per cent of a core that each kind of process takes while nothing is to be done."""
    before = by_kind(family)
    time.sleep(seconds)
    return {kind: round(100 * (taken - before[kind]) / seconds, 2) for kind, taken in by_kind(family).items()}


def measure(folder: Path, sites: int, rounds: int, megabytes: float, hold_s: float, idle_s: float) -> dict[str, object]:
    family, stop = processes.Family(folder), threading.Event()
    began = time.monotonic()
    with family.watched():
        link = superlink.prepare(folder / "superlink")
        child = family.start(link.program)
        control = runtime.Control(link.link)
        superlink.wait_ready(link, child)
        front = proxy.Settings(superlink.HOST, processes.free_port(), str(link.certificate), str(link.key),
                               link.address, str(link.authority), str(folder / "keys.txt"), hold_s=hold_s)  # fmt: skip
        family.start(front.program(folder / "proxy.json"))
        start_sites(folder, front, link, sites, family, control)
        while sum(node.online for node in control.nodes()) < sites:
            time.sleep(0.2)
        with runtime.server_task(link.link, control.start_run(), stop) as (grid, _):
            steady = retrying.SteadyGrid(grid, lambda: None)
            phases(steady, 1, megabytes)
            ready = time.monotonic() - began
            before = processor_seconds(family)
            found = phases(steady, rounds, megabytes)
            used = (processor_seconds(family) - before) / rounds
            resting = idle(family, idle_s) if idle_s else None
    both = [a + b for a, b in zip(found["train"], found["evaluate"], strict=True)]
    row = {name: round(statistics.median(taken), 2) for name, taken in {**found, "round": both}.items()}
    return {
        "sites": sites,
        "rounds": rounds,
        "megabytes": megabytes,
        "hold_s": hold_s,
        "start_s": round(ready, 1),
        **row,
        "processor_s": round(used, 2),
        **({"idle_percent": resting} if resting else {}),
    }


def main() -> None:
    if sys.argv[1:2] == ["--executor"]:
        secret = Path(sys.argv[3]).read_bytes()
        executor.serve(runtime.Link(f"127.0.0.1:{sys.argv[2]}", b"", secret), echo, threading.Event())
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=1.0)
    parser.add_argument("--hold", type=float, default=10.0)
    parser.add_argument("--idle", type=float, default=0.0, help="seconds to watch everything wait")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedvfm-floor-") as folder:
        print(json.dumps(measure(Path(folder), given.sites, given.rounds, given.megabytes, given.hold, given.idle)))


if __name__ == "__main__":
    main()
