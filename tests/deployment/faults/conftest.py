"""Federations that are hurt on purpose: two hospitals by the real commands, and what may be done to them.

Each group of faults is one federation. A group that keeps its cohort whole must end with the adapter of the in-process
engine, bit for bit. ``FEDVFM_FAULT_ROWS`` names a file that takes a line of JSON for each fault;
``benchmarks/fault_table.py`` makes the table of ``docs/faults.md`` of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedvfm.audit import audit
from fedvfm.client import state_folder as joining
from fedvfm.client.gate import policy
from fedvfm.model import locking
from fedvfm.runtime import processes
from fedvfm.server import state_folder as enrolment

SITES = ("east", "south")
PATIENCE_S = 600.0
"""For a condition; a busy machine is slow."""
EPOCHS = 12
"""Enough local epochs that a round's training can be met while it goes on."""


@dataclass
class Discs:
    """The tiny experiment with these two sites, and what the in-process engine makes of it.

    Attributes:
        tiny: data and backbone of the command line's tests.
        folder: of the experiments and their runs.
    """

    tiny: Any
    folder: Path
    _known: dict[int, list[str]] = field(default_factory=dict)

    def recipe(self, rounds: int) -> str:
        """The recipe in TOML."""
        inner: str = self.tiny.recipe
        inner = inner.replace("rounds = 3", f"rounds = {rounds}").replace("batch_size = 3", "batch_size = 1")
        inner = inner.replace("[optimiser]\n", f"[optimiser]\nlocal_epochs = {EPOCHS}\n")
        inner = inner.replace("learning_rate = 1e-2", "learning_rate = 1e-3")
        return inner.replace("surface = false", "surface = false\nevery = 0")

    def expected(self, rounds: int) -> list[str]:
        """The fingerprint after every round where nothing goes wrong."""
        if rounds not in self._known:
            text: str = self.tiny.experiment.read_text()
            head = text[: text.index("[recipe]")].replace('baselines = ["pooled"]', "baselines = []")
            head = head.replace('kind = "natural"', f'kind = "natural"\ninclude = {json.dumps(SITES)}')
            plain = self.recipe(rounds).replace("\n[", "\n[recipe.")
            path = self.folder / f"{rounds}.toml"
            path.write_text(f"{head}[recipe]\n{plain}")
            run = self.folder / f"run-{rounds}"
            answer = self.tiny.run("simulate", path, "--output", run)
            assert answer.code == 0, answer.err
            self._known[rounds] = [line["fingerprint"] for line in self.tiny.lines(run / "journal.jsonl")]
        return self._known[rounds]


