"""Lossless decoding: full attention's tokens, whatever the plan drafts."""

from __future__ import annotations

import itertools
import threading

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

import tidaldecode
from chi_square import p_value
from families import FAMILIES, plan_for, ragged_batch
from tidaldecode import InputError, TidalCache, TidalPlan
from tidaldecode.hf.second_pass import Correction, DraftLength, Rounds, full_pass, lossless
from tidaldecode.hf.second_pass.tokens import TokenBuffer

GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
LENGTHS = (40, 23, 31, 5)


@pytest.fixture
def llama(tiny):
    return tiny("llama").double()


DRAFTING = pytest.mark.parametrize("drafting", ["plan", "verification"])


def plans(config, drafting="plan"):
    """Good and bad: everything read; a budget that binds; next to nothing read, so that drafts are hardly accepted."""
    budgets = {"good": 1.0, "middling": 0.7, "bad": 2}
    return {kind: plan_for(config, token_budget=budget).with_drafting(drafting) for kind, budget in budgets.items()}


def full_attention(model, ids, mask, **options):
    """What Transformers' own loop gives with full attention through the same kind of cache."""
    tidaldecode.apply(model, "full")
    output = model.generate(ids, attention_mask=mask, **options)
    tidaldecode.remove(model)
    return output


# ---- greedy


@pytest.mark.parametrize("kind", ["good", "middling", "bad"])
@pytest.mark.parametrize("batch", [1, 4])
@DRAFTING
def test_greedy_tokens_are_full_attentions(llama, kind, batch, drafting):
    ids, mask = ragged_batch(LENGTHS[:batch])
    expected = llama.generate(ids, attention_mask=mask, **GREEDY)
    plan = plans(llama.config, drafting)[kind]
    tidaldecode.apply(llama, plan)
    for length in (1, 2, 5, 8, 32, "auto"):
        cache = TidalCache(llama.config, plan, 100)
        output = llama.generate(ids, attention_mask=mask, past_key_values=cache, lossless=length, **GREEDY)
        assert torch.equal(output, expected), length
        if kind == "good" and length != "auto":
            drafted = cache.rounds.drafted[1:] if drafting == "verification" else cache.rounds.drafted
            assert drafted[:-1] == [length] * (len(drafted) - 1)
            assert cache.rounds.tokens[-len(drafted) :] == [batch * (count + 1) for count in drafted]
            assert sum(cache.rounds.tokens) == 23 * batch
        elif kind == "bad" and length != "auto":
            assert cache.rounds.accepted_per_round < 0.9 * (length + 1)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("llama", "gemma3_text")])
@DRAFTING
def test_families(tiny, family, drafting):
    model = tiny(family)
    ids, mask = ragged_batch()
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    tidaldecode.apply(model, plan_for(model.config).with_drafting(drafting))
    assert torch.equal(model.generate(ids, attention_mask=mask, lossless=3, **GREEDY), expected)


@DRAFTING
def test_the_cache_holds_what_it_would_hold(llama, drafting):
    """Lengths, and K and V of a full prefill: no trace of refused tokens, or of sparse layers."""
    ids, mask = ragged_batch(LENGTHS)
    plan = plans(llama.config, drafting)["bad"]
    tidaldecode.apply(llama, plan)
    cache = TidalCache(llama.config, plan, 100)
    output = llama.generate(ids, attention_mask=mask, past_key_values=cache, lossless=4, **GREEDY)
    assert cache.get_seq_length() == 40 + 23
    assert_exact(llama, cache, output[:, :-1], mask)


def assert_exact(model, cache, ids, mask, capacity=100):
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    exact = TidalCache(model.config, TidalPlan.full(model.config.num_hidden_layers), capacity)
    model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=exact)
    assert torch.equal(cache.sequences.lengths, exact.sequences.lengths)
    for mine, theirs in zip(cache.layers, exact.layers, strict=True):
        for b, length in enumerate(cache.sequences.lengths.tolist()):
            torch.testing.assert_close(mine.keys[b, :, :length], theirs.keys[b, :, :length], rtol=0, atol=1e-9)
            torch.testing.assert_close(mine.values[b, :, :length], theirs.values[b, :, :length], rtol=0, atol=1e-9)


