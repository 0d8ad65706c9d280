"""What computes for a site whose training runs in batch jobs: this process asks, waits, checks, and computes nothing.

The gate, its keys, policy, ledger and audit log are on this side; see :mod:`fedvfm.client.batch.spool` for the other.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flwr.app import RecordDict

from fedvfm import errors
from fedvfm.client.batch import scheduler, spool
from fedvfm.client.training import compute
from fedvfm.client.training import site as sites
from fedvfm.config import batch, schema
from fedvfm.flower import internals
from fedvfm.model import adapted_model
from fedvfm.protocol import protocol
from fedvfm.runtime import processes
from fedvfm.state import groups, state
from fedvfm.storage import storage

LOG = logging.getLogger(__name__)
LOOKS = 12
"""Every so many looks into the folder the scheduler is asked whether the job is still there."""
LATE_S = 30.0
"""Files of a job that is over may be seen so much later, where file systems keep what they know of a folder."""
LONGEST_S = 30 * 24 * 3600.0


class Jobs:
    """A site's training in jobs of a cluster; see :class:`fedvfm.client.training.compute.Compute`.

    Args:
        settings: the site's file as it was last read.
        late_s: how long an answer of a job that is over is waited for.
    """

    def __init__(self, settings: Callable[[], schema.SiteConfig], late_s: float = LATE_S) -> None:
        self._settings, self._late_s = settings, late_s
        self._model: tuple[str, adapted_model.AdaptedModel] | None = None
        self._lock: tuple[Path, object] | None = None

    @property
    def _batch(self) -> batch.BatchConfig:
        settings = self._settings().batch
        if settings is None:
            raise errors.JobError("config", "[batch] was taken out of the site's file; start the client again")
        return settings

    def shapes(self, site: sites.Site, recipe: schema.Recipe) -> adapted_model.AdaptedModel:
        """See above; without weights."""
        own = site.recipe(recipe)
        if self._model is None or self._model[0] != own.hash:
            self._model = own.hash, adapted_model.AdaptedModel(own, with_weights=False)
        return self._model[1]

    def hello(self, site: sites.Site, task: protocol.Task) -> protocol.Hello:
        """See above; the compute node says what it computes in, and must have the same model.

        Raises:
            JobError: also for a recipe of which a job does not train all that there is to train.
        """
        _require_whole(task.recipe)
        # A greeting lives for minutes: one that waits longer in the queue answers the next, while the policy lasts.
        left = site.ends[0] - time.monotonic()
        content = self._ask(protocol.HANDSHAKE, site, protocol.Task(task.recipe, task.round), left)
        given, model = protocol.decode_hello(content), self.shapes(site, task.recipe)
        own = protocol.Hello(
            site.name,
            given.backbone_sha256,
            model.manifest.fingerprint,
            model.recipe.adapter.rank,
            compute.counts(site, site.recipe(task.recipe)),
            given.backbone_config_sha256,
            given.precision,
            task.recipe.codec,
            labelled=site.labelled,
            lacking=site.lacking,
            without_labels=site.without_labels,
        )
        _require(given == own, "greets with another model or other counts than this machine knows")
        return own

    def train(self, site: sites.Site, task: protocol.Task, start: state.AdapterState, until: float) -> state.SiteUpdate:
        """See above."""
        asked = protocol.Task(task.recipe, task.round, start, correction=task.correction)
        update = protocol.decode_update(self._ask(protocol.TRAIN, site, asked, until - time.monotonic()))
        model = self.shapes(site, task.recipe)
        trained = set(model.trained(task.round))
        wanted = {spec.name: tuple(spec.shape) for spec in model.manifest if spec.name in trained}
        given = {name: array.shape for name, array in update.state.items()}
        about = (update.site, update.base_round, update.base_fingerprint)
        _require(about == (site.name, task.round - 1, start.fingerprint), "answers something else than was asked")
        _require(0 <= update.num_examples <= len(site.split("train")), "counts more examples than there are")
        _require(given == wanted, "has other arrays than the model")
        _require(all(np.isfinite(array).all() for array in update.state.values()), "has a number that is not finite")
        return update

    def beside(
        self, site: sites.Site, task: protocol.Task, own: state.AdapterState, until: float
    ) -> state.AdapterState:
        """See above; no job does so.

        Raises:
            JobError: always.
        """
        _require_whole(task.recipe)
        raise errors.JobError("batch", "no job trains beside the shared adapter")

    def evaluate(
        self, site: sites.Site, task: protocol.Task, own: state.AdapterState, until: float
    ) -> protocol.Evaluation:
        """See above."""
        asked = protocol.Task(task.recipe, task.round, own, task.split, task.surface)
        content = self._ask(protocol.EVALUATE, site, asked, until - time.monotonic())
        scores = protocol.decode_evaluation(content, inside=True)
        plain = (scores.site, scores.round, scores.acceptance, dict(scores.samples), scores.ids)
        _require(plain == (site.name, task.round, "", {}, ()), "answers something else than was asked")
        _require(scores.num_examples <= len(site.split(task.split)), "counts more examples than there are")
        return scores

    def _ask(self, kind: str, site: sites.Site, task: protocol.Task, seconds: float) -> RecordDict:
        """The answer of a job to a task.

        Raises:
            DeadlinePassed: if none comes in time; the job is cancelled.
            JobError: if jobs end without an answer, or what they answer is not of its form.
            Interrupted: if this process is asked to end; the job is cancelled.
        """
        config = self._settings()
        message = internals.records(protocol.encode_task(task))
        job = spool.Job(
            kind=kind,  # type: ignore[arg-type]
            message=hashlib.sha256(message).hexdigest(),
            name=site.name,
            data=config.data,
            labels=config.labels,
            labelled=site.labelled,
            without_labels=site.without_labels,
            table=config.table,
            splits={split: tuple(each.id for each in site.split(split)) for split in ("train", "val", "test")},
            listing=spool.listing(site.hospital.splits),
            device=config.device,
            spare_devices=config.spare_devices,
            rank=config.rank,
            units=site.units,
            least_steps=site.least_steps,
            least_units=site.least_units if site.without_labels else 1,
            cache_mib=config.cache_mib,
            limits=config.limits,
            seconds=max(1.0, min(seconds, LONGEST_S) if math.isfinite(seconds) else LONGEST_S),
        )
        place = Path(self._batch.spool)
        self._alone(place)
        clear(place, self._batch, but=job.name_of_folder)
        most = spool.ROOM_BYTES + 8 * self.shapes(site, task.recipe).manifest.parameters
        folder = spool.make(place, job, message)
        storage.fault_point("job-written")
        try:
            return _answer(folder, _Wait(self._batch, folder, job.seconds, self._late_s).result(), most)
        except errors.FedvfmError:  # asked again, it is computed again
            storage.remove_folder(folder)
            raise

    def _alone(self, place: Path) -> None:
        """Be the only process that gives jobs through a spool, as long as this one lives."""
        spool.require_private(place)
        if self._lock is None or self._lock[0] != place:
            self._lock = place, spool.only(place)


def _answer(folder: Path, result: spool.Result, most: int) -> RecordDict:
    """The records that a result names.

    Raises:
        JobError: if it is a refusal, or they are not these records.
    """
    if result.word:
        detail = f"the job answered '{result.word}'; {spool.log_of(folder)} says more"
        raise errors.JobError(result.word if result.word in protocol.ERROR_CODES else "batch", detail)
    data = spool.read_bytes(folder / f"{spool.RECORDS}{result.records}", most)
    if data is None or hashlib.sha256(data).hexdigest() != result.records:
        raise errors.JobError("batch", f"{folder}: the answer is not the one that {spool.RESULT} names")
    try:
        return internals.parse_records(data)
    except ValueError as error:
        raise errors.JobError("batch", f"{folder}: {error}") from None


class _Wait:
    """For the result of one job, given to the scheduler as often as it may be."""

    def __init__(self, settings: batch.BatchConfig, folder: Path, seconds: float, late_s: float) -> None:
        self._settings, self._folder, self._late_s = settings, folder, late_s
        self._scheduler = scheduler.Scheduler(settings)
        self._until = time.monotonic() + seconds

    def result(self) -> spool.Result:
        """See :meth:`Jobs._ask`."""
        with processes.told_to_end() as over:
            looks = 0
            while True:
                if (ended := self._ended()) is not None:
                    return ended
                if over.is_set():
                    cancel(self._folder, self._scheduler)
                    raise errors.Interrupted("asked to end; the job that was waited for is cancelled")
                if time.monotonic() > self._until:
                    began = "though the job began" if (self._folder / spool.ALIVE).exists() else "and no job began"
                    cancel(self._folder, self._scheduler)
                    raise errors.DeadlinePassed(
                        f"{self._folder}: no answer in the time of the round, {began}. Ask the coordinator for longer "
                        "rounds, or your cluster for a shorter queue"
                    )
                self._keep_going(looks)
                looks += 1
                over.wait(self._settings.poll_s)

    def _ended(self) -> spool.Result | None:
        """The result, once its records can be seen too."""
        ended = spool.read(self._folder, spool.RESULT, spool.Result)
        if ended is None:
            return None
        if ended.job != self._folder.name:
            raise errors.JobError("batch", f"{self._folder / spool.RESULT}: of another job")
        seen = not ended.records or (self._folder / f"{spool.RECORDS}{ended.records}").exists()
        return ended if seen else None

    def _keep_going(self, looks: int) -> None:
        """Give the job to the scheduler where none has it; give up where it may not be given again."""
        note = spool.read(self._folder, spool.SUBMITTED, spool.Submitted)
        if note is None:
            self._submit(1)
            return
        began = (self._folder / spool.ALIVE).exists()
        waited = time.time() - note.time
        if self._settings.queue_minutes and not began and waited > 60.0 * self._settings.queue_minutes:
            cancel(self._folder, self._scheduler)
            raise errors.JobError(
                "batch", f"{self._folder}: job {note.id} did not begin in {self._settings.queue_minutes} minutes"
            )
        if looks % LOOKS or not self._scheduler.over(note.id):
            return
        late = time.monotonic() + self._late_s
        while time.monotonic() < late:
            if self._ended() is not None:
                return
            time.sleep(min(self._settings.poll_s, 1.0))
        if note.attempt >= self._settings.attempts:
            raise errors.JobError(
                "batch",
                f"{self._folder}: {note.attempt} job{'s' * (note.attempt > 1)} ended without an answer, the last one "
                f"{note.id}. {spool.log_of(self._folder)} may say why; batch.attempts says how often it is tried",
            )
        LOG.warning(f"job {note.id} ended without an answer; it is given to the scheduler again")
        self._submit(note.attempt + 1)

    def _submit(self, attempt: int) -> None:
        (self._folder / spool.ALIVE).unlink(missing_ok=True)
        name = self._scheduler.submit(self._folder)
        storage.fault_point("job-submitted")
        spool.write(self._folder, spool.SUBMITTED, spool.Submitted(id=name, attempt=attempt, time=time.time()))
        storage.fault_point("job-noted")
        LOG.info(f"job {name} was given to the scheduler")


def cancel(folder: Path, asked: scheduler.Scheduler) -> None:
    """End a job that is wanted no more, and let its folder go."""
    note = None
    try:
        storage.write_text(folder / spool.CANCEL, "")
        note = spool.read(folder, spool.SUBMITTED, spool.Submitted)
    except errors.FedvfmError as error:
        LOG.warning(str(error))
    if note is not None and not (folder / spool.RESULT).exists():
        asked.cancel(note.id)
    storage.remove_folder(folder)


def clear(place: Path, settings: batch.BatchConfig, but: str = "") -> None:
    """Cancel and remove every job of a spool, but for the one of this name, unless it was being cancelled."""
    for folder in spool.folders(place):
        if folder.name != but or (folder / spool.CANCEL).exists():
            cancel(folder, scheduler.Scheduler(settings))


def _require_whole(recipe: schema.Recipe) -> None:
    """Whether a job trains all that a round of this recipe trains."""
    kind = recipe.personal.kind
    if kind in groups.BESIDE:
        raise errors.JobError(
            "config",
            f"recipe.personal.kind = '{kind}': is not trained in batch jobs. Take [batch] out of the site's file and "
            "run the client where it may compute, or ask the coordinator for another kind",
        )


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise errors.JobError("batch", f"what the job answered {what}; does the compute node have this release?")
