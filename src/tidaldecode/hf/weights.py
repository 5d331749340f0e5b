"""What a captured step reads of a model, and whether it would still read the same.

A CUDA graph reads weights where they were when it was captured, through the modules that ran then. So each replay asks
first; in Python, for hundreds of weights, that must be a few calls into C and not a loop.
"""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tidaldecode.hf.merged import is_merged

_NAME = "_tidaldecode_weights"  # in the model: what holds its weights must not outlive it
_MEMBERS = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_PLAIN = ("torch.", "transformers.")  # modules whose attributes are constants, once they are made
_numbers = itertools.count(1)
_looking = threading.Lock()

# in PyTorch's CUDA builds: its own graphs ask so whether their inputs lie where they did
_same_addresses: Callable[[list[Any], list[Any], list[int]], bool] | None = getattr(
    torch._C, "_tensors_data_ptrs_at_indices_equal", None
)


def weights_now(model: nn.Module) -> int:
    """A number that stays the same as long as a graph captured from the model reads what the model reads.

    It is another one after a parameter was replaced or its data lie elsewhere, a module was replaced, got a hook or a
    forward of its own, an adapter was injected, merged, switched or scaled, the model moved, converted or quantized.
    What is copied to where weights lie, as by `load_state_dict`, the graph reads there, and nothing changes.
    """
    seen: _Seen | None = vars(model).get(_NAME)
    if seen is None or not seen.unchanged():
        with _looking:
            seen = vars(model).get(_NAME)
            if seen is None or not seen.unchanged():
                seen = vars(model)[_NAME] = _Seen(model)
    return seen.number


def forget_weights(model: nn.Module) -> None:
    """Leaves nothing of `weights_now` in the model."""
    vars(model).pop(_NAME, None)


class _Seen:
    """A model as it was looked at: its modules, their parameters, buffers and hooks, and where the tensors lie.

    Attributes:
        number: tells it from every other look.
    """

    def __init__(self, model: nn.Module) -> None:
        self.number = next(_numbers)
        inner = [module for module in model.modules() if module is not model]  # its own hooks run outside of a step
        self._own = [vars(module) for module in inner]
        self._own_sizes = list(map(_size, self._own))
        self._hooks = [attributes[name] for attributes in self._own for name in _HOOKS]
        self._hooks += [torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks]
        self._hooked = any(self._hooks)
        self._places = [attributes[name] for attributes in (vars(model), *self._own) for name in _MEMBERS]
        self._places = [place for place in self._places if place]
        self._places += [place for module in inner for place in _state(module)]
        self._places += self._hooks if self._hooked else []  # some are there for good: the same ones must stay
        self._places += _inside(gc.get_referents(*self._places))
        self._members = gc.get_referents(*self._places)
        self._at = [index for index, member in enumerate(self._members) if _lies_somewhere(member)]
        self._addresses = [member.data_ptr() if _lies_somewhere(member) else None for member in self._members]
        self._dtypes = self._dtypes_now(self._members)
        # another dtype at the same address needs memory that was free in between: then its storage tells. Where PyTorch
        # keeps no object for a storage it is gone at once, and dtypes are compared, which takes as long as all the rest
        self._freed: list[object] = []
        storages = {id(storage): storage for storage in map(_storage, map(self._members.__getitem__, self._at))}
        self._storages = [weakref.ref(storage, self._freed.append) for storage in storages.values()]
        del storages
        self._told = not self._freed

    def unchanged(self) -> bool:
        """Whether all of it is as it was. Some microseconds: a call into C for each kind of thing."""
        members = gc.get_referents(*self._places)
        try:
            same = members == self._members  # the same objects are equal at once
        except Exception:  # tensors that are not the same ones, or whatever compares in a way of its own
            return False
        return bool(
            same
            and (self._hooked or not any(self._hooks))
            and self._lie_there(members)
            and (not self._freed if self._told else self._dtypes_now(members) == self._dtypes)
            and self._own_alike()
        )

    def _lie_there(self, members: list[Any]) -> bool:
        if _same_addresses is not None:
            return _same_addresses(members, self._addresses, self._at)
        return all(members[index].data_ptr() == self._addresses[index] for index in self._at)

    def _dtypes_now(self, members: list[Any]) -> list[torch.dtype]:
        return [members[index].dtype for index in self._at]

    def _own_alike(self) -> bool:
        """Whether no module has an attribute more or less, such as a `forward`, but for those of `merged_products`."""
        return list(map(len, self._own)) == self._own_sizes or list(map(_size, self._own)) == self._own_sizes

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of the model is looked at anew."""
        return type(None), ()


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _size(attributes: dict[str, Any]) -> int:
    return len(attributes) - is_merged(attributes)


def _state(module: nn.Module) -> Iterator[Any]:
    """The attributes of a module that somebody may switch, and the lists and the like among them: an adapter's."""
    if type(module).__module__.startswith(_PLAIN) and "forward" not in vars(module):
        return
    if is_merged(vars(module)):
        return
    yield vars(module)
    for name, value in vars(module).items():
        if isinstance(value, dict | list | set) and name not in (*_MEMBERS, *_HOOKS):
            yield value


def _inside(members: list[Any]) -> list[dict[str, Any]]:
    """Where the tensors are that others wrap, as a quantized weight does."""
    wrappers = [vars(member) for member in members if is_traceable_wrapper_subclass(member)]
    return [*wrappers, *_inside(gc.get_referents(*wrappers))] if wrappers else []


def _lies_somewhere(member: Any) -> bool:
    """Whether it is a tensor with an address: one that wraps others, as a quantized weight, has none."""
    if not isinstance(member, Tensor):
        return False
    try:
        return member.data_ptr() != 0
    except Exception:  # whatever a subclass says to that
        return False
