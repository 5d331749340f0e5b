"""A plan's attention over caches as vLLM lays them out, against the reference on a contiguous one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tidaldecode import ModelShape, TidalPlan, ops
from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.ops import KV, reference
from tidaldecode.serving.rank import Limits, RankAttention
from tidaldecode.vllm.cache_layout import packed_views, row_views

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CAPACITY = 2048 if DEVICE.type == "cuda" else 256
ROLES = ("full", "select", "sparse", "select", "sparse")
ALONE = SimpleNamespace(rank_in_group=0, world_size=1)


def _kv_cache(k: Tensor, v: Tensor, table: Tensor, block_size: int, layout: str) -> Tensor:
    """A layer's cache as vLLM keeps it, [num_blocks, Hkv, block_size, 2 · D], from K and V [B, T, Hkv, D]."""
    batch, tokens, heads, dim = k.shape
    blocks = tokens // block_size
    paged = k.new_full((int(table.max()) + 2, block_size, heads, 2 * dim), float("nan"))
    paged[table.long()] = torch.cat([k, v], -1).view(batch, blocks, block_size, heads, 2 * dim)
    by_head = paged.transpose(1, 2)
    if layout == "token rows":
        return by_head
    if layout == "head rows":
        return by_head.contiguous()
    packed = [part.transpose(2, 3) if index == 0 else part for index, part in enumerate(by_head.split(dim, -1))]
    return torch.cat([part.flatten(2) for part in packed], -1).view(-1, heads, block_size, 2 * dim)


@pytest.fixture
def by_kernel(monkeypatch):
    """Operations by the Triton kernels, under the interpreter where there is no GPU."""
    if DEVICE.type == "cpu":
        from tidaldecode.ops import kernels

        for name in ("full_attention", "full_attention_with_selection", "sparse_attention"):
            monkeypatch.setattr(ops, name, getattr(kernels, name))


@pytest.mark.parametrize(
    ("layout", "block_size"),
    [("token rows", 16), ("head rows", 64)]
    if DEVICE.type == "cpu"
    else [(layout, size) for layout in ("token rows", "head rows") for size in (16, 32, 64)],
)
@pytest.mark.parametrize("batch", [3] if DEVICE.type == "cpu" else [1, 7, 64])
@pytest.mark.parametrize("selection", ["unified", "per_group", "per_head"])
@pytest.mark.kernels
def test_kernels_on_vllms_layouts(by_kernel, layout, block_size, batch, selection):
    _compare(layout, block_size, batch, selection, row_views, torch.float32 if DEVICE.type == "cpu" else torch.bfloat16)


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_reference_on_the_layout_of_the_cpu(block_size):
    _compare("packed", block_size, 3, "unified", packed_views, torch.float64)


def _compare(layout, block_size, batch, selection, views, dtype):
    torch.manual_seed(block_size + batch)
    shape = ModelShape(num_layers=5, num_query_heads=8, num_kv_heads=2, head_dim=32)
    plan = TidalPlan.validated(roles=ROLES, selection=selection, token_budget=24, sink_tokens=2, recent_tokens=4)
    lengths = torch.randint(1, CAPACITY + 1, (batch,), dtype=torch.int32, device=DEVICE)
    lengths[-1] = 0 if batch > 1 else CAPACITY  # the padding of a CUDA graph
    blocks = batch * CAPACITY // block_size
    table = torch.randperm(blocks, dtype=torch.int32, device=DEVICE).view(batch, -1)
    whole = torch.arange(batch, dtype=torch.int32, device=DEVICE)[:, None]
    exact, paged = DecodeAttention(plan, shape), RankAttention(plan, shape, ALONE, Limits(CAPACITY, 64, 64))
    paged.reserve(DEVICE)
    exact.begin(lengths, CAPACITY)
    paged.begin(lengths)
    for layer in range(5):
        k, v = (torch.randn(batch, CAPACITY, 2, 32, device=DEVICE).to(dtype) for _ in range(2))
        query = (torch.randn(batch, 8, 32, device=DEVICE) * 3).to(dtype)
        kv = KV(*views(_kv_cache(k, v, table, block_size, layout)), table, lengths)
        output = paged.attend(layer, query, kv, 0.2)
        plain = KV(k.double(), v.double(), whole, lengths)
        if ROLES[layer] == "sparse":  # over the sets that were chosen: ties may go either way
            rows, sets, counts = paged._sets_of(layer)
            expected = reference.sparse_attention(query.double(), plain, sets, counts, rows, 0.2)
        else:
            expected = reference.full_attention(query.double(), plain, 0.2)
        real = lengths > 0
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(output[real].double(), expected[real], atol=tolerance, rtol=tolerance)
        assert not output[~real].any()
        if ROLES[layer] == "select":
            _same_sets(exact, paged, layer, query, plain, dtype)


def _same_sets(exact, paged, layer, query, plain, dtype):
    """All but a few tokens that tie in this precision are the reference's."""
    exact.indices.zero_()
    reference.full_attention_with_selection(
        query.double(), plain, 0.2, exact.writes[layer], exact.choice_of(layer), CAPACITY, exact._written_by(layer)
    )
    pairs = zip(exact._written_by(layer), paged._written_by(layer), exact.counts.tolist(), strict=True)
    for wanted, got, count in pairs:
        for one, other in zip(wanted[:, :count].tolist(), got[:, :count].tolist(), strict=True):
            assert len(set(other)) == count
            assert len(set(one) ^ set(other)) <= (4 if dtype == torch.bfloat16 else 0)
