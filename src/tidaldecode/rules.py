"""Rules of choice: whose scores choose the tokens of an index set (DESIGN, "Selection, exactly").

With `s[h, t]` the scaled scores of a layer's query heads and `p[h] = softmax(s[h])`, the importance of token `t` to a
set is the mean of `p[h, t]` over the query heads that share the set. The heads share the sets evenly, in order: so a
rule is how many sets there are, in PyTorch and in the kernels, and a new one is one `Rule` in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """One rule of choice.

    Attributes:
        name: in plans, in results and on the command line.
        num_sets: index sets of a layer, from its query heads and its KV heads; a divisor of the former.
        by_scores: with a set for each query head: the importance is `s[h, t]` itself, which orders tokens as `p[h, t]`
            does and needs no softmax.
    """

    name: str
    num_sets: Callable[[int, int], int]
    by_scores: bool = False

    def importance(self, scores: Tensor, probabilities: Tensor) -> Tensor:
        """Importance of each token to each set, from scores and probabilities [n, Hkv, G, T]: [n, S, T]."""
        if self.by_scores:
            return scores.flatten(1, 2)
        steps, kv_heads, group, tokens = probabilities.shape
        sets = self.num_sets(kv_heads * group, kv_heads)
        return probabilities.reshape(steps, sets, kv_heads * group // sets, tokens).mean(2)


UNIFIED = Rule("unified", lambda heads, kv_heads: 1)
PER_GROUP = Rule("per_group", lambda heads, kv_heads: kv_heads)
PER_HEAD = Rule("per_head", lambda heads, kv_heads: heads, by_scores=True)

RULES = {rule.name: rule for rule in (UNIFIED, PER_GROUP, PER_HEAD)}
"""All rules, by name: all query heads together, those of a KV head together, and each for itself (the paper)."""


def known(name: str) -> str:
    """The name of a rule, as it is.

    Raises:
        ValueError: there is no rule of that name.
    """
    if name not in RULES:
        *others, last = (repr(rule) for rule in reversed(RULES))
        raise ValueError(f"Input should be {', '.join(others)} or {last}")
    return name
