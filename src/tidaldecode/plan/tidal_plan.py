"""What each layer of a model does in a decode step: a validated piece of data, saved as JSON."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError, model_validator

from tidaldecode.errors import InputError
from tidaldecode.plan.calibration import Calibration
from tidaldecode.plan.shape import ModelShape, Selection, Source, describe_shape
from tidaldecode.text_file import read_text
from tidaldecode.whole_file import whole_file

Role = Literal["full", "select", "sparse", "quantized_select"]
CHOOSING: tuple[Role, ...] = ("select", "quantized_select")
"""Roles of layers that choose tokens."""

READING: tuple[Role, ...] = ("sparse", "quantized_select")
"""Roles of layers that attend to chosen tokens alone."""

Drafting = Literal["plan", "verification"]
KeyBits = Literal[1, 2, 4]
KEY_BITS: tuple[KeyBits, ...] = get_args(KeyBits)
"""Bits a channel that codes of keys may have."""

PAPER_RESELECT_LAYERS = {
    "llama-2-7b": 7,
    "longchat-7b": 7,
    "llama-3-8b": 13,
    "llama-3.1-8b": 13,
}
"""Re-selection layer that TidalDecode (arXiv 2410.05076) tuned by hand, by model family."""


def plain_name(name: str) -> str:
    """A model's name without its case and punctuation: `HuggingFaceTB/SmolLM2-135M` and `smollm2_135m` agree."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def published_reselect_layer(model: str | None) -> int | None:
    """The re-selection layer that `PAPER_RESELECT_LAYERS` has for the family of a model, by the model's name."""
    name = plain_name(model or "")
    return next((layer for family, layer in PAPER_RESELECT_LAYERS.items() if plain_name(family) in name), None)


