"""What a coordinator that was taken over asks of a hospital: its keys are real, its SuperLink is ours to misuse.

The bundle of its run ships a ``fedvfm`` of its own. Every message goes to the first hospital's real SuperNode and
executor; what comes back must be a word, and the hospital's audit log must say so.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from attacks import bundles, ours, strangers
from fedvfm.config import schema
from fedvfm.flower import internals, runtime
from fedvfm.protocol import protocol
from fedvfm.runtime import processes
from fedvfm.server import supervisor
from fedvfm.server.coordinator import coordinator
from fedvfm.server.network import proxy, superlink
from fedvfm.state import state

Made = tuple[str, RecordDict]
Make = Callable[["Asks"], Made]
ASKS: dict[str, tuple[str, Make]] = {}


def ask(name: str, title: str) -> Callable[[Make], Make]:
    def keep(make: Make) -> Make:
        ASKS[name] = (title, make)
        return make

    return keep


@dataclass(frozen=True)
class Asks:
    """What the hospital approved, and the adapter to begin with."""

    recipe: schema.Recipe
    base: state.AdapterState

    def other(self, **changes: Any) -> schema.Recipe:
        """The recipe with other values: ``optimiser__learning_rate=0.5``."""
        values = json.loads(self.recipe.model_dump_json())
        for name, value in changes.items():
            *path, last = name.split("__")
            inner = values
            for part in path:
                inner = inner[part]
            inner[last] = value
        return schema.parse(schema.Recipe, values, "hostile recipe")

    def train(self, adapter: state.AdapterState | None = None, number: int = 1) -> Made:
        base = self.base if adapter is None else adapter
        return protocol.TRAIN, protocol.encode_task(protocol.Task(self.recipe, number, base))

    def evaluate(self, adapter: state.AdapterState) -> Made:
        """A score of this adapter on the test split."""
        return protocol.EVALUATE, protocol.encode_task(protocol.Task(self.recipe, 1, adapter, "test"))

    def made(self, by: float) -> state.AdapterState:
        """An adapter of the asker's own making."""
        return state.AdapterState({name: array + np.float32(by) for name, array in self.base.items()})

    def header(self, content: RecordDict, **changes: Any) -> RecordDict:
        content["fedvfm"] = ConfigRecord({**dict(content["fedvfm"]), **changes})
        return content


@ask("tampered", "a recipe changed under the hash of the approved one")
def _tampered(asks: Asks) -> Made:
    content = protocol.encode_task(protocol.Task(asks.other(rounds=1000)))
    return protocol.HANDSHAKE, asks.header(content, recipe_hash=asks.recipe.hash)


@ask("replayed", "the approval of one recipe used for another")
def _replayed(asks: Asks) -> Made:
    return protocol.HANDSHAKE, protocol.encode_task(protocol.Task(asks.other(optimiser__learning_rate=0.5)))


@ask("more-rounds", "a recipe of more rounds than the policy allows")
def _rounds(asks: Asks) -> Made:
    return protocol.HANDSHAKE, protocol.encode_task(protocol.Task(asks.other(rounds=1000)))


@ask("traversal-backbone", "path traversal in the name of the backbone")
def _backbone(asks: Asks) -> Made:
    return protocol.HANDSHAKE, protocol.encode_task(protocol.Task(asks.other(backbone__name="../../../../etc/passwd")))


@ask("one-image-batch", "steps of one image, whose gradient gives the image back")
def _one_image(asks: Asks) -> Made:
    return protocol.HANDSHAKE, protocol.encode_task(protocol.Task(asks.other(optimiser__batch_size=1)))


@ask("forbidden-metric", "a metric that the policy forbids, in the recipe")
def _metric(asks: Asks) -> Made:
    return protocol.HANDSHAKE, protocol.encode_task(protocol.Task(asks.other(evaluation__surface=True)))


@ask("forbidden-values", "values of single patients, beyond the approved recipe")
def _samples(asks: Asks) -> Made:
    return protocol.EVALUATE, protocol.encode_task(protocol.Task(asks.recipe, 1, asks.base, "test", per_sample=True))


@ask("traversal-split", "path traversal in the name of a split")
def _split(asks: Asks) -> Made:
    return protocol.EVALUATE, protocol.encode_task(protocol.Task(asks.recipe, 1, asks.base, "../../../etc"))


@ask("traversal-array", "path traversal in the name of an array")
def _array(asks: Asks) -> Made:
    arrays = dict(asks.base)
    arrays["../../../../tmp/canary"] = arrays.pop(next(iter(arrays)))
    return asks.evaluate(state.AdapterState(arrays))


@ask("wrong-shape", "an adapter of a wrong shape")
def _shape(asks: Asks) -> Made:
    arrays = dict(asks.base)
    arrays[next(iter(arrays))] = np.zeros((1, 1), np.float32)
    return asks.evaluate(state.AdapterState(arrays))


