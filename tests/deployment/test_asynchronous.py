"""Three hospitals by the real commands, of which one is slow: its late update counts, whatever is killed meanwhile."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from fedvfm.audit import audit
from fedvfm.client.gate import policy
from fedvfm.runtime import processes
from tests.deployment import two_hospitals

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_left")]
SITES = ("east", "north", "south")
LONG = 900.0


def test_a_slow_hospitals_update_of_an_earlier_round_counts_and_survives_the_coordinator(
    tiny: Any, tmp_path: Path, until: Any
) -> None:
    recipe = tiny.recipe + "\n[asynchronous]\nbuffer_size = 2\n"
    with two_hospitals.enrolled(tiny, tmp_path, recipe, SITES) as three:
        allowed = policy.accepting(policy.Facts.of(three.locked)).replace("units = 10", "units = 1")
        for site in SITES:
            three.settings(site).write_text(tiny.site(site) + allowed)
        three.start_clients()
        # The seventh update is that of the slow site: two rounds of the two others, and theirs of the last round.
        server = three.start_server(FEDVFM_FAULT_POINT="update-kept:7")
        slow = three.sites["south"]

        def trains() -> bool:
            return any(entry["event"] == "decided" and entry["kind"] == "train" for entry in slow.audit.entries)

        assert until(trains, LONG), three.said()
        executor = processes.running(processes.pid_path(slow.folder / "run", "executor"))
        assert executor is not None
        os.kill(executor, signal.SIGSTOP)
        try:
            kept = three.run / "received"
            assert until(lambda: len(list(kept.glob("00003-*"))) == 2, LONG), three.said()
            assert [line["staleness"] for line in three.journal()] == [{}, {}]
            assert all(line["out"] == {"south": {"round": 1}} for line in three.journal())
        finally:
            os.kill(executor, signal.SIGCONT)
        assert until(lambda: server.poll() is not None, LONG), three.said()
        assert server.returncode == 0, three.said()

        lines = three.journal()
        assert [line["staleness"] for line in lines] == [{}, {}, {"south": 2}]
        assert [line["cohort"] for line in lines] == [list(SITES), ["east", "north"], ["east", "north"]]
        assert [sorted(line["examples"]) for line in lines] == [["east", "north"], ["east", "north"], list(SITES)]
        assert [sorted(line["validation"]) for line in lines] == [["east", "north"], ["east", "north"], list(SITES)]
        assert all(line["refused"] == {} for line in lines)
        assert lines[2]["weights"]["south"] < min(lines[2]["weights"][site] for site in ("east", "north"))
        assert lines[-1]["out"] == {}
        words = ("baselines=[]", "recipe.asynchronous={buffer_size=2}", "site_times={south=2.5}")
        sets = [word for value in words for word in ("--set", value)]
        answer = tiny.run("simulate", tiny.experiment, *sets, "--output", tmp_path / "simulated")
        assert answer.code == 0, answer.err
        simulated = tiny.lines(tmp_path / "simulated" / "journal.jsonl")
        assert [line["fingerprint"] for line in simulated] == [line["fingerprint"] for line in lines]
        assert not list(kept.glob("*"))
        trained = [entry["round"] for entry in slow.audit.entries if entry["event"] == "trained"]
        assert trained == [1], "nothing was trained twice, and nothing thrown away"
        assert three.said().count("the run ended (-9)") == 1, "killed with the late update, and never again"
        for site in SITES:
            assert audit.verify(three.folder / site / "audit.jsonl")["unfinished"] == 0
