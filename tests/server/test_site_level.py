"""Site-level privacy at the server: one site's influence, noise, the clip that adapts, epsilon, and one draw only."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.privacy import accountant, base, events, randomness, site_level, table
from fedvfm.server.rounds import aggregation, dp_aggregation, federation
from fedvfm.simulation.engines import in_process
from fedvfm.state import checkpoint, factors, state
from fedvfm.storage import hash_chain
from tests.privacy import gaussian
from tests.server import numpy_sites as sites

CLIP = 0.5
PRIVACY: dict[str, Any] = {"mechanism": "site-level", "clip": CLIP, "noise_multiplier": 1.2, "delta": 1e-5}
ADAPTIVE = PRIVACY | {"adaptive_quantile": 0.5}
UNIFORM = {"aggregation": {"weighting": "uniform"}}


class Harness:
    """Federations of sites that answer with arithmetic."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, int]] = []
        self.notes: list[str] = []

    def members(self, names: tuple[str, ...] = ("east", "north", "west"), **more: Any) -> list[Any]:
        return [sites.NumpySite(name, **more) for name in names]

    def job(self, members: list[Any], folder: str, **more: Any) -> federation.Job:
        recipe = sites.make_recipe(**{"privacy": PRIVACY, **UNIFORM, **more.pop("recipe", {})})
        found: federation.Job = sites.make_job(self.folder / folder, members, recipe, **more)
        return found

    def run(self, members: list[Any] | None = None, folder: str = "run", stop: Any = None, **more: Any) -> Path:
        """Run or resume; ``stop`` says of an event whether the process ends there."""
        members = members or self.members()
        job = self.job(members, folder, **more)
        grid = in_process.InProcessGrid(sites.client_app(members), len(members))

        def note(event: str, fields: Mapping[str, Any]) -> None:
            self.notes += [fields["text"]] if event == "note" else []

        found: Path = sites.run(job, members, stop=stop, note=note, grid=grid)
        self.asked = [one for member in members for one in member.asked]
        return found


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


def journal(folder: Path) -> list[dict[str, Any]]:
    return hash_chain.read(folder / "journal.jsonl")


def final(folder: Path) -> state.AdapterState:
    return checkpoint.read(folder / "adapter.safetensors")[0]


def recipe(**privacy: Any) -> schema.Recipe:
    found: schema.Recipe = sites.make_recipe(privacy=PRIVACY | privacy, **UNIFORM)
    return found


# -- one site's influence ----------------------------------------------------------------------------------------------

numbers = st.floats(-(2.0**100), 2.0**100, width=32)
changes = st.dictionaries(st.sampled_from("abcd"), st.lists(numbers, min_size=1, max_size=6), min_size=1).map(
    lambda arrays: {name: np.array(values, np.float64) for name, values in arrays.items()}
)


def joined(
    part: dp_aggregation.Private,
    number: int,
    start: state.AdapterState,
    updates: Mapping[str, state.SiteUpdate],
    kept: Mapping[str, state.Array],
    record: Mapping[str, Any],
) -> aggregation.Joined:
    """One round of these updates, as the round loop takes them."""
    intake = part.intake(number, start, len(record["cohort"]), kept, [])
    for update in updates.values():
        intake.take(update)
    return intake.finish(record)


@given(changes, st.floats(1e-6, 1e6), st.booleans())
def test_no_change_is_longer_than_the_clip(change: base.Change, clip: float, adaptive: bool) -> None:
    memory: Mapping[str, Any] = {"clip": clip, **({"within": 0.0} if adaptive else {})}
    clipped, after = site_level.Server().on_aggregate(change, memory)
    length = math.sqrt(math.fsum(float(value) ** 2 for array in clipped.values() for value in array))
    assert length <= clip * (1 + 1e-15)
    if site_level.norm(change) <= clip:
        assert all((clipped[name] == change[name]).all() for name in change)
    else:
        assert length == pytest.approx(clip, rel=1e-9)
    assert abs(after.get("within", 0.5)) == 0.5


