"""What a user says of TidalDecode to vLLM: the plan, and optionally a budget."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tidaldecode.errors import InputError
from tidaldecode.models import check_architecture, check_plan
from tidaldecode.plan import TidalPlan
from tidaldecode.plans.find import find_plan

KEY = "tidaldecode"
"""Key of the settings in vLLM's additional config."""

_VARIABLES = {
    "plan": "TIDALDECODE_PLAN",
    "token_budget": "TIDALDECODE_BUDGET",
    "vllm_attention": "TIDALDECODE_VLLM_ATTENTION",
}

VllmAttention = Literal["FLASH_ATTN", "TRITON_ATTN"]
"""vLLM's own backends that ours can extend on a GPU, as vLLM names them."""


class Settings(BaseModel):
    """The settings, from `--additional-config '{"tidaldecode": {...}}'`, or else from the environment.

    Attributes:
        plan: as for `tidaldecode.apply`: `auto`, a shipped plan's name, `paper`, or a plan file; `TIDALDECODE_PLAN`.
        token_budget: instead of the plan's, in tokens or as a fraction of the context; `TIDALDECODE_BUDGET`.
        vllm_attention: vLLM's own backend for what is read in full, on a GPU; `TIDALDECODE_VLLM_ATTENTION`. Default:
            FlashAttention where it is there and knows the dtype, else Triton.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: str = "auto"
    token_budget: int | float | None = None
    vllm_attention: VllmAttention | None = None

    @classmethod
    def of(cls, additional_config: Any) -> Settings:
        """The settings of a vLLM configuration.

        Raises:
            InputError: an unknown setting, or a wrong value.
        """
        given = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
        if isinstance(given, str):  # the plan alone
            given = {"plan": given}
        if not isinstance(given, dict):
            raise InputError(f'additional config {KEY!r}: give an object such as {{"plan": "auto"}}, not {given!r}')
        environment = {name: value for name, variable in _VARIABLES.items() if (value := os.environ.get(variable))}
        try:
            return cls.model_validate(environment | given)
        except ValidationError as error:
            detail = error.errors()[0]
            name = str(detail["loc"][0])
            source = f"additional config {KEY!r}: {name}" if name in given else _VARIABLES[name]
            message = "unknown setting" if detail["type"] == "extra_forbidden" else detail["msg"]
            raise InputError(f"{source}: {message}; there are {', '.join(_VARIABLES)}") from None

    def plan_for(self, config: Any) -> TidalPlan:
        """The plan for a model.

        Args:
            config: its Transformers configuration (`PreTrainedConfig`).

        Raises:
            InputError: the plan is unknown, or does not fit the model; or TidalDecode can't work with the model.
        """
        check_architecture(config)
        plan = find_plan(self.plan, config)
        if self.token_budget is not None:
            plan = plan.with_budget(self.token_budget)
        check_plan(plan, config)
        return plan
