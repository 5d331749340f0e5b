"""Linear layers that read the same input, computed as one product in a compiled decode step.

A product with one row is as fast as its weights are read, and small weights are read slowly: on an H200 the K and V
projections of an 8B model run at a third of the memory's speed. So the weights of such layers are laid one behind the
other in one buffer, of which the parameters stay views: the model, its state dict and its prefill are what they were,
and no byte is held twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names that Transformers' models give to layers of one input."""


@dataclass(eq=False)
class _Product:
    """The product of one input with the weights of several layers.

    Another thread may run the model meanwhile, and its layers come here too.

    Attributes:
        weight: [sum of the layers' outputs, inputs].
        bias: [sum of the layers' outputs], or `None`.
        last: input and output of the layers that were called last, and how many of them; kept until all of them were.
    """

    weight: Tensor
    bias: Tensor | None
    num_layers: int
    last: tuple[Tensor, Tensor, int] | None = None

    def part(self, rows: Tensor, begin: int, end: int) -> Tensor:
        """What one layer makes of an input [..., inputs]: columns `begin` to `end` of the product."""
        last = self.last  # looked at once: it may be another thread's a line later
        if last is None or last[0] is not rows:
            last = rows, F.linear(rows, self.weight, self.bias), 0
        served = last[2] + 1
        self.last = None if served == self.num_layers else (rows, last[1], served)
        return last[1][..., begin:end]


@contextmanager
def merged_products(model: nn.Module) -> Iterator[None]:
    """While it lasts, the layers of a model that read the same input compute one product between them.

    Only plain `nn.Linear` layers are merged: neither quantized ones, nor such as an adapter stands for.
    """
    merged: list[nn.Linear] = []
    try:
        for layers in list(_together(model)):
            if (product := _product(layers)) is None:
                continue
            end = 0
            for layer in layers:
                begin, end = end, end + layer.out_features
                vars(layer)["forward"] = _part(product, begin, end)
                merged.append(layer)
        yield
    finally:
        for layer in merged:
            del vars(layer)["forward"]


def is_merged(attributes: dict[str, Any]) -> bool:
    """Whether a layer with these attributes computes its product together with others at the moment."""
    return getattr(attributes.get("forward"), "__module__", None) == __name__


def _part(product: _Product, begin: int, end: int) -> Callable[[Tensor], Tensor]:
    def forward(rows: Tensor) -> Tensor:
        return product.part(rows, begin, end)

    return forward


def _together(model: nn.Module) -> Iterator[list[nn.Linear]]:
    """Layers whose products can be one."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        children = dict(module.named_children())
        for names in _TOGETHER:
            layers = [children[name] for name in names if name in children]
            plain = [layer for layer in layers if type(layer) is nn.Linear and "forward" not in vars(layer)]
            if len(plain) == len(names) and _alike(plain) and all(uses[id(layer.weight)] == 1 for layer in plain):
                yield plain


def _alike(layers: list[nn.Linear]) -> bool:
    """Whether the weights of layers can lie in one buffer."""
    if len({layer.bias is None for layer in layers}) > 1:
        return False
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    return (
        all(type(parameter) is nn.Parameter and not parameter.is_inference() for parameter in parameters)
        and all(layer.weight.is_contiguous() for layer in layers)
        and len({layer.in_features for layer in layers}) == 1
        and len({(parameter.dtype, parameter.device) for parameter in parameters}) == 1
    )


def _product(layers: list[nn.Linear]) -> _Product | None:
    """The product of layers, their weights laid together; `None` where memory is too short for that."""
    try:
        weight = _laid_together([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        bias = _laid_together(biases) if biases else None
    except torch.OutOfMemoryError:
        return None
    return _Product(weight, bias, len(layers))


def _laid_together(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor of parameters one behind the other, whose storage they share; moved there if they do not lie so."""
    rows = sum(len(parameter) for parameter in parameters)
    if all(_follows(before, after) for before, after in pairwise(parameters)):
        first = parameters[0].detach()
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    with torch.inference_mode(False), torch.no_grad():
        buffer = torch.cat([parameter.detach() for parameter in parameters])
        parts = torch.split(buffer, [len(parameter) for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part
    if buffer.is_cuda:
        torch.cuda.empty_cache()  # or what the parameters leave behind would add up to most of the model
    return buffer


def _follows(before: Tensor, after: Tensor) -> bool:
    same = before.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
    return same and after.data_ptr() == before.data_ptr() + before.nbytes
