"""What Transformers calls a cache: `cache` since 5.24, `past_key_values` before. A user may say either."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

from tidaldecode.errors import InputError

_NAMES = ("cache", "past_key_values")

CACHE = next(field.name for field in dataclasses.fields(CausalLMOutputWithPast) if field.name in _NAMES)
"""The name in the installed version: of arguments, of `generate`'s `model_kwargs`, and in outputs."""

_OTHER = next(name for name in _NAMES if name != CACHE)


def with_cache_named(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, with the cache under `CACHE` whichever name it came by.

    Raises:
        InputError: a cache under each name.
    """
    if _OTHER not in arguments:
        return arguments
    rest = {name: value for name, value in arguments.items() if name != _OTHER}
    given = arguments[_OTHER]
    if given is None:
        return rest
    if rest.get(CACHE) is not None:
        raise InputError(f"{CACHE} and {_OTHER} are two names of one argument: leave out one")
    return rest | {CACHE: given}
