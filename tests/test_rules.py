"""Rules of choice; a new one is one object, which plans, operations, kernels and methods take by its name."""

from __future__ import annotations

import pytest
import torch

from test_ops import Case
from tidaldecode import ModelShape, TidalPlan, ops
from tidaldecode.errors import InputError
from tidaldecode.methods.oracle import OracleAttention
from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.ops import Choice, reference
from tidaldecode.rules import RULES, Rule

SHAPE = ModelShape(num_layers=4, num_query_heads=8, num_kv_heads=2, head_dim=16)
ROLES = ("full", "select", "sparse", "sparse")
LENGTHS = (60, 33, 7)


@pytest.fixture
def pairs(monkeypatch):
    """Two neighbouring query heads together."""
    monkeypatch.setitem(RULES, "per_pair", Rule("per_pair", lambda heads, kv_heads: heads // 2))
    return "per_pair"


@pytest.fixture
def case():
    return Case(8, 2, 16, 64, lengths=LENGTHS)


def test_what_each_rule_chooses_by():
    scores = torch.randn(3, 2, 4, 9)
    probabilities = scores.softmax(-1)
    assert torch.equal(RULES["per_head"].importance(scores, probabilities), scores.flatten(1, 2))
    torch.testing.assert_close(RULES["per_group"].importance(scores, probabilities), probabilities.mean(2))
    torch.testing.assert_close(RULES["unified"].importance(scores, probabilities)[:, 0], probabilities.mean((1, 2)))
    assert [SHAPE.num_sets(rule) for rule in RULES] == [1, 2, 8]
    assert [SHAPE.sets_per_kv_head(rule) for rule in RULES] == [1, 1, 4]


def test_a_rule_that_there_is_not():
    with pytest.raises(InputError, match="selection: Input should be 'per_head', 'per_group' or 'unified'$"):
        TidalPlan.validated(roles=ROLES, selection="per_pair", token_budget=9)
    for source in ("1:per_pair:2", "1:per_head", "1:unified:0", "unified"):
        with pytest.raises(InputError, match="write LAYER:unified, LAYER:per_group:H or LAYER:per_head:H"):
            TidalPlan.validated(roles=ROLES, selection="unified", token_budget=9, sources={2: (source,)})


def test_plans_name_a_new_rule(pairs):
    plan = TidalPlan.validated(roles=ROLES, selection=pairs, token_budget=9, sources={3: ["1:per_pair:2"] * 8})
    assert TidalPlan.model_validate_json(plan.to_json()) == plan
    attention = DecodeAttention(plan, SHAPE)
    assert attention.writes == {1: [pairs]} and attention.num_sets == 4
    assert attention.head_to_set[2].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and attention.head_to_set[3].tolist() == [2]
    assert attention.tokens_read(100) == {0: 100, 1: 100, 2: 18, 3: 9}
    assert plan.sets_per_kv_head(SHAPE) == 1.5


def test_a_new_rule_chooses_by_its_own_heads(pairs, case):
    oracle = OracleAttention(SHAPE, 7, pairs)
    oracle.begin(case.lengths, 64)
    output = oracle.attend(0, case.query, case.kv, case.scale)
    for b, length in enumerate(LENGTHS):
        importance = case.scores(b).softmax(-1).view(4, 2, length).mean(1)
        for head in range(8):
            chosen = [*importance[head // 2, :-1].topk(min(6, length - 1)).indices.tolist(), length - 1]
            torch.testing.assert_close(output[b, head].double(), case.attend(b, head, chosen), rtol=1e-4, atol=1e-5)


@pytest.mark.kernels
def test_kernels_know_a_new_rule(pairs, case):
    pytest.importorskip("triton")
    kernels = pytest.importorskip("tidaldecode.ops.kernels")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("query", "k_cache", "v_cache", "block_table", "lengths"):
        setattr(case, name, getattr(case, name).to(device))
    rules = [pairs, "unified"]
    importance, wanted = torch.zeros(2, 3, 5, 64, device=device)
    kernels.full_attention_with_importance(case.query, case.kv, case.scale, rules, importance)
    reference.full_attention_with_importance(case.query, case.kv, case.scale, rules, wanted)
    for b, length in enumerate(LENGTHS):
        torch.testing.assert_close(importance[b, :, :length], wanted[b, :, :length], rtol=1e-4, atol=1e-6)
    table, expected = torch.zeros(2, 3, 5, 9, dtype=torch.int32, device=device)
    choice = Choice.alike(case.lengths, 9, 2, 1)
    kernels.full_attention_with_selection(case.query, case.kv, case.scale, rules, choice, 64, table)
    reference.full_attention_with_selection(case.query, case.kv, case.scale, rules, choice, 64, expected)
    assert torch.equal(table.sort(-1).values, expected.sort(-1).values)
    assert ops.has_kernel(case.query) == (device.type == "cuda")
