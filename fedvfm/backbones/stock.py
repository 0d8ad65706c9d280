"""What backbones on a stock ``transformers`` model share: reading weights once, freezing, modes, checkpointing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from fedvfm import errors
from fedvfm.backbones import base, weights
from fedvfm.config import schema


class Stock(base.Backbone):
    """A frozen model of ``transformers`` whose blocks are walked one by one.

    Args:
        name: as the recipe names it.
        model: the stock model.
        sha256: of its weights file.
        checkpointing: compute a block's activations again in the backward pass in place of keeping them.
    """

    def __init__(self, name: str, model: nn.Module, sha256: str, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.name, self.model, self.sha256, self.pretrained = name, model, sha256, True
        self.checkpointing = checkpointing
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Stock:
        """Only the dropout of an adapter knows a training mode: the frozen blocks always compute the same.

        DINOv3 would jitter its positions in training, others drop tokens; what is kept of the frozen blocks would not
        fit then.
        """
        super().train(False)
        self.training = mode
        for path, module in self.model.named_modules():
            if path.endswith("adapter_dropout") or "lora_dropout" in path:
                module.train(mode)
        return self

    def check_size(self, size: Sequence[int]) -> list[str]:
        """Faults of an input size (height, width)."""
        wrong = [side for side in size if side % self.patch]
        if not wrong:
            return []
        near = max(self.patch, round(wrong[0] / self.patch) * self.patch)
        return [
            f"recipe.data.input_size = {list(size)}: sides must be multiples of the patch size {self.patch}; "
            f"nearest: {near}"
        ]

    def block(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """One block, checkpointed where asked for and where a backward pass may follow.

        Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; torch's non-reentrant form.
        """
        if self.checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(module, hidden, use_reentrant=False)  # type: ignore[no-any-return]
        result: Tensor = module(hidden)
        return result


_masters: dict[tuple[str, str, str], nn.Module] = {}


def shared(identity: str, model: str, device: str, read: Callable[[], nn.Module]) -> nn.Module:
    """A copy of the module tree on the same tensors: one frozen backbone in memory, however many stand on it.

    Args:
        identity: of weights and settings.
        model: name of the class they are read into.
        device: where they lie.
        read: reads them; called where the last models were of others. Models of the same weights (an image tower and
            what stands beside it) are kept together.
    """
    key = (identity, model, device)
    if key not in _masters:
        for other in [each for each in _masters if (each[0], each[2]) != (identity, device)]:
            del _masters[other]
        _masters[key] = read().to(device)
    master = _masters[key]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*master.parameters(), *master.buffers())}
    return copy.deepcopy(master, memo)


def transformers_class(name: str | type) -> Any:
    """A class of transformers, imported where it is used; or one of ours that stands on one of theirs.

    Raises:
        ConfigError: if the installed release has no such class.
    """
    if isinstance(name, type):
        return name
    import transformers

    if not hasattr(transformers, name):
        raise errors.ConfigError(
            "backbone", [f"transformers {transformers.__version__} has no {name}; install a newer release"]
        )
    return getattr(transformers, name)


def read(
    model: str | type, located: weights.Located, settings: Any, optional: Sequence[str] = (), **arguments: Any
) -> nn.Module:
    """Stock weights into a stock class, in float32 and evaluation mode.

    Args:
        model: class name in transformers, or a class that stands on one.
        located: the weights on this machine.
        settings: the model's configuration.
        optional: arrays that may be missing.
        arguments: further arguments of the class.

    Raises:
        WeightsError: if they are damaged, or arrays are missing or of another shape.
    """
    try:
        with quiet():
            made, info = transformers_class(model).from_pretrained(
                located.folder,
                config=settings,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                **arguments,
            )
    except errors.FedvfmError:
        raise
    except Exception as error:  # damaged files, and settings that do not fit, break transformers in a dozen ways
        raise errors.WeightsError(
            f"{located.folder}: the weights cannot be read into {transformers_class(model).__name__} "
            f"({type(error).__name__}). Fetch the backbone again"
        ) from None
    missing = sorted(set(info["missing_keys"]) - set(optional))
    if missing:
        raise errors.WeightsError(
            f"{located.folder}: the weights lack {len(missing)} arrays (first: {missing[0]}). Fetch the backbone again"
        )
    made.eval()
    return made  # type: ignore[no-any-return]


Made = TypeVar("Made", bound=Stock)


def load(
    settings: schema.BackboneConfig,
    shape: Callable[[Mapping[str, Any]], tuple[str | type, Any]],
    build: Callable[..., Made],
    *,
    with_weights: bool,
    device: str,
) -> Made:
    """A frozen backbone by table name, Hugging Face name or local folder.

    Args:
        settings: what the recipe names; ``options.gradient_checkpointing`` is read.
        shape: the values of ``config.json`` -> class (or its name) and configuration of the stock model.
        build: name, stock model, sha256 and ``checkpointing`` -> the backbone.
        with_weights: False builds shapes only, on the meta device, without network.
        device: where to compute.

    Raises:
        WeightsError: if the weights are not here, damaged, or not the pinned ones.
        ConfigError: if an option has no meaning.
    """
    checkpointing = switch(settings.options, "gradient_checkpointing", settings.name)
    if with_weights:
        located = weights.locate(settings)
        with described(settings.name):
            kind, config = shape(located.config)
        model = shared(located.key, str(kind), device, lambda: read(kind, located, config))
        sha256, config_sha256 = located.sha256, located.config_sha256
    else:
        values = weights.describe(settings)
        with described(settings.name), torch.device("meta"):
            kind, config = shape(values)
            model = transformers_class(kind)(config)
        sha256, config_sha256 = weights.pinned(settings)
    with described(settings.name):
        made = build(settings.name, model, sha256, checkpointing=checkpointing)
    made.config_sha256 = config_sha256
    return made


@contextlib.contextmanager
def described(name: str) -> Iterator[None]:
    """Where a model is made of its ``config.json``: what transformers says of wrong settings is one error of ours.

    Raises:
        WeightsError: in place of what it raised.
    """
    try:
        yield
    except errors.FedvfmError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise errors.WeightsError(
            f"backbone '{name}': its config.json does not describe a model ({type(error).__name__}: {said}). Bring "
            "the one that belongs to the weights"
        ) from None


def switch(settings: Mapping[str, Any], key: str, name: str) -> bool:
    """A true-or-false option of ``recipe.backbone.options``; false where it is not given.

    Raises:
        ConfigError: if it is anything else.
    """
    value = settings.get(key, False)
    if not isinstance(value, bool):
        raise errors.ConfigError(f"backbone '{name}'", [f"options.{key} = {value!r}: give true or false"])
    return value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own bars and reports: what matters becomes an error of ours."""
    from transformers.utils import logging

    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
