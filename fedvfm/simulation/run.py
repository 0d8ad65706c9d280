"""``simulate``: an experiment from file to report. Arms run one after another; what is finished is never run again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedvfm import errors, seeding
from fedvfm.backbones import table as backbones
from fedvfm.backbones import weights
from fedvfm.client import app as client_app
from fedvfm.client.gate import held_adapters
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data import prompts
from fedvfm.data.partition import virtual_hospitals
from fedvfm.data.sources import index
from fedvfm.model import adapted_model, feature_cache, feature_files
from fedvfm.model import device as devices
from fedvfm.report import charts, progress
from fedvfm.server.rounds import federation
from fedvfm.server.rounds import summary as summaries
from fedvfm.simulation import attacks, baselines, detail, experiment, imbalance, personal, run_folder, tables, untrained
from fedvfm.simulation.engines import worker_schedule
from fedvfm.simulation.results import examination, number_format, simulated_epsilon, site_errors, summary
from fedvfm.state import groups
from fedvfm.storage import hash_chain, storage
from fedvfm.tasks import table as tasks
from fedvfm.trust import locked_recipe

MIB = 1 << 20

Engine = Callable[
    [Sequence[federation.Job], Sequence[sites.Site], progress.Observer, schema.Experiment], client_app.Models | None
]
"""Runs or resumes every job; the models that it computed with, where they are in this process."""


@dataclass(frozen=True)
class Result:
    """What a run leaves.

    Attributes:
        path: the run folder.
        summary: the contents of summary.json.
    """

    path: Path
    summary: Mapping[str, Any] = field(repr=False)

    @property
    def metrics(self) -> Any:
        """Every value of metrics.csv (arm, round, split, site, metric, value): a frame, or rows without pandas."""
        return summary.frame(self.path / "metrics.csv")

    @property
    def samples(self) -> Any:
        """Every test sample of samples.csv (arm, site, sample, metric, value): a frame, or rows without pandas."""
        return summary.frame(self.path / "samples.csv")

    def plot(self, metric: str = "", arm: str = "federated") -> charts.Picture:
        """A chart of a value of every site over rounds; a notebook shows it, ``.save(path)`` keeps it as SVG.

        Args:
            metric: of metrics.csv, "loss" for instance; the primary metric where none is given.
            arm: whose.

        Raises:
            ConfigError: if there is no such value.
            CheckpointError: if the run has no metrics.csv.
        """
        return summary.curves(self.path / "metrics.csv", metric or str(self.summary["primary"]), arm)

    def push_to_hub(self, repository: str, **options: Any) -> dict[str, Any]:
        """Publish the final adapter; see :func:`fedvfm.push_to_hub`, whose options these are.

        Raises:
            FedvfmError: as there.
        """
        from fedvfm.inference import publication

        return publication.push_to_hub(self.path / "adapter", repository, **options)

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        return summary.as_html(self.summary)


def simulate(
    what: schema.Experiment | Mapping[str, Any] | str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    observer: progress.Observer = progress.silent,
    engine: Engine | None = None,
) -> Result:
    """Run an experiment to its report.

    Args:
        what: a bundled name, a TOML file, a table of the same values, or an Experiment.
        output: a folder that does not exist or is empty; by default ``runs/NAME-DATE``.
        observer: told of progress.
        engine: carries the messages, in place of the one that the experiment names.

    Raises:
        FedvfmError: with cause, value, limit and remedy.
    """
    prepared, shapes = prepare(what)
    run = run_folder.RunFolder(Path(output) if output else default_output(prepared.name))
    run.require_free()
    hospitals = experiment.hospitals(prepared)
    new = run.create()
    with run_folder.Lock(run.path):
        run.require_free()
        storage.sweep(run.path)
        with run.freed_unless_trained(new):
            run.write_experiment(prepared.model_dump(mode="json"))
            return _run(prepared, shapes, hospitals, run, observer, engine)


def prepare(
    what: schema.Experiment | Mapping[str, Any] | str | os.PathLike[str],
) -> tuple[schema.Experiment, adapted_model.AdaptedModel]:
    """The experiment, checked for this machine, with absolute paths; and its model on the meta device.

    Raises:
        ConfigError: with all faults at once.
    """
    if isinstance(what, str | os.PathLike):
        what = experiment.load(os.fspath(what))
    elif not isinstance(what, schema.Experiment):
        what = experiment.parse(what, "experiment")
    what = _anywhere(what)
    shapes = experiment.examine(what)
    return _with_threads(what), shapes


def resume(
    path: str | os.PathLike[str],
    *,
    observer: progress.Observer = progress.silent,
    workers: schema.Workers | None = None,
) -> Result:
    """Go on with a run that was stopped, however it was stopped.

    Args:
        path: the run folder.
        observer: told of progress.
        workers: processes that compute, in place of the experiment's.

    Raises:
        CheckpointError: if the folder is no run, or was changed.
    """
    run = run_folder.RunFolder(Path(path))
    what = experiment.parse(run.read_experiment(), str(run.experiment))
    what = what if workers is None else what.model_copy(update={"workers": workers})
    what, shapes = _with_threads(what), experiment.examine(what)
    with run_folder.Lock(run.path):
        storage.sweep(run.path)
        return _run(what, shapes, experiment.hospitals(what), run, observer)


def _with_threads(what: schema.Experiment) -> schema.Experiment:
    """The same experiment with the number of threads stated, so that every engine, and a resume, takes that one."""
    here = what.model_copy(update={"device": devices.choose(what.device)})
    return what.model_copy(update={"threads": worker_schedule.threads(here)})


def _anywhere(what: schema.Experiment) -> schema.Experiment:
    """The same experiment with absolute folders: a run may be resumed from elsewhere, under other variables."""
    what = what.model_copy(update={"data": index.resolve(what.data)})
    backbone = what.recipe.backbone
    if backbone.name not in backbones.TABLE and weights.is_folder(backbone.name):
        own = backbone.model_copy(update={"name": str(Path(backbone.name).absolute())})
        what = what.model_copy(update={"recipe": what.recipe.model_copy(update={"backbone": own})})
    return what


def _same_setup(
    run: run_folder.RunFolder, hospitals: Sequence[virtual_hospitals.Hospital], jobs: Sequence[federation.Job]
) -> None:
    """Keep which samples, rows of tables and backbone the run began with; refuse to go on with others.

    Raises:
        CheckpointError: if samples came, went or moved between splits, a row of ``recipe.inputs`` changed, an
            image came or went, or a backbone has other bytes.
    """
    members = {h.name: {split: [one.id for one in part] for split, part in h.splits.items()} for h in hospitals}
    frozen = {job.name: _frozen(job.locked) for job in jobs}
    rows = {one.id: one.inputs for h in hospitals for part in h.splits.values() for one in part if one.inputs}
    bare = [each.id for h in hospitals for part in h.splits.values() for each in part if each.without_image]
    began: dict[str, Any] = {"samples": members, "frozen": frozen} | ({"inputs": rows} if rows else {})
    began |= {"without_image": bare} if bare else {}
    found = hashlib.sha256(hash_chain.canonical(began).encode()).hexdigest()
    path = run.path / "setup.json"
    if not path.exists():
        storage.write_text(path, hash_chain.canonical({"sha256": found}) + "\n")
    elif run_folder.read_json(path, f"{path} is damaged; restore it from a backup").get("sha256") != found:
        raise errors.CheckpointError(
            f"{run.path}: samples, their splits, rows of tables or the backbone are not those this run began with. "
            "Bring them back, or start a new run with another --output"
        )


def _frozen(locked: locked_recipe.LockedRecipe) -> list[str]:
    return [locked.backbone_sha256, locked.backbone_config_sha256, locked.manifest.fingerprint]


def default_output(name: str) -> Path:
    """A new folder below ``runs/``, named after experiment and time."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    candidates = [Path("runs") / f"{name}-{stamp}", *(Path("runs") / f"{name}-{stamp}-{n}" for n in range(2, 100))]
    return next(path for path in candidates if not path.exists())