@given(
    st.lists(st.floats(-60.0, 60.0), min_size=1, max_size=4),
    st.sampled_from(["both", "freeze-A", "alternate"]),
    st.integers(1, 2),
    st.sampled_from([PRIVACY, ADAPTIVE]),
)
@settings(max_examples=40)
def test_one_site_moves_the_sum_by_at_most_the_clip(
    tmp_path_factory: pytest.TempPathFactory, scales: list[float], way: str, number: int, privacy: Any
) -> None:
    """All sites or all but one, the same noise: what is left of the difference is that site's."""
    chosen = sites.make_recipe(privacy=privacy, adapter={"rank": 3, "alpha": 6.0, "factors": way}, **UNIFORM)
    locked = sites.lock(chosen)
    start = locked.adapter
    names = factors.trained(locked.manifest, way, number)
    updates = {}
    for at, scale in enumerate(scales):
        drawn = sites.draw(locked.manifest, at, float(np.float32(scale)))
        moved = {name: start[name] + drawn[name] for name in names}
        updates[f"s{at}"] = state.SiteUpdate(f"s{at}", state.AdapterState({**start, **moved}), 1, number - 1, "")
    record = {"cohort": sorted(updates), "refused": {}}

    def made(who: Mapping[str, state.SiteUpdate]) -> state.AdapterState:
        from fedvfm.aggregators import mean

        folder = tmp_path_factory.mktemp("one")
        part = dp_aggregation.of(locked, mean.Mean(), folder, simulated=True)
        assert part is not None
        return joined(part, number, start, who, {}, record).adapter

    whole, without = made(updates), made({name: one for name, one in updates.items() if name != "s0"})
    told = (whole - without) * float(len(scales))
    assert told.norm() <= CLIP * (1 + 1e-4)
    idle = set(start) - set(names)
    assert all((whole[name] == start[name]).all() for name in idle), "what did not train gets neither mean nor noise"
    assert all((whole[name] != start[name]).all() for name in names), "every number that trained has its own noise"


def test_any_rule_that_is_a_sum_gets_the_private_mean_and_its_own_state(tmp_path: Path) -> None:
    from fedvfm.aggregators import exact_sum, mean

    class Half(mean.Mean):
        """Goes half way, and keeps how much weight it saw."""

        def init(self, manifest: state.Manifest, kept: Mapping[str, state.Array] | None = None) -> exact_sum.ExactSum:
            assert kept is not None
            assert kept["seen"] == 7
            return super().init(manifest, kept)

        def finish(self, acc: exact_sum.ExactSum) -> tuple[state.AdapterState, dict[str, state.Array]]:
            return super().finish(acc)[0] * 0.5, {"seen": np.float32([float(acc.weight)])}

    locked = sites.lock(recipe())
    update = state.SiteUpdate("a", sites.draw(locked.manifest, 5), 1, 0, "")
    record = {"cohort": ["a", "b", "c"], "refused": {}}
    made = []
    for rule in (Half(), mean.Mean()):
        part = dp_aggregation.of(locked, rule, tmp_path / type(rule).__name__, simulated=True)
        assert part is not None
        made.append(joined(part, 1, locked.adapter, {"a": update}, {"seen": np.float32([7])}, record))
    assert made[0].adapter == made[1].adapter * 0.5
    assert made[0].kept["seen"] == 3, "weight of all that were asked"


def test_the_denominator_is_who_was_asked_and_not_who_answered(harness: Harness) -> None:
    def fail(kind: str, number: int, reply: Any) -> Any:
        if kind == "train":
            raise errors.DataError("no")
        return reply

    lost = harness.members(("east", "north")) + harness.members(("west",), change=fail)
    more: dict[str, Any] = {"recipe": {"rounds": 1}, "simulated": True, "server": schema.ServerConfig(quorum=2)}
    two, three = harness.run(lost, "two", **more), harness.run(folder="three", **more)
    told = (final(three) - final(two)) * 3.0
    assert told.norm() == pytest.approx(CLIP, rel=1e-3), "one clipped update of three, whole"
    assert journal(two)[0]["privacy"]["sites"] == journal(three)[0]["privacy"]["sites"] == 3
    assert journal(two)[0]["refused"]["west"]["reason"] == "site-data"


