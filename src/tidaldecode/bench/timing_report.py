"""Rows of times, and what they were measured on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Self, TypeVar

import torch

from tidaldecode.bench.roofline import read_bandwidth_gbs
from tidaldecode.results.environment import environment
from tidaldecode.results.rows import Row

R = TypeVar("R", bound=Row)


@dataclass(frozen=True, kw_only=True)
class TimingReport(Generic[R]):
    """Rows with what they were measured on.

    Attributes:
        environment: command, versions, device.
        read_bandwidth_gbs: measured before, in 1e9 bytes a second.
    """

    environment: dict[str, object]
    dtype: str
    read_bandwidth_gbs: float
    rows: tuple[R, ...] = ()

    def with_rows(self, rows: Iterable[R]) -> Self:
        """The report with more rows."""
        return replace(self, rows=self.rows + tuple(rows))

    def to_json(self) -> dict[str, Any]:
        """The report as one flat object with a list of rows."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        rows = [row.model_dump() for row in values.pop("rows")]
        return {**values.pop("environment"), **values, "rows": rows}


def measured_on(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of a report but for its rows; measures the bandwidth."""
    return {
        "environment": environment(device),
        "dtype": str(dtype).removeprefix("torch."),
        "read_bandwidth_gbs": round(read_bandwidth_gbs(device), 1),
    }
