"""`apply`, `remove`, and `model.generate` called as before."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DeepseekV3Config,
    DogeConfig,
    DynamicCache,
    Gemma2Config,
    GenerationConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3NextConfig,
    StableLmConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    TextStreamer,
    ViTConfig,
    pipeline,
)
from transformers.cache_utils import Cache

import tidaldecode
from families import FAMILIES, plan_for, ragged_batch
from tidaldecode import InputError, ModelShape, TidalCache, TidalPlan
from tidaldecode.hf.cache_name import CACHE
from tidaldecode.hf.forward import PREFILL_CHUNK, chunk_size
from tidaldecode.models import check_architecture
from tidaldecode.plans import shipped_plans
from tidaldecode.plans.find import find_plan

GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def llama(tiny):
    return tiny("llama")


def whole(model):
    """A plan that reads everything, through sparse layers."""
    return plan_for(model.config, token_budget=1.0)


def test_remove_undoes_apply(llama):
    ids, mask = ragged_batch()
    before = dict(vars(llama))
    expected = llama.generate(ids, attention_mask=mask, **GREEDY)
    assert tidaldecode.apply(llama, plan_for(llama.config)) is llama
    assert not torch.equal(llama.generate(ids, attention_mask=mask, **GREEDY), expected)  # the budget binds
    assert tidaldecode.remove(llama) is llama
    assert llama.config._attn_implementation == "sdpa"
    assert torch.equal(llama.generate(ids, attention_mask=mask, **GREEDY), expected)
    assert vars(llama).keys() == before.keys()
    tidaldecode.apply(llama, plan_for(llama.config))  # and it can be applied again


def test_sampling_is_transformers_own(llama):
    ids, mask = ragged_batch()
    options = {"max_new_tokens": 10, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2}
    torch.manual_seed(5)
    expected = llama.generate(ids, attention_mask=mask, num_return_sequences=2, **options)
    tidaldecode.apply(llama, whole(llama))
    torch.manual_seed(5)
    assert torch.equal(llama.generate(ids, attention_mask=mask, num_return_sequences=2, **options), expected)


def test_left_padding_changes_nothing(llama):
    """Each sequence of a batch says what it says alone, under a budget that binds."""
    tidaldecode.apply(llama, plan_for(llama.config, sink_tokens=2))
    ids, mask = ragged_batch()
    together = llama.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    for row in range(len(ids)):
        alone = ids[row : row + 1, mask[row].bool()]
        assert torch.equal(llama.generate(alone, **GREEDY)[0, alone.shape[1] :], together[row])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_long_prompts_are_read_in_chunks(tiny, family, monkeypatch):
    model, seen = tiny(family), []
    model.get_input_embeddings().register_forward_hook(lambda _, args, output: seen.append(args[0].shape[1]))
    ids, mask = ragged_batch((40, 3, 25))
    plan = plan_for(model.config)
    tidaldecode.apply(model, plan)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    assert seen == [40] + [1] * 9
    seen.clear()
    monkeypatch.setattr("tidaldecode.hf.forward.chunk_size.__defaults__", (8,))
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
    assert seen == [8] * 5 + [1] * 9


def test_logits_of_a_long_prompt_are_its_last_ones_only(llama, monkeypatch):
    shapes = []
    head = llama.lm_head.forward
    monkeypatch.setattr(llama.lm_head, "forward", lambda hidden: (shapes.append(hidden.shape[1]), head(hidden))[1])
    tidaldecode.apply(llama, plan_for(llama.config))
    llama.generate(ragged_batch()[0][:1], **GREEDY)
    assert set(shapes) == {1}


@pytest.mark.parametrize("limit", [4, 7, 16, PREFILL_CHUNK])
def test_no_chunk_of_one_token(limit):
    """A lone token behind a prompt would be a decode step."""
    for tokens in range(2, 400):
        size = chunk_size(tokens, limit)
        assert tokens % size != 1
        assert size <= 2 * limit
    assert chunk_size(1, limit) == 1


def test_the_cache_is_allocated_once(llama):
    plan = plan_for(llama.config)
    tidaldecode.apply(llama, plan)
    ids, mask = ragged_batch()
    cache = TidalCache(llama.config, plan, 60)
    llama(ids, attention_mask=mask, past_key_values=cache)
    places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    output = llama.generate(
        ids[:, -1:], attention_mask=torch.cat([mask, mask[:, :1] | 1], 1), past_key_values=cache, **GREEDY
    )
    assert output.shape == (3, 11)
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == places
    assert cache.layers[0].keys.shape == (3, 2, 60, 16)
    assert cache.get_seq_length() == 40 + 1 + 9


def test_sparse_layers_read_nothing_else(llama):
    """Rows that no set chose may hold anything: a step's time can't grow with them."""
    plan = plan_for(llama.config, selection="per_head")
    tidaldecode.apply(llama, plan)
    ids, _ = ragged_batch((40,))
    caches = [TidalCache(llama.config, plan, 60) for _ in range(2)]
    for cache in caches:
        llama(ids, past_key_values=cache)
    expected = llama(ids[:, :1], past_key_values=caches[0]).logits
    attend, poisoned = caches[1].attention.attend, []

    def attend_poisoned(layer, query, kv, scale):
        if plan.roles[layer] == "sparse":
            attention = caches[1].attention
            read = attention.indices[0, attention.head_to_set[layer], : attention.counts[0]].flatten().tolist()
            unread = sorted(set(range(41)) - set(read))
            kv.k[0, unread] = kv.v[0, unread] = torch.nan
            poisoned.append(len(unread))
        return attend(layer, query, kv, scale)

    caches[1].attention.attend = attend_poisoned
    assert torch.equal(llama(ids[:, :1], past_key_values=caches[1]).logits, expected)
    assert len(poisoned) == 4
    assert min(poisoned) > 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_works_across_inference_mode(tiny, family):
    llama = tiny(family)
    plan = plan_for(llama.config)
    tidaldecode.apply(llama, plan)
    ids, _ = ragged_batch((40,))
    expected = llama.generate(ids, **GREEDY)
    cache = TidalCache(llama.config, plan, 60)
    with torch.inference_mode():
        first = llama(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        second = llama(first, past_key_values=cache).logits[:, -1:].argmax(-1)
    start = torch.cat([ids, first, second], 1)
    assert torch.equal(llama.generate(start, past_key_values=cache, **GREEDY | {"max_new_tokens": 8}), expected)


def test_decoding_keeps_no_gradients(llama):
    plan = plan_for(llama.config)
    tidaldecode.apply(llama, plan)
    cache = TidalCache(llama.config, plan, 60)
    assert not llama(ragged_batch()[0], past_key_values=cache).logits.requires_grad
    assert not cache.layers[0].keys.requires_grad


def test_a_cache_is_cropped_where_transformers_does_not_ask_whether_it_can_be(llama, monkeypatch):
    """As in 5.16, the first version that tidaldecode works with."""
    monkeypatch.delattr(Cache, "is_croppable", raising=False)
    cache = TidalCache(llama.config, plan_for(llama.config), 60)
    cache.crop(0)
    assert cache.is_croppable


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("lossless", [None, 3])
@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_cache_goes_by_both_names_that_transformers_gave_it(llama, name, lossless):
    """Whichever is the installed version's."""
    plan = plan_for(llama.config)
    tidaldecode.apply(llama, plan)
    ids = ragged_batch((40,))[0]
    expected = llama.generate(ids, lossless=lossless, **GREEDY)
    cache, loop = (TidalCache(llama.config, plan, 60) for _ in range(2))
    output = llama.generate(ids, lossless=lossless, return_dict_in_generate=True, **GREEDY, **{name: cache})
    assert torch.equal(output.sequences, expected) and getattr(output, CACHE) is cache
    output = llama(ids, **{name: loop})
    assert getattr(output, CACHE) is loop and loop.get_seq_length() == 40
    inputs = llama.prepare_inputs_for_generation(ids, next_sequence_length=1, **{name: loop})
    assert inputs[CACHE] is loop and llama(**inputs).logits.shape[1] == 1


