"""Trackers: what the journal says reaches them whole and once, read back by their own readers; a fault ends nothing."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.server import tracked_runs as server_runs
from fedvfm.simulation import tracked_runs
from fedvfm.storage import hash_chain
from fedvfm.tracking import base, follower, mlflow, targets, values, wandb

Points = dict[str, dict[int, float]]
SITE = "east"
LINE = {
    "round": 3,
    "examples": {"east": 4, "west": 6},
    "refused": {"south": {"reason": "norm"}},
    "train": {"east": {"loss": 0.25}, "west": {"loss": 0.75}},
    "validation": {"east": {"dice": 0.5, "num_examples": 4.0}, "west": {"num_examples": 6.0}},
    "privacy": {"epsilon": 2.0},
    "bytes": {"up": 10, "down": 20},
    "seconds": 1.5,
    "factor_error": float("nan"),
}


# -- what is told ------------------------------------------------------------------------------------------------------


def test_a_line_in_numbers_and_single_sites_where_they_are_asked_for_alone() -> None:
    means = values.of_line(LINE, sites=False)
    assert means == {
        "round/seconds": 1.5,
        "round/bytes_up": 10.0,
        "round/bytes_down": 20.0,
        "round/admitted": 2.0,
        "round/refused": 1.0,
        "privacy/epsilon": 2.0,
        "train/loss": 0.5,
        "val/dice": 0.5,
    }
    single = values.of_line(LINE, sites=True)
    assert {name: single[name] for name in single.keys() - means.keys()} == {
        "site/east/train/loss": 0.25,
        "site/west/train/loss": 0.75,
        "site/east/val/dice": 0.5,
    }
    hidden = {**LINE, "train": {}, "validation": {}, "secure_aggregation": {"sites": 3, "loss": 0.4}}
    assert values.of_line(hidden, sites=True)["train/loss"] == 0.4
    assert values.of_test({"last": {"sites": {"east": {"dice": 0.5}, "west": {}}}}, sites=False) == {"test/dice": 0.5}
    assert values.parameters({"a": {"b": 1, "c": [2]}, "d": None}) == {"a.b": "1", "a.c": "[2]", "d": "None"}


def test_what_is_asked_for_is_checked_before_anything_begins(monkeypatch: pytest.MonkeyPatch, cli: Any) -> None:
    with pytest.raises(errors.ConfigError) as told:
        targets.parse(["tensorbord:runs", "mlflow:", "mlflaw:http://me:secret@host"])
    assert "nearest: 'tensorboard'" in str(told.value)
    assert "--track mlflow: name a tracking URI, or a folder after a colon" in str(told.value)
    assert "secret" not in str(told.value)
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    answer = cli("simulate", "brain-mri", "--track", "tensorboard:runs", "--dry-run")
    assert (answer.code, 'pip install "fedvfm[tensorboard]"' in answer.err) == (errors.MissingExtra.exit_code, True)
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: name)  # type: ignore[attr-defined]
    (target,) = targets.parse(["mlflow:http://host", "mlflow:http://host"])
    assert target.shown == "mlflow:http://host"
    assert targets.Target("mlflow", "http://me:secret@host").shown == "mlflow:http://host"
    assert targets.without_login("no route to http://me:p@ss@host/a") == "no route to http://host/a"
    (folder,) = targets.parse(["tensorboard:runs"])
    assert Path(folder.where).is_absolute()


@pytest.mark.parametrize(
    ("word", "shown", "remedy"),
    [
        ("mlflow:http://me:secret@host:5000/a", "mlflow:http://host:5000/a", "MLFLOW_TRACKING_PASSWORD"),
        ("mlflow:HTTPS://secret@host", "mlflow:HTTPS://host", "MLFLOW_TRACKING_TOKEN"),
        ("mlflow:postgresql://me:p@secret@host/db", "mlflow:postgresql://host/db", "PGPASSWORD"),
        ("wandb:https://api:secret@host", "wandb:https://host", "WANDB_API_KEY"),
        (
            "mlflow:postgresql:///db?user=me&password=secret",
            "mlflow:postgresql:///db?user=me&password=...",
            "PGPASSWORD",
        ),
        ("mlflow:mysql://host/db?SSLPassword=secret&a=b", "mlflow:mysql://host/db?SSLPassword=...&a=b", "PGPASSWORD"),
    ],
)
def test_a_login_in_an_address_is_refused_and_stands_nowhere(cli: Any, word: str, shown: str, remedy: str) -> None:
    answer = cli("simulate", "brain-mri", "--track", word, "--dry-run")
    assert answer.code == errors.ConfigError.exit_code
    assert f"--track {shown}: the address had a name or a password in it" in answer.err
    assert remedy in answer.err
    assert "secret" not in answer.err + answer.out


@pytest.mark.parametrize(
    "word",
    ["mlflow:http://host/a@b", "mlflow:postgresql://me@host/db", "mlflow:sqlite:////a/b.db", "mlflow:databricks"],
)
def test_an_address_without_a_password_is_taken(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: name)  # type: ignore[attr-defined]
    (target,) = targets.parse([word])
    assert target.where == word.partition(":")[2]


# -- a fault -----------------------------------------------------------------------------------------------------------


class Recorder:
    """A tracker that fails as often as it is told."""

    def __init__(self, failures: int) -> None:
        self.failures, self.rows = failures, list[tuple[str, int]]()

    def begin(self, run: base.Run, known: str) -> str:
        return known or run.name

    def log(self, known: str, step: int, numbers: Mapping[str, float]) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("no route to http://me:secret@host\nwith more")
        self.rows.append((known, step))

    def end(self, known: str) -> None:
        self.rows.append((known, -1))

    def close(self) -> None:
        pass


def journal(folder: Path, rounds: int, *, tested: bool = False) -> None:
    chain = hash_chain.Chain(folder / "journal.jsonl")
    for number in range(len(chain.entries) + 1, rounds + 1):
        chain.append({**LINE, "round": number, "factor_error": None})
    if tested:
        (folder / "evaluation.json").write_text(json.dumps({"round": rounds, "last": {"sites": {SITE: {"dice": 0.5}}}}))


def test_a_fault_is_told_once_and_what_was_missed_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, said = Recorder(failures=3), list[str]()
    monkeypatch.setattr(targets.Target, "open", lambda target: recorder)
    target = targets.Target("mlflow", "http://me:secret@host")
    run = base.Run("a", tmp_path, "a", {})
    own = follower.Follower(target, lambda: [run], said.append, sites=False)
    assert own.look(), "a run without a round is nothing to tell of"
    journal(tmp_path, 2)
    assert [own.look() for _ in range(4)] == [False, False, False, True]
    assert (len(said), said[1]) == (2, "")
    assert "tracker mlflow:http://host takes nothing: OSError: no route to http://host with more" in said[0]
    assert recorder.rows == [("a", 1), ("a", 2)]
    journal(tmp_path, 3, tested=True)
    again = follower.Follower(target, lambda: [run], said.append, sites=False)  # the run was resumed
    assert again.look()
    assert again.look()
    assert recorder.rows == [("a", 1), ("a", 2), ("a", 3), ("a", 3), ("a", -1)]
    other = follower.Follower(targets.Target("mlflow", "elsewhere"), lambda: [run], said.append, sites=False)
    assert other.look(), "another tracker of the same run"
    assert len(recorder.rows) == 10


def test_classes_that_mlflow_would_write_alike_are_two_metrics() -> None:
    """The later of two overwrote the earlier, and its curve was lost."""
    pytest.importorskip("mlflow.entities", reason="the extra mlflow is not installed")
    told: list[tuple[str, float]] = []

    class Client:
        def log_batch(self, _run: str, metrics: Any) -> None:
            told.extend((one.key, one.value) for one in metrics)

    own = object.__new__(mlflow.MLflow)
    own._client = Client()
    for step in (1, 2):
        own.log("run", step, {"val/dice_ER+": 0.1, "val/dice_ER?": 0.2, "val/dice": 0.3})
    assert told[:3] == told[3:]
    assert len({name for name, _ in told}) == 3
    assert told[2] == ("val/dice", 0.3)


@pytest.mark.usefixtures("own_environment")
def test_a_run_that_mlflow_refuses_half_way_is_not_left_there_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = pytest.importorskip("mlflow.tracking", reason="the extra mlflow is not installed")
    own = mlflow.MLflow(str(tmp_path / "target"))
    refuse = lambda *given, **named: (_ for _ in ()).throw(OSError("too long"))  # noqa: E731
    monkeypatch.setattr(tracking.MlflowClient, "log_batch", refuse)
    for _ in range(2):
        with pytest.raises(OSError, match="too long"):
            own.begin(base.Run("a", tmp_path, "a", {"key": "value"}), "")
    client = tracking.MlflowClient(tracking_uri=str(tmp_path / "target"))
    (experiment,) = [row for row in client.search_experiments() if row.name == mlflow.EXPERIMENT]
    assert client.search_runs([experiment.experiment_id]) == []


# -- the real ones -----------------------------------------------------------------------------------------------------


def tensorboard_points(target: str) -> dict[str, Points]:
    """Run -> name -> step -> value, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing import event_accumulator

    runs: dict[str, Points] = {}
    for folder in sorted({path.parent for path in Path(target).rglob("events.out.tfevents.*")}):
        reader = event_accumulator.EventAccumulator(str(folder))
        reader.Reload()
        points = {
            name: {event.step: round(event.value, 5) for event in reader.Scalars(name)}
            for name in reader.Tags()["scalars"]
        }
        assert b"optimiser.learning_rate" in reader.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]
        runs[str(folder.relative_to(target))] = points
    return runs


