"""Drafting out of verification: what the passes choose, what draft steps read, and which cache they go through."""

from __future__ import annotations

import pytest
import torch

import tidaldecode
from families import plan_for, ragged_batch
from tidaldecode import ModelShape, TidalCache, TidalPlan, ops
from tidaldecode.evaluate.generation import generate_measured
from tidaldecode.evaluate.generation_settings import GenerationSettings, Passes
from tidaldecode.methods.method import Method
from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.methods.verified import VerifiedDrafts
from tidaldecode.ops import KV
from tidaldecode.plans import shipped_plans

SHAPE = ModelShape(num_layers=2, num_query_heads=4, num_kv_heads=2, head_dim=8)
SETS = {"per_head": 4, "per_group": 2, "unified": 1}


def plan(**fields):
    return TidalPlan(**{"roles": ("full", "select"), "selection": "unified", "token_budget": 8, **fields})


def lengths_of(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("rule", SETS)
@pytest.mark.parametrize("accepted", [(0, 0, 0), (3, 0, 1), (3, 3, 3)])
def test_drafts_read_what_was_chosen_and_what_came_since(rule, accepted):
    """The second sequence is shorter than its budget. What is not to be read is NaN by then."""
    torch.manual_seed(0)
    passed, past = 4, lengths_of(30, 6, 21)
    attention = VerifiedDrafts(plan(selection=rule, sink_tokens=1, recent_tokens=2), SHAPE, longest=3)
    table, new = torch.arange(3, dtype=torch.int32)[:, None], torch.full_like(past, passed)
    keys, values = torch.randn(2, 2, 3, 50, 2, 8).double()
    queries = torch.randn(2, 3, passed, 4, 8).double()
    attention.begin_pass(past + passed, new, 50)
    for layer in range(2):
        chunk = queries[layer], KV(keys[layer], values[layer], table, past + passed), new, 8**-0.5
        torch.testing.assert_close(attention.verify(layer, *chunk), ops.multi_query_attention(*chunk))
    lengths = past + 1 + lengths_of(*accepted)
    for _ in range(3):
        lengths = lengths + 1
        attention.begin(lengths, 50)
        assert attention.counts.tolist() == (past.clamp(max=8) + lengths - past).tolist()
        for layer in range(2):
            query = torch.randn(3, 4, 8).double()
            k_cache, v_cache = keys[layer].clone(), values[layer].clone()
            for b, length in enumerate(lengths.tolist()):
                scores = queries[layer, b, 0].view(2, 2, 8) @ keys[layer, b, : past[b] + 1].permute(1, 2, 0) * 8**-0.5
                importance = scores.softmax(-1).view(SETS[rule], -1, int(past[b]) + 1).mean(1)
                free = importance[:, 1 : past[b] - 2].topk(min(5, int(past[b]) - 3)).indices + 1
                forced = [0, *range(int(past[b]) - 2, length)]
                reads = [{*forced, *row.tolist()} for row in free]
                for group in range(2):
                    mine = reads[group * len(reads) // 2 : (group + 1) * len(reads) // 2] or reads
                    unread = sorted(set(range(50)) - set().union(*mine))
                    k_cache[b, unread, group], v_cache[b, unread, group] = torch.nan, torch.nan
                for head in range(4):
                    chosen = sorted(reads[head * len(reads) // 4])
                    weights = (k_cache[b, chosen, head // 2] @ query[b, head] * 8**-0.5).softmax(0)
                    expected = weights @ v_cache[b, chosen, head // 2]
                    output = attention.attend(layer, query, KV(k_cache, v_cache, table, lengths), 8**-0.5)
                    torch.testing.assert_close(output[b, head], expected)


def test_a_fraction_of_each_context_is_chosen():
    attention = VerifiedDrafts(plan(token_budget=0.25, recent_tokens=0.5), SHAPE, longest=2)
    for past in ([40, 12], [44, 16]):
        attention.begin_pass(lengths_of(*past) + 3, lengths_of(3, 3), 60)
        attention.begin(lengths_of(*past) + 4, 60)
        assert attention.counts.tolist() == [length // 4 + 4 for length in past]
    assert attention.indices.shape == (2, 2, 1, 15 + 5)


def test_a_sequence_that_ended_far_back_reads_nothing():
    attention = VerifiedDrafts(plan(), SHAPE, longest=2)
    attention.begin_pass(lengths_of(40, 30) + 3, lengths_of(3, 3), 60)
    attention.begin(lengths_of(41, 12), 60)
    assert attention.counts.tolist() == [9, 0]


def test_what_a_draft_step_reads():
    drafts = VerifiedDrafts(plan(roles=("full", None, "select")), SHAPE, longest=2)
    assert drafts.tokens_read(100) == {0: 13, 2: 13}
    assert drafts.kv_read_fraction(100) == pytest.approx(0.13)
    assert drafts.kv_read_fraction(12) == 1
    assert VerifiedDrafts(plan(selection="per_head"), SHAPE, longest=2).kv_read_fraction(100) == pytest.approx(0.26)


def test_one_cache_for_all_drafts(tiny):
    config = tiny().config
    by_roles = plan_for(config)
    cache = TidalCache(config, by_roles, 60)
    assert cache.for_drafts(4) is cache
    cache.use_plan(by_roles.with_drafting("verification"))
    drafts = cache.for_drafts(4)
    assert drafts is not cache and drafts.layers is cache.layers and drafts.sequences is cache.sequences
    assert drafts.session.graphs is not cache.session.graphs and isinstance(cache.attention, DecodeAttention)
    assert cache.for_drafts(3) is drafts and drafts.for_drafts(9) is drafts
    assert cache.for_drafts(5) is not drafts
    drafts = cache.for_drafts(5)
    cache.begin(2, 7, torch.device("cpu"))  # another number of sequences
    assert cache.for_drafts(5) is not drafts
    cache.use_plan(by_roles)
    assert cache.for_drafts(5) is cache


def test_decoding_by_the_plan_is_what_it_was(tiny):
    """In a cache that was drafted in before, too."""
    model = tiny().double()
    ids, mask = ragged_batch()
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    by_roles = plan_for(model.config, token_budget=4)
    tidaldecode.apply(model, by_roles)
    texts = []
    for drafting in ("plan", "verification"):
        cache = TidalCache(model.config, by_roles.with_drafting(drafting), 60)
        exact = model.generate(ids, past_key_values=cache, lossless=3, **options)
        cache.crop(39 - cache.get_seq_length())
        texts.append(model.generate(ids, past_key_values=cache, **options))
    assert torch.equal(*texts) and not torch.equal(texts[0], exact)


def test_no_draft_reads_everything(tiny, monkeypatch):
    """Every step of 1 token but the first pass goes through sparse attention; figures say so."""
    model = tidaldecode.apply(tiny(), plan_for(tiny().config, token_budget=8).with_drafting("verification"))
    for name in ("full_attention", "full_attention_with_selection"):
        monkeypatch.setattr(ops, name, lambda *args: pytest.fail("a layer of a draft read everything"))
    ids = ragged_batch((200,))[0]
    tokenizer = type("Bytes", (), {"decode": lambda self, ids, **_: "", "all_special_ids": []})()
    settings = GenerationSettings(max_new_tokens=20, passes=Passes(lossless=4))
    done, cache = generate_measured(model, tokenizer, ids, settings)
    assert cache.rounds.drafted[:2] == [0, 4]
    rounds, drafts = len(cache.rounds.drafted), sum(cache.rounds.drafted)
    assert done.kv_read_fraction == pytest.approx((rounds + drafts * (8 + 9) / 210) / 19, rel=0.02)


def test_results_tell_ways_to_draft_apart():
    """Those of plans that draft by their roles keep the digest that they had before there was another way."""
    by_roles = shipped_plans()["smollm2-135m"]
    digests = [
        Method.named("tidal", 64, way).key()["plan_digest"]
        for way in (by_roles, by_roles.with_drafting("verification"))
    ]
    assert digests[0] == "19bac751638c" != digests[1]
