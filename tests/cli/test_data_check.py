"""``fedvfm data check``: verdict and exit code, JSON, page and list of files, with a recipe and real training steps."""

from __future__ import annotations

import html.parser
import json
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.client.readiness import offline, resources, step
from fedvfm.data import defect
from fedvfm.data.readiness import catalogue
from fedvfm.model import memory
from fedvfm.report import page

NOT_READY = errors.NOT_READY
SECRET = "Mueller_Hans_19510203"


@pytest.fixture
def hospital(tiny: Any, tmp_path: Path) -> Path:
    """A hospital on a copy of the pictures, its files named after a patient."""
    data = shutil.copytree(tiny.data, tmp_path / "data")
    (data / "index.csv").unlink()
    rows = ["id,patient"]
    for number, path in enumerate(sorted((data / "images").iterdir())):
        for part in ("images", "masks"):
            (data / part / path.name).rename(data / part / f"{SECRET}_{number:02d}.png")
        rows.append(f"{SECRET}_{number:02d},{SECRET}-{number // 2}")
    (data / "patients.csv").write_text("\n".join(rows) + "\n")
    site = tmp_path / "site.toml"
    policy = "[policy]\nmin_train_units = 1\n"
    site.write_text(f'name = "north"\nrecipe = "{tiny.experiment}"\n{policy}[data]\nsource = "folder"\npath = "data"\n')
    return site


def changed(tiny: Any, tmp_path: Path, **values: str) -> Path:
    """The tiny recipe with other lines: ``rank="rank = 3"``."""
    lines = tiny.experiment.read_text().splitlines()
    lines = [values.get(line.partition(" =")[0], line) for line in lines]
    path = tmp_path / "recipe.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def codes(answer: Any) -> dict[str, dict[str, Any]]:
    return {row["code"]: row for row in json.loads(answer.out)["findings"]}


# --- a whole check ----------------------------------------------------------------------------------------------------


def test_what_the_sites_own_policy_will_refuse_is_no_ready_hospital(cli: Any, hospital: Path) -> None:
    hospital.write_text(hospital.read_text().replace("min_train_units = 1\n", "min_train_units = 90\n"))
    answer = cli("data", "check", hospital, "--json")
    row = codes(answer)["policy-refuses"]
    assert (answer.code, row["severity"]) == (NOT_READY, "blocker")
    assert "policy.min_train_units = 90: every round will be refused" in row["problem"]


