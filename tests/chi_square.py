"""Pearson's chi-square test of counts against a distribution, with PyTorch's incomplete gamma function."""

from __future__ import annotations

import torch
from torch import Tensor


def p_value(counts: Tensor, expected: Tensor) -> float:
    """Probability of counts at least as far from what is expected, [C] each; cells that expect under 5 are one."""
    rare = expected < 5
    cells = [torch.cat([part[~rare].double(), part[rare].sum().double()[None]]) for part in (counts, expected)]
    observed, wanted = (part[cells[1] > 0] for part in cells)
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor(len(observed) - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))
