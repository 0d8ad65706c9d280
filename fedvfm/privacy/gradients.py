"""The gradient of each unit (record or patient) by itself: two ways, of which one is proven before it is used.

``Loop`` computes one unit after the other and is right for every model. On a CPU it is as quick as any and needs a part
of the memory (``benchmarks/private_step.py``), so it is all there is. ``Hooks`` computes many at once, for
accelerators, with Opacus's hooks on the layers. Opacus takes the first axis of what enters a layer for the samples;
that is wrong for windows (SAM, Swin), for prompts of a mask decoder, and for a parameter that is read without a call of
its module. So hooks are used only where, on made images and with every trained number moved away from where it began,
they give what the loop gives; and the loop takes over where a step's rows do not add up.

Both looks are at images that are no site's, and no step ends for what is in one: a refusal carries no noise.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedvfm import errors
from fedvfm.privacy import base

LOOP, HOOKS = "loop", "hooks"
_CLOSE, _CLOSE_TO_ALL = 1e-3, 1e-5
_LAYER_ATTRIBUTES = ("activations", "max_batch_len", "ft_compute_sample_grad")
_proven: weakref.WeakKeyDictionary[nn.Module, dict[frozenset[int], bool]] = weakref.WeakKeyDictionary()

Units = Sequence[Sequence[Any]]
"""Each unit's samples."""


class Way(Protocol):
    """How gradients are computed.

    Attributes:
        name: "loop" or "hooks".
    """

    name: str

    def rows(self, units: Units, losses: base.Losses) -> Tensor:
        """The gradient of each unit's mean loss, all trained numbers in a row. Shapes: (U, P), float32.

        Raises:
            TrainingError: if they are not one row a unit.
        """
        ...

    def close(self) -> None:
        """Take everything out of the model again."""
        ...


class Loop:
    """One backward pass a unit. Nothing of one unit is there when the next is computed."""

    name = LOOP

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)

    def rows(self, units: Units, losses: base.Losses) -> Tensor:
        """See Way."""
        return torch.stack([self._row(unit, losses) for unit in units])

    def _row(self, unit: Sequence[Any], losses: base.Losses) -> Tensor:
        loss = losses(unit).mean()
        # Of a loss that depends on nothing that trains, torch refuses to ask.
        nothing = (None,) * len(self._parameters)
        found = torch.autograd.grad(loss, self._parameters, allow_unused=True) if loss.requires_grad else nothing
        pairs = zip(found, self._parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if one is None else one).reshape(-1).float() for one, p in pairs])

    def close(self) -> None:
        """Nothing was put in."""


