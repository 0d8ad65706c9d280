"""FedProx and Ditto: what trains is pulled to an adapter, so that it drifts less far from what all sites share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedvfm.model import adapted_model
from fedvfm.state import state


class Proximal:
    """Adds the gradient of ``mu / 2 ||w - w0||^2``.

    Args:
        optimiser: whose parameters train.
        mu: strength; with 0 nothing is kept and nothing added.
        towards: w0 of each parameter; None for the parameters as they are now.

    Source: Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020 (FedProx), eq. (2). With another
        w0: Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, alg. 1.
    """

    def __init__(
        self, optimiser: torch.optim.Optimizer, mu: float, towards: Mapping[nn.Parameter, Tensor] | None = None
    ) -> None:
        self._mu = mu
        trained = [parameter for group in optimiser.param_groups for parameter in group["params"]] if mu else []
        self._starts = [
            (parameter, parameter.detach().clone() if towards is None else towards[parameter]) for parameter in trained
        ]

    @torch.no_grad()
    def pull(self) -> None:
        """Add it to the gradients, after backward and before they are clipped.

        It is made of the parameters alone: where these are private already it costs no privacy.
        """
        for parameter, start in self._starts:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self._mu)


def places(model: adapted_model.AdaptedModel, adapter: state.AdapterState) -> dict[nn.Parameter, Tensor]:
    """Where an adapter has each parameter; the model is left with it."""
    model.write(adapter)
    return {model.parameter(name): model.parameter(name).detach().clone() for name in adapter}