def test_a_cache_under_each_name_is_refused(llama):
    plan = plan_for(llama.config)
    tidaldecode.apply(llama, plan)
    ids = ragged_batch((40,))[0]
    caches = {name: TidalCache(llama.config, plan, 60) for name in ("past_key_values", "cache")}
    for call in (llama, llama.generate):
        with pytest.raises(InputError, match="two names of one argument: leave out one"):
            call(ids, **caches)
    unused = {name: cache if name == "cache" else None for name, cache in caches.items()}
    assert llama.generate(ids, **unused, **GREEDY).shape == (1, 50) and caches["cache"].get_seq_length() == 49


def test_a_cropped_cache_decodes_again_by_another_plan(llama):
    plan = plan_for(llama.config)
    tidaldecode.apply(llama, plan)
    ids, _ = ragged_batch((40,))
    full = TidalPlan.full(llama.config.num_hidden_layers)
    cache = TidalCache(llama.config, full, 60)
    llama(ids[:, :-1], past_key_values=cache)
    results = []
    for used in (plan, full, plan):
        cache.use_plan(used)
        results.append(llama.generate(ids, past_key_values=cache, **GREEDY))
        cache.crop(39 - cache.get_seq_length())
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def test_without_its_cache_the_model_is_unchanged(llama):
    ids, mask = ragged_batch()
    expected = llama(ids, attention_mask=mask, labels=ids)
    tidaldecode.apply(llama, plan_for(llama.config))
    output = llama(ids, attention_mask=mask, labels=ids)
    assert torch.equal(output.logits, expected.logits)
    output.loss.backward()
    assert llama.lm_head.weight.grad.any()


