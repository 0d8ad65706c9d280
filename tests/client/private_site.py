"""A hospital with images and a budget, whose training is arithmetic; and what SIGKILL leaves of its rounds.

Run as a program by test_spending.py: ``private_site.py FOLDER POINT...`` kills a real process of the site at each of
these fault points in round 1, asks again as a coordinator does, and prints what is wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from fedvfm.client import site_file
from fedvfm.client import state_folder as joining
from fedvfm.client.gate import enforcement, exchange, gate, policy, privacy_charge, reply_cache
from fedvfm.config import schema
from fedvfm.flower import internals
from fedvfm.ledger import ledger
from fedvfm.protocol import protocol
from fedvfm.server import state_folder as enrolment
from fedvfm.state import state
from fedvfm.trust import locked_recipe

SHA = "ab" * 32
ROWS = state.Manifest.of([state.ArraySpec("head.bias", (2,), "head")])
CONTEXT = internals.context(1, 7, {})
PRIVACY = {"mechanism": "record-level", "clip": 1.0, "noise_multiplier": 1.1, "delta": 1e-5}
BUDGET = 'data_set = "discs"\nepsilon = 8.0\ndelta = 1e-5\nunit = "record"\n'


def make_recipe(privacy: dict[str, Any] | None = None, **values: Any) -> schema.Recipe:
    base = {
        "backbone": {"name": "some/backbone", "sha256": SHA},
        "data": {"class_names": ["background", "disc"], "input_size": [28, 28]},
        "rounds": 3,
        "optimiser": {"batch_size": 5},
        "aggregation": {"weighting": "uniform"},
        "evaluation": {"surface": False},
        "privacy": {**PRIVACY, **(privacy or {})},
    }
    return schema.parse(schema.Recipe, {**base, **values}, "recipe")


def adapter(*values: float) -> state.AdapterState:
    return state.AdapterState({"head.bias": np.array(values, np.float32)})


START = adapter(0.0, 0.0)


def build(asked: schema.Recipe) -> locked_recipe.LockedRecipe:
    return locked_recipe.LockedRecipe.of(asked, ROWS, START, SHA, 1000)


def train(number: int = 1, start: state.AdapterState = START, **values: Any) -> protocol.Task:
    return protocol.Task(make_recipe(**values), number, start)


def write_images(folder: Path, first: int = 0, last: int = 30) -> None:
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number in range(first, last):
        image = np.random.default_rng(number).integers(0, 255, (28, 28), dtype=np.uint8)
        Image.fromarray(image).save(folder / "images" / f"scan-{number:02d}.png")
        Image.fromarray((image > 128).astype(np.uint8)).save(folder / "masks" / f"scan-{number:02d}.png")


class Training:
    """A site's ClientApp: noise nobody knows in place of training, and all that a plain one would tell."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.during: Callable[[], None] = lambda: None

    def __call__(self, message: Message, context: Context) -> Message:
        task = protocol.decode_task(message.content)
        self.asked.append(message.metadata.message_type)
        self.during()
        if message.metadata.message_type != protocol.TRAIN or task.state is None:
            content = protocol.encode_evaluation(protocol.Evaluation("north", task.round, 12, {"dice": 0.5}))
            return Message(content, reply_to=message)
        after = task.state + adapter(*np.frombuffer(os.urandom(8), np.uint32) / 2**32 + 0.5)
        said = {"loss": 0.5, "seconds": 1.0, "steps": 3.0}
        made = state.SiteUpdate("north", after, 17, task.round - 1, task.state.fingerprint, metrics=said)
        return Message(protocol.encode_update(made), reply_to=message)


