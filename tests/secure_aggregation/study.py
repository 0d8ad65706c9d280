"""Four NumPy hospitals that mask what they send, over a real Flower Grid, and runs that may end anywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedvfm import errors
from fedvfm.client.gate import masking, secure_answers
from fedvfm.config import schema
from fedvfm.protocol import protocol
from fedvfm.server.rounds import federation
from fedvfm.simulation.engines import in_process
from fedvfm.state import checkpoint, state
from fedvfm.storage import hash_chain
from fedvfm.trust import keys, roster_document
from tests.server import numpy_sites

COUNTS = {"east": 10, "north": 20, "south": 30, "west": 40}
Fails = Callable[[str, str, int], bool]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class SecureSite(numpy_sites.NumpySite):
    """A NumPy site that masks what it sends, as the gate of a hospital does."""

    own: masking.Sessions
    document: roster_document.RosterDocument
    fails: Fails

    def answer(self, kind: str, task: protocol.Task) -> RecordDict:
        self.asked.append((kind, task.round))
        if self.fails(self.name, kind, task.round):
            raise errors.DataError("gone")
        if kind == protocol.SHARE:
            return secure_answers.share(self.own, task, self.document)
        if kind == protocol.UNMASK:
            return secure_answers.unmask(self.own, task, lambda _: self.document)[0]
        if kind == protocol.AGREE:
            return secure_answers.agree(self.own, task)
        update = protocol.decode_update(self.train(task))
        return secure_answers.mask(self.own, self.name, task, update)

    def hello(self, task: protocol.Task) -> RecordDict:
        plain = protocol.decode_hello(super().hello(task))
        return protocol.encode_hello(dataclasses.replace(plain, keys=self.own.advertised(task.recipe.hash)))


class Study:
    """Four hospitals, a roster document, and runs that may end anywhere."""

    def __init__(self, folder: Path, **recipe: Any) -> None:
        self.folder = folder
        given = {"rounds": 2, "min_sites": 3, "secure_aggregation": {"clip_norm": 50.0}}
        self.recipe = numpy_sites.make_recipe(**{**given, **recipe})
        self.keys = {name: keys.make() for name in COUNTS}
        public = {name: keys.public_text(key) for name, key in self.keys.items()}
        self.document = roster_document.make(keys.make(), "tiny", public)
        self.fails: Fails = lambda site, kind, number: False
        self.sites = [self._site(name) for name in sorted(COUNTS)]
        self.sent: list[tuple[str, str, RecordDict]] = []

    def _site(self, name: str) -> SecureSite:
        site = SecureSite(name, examples=COUNTS[name])
        site.own = masking.Sessions(self.folder / name, name, lambda: self.keys[name])
        site.document, site.fails = self.document, lambda *words: self.fails(*words)
        return site

    def site(self, name: str) -> SecureSite:
        return next(site for site in self.sites if site.name == name)

    def app(self) -> ClientApp:
        app = ClientApp()

        def register(kind: str, decorate: Any) -> None:
            @decorate
            def answer(message: Message, context: Context) -> Message:
                site = self.sites[int(context.node_config["partition-id"])]
                try:
                    task = protocol.decode_task(message.content)
                    content = (
                        site.hello(task)
                        if kind == protocol.HANDSHAKE
                        else site.evaluate(task)
                        if kind == protocol.EVALUATE
                        else site.answer(kind, task)
                    )
                    self.sent.append((site.name, kind, content))
                    return Message(content, reply_to=message)
                except errors.FedvfmError as error:
                    return Message(protocol.refusal(error), reply_to=message)

        register(protocol.HANDSHAKE, app.query("handshake"))
        register(protocol.SHARE, app.query("share"))
        register(protocol.AGREE, app.query("agree"))
        register(protocol.UNMASK, app.query("unmask"))
        register(protocol.TRAIN, app.train())
        register(protocol.EVALUATE, app.evaluate())
        return app

    def run(self, quorum: int = 3, *, rounds: int = 0) -> Path:
        """Run or resume."""
        where = self.folder / "server"
        job = numpy_sites.make_job(where, self.sites, self.recipe, server=schema.ServerConfig(quorum=quorum))
        job = dataclasses.replace(job, roster=self.document, durable=True, last=rounds, least_tests=quorum)
        (where / "evaluation.json").unlink(missing_ok=True)  # a run that ended early goes on
        federation.Federation(job, in_process.InProcessGrid(self.app(), len(self.sites))).run()
        return where

    def adapter(self) -> state.AdapterState:
        return checkpoint.read(self.folder / "server" / "adapter.safetensors")[0]

    def journal(self) -> list[dict[str, Any]]:
        return hash_chain.read(self.folder / "server" / "journal.jsonl")

    def plain(self, absent: Mapping[int, str] | None = None) -> str:
        """The fingerprint that a simulation comes to without masks, where these sites do not train in these rounds."""
        gone = absent or {}

        def change(kind: str, number: int, reply: Any) -> Any:
            if kind == "train" and gone.get(number) == reply.site:
                raise errors.DataError("gone")
            return reply

        members = [numpy_sites.NumpySite(name, examples=count, change=change) for name, count in COUNTS.items()]
        job = numpy_sites.make_job(
            self.folder / "plain", members, self.recipe, simulated=True, server=schema.ServerConfig(quorum=3)
        )
        federation.Federation(job, in_process.InProcessGrid(numpy_sites.client_app(members), len(members))).run()
        return checkpoint.read(self.folder / "plain" / "adapter.safetensors")[0].fingerprint
