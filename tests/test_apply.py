"""What `apply` makes of a model: its copies, what it is wrapped in, and other models of its configuration."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import pydoc
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaForCausalLM

import tidaldecode
from families import plan_for, ragged_batch
from tidaldecode import InputError, TidalCache, TidalPlan, applied_plan
from tidaldecode.hf.cache_name import CACHE

GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def llama(tiny):
    return tiny("llama")


@pytest.fixture
def planned(llama):
    return tidaldecode.apply(llama, plan_for(llama.config))


def tokens(model, **options):
    ids, mask = ragged_batch()
    return model.generate(ids, attention_mask=mask, **GREEDY | options)


@pytest.fixture
def full_tokens(llama):
    return tokens(llama)


# ---- copies


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def sent(model):
    """As a worker that is spawned gets it: the tensors by their file descriptors."""
    return pickle.loads(ForkingPickler.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": pickled, "spawn": sent, "torch.save": saved}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_decodes_by_the_plan(llama, full_tokens, copied):
    planned = tidaldecode.apply(llama, plan_for(llama.config))
    expected = tokens(planned)
    assert not torch.equal(expected, full_tokens)  # the budget binds
    twin = copied(planned)
    assert applied_plan(twin) == applied_plan(planned)
    output = tokens(twin, return_dict_in_generate=True)
    assert isinstance(output.past_key_values, TidalCache)
    assert torch.equal(output.sequences, expected)
    assert twin.forward.__self__ is twin.generate.__self__ is twin
    assert torch.equal(tokens(planned), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_plan_is_removed_from_a_copy_alone(llama, full_tokens, copied):
    planned = tidaldecode.apply(llama, plan_for(llama.config))
    expected = tokens(planned)
    twin = tidaldecode.remove(copied(planned))
    assert type(twin) is LlamaForCausalLM
    assert twin.config._attn_implementation == "sdpa"
    assert torch.equal(tokens(twin), full_tokens)
    assert torch.equal(tokens(planned), expected)


def test_a_copy_in_half_precision_decodes_by_the_plan(planned):
    twin = copy.deepcopy(planned).bfloat16()
    output = tokens(twin, return_dict_in_generate=True)
    assert isinstance(output.past_key_values, TidalCache)
    assert output.past_key_values.layers[0].keys.dtype == torch.bfloat16


def test_a_replica_of_data_parallel_decodes_by_the_plan(planned):
    replica = planned._replicate_for_data_parallel()
    assert replica.forward.__self__ is replica
    assert applied_plan(replica) == applied_plan(planned)


def test_a_model_made_of_the_class_of_another_has_no_plan(planned):
    """As `type(model)(model.config)` makes it: it attends in full, and takes a plan of its own."""
    torch.manual_seed(0)
    other = type(planned)(planned.config).eval()
    assert applied_plan(other) is None
    expected = tokens(tidaldecode.remove(copy.deepcopy(planned)))
    assert torch.equal(tokens(other), expected)
    assert torch.equal(tokens(tidaldecode.apply(other, plan_for(other.config))), tokens(planned))
    tidaldecode.remove(other)
    assert other.config._attn_implementation == "sdpa"
    assert torch.equal(tokens(other), expected)


def test_the_class_goes_by_its_name(planned, tmp_path):
    """Transformers looks for the name of a model's class, in pipelines and in what it saves."""
    assert isinstance(planned, LlamaForCausalLM)
    assert repr(planned).startswith("LlamaForCausalLM(")
    planned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LlamaForCausalLM
    assert applied_plan(loaded) is None and loaded.config._attn_implementation == "sdpa"


# ---- wrappers


class Tuner(nn.Module):
    """Wraps a model as PEFT's LoRA does: hands on what it does not have itself."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args, **kwargs):
        return self.model.forward(*args, **kwargs)


class Adapted(nn.Module):
    """Wraps a tuner as `PeftModelForCausalLM` does, with a `generate` of its own."""

    def __init__(self, model):
        super().__init__()
        self.base_model = Tuner(model)
        self.config = model.config
        self.prepare = self.base_model.prepare_inputs_for_generation

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

    def generate(self, *args, **kwargs):
        self.base_model.prepare_inputs_for_generation = lambda *args, **kwargs: self.prepare(*args, **kwargs)
        try:
            return self.base_model.generate(*args, **kwargs)
        finally:
            del self.base_model.prepare_inputs_for_generation


def lora(model):
    """A LoRA adapter that adds nothing yet."""
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")).eval()


def compiled(model):
    torch.compiler.reset()
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    torch.compiler.reset()
    model.compile(backend="eager")
    return model


def with_compiled_forward(model):
    """Transformers' recipe."""
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    return model


WRAPPERS = {
    "adapted": Adapted,
    "peft": lora,
    "compiled": lambda model: compiled(Adapted(model)),
    "model.compile": compiled_in_place,
    "compiled forward": with_compiled_forward,
}