def test_streamer_and_stopping_criteria(llama, byte_tokenizer, capsys):
    class StopAfter(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 44)

    ids, _ = ragged_batch((40,))
    expected = llama.generate(ids, **GREEDY)[:, :44]
    tidaldecode.apply(llama, whole(llama))
    streamer = TextStreamer(byte_tokenizer, skip_prompt=True)
    output = llama.generate(ids, streamer=streamer, stopping_criteria=StoppingCriteriaList([StopAfter()]), **GREEDY)
    assert torch.equal(output, expected)
    assert capsys.readouterr().out == byte_tokenizer.decode(output[0, 40:]) + "\n"


def test_stop_strings(llama, byte_tokenizer):
    ids, _ = ragged_batch((40,))
    text = byte_tokenizer.decode(llama.generate(ids, **GREEDY | {"max_new_tokens": 40})[0, 40:])
    options = {**GREEDY, "max_new_tokens": 40, "tokenizer": byte_tokenizer}
    options["stop_strings"] = [next(letter for letter in text[3:] if letter.isalnum())]
    expected = llama.generate(ids, **options)
    assert expected.shape[1] < 80
    tidaldecode.apply(llama, whole(llama))
    assert torch.equal(llama.generate(ids, **options), expected)


def test_pipeline(llama, byte_tokenizer):
    texts = ["It was the best of times, it was the worst of times", "Call me Ishmael."]
    options = {"max_new_tokens": 8, "do_sample": False, "batch_size": 2}
    expected = pipeline("text-generation", model=llama, tokenizer=byte_tokenizer)(texts, **options)
    tidaldecode.apply(llama, whole(llama))
    assert pipeline("text-generation", model=llama, tokenizer=byte_tokenizer)(texts, **options) == expected


@pytest.mark.parametrize(
    "config",
    [GenerationConfig(max_new_tokens=10), GenerationConfig(max_length=50), None],
    ids=["max_new_tokens", "max_length", "default"],
)
def test_lengths_come_from_wherever_transformers_takes_them(llama, config):
    ids, _ = ragged_batch((40,))
    expected = llama.generate(ids, config, eos_token_id=None, pad_token_id=1)
    tidaldecode.apply(llama, whole(llama))
    assert torch.equal(llama.generate(ids, config, eos_token_id=None, pad_token_id=1), expected)
    llama.generation_config.max_new_tokens = 3
    assert llama.generate(ids, eos_token_id=None, pad_token_id=1).shape[1] == 43