@DRAFTING
def test_a_conversation_goes_on_in_its_cache(llama, drafting):
    """Also where a single token is new, which would be a decode step by the plan."""
    for length in (12, 1):
        first, second = ragged_batch((30,))[0], ragged_batch((length,), seed=1)[0][:, : length - 1]
        plan = plans(llama.config, drafting)["bad"]
        history = torch.cat([full_attention(llama, first, torch.ones_like(first), **GREEDY), second], 1)
        expected = full_attention(llama, history, torch.ones_like(history), **GREEDY)
        tidaldecode.apply(llama, plan)
        cache = TidalCache(llama.config, plan, 100)
        assert torch.equal(llama.generate(first, past_key_values=cache, lossless=4, **GREEDY), history[:, :54])
        assert torch.equal(llama.generate(history, past_key_values=cache, lossless=4, **GREEDY), expected)
        tidaldecode.remove(llama)


def test_a_prompt_of_embeddings(llama):
    ids, mask = ragged_batch()
    embeddings = llama.get_input_embeddings()(ids).detach()
    expected = llama.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY)
    tidaldecode.apply(llama, plan_for(llama.config))
    output = llama.generate(inputs_embeds=embeddings, attention_mask=mask, lossless=4, **GREEDY)
    assert torch.equal(output, expected)


def test_positions_of_the_users(llama):
    ids, mask = ragged_batch((40, 23))
    positions = (mask.cumsum(1) - 1).clamp(min=0) + torch.tensor([[7], [0]])
    options = {"attention_mask": mask, "position_ids": positions, **GREEDY}
    expected = llama.generate(ids, **options)
    tidaldecode.apply(llama, plan_for(llama.config))
    assert torch.equal(llama.generate(ids, lossless=3, **options), expected)


def test_arguments_by_place(llama):
    ids, mask = ragged_batch()
    config = GenerationConfig(**{**GREEDY, "repetition_penalty": 1.3}, pad_token_id=1)
    expected = llama.generate(ids, config, attention_mask=mask)
    tidaldecode.apply(llama, plan_for(llama.config))
    assert torch.equal(llama.generate(ids, config, attention_mask=mask, lossless=3), expected)
    assert torch.equal(llama.generate(ids, config, LogitsProcessorList(), attention_mask=mask, lossless=3), expected)


# ---- logits processors


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 9, "eos_token_id": list(range(2, 130))},
        {"eos_token_id": 5, "forced_eos_token_id": 5},
        {"bad_words_ids": [[7], [9, 11]], "suppress_tokens": list(range(20, 90))},
        {"exponential_decay_length_penalty": (3, 1.9), "eos_token_id": 5},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [2 + batch, 10 + len(ids) % 7, 100, 150, 200]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_see_each_sequence_as_it_is(llama, options):
    """Those that look at the width of the batch, at the number of the sequence, and at what it says."""
    ids, mask = ragged_batch(LENGTHS)
    options = {**GREEDY, "attention_mask": mask, **options}
    expected = llama.generate(ids, **options)
    plain = llama.generate(ids, **{**options, **dict.fromkeys(options.keys() - GREEDY.keys() - {"attention_mask"})})
    assert not torch.equal(expected, plain)  # the processor does something
    tidaldecode.apply(llama, plan_for(llama.config, token_budget=0.7))
    assert torch.equal(llama.generate(ids, lossless=4, **options), expected)


def test_a_rule_of_allowed_tokens_is_not_asked_behind_an_end(llama):
    """It may allow nothing there: Transformers would not ask either."""
    ids, mask = ragged_batch((40,))
    end = int(llama.generate(ids, attention_mask=mask, **GREEDY)[0, 48])
    asked = []

    def allowed(batch, tokens):
        asked.append(tokens[40:].tolist())
        return [] if end in tokens[40:] else range(260)

    options = {**GREEDY, "attention_mask": mask, "eos_token_id": end, "pad_token_id": 1}
    options["prefix_allowed_tokens_fn"] = allowed
    expected = llama.generate(ids, **options)
    assert 41 < expected.shape[1] < 64
    tidaldecode.apply(llama, plan_for(llama.config, token_budget=0.9))
    for length in (1, 3, 8):
        assert torch.equal(llama.generate(ids, lossless=length, **options), expected)
    assert not any(end in tokens for tokens in asked)


