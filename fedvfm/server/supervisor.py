"""``fedvfm server start``: SuperLink, proxy and run, watched until the federation is finished; and how they are."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.doctor import host as machine
from fedvfm.doctor import monitor
from fedvfm.flower import runtime
from fedvfm.runtime import capacity, processes
from fedvfm.server import daemon, state_folder
from fedvfm.server.coordinator import coordinator, status_file, waiting
from fedvfm.server.coordinator import orders as steering
from fedvfm.server.network import node_keys, proxy, refused_requests, superlink
from fedvfm.server.rounds import journal, result
from fedvfm.trust import certificates, signed_documents

LOG = logging.getLogger(__name__)
NAME = "server"
CHILDREN = ("superlink", "proxy", "coordinate")
READY_S = 60.0
RENEW_S = 12 * 3600.0
KEYS = "keys.txt"
"""The keys that the public port lets in, for the proxy."""


def _folder(where: state_folder.State) -> Path:
    return where.folder / coordinator.RUN


def start(
    where: state_folder.State, server: schema.ServerConfig, listen: str, *, stay: bool = False
) -> dict[str, Any] | None:
    """Run the federation to its end, or until this process is told to end. What ends by itself is started again.

    Args:
        where: the state folder.
        server: quorum, cohort, deadlines.
        listen: ``host:port`` of the public port; empty for that of the address sites were told, on all interfaces.
        stay: keep the sites connected when all recipes are finished, and wait for a further one.

    Returns: the evaluation of the last recipe, or None if it was told to end before that was finished.

    Raises:
        OutputInUse: if it runs already.
        TrustError: if the certificate has expired and cannot be renewed here.
        EngineError: if the port is taken, the SuperLink does not start, or the run stopped for good; then with the
            exit code the run ended with.
    """
    folder = _folder(where)
    with processes.alone(folder, NAME, f"the server of {where.folder}"), processes.told_to_end() as over:
        note = state_folder.renew(where)
        if note:
            LOG.warning(note)
        before, now = capacity.raise_file_limit()
        LOG.info(f"open files: at most {now}" + (f", raised from {before}" if now != before else ""))
        family = processes.Family(folder)
        try:
            with family.watched():
                return _watch(where, server, _listening(where, listen), family, over, stay)
        finally:
            daemon.silence(folder)


def require_known(where: state_folder.State, server: schema.ServerConfig) -> None:
    """Check that the sites to go on without are such as are on the roster: a slip of the pen would wait for ever.

    Raises:
        ConfigError: naming those that are not.
    """
    known = where.sites()
    faults = [
        f"without '{signed_documents.shown(one)}': is not on the roster: {', '.join(known)}" for one in server.without
    ]
    strangers = [fault for one, fault in zip(server.without, faults, strict=True) if one not in known]
    if strangers:
        raise errors.ConfigError("server start", strangers)


def _listening(where: state_folder.State, listen: str) -> tuple[str, int]:
    host, port = certificates.split_address(listen or where.about.address)
    return (host if listen or host.startswith("127.") else "0.0.0.0", port)  # noqa: S104 - the port sites reach


def _watch(
    where: state_folder.State,
    server: schema.ServerConfig,
    public: tuple[str, int],
    family: processes.Family,
    over: threading.Event,
    stay: bool,
) -> dict[str, Any] | None:
    folder = _folder(where)
    processes.end(processes.pid_path(folder, "proxy"))  # one that a killed server left would hold the port
    _require_free(public)
    link = superlink.prepare(folder / "superlink")
    child = family.start(link.program)
    control = runtime.Control(link.link)
    superlink.wait_ready(link, child, over=over)
    front = proxy.Settings(
        host=public[0],
        port=public[1],
        certificate=str(where.certificate),
        key=str(where.key),
        upstream=link.address,
        authority=str(link.authority),
        keys=str(folder / KEYS),
        log=str(folder / refused_requests.FILE),
    )
    node_keys.write(Path(front.keys), coordinator.known_keys(where.sites()))
    door = processes.Child(front.program(folder / "proxy.json"), folder)
    if not over.is_set():
        door = family.start(door.program)
        _wait_listening(public, door, over)
    if over.is_set():  # told to end before it stood
        control.close()
        return None
    command = processes.module(
        coordinator.__name__, str(where.folder.absolute()), str(link.port), server.model_dump_json()
    )
    run = processes.Child(processes.Program("coordinate", command, runtime.CHILD_ENVIRONMENT, restart=False), folder)
    LOG.info(f"federation {where.about.federation}: listening at {public[0]}:{public[1]}")
    daemon.announce(folder, f"{public[0]}:{public[1]}")
    run.start()
    try:
        disk = monitor.Lookout(lambda: [machine.disk(where.folder, 0)])
        collected = refused_requests.collected(folder / refused_requests.FILE, where.audit)
        renewed = processes.repeated(lambda: _renew(where, door), RENEW_S, "fedvfm-certificate")
        with collected, disk.watched(), renewed:
            return _until_done(where, run, control, over, stay)
    finally:
        run.stop()
        if over.is_set():  # a person ended it, and whoever starts it again has as long as at first
            waiting.Memory(folder).forget()
        control.close()


def _renew(where: state_folder.State, door: processes.Child) -> None:
    """Renew the certificate of a server that runs for months, in time; its port starts again with the new one."""
    try:
        where = state_folder.open_state(where.folder)  # names and recipe may be others by now
        before, note = state_folder.certified_until(where), state_folder.renew(where)
        anew = state_folder.certified_until(where) != before
    except (OSError, errors.FedvfmError) as error:
        note, anew = str(error), False
    if note:
        LOG.warning(note)
    if anew and door.process is not None:
        door.process.terminate()  # it is watched


def _require_free(public: tuple[str, int]) -> None:
    """Check that nobody else listens at the public port; he would answer the sites in our place."""
    try:
        family = socket.getaddrinfo(*public, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(public)
    except OSError as error:
        raise errors.EngineError(
            f"cannot listen at {public[0]}:{public[1]}: {error.strerror or error}. End what listens there, or give "
            "another port with --listen"
        ) from None


def _wait_listening(public: tuple[str, int], child: processes.Child, over: threading.Event) -> None:
    host = {"0.0.0.0": superlink.HOST, "::": "::1"}.get(public[0], public[0])  # noqa: S104 - which it is reached by
    deadline = time.monotonic() + READY_S
    while not over.is_set():
        try:
            socket.create_connection((host, public[1]), 1.0).close()
            return
        except OSError as error:
            if child.failures or time.monotonic() > deadline:
                log = processes.log_path(child.folder, child.program.name)
                raise errors.EngineError(
                    f"the proxy does not listen at {public[0]}:{public[1]} ({error.strerror or error}). Its log {log} "
                    f"ends: {child.last_words(2)}"
                ) from None
            over.wait(0.1)


def _until_done(
    where: state_folder.State, run: processes.Child, control: runtime.Control, over: threading.Event, stay: bool
) -> dict[str, Any] | None:
    roster, rested, told, shown = 0, "", "", ""
    while not over.wait(0.5):
        roster = _synced(where, control, roster)
        if run.process is None and processes.due(run):
            run.try_start()
        elif run.code == 0:
            try:
                shown = _shown(where, shown)
                where = steering.settle(where)
            except errors.StorageError as error:  # a full disk is waited for
                if str(error) != told:
                    LOG.error(f"what follows cannot be written down yet: {error}")
                told = str(error)
                continue
            recipe = where.about.recipe
            if not where.finished(recipe):
                LOG.info(f"recipe {recipe[:12]} begins")
                run.try_start()
            elif not stay:
                return _evaluation(where)
            elif recipe != rested:
                LOG.info(f"recipe {recipe[:12]} is finished; waits for a further one")
                rested = recipe
        elif run.code is not None:
            if run.code in errors.LASTING:
                raise run.failure().error("the run stopped")
            code = run.code
            LOG.warning(f"the run ended ({code}) and resumes in {run.postpone():g} s")
    return _evaluation(where) if where.finished(where.about.recipe) else None


def _shown(where: state_folder.State, before: str) -> str:
    """Write what a finished recipe leaves, and say where it is, once; the recipe that was said last."""
    recipe = where.about.recipe
    folder = result.ensure(where) if recipe != before else None
    if folder is not None:
        LOG.info(f"recipe {recipe[:12]} is finished: adapter and report lie in {folder}")
    return recipe if folder is not None else before


def _synced(where: state_folder.State, control: runtime.Control, known: int) -> int:
    """Let proxy and SuperLink know the roster where it changed; when it was changed last, as far as both know it."""
    changed = where.roster_path.stat().st_mtime_ns
    if changed == known:
        return known
    listed = where.roster_path.parent / coordinator.RUN / KEYS
    steps: dict[str, Callable[[], object]] = {
        "proxy": lambda: node_keys.write(listed, coordinator.known_keys(where.sites())),
        "SuperLink": lambda: coordinator.sync(control, where.sites()),
    }
    # Each is told, whatever becomes of the other: a revoked site is out at one of them.
    known_to = [_told(name, tell) for name, tell in steps.items()]
    return changed if all(known_to) else known


def _told(name: str, tell: Callable[[], object]) -> bool:
    try:
        tell()
    except (errors.EngineError, errors.StorageError) as error:
        LOG.warning(f"the roster is not yet known to the {name}: {error}")
        return False
    return True


def _evaluation(where: state_folder.State) -> dict[str, Any]:
    path = where.run_path(where.about.recipe) / "evaluation.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        why = "cannot be read; remove it and start the server: the final test is made again"
        raise errors.CheckpointError(f"{path}: {why}")
    return found


def _finished(where: state_folder.State) -> tuple[dict[str, Any], str]:
    """The evaluation, empty where there is none; and why, where it is damaged."""
    try:
        return (_evaluation(where) if where.finished(where.about.recipe) else {}), ""
    except errors.CheckpointError as error:
        return {}, str(error)


def _certificate(where: state_folder.State) -> str:
    """How the server's certificate stands, for people."""
    ends, now = state_folder.certified_until(where), signed_documents.now()
    until = signed_documents.stamp(ends)
    if ends <= now:
        return f"expired at {until}: every site refuses it. Run: fedvfm server certify"
    days = (ends - now).days
    soon = f", {days} days: 'server start' renews it" if days < state_folder.RENEWED_DAYS else ""
    return f"good until {until}{soon}"


