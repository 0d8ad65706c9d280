"""Sites that answer with arithmetic: a real Flower ClientApp without torch, for tests of the server wing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedvfm import seeding
from fedvfm.client.gate import held_adapters
from fedvfm.config import schema
from fedvfm.flower import internals
from fedvfm.protocol import codecs, protocol
from fedvfm.server.rounds import federation, handshake
from fedvfm.state import factors, state
from fedvfm.trust import locked_recipe

SHA = "ab" * 32
SETTINGS = "ef" * 32


def manifest(rank: int = 3, alpha: float = 6.0, residual: int = 0) -> state.Manifest:
    """One low-rank pair of a 5 x 7 product, its residual where it has a rank, and a head."""
    beside = zip(factors.residual_names("block.00.q"), ((residual, 7), (5, residual)), strict=True)
    rows = [
        *(state.ArraySpec(name, shape, factors.RESIDUAL) for name, shape in beside if residual),
        state.ArraySpec("block.00.q.A", (rank, 7), "lora", "A", "block.00.q", alpha / rank),
        state.ArraySpec("block.00.q.B", (5, rank), "lora", "B", "block.00.q", alpha / rank),
        state.ArraySpec("head.bias", (2,), "head"),
        state.ArraySpec("head.weight", (2, 5), "head"),
    ]
    return state.Manifest.of(rows)


def draw(rows: state.Manifest, seed: int, scale: float = 1.0) -> state.AdapterState:
    """Random arrays of a manifest."""
    rng = seeding.stream(seed, "draw")
    return state.AdapterState(
        {spec.name: (scale * rng.standard_normal(spec.shape)).astype(np.float32) for spec in rows}
    )


def make_recipe(**values: Any) -> schema.Recipe:
    """A recipe whose model nobody builds."""
    base = {
        "backbone": {"name": "none"},
        "data": {"class_names": ["rest", "cell"]},
        "rounds": 3,
        "adapter": {"rank": 3, "alpha": 6.0},
    }
    return schema.parse(schema.Recipe, {**base, **values}, "recipe")


def lock(chosen: schema.Recipe) -> locked_recipe.LockedRecipe:
    """The recipe with a manifest and a first adapter of our own."""
    rows = of_recipe(chosen)
    return locked_recipe.LockedRecipe.of(chosen, rows, draw(rows, chosen.seed), SHA, 1000, SETTINGS)


def of_recipe(chosen: schema.Recipe) -> state.Manifest:
    """The manifest of a recipe's adapter."""
    return manifest(chosen.adapter.rank, residual=int(str(chosen.adapter.options.get("residual", 0))))


@dataclass
class NumpySite:
    """A site: what it says in the handshake, and how it may misbehave.

    Attributes:
        change: (message type, round, reply) -> the reply it sends instead; may raise.
        asked: (message type, round) of every message it got.
    """

    name: str
    examples: int = 10
    val: int = 4
    rank: int = 3
    sha256: str = SHA
    config_sha256: str = SETTINGS
    fingerprint: str = ""
    change: Callable[[str, int, Any], Any] = lambda kind, number, reply: reply
    asked: list[tuple[str, int]] = field(default_factory=list)
    adapters: held_adapters.Adapters = field(default_factory=held_adapters.Adapters)
    residuals: held_adapters.Residuals = field(default_factory=held_adapters.Residuals)

    def hello(self, task: protocol.Task) -> RecordDict:
        """The handshake reply."""
        own = self.fingerprint or handshake.at_rank(of_recipe(task.recipe), self.rank).fingerprint
        counts = {"train": self.examples, "val": self.val, "test": 5}
        return protocol.encode_hello(
            self.change(
                "hello",
                0,
                protocol.Hello(
                    self.name, self.sha256, own, self.rank, counts, self.config_sha256, codec=task.recipe.codec
                ),
            )
        )

    def train(self, task: protocol.Task) -> RecordDict:
        """Every array that trains moves half way to where this site wants it, with a little noise of the round."""
        assert task.state is not None
        rows = of_recipe(task.recipe)
        rng = seeding.stream(task.recipe.seed, "train", task.round, self.name)
        arrays = {
            name: (0.5 * array + 0.5 * len(self.name) + 0.1 * rng.standard_normal(array.shape)).astype(np.float32)
            for name, array in task.state.items()
        }
        update = state.SiteUpdate(
            self.name,
            state.AdapterState(arrays).select(factors.trained(rows, task.recipe.adapter.factors, task.round)),
            self.examples,
            task.round - 1,
            task.state.fingerprint,
            metrics={"loss": 1.0 / task.round},
        )
        reply = self.change("train", task.round, update)
        if isinstance(reply, RecordDict) or task.recipe.codec == codecs.PLAIN:
            return reply if isinstance(reply, RecordDict) else protocol.encode_update(reply)
        word = (task.recipe.hash, self.name, task.round)
        coded = codecs.encode(task.recipe.codec, reply.state, task.state, self.residuals.before(*word))
        self.residuals.propose(*word, task.state.fingerprint, coded.residual)
        return protocol.encode_update(reply, coded.difference)

    def evaluate(self, task: protocol.Task) -> RecordDict:
        """Dice is made of the adapter's numbers."""
        assert task.state is not None
        dice = float(1 / (1 + np.abs(task.state["head.bias"]).sum()))
        samples = {"dice": [dice, dice]} if task.per_sample else {}
        ids = ("a", "b") if task.per_sample else ()
        answer = protocol.Evaluation(self.name, task.round, 2, {"dice": dice}, samples, ids)
        reply = self.change("evaluate " + task.split, task.round, answer)
        return reply if isinstance(reply, RecordDict) else protocol.encode_evaluation(reply)


