"""The rows of `eval needle`: a cell for each needle and method, and their summary."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tidaldecode.results.rows import Count, Fields, MethodRow, Positive, Share, by_method, mean_read


class NeedleRow(MethodRow):
    """Needles of one length and depth by one method.

    Attributes:
        length: tokens of the prompt.
        depth: where the needle lies, 0 (start) to 1 (end).
        repeat: number among the needles of its length and depth; `None` of several, added up.
    """

    length: Positive
    depth: Share
    repeat: Count | None = None
    correct: Count
    total: Positive


class NeedleCell(NamedTuple):
    """Needles of one length and depth."""

    length: int
    depth: float
    correct: int
    total: int
    kv_read_fraction: float | None = None


class NeedleSummary(MethodRow):
    """Needles found by a method; what it reads is the mean over them.

    Attributes:
        cells: one for each length and depth, sorted.
    """

    cells: tuple[NeedleCell, ...]

    @property
    def correct(self) -> int:
        """Needles found."""
        return sum(cell.correct for cell in self.cells)

    @property
    def total(self) -> int:
        """Needles hidden."""
        return sum(cell.total for cell in self.cells)

    @property
    def accuracy(self) -> float:
        """Share of the needles that were found, 0 to 1."""
        return self.correct / self.total

    def of_length(self, length: int) -> tuple[int, int]:
        """Needles found and hidden in prompts of a length."""
        cells = [cell for cell in self.cells if cell.length == length]
        return sum(cell.correct for cell in cells), sum(cell.total for cell in cells)


def needle_summary(rows: Iterable[Fields]) -> list[NeedleSummary]:
    """Needles found by each method at each budget, in the order in which they come first.

    Args:
        rows: several of one length and depth are added up.
    """
    return [
        NeedleSummary.model_construct(**method, cells=_added_up(group), kv_read_fraction=mean_read(group))
        for method, group in by_method(rows)
    ]


def _added_up(rows: Iterable[Fields]) -> tuple[NeedleCell, ...]:
    found: dict[tuple[int, float], list[Fields]] = {}
    for row in rows:
        found.setdefault((row["length"], row["depth"]), []).append(row)
    return tuple(
        NeedleCell(*place, sum(row["correct"] for row in own), sum(row["total"] for row in own), mean_read(own))
        for place, own in sorted(found.items())
    )
