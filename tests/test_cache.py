"""The cache in a loop of one's own and in a conversation: its masks, how it grows, and what recipes ask of it."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import tidaldecode
from families import plan_for, ragged_batch
from tidaldecode import InputError, TidalCache
from tidaldecode.evaluate.scoring import step_logits
from tidaldecode.hf.cache_name import CACHE
from tidaldecode.hf.layers import TidalLayer
from tidaldecode.hf.merged import merged_products
from tidaldecode.hf.second_pass import Correction
from tidaldecode.methods.oracle import OracleAttention
from tidaldecode.methods.quest import QuestAttention
from tidaldecode.methods.streaming import StreamingAttention
from tidaldecode.models import model_shape

GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
IDS, MASK = ragged_batch()
TOKEN = IDS[:, -1:].clone()


@pytest.fixture
def llama(tiny):
    model = tiny("llama")
    return tidaldecode.apply(model, plan_for(model.config))


def whole(model):
    return plan_for(model.config, token_budget=1.0)


def read(model, ids=IDS, mask=MASK, capacity=80, plan=None):
    """A cache that holds prompts."""
    cache = TidalCache(model.config, plan or model._tidaldecode.plan, capacity)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
    return cache


def longer(mask, tokens=1):
    return torch.nn.functional.pad(mask, (0, tokens), value=1)


# ---- masks


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_step_with_the_mask_of_its_cache_gives_transformers_logits(tiny, family):
    model = tiny(family)
    past, mask, positions = DynamicCache(config=model.config), MASK, (MASK.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(IDS, attention_mask=mask, position_ids=positions, past_key_values=past)
    tidaldecode.apply(model, whole(model))
    cache = read(model)
    for _ in range(3):
        mask = longer(mask)
        options = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        tidaldecode.remove(model)
        with torch.no_grad():
            expected = model(TOKEN, past_key_values=past, **options).logits
        tidaldecode.apply(model, whole(model))
        logits = model(TOKEN, past_key_values=cache, **options).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("capacity", [7, 41, 90])
def test_a_context_shorter_than_the_window_attends_to_nothing_else(tiny, capacity):
    """Gemma 3's windows are of 512 and 1,024 tokens; here of 60, longer than the context and than what it needs."""
    model = tiny("gemma3_text", sliding_window=60)
    past, ids = DynamicCache(config=model.config), IDS[:, :5]
    with torch.no_grad():
        expected = [model(part, past_key_values=past).logits for part in (ids, *IDS[:, :35].split(1, 1))]
    cache = TidalCache(model.config, whole(model), capacity)
    tidaldecode.apply(model, whole(model))
    logits = [model(part, past_key_values=cache).logits for part in (ids, *IDS[:, :35].split(1, 1))]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def hole(mask):
    mask = mask.clone()
    mask[0, 20] = 0
    return mask


def left(mask):
    """The first tokens of a sequence are to be forgotten."""
    mask = mask.clone()
    mask[0, :5] = 0
    return mask


WRONG_MASKS = {
    "a hole": (hole, "attention_mask must pad on the left only"),
    "the left": (left, "attention_mask must be the one that the cache was filled with"),
    "padding unmasked": (torch.ones_like, "attention_mask must be the one that the cache was filled with"),
    "the end": (lambda mask: mask.flip(1), "attention_mask must pad on the left only"),
    "too short": (lambda mask: mask[:, -7:], r"attention_mask must be \[3, \d+\], one entry a token, not \[3, 7\]"),
    "one sequence's": (lambda mask: mask[:1], r"attention_mask must be \[3, \d+\], .*, not \[1, \d+\]"),
    "four dimensions": (lambda mask: mask[:, None, None], r"attention_mask must be \[3, \d+\]"),
    "a dictionary": (lambda mask: {"full_attention": mask}, r"attention_mask must be \[3, \d+\], .*, not dict"),
}


