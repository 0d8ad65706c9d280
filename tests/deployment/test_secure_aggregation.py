"""Three hospitals under secure aggregation by the real commands: approvals, a kill, no plain update at the server."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedvfm.audit import audit
from fedvfm.client import state_folder
from fedvfm.client.gate import policy, reply_cache
from fedvfm.ledger import ledger
from fedvfm.protocol import protocol
from fedvfm.runtime import processes
from fedvfm.secure_aggregation import fixed_point
from fedvfm.state import checkpoint, state
from fedvfm.storage import hash_chain
from tests.deployment import two_hospitals

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_left")]
SITES = ("east", "north", "south")
LAST = 3
"""The recipe has so many rounds."""
NUMBERS = 16
"""So many numbers of an update one behind another are looked for: no chance makes them."""

Three = two_hospitals.Two


@pytest.fixture
def three(tiny: Any, tmp_path: Path) -> Iterator[Three]:
    recipe = tiny.recipe.replace("rounds = 3", "rounds = 3\nmin_sites = 3") + "\n[secure_aggregation]\n"
    with two_hospitals.enrolled(tiny, tmp_path, recipe, SITES) as made:
        allowed = policy.accepting(policy.Facts.of(made.locked)).replace("units = 10", "units = 1")
        assert "require_secure = true" in allowed
        for site in SITES:
            made.settings(site).write_text(tiny.site(site) + allowed)
        yield made


SHARED = """
[aggregation]
weighting = "uniform"

[secure_aggregation]

