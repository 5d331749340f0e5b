"""How a plan was found."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Calibration(BaseModel):
    """How a plan was found, and what it loses: what `tidaldecode calibrate` writes into it.

    Attributes:
        text, heldout_text: names of the text that the plan was chosen on, and of the one it was checked on.
        context, windows, decode: tokens of a window, how many windows, and decode steps of each that chose the plan.
        heldout_windows, heldout_decode: likewise, of the check.
        loss: what the search made small: the Kullback-Leibler divergence of the plan's next-token distribution from
            full attention's, in nats, averaged over the steps of the text, of the probes, and of full attention's own
            answers.
        text_divergence: the same over the steps of the text alone.
        calibration_gap, heldout_gap: nats per token above full attention, teacher-forced; `heldout_gap` is `None` where
            the calibration was stopped before the check.
        heldout_error: standard error of `heldout_gap` over the windows.
        heldout_surprise: how much less probable full attention finds the plan's sampled answers to questions about the
            held-out text than its own, nats per token; `None` if nothing was asked.
        heldout_surprise_error: its standard error over the questions.
        kv_read_fraction: share of the KV cache that a step reads at `context` tokens.
        versions: of the packages that it was made with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    heldout_text: str | None = None
    context: int
    windows: int
    decode: int
    heldout_windows: int | None = None
    heldout_decode: int | None = None
    seed: int
    dtype: str
    device: str
    versions: dict[str, str]
    loss: float
    text_divergence: float
    calibration_gap: float
    heldout_gap: float | None = None
    heldout_error: float | None = None
    heldout_surprise: float | None = None
    heldout_surprise_error: float | None = None
    kv_read_fraction: float
