"""``python -m fedvfm.client.batch.job FOLDER``: one job on a compute node, which reads a folder and answers there.

It needs no socket, no key and nothing of the environment but where the weights are (FEDVFM_CACHE). Killed at any line
it leaves no answer, and is given to the scheduler again; given twice, it computes twice and answers once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path

from flwr.app import RecordDict

from fedvfm import errors
from fedvfm.client.batch import spool
from fedvfm.client.training import compute
from fedvfm.client.training import site as sites
from fedvfm.data import bags, channels, partial_labels, unlabelled
from fedvfm.data import sample as samples
from fedvfm.data.partition import virtual_hospitals
from fedvfm.data.sources import table as sources
from fedvfm.flower import internals
from fedvfm.protocol import protocol
from fedvfm.runtime import logs, processes
from fedvfm.storage import storage

LOG = logging.getLogger(__spec__.name)  # this module runs as "__main__"
ALIVE_S = 5.0
MIB = 1 << 20


def main(folder: Path) -> int:
    """Compute one job; the exit code.

    Raises:
        JobError: if the folder holds no job.
        StorageError: if the answer cannot be written.
    """
    os.umask(0o077)
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched because a recipe names it
    job = spool.read(folder, spool.JOB, spool.Job, spool.MAX_JOB)
    if job is None or job.name_of_folder != folder.name:
        raise errors.JobError("batch", f"{folder}: holds no job of this name")
    if (folder / spool.RESULT).exists():  # requeued after it had answered
        return 0
    began = time.monotonic()

    def alive() -> None:
        with contextlib.suppress(errors.StorageError, errors.Interrupted):
            _require_wanted(folder)
            storage.write_text(folder / spool.ALIVE, json.dumps({"seconds": round(time.monotonic() - began, 1)}) + "\n")

    alive()
    records, word = b"", ""
    with processes.repeated(alive, ALIVE_S, "fedvfm-alive"):
        try:
            records = internals.records(computed(folder, job, began + job.seconds))
        except errors.Interrupted:
            raise
        except Exception as error:
            # As an executor logs it: no text, which may name a file or a patient.
            word = protocol.refusal(error).reason or "error"
            LOG.warning(word, extra={"fields": {"error": type(error).__name__, "told": word}})
        storage.fault_point("computed")
        _require_wanted(folder)
        spool.finish(folder, records, word)
    return 0


def _require_wanted(folder: Path) -> None:
    """Check that nobody cancelled the job: then its folder goes, and nothing of it is written again.

    Raises:
        Interrupted: if somebody did.
    """
    if (folder / spool.CANCEL).exists() or not (folder / spool.JOB).exists():
        raise errors.Interrupted("the client wants the answer no more")


def computed(folder: Path, job: spool.Job, until: float) -> RecordDict:
    """The records of the answer.

    Raises:
        DataError: if this machine sees other data than the client did.
        Interrupted: if the job was cancelled.
        FedvfmError: as training and evaluation.
    """
    from fedvfm.client import app
    from fedvfm.client.process import limits
    from fedvfm.model import device_check

    device = device_check.first(names := (job.device, *job.spare_devices))
    limits.apply(job.limits, device)
    task = spool.task(folder, job)
    site = _site(job, task, device)
    site.spare_devices, site.gpu_share = device_check.after(names, device), job.limits.gpu_memory
    looked = 0.0

    def on_step(*_: int) -> None:
        nonlocal looked
        if time.monotonic() - looked > 1.0:  # a look costs a round trip on a shared file system
            looked = time.monotonic()
            _require_wanted(folder)

    here = compute.Here(app.Models(threads=job.limits.threads), on_step)
    if job.kind == protocol.HANDSHAKE:
        return protocol.encode_hello(here.hello(site, task))
    if task.state is None:
        raise errors.ProtocolError("a job without an adapter")
    if job.kind == protocol.TRAIN:
        return protocol.encode_update(here.train(site, task, task.state, until))
    return protocol.encode_evaluation(here.evaluate(site, task, task.state, until))


def _site(job: spool.Job, task: protocol.Task, device: str) -> sites.Site:
    """The site with the splits that the client drew.

    Raises:
        DataError: if its samples are not here, or are others.
    """
    from fedvfm.model import feature_cache

    raw = sources.make(job.data, task.recipe.data)
    mapped = unlabelled.shown(raw, job.labels, task.recipe.data.class_names, without_labels=job.without_labels)
    source = bags.of(mapped, task.recipe, table=job.table == "given")
    source = partial_labels.declared(source, job.labelled, task.recipe)
    here = {each.id: each for each in source.samples()}
    parts: dict[str, tuple[samples.Sample, ...]] = {
        split: tuple(here[name] for name in names if name in here) for split, names in job.splits.items()
    }
    if spool.listing(parts) != job.listing:
        raise errors.DataError(
            "this machine sees other images, labels or patients than the client: mount the data under the same path"
        )
    hospital = virtual_hospitals.Hospital(
        job.name,
        source,
        parts.get("train", ()),
        parts.get("val", ()),
        parts.get("test", ()),
        labelled=job.labelled,
        lacking=channels.lacking(task.recipe.data, job.data),
        without_labels=job.without_labels,
    )
    cache = feature_cache.FeatureCache(job.cache_mib * MIB)
    return sites.Site(
        job.name,
        hospital,
        device,
        job.rank,
        cache,
        units=job.units,
        least_steps=job.least_steps,
        least_units=job.least_units,
    )


if __name__ == "__main__":
    _folder = Path(sys.argv[1]).absolute()
    _log = spool.open_log(_folder)
    for _number in (1, 2):
        os.dup2(_log, _number)
    with logs.output(as_json=True):
        try:
            _code = main(_folder)
        except errors.FedvfmError as _error:
            LOG.error(str(_error))
            _code = _error.exit_code
    sys.exit(_code)
