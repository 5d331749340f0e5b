"""The share of K and V that a step of a method reads, where a file says enough to know it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pydantic import ValidationError

from tidaldecode.errors import InputError
from tidaldecode.plan import ModelShape, TidalPlan, plain_name
from tidaldecode.plans import shipped_plans
from tidaldecode.report.folder import Result
from tidaldecode.results.rows import Budget, MethodSettings

_SHAPE = re.compile(r"(\d{1,3}) layers, (\d{1,4}) query heads, (\d{1,4}) KV heads, head dim (\d{1,5})")


class SharesRead:
    """Knows the plans that ship, that calibrations of the folder found, and that lie in it, by their digests."""

    def __init__(self, results: Iterable[Result]) -> None:
        from tidaldecode.methods.method import Method  # takes seconds, and a folder without results is told before

        plans = [*shipped_plans().values(), *_plans_in(results)]
        self._plans = {Method.named("tidal", plan=plan).key()["plan_digest"]: plan for plan in plans}
        self._shapes = {plain_name(p.model.name): p.model for p in plans if p.model is not None and p.model.name}

    def of(self, result: Result, settings: MethodSettings, budget: Budget, context: int | None) -> float | None:
        """The share at a context of so many tokens, 0 to 1.

        Returns:
            `None` where the shape of the model or the plan is not known, or the setting is one of another version.
        """
        from tidaldecode.methods.method import Method

        shape, plan = self._shape(result), self._plans.get(settings.plan_digest)
        if settings.method == "full":
            return 1.0
        if shape is None or context is None or context < 1 or (settings.full_layers or 0) > shape.num_layers:
            return None
        if plan is not None and plan.mismatch(shape.model_dump(exclude={"name"})) is not None:
            return None
        try:
            own = {name: getattr(settings, name) for name in ("selection", "page_size", "full_layers")}
            method = Method.named(settings.method, budget, plan, **own)
            return method.attention(shape, context).kv_read_fraction(context)
        except (InputError, KeyError):  # a method, a setting or a rule of another version
            return None

    def _shape(self, result: Result) -> ModelShape | None:
        """As the file says it, or as a plan says it that was made for the model of that name."""
        found = _SHAPE.fullmatch(str(result.fields.get("model_shape")))
        if found is None:
            return self._shapes.get(plain_name(str(result.fields.get("model"))))
        layers, query_heads, kv_heads, head_dim = map(int, found.groups())
        try:
            return ModelShape(num_layers=layers, num_query_heads=query_heads, num_kv_heads=kv_heads, head_dim=head_dim)
        except ValidationError:
            return None


def _plans_in(results: Iterable[Result]) -> Iterable[TidalPlan]:
    for result in results:
        found = [result.fields.get("plan"), *(row.get("plan") for row in result.fields.get("frontier") or ())]
        for fields in found if result.kind == "calibration" else [result.fields]:
            try:
                yield TidalPlan.model_validate(fields)
            except ValidationError:
                continue
