"""The ClientApp: answers handshake, train and evaluate for the site this node is."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedvfm import errors
from fedvfm.client.gate import held_adapters
from fedvfm.client.training import compute
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.model import adapted_model, feature_counts
from fedvfm.protocol import codecs, envelope, protocol
from fedvfm.report import progress
from fedvfm.state import control_variates, groups, state

MODELS_HELD = 8

SiteOf = Callable[[Context], sites.Site]
Report = Callable[[str, Exception], None]
Keep = Callable[[adapted_model.AdaptedModel, sites.Site, protocol.Task, protocol.Evaluation, float], str]
"""What a site does with the final adapter and its scores until a time; answers one of ``protocol.ACCEPTANCE``."""


class Models:
    """The models of one process: one frozen backbone, and an adapted model on it for each rank in use.

    All virtual sites of a process share them; a site's adapter lives in the messages, not here. Models of a recipe that
    was not asked for lately are let go, so a run with many arms holds those of few.

    Args:
        limit: of models held at a time; the least recently used one goes first.
        recipes: held at a time; those that differ in the adapter's rank alone count as one.
        threads: CPU threads that compute; 0 takes each recipe's, where it names a number.
    """

    def __init__(self, limit: int = MODELS_HELD, threads: int = 0, recipes: int = 1) -> None:
        self.threads, self.recipes = threads, recipes
        self._limit = limit
        self._models: OrderedDict[tuple[str, str, str], adapted_model.AdaptedModel] = OrderedDict()

    def get(self, recipe: schema.Recipe, device: str) -> adapted_model.AdaptedModel:
        """The model of this recipe, built if it is not held."""
        adapter = recipe.adapter.model_copy(update={"rank": 1, "alpha": None})
        key = (recipe.model_copy(update={"adapter": adapter}).hash, recipe.hash, device)
        if key not in self._models:
            self._make_room(key[0])
            if threads := self.threads or recipe.threads:
                torch.set_num_threads(threads)
            self._models[key] = adapted_model.AdaptedModel(recipe, device=device)
        self._models.move_to_end(key)
        return self._models[key]

    def _make_room(self, coming: str) -> None:
        """Let go of what was not used for longest, until one model more, of this recipe, is not too many."""

        def full() -> bool:
            recipes = {base for base, _, _ in self._models} | {coming}
            return len(self._models) >= self._limit or len(recipes) > self.recipes

        while self._models and full():
            self._models.popitem(last=False)


def _until(message: Message, site: sites.Site) -> float:
    """When the work on a message ends: with its life or with the site's own terms, whichever is first.

    From the arrival, not from the coordinator's clock, which may differ.
    """
    return min(time.monotonic() + message.metadata.ttl, site.ends[0])


@contextlib.contextmanager
def _own_end(site: sites.Site) -> Iterator[None]:
    """Where the site's own terms ended the work, the coordinator is told so, and not that it was slow."""
    try:
        yield
    except errors.DeadlinePassed as late:
        at, word = site.ends
        if time.monotonic() < at:
            raise
        raise errors.PolicyRefused(word, str(late)) from late


def _encoded(site: sites.Site, task: protocol.Task, base: state.AdapterState, update: state.SiteUpdate) -> RecordDict:
    """The update as the recipe's codec writes it; what that loses is proposed for the next one.

    Under a mechanism the update is noised by now: all that is made of it is post-processing.

    Raises:
        TrainingError: if a number of it is not finite.
    """
    codec, recipe = task.recipe.codec, task.recipe.hash
    if codec == codecs.PLAIN:
        return protocol.encode_update(update)
    try:
        coded = codecs.encode(codec, update.state, base, site.residuals.before(recipe, site.name, task.round))
    except ValueError as error:
        raise errors.TrainingError(f"site '{site.name}', round {task.round}: {error}") from None
    site.residuals.propose(recipe, site.name, task.round, base.fingerprint, coded.residual)
    return protocol.encode_update(dataclasses.replace(update, state=coded.after), coded.difference)


