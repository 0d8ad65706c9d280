"""``fedvfm doctor server``: whether a coordinator is ready, and what to do where it is not. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.doctor import host as machine
from fedvfm.doctor import network
from fedvfm.report import finding
from fedvfm.runtime import processes
from fedvfm.server import state_folder
from fedvfm.trust import certificates, keys, signed_documents
from fedvfm.trust import roster as rosters

RUN = "run"
CHILDREN = ("superlink", "proxy", "coordinate")
BASE_BYTES = 512 * machine.MIB
"""Logs, Flower's database and what lies in it for a while."""
COPIES = 6
"""Of an adapter each site needs at most so many: received, in Flower's database both ways, checkpoints."""


def examine(folder: Path, server: schema.ServerConfig, listen: str = "") -> list[finding.Row]:
    """All rows of a coordinator.

    Args:
        folder: the state folder.
        server: quorum and deadlines, as ``server start --config`` would take them.
        listen: ``host:port`` as ``server start --listen`` would take it.
    """
    try:
        where = state_folder.open_state(folder)
    except errors.FedvfmError as error:
        return [finding.blocker("state", str(error), "name the folder with --state, or run: fedvfm server init")]
    rows = [finding.ok("state", f"federation '{where.about.federation}' in {folder}")]
    rows += finding.caught("files", lambda: [machine.private(folder)])
    rows += finding.caught("state", lambda: [_recipe(where)])
    rows += finding.caught("certificate", lambda: _certificate(where))
    rows += finding.caught("authority", lambda: [_authority(where)])
    rows += finding.caught("port", lambda: [_port(where, listen)])
    rows += finding.caught("disk", lambda: [machine.disk(folder, _need(where))])
    rows += finding.caught("versions", lambda: machine.versions(_versions(where)))
    rows += finding.caught("quorum", lambda: _roster(where, server))
    rows += finding.caught("clock", lambda: [_clock(where)])
    rows.append(machine.other_users())
    rows.append(machine.alive(children(where)))
    if processes.running(processes.pid_path(folder / RUN, "proxy")) is not None:
        rows += finding.caught("health", lambda: _answers(where, listen))
    return rows


def children(where: state_folder.State) -> dict[str, int | None]:
    """The server's processes and their numbers; None for one that does not run."""
    return {name: processes.running(processes.pid_path(where.folder / RUN, name)) for name in CHILDREN}


def alive(where: state_folder.State) -> Mapping[str, bool]:
    """For the health probe: which of them run; nothing drives rounds when all are done."""
    done = state_folder.open_state(where.folder).finished(where.about.recipe)
    return {name: pid is not None or (done and name == "coordinate") for name, pid in children(where).items()}


def _recipe(where: state_folder.State) -> finding.Row:
    """Whether recipe and initial adapter are whole."""
    locked = where.locked()
    return finding.ok("state", f"recipe {locked.recipe.hash[:12]} and its initial adapter are whole")


def _certificate(where: state_folder.State) -> list[finding.Row]:
    certificate = certificates.read_pem(where.certificate.read_text(), str(where.certificate))
    authority = certificates.read_pem(where.authority.read_text(), str(where.authority))
    again = "fedvfm server certify, then restart the server"
    key = keys.read_private(where.key)
    if key.public_key() != certificate.public_key():
        return [finding.blocker("certificate", f"{where.key} is not the key of {where.certificate}", again)]
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        told = f"{where.certificate} is not signed by {where.authority}: sites refuse it"
        return [finding.blocker("certificate", told, again)]
    host, _ = certificates.split_address(where.about.address)
    names = certificates.names_of(certificate)
    if host not in names:
        told = f"it is for {', '.join(names)}, but sites connect to {host}"
        return [finding.blocker("certificate", told, f"fedvfm server certify --san {host}, then restart the server")]
    return [_dates("certificate", certificate, again)]


def _dates(check: str, certificate: certificates.Certificate, again: str) -> finding.Row:
    now = signed_documents.now()
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begins:
        told = f"good from {signed_documents.stamp(begins)} only; it is {signed_documents.stamp(now)} here"
        return finding.blocker(check, told, "set this machine's clock")
    if now >= ends:
        return finding.blocker(
            check, f"expired at {signed_documents.stamp(ends)}; it is {signed_documents.stamp(now)} here", again
        )
    left = (ends - now).days
    if left < state_folder.RENEWED_DAYS:
        return finding.warning(check, f"expires in {left} days, at {signed_documents.stamp(ends)}", again)
    return finding.ok(check, f"good until {signed_documents.stamp(ends)}")