def test_a_rule_of_allowed_tokens_sees_padding_behind_an_end(llama):
    """As in Transformers' own loop, where another sequence goes on."""
    ids, mask = ragged_batch(LENGTHS)
    new = llama.generate(ids, attention_mask=mask, **GREEDY)[:, 40:]
    ends = sorted({int(row[3 + 5 * b]) for b, row in enumerate(new)})

    def allowed(batch, tokens):
        new = tokens[40:].tolist()
        first = next((place for place, token in enumerate(new) if token in ends), len(new))
        assert set(new[first + 1 :]) <= {1}
        return range(260)

    options = {**GREEDY, "attention_mask": mask, "eos_token_id": ends, "pad_token_id": 1}
    options["prefix_allowed_tokens_fn"] = allowed
    expected = llama.generate(ids, **options)
    tidaldecode.apply(llama, plan_for(llama.config, token_budget=0.9))
    assert torch.equal(llama.generate(ids, lossless=5, **options), expected)


class Counting(LogitsProcessor):
    """Keeps state."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores


class Favouring(LogitsProcessor):
    """Keeps none; holds a tensor and a list."""

    def __init__(self):
        self.bias, self.rest = torch.arange(260) / 100, [Ellipsis, max]

    def __call__(self, input_ids, scores):
        return scores + self.bias


def test_processors_of_the_users(llama):
    ids, mask = ragged_batch()
    options = {**GREEDY, "attention_mask": mask, "logits_processor": LogitsProcessorList([Favouring()])}
    expected = llama.generate(ids, **options)
    tidaldecode.apply(llama, plan_for(llama.config))
    assert torch.equal(llama.generate(ids, lossless=4, **options), expected)
    options["logits_processor"][0].rest.append(float("nan"))
    assert torch.equal(llama.generate(ids, lossless=4, **options), expected)
    for held in (threading.Lock(), numpy.arange(3)):
        options["logits_processor"][0].held = held
        with pytest.raises(InputError, match="the logits processor Favouring can't be looked at"):
            llama.generate(ids, lossless=4, **options)
    del options["logits_processor"][0].held
    options["logits_processor"].append(Counting())
    with pytest.raises(InputError, match="the logits processor Counting keeps state between calls"):
        llama.generate(ids, lossless=4, **options)
    with pytest.raises(InputError, match="UnbatchedClassifierFreeGuidanceLogitsProcessor keeps state"):
        llama.generate(ids, lossless=4, **GREEDY, attention_mask=mask, guidance_scale=1.5)


# ---- ends


@pytest.mark.parametrize("batch", [1, 4])
@DRAFTING
def test_an_end_of_sequence_inside_a_round(llama, batch, drafting):
    """At every place of a round, and at another place of each sequence."""
    ids, mask = ragged_batch(LENGTHS[:batch])
    new = llama.generate(ids, attention_mask=mask, **GREEDY)[:, 40:]
    plan = plan_for(llama.config, token_budget=0.9).with_drafting(drafting)
    for place in (0, 1, 2, 3, 7):
        ends = sorted({int(row[(place + 2 * b) % 24]) for b, row in enumerate(new)})
        options = {**GREEDY, "attention_mask": mask, "eos_token_id": ends, "pad_token_id": 1}
        expected = llama.generate(ids, **options)
        tidaldecode.apply(llama, plan)
        for length in (2, 5):
            cache = TidalCache(llama.config, plan, 100)
            output = llama.generate(ids, past_key_values=cache, lossless=length, **options)
            assert torch.equal(output, expected)
            assert cache.get_seq_length() == output.shape[1] - 1
            assert_exact(llama, cache, output[:, :-1], mask)
        tidaldecode.remove(llama)


class StopAfter(StoppingCriteria):
    """Stops each sequence at a width of its own, and remembers what it saw."""

    def __init__(self, *widths):
        self.widths, self.seen = torch.tensor(widths), []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return input_ids.shape[1] >= self.widths


class Remembering(BaseStreamer):
    def __init__(self):
        self.put_values, self.ended = [], 0

    def put(self, value):
        self.put_values.append(value.clone())

    def end(self):
        self.ended += 1


def test_streamer_and_stopping_criteria_see_the_same(llama):
    ids, mask = ragged_batch()
    seen = []
    for length in (None, 5):
        criterion, streamer = StopAfter(44, 49, 46), Remembering()
        options = {"streamer": streamer, "stopping_criteria": StoppingCriteriaList([criterion])}
        output = llama.generate(
            ids, attention_mask=mask, **options, **GREEDY, **({"lossless": length} if length else {})
        )
        assert streamer.ended == 1
        seen.append([output, *streamer.put_values, *criterion.seen])
        if length is None:
            tidaldecode.apply(llama, plan_for(llama.config))
    assert seen[0][0].shape[1] == 49
    assert len(seen[0]) == len(seen[1])
    assert all(map(torch.equal, *seen))


def test_text_streamer_and_stop_strings(llama, byte_tokenizer, capsys):
    ids, _ = ragged_batch((40,))
    text = byte_tokenizer.decode(llama.generate(ids, **GREEDY)[0, 40:])
    strings = [next(letter for letter in text[3:] if letter.isalnum())]
    config = GenerationConfig(**GREEDY, stop_strings=strings, pad_token_id=1)
    expected = llama.generate(ids, config, tokenizer=byte_tokenizer)
    assert expected.shape[1] < 64
    tidaldecode.apply(llama, plan_for(llama.config, token_budget=0.7))
    for options in ({"stop_strings": strings, **GREEDY}, {"generation_config": config}):
        streamer = TextStreamer(byte_tokenizer, skip_prompt=True)
        output = llama.generate(ids, lossless=6, tokenizer=byte_tokenizer, streamer=streamer, **options)
        assert torch.equal(output, expected)
        assert capsys.readouterr().out == byte_tokenizer.decode(output[0, 40:]) + "\n"
        with pytest.raises(InputError, match="stop_strings need the tokenizer"):
            llama.generate(ids, lossless=6, **options)
    assert config.stop_strings == strings


def test_stop_strings_of_the_models_own_configuration(llama, byte_tokenizer):
    ids, _ = ragged_batch((40,))
    text = byte_tokenizer.decode(llama.generate(ids, **GREEDY)[0, 40:])
    strings = [next(letter for letter in text[3:] if letter.isalnum())]
    llama.generation_config.stop_strings = strings
    expected = llama.generate(ids, tokenizer=byte_tokenizer, **GREEDY)
    assert expected.shape[1] < 64
    tidaldecode.apply(llama, plan_for(llama.config, token_budget=0.7))
    assert torch.equal(llama.generate(ids, lossless=6, tokenizer=byte_tokenizer, **GREEDY), expected)
    with pytest.raises(InputError, match="stop_strings need the tokenizer"):
        llama.generate(ids, lossless=6, **GREEDY)
    assert llama.generation_config.stop_strings == strings


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize(("tokens", "call"), [(1, 1), (1, 3), (6, 1), (6, 2)], ids=str)
@DRAFTING
def test_a_stop_leaves_a_usable_cache(llama, monkeypatch, stop, tokens, call, drafting):
    """In a draft step and in a verification pass, of the first round and a later one."""
    plan = plan_for(llama.config).with_drafting(drafting)
    ids, mask = ragged_batch()
    expected = llama.generate(ids, attention_mask=mask, **GREEDY)
    tidaldecode.apply(llama, plan)
    cache = TidalCache(llama.config, plan, 100)
    forward, calls = llama.model.layers[3].forward, itertools.count(1)

    def stops(hidden, *args, **kwargs):
        if hidden.shape[1] == tokens and next(calls) == call:
            raise stop
        return forward(hidden, *args, **kwargs)

    monkeypatch.setattr(llama.model.layers[3], "forward", stops)
    with pytest.raises(stop):
        llama.generate(ids, attention_mask=mask, past_key_values=cache, lossless=5, **GREEDY)
    monkeypatch.undo()
    held = cache.get_seq_length()
    assert held >= 40
    assert_exact(llama, cache, expected[:, :held], mask)
    history = expected[:, : held + 1]
    options = {**GREEDY, "max_new_tokens": 64 - history.shape[1], "past_key_values": cache}
    mask = torch.nn.functional.pad(mask, (0, history.shape[1] - 40), value=1)
    assert torch.equal(llama.generate(history, attention_mask=mask, lossless=5, **options), expected)


# ---- sampling


@pytest.mark.parametrize(("drafting", "new", "thousands"), [("plan", 3, 20), ("verification", 4, 8)])
def test_sampled_tokens_are_distributed_as_full_attentions(tiny, drafting, new, thousands):
    """20,000 texts, by the whole machinery: temperature, top-k and a repetition penalty too.

    Of three tokens; out of verification of four, for its first round drafts none, and fewer, for they take longer.
    """
    model = tiny("llama", vocab_size=7, num_hidden_layers=3, bos_token_id=None, eos_token_id=None)
    prompt = torch.tensor([[2, 3, 4, 2, 6, 5, 4, 3, 2, 5]])
    options = {"do_sample": True, "temperature": 1.3, "top_k": 5, "repetition_penalty": 1.2, "eos_token_id": None}
    expected = exact_distribution(model, prompt, options, new)
    plan = TidalPlan(roles=("select", "sparse", "sparse"), selection="unified", token_budget=2, drafting=drafting)
    tidaldecode.apply(model, plan)
    torch.manual_seed(0)
    counts = torch.zeros(7**new)
    for _ in range(thousands // 4):
        output = model.generate(
            prompt.expand(4000, -1), max_new_tokens=new, lossless=2, return_dict_in_generate=True, **options
        )
        rounds = output.past_key_values.rounds
        accepted = [tokens / 4000 for drafted, tokens in zip(rounds.drafted, rounds.tokens, strict=True) if drafted]
        assert 1.2 < accepted[0] < 1.99  # some are accepted, some not
        counts += (output.sequences[:, -new:] @ 7 ** torch.arange(new).flip(0)).bincount(minlength=7**new)
    assert p_value(counts, expected * counts.sum()) > 0.01


def exact_distribution(model, prompt, options, new):
    """Probability of each text of `new` tokens by Transformers' own loop: [7 ** new]."""
    probabilities = torch.ones(1, dtype=torch.float64)
    texts = prompt
    for _ in range(new):
        settings = {**options, "max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
        scores = model.generate(texts, attention_mask=torch.ones_like(texts), **settings).scores[0]
        probabilities = (probabilities[:, None] * scores.double().softmax(1)).flatten()
        texts = torch.cat([texts.repeat_interleave(7, 0), torch.arange(7).repeat(len(texts))[:, None]], 1)
    return probabilities


def test_a_seed_gives_the_same_text(llama):
    tidaldecode.apply(llama, plan_for(llama.config))
    ids, mask = ragged_batch()
    options = {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2, "max_new_tokens": 20}
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(llama.generate(ids, attention_mask=mask, lossless=4, **options))
    assert torch.equal(*texts)
    assert len(texts[0]) == 6


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lossless": 0}, "lossless 0: give the tokens to draft in a round, at least 1, or 'auto'"),
        ({"lossless": -2}, "lossless -2"),
        ({"lossless": True}, "lossless True"),
        ({"lossless": 2.5}, "lossless 2.5"),
        ({"lossless": "often"}, "lossless 'often'"),
        ({"correction_interval": 8}, "leave out correction_interval"),
        ({"num_beams": 2}, "beam search"),
        ({"output_scores": True, "return_dict_in_generate": True}, "leave out output_scores"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "leave out output_hidden_states"),
        ({"custom_generate": lambda model, **kwargs: None}, "leave out custom_generate"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "it can't do contrastive search"),
    ],
)
def test_generate_refuses(llama, options, message):
    tidaldecode.apply(llama, plan_for(llama.config))
    prefills = []
    llama.get_input_embeddings().register_forward_hook(lambda *_: prefills.append(1))
    with pytest.raises(InputError, match=message) as error:
        llama.generate(ragged_batch()[0], **{"lossless": 4, **options})
    assert "\n" not in str(error.value)
    assert prefills == []