def arms(what: schema.Experiment, names: Sequence[str]) -> list[baselines.Arm]:
    """All arms of an experiment, the federated one first."""
    found = baselines.federated(what, names)
    for baseline in what.baselines:
        found += [baselines.whole(arm) for arm in tables.BASELINES.get(baseline)(what, names)]
    return [baselines.equal_steps(arm, what.server, len(names)) for arm in attacks.arms(what, found)]


def _run(
    what: schema.Experiment,
    shapes: adapted_model.AdaptedModel,
    hospitals: Sequence[virtual_hospitals.Hospital],
    run: run_folder.RunFolder,
    observer: progress.Observer,
    engine: Engine | None = None,
) -> Result:
    with (
        as_before(),
        number_format.of_run(run, what, observer),
        feature_files.of_run(run.features, what.cache_disk_mib * MIB) as files,
    ):
        engine = engine or tables.ENGINES.get(what.engine)
        return _train_and_report(what, shapes, hospitals, run, observer, engine, files)


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """The caller's own number of threads and random state are as before afterwards.

    One thread until an engine takes more: threads that once computed do not go along into a forked process.
    """
    import torch

    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def notes(what: schema.Experiment, hospitals: Sequence[virtual_hospitals.Hospital]) -> list[str]:
    """What a reader of the results must know, each sentence once."""
    names = [hospital.name for hospital in hospitals]
    planned = arms(what, names)
    rounds = {arm.group: arm.recipe.rounds for arm in planned if arm.recipe is not None}
    told = [attacks.describe(what), *(note for hospital in hospitals for note in hospital.notes)]
    told += simulated_epsilon.notes(what.recipe, len(hospitals))
    told += [baselines.fewer_rounds(rounds, what, len(hospitals)), baselines.fewer_tests(what, len(hospitals))]
    told += [
        baselines.slow_sites(what, names),
        groups.describe(what.recipe),
        prompts.describe(what.recipe.task),
        imbalance.note(what, hospitals),
        detail.note(what, hospitals),
    ]
    return [note for note in dict.fromkeys(told) if note]


