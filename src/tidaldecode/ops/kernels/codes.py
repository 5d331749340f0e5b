"""Choosing by codes of keys, which are scored instead of K."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tidaldecode.ops.kernels.code_scores import score, turned_query
from tidaldecode.ops.kernels.importance import write_importance
from tidaldecode.ops.kernels.scores import Scores
from tidaldecode.ops.kernels.select import Choosing, tables_by_rule
from tidaldecode.ops.rounds import pair_of, tile_of
from tidaldecode.ops.values import KV, Choice
from tidaldecode.rules import RULES


def choose_by_codes(
    query: Tensor,
    kv: KV,
    scale: float,
    selections: Sequence[str],
    choice: Choice,
    capacity: int,
    indices: Tensor,
) -> None:
    """As `reference.choose_by_codes`; ties as in `full_attention_with_selection`."""
    codes = kv.codes
    assert codes is not None
    tables = tables_by_rule(indices, selections, query.shape[1], kv.k.shape[2])
    pair = pair_of(codes.packed.shape[3], query.shape[1] // kv.k.shape[2])
    choosing = Choosing(query, kv, choice, capacity, tile_of(pair), list(tables.values()), pair)
    turned = turned_query(query, codes)
    for turn in range(choosing.scores.rounds.number):
        score(*turned, kv, codes, scale, choosing.scores, turn)
        choosing.choose(turn, kv.lengths)


def importance_by_codes(query: Tensor, kv: KV, scale: float, selections: Sequence[str], importance: Tensor) -> None:
    """As `reference.importance_by_codes`."""
    codes = kv.codes
    assert codes is not None
    tables = tables_by_rule(importance, selections, query.shape[1], kv.k.shape[2])
    pair = pair_of(codes.packed.shape[3], query.shape[1] // kv.k.shape[2])
    none = torch.zeros_like(kv.lengths)  # none is short
    scores = Scores.room(
        query,
        kv,
        none,
        importance.shape[2],
        tile=tile_of(pair),
        sets=1,
        counts=0,
        more_bytes=0,
        coded=True,
        pair=pair,
    )
    turned = turned_query(query, codes)
    for turn in range(scores.rounds.number):
        score(*turned, kv, codes, scale, scores, turn)
        for rule, sets in tables.items():
            write_importance(scores, turn, sets, as_scores=RULES[rule].by_scores)
