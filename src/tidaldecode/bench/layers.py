"""The operations of one layer, one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from tidaldecode import ops
from tidaldecode.bench.caches import LayerCaches
from tidaldecode.bench.sdpa import sdpa
from tidaldecode.bench.timing import Call
from tidaldecode.bench.workload import Workload
from tidaldecode.ops import KV, Choice
from tidaldecode.plan import Selection, tokens_of
from tidaldecode.rules import RULES

NEW_TOKENS = (8, 32)
"""Tokens of a chunk that verifies or corrects."""


def layer_workloads(caches: LayerCaches, budgets: tuple[int | float, ...]) -> Iterator[Workload]:
    """Every operation on a cache, made one after the other, so that their buffers do not pile up.

    Args:
        caches: of the layers; one call for each.
        budgets: tokens to choose, or fractions of the context.
    """
    yield Workload("sdpa", None, _all(caches), _on_each(caches, partial(_sdpa, caches)))
    yield from _flashinfer(caches)
    yield Workload("full", None, _all(caches), _on_each(caches, partial(_full, caches)))
    for rule in RULES:
        yield from _selecting(caches, rule, budgets)
    for rule in RULES:
        for budget in budgets:
            yield _sparse(caches, rule, budget)
    for new_tokens in NEW_TOKENS:
        if new_tokens <= caches.shape.context:
            yield _multi_query(caches, new_tokens)
    yield _write(caches)


def _on_each(caches: LayerCaches, call: Callable[[int], object]) -> list[Call]:
    return [partial(call, layer) for layer in range(len(caches))]


def _all(caches: LayerCaches) -> float:
    return caches.shape.kv_bytes(caches.shape.context)


def _query(caches: LayerCaches, layer: int) -> tuple[Tensor, KV, float]:
    """A layer's query, cache and factor of the scores, as the operations take them."""
    return caches.queries[layer], caches.kv(layer), caches.scale


def _sdpa(caches: LayerCaches, layer: int) -> Tensor:
    return sdpa(caches.queries[layer], caches.keys[layer], caches.values[layer], caches.scale)


def _full(caches: LayerCaches, layer: int) -> Tensor:
    return ops.full_attention(*_query(caches, layer))


def _selecting(caches: LayerCaches, rule: Selection, budgets: tuple[int | float, ...]) -> Iterator[Workload]:
    """A select layer, and beside it attention with importance and selection alone.

    All layers write the same importances, as in a decode step, where selection finds them in the L2 cache.
    """
    shape = caches.shape
    sets = shape.model(1).num_sets(rule)
    importance = torch.empty(shape.batch, sets, shape.context, device=caches.lengths.device)

    def attend(layer: int) -> None:
        ops.full_attention_with_importance(*_query(caches, layer), [rule], importance)

    yield Workload(f"importance {rule}", None, _all(caches), _on_each(caches, attend))
    for budget in budgets:
        tokens = tokens_of(budget, shape.context)
        choice = Choice.alike(caches.lengths, tokens)
        indices = caches.lengths.new_zeros(shape.batch, sets, min(tokens, shape.context))
        select = partial(ops.select_tokens, importance, caches.lengths, choice, indices)

        def attend_and_select(layer: int, choice: Choice = choice, indices: Tensor = indices) -> None:
            ops.full_attention_with_selection(*_query(caches, layer), [rule], choice, shape.context, indices)

        yield Workload(f"selection {rule}", budget, importance.nbytes, [select] * len(caches))
        yield Workload(f"select {rule}", budget, _all(caches), _on_each(caches, attend_and_select))


def _sparse(caches: LayerCaches, rule: Selection, budget: int | float) -> Workload:
    shape = caches.shape
    model = shape.model(1)
    sets, tokens = model.num_sets(rule), min(tokens_of(budget, shape.context), shape.context)
    indices = _random_sets(shape.batch, sets, tokens, shape.context, caches.lengths.device)
    counts = torch.full_like(caches.lengths, tokens)

    def attend(layer: int) -> Tensor:
        return ops.sparse_attention(caches.queries[layer], caches.kv(layer), indices, counts, None, caches.scale)

    rows = tokens * model.sets_per_kv_head(rule)
    return Workload(f"sparse {rule}", budget, shape.kv_bytes(min(rows, shape.context)), _on_each(caches, attend))


def _random_sets(batch: int, sets: int, tokens: int, context: int, device: torch.device) -> Tensor:
    """Distinct tokens in order, [batch, sets, tokens], int32."""
    drawn = [torch.rand(sets, context, device=device).topk(tokens).indices for _ in range(batch)]
    return torch.stack(drawn).sort(-1).values.int()


def _multi_query(caches: LayerCaches, new_tokens: int) -> Workload:
    shape = caches.shape
    queries = torch.randn_like(caches.queries[0][:, None].expand(-1, new_tokens, -1, -1))  # [B, N, Hq, D]
    new_lengths = torch.full_like(caches.lengths, new_tokens)

    def attend(layer: int) -> Tensor:
        return ops.multi_query_attention(queries, caches.kv(layer), new_lengths, caches.scale)

    return Workload(f"multi_query {new_tokens}", None, shape.kv_bytes(shape.context), _on_each(caches, attend))


def _write(caches: LayerCaches) -> Workload:
    shape = caches.shape
    new = caches.keys[0].new_empty(2, shape.batch, 1, shape.kv_heads, shape.head_dim).normal_()
    new_lengths = torch.ones_like(caches.lengths)

    def write(layer: int) -> None:
        ops.write_kv(new[0], new[1], caches.kv(layer), new_lengths)

    return Workload("write_kv", None, new.nbytes, _on_each(caches, write))


def _flashinfer(caches: LayerCaches) -> Iterator[Workload]:
    """Full attention by FlashInfer, if it is installed; it sees the same memory as pages."""
    if caches.lengths.device.type != "cuda":
        return
    try:
        import flashinfer
    except ImportError:
        return
    shape, device = caches.shape, caches.lengths.device
    page_size = math.gcd(shape.context, 16)
    pages = shape.context // page_size  # of each sequence
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(2**27, dtype=torch.uint8, device=device), "HND", use_tensor_cores=shape.heads > shape.kv_heads
    )
    wrapper.plan(
        torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * pages,
        torch.arange(shape.batch * pages, dtype=torch.int32, device=device),
        torch.full_like(caches.lengths, page_size),
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        page_size,
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
        sm_scale=caches.scale,
    )

    def attend(layer: int) -> object:
        paged = (caches.keys[layer], caches.values[layer])
        views = tuple(cache.view(-1, shape.kv_heads, page_size, shape.head_dim) for cache in paged)
        return wrapper.run(caches.queries[layer], views)

    yield Workload("flashinfer", None, _all(caches), _on_each(caches, attend))