def _train_and_report(
    what: schema.Experiment,
    shapes: adapted_model.AdaptedModel,
    hospitals: Sequence[virtual_hospitals.Hospital],
    run: run_folder.RunFolder,
    observer: progress.Observer,
    engine: Engine,
    files: feature_files.FeatureFiles | None,
) -> Result:
    started = time.monotonic()
    what = what.model_copy(update={"device": devices.choose(what.device)})
    hospitals = attacks.poisoned(what, hospitals)
    names = [hospital.name for hospital in hospitals]
    planned, own = arms(what, names), personal.arms(what, names)
    for note in notes(what, hospitals):
        observer("note", text=note)
    jobs, everyone = _jobs(what, run, planned, shapes), members(what, hospitals, files, run.path)
    _same_setup(run, hospitals, jobs)
    waiting = [job for job in jobs if not _done(run, job)]
    built: client_app.Models | None = None
    if waiting:
        _check_sites(what, waiting)
        with site_errors.explained(f"engine '{what.engine}'"):
            built = engine(waiting, everyone, observer, what)
    shutil.rmtree(run.residuals, ignore_errors=True)
    for arm in planned:
        if arm.recipe is None and run.evaluation(arm.name) is None:
            with site_errors.explained(f"arm '{arm.name}'"):
                run.write_evaluation(arm.name, untrained.evaluation(arm.name, what, hospitals, what.device))
    built = built or client_app.Models()
    if own:
        personal.run(what, run, jobs[0], everyone[: len(hospitals)], built, observer)
    made = summary.build(what, run, [*planned, *own], jobs[0].locked, time.monotonic() - started, hospitals)
    made |= _benefit(run, made, hospitals)
    for text in examination.headlines(made):
        observer("note", text=f"Attention: {text}")
    if summary.too_small(made):
        observer("note", text=summary.too_small(made))
    personal.write_sites(run, jobs[0], everyone[: len(hospitals)], built)
    model = built.get(jobs[0].locked.recipe, what.device)
    _finish(what, hospitals, run, model, made, observer, everyone)
    return Result(run.path, made)


def _benefit(
    run: run_folder.RunFolder, made: Mapping[str, Any], hospitals: Sequence[virtual_hospitals.Hospital]
) -> dict[str, Any]:
    """``benefit`` of the summary, where there are personal adapters."""
    from fedvfm.simulation.results import benefit, compare

    table = benefit.build(run, made, compare.scores(run, made, compare.patients_of(hospitals)))
    return {"benefit": table} if table else {}


def _done(run: run_folder.RunFolder, job: federation.Job) -> bool:
    """Whether an arm is finished.

    Raises:
        CheckpointError: if it was finished under another recipe: the experiment in the folder was changed since.
    """
    found = run.evaluation(job.name)
    if found is None:
        return False
    if found.get("recipe") != job.locked.recipe.hash:
        raise errors.CheckpointError(
            f"{run.experiment} was changed after arm '{job.name}' was finished (recipe "
            f"{str(found.get('recipe'))[:12]}, "
            f"now {job.locked.recipe.hash[:12]}). Run the changed experiment into another folder"
        )
    return True


def _check_sites(what: schema.Experiment, jobs: Sequence[federation.Job]) -> None:
    """A federation of no sites cannot be."""
    for job in jobs:
        if not job.train_sites:
            raise errors.PartitionError(f"arm '{job.name}' of experiment '{what.name}' has no site to train at")


def _jobs(
    what: schema.Experiment,
    run: run_folder.RunFolder,
    planned: Sequence[baselines.Arm],
    shapes: adapted_model.AdaptedModel,
) -> list[federation.Job]:
    """The arms that train. Arms of one recipe share its lock: 64 local-only arms build one model, not 64."""
    locked = {what.recipe.hash: locked_here(shapes)}
    jobs = []
    for arm in planned:
        if arm.recipe is not None:
            if arm.recipe.hash not in locked:
                locked[arm.recipe.hash] = locked_here(adapted_model.AdaptedModel(arm.recipe, with_weights=False))
            jobs.append(_job(what, run, arm, locked[arm.recipe.hash]))
    return jobs