def _authority(where: state_folder.State) -> finding.Row:
    authority = certificates.read_pem(where.authority.read_text(), str(where.authority))
    if not where.authority_key.exists():
        told = f"{where.authority_key} is not here; the federation runs without it"
        return finding.warning("authority", told, "bring it back to invite sites or to make a new certificate")
    key = keys.read_private(where.authority_key)
    if key.public_key() != certificates.authority_key(authority, str(where.authority)):
        told = f"{where.authority_key} is not the key of {where.authority}"
        return finding.blocker("authority", told, "restore both from one backup")
    found = _dates("authority", authority, "a new authority means a new federation: fedvfm server init")
    return found if found.severity != finding.OK else finding.ok("authority", f"{where.fingerprint()}, {found.problem}")


def _listening(where: state_folder.State, listen: str) -> tuple[str, int]:
    host, number = certificates.split_address(listen or where.about.address)
    return (host if listen or host.startswith("127.") else "0.0.0.0", number)  # noqa: S104 - what the server does


def _port(where: state_folder.State, listen: str) -> finding.Row:
    host, number = _listening(where, listen)
    return machine.port(host, number, processes.running(processes.pid_path(where.folder / RUN, "proxy")))


def _need(where: state_folder.State) -> int:
    size = sum(4 * spec.size for spec in where.lock().manifest)
    return BASE_BYTES + size * COPIES * max(1, len(where.sites()))


def _versions(where: state_folder.State) -> dict[str, str]:
    found = {f"site '{name}'": entry.version for name, entry in where.sites().items() if entry.status == "approved"}
    return found | {f"recipe {where.about.recipe[:12]}": where.lock().version}


def _roster(where: state_folder.State, server: schema.ServerConfig) -> list[finding.Row]:
    sites, invited = where.sites(), where.invited()
    approved = [name for name, entry in sites.items() if entry.status == rosters.APPROVED]
    open_ones, void = [one for one in invited if invited[one]], [one for one in invited if not invited[one]]
    rows = [_quorum(where, server, approved, open_ones)]
    strangers = [signed_documents.shown(one) for one in server.without if one not in sites]
    if strangers:
        told = f"'without' names sites that are not on the roster: {', '.join(strangers)}"
        rows.append(finding.blocker("quorum", told, f"mend server.toml; the roster has: {', '.join(sites)}"))
    if void:
        remedy = "the first round does not wait for them; fedvfm server invite SITE for each, or revoke it"
        rows.append(finding.warning("invites", f"the invites expired of: {', '.join(void)}", remedy))
    if open_ones:
        remedy = (
            "fedvfm server approve REQUEST --key KEY; the first round waits for them, or: fedvfm server start "
            "--without SITE"
        )
        rows.append(finding.warning("invites", f"not joined yet: {', '.join(open_ones)}", remedy))
    return rows


def _quorum(
    where: state_folder.State, server: schema.ServerConfig, approved: Sequence[str], invited: Sequence[str]
) -> finding.Row:
    """Whether the approved sites can make a quorum: of the first round all that were invited are a part."""
    waited = [] if where.begun else [one for one in invited if one not in server.without]
    every = [one for one in approved if one not in server.without] + waited
    least = server.quorum or max(1, len(every))
    told = f"{len(approved)} sites are approved, the quorum is {least}"
    told += f" (all, with {len(waited)} that are invited)" if waited and not server.quorum else ""
    if len(approved) < (server.quorum or 1):
        return finding.blocker(
            "quorum", told, "fedvfm server approve REQUEST --key KEY for each file that a site sent back"
        )
    return finding.ok("quorum", told)


def _clock(where: state_folder.State) -> finding.Row:
    """A coordinator has no other end to ask: its clock must at least stand after what it wrote itself."""
    last = signed_documents.moment(where.audit.last["time"])
    now = signed_documents.now()
    if (last - now).total_seconds() > network.AHEAD_S:
        told = (
            f"it is {signed_documents.stamp(now)} here, but the audit log was written at {signed_documents.stamp(last)}"
        )
        return finding.blocker("clock", told, "set this machine's clock; sites compare theirs with it")
    return finding.ok("clock", f"{signed_documents.stamp(now)}, after the last entry of the audit log")


def _answers(where: state_folder.State, listen: str) -> list[finding.Row]:
    """The running server's own public port, as a site sees it."""
    host, number = _listening(where, listen)
    host = "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104 - compared, not bound
    name, _ = certificates.split_address(where.about.address)
    found = network.examine(network.Route(host, number, name=name), where.authority)
    return [one for one in found if one.check in ("health", "certificate", "reach") and one.severity != finding.OK] or [
        finding.ok("health", "the public port answers, with the certificate that lies here")
    ]
