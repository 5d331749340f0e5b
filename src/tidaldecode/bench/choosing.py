"""Layers that choose for themselves: by codes of keys, and by bounds of pages (Quest)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tidaldecode import ops
from tidaldecode.bench.caches import LayerCaches
from tidaldecode.bench.workload import Workload
from tidaldecode.methods.quest import QuestAttention
from tidaldecode.ops import KV, Choice
from tidaldecode.ops.codes import room_for_codes
from tidaldecode.ops.values import CODE_BITS, code_bytes
from tidaldecode.plan import tokens_of


def choosing_workloads(caches: LayerCaches, budgets: tuple[int | float, ...]) -> Iterator[Workload]:
    """By bits: `choice` writes a set for each KV head, `quantized_select` attends to it, too; then Quest's layer."""
    for bits in CODE_BITS:
        if caches.shape.head_dim * bits % 8 == 0:
            yield from _by_codes(caches, bits, budgets)
    for budget in budgets:
        yield _by_pages(caches, budget)


def coded(caches: LayerCaches, layer: int, bits: int) -> KV:
    """A layer's cache with codes of its keys."""
    kv = caches.kv(layer)
    kv = replace(kv, codes=room_for_codes(kv.k, bits))
    ops.write_codes(kv, kv.lengths, caches.shape.batch * caches.shape.context)
    return kv


def _by_codes(caches: LayerCaches, bits: int, budgets: tuple[int | float, ...]) -> Iterator[Workload]:
    shape, lengths = caches.shape, caches.lengths
    layers = [coded(caches, layer, bits) for layer in range(len(caches))]
    code_floor = shape.batch * shape.kv_heads * shape.context * code_bytes(bits, shape.head_dim)
    name = f"{bits} bit{'s' * (bits > 1)}"
    for budget in budgets:
        tokens = min(tokens_of(budget, shape.context), shape.context)
        choice = Choice.alike(lengths, tokens)
        counts = torch.minimum(choice.budgets, lengths)
        indices = lengths.new_zeros(shape.batch, shape.kv_heads, tokens)

        def choose(layer: int, choice: Choice = choice, indices: Tensor = indices) -> None:
            ops.choose_by_codes(
                caches.queries[layer], layers[layer], caches.scale, ["per_group"], choice, shape.context, indices
            )

        def attend(layer: int, choice: Choice = choice, indices: Tensor = indices, counts: Tensor = counts) -> Tensor:
            choose(layer, choice, indices)
            return ops.sparse_attention(caches.queries[layer], layers[layer], indices, counts, None, caches.scale)

        yield Workload.on_layers(caches, f"choice {name}", choose, budget, code_floor)
        floor = code_floor + shape.kv_bytes(tokens)
        yield Workload.on_layers(caches, f"quantized_select {name}", attend, budget, floor)


def _by_pages(caches: LayerCaches, budget: int | float) -> Workload:
    shape = caches.shape
    tokens = tokens_of(budget, shape.context)
    page_size = min(16, 1 << (max(1, tokens // 2).bit_length() - 1))  # two pages in the smallest budgets too
    attention = QuestAttention(shape.model(len(caches)), tokens, (), page_size)
    attention.begin(caches.lengths, shape.context)
    for layer in range(len(caches)):
        attention.prepare(layer, caches.kv(layer))
    read = min(attention.tokens_read(shape.context)[0], shape.context)
    return Workload.on_layers(
        caches, "quest", lambda layer: attention.attend(layer, *caches.inputs(layer)), budget, shape.kv_bytes(read)
    )
