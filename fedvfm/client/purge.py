"""``fedvfm client purge``: what a site received and kept of a federation is removed; what it is and did stays.

Only what is named here is touched, so nothing of another kind is ever lost. Files are unlinked, not overwritten.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from fedvfm import errors
from fedvfm.audit import audit, segments
from fedvfm.client import state_folder
from fedvfm.client.adoption import decisions
from fedvfm.client.gate import masking
from fedvfm.client.personal import statement
from fedvfm.client.process import supervisor
from fedvfm.runtime import processes
from fedvfm.storage import storage
from fedvfm.trust import keys

AUDIT = "audit.jsonl"
SEEDS = "noise-seeds"


@dataclass(frozen=True)
class Removed:
    """One kind of what was there.

    Attributes:
        kind: a word of the audit log.
        path: where it lay.
        files: how many.
        bytes: how many.
    """

    kind: str
    path: str
    files: int
    bytes: int


def found(where: state_folder.State, *, with_audit: bool = False) -> list[Removed]:
    """What a purge would remove."""
    rows = [
        ("adapters", where.folder / decisions.FOLDER),
        ("personal", where.folder / statement.FOLDER),
        ("replies", where.sent),
        ("features", where.features),
        # What was opened is never forgotten: a second sum of a round would be one site's update by subtraction.
        *(("sessions", path) for ending in ("session", "keys") for path in sorted(where.secure.glob(f"*.{ending}"))),
        *((SEEDS, path) for path in masking.noise_seeds(where.secure)),
        ("run-files", where.folder / supervisor.FOLDER),
        *(("rehearsals", path) for path in sorted(where.folder.glob(f"{state_folder.REHEARSAL}*"))),
        *(("unfinished", path) for path in sorted(where.folder.rglob(f".*{storage.PART}"))),
        *((("audit", where.folder / AUDIT),) if with_audit else ()),
    ]
    return [_measured(kind, path) for kind, path in rows if path.exists()]


def _measured(kind: str, path: Path) -> Removed:
    files = [path] if path.is_file() else []
    for folder in (path, *([segments.folder(path)] if path.name == AUDIT else [])):
        files += [one for one in folder.rglob("*") if one.is_file() and not one.is_symlink()]
    return Removed(kind, str(path), len(files), sum(one.stat().st_size for one in files))


def receipt(where: state_folder.State) -> audit.Receipt:
    """What the audit log was, signed, before it is removed: whoever keeps it can say so later."""
    return where.audit.receipt(keys.read_private(where.key))


def require_stopped(where: state_folder.State) -> None:
    """Check that nothing of the client runs.

    Raises:
        OutputInUse: if it does.
    """
    folder = where.folder / supervisor.FOLDER
    for name in (supervisor.NAME, *supervisor.CHILDREN):
        pid = processes.running(processes.pid_path(folder, name))
        if pid is not None:
            raise errors.OutputInUse(
                f"the client of {where.folder} runs ({name}, process {pid}). Stop it first: fedvfm client stop "
                f"--state {where.folder}"
            )


def run(where: state_folder.State, *, with_audit: bool = False) -> list[Removed]:
    """Remove it; what was removed.

    With the audit log the count of rounds and hours would begin anew, so every approval is withdrawn first.

    Raises:
        OutputInUse: if the client runs.
        StorageError: if something cannot be removed.
    """
    require_stopped(where)
    rows = found(where, with_audit=with_audit)
    if with_audit:
        for recipe in where.approvals.stand():
            state_folder.withdraw(where, recipe)
        for survey in filter(None, map(where.find_survey, where.survey_approvals.stand())):
            state_folder.withdraw_survey(where, survey)
    for one in rows:
        path = Path(one.path)
        if path.name == AUDIT:
            storage.remove_folder(segments.folder(path))
        if one.kind == SEEDS:
            masking.end_noise(path)  # that there was one stays
        else:
            with storage.guard(path):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        where.audit.record("purged", kind=one.kind, numbers=one.files, bytes=one.bytes)
    return rows
