"""The shared folder of batch jobs, what a scheduler is asked, the scripts of a compute node; nothing trains here."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.client import doctor, site_file
from fedvfm.client.batch import job, jobs, scheduler, scripts, spool
from fedvfm.client.training import site as sites
from fedvfm.config import batch, schema
from fedvfm.data import sample as samples
from fedvfm.data.partition import virtual_hospitals
from fedvfm.data.sources import table
from fedvfm.protocol import protocol
from tests.client import private_site
from tests.support import cluster

DATA = {"source": "folder", "path": "/data/of the study"}


def site(root: Path, **more: Any) -> schema.SiteConfig:
    values = {"name": "north", "data": DATA, "batch": {"spool": str(root / "spool")}} | more
    return schema.parse(schema.SiteConfig, values, "site.toml")


def a_job(**more: Any) -> spool.Job:
    values = {"kind": "train", "message": "ab" * 32, "name": "north", "data": schema.SourceConfig(**DATA)}
    return spool.Job(**(values | {"splits": {"train": ("1", "2")}, "listing": "cd" * 32, "seconds": 60.0} | more))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"spool": "spool"}, "absolute path"),
        ({"submit": ["sbatch", "x"]}, "submit: no argument holds {folder}"),
        ({"query": ["{job}"]}, "query: no argument holds {job}"),
        ({"submit": "sbatch {folder}"}, "batch.submit"),
        ({"attempts": 0}, "batch.attempts"),
    ],
)
def test_a_batch_table_with_a_fault_is_told_as_that(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.ConfigError, match=said.replace("{", r"\{")):
        site(tmp_path, batch={"spool": "/s"} | values)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('[data.options]\npatients = "hash"\n', "no key reaches a compute node"),
        ('[policy.final]\naccept = "score"\nmax_drop = 0.1\n', "max_drop"),
    ],
)
def test_what_would_need_a_key_or_computing_beside_the_client_is_refused(tmp_path: Path, more: str, said: str) -> None:
    path = tmp_path / "site.toml"
    path.write_text(f'name = "north"\n[batch]\nspool = "/spool"\n[data]\nsource = "folder"\npath = "/data"\n{more}')
    with pytest.raises(errors.ConfigError, match=said):
        site_file.read_site(path)


def test_a_job_is_named_by_what_it_computes(tmp_path: Path) -> None:
    name = a_job().name_of_folder
    assert a_job(seconds=7.0).name_of_folder == name
    others = [a_job(kind="evaluate"), a_job(listing="ee" * 32), a_job(splits={"train": ("2", "1")}), a_job(rank=2)]
    assert len({name, *(each.name_of_folder for each in others)}) == 5
    folder = spool.make(tmp_path, a_job(), b"message")
    assert spool.read(folder, spool.JOB, spool.Job, spool.MAX_JOB) == a_job()
    assert set(json.loads((folder / spool.JOB).read_text())).isdisjoint(
        {"policy", "privacy", "recipe", "batch", "split"}
    )


def test_what_another_user_could_have_written_is_not_read(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"12345")
    path.chmod(0o600)
    assert spool.read_bytes(path, 5) == b"12345"
    assert spool.read_bytes(tmp_path / "none", 5) is None
    link.symlink_to(path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for place, most, said in (
        (path, 4, "more than 4 bytes"),
        (link, 5, "cannot be read"),
        (tmp_path / "pipe", 5, "no plain file"),
        (tmp_path, 5, "no plain file"),
    ):
        with pytest.raises(errors.JobError, match=said):
            spool.read_bytes(place, most)
    path.chmod(0o644)
    with pytest.raises(errors.JobError, match="no plain file of this user alone"):
        spool.read_bytes(path, 5)


def test_a_spool_of_others_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "own"
    spool.require_private(own)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (own, own / "logs")] == [0o700, 0o700]
    own.chmod(0o750)
    with pytest.raises(errors.StorageError, match="chmod 700"):
        spool.require_private(own)
    handle = spool.only(tmp_path)
    with pytest.raises(errors.OutputInUse, match="another client gives jobs through it"):
        spool.only(tmp_path)
    os.close(handle)


def test_a_listing_says_which_samples_are_for_what_and_whose() -> None:
    first, second = samples.Sample("1", patient="a"), samples.Sample("2", patient="b")
    one = spool.listing({"train": [first, second]})
    assert one == spool.listing({"train": [first, second], "val": []})
    for other in (
        {"train": [second, first]},
        {"train": [first], "val": [second]},
        {"train": [first, samples.Sample("2", patient="a")]},
        {"train": [first, samples.Sample("2", label=1, patient="b")]},
        {"train": [first, samples.Sample("2", patient="b", labelled=(0, 1))]},
    ):
        assert spool.listing(other) != one


# -- what a job answers ------------------------------------------------------------------------------------------------


def answered(folder: Path, records: bytes = b"records", word: str = "") -> spool.Result:
    spool.finish(folder, records, word)
    found = spool.read(folder, spool.RESULT, spool.Result)
    assert found is not None
    return found


def test_an_answer_is_taken_only_whole(tmp_path: Path) -> None:
    folder = spool.make(tmp_path, a_job(), b"message")
    result = answered(folder)
    path = folder / f"{spool.RECORDS}{hashlib.sha256(b'records').hexdigest()}"
    assert path.read_bytes() == b"records"
    with pytest.raises(errors.JobError, match="no records"):
        jobs._answer(folder, result, 100)
    path.write_bytes(b"recordt")
    with pytest.raises(errors.JobError, match=r"not the one that result\.json names"):
        jobs._answer(folder, result, 100)
    path.write_bytes(b"r" * 101)
    with pytest.raises(errors.JobError, match="more than 100 bytes"):
        jobs._answer(folder, result, 100)


@pytest.mark.parametrize("word", ["training", "of-another-release"])
def test_a_refusal_of_a_job_keeps_its_word(tmp_path: Path, word: str) -> None:
    folder = spool.make(tmp_path, a_job(), b"message")
    with pytest.raises(errors.JobError, match=f"answered '{word}'") as caught:
        jobs._answer(folder, answered(folder, b"", word), 100)
    assert caught.value.reason == ("training" if word == "training" else "batch")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"form": 2}', '{"form": 1, "job": "x", "word": "a b"}', "1" * 5000, "[" * 4000]
)
def test_a_result_of_another_form_is_told_as_that(tmp_path: Path, text: str) -> None:
    path = tmp_path / spool.RESULT
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(errors.JobError, match=r"not of its form|more than"):
        spool.read(tmp_path, spool.RESULT, spool.Result)


def settings(tmp_path: Path, **more: Any) -> batch.BatchConfig:
    import tomllib

    found = schema.parse(batch.BatchConfig, tomllib.loads(cluster.settings(tmp_path, **more))["batch"], "batch")
    spool.require_private(Path(found.spool))
    return found


def waiting(tmp_path: Path, seconds: float = 60.0, **more: Any) -> Callable[[], spool.Result]:
    own = settings(tmp_path, **more)
    return jobs._Wait(own, spool.make(Path(own.spool), a_job(), b"m"), seconds, 0.0).result


def test_a_job_that_does_not_begin_is_given_up(tmp_path: Path) -> None:
    wait = waiting(tmp_path, queue_minutes=1)
    (folder,) = spool.folders(tmp_path / "spool")
    spool.write(folder, spool.SUBMITTED, spool.Submitted(id="wait", attempt=1, time=time.time() - 61.0))
    with pytest.raises(errors.JobError, match="did not begin in 1 minutes"):
        wait()
    assert (cluster.log(tmp_path), spool.folders(tmp_path / "spool")) == (["cancel"], [])


def test_a_job_that_was_being_cancelled_when_the_client_was_killed_is_asked_anew(tmp_path: Path) -> None:
    own = settings(tmp_path)
    folder = spool.make(Path(own.spool), a_job(), b"m")
    jobs.clear(Path(own.spool), own, but=folder.name)
    assert spool.folders(Path(own.spool)) == [folder]
    (folder / spool.CANCEL).touch()
    jobs.clear(Path(own.spool), own, but=folder.name)
    assert spool.folders(Path(own.spool)) == []


def test_a_greeting_waits_for_its_job_no_longer_than_the_policy_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waited(Exception):
        pass

    def ask(self: jobs.Jobs, kind: str, where: sites.Site, task: protocol.Task, seconds: float) -> Any:
        raise Waited(seconds)

    monkeypatch.setattr(jobs.Jobs, "_ask", ask)
    source: Any = None
    own = sites.Site("north", virtual_hospitals.Hospital("north", source, (), (), ()))
    own.ends = time.monotonic() + 1000.0, "policy-hours"
    with pytest.raises(Waited) as caught:
        jobs.Jobs(lambda: site(tmp_path)).hello(own, protocol.Task(private_site.make_recipe(privacy=None)))
    assert 0.0 < caught.value.args[0] <= 1000.0


def test_the_result_of_another_job_is_refused(tmp_path: Path) -> None:
    wait = waiting(tmp_path)
    (folder,) = spool.folders(tmp_path / "spool")
    spool.write(folder, spool.RESULT, spool.Result(job="0" * 32))
    with pytest.raises(errors.JobError, match="of another job"):
        wait()


# -- the scheduler -----------------------------------------------------------------------------------------------------


def test_commands_get_a_bare_environment_and_no_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDVFM_SECRET", "x")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:password@proxy:1")
    (tmp_path / "plan").write_text("lost")
    asked = scheduler.Scheduler(settings(tmp_path))
    assert asked.submit(tmp_path / "$(touch x); a b") == "lost"
    seen = set((tmp_path / "seen-by-submit").read_text().split())
    assert seen <= {*scheduler.PASSED, "LC_CTYPE"}
    assert asked.over("lost") is True
    assert asked.over("wait") is False


@pytest.mark.parametrize(
    ("said", "name"),
    [("123", "123"), ("123;alpine", "123"), ("Submitted batch job 7_[1-2]", "7_[1-2]"), ("", ""), ("a/b", "")],
)
def test_the_name_of_a_job_is_what_is_printed_last(tmp_path: Path, said: str, name: str) -> None:
    command = [sys.executable, "-S", "-c", f"print({said!r}) #{{folder}}"]
    asked = scheduler.Scheduler(settings(tmp_path, submit=command))
    if name:
        assert asked.submit(tmp_path) == name
    else:
        with pytest.raises(errors.JobError, match="gave no job"):
            asked.submit(tmp_path)


def test_a_scheduler_that_does_not_answer_ends_no_job(tmp_path: Path) -> None:
    gone = scheduler.Scheduler(settings(tmp_path, query=["/no/such/program", "{job}"]))
    assert gone.over("1") is None
    failing = scheduler.Scheduler(settings(tmp_path, query=[sys.executable, "-S", "-c", "raise SystemExit(1) #{job}"]))
    assert failing.over("1") is None


def test_a_job_that_slurm_forgot_is_over(tmp_path: Path) -> None:
    words = "raise SystemExit('slurm_load_jobs error: Invalid job id specified') #{job}"
    forgotten = scheduler.Scheduler(settings(tmp_path, query=[sys.executable, "-S", "-c", words]))
    assert forgotten.over("1") is True


# -- the compute node --------------------------------------------------------------------------------------------------


def test_a_folder_without_a_job_of_its_name_computes_nothing(tmp_path: Path) -> None:
    with pytest.raises(errors.JobError, match="holds no job"):
        job.main(tmp_path)
    folder = spool.make(tmp_path, a_job(), b"message")
    other = folder.rename(tmp_path / ("0" * 32))
    with pytest.raises(errors.JobError, match="holds no job of this name"):
        job.main(other)


def test_a_job_whose_message_was_changed_computes_nothing(tmp_path: Path) -> None:
    asked = a_job(message=hashlib.sha256(b"message").hexdigest())
    folder = spool.make(tmp_path, asked, b"other")
    with pytest.raises(errors.JobError, match="not the message of this job"):
        spool.task(folder, asked)
    (folder / spool.MESSAGE).write_bytes(b"message")
    with pytest.raises(errors.JobError, match="no records"):
        spool.task(folder, asked)


def test_a_job_that_is_cancelled_writes_nothing_more(tmp_path: Path) -> None:
    folder = spool.make(tmp_path, a_job(), b"message")
    job._require_wanted(folder)
    (folder / spool.CANCEL).touch()
    with pytest.raises(errors.Interrupted):
        job._require_wanted(folder)


def test_the_images_of_the_node_must_be_those_of_the_client(tmp_path: Path) -> None:
    private_site.write_images(tmp_path / "data", 0, 4)
    source = schema.SourceConfig(source="folder", path=str(tmp_path / "data"))
    task = protocol.Task(private_site.make_recipe(privacy=None))
    every = table.make(source).samples()
    names, listed = tuple(each.id for each in every[:2]), spool.listing({"train": every[:2]})
    found = job._site(a_job(data=source, splits={"train": names}, listing=listed, least_steps=7), task, "cpu")
    assert found.split("train") == tuple(every[:2])
    assert found.least_steps == 7
    with pytest.raises(errors.DataError, match="mount the data under the same path"):
        job._site(a_job(data=source, splits={"train": (names[0], "0009")}, listing=listed), task, "cpu")


@pytest.mark.parametrize("image", [None, Path("/images/fedvfm.sif")])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batch_scripts_are_shell_and_name_what_a_node_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Path | None, device: str
) -> None:
    monkeypatch.setenv("FEDVFM_CACHE", "/weights of all")
    text = scripts.slurm(site(tmp_path, device=device), image, require_no_network=True)
    assert subprocess.run(["bash", "-n"], input=text.encode(), check=False).returncode == 0
    assert "@" not in text.replace('"${alone[@]}"', "")
    options = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert ("#SBATCH --gpus=1" in options) == (device == "cuda")
    assert {"#SBATCH --export=NONE", "#SBATCH --requeue", f"#SBATCH --output={tmp_path}/spool/logs/slurm-%j.log"} <= {
        *options
    }
    assert "'/weights of all'" in text
    if image is None:
        assert "network=required" in text
        return
    assert ("--nv" in text) == (device == "cuda")
    for word in (
        "--containall",
        "--cleanenv",
        "--net --network none",
        "--bind '/data/of the study':'/data/of the study':ro",
    ):
        assert word in text


def test_scripts_hold_no_path_that_they_cannot_name(tmp_path: Path) -> None:
    for bad in ("/a b", "/a%j", "/a\nb"):
        with pytest.raises(errors.ConfigError, match=r"batch\.spool"):
            scripts.slurm(site(tmp_path, batch={"spool": bad}))
    with pytest.raises(errors.ConfigError, match="cannot be bound"):
        scripts.slurm(site(tmp_path, data={"source": "folder", "path": "/a:b"}), Path("/image.sif"))
    with pytest.raises(errors.ConfigError, match="is not given"):
        scripts.slurm(site(tmp_path, batch=None))
    assert "fedvfm-0.1.0-py3-none-any.whl" in scripts.definition()


def test_doctor_looks_at_folder_and_commands(tmp_path: Path) -> None:
    (row,) = doctor._batch(settings(tmp_path))
    assert (row.check, row.severity) == ("batch", "ok")
    (row,) = doctor._batch(settings(tmp_path, cancel=["/no/scancel", "{job}"]))
    assert row.severity == "blocker"
    assert "batch.cancel = /no/scancel" in row.problem
