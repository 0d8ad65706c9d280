"""Training in jobs of a cluster's scheduler: ``[batch]`` of the site's file."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

import pydantic
from pydantic import Field

from fedvfm.config import base

FOLDER, JOB = "{folder}", "{job}"
"""What stands in a command for the folder of a job, and for the name that the scheduler gave it."""

Command = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=1000)], ...], Field(min_length=1, max_length=50, strict=False)
]


class BatchConfig(pydantic.BaseModel):
    """Where a site's training is computed that runs in batch jobs, and how its scheduler is asked.

    Commands are lists of a program and its arguments; no shell reads them. They get none of this process's environment
    but PATH, HOME, USER, LOGNAME, LANG and SLURM_CONF.
    """

    model_config = base.SETTINGS

    spool: Annotated[str, Field(min_length=1, max_length=1000)]
    """(path) A folder of this site alone that this machine and the compute nodes see under the same absolute path.
    Change: to a folder on your shared file system."""
    submit: Command = ("sbatch", "--parsable", "/etc/fedvfm/fedvfm.sbatch", FOLDER)
    """Gives a job to the scheduler and prints its name last; {folder} is the folder of the job. Change: to where the
    script lies that 'fedvfm client batch-script' prints."""
    query: Command = ("squeue", "--noheader", "--format=%T", f"--jobs={JOB}")
    """Prints something while the job {job} waits or runs, and nothing once it is over. Change: for another scheduler
    than Slurm."""
    cancel: Command = ("scancel", JOB)
    """Ends the job {job}. Change: for another scheduler than Slurm."""
    attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """(jobs) How often the work of one message is given to the scheduler, where a job ends without an answer. Change:
    up where jobs are preempted often."""
    poll_s: Annotated[float, Field(gt=0.0, le=3600.0)] = 5.0
    """(s) Between two looks into the folder; the scheduler is asked every twelfth time. Change: up where the file
    system is slow."""
    queue_minutes: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """(minutes) A job that has not begun by then is given up, and the coordinator told; 0: it may wait as long as the
    round lasts. Change: where the coordinator should know early that the queue is full."""

    @pydantic.model_validator(mode="after")
    def _agree(self) -> BatchConfig:
        if not PurePosixPath(self.spool).is_absolute():
            raise ValueError("spool must be an absolute path: the compute nodes look for it too")
        for key, word in (("submit", FOLDER), ("query", JOB), ("cancel", JOB)):
            if not any(word in argument for argument in getattr(self, key)[1:]):
                raise ValueError(f"{key}: no argument holds {word}")
        return self
