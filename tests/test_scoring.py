"""Teacher-forced decoding in one pass: the logits of real decode steps through the cache, by every method."""

from __future__ import annotations

import pytest
import torch

from families import plan_for
from tidaldecode import InputError, ModelShape, TidalCache, TidalPlan, apply
from tidaldecode.evaluate import scoring
from tidaldecode.evaluate.scoring import score_tokens, step_logits, steps_at_once
from tidaldecode.methods.method import Method
from tidaldecode.methods.oracle import OracleAttention
from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.models import model_shape
from tidaldecode.ops import KV

PROMPT, STEPS = 45, 22  # the steps cross the borders of pages of 4, 8 and 16
IDS = torch.randint(2, 260, (1, PROMPT + STEPS + 1), generator=torch.Generator().manual_seed(1))


def mapped(config, **options):
    """A plan whose sparse heads read sets of other heads, layers and rules."""
    plan = plan_for(config, "per_head", **options)
    sources = {
        2: ["1:per_group:1", "1:per_group:0", "1:unified", "1:per_head:5", "1:per_head:0", "1:unified"],
        5: ["4:per_head:3", "1:unified", "4:per_group:1", "4:unified", "1:per_group:0", "4:per_head:0"],
        6: ["4:unified"] * 6,
    }
    return TidalPlan.validated(**{**plan.model_dump(), "sources": sources})


def tidal(budget=None, selection="unified", **options):
    return lambda config: Method.named("tidal", budget, plan_for(config, selection, **options))


class EachStep:
    """A plan as `apply` runs it, its fraction one of each step's context."""

    def __init__(self, plan):
        self.attention = lambda shape, context: DecodeAttention(plan, shape)


METHODS = {
    "full": lambda config: Method.named("full"),
    **{f"tidal {rule}": tidal(16, rule) for rule in ("per_head", "per_group", "unified")},
    "tidal sinks and recent": tidal(24, sink_tokens=2, recent_tokens=0.25),
    "tidal sources": lambda config: Method.named("tidal", 16, mapped(config)),
    "tidal fraction": tidal(0.3),
    "tidal fraction of the plan": tidal(token_budget=0.3, recent_tokens=0.2),
    "tidal fraction of each step": lambda config: EachStep(plan_for(config, "unified", token_budget=0.3)),
    "tidal between": tidal(55),  # of some steps the whole context
    "tidal above": tidal(400, "per_head"),
    "quest": lambda config: Method.named("quest", 24, page_size=4),
    "quest everywhere": lambda config: Method.named("quest", 32, page_size=8, full_layers=0),
    "quest fraction": lambda config: Method.named("quest", 0.6, page_size=8),
    "quest above": lambda config: Method.named("quest", 400),
    "streaming": lambda config: Method.named("streaming", 16),
    "streaming fraction": lambda config: Method.named("streaming", 0.4),
    "streaming between": lambda config: Method.named("streaming", 55),
    "oracle per_head": lambda config: Method.named("oracle", 6),
    "oracle unified": lambda config: Method.named("oracle", 6, selection="unified"),
    "oracle behind full layers": lambda config: Method.named("oracle", 6, full_layers=2),
    "oracle between": lambda config: Method.named("oracle", 55),
}


def attention(model, name):
    return METHODS[name](model.config).attention(model_shape(model.config), PROMPT)


def prompt_cache(model, name="full", tokens=PROMPT, capacity=PROMPT + STEPS):
    """A cache that holds the prompt and goes on by a method."""
    cache = TidalCache(model.config, model._tidaldecode.plan, capacity)
    model(IDS[:, :tokens], past_key_values=cache, logits_to_keep=1)
    cache.attention = attention(model, name)
    return cache


def steps(model, cache, first=PROMPT, count=STEPS):
    """Logits of real decode steps, [1, count, V]."""
    ids = IDS[:, first : first + count]
    return torch.cat([model(token, past_key_values=cache).logits for token in ids.split(1, 1)], 1)


@pytest.fixture
def llama(tiny):
    return apply(tiny("llama").double(), "full")


@pytest.fixture
def at_once(monkeypatch):
    """Sets how many steps go in one pass."""
    return lambda count: monkeypatch.setattr(scoring, "steps_at_once", lambda model, capacity: count)


