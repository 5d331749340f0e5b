"""What a user says of TidalDecode to vLLM: the plan, and optionally a budget."""

from __future__ import annotations

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tidaldecode.architecture import check_architecture, check_plan
from tidaldecode.errors import InputError
from tidaldecode.plan import TidalPlan
from tidaldecode.plans.find import find_plan

KEY = "tidaldecode"
"""Key of the settings in vLLM's additional config."""


class Settings(BaseModel):
    """The settings, from `--additional-config '{"tidaldecode": {...}}'`, or else from the environment.

    Attributes:
        plan: as for `tidaldecode.apply`: `auto`, a shipped plan's name, `paper`, or a plan file; `TIDALDECODE_PLAN`.
        token_budget: instead of the plan's, in tokens or as a fraction of the context; `TIDALDECODE_BUDGET`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: str = "auto"
    token_budget: int | float | None = None

    @classmethod
    def of(cls, additional_config: Any) -> Settings:
        """The settings of a vLLM configuration.

        Raises:
            InputError: an unknown setting, or a wrong value.
        """
        given = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
        if isinstance(given, str):  # the plan alone
            given = {"plan": given}
        environment = {"plan": os.environ.get("TIDALDECODE_PLAN"), "token_budget": os.environ.get("TIDALDECODE_BUDGET")}
        try:
            return cls.model_validate({name: value for name, value in environment.items() if value} | given)
        except (ValidationError, TypeError) as error:
            detail = error.errors()[0] if isinstance(error, ValidationError) else {"msg": str(error)}
            where = ".".join(map(str, detail.get("loc", ())))
            raise InputError(f"additional config {KEY!r}: {where}: {detail['msg']}") from None

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
