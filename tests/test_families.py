"""Every family, every selection, ragged batches: against the model's own attention, and against a dense oracle."""

from __future__ import annotations

import pytest
import torch

import tidaldecode
from dense_oracle import DenseOracle
from families import FAMILIES, plan_for, ragged_batch, shape_of
from tidaldecode import TidalCache
from tidaldecode.models import TESTED_ARCHITECTURES, model_shape

SELECTIONS = ("per_head", "per_group", "unified")
STEPS = 12


def generate(model, ids, mask, **options):
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)


def test_the_list_of_tested_families_is_true():
    assert set(FAMILIES) == set(TESTED_ARCHITECTURES)


@pytest.mark.parametrize("family", FAMILIES)
def test_shape(tiny, family):
    config = tiny(family).config
    assert model_shape(config).model_copy(update={"name": None}) == shape_of(config)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_budget_of_the_context_is_full_attention(tiny, family, selection):
    model = tiny(family)
    ids, mask = ragged_batch()
    expected = generate(model, ids, mask)
    tidaldecode.apply(model, plan_for(model.config, selection, token_budget=40 + STEPS))
    output = generate(model, ids, mask)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)
    assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_smaller_budget_equals_the_dense_oracle(tiny, family, selection):
    model = tiny(family)
    ids, mask = ragged_batch()
    plan = plan_for(model.config, selection, token_budget=16, sink_tokens=2, recent_tokens=0.25)
    assert_equals_oracle(model, plan, ids, mask)


@pytest.mark.parametrize(
    "fields", [{"token_budget": 0.3}, {"token_budget": 36, "recent_tokens": 5}, {"token_budget": 2}]
)
def test_other_budgets_equal_the_dense_oracle(tiny, fields):
    """A fraction of the context, one that only the longest sequences exceed, and the smallest there is."""
    model = tiny("llama")
    ids, mask = ragged_batch((40, 23, 31, 5))
    assert_equals_oracle(model, plan_for(model.config, "per_group", **fields), ids, mask)


def assert_equals_oracle(model, plan, ids, mask):
    """Logits of every step, and the same tokens chosen in every select layer.

    In float64: in float32 two scores at the border of the budget can lie within rounding of each other.
    """
    model.double()
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the grouped one has no float64
    width = ids.shape[1]
    tidaldecode.apply(model, plan)
    cache = TidalCache(model.config, plan, width + STEPS)
    output = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
    logits, tables, counts = [output.logits[:, -1]], [], []
    for _ in range(STEPS):
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        output = model(
            ids[:, -1:], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1, past_key_values=cache
        )
        logits.append(output.logits[:, -1])
        tables.append(cache.attention.indices.clone())
        counts.append(cache.attention.counts.clone())
    tidaldecode.remove(model)

    oracle = DenseOracle(plan, mask, width)
    expected = oracle.logits(model, ids)[:, width - 1 :]
    torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=0, atol=1e-7)
    attention = cache.attention
    for layer, rows in attention.head_to_set.items():
        nearest = max(below for below in oracle.chosen if below < layer)
        heads = attention.shape.num_query_heads
        for step in range(STEPS):
            for b in range(len(ids)):
                pad = int((1 - mask[b]).sum())
                for head in range(heads):
                    row = int(rows[head * len(rows) // heads])
                    read = set(tables[step][b, row, : counts[step][b]].tolist())
                    allowed = oracle.chosen[nearest][b, head, width + step, pad : width + step + 1]
                    assert read == set(allowed.nonzero().flatten().tolist())
    smallest = min(int(count.min()) for count in counts)
    assert smallest < width  # the budget did bind
