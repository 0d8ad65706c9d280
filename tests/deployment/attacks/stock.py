"""Flower as it comes: its SuperLink with TLS and node keys, its FedAvg, its SuperNode, and the same attacks on them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from flwr.common import serde
from flwr.proto import control_pb2
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from attacks import bundles, ours, strangers, updates
from fedvfm.flower import runtime
from fedvfm.runtime import processes
from fedvfm.trust import certificates, keys, signed_documents

SITES = ("east", "south", "mal")
# What FedAvg is asked to do, once for each lie; it says how that ended.
_FEDAVG = """
import json, time
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
app = ServerApp()

class Noting(FedAvg):
    nodes = ()
    def aggregate_train(self, server_round, replies):
        kept = list(replies)
        self.nodes = [reply.metadata.src_node_id for reply in kept]
        return super().aggregate_train(server_round, kept)

def arrays():
    rng = np.random.default_rng(0)
    return ArrayRecord({name: Array(rng.normal(size=(8, 4)).astype(np.float32)) for name in ("a", "b")})

@app.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < 3:
        time.sleep(0.5)
    for lie in LIES:
        strategy, started, row = Noting(fraction_evaluate=0.0), time.monotonic(), {"lie": lie}
        try:
            done = strategy.start(grid, arrays(), 1, 120, train_config=ConfigRecord({"lie": lie}))
            moved = [one.numpy().astype(np.float64) - arrays()[name].numpy() for name, one in done.arrays.items()
                     if name in arrays() and one.numpy().shape == (8, 4)]
            with np.errstate(all="ignore"):
                row["moved"] = float(max(np.abs(one).max() for one in moved)) if moved else -1.0
            row["names"] = sorted(done.arrays)
            row["metrics_nan"] = any(v != v for one in done.train_metrics_clientapp.values() for v in one.values())
        except BaseException as error:
            row["ended"] = type(error).__name__
        row |= {"nodes": len(strategy.nodes), "different": len(set(strategy.nodes)),
                "seconds": round(time.monotonic() - started, 1)}
        with Path(OUT).open("a") as file:
            file.write(json.dumps(row) + "\\n")
"""


@dataclass
class Flower:
    """A stock deployment in a folder."""

    folder: Path
    address: str
    started: list[subprocess.Popen[Any]] = field(default_factory=list)

    @property
    def authority(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def canary(self) -> Path:
        return self.folder / "canary"

    @property
    def target(self) -> strangers.Target:
        return strangers.Target(self.address, self.authority.read_bytes(), self.canary, self.folder / "gone.key")

    def spawn(self, name: str, command: list[str], **environment: str) -> subprocess.Popen[Any]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        fixed = {
            **runtime.CHILD_ENVIRONMENT,
            "PATH": path,
            "FLWR_HOME": str(self.folder / f"home-{name}"),
            "OMP_NUM_THREADS": "1",
        }
        with (self.folder / f"{name}.txt").open("w") as words:
            made = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, **fixed, **environment},
                stdout=words,
                stderr=words,
                start_new_session=True,
            )
        self.started.append(made)
        return made

    def control(self) -> ControlHttpClient:
        """Flower's own client of the Control API: it needs nothing but the address."""
        intercept = [RuntimeVersionHttpInterceptor(component_name="flwr")]
        return ControlHttpClient.from_server_address(self.address, False, self.authority.read_bytes(), intercept)

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        return ours.whole_lines(path)

    def words(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.txt")))


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Flower]:
    """SuperLink with TLS and node keys as Flower's documentation says, three nodes of which one lies."""
    made = Flower(folder, f"127.0.0.1:{processes.free_port()}")
    made.canary.mkdir()
    now = signed_documents.now()
    authority_key, authority = certificates.make_authority("stock", now)
    key, certificate = certificates.make_server(authority_key, authority, ("127.0.0.1", "localhost"), now)
    made.authority.write_text(certificates.to_pem(authority))
    (folder / "server.pem").write_text(certificates.to_pem(certificate))
    keys.write_private(folder / "server.key", key, pem=True)
    try:
        host, _, port = made.address.rpartition(":")
        made.spawn(
            "superlink",
            [
                *(processes.console_script("flower-superlink"), "--host", host, "--port", port),
                *("--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key"),
                *("--enable-supernode-auth", "--database", "state.db"),
            ],
        )
        control = made.control()

        def answers() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                control.ListNodes(control_pb2.ListNodesRequest())
                return True
            return False

        ours.until(answers, ours.START_S, "stock SuperLink")
        nodes = {site: _register(control, folder, site) for site in (*SITES, "stock", "gone")}
        control.UnregisterNode(control_pb2.UnregisterNodeRequest(node_id=nodes["gone"]))
        control.close()
        (folder / "victim.json").write_text(json.dumps(["east", nodes["east"]]))
        book = {
            "address": made.address,
            "authority": str(made.authority),
            "speaks": "stock",
            "canary": str(made.canary),
            "victims": str(folder / "victim.json"),
            "log": str(folder / "lies.jsonl"),
            "release": str(folder / "never"),
            "hold_s": 20.0,
            "nodes": [{"site": site, "lies": site == "mal", "key": str(folder / f"{site}.key")} for site in SITES],
        }
        (folder / "book.json").write_text(json.dumps(book))
        yield made
    finally:
        for process in reversed(made.started):
            process.terminate()
        for process in made.started:
            process.wait(300)
        for process in made.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)  # the children that Flower's programs started


