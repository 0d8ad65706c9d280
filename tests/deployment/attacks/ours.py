"""A real federation of fedvfm on loopback, and every attack on it: two honest hospitals, and sites that lie.

``mal`` is approved and lies once a round; ``thief`` is approved and calls itself by another's name; ``liar`` is
approved and says it holds another backbone; ``gone`` was approved and revoked; ``stray`` has a key that the SuperLink
and the public port know and the roster does not.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from attacks import strangers, updates
from fedvfm import errors
from fedvfm.client import state_folder as joining
from fedvfm.client.gate import policy
from fedvfm.flower import runtime
from fedvfm.model import locking
from fedvfm.runtime import processes
from fedvfm.server import state_folder as enrolment
from fedvfm.server import supervisor
from fedvfm.server.coordinator import coordinator
from fedvfm.server.network import node_keys, superlink
from fedvfm.trust import keys, signed_documents

HONEST = ("east", "south")
FIRST, LATER = (*HONEST, "mal"), ("thief", "liar")
ORDER = tuple(updates.LIES)
ROUND_S, HOLD_S, ALL_S = 900.0, 720.0, 3600.0
START_S = 900.0
"""For each thing that must be there before the attacks; a busy machine is slow."""
HERE = Path(__file__).parent


def until(true: Any, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.2)


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON that are whole: one that is being written is left out, and so are words that are no JSON."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{")]


@dataclass
class Federation:
    """The federation's folder, ends and processes.

    Attributes:
        tiny: the tiny experiment of the command line's tests: data, backbone, command, environment.
        secrets: bytes that must stand in no argument, log or journal.
        copied: what came of a request that somebody else made with a copy of the first hospital's invite.
    """

    tiny: Any
    folder: Path
    server: enrolment.State
    sites: dict[str, joining.State]
    started: list[subprocess.Popen[Any]] = field(default_factory=list)
    secrets: dict[str, bytes] = field(default_factory=dict)
    arguments: set[str] = field(default_factory=set)
    copied: str = ""

    @property
    def canary(self) -> Path:
        return self.folder / "canary"

    @property
    def release(self) -> Path:
        """Once this is there, a liar delivers what it announced."""
        return self.folder / "release"

    def heard(self, number: int) -> dict[str, float]:
        """When the train replies of a round were taken, by site."""
        log = [line for line in self.log() if line.get("event") == "reply" and line["round"] == number]
        return {
            line["site"]: signed_documents.moment(line["time"]).timestamp() for line in log if line["phase"] == "train"
        }

    @property
    def link(self) -> superlink.SuperLink:
        """The SuperLink that runs now."""
        run = self.server.folder / coordinator.RUN
        upstream = json.loads((run / "proxy.json").read_text())["upstream"]
        return superlink.SuperLink(run / "superlink", int(upstream.rpartition(":")[2]))

    @property
    def target(self) -> strangers.Target:
        authority = self.sites["east"].authority.read_bytes()
        return strangers.Target(self.server.about.address, authority, self.canary, self.sites["gone"].key)

    def start(self, *arguments: str) -> subprocess.Popen[Any]:
        """A real command, its words in a file."""
        return self.spawn(self.tiny.command(*arguments), f"{arguments[0]}-{len(self.started)}.txt")

    def spawn(self, command: list[str], words: str, **environment: str) -> subprocess.Popen[Any]:
        with (self.folder / words).open("w") as file:
            made = subprocess.Popen(
                command, cwd=self.folder, env=self.tiny.environment(environment), stdout=file, stderr=file
            )
        self.started.append(made)
        return made

    def nodes(self, book: str) -> None:
        """Start the lying nodes of a book."""
        command = [sys.executable, "-m", "attacks.serve", str(self.folder / f"{book}.json")]
        self.spawn(command, f"{book}-nodes.txt", PYTHONPATH=f"{HERE.parents[2]}:{HERE.parent}")

    def journal(self) -> list[dict[str, Any]]:
        path = self.server.folder / "runs" / self.server.about.recipe / "journal.jsonl"
        return whole_lines(path)

    def log(self) -> list[dict[str, Any]]:
        """What the coordinator's process said."""
        path = self.server.folder / coordinator.RUN / "coordinate.log"
        return whole_lines(path)

    def told(self) -> list[dict[str, Any]]:
        """What the lying nodes got."""
        path = self.folder / "lies.jsonl"
        return whole_lines(path)

    def refusals(self) -> list[dict[str, Any]]:
        """What the audit log says of refused requests."""
        return [entry for entry in self.server.audit.entries if entry["event"] == "refused"]

    def words(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.txt")))[-4000:]

    def watch_arguments(self) -> None:
        """Note the arguments of every process of this machine, as any of its users can read them."""
        for process in psutil.process_iter(["cmdline"]):
            self.arguments.add("\0".join(process.info["cmdline"] or []))

    def take_secrets(self) -> None:
        """Note what is secret now: keys, tokens, secrets of executors."""
        for path in self.folder.rglob("*"):
            if path.suffix == ".key":
                self.secrets[str(path)] = path.read_bytes().splitlines()[2]
            if path.suffix == ".secret":
                self.secrets[str(path)] = path.read_bytes()


def make(folder: Path, tiny: Any) -> Federation:
    """Join, approve, revoke: nothing runs yet."""
    folder.chmod(0o755)  # another user reaches it; what lies in it must guard itself
    (folder / "canary").mkdir()
    (folder / "canary").chmod(0o777)
    recipe = tiny.recipe.replace("rounds = 3", f"rounds = {len(ORDER)}")
    recipe = recipe.replace("surface = false", "surface = false\nevery = 0")
    (folder / "recipe.toml").write_text(recipe)
    limits = f"quorum = 2\nround_timeout_s = {ROUND_S}\njoin_timeout_s = 900.0\n"
    (folder / "server.toml").write_text(f"{limits}without = {json.dumps(LATER)}\n")
    locked = locking.open_recipe(folder / "recipe.toml")
    plan = enrolment.Plan("tiny", f"127.0.0.1:{processes.free_port()}", (), (*FIRST, *LATER, "gone"))
    server = enrolment.init(folder / "server", plan, locked)
    made = Federation(tiny, folder, server, {})
    for site in (*FIRST, *LATER, "gone"):
        invite = joining.read_invite(server.invite_path(site), server.fingerprint())
        made.secrets[f"token of {site}"] = invite.token.encode()
        made.sites[site] = joining.join(folder / site, invite, locked.hash)
        if site not in LATER:
            enrolment.approve(server, made.sites[site].request)
        if site == HONEST[0]:
            made.copied = _copied(made, invite, locked.hash)
    enrolment.revoke(server, "gone")
    keys.write_private(folder / "stray.key", keys.make())
    allowed = policy.accepting(policy.Facts.of(locked)).replace("units = 10", "units = 1")
    for site in HONEST:
        (folder / f"{site}.toml").write_text(tiny.site(site) + allowed)
    book = {
        "address": server.about.address,
        "authority": str(made.sites["east"].authority),
        "speaks": "fedvfm",
        "order": ORDER,
        "canary": str(made.canary),
        "victims": str(folder / "victim.json"),
        "log": str(folder / "lies.jsonl"),
        "release": str(made.release),
        "hold_s": HOLD_S,
        "rank": locked.recipe.adapter.rank,
        "backbone": locked.backbone_sha256,
        "backbone_config": locked.backbone_config_sha256,
        "manifest": locked.manifest.fingerprint,
    }
    first = [{"site": "mal", "calls_itself": "mal", "lies": True, "key": str(made.sites["mal"].key)}]
    later = [
        {"site": "thief", "calls_itself": "east", "key": str(made.sites["thief"].key)},
        {"site": "liar", "calls_itself": "liar", "backbone": "0" * 64, "key": str(made.sites["liar"].key)},
        {"site": "stray", "calls_itself": "stray", "key": str(folder / "stray.key")},
    ]
    (folder / "first.json").write_text(json.dumps({**book, "nodes": first}))
    (folder / "later.json").write_text(json.dumps({**book, "nodes": later}))
    return made


def _copied(made: Federation, invite: Any, recipe: str) -> str:
    """Join with a copy of the invite; the operator was told the hospital's own key by telephone."""
    own = keys.spoken(keys.public_text(keys.read_private(made.sites[HONEST[0]].key)))
    thief = joining.join(made.folder / "copier", invite, recipe)
    try:
        enrolment.approve(made.server, thief.request, own)
    except errors.TrustError as error:
        return f"refused: {error.code}"
    return "ENROLLED"


@contextlib.contextmanager
def running(made: Federation) -> Iterator[subprocess.Popen[Any]]:
    """Server, honest clients and lying nodes, the victim's node known to the liars; the server's process."""
    try:
        server = made.start("server", "start", "--state", "server", "--config", "server.toml")
        for site in HONEST:
            made.start("client", "start", f"{site}.toml", "--state", site)
        until(lambda: (made.server.folder / coordinator.RUN / "proxy.json").exists(), START_S, "the server")
        control = runtime.Control(made.link.link, patience_s=120.0)
        made.nodes("first")

        def victim() -> bool:
            wanted = made.sites["east"].public_key.read_text().strip()
            found = [node for node in control.nodes() if node.public_key == wanted and node.online]
            if found:
                (made.folder / "victim.json").write_text(json.dumps(["east", found[0].id]))
            return bool(found)

        until(victim, START_S, "the first hospital")
        until(lambda: any(line.get("event") == "round" for line in made.log()), START_S, "the first round")
        for site in LATER:
            enrolment.approve(made.server, made.sites[site].request)
        known = {made.sites[site].public_key.read_text().strip() for site in LATER}
        until(lambda: known <= {node.public_key for node in control.nodes()}, START_S, "the roster")
        # As whoever broke into the coordinator's machine would: a key that no roster has.
        stray = keys.public_text(keys.read_private(made.folder / "stray.key"))
        port = made.server.folder / coordinator.RUN / supervisor.KEYS
        made.nodes("later")

        def there() -> bool:
            if stray not in {node.public_key for node in control.nodes()}:
                control.register(stray, "stray")
            listed = set(port.read_text().splitlines())
            if stray not in listed:
                node_keys.write(port, listed | {stray})
            return any(line["site"] == "stray" and "node" in line for line in made.told())

        until(there, START_S, "the stray node")
        control.close()
        made.take_secrets()
        yield server
    finally:
        for process in made.started:
            process.terminate()
        for process in made.started:
            process.wait(300)
