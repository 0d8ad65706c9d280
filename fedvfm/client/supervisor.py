"""``fedvfm client start``: SuperNode and executor of a site, watched; and what they do, from outside.

``python -m fedvfm.client.supervisor`` is the executor's own process.
"""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path
from typing import Any

from fedvfm import config as configs
from fedvfm import errors, flower_runtime, logs, processes, protocol, storage
from fedvfm.client import joining, limits, own, refusals, split_note, supernode, verdicts
from fedvfm.diagnosis import channel, lookout, machine, row

LOG = logging.getLogger(__spec__.name)  # this module may run as "__main__"
NAME = "client"
CHILDREN = ("supernode", "executor")
FOLDER = "run"


def _folder(where: joining.State) -> Path:
    return where.folder / FOLDER


def start(where: joining.State, settings: Path) -> None:
    """Run the site's processes until this one is told to end; what ends by itself is started again.

    A SuperNode that was killed is refused for up to a minute (the coordinator takes it for present still); the waits
    between its starts grow to half a minute, so it is back soon after.

    Raises:
        ConfigError: if the site's file has faults or names another site.
        OutputInUse: if it runs already.
    """
    site = own.read_site(settings, where.about.site)
    with processes.alone(_folder(where), NAME, f"the client of {where.folder}"), processes.told_to_end() as over:
        _watch(where, settings, site, over)
        storage.remove_folder(where.features)


def _watch(where: joining.State, settings: Path, site: configs.SiteConfig, over: threading.Event) -> None:
    folder = _folder(where)
    node = supernode.SuperNode(
        "supernode", folder, where.about.address, where.authority, where.key, processes.free_port()
    )
    node.prepare()
    command = processes.module(
        __name__, str(where.folder.absolute()), str(settings.absolute()), str(node.port), str(node.secret.absolute())
    )
    # What a site computes with was fetched by its people before; nothing is fetched because a recipe names it.
    environment = {"HF_HUB_OFFLINE": "1", **flower_runtime.CHILD_ENVIRONMENT, **limits.environment(site)}
    family = processes.Family(folder)
    outside = lookout.Lookout(lambda: look(where))
    with family.watched(), outside.watched(), refusals.told(where.audit.path):
        family.start(node.program)
        family.start(processes.Program("executor", command, environment, pulls_down=(node.name,)))
        LOG.info(f"site {where.about.site}: waiting for messages of {where.about.address}")
        while not over.wait(1.0):
            pass


def look(where: joining.State) -> list[row.Row]:
    """What stops a site that runs: the way to its coordinator, the clock, the disk."""
    way = channel.examine(channel.route(where.about.address), where.authority)
    return [*way, machine.disk(where.folder, 0)]


def stop(where: joining.State) -> bool:
    """End the client and all its processes; whether it ran."""
    folder = _folder(where)
    ran = processes.end(processes.pid_path(folder, NAME), 30.0)
    for name in CHILDREN:  # where the client itself was killed elsewhere than on Linux
        processes.end(processes.pid_path(folder, name))
    return ran


def status(where: joining.State) -> dict[str, Any]:
    """What runs, and what was received, decided and sent last."""
    from fedvfm.client import privacy_here  # SciPy only where privacy is counted

    folder = _folder(where)
    found = {name: processes.running(processes.pid_path(folder, name)) for name in (NAME, *CHILDREN)}
    entries = where.audit.entries
    last = {entry["event"]: {key: entry[key] for key in _SHOWN if key in entry} for entry in entries}
    return {
        "site": where.about.site,
        "federation": where.about.federation,
        "address": where.about.address,
        "processes": found,
        "approved": where.approvals.stand(),
        "waiting": [one for one in where.seen() if one not in where.approvals.stand()],
        "adapters": verdicts.to_json(where),
        "damaged": verdicts.damaged(where),
        "privacy": privacy_here.status(where),
        "last": last,
    }


_SHOWN = ("time", "kind", "verdict", "reason", "recipe", "round", "bytes")


def serve(folder: Path, settings: Path, link: flower_runtime.Link) -> None:
    """Be the executor; does not return."""
    from fedvfm.client import app as client_app
    from fedvfm.client import devices, executor, final, gate, sent, terms, unfinished

    where = joining.open_state(folder)
    site = own.read_site(settings)
    device = devices.choose(site.device)
    limits.apply(site.limits, device)
    mine = terms.SiteTerms(where, settings, device)

    def report(at: str, error: Exception) -> None:
        # No text of it: it may name a file or a patient. 'fedvfm data check' says which, on the screen alone.
        word = protocol.refusal(error).reason
        line: dict[str, object] = {"error": type(error).__name__, "told": word}
        plain = word in ("privacy-budget", split_note.REASON)
        if plain or isinstance(error, errors.BudgetExceeded | errors.LedgerError):
            line["text"] = str(error)  # numbers and the remedy; nothing of a patient is in them
        LOG.warning(word, extra={"fields": line})

    built = client_app.Models(threads=site.limits.threads)
    kept = sent.Sent(where.sent)
    finals = final.Finals(where, lambda: mine.config.policy)
    app = client_app.make_client_app(mine.site, built, report, finals, adapters=kept.adapters)
    entry = gate.Gate(app, kept, mine, report)
    unfinished.settle(where)
    executor.serve(link, unfinished.counted(where, entry), threading.Event())


if __name__ == "__main__":
    _state, _settings, _port, _secret = sys.argv[1:]
    _link = flower_runtime.Link(f"{supernode.HOST}:{_port}", b"", Path(_secret).read_bytes())
    with logs.output(as_json=True):
        serve(Path(_state), Path(_settings), _link)