class Hooks:
    """One backward pass for many units, with Opacus's hooks in the layers until ``close``.

    Where a step's rows are not those of its images, the loop computes them, and all that come after.

    Source: Opacus 1.6, ``opacus/grad_sample/grad_sample_module.py``.
    """

    name = HOOKS

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self._model, self._parameters = model, list(parameters)
        self._hooks: Any = None
        self._loop: Loop | None = None
        # Opacus looks only at layers in training mode, and frozen backbones never are. A layer that owns what trains
        # is a linear or a norm, and knows no mode; where it does, the proof finds it.
        trained = {id(one) for one in parameters}
        owners = [one for one in model.modules() if any(id(p) in trained for p in one.parameters(recurse=False))]
        self._still = [one for one in owners if not one.training]
        try:
            self._put_in()
        except BaseException:
            self.close()
            raise

    def _put_in(self) -> None:
        from opacus.grad_sample import grad_sample_module

        for module in self._still:
            module.training = True
        # Made before it is filled, so that what was put in can be taken out where filling it fails.
        self._hooks = grad_sample_module.GradSampleHooks.__new__(grad_sample_module.GradSampleHooks)
        self._hooks.__init__(self._model, loss_reduction="sum", strict=False)
        arranged = self._hooks.rearrange_grad_samples

        def contiguous(**arguments: Any) -> tuple[list[Tensor], Tensor]:
            # Opacus unfolds a convolution's input by strides of its own; of a channels-last one it gives other numbers.
            activations, backprops = arranged(**arguments)
            return [one.contiguous() for one in activations], backprops.contiguous()

        self._hooks.rearrange_grad_samples = contiguous

    def rows(self, units: Units, losses: base.Losses) -> Tensor:
        """See Way. A unit's row is the sum of its samples' rows, each weighed by one over their number."""
        if self._loop is None:
            try:
                return self.together(units, losses)
            except Exception:
                # Whatever it was, it may be of one image, such as a gradient that is not finite or too little memory;
                # what is wrong with an image itself, the loop meets again and says.
                self._loop = Loop(self._parameters)
            self.close()
        return self._loop.rows(units, losses)

    def together(self, units: Units, losses: base.Losses) -> Tensor:
        """The rows by hooks alone.

        Raises:
            TrainingError: if they are not those of the images.
        """
        owner = [number for number, unit in enumerate(units) for _ in unit]
        samples = [sample for unit in units for sample in unit]
        found = losses(samples)
        shares = torch.tensor([1.0 / len(units[number]) for number in owner], device=found.device)
        try:
            with warnings.catch_warnings():
                # Of torch: the first layer's input needs no gradient, so its hook sees that of the output alone.
                warnings.simplefilter("ignore")
                (found * shares).sum().backward()
            rows = torch.cat([self._rows_of(one, len(samples)) for one in self._parameters], dim=1)
            self._complete(rows)
        finally:
            for one in self._parameters:
                one.grad = one.grad_sample = None  # type: ignore[attr-defined]
        if len(samples) == len(units):
            return rows
        where = torch.tensor(owner, device=rows.device)
        return rows.new_zeros(len(units), rows.shape[1]).index_add_(0, where, rows)

    @staticmethod
    def _rows_of(parameter: nn.Parameter, count: int) -> Tensor:
        rows = getattr(parameter, "grad_sample", None)
        if not isinstance(rows, Tensor) or rows.shape != (count, *parameter.shape):
            shown = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise errors.TrainingError(
                f"per-sample gradients of a parameter {tuple(parameter.shape)} are {shown} for {count} images: one "
                "image's influence is not bounded"
            )
        return rows.reshape(count, -1).float()

    def _complete(self, rows: Tensor) -> None:
        """The rows sum to the gradient that autograd computes, so that no part of any image's gradient is missing."""
        whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        expected = torch.cat([one.reshape(-1).float() for one in whole])
        apart = float(torch.linalg.vector_norm(rows.sum(dim=0) - expected))
        if not apart <= _CLOSE * float(torch.linalg.vector_norm(rows)) + 1e-12:
            raise errors.TrainingError(
                f"per-sample gradients miss their sum by {apart:.3g}: they are not those of the images"
            )

    def close(self) -> None:
        """See Way. What is out already is left alone."""
        if self._hooks is not None:
            self._hooks.cleanup()
        for module in self._still:
            module.training = False
        for module in self._model.modules():
            for name in _LAYER_ATTRIBUTES:
                if name in module.__dict__:
                    delattr(module, name)


@contextlib.contextmanager
def opened(work: base.Work, *, hooks: bool | None = None) -> Iterator[Way]:
    """The quickest way that is right for this model; nothing of it stays behind.

    Args:
        work: the model, what trains, and examples for the proof.
        hooks: whether to use them where they are right; None: where they are worth it.

    Raises:
        ConfigError: if a layer mixes the samples of a batch.
        TrainingError: if no gradient reaches what trains.
    """
    wrong = faults(work.model)
    if wrong:
        raise errors.ConfigError("recipe", wrong)
    _require_gradients(work)
    wanted = worthwhile(work.parameters) if hooks is None else hooks
    way: Way = Hooks(work.model, work.parameters) if wanted and _right(work) else Loop(work.parameters)
    try:
        yield way
    finally:
        way.close()


