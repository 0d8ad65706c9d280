"""``fedvfm server start``: SuperLink, proxy and run, watched until the federation is finished; and how they are."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.doctor import host as machine
from fedvfm.doctor import monitor
from fedvfm.flower import runtime
from fedvfm.runtime import capacity, page_server, processes
from fedvfm.server import daemon, live_page, state_folder, status, tracked_runs
from fedvfm.server.coordinator import coordinator, waiting
from fedvfm.server.coordinator import orders as steering
from fedvfm.server.network import node_keys, proxy, refused_requests, superlink
from fedvfm.server.rounds import result
from fedvfm.tracking import follower, targets
from fedvfm.trust import certificates, signed_documents
from fedvfm.trust import roster as rosters

LOG = logging.getLogger(__name__)
NAME, CHILDREN = status.NAME, status.CHILDREN
READY_S = 60.0
RENEW_S = 12 * 3600.0
KEYS = "keys.txt"
"""The keys that the public port lets in, for the proxy."""


def _folder(where: state_folder.State) -> Path:
    return where.folder / coordinator.RUN


def start(
    where: state_folder.State,
    server: schema.ServerConfig,
    listen: str,
    *,
    stay: bool = False,
    page_port: int | None = None,
    trackers: Sequence[targets.Target] = (),
    track_sites: bool = False,
) -> dict[str, Any] | None:
    """Run the federation to its end, or until this process is told to end. What ends by itself is started again.

    Args:
        where: the state folder.
        server: quorum, cohort, deadlines.
        listen: ``host:port`` of the public port; empty for that of the address sites were told, on all interfaces.
        stay: keep the sites connected when all recipes are finished, and wait for a further one.
        page_port: of the live page on loopback, 0 for any that is free; None for no page.
        trackers: take the numbers of rounds.
        track_sites: whether they take those of single sites too.

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
                if page_port is not None:
                    page = str(where.folder.absolute())
                    page_server.start(family.start, folder, live_page.__name__, page, port=page_port)
                place = tracked_runs.__name__
                with follower.followed(trackers, family.start, place, where.folder, LOG.warning, sites=track_sites):
                    return _watch(where, server, _listening(where, listen), family, over, stay)
        finally:
            page_server.forget(folder)
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
    _write_keys(where, Path(front.keys))
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
                return status.evaluation(where)
            elif recipe != rested:
                LOG.info(f"recipe {recipe[:12]} is finished; waits for a further one")
                rested = recipe
        elif run.code is not None:
            if run.code in errors.LASTING:
                raise run.failure().error("the run stopped")
            code = run.code
            LOG.warning(f"the run ended ({code}) and resumes in {run.postpone():g} s")
    return status.evaluation(where) if where.finished(where.about.recipe) else None


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
        "proxy": lambda: _write_keys(where, listed),
        "SuperLink": lambda: coordinator.sync(control, where.sites()),
    }
    # Each is told, whatever becomes of the other: a revoked site is out at one of them.
    known_to = [_told(name, tell) for name, tell in steps.items()]
    return changed if all(known_to) else known


def _write_keys(where: state_folder.State, path: Path) -> None:
    sites = where.sites()
    dropped = [entry.public_key for entry in sites.values() if entry.status == rosters.DROPPED]
    node_keys.write(path, coordinator.known_keys(sites), dropped)


def _told(name: str, tell: Callable[[], object]) -> bool:
    try:
        tell()
    except (errors.EngineError, errors.StorageError) as error:
        LOG.warning(f"the roster is not yet known to the {name}: {error}")
        return False
    return True


def stop(where: state_folder.State) -> bool:
    """End the server and all its processes; whether it ran. What was admitted is kept."""
    folder = _folder(where)
    ran = processes.end(processes.pid_path(folder, NAME), 30.0)
    for name in (*CHILDREN, page_server.NAME):
        processes.end(processes.pid_path(folder, name))
    return ran
