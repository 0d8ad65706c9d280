"""A run computes in one precision from beginning to end, in every engine, and says in which."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.model import precision
from fedvfm.simulation import run
from fedvfm.storage import hash_chain


def small(tiny: Any, **recipe: Any) -> dict[str, Any]:
    return {**tiny.values, "baselines": ["pooled"], "recipe": {**tiny.values["recipe"], **recipe}}


class Stop(KeyboardInterrupt):
    """Ends a run between two rounds."""


class Notes(list[str]):
    """An observer that keeps notes; may stop after a round."""

    def __init__(self, stop_after: int = 0) -> None:
        super().__init__()
        self._stop_after = stop_after

    def __call__(self, event: str, /, **fields: Any) -> None:
        if event == "note":
            self.append(str(fields["text"]))
        if event == "round-end" and fields["round"] == self._stop_after:
            raise Stop


def computed(path: Path) -> list[str]:
    """What each round's line says, once a kind."""
    lines = hash_chain.read(path / "journal.jsonl")
    assert all(set(line["precision"]) == set(line["cohort"]) for line in lines)
    return sorted({word for line in lines for word in line["precision"].values()})


@dataclass(frozen=True)
class Whole:
    """A run that nothing stopped, and what it noted."""

    made: run.Result
    notes: Notes

    @property
    def fingerprint(self) -> str:
        return str(self.made.summary["fingerprint"])


def simulated(values: dict[str, Any], ratio: float, output: Path) -> Whole:
    notes = Notes()
    with precision.taken("cpu", ratio):
        return Whole(run.simulate(values, output=output, observer=notes), notes)


@pytest.fixture(scope="module")
def wholes(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Whole]:
    """Runs of precision "auto" by how long bfloat16 takes; tests only read them."""
    root = tmp_path_factory.mktemp("wholes")
    return {ratio: simulated(small(tiny, precision="auto"), ratio, root / str(ratio)) for ratio in (0.5, 8.0)}


def test_the_journal_the_summary_and_the_report_say_what_was_computed_in(
    tiny: Any, wholes: dict[float, Whole], tmp_path: Path
) -> None:
    runs = {"slow": wholes[8.0], "quick": wholes[0.5]}
    for name, asked in (("strict", "float32"), ("may", "bfloat16")):
        runs[name] = simulated(small(tiny, precision=asked), 0.5, tmp_path / name)
    for name, asked in (("strict", "float32"), ("slow", "auto"), ("quick", "auto"), ("may", "bfloat16")):
        made = runs[name].made
        expected = "bfloat16" if name in ("quick", "may") else "float32"
        assert computed(made.path) == computed(made.path / "arms" / "pooled") == [expected]
        assert made.summary["precision"] == expected
        assert f"{expected}; the recipe says {asked}" in (made.path / "report.html").read_text()
        assert any("emulates bfloat16" in note for note in runs[name].notes) == (name == "slow")
    fingerprints = {name: whole.fingerprint for name, whole in runs.items()}
    assert fingerprints["strict"] == fingerprints["slow"]
    assert fingerprints["quick"] == fingerprints["may"] != fingerprints["slow"]


@pytest.mark.parametrize(("began", "there"), [(0.5, 8.0), (8.0, 0.5)])
def test_a_run_goes_on_as_it_began_and_says_so(
    tiny: Any, wholes: dict[float, Whole], tmp_path: Path, began: float, there: float
) -> None:
    values, notes = small(tiny, precision="auto"), Notes()
    with precision.taken("cpu", began), pytest.raises(Stop):
        run.simulate(values, output=tmp_path / "run", observer=Notes(stop_after=1))
    with precision.taken("cpu", there):
        made = run.resume(tmp_path / "run", observer=notes)
        assert precision.ratio("cpu") == there
    assert made.summary["fingerprint"] == wholes[began].fingerprint
    words = ("bfloat16", "float32") if began < 1 else ("float32", "bfloat16")
    assert made.summary["precision"] == words[0]
    assert any(f"this run began in {words[0]} and goes on so, though {words[1]} is quicker" in note for note in notes)


def test_a_run_that_does_not_say_how_it_began_is_not_mixed(
    tiny: Any, wholes: dict[float, Whole], tmp_path: Path
) -> None:
    with precision.taken("cpu", 0.5):
        for asked in ("auto", "bfloat16"):
            with pytest.raises(Stop):
                run.simulate(small(tiny, precision=asked), output=tmp_path / asked, observer=Notes(stop_after=1))
            (tmp_path / asked / "precision.json").unlink()
    with precision.taken("cpu", 8.0):
        with pytest.raises(errors.CheckpointError, match=r"precision\.json is missing"):
            run.resume(tmp_path / "auto")
        # An earlier release wrote none, and took the word literally.
        made = run.resume(tmp_path / "bfloat16")
    assert (made.summary["precision"], made.summary["fingerprint"]) == ("bfloat16", wholes[0.5].fingerprint)


def test_a_run_of_strict_precision_times_nothing(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "ratio", lambda device: pytest.fail("timed"))
    made = run.simulate(small(tiny, rounds=1, precision="float32"), output=tmp_path / "run")
    assert not (made.path / "precision.json").exists()
    shutil.rmtree(made.path)


def test_the_kept_decision_is_readable_by_people(tiny: Any, tmp_path: Path) -> None:
    with precision.taken("cpu", 0.5):
        made = run.simulate(small(tiny, rounds=1), output=tmp_path / "run")
    kept = json.loads((made.path / "precision.json").read_text())
    assert kept == {"device": "cpu", "bfloat16_over_float32": 0.5}
