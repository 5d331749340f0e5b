"""Rows of times, and what they were measured on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar

import torch

from tidaldecode.bench.roofline import read_bandwidth_gbs
from tidaldecode.results.environment import environment
from tidaldecode.results.rows import Row

R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class TimingReport(Generic[R]):
    """Rows with what they were measured on.

    Attributes:
        about: what all rows share, as results name it: command, versions, device, dtype, `read_bandwidth_gbs` (in 1e9
            bytes a second), and what the benchmark adds.
    """

    about: dict[str, Any]
    rows: tuple[R, ...] = ()

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype) -> Self:
        """A report without rows; measures the bandwidth."""
        bandwidth = round(read_bandwidth_gbs(device), 1)
        name = str(dtype).removeprefix("torch.")
        return cls({**environment(device), "dtype": name, "read_bandwidth_gbs": bandwidth})

    def with_about(self, **about: Any) -> Self:
        """The report, and more that its rows share."""
        return replace(self, about={**self.about, **about})

    def with_rows(self, rows: Iterable[R]) -> Self:
        """The report with more rows."""
        return replace(self, rows=self.rows + tuple(rows))

    def to_json(self) -> dict[str, Any]:
        """The report as one flat object with a list of rows."""
        return {**self.about, "rows": [row.model_dump() for row in self.rows]}
