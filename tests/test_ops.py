"""Every operation against float64 formulas written out token by token, over ragged batches and shuffled blocks."""

from __future__ import annotations

import math

import pytest
import torch

from tidaldecode import ops
from tidaldecode.ops import KV, Choice, reference

LENGTHS = (33, 1, 64, 7)
HEADS = [(1, 1), (6, 3), (3, 1), (8, 2), (7, 1), (8, 1), (14, 2)]  # ratios 1, 2, 3, 4, 7, 8, 7


class Case:
    """A random cache in blocks, and the same K and V as plain tensors [Hkv, T, D] for each sequence."""

    def __init__(self, heads, kv_heads, head_dim, block_size, dtype=torch.float32, lengths=LENGTHS):
        generator = torch.Generator().manual_seed(hash((heads, kv_heads, head_dim, block_size)) % 2**31)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.scale = head_dim**-0.5
        columns = math.ceil(max(lengths) / block_size)
        blocks = len(lengths) * columns + 3
        self.block_table = torch.randperm(blocks, generator=generator)[: len(lengths) * columns].int()
        self.block_table = self.block_table.view(len(lengths), columns)
        self.k_cache = torch.full((blocks, block_size, kv_heads, head_dim), torch.nan, dtype=dtype)
        self.v_cache = self.k_cache.clone()
        self.query = torch.randn(len(lengths), heads, head_dim, generator=generator).to(dtype)
        self.keys, self.values = [], []
        for b, length in enumerate(lengths):
            for cache, plain in ((self.k_cache, self.keys), (self.v_cache, self.values)):
                rows = torch.randn(length, kv_heads, head_dim, generator=generator).to(dtype)
                plain.append(rows.double().transpose(0, 1).repeat_interleave(heads // kv_heads, 0))  # [Hq, T, D]
                for token in range(length):
                    cache[self.block_table[b, token // block_size], token % block_size] = rows[token]

    @property
    def kv(self):
        return KV(self.k_cache, self.v_cache, self.block_table, self.lengths)

    def scores(self, b):
        return torch.einsum("hd,htd->ht", self.query[b].double(), self.keys[b]) * self.scale

    def attend(self, b, head, tokens):
        probabilities = self.scores(b)[head, tokens].softmax(0)
        return probabilities @ self.values[b][head, tokens]


@pytest.mark.parametrize("block_size", [64, 8, 5])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("head_dim", [16, 20])
def test_full_attention(heads, kv_heads, head_dim, block_size):
    case = Case(heads, kv_heads, head_dim, block_size)
    output = ops.full_attention(case.query, case.kv, case.scale)
    for b, length in enumerate(LENGTHS):
        expected = torch.stack([case.attend(b, head, range(length)) for head in range(heads)])
        torch.testing.assert_close(output[b].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_size", [64, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_importance(heads, kv_heads, block_size):
    case = Case(heads, kv_heads, 16, block_size)
    rules = ("unified", "per_head", "per_group")
    importance = torch.full((len(LENGTHS), 1 + heads + kv_heads, 80), torch.nan)
    arguments = (case.query, case.kv, case.scale)
    output = ops.full_attention_with_importance(*arguments, rules, importance)
    torch.testing.assert_close(output, ops.full_attention(case.query, case.kv, case.scale))
    for b, length in enumerate(LENGTHS):
        probabilities = case.scores(b).softmax(-1)
        groups = [probabilities[g * heads // kv_heads : (g + 1) * heads // kv_heads].mean(0) for g in range(kv_heads)]
        expected = torch.cat([probabilities.mean(0)[None], case.scores(b), torch.stack(groups)])
        torch.testing.assert_close(importance[b, :, :length].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (2, 3), (4, 1)])
def test_selection(sink, recent):
    generator = torch.Generator().manual_seed(0)
    lengths, budgets = torch.tensor([50, 9, 8, 30]).int(), torch.tensor([9, 9, 9, 16]).int()
    importance = torch.rand(4, 3, 50, generator=generator)
    for b, length in enumerate(lengths):
        importance[b, :, length:] = torch.nan
    indices = torch.full((4, 3, 16), -7, dtype=torch.int32)
    ops.select_tokens(importance, lengths, Choice(budgets, torch.full((4,), recent).int(), sink), indices)
    for b in range(4):
        length, budget = int(lengths[b]), int(budgets[b])
        for row in range(3):
            chosen = indices[b, row, : min(length, budget)].tolist()
            forced = set(range(sink)) | set(range(length - recent, length))
            ranked = sorted(set(range(length)) - forced, key=lambda t, b=b, row=row: -float(importance[b, row, t]))
            expected = forced | set(ranked[: budget - len(forced)]) if length > budget else set(range(length))
            assert len(chosen) == len(set(chosen))
            assert set(chosen) == expected


@pytest.mark.parametrize("block_size", [64, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("sets", ["one", "per_group", "per_head"])
def test_sparse_attention_reads_only_what_was_chosen(heads, kv_heads, sets, block_size):
    case = Case(heads, kv_heads, 16, block_size)
    generator = torch.Generator().manual_seed(1)
    counts = torch.tensor([9, 1, 12, 4]).int()
    rows = {"one": 1, "per_group": kv_heads, "per_head": heads}[sets]
    of_sets = counts[:, None].repeat(1, rows + 2)
    if sets != "one":  # each set has a count of its own
        of_sets = torch.randint(1, 5, (rows + 2, 4), generator=generator).int().T
        counts = of_sets
    head_to_set = torch.randperm(rows + 2, generator=generator)[:rows]
    indices = torch.zeros(len(LENGTHS), rows + 2, 12, dtype=torch.int32)
    for b, length in enumerate(LENGTHS):
        for row, count in enumerate(of_sets[b].tolist()):
            indices[b, row, :count] = torch.randperm(length, generator=generator)[:count]
    for b, length in enumerate(LENGTHS):  # what no set chose must not be read
        read = {token for row in head_to_set for token in indices[b, row, : of_sets[b, row]].tolist()}
        for token in set(range(length)) - read:
            case.k_cache[case.block_table[b, token // block_size], token % block_size] = torch.nan
            case.v_cache[case.block_table[b, token // block_size], token % block_size] = torch.nan
    output = ops.sparse_attention(case.query, case.kv, indices, counts, head_to_set, case.scale)
    for b in range(len(LENGTHS)):
        for head in range(heads):
            row = head_to_set[head * rows // heads]
            expected = case.attend(b, head, indices[b, row, : of_sets[b, row]].tolist())
            torch.testing.assert_close(output[b, head].double(), expected, rtol=1e-4, atol=1e-5)


def test_sparse_attention_refuses_a_map_of_another_length():
    case = Case(6, 3, 16, 64)
    with pytest.raises(ValueError, match="head_to_set has 2 entries, not 1, 3 or 6"):
        ops.sparse_attention(
            case.query, case.kv, torch.zeros(4, 2, 1).int(), case.lengths, torch.tensor([0, 1]), case.scale
        )


@pytest.mark.parametrize("block_size", [64, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("new", [(5, 1, 5, 0), (3, 1, 2, 3)])
def test_multi_query_attention(heads, kv_heads, new, block_size):
    case = Case(heads, kv_heads, 16, block_size)
    queries = torch.randn(len(LENGTHS), 5, heads, 16, generator=torch.Generator().manual_seed(2))
    output = ops.multi_query_attention(queries, case.kv, torch.tensor(new).int(), case.scale)
    for b, (length, count) in enumerate(zip(LENGTHS, new, strict=True)):
        assert not output[b, : 5 - count].any()
        for i in range(count):
            case.query[b] = queries[b, 5 - count + i]
            visible = range(length - count + i + 1)
            expected = torch.stack([case.attend(b, head, visible) for head in range(heads)])
            torch.testing.assert_close(output[b, 5 - count + i].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_size", [64, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 3), (8, 2)])
@pytest.mark.parametrize("rule", ["per_head", "per_group", "unified"])
def test_a_chunk_chooses_by_its_first_token(heads, kv_heads, rule, block_size):
    """Among the tokens before the chunk, whatever the others ask for."""
    lengths, new = (33, 9, 64, 40), (5, 2, 3, 1)
    case = Case(heads, kv_heads, 16, block_size, lengths=lengths)
    queries = torch.randn(4, 5, heads, 16, generator=torch.Generator().manual_seed(2))
    sets = {"per_head": heads, "per_group": kv_heads, "unified": 1}[rule]
    table = torch.full((4, sets, 12), -7, dtype=torch.int32)
    budgets, recents = torch.tensor([12, 10, 9, 11]).int(), torch.tensor([3, 2, 1, 4]).int()
    chunk = queries, case.kv, torch.tensor(new).int(), case.scale
    output = ops.multi_query_attention_with_selection(*chunk, rule, Choice(budgets, recents, 2), 64, table)
    torch.testing.assert_close(output, ops.multi_query_attention(*chunk), rtol=0, atol=0)
    for b, (length, count) in enumerate(zip(lengths, new, strict=True)):
        past, budget, recent = length - count, int(budgets[b]), int(recents[b])
        case.query[b] = queries[b, 5 - count]
        probabilities = case.scores(b)[:, : past + 1].softmax(-1)
        importance = probabilities.view(sets, heads // sets, -1).mean(1)
        for row in range(sets):
            chosen = table[b, row, : min(budget, past)].tolist()
            forced = set(range(min(2, past))) | set(range(max(0, past - recent), past))
            free = sorted(set(range(past)) - forced, key=lambda token, row=row: -float(importance[row, token]))
            assert set(chosen) == forced | set(free[: max(0, budget - len(forced))])
            assert len(chosen) == len(set(chosen)) and (table[b, row, len(chosen) :] == -7).all()


@pytest.mark.parametrize("block_size", [64, 8, 5])
def test_write_kv(block_size):
    case = Case(6, 3, 16, block_size)
    k_cache, v_cache = torch.full_like(case.k_cache, torch.nan), torch.full_like(case.v_cache, torch.nan)
    written = torch.zeros(len(LENGTHS), dtype=torch.int32)
    generator = torch.Generator().manual_seed(3)
    while bool((written < case.lengths).any()):
        new = torch.minimum(torch.randint(0, 12, (len(LENGTHS),), generator=generator).int(), case.lengths - written)
        width = max(1, int(new.max()))
        key, value = (torch.full((len(LENGTHS), width, 3, 16), torch.nan) for _ in range(2))
        for b, count in enumerate(new.tolist()):
            rows = slice(int(written[b]), int(written[b]) + count)
            key[b, width - count :] = case.keys[b][::2, rows].transpose(0, 1).float()
            value[b, width - count :] = case.values[b][::2, rows].transpose(0, 1).float()
        written += new
        ops.write_kv(key, value, KV(k_cache, v_cache, case.block_table, written), new)
    torch.testing.assert_close(k_cache, case.k_cache, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(v_cache, case.v_cache, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float64, 1e-12)]
)
def test_dtypes(dtype, tolerance):
    case = Case(8, 2, 16, 16, dtype)
    importance = torch.empty(len(LENGTHS), 1, 64, dtype=torch.promote_types(dtype, torch.float32))
    arguments = (case.query, case.kv, case.scale)
    output = ops.full_attention_with_importance(*arguments, ["unified"], importance)
    assert output.dtype == dtype
    for b, length in enumerate(LENGTHS):
        expected = torch.stack([case.attend(b, head, range(length)) for head in range(8)])
        assert (output[b].double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("rules", [["per_head"], ["per_group", "unified"]])
@pytest.mark.parametrize("run", [1, 2**20])
def test_sequences_that_share_their_blocks(rules, run, monkeypatch):
    """Decode steps of one sequence, several at once, beside other sequences: each as if it were alone."""
    case = Case(6, 2, 16, 64, dtype=torch.float64, lengths=(60, 33))
    rows = torch.tensor([0, 0, 0, 1, 0, 0, 0])
    lengths = torch.tensor([7, 60, 31, 33, 0, 60, 1], dtype=torch.int32)
    query, table = torch.randn(7, 6, 16, dtype=torch.float64), case.block_table[rows]
    monkeypatch.setattr(reference, "_RUN", run)
    importance = torch.full((7, 6 if rules == ["per_head"] else 3, 64), torch.nan, dtype=torch.float64)
    kv = KV(case.k_cache, case.v_cache, table, lengths)
    output = ops.full_attention_with_importance(query, kv, case.scale, rules, importance)
    for b, length in enumerate(lengths.tolist()):
        alone = torch.full_like(importance[:1], torch.nan)
        one = query[b : b + 1], kv.of(slice(b, b + 1)), case.scale
        torch.testing.assert_close(output[b : b + 1], ops.full_attention_with_importance(*one, rules, alone))
        torch.testing.assert_close(importance[b, :, :length], alone[0, :, :length])
        torch.testing.assert_close(output[b : b + 1], ops.full_attention(*one))