def test_a_checkpoint_may_ask_for_a_cache_of_transformers(llama):
    llama.generation_config.cache_implementation = "static"
    tidaldecode.apply(llama, plan_for(llama.config))
    llama.generate(ragged_batch()[0], **GREEDY)
    tidaldecode.remove(llama)
    assert llama.generation_config.cache_implementation == "static"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"generation_config": GenerationConfig(num_beams=3, max_new_tokens=4)}, "beam search"),
        ({"prompt_lookup_num_tokens": 3}, "prompt look-up"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"generation_config": GenerationConfig(cache_implementation="static")}, "cache_implementation"),
        ({"assistant_early_exit": 2}, "early exit"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"prefill_chunk_size": 3}, "prefill_chunk_size"),
        ({"past_key_values": DynamicCache()}, "TidalCache or left out, not a DynamicCache"),
    ],
)
def test_generate_refuses(llama, options, message):
    tidaldecode.apply(llama, plan_for(llama.config))
    with pytest.raises(InputError, match=message) as error:
        llama.generate(ragged_batch()[0], **options)
    assert "\n" not in str(error.value)


def test_generate_refuses_an_assistant(llama, tiny):
    tidaldecode.apply(llama, plan_for(llama.config))
    with pytest.raises(InputError, match="assistant"):
        llama.generate(ragged_batch((40,))[0], assistant_model=tiny("llama"), max_new_tokens=4)


def test_masks_must_pad_on_the_left(llama):
    tidaldecode.apply(llama, plan_for(llama.config))
    ids, mask = ragged_batch()
    with pytest.raises(InputError, match="pad on the left"):
        llama.generate(ids, attention_mask=mask.flip(1), **GREEDY)


def test_a_prompt_may_hold_the_padding_token(llama):
    """Transformers takes it for padding unless a mask says otherwise; the line says which."""
    tidaldecode.apply(llama, plan_for(llama.config))
    ids = ragged_batch((40,))[0]
    ids[0, 7] = 1
    with pytest.raises(InputError, match="pass the mask of a prompt that holds the padding token"):
        llama.generate(ids, **GREEDY)
    assert llama.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY).shape == (1, 50)


def test_a_refused_call_leaves_the_cache_as_it_was(llama):
    plan = plan_for(llama.config)
    tidaldecode.apply(llama, plan)
    ids, mask = ragged_batch()
    expected = llama.generate(ids, attention_mask=mask, **GREEDY)
    cache = TidalCache(llama.config, plan, 60)
    with pytest.raises(InputError, match="pad on the left"):
        llama(ids, attention_mask=mask.flip(1), past_key_values=cache)
    with pytest.raises(InputError, match="one entry a token"):
        llama(ids, attention_mask=mask[:, :-1], past_key_values=cache)
    assert torch.equal(llama.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY), expected)
    with pytest.raises(InputError, match="the cache holds 3 sequences, the input has 1"):
        llama(ids[:1, :1], past_key_values=cache)
    for tokens in (39, -50):
        with pytest.raises(InputError, match=rf"crop\({tokens}\) of a cache of 49 tokens"):
            cache.crop(tokens)
    cache.reset()
    assert torch.equal(llama.generate(ids[:1], past_key_values=cache, **GREEDY), expected[:1])