def _shared(
    model: adapted_model.AdaptedModel,
    site: sites.Site,
    task: protocol.Task,
    base: state.AdapterState,
    update: state.SiteUpdate,
) -> state.SiteUpdate:
    """What leaves of an update; the personal arrays are proposed for this site's next round."""
    if not model.personal or model.recipe.personal.kind in groups.BESIDE:
        return update
    own = {name: update.state[name] for name in sorted(model.personal)}
    site.personal.propose(task.recipe.hash, site.name, task.round, base.fingerprint, own)
    shared = update.state.select(model.leaving(task.round))
    return dataclasses.replace(update, state=shared, base_fingerprint=base.fingerprint)


def make_client_app(
    site_of: SiteOf,
    built: Models | None = None,
    report: Report | None = None,
    keep: Keep | None = None,
    on_step: progress.Step = progress.no_step,
    adapters: held_adapters.Adapters | None = None,
    elsewhere: compute.Compute | None = None,
) -> ClientApp:
    """A ClientApp.

    Args:
        site_of: which site a node is.
        built: where models are kept between messages.
        report: told where an exception was and which; its text never travels.
        keep: asked what becomes of the final adapter; a virtual hospital has nobody to ask.
        adapters: that came, where a codec sends differences to them; a gate has its own.
        on_step: told after each step of training and each sample of evaluation; nothing of it travels.
        elsewhere: what computes in place of this process; a final adapter is kept from here all the same.
    """
    app = ClientApp()
    kept = built or Models()
    came = adapters or held_adapters.Adapters()
    where = elsewhere or compute.Here(kept, on_step)

    def answer(message: Message, context: Context, work: Callable[[sites.Site, protocol.Task], RecordDict]) -> Message:
        site: sites.Site | None = None
        try:
            site = site_of(context)
            task = envelope.of(message, came.find).task
            if task.state is not None and task.recipe.codec != codecs.PLAIN:
                came.keep(task.recipe.hash, task.state)
            return Message(work(site, task), reply_to=message)
        except errors.Interrupted:
            raise
        except Exception as error:
            # Whatever broke: the coordinator gets a code and a word, because any text may name files or patients.
            if report is not None:
                report(f"node {context.node_id}" if site is None else f"site '{site.name}'", error)
            return Message(protocol.refusal(error), reply_to=message)

    @app.query("handshake")
    def handshake(message: Message, context: Context) -> Message:
        def work(site: sites.Site, task: protocol.Task) -> RecordDict:
            if task.recipe.codec not in codecs.TABLE:
                raise errors.PolicyRefused("codec", codecs.TABLE.fault(task.recipe.codec))
            with _own_end(site):
                return protocol.encode_hello(where.hello(site, task))

        return answer(message, context, work)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        def work(site: sites.Site, task: protocol.Task) -> RecordDict:
            if task.state is None:
                raise errors.ProtocolError("a train message without an adapter")
            model = where.shapes(site, task.recipe)
            control_variates.require(task.correction, model.manifest, task.recipe, task.round)
            until = _until(message, site)
            before = site.cache.counts
            with _own_end(site):
                start = site.own(model, task.recipe.hash, task.state, task.round)
                beside = model.recipe.personal.kind in groups.BESIDE
                # What is lost is said before anything is trained.
                own = site.beside(model, task.recipe.hash, task.state, task.round) if beside else start
                update = where.train(site, task, start, until)
                if beside:
                    kept = dict(where.beside(site, task, own, until))
                    site.personal.propose(task.recipe.hash, site.name, task.round, task.state.fingerprint, kept)
            update = _shared(model, site, task, task.state, update)
            if site.simulated and update.metrics:  # at a real site how often is nobody else's business
                counts = feature_counts.as_metrics(site.cache.counts - before)
                update = dataclasses.replace(update, metrics={**update.metrics, **counts})
            return _encoded(site, task, task.state, update)

        return answer(message, context, work)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        def work(site: sites.Site, task: protocol.Task) -> RecordDict:
            if task.state is None:
                raise errors.ProtocolError("an evaluate message without an adapter")
            model = where.shapes(site, task.recipe)
            until = _until(message, site)
            with _own_end(site):
                own = site.own(model, task.recipe.hash, task.state, task.round + 1)
                found = where.evaluate(site, task, own, until)
                if task.final and keep is not None:
                    if elsewhere is not None:
                        model = kept.get(site.recipe(task.recipe), site.device)
                    found = dataclasses.replace(found, acceptance=keep(model, site, task, found, until))
            return protocol.encode_evaluation(found)

        return answer(message, context, work)

    return app