def test_a_cache_that_is_corrected_already_is_refused(llama):
    tidaldecode.apply(llama, plan := plan_for(llama.config))
    cache = TidalCache(llama.config, plan, 90)
    cache.correction = Correction(5)
    with pytest.raises(InputError, match="set cache.correction to None"):
        llama.generate(torch.full((1, 20), 5), past_key_values=cache, lossless=4, max_new_tokens=8)
    assert cache.get_seq_length() == 0


def test_no_more_is_drafted_than_is_wanted(llama):
    tidaldecode.apply(llama, plan_for(llama.config, token_budget=4))
    ids = ragged_batch()[0][:1]
    expected = llama.generate(ids, lossless=4, max_new_tokens=6, do_sample=False, eos_token_id=None)
    huge = llama.generate(ids, lossless=10**13, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(huge, expected)


@pytest.mark.parametrize(
    ("length", "room", "captured", "expected_passes"),
    [  # 24 tokens: the prompt's, then 4 rounds of 5 and 3, or 2 rounds of 9 and 5
        (4, 4, (5,), [(5, True)] * 5),
        (4, 0, (5,), [(5, True)] * 4 + [(3, False)]),
        (8, 8, (6, 9), [(9, True)] * 2 + [(6, True)]),  # that of another use of the cache
        (8, 50, (40,), [(9, True)] * 2 + [(5, False)]),  # too long
    ],
)
def test_a_last_shorter_round_is_verified_by_a_captured_pass(
    llama, monkeypatch, length, room, captured, expected_passes
):
    """Where there is one and the cache has room: else a GPU would compile a kernel for this length alone."""
    plan = plan_for(llama.config, token_budget=1.0)
    ids, passes = ragged_batch((40,))[0], []
    expected = llama.generate(ids, **GREEDY)
    tidaldecode.apply(llama, plan)

    def recording(model, cache, token_ids, *arguments, capture, **options):
        passes.append((token_ids.shape[1], capture))
        cache.session.graphs |= dict.fromkeys(captured)
        return full_pass(model, cache, token_ids, *arguments, capture=capture, **options)

    monkeypatch.setattr(lossless, "full_pass", recording)
    cache = TidalCache(llama.config, plan, 63 + room)
    assert torch.equal(llama.generate(ids, past_key_values=cache, lossless=length, **GREEDY), expected)
    assert passes == expected_passes
    assert cache.get_seq_length() == 63


class LargeResults(TorchDispatchMode):
    """Names the operations that compute as many entries as the distributions of a whole round have, or more."""

    def __init__(self, entries):
        super().__init__()
        self.entries, self.operations = entries, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **kwargs or {})
        if isinstance(output, torch.Tensor) and not operation.is_view and output.numel() >= self.entries:
            self.operations.add(operation.overloadpacket.__name__)
        return output


