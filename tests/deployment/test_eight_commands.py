"""Two hospitals over TLS, from a recipe and a folder of images each, in eight commands and nothing typed in a file."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedvfm.runtime import processes
from tests.cli import conftest as cli

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_left")]
HOSPITALS = ("north", "south")
LONG_S = 900.0


@dataclass
class Machines:
    """Three machines, each a folder; every command is counted."""

    tiny: Any
    folder: Path
    count: int = 0
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, machine: str, *words: str) -> subprocess.Popen[bytes]:
        """A command on a machine."""
        self.count += 1
        place = self.folder / machine
        place.mkdir(exist_ok=True)
        command, environment = self.tiny.command(*words), self.tiny.environment()
        with (place / "said.txt").open("ab") as said:
            out = subprocess.PIPE if "--json" in words else said
            self.running.append(subprocess.Popen(command, cwd=place, env=environment, stdout=out, stderr=said))
        return self.running[-1]

    def run(self, machine: str, *words: str) -> dict[str, Any]:
        """The same to its end; what it answers."""
        process = self.start(machine, *words, "--json")
        out, _ = process.communicate(timeout=LONG_S)
        assert process.returncode == 0, (self.folder / machine / "said.txt").read_text()
        answer: dict[str, Any] = json.loads(out)
        return answer


@pytest.fixture
def machines(tiny: Any, tmp_path: Path) -> Iterator[Machines]:
    three = Machines(tiny, tmp_path)
    yield three
    for process in three.running:
        process.terminate()
    for process in three.running:
        process.wait(LONG_S)


def test_two_hospitals_over_tls_in_eight_commands(machines: Machines) -> None:
    tiny, folder = machines.tiny, machines.folder
    for name in HOSPITALS:
        (folder / name).mkdir()
        cli.write_data(folder / name / "study", (name,), per_site=24)
    (folder / "recipe.toml").write_text(tiny.recipe.replace("rounds = 3", "rounds = 2"))
    told = ("--name", "study", "--address", f"127.0.0.1:{processes.free_port()}", "--sites", ",".join(HOSPITALS))
    study = machines.run("coordinator", "server", "init", "../recipe.toml", *told)
    for name in HOSPITALS:
        invite = str((folder / "coordinator" / study["invites"][name]).absolute())
        heard = ("--fingerprint", study["fingerprint"], "--approve", study["recipe"])
        site = machines.run(name, "client", "join", invite, *heard, "--path", "study")
        request = str((folder / name / site["request"]).absolute())
        machines.run("coordinator", "server", "approve", request, "--key", site["key"])
    server = machines.start("coordinator", "server", "start")
    clients = [machines.start(name, "client", "start", "site.toml") for name in HOSPITALS]
    assert machines.count == 8
    deadline = time.monotonic() + LONG_S
    while server.poll() is None:
        said = {name: (folder / name / "said.txt").read_text() for name in HOSPITALS}
        assert all(client.poll() is None for client in clients), said
        assert time.monotonic() < deadline, said
        time.sleep(0.5)
    assert server.returncode == 0, (folder / "coordinator" / "said.txt").read_text()
    [arm] = (folder / "coordinator" / "fedvfm-server" / "runs").iterdir()
    rounds = [json.loads(line) for line in (arm / "journal.jsonl").read_text().splitlines()]
    assert [sorted(line["examples"]) for line in rounds] == [sorted(HOSPITALS)] * 2
    assert (arm / "adapter").is_dir()
    assert (arm / "report.html").is_file()