def locked_here(shapes: adapted_model.AdaptedModel) -> locked_recipe.LockedRecipe:
    """A recipe locked to the weights that are on this machine, which are not loaded."""
    locked = shapes.locked()
    if not shapes.backbone.pretrained:
        return locked
    here = weights.locate(shapes.recipe.backbone)
    return locked.model_copy(update={"backbone_sha256": here.sha256, "backbone_config_sha256": here.config_sha256})


def _job(
    what: schema.Experiment, run: run_folder.RunFolder, arm: baselines.Arm, locked: locked_recipe.LockedRecipe
) -> federation.Job:
    return federation.Job(
        name=arm.name,
        locked=locked,
        folder=run.arm(arm.name),
        train_sites=arm.train_sites,
        test_sites=arm.test_sites,
        server=baselines.server_of(arm, what.server),
        per_sample=True,
        # Under a mechanism no round is chosen by what its scores say; of personal arrays the last few are kept.
        test_best=arm.test_best
        and not simulated_epsilon.is_private(locked.recipe)
        and locked.recipe.personal.kind in (groups.NONE, *groups.BESIDE),
        simulated=True,
        primary=tasks.TABLE.get(locked.recipe.task.kind)(locked.recipe).primary,
        machine={"threads": worker_schedule.threads(what)},
        site_times=what.site_times,
    )


def shared_files(path: Path, what: schema.Experiment) -> feature_files.FeatureFiles | None:
    """Files of features as another process of the run sees them, None where it keeps none.

    Args:
        path: the run folder.
        what: the experiment.
    """
    limit = what.cache_disk_mib * MIB
    return feature_files.FeatureFiles(run_folder.RunFolder(path).features, limit) if limit else None


def members(
    what: schema.Experiment,
    hospitals: Sequence[virtual_hospitals.Hospital],
    files: feature_files.FeatureFiles | None = None,
    run: Path | None = None,
) -> list[sites.Site]:
    """The sites of a simulation: one a hospital, and the one that pools them all. They share one cache.

    Args:
        what: the experiment.
        hospitals: its hospitals.
        files: shared with other processes of the run.
        run: the run folder, where what coding an update lost outlives the process; None to keep it in memory.
    """
    place = None if run is None else run_folder.RunFolder(run)
    residuals = held_adapters.Residuals(None if place is None else place.residuals, at_once=True)
    cache = feature_cache.FeatureCache(what.cache_mib * MIB, files, files_first=True)
    everyone = [*hospitals, virtual_hospitals.pooled(hospitals)]
    device = devices.choose(what.device)
    return [
        sites.Site(
            hospital.name,
            hospital,
            device,
            what.site_ranks.get(hospital.name, 0),
            cache,
            simulated=True,
            residuals=residuals,
            personal=held_adapters.PersonalArrays(
                None if place is None else place.personal_arrays(hospital.name), at_once=True
            ),
            pace=what.site_pace.get(hospital.name, 0.0),
        )
        for hospital in everyone
    ]


def _finish(
    what: schema.Experiment,
    hospitals: Sequence[virtual_hospitals.Hospital],
    run: run_folder.RunFolder,
    model: adapted_model.AdaptedModel,
    made: Mapping[str, Any],
    observer: progress.Observer,
    everyone: Sequence[sites.Site],
) -> None:
    """Write what is derived from the arms: tables, adapter, summary, report."""
    from fedvfm.inference import export
    from fedvfm.simulation.results import compare, pictures, report
    from fedvfm.state import checkpoint

    adapter, _, _ = checkpoint.read(run.path / "adapter.safetensors")
    if adapter.fingerprint != made["fingerprint"]:
        raise errors.CheckpointError(
            f"{run.path / 'adapter.safetensors'} is not the adapter that was tested. Restore it from a backup"
        )
    model.write(adapter)
    summary.write_tables(run, made)
    note = ". ".join(filter(None, (what.note, groups.describe(model.recipe))))
    export.save(model, run.path / "adapter", made, note=note)
    ranked = examination.worst_first(compare.samples_of(run, compare.FEDERATED))
    members, rng = everyone[: len(hospitals)], seeding.stream(what.recipe.seed, "report")

    def use(site: sites.Site) -> None:
        if model.personal:
            model.write(site.own(model, model.recipe.hash, adapter, made["rounds"] + 1))

    shown = pictures.examples(model, members, rng, ranked, use)
    storage.write_text(run.summary, summaries.as_json(made) + "\n")
    compare.write_groups(run, hospitals)
    # The report states the recipe that was trained: with what the backbone decides.
    report.write(run, what.model_copy(update={"recipe": model.recipe}), hospitals, made, shown)
    observer("note", text=f"report: {run.path / 'report.html'}")
