"""What a message costs a site whose audit log is long.

    python benchmarks/audit_log.py [--entries 1000 200000] [--rounds 30]

A site whose log has so many entries starts (the running state of its gate is made from the log) and answers train
messages of a recipe whose adapter is two numbers, through the real gate, each with its four appends and their fsync.
Printed are the seconds of the start, milliseconds of the first message and the median of the later ones (wall and
processor), how many lines of files a message parses, and how much memory the process has more at its peak than before
the log was opened. Each length has a process of its own. ``--one-file`` leaves the log in one file that is never
sealed, as it was before segments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHA = "ab" * 32


def lengthen(path: Path, head: str, number: int) -> None:
    """So many entries more, of messages of a coordinator that were refused."""
    with path.open("a") as file:
        for at in range(number):
            mark = f'"kind":"train","peer":"trial","peer_head":"{at:064x}","peer_length":{at + 1}'
            rest = f'{mark},"prev":"{head}","recipe":"{SHA}","round":1,"run":"1","time":"2026-01-01T00:00:00Z"}}'
            begin = '{"bytes":1,"event":"received",'
            head = hashlib.sha256((begin + rest).encode()).hexdigest()
            file.write(f'{begin}"hash":"{head}",{rest}\n')


def measure(entries: int, rounds: int, *, one_file: bool) -> dict[str, Any]:
    """The figures of one length."""
    sys.path.insert(0, str(ROOT))
    from flwr.app import Message

    from fedvfm.audit import audit
    from fedvfm.client import state_folder
    from fedvfm.client.gate import enforcement, gate, policy, reply_cache
    from fedvfm.config import schema
    from fedvfm.flower import internals
    from fedvfm.protocol import protocol
    from fedvfm.storage import hash_chain
    from tests.client import two_numbers
    from tests.deployment import test_marks

    internals.be_server_task(1)
    recipe = two_numbers.make_recipe(rounds=rounds)
    locked = two_numbers.build(recipe)
    text = policy.accepting(policy.Facts.of(locked))
    rules = schema.parse(schema.PolicyConfig, tomllib.loads(text)["policy"], "policy")
    if one_file:
        audit.Audit.most = 0
    read = [0]
    parse = hash_chain.parse

    def counted(line: bytes) -> dict[str, Any] | None:
        read[0] += 1
        return parse(line)

    hash_chain.parse = counted
    with tempfile.TemporaryDirectory() as folder:
        site = two_numbers.join(Path(folder)).site
        site.remember(locked)
        state_folder.approve(site, locked)
        log = site.audit
        lengthen(log.path, log.mark.head, max(0, entries - log.mark.length))
        del log
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        own = enforcement.HospitalTerms(site, lambda: rules, two_numbers.build)
        start = time.perf_counter() - began
        door = gate.Gate(test_marks.app, reply_cache.Sent(site.sent), own, lambda at, error: print(at, error))
        rows = []
        for number in range(1, rounds + 1):
            task = protocol.Task(recipe, number, two_numbers.adapter(number - 1.0))
            message = Message(protocol.encode_task(task), 5, protocol.TRAIN, ttl=60.0)
            read[0], wall, cpu = 0, time.perf_counter(), time.process_time()
            if door(message, internals.context(1, 5, {})).has_error():
                raise SystemExit("the site refused")
            rows.append((time.perf_counter() - wall, time.process_time() - cpu, read[0]))
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    later = rows[1:]  # the first seals what was there
    return {
        "entries": entries,
        "start_s": round(start, 2),
        "first_ms": round(1000 * rows[0][0], 1),
        "message_ms": round(1000 * statistics.median(row[0] for row in later), 1),
        "cpu_ms": round(1000 * statistics.median(row[1] for row in later), 1),
        "lines_read": max(row[2] for row in later),
        "memory_mib": round(more / 1024, 1),
    }


def main() -> None:
    """Measure each length in a process of its own and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--entries", type=int, nargs="+", default=[1000, 200_000])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--one-file", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        print(json.dumps(measure(asked.entries[0], asked.rounds, one_file=asked.one_file)))
        return
    rows = []
    for entries in asked.entries:
        command = [sys.executable, __file__, "--inside", "--entries", str(entries), "--rounds", str(asked.rounds)]
        done = subprocess.run([*command, *(["--one-file"] if asked.one_file else [])], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(f"{row[name]:,}" for name in names) + " |")


if __name__ == "__main__":
    main()