def worthwhile(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether many units at once are quicker than one after the other: the same at every site of a kind."""
    return any(one.device.type != "cpu" for one in parameters)


def _right(work: base.Work) -> bool:
    """Whether hooks are right, proven once for a model and what trains of it."""
    known = _proven.setdefault(work.model, {})
    trained = frozenset(id(one) for one in work.parameters)
    if trained not in known:
        known[trained] = _agree(work)
    return known[trained]


def faults(model: nn.Module) -> list[str]:
    """Layers whose result for one image depends on the other images of its batch, or of earlier ones."""
    found = sorted({type(one).__name__ for one in model.modules() if _mixes(one)})
    return [
        f"recipe.privacy: the model has {name} layers, which mix the images of a batch: one image's influence cannot "
        "be bounded. Use a backbone, an adapter and a head with LayerNorm or GroupNorm"
        for name in found
    ]


def _mixes(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    return isinstance(module, nn.modules.instancenorm._InstanceNorm) and bool(module.track_running_stats)


def _require_gradients(work: base.Work) -> None:
    """Noise would hide for ever that the adapter, or the head, learns nothing. Usually one example is enough."""
    sizes = [sum(one.numel() for one in group) for group in work.groups]
    found = torch.zeros(sum(sizes), device=work.parameters[0].device)
    for one in work.examples:
        with _without_dropout(work.model):
            found += Loop(work.parameters).rows([[one]], work.losses)[0].abs()
        if not bool(torch.isfinite(found).all()):
            raise errors.TrainingError(
                f"{work.where}: of a made image a gradient is not finite; nothing was spent or sent. Lower "
                "recipe.optimiser.learning_rate"
            )
        if all(bool(share.any()) for share in torch.split(found, sizes) if len(share)):
            return
    raise errors.TrainingError(
        f"{work.where}: no gradient reaches what trains, so noise is all it would learn; nothing was spent or sent. "
        "Check recipe.adapter and the loss"
    )


def _agree(work: base.Work) -> bool:
    """Whether hooks give the loop's rows, on two made images that differ.

    Every trained number is moved first: at the start one factor of each pair is zero, and so is the gradient of the
    other, where any two ways agree.
    """
    units = [[one] for one in work.examples[:2]]
    if len(units) < 2:
        return False
    with _moved(work.parameters), _without_dropout(work.model):
        expected = Loop(work.parameters).rows(units, work.losses)
        if not bool(torch.isfinite(expected).all()) or _near(expected[:1], expected[1:], work.parameters):
            return False  # rows that are alike, or both of nought, could be mixed up unseen
        found = _by_hooks(work, units)
    return found is not None and _near(found, expected, work.parameters)


def _by_hooks(work: base.Work, units: Units) -> Tensor | None:
    """The rows, or None where hooks cannot give them."""
    hooks: Hooks | None = None
    try:
        hooks = Hooks(work.model, work.parameters)
        return hooks.together(units, work.losses)
    except Exception:
        # Opacus fails in many ways where a batch is not one of images; whatever it is, the loop is right.
        return None
    finally:
        if hooks is not None:
            hooks.close()


def _near(found: Tensor, expected: Tensor, parameters: Sequence[nn.Parameter]) -> bool:
    """Parameter by parameter and row by row; nearly nothing may miss what is nearly nothing of the whole row."""
    if not bool(torch.isfinite(found).all()):
        return False
    whole = torch.linalg.vector_norm(expected, dim=1)
    sizes = [one.numel() for one in parameters]
    for one, other in zip(torch.split(found, sizes, dim=1), torch.split(expected, sizes, dim=1), strict=True):
        apart = torch.linalg.vector_norm(one - other, dim=1)
        if bool((apart > _CLOSE * torch.linalg.vector_norm(other, dim=1) + _CLOSE_TO_ALL * whole).any()):
            return False
    return True


@contextlib.contextmanager
def _moved(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Every parameter somewhere near, and back to the last bit; the global random stream is left alone."""
    kept = [one.detach().clone() for one in parameters]
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in parameters:
            size = 0.02 + 0.1 * float(one.square().mean().sqrt())
            one.add_((size * torch.randn(one.shape, generator=stream)).to(one))
    try:
        yield
    finally:
        with torch.no_grad():
            for one, before in zip(parameters, kept, strict=True):
                one.copy_(before)


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Two ways draw different numbers for it, and would differ where both are right."""
    dropped = [one for one in model.modules() if isinstance(one, nn.modules.dropout._DropoutNd) and one.training]
    for one in dropped:
        one.eval()
    try:
        yield
    finally:
        for one in dropped:
            one.train()
