"""Asynchronous rounds in whole simulations: the same bits however they are run, and what an experiment may not ask."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.report import rounds as report
from fedvfm.simulation import baselines, run
from fedvfm.simulation.engines import flower_run
from fedvfm.storage import hash_chain
from tests.server import numpy_sites


@pytest.fixture
def slow(tiny: Any) -> dict[str, Any]:
    recipe = {**tiny.values["recipe"], "rounds": 4, "asynchronous": {"buffer_size": 2}}
    recipe["evaluation"] = {"every": 2, "surface": False}
    return {**tiny.values, "baselines": [], "recipe": recipe, "site_times": {"west": 2.5}}


@pytest.mark.slow
def test_every_way_to_run_it_ends_with_the_same_bits(slow: dict[str, Any], tmp_path: Path) -> None:
    made = run.simulate(slow, output=tmp_path / "whole")
    lines = hash_chain.read(made.path / "journal.jsonl")
    assert [line["staleness"] for line in lines] == [{}, {}, {"west": 2}, {"north": 1}]
    assert lines[-1]["clock"] == 5.5
    assert set(lines[1]["validation"]) == {"east", "north", "west"}, "nobody is really busy"
    assert "west 2.5" in (made.path / "report.html").read_text()

    def stop(event: str, /, **fields: Any) -> None:
        if event == "round-end" and fields["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.simulate({**slow, "workers": 2}, output=tmp_path / "stopped", observer=stop)
    assert run.resume(tmp_path / "stopped").summary["fingerprint"] == made.summary["fingerprint"]


def test_what_an_experiment_may_not_ask(slow: dict[str, Any], tmp_path: Path) -> None:
    wrong = {**slow, "attack": {"kind": "sign-flip", "sites": ["east"]}, "server": {"cohort": 2, "grace_s": 1.0}}
    with pytest.raises(errors.ConfigError) as caught:
        run.simulate(wrong, output=tmp_path / "run")
    for fault in (
        "attack: a bad site is to know",
        "server.cohort = 2: with recipe.asynchronous",
        "server.grace_s = 1: ",
    ):
        assert str(caught.value).count(fault) == 1
    for changes, match in (
        ({"site_times": {"south": 2.0}}, "site_times: no site south; sites: east, north, west"),
        ({"recipe": {**slow["recipe"], "asynchronous": None}}, r"site_times: only recipe\.asynchronous reads it"),
    ):
        with pytest.raises(errors.ConfigError, match=match):
            run.simulate({**slow, **changes}, output=tmp_path / "run")


def test_a_baseline_has_plain_rounds(slow: dict[str, Any]) -> None:
    recipe = schema.parse(schema.Experiment, slow, "experiment").recipe
    arm = baselines.whole(baselines.Arm("pooled", "pooled", recipe, ("pooled",), ()))
    assert arm.recipe is not None
    assert arm.recipe.hash == recipe.model_copy(update={"asynchronous": None}).hash


def test_hospitals_that_share_a_node_do_not_wait_for_one_whose_answer_is_not_taken_yet() -> None:
    class OneNode(numpy_sites.LoopGrid):
        def __init__(self) -> None:
            super().__init__(lambda message, context: Message(RecordDict(), reply_to=message), 1)  # type: ignore[arg-type]

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return super().pull_messages(list(message_ids))

    grid = flower_run.SharedNodes(OneNode(), 2)
    content = RecordDict({"a": ConfigRecord({"b": 1})})
    first, second = grid.push_messages(
        [Message(content, node, "train", ttl=60.0, group_id="1") for node in grid.get_node_ids()]
    )
    assert list(grid.pull_messages([second])) == [], "the node answers as the first hospital"
    (reply,) = grid.pull_messages([second])
    assert reply.metadata.reply_to_message_id == second
    (reply,) = grid.pull_messages([first])
    assert reply.metadata.reply_to_message_id == first, "kept until it is asked for"


def test_the_report_says_who_came_late() -> None:
    line = {"round": 1, "cohort": ["east"], "validation": {}, "bytes": {"up": 1, "down": 1}, "seconds": 1.0}
    assert "late" not in report.every_round([line], "dice", "Dice")
    late = report.every_round([{**line, "staleness": {}}, {**line, "staleness": {"west": 2}}], "dice", "Dice")
    assert "late</th>" in late
    assert "west 2" in late
