"""SCAFFOLD at a site: what the coordinator sends is added to the gradient of every step."""

from __future__ import annotations

import torch

from fedvfm.model import adapted_model
from fedvfm.state import state


class Correction:
    """Adds ``c - c_i`` to the gradients; see :mod:`fedvfm.state.control_variates`.

    Args:
        model: whose parameters train.
        arrays: the correction by name; None adds nothing.
    """

    def __init__(self, model: adapted_model.AdaptedModel, arrays: state.AdapterState | None) -> None:
        values = {name: torch.tensor(array, device=model.device) for name, array in (arrays or {}).items()}
        self._rows = [(model.parameter(name), value) for name, value in values.items()]

    @torch.no_grad()
    def add(self) -> None:
        """Add it, after the gradients were clipped; a parameter that no gradient reached is moved too."""
        for parameter, value in self._rows:
            if parameter.grad is None:
                parameter.grad = value.to(parameter.dtype, copy=True)
            else:
                parameter.grad.add_(value)
