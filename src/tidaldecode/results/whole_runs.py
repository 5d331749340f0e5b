"""The rows of `bench generate`: a cell for each shape of prompts and way to generate, and what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tidaldecode.results.rows import Fields, MethodRow, Name, Number, Positive, Time

FULL = ("full", "transformers", "transformers-static")
"""Ways to generate with full attention."""


class WholeRunCell(MethodRow):
    """One call of `generate`.

    Attributes:
        method: as in other rows; `lossless`; or Transformers' own `generate`, with its growing cache or its static one.
        context: tokens of each prompt.
        batch: prompts.
        lossless: tokens drafted in a round, or `auto`; of `lossless`.
        out_of_memory: memory did not suffice: the figures are `None`.
        total_ms: milliseconds of the whole call.
        prefill_ms: of it until the first new token was there.
        decode_ms_per_token: milliseconds of the rest over the new tokens of a sequence behind the first.
        tokens_per_second: new tokens behind the first ones, of all sequences, over the rest's time.
        peak_memory_gib: most memory that was allocated at once, the weights among it; `None` on a CPU.
        kv_read_fraction: see `MethodRow`; of rounds, what drafts and passes read for a token that came out.
        captured: whether decode steps ran in a CUDA graph of ours.
        accepted_per_round: tokens that came out of a round of lossless decoding.
        pace: what `lossless="auto"` went by.
    """

    context: Positive
    batch: Positive
    lossless: Positive | Name | None = None
    out_of_memory: bool = False
    total_ms: Time | None = None
    prefill_ms: Time | None = None
    decode_ms_per_token: Time | None = None
    tokens_per_second: Time | None = None
    peak_memory_gib: Number | None = None
    captured: bool | None = None
    accepted_per_round: Number | None = None
    pace: dict[str, Number] | None = None


class WholeRunRow(WholeRunCell):
    """The same beside full attention.

    Attributes:
        speedup_vs_full: time of the fastest whole call with full attention, whoever made it, over this one's; `None`
            where none was measured.
        decode_speedup_vs_full: the same of decoding alone.
    """

    speedup_vs_full: Number | None = None
    decode_speedup_vs_full: Number | None = None


def whole_run_rows(cells: Sequence[Fields]) -> list[WholeRunRow]:
    """The cells of each context and batch, compared."""
    return [
        WholeRunRow.model_construct(
            **{
                **cell,
                "speedup_vs_full": _ratio(cell, cells, "total_ms"),
                "decode_speedup_vs_full": _ratio(cell, cells, "decode_ms_per_token"),
            }
        )
        for cell in cells
    ]


def _ratio(cell: Fields, cells: Sequence[Fields], time: str) -> float | None:
    def shape(other: Fields) -> tuple[Any, Any]:
        return other["context"], other["batch"]

    alike = (other for other in cells if shape(other) == shape(cell) and other["method"] in FULL)
    full, mine = [ms for other in alike if (ms := other.get(time))], cell.get(time)
    return round(min(full) / mine, 4) if full and mine else None
