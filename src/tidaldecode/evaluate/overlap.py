"""How much of one text another one says, and how much a text says again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

NGRAM = 8
_LOOP, _TIMES = 32, 3


def words(text: str) -> list[str]:
    """Letters and digits, lower case; everything else parts words."""
    return re.findall(r"\w+", text.lower())


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, 0 to 1 (ROUGE-L, Lin 2004, without stemming)."""
    said, right = words(text), words(reference)
    lengths = [0] * (len(right) + 1)  # of the longest common subsequence with each beginning of the reference
    for word in said:
        before = 0
        for place, other in enumerate(right, 1):
            longest = before + 1 if word == other else max(lengths[place], lengths[place - 1])
            before, lengths[place] = lengths[place], longest
    return _f1(lengths[-1], said, right)


def token_f1(text: str, reference: str) -> float:
    """F1 of the words that both say, in any order, 0 to 1 (SQuAD's, articles left in)."""
    said, right = words(text), words(reference)
    return _f1((Counter(said) & Counter(right)).total(), said, right)


def _f1(common: int, said: Sequence[str], right: Sequence[str]) -> float:
    return 2 * common / (len(said) + len(right)) if common else float(not said and not right)


def repetition(token_ids: Sequence[int]) -> float:
    """Share of the runs of 8 tokens that came before in the same text, 0 to 1; 0 of a text that is shorter."""
    runs = [tuple(token_ids[start : start + NGRAM]) for start in range(len(token_ids) - NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def loops(token_ids: Sequence[int]) -> bool:
    """Whether a text ends in one stretch said three times or more in a row, over 32 tokens at least."""
    for period in range(1, len(token_ids) // _TIMES + 1):
        tail = token_ids[-max(_LOOP, _TIMES * period) :]
        if len(tail) >= _LOOP and tail[period:] == tail[:-period]:
            return True
    return False