def stop(where: state_folder.State) -> bool:
    """End the server and all its processes; whether it ran. What was admitted is kept."""
    folder = _folder(where)
    ran = processes.end(processes.pid_path(folder, NAME), 30.0)
    for name in CHILDREN:
        processes.end(processes.pid_path(folder, name))
    return ran


def status(where: state_folder.State) -> dict[str, Any]:
    """What runs, what was refused lately, who is on the roster, how far the rounds are, and how the run stands."""
    folder, recipe = _folder(where), where.about.recipe
    arm = where.run_path(recipe)
    rounds = journal.Journal(arm / "journal.jsonl", recipe) if (arm / "journal.jsonl").exists() else None
    found = {name: processes.running(processes.pid_path(folder, name)) for name in (NAME, *CHILDREN)}
    done, fault = _finished(where)
    orders, stands = steering.read(where), status_file.read(folder) if found["coordinate"] else {}
    takes_part: dict[str, str] = stands.get("sites", {})
    return {
        "federation": where.about.federation,
        "address": where.about.address,
        "certificate": _certificate(where),
        "certified_until": signed_documents.stamp(state_folder.certified_until(where)),
        "recipe": recipe,
        "rounds": where.lock().recipe.rounds,
        "finished_rounds": rounds.last_round if rounds is not None else 0,
        "finished": bool(done),
        "phase": "finished" if done else stands.get("phase", "stopped"),
        "round": stands.get("round", 0),
        "reason": "" if done else fault or stands.get("reason", ""),
        **steering.told(orders, recipe),
        "processes": found,
        "refused": refused_requests.lately(folder / refused_requests.FILE),
        "sites": {name: entry.status for name, entry in where.sites().items()},
        "takes_part": takes_part,
        "pending": sorted(name for name, word in takes_part.items() if word in ("approval-pending", "roster-pending")),
        "acceptance": done.get("acceptance", {}),
        "result": str(arm) if (arm / result.REPORT).is_file() else "",
    }