def in_a_loop(model, plan, steps=4):
    """Greedy tokens of a loop of one's own."""
    ids = ragged_batch((40,))[0]
    cache = TidalCache(model.config, plan, 60)
    for _ in range(steps):
        ids = torch.cat(
            [ids, model(ids[:, cache.get_seq_length() :], past_key_values=cache).logits[:, -1:].argmax(-1)], 1
        )
    return ids


@pytest.fixture
def small(tiny):
    return tiny("llama", num_hidden_layers=3)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_apply_takes_a_wrapped_model(small, wrap):
    plan, ids = plan_for(small.config), ragged_batch()[0]
    logits = small(ids).logits
    alone = tidaldecode.apply(copy.deepcopy(small), plan)
    wrapped = wrap(small)
    before = vars(small).keys()
    assert tidaldecode.apply(wrapped, plan) is wrapped
    assert applied_plan(wrapped) == plan
    with pytest.raises(InputError, match="has a plan already"):
        tidaldecode.apply(wrapped, plan)
    assert torch.equal(tokens(wrapped), tokens(alone))
    assert torch.equal(in_a_loop(wrapped, plan), in_a_loop(alone, plan))
    assert tidaldecode.remove(wrapped) is wrapped
    assert applied_plan(wrapped) is None
    assert torch.equal(wrapped(ids).logits, logits)
    assert vars(small).keys() == before
    assert type(small) is LlamaForCausalLM


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_model_with_a_plan_may_be_wrapped(small, wrap):
    planned = tidaldecode.apply(small, plan_for(small.config))
    expected = tokens(planned), in_a_loop(planned, applied_plan(planned))
    wrapped = wrap(planned)
    assert torch.equal(tokens(wrapped), expected[0])
    assert torch.equal(in_a_loop(wrapped, applied_plan(wrapped)), expected[1])
    assert applied_plan(tidaldecode.remove(wrapped)) is None


def test_without_a_cache_a_model_with_a_plan_compiles_whole(small):
    ids = ragged_batch()[0]
    expected = small(ids).logits
    tidaldecode.apply(small, plan_for(small.config))
    torch.compiler.reset()
    assert torch.equal(torch.compile(small, backend="eager", fullgraph=True)(ids).logits, expected)


@pytest.mark.parametrize("first", ["hook", "plan"])
def test_a_hook_stays_at_work(llama, full_tokens, first):
    """As accelerate sets it, with a `forward` of the model's own."""
    seen = []

    class Count(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(type(kwargs.get(CACHE)))
            return args, kwargs

    steps = [lambda: add_hook_to_module(llama, Count()), lambda: tidaldecode.apply(llama, plan_for(llama.config))]
    for step in steps if first == "hook" else reversed(steps):
        step()
    assert not torch.equal(tokens(llama), full_tokens)
    assert seen == [TidalCache] * 10
    tidaldecode.remove(llama)
    assert torch.equal(tokens(llama), full_tokens)
    assert seen[10:] == [DynamicCache] * 10


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2)), "smollm2-135m", None])
def test_what_is_no_model_of_transformers_is_refused(model):
    with pytest.raises(InputError, match="takes a language model of Transformers, not a "):
        tidaldecode.apply(model, "full")
    with pytest.raises(InputError, match="has no plan"):
        tidaldecode.remove(model)
    assert applied_plan(model) is None


def test_a_refused_model_is_as_it_was(llama, monkeypatch):
    config, before = llama.config, dict(vars(llama))
    monkeypatch.setattr(LlamaForCausalLM, "_can_set_attn_implementation_cached_value", False, raising=False)
    for plan, message in (("full", "does not take attention functions"), (TidalPlan.full(5), "5 roles")):
        with pytest.raises(InputError, match=message):
            tidaldecode.apply(Adapted(llama), plan)
        assert vars(llama) == before and type(llama) is LlamaForCausalLM
        assert llama.config is config and llama.model.config is config and config._attn_implementation == "sdpa"


# ---- other models of its configuration


def test_two_models_of_one_configuration(llama, full_tokens):
    twin = LlamaForCausalLM(llama.config).eval()
    twin.load_state_dict(llama.state_dict())
    config, plan = llama.config, plan_for(llama.config)
    expected = tokens(tidaldecode.apply(llama, plan))
    assert config._attn_implementation == twin.config._attn_implementation == "sdpa"
    assert torch.equal(tokens(twin), full_tokens)
    tidaldecode.apply(twin, plan)
    assert torch.equal(tokens(twin), expected)
    tidaldecode.remove(llama)
    assert torch.equal(tokens(twin), expected)
    assert torch.equal(tokens(llama), full_tokens)
    tidaldecode.remove(twin)
    assert llama.config is twin.config is config and config._attn_implementation == "sdpa"
    assert twin.model.layers[0].self_attn.config is config
    assert torch.equal(tokens(twin), full_tokens)