@ask("pickle", "a pickle in place of the adapter")
def _pickle(asks: Asks) -> Made:
    kind, content = asks.train()
    content["adapter"]["adapter"] = Array("object", (1,), "numpy.ndarray", b"\x80\x04cos\nsystem\n.")
    return kind, content


@ask("no-such-round", "round -1")
def _round(asks: Asks) -> Made:
    return asks.train(number=-1)


@ask("other-run", "a new run of the approved recipe: all its rounds are used up")
def _again(asks: Asks) -> Made:
    return asks.train(asks.made(1.0))


@ask("own-adapter", "a score of an adapter that the asker made, on the patients of the test")
def _oracle(asks: Asks) -> Made:
    return asks.evaluate(asks.made(1.0))


@ask("own-adapter-validated", "... and on those of validation, in a recipe that never validates")
def _validated(asks: Asks) -> Made:
    return protocol.EVALUATE, protocol.encode_task(protocol.Task(asks.recipe, 2, asks.made(2.0), "val"))


@ask("second-test", "a second score of the test, of the adapter that was final")
def _second(asks: Asks) -> Made:
    return protocol.EVALUATE, protocol.encode_task(protocol.Task(asks.recipe, 2, asks.base, "test", final=True))


@ask("unknown-kind", "a message of an unknown kind")
def _kind(asks: Asks) -> Made:
    return "query.shell", protocol.encode_task(protocol.Task(asks.recipe))


@ask("empty", "a message without any record")
def _empty(asks: Asks) -> Made:
    return protocol.TRAIN, RecordDict()


@ask("foreign-approval", "the file of another hospital's approvals in place of its own")
def _approval(asks: Asks) -> Made:
    return protocol.HANDSHAKE, protocol.encode_task(protocol.Task(asks.recipe))


@contextlib.contextmanager
def taken_over(fed: ours.Federation) -> Iterator[tuple[Grid, int]]:
    """SuperLink and proxy again, driven by us: a Grid whose run ships a foreign bundle, and the hospital's node."""
    folder = fed.server.folder / coordinator.RUN
    family, stop = processes.Family(folder), threading.Event()
    host, _, port = fed.server.about.address.rpartition(":")
    with family.watched():
        link = superlink.prepare(folder / "superlink")
        superlink.wait_ready(link, family.start(link.program), 300.0)
        front = proxy.Settings(
            host=host,
            port=int(port),
            certificate=str(fed.server.certificate),
            key=str(fed.server.key),
            upstream=link.address,
            authority=str(link.authority),
            keys=str(folder / supervisor.KEYS),
        )
        family.start(front.program(folder / "proxy.json"))
        control = runtime.Control(link.link, patience_s=120.0)
        key = fed.sites["east"].public_key.read_text().strip()

        nodes: list[int] = []

        def back() -> bool:
            nodes.extend(node.id for node in control.nodes() if node.public_key == key and node.online)
            return bool(nodes)

        ours.until(back, ours.START_S, "the hospital comes back")
        asked = strangers.start_request(bundles.foreign(fed.canary))
        run_id = int(control._client.StartRun(asked).run_id)
        control.close()
        with runtime.server_task(link.link, run_id, stop) as (grid, _):
            yield grid, nodes[0]


@dataclass(frozen=True)
class Told:
    """What came of one message: the reply's word (or what it was instead), and the hospital's audit line."""

    word: str
    audit: str
    reply: bytes


def one(fed: ours.Federation, grid: Grid, node: int, kind: str, content: RecordDict) -> Told:
    """Send one message and wait for what comes back."""
    log = fed.sites["east"].audit
    before = len(log.entries)
    message = Message(content, node, kind, ttl=300.0, group_id="hostile")
    wanted, found = set(grid.push_messages([message])), []
    until = time.monotonic() + 300.0
    while not found and time.monotonic() < until:
        found = list(grid.pull_messages(sorted(wanted)))
        time.sleep(0.2)
    if not found:
        return Told("no reply", "", b"")
    word = protocol.error_word(found[0]) if found[0].has_error() else "ANSWERED"
    lines = [
        ", ".join(str(entry[key]) for key in ("event", "kind", "verdict", "reason") if key in entry)
        for entry in log.entries[before:]
    ]
    refused = [line for line in lines if "refused" in line or "reason" in line]
    return Told(word, refused[0] if refused else "; ".join(lines), internals.serialise(found[0]))


def run(fed: ours.Federation) -> dict[str, Told]:
    """Every message to the first hospital, one after another."""
    locked = fed.server.locked()
    asks, found = Asks(locked.recipe, locked.adapter), {}
    own = fed.sites["east"].folder / "approvals.jsonl"
    with taken_over(fed) as (grid, node):
        for name, (_, make) in ASKS.items():
            if name == "foreign-approval":
                shutil.copy(own, fed.folder / "approvals.kept")
                shutil.copy(fed.sites["south"].folder / "approvals.jsonl", own)
            found[name] = one(fed, grid, node, *make(asks))
        shutil.copy(fed.folder / "approvals.kept", own)
    return found