@pytest.mark.parametrize("tokens", [1, 5], ids=["step", "prompt"])
@pytest.mark.parametrize("wrong", WRONG_MASKS)
def test_a_mask_that_is_not_the_caches_is_refused(llama, wrong, tokens):
    """In a decode step as in a prompt behind a prompt; the cache goes on as if nothing had been."""
    change, message = WRONG_MASKS[wrong]
    cache, ids = read(llama), IDS[:, :tokens]
    mask = longer(MASK, tokens)
    with pytest.raises(InputError, match=message) as error:
        llama(ids, attention_mask=change(mask), past_key_values=cache)
    assert "\n" not in str(error.value)
    logits = llama(ids, attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(logits, llama(ids, past_key_values=read(llama)).logits)


def test_a_step_with_a_mask_and_corrections(llama):
    cache = read(llama)
    cache.correction = Correction(4)
    with pytest.raises(InputError, match="pad on the left"):
        llama(TOKEN, attention_mask=hole(longer(MASK)), past_key_values=cache)
    assert cache.get_seq_length() == 40 and len(cache.correction) == 0


@pytest.mark.parametrize("lossless", [None, 3])
@pytest.mark.parametrize("new", [1, 4])
def test_generate_refuses_such_a_mask_too(llama, lossless, new):
    """Also one of ones alone, which Transformers drops before the model could see it."""
    cache, ids = read(llama), torch.cat([IDS, IDS[:, :new]], 1)
    mask = longer(MASK, new)
    for change, message in WRONG_MASKS.values():
        wrong = change(mask)
        if not isinstance(wrong, torch.Tensor) or wrong.ndim > 2:
            continue  # Transformers says so
        with pytest.raises(InputError, match=message.replace("40", r"\d+")):
            llama.generate(ids, attention_mask=wrong, past_key_values=cache, lossless=lossless, **GREEDY)
    output = llama.generate(ids, attention_mask=mask, past_key_values=cache, lossless=lossless, **GREEDY)
    alone = llama.generate(ids, attention_mask=mask, past_key_values=read(llama), lossless=lossless, **GREEDY)
    assert torch.equal(output, alone)


def test_new_tokens_alone_go_with_the_longer_mask(llama):
    ids, mask = torch.cat([IDS, IDS[:, :4]], 1), longer(MASK, 4)
    expected = llama.generate(ids, attention_mask=mask, past_key_values=read(llama), **GREEDY)
    output = llama.generate(ids[:, -4:], attention_mask=mask, past_key_values=read(llama, capacity=40), **GREEDY)
    assert torch.equal(output[:, 4:], expected[:, 44:])
    cache = read(llama, IDS[:1, :30], MASK[:1, :30])
    with pytest.raises(InputError, match=r"must be \[1, 31\], one entry a token, not \[1, 7\]"):
        llama.generate(IDS[:1, -1:], attention_mask=torch.ones(1, 7).long(), past_key_values=cache, **GREEDY)


def test_transformers_own_loop_waits_for_one_mask_alone(llama, monkeypatch):
    looks = []
    check = tidaldecode.hf.sequences.Sequences.check_mask

    def counted(*arguments):
        looks.append(arguments[2:])
        return check(*arguments)

    monkeypatch.setattr("tidaldecode.hf.sequences.Sequences.check_mask", counted)
    cache = TidalCache(llama.config, llama._tidaldecode.plan, 60)
    llama.generate(IDS, attention_mask=MASK, past_key_values=cache, **GREEDY)
    assert looks == [(3, 40), (3, 40)]  # what was given, and what came to the model
    mask = longer(MASK, 10)
    llama(TOKEN, attention_mask=mask, past_key_values=cache)  # a loop of one's own: each time
    assert len(looks) == 3


# ---- no tokens, nothing new


def test_no_tokens_are_refused(llama):
    cache = read(llama)
    for ids in (IDS[:, :0], IDS[:0, :3], IDS[:0, :0]):
        for options in ({"past_key_values": cache}, {"past_key_values": TidalCache(llama.config, whole(llama), 60)}):
            with pytest.raises(InputError, match="the input has no tokens, its shape is"):
                llama(ids, **options)
    with pytest.raises(InputError, match="the input has no tokens: give input_ids, or inputs_embeds"):
        llama(past_key_values=cache)
    with pytest.raises(InputError, match=r"input_ids must be \[batch, tokens\], not \[40\]"):
        llama(IDS[0], past_key_values=cache)
    for lossless in (None, 4):
        with pytest.raises(InputError, match="the prompt has no tokens"):
            llama.generate(IDS[:, :0], lossless=lossless, **GREEDY)
    with pytest.raises(InputError, match="a sequence without tokens"):
        llama.generate(IDS, attention_mask=MASK * torch.tensor([[1], [0], [1]]), **GREEDY)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("lossless", [None, 4])
@pytest.mark.parametrize("tokens", [40, 39, 1])
def test_a_history_that_is_no_longer_than_its_cache_is_refused(llama, tokens, lossless):
    cache = read(llama)
    for options in ({}, {"attention_mask": MASK[:, :tokens]}):
        with pytest.raises(InputError, match=rf"the cache holds 40 tokens, the prompt has {tokens}: give the whole"):
            llama.generate(IDS[:, :tokens], past_key_values=cache, lossless=lossless, **options, **GREEDY)
    cache.crop(-1)
    options = {"attention_mask": MASK, **GREEDY}
    output = llama.generate(IDS, past_key_values=cache, lossless=lossless, **options)
    assert output.shape == (3, 50)


@pytest.mark.parametrize("capacity", [0, -3, 2.5, None, True])
def test_a_capacity_is_a_positive_number(llama, capacity):
    with pytest.raises(InputError, match=rf"capacity {capacity} must be a positive whole number"):
        TidalCache(llama.config, whole(llama), capacity)


# ---- growing


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("capacity", [1, 5, 11, 40, 45])
def test_a_cache_that_becomes_too_short_grows(tiny, family, capacity):
    """Also the window of a sliding-window layer, 12 tokens here, of which less was allocated."""
    model = tiny(family)
    plan = plan_for(model.config)
    tidaldecode.apply(model, plan)
    small, large = (read(model, IDS[:, -4:], MASK[:, -4:], size, plan) for size in (capacity, 90))
    for start in range(0, 40, 8):
        for ids in (IDS[:, start : start + 7], IDS[:, start + 7 : start + 8]):  # a prompt, and a step
            logits = [model(ids, past_key_values=cache).logits for cache in (small, large)]
            torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    assert large.capacity == 90 and 44 <= small.capacity <= 90
    assert small.layers[-1].keys.shape[2] == small.capacity


def test_growing_is_amortized(llama, monkeypatch):
    cache, grown = read(llama, capacity=40), []
    grow = TidalLayer.grow
    monkeypatch.setattr(TidalLayer, "grow", lambda layer, size: (grown.append(size), grow(layer, size)))
    cache.layers, layers = cache.layers[:1], cache.layers
    for _ in range(300):
        cache.make_room(1)
        cache.count(1)
    cache.layers = layers
    assert grown == [60, 90, 135, 202, 303, 454]


@pytest.mark.parametrize(
    "method",
    [
        lambda shape: QuestAttention(shape, 32, page_size=4),
        lambda shape: StreamingAttention(shape, 16),
        lambda shape: OracleAttention(shape, 16),
    ],
)
def test_every_method_goes_on_in_a_grown_cache(llama, method):
    caches = [read(llama, capacity=capacity) for capacity in (40, 90)]
    for cache in caches:
        cache.attention = method(model_shape(llama.config))
    for token in IDS[:, :12].split(1, 1):
        logits = [llama(token, past_key_values=cache).logits for cache in caches]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    assert caches[0].capacity == 60


def test_scored_steps_let_a_cache_grow(llama):
    caches = [read(llama, IDS[:1], MASK[:1], capacity) for capacity in (40, 90)]
    logits = [torch.cat(list(step_logits(llama, cache, IDS[:1])), 1) for cache in caches]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_a_mark_outlives_growing(tiny):
    model = tiny("gemma3_text")
    tidaldecode.apply(model, plan_for(model.config))
    cache = read(model, IDS[:, -5:], MASK[:, -5:], 6)
    mark, results = cache.mark(), []
    for _ in range(2):
        results.append([model(token, past_key_values=cache).logits for token in IDS[:, :20].split(1, 1)])
        cache.go_back(mark)
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.parametrize("short", [True, False])
def test_memory_says_how_far_a_cache_grows(llama, monkeypatch, short):
    """By half if there is room for it, else as far as it must."""
    cache = read(llama, capacity=40)

    def check(layer, keys, values, capacity):
        if short and capacity > 42:
            raise InputError(f"{capacity} do not fit")

    monkeypatch.setattr(TidalLayer, "check_memory", check)
    llama(TOKEN, past_key_values=cache)
    assert cache.capacity == (41 if short else 60)
    if short:
        with pytest.raises(InputError, match="45 do not fit"):
            llama(IDS[:, :4], past_key_values=cache)
        assert cache.get_seq_length() == 41
        llama(TOKEN, past_key_values=cache)


@pytest.mark.parametrize("lossless", [None, 3, "auto"])
@pytest.mark.parametrize("drafting", ["plan", "verification"])
def test_a_conversation_goes_on_in_the_cache_that_generate_returns(tiny, lossless, drafting):
    """Two turns more give what one prompt of all gives, with full attention's tokens."""
    model = tiny("llama").double()
    turns = [IDS[:2, :7], IDS[1:, :1], IDS[:2, :9]]
    history, mask = IDS[:2], MASK[:2]
    expected = history
    for turn in (None, *turns):
        expected = expected if turn is None else torch.cat([expected, turn], 1)
        expected = model.generate(expected, attention_mask=longer(mask, expected.shape[1] - 40), **GREEDY)
    budget = 1.0 if lossless is None else 12
    tidaldecode.apply(model, plan_for(model.config, token_budget=budget).with_drafting(drafting))
    cache = None
    for turn in (None, *turns):
        history = history if turn is None else torch.cat([history, turn], 1)
        output = model.generate(
            history, attention_mask=longer(mask, history.shape[1] - 40), past_key_values=cache, lossless=lossless,
            return_dict_in_generate=True, **GREEDY,
        )  # fmt: skip
        history, cache = output.sequences, output.past_key_values
        assert cache.get_seq_length() == history.shape[1] - 1
    assert torch.equal(history, expected)


def test_corrected_tokens_go_on_in_a_grown_cache(llama):
    options = {"attention_mask": MASK, "correction_interval": 3, **GREEDY}
    expected = llama.generate(IDS, **options)
    cache = read(llama, IDS[:, :30], MASK[:, :30], 30)
    assert torch.equal(llama.generate(IDS, past_key_values=cache, **options), expected)


# ---- recipes


def test_one_prompt_has_several_continuations(llama):
    """Transformers' recipe: the prompt's cache is repeated, or copied, and each copy goes on."""
    prompt, mask = IDS[1:2, -23:], MASK[1:2, -23:]
    rows = [torch.cat([prompt, IDS[row : row + 1, -6:]], 1) for row in range(3)]
    expected = [llama.generate(row, **GREEDY) for row in rows]
    cache = read(llama, prompt, mask, 23)
    assert torch.equal(llama.generate(rows[2], past_key_values=copy.deepcopy(cache), **GREEDY), expected[2])
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(llama.generate(rows[0], past_key_values=again, **GREEDY), expected[0])
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == cache.max_batch_size == 3 and cache.get_seq_length() == 23
    output = llama.generate(torch.cat(rows), past_key_values=cache, **GREEDY)
    assert torch.equal(output, torch.cat(expected))
    assert cache.max_cache_len == cache.capacity == 38 and cache.get_max_length() == -1 and cache.is_croppable


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("indices", [torch.tensor([2, 0]), torch.tensor([True, False, True]), [1]])
def test_some_sequences_go_on(tiny, family, indices):
    model = tiny(family)
    tidaldecode.apply(model, plan_for(model.config))
    cache, rest = read(model), read(model)
    rows = torch.arange(3)[indices]
    cache.batch_select_indices(indices)
    assert len(cache.sequences.lengths) == cache.batch_size == len(rows)
    for token in IDS[:, :5].split(1, 1):
        logits = model(token[rows], past_key_values=cache).logits
        expected = model(token, past_key_values=rest).logits[rows]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_sequences_that_are_taken_out_are_corrected(llama):
    caches = [read(llama) for _ in range(2)]
    for cache in caches:
        cache.correction = Correction(4)
        for token in IDS[:, :2].split(1, 1):
            llama(token, past_key_values=cache)
    caches[0].batch_select_indices(torch.tensor([2, 1]))
    for token in IDS[:, 2:6].split(1, 1):
        logits = llama(token[[2, 1]], past_key_values=caches[0]).logits
        torch.testing.assert_close(logits, llama(token, past_key_values=caches[1]).logits[[2, 1]], rtol=0, atol=1e-5)


def test_a_cache_may_be_allocated_early(llama):
    cache = TidalCache(llama.config, llama._tidaldecode.plan, 60)
    assert cache.batch_size == -1 and not cache.is_initialized
    cache.early_initialization(3, 2, 16, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    places = [layer.keys.data_ptr() for layer in cache.layers]
    output = llama.generate(IDS, attention_mask=MASK, past_key_values=cache, **GREEDY)
    assert torch.equal(output, llama.generate(IDS, attention_mask=MASK, **GREEDY))
    assert [layer.keys.data_ptr() for layer in cache.layers] == places


def test_what_a_cache_can_not_do_is_said_in_a_line(llama):
    cache = read(llama)
    mark = cache.mark()
    for call, message in {
        lambda: cache.reorder_cache(torch.tensor([0, 0, 1])): "beam search",
        lambda: cache.offload(0): "can't be offloaded",
        lambda: cache.batch_select_indices(torch.tensor([3])): "the cache holds sequences 0 to 2",
        lambda: cache.batch_select_indices(torch.tensor([], dtype=torch.int64)): "no sequence would stay",
        lambda: cache.batch_repeat_interleave(0): "no sequence would stay",
    }.items():
        with pytest.raises(InputError, match=message):
            call()
    cache.batch_repeat_interleave(2)
    with pytest.raises(InputError, match="other sequences than when it was marked"):
        cache.go_back(mark)


class PromptLearning:
    """What PEFT puts around a model: virtual tokens in front of the prompt, as embeddings or as a cache of its own."""

    def __init__(self, model, kind, tokens=12):
        self.active_peft_config = SimpleNamespace(is_prompt_learning=True, peft_type=SimpleNamespace(value=kind))
        self.model, self.prepare = model, model.prepare_inputs_for_generation
        self.virtual = torch.randn(1, tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
        model.prepare_inputs_for_generation = self.prepare_inputs_for_generation

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = self.prepare(*args, **kwargs)
        inputs["position_ids"], mask = None, inputs.get("attention_mask")
        if mask is not None:  # of all ones, only early versions of Transformers hand it on
            inputs["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.virtual.shape[1]), mask], 1)
        if inputs[CACHE].get_seq_length() == 0:
            embeddings = self.model.get_input_embeddings()(inputs.pop("input_ids"))
            inputs["inputs_embeds"] = torch.cat([self.virtual.expand(len(embeddings), -1, -1), embeddings], 1)
        return inputs


@pytest.mark.parametrize("first", ["plan", "adapter"])
def test_virtual_tokens_in_front_of_a_prompt_are_read_as_part_of_it(tiny, first):
    """PEFT's prompt tuning: the cache holds more tokens than the prompt has."""
    model = tiny("llama")
    if first == "plan":
        tidaldecode.apply(model, whole(model))
    adapter = PromptLearning(model, "PROMPT_TUNING")
    if first == "adapter":
        tidaldecode.apply(model, whole(model))
        model.prepare_inputs_for_generation = adapter.prepare_inputs_for_generation
    output = model.generate(IDS[:1], **GREEDY)
    embeddings = torch.cat([adapter.virtual, model.get_input_embeddings()(IDS[:1])], 1)
    plain = tiny("llama")
    assert torch.equal(output[:, 40:], plain.generate(inputs_embeds=embeddings, **GREEDY))
    with pytest.raises(InputError, match="lossless decoding can't go with PROMPT_TUNING adapters"):
        model.generate(IDS[:1], lossless=3, **GREEDY)


def test_adapters_that_bring_a_cache_of_their_own_are_refused(llama):
    """The model would decode with full attention, and not say so."""
    PromptLearning(llama, "PREFIX_TUNING")
    with pytest.raises(InputError, match="can't decode with PREFIX_TUNING adapters"):
        llama.generate(IDS[:1], **GREEDY)


def test_a_model_that_was_converted_does_not_go_on_in_its_cache(llama):
    cache = read(llama)
    llama.double()
    with pytest.raises(InputError, match="the cache holds float32 on cpu, the model goes on in float64 on cpu"):
        llama(TOKEN, past_key_values=cache)
    cache.reset()
    output = llama.generate(IDS, attention_mask=MASK, past_key_values=cache, **GREEDY)
    assert torch.equal(output, llama.generate(IDS, attention_mask=MASK, **GREEDY))


# ---- threads


class LooksAtStopStrings(BaseStreamer):
    """Sees the model's own stop strings while tokens are generated."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def put(self, value):
        self.seen.append(self.model.generation_config.stop_strings)

    def end(self):
        pass


def test_lossless_decoding_leaves_the_models_configuration_alone(llama, byte_tokenizer):
    """Another thread may generate by it meanwhile."""
    llama.generation_config.stop_strings = ["never"]
    streamer = LooksAtStopStrings(llama)
    llama.generate(IDS[:1], lossless=3, tokenizer=byte_tokenizer, streamer=streamer, **GREEDY)
    assert set(map(tuple, streamer.seen)) == {("never",)}


def test_two_threads_generate_what_each_gives_alone(llama, byte_tokenizer):
    """With one model, each in a cache of its own: plain, lossless, corrected and sampled, stop strings or not."""
    text = byte_tokenizer.decode(llama.generate(IDS[:1], **GREEDY | {"max_new_tokens": 40})[0, 40:])
    llama.generation_config.stop_strings = [next(letter for letter in text[9:] if letter.isalnum())]
    options = {**GREEDY, "max_new_tokens": 40, "tokenizer": byte_tokenizer}
    calls = [
        {"inputs": IDS, "attention_mask": MASK, **options},
        {"inputs": IDS[:1], "lossless": 3, **options},
        {"inputs": IDS[1:2, -23:], "correction_interval": 4, **options},
        {"inputs": IDS[:1], **options},
    ]
    expected = [llama.generate(**call) for call in calls]
    assert expected[3].shape[1] < 80  # stopped by its string
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(2) as pool:
            outputs = list(pool.map(lambda call: llama.generate(**call), calls))
    finally:
        sys.setswitchinterval(before)
    assert all(map(torch.equal, outputs, expected))


def test_another_thread_between_the_layers_of_a_merged_product(llama):
    """Whichever line of the first thread's product it comes between."""
    attention = llama.model.layers[0].self_attn
    one, other = torch.randn(2, 1, 5, attention.q_proj.in_features)
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    expected = [layer(one) for layer in layers]
    with merged_products(attention):
        for line in range(30):
            events = [0]

            def trace(frame, event, arg, events=events, line=line):
                if frame.f_code.co_name != "part":
                    return trace if frame.f_code.co_name == "forward" else None
                if event == "line":
                    events[0] += 1
                    if events[0] == line:
                        sys.settrace(None)
                        attention.q_proj(other)
                return trace

            sys.settrace(trace)
            try:
                outputs = [layer(one) for layer in layers]
            finally:
                sys.settrace(None)
            torch.testing.assert_close(outputs, expected)