class TidalPlan(BaseModel):
    """Position persistent sparse attention (TidalDecode, arXiv 2410.05076), layer by layer.

    Attributes:
        roles: one per layer of the model. `full` attends to the whole cache; `select` does too and chooses tokens;
            `sparse` attends to the tokens that a `select` layer below it chose. `quantized_select` chooses by scores
            that are estimated from codes of the keys, and attends to what it chose; sparse layers above may read its
            choice, too. `None` is a layer that can't have a role because it attends to a sliding window of its own.
        key_bits: bits a channel of the codes of keys, 1, 2 or 4 (RaBitQ, Gao and Long, SIGMOD 2024); of a plan with
            `quantized_select` layers.
        token_budget: tokens that a sparse layer reads, sinks and recent tokens included; a float is a fraction of
            the context, in (0, 1].
        budgets: by layer that chooses, how many tokens its sets hold where that is not `token_budget`; tokens or
            fractions as that is. All who read a set read all of it.
        sink_tokens: first tokens of the context that are always read.
        recent_tokens: last tokens that are always read, the new token among them (so at least 1); a float is a
            share of a set's budget, in [0, 0.99].
        selection: whose scores choose, one of `tidaldecode.rules`: each query head its own set (`per_head`), the query
            heads of a KV head together (`per_group`), or all query heads together (`unified`).
        sources: for each layer that reads chosen tokens, and for each of its query heads, the set that it reads. Of
            those left out, a sparse layer reads the set of the same head of the nearest layer below that chooses, a
            quantized select layer its own.
        drafting: how lossless decoding drafts. `plan`: by the roles, as all other decoding. `verification`: every layer
            with a role attends to the tokens that the latest verification pass chose in it by `selection`, and to those
            that came since; `token_budget` counts the chosen ones.
        model: the model that the plan was made for; `None` fits every model with this many layers.
        origin: where the plan comes from, in words.
        calibration: how it was found and what it loses, of a plan that `tidaldecode calibrate` made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = None
    origin: str | None = None
    calibration: Calibration | None = None
    model: ModelShape | None = None
    roles: Annotated[tuple[Role | None, ...], Field(min_length=1)]
    selection: Selection
    key_bits: KeyBits | None = None
    token_budget: StrictInt | StrictFloat
    budgets: dict[int, StrictInt | StrictFloat] | None = None
    sink_tokens: StrictInt = Field(default=0, ge=0)
    recent_tokens: StrictInt | StrictFloat = 1
    sources: dict[int, tuple[Source, ...]] | None = None
    drafting: Drafting = "plan"

    # ---- validation

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_roles()
        self._check_budgets()
        for layer, sources in (self.sources or {}).items():
            self._check_sources(layer, sources)
        return self

    def _check_roles(self) -> None:
        if self.model is not None and self.model.num_layers != len(self.roles):
            raise ValueError(f"roles: {len(self.roles)} roles for a model of {self.model.num_layers} layers")
        for layer, role in enumerate(self.roles):
            if role == "sparse" and not set(CHOOSING) & set(self.roles[:layer]):
                raise ValueError(f"roles: layer {layer} is sparse but no layer below it is select")
        if ("quantized_select" in self.roles) != (self.key_bits is not None):
            raise ValueError("key_bits: give 1, 2 or 4 if, and only if, a layer is quantized_select")
        if self.model is not None and self.key_bits is not None and self.model.head_dim * self.key_bits % 8:
            raise ValueError(f"key_bits: {self.key_bits} bits of {self.model.head_dim} channels fill no whole bytes")

    def _check_budgets(self) -> None:
        recent = self.recent_tokens
        if isinstance(recent, float) and not 0 <= recent <= 0.99:
            raise ValueError(f"recent_tokens: {recent} as a share of the budget must lie in [0, 0.99]")
        if isinstance(recent, int) and recent < 1:
            raise ValueError(f"recent_tokens: {recent} must be at least 1: the new token is always read")
        self._check_budget("token_budget", self.token_budget)
        for layer, budget in (self.budgets or {}).items():
            if not 0 <= layer < len(self.roles) or self.roles[layer] not in CHOOSING:
                raise ValueError(f"budgets: layer {layer} is not a layer that chooses")
            if type(budget) is not type(self.token_budget):
                raise ValueError(f"budgets: {budget} of layer {layer} must be tokens or a fraction, as token_budget is")
            self._check_budget(f"budgets: layer {layer}", budget)

    def _check_budget(self, name: str, budget: int | float) -> None:
        if isinstance(budget, float):
            if not 0 < budget <= 1:
                raise ValueError(f"{name}: {budget} as a fraction of the context must lie in (0, 1]")
            return
        if budget <= 0:
            raise ValueError(f"{name}: {budget} must be positive")
        least = self.sink_tokens + self.recent_for(budget) + 1
        if budget < least:
            raise ValueError(f"{name}: {budget} is below sink_tokens + recent_tokens + 1 = {least}")

    def _check_sources(self, layer: int, sources: tuple[Source, ...]) -> None:
        if not 0 <= layer < len(self.roles) or self.roles[layer] not in READING:
            raise ValueError(f"sources: layer {layer} is not a layer that reads chosen tokens")
        if self.model is not None and len(sources) != self.model.num_query_heads:
            raise ValueError(
                f"sources: layer {layer} names {len(sources)} sets for {self.model.num_query_heads} query heads"
            )
        for source in sources:
            own = source.layer == layer and self.roles[layer] == "quantized_select"
            if not own and (source.layer >= layer or self.roles[source.layer] not in CHOOSING):
                raise ValueError(
                    f"sources: layer {layer} reads layer {source.layer}, which is no select layer below it"
                )
            if self.model is not None and source.head >= self.model.num_sets(source.selection):
                raise ValueError(f"sources: layer {layer} reads head {source.head}, which the model does not have")

    @property
    def reading(self) -> list[int]:
        """The layers that attend to chosen tokens alone."""
        return [layer for layer, role in enumerate(self.roles) if role in READING]

    # ---- what the numbers mean at a context length

    def budget_for(self, context: int, layer: int | None = None) -> int:
        """Tokens of a set at a context of `context` tokens (the context itself may be shorter).

        Args:
            layer: which layer chose it; by default one without a budget of its own.
        """
        fraction = self.budget_of(layer)
        if isinstance(fraction, int):
            return fraction
        return self._enough(math.ceil(fraction * context))

    def _enough(self, budget: int) -> int:
        """A budget, or the least that has room beside its sinks and recent tokens."""
        budget = max(budget, self.sink_tokens + 2)
        while budget < self.sink_tokens + self.recent_for(budget) + 1:  # the recent tokens may be a share of it
            budget += 1
        return budget

    def budget_of(self, layer: int | None) -> int | float:
        """Tokens, or fraction of the context, of the sets that a layer chooses."""
        return self.token_budget if layer is None else (self.budgets or {}).get(layer, self.token_budget)

    def recent_for(self, budget: int) -> int:
        """Recent tokens among `budget` tokens, the new token included."""
        return recent_among(budget, self.recent_tokens)

    def sets_per_kv_head(self, shape: ModelShape) -> float:
        """Index sets that the query heads of one KV head read in a sparse layer, each of `token_budget` tokens.

        1 where they read the same one; averaged over KV heads and sparse layers; 0 where no layer is sparse.
        """
        counts = [sets_read(self.sources_of(layer, shape), shape.group_size) for layer in self.reading]
        return sum(counts) / len(counts) if counts else 0.0

    def sources_of(self, layer: int, shape: ModelShape) -> tuple[Source, ...]:
        """The set that each query head of a layer reads, by default its own head of the nearest layer that chose."""
        if self.sources is not None and layer in self.sources:
            return self.sources[layer]
        nearest = max(chose for chose in range(layer + 1) if self.roles[chose] in CHOOSING)
        heads, sets = shape.num_query_heads, shape.num_sets(self.selection)
        return tuple(
            Source(layer=nearest, selection=self.selection, head=head * sets // heads) for head in range(heads)
        )

    def mismatch(self, fields: Mapping[str, int]) -> str | None:
        """Why the plan was not made for a model, `None` where nothing says so.

        Args:
            fields: those of the model's `ModelShape` that are known, its name left out.
        """
        if self.model is not None and any(getattr(self.model, name) != value for name, value in fields.items()):
            return (
                f"the plan was made for another model, {self.model.name or 'unnamed'} ({self.model.describe()}); "
                f"this one has {describe_shape(fields)}"
            )
        if len(self.roles) != fields.get("num_layers", len(self.roles)):
            return f"the plan has {len(self.roles)} roles, but the model has {fields['num_layers']} layers"
        return None

    # ---- making plans

    def with_budget(self, token_budget: int | float) -> Self:
        """The same plan with another budget (tokens, or a fraction of the context).

        Those of single layers go along with it, as far as they leave room beside the sinks and recent tokens, and are
        no more than the context.

        Raises:
            InputError: the budget leaves no such room.
        """
        fields = {**self.model_dump(), "token_budget": token_budget}
        if self.budgets is not None and token_budget != self.token_budget:
            factor = token_budget / self.token_budget
            fields["budgets"] = {
                layer: self._enough(math.ceil(round(budget * factor, 6)))
                if isinstance(token_budget, int)
                else min(budget * factor, 1.0)
                for layer, budget in self.budgets.items()
            }
        return self.validated(**fields)

    def with_drafting(self, drafting: Drafting) -> Self:
        """The same plan with another way to draft in lossless decoding.

        Raises:
            InputError: there is no such way.
        """
        return self.validated(**{**self.model_dump(), "drafting": drafting})

    @classmethod
    def validated(cls, **fields: Any) -> Self:
        """A plan from its fields.

        Raises:
            InputError: a field is missing, unknown or wrong; one line, unlike pydantic's own error.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            raise InputError(f"plan: {_first_line(error)}") from None

    @classmethod
    def full(cls, num_layers: int, global_layers: tuple[int, ...] | None = None) -> Self:
        """Full attention in every layer that attends to the whole context: the baseline, through the same code."""
        layers = range(num_layers) if global_layers is None else global_layers
        roles: tuple[Role | None, ...] = tuple("full" if layer in layers else None for layer in range(num_layers))
        return cls(name="full", roles=roles, selection="unified", token_budget=1.0)

    @classmethod
    def paper(
        cls,
        num_layers: int,
        reselect_layer: int | None = None,
        *,
        token_budget: int | float = 1024,
        global_layers: tuple[int, ...] | None = None,
    ) -> Self:
        """The paper's plan: layers 0 and 1 full, layer 2 and one middle layer select, per query head.

        Args:
            num_layers: layers of the model.
            reselect_layer: the second selection layer; `PAPER_RESELECT_LAYERS` has the published ones. Default: 13
                (Llama-3-8B's), or the middle layer of a model with fewer than 26.
            token_budget: tokens, or a fraction of the context.
            global_layers: the layers that attend to the whole context, if others keep a sliding window; they take
                the roles in order, and the rest get none. Default: all layers.

        Raises:
            InputError: fewer than three layers can have a role, or `reselect_layer` can't select.
        """
        layers = tuple(range(num_layers)) if global_layers is None else global_layers
        if len(layers) < 3:
            raise InputError(f"the paper's plan needs 3 layers with global attention, not {len(layers)}")
        if reselect_layer is None:
            reselect_layer = layers[min(13, max(2, len(layers) // 2))]
        if reselect_layer not in layers[2:]:
            raise InputError(f"reselect_layer {reselect_layer} must be one of the layers {_ranges(layers[2:])}")
        roles: list[Role | None] = [None] * num_layers
        for position, layer in enumerate(layers):
            roles[layer] = "full" if position < 2 else "select" if layer in (layers[2], reselect_layer) else "sparse"
        origin = "Yang et al., TidalDecode, ICLR 2025 (arXiv 2410.05076)"
        return cls.validated(
            name="paper", origin=origin, roles=tuple(roles), selection="per_head", token_budget=token_budget
        )

    # ---- files

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a plan file.

        Raises:
            InputError: the file is missing, is no UTF-8 or no JSON, or holds an unknown key or a wrong value.
        """
        text = read_text("plan file", path)
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise InputError(f"plan file {path}: {_first_line(error)}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, one line a field; an existing file stays whole until the new one is complete.

        Raises:
            InputError: the file can't be written.
        """
        with whole_file(Path(path)) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The plan as JSON text: a line for each field, and for each layer of `sources`."""
        fields = self.model_dump(mode="json", exclude_none=True) | {"roles": self.roles}
        sources = fields.pop("sources", None)
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()]
        if sources is not None:
            layers = (f"    {json.dumps(str(key))}: {json.dumps(value)}" for key, value in sources.items())
            lines.append('  "sources": {\n' + ",\n".join(layers) + "\n  }")
        return "{\n" + ",\n".join(lines) + "\n}\n"


def tokens_of(budget: int | float, context: int) -> int:
    """A budget in tokens at a context; of a fraction at least 2, a chosen token beside the new one."""
    return budget if isinstance(budget, int) else max(2, math.ceil(budget * context))


def sets_read(sources: Sequence[Hashable], group_size: int) -> float:
    """Different sets that the query heads of one KV head read, from each head's set; the mean over the KV heads."""
    groups = [set(sources[start : start + group_size]) for start in range(0, len(sources), group_size)]
    return sum(map(len, groups)) / len(groups)


def recent_among(budget: int, recent_tokens: int | float) -> int:
    """Recent tokens among `budget` tokens, of a number of them or a share of the budget; at least the new token."""
    return recent_tokens if isinstance(recent_tokens, int) else max(1, int(recent_tokens * budget))


def _first_line(error: ValidationError) -> str:
    """The first of pydantic's errors on one line, with where it is and how many follow."""
    details = error.errors()
    first = details[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("int", "float"))
    message = first["msg"].removeprefix("Value error, ").replace("\n", " ")
    if first["type"] == "extra_forbidden":
        message = "unknown key"
    rest = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{where}: {message}{rest}" if where else f"{message}{rest}"


def _ranges(layers: tuple[int, ...]) -> str:
    return f"{layers[0]} to {layers[-1]}" if len(layers) == layers[-1] - layers[0] + 1 else ", ".join(map(str, layers))
