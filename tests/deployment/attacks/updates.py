"""What a malicious site answers when it is asked to train: one lie a round.

Each lie is told in the language of the federation it is told to: fedvfm's records or those of Flower's FedAvg.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message import make_message

from attacks import fleet
from fedvfm.protocol import protocol
from fedvfm.state import state

PATIENT = "patient Miller, /data/patients/Miller.dcm"


@dataclass
class Update:
    """What a site would answer if it were honest; a lie changes it."""

    site: str
    arrays: dict[str, Any]
    examples: int = 8
    metrics: dict[str, Any] = field(default_factory=lambda: {"loss": 0.5})
    round: int = 1
    base: str = ""


class Language(Protocol):
    """How updates are written and read."""

    def read(self, message: Message) -> tuple[str, Update]:
        """What is asked for (the name of a lie), and the honest answer to it."""
        ...

    def write(self, update: Update) -> RecordDict:
        """The records of an update."""
        ...


@dataclass(frozen=True)
class Fedvfm:
    """fedvfm's records; lie number n is told in round n."""

    site: str
    lies: tuple[str, ...]

    def read(self, message: Message) -> tuple[str, Update]:
        task = protocol.decode_task(message.content)
        assert task.state is not None
        arrays = {name: array + np.float32(1e-3) for name, array in task.state.items()}
        lie = self.lies[task.round - 1] if task.round <= len(self.lies) else ""
        return lie, Update(self.site, arrays, round=task.round, base=task.state.fingerprint)

    def write(self, update: Update) -> RecordDict:
        made = state.SiteUpdate(
            update.site,
            state.AdapterState({name: np.asarray(array, np.float32) for name, array in update.arrays.items()}),
            update.examples,
            update.round - 1,
            update.base,
            metrics=update.metrics,
        )
        return protocol.encode_update(made)


@dataclass(frozen=True)
class Stock:
    """FedAvg's records; the message's configuration names the lie."""

    site: str

    def read(self, message: Message) -> tuple[str, Update]:
        arrays = {name: array.numpy() + np.float32(1e-3) for name, array in message.content["arrays"].items()}
        return str(message.content["config"].get("lie", "")), Update(self.site, arrays)

    def write(self, update: Update) -> RecordDict:
        arrays = ArrayRecord({name: Array(np.asarray(one, np.float32)) for name, one in update.arrays.items()})
        metrics = MetricRecord({"num-examples": update.examples, **update.metrics})
        return RecordDict({"arrays": arrays, "metrics": metrics})


@dataclass
class Stage:
    """What a lie has at hand.

    Attributes:
        victim: name and node of a site to harm.
        earlier: the update of the round before.
        release: a file; until it is there, parts are held back, but no longer than ``hold_s``.
    """

    node: fleet.Node
    asked: Message
    language: Language
    canary: Path
    victim: tuple[str, int]
    earlier: Update | None
    release: Path
    hold_s: float

    def say(self, update: Update) -> None:
        """Push an update as a SuperNode would."""
        self.node.push(Message(self.language.write(update), reply_to=self.asked))

    def records(self, change: Callable[[RecordDict], None], update: Update) -> None:
        """Push an update whose records were changed."""
        content = self.language.write(update)
        change(content)
        self.node.push(Message(content, reply_to=self.asked))


Lie = Callable[[Stage, Update], str]
LIES: dict[str, tuple[str, Lie]] = {}


def lie(name: str, title: str) -> Callable[[Lie], Lie]:
    def keep(tell: Lie) -> Lie:
        LIES[name] = (title, tell)
        return tell

    return keep


def _first(update: Update) -> str:
    return next(iter(update.arrays))


@lie("nan", "update with NaN")
def _nan(stage: Stage, update: Update) -> str:
    update.arrays[_first(update)] = np.full_like(update.arrays[_first(update)], np.nan)
    stage.say(update)
    return "pushed"


@lie("wrong-shape", "update of a wrong shape")
def _shape(stage: Stage, update: Update) -> str:
    name = _first(update)
    update.arrays[name] = np.zeros((1, 1), np.float32)
    stage.say(update)
    return "pushed"


@lie("huge-norm", "update of a huge norm")
def _norm(stage: Stage, update: Update) -> str:
    update.arrays = {name: array + np.float32(1e9) for name, array in update.arrays.items()}
    stage.say(update)
    return "pushed"


@lie("many-examples", "claim of 1e12 examples")
def _examples(stage: Stage, update: Update) -> str:
    update.examples = 10**12
    update.arrays = {name: array + np.float32(1.0) for name, array in update.arrays.items()}
    stage.say(update)
    return "pushed"


@lie("more-than-greeted", "claim of one example more than the site greeted with")
def _one_more(stage: Stage, update: Update) -> str:
    update.examples += 1
    stage.say(update)
    return "pushed"


@lie("extra-arrays", "extra arrays in the update")
def _extra(stage: Stage, update: Update) -> str:
    update.arrays["block.99.extra"] = np.ones((2, 2), np.float32)
    stage.say(update)
    return "pushed"


@lie("extra-metrics", "ten thousand extra metrics")
def _metrics(stage: Stage, update: Update) -> str:
    def change(content: RecordDict) -> None:
        metrics = next(iter(content.metric_records.values()))
        for number in range(10_000):
            metrics[f"stuffed-{number:05d}"] = float(number)

    stage.records(change, update)
    return "pushed"