class Site:
    """A site that joined, in a folder that may be there already: then it is what a restart finds."""

    def __init__(self, folder: Path, locked: schema.Recipe | None = None, budget: str = BUDGET) -> None:
        internals.be_server_task(1)
        self.folder, self.settings = folder, folder / "north.toml"
        if not (folder / "site").exists():
            self._join(locked or make_recipe(), budget)
        self.where = joining.open_state(folder / "site")
        self.app, self.faults = Training(), list[Exception]()
        self.terms = enforcement.SiteTerms(self.where, self.settings, "cpu", build)
        kept = reply_cache.Sent(self.where.sent)
        self.door = gate.Gate(self.app, kept, self.terms, lambda where, error: self.faults.append(error))

    def _join(self, asked: schema.Recipe, budget: str) -> None:
        locked = build(asked)
        plan = enrolment.Plan("trial", "a.example:1", (), ("north",))
        server = enrolment.init(self.folder / "server", plan, locked)
        invite = joining.read_invite(server.invite_path("north"), server.fingerprint())
        joining.join(self.folder / "site", invite, locked.hash)
        write_images(self.folder / "data")
        self.write(asked, budget)

    def write(self, asked: schema.Recipe, budget: str) -> None:
        """The site's own file: accepts this recipe, with the epsilon that it comes to here."""
        about = f'name = "north"\n[data]\nsource = "folder"\npath = "{self.folder / "data"}"\n'
        ending = f"[privacy]\n{budget}" if budget else ""
        self.settings.write_text(about + ending)
        config = site_file.read_site(self.settings)
        private = privacy_charge.private(asked)
        units = privacy_charge.counted(asked, site_file.hospital(config, asked), config.privacy) if private else None
        rules = policy.accepting(policy.Facts.of(build(asked), units)).replace("max_rounds = 3", "max_rounds = 9")
        rules = rules.replace("min_units = 10", "min_units = 5")
        self.settings.write_text(about + rules + ending)

    def approve(self, asked: schema.Recipe) -> None:
        locked = build(asked)
        self.where.remember(locked)
        joining.approve(self.where, locked)

    def ask(self, task: protocol.Task, kind: str = protocol.TRAIN) -> Message:
        message = Message(protocol.encode_task(task), 7, kind, ttl=600.0, group_id=str(task.round))
        internals.set_message_id(message, "m1")
        return internals.copy(self.door(internals.copy(message), CONTEXT))

    def judge(self, task: protocol.Task) -> exchange.Exchange:
        """A train message that came and was judged, and not answered yet."""
        passing = self.door.open(
            Message(protocol.encode_task(task), 7, protocol.TRAIN, ttl=600.0, group_id="1"), CONTEXT
        )
        self.door.judge(passing)
        return passing

    @property
    def book(self) -> ledger.Ledger:
        return ledger.Ledger(self.folder / "fedvfm-ledger", "north", "record")

    def charged(self) -> list[dict[str, Any]]:
        return [one for one in self.book.entries if one["event"] == "charged"]


def child(work: Callable[[], object], **environment: str) -> int:
    """Start a child process that does it; its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.environ.update(environment)
        work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def leave(folder: Path) -> None:
    """Ask a site of its own process for round 1, and keep what came out of it."""
    reply = Site(folder).ask(train())
    (folder / "left").write_text(protocol.error_word(reply) if reply.has_error() else protocol.digest(reply.content))


def examine(folder: Path, point: str) -> list[str]:
    status = os.waitpid(child(lambda: leave(folder), FEDVFM_FAULT_POINT=point), 0)[1]
    wrong = [] if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else [f"not killed: {status}"]
    site = Site(folder)
    if (folder / "left").exists():
        wrong.append("something left though it was killed")
    kept = reply_cache.Sent(site.where.sent).find(train())
    before = {one["update"] for one in site.charged()}
    reply = site.ask(train())
    if reply.has_error():
        return [*wrong, f"asked again it refuses: {protocol.error_word(reply)}: {site.faults}"]
    digest = protocol.digest(reply.content)
    charged = [one["update"] for one in site.charged()]
    if digest not in charged:
        wrong.append("an update left that is not in the ledger")
    if kept is not None and (protocol.digest(kept) != digest or site.app.asked):
        wrong.append("what was kept was not sent, or trained anew")
    if len(charged) != 1 or not before <= set(charged):
        wrong.append(f"charged {len(charged)} times")
    if len(site.book.spending(site.book.entries).rows) != 1:
        wrong.append("something else than the one release counts")
    return wrong


def main() -> None:
    os.fsync = lambda handle: None  # what is killed leaves to the kernel what it wrote; no machine stops here
    folder = Path(sys.argv[1])
    Site(folder / "begun")
    wrong = {}
    for number, point in enumerate(sys.argv[2:]):
        copy = folder / f"kill-{number}"
        shutil.copytree(folder / "begun", copy)
        settings = copy / "north.toml"
        settings.write_text(settings.read_text().replace(str(folder / "begun"), str(copy)))
        found = examine(copy, point)
        if found:
            wrong[point] = found
    print(json.dumps({"killed": len(sys.argv[2:]), "wrong": wrong}))


if __name__ == "__main__":
    main()
