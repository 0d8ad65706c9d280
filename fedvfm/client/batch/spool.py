"""The folder that client and compute nodes share: one folder a job, files of its owner alone, nothing unpickled.

    <job>/job.json         what to compute (:class:`Job`), written last of what the client writes
    <job>/message          the recipe and the adapter to start from, as a message of :mod:`fedvfm.protocol`
    <job>/submitted.json   which job of the scheduler has it (:class:`Submitted`); the client's
    <job>/cancel           the client wants it no more
    <job>/alive            written every few seconds while the job computes
    <job>/records-<sha256> the answer, as a message of the same protocol
    <job>/result.json      which records are the answer, or the word of a refusal (:class:`Result`); written last

A job is named by what it computes: asked for the same again, after a kill at either end, it is the same folder, and an
answer that lies there is taken. Of a job that ran twice each answer names its own records, so no two are mixed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import pydantic
from pydantic import Field

from fedvfm import errors
from fedvfm.config import base, schema
from fedvfm.data import sample as samples
from fedvfm.flower import internals
from fedvfm.protocol import protocol
from fedvfm.runtime import processes
from fedvfm.storage import hash_chain, storage

LOG = logging.getLogger(__name__)
JOB, MESSAGE, SUBMITTED, CANCEL, ALIVE, RESULT = (
    "job.json",
    "message",
    "submitted.json",
    "cancel",
    "alive",
    "result.json",
)
RECORDS = "records-"
LOGS = 50
"""Of jobs that are kept."""
MAX_JOB = 256 * 1024 * 1024
MAX_RESULT = 4096
ROOM_BYTES = 16 * 1024 * 1024
"""Of a message besides the adapter."""
_NAME = re.compile(r"[0-9a-f]{32}")
Ids = Annotated[tuple[Annotated[str, Field(max_length=1000)], ...], Field(strict=False)]


class Part(pydantic.BaseModel):
    """Base of what stands in the files."""

    model_config = base.SETTINGS


class Job(Part):
    """What a compute node is told of a site: where the images are and which are for what; no policy, budget or key."""

    form: Literal[1] = 1
    """Of this file."""
    kind: Literal["query.handshake", "train", "evaluate"]
    """Of the message."""
    message: base.Sha256
    """Of the file beside."""
    name: schema.SiteName
    """Of the site."""
    data: schema.SourceConfig
    """Where its images are; paths are those of the client's machine."""
    labels: dict[base.Name, base.Name] = {}
    """Its class names = the recipe's."""
    labelled: Annotated[tuple[base.Name, ...], Field(strict=False)] = ()
    """The recipe's classes that are labelled there; empty for all."""
    without_labels: Annotated[bool, Field(exclude_if=lambda said: not said)] = False
    """Whether nothing is labelled there."""
    table: Annotated[Literal["given", "absent"], Field(exclude_if=lambda said: said == "given")] = "given"
    """Whether it has the columns of ``recipe.inputs``."""
    splits: dict[Literal["train", "val", "test"], Ids]
    """The samples of each split, in order."""
    listing: base.Sha256
    """Of the samples as the client sees them: see :func:`listing`."""
    device: schema.Device = "cpu"
    """Where to compute."""
    spare_devices: Annotated[tuple[schema.Device, ...], Field(strict=False)] = ()
    """Where else."""
    rank: Annotated[int, Field(ge=0, le=schema.MAX_RANK)] = 0
    """Of the site."""
    units: Annotated[int, Field(ge=0)] = 0
    """That a private round is made from."""
    least_steps: Annotated[int, Field(ge=1)] = 1
    """Of a round that ends by the clock, as the site's policy says."""
    least_units: Annotated[int, Field(ge=1, exclude_if=lambda said: said == 1)] = 1
    """Patients of an update of a site without labels, as its policy says."""
    cache_mib: Annotated[int, Field(ge=0)] = 0
    """Memory for images."""
    limits: schema.LimitsConfig = schema.LimitsConfig()
    """Of the machine."""
    seconds: base.Positive
    """The most that it may compute."""

    @property
    def name_of_folder(self) -> str:
        """What it computes, hashed; how long it may is left out, since that is another number each time it is asked."""
        text = hash_chain.canonical(self.model_dump(mode="json", exclude={"seconds"}))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class Submitted(Part):
    """Which job of the scheduler has it."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\[\]-]{1,80}$")]
    """As the scheduler calls it."""
    attempt: Annotated[int, Field(ge=1)]
    """How often it was given to the scheduler."""
    time: base.NonNegative
    """Seconds since 1970 when it was."""


class Result(Part):
    """How a job ended."""

    form: Literal[1] = 1
    """Of this file."""
    job: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """Name of the job's folder."""
    word: Annotated[str, Field(pattern=r"^[a-z-]{0,40}$")] = ""
    """Of a refusal; empty where there is an answer."""
    records: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    """sha256 of the answer."""


Model = TypeVar("Model", bound=Part)


def listing(splits: Mapping[str, Iterable[samples.Sample]]) -> str:
    """sha256 of the samples of each split: ids, truths, rows of inputs, who is one patient, what is scored as one.

    Both ends make it of what they see: a compute node where another folder, or nothing, is mounted, computes nothing.
    """
    total = hashlib.sha256()
    for name in ("train", "val", "test"):
        for each in splits.get(name, ()):
            row: list[object] = [
                name,
                each.id,
                each.truth,
                each.subject,
                each.unit,
                [image.id for image in each.images],
            ]
            if each.labelled:
                row.append(each.labelled)
            if each.inputs:
                row.append({"inputs": each.inputs})
            if each.without_image:
                row.append("without image")
            total.update((json.dumps(row) + "\n").encode())
    return total.hexdigest()