@pytest.mark.parametrize("name", METHODS)
def test_one_pass_equals_decode_steps(llama, at_once, name):
    expected = steps(llama, prompt_cache(llama, name))
    if "above" not in name and name != "full":  # the method shows
        assert (expected - steps(llama, prompt_cache(llama))).abs().max() > 1e-3
    for count in (STEPS, 7, 1):  # 22 = 7 + 7 + 7 + 1: the last pass is of one step
        at_once(count)
        cache = prompt_cache(llama, name)
        parts = list(step_logits(llama, cache, IDS[:, PROMPT : PROMPT + STEPS]))
        assert [part.shape[1] for part in parts] == [count] * (STEPS // count) + [STEPS % count] * (STEPS % count > 0)
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["full", "tidal sources", "quest", "streaming", "oracle per_head"])
def test_one_pass_equals_decode_steps_in_float32(tiny, name):
    model = apply(tiny("llama"), "full")
    expected = steps(model, prompt_cache(model, name))
    (logits,) = step_logits(model, prompt_cache(model, name), IDS[:, PROMPT : PROMPT + STEPS])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt_neox", "phi3", "gemma", "qwen3"])
def test_other_families(tiny, family):
    model = apply(tiny(family).double(), "full")
    for name in ("tidal unified", "quest"):
        expected = steps(model, prompt_cache(model, name))
        (logits,) = step_logits(model, prompt_cache(model, name), IDS[:, PROMPT : PROMPT + STEPS])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_one_pass_equals_captured_steps(tiny, name):
    """On a GPU, by the kernels."""
    model = apply(tiny("llama").cuda(), "full")
    ids = IDS.cuda()

    def prompt():
        cache = TidalCache(model.config, model._tidaldecode.plan, PROMPT + STEPS)
        model(ids[:, :PROMPT], past_key_values=cache, logits_to_keep=1)
        cache.attention = attention(model, name)
        return cache

    cache = prompt()
    expected = [model(token, past_key_values=cache).logits for token in ids[:, PROMPT : PROMPT + STEPS].split(1, 1)]
    assert cache.session.step is not None
    (logits,) = step_logits(model, prompt(), ids[:, PROMPT : PROMPT + STEPS])
    torch.testing.assert_close(logits, torch.cat(expected, 1), rtol=1e-4, atol=1e-4)


def test_one_prompt_serves_all_methods(llama, at_once):
    """In any order, each as if the prompt had been read for it alone."""
    at_once(9)
    cache = prompt_cache(llama)
    for name in [*METHODS, *reversed(METHODS)]:
        cache.attention = attention(llama, name)
        logits = torch.cat(list(step_logits(llama, cache, IDS[:, PROMPT : PROMPT + STEPS])), 1)
        assert cache.get_seq_length() == PROMPT + STEPS
        cache.crop(-STEPS)
        alone = torch.cat(list(step_logits(llama, prompt_cache(llama, name), IDS[:, PROMPT : PROMPT + STEPS])), 1)
        assert torch.equal(logits, alone), name


@pytest.mark.parametrize("name", METHODS)
def test_decoding_goes_on_behind_a_pass(llama, name):
    """Steps, a pass, steps: as steps alone."""
    expected = steps(llama, prompt_cache(llama, name))
    cache = prompt_cache(llama, name)
    before = steps(llama, cache, count=5)
    (between,) = step_logits(llama, cache, IDS[:, PROMPT + 5 : PROMPT + 15])
    behind = steps(llama, cache, first=PROMPT + 15, count=STEPS - 15)
    torch.testing.assert_close(torch.cat([before, between, behind], 1), expected, rtol=0, atol=1e-9)


def test_a_likelihood_that_is_not_finite_is_no_score(tiny):
    """float16 overflows: neither a perplexity nor a needle that was missed."""
    model = apply(tiny("llama").half(), "full")
    model.lm_head.weight.data.mul_(60000)
    with pytest.raises(InputError, match="not finite: float16 overflows; give --dtype bfloat16 or float32"):
        score_tokens(model, prompt_cache(model), IDS[:, PROMPT : PROMPT + STEPS])