def test_the_distributions_of_a_round_lie_in_one_place(tiny, monkeypatch):
    """Of 16 sequences and 16 drafts with a vocabulary of 152K those are 158 MB: no list beside, and no copy."""
    model = tiny("llama", vocab_size=3000)
    tidaldecode.apply(model, plan_for(model.config, token_budget=1.0))
    options = {**GREEDY, "do_sample": True, "max_new_tokens": 10, "top_k": 0}

    def unseen(function):  # the verification pass; and SDPA's mask of a prompt does not go with a dispatch mode
        def run(*arguments, **rest):
            with _disable_current_modes():
                return function(*arguments, **rest)

        return run

    monkeypatch.setattr(lossless, "full_pass", unseen(full_pass))
    monkeypatch.setattr(tidaldecode.ops, "multi_query_attention", unseen(tidaldecode.ops.multi_query_attention))
    with LargeResults(4 * 3000) as large:
        model.generate(ragged_batch((40,))[0], lossless=4, **options)
    assert large.operations == {"new_empty"}


def test_a_cache_of_its_own_has_room_for_such_a_pass(llama):
    tidaldecode.apply(llama, plan_for(llama.config))
    output = llama.generate(ragged_batch((40,))[0], lossless=4, return_dict_in_generate=True, **GREEDY)
    assert output.past_key_values.capacity == 68