def require_private(spool: Path) -> None:
    """Make the spool where there is none; it must be this user's alone.

    Raises:
        StorageError: if it is not, or cannot be made.
    """
    with storage.guard(spool):
        spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        seen = spool.lstat()
        (spool / "logs").mkdir(mode=0o700, exist_ok=True)
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.geteuid() or seen.st_mode & 0o077:
        raise errors.StorageError(
            f"batch.spool {spool}: mode {seen.st_mode & 0o777:03o} of user {seen.st_uid}; it must be a folder of user "
            f"{os.geteuid()} alone (mode 700). chmod 700 it, or name another one"
        )


def folders(spool: Path) -> list[Path]:
    """The folders of jobs; whatever else lies there is not ours."""
    with contextlib.suppress(OSError):
        return sorted(path for path in spool.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
    return []


def write(folder: Path, name: str, content: Part) -> None:
    """Write one of the files above, whole or not at all, for its owner alone.

    Raises:
        StorageError: if the disk refuses.
    """
    storage.write_text(folder / name, hash_chain.canonical(content.model_dump(mode="json")) + "\n")


def read(folder: Path, name: str, form: type[Model], most: int = MAX_RESULT) -> Model | None:
    """Read one of the files above; None where there is none.

    Raises:
        JobError: if it is not of its form, is too large, or is another user's.
    """
    data = read_bytes(folder / name, most)
    if data is None:
        return None
    try:
        return form.model_validate(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise errors.JobError("batch", f"{folder / name}: not of its form ({type(error).__name__})") from None


def read_bytes(path: Path, most: int) -> bytes | None:
    """The bytes of a plain file of this user; None where there is none.

    Raises:
        JobError: if it is a link or no file, another user's, open to others, or larger than ``most``.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise errors.JobError("batch", f"{path}: cannot be read: {error.strerror}") from None
    seen = os.fstat(handle)
    if not stat.S_ISREG(seen.st_mode) or seen.st_uid != os.geteuid() or seen.st_mode & 0o077:
        os.close(handle)
        raise errors.JobError("batch", f"{path}: no plain file of this user alone (mode 600)")
    with os.fdopen(handle, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise errors.JobError("batch", f"{path}: more than {most:,} bytes, which no job of this kind answers")
    return data


def task(folder: Path, job: Job, most: int = MAX_JOB) -> protocol.Task:
    """What a job is asked, as it was written.

    Raises:
        JobError: if the message is gone or not the one that the job names.
        ProtocolError, ConfigError: as :func:`fedvfm.protocol.protocol.decode_task`.
    """
    data = read_bytes(folder / MESSAGE, most)
    if data is None or hashlib.sha256(data).hexdigest() != job.message:
        raise errors.JobError("batch", f"{folder / MESSAGE}: not the message of this job")
    try:
        return protocol.decode_task(internals.parse_records(data))
    except ValueError as error:
        raise errors.JobError("batch", f"{folder / MESSAGE}: {error}") from None


def make(spool: Path, job: Job, message: bytes) -> Path:
    """The folder of a job, which is there already where it was asked for before.

    Raises:
        StorageError: if the disk refuses.
    """
    folder = spool / job.name_of_folder
    with storage.guard(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    if not (folder / JOB).exists():
        storage.write_bytes(folder / MESSAGE, message)
        write(folder, JOB, job)
    return folder


def finish(folder: Path, records: bytes = b"", word: str = "") -> None:
    """Answer a job: with records, or with the word of a refusal.

    Raises:
        StorageError: if the disk refuses.
    """
    digest = hashlib.sha256(records).hexdigest() if records else ""
    if records:
        storage.write_bytes(folder / f"{RECORDS}{digest}", records)
    storage.fault_point("records-written")
    write(folder, RESULT, Result(job=folder.name, word=word, records=digest))


def log_of(folder: Path) -> Path:
    """The log of a job; it outlives the folder."""
    return folder.parent / "logs" / f"{folder.name}.log"


def open_log(folder: Path) -> int:
    """A file descriptor to append to the log of a job; those that are older than the last few go.

    Raises:
        StorageError: if the disk refuses.
    """
    path = log_of(folder)
    handle = processes.open_log(path)
    with contextlib.suppress(OSError):  # another job may remove them too
        for old in sorted(path.parent.glob("*.log"), key=lambda each: each.stat().st_mtime)[:-LOGS]:
            old.unlink()
    return handle


def only(spool: Path) -> int:
    """Be the only process that gives jobs through a spool; the handle that says so, for as long as it is open.

    Raises:
        OutputInUse: if there is one already.
        StorageError: if the lock cannot be made.
    """
    with storage.guard(spool):
        handle = os.open(spool / ".client.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise errors.OutputInUse(
            f"batch.spool {spool}: another client gives jobs through it. Each client needs a folder of its own; "
            "a rehearsal needs the client stopped"
        ) from None
    except OSError:  # a file system without locks
        LOG.warning(f"batch.spool {spool}: the file system has no locks; take care that no other client uses it")
    return handle
