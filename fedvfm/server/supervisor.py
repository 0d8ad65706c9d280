"""``fedvfm server start``: SuperLink, proxy and run, watched until the federation is finished; and how they are."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedvfm import config as configs
from fedvfm import errors, flower_runtime, processes, storage
from fedvfm.server import coordinate, enrolment, journal, proxy, superlink
from fedvfm.trust import certificates

NAME = "server"
CHILDREN = ("superlink", "proxy", "coordinate")
LASTING = (2, 4, 5, 7, 8, 9, 12, 14)
"""Exit codes that another start does not mend: configuration, weights, checkpoint, disk, protocol, training, trust."""


def _folder(where: enrolment.State) -> Path:
    return where.folder / coordinate.RUN


def start(
    where: enrolment.State, server: configs.ServerConfig, listen: str, note: Callable[[str], None]
) -> dict[str, Any] | None:
    """Run the federation to its end, or until this process is told to end. What ends by itself is started again.

    Args:
        where: the state folder.
        server: quorum, cohort, deadlines.
        listen: ``host:port`` of the public port; empty for that of the address sites were told, on all interfaces.
        note: told what happens.

    Returns: the evaluation, or None if it was told to end before.

    Raises:
        OutputInUse: if it runs already.
        EngineError: if the SuperLink does not start, or the run stopped for good.
    """
    folder = _folder(where)
    with storage.guard(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    mine = processes.pid_path(folder, NAME)
    if processes.running(mine) is not None:
        raise errors.OutputInUse(f"the server of {where.folder} runs already (process {processes.running(mine)})")
    processes.write_pid(mine, processes.own_pid())
    over = threading.Event()
    before = [signal.signal(number, lambda *_: over.set()) for number in (signal.SIGTERM, signal.SIGINT)]
    family = processes.Family(folder, note)
    try:
        with family.watched():
            return _watch(where, server, _listening(where, listen), family, over, note)
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
        mine.unlink(missing_ok=True)


def _listening(where: enrolment.State, listen: str) -> tuple[str, int]:
    host, port = certificates.split_address(listen or where.about.address)
    return (host if listen or host.startswith("127.") else "0.0.0.0", port)  # noqa: S104 - the port sites reach


def _watch(
    where: enrolment.State,
    server: configs.ServerConfig,
    public: tuple[str, int],
    family: processes.Family,
    over: threading.Event,
    note: Callable[[str], None],
) -> dict[str, Any] | None:
    folder = _folder(where)
    link = superlink.prepare(folder / "superlink")
    child = family.start(link.program)
    control = flower_runtime.Control(link.link)
    superlink.wait_ready(link, child)
    front = proxy.Settings(
        host=public[0],
        port=public[1],
        certificate=str(where.certificate),
        key=str(where.key),
        upstream=link.address,
        authority=str(link.authority),
        log=str(folder / "refused.jsonl"),
    )
    family.start(front.program(folder / "proxy.json"))
    command = processes.module(
        coordinate.__name__, str(where.folder.absolute()), str(link.port), server.model_dump_json()
    )
    run = processes.Child(
        processes.Program("coordinate", command, flower_runtime.CHILD_ENVIRONMENT, restart=False), folder
    )
    note(f"federation {where.about.federation}: listening at {public[0]}:{public[1]}")
    run.start()
    try:
        return _until_done(where, run, control, over, note)
    finally:
        run.stop()
        control.close()


def _until_done(
    where: enrolment.State,
    run: processes.Child,
    control: flower_runtime.Control,
    over: threading.Event,
    note: Callable[[str], None],
) -> dict[str, Any] | None:
    roster = 0.0
    while not over.wait(0.5):
        changed = where.roster_path.stat().st_mtime
        if changed != roster:
            try:
                coordinate.sync(control, where.sites())
                roster = changed
            except errors.EngineError as error:
                note(f"the roster is not yet known to the SuperLink: {error}")
        if run.process is None and processes.due(run):
            run.start()
        elif run.code == 0:
            return _evaluation(where)
        elif run.code is not None:
            if run.code in LASTING:
                raise errors.EngineError(f"the run stopped: {run.last_words(1)}")
            code = run.code
            note(f"the run ended ({code}) and resumes in {run.postpone():g} s")
    return None


def _evaluation(where: enrolment.State) -> dict[str, Any]:
    path = where.folder / "runs" / where.about.recipe / "evaluation.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def stop(where: enrolment.State) -> bool:
    """End the server and all its processes; whether it ran. What was admitted is kept."""
    folder = _folder(where)
    ran = processes.end(processes.pid_path(folder, NAME), 30.0)
    for name in CHILDREN:
        processes.end(processes.pid_path(folder, name))
    return ran


def status(where: enrolment.State) -> dict[str, Any]:
    """What runs, who is on the roster, how far the rounds are, and the last thing the run said."""
    folder, recipe = _folder(where), where.about.recipe
    arm = where.folder / "runs" / recipe
    rounds = journal.Journal(arm / "journal.jsonl", recipe) if (arm / "journal.jsonl").exists() else None
    words = processes.Child(processes.Program("coordinate", ()), folder).last_words(1)
    return {
        "federation": where.about.federation,
        "address": where.about.address,
        "recipe": recipe,
        "rounds": where.lock().recipe.rounds,
        "finished_rounds": rounds.last_round if rounds is not None else 0,
        "finished": (arm / "evaluation.json").exists(),
        "processes": {name: processes.running(processes.pid_path(folder, name)) for name in (NAME, *CHILDREN)},
        "sites": {name: entry.status for name, entry in where.sites().items()},
        "last": words,
    }
