"""The rows of `eval ppl`: a cell for each window and method, and their summary."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Annotated, Self

from pydantic import Field

from tidaldecode.results.rows import Count, Fields, MethodRow, Nll, Number, Positive, by_method, mean_and_error


class PplRow(MethodRow):
    """Negative log-likelihood of decoded tokens, nats per token.

    Attributes:
        nll: the mean.
        full_nll: full attention's, on the same tokens.
        tokens: decoded tokens.
        nll_by_position: [bins]; bin `i` begins at position `first_position + i * bin_tokens`.
        first_position: tokens before the first decoded one.
        bin_tokens: positions of a bin (the last may have fewer).
    """

    nll: Nll
    full_nll: Nll
    tokens: Positive
    first_position: Count
    bin_tokens: Positive
    nll_by_position: Annotated[tuple[Nll, ...], Field(min_length=1, strict=False)]  # JSON has lists


class PplCell(PplRow):
    """One window, which goes by its first token's place in the text, by one method."""

    window: Count
    seconds: Number | None = None


class PplSummary(PplRow):
    """All windows by one method; each window counts the same.

    Attributes:
        windows: how many there were.
        gap: `nll - full_nll`.
        gap_stderr: standard error of the gap over windows; `None` of one window.
    """

    windows: Positive
    gap: Number
    gap_stderr: Number | None

    @classmethod
    def of_cells(cls, method: Fields, cells: list[Fields]) -> Self:
        """The summary of a method's cells."""
        gap, error = mean_and_error([cell["nll"] - cell["full_nll"] for cell in cells])
        positions = zip(*(cell["nll_by_position"] for cell in cells), strict=True)
        return cls.model_construct(
            **method,
            nll=statistics.fmean(cell["nll"] for cell in cells),
            full_nll=statistics.fmean(cell["full_nll"] for cell in cells),
            tokens=sum(cell["tokens"] for cell in cells),
            first_position=cells[0]["first_position"],
            bin_tokens=cells[0]["bin_tokens"],
            nll_by_position=tuple(map(statistics.fmean, positions)),
            windows=len(cells),
            gap=gap,
            gap_stderr=error,
            kv_read_fraction=cells[0].get("kv_read_fraction"),
        )


def ppl_summary(cells: Iterable[Fields]) -> list[PplSummary]:
    """Perplexity for each method and budget, in the order in which they come first.

    Args:
        cells: of one file: windows of one length, decoded from one position.
    """
    return [PplSummary.of_cells(method, group) for method, group in by_method(cells)]
