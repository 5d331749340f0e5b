"""Heads and layers of a model, and the index sets that its select layers choose."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_serializer, model_validator

from tidaldecode.rules import RULES, UNIFIED, known

Selection = Annotated[str, AfterValidator(known)]
"""The name of one of `tidaldecode.rules.RULES`."""

_SOURCE = re.compile(r"(\d+):(\w+)(?::(\d+))?")


class Source(BaseModel):
    """One index set of a step: which `select` layer chose it, by which rule, and for which head.

    In JSON a string: `"12:unified"`, `"7:per_group:1"` (KV head 1), `"7:per_head:4"` (query head 4).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int = Field(ge=0)
    selection: Selection
    head: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = _SOURCE.fullmatch(value)
        layer, rule, head = match.groups() if match else (None, "", None)
        if rule not in RULES or (head is None) != (rule == UNIFIED.name):
            *others, last = (f"LAYER:{rule}" + ":H" * (rule != UNIFIED.name) for rule in RULES)
            raise ValueError(f"{value!r} is no source: write {', '.join(others)} or {last}")
        return {"layer": layer, "selection": rule, "head": head or 0}

    @model_serializer
    def _to_text(self) -> str:
        return f"{self.layer}:{self.selection}" + f":{self.head}" * (self.selection != UNIFIED.name)


class ModelShape(BaseModel):
    """The attention shape of the model that a plan was made for, and optionally its name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = None
    num_layers: int = Field(ge=1)
    num_query_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_query_heads} query heads are no multiple of {self.num_kv_heads} KV heads")
        return self

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_query_heads // self.num_kv_heads

    def num_sets(self, selection: Selection) -> int:
        """Index sets that one `select` layer of the model chooses under a rule."""
        return RULES[selection].num_sets(self.num_query_heads, self.num_kv_heads)

    def sets_per_kv_head(self, selection: Selection) -> float:
        """Of these, how many the query heads of one KV head read, each its own by its place."""
        return max(1.0, self.num_sets(selection) / self.num_kv_heads)

    def describe(self) -> str:
        """The shape in words, for messages."""
        return describe_shape(self.model_dump(exclude={"name"}))


def describe_shape(fields: Mapping[str, int]) -> str:
    """Those fields of a `ModelShape` that are known, in words."""
    words = {"num_layers": "{} layers", "num_query_heads": "{} query heads", "num_kv_heads": "{} KV heads"}
    words["head_dim"] = "head dim {}"
    return ", ".join(text.format(fields[name]) for name, text in words.items() if name in fields)
