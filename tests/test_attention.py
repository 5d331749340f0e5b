"""A plan at work on one step: which sets are written, which head reads which, and what a step reads."""

from __future__ import annotations

import pytest
import torch

from tidaldecode import ModelShape, TidalPlan
from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.ops import KV

SHAPE = ModelShape(num_layers=6, num_query_heads=4, num_kv_heads=2, head_dim=8)
ROLES = ("full", "select", "sparse", "select", "sparse", "sparse")


def plan(**fields):
    return TidalPlan(**{"roles": ROLES, "selection": "per_head", "token_budget": 8, **fields})


@pytest.mark.parametrize(
    ("selection", "maps"),
    [
        ("per_head", {2: [0, 1, 2, 3], 4: [4, 5, 6, 7], 5: [4, 5, 6, 7]}),
        ("per_group", {2: [0, 1], 4: [2, 3], 5: [2, 3]}),
        ("unified", {2: [0], 4: [1], 5: [1]}),
    ],
)
def test_heads_read_the_nearest_select_layer(selection, maps):
    attention = DecodeAttention(plan(selection=selection), SHAPE)
    assert {layer: rows.tolist() for layer, rows in attention.head_to_set.items()} == maps


def test_sources_choose_layer_rule_and_head():
    sources = {
        4: ("1:per_head:3", "3:unified", "3:per_group:1", "1:per_head:3"),
        5: ("3:unified", "3:unified", "3:per_group:0", "3:per_group:0"),
    }
    attention = DecodeAttention(plan(sources=sources), SHAPE)
    # rows: layer 1 per head 0-3, layer 3 unified 4 and per group 5-6
    assert attention.writes == {1: ["per_head"], 3: ["unified", "per_group"]}
    assert attention.num_sets == 7
    assert attention.head_to_set[2].tolist() == [0, 1, 2, 3]
    assert attention.head_to_set[4].tolist() == [3, 4, 6, 3]
    assert attention.head_to_set[5].tolist() == [4, 5]  # the heads of a KV head agree: one set each


def test_sources_attend_to_the_sets_they_name():
    """A head with a source gives what it would give alone with that layer's choice."""
    torch.manual_seed(0)
    length = 30
    sources = {2: ("1:per_group:1", "1:per_group:1", "1:unified", "1:per_head:0")}
    attention = DecodeAttention(plan(sources=sources), SHAPE)
    lengths = torch.tensor([length]).int()
    table = torch.zeros(1, 1).int()
    keys, values = torch.randn(3, 1, length, 2, 8), torch.randn(3, 1, length, 2, 8)
    queries = torch.randn(3, 1, 4, 8)
    attention.begin(lengths, capacity=64)
    for layer in range(3):
        output = attention.attend(layer, queries[layer], KV(keys[layer], values[layer], table, lengths), 8**-0.5)
    scores = torch.einsum("hd,thd->ht", queries[1, 0], keys[1, 0].repeat_interleave(2, 1)) * 8**-0.5
    probabilities = scores.softmax(-1)
    importance = [probabilities[2:].mean(0)] * 2 + [probabilities.mean(0), scores[0]]
    for head in range(4):
        chosen = [*importance[head][:-1].topk(7).indices.tolist(), length - 1]
        own = (queries[2, 0, head] @ keys[2, 0, chosen, head // 2].T * 8**-0.5).softmax(-1)
        torch.testing.assert_close(output[0, head], own @ values[2, 0, chosen, head // 2])


def test_what_a_step_reads():
    assert DecodeAttention(plan(selection="unified"), SHAPE).tokens_read(100) == dict(
        enumerate([100, 100, 8, 100, 8, 8])
    )
    # two query heads of a KV head with sets of their own read both
    assert DecodeAttention(plan(), SHAPE).tokens_read(100)[2] == 16
    assert DecodeAttention(plan(), SHAPE).kv_read_fraction(100) == pytest.approx((3 * 100 + 3 * 16) / 600)
    assert DecodeAttention(plan(), SHAPE).kv_read_fraction(8) == 1
    assert DecodeAttention(plan(token_budget=0.2), SHAPE).tokens_read(100)[4] == 40
    shared = {2: ("1:unified", "1:unified", "1:per_head:0", "1:per_head:1")}
    assert DecodeAttention(plan(sources=shared), SHAPE).tokens_read(100)[2] == 12


def test_a_fraction_of_the_context_grows_with_each_sequence():
    attention = DecodeAttention(plan(token_budget=0.25, recent_tokens=0.5), SHAPE)
    for lengths in ([40, 12], [44, 16]):
        attention.begin(torch.tensor(lengths).int(), capacity=60)
        assert attention.counts.tolist() == [length // 4 for length in lengths]
    assert attention.indices.shape == (2, 8, 15)


BUDGETS = {1: 12, 3: 5}


def test_layers_that_choose_have_budgets_of_their_own():
    """Each head of a sparse layer reads all of the set that it names, of whichever budget."""
    torch.manual_seed(0)
    lengths, capacity = torch.tensor([30, 10]).int(), 64
    sources = {4: ("1:unified", "1:unified", "3:unified", "3:unified"), 5: ("3:unified",) * 4}
    attention = DecodeAttention(plan(selection="unified", budgets=BUDGETS, sources=sources), SHAPE)
    table = torch.arange(2)[:, None].int()
    keys, values, queries = torch.randn(6, 2, 30, 2, 8), torch.randn(6, 2, 30, 2, 8), torch.randn(6, 2, 4, 8)
    attention.begin(lengths, capacity)
    assert attention.counts.tolist() == [[5, 12], [5, 10]]  # the sets of one budget lie together, the smallest first
    outputs = [
        attention.attend(layer, queries[layer], KV(keys[layer], values[layer], table, lengths), 8**-0.5)
        for layer in range(6)
    ]
    for b, length in enumerate(lengths.tolist()):
        chosen = {}
        for layer, budget in BUDGETS.items():
            scores = torch.einsum("hd,thd->ht", queries[layer, b], keys[layer, b, :length].repeat_interleave(2, 1))
            importance = (scores * 8**-0.5).softmax(-1).mean(0)[:-1]
            chosen[layer] = [*importance.topk(min(budget, length) - 1).indices.tolist(), length - 1]
        for layer, heads in ((4, (1, 1, 3, 3)), (5, (3, 3, 3, 3))):
            for head, source in enumerate(heads):
                own = (queries[layer, b, head] @ keys[layer, b, chosen[source], head // 2].T * 8**-0.5).softmax(-1)
                expected = own @ values[layer, b, chosen[source], head // 2]
                torch.testing.assert_close(outputs[layer][b, head], expected)


def test_fractions_of_the_context_by_layer():
    attention = DecodeAttention(plan(selection="unified", token_budget=0.25, budgets={3: 0.5}), SHAPE)
    attention.begin(torch.tensor([40, 12]).int(), capacity=60)
    assert attention.counts.tolist() == [[10, 20], [3, 6]]
    assert attention.tokens_read(40) == dict(enumerate([40, 40, 10, 40, 20, 20]))


def test_what_a_step_reads_of_sets_with_budgets_of_their_own():
    sources = {4: ("1:unified", "1:unified", "1:unified", "3:unified")}
    attention = DecodeAttention(plan(selection="unified", budgets=BUDGETS, sources=sources), SHAPE)
    assert attention.tokens_read(100) == dict(enumerate([100, 100, 12, 100, (12 + 12 + 5) / 2, 5]))
    assert attention.tokens_read(10)[4] == (10 + 10 + 5) / 2
    assert attention.tokens_read(5)[4] == 5