# ---- drafting


def lengths_drafted(accepts, draft_ms, pass_ms, full_ms=10.0, rounds=40, most=None):
    """What `auto` drafts, round by round, where these are the times; the first of each kind is compiled and captured.

    Args:
        accepts: tokens that are accepted of so many.
        pass_ms: of a pass behind so many drafted tokens.
    """
    length, drafted = DraftLength("auto", most), []
    for _ in range(rounds):
        drafts = int(length)
        compiles = 0 if drafts in drafted else 60_000
        assert length.timed == (0 < drafted.count(drafts) < 3)
        last_ms = pass_ms(drafts) if drafts else full_ms
        accepted = accepts(drafts)
        length.saw(drafts, [accepted], (drafts * draft_ms + compiles) / 1000, (last_ms + compiles) / 1000)
        drafted.append(drafts)
    return drafted, length.pace


TRIAL = [0, 0, 0, 8, 8, 8]


def test_auto_drafts_more_where_more_is_accepted():
    drafted, pace = lengths_drafted(lambda drafts: drafts, 2, lambda drafts: 10.5)
    assert drafted == [*TRIAL, *[16] * 34]
    assert (pace.length, pace.drafted, pace.accepted_per_round) == (16, 16, 17)
    assert (pace.draft_ms, pace.pass_ms, pace.full_step_ms) == pytest.approx((2, 10.5, 10))
    assert pace.speedup == pytest.approx(17 * 10 / (16 * 2 + 10.5))
    drafted, pace = lengths_drafted(lambda drafts: min(drafts, 1), 1, lambda drafts: 10.5)
    assert drafted == [*TRIAL, *[2] * 34]


