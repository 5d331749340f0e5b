"""How much a unit of lost attention mass costs in each layer, by what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_RIDGE = 0.3  # how strongly the weights hold on to their common mean, in units of lost mass


def fitted_weights(lost: Sequence[Tensor], losses: Sequence[float]) -> Tensor:
    """Weights of the layers that let expect the losses: ridge regression towards their common mean, none negative.

    Args:
        lost: the mass that each layer loses under a plan, [L], of at least one plan.
        losses: what the plans lose, finite.

    Returns:
        [L], float64.
    """
    features, measured = torch.stack([mass.double() for mass in lost]), torch.tensor(losses, dtype=torch.float64)
    mean = float(measured.sum() / features.sum().clamp(min=1e-9))
    size = features.shape[1]
    rows = torch.cat([features, _RIDGE * torch.eye(size, dtype=torch.float64)])
    wanted = torch.cat([measured - features.sum(1) * mean, measured.new_zeros(size)])
    change = torch.linalg.lstsq(rows, wanted[:, None]).solution[:, 0]
    return (change + mean).clamp(min=0.1 * mean)