def mlflow_points(target: str) -> dict[str, Points]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=target)
    (experiment,) = [one for one in client.search_experiments() if one.name == mlflow.EXPERIMENT]
    runs: dict[str, Points] = {}
    for run in client.search_runs([experiment.experiment_id]):
        assert run.info.status == "FINISHED"
        assert "optimiser.learning_rate" in run.data.params
        runs[run.data.tags["fedvfm.run"]] = {
            name: {point.step: round(point.value, 5) for point in client.get_metric_history(run.info.run_id, name)}
            for name in run.data.metrics
        }
    return runs


def wandb_points(folder: Path) -> dict[str, Points]:
    """Of the offline files: records of LevelDB's log format, each a message of the package's own kind."""
    from wandb.proto import wandb_internal_pb2

    runs: dict[str, Points] = {}
    for path in folder.rglob("*.wandb"):
        points: Points = {}
        for data in leveldb_records(path.read_bytes()[7:]):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in items.items():
                if not name.startswith("_"):
                    points.setdefault(name, {})[int(items["_step"])] = round(float(value), 5)
        runs[str(path.parents[2].relative_to(folder))] = points
    return runs


def leveldb_records(data: bytes, block: int = 32768) -> Iterator[bytes]:
    at, whole = 7, b""
    data = bytes(7) + data
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tracker sets in its process does not stay in this one."""
    for name, value in {**mlflow.ENVIRONMENT, **wandb.ENVIRONMENT}.items():
        monkeypatch.setenv(name, value)


READERS: dict[str, Callable[[Path, Path], dict[str, Points]]] = {
    "tensorboard": lambda target, run: tensorboard_points(str(target)),
    "mlflow": lambda target, run: mlflow_points(str(target)),
    "wandb": lambda target, run: wandb_points(run),
}


@pytest.mark.parametrize("kind", ["tensorboard", "mlflow", pytest.param("wandb", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("own_environment")
def test_a_run_is_read_back_by_the_trackers_own_reader(kind: str, tiny_run: Path, tmp_path: Path) -> None:
    pytest.importorskip(kind, reason=f"the extra {kind} is not installed")
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_run, folder)
    tracked = "study" if kind == "wandb" else str(tmp_path / "target")
    said: list[str] = []
    for _ in range(2):  # the second process hands on nothing twice
        own = follower.Follower(
            targets.Target(kind, tracked), lambda: tracked_runs.runs(folder), said.append, sites=True
        )
        assert own.look(), said
        own.close()
    found = READERS[kind](tmp_path / "target", folder)
    lines = hash_chain.read(folder / "journal.jsonl")
    (place,) = [place for place in found if place in (".", "tiny/federated")]
    points = found[place]
    for site, row in lines[0]["train"].items():
        assert set(points[f"site/{site}/train/loss"]) == {line["round"] for line in lines}
        assert points[f"site/{site}/train/loss"][1] == pytest.approx(row["loss"], abs=1e-4)
    assert points["round/seconds"][1] == pytest.approx(lines[0]["seconds"], abs=1e-3)
    assert any(name.startswith("test/") for name in points)
    arms = {str(path.parent.relative_to(folder)) for path in folder.rglob("evaluation.json")}
    assert len(found) == len(arms), "a run for each arm"


def test_a_coordinators_recipe_is_followed_from_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedvfm.server import state_folder
    from tests.server import numpy_sites

    locked = numpy_sites.lock(numpy_sites.make_recipe(backbone={"name": "none", "sha256": numpy_sites.SHA}))
    plan = state_folder.Plan("town", "127.0.0.1:8443", (), ("east",))
    where = state_folder.init(tmp_path / "server", plan, locked)
    recipes = server_runs.Recipes(where.folder)
    assert recipes() == []
    where.run_path(locked.hash).mkdir(parents=True)
    (run,) = recipes()
    assert (run.name, run.place) == (f"town, recipe {locked.hash[:12]}", f"town/{locked.hash[:12]}")
    assert run.parameters["hash"] == locked.hash
    assert run.parameters["optimiser.learning_rate"] == "0.001"


@pytest.mark.slow
def test_a_tracker_that_hangs_or_is_away_ends_nothing(tiny_run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Real processes: one tracker that never answers, one that nobody serves, one that works."""
    for kind in ("mlflow", "tensorboard"):
        pytest.importorskip(kind, reason=f"the extra {kind} is not installed")
    monkeypatch.setattr(follower, "GRACE_S", 12.0)
    folder, board, said = tmp_path / "tiny", str(tmp_path / "board"), list[str]()
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as gone:
        ports = [silent.getsockname()[1], gone.getsockname()[1]]
        gone.close()
        wanted = [targets.Target("mlflow", f"http://127.0.0.1:{port}") for port in ports]
        wanted.append(targets.Target("tensorboard", board))
        with tracked_runs.tracked(folder, wanted, lambda event, /, **fields: said.append(str(fields["text"]))):
            shutil.copytree(tiny_run, folder)
            deadline = time.monotonic() + 600.0
            taken = folder / f"{follower.PREFIX}{wanted[-1].mark}.json"
            while not (taken.exists() and json.loads(taken.read_text()).get("tested")):
                assert time.monotonic() < deadline, said
                time.sleep(0.1)
    assert len(said) == len(set(said)) == 2, said
    assert sum("takes nothing" in text or "did not take the last rows" in text for text in said) == 2, said
    assert "tiny/federated" in tensorboard_points(board)
