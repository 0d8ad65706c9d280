"""A hospital whose training runs in batch jobs without a network: the same bytes as here, whatever is killed."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.client import app as client_app
from fedvfm.client import site_file
from fedvfm.client.adoption import adoption
from fedvfm.client.batch import jobs, scripts, spool
from fedvfm.client.gate import enforcement, gate, policy, reply_cache
from fedvfm.client.process import supervisor
from fedvfm.model import locking
from fedvfm.protocol import protocol
from fedvfm.trust import locked_recipe, recipes
from tests.client import private_site
from tests.deployment import test_site_verbs, two_hospitals
from tests.support import cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not cluster.permitted(), reason="this machine lets no user make a network namespace"),
]


@pytest.fixture(scope="module")
def locked(tiny: Any) -> locked_recipe.LockedRecipe:
    recipe = recipes.written(tiny.experiment)
    return locking.make(recipe.model_copy(update={"precision": "float32", "threads": 1}))


class Site(test_site_verbs.Hospital):
    """A hospital whose file has [batch]."""

    late_s = 1.0

    @property
    def root(self) -> Path:
        return self.folder / "cluster"

    def with_cluster(self, **more: object) -> Site:
        self.settings.write_text(self.settings.read_text() + cluster.settings(self.root, **more))
        return self

    def plan(self, *words: str) -> None:
        (self.root / "plan").write_text("\n".join(words))

    def open(self) -> None:
        mine = enforcement.SiteTerms(self.where, self.settings, "cpu")
        self.faults: list[Exception] = []
        app = client_app.make_client_app(
            mine.site,
            client_app.Models(),
            lambda at, error: self.faults.append(error),
            adoption.Finals(self.where, lambda: mine.config.policy),
            elsewhere=jobs.Jobs(lambda: mine.judged, self.late_s) if mine.config.batch else None,
        )
        report = lambda at, error: self.faults.append(error)  # noqa: E731
        self.door = gate.Gate(app, reply_cache.Sent(self.where.sent), mine, report)

    @property
    def spooled(self) -> list[Path]:
        return spool.folders(self.root / "spool")


def slurm_runs() -> bool:
    """Whether a Slurm takes jobs of this machine."""
    return (
        shutil.which("sbatch") is not None
        and subprocess.run(["sinfo"], capture_output=True, check=False).returncode == 0
    )


def site(tiny: Any, locked: locked_recipe.LockedRecipe, folder: Path) -> Site:
    folder.mkdir()
    made = test_site_verbs.joined(tiny, locked, folder)
    return Site(made.folder, made.tiny, made.lock, made.where)


def fingerprint(reply: Any) -> str:
    assert not reply.has_error(), protocol.error_word(reply)
    return protocol.decode_update(reply.content).state.fingerprint


def val(given: Site) -> protocol.Task:
    return protocol.Task(given.lock.recipe, 1, given.initial, "val")


def test_jobs_without_a_network_answer_with_the_same_bytes(
    tiny: Any, locked: locked_recipe.LockedRecipe, tmp_path: Path
) -> None:
    here, there = site(tiny, locked, tmp_path / "here"), site(tiny, locked, tmp_path / "there").with_cluster()
    greeting = protocol.Task(locked.recipe)
    hello = [protocol.decode_hello(each.ask(protocol.HANDSHAKE, greeting).content) for each in (here, there)]
    assert hello[0] == hello[1]
    assert fingerprint(here.train()) == fingerprint(there.train())
    (folder,) = there.spooled
    kept = [*folder.iterdir(), *(there.root / "spool" / "logs").iterdir()]
    assert {spool.JOB, spool.MESSAGE, spool.RESULT, spool.SUBMITTED} <= {path.name for path in kept}
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)} == {0o700}
    secrets = [there.where.key.read_bytes().splitlines()[1], b"max_rounds", b"policy", b"approv", b"PRIVATE KEY"]
    assert [each for each in secrets for path in kept if each in path.read_bytes()] == []
    words = set((there.root / "environment").read_text().split())
    assert words <= {
        "PATH",
        "PYTHON",
        "ROOT",
        "FOLDER",
        "PYTHONPATH",
        "FEDVFM_CACHE",
        "OMP_NUM_THREADS",
        "PWD",
        "_",
        "SHLVL",
    }
    assert (there.root / "interfaces").read_text().split() == ["lo"]
    assert "unreachable" in (there.root / "connect").read_text()
    assert set((there.root / "seen-by-submit").read_text().split()) <= {
        *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_CTYPE")
    }
    scores = [protocol.decode_evaluation(each.ask(protocol.EVALUATE, val(each)).content) for each in (here, there)]
    assert scores[0] == scores[1]
    assert scores[0].metrics
    assert [each.finish(each.initial) for each in (here, there)] == ["pending", "pending"]
    assert [path.name for path in there.spooled] != [folder.name], "of one job at a time something lies there"


@pytest.mark.parametrize("point", ["computed", "records-written"])
def test_a_job_that_is_killed_is_given_again(
    tiny: Any, locked: locked_recipe.LockedRecipe, tmp_path: Path, point: str
) -> None:
    here, there = site(tiny, locked, tmp_path / "here"), site(tiny, locked, tmp_path / "there").with_cluster()
    there.plan(f"kill={point}", "lost", "run")
    assert fingerprint(here.train()) == fingerprint(there.train())
    assert cluster.log(there.root).count("submit") == 3


def test_jobs_that_end_without_an_answer_are_a_word(
    tiny: Any, locked: locked_recipe.LockedRecipe, tmp_path: Path
) -> None:
    there = site(tiny, locked, tmp_path / "there").with_cluster(attempts=2)
    there.plan("lost", "lost", "refuse")
    assert protocol.error_word(there.train()) == "batch"
    assert "2 jobs ended without an answer" in str(there.faults[-1])
    assert there.spooled == []
    assert protocol.error_word(there.train()) == "batch"
    assert "Invalid partition" in str(there.faults[-1])
    assert len(fingerprint(there.train())) == 64, "the site takes part in the next round"


def test_a_job_that_never_begins_is_cancelled_when_the_round_is_over(
    tiny: Any, locked: locked_recipe.LockedRecipe, tmp_path: Path
) -> None:
    there = site(tiny, locked, tmp_path / "there").with_cluster()
    there.plan("wait")
    task = protocol.Task(locked.recipe, 1, there.initial)
    assert protocol.error_word(there.ask(protocol.TRAIN, task, ttl=8.0)) == "deadline"
    assert "no job began" in str(there.faults[-1])
    assert cluster.log(there.root)[-1] == "cancel"
    assert there.spooled == []


def killed(given: Site, point: str) -> None:
    pid = private_site.child(lambda: given.train(), FEDVFM_FAULT_POINT=point)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status)


@pytest.mark.parametrize(("point", "most"), [("job-written", 1), ("job-submitted", 2), ("job-noted", 1)])
def test_a_client_that_is_killed_finds_its_job_again(
    tiny: Any, locked: locked_recipe.LockedRecipe, tmp_path: Path, point: str, most: int
) -> None:
    here, there = site(tiny, locked, tmp_path / "here"), site(tiny, locked, tmp_path / "there").with_cluster()
    killed(there, point)
    (folder,) = there.spooled
    assert fingerprint(here.train()) == fingerprint(there.train())
    assert there.spooled == [folder]
    assert cluster.log(there.root).count("submit") <= most


def test_a_client_that_is_told_to_end_cancels_its_job(
    tiny: Any, locked: locked_recipe.LockedRecipe, tmp_path: Path, until: Callable[..., bool]
) -> None:
    there = site(tiny, locked, tmp_path / "there").with_cluster()
    there.plan("wait")
    pid = private_site.child(lambda: there.train())
    assert until(lambda: any((each / spool.SUBMITTED).exists() for each in there.spooled), 600)
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1, "raised Interrupted"
    assert cluster.log(there.root)[-1] == "cancel"
    assert there.spooled == []


def test_what_was_left_at_the_scheduler_is_cancelled_when_the_client_stops(
    tiny: Any, locked: locked_recipe.LockedRecipe, tmp_path: Path
) -> None:
    there = site(tiny, locked, tmp_path / "there").with_cluster()
    there.plan("wait")
    killed(there, "job-noted")
    there.open()
    mine = enforcement.SiteTerms(there.where, there.settings, "cpu").config
    assert mine.batch is not None
    supervisor._end_jobs(mine.batch)
    assert (cluster.log(there.root)[-1], there.spooled) == ("cancel", [])


def test_a_node_that_sees_other_images_computes_nothing(
    tiny: Any, locked: locked_recipe.LockedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = site(tiny, locked, tmp_path / "there").with_cluster()
    true = spool.listing
    monkeypatch.setattr(spool, "listing", lambda splits: true({"test": splits["test"]}))
    assert protocol.error_word(there.train()) == "data"
    assert isinstance(there.faults[-1], errors.JobError)


def test_a_rehearsal_is_computed_by_jobs_too(
    tiny: Any, locked: locked_recipe.LockedRecipe, tmp_path: Path, cli: Any
) -> None:
    there = site(tiny, locked, tmp_path / "there").with_cluster()
    done = cli("client", "rehearse", there.settings, "--state", there.state)
    assert done.code == 0, done.err
    assert "update, every round" in done.out
    assert cluster.log(there.root).count("submit") >= 3


@pytest.mark.skipif(not slurm_runs(), reason="no Slurm takes jobs of this machine")
@pytest.mark.parametrize(
    "meanwhile", [(), ("scontrol", "requeue"), ("scancel",)], ids=["left alone", "requeue", "scancel"]
)
def test_slurm_itself_runs_the_script_of_the_package(
    tiny: Any,
    locked: locked_recipe.LockedRecipe,
    tmp_path: Path,
    until: Callable[..., bool],
    monkeypatch: pytest.MonkeyPatch,
    meanwhile: tuple[str, ...],
) -> None:
    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path / "cache"))
    here, there = site(tiny, locked, tmp_path / "here"), site(tiny, locked, tmp_path / "there")
    script = there.folder / "fedvfm.sbatch"
    own = {"submit": ["sbatch", "--parsable", str(script), "{folder}"], "cancel": ["scancel", "{job}"]}
    there.with_cluster(**own, query=["squeue", "--noheader", "--format=%T", "--jobs={job}"])
    text = scripts.slurm(site_file.read_site(there.settings), require_no_network=True)
    script.write_text(text.replace("cpus-per-task=4", "cpus-per-task=1").replace("--mem=32G", "--mem=0"))

    def disturb() -> None:
        if until(lambda: [path for each in there.spooled if (path := each / spool.ALIVE).exists()], 600):
            note = spool.read(there.spooled[0], spool.SUBMITTED, spool.Submitted)
            assert note is not None
            subprocess.run([*meanwhile, note.id], check=True)

    thread = threading.Thread(target=disturb)
    thread.start() if meanwhile else None
    assert fingerprint(here.train()) == fingerprint(there.train())
    thread.join() if meanwhile else None


@pytest.mark.usefixtures("nothing_left")
def test_a_federation_of_real_processes_in_which_a_hospital_computes_by_jobs(
    tiny: Any, tmp_path: Path, until: Callable[..., bool]
) -> None:
    with two_hospitals.enrolled(tiny, tmp_path, tiny.recipe) as two:
        allowed = policy.accepting(policy.Facts.of(two.locked)).replace("units = 10", "units = 1")
        root = tmp_path / "cluster"
        for name in two.names:
            batch = cluster.settings(root) if name == "east" else ""
            two.settings(name).write_text(tiny.site(name) + allowed + batch)
        two.start_clients()
        server = two.start_server()
        assert until(lambda: server.poll() is not None, 900), two.said()
        assert server.returncode == 0, two.said()
        journal = two.journal()
        assert [line["round"] for line in journal] == [1, 2, 3]
        assert all(line["cohort"] == list(two.names) and not line["refused"] for line in journal)
        trained = [row["round"] for row in two.sites["east"].audit.entries if row["event"] == "trained"]
        assert trained == [1, 2, 3]
        assert cluster.log(root).count("submit") >= 1 + len(journal)
        tiny.run("client", "stop", "--state", two.folder / "east")
        assert spool.folders(root / "spool") == []