def test_auto_drafts_fewer_where_longer_passes_take_longer():
    drafted, _ = lengths_drafted(lambda drafts: drafts, 2, lambda drafts: 10 + 4 * drafts)
    assert drafted == [*TRIAL, *[8] * 34]
    drafted, _ = lengths_drafted(lambda drafts: min(drafts, 3), 2, lambda drafts: 10 + 4 * drafts)
    assert drafted[6] == 1


@pytest.mark.parametrize(
    ("accepts", "draft_ms", "pass_ms"),
    [
        (lambda drafts: 0, 4, lambda drafts: 10.5),  # nothing is accepted
        (lambda drafts: drafts, 10, lambda drafts: 10.5),  # a draft step takes as long as a full one
        (lambda drafts: drafts, 2, lambda drafts: 10 + 10 * drafts),  # a pass as long as its steps one by one
    ],
)
def test_auto_switches_itself_off_where_it_cannot_win(accepts, draft_ms, pass_ms):
    drafted, pace = lengths_drafted(accepts, draft_ms, pass_ms)
    assert drafted == [*TRIAL, *[0] * 34]
    assert (pace.length, pace.drafted) == (0, 8) and pace.speedup < 1


def test_auto_switches_itself_off_when_its_drafts_are_refused_later():
    calls = itertools.count()
    drafted, pace = lengths_drafted(lambda drafts: drafts if next(calls) < 20 else 0, 2, lambda drafts: 10.5, rounds=80)
    assert drafted[6:18] == [16] * 12 and drafted[-1] == 0
    assert drafted.index(0, 6) == len(drafted) - drafted[6:].count(0)  # for good
    assert pace.length == 0


def test_auto_with_few_tokens_left():
    drafted, pace = lengths_drafted(lambda drafts: drafts, 4, lambda drafts: 10.5, most=3)
    assert drafted[:6] == [0, 0, 0, 3, 3, 3] and set(drafted[6:]) <= {2, 3} and pace.length
    length = DraftLength("auto")
    length.saw(0, [0])
    assert length.pace is None
    fixed = DraftLength(5)
    fixed.saw(5, [0])
    assert int(fixed) == 5 and not fixed.timed and fixed.pace is None


@pytest.fixture
def clock(monkeypatch):
    """A clock that steps and passes move: `clock.full`, `clock.draft` and `clock.verify` milliseconds."""

    class Clock:
        now, full, draft, verify = 50.0, 10.0, 2.0, 11.0

    clock, decode = Clock(), lossless._Speculation._decode

    def timed_decode(speculation, cache, drafted):
        is_full = cache is speculation.cache.for_full_steps()
        clock.now += (clock.full if is_full else clock.draft) / 1000
        return decode(speculation, cache, drafted)

    def timed_pass(*arguments, **options):
        clock.now += clock.verify / 1000
        return full_pass(*arguments, **options)

    monkeypatch.setattr(lossless._Speculation, "_decode", timed_decode)
    monkeypatch.setattr(lossless, "full_pass", timed_pass)
    monkeypatch.setattr(lossless, "now", lambda device: clock.now)
    return clock