def test_an_interrupted_pass_is_named(llama, monkeypatch):
    plan = plan_for(llama.config)
    tidaldecode.apply(llama, plan)
    ids = ragged_batch((40,))[0]
    cache = TidalCache(llama.config, plan, 90)
    with monkeypatch.context() as patch:
        patch.setattr(llama.model.layers[3], "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llama(ids, past_key_values=cache)
    with pytest.raises(InputError, match=r"left in the middle of a forward pass: reset\(\) it or"):
        llama(ids, past_key_values=cache)
    cache.reset()
    assert torch.equal(llama(ids, past_key_values=cache).logits, llama(ids).logits)


def test_a_conversation_goes_on_in_its_cache(llama):
    """A second turn behind the first gives what one prompt of both gives."""
    plan = whole(llama)
    first, second = ragged_batch((30,))[0], ragged_batch((12,), seed=1)[0]
    history = torch.cat([llama.generate(first, **GREEDY), second], 1)
    expected = llama.generate(history, **GREEDY)
    tidaldecode.apply(llama, plan)
    cache = TidalCache(llama.config, plan, capacity=80)
    answer = llama.generate(first, past_key_values=cache, **GREEDY)
    assert torch.equal(answer, history[:, :40])
    assert torch.equal(llama.generate(history, past_key_values=cache, **GREEDY), expected)


def test_phi3_keeps_its_cache_where_its_rope_changes(tiny):
    """Phi-3 drops its cache at the length up to which it was first trained; prompts beyond it and across it."""
    model = tiny("phi3", original_max_position_embeddings=32)
    for length in (40, 28):
        ids = ragged_batch((length,))[0]
        options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
        expected = model.generate(ids, use_cache=False, **options)
        cache = TidalCache(model.config, whole(model), 60)
        tidaldecode.apply(model, whole(model))
        output = model.generate(ids, past_key_values=cache, **options)
        torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)
        assert cache.get_seq_length() == length + 9
        tidaldecode.remove(model)
    tidaldecode.apply(model, plan_for(model.config, token_budget=2))
    ids = ragged_batch((40,))[0]
    sparse = model.generate(ids, **GREEDY)
    tidaldecode.remove(model)
    assert not torch.equal(sparse, model.generate(ids, **GREEDY))


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_rope_that_looks_at_the_whole_prompt(tiny, rope, monkeypatch):
    monkeypatch.setattr("tidaldecode.hf.forward.chunk_size.__defaults__", (8,))
    parameters = {"rope_type": rope, "rope_theta": 10_000.0, "original_max_position_embeddings": 24, "factor": 4.0}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    model = tiny("llama", rope_parameters=parameters, max_position_embeddings=24 if rope == "dynamic" else 512)
    ids = ragged_batch((40,))[0]
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    expected = copy.deepcopy(model).generate(ids, **options)  # a copy: dynamic RoPE remembers the longest prompt
    tidaldecode.apply(model, whole(model))
    output = model.generate(ids, **options)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)


def test_hidden_states_of_a_long_prompt_are_whole(llama, monkeypatch):
    monkeypatch.setattr("tidaldecode.hf.forward.chunk_size.__defaults__", (8,))
    tidaldecode.apply(llama, plan_for(llama.config))
    options = {**GREEDY, "output_hidden_states": True, "return_dict_in_generate": True}
    assert llama.generate(ragged_batch((40,))[0], **options).hidden_states[0][-1].shape[1] == 40


def test_prefill_memory_grows_with_the_prompt_not_with_its_square(llama, monkeypatch):
    monkeypatch.setattr("tidaldecode.hf.forward.chunk_size.__defaults__", (16,))
    tidaldecode.apply(llama, plan_for(llama.config))
    largest = []
    for length in (240, 480):
        with torch.profiler.profile(record_shapes=True) as profile:
            llama.generate(ragged_batch((length,))[0], **GREEDY | {"max_new_tokens": 1})
        shapes = [shape for event in profile.events() for shape in event.input_shapes or [] if shape]
        largest.append(max(math.prod(shape) for shape in shapes if all(isinstance(size, int) for size in shape)))
    assert largest[0] >= 16 * 240  # a chunk's mask was seen
    assert largest[1] <= 2.2 * largest[0]


def test_a_deep_copy_runs_its_own_weights(llama):
    tidaldecode.apply(llama, plan_for(llama.config))
    twin = copy.deepcopy(llama)
    twin.lm_head.weight.data.zero_()
    ids = ragged_batch()[0]
    assert not twin(ids).logits.any()
    assert twin.generate(ids, **GREEDY).shape == (3, 50)
    assert llama(ids).logits.any()


def test_remove_gives_back_a_forward_of_the_users(llama):
    forward = llama.forward

    def mine(*args, **kwargs):
        return forward(*args, **kwargs)

    llama.forward = mine
    tidaldecode.remove(tidaldecode.apply(llama, plan_for(llama.config)))
    assert llama.forward is mine


