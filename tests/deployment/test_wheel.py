"""The wheel, away from the clone: a coordinator without torch; a simulation and a federation of two hospitals.

The coordinator's environment is what a person gets from ``pip install "fedvfm-....whl[server]"`` with the versions of
the lock. For the rest the packages of the extra "client" are added where the tests' own environment has them: a
line in a ``.pth`` file adds that folder to the path without its own ``.pth`` files, so that no clone that is installed
there for development can be seen.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.client import state_folder
from fedvfm.model import locking
from fedvfm.runtime import extras, processes
from fedvfm.simulation import experiment as experiments
from fedvfm.trust import recipes

ROOT = Path(__file__).parents[2]
SITES = ("east", "south")
KEPT = ("PIP_", "UV_", "SSL_", "LANG", "LC_", "HTTP", "http", "NO_PROXY", "no_proxy")

pytestmark = pytest.mark.slow


def environment(venv: Path, home: Path) -> dict[str, str]:
    """A person's who has this virtual environment and nothing of the clone."""
    kept = {key: value for key, value in os.environ.items() if key.startswith(KEPT)}
    fixed = {"HOME": str(home), "FEDVFM_CACHE": str(home / "weights"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return kept | fixed | {"PATH": f"{venv / 'bin'}:/usr/bin:/bin", "COLUMNS": "200"}


@dataclass
class Installed:
    """fedvfm from a wheel, and a folder to work in."""

    venv: Path
    folder: Path
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, *words: object, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(self.venv / "bin" / str(words[0])), *map(str, words[1:])], cwd=self.folder, text=True,
            env=environment(self.venv, self.folder), capture_output=True, timeout=900, check=False,
        )  # fmt: skip
        assert code is None or done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def json(self, *words: object) -> Any:
        return json.loads(self.run("fedvfm", *words, "--json").stdout)

    def start(self, *words: str) -> subprocess.Popen[str]:
        with (self.folder / f"{words[0]}-{len(self.running)}.txt").open("w") as log:
            process = subprocess.Popen(
                [str(self.venv / "bin" / "fedvfm"), *words], cwd=self.folder, text=True, stdout=log, stderr=log,
                env=environment(self.venv, self.folder),
            )  # fmt: skip
        self.running.append(process)
        return process

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.txt")))

    def end(self) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait(300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True, timeout=600)
    (made,) = folder.glob("*.whl")
    return made


def make(folder: Path) -> Installed:
    """A bare environment."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True, capture_output=True, timeout=300)
    work = folder / "work"
    work.mkdir()
    return Installed(folder / "venv", work)


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The coordinator's packages at the lock's versions, and fedvfm[server] on top; nothing more is asked for."""
    made = make(tmp_path_factory.mktemp("bare"))
    made.run("pip", "install", "-q", "--no-deps", "--require-hashes", "-r", ROOT / "server/requirements.lock")
    said = made.run("pip", "install", "--no-index", f"{wheel}[server]")
    assert "does not provide the extra" not in said.stderr
    return made


@pytest.fixture
def coordinator(bare: Installed, tmp_path: Path) -> Iterator[Installed]:
    made = Installed(bare.venv, tmp_path)
    yield made
    made.end()


@pytest.fixture
def whole(bare: Installed, tmp_path: Path) -> Iterator[Installed]:
    """The same with the packages of the extra "client", for as long as the test."""
    made = Installed(bare.venv, tmp_path / "work")
    made.folder.mkdir()
    (packages,) = made.venv.glob("lib/python3*/site-packages")
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    yield made
    made.end()
    (packages / "dependencies.pth").unlink()


# -- what is in it -----------------------------------------------------------------------------------------------------


def test_what_is_not_python_is_in_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"fedvfm/templates/{name}.toml" for name in ("site", "server", "recipe")} | {"fedvfm/py.typed"}
    shipped |= {f"fedvfm/simulation/experiments/{name}.toml" for name in experiments.bundled()}
    assert shipped <= names
    assert {name.partition("/")[0] for name in names} == {"fedvfm", f"{wheel.stem.rpartition('-py3')[0]}.dist-info"}