[privacy]
mechanism = "record-level-shared"
clip = 1.0
noise_multiplier = 2.0
delta = 1e-3
"""
STEP = '[optimiser]\nname = "sgd"\nschedule = "constant"\nwarmup = 0.0\nweight_decay = 0.0\n'


@pytest.fixture
def sharing(tiny: Any, tmp_path: Path) -> Iterator[Three]:
    """Three hospitals that share noise; each has a budget, and a policy that names the mechanism."""
    recipe = tiny.recipe.replace("rounds = 3", "rounds = 1\nmin_sites = 3").replace("[optimiser]\n", STEP) + SHARED
    with two_hospitals.enrolled(tiny, tmp_path, recipe, SITES) as made:
        allowed = policy.accepting(policy.Facts.of(made.locked, 5)).replace("units = 10", "units = 1")
        budget = '[privacy]\ndata_set = "discs"\nepsilon = 9.0\ndelta = 1e-3\nunit = "record"\n'
        for site in SITES:
            # Each image is drawn alone: with this seed each site has 5, 1 and 2 of 8.
            own = f'{tiny.site(site)}[split]\nseed = 123\n{allowed}\n{budget}ledger = "{site}-ledger"\n'
            made.settings(site).write_text(own)
        yield made


def test_three_hospitals_share_noise_and_their_ledgers_say_whose(sharing: Three, until: Any, cli: Any) -> None:
    state = ("--state", str(sharing.server.folder))
    roster = json.loads(cli("server", "publish-roster", *state, "--json").out)["roster"]
    clients = sharing.start_clients()
    server = sharing.start_server()
    assert until(lambda: all(_came(sharing, site, roster) for site in SITES), 900), sharing.said()
    for site in SITES:
        shown = cli("client", "review", sharing.locked.hash, "--state", str(sharing.sites[site].folder))
        assert "1/sqrt(2) of the noise" in shown.out
        state_folder.approve(sharing.sites[site], sharing.locked, roster=roster)
    assert until(lambda: server.poll() is not None, 1500), sharing.said()
    assert server.returncode == 0, sharing.said()
    (line,) = sharing.journal()
    told = line["secure_aggregation"]
    assert (told["sites"], told["weight"], told["honest"], told["loss"]) == (3, 3, 2, None)
    # The mean is of updates that the sites kept, and of noise that nobody has: so much of it as was said.
    start = sharing.locked.adapter
    after = checkpoint.read(sharing.run / "checkpoints" / "round-00001.safetensors")[0]
    plain = updates(sharing)
    names = sorted(plain["east"].state)
    noise = np.concatenate(
        [
            (
                after[name].astype(float)
                - start[name]
                - np.mean([own.state[name] - start[name] for own in plain.values()], axis=0)
            ).reshape(-1)
            for name in names
        ]
    )
    assert noise.std() == pytest.approx(told["noise_on_mean"], rel=5 / np.sqrt(2 * noise.size))
    assert stats.kstest(noise / told["noise_on_mean"], "norm").pvalue > 1e-5
    for site in SITES:
        (charged,) = (
            entry for entry in ledger.reopen(sharing.folder / f"{site}-ledger").entries if entry["event"] == "charged"
        )
        assert (charged["mechanism"], charged["honest"], charged["steps"]) == ("record-level-shared", 2, 1)
        assert clients[site].poll() is None
        kept = [json.loads(path.read_text())["seed"] for path in sharing.sites[site].secure.glob("*.noise")]
        assert kept == [""], "it went with the recipe; that there was one is kept"


@contextlib.contextmanager
def stopped(folder: Path, name: str) -> Iterator[None]:
    """A process that a pid file names stands still while the block runs."""
    process = processes.running(processes.pid_path(folder, name))
    assert process is not None
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def trained(three: Three, site: str) -> list[int]:
    return [entry["round"] for entry in three.sites[site].audit.entries if entry["event"] == "trained"]


def test_three_hospitals_approve_a_roster_and_nobody_sees_an_update(three: Three, until: Any, cli: Any) -> None:
    state = ("--state", str(three.server.folder))
    refused = cli("server", "start", *state)
    assert refused.code == 2
    assert "publish-roster" in refused.err
    published = json.loads(cli("server", "publish-roster", *state, "--json").out)
    assert set(published["sites"]) == set(SITES)
    crash = {"south": {"FEDVFM_FAULT_POINT": f"secure-masked-on-disk:{LAST}"}}
    clients = {site: three.start_client(site, **crash.get(site, {})) for site in SITES}
    server = three.start_server("--stay", FEDVFM_FAULT_POINT="secure-survivors-kept:2")

    # The document came with the greeting and waits for people; nothing was trained.
    roster = published["roster"]
    assert until(lambda: all(_came(three, site, roster) for site in SITES), 900), three.said()
    assert until(lambda: all(_pending(three, site) for site in SITES), 900), three.said()
    assert all(trained(three, site) == [] for site in SITES)
    for site in SITES:
        shown = cli("client", "review", three.locked.hash, "--state", str(three.sites[site].folder))
        assert all(key in shown.out for key in (roster, "not approved here", *published["sites"].values()))
        state_folder.approve(three.sites[site], three.locked, roster=roster)

    # All masked updates of the last round are there, and the sum cannot be opened: south was killed before it sent its
    # own, and the other two, who sent theirs, stand still until all that the server is was copied.
    def came() -> int:
        return len(list((three.run / "received").glob(f"{LAST:05d}-*.masked")))

    assert until(lambda: came() == 2, 1500), three.said()
    with contextlib.ExitStack() as held:
        for site in ("east", "north"):
            held.enter_context(stopped(three.sites[site].folder / "run", "executor"))
        assert until(lambda: came() == 3, 900), three.said()
        files, memory = everything(three, server.pid)
    check_nothing_plain(three, files, memory)

    assert until(lambda: (three.run / "evaluation.json").exists(), 900), three.said()
    check_nothing_plain(three, *everything(three, server.pid))
    check_rounds(three)
    for site in SITES:
        assert clients[site].poll() is None
        assert trained(three, site) == [1, 2, 3], "a coordinator or a site that was killed makes nobody train twice"
        opened = [entry["round"] for entry in three.sites[site].audit.entries if entry["event"] == "unmasked"]
        assert sorted(set(opened)) == [1, 2, 3]
        assert audit.verify(three.sites[site].folder / "audit.jsonl")["unfinished"] == 0


def _came(three: Three, site: str, roster: str) -> bool:
    return three.sites[site].roster_path(roster).exists()


def _pending(three: Three, site: str) -> bool:
    entries = three.sites[site].audit.entries
    return any(entry.get("reason") == "roster-pending" for entry in entries)


def check_rounds(three: Three) -> None:
    lines = three.journal()
    assert [line["round"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert (line["examples"], line["train"], line["refused"]) == (dict.fromkeys(SITES), {}, {})
        told = line["secure_aggregation"]
        assert told["sites"] == 3
        assert told["weight"] > 0
        assert told["loss"] > 0
    assert not list((three.run / "received").glob("*"))
    hello = [entry for entry in hash_chain.read(three.server.audit_path) if entry.get("kind") == "share"]
    asked = [entry for entry in hello if entry["event"] == "sent" and entry["peer"] == "east"]
    assert len(asked) <= 4, "one session a round, and one more at most after the kill"


def updates(three: Three) -> dict[str, state.SiteUpdate]:
    """The last plain update of each site, which it keeps for itself."""
    found = {}
    for site in SITES:
        content = reply_cache.Sent(three.sites[site].sent).last(three.locked.hash)
        assert content is not None
        found[site] = protocol.decode_update(content)
    return found


def forms(three: Three, update: state.SiteUpdate) -> list[bytes]:
    """What of an update may lie somewhere: as it is, its change, in float64, in fixed point before it is masked."""
    start = checkpoint.read(three.run / "checkpoints" / "round-00002.safetensors")[0]
    names = sorted(update.state)
    loss, examples = update.metrics["loss"], update.num_examples
    whole = fixed_point.of(three.locked.recipe).encode(update.state, start, names, examples, loss)
    found = [whole[-fixed_point.TAIL - NUMBERS :].astype("<u8").tobytes()]
    # What moved everywhere: zeros, or what did not train, lie in every memory.
    pairs = [(update.state[name].reshape(-1)[:NUMBERS], start[name].reshape(-1)[:NUMBERS]) for name in names]
    trained = [(now, before) for now, before in pairs if len(now) == NUMBERS and (now != before).all()]
    assert trained
    for now, before in trained[:2]:
        found += [numbers.astype(form).tobytes() for numbers in (now, now - before) for form in ("<f4", "<f8")]
    return found


def everything(three: Three, supervisor: int) -> tuple[list[bytes], list[bytes]]:
    """A copy of the server's whole state on disk, and of the memory of each of its processes."""
    folder, files = three.server.folder, []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # it went meanwhile
            files += [path.read_bytes()] if path.is_file() else []
    running = (processes.running(path) for path in (folder / "run").rglob("*.pid"))
    pids = {supervisor, *(pid for pid in running if pid is not None)}
    return files, [place for pid in pids for place in _memory(pid)]


def check_nothing_plain(three: Three, files: list[bytes], memory: list[bytes]) -> None:
    """A byte search over both."""
    # What is there is found: the global adapter on disk, and in memory while its round is at work.
    adapter = checkpoint.read(three.run / "checkpoints" / "round-00002.safetensors")[0]
    name = max(adapter, key=lambda name: adapter[name].size)
    here = adapter[name].reshape(-1)[:NUMBERS].astype("<f4").tobytes()
    wanted = {data: site for site, update in updates(three).items() for data in forms(three, update)}
    assert any(here in data for data in files)
    assert (three.run / "evaluation.json").exists() or any(here in place for place in memory)
    for place in (*files, *memory):
        shown = [site for data, site in wanted.items() if data in place]
        assert not shown, f"an update of {shown} lies at the server"


def _memory(pid: int) -> Iterator[bytes]:
    """All memory that a process of this user writes to, part by part; nothing of one that ended meanwhile."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        places = [match for line in lines if (match := re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)) is not None]
        with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
            for place in places:
                start, stop = int(place[1], 16), int(place[2], 16)
                with contextlib.suppress(OSError, OverflowError, ValueError):
                    memory.seek(start)
                    yield memory.read(stop - start)
