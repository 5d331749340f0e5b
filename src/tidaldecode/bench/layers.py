"""The operations of one layer, one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from tidaldecode import ops
from tidaldecode.bench.caches import LayerCaches
from tidaldecode.bench.methods import sdpa
from tidaldecode.bench.workload import Workload
from tidaldecode.ops import Choice
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

    def attend_by_sdpa(layer: int) -> Tensor:
        return sdpa(caches.queries[layer], caches.keys[layer], caches.values[layer], caches.scale)

    def attend(layer: int) -> Tensor:
        return ops.full_attention(*caches.inputs(layer))

    yield Workload.on_layers(caches, "sdpa", attend_by_sdpa)
    yield from _flashinfer(caches)
    yield Workload.on_layers(caches, "full", attend)
    for rule in RULES:
        yield from _selecting(caches, rule, budgets)
    for rule in RULES:
        for budget in budgets:
            yield _sparse(caches, rule, budget)
    for new_tokens in NEW_TOKENS:
        if new_tokens <= caches.shape.context:
            yield _multi_query(caches, new_tokens)
    yield _write(caches)


def _selecting(caches: LayerCaches, rule: Selection, budgets: tuple[int | float, ...]) -> Iterator[Workload]:
    """A select layer, and beside it attention with importance and selection alone.

    All layers write the same importances, as in a decode step, where selection finds them in the L2 cache.
    """
    shape, lengths = caches.shape, caches.lengths
    sets = shape.model(1).num_sets(rule)
    importance = torch.empty(shape.batch, sets, shape.context, device=lengths.device)

    def attend(layer: int) -> None:
        ops.full_attention_with_importance(*caches.inputs(layer), [rule], importance)

    yield Workload.on_layers(caches, f"importance {rule}", attend)
    for budget in budgets:
        tokens = tokens_of(budget, shape.context)
        choice = Choice.alike(lengths, tokens)
        indices = lengths.new_zeros(shape.batch, sets, min(tokens, shape.context))
        select = partial(ops.select_tokens, importance, lengths, choice, indices)

        def attend_and_select(layer: int, choice: Choice = choice, indices: Tensor = indices) -> None:
            ops.full_attention_with_selection(*caches.inputs(layer), [rule], choice, shape.context, indices)

        yield Workload(f"selection {rule}", budget, importance.nbytes, [select] * len(caches))
        yield Workload.on_layers(caches, f"select {rule}", attend_and_select, budget)


def _sparse(caches: LayerCaches, rule: Selection, budget: int | float) -> Workload:
    """A sparse layer, by random sets of distinct tokens in order."""
    shape = caches.shape
    model = shape.model(1)
    tokens = min(tokens_of(budget, shape.context), shape.context)
    size = (model.num_sets(rule), shape.context)
    drawn = [torch.rand(size, device=caches.lengths.device).topk(tokens).indices for _ in range(shape.batch)]
    indices = torch.stack(drawn).sort(-1).values.int()  # [B, sets, tokens]
    counts = torch.full_like(caches.lengths, tokens)

    def attend(layer: int) -> Tensor:
        return ops.sparse_attention(caches.queries[layer], caches.kv(layer), indices, counts, None, caches.scale)

    rows = tokens * model.sets_per_kv_head(rule)
    return Workload.on_layers(caches, f"sparse {rule}", attend, budget, shape.kv_bytes(min(rows, shape.context)))


def _multi_query(caches: LayerCaches, new_tokens: int) -> Workload:
    queries = torch.randn_like(caches.queries[0][:, None].expand(-1, new_tokens, -1, -1))  # [B, N, Hq, D]
    new_lengths = torch.full_like(caches.lengths, new_tokens)

    def attend(layer: int) -> Tensor:
        return ops.multi_query_attention(queries, caches.kv(layer), new_lengths, caches.scale)

    return Workload.on_layers(caches, f"multi_query {new_tokens}", attend)


def _write(caches: LayerCaches) -> Workload:
    shape = caches.shape
    new = caches.keys[0].new_empty(2, shape.batch, 1, shape.kv_heads, shape.head_dim).normal_()
    new_lengths = torch.ones_like(caches.lengths)

    def write(layer: int) -> None:
        ops.write_kv(new[0], new[1], caches.kv(layer), new_lengths)

    return Workload.on_layers(caches, "write_kv", write, floor_bytes=new.nbytes)


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

    yield Workload.on_layers(caches, "flashinfer", attend)
