"""A coordinator and two hospitals, joined and approved, whose ends are real processes."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedvfm.client import state_folder as joining
from fedvfm.model import locking
from fedvfm.runtime import processes
from fedvfm.server import state_folder as enrolment
from fedvfm.trust import locked_recipe

SITES = ("east", "south")
END_S = 300.0
"""For a process that was told to end; a busy machine is slow."""


@dataclass
class Two:
    """The federation.

    Attributes:
        tiny: the tiny experiment of the command line's tests: data, backbone, command, environment.
        folder: holds the state folders ``server``, ``east`` and ``south``, and beside them what the processes say.
        locked: the recipe.
        names: of the hospitals, where they are others.
    """

    tiny: Any
    folder: Path
    locked: locked_recipe.LockedRecipe
    server: enrolment.State
    names: tuple[str, ...] = SITES
    sites: dict[str, joining.State] = field(default_factory=dict)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """A real command, its words in a file."""
        with (self.folder / f"{arguments[0]}-{len(self.started)}.txt").open("w") as words:
            process = subprocess.Popen(
                self.tiny.command(*arguments),
                cwd=self.folder,
                env=self.tiny.environment(environment),
                stdout=words,
                stderr=words,
                text=True,
            )
        self.started.append(process)
        return process

    def start_client(self, site: str, **environment: str) -> subprocess.Popen[str]:
        return self.start("client", "start", f"{site}.toml", "--state", site, **environment)

    def start_clients(self) -> dict[str, subprocess.Popen[str]]:
        return {site: self.start_client(site) for site in self.names}

    def start_server(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        return self.start("server", "start", "--state", "server", *options, **environment)

    def settings(self, site: str) -> Path:
        """A hospital's own file, which each test writes."""
        return self.folder / f"{site}.toml"

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.txt")))

    @property
    def run(self) -> Path:
        """What the coordinator keeps of the recipe's rounds."""
        return self.server.run_path(self.locked.hash)

    def journal(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.tiny.lines(self.run / "journal.jsonl")
        return found

    def end(self) -> None:
        for process in self.started:
            process.terminate()
        for process in self.started:
            process.wait(END_S)


@contextlib.contextmanager
def enrolled(tiny: Any, folder: Path, recipe: str, names: tuple[str, ...] = SITES) -> Iterator[Two]:
    """All hospitals have approved the recipe, the coordinator all of them; nothing runs yet."""
    (folder / "recipe.toml").write_text(recipe)
    locked = locking.open_recipe(folder / "recipe.toml")
    plan = enrolment.Plan("tiny", f"127.0.0.1:{processes.free_port()}", (), names)
    server = enrolment.init(folder / "server", plan, locked)
    made = Two(tiny, folder, locked, server, names)
    for site in names:
        invite = joining.read_invite(server.invite_path(site), server.fingerprint())
        made.sites[site] = joining.join(folder / site, invite, locked.hash)
        enrolment.approve(server, made.sites[site].request)
    try:
        yield made
    finally:
        made.end()