def test_a_ready_hospital_gets_its_numbers_its_step_and_exit_code_0(cli: Any, tiny: Any, hospital: Path) -> None:
    answer = cli("data", "check", hospital, "--json")
    assert (answer.code, answer.err) == (0, "")
    told = json.loads(answer.out)
    assert list(told) == [
        "format",
        "version",
        "site",
        "ready",
        "exit_code",
        "counts",
        "recipe",
        "data",
        "images",
        "masks",
        "machine",
        "training_step",
        "findings",
    ]
    assert (told["format"], told["site"], told["ready"], told["exit_code"]) == (1, "north", True, 0)
    assert told["recipe"]["backbone"] == "backbone"
    assert told["data"]["classes"] == ["background", "disc"]
    assert told["data"]["patients"] == 12
    assert told["machine"]["device"] == "cpu"
    assert told["machine"]["memory_mib"]["needed"] > memory.BASE_MIB
    assert told["machine"]["disk_mib"]["available"] > 0
    timing = told["training_step"]
    steps = -(-told["data"]["splits"]["train"] // 3)
    assert timing["steps"] == steps
    assert 0 < timing["step_s"] <= timing["first_s"] + 1.0
    assert timing["round_s"] >= 0.9 * steps * timing["step_s"]
    for row in told["findings"]:
        assert list(row) == ["code", "severity", "count", "samples", "problem", "why", "remedy"]
        assert row["code"] in catalogue.ENTRIES
    assert not any(row["severity"] == "blocker" for row in told["findings"])
    assert SECRET not in answer.out


class Page(html.parser.HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data + " "

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_and_the_list_are_for_their_owner_and_the_page_names_nobody(
    cli: Any, hospital: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "data" / "images" / f"{SECRET}_03.png"
    bad.write_bytes(bad.read_bytes()[:60])
    report, listed = tmp_path / "out.html", tmp_path / "files.csv"
    answer = cli("data", "check", hospital, "--html", report, "--files", listed)
    assert answer.code == NOT_READY
    assert "NOT READY (1 blocker" in answer.out
    assert "[unreadable]" in answer.out
    assert SECRET not in answer.out + answer.err
    assert "read 24 of 24 samples" in answer.err or "read 23 of 23 samples" in answer.err
    assert {path.stat().st_mode & 0o777 for path in (report, listed)} == {0o600}
    source = report.read_text(encoding="utf-8")
    assert SECRET not in source
    assert str(tmp_path) not in source
    assert f"{SECRET}_03" in listed.read_text()
    found = Page(source)
    assert page.POLICY in [tag.get("content") for tag in found.named("meta")]
    assert not found.named("script")
    pictures = found.named("img")
    assert len(pictures) == 16
    assert all(str(tag["src"]).startswith("data:image/png;base64,") for tag in pictures)
    assert all(str(tag["href"]).startswith("#") for tag in found.named("a"))
    for words in ("Not ready", "This page stays at the hospital", "damaged, cut short", "Copy the file again"):
        assert words in found.words
    # The same names again: both are files of an earlier check.
    answer = cli("data", "check", hospital, "--html", report, "--files", listed, "--no-pictures", "-q")
    assert (answer.code, answer.err) == (NOT_READY, "")
    found = Page(report.read_text(encoding="utf-8"))
    assert not found.named("img")
    assert "holds no picture" in found.words


def test_what_is_there_is_not_overwritten(cli: Any, tiny: Any, hospital: Path) -> None:
    for option in ("--html", "--files"):
        tiny.one_error(cli("data", "check", hospital, option, hospital), 6, option, "no file of an earlier check")
        tiny.one_error(cli("data", "check", hospital, option, hospital.parent), 6, option, "is a folder")
    assert hospital.read_text().startswith('name = "north"')


def test_without_a_recipe_it_says_what_one_would_add(cli: Any, tiny: Any, hospital: Path) -> None:
    hospital.write_text(hospital.read_text().replace("recipe = ", "# "))
    answer = cli("data", "check", hospital, "--json")
    assert answer.code == 0
    assert "training steps" in codes(answer)["no-recipe"]["why"]
    assert json.loads(answer.out)["training_step"] is None
    assert json.loads(cli("data", "check", hospital, "--recipe", tiny.experiment, "--json").out)["training_step"]


def test_a_quick_look_says_that_it_was_one(cli: Any, hospital: Path) -> None:
    answer = cli("data", "check", hospital, "--limit", "9", "--json")
    assert codes(answer)["limited"]["count"] == 15
    assert json.loads(answer.out)["training_step"]["steps"] == 5


# --- faults of settings -----------------------------------------------------------------------------------------------


def test_faults_of_the_files_are_told_at_once(cli: Any, tiny: Any, hospital: Path, tmp_path: Path) -> None:
    text = hospital.read_text()
    hospital.write_text("rang = 2\ndevice = 'gpu'\n" + text + "[split]\nval_share = 0.6\ntest_share = 0.5\n")
    tiny.one_error(
        cli("data", "check", hospital),
        2,
        "3 faults",
        "rang: unknown key",
        "nearest: 'rank'",
        "device = 'gpu'",
        "below 1",
    )
    hospital.write_text(text.replace('"folder"', '"foldr"'))
    tiny.one_error(cli("data", "check", hospital), 2, "unknown data source 'foldr'", "nearest: 'folder'")
    hospital.write_text(text)
    tiny.one_error(cli("data", "check", tmp_path / "none.toml"), 2, "cannot be read")
    recipe = changed(tiny, tmp_path, rank="rank = 0")
    tiny.one_error(cli("data", "check", hospital, "--recipe", recipe), 2, "rank = 0")
    recipe = changed(tiny, tmp_path, input_size="input_size = [30, 30]")
    tiny.one_error(cli("data", "check", hospital, "--recipe", recipe), 2, str(recipe), "30")
    tiny.one_error(cli("data", "check", hospital, "--limit", "-1"), 2, "--limit")


# --- the recipe against data and machine ------------------------------------------------------------------------------


def test_classes_that_do_not_fit_and_a_map_that_makes_them_fit(
    cli: Any, tiny: Any, hospital: Path, tmp_path: Path
) -> None:
    recipe = changed(tiny, tmp_path, class_names='class_names = ["background", "disc", "ring"]')
    found = codes(cli("data", "check", hospital, "--recipe", recipe, "--json"))
    assert "background, disc, ring" in found["contract"]["problem"]
    assert found["step-skipped"]["severity"] == "note"
    text = hospital.read_text()
    hospital.write_text(text + '[labels]\nforeground = "disc"\n')
    answer = cli("data", "check", hospital, "--recipe", recipe, "--json")
    assert answer.code == 0
    assert "no sample of ring" in codes(answer)["class-missing"]["problem"]
    hospital.write_text(text + '[labels]\nforegrond = "disc"\n')
    found = codes(cli("data", "check", hospital, "--json"))
    assert "labels.foregrond: the data has no such class; nearest: 'foreground'" in found["contract"]["problem"]


def test_rank_device_and_weights(cli: Any, tiny: Any, hospital: Path, tmp_path: Path) -> None:
    text = hospital.read_text()
    hospital.write_text("rank = 3\n" + text)
    answer = cli("data", "check", hospital, "--json")
    assert answer.code == NOT_READY
    assert "rank 3 is over the recipe's 2" in codes(answer)["rank-too-high"]["problem"]
    import torch

    if not torch.cuda.is_available():
        hospital.write_text('device = "cuda"\n' + text)
        answer = cli("data", "check", hospital, "--json")
        assert answer.code == NOT_READY
        assert "torch sees no CUDA device" in codes(answer)["device-missing"]["problem"]
        assert "step-skipped" in codes(answer)
    hospital.write_text(text)
    recipe = changed(tiny, tmp_path, name='name = "deit-tiny"', input_size="input_size = [32, 32]")
    answer = cli("data", "check", hospital, "--recipe", recipe, "--json")
    assert answer.code == NOT_READY
    assert codes(answer)["weights-missing"]["remedy"] == "Run: fedvfm weights fetch deit-tiny"


def test_memory_that_is_not_there_stops_before_the_step(cli: Any, tiny: Any, hospital: Path, tmp_path: Path) -> None:
    recipe = changed(tiny, tmp_path, input_size="input_size = [2800, 2800]", batch_size="batch_size = 4096")
    answer = cli("data", "check", hospital, "--recipe", recipe, "--json")
    assert answer.code == NOT_READY
    assert "MiB of memory needed" in codes(answer)["memory-short"]["problem"]
    assert json.loads(answer.out)["training_step"] is None
    assert "small-images" in codes(answer)


def test_a_step_that_fails_is_a_blocker_and_a_slow_round_a_warning(
    cli: Any, tiny: Any, hospital: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "ROUND_TIMEOUT_S", 1e-6)
    assert "hours" in codes(cli("data", "check", hospital, "--json"))["round-slow"]["problem"]
    recipe = changed(tiny, tmp_path, learning_rate="learning_rate = 1e35\nwarmup = 0.0")
    answer = cli("data", "check", hospital, "--recipe", recipe, "--json")
    assert answer.code == NOT_READY
    assert "TrainingError: site 'north': the loss is" in codes(answer)["step-failed"]["problem"]


def test_resources_are_judged_by_what_is_needed() -> None:
    needed = memory.Memory(base=100.0, backbone=200.0, activations=300.0, kept=400.0)
    ample = resources.Machine("cpu", "", memory=5000.0, gpu_memory=None, disk=5000.0)
    assert resources.judge(ample, needed, 100.0) == []
    tight = resources.Machine("cpu", "", memory=1100.0, gpu_memory=None, disk=110.0)
    assert [one.code for one in resources.judge(tight, needed, 100.0)] == ["memory-tight", "disk-tight"]
    short = resources.Machine("cuda", "a GPU", memory=600.0, gpu_memory=1000.0, disk=90.0)
    found = {one.code: one for one in resources.judge(short, needed, 100.0)}
    assert set(found) == {"memory-short", "gpu-memory-short", "disk-short"}
    assert "700 MiB of memory needed, 600 MiB free" in found["memory-short"].problem
    assert "1,100 MiB of GPU memory needed, 1,000 MiB free" in found["gpu-memory-short"].problem


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    free = resources.free_memory(tmp_path)
    assert free > 0
    (tmp_path / "memory.current").write_text(f"{40 * memory.MIB}\n")
    (tmp_path / "memory.max").write_text(f"{100 * memory.MIB}\n")
    assert resources.free_memory(tmp_path) == 60.0
    (tmp_path / "memory.max").write_text("max\n")
    assert resources.free_memory(tmp_path) > 60.0


# --- nothing leaves ---------------------------------------------------------------------------------------------------


def test_the_guard_refuses_the_network_and_opens_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with offline.closed():
            with pytest.raises(OSError, match="uses no network"):
                socket.create_connection(address)
            with socket.socket() as alone:
                with pytest.raises(OSError, match="uses no network"):
                    alone.connect(address)
                assert alone.connect_ex(address) != 0
            near, far = socket.socketpair()
            near.sendall(b"here")
            assert far.recv(4) == b"here"
            near.close()
            far.close()
        taken = threading.Thread(target=lambda: server.accept()[0].close())
        taken.start()
        socket.create_connection(address).close()
        taken.join()


def test_a_source_that_would_download_is_refused(cli: Any, hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard is closed while a source is opened, whatever it tries."""
    from fedvfm.data.sources import folder

    def reach_out(*_: Any, **__: Any) -> None:
        try:
            socket.create_connection(("127.0.0.1", 9))
        except OSError as error:
            raise defect.NOT_FOUND.error(f"download failed ({error})") from None

    monkeypatch.setattr(folder.Folder, "tolerant", reach_out)
    answer = cli("data", "check", hospital, "--json")
    assert answer.code == NOT_READY
    assert codes(answer)["not-found"]["severity"] == "blocker"
