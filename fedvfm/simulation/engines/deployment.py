"""The deployment engine: what hospitals run, all of it on this machine's loopback.

A real SuperLink with TLS and node keys behind the real proxy, and for every virtual hospital a real SuperNode and a
process of its own that executes its messages. The ServerApp runs here. All of it ends with this process, however that
ends.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context

from fedvfm import errors
from fedvfm.client.process import executor, supernode
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.flower import runtime
from fedvfm.model import precision
from fedvfm.report import progress
from fedvfm.runtime import logs, processes
from fedvfm.server import app as server_app
from fedvfm.server.grid import retrying
from fedvfm.server.network import node_keys, proxy, superlink
from fedvfm.server.rounds import federation
from fedvfm.simulation import run_folder
from fedvfm.simulation.engines import worker_schedule
from fedvfm.simulation.results import site_errors
from fedvfm.storage import storage
from fedvfm.trust import keys

FOLDER = "deployment"
ONLINE_S = 180.0
NAMED_S = 60.0
KEYS = "keys.txt"
TRIES = 3
"""A process that ended so often one after another will not do better."""


@dataclass(frozen=True)
class Nodes:
    """The virtual hospitals' processes.

    Attributes:
        folder: keys, logs and pid files of all.
        server: where the SuperNodes connect.
        authority: whom they trust.
    """

    folder: Path
    server: str
    authority: Path

    def start(self, family: processes.Family, control: runtime.Control, names: Sequence[str]) -> None:
        """Register a key for each site, and start its SuperNode and its executor."""
        known = [keys.make() for _ in names]
        node_keys.write(self.folder / KEYS, map(keys.public_text, known))
        for number, (name, key) in enumerate(zip(names, known, strict=True)):
            label = f"site-{number:03d}"
            keys.write_private(self.folder / f"{label}.key", key)
            control.register(keys.public_text(key), name)
            node = supernode.SuperNode(
                f"supernode-{label}",
                self.folder,
                self.server,
                self.authority,
                self.folder / f"{label}.key",
                processes.free_port(),
            )
            node.prepare()
            family.start(node.program)
            command = processes.module(__name__, str(self.folder), name, str(node.port), str(node.secret))
            environment = {**runtime.CHILD_ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
            program = processes.Program(f"executor-{label}", command, environment, pulls_down=(node.name,))
            family.start(program)


def run(
    jobs: Sequence[federation.Job],
    members: Sequence[sites.Site],
    observer: progress.Observer,
    experiment: schema.Experiment,
) -> None:
    """Run or resume every job with one SuperNode and one executor a site.

    Raises:
        EngineError: if a process cannot be started or ends again and again.
        FedvfmError: what stopped the federation; where a site's own error did, that one.
    """
    wanted = {name for job in jobs for name in (*job.train_sites, *job.test_sites)}
    names = [site.name for site in members if site.name in wanted]
    folder = _fresh(run_folder.of_arm(jobs[0].folder) / FOLDER)
    storage.write_text(folder / "experiment.json", experiment.model_dump_json())
    precision.write(folder / "precision.json", experiment.device)
    server = server_app.make_server_app(jobs, observer)
    with site_errors.shown(lambda: site_errors.last(folder / "faults")), _connected(folder, names) as steady:
        grid, context = steady
        server(grid, context)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _connected(folder: Path, names: Sequence[str]) -> Iterator[tuple[retrying.SteadyGrid, Context]]:
    """Everything started and every node online; all of it ended afterwards."""
    family, stop = processes.Family(folder), threading.Event()

    def check() -> None:
        for child in family.children.values():
            if child.failures >= TRIES:
                stop.set()
                raise errors.EngineError(
                    f"engine 'deployment': {child.program.name} ended {child.failures} times. Its log "
                    f"{processes.log_path(folder, child.program.name)} ends: {child.last_words()}"
                )

    with family.watched():
        link = superlink.prepare(folder / "superlink")
        child = family.start(link.program)
        control = runtime.Control(link.link)
        superlink.wait_ready(link, child)
        front = proxy.Settings(
            host=superlink.HOST,
            port=processes.free_port(),
            certificate=str(link.certificate),
            key=str(link.key),
            upstream=link.address,
            authority=str(link.authority),
            keys=str(folder / KEYS),
            log=str(folder / "refused.jsonl"),
        )
        family.start(front.program(folder / "proxy.json"))
        Nodes(folder, f"{front.host}:{front.port}", link.authority).start(family, control, names)
        _wait_online(control, len(names), check)
        run_id = control.start_run()
        control.close()
        with runtime.server_task(link.link, run_id, stop) as (grid, context):
            try:
                yield retrying.SteadyGrid(grid, check), context
            except errors.HandshakeRefused:
                _wait_named(family, check)
                raise


def _wait_named(family: processes.Family, check: Callable[[], None]) -> None:
    """Sites are missing: where a process ends again and again it is named, by ``check``, and not they.

    A SuperNode is online before its executor has ended for the first time, and leaves with it.
    """
    deadline = time.monotonic() + NAMED_S
    while any(child.failures for child in family.children.values()) and time.monotonic() < deadline:
        check()
        time.sleep(0.3)


def _wait_online(control: runtime.Control, count: int, check: Callable[[], None]) -> None:
    deadline = time.monotonic() + ONLINE_S
    while (online := sum(node.online for node in control.nodes())) < count:
        check()
        if time.monotonic() > deadline:
            raise errors.EngineError(
                f"engine 'deployment': {online} of {count} SuperNodes came online in {ONLINE_S:g} s"
            )
        time.sleep(0.3)


def _fresh(folder: Path) -> Path:
    """An empty private folder; processes that an earlier run left are ended first."""
    for path in folder.glob("*.pid"):
        processes.end(path, 2.0)
    shutil.rmtree(folder, ignore_errors=True)
    with storage.guard(folder):
        folder.mkdir(parents=True, mode=0o700)
        (folder / "faults").mkdir(mode=0o700)
    return folder


def serve(folder: Path, name: str, link: runtime.Link) -> None:
    """Be the executor of one virtual hospital; does not return."""
    storage.fault_point("executor-starts")
    import torch

    from fedvfm.client import app as client_app
    from fedvfm.client.gate import gate, held_adapters, reply_cache
    from fedvfm.simulation import experiment as experiments
    from fedvfm.simulation import run as runs

    what = schema.Experiment.model_validate_json((folder / "experiment.json").read_text(encoding="utf-8"))
    built = client_app.Models(threads=worker_schedule.threads(what))
    torch.set_num_threads(built.threads)
    precision.take(what.device, precision.read(folder / "precision.json"))
    files = runs.shared_files(folder.parent, what)
    (site,) = [one for one in runs.members(what, experiments.hospitals(what), files) if one.name == name]

    def report(where: str, error: Exception) -> None:
        site_errors.leave(folder / "faults", where, error)

    kept = reply_cache.Sent(folder / "sent" / name)
    # The gate settles what coding an update lost, and the personal arrays, as at a real site, and so all of a folder;
    # these lie in the run's, for a run that goes on.
    run = run_folder.RunFolder(folder.parent)
    site.residuals = kept.residuals = held_adapters.Residuals(run.residuals / name)
    site.personal = kept.personal = held_adapters.PersonalArrays(run.personal_arrays(name))
    app = client_app.make_client_app(lambda context: site, built, report, adapters=kept.adapters)
    entry = gate.Gate(app, kept, gate.NoTerms(), report)
    executor.serve(link, entry, threading.Event())


if __name__ == "__main__":
    _folder, _name, _port, _secret = sys.argv[1:]
    with logs.output(as_json=True):
        serve(Path(_folder), _name, runtime.Link(f"{supernode.HOST}:{_port}", b"", Path(_secret).read_bytes()))