@pytest.mark.parametrize(
    ("batch", "wins", "drafting"),
    [(1, True, "plan"), (4, False, "plan"), (4, True, "verification"), (1, False, "verification")],
)
def test_auto_gives_full_attentions_text_whatever_it_decides(llama, clock, caplog, batch, wins, drafting):
    clock.draft = 2.0 if wins else 10.0
    ids, mask = ragged_batch(LENGTHS[:batch])
    options = {**GREEDY, "max_new_tokens": 50}
    expected = llama.generate(ids, attention_mask=mask, **options)
    plan = plans(llama.config, drafting)["good"]
    tidaldecode.apply(llama, plan)
    cache = TidalCache(llama.config, plan, 150)
    with caplog.at_level("INFO", "tidaldecode"):
        output = llama.generate(ids, attention_mask=mask, past_key_values=cache, lossless="auto", **options)
    assert torch.equal(output, expected)
    assert cache.get_seq_length() == output.shape[1] - 1
    assert_exact(llama, cache, output[:, :-1], mask, 150)
    choosing = [0] if drafting == "verification" else []  # a pass
    assert cache.rounds.drafted[: 6 + len(choosing)] == [0, 0, 0, *choosing, 8, 8, 8]
    pace, (record,) = cache.rounds.pace, caplog.records
    assert record.levelname == ("INFO" if wins else "WARNING")
    assert (pace.draft_ms, pace.pass_ms, pace.full_step_ms) == pytest.approx((clock.draft, 11, 10))
    if wins:
        assert pace.length == 16 and pace.speedup > 2 and record.message.startswith("lossless auto drafts 16 tokens")
    else:
        assert not any(cache.rounds.drafted[6 + len(choosing) :])
        assert record.message == (
            "lossless auto switched itself off: 8 draft steps of 10.00 ms and a pass of 11.00 ms give 9.00 tokens, "
            "0.99 times as fast as full steps of 10.00 ms"
        )


@pytest.mark.parametrize("wins", [True, False])
def test_auto_beside_processors_ends_and_a_stop(llama, clock, monkeypatch, wins):
    """Steps with full attention see what Transformers' own loop shows; a stop in one leaves a usable cache."""
    clock.draft = 2.0 if wins else 10.0
    ids, mask = ragged_batch(LENGTHS)
    new = llama.generate(ids, attention_mask=mask, **GREEDY)[:, 40:]
    ends = sorted({int(row[2 + 4 * b]) for b, row in enumerate(new)})
    plan = plan_for(llama.config, token_budget=0.9)
    options = {**GREEDY, "attention_mask": mask, "eos_token_id": ends, "pad_token_id": 1, "repetition_penalty": 1.2}
    expected = llama.generate(ids, **options)
    tidaldecode.apply(llama, plan)
    assert torch.equal(llama.generate(ids, lossless="auto", **options), expected)
    cache, forward, calls = TidalCache(llama.config, plan, 100), llama.model.layers[3].forward, itertools.count(1)

    def stops(hidden, *args, **kwargs):
        if hidden.shape[1] == 1 and next(calls) == 2:
            raise KeyboardInterrupt
        return forward(hidden, *args, **kwargs)

    monkeypatch.setattr(llama.model.layers[3], "forward", stops)
    with pytest.raises(KeyboardInterrupt):
        llama.generate(ids, past_key_values=cache, lossless="auto", **options)
    held = cache.get_seq_length()  # up to where the first sequence ended
    assert held in (40, 41)
    assert_exact(llama, cache, expected[:, :held], mask)


def test_auto_samples_the_same_text_by_the_same_clock(llama, clock):
    tidaldecode.apply(llama, plan_for(llama.config))
    ids, mask = ragged_batch()
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(llama.generate(ids, attention_mask=mask, lossless="auto", do_sample=True, max_new_tokens=16))
    assert torch.equal(*texts)


def test_rounds():
    rounds = Rounds()
    assert rounds.accepted_per_round is None
    rounds.add(4, [5, 1])
    rounds.add(4, [3])
    rounds.add(0, [1, 1])  # a step with full attention
    assert rounds.accepted_per_round == 3


def test_tokens_of_sequences_of_different_lengths():
    tokens = TokenBuffer(torch.tensor([[1, 2], [3, 4]]), 4)
    tokens.write(0, torch.tensor([5, 6]))
    tokens.extend([1, 0])
    assert tokens.counts == [3, 2]
    assert tokens.window(-1, 1).tolist() == [[5], [4]]
    tokens.write(torch.tensor([1, 0]), torch.tensor([7, 8]))
    assert tokens.ids.tolist() == [[1, 2, 5, 0, 7, 0], [3, 4, 8, 0, 0, 0]]
    widths = []

    def processor(input_ids, scores):
        widths.append(input_ids.shape[1])
        return scores + input_ids.shape[1]

    with Operations() as operations:
        scores = tokens.scores(LogitsProcessorList([processor]), 1, torch.zeros(2, 3))
    assert widths == [3, 4]
    assert scores[:, 0].tolist() == [4, 3]
    assert not any("index" in name for name in operations.names)  # of which each would be copied to a GPU


class Operations(TorchDispatchMode):
    """Remembers the names of the operations on tensors."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))
