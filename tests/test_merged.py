"""Layers of one input whose products are one while a decode step is compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tidaldecode.hf.merged import merged_products

TOKENS = torch.randint(0, 200, (2, 5), generator=torch.Generator().manual_seed(0))


def products_of(model):
    """Products with weights in the model's compiled forward pass, and its logits."""
    counts = []

    def count(graph, inputs):
        counts.append(sum(node.target is nn.functional.linear for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        logits = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend=count, fullgraph=True)(TOKENS)
    return counts[0], logits


@pytest.mark.parametrize(
    ("family", "products_a_layer"), [("llama", (7, 4)), ("qwen2", (7, 4)), ("olmo2", (7, 4)), ("phi3", (4, 4))]
)
def test_the_products_are_merged_and_nothing_else_changes(tiny, family, products_a_layer):
    model = tiny(family)
    before, expected = products_of(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with merged_products(model):
        merged, logits = products_of(model)
    layers = model.config.num_hidden_layers
    assert (before, merged) == tuple(layers * number + 1 for number in products_a_layer)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert products_of(model)[0] == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_weights_are_moved_once(tiny):
    model = tiny()
    with merged_products(model):
        places = [parameter.data_ptr() for parameter in model.parameters()]
    with merged_products(model):
        assert [parameter.data_ptr() for parameter in model.parameters()] == places
    attention = model.model.layers[0].self_attn
    ends = attention.q_proj.weight.data_ptr() + attention.q_proj.weight.nbytes
    assert attention.k_proj.weight.data_ptr() == ends
    other = copy.deepcopy(model)
    with torch.no_grad(), merged_products(other):
        other.model.layers[0].self_attn.k_proj.weight.zero_()
        assert (other.model.layers[0].self_attn.k_proj(torch.ones(1, model.config.hidden_size)) == 0).all()
    assert (attention.k_proj.weight != 0).any()


def test_a_model_with_merged_weights_can_be_saved(tiny, tmp_path):
    model = tiny()
    with merged_products(model):
        pass
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_layers_of_different_inputs_stay_right(tiny):
    """A model could give such names to layers that do not read the same."""
    attention = tiny().model.layers[0].self_attn
    one, other = torch.randn(2, 3, attention.q_proj.in_features).unbind()
    expected = attention.q_proj(one), attention.k_proj(other), attention.v_proj(one)
    with merged_products(attention):
        rows = attention.q_proj(one), attention.k_proj(other), attention.v_proj(one)
    torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize("change", ["shared", "mixed", "adapter"])
def test_what_is_no_plain_layer_is_left_alone(tiny, change):
    attention = tiny().model.layers[0].self_attn
    if change == "shared":
        attention.k_proj.weight = attention.v_proj.weight
    elif change == "mixed":
        attention.k_proj.double()
    else:
        attention.k_proj = nn.Sequential(attention.k_proj)
    places = [parameter.data_ptr() for parameter in attention.parameters()]
    with merged_products(attention):
        assert "forward" not in vars(attention.q_proj)
    assert [parameter.data_ptr() for parameter in attention.parameters()] == places


def test_too_little_memory_leaves_a_model_as_it_is(tiny, monkeypatch):
    model = tiny()
    places = [parameter.data_ptr() for parameter in model.parameters()]

    def short(tensors):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch, "cat", short)
    with merged_products(model):
        assert "forward" not in vars(model.model.layers[0].self_attn.q_proj)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places


@pytest.mark.gpu
def test_merging_takes_no_memory_for_good():
    """Nor, on the way, more than the weights of one product."""
    blocks = nn.ModuleList()
    for _ in range(8):
        names = {"gate_proj": nn.Linear(4096, 4096, bias=False), "up_proj": nn.Linear(4096, 4096, bias=False)}
        blocks.append(nn.ModuleDict(names).cuda())  # 64 MiB each
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    with merged_products(blocks):
        assert torch.cuda.memory_allocated() <= allocated
        assert torch.cuda.memory_reserved() <= reserved
        assert torch.cuda.max_memory_reserved() <= reserved + 2**27