def test_models_that_do_not_generate_are_refused(llama):
    with pytest.raises(InputError, match="LlamaModel does not generate text"):
        tidaldecode.apply(llama.model, plan_for(llama.config))
    assert llama.config._attn_implementation == "sdpa"


def test_a_model_that_does_not_pass_the_cache_on_is_refused():
    """StableLM's layers drop what its attention function would need: better no answer than a wrong one."""
    config = StableLmConfig(
        vocab_size=260, hidden_size=64, intermediate_size=64, num_hidden_layers=7, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    try:
        expected = model.generate(ragged_batch()[0], **GREEDY)
        tidaldecode.apply(model, plan_for(config, token_budget=1.0))
        assert torch.equal(model.generate(ragged_batch()[0], **GREEDY), expected)  # a later Transformers passes it on
    except InputError as error:
        assert "StableLmForCausalLM does not pass on what tidaldecode needs" in str(error)  # noqa: PT017


def test_a_model_with_a_mask_of_its_own_is_refused():
    """Doge adds what it learned to every score, also where the budget is the whole context."""
    config = DogeConfig(
        vocab_size=260, hidden_size=64, intermediate_size=64, num_hidden_layers=7, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    tidaldecode.apply(model, plan_for(config, token_budget=1.0))
    with pytest.raises(InputError, match="can't work with 'doge': layer 0 attends by a mask of the model's own"):
        model.generate(ragged_batch()[0], **GREEDY)


def test_a_tidal_cache_needs_a_model_with_a_plan(llama):
    cache = TidalCache(llama.config, plan_for(llama.config), 60)
    with pytest.raises(InputError, match=r"tidaldecode\.apply"):
        llama(ragged_batch()[0], past_key_values=cache)


def test_apply_twice_and_remove_too_often(llama):
    tidaldecode.apply(llama, plan_for(llama.config))
    with pytest.raises(InputError, match=r"has a plan already: call tidaldecode\.remove"):
        tidaldecode.apply(llama, plan_for(llama.config))
    tidaldecode.remove(llama)
    with pytest.raises(InputError, match="has no plan"):
        tidaldecode.remove(llama)


def test_plans_of_other_models_are_refused(llama, tiny):
    with pytest.raises(InputError, match="the plan has 5 roles, but the model has 7 layers"):
        tidaldecode.apply(llama, TidalPlan.full(5))
    shape = ModelShape(name="other-7b", num_layers=7, num_query_heads=8, num_kv_heads=2, head_dim=16)
    plan = plan_for(llama.config)
    with pytest.raises(InputError, match=r"made for another model, other-7b \(7 layers, 8 query heads"):
        tidaldecode.apply(llama, plan.model_copy(update={"model": shape}))
    sources = {2: ("1:per_head:6",) * 6}
    with pytest.raises(InputError, match="reads head 6, which the model does not have"):
        tidaldecode.apply(llama, TidalPlan.validated(**{**plan.model_dump(), "sources": sources}))
    gemma = tiny("gemma3_text")
    with pytest.raises(InputError, match="layer 0 attends to a sliding window; its role must be null, not 'full'"):
        tidaldecode.apply(gemma, TidalPlan.full(10))
    roles = plan_for(gemma.config).roles
    with pytest.raises(InputError, match="layer 9 attends to the whole context and needs a role, not null"):
        tidaldecode.apply(gemma, TidalPlan(roles=(*roles[:-1], None), selection="unified", token_budget=9))
    assert tidaldecode.hf.applied_plan(llama) is None


def test_plans_by_name(llama, tiny, tmp_path):
    with pytest.raises(InputError, match="no shipped plan was made for this model"):
        tidaldecode.apply(llama)
    with pytest.raises(InputError, match="no plan 'smolm': give a plan file"):
        tidaldecode.apply(llama, "smolm")
    with pytest.raises(InputError, match="made for another model, smollm2-135m"):
        tidaldecode.apply(llama, "smollm2-135m")
    plan_for(llama.config).save(tmp_path / "mine.json")
    for name in (str(tmp_path / "mine.json"), "paper"):
        tidaldecode.remove(tidaldecode.apply(llama, name))
    gemma = tidaldecode.apply(tiny("gemma3_text"), "paper")
    assert tidaldecode.hf.applied_plan(gemma).roles[:5] == (None, "full", "full", None, "select")


def test_auto_takes_the_plan_made_for_the_model(tiny):
    """By shape and name: SmolLM2's plan is not for another model of its shape."""
    model = tiny(
        "llama", num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64, hidden_size=576
    )
    model.config.name_or_path = "someone/other-135m"
    with pytest.raises(InputError, match="no shipped plan was made for someone/other-135m .*tidaldecode calibrate"):
        tidaldecode.apply(model)
    model.config.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    tidaldecode.apply(model)
    assert tidaldecode.hf.applied_plan(model) == shipped_plans()["smollm2-135m"]


@pytest.mark.parametrize(
    ("name", "layers", "kv_heads", "plan", "select"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", 32, 32, "llama-2-7b", (2, 7)),
        ("lmsys/longchat-7b-v1.5-32k", 32, 32, "longchat-7b", (2, 7)),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 32, 8, "llama-3-8b", (2, 13)),
        ("meta-llama/Llama-3.1-8B-Instruct", 32, 8, "llama-3-1-8b", (2, 13)),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 32, 8, "deepseek-r1-distill-llama-8b", (0, 2, 8, 13, 14)),
        ("Qwen/Qwen3-8B", 36, 8, "qwen3-8b", (0, 2, 7, 14, 23)),
    ],
)
def test_auto_takes_a_published_plan_and_says_that_it_was_not_measured(caplog, name, layers, kv_heads, plan, select):
    config = LlamaConfig(
        num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=kv_heads, hidden_size=4096
    )
    config.name_or_path = name
    found = find_plan("auto", config)
    assert found.name == plan
    assert tuple(layer for layer, role in enumerate(found.roles) if role == "select") == select
    assert "arXiv" in found.origin and "not measured here" in caplog.text and "tidaldecode calibrate" in caplog.text


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "encoder-decoder"),
        (DeepseekV3Config(), r"multi-head latent attention \(MLA\)"),
        (Qwen3NextConfig(), "linear"),
        (MambaConfig(), "no attention"),
        (BertConfig(), "no causal language model"),
        (ViTConfig(), "no causal language model"),
        (Gemma2Config(), "soft-caps"),
        (GptOssConfig(), "attention sinks"),
        (MistralConfig(sliding_window=4096), r"sliding window \(4096 tokens\)"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_unsupported_architectures_are_refused_by_name(config, reason):
    with pytest.raises(InputError, match=reason) as error:
        check_architecture(config)
    assert repr(config.model_type) in str(error.value)
    assert "it works with gemma, gemma3_text, gpt_neox" in str(error.value)


def test_apply_refuses_unsupported_models():
    model = AutoModelForCausalLM.from_config(
        DeepseekV3Config(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2, vocab_size=50,
            n_routed_experts=4, n_group=2, topk_group=1, intermediate_size=16, moe_intermediate_size=8,
            q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_experts_per_tok=2,
        )
    )  # fmt: skip
    with pytest.raises(InputError, match="'deepseek_v3': it has multi-head latent attention"):
        tidaldecode.apply(model, TidalPlan.full(4))


def test_a_window_that_no_context_fills_is_none():
    config = FAMILIES["phi3"](sliding_window=262_144, max_position_embeddings=512)
    check_architecture(config)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids, mask = ragged_batch()
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    tidaldecode.apply(model, plan_for(LlamaConfig(num_hidden_layers=7), token_budget=1.0))
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)


def test_an_untested_architecture_is_named_once(caplog):
    config = copy.deepcopy(FAMILIES["llama"]())
    config.model_type = "brand_new"
    check_architecture(config)
    check_architecture(config)
    assert caplog.text.count("has not been tested with 'brand_new'") == 1
