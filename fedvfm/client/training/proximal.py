"""FedProx: what trains is pulled back to where the round began, so that unlike sites drift less far apart."""

from __future__ import annotations

import torch


class Proximal:
    """Adds the gradient of ``mu / 2 ||w - w0||^2``, w0 being the parameters as they are now.

    Args:
        optimiser: whose parameters train.
        mu: strength; with 0 nothing is kept and nothing added.

    Source: Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020 (FedProx), eq. (2).
    """

    def __init__(self, optimiser: torch.optim.Optimizer, mu: float) -> None:
        self._mu = mu
        trained = [parameter for group in optimiser.param_groups for parameter in group["params"]] if mu else []
        self._starts = [(parameter, parameter.detach().clone()) for parameter in trained]

    @torch.no_grad()
    def pull(self) -> None:
        """Add it to the gradients, after backward and before they are clipped.

        It is made of the parameters alone: where these are private already it costs no privacy.
        """
        for parameter, start in self._starts:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self._mu)
