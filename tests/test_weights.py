"""Whether a captured step still reads what its model computes with: every change must be seen, and cheaply."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref

import pytest
import torch
from torch import nn

from tidaldecode.hf import weights
from tidaldecode.hf.merged import merged_products
from tidaldecode.hf.weights import forget_weights, weights_now

IDS = torch.arange(5)[None]


class Adapter(nn.Module):
    """A linear layer with adapters beside it that can be switched, scaled and merged, as PEFT's layers can."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({name: nn.Linear(base.in_features, base.out_features) for name in ("one", "two")})
        self.scaling = {"one": 1.0, "two": 1.0}
        self._active_adapter = ["one"]
        self._disable_adapters = False
        self.merged_adapters = []

    def forward(self, rows):
        output = self.base_layer(rows)
        if self._disable_adapters or self.merged_adapters:
            return output
        return output + sum(self.scaling[name] * self.lora_A[name](rows) for name in self._active_adapter)


class Quantized(torch.Tensor):
    """A weight that wraps the tensor that holds its numbers."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes):
        self.codes = codes

    def __tensor_flatten__(self):
        return ["codes"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        return Quantized(inner["codes"])

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        assert operation is torch.ops.aten.detach.default, operation
        return Quantized(args[0].codes)


def merge(adapter):
    adapter.base_layer.weight.data += adapter.lora_A["one"].weight
    adapter.merged_adapters.append("one")


def attention(model):
    return model.model.layers[3].self_attn


def swap(parameter):
    parameter.data = parameter.data.clone()


def read_from(parameter, buffer, dtype):
    """Lets a parameter be what lies in a buffer."""
    parameter.data = torch.frombuffer(buffer, dtype=dtype)


CHANGES = {
    "a replaced parameter": lambda m: setattr(attention(m).k_proj, "weight", nn.Parameter(torch.zeros(32, 96))),
    "a replaced parameter of one number": lambda m: setattr(m.model.norm, "one", nn.Parameter(torch.ones(1))),
    "swapped data": lambda m: swap(m.model.layers[6].mlp.down_proj.weight),
    "swapped data of a norm": lambda m: swap(m.model.layers[6].input_layernorm.weight),
    "swapped data of a buffer": lambda m: swap(m.model.rotary_emb.inv_freq),
    "other weights assigned": lambda m: m.load_state_dict(
        {k: v.clone() for k, v in m.state_dict().items()}, assign=True
    ),
    "other weights in one layer's dictionary": lambda m: m.lm_head._parameters.update(
        weight=nn.Parameter(torch.ones(9))
    ),
    "a moved layer": lambda m: m.model.layers[5].to("meta"),
    "a converted layer": lambda m: m.model.layers[5].mlp.double(),
    "a replaced module": lambda m: setattr(attention(m), "o_proj", nn.Linear(96, 96, bias=False)),
    "an injected adapter": lambda m: setattr(attention(m), "q_proj", Adapter(attention(m).q_proj)),
    "layers taken out": lambda m: m.model.layers.__delitem__(6),
    "a hook": lambda m: m.model.layers[2].register_forward_hook(lambda module, args, output: output),
    "a hook before": lambda m: m.model.layers[2].mlp.register_forward_pre_hook(lambda module, args: args),
    "a forward of its own": lambda m: setattr(m.model.layers[2].mlp, "forward", lambda rows: rows),
    "a quantized weight": lambda m: setattr(
        attention(m).v_proj, "weight", nn.Parameter(Quantized(torch.ones(32, 96)), requires_grad=False)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(tiny, change):
    model = tiny()
    model.model.norm.one = nn.Parameter(torch.ones(1))
    before = weights_now(model)
    assert weights_now(model) == before
    CHANGES[change](model)
    after = weights_now(model)
    assert after != before
    assert weights_now(model) == after


@pytest.mark.parametrize("told", [True, False])
def test_another_dtype_at_the_same_address_is_seen(tiny, monkeypatch, told):
    """As after a way over the CPU. Also with a PyTorch that does not tell when a storage is freed."""
    if not told:
        monkeypatch.setattr(weights, "_storage", lambda tensor: torch.UntypedStorage())
    model, buffer = tiny(), bytearray(64 * 4)
    weight = model.model.norm.weight
    read_from(weight, buffer, torch.float32)
    before = weights_now(model)
    assert weights_now(model) == before
    address = weight.data_ptr()
    read_from(weight, buffer, torch.float16)
    assert weight.data_ptr() == address
    assert weights_now(model) != before


ADAPTER_CHANGES = {
    "merged": merge,
    "switched": lambda adapter: setattr(adapter, "_active_adapter", ["two"]),
    "switched in place": lambda adapter: adapter._active_adapter.__setitem__(0, "two"),
    "scaled": lambda adapter: adapter.scaling.update(one=0.5),
    "disabled": lambda adapter: setattr(adapter, "_disable_adapters", True),
    "another one added": lambda adapter: adapter.lora_A.update({"three": nn.Linear(96, 96)}),
    "trained elsewhere": lambda adapter: swap(adapter.lora_A["one"].weight),
}


@pytest.mark.parametrize("change", ADAPTER_CHANGES)
def test_a_change_of_an_adapter_is_seen(tiny, change):
    model = tiny()
    adapter = attention(model).q_proj = Adapter(attention(model).q_proj)
    before = weights_now(model)
    model(IDS)
    assert weights_now(model) == before
    ADAPTER_CHANGES[change](adapter)
    assert weights_now(model) != before


def test_an_unloaded_adapter_is_seen(tiny):
    model = tiny()
    base = attention(model).q_proj
    attention(model).q_proj = Adapter(base)
    before = weights_now(model)
    attention(model).q_proj = base
    assert weights_now(model) != before


def test_what_a_quantized_weight_wraps_is_seen(tiny):
    model = tiny()
    weight = nn.Parameter(Quantized(torch.ones(96, 96)), requires_grad=False)
    attention(model).q_proj.weight = weight
    before = weights_now(model)
    assert weights_now(model) == before
    swap(weight.codes)
    assert weights_now(model) != before
    before = weights_now(model)
    weight.codes = torch.ones(96, 96)
    assert weights_now(model) != before


def test_a_hook_beside_another_is_seen(tiny):
    model = tiny()
    model.model.norm.register_forward_hook(lambda module, args, output: output)
    before = weights_now(model)
    assert weights_now(model) == before
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: output)
    after = weights_now(model)
    assert after != before
    handle.remove()
    assert weights_now(model) != after


def test_what_a_graph_reads_all_the_same_is_no_change(tiny):
    """New numbers where the old ones were; passes of the model; modes that a step does not go by."""
    model = tiny()
    with merged_products(model):
        pass
    before = weights_now(model)
    model(IDS).logits.sum().backward()
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    model.requires_grad_(False)
    model.register_forward_hook(lambda module, args, output: output)  # of the whole: outside of a step
    assert weights_now(model) == before
    with merged_products(model):  # another thread captures
        assert weights_now(model) == before
    assert weights_now(model) == before


def test_merged_products_read_loaded_weights(tiny):
    model, other = tiny(), tiny()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    with merged_products(model):
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(IDS).logits, other(IDS).logits)


def test_a_copy_is_looked_at_anew_and_nothing_keeps_a_model_alive(tiny):
    model = tiny()
    number = weights_now(model)
    assert weights_now(copy.deepcopy(model)) != number
    assert weights_now(pickle.loads(pickle.dumps(model))) != number
    weight = weakref.ref(model.lm_head.weight)
    forget_weights(model)
    assert not any("tidaldecode" in name for name in vars(model))
    weights_now(model)
    del model
    gc.collect()
    assert weight() is None


def test_a_look_is_a_few_calls_however_many_layers(tiny, monkeypatch):
    """Well below 1 % of a decode step: no loop in Python over hundreds of weights."""
    monkeypatch.setattr(weights, "_same_addresses", lambda members, addresses, at: True)
    counts = []
    for layers in (2, 12):
        model = tiny(num_hidden_layers=layers)
        weights_now(model)
        counts.append(0)

        def count(frame, event, arg):
            counts[-1] += 1

        sys.setprofile(count)
        weights_now(model)
        sys.setprofile(None)
    assert counts[0] == counts[1] < 60