def test_frequencies_that_vary_with_the_context(tiny):
    """RoPE of a whole pass goes by its largest position: each step has a pass of its own."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = apply(tiny("llama", rope_parameters=rope, max_position_embeddings=48).double(), "full")
    expected = steps(model, prompt_cache(model, "tidal unified"))
    parts = list(step_logits(model, prompt_cache(model, "tidal unified"), IDS[:, PROMPT : PROMPT + STEPS]))
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-9)


def test_scores_of_tokens(llama, at_once):
    at_once(8)
    expected = steps(llama, prompt_cache(llama, "quest")).log_softmax(-1)[0]
    token = IDS[0, PROMPT + 1 :]
    found = score_tokens(llama, prompt_cache(llama, "quest"), IDS[:, PROMPT:])
    wanted = expected[torch.arange(STEPS), token].float()
    torch.testing.assert_close(found.log_probs, wanted, rtol=1e-5, atol=1e-5)
    best = IDS.clone()
    best[0, PROMPT + 1] = expected[0].argmax()
    assert score_tokens(llama, prompt_cache(llama, "quest"), best[:, PROMPT:]).greedy[0]
    assert torch.equal(found.greedy, expected.argmax(-1) == token)


def test_an_empty_cache(llama):
    """The first token attends to itself."""
    cache = TidalCache(llama.config, llama._tidaldecode.plan, PROMPT)
    (logits,) = step_logits(llama, cache, IDS[:, :PROMPT])
    torch.testing.assert_close(logits, llama(IDS[:, :PROMPT], use_cache=False).logits, rtol=0, atol=1e-9)


def test_steps_at_once_go_by_sizes(tiny):
    model = tiny("llama")
    assert steps_at_once(model, 64) == 1024
    assert steps_at_once(model, 2**20) == 2**27 // (4 * 6 * 2**20)
    assert steps_at_once(model, 2**30) == 1
    assert steps_at_once(tiny("llama", vocab_size=2**18), 64) == 2**27 // (4 * 2**18)


def test_wrong_passes(llama, tiny):
    for ids, message in ((IDS.expand(2, -1), "one sequence at a time, not 2"), (IDS[:, :0], "no tokens")):
        with pytest.raises(InputError, match=message):
            next(step_logits(llama, prompt_cache(llama), ids))
    with pytest.raises(InputError, match="no plan"):
        next(step_logits(tiny("llama"), prompt_cache(llama), IDS))


def test_wrong_methods(llama):
    plan = plan_for(llama.config, sink_tokens=4)
    for arguments, message in (
        ({"name": "magic"}, "method 'magic' is unknown: give one of full, tidal"),
        ({"name": "tidal"}, "needs a plan"),
        ({"name": "full", "budget": 64}, "leave out the budget"),
        ({"name": "quest"}, "'quest' needs a budget"),
        ({"name": "oracle", "budget": 1}, "budget 1 is too small"),
        ({"name": "quest", "budget": 31}, "quest: budget 31 is too small: two pages of 16 make 32"),
        ({"name": "oracle", "budget": 1.5}, "lies in"),
        (
            {"name": "oracle", "budget": 9, "selection": "per_tail"},
            "selection 'per_tail' is unknown: give one of unified",
        ),
        ({"name": "quest", "budget": 64, "page_size": 12}, "page size 12 is no power of two"),
        ({"name": "tidal", "budget": 5, "plan": plan}, "token_budget: 5 is below"),
    ):
        with pytest.raises(InputError, match=message):
            Method.named(**arguments).attention(model_shape(llama.config), 64)


@pytest.mark.parametrize("selection", ["per_head", "per_group", "unified"])
def test_the_oracle_reads_its_own_largest_scores(selection):
    """By float64 formulas: the new token, and of the others those that the scores of the query choose."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(2, heads, 40, 8, generator=generator).double() for heads in (6, 2, 2))
    query, lengths = query[:, :, 0], torch.tensor([40, 23], dtype=torch.int32)
    oracle = OracleAttention(ModelShape(num_layers=1, num_query_heads=6, num_kv_heads=2, head_dim=8), 7, selection)
    oracle.begin(lengths, 40)
    table = torch.arange(2, dtype=torch.int32)[:, None]
    output = oracle.attend(0, query, KV(keys.transpose(1, 2), values.transpose(1, 2), table, lengths), 0.3)
    for b, length in enumerate(lengths.tolist()):
        scores = torch.einsum("hd,htd->ht", query[b], keys[b, :, :length].repeat_interleave(3, 0)) * 0.3
        means = scores.softmax(-1).view(2, 3, length).mean(1)
        importance = {
            "per_head": scores,
            "per_group": means.repeat_interleave(3, 0),
            "unified": means.mean(0).expand(6, -1),
        }[selection]
        for head in range(6):
            chosen = [*importance[head, : length - 1].topk(6).indices.tolist(), length - 1]
            expected = scores[head, chosen].softmax(0) @ values[b, head // 3, chosen]
            torch.testing.assert_close(output[b, head], expected)
    assert oracle.tokens_read(40) == {0: 21 if selection == "per_head" else 7}
    assert oracle.tokens_read(5) == {0: 5}
