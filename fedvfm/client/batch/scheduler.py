"""How a cluster's scheduler is asked: commands of the site's file, without a shell and with a bare environment."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedvfm import errors
from fedvfm.config import batch

LOG = logging.getLogger(__name__)
PASSED = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "SLURM_CONF")
"""Environment variables that reach a command; a job gets no more of them than the scheduler hands on."""
SECONDS = 60.0
"""The most that a command may take."""
FORGOTTEN = "invalid job id"
"""What squeue says, with an error, of a job that ended longer ago than Slurm's MinJobAge (5 minutes by default)."""
_ID = re.compile(r"[A-Za-z0-9_.\[\]-]{1,80}")


def environment(own: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a command gets of this process's environment."""
    given = os.environ if own is None else own
    return {name: given[name] for name in PASSED if name in given}


class Scheduler:
    """A cluster's scheduler.

    Args:
        settings: the commands.
    """

    def __init__(self, settings: batch.BatchConfig) -> None:
        self._settings = settings

    def submit(self, folder: Path) -> str:
        """Give a job to the scheduler; the name that it has there.

        Raises:
            JobError: if it takes none.
        """
        code, out, said = _run(_filled(self._settings.submit, batch.FOLDER, str(folder)))
        words = out.split()
        name = words[-1].partition(";")[0] if words else ""  # "123;cluster" of sbatch --parsable
        if code or not _ID.fullmatch(name):
            raise errors.JobError(
                "batch",
                f"batch.submit: {self._settings.submit[0]} ended with {code} and gave no job: "
                f"{_shown(said or out)}. Run it by hand",
            )
        return name

    def over(self, job: str) -> bool | None:
        """Whether a job neither waits nor runs any more; None where the scheduler does not say."""
        try:
            code, out, said = _run(_filled(self._settings.query, batch.JOB, job))
        except errors.JobError as error:
            LOG.warning(str(error))
            return None
        if code and FORGOTTEN in said.lower():
            return True
        if code:
            LOG.warning(f"batch.query ended with {code}: {_shown(said)}")
            return None
        return not out.strip()

    def cancel(self, job: str) -> None:
        """End a job; one that is over already is no fault."""
        try:
            code, _, said = _run(_filled(self._settings.cancel, batch.JOB, job))
            if code:
                LOG.warning(f"batch.cancel of job {job} ended with {code}: {_shown(said)}")
        except errors.JobError as error:
            LOG.warning(str(error))


def _filled(command: Sequence[str], word: str, value: str) -> list[str]:
    return [argument.replace(word, value) for argument in command]


def _run(command: Sequence[str]) -> tuple[int, str, str]:
    """Exit code, output and errors.

    Raises:
        JobError: if it cannot be started, or takes too long.
    """
    try:
        ended = subprocess.run(
            command,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            cwd="/",
            check=False,
        )
    except (OSError, ValueError) as error:
        raise errors.JobError(
            "batch", f"{command[0]} cannot be started: {error}. Mend [batch] of the site's file"
        ) from None
    except subprocess.TimeoutExpired:
        raise errors.JobError("batch", f"{command[0]} took more than {SECONDS:g} s; is the scheduler there?") from None
    return ended.returncode, ended.stdout[:10_000].decode("utf-8", "replace"), ended.stderr.decode("utf-8", "replace")


def _shown(text: str) -> str:
    """The last line of what a command said, for a log."""
    lines = text.strip().splitlines() or [""]
    return "".join(each if each.isprintable() else "?" for each in lines[-1][:300])
