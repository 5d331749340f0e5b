"""How many tokens' K and V a layer reads of contexts of any length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LayerReads:
    """What a layer of a plan reads in a decode step, per KV head.

    Attributes:
        sets: of the sets that it attends to, by budget: tokens or fraction of the context, the least tokens of such a
            fraction, and how many of them the query heads of a KV head read, on average. None of a layer that reads
            everything.
        code_share: bytes of a token's code over those of its K and V, where the layer looks at codes.
    """

    sets: tuple[tuple[int | float, int, float], ...]
    code_share: float = 0.0

    def tokens(self, contexts: NDArray[np.integer]) -> NDArray[np.float64]:
        """Tokens read at contexts, any shape; where no set leaves any out they are read once, and no code is."""
        lengths = contexts.astype(np.float64)
        if not self.sets:
            return lengths
        read, whole = lengths * self.code_share, np.ones_like(lengths, dtype=bool)
        for budget, least, number in self.sets:
            tokens = np.maximum(np.ceil(budget * lengths), least) if isinstance(budget, float) else budget
            read += np.minimum(tokens, lengths) * number
            whole &= tokens >= lengths
        return np.where(whole, lengths, read)