def test_the_base_asks_for_no_torch(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    lines = [
        line for line in archive.read(path).decode().splitlines() if line.startswith(("Requires-Dist", "Provides"))
    ]
    base = {re.split(r"[<>=!~\[; ]", line.split(": ")[1])[0] for line in lines if ";" not in line and "Dist" in line}
    assert base.isdisjoint(extras.CLIENT.values())
    assert "flwr" in base
    for package in extras.CLIENT.values():
        assert any(re.match(rf"Requires-Dist: {package}\b.*extra == 'client'", line) for line in lines), package
    assert {"Provides-Extra: client", "Provides-Extra: server"} <= set(lines)


# -- a coordinator without torch ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe as somebody with the whole of fedvfm locked it."""
    folder = tmp_path_factory.mktemp("locked")
    return locking.write(folder / "recipe.json", locking.make(recipes.written(tiny.experiment)))[0]


@pytest.mark.usefixtures("nothing_left")
def test_a_coordinator_without_torch_invites_approves_and_serves(
    coordinator: Installed, locked: Path, until: Any
) -> None:
    found = coordinator.run(
        "python", "-c", f"import importlib.util as u; print([n for n in {list(extras.CLIENT)!r} if u.find_spec(n)])"
    )
    assert found.stdout.strip() == "[]"
    address = f"127.0.0.1:{processes.free_port()}"
    names = ("--name", "trial", "--address", address, "--sites", "east,south")
    made = coordinator.json("server", "init", locked, *names)
    for site in SITES:
        invite = state_folder.read_invite(Path(coordinator.folder / made["invites"][site]), made["fingerprint"])
        state = state_folder.join(coordinator.folder / site, invite, invite.lock.hash)
        assert coordinator.json("server", "approve", state.request, "--key", state.spoken_key)["status"] == "approved"
    late = coordinator.json("server", "invite", "late")
    assert (coordinator.folder / late["invite"]).is_file()
    coordinator.json("server", "init-config")
    told = coordinator.json("server", "start", "--config", "server.toml", "--detach")
    try:
        assert told["address"] == address
        waits = re.compile(r"waiting: 0 of 3 sites are there")
        assert until(lambda: waits.search(coordinator.run("fedvfm", "server", "status").stdout), 600), (
            coordinator.said()
        )
        rows = coordinator.json("doctor", "server")["rows"]
        severity = {row["check"]: row["severity"] for row in rows}
        assert severity["health"] == "ok", rows
        assert "blocker" not in severity.values(), rows
    finally:
        assert coordinator.json("server", "stop")["stopped"] is True
    assert coordinator.json("audit", "verify", "fedvfm-server")["whole"] is True
    assert coordinator.json("audit", "receipt", "fedvfm-server", "-o", "receipt.json")["length"] > 3


COMMANDS: dict[str, str] = {
    "simulate": "simulate tiny.toml",
    "a plan": "simulate tiny.toml --dry-run",
    "predict": "predict adapter images -o masks",
    "export": "export adapter -o merged",
    "the check of data": "data check site.toml",
    "a hospital's file": "client init --path images",
    "rehearse": "client rehearse site.toml --recipe recipe.json",
    "a hospital": "client start site.toml --state east",
    "weights": "weights fetch dinov2-small-imgfocus",
    "weights of a hub": "weights fetch facebook/dinov2-small",
    "lock": "recipe lock recipe.toml",
    "init from TOML": "server init recipe.toml --name a --address localhost:8443 --sites a --state other",
    "plan of privacy": "privacy plan recipe.toml --samples 100 --epsilon 8 --delta 1e-3",
}
"""Commands that need what a coordinator does not have."""


def test_commands_that_need_more_say_so_and_leave_nothing(coordinator: Installed, tiny: Any, locked: Path) -> None:
    shutil.copy(tiny.experiment, coordinator.folder / "tiny.toml")
    for path in (locked, locked.with_suffix(".safetensors")):
        shutil.copy(path, coordinator.folder)
    (coordinator.folder / "recipe.toml").write_text(tiny.recipe)
    (coordinator.folder / "site.toml").write_text(tiny.site("east"))
    made = coordinator.json(
        "server", "init", "recipe.json", "--name", "a", "--address", "localhost:8443", "--sites", "east"
    )
    invite = state_folder.read_invite(coordinator.folder / made["invites"]["east"], made["fingerprint"])
    state_folder.join(coordinator.folder / "east", invite, invite.lock.hash)
    before = sorted(coordinator.folder.rglob("*"))
    for what, line in COMMANDS.items():
        done = coordinator.run("fedvfm", *line.split(), code=None)
        assert done.returncode == errors.MissingExtra.exit_code, f"{what}: {done.stderr}{done.stdout}"
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        named = 'pip install "fedvfm[client]"' in done.stderr or "On a machine with the whole fedvfm run" in done.stderr
        assert named, f"{what}: {done.stderr}"
    assert sorted(coordinator.folder.rglob("*")) == before


def test_commands_that_need_no_more_work(coordinator: Installed, locked: Path, tmp_path: Path) -> None:
    assert set(coordinator.json("experiments")) == set(experiments.bundled())
    answer = coordinator.run("fedvfm", "recipe", "new", "--classes", "background,lesion")
    assert "was not checked against the backbone" in answer.stderr
    assert (tmp_path / "recipe.toml").is_file()
    assert "facebook" not in coordinator.run("fedvfm", "client", "review", locked).stdout
    assert coordinator.json(
        "privacy", "epsilon", "--noise", 1, "--samples", 100, "--batch", 10, "--steps", 10, "--delta", "1e-3"
    )["epsilons"]


# -- a simulation and a federation from the wheel ----------------------------------------------------------------------


@pytest.fixture
def ready(whole: Installed, tiny: Any) -> Installed:
    """The tiny data and backbone, away from the clone, with a recipe made by ``recipe new``."""
    where = whole.run("python", "-c", "import fedvfm; print(fedvfm.__file__)").stdout.strip()
    assert Path(where).is_relative_to(whole.venv), "the wheel's, not the clone's"
    shutil.copytree(tiny.data, whole.folder / "data")
    shutil.copytree(tiny.backbone, whole.folder / "backbone")
    new = ("--backbone", whole.folder / "backbone", "--classes", "background,foreground")
    whole.run("fedvfm", "recipe", "new", *new)
    text = (whole.folder / "recipe.toml").read_text()
    for key, value in {"rounds": "2", "threads": "1", "input_size": "[28, 28]", "views": "1"}.items():
        text, number = re.subn(rf"^#?{key} = .*$", f"{key} = {value}", text, flags=re.M)
        assert number == 1, key
    (whole.folder / "recipe.toml").write_text(text)
    return whole


def test_a_simulation_from_the_wheel(ready: Installed) -> None:
    recipe = re.sub(r"^\[", "[recipe.", (ready.folder / "recipe.toml").read_text(), flags=re.M)
    head = 'name = "mine"\nbaselines = []\n[data]\nsource = "folder"\npath = "data"\n[recipe]\n'
    (ready.folder / "mine.toml").write_text(head + recipe)
    found = ready.json("simulate", "mine.toml", "--output", "run")
    assert set(found["arms"]["federated"]["sites"]) == {"east", "north", "south"}
    assert (ready.folder / "run" / "report.html").stat().st_size > 1000
    ready.run("fedvfm", "predict", "run/adapter", "data/images", "-o", "masks")
    assert len(list((ready.folder / "masks").rglob("*.png"))) == 24
    script = "import fedvfm; print(type(fedvfm.load_adapter('run/adapter')).__name__)"
    assert ready.run("python", "-c", script).stdout.strip() == "AdaptedModel"


@pytest.mark.usefixtures("nothing_left")
def test_a_federation_of_two_hospitals_from_the_wheel(ready: Installed, until: Any) -> None:
    """The commands of the READMEs, in their order; every end is the wheel's."""
    names = ("--name", "study", "--address", f"127.0.0.1:{processes.free_port()}", "--sites", ",".join(SITES))
    made = ready.json("server", "init", "recipe.toml", *names)
    for site in SITES:
        told = ("--fingerprint", made["fingerprint"], "--approve", made["recipe"], "--state", site)
        assert ready.json("client", "init", "--name", site, "--path", "data", "-o", f"{site}.toml")["layout"] == "pairs"
        invite = made["invites"][site]
        policy = ready.run("fedvfm", "client", "review", invite, "--print-policy").stdout
        text = (ready.folder / f"{site}.toml").read_text().replace('#include = ["ward-3"]', f'include = ["{site}"]')
        start = text.index("[policy]\n")
        (ready.folder / f"{site}.toml").write_text(text[:start] + policy.replace("units = 10", "units = 1"))
        checked = ready.json("data", "check", f"{site}.toml", "--recipe", invite)
        assert checked["training_step"] is not None, checked["findings"]
        key = ready.json("client", "join", invite, *told, "--data", f"{site}.toml")["key"]
        ready.json("server", "approve", f"{site}/request.json", "--key", key)
    ready.start("server", "start")
    for site in SITES:
        ready.start("client", "start", f"{site}.toml", "--state", site)

    def over() -> bool:
        broken = [process.args for process in ready.running[1:] if process.poll() is not None]
        assert not broken, ready.said()
        return bool(ready.json("server", "status")["finished"])

    assert until(over, 1500), ready.said()
    status = ready.json("server", "status")
    assert (status["finished_rounds"], {row["roster"] for row in status["sites"].values()}) == (2, {"approved"})
    assert "Traceback" not in ready.said()
    ready.run("fedvfm", "audit", "receipt", "fedvfm-server", "-o", "receipt.json")
    for site in SITES:
        assert ready.json("audit", "verify", site, "--against", "receipt.json")["checked"] == 1
