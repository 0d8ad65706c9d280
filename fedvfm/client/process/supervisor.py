"""``fedvfm client start``: SuperNode and executor of a site, watched; and what they do, from outside.

``python -m fedvfm.client.process.supervisor`` is the executor's own process.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from pathlib import Path

from fedvfm import errors
from fedvfm.client import console, live_page, rekeying, site_file, state_folder, status
from fedvfm.client.gate import split_pin
from fedvfm.client.process import limits, supernode
from fedvfm.config import batch, schema
from fedvfm.doctor import host, monitor, network
from fedvfm.flower import runtime
from fedvfm.flower import supernode as flower_supernode
from fedvfm.protocol import protocol
from fedvfm.report import finding
from fedvfm.runtime import logs, page_server, processes
from fedvfm.storage import storage
from fedvfm.trust import keys

LOG = logging.getLogger(__spec__.name)  # this module may run as "__main__"
NAME, CHILDREN, FOLDER = status.NAME, status.CHILDREN, status.FOLDER
ROOM_BYTES = 16 * 1024 * 1024
"""Of a message besides the adapter: the recipe, words."""
WORD_S = 2.0
"""An executor that ends itself takes the SuperNode along: so long that has to send what it was answered last."""


def _folder(where: state_folder.State) -> Path:
    return where.folder / FOLDER


def start(where: state_folder.State, settings: Path, *, page_port: int | None = None) -> None:
    """Run the site's processes until this one is told to end; what ends by itself is started again.

    A SuperNode that was killed is refused for up to a minute (the coordinator takes it for present still); the waits
    between its starts grow to half a minute, so it is back soon after.

    Args:
        where: the site's state folder.
        settings: the site's own file.
        page_port: of the live page on loopback, 0 for any that is free; None for no page.

    Raises:
        ConfigError: if the site's file has faults or names another site.
        OutputInUse: if it runs already.
    """
    site = site_file.read_site(settings, where.about.site)
    with processes.alone(_folder(where), NAME, f"the client of {where.folder}"), processes.told_to_end() as over:
        status.note_settings(where, settings)
        status.note_standing(where, "")
        try:
            _watch(where, settings, site, over, page_port)
        finally:
            page_server.forget(_folder(where))
        storage.remove_folder(where.features)
        if site.batch is not None:
            _end_jobs(site.batch)


def _end_jobs(settings: batch.BatchConfig) -> None:
    """Cancel what an executor that was killed left at the scheduler, and leave nothing of it in the shared folder."""
    from fedvfm.client.batch import jobs

    jobs.clear(Path(settings.spool), settings)


def _watch(
    where: state_folder.State,
    settings: Path,
    site: schema.SiteConfig,
    over: threading.Event,
    page_port: int | None,
) -> None:
    folder = _folder(where)
    _take_new_key(where)
    node = supernode.SuperNode(
        "supernode", folder, where.about.address, where.authority, where.key, processes.free_port()
    )
    node.prepare()
    command = processes.module(
        __name__, str(where.folder.absolute()), str(settings.absolute()), str(node.port), str(node.secret.absolute())
    )
    # What a site computes with was fetched by its people before; nothing is fetched because a recipe names it.
    environment = {"HF_HUB_OFFLINE": "1", **runtime.CHILD_ENVIRONMENT, **limits.environment(site)}
    family = processes.Family(folder)
    outside = monitor.Lookout(lambda: look(where))

    def rounds_of(recipe: str) -> int:
        return where.find(recipe).recipe.rounds if recipe in where.seen() else 0

    # The console ends last: it tells of what the others did until their end.
    with console.told(where.audit.path, rounds_of), family.watched(), outside.watched():
        if page_port is not None:
            page_server.start(family.start, folder, live_page.__name__, str(where.folder.absolute()), port=page_port)
        family.start(node.program)
        family.start(processes.Program("executor", command, environment, pulls_down=(node.name,)))
        LOG.info(f"site {where.about.site}: waiting for messages of {where.about.address}")
        ask = 0.0
        while not over.wait(1.0):
            if time.monotonic() >= ask:
                ask = time.monotonic() + rekeying.pause_s(where)
                _take_new_key(where, family.children[node.name])


def _take_new_key(where: state_folder.State, node: processes.Child | None = None) -> None:
    """Take a new key that waits once the coordinator lets it in; the SuperNode starts again with it."""

    def let_in(key: keys.Private) -> bool:
        return flower_supernode.is_let_in(where.about.address, where.authority.read_bytes(), key)

    try:
        if rekeying.finish(where, let_in) and node is not None and node.process is not None:
            node.process.terminate()  # it is watched: it ends and is started again
    except errors.FedvfmError as error:
        LOG.error(f"the new key cannot be taken now: {error}")


def look(where: state_folder.State) -> list[finding.Row]:
    """What stops a site that runs: the way to its coordinator, the clock, the disk, and that it was dropped."""
    way = network.examine(network.route(where.about.address), where.authority)
    there = finding.ready(way)
    return [*way, *(_standing(where) if there else ()), host.disk(where.folder, 0)]


def _standing(where: state_folder.State) -> list[finding.Row]:
    """What the coordinator says of this site when it asks by its key; kept for ``client status`` till it says else."""
    key = keys.read_private(where.key)
    word = flower_supernode.standing(where.about.address, where.authority.read_bytes(), key)
    if word:
        status.note_standing(where, word)
    else:  # a question that got no answer ends no drop
        word = (status.standing_of(where) or {}).get("word", "")
    if word not in status.STANDING:
        return []
    problem, remedy = status.STANDING[word]
    return [finding.blocker("standing", problem, remedy.format(site=where.about.site))]


def stop(where: state_folder.State) -> bool:
    """End the client and all its processes; whether it ran."""
    folder = _folder(where)
    ran = processes.end(processes.pid_path(folder, NAME), 30.0)
    for name in (*CHILDREN, page_server.NAME):  # where the client itself was killed elsewhere than on Linux
        processes.end(processes.pid_path(folder, name))
    return ran


def serve(folder: Path, settings: Path, link: runtime.Link) -> None:
    """Be the executor; does not return."""
    from fedvfm.client import app as client_app
    from fedvfm.client.adoption import adoption
    from fedvfm.client.batch import jobs
    from fedvfm.client.gate import compute_time, enforcement, gate, reply_cache
    from fedvfm.client.process import executor
    from fedvfm.client.training import compute

    where = state_folder.open_state(folder)
    site = site_file.read_site(settings)
    device, fault = ("cpu", None) if site.batch is not None else device_or_fault(site)
    limits.apply(site.limits, device)
    mine = enforcement.SiteTerms(where, settings, device)
    over = threading.Event()

    def report(at: str, error: Exception) -> None:
        # No text of it: it may name a file or a patient. 'fedvfm data check' says which, on the screen alone.
        word = protocol.refusal(error).reason
        if isinstance(error, errors.DeviceError):
            over.set()  # once it has answered: a CUDA error stays with its process, and a new one chooses again
        line: dict[str, object] = {"error": type(error).__name__, "told": word}
        plain = word in ("privacy-budget", split_pin.REASON)
        if plain or isinstance(
            error, errors.BudgetExceeded | errors.LedgerError | errors.JobError | errors.DeviceError
        ):
            line["text"] = str(error)  # numbers and the remedy; nothing of a patient is in them
        LOG.warning(word, extra={"fields": line})

    built = client_app.Models(threads=site.limits.threads)
    kept = reply_cache.Sent(where.sent)
    finals = adoption.Finals(
        where, lambda: mine.config.policy, lambda recipe, digest: mine.history.left(recipe, digest)
    )
    elsewhere: compute.Compute | None = None if fault is None else compute.Nowhere(fault)
    if site.batch is not None:
        elsewhere = jobs.Jobs(lambda: mine.judged)
    app = client_app.make_client_app(mine.site, built, report, finals, adapters=kept.adapters, elsewhere=elsewhere)
    entry = gate.Gate(app, kept, mine, report)
    compute_time.settle(where)
    executor.serve(link, compute_time.counted(where, entry), over, lambda: most_bytes(where))
    time.sleep(WORD_S)


def device_or_fault(site: schema.SiteConfig) -> tuple[str, errors.FedvfmError | None]:
    """The first device that computes; or the CPU, on which nothing is computed then, and why there is none.

    A process that ended here would leave the coordinator to wait for the site until each round is over.
    """
    from fedvfm.model import device_check

    try:
        return device_check.first((site.device, *site.spare_devices)), None
    except (errors.ConfigError, errors.DeviceError) as error:
        LOG.error(str(error))
        return "cpu", error


def most_bytes(where: state_folder.State) -> int:
    """Of a message: four times the largest adapter among the approved recipes, and room for words."""
    try:
        manifests = [where.find(recipe).manifest for recipe in where.approvals.stand()]
    except errors.FedvfmError:  # approvals that are not this site's, say: the gate refuses the message with its word
        manifests = []
    return ROOM_BYTES + 4 * 4 * max((manifest.parameters for manifest in manifests), default=0)


if __name__ == "__main__":
    _state, _settings, _port, _secret = sys.argv[1:]
    _link = runtime.Link(f"{supernode.HOST}:{_port}", b"", Path(_secret).read_bytes())
    with logs.output(as_json=True):
        try:
            serve(Path(_state), Path(_settings), _link)
        except errors.Interrupted as _ended:  # a job was waited for
            sys.exit(_ended.exit_code)
