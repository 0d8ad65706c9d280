"""The ClientApp: answers handshake, train and evaluate for the site this node is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedvfm import config as configs
from fedvfm import errors, protocol
from fedvfm.client import evaluator, trainer
from fedvfm.client import model as models
from fedvfm.client import site as sites

SiteOf = Callable[[Context], sites.Site]
Report = Callable[[str, Exception], None]


class Models:
    """The models of one process: one frozen backbone, and the adapted model last used.

    All virtual sites of a process share it; a site's adapter lives in the messages, not here.
    """

    def __init__(self) -> None:
        self._key: str | None = None
        self._model: models.AdaptedModel | None = None

    def get(self, recipe: configs.Recipe, device: str) -> models.AdaptedModel:
        """The model of this recipe, built if it is another than the last one."""
        key = f"{recipe.hash}:{device}"
        if self._model is None or self._key != key:
            self._model = None
            torch.set_num_threads(recipe.threads)
            self._model, self._key = models.AdaptedModel(recipe, device=device), key
        return self._model


def no_site(context: Context) -> sites.Site:
    """The site of a node that was given none.

    Raises:
        ConfigError: always; a node without data must refuse, not answer.
    """
    raise errors.ConfigError("client", ["this node was given no site; use: fedvfm simulate EXPERIMENT"])


def make_client_app(site_of: SiteOf, built: Models | None = None, report: Report | None = None) -> ClientApp:
    """A ClientApp.

    Args:
        site_of: which site a node is.
        built: where models are kept between messages.
        report: told of an exception at the site; its text never travels.
    """
    app = ClientApp()
    kept = built or Models()

    def answer(message: Message, context: Context, work: Callable[[sites.Site, protocol.Task], RecordDict]) -> Message:
        try:
            site = site_of(context)
            return Message(work(site, protocol.decode_task(message.content)), reply_to=message)
        except errors.FedvfmError as error:
            if report is not None:
                report(str(context.node_id), error)
            return Message(protocol.refusal(error), reply_to=message)

    @app.query("handshake")
    def handshake(message: Message, context: Context) -> Message:
        def work(site: sites.Site, task: protocol.Task) -> RecordDict:
            recipe = site.recipe(task.recipe)
            model = kept.get(recipe, site.device)
            counts = {split: len(site.split(split)) for split in ("train", "val", "test")}
            fingerprint = model.manifest.fingerprint
            return protocol.encode_hello(
                protocol.Hello(site.name, model.backbone.sha256, fingerprint, recipe.adapter.rank, counts)
            )

        return answer(message, context, work)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        def work(site: sites.Site, task: protocol.Task) -> RecordDict:
            if task.state is None:
                raise errors.ProtocolError("a train message without an adapter")
            model = kept.get(site.recipe(task.recipe), site.device)
            return protocol.encode_update(trainer.train(model, site, task.state, task.round))

        return answer(message, context, work)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        def work(site: sites.Site, task: protocol.Task) -> RecordDict:
            if task.state is None:
                raise errors.ProtocolError("an evaluate message without an adapter")
            model = kept.get(site.recipe(task.recipe), site.device)
            return protocol.encode_evaluation(evaluator.evaluate(model, site, task.state, task))

        return answer(message, context, work)

    return app