# -- noise -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("privacy", [{}, {"adaptive_quantile": 0.4}])
def test_noise_is_as_much_as_the_journal_says_and_independent(privacy: Any) -> None:
    part, size, asked = site_level.Server(), 40_000, 5
    chosen = recipe(**privacy)
    drawn = []
    for _ in range(2):
        memory = part.configure(chosen, asked, {})
        total = {"a": np.zeros((size // 2,)), "b": np.zeros((2, size // 4))}
        noise, _ = part.finish(total, memory, randomness.System())
        drawn.append(np.concatenate([noise["a"].ravel(), noise["b"].ravel()]))
    spread = memory["sum_noise"] * CLIP / asked
    for one in drawn:
        # 5 standard errors of a standard deviation and of a mean
        assert one.std() == pytest.approx(spread, rel=5 / math.sqrt(2 * size))
        assert abs(one.mean()) < 5 * spread / math.sqrt(size)
        assert stats.kstest(one / spread, "norm").pvalue > 1e-6
        assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 5 / math.sqrt(size)
    assert abs(np.corrcoef(*drawn)[0, 1]) < 5 / math.sqrt(size), "nothing is drawn twice"
    assert memory["sum_noise"] == (1.2 if not privacy else pytest.approx(1.2 / math.sqrt(0.75)))


def test_a_run_s_noise_is_no_one_s_to_repeat_and_a_simulation_s_is(harness: Harness) -> None:
    real = [final(harness.run(folder=name)).fingerprint for name in ("a", "b")]
    seeded = [final(harness.run(folder=name, simulated=True)).fingerprint for name in ("c", "d")]
    assert real[0] != real[1]
    assert seeded[0] == seeded[1]
    assert [line["privacy"]["simulated"] for line in journal(harness.folder / "a")] == [False] * 3
    assert [line["privacy"]["simulated"] for line in journal(harness.folder / "c")] == [True] * 3


# -- epsilon -----------------------------------------------------------------------------------------------------------


def test_the_journal_s_epsilon_is_the_accountant_s_and_bounds_the_exact_one(harness: Harness) -> None:
    lines = journal(harness.run(recipe={"rounds": 6}))
    for number, line in enumerate(lines, 1):
        said = line["privacy"]
        assert said["steps"] == number
        assert said["epsilon"] == accountant.epsilon(accountant.steps(1.0, 1.2, number), 1e-5).value
        exact = gaussian.epsilon(1.2 / math.sqrt(number), 1e-5)
        assert exact <= said["epsilon"] <= 1.15 * exact
        told = f"round {number}: epsilon {said['epsilon']:.3g} (site level, delta 1e-05)"
        assert told in harness.notes, "whoever coordinates is told as it goes"
        assert (said["mechanism"], said["unit"], said["delta"], said["clip"]) == ("site-level", "site", 1e-5, CLIP)


def test_noise_that_is_found_keeps_the_epsilon_over_all_rounds(harness: Harness) -> None:
    privacy = {"mechanism": "site-level", "clip": CLIP, "epsilon": 8.0, "delta": 1e-5}
    line = journal(harness.run(recipe={"rounds": 5, "privacy": privacy}))[-1]
    sigma = line["privacy"]["noise_multiplier"]
    assert line["privacy"]["epsilon"] <= 8.0 < accountant.epsilon(accountant.steps(1.0, sigma - 0.002, 5), 1e-5).value
    event = events.event_of(
        harness.job(harness.members(), "x", recipe={"rounds": 5, "privacy": privacy}).locked.recipe, 3
    )
    assert event == base.PrivacyEvent("site-level", "site", sigma, 1.0, 1, CLIP), "ledgers count as the journal does"


@pytest.mark.parametrize(("sigma", "counted"), [(1.0, 1.0), (4.5, 3.0), (0.7, 10.0)])
def test_sum_and_count_together_spend_what_the_recipe_says(sigma: float, counted: float) -> None:
    """Divergences add: of the sum, with sensitivity 1, and of the count, with sensitivity 1/2."""
    on_sum = site_level.noise_on_sum(sigma, counted)
    for order in (2.0, 8.0, 64.0):
        both = order / (2 * on_sum**2) + order * 0.5**2 / (2 * counted**2)
        assert both == pytest.approx(order / (2 * sigma**2), rel=1e-12)
    with pytest.raises(ValueError, match="spends more"):
        site_level.noise_on_sum(sigma, sigma / 2)


# -- the clip that adapts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begins", [0.01, 100.0])
@pytest.mark.parametrize("quantile", [0.3, 0.8])
def test_an_adaptive_clip_finds_the_quantile(begins: float, quantile: float) -> None:
    lengths = np.random.default_rng(1).lognormal(sigma=0.8, size=200)
    chosen = recipe(clip=begins, adaptive_quantile=quantile, noise_multiplier=2.0)
    part, memory, draws, seen = site_level.Server(), {}, randomness.Seeded(0, "clip"), []
    for _ in range(150):
        memory = part.configure(chosen, len(lengths), memory)
        for length in lengths:
            _, memory = part.on_aggregate({"a": np.array([length])}, memory)
        _, memory = part.finish({"a": np.zeros(1)}, memory, draws)
        assert "within" not in memory, "a count without noise is told to nobody"
        seen.append(memory["next_clip"])
    share = float((lengths <= np.median(seen[-40:])).mean())
    assert share == pytest.approx(quantile, abs=0.06)


def test_an_adaptive_clip_goes_on_where_it_was(harness: Harness) -> None:
    more: dict[str, Any] = {"recipe": {"rounds": 4, "privacy": ADAPTIVE}, "simulated": True}
    whole = harness.run(folder="whole", **more)
    harness.run(stop=sites.after(2), **more)
    again = harness.run(**more)
    clips = [line["privacy"]["clip"] for line in journal(whole)]
    assert len(set(clips)) == 4
    assert clips[1:] == [line["privacy"]["next_clip"] for line in journal(whole)][:-1]
    assert [line["privacy"] for line in journal(again)] == [line["privacy"] for line in journal(whole)]
    assert final(again) == final(whole)


# -- one draw a round --------------------------------------------------------------------------------------------------


def test_a_stop_between_checkpoint_and_journal_draws_nothing_again(harness: Harness) -> None:
    """True entropy: were the round drawn again, it would end elsewhere."""
    momentum = {"recipe": {"aggregation": {"weighting": "uniform", "server_momentum": 0.5}}}

    def validating(event: str, fields: Mapping[str, Any]) -> bool:
        return event == "reply" and fields["phase"] == "val" and fields["round"] == 2

    folder = harness.run(stop=validating, durable=True, **momentum)
    assert [line["round"] for line in journal(folder)] == [1]
    before = checkpoint.read(folder / "checkpoints" / "round-00002.safetensors")[0].fingerprint
    assert not list((folder / "received").glob("*.safetensors")), "what is not private is gone as soon as it can be"
    harness.run(durable=True, **momentum)
    assert journal(folder)[1]["fingerprint"] == before
    assert {number for kind, number in harness.asked if kind == "train"} == {3}
    assert [line["privacy"]["steps"] for line in journal(folder)] == [1, 2, 3]
    kept = sorted(path.name for path in (folder / "private").iterdir())
    assert kept == ["round-00001.drawn", "round-00002.safetensors", "round-00003.safetensors"]


def test_a_draw_from_another_adapter_is_refused(harness: Harness) -> None:
    folder = harness.run(stop=sites.after(2))
    drawn = folder / "private"
    (drawn / "round-00002.safetensors").rename(drawn / "round-00003.safetensors")
    with pytest.raises(errors.CheckpointError, match="noise was drawn for round 3 before, from another adapter"):
        harness.run()
    (drawn / "round-00003.safetensors").write_bytes(b"cut")
    with pytest.raises(errors.CheckpointError, match="cannot be read as a checkpoint"):
        harness.run()
    assert [line["round"] for line in journal(folder)] == [1, 2]


def put_back(folder: Path, safe: Path) -> None:
    """Journal and checkpoints of an older copy; what was drawn since stays."""
    for name in ("journal.jsonl", "checkpoints", "evaluation.json", "adapter.safetensors"):
        one = folder / name
        shutil.rmtree(one) if one.is_dir() else one.unlink()
    shutil.copytree(safe, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("private"))


def test_a_folder_that_was_put_back_draws_no_second_time(harness: Harness, tmp_path: Path) -> None:
    rounds: dict[str, Any] = {"recipe": {"rounds": 4}}

    def copied_after(number: int) -> Path:
        found = harness.run(stop=sites.after(number), **rounds)
        shutil.copytree(found, tmp_path / f"safe-{number}")
        return found

    copied_after(1)
    folder = copied_after(2)
    harness.run(**rounds)
    drawn = final(folder)
    put_back(folder, tmp_path / "safe-2")
    harness.run(**rounds)
    assert final(folder) == drawn, "what is there is taken, and no site is asked to train again"
    assert not [one for one in harness.asked if one[0] == "train"]
    put_back(folder, tmp_path / "safe-1")
    with pytest.raises(errors.CheckpointError, match=r"drawn up to round 4 before, .* for round 2 is gone: .*put back"):
        harness.run(**rounds)
    assert [line["round"] for line in journal(folder)] == [1]


SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy_sites
members = [numpy_sites.NumpySite(name) for name in ("east", "west")]
recipe = numpy_sites.make_recipe(**json.loads(sys.argv[3]))
job = numpy_sites.make_job(Path(sys.argv[2]), members, recipe, durable=True)
numpy_sites.run(job, members)
print(json.dumps({"trained": sorted({n for m in members for kind, n in m.asked if kind == "train"}),
                  "torch": "torch" in sys.modules}))
"""


def test_killed_with_the_draw_on_disk(tmp_path: Path) -> None:
    """SIGKILL before the checkpoint: the draw that is there counts, and the sites are not asked again."""
    values = json.dumps({"privacy": ADAPTIVE, **UNIFORM})
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path / "run"), values]
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0"}
    killed = subprocess.run(
        command, env={**environment, "FEDVFM_FAULT_POINT": "private-kept:2"}, capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    drawn, _, marks = checkpoint.read(tmp_path / "run" / "private" / "round-00002.safetensors")
    assert [line["round"] for line in journal(tmp_path / "run")] == [1]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"trained": [3], "torch": False}
    line = journal(tmp_path / "run")[1]
    assert line["fingerprint"] == drawn.fingerprint
    assert line["privacy"] == json.loads(marks["record"])["privacy"]


# -- what else there is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["freeze-A", "alternate"])
def test_with_one_factor_at_a_time_the_other_stays(harness: Harness, way: str) -> None:
    adapter = {"rank": 3, "alpha": 6.0, "factors": way}
    folder = harness.run(recipe={"rounds": 2, "adapter": adapter})
    first = harness.job(harness.members(), "x", recipe={"adapter": adapter}).locked.adapter
    last = final(folder)
    assert (last["block.00.q.A"] == first["block.00.q.A"]).all() == (way == "freeze-A")
    assert (last["block.00.q.B"] != first["block.00.q.B"]).all()
    after_one, _, _ = checkpoint.read(folder / "checkpoints" / "round-00001.safetensors")
    assert (last["block.00.q.B"] == after_one["block.00.q.B"]).all() == (way == "alternate")


def test_nothing_but_the_update_is_kept_of_what_a_site_sent(harness: Harness) -> None:
    def tell(kind: str, number: int, reply: Any) -> Any:
        if kind == "train":
            large = reply.site == "west"
            moved = reply.state * 1e4 if large else reply.state
            return dataclasses.replace(reply, state=moved, num_examples=7331, metrics={"loss": 0.1357902468})
        return reply

    seen: list[Any] = []

    def watch(event: str, fields: Mapping[str, Any]) -> bool:
        seen.append(fields.get("loss"))
        return False

    server = schema.ServerConfig(quorum=2)
    folder = harness.run(harness.members(change=tell, examples=8000), stop=watch, durable=True, server=server)
    assert set(seen) == {None}
    for line in journal(folder):
        assert line["train"] == {"east": {}, "north": {}}
        assert line["examples"] == {"east": 1, "north": 1}
        assert line["factor_error"] is None
        assert line["refused"]["west"] == {"reason": "norm", "detail": "not told: it is made from images"}
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"0.13579" not in everything
    assert b"7331" not in everything


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"aggregation": {"weighting": "examples"}}, "under 'site-level' no site may weigh more than its clip"),
        ({"aggregation": {"rule": "svd", "weighting": "uniform"}}, "rule 'svd' needs more than a sum of the updates"),
        ({"privacy": PRIVACY | {"microbatch": 4}}, "privacy.microbatch: only a mechanism at the sites reads it"),
        ({"privacy": ADAPTIVE | {"adaptive_noise": 0.5}}, "adaptive_noise = 0.5: .*give more than 0.6"),
        (
            {"privacy": {"mechanism": "site-level", "clip": 1.0, "epsilon": 1e-9, "delta": 1e-9}},
            "no noise reaches it at delta 1e-09 over 3 rounds",
        ),
    ],
)
def test_what_it_cannot_be_is_said_before_anybody_is_asked(
    harness: Harness, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(errors.ConfigError, match=said):
        harness.run(recipe=changes)
    assert not (harness.folder / "run" / "journal.jsonl").exists()


@pytest.mark.parametrize(
    "privacy",
    [
        PRIVACY | {"mechanism": "record-level", "adaptive_quantile": 0.5},
        PRIVACY | {"adaptive_rate": 0.2},
        {"adaptive_noise": 1.0},
    ],
)
def test_an_adaptive_clip_is_site_level_s_alone(privacy: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError, match="only of mechanism 'site-level' and with adaptive_quantile"):
        sites.make_recipe(privacy=privacy)


def test_the_server_must_see_single_updates() -> None:
    assert table.TABLE.get("site-level")().needs_plain_updates
    assert table.TABLE.get("site-level")().site() is None