def _register(control: ControlHttpClient, folder: Path, site: str) -> int:
    key = keys.make()
    keys.write_private(folder / f"{site}.key", key)
    public = public_key_to_bytes(key.public_key())
    return int(control.RegisterNode(control_pb2.RegisterNodeRequest(public_key=public, name=site)).node_id)


def lies(made: Flower) -> list[dict[str, Any]]:
    """Let FedAvg run one round for each lie; what came of each."""
    head = f"OUT, LIES = {str(made.folder / 'rounds.jsonl')!r}, {ours.ORDER!r}\n"
    files = {"app/__init__.py": "", "app/server_app.py": head + _FEDAVG, "app/client_app.py": _NO_CLIENT}
    bundle = bundles.make(files, "app.server_app:app", "app.client_app:app")
    path = f"{ours.HERE.parents[2]}:{ours.HERE.parent}"
    nodes = made.spawn("nodes", [sys.executable, "-m", "attacks.serve", "book.json"], PYTHONPATH=path)
    control = made.control()
    fab = serde.fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {}))
    control.StartRun(control_pb2.StartRunRequest(fab=fab))
    control.close()
    ours.until(lambda: len(made.lines("rounds.jsonl")) == len(ours.ORDER), ours.ALL_S, "FedAvg")
    nodes.terminate()
    nodes.wait(300)
    return made.lines("rounds.jsonl")


_NO_CLIENT = "from flwr.clientapp import ClientApp\napp = ClientApp()\n"


def said(made: Flower, row: dict[str, Any]) -> str:
    """What Flower did with a lie, in words."""
    got = next(
        (line["got"] for line in made.lines("lies.jsonl") if line.get("lie") == row["lie"] and line["site"] == "mal"),
        "",
    )
    if row["lie"] == "instruction":
        injected = [line for line in made.lines("lies.jsonl") if line.get("group") == "injected"]
        return f"accepted ({got}): the other site got and answered it" if injected else f"refused ({got})"
    if row["lie"] == "other-node":
        return f"refused ({got})"
    if "ended" in row:
        return f"the run ends for all: {row['ended']}"
    if row["lie"] == "free-text":
        kept = updates.PATIENT in made.words()
        return "accepted: its text stands in the coordinator's log" if kept else "refused: its text is dropped"
    if row["lie"] == "half":
        return f"accepted: the round waits for its parts, {row['seconds']:g} s here, 180 s if they never come"
    if row["lie"] == "other-node-inside":
        return "accepted under the other's number" if row["different"] < row["nodes"] else "refused"
    if row["lie"] in ("other-name", "stale"):
        return "accepted: there are no names or rounds to check"
    if row["lie"] == "nan-metric":
        return "accepted: the mean of the metric is NaN" if row["metrics_nan"] else "refused"
    moved = row["moved"]
    if moved != moved:
        return "accepted: the global model is NaN"
    # Two honest sites and an honest third would move every number by 0.001.
    return f"accepted: the model moved by {moved:.3g} (honest: 0.001)"


def asked(made: Flower) -> dict[str, str]:
    """Every stranger's attack; a stock SuperNode is there to run what is shipped to it."""
    found = {}
    for name, (_, attack) in strangers.STRANGERS.items():
        if name != "foreign-bundle":
            found[name] = attack(made.target)
    made.spawn(
        "supernode",
        [
            *(processes.console_script("flower-supernode"), "--superlink", made.address),
            *("--root-certificates", "ca.crt", "--auth-supernode-private-key", "stock.key"),
            *("--port", str(processes.free_port())),
        ],
    )
    ours.until(lambda: "SuperNode ID" in (made.folder / "supernode.txt").read_text(), ours.START_S, "stock SuperNode")
    found["foreign-bundle"] = strangers.STRANGERS["foreign-bundle"][1](made.target)
    with contextlib.suppress(TimeoutError):
        ours.until(lambda: list(made.canary.iterdir()), ours.START_S, "the canary")
    return found