def client_app(sites: Sequence[NumpySite]) -> ClientApp:
    """The ClientApp of all nodes; a node is the site of its partition number."""
    app = ClientApp()

    def answer(message: Message, context: Context, work: str) -> Message:
        site = sites[int(context.node_config["partition-id"])]
        try:
            task = protocol.decode_task(message.content, site.adapters.find)
            if task.state is not None:
                site.adapters.keep(task.recipe.hash, task.state)
            site.asked.append((work, task.round))
            return Message(getattr(site, work)(task), reply_to=message)
        except Exception as error:
            return Message(protocol.refusal(error), reply_to=message)

    @app.query("handshake")
    def handshake(message: Message, context: Context) -> Message:
        return answer(message, context, "hello")

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, context, "train")

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, context, "evaluate")

    return app


def make_job(folder: Path, sites: Sequence[NumpySite], chosen: schema.Recipe, **more: Any) -> federation.Job:
    """A federation of all these sites."""
    names = tuple(sorted({site.name for site in sites}))
    server = more.pop("server", schema.ServerConfig())
    return federation.Job(
        "federated", lock(chosen), folder, more.pop("train_sites", names), more.pop("test_sites", names), server, **more
    )


class LoopGrid(Grid):
    """The least a Grid can be; unlike the in-process engine's module, it comes without torch."""

    def __init__(self, app: ClientApp, nodes: int) -> None:
        self._app = app
        self._contexts: Mapping[int, Any] = {
            n: internals.context(1, n, {"partition-id": n - 10}) for n in range(10, 10 + nodes)
        }
        self._waiting: dict[str, Message] = {}
        self._pushed = 0
        internals.be_server_task(1)

    @property
    def run(self) -> Any:
        return internals.empty_run(1)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        kept = list(messages)
        for message in kept:
            self._pushed += 1
            internals.set_message_id(message, f"m{self._pushed}-{message.metadata.dst_node_id}")
            self._waiting[message.metadata.message_id] = message
        return [message.metadata.message_id for message in kept]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = [self._waiting.pop(key) for key in list(message_ids) if key in self._waiting]
        return [
            internals.parse(
                internals.serialise(
                    self._app(internals.parse(internals.serialise(m)), self._contexts[m.metadata.dst_node_id])
                )
            )
            for m in found
        ]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


Stop = Callable[[str, Mapping[str, Any]], bool]


def after(number: int) -> Stop | None:
    """The end of a process as this round ends; 0 for none."""
    return (lambda event, fields: event == "round-end" and fields["round"] == number) if number else None


def run(
    job: federation.Job,
    members: Sequence[NumpySite],
    *,
    stop: Stop | None = None,
    note: Callable[[str, Mapping[str, Any]], object] = lambda event, fields: None,
    grid: Grid | None = None,
) -> Path:
    """Run or resume a federation of these sites; its folder.

    Args:
        stop: says of an event whether the process ends there.
        note: told of every event.
    """

    def watch(event: str, /, **fields: Any) -> None:
        note(event, fields)
        if stop is not None and stop(event, fields):
            raise KeyboardInterrupt

    try:
        federation.Federation(job, grid or LoopGrid(client_app(members), len(members)), watch).run()
    except KeyboardInterrupt:
        assert stop is not None
    return job.folder
