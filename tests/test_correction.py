"""Cache correction: after it the K and V of decoded tokens are a full prefill's."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

import tidaldecode
from families import FAMILIES, plan_for, ragged_batch
from tidaldecode import InputError, TidalCache, TidalPlan
from tidaldecode.evaluate.scoring import score_tokens
from tidaldecode.hf.second_pass import Correction

OPTIONS = {"do_sample": False, "eos_token_id": None}
FAMILIES_WITHOUT_WINDOWS = [family for family in FAMILIES if family != "gemma3_text"]


def prefilled(model, ids, mask, capacity=90):
    """A cache into which all tokens were read at once."""
    cache = TidalCache(model.config, TidalPlan.full(model.config.num_hidden_layers), capacity)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return cache


def largest_difference(one, other, start, stop):
    """Between K and V rows of tokens, `start` to `stop` from each sequence's first decoded one."""
    largest = 0.0
    assert torch.equal(one.sequences.lengths, other.sequences.lengths)
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        for b, length in enumerate(one.sequences.lengths.tolist()):
            first = length - stop
            for rows, exact in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                difference = (rows[b, :, first : length - start] - exact[b, :, first : length - start]).abs().max()
                largest = max(largest, float(difference))
    return largest


@pytest.mark.parametrize("family", FAMILIES_WITHOUT_WINDOWS)
def test_corrected_rows_are_a_prefills(tiny, family):
    model = tiny(family)
    if family in ("mixtral", "qwen3_moe"):
        near, far = 1e-3, 1e-2  # experts have no products in float64
    else:
        model, (near, far) = model.double(), (1e-9, 1e-4)
    ids, mask = ragged_batch((40, 23, 31))
    plan = plan_for(model.config, token_budget=4)
    tidaldecode.apply(model, plan)
    options = {**OPTIONS, "attention_mask": mask, "max_new_tokens": 13}  # 12 steps: 3 corrections of 4
    plain, corrected = (TidalCache(model.config, plan, 60) for _ in range(2))
    model.generate(ids, past_key_values=plain, **options)
    output = model.generate(ids, past_key_values=corrected, correction_interval=4, **options)
    assert corrected.correction is None
    exact = prefilled(model, output[:, :-1], torch.nn.functional.pad(mask, (0, 12), value=1))
    assert largest_difference(corrected, exact, 0, 12) < near
    output = model.generate(ids, past_key_values=(drifted := TidalCache(model.config, plan, 60)), **options)
    exact = prefilled(model, output[:, :-1], torch.nn.functional.pad(mask, (0, 12), value=1))
    assert largest_difference(drifted, exact, 0, 12) > far


@pytest.mark.parametrize("interval", [1, 3, 8])
def test_only_whole_intervals_are_corrected(tiny, interval):
    model = tiny("llama").double()
    ids, mask = ragged_batch((40, 23))
    plan = plan_for(model.config, token_budget=4)
    tidaldecode.apply(model, plan)
    cache = TidalCache(model.config, plan, 60)
    output = model.generate(
        ids, attention_mask=mask, past_key_values=cache, correction_interval=interval, max_new_tokens=11, **OPTIONS
    )
    exact = prefilled(model, output[:, :-1], torch.nn.functional.pad(mask, (0, 10), value=1))
    rest = 10 % interval
    assert largest_difference(cache, exact, rest, 10) < 1e-9
    assert rest == 0 or largest_difference(cache, exact, 0, rest) > 1e-6


def test_a_loop_of_its_own_and_a_second_prompt(tiny):
    """Tokens that are not corrected yet are before more of a prompt is read behind them."""
    model = tiny("llama").double()
    plan = plan_for(model.config, token_budget=4)
    tidaldecode.apply(model, plan)
    ids = ragged_batch((40,))[0]
    cache = TidalCache(model.config, plan, 60)
    cache.correction = Correction(5)
    model(ids[:, :20], past_key_values=cache)
    for token in ids[0, 20:27]:
        model(token.view(1, 1), past_key_values=cache)
    assert len(cache.correction) == 2
    model(ids[:, 27:], past_key_values=cache)
    assert len(cache.correction) == 0
    assert largest_difference(cache, prefilled(model, ids, torch.ones_like(ids)), 0, 20) < 1e-9
    model(ids[:, :1], past_key_values=cache)
    cache.crop(-1)
    assert len(cache.correction) == 0