@pytest.fixture(scope="session")
def discs(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Discs:
    return Discs(tiny, tmp_path_factory.mktemp("faults"))


@dataclass
class Federation:
    """Two hospitals and their coordinator, joined and approved; every end is a real command.

    Attributes:
        discs: what is trained.
        folder: of all their files.
        server: the coordinator's state.
        sites: the hospitals' states.
        rounds: of the recipe.
        started: the last command of each end.
    """

    discs: Discs
    folder: Path
    server: enrolment.State
    sites: dict[str, joining.State]
    rounds: int
    started: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    faulted: set[int] = field(default_factory=set)

    # -- the ends --------------------------------------------------------------------------------------------------

    def start(self, end: str, *more: str, **environment: str) -> None:
        """``fedvfm server start`` or ``fedvfm client start``; what it says is appended to a file."""
        if end == "server":
            words = ("server", "start", "--state", str(self.server.folder), "--config", "server.toml", *more)
        else:
            words = ("client", "start", f"{end}.toml", "--state", str(self.sites[end].folder), *more)
        with (self.folder / f"{end}.txt").open("a") as said:
            self.started[end] = subprocess.Popen(
                self.discs.tiny.command(*words),
                cwd=self.folder,
                env=self.discs.tiny.environment(environment),
                stdout=said,
                stderr=said,
                text=True,
            )

    def start_all(self) -> None:
        """All three, from nothing."""
        for end in ("server", *self.sites):
            self.start(end)

    def said(self, end: str) -> str:
        """All that an end's commands have printed."""
        path = self.folder / f"{end}.txt"
        return path.read_text() if path.exists() else ""

    def run_folder(self, end: str) -> Path:
        """Where an end's pid files and logs lie."""
        state = self.server if end == "server" else self.sites[end]
        return Path(state.folder) / "run"

    def pid(self, end: str, name: str) -> int | None:
        """A process of an end now."""
        return processes.running(processes.pid_path(self.run_folder(end), name))

    def hit(self, end: str, name: str, number: int) -> int:
        """Send a signal to a process of an end; which one it was."""
        pid = self.until(lambda: self.pid(end, name), f"{name} of {end} runs")
        os.kill(pid, number)
        return int(pid)

    def anew(self, end: str, name: str, before: int) -> None:
        """Until a process of an end is another one than before."""
        self.until(lambda: self.pid(end, name) not in (None, before), f"{name} of {end} is started again")

    # -- what they wrote -------------------------------------------------------------------------------------------

    @property
    def arm(self) -> Path:
        """Journal, checkpoints and received updates of the run."""
        return Path(self.server.folder) / "runs" / self.server.about.recipe

    def journal(self) -> list[dict[str, Any]]:
        """The finished rounds."""
        return _lines(self.arm / "journal.jsonl")

    def round(self) -> int:
        """The last finished round."""
        found = self.journal()
        return int(found[-1]["round"]) if found else 0

    def received(self) -> set[str]:
        """Names of the admitted updates on disk of the round that runs."""
        return {path.name for path in (self.arm / "received").glob("*.safetensors")}

    def entries(self, site: str, event: str, **about: Any) -> list[dict[str, Any]]:
        """Of a site's audit log, as it is on disk."""
        found = _lines(Path(self.sites[site].folder) / "audit.jsonl")
        return [e for e in found if e["event"] == event and about.items() <= e.items()]

    def trained(self, site: str) -> Counter[tuple[int, str]]:
        """How often a site finished training each round from each adapter."""
        return Counter((entry["round"], entry["base"]) for entry in self.entries(site, "trained"))

    # -- conditions ------------------------------------------------------------------------------------------------

    def until(self, true: Callable[[], Any], what: str, *ends: str, every: float = 0.1) -> Any:
        """Wait for a condition; its value. Says all that was printed if it does not come, or one of ``ends`` ended."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := true()):
            ended = [end for end in ends if self.started[end].poll() is not None]
            if ended or time.monotonic() > deadline:
                why = f"{ended[0]} ended" if ended else f"not in {PATIENCE_S:g} s"
                raise AssertionError(f"{why}: {what}\n{self.tell()}")
            time.sleep(every)
        return found

    def tell(self) -> str:
        """What everybody said last."""
        parts = [f"== {end}\n{self.said(end)[-3000:]}" for end in ("server", *self.sites)]
        for end in ("server", *self.sites):
            for path in sorted(self.run_folder(end).glob("*.log")):
                parts.append(f"== {end}: {path.name}\n{path.read_text(errors='replace')[-3000:]}")
        return "\n".join(parts)

    def finished(self, number: int) -> float:
        """Until a round is in the journal; the clock then."""
        self.until(lambda: self.round() >= number, f"round {number} is finished", "server")
        return time.monotonic()

    def training(self, site: str) -> int:
        """Until a site has begun to train a round and not finished it; which one."""

        def found() -> int:
            begun = self.entries(site, "decided", kind="train", verdict="accepted")
            number = int(begun[-1]["round"]) if begun else 0
            return number if number not in {one for one, _ in self.trained(site)} else 0

        return int(self.until(found, f"{site} trains", "server", site, every=0.02))

    def held(self, site: str) -> tuple[int, int]:
        """A site's executor stopped (SIGSTOP) in the middle of a training; the round and its process."""
        while True:
            number = self.training(site)
            pid = self.hit(site, "executor", signal.SIGSTOP)
            if number not in {one for one, _ in self.trained(site)}:
                return number, pid
            os.kill(pid, signal.SIGCONT)

    # -- the end ---------------------------------------------------------------------------------------------------

    def done(self) -> None:
        """Until ``fedvfm server start`` has ended well."""
        self.until(lambda: self.started["server"].poll() is not None, "the federation is finished")
        assert self.started["server"].returncode == 0, self.tell()

    def whole(self) -> None:
        """Every round had every update, nobody trained one twice, and the adapter is the in-process engine's."""
        lines = self.journal()
        assert [line["round"] for line in lines] == list(range(1, self.rounds + 1))
        assert all(sorted(line["examples"]) == list(SITES) and not line["refused"] for line in lines)
        assert [line["fingerprint"] for line in lines] == self.discs.expected(self.rounds)
        for site in self.sites:
            counts = self.trained(site)
            assert sorted(number for number, _ in counts) == list(range(1, self.rounds + 1))
            assert set(counts.values()) == {1}, f"{site} trained a round twice: {counts}"
        self.sound()

    def sound(self) -> None:
        """All logs are whole chains, and nothing admitted waits to be counted."""
        assert not self.received()
        for folder in (self.server.folder, *(state.folder for state in self.sites.values())):
            assert audit.verify(Path(folder) / "audit.jsonl")["unfinished"] == 0

    def quiet(self) -> float:
        """Seconds of a round that nothing was done to, by the journal: the median."""
        plain = sorted(line["seconds"] for line in self.journal() if line["round"] not in self.faulted)
        return float(plain[len(plain) // 2]) if plain else float("nan")

    def stop(self) -> None:
        """End all that runs still."""
        for process in self.started.values():
            if process.poll() is None:
                process.terminate()
        for process in self.started.values():
            process.wait(PATIENCE_S)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of JSON; one that is being written is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


@dataclass
class Table:
    """Rows of the fault matrix of one test, for who asked for them."""

    group: str
    path: Path | None

    def row(self, fault: str, happened: str, lost: int, seconds: float, **more: object) -> None:
        """One fault: what happened, how many sites' rounds did not count, seconds until the hurt round was finished."""
        if self.path is not None:
            line = {"group": self.group, "fault": fault, "happened": happened, "lost": lost, "seconds": seconds, **more}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Table:
    path = os.environ.get("FEDVFM_FAULT_ROWS")
    return Table(request.module.__name__.rpartition("test_")[2], Path(path) if path else None)


@dataclass
class Made:
    """Makes federations; ends them when the test is over."""

    discs: Discs
    folder: Path
    made: list[Federation] = field(default_factory=list)

    def __call__(
        self,
        rounds: int,
        settings: str = "",
        host: str = "127.0.0.1",
        places: Mapping[str, Path] | None = None,
    ) -> Federation:
        """A federation.

        Args:
            rounds: of its recipe.
            settings: of the server, in TOML.
            host: that sites connect to.
            places: where state folders lie, by end, if not below the test's folder.
        """
        lies = {end: (places or {}).get(end, self.folder) / end for end in ("server", *SITES)}
        (self.folder / "recipe.toml").write_text(self.discs.recipe(rounds))
        (self.folder / "server.toml").write_text(settings or "round_timeout_s = 600.0\n")
        locked = locking.open_recipe(self.folder / "recipe.toml")
        plan = enrolment.Plan("discs", f"{host}:{processes.free_port()}", (), SITES)
        server = enrolment.init(lies["server"], plan, locked)
        joined = {}
        for site in SITES:
            invite = joining.read_invite(server.invite_path(site), server.fingerprint())
            joined[site] = joining.join(lies[site], invite, locked.hash)
            enrolment.approve(server, joined[site].request)
            allowed = policy.accepting(policy.Facts.of(locked)).replace("units = 10", "units = 1")
            (self.folder / f"{site}.toml").write_text(self.discs.tiny.site(site) + allowed)
        self.made.append(Federation(self.discs, self.folder, server, joined, rounds))
        return self.made[-1]


@pytest.fixture
def federation(discs: Discs, tmp_path: Path, nothing_left: None) -> Iterator[Made]:
    made = Made(discs, tmp_path)
    yield made
    for one in made.made:
        one.stop()


@pytest.fixture(name="all_of")
def all_of_fixture() -> Any:
    return all_of


def all_of(folder: Path) -> list[int]:
    """Every process that names a folder in its arguments."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(folder) in word for word in words):
            found.append(process.pid)
    return found
