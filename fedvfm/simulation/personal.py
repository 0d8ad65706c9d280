"""The arm ``personal``: after the last round every virtual hospital trains on for itself and chooses.

What a site computes is :mod:`fedvfm.client.personal.tuning`, the code of a real site; here it is handed the adapters
that lie in the run folder, and what it makes is kept there. A site is finished or not begun; sites compute side by
side.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import threadpoolctl
import torch
from flwr.app import Context, Message, RecordDict

from fedvfm import errors
from fedvfm.aggregators import table as rules
from fedvfm.client import app as client_app
from fedvfm.client.personal import tuning
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.flower import internals
from fedvfm.inference import export
from fedvfm.protocol import protocol
from fedvfm.report import progress, quantity
from fedvfm.server.rounds import federation, handshake, journal
from fedvfm.simulation import baselines, run_folder
from fedvfm.simulation.engines import in_process, worker_schedule, workers
from fedvfm.simulation.results import site_errors
from fedvfm.state import checkpoint, factors, groups, state
from fedvfm.storage import hash_chain, storage

GROUP = "personal"


def arms(what: schema.Experiment, names: Sequence[str]) -> list[baselines.Arm]:
    """A part of the arm for each site; none where the experiment says so, or has nothing to compare them with."""
    said = what.personal.enabled
    wanted = "local-only" in what.baselines if said is None else said
    return [baselines.personal(what, name) for name in baselines.labelled(what, names)] if wanted else []


def run(
    what: schema.Experiment,
    place: run_folder.RunFolder,
    job: federation.Job,
    members: Sequence[sites.Site],
    built: client_app.Models,
    observer: progress.Observer,
) -> None:
    """Compute what is not there yet.

    Args:
        what: the experiment.
        place: the run folder, with the arms of the federation and of each site alone.
        job: of the federated arm.
        members: the sites, without the one that pools them all.
        built: models of this process.
        observer: told of progress.

    Raises:
        FedvfmError: what stopped a site.
    """
    phase = _Phase(what, place, job, members, built)
    waiting = [site for site in members if not site.without_labels and not phase.done(site)]
    if not waiting:
        return
    rounds = tuning.rounds_of(job.locked.recipe, what.personal)
    who, long = quantity.of(len(waiting), "site trains", "sites train"), quantity.of(rounds, "round")
    observer("note", text=f"personal adapters: {who} on for {long}, then the choice")
    with threadpoolctl.threadpool_limits(limits=1, user_api="blas"):
        number, _ = worker_schedule.count(what, len(waiting), lambda: built.get(job.locked.recipe, what.device))
        if number > 1:
            try:
                phase.side_by_side(number, waiting, observer)
                return
            except workers.CannotCompute as error:
                observer("note", text=f"1 worker: {error}")
        phase.in_turn(waiting, observer)


def write_sites(
    place: run_folder.RunFolder, job: federation.Job, members: Sequence[sites.Site], built: client_app.Models
) -> None:
    """``sites/NAME/``: the final adapter with each site's own arrays, where the recipe has personal ones.

    Raises:
        CheckpointError: if adapter or personal arrays are damaged.
    """
    recipe = job.locked.recipe
    if recipe.personal.kind == groups.NONE:
        return
    adapter, rule = checkpoint.read(job.folder / "adapter.safetensors")[0], rules.make(recipe.aggregation)
    for site in members:
        model = built.get(site.recipe(recipe), site.device)
        model.write(site.beside(model, recipe.hash, rule.for_site(adapter, model.manifest), recipe.rounds + 1))
        note = f"Of virtual hospital '{site.name}', with what it keeps for itself ({recipe.personal.kind})"
        if groups.bare(recipe):
            model, note = model.without_mechanism(), f"{note}. {groups.BARE}"
        export.save(model, place.path / "sites" / site.name, {"experiment": job.name}, note=note)


@dataclass(frozen=True)
class _Phase:
    """All sites of a run, each with its own folder; see :func:`run`."""

    what: schema.Experiment
    place: run_folder.RunFolder
    job: federation.Job
    members: Sequence[sites.Site]
    built: client_app.Models

    def name(self, site: sites.Site) -> str:
        """Of the site's part of the arm."""
        return f"{GROUP}/{site.name}"

    def done(self, site: sites.Site) -> bool:
        """Whether the site is finished.

        Raises:
            CheckpointError: if it was finished from another adapter or with other settings.
        """
        kept = self.place.evaluation(self.name(site))
        if kept is None:
            return False
        if kept.get("start") != self._settings():
            raise errors.CheckpointError(
                f"{self.place.experiment} was changed after arm '{self.name(site)}' was finished. Run the changed "
                "experiment into another folder"
            )
        return True

    def _settings(self) -> dict[str, Any]:
        return {"recipe": self.job.locked.recipe.hash, **self.what.personal.model_dump(mode="json")}

    def in_turn(self, waiting: Sequence[sites.Site], observer: progress.Observer) -> None:
        """One site after another, in this process."""
        threads = worker_schedule.threads(self.what)
        self.built.threads = threads
        torch.set_num_threads(threads)
        steps = in_process.Steps(observer)
        for site in waiting:
            steps.about = self._about(site)
            with site_errors.explained(f"arm '{self.name(site)}'"):
                self.compute(site, steps)

    def side_by_side(self, number: int, waiting: Sequence[sites.Site], observer: progress.Observer) -> None:
        """In ``number`` workers, the site with most images first."""
        places = {site.name: place for place, site in enumerate(self.members)}
        contexts = in_process.contexts(len(self.members))
        pool = workers.Pool(number, lambda index: self._prepare(number, index), self._app, contexts, observer)
        orders = []
        with pool.working():
            for site in waiting:
                node = in_process.FIRST_NODE + places[site.name]
                message = Message(RecordDict(), node, protocol.TRAIN, group_id="0")
                internals.set_message_id(message, self.name(site))
                rank = (-float(len(site.split("train"))), float(places[site.name]))
                body = workers.Body(internals.body(message.content))
                orders.append(workers.Order(rank, node, internals.head(message), body, self._about(site), []))
                pool.submit(orders[-1])
            pool.serve(lambda: all(order.reply for order in orders))

    def _prepare(self, number: int, index: int) -> None:
        in_process.become_worker(self.members, self.built, self.what, number, index)

    def _about(self, site: sites.Site) -> dict[str, Any]:
        return {"arm": self.name(site), "round": self.job.rounds + 1, "phase": "train", "site": site.name}

    def _app(self, report: client_app.Report, on_step: progress.Step) -> Callable[[Message, Context], Message]:
        """What answers in a worker: the site computes, and writes its own folder."""

        def answer(message: Message, context: Context) -> Message:
            internals.be_server_task(in_process.RUN_ID)
            site = self.members[int(context.node_config["partition-id"])]
            with site_errors.explained(f"arm '{self.name(site)}'"):
                self.compute(site, on_step)
            return Message(RecordDict(), reply_to=message)

        return answer

    def compute(self, site: sites.Site, on_step: progress.Step) -> None:
        """One site, from the adapters in the run folder to its own folder."""
        recipe, began = self.job.locked.recipe, time.monotonic()
        model = self.built.get(site.recipe(recipe), site.device)
        shared, own = self._adapter("federated", site), self._adapter(f"local-only/{site.name}", site)
        if shared is None:
            raise errors.CheckpointError(f"{self.place.path}: the federated adapter is missing. Restore it")
        partial = site.beside(model, recipe.hash, shared, recipe.rounds + 1)
        trained = tuning.train(model, site, partial, self.what.personal, recipe.rounds, on_step=on_step)
        beside = recipe.personal.kind in groups.BESIDE
        offered = tuning.candidates(shared, trained.adapter, own, partial, beside=beside)
        chosen = tuning.choose(model, site, offered)
        tests = {
            adapter.fingerprint: tuning.evaluate(model, site, adapter, "test")
            for adapter in {trained.adapter, chosen.adapter}
        }
        self._keep(site, trained, chosen, tests, began)

    def _adapter(self, arm: str, site: sites.Site) -> state.AdapterState | None:
        """An arm's last adapter in the site's own rank, None where the arm did not run."""
        path = self.place.arm(arm) / "adapter.safetensors"
        if not path.exists():
            return None
        rule = rules.make(self.job.locked.recipe.aggregation)
        rank = site.rank or self.job.locked.recipe.adapter.rank
        adapter = factors.completed(checkpoint.read(path)[0], self.job.locked.adapter)
        return rule.for_site(adapter, handshake.at_rank(self.job.locked.manifest, rank))

    def _keep(
        self,
        site: sites.Site,
        trained: tuning.Trained,
        chosen: tuning.Chosen,
        tests: dict[str, protocol.Evaluation],
        began: float,
    ) -> None:
        """Write the site's folder, what marks it as finished last."""
        place, recipe = self.place.arm(self.name(site)), self.job.locked.recipe
        shutil.rmtree(place, ignore_errors=True)
        storage.make_private(place)
        rounds = recipe.rounds + len(trained.rounds)
        lines = hash_chain.Chain(place / "journal.jsonl")
        for number, (metrics, fingerprint) in enumerate(trained.rounds, recipe.rounds + 1):
            about: dict[str, Any] = {"round": number, "cohort": [site.name], "fingerprint": fingerprint}
            about |= {"examples": {site.name: len(site.split("train"))}, "train": {site.name: dict(metrics)}}
            lines.append({**about, "validation": {}})
        checkpoint.write(place / "adapter.safetensors", chosen.adapter, {"round": str(rounds), "recipe": recipe.hash})
        values = {
            "round": rounds,
            "fingerprint": chosen.adapter.fingerprint,
            "recipe": recipe.hash,
            "start": self._settings(),
            "choice": chosen.choice.to_json(),
            "last": federation.as_record({site.name: tests[chosen.adapter.fingerprint]}),
            "personal": federation.as_record({site.name: tests[trained.adapter.fingerprint]}),
            "bytes": {"up": 0, "down": 0},
            "seconds": round(time.monotonic() - began, 3),
            "ended": round(time.time(), 3),
            "peak_mib": journal.peak_mib(),
            **({"prompt": recipe.task.oracle} if recipe.task.oracle else {}),
        }
        self.place.write_evaluation(self.name(site), values)