@pytest.mark.parametrize("own_steps", [False, True])
@pytest.mark.parametrize("interval", [1, 3, 5, 20])
def test_scored_in_a_few_passes(tiny, interval, own_steps):
    """Teacher-forced decoding with correction, against step after step."""
    model = tiny("llama").double()
    plan = plan_for(model.config, token_budget=4)
    tidaldecode.apply(model, plan)
    ids = ragged_batch((40,))[0]
    one, other = (TidalCache(model.config, plan, 60) for _ in range(2))
    other.correction = Correction(interval)
    for cache in (one, other):
        model(ids[:, :24], past_key_values=cache)
    scores = score_tokens(model, one, ids[:, 24:], interval, own_steps)
    assert one.correction is None
    logits = [model(token.view(1, 1), past_key_values=other).logits[0, 0] for token in ids[0, 24:-1]]
    expected = torch.stack(logits).log_softmax(1).gather(1, ids[0, 25:, None])[:, 0]
    torch.testing.assert_close(scores.log_probs.double(), expected, rtol=0, atol=1e-5)
    assert one.get_seq_length() == other.get_seq_length() == 39
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        torch.testing.assert_close(mine.keys[..., :39, :], theirs.keys[..., :39, :], rtol=0, atol=1e-9)


def test_steps_that_wait_for_a_correction_leave_with_their_tokens(tiny):
    """Whatever takes tokens out of a cache; else the next correction would write them over other rows."""
    model = tiny("llama").double()
    tidaldecode.apply(model, plan := plan_for(model.config, token_budget=4))
    ids = torch.randint(2, 260, (1, 40), generator=torch.Generator().manual_seed(1))
    cache = TidalCache(model.config, plan, 90)
    cache.correction = Correction(50)
    model(ids[:, :30], past_key_values=cache)
    mark = cache.mark()
    for step in range(30, 33):
        model(ids[:, step : step + 1], past_key_values=cache)
    assert len(cache.correction) == 3
    cache.go_back(mark)
    assert len(cache.correction) == 0
    for step in range(30, 33):
        model(ids[:, step : step + 1], past_key_values=cache)
    # another interval for one call: what waited is corrected before it
    output = model.generate(ids[:, :34], past_key_values=cache, correction_interval=4, max_new_tokens=4, **OPTIONS)
    assert len(cache.correction) == 0 and cache.correction.interval == 50
    model(ids[:, 34:37], past_key_values=cache)
    exact = prefilled(model, torch.cat([output[:, :-1], ids[:, 34:37]], 1), torch.ones(1, 40).long())
    assert largest_difference(cache, exact, 0, 40) < 1e-9


def test_a_budget_of_the_whole_context_is_full_attention(tiny):
    model = tiny("llama").double()
    ids, mask = ragged_batch()
    options = {**OPTIONS, "attention_mask": mask, "max_new_tokens": 20}
    expected = model.generate(ids, **options)
    tidaldecode.apply(model, plan_for(model.config, token_budget=1.0))
    assert torch.equal(model.generate(ids, correction_interval=3, **options), expected)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("layer", [0, 3])
def test_a_stop_leaves_a_usable_cache(tiny, monkeypatch, stop, layer):
    model = tiny("llama").double()
    plan = plan_for(model.config)
    tidaldecode.apply(model, plan)
    ids, mask = ragged_batch()
    cache = TidalCache(model.config, plan, 90)
    attend = model.model.layers[layer].forward

    def stops(hidden, *args, **kwargs):
        if hidden.shape[1] == 4:
            raise stop
        return attend(hidden, *args, **kwargs)

    monkeypatch.setattr(model.model.layers[layer], "forward", stops)
    with pytest.raises(stop):
        model.generate(
            ids, attention_mask=mask, past_key_values=cache, correction_interval=4, max_new_tokens=20, **OPTIONS
        )
    monkeypatch.undo()
    assert cache.get_seq_length() == 44
    assert cache.sequences.lengths.tolist() == [44, 27, 35]
    logits = model(ids[:, -1:], past_key_values=cache).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("interval", [0, -3, 2.0, True, "8"])
def test_intervals_that_are_none(tiny, interval):
    model = tidaldecode.apply(tiny("llama"), "paper")
    with pytest.raises(InputError, match="correction_interval .* must be a positive whole number of tokens") as error:
        model.generate(ragged_batch()[0], correction_interval=interval, **OPTIONS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", [{"correction_interval": 4}, {"lossless": 4}])
def test_models_whose_tokens_cannot_run_again(tiny, option):
    (name,) = option
    ids = ragged_batch()[0]
    windows = tidaldecode.apply(tiny("gemma3_text"), "paper")
    with pytest.raises(InputError, match=f"'gemma3_text' has sliding-window layers.*leave out {name}"):
        windows.generate(ids, **option, **OPTIONS)
    parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    varying = tidaldecode.apply(tiny("llama", rope_parameters=parameters), "paper")
    with pytest.raises(InputError, match=f"'llama' has RoPE frequencies that vary.*leave out {name}"):
        varying.generate(ids, GenerationConfig(max_new_tokens=3), **option)
