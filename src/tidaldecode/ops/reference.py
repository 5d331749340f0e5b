"""The operations in plain PyTorch: the definition of what is correct.

One sequence at a time, so that ragged lengths need neither masks nor padding, but for sequences that share their
blocks; a contiguous cache is read through views, never copied. Scores and softmax are computed in float32 (float64 for
float64 inputs). Shapes as in `tidaldecode.ops`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from tidaldecode.ops.codes import decode, turned_query, write_codes
from tidaldecode.ops.values import KV, Choice
from tidaldecode.rules import RULES


def full_attention(query: Tensor, kv: KV, scale: float) -> Tensor:
    """Attention of one new token per sequence over its whole cache: `softmax(scale · q · Kᵀ) · V`.

    Args:
        query: [B, Hq, D], of the last token of each sequence, whose K and V are already in the cache.
        kv: the cache.
        scale: factor of the scores, usually `D ** -0.5`.

    Returns:
        [B, Hq, D], dtype of `query`; zeros for a sequence of length 0.
    """
    output = torch.zeros_like(query)
    for b, length in enumerate(kv.lengths.tolist()):
        keys = _rows(kv.k, kv.block_table[b], length)
        probabilities = _grouped_scores(query[b], keys, scale).softmax(-1)
        output[b] = _weigh(probabilities, _rows(kv.v, kv.block_table[b], length))
    return output


def full_attention_with_importance(
    query: Tensor, kv: KV, scale: float, selections: Sequence[str], importance: Tensor
) -> Tensor:
    """Full attention that also returns how important each cached token is, by one or more of `tidaldecode.rules`.

    Args:
        query, kv, scale: as for `full_attention`.
        selections: names of the rules whose importances are wanted, in order.
        importance: [B, S, T], float32 or float64, written; T is at least the longest length, and S adds up the index
            sets of each rule. Entries past a sequence's length are undefined.

    Returns:
        [B, Hq, D], the output of `full_attention`.
    """
    output = torch.empty_like(query)
    num_heads, num_kv_heads, dim = query.shape[1], kv.k.shape[2], query.shape[2]
    for run, length in _runs(kv.block_table, kv.lengths, num_heads):
        grouped = query[run].view(-1, num_kv_heads, num_heads // num_kv_heads, dim).transpose(0, 1)  # [Hkv, n, G, D]
        scores = _grouped_scores(grouped.reshape(-1, dim), _rows(kv.k, kv.block_table[run.start], length), scale)
        if len(grouped[0]) > 1:
            past = torch.arange(length, device=query.device) >= kv.lengths[run, None]  # [n, T]
            scores.view(*grouped.shape[:3], length).masked_fill_(past[:, None], -torch.inf)
        probabilities = scores.softmax(-1)  # [Hkv, n · G, T]
        outputs = _weigh(probabilities, _rows(kv.v, kv.block_table[run.start], length))
        output[run] = outputs.view(grouped.shape).transpose(0, 1).flatten(1, 2)
        split = (part.view(*grouped.shape[:3], length).transpose(0, 1) for part in (scores, probabilities))
        scores, probabilities = split  # [n, Hkv, G, T]
        importance[run, :, :length] = torch.cat(
            [RULES[rule].importance(scores, probabilities) for rule in selections], 1
        )
    return output


_RUN = 2**20  # scores that are computed at once


def _runs(block_table: Tensor, lengths: Tensor, num_heads: int) -> Iterator[tuple[slice, int]]:
    """Sequences one by one, or, where neighbours share their blocks, a few at once, with the longest length.

    Decode steps of one sequence share them, and one matrix product for several is much faster than one for each.
    """
    tables, all_lengths = block_table.tolist(), lengths.tolist()
    start = 0
    while start < len(tables):
        stop, longest = start + 1, all_lengths[start]
        while (
            stop < len(tables)
            and longest > 0 < all_lengths[stop]
            and tables[stop] == tables[start]
            and (stop + 1 - start) * num_heads * max(longest, all_lengths[stop]) <= _RUN
        ):
            longest = max(longest, all_lengths[stop])
            stop += 1
        yield slice(start, stop), longest
        start = stop


def select_tokens(importance: Tensor, lengths: Tensor, choice: Choice, indices: Tensor) -> None:
    """Writes the index sets that the importances choose: sinks, recent tokens, and the most important of the rest.

    A sequence no longer than its budget is chosen whole. The order within a set has no meaning.

    Args:
        importance: [B, S, T], from `full_attention_with_importance`.
        lengths: [B], int32.
        choice: how many tokens, and which of them in any case.
        indices: [B, S, K], int32, written; the first `min(budgets[b], lengths[b])` entries of each set are valid.
    """
    sinks = choice.sinks
    per_sequence = zip(lengths.tolist(), choice.budgets.tolist(), choice.recents.tolist(), strict=True)
    for b, (length, budget, recent) in enumerate(per_sequence):
        if length <= budget:
            indices[b, :, :length] = torch.arange(length, device=indices.device)
            continue
        middle = importance[b, :, sinks : length - recent]
        indices[b, :, :sinks] = torch.arange(sinks, device=indices.device)
        indices[b, :, sinks : budget - recent] = middle.topk(budget - sinks - recent, sorted=False).indices + sinks
        indices[b, :, budget - recent : budget] = torch.arange(length - recent, length, device=indices.device)


def full_attention_with_selection(
    query: Tensor,
    kv: KV,
    scale: float,
    selections: Sequence[str],
    choice: Choice,
    capacity: int,
    indices: Tensor,
) -> Tensor:
    """Full attention that chooses tokens: what a `select` layer does in one call.

    Args:
        query, kv, scale, selections: as for `full_attention_with_importance`.
        choice: as for `select_tokens`.
        capacity: the longest that a sequence can become; sizes what lies between attention and selection, so that
            nothing depends on the lengths.
        indices: [B, S, K], int32, written; S adds up the index sets of each rule, in order.

    Returns:
        [B, Hq, D], the output of `full_attention`.
    """
    dtype = _accumulator(query.dtype)
    importance = query.new_empty(len(query), indices.shape[1], capacity, dtype=dtype)
    output = full_attention_with_importance(query, kv, scale, selections, importance)
    select_tokens(importance, kv.lengths, choice, indices)
    return output


def choose_by_codes(
    query: Tensor,
    kv: KV,
    scale: float,
    selections: Sequence[str],
    choice: Choice,
    capacity: int,
    indices: Tensor,
) -> None:
    """Writes the index sets that scores estimated from codes choose, without a look at K.

    Args:
        query: [B, Hq, D], of the last token of each sequence.
        kv: a cache with codes, those of the last tokens among them.
        scale, selections, choice, capacity, indices: as for `full_attention_with_selection`.
    """
    importance = query.new_empty(len(query), indices.shape[1], capacity, dtype=torch.float32)
    importance_by_codes(query, kv, scale, selections, importance)
    select_tokens(importance, kv.lengths, choice, indices)


def importance_by_codes(query: Tensor, kv: KV, scale: float, selections: Sequence[str], importance: Tensor) -> None:
    """Writes how important each cached token is by the scores that codes estimate.

    Args:
        query, kv, scale: as for `choose_by_codes`.
        selections, importance: as for `full_attention_with_importance`.
    """
    codes = kv.codes
    assert codes is not None
    kv_heads, dim = codes.packed.shape[2], query.shape[2]
    numbers, steps = turned_query(query, codes)
    turned = (
        (numbers * (steps * scale)[..., None]).view(len(query), kv_heads, -1, dim).transpose(0, 1)
    )  # [Hkv, B, G, D]
    for run, length in _runs(kv.block_table, kv.lengths, query.shape[1]):
        packed = _rows(codes.packed, kv.block_table[run.start], length)
        factors = _rows(codes.factors[..., None], kv.block_table[run.start], length)[..., 0]
        of_run = turned[:, run]  # one product a KV head for all sequences of a run: many small ones are slow on a CPU
        scores = of_run.flatten(1, 2) @ decode(packed, factors, codes.bits).transpose(1, 2)
        scores = scores.view(*of_run.shape[:3], length).transpose(0, 1)  # [n, Hkv, G, T]
        past = torch.arange(length, device=query.device) >= kv.lengths[run, None]  # [n, T]
        scores.masked_fill_(past[:, None, None], -torch.inf)
        parts = [RULES[rule].importance(scores, scores.softmax(-1)) for rule in selections]
        importance[run, :, :length] = torch.cat(parts, 1)


def sparse_attention(
    query: Tensor,
    kv: KV,
    indices: Tensor,
    counts: Tensor,
    head_to_set: Tensor | None,
    scale: float,
    page_size: int = 1,
) -> Tensor:
    """Attention of one new token per sequence over the tokens of an index set: position persistent sparse attention.

    Args:
        query: [B, Hq, D].
        kv: the cache; its lengths are not read.
        indices: [B, S, K], int32; the step's table of index sets.
        counts: [B], int32; tokens of each of the sequence's sets; or [B, S], of each set, contiguous over B.
        head_to_set: [1], [Hkv] or [Hq], integer; the set that all heads, the heads of each KV head, or each query head
            read. The shorter forms read each K and V row once for all heads that share a set. `None` is the map of
            sets that are as many as one of these forms has entries, in order; it spares the look-up.
        scale: factor of the scores.
        page_size: tokens that one entry of a set stands for: entry `p` for the `page_size` tokens from
            `p * page_size` on. Of the last page of a set only the first tokens may count.

    Returns:
        [B, Hq, D], dtype of `query`.
    """
    num_heads, num_kv_heads = query.shape[1], kv.k.shape[2]
    if head_to_set is None:
        head_to_set = torch.arange(indices.shape[1], device=indices.device)
    check_map(len(head_to_set), num_heads, num_kv_heads)
    output = torch.empty_like(query)
    counts = counts[:, None].expand(-1, indices.shape[1]) if counts.dim() == 1 else counts
    for b, of_heads in enumerate(counts.index_select(1, head_to_set).tolist()):  # [1 | Hkv | Hq]
        most = max(of_heads)
        chosen = indices[b, :, : -(-most // page_size)].index_select(0, head_to_set)
        if page_size > 1:
            chosen = (chosen[..., None] * page_size + torch.arange(page_size, device=chosen.device)).flatten(1)
        chosen = chosen[:, :most]  # [1 | Hkv | Hq, most]
        past = None
        if min(of_heads) < most:
            past = torch.arange(most, device=chosen.device) >= counts.new_tensor(of_heads)[:, None]
            chosen = torch.where(past, chosen[:, :1], chosen)
        keys, values = _gather(kv.k, kv.block_table[b], chosen), _gather(kv.v, kv.block_table[b], chosen)
        scores = _grouped_scores(query[b], keys, scale)
        if past is not None:
            scores.view(len(past), -1, most).masked_fill_(past[:, None], -torch.inf)
        output[b] = _weigh(scores.softmax(-1), values)
    return output


def check_map(entries: int, num_heads: int, num_kv_heads: int) -> None:
    """Refuses a map from heads to sets of another length than `sparse_attention` takes."""
    if entries not in (1, num_kv_heads, num_heads):
        raise ValueError(f"head_to_set has {entries} entries, not 1, {num_kv_heads} or {num_heads}")


def multi_query_attention(query: Tensor, kv: KV, new_lengths: Tensor, scale: float) -> Tensor:
    """Attention of the last tokens of each sequence over its whole cache, causal among themselves.

    Serves prefill in chunks, cache correction and verification.

    Args:
        query: [B, N, Hq, D]; the last `new_lengths[b]` rows are the last tokens of sequence `b`, whose K and V are
            already in the cache; rows before them are left padding.
        kv: the cache.
        new_lengths: [B], int32.
        scale: factor of the scores.

    Returns:
        [B, N, Hq, D], dtype of `query`; zeros in the padding.
    """
    output = torch.zeros_like(query)
    for b, (length, new) in enumerate(zip(kv.lengths.tolist(), new_lengths.tolist(), strict=True)):
        if new == 0:
            continue
        keys, values = (_rows(cache, kv.block_table[b], length)[None] for cache in (kv.k, kv.v))  # [1, Hkv, T, D]
        output[b, -new:] = scaled_dot_product_attention(
            query[b, -new:].transpose(0, 1)[None],
            keys,
            values,
            attn_mask=causal_lower_right(new, length),
            scale=scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
    return output


def multi_query_attention_with_selection(
    query: Tensor,
    kv: KV,
    new_lengths: Tensor,
    scale: float,
    selection: str,
    choice: Choice,
    capacity: int,
    indices: Tensor,
) -> Tensor:
    """Attention of a chunk that also chooses among the tokens before it: verification's, for the drafts that follow.

    The importances are those of the chunk's first token. It alone is known to stay: those behind it were drafted.

    Args:
        query, kv, new_lengths, scale: as for `multi_query_attention`.
        selection: name of the rule of the choice.
        choice: as for `select_tokens`, of the tokens before the chunk.
        capacity: as for `full_attention_with_selection`.
        indices: [B, S, K], int32, written; S by the rule. Of a sequence without new tokens undefined.

    Returns:
        [B, N, Hq, D], the output of `multi_query_attention`.
    """
    past = kv.lengths - new_lengths
    rows = (query.shape[1] - new_lengths).clamp(max=query.shape[1] - 1).long()
    first = query[torch.arange(len(query), device=query.device), rows]  # [B, Hq, D]
    importance = query.new_empty(len(query), indices.shape[1], capacity, dtype=_accumulator(query.dtype))
    seen = replace(kv, lengths=torch.minimum(past + 1, kv.lengths))
    full_attention_with_importance(first, seen, scale, [selection], importance)
    select_tokens(importance, past, choice, indices)
    return multi_query_attention(query, kv, new_lengths, scale)


def write_kv(key: Tensor, value: Tensor, kv: KV, new_lengths: Tensor) -> None:
    """Writes the K and V of new tokens, and the codes of K, behind those that the cache holds.

    Args:
        key, value: [B, N, Hkv, D]; the last `new_lengths[b]` rows are new tokens of sequence `b`, rows before them are
            left padding and are not written.
        kv: the cache, written; its lengths count the new tokens.
        new_lengths: [B], int32.
    """
    block_size = kv.k.shape[1]
    for b, (length, new) in enumerate(zip(kv.lengths.tolist(), new_lengths.tolist(), strict=True)):
        start = length - new
        while start < length:
            block, row = int(kv.block_table[b, start // block_size]), start % block_size
            count = min(block_size - row, length - start)
            source = slice(key.shape[1] - (length - start), key.shape[1] - (length - start) + count)
            kv.k[block, row : row + count] = key[b, source]
            kv.v[block, row : row + count] = value[b, source]
            start += count
    if kv.codes is not None:
        write_codes(kv, new_lengths, key.shape[0] * key.shape[1])


def _rows(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """The first `length` tokens of a sequence, [Hkv, length, D]; a view if they lie in one block."""
    block_size = cache.shape[1]
    if length <= block_size:
        rows = cache[int(blocks[0])] if length else cache[0]
    else:
        rows = cache[blocks[: -(-length // block_size)].long()].flatten(0, 1)
    return rows[:length].transpose(0, 1)


def _gather(cache: Tensor, blocks: Tensor, tokens: Tensor) -> Tensor:
    """K or V rows of the tokens [S, K] of one sequence: [Hkv, K, D] for S = 1 or Hkv, [Hq, K, D] for S = Hq."""
    block_size, num_kv_heads = cache.shape[1], cache.shape[2]
    heads = torch.arange(len(tokens), device=cache.device)[:, None] * num_kv_heads // len(tokens)
    if len(blocks) == 1:  # the contiguous cache: whole rows are the fastest gather there is
        rows = cache[int(blocks[0])].transpose(0, 1)  # [Hkv, T, D]
        if len(tokens) == 1:
            return rows.index_select(1, tokens[0])
        if rows.is_contiguous():
            flat = (tokens + heads * block_size).flatten()
            return rows.flatten(0, 1).index_select(0, flat).view(*tokens.shape, -1)
    tokens = tokens.long()
    block, row = blocks.long()[tokens // block_size], tokens % block_size
    if len(tokens) == 1:
        return cache[block[0], row[0]].transpose(0, 1)
    return cache[block, row, heads]


def _grouped_scores(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """`scale · q · Kᵀ` of query [Hq, D] with keys [H, T, D], H = Hkv or Hq: [H, Hq // H, T], in float32 or more."""
    accumulator = _accumulator(query.dtype)
    heads, _, dim = keys.shape
    grouped = (query.to(accumulator) * scale).view(heads, -1, dim)
    # K times q is a tenth faster on a CPU than q times K transposed, and the copy is small
    return torch.bmm(keys.to(accumulator), grouped.transpose(1, 2)).transpose(1, 2).contiguous()


def _weigh(probabilities: Tensor, values: Tensor) -> Tensor:
    """Probabilities [H, G, T] times values [H, T, D]: [H · G, D]."""
    return torch.bmm(probabilities, values.to(probabilities.dtype)).flatten(0, 1)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
