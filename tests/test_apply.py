"""What `apply` makes of a model: its copies, what it is wrapped in, and other models of its configuration."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from transformers import LlamaForCausalLM

import tidaldecode
from families import plan_for, ragged_batch
from tidaldecode import TidalCache, applied_plan

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


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved}


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


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
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


def _tokens_of(model, answers):
    torch.set_num_threads(1)
    answers.put((applied_plan(model).selection, tokens(model).tolist()))


def test_a_spawned_worker_decodes_by_the_plan(planned):
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    worker = context.Process(target=_tokens_of, args=(planned, answers))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    assert answers.get() == ("unified", tokens(planned).tolist())