def test_what_is_set_in_the_configuration_stays(llama):
    config = llama.config
    tidaldecode.apply(llama, plan_for(config))
    llama.config.output_hidden_states = True
    assert llama(ragged_batch()[0], past_key_values=TidalCache(config, plan_for(config), 60)).hidden_states
    tidaldecode.remove(llama)
    assert llama.config.output_hidden_states and llama.config._attn_implementation == "sdpa"


def test_two_models_of_one_generation_configuration(llama, tiny):
    twin, asked = tiny("llama"), GenerationConfig(cache_implementation="static", pad_token_id=1)
    for model in (llama, twin):
        model.generation_config = asked
        tidaldecode.apply(model, plan_for(model.config))
    tidaldecode.remove(llama)
    assert llama.generation_config is asked and asked.cache_implementation == "static"
    assert tokens(twin).shape == (3, 50)
    tidaldecode.remove(twin)
    assert twin.generation_config is asked


def by_method(model):
    model.set_attn_implementation("eager")


def by_inner_model(model):
    model.model.set_attn_implementation("eager")


def by_configuration(model):
    model.config._attn_implementation = "eager"


@pytest.mark.parametrize("change", [by_method, by_inner_model, by_configuration])
def test_another_attention_comes_when_the_plan_goes(planned, caplog, change):
    expected = tokens(planned)
    change(planned)
    assert torch.equal(tokens(planned), expected)
    assert "the model keeps its plan: its attention will be 'eager' after tidaldecode.remove(model)" in caplog.text
    assert caplog.text.count("keeps its plan") == 1
    tidaldecode.remove(planned)
    assert planned.config._attn_implementation == planned.model.config._attn_implementation == "eager"


def test_an_attention_that_does_not_exist_is_refused_as_ever(planned):
    with pytest.raises(ValueError, match="nonsense"):
        planned.set_attn_implementation("nonsense")
    assert tokens(planned).shape == (3, 50)


def test_layers_shared_with_a_model_that_lost_its_plan(planned):
    """A shallow copy has the layers of the original: with the copy's plan they lose the original's."""
    tidaldecode.remove(copy.copy(planned))
    with pytest.raises(InputError, match=r"shares its layers .* call tidaldecode\.remove, then apply"):
        tokens(planned)
    tidaldecode.apply(tidaldecode.remove(planned), plan_for(planned.config))
    assert tokens(planned).shape == (3, 50)


# ---- what the user sees


def test_generate_shows_its_two_arguments(planned):
    parameters = list(inspect.signature(planned.generate).parameters)
    assert parameters[:2] == ["inputs", "generation_config"]
    assert parameters[-3:] == ["lossless", "correction_interval", "kwargs"]
    shown = pydoc.render_doc(planned.generate)
    assert "lossless: " in shown and "correction_interval: " in shown
    assert "stopping_criteria" in shown  # and those of Transformers
    tidaldecode.remove(planned)
    assert "lossless" not in inspect.signature(planned.generate).parameters


def test_forward_shows_the_models_arguments(planned):
    plain = LlamaForCausalLM
    for name in ("forward", "prepare_inputs_for_generation", "set_attn_implementation"):
        shown = inspect.signature(getattr(type(planned), name))
        assert shown == inspect.signature(getattr(plain, name))


@pytest.mark.parametrize(
    "form",
    [
        lambda plan, file: file,
        lambda plan, file: str(file),
        lambda plan, file: plan,
        lambda plan, file: plan.model_dump(),
        lambda plan, file: json.loads(file.read_text()),
    ],
    ids=["path", "name", "plan", "fields", "json"],
)
def test_a_plan_in_any_form(llama, tmp_path, form):
    plan = TidalPlan.validated(**plan_for(llama.config).model_dump() | {"sources": {2: ("1:unified",) * 6}})
    plan.save(tmp_path / "plan.json")
    given = form(plan, tmp_path / "plan.json")
    assert applied_plan(tidaldecode.apply(llama, given)) == plan
    cache = TidalCache(llama.config, given, 60)
    assert cache.attention.plan == plan
    cache.use_plan("full")
    assert cache.attention.plan == TidalPlan.full(7)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"roles": ["full"] * 7}, "plan: selection: Field required"),
        ({1: 2}, "plan: "),
        (3, "a plan is a TidalPlan, its fields, its file or a name, not a int"),
        (None, "not a NoneType"),
        (Path("missing.json"), "plan file missing.json does not exist"),
    ],
)
def test_what_is_no_plan_is_refused(llama, plan, message):
    before = dict(vars(llama))
    for call in (lambda: tidaldecode.apply(llama, plan), lambda: TidalCache(llama.config, plan, 60)):
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert vars(llama) == before
