"""Workers forked from one process: the same bits as one process, and nothing left when something ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedvfm
from fedvfm import errors
from fedvfm.client.training import trainer
from fedvfm.config import schema
from fedvfm.data import sample as data
from fedvfm.simulation import run
from fedvfm.simulation.engines import in_process, worker_schedule, workers
from fedvfm.storage import hash_chain

pytestmark = pytest.mark.skipif(not worker_schedule.can_fork(), reason="workers cannot be forked safely here")


def values(tiny: Any, **more: Any) -> dict[str, Any]:
    recipe = {**tiny.values["recipe"], **more.pop("recipe", {})}
    return {**tiny.values, "workers": "auto", "baselines": ["local-only", "pooled"], "recipe": recipe, **more}


@pytest.fixture(scope="module")
def one(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in this process alone."""
    return run.simulate(values(tiny, workers=1), output=tmp_path_factory.mktemp("one") / "run").path


def lines(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Arm -> what the journal says that does not depend on when and how fast."""
    changing = ("seconds", "ended", "peak_mib", "prev", "hash", "workers", "same_as", "train")
    return {
        str(journal.parent.relative_to(path)): [
            {key: value for key, value in line.items() if key not in changing} for line in hash_chain.read(journal)
        ]
        for journal in sorted(path.rglob("journal.jsonl"))
    }


@pytest.mark.parametrize("number", [2, 3])
def test_any_number_of_workers_gives_the_same_bits(tiny: Any, one: Path, tmp_path: Path, number: int) -> None:
    events: list[tuple[str, dict[str, Any]]] = []

    def watch(event: str, /, **fields: Any) -> None:
        events.append((event, fields))

    made = run.simulate(values(tiny, workers=number), output=tmp_path / "run", observer=watch)
    alone = run.resume(one).summary
    assert made.summary["workers"] == number
    assert (made.summary["threads"], alone["threads"]) == (1, 1)
    for key in ("fingerprint", "arms", "bytes"):
        assert made.summary[key] == alone[key], key
    assert (made.path / "samples.csv").read_bytes() == (one / "samples.csv").read_bytes()
    assert lines(made.path) == lines(one)
    assert {fields["name"] for event, fields in events if event == "arm"} == {
        "federated", "local-only/east", "local-only/north", "local-only/west", "pooled",
    }  # fmt: skip
    assert {fields["count"] for event, fields in events if event == "arm"} == {5}
    assert not multiprocessing.active_children()


def test_the_first_round_of_a_site_alone_is_computed_once(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, int]] = []
    train = trainer.train

    def counting(model: Any, site: Any, base: Any, number: int, *more: Any, **named: Any) -> Any:
        trained.append((site.name, number))
        return train(model, site, base, number, *more, **named)

    monkeypatch.setattr(trainer, "train", counting)
    made = run.simulate(values(tiny, workers=1), output=tmp_path / "run")
    assert trained.count(("east", 1)) == 1
    assert trained.count(("east", 2)) == 2
    assert trained.count(("pooled", 1)) == 1
    (federated, _), (own, second) = (
        hash_chain.read(folder / "journal.jsonl") for folder in (made.path, made.path / "arms" / "local-only" / "east")
    )
    assert own["same_as"] == {"east": "federated"}, "the journal says whose reply it is"
    assert own["train"]["east"] == federated["train"]["east"]
    assert "same_as" not in second
    assert "same_as" not in federated


def test_another_recipe_is_not_the_same_round(tiny: Any, tmp_path: Path) -> None:
    """The site alone takes no step of the server's own, so its recipe is another one."""
    what = values(tiny, baselines=["local-only"], recipe={"aggregation": {"server_learning_rate": 0.5}}, workers=2)
    made = run.simulate(what, output=tmp_path / "run")
    assert not any("same_as" in line for path in made.path.rglob("journal.jsonl") for line in hash_chain.read(path))


def test_a_killed_worker_is_one_clear_error_and_the_run_goes_on(tiny: Any, one: Path, tmp_path: Path) -> None:
    def kill(event: str, /, **fields: Any) -> None:
        if event == "round-end" and fields["arm"] == "federated":
            worker = multiprocessing.active_children()[0]
            os.kill(worker.pid or 0, signal.SIGKILL)

    with pytest.raises(errors.EngineError) as caught:
        run.simulate(values(tiny, workers=2), output=tmp_path / "run", observer=kill)
    said = str(caught.value)
    assert "ended with signal SIGKILL" in said
    assert "--workers 1" in said
    assert "--resume" in said
    assert not multiprocessing.active_children()
    made = run.resume(tmp_path / "run", workers=3)
    assert made.summary["workers"] == 3
    assert made.summary["fingerprint"] == run.resume(one).summary["fingerprint"]
    assert made.summary["arms"] == run.resume(one).summary["arms"]


def test_who_stops_a_run_in_any_thread_stops_it(tiny: Any, one: Path, tmp_path: Path) -> None:
    def stop(event: str, /, **fields: Any) -> None:
        if event == "reply" and fields["arm"] == "pooled":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.simulate(values(tiny, workers=2), output=tmp_path / "run", observer=stop)
    assert not multiprocessing.active_children()
    if (tmp_path / "run" / "experiment.json").exists():
        assert run.resume(tmp_path / "run").summary["fingerprint"] == run.resume(one).summary["fingerprint"]


class Struck(threading.Condition):
    """A condition that Ctrl-C meets in the main thread, once, as it is given back."""

    struck = False

    def __exit__(self, *raised: Any) -> None:
        if not self.struck and threading.current_thread() is threading.main_thread():
            self.struck = True
            signal.raise_signal(signal.SIGINT)
        super().__exit__(*raised)


def test_ctrl_c_while_a_lock_is_given_back_leaves_no_thread_waiting(
    tiny: Any, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, conditions = workers.Pool.__init__, []

    def with_condition(pool: workers.Pool, *arguments: Any) -> None:
        begin(pool, *arguments)
        pool.changed = Struck()
        conditions.append(pool.changed)

    with monkeypatch.context() as during:
        during.setattr(workers.Pool, "__init__", with_condition)
        with pytest.raises(KeyboardInterrupt):
            run.simulate(values(tiny, workers=2), output=tmp_path / "run")
    assert [condition.struck for condition in conditions] == [True]
    assert not multiprocessing.active_children()
    if (tmp_path / "run" / "experiment.json").exists():
        assert run.resume(tmp_path / "run").summary["fingerprint"] == run.resume(one).summary["fingerprint"]


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_a_codec_s_residual_follows_its_site_from_worker_to_worker(tiny: Any, tmp_path: Path, codec: str) -> None:
    made = [
        run.simulate(
            values(tiny, baselines=["pooled"], recipe={"rounds": 4, "codec": codec}, workers=number),
            output=tmp_path / str(number),
        )
        for number in (1, 2, 3)
    ]
    assert len({one.summary["fingerprint"] for one in made}) == 1
    assert made[0].summary["arms"] == made[1].summary["arms"] == made[2].summary["arms"]
    moved = [[line["bytes"] for line in hash_chain.read(one.path / "journal.jsonl")] for one in made]
    assert moved[0] == moved[1] == moved[2], "no worker has to be sent what another one holds"


@pytest.mark.parametrize("mechanism", ["site-level", "record-level"])
def test_arms_that_draw_other_views_of_an_image_share_none(tiny: Any, tmp_path: Path, mechanism: str) -> None:
    """A mechanism keys draws by names that stay, and not every arm has it: kept views must not pass between them."""
    recipe = {
        "privacy": {"mechanism": mechanism, "clip": 1.0, "noise_multiplier": 0.8, "delta": 1e-5},
        "aggregation": {"weighting": "uniform"},
        "data": {**tiny.values["recipe"]["data"], "augment": ["flip", "intensity", "noise"], "views": 1},
    }
    adapters = []
    for name, more in (("kept", {}), ("not-kept", {"cache_mib": 0, "cache_disk_mib": 0}), ("workers", {"workers": 2})):
        path = run.simulate(values(tiny, recipe=recipe, **{"workers": 1, **more}), output=tmp_path / name).path
        adapters.append({arm: [line["fingerprint"] for line in rounds] for arm, rounds in lines(path).items()})
    assert adapters[0] == adapters[1] == adapters[2]


class Loud:
    """Boxes at two sites whose reader complains."""

    info = data.SourceInfo("loud", "segmentation", ("background", "box"), "none")

    def __init__(self, settings: schema.SourceConfig) -> None: ...

    def samples(self) -> list[data.Sample]:
        return [data.Sample(f"{site}-{n}", site=site, split=split) for site in ("east", "west") for n, split in
                enumerate(("train", "train", "val", "test"))]  # fmt: skip

    def read(self, sample: data.Sample) -> data.Pixels:
        print(f"a dull picture: {sample.id}", file=sys.stderr)
        mask = np.zeros((28, 28), dtype=np.int64)
        mask[8:20, 8:20] = 1
        return data.Pixels((0.2 + 0.6 * mask[None]).astype(np.float32), mask)


def test_what_workers_print_is_not_lost(
    tiny: Any, tiny_dino: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fedvfm.register_source("loud", Loud, replace=True)
    contract = {"class_names": ["background", "box"], "input_size": [28, 28]}
    own = values(tiny, data={"source": "loud"}, recipe={"rounds": 1, "data": contract}, workers=2)
    run.simulate(own, output=tmp_path / "run")
    assert "a dull picture: east-0" in capfd.readouterr().err


def test_steps_are_told_while_a_site_computes(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "STEP_S", 0.0)
    for number in (1, 2):
        seen: list[dict[str, Any]] = []

        def watch(event: str, /, seen: list[dict[str, Any]] = seen, **fields: Any) -> None:
            seen.extend([fields] if event == "step" else [])

        run.simulate(values(tiny, workers=number, recipe={"rounds": 1}), output=tmp_path / str(number), observer=watch)
        arms = {(step["arm"], step["site"]) for step in seen if step["phase"] == "train"}
        assert {("federated", "east"), ("federated", "west"), ("pooled", "pooled")} <= arms
        assert {step["phase"] for step in seen} == {"train", "evaluate"}
        assert all(1 <= step["done"] <= step["total"] for step in seen)
        assert {step["round"] for step in seen if not step["arm"].startswith("personal/")} == {1}


def test_threads_that_computed_before_the_fork_are_not_waited_for(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller's own threads do not go along into a worker, which would wait for them for ever."""
    monkeypatch.setattr(in_process, "ALARM_S", 2)
    notes: list[str] = []
    computed: set[int] = set()
    really = trainer.train

    def watch(event: str, /, **fields: Any) -> None:
        notes.extend([fields["text"]] if event == "note" else [])

    def train(*arguments: Any, **further: Any) -> Any:
        computed.add(torch.get_num_threads())
        return really(*arguments, **further)

    monkeypatch.setattr(trainer, "train", train)
    torch.set_num_threads(2)
    try:
        torch.ones(1 << 22).sum()
        made = run.simulate(
            values(tiny, baselines=[], threads=2, workers=2, recipe={"rounds": 1}),
            output=tmp_path / "run",
            observer=watch,
        )
    finally:
        torch.set_num_threads(1)
    assert any(note.startswith("1 worker: worker 1 of 2 cannot compute") for note in notes), notes
    assert (made.summary["workers"], made.summary["threads"]) == (1, 2)
    assert computed == {2}, "as many as the run says, though models were built for the workers before"


# -- the schedule ------------------------------------------------------------------------------------------------------


def experiment(tiny: Any, **more: Any) -> schema.Experiment:
    return schema.parse(schema.Experiment, values(tiny, **more), "x")


def test_how_many_workers(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def number(tasks: int, **more: Any) -> tuple[int, str]:
        what = experiment(tiny, **more)
        return worker_schedule.count(
            what, tasks, lambda: in_process.adapted_model.AdaptedModel(what.recipe, with_weights=False)
        )

    monkeypatch.setattr(worker_schedule.capacity, "cores", lambda: 8)
    monkeypatch.setattr(worker_schedule.capacity, "memory_mib", lambda: 64_000.0)
    assert number(20) == (8, "")
    assert number(20, threads=3) == (2, "")
    assert number(5) == (5, "")
    assert number(20, workers=30) == (30, ""), "whoever says a number gets it"
    assert number(1) == (1, "")
    assert number(20, device="cuda") == (1, "")
    assert number(20, device="cuda", workers=2) == (1, "1 worker: the sites take turns on cuda")
    monkeypatch.setattr(worker_schedule.capacity, "memory_mib", lambda: 2048 + 700.0)
    assert number(20)[0] == 3
    monkeypatch.setattr(worker_schedule.capacity, "memory_mib", lambda: 100.0)
    least, why = number(20)
    assert least == 1
    assert why.startswith("1 worker: there is no memory for another")
    monkeypatch.setattr(worker_schedule, "can_fork", lambda: False)
    assert number(20)[0] == 1
    assert "cannot be forked safely" in number(20)[1]
    assert number(20, workers=1) == (1, "")
    assert worker_schedule.threads(experiment(tiny, recipe={"threads": None})) == 4


def test_the_longest_arm_goes_first_and_sites_stick_to_workers(tiny: Any, one: Path) -> None:
    what, shapes = run.prepare(values(tiny))
    hospitals = run.experiment.hospitals(what)
    names = [hospital.name for hospital in hospitals]
    jobs = run._jobs(what, run.run_folder.RunFolder(one), run.arms(what, names), shapes)
    turns = worker_schedule.Schedule(jobs, run.members(what, hospitals))
    assert [job.name for job in turns.jobs][:2] == ["pooled", "federated"]
    by_name = {job.name: job for job in jobs}
    first = turns.rank(by_name["federated"], 1, "east", "train")
    assert (
        turns.rank(by_name["pooled"], 1, "pooled", "train")
        < first
        < turns.rank(by_name["federated"], 2, "east", "train")
    )
    pool = workers.Pool(2, lambda index: None, lambda report, step: lambda message, context: message, {}, print)

    def order(node: int, rank: tuple[float, ...]) -> workers.Order:
        return workers.Order(rank, node, b"", workers.Body(b""), {}, [])

    pool._homes = {7: 0, 8: 1}
    pool._queue = [order(8, (0, 0, 1)), order(9, (0, 0, 2)), order(7, (0, 0, 3)), order(5, (1, 0, 0))]
    assert pool._choice(0) == 2, "its own site"
    assert pool._choice(2) == 1, "a new site rather than another's"
    pool._queue = pool._queue[:1]
    assert pool._choice(0) == 0, "another's site rather than nothing"


def _simulate(values: dict[str, Any], output: Path) -> None:
    made = run.simulate(values, output=output)
    assert made.summary["workers"] == 1


def test_a_process_that_may_have_no_children_computes_alone(tiny: Any, tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(
        target=_simulate, args=(values(tiny, workers=2, recipe={"rounds": 1}), tmp_path / "run"), daemon=True
    )
    child.start()
    child.join()
    assert child.exitcode == 0
