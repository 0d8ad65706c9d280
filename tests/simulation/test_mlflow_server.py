"""``simulate --track`` against a real MLflow server that asks for a login, which the environment holds.

The server is MLflow's own with its basic authentication: ``pip install "mlflow[auth]"``, best in an environment of its
own, whose ``mlflow`` the variable ``FEDVFM_MLFLOW`` names; the client alone (the extra "mlflow") cannot serve.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedvfm.runtime import processes
from fedvfm.simulation import tracked_runs
from fedvfm.tracking import follower, targets
from tests.cli import conftest as cli_tests
from tests.simulation import test_trackers
from tests.support import forks

pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
NEEDED = ("flask", "flask_wtf", "sqlalchemy", "alembic")
PROGRAM = os.environ.get("FEDVFM_MLFLOW") or (
    shutil.which("mlflow", path=str(Path(sys.executable).parent))
    if all(importlib.util.find_spec(name) for name in NEEDED)
    else None
)
USER, PASSWORD = "radiology", "only-for-this-test"
START_S = 600.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAM, reason='its server needs the whole of MLflow: pip install "mlflow[auth]"'),
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server that lets in one user."""
    folder, port = tmp_path / "mlflow", processes.free_port()
    folder.mkdir()
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder / 'users.db'}\n"
        f"admin_username = {USER}\nadmin_password = {PASSWORD}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PYTHON"))}
    own = {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-a-test"}
    own |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [str(PROGRAM), "server", "--app-name", "basic-auth", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'runs.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "words.txt").open("w") as words:
        process = subprocess.Popen(
            command, cwd=folder, env={**clean, **own}, stdout=words, stderr=words,
            start_new_session=True,
        )  # fmt: skip
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while not answers(address):
            assert process.poll() is None, (folder / "words.txt").read_text()[-3000:]
            assert time.monotonic() < deadline, (folder / "words.txt").read_text()[-3000:]
            time.sleep(0.2)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait(120)


def answers(address: str) -> bool:
    """Whether the server lets the user in."""
    login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    request = urllib.request.Request(f"{address}/health", headers={"Authorization": f"Basic {login}"})
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=60) as answer:
        return bool(answer.status == 200)
    return False


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory, template: forks.Template) -> cli_tests.Tiny:
    return cli_tests.write(tmp_path_factory.mktemp("discs"), template)


def test_a_simulation_is_tracked_by_a_server_that_asks_for_a_login(
    server: str, discs: cli_tests.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_environment: None
) -> None:
    login = {
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "300",
    }
    run, target = tmp_path / "run", targets.Target("mlflow", server)
    call = ["simulate", discs.experiment, "--set", "baselines=[]", "--output", run, "--track", f"mlflow:{server}"]
    answer = discs.run_anew(*call, environment=login)
    assert answer.code == 0, answer.err
    assert "Unauthorized" not in answer.err, answer.err
    for key, value in login.items():
        monkeypatch.setenv(key, value)
    said: list[str] = []
    # On a machine that is too busy the run did not wait for the last rows; whoever follows it next hands them on.
    own = follower.Follower(target, lambda: tracked_runs.runs(run), said.append, sites=True)
    assert own.look(), said
    ((name, points),) = test_trackers.mlflow_points(server).items()
    assert name == "run/federated"
    lines = discs.lines(run / "journal.jsonl")
    assert set(points["round/seconds"]) == {line["round"] for line in lines} == {1, 2, 3}
    for site, row in lines[0]["train"].items():
        assert points[f"site/{site}/train/loss"][1] == pytest.approx(row["loss"], abs=1e-4)

    # With another password nothing is taken: that is one sentence, and no password stands in it.
    second = shutil.copytree(run, tmp_path / "second", ignore=shutil.ignore_patterns(f"{follower.PREFIX}*"))
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another")
    own = follower.Follower(target, lambda: tracked_runs.runs(second), said.append, sites=True)
    assert [own.look(), own.look()] == [False, False]
    (sentence,) = said
    assert sentence.startswith(f"tracker mlflow:{server} takes nothing: ")
    assert "another" not in sentence
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    assert set(test_trackers.mlflow_points(server)) == {"run/federated"}


own_environment: Callable[..., Any] = test_trackers.own_environment
