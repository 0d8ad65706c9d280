"""A port that strangers flood, and many sites at once: rounds go on, and the proxy stays small."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from fedvfm.runtime import capacity
from fedvfm.server.network import refused_requests
from tests.deployment import flood, light_sites

MIB = 1 << 20
WORDS = {"connections", "key"}
LONGEST_S = 900.0
"""Until the flood is whole; a busy machine is slow."""
SMALL = 100_000
"""Numbers of a message: 0.4 MB."""


def _memory(process: psutil.Process) -> float:
    return process.memory_info().rss / MIB


def _flooded(folder: Path, connections: int, rounds: int, seconds: float) -> None:
    """Rounds before and during a flood from the very address that the sites have."""
    capacity.raise_file_limit()
    with light_sites.wired(folder, 2) as sites:
        for number in range(2):
            sites.round(number, SMALL)
        proxy = sites.process("proxy")
        before, most = _memory(proxy), 0.0
        with flood.going_on(sites.front.host, sites.front.port, connections, folder / "flood.txt") as attack:
            began, number = time.monotonic(), 2

            def flooded() -> bool:
                """Whether every kind of attacker is there and was refused."""
                words = refused_requests.lately(Path(sites.front.log))
                return set(attack()) == set(flood.KINDS) and words.keys() >= WORDS

            while number < 2 + rounds or time.monotonic() < began + seconds or not flooded():
                sites.round(number, SMALL)
                most, number = max(most, _memory(proxy)), number + 1
                assert time.monotonic() < began + LONGEST_S, attack()
            kinds = attack()
        assert most - before < 100, (before, most)
        assert not sites.faults
        assert proxy.is_running()
        assert sites.family.children["proxy"].failures == 0
        refused = refused_requests.lately(Path(sites.front.log))
        assert set(refused) >= WORDS
        assert set(kinds) == set(flood.KINDS)
    memory = f"proxy {before:.0f} -> {most:.0f} MiB"
    print(f"{connections} at a time, {sum(kinds.values())} in all, {number - 2} rounds, {memory}, refused {refused}")


@pytest.mark.slow
@pytest.mark.alone
def test_rounds_go_on_under_a_flood(tmp_path: Path) -> None:
    _flooded(tmp_path, 600, 2, 4.0)


@pytest.mark.slow
@pytest.mark.alone
def test_rounds_go_on_under_three_thousand_connections(tmp_path: Path) -> None:
    _flooded(tmp_path, 3000, 5, 40.0)


@pytest.mark.slow
@pytest.mark.alone
def test_twenty_sites_at_once(tmp_path: Path) -> None:
    """Each sends its answer as soon as it has it; no round is lost, and the data base is never found locked."""
    with light_sites.wired(tmp_path, 20) as sites:
        taken = [sites.round(number, SMALL) for number in range(2)]
        assert not sites.faults
        assert "locked" not in sites.log("superlink")
    print(f"20 sites, seconds a round: {[round(one, 1) for one in taken]}, pauses {sorted(sites.pauses)}")