@lie("nan-metric", "a metric that is NaN")
def _nan_metric(stage: Stage, update: Update) -> str:
    def change(content: RecordDict) -> None:
        next(iter(content.metric_records.values()))["loss"] = float("nan")

    stage.records(change, update)
    return "pushed"


@lie("path-in-name", "path traversal in the name of an array")
def _path(stage: Stage, update: Update) -> str:
    name = _first(update)
    update.arrays[f"../../../../..{stage.canary}/from-a-name"] = update.arrays.pop(name)
    stage.say(update)
    return "pushed"


class _Bomb:
    """Unpickled, it writes the canary."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> Any:
        return (exec, (f"open({self._path!r}, 'w').write('a pickle was opened')",))


@lie("pickled-array", "a pickle in place of an array")
def _pickled(stage: Stage, update: Update) -> str:
    def change(content: RecordDict) -> None:
        record = next(iter(content.array_records.values()))
        name = next(iter(record))
        bomb = np.empty(1, object)
        bomb[0] = _Bomb(stage.canary / "unpickled-array")
        file = io.BytesIO()
        np.save(file, bomb, allow_pickle=True)
        record[name] = Array("object", (1,), "numpy.ndarray", file.getvalue())

    stage.records(change, update)
    return "pushed"


@lie("pickled-reply", "a pickle in place of the whole reply")
def _bytes(stage: Stage, update: Update) -> str:
    parts = fleet.Parts.of(Message(stage.language.write(update), reply_to=stage.asked))
    body = pickle.dumps(_Bomb(stage.canary / "unpickled-reply"))
    parts.be_only(f"Message  {len(body)}\0".encode() + body)  # the SuperLink looks at this head and no further
    stage.node.deliver(parts, stage.node.announce(parts))
    return "pushed"


@lie("hundredfold", "update of 100 times the size")
def _large(stage: Stage, update: Update) -> str:
    rng = np.random.default_rng(0)
    size = 100 * sum(array.size for array in update.arrays.values())
    update.arrays[_first(update)] = rng.random(size, np.float32)
    stage.say(update)
    return "pushed"


@lie("other-name", "update under another site's name")
def _name(stage: Stage, update: Update) -> str:
    update.site = stage.victim[0]
    stage.say(update)
    return "pushed"


def _tried(stage: Stage, parts: fleet.Parts) -> str:
    try:
        answer = stage.node.announce(parts)
    except Exception as error:
        return fleet.status_of(error)
    stage.node.deliver(parts, answer)
    return "200, stored" if answer.objects_to_push else "200, not stored"


@lie("other-node", "answer pushed as another site's node")
def _node(stage: Stage, update: Update) -> str:
    parts = fleet.Parts.of(Message(stage.language.write(update), reply_to=stage.asked))
    parts.head.metadata.src_node_id = stage.victim[1]
    got = _tried(stage, parts)
    stage.say(update)
    return got


@lie("other-node-inside", "another site's node named inside the reply, where the SuperLink does not look")
def _inside(stage: Stage, update: Update) -> str:
    honest = Message(stage.language.write(dataclasses.replace(update, site=stage.victim[0])), reply_to=stage.asked)
    head = copy.copy(honest.metadata)
    head.__dict__ = {**honest.metadata.__dict__, "_src_node_id": stage.victim[1]}
    inner = make_message(head, content=honest.content)
    parts = fleet.Parts.of(inner)
    parts.head.metadata.src_node_id = honest.metadata.src_node_id
    stage.node.deliver(parts, stage.node.announce(parts))
    return "pushed"


@lie("instruction", "an instruction sent to another site, as if from the coordinator")
def _instruct(stage: Stage, update: Update) -> str:
    parts = stage.node.instruction(stage.victim[1], stage.asked, stage.asked.content)
    got = _tried(stage, parts)
    stage.say(update)
    return got


@lie("stale", "the update of an earlier round again")
def _stale(stage: Stage, update: Update) -> str:
    stage.say(stage.earlier or update)
    return "pushed"


@lie("free-text", "an error with free text in it")
def _text(stage: Stage, update: Update) -> str:
    stage.node.push(Message(Error(4711, f"<script>alert(1)</script> {PATIENT}"), reply_to=stage.asked))
    return "pushed"


@lie("half", "a reply that is announced, its parts held back")
def _half(stage: Stage, update: Update) -> str:
    parts = fleet.Parts.of(Message(stage.language.write(update), reply_to=stage.asked))
    announced = stage.node.announce(parts)
    until = time.monotonic() + stage.hold_s
    while not stage.release.exists() and time.monotonic() < until:
        time.sleep(0.2)
    stage.node.deliver(parts, announced)
    return "pushed late"


def answer(node: fleet.Node, asked: Message, language: Language, about: Mapping[str, Any], before: list[Update]) -> str:
    """Tell the lie that is due; the name of it and what the attacker got."""
    name, update = language.read(asked)
    honest = dataclasses.replace(update, arrays=dict(update.arrays), metrics=dict(update.metrics))
    stage = Stage(
        node,
        asked,
        language,
        Path(about["canary"]),
        tuple(about["victim"]),
        before[-1] if before else None,
        Path(about["release"]),
        float(about["hold_s"]),
    )
    if name in LIES and about.get("lies"):
        got = LIES[name][1](stage, update)
    else:
        stage.say(update)
        got = "pushed"
    before.append(honest)
    return json.dumps({"lie": name, "got": got})
