"""Calibration: from a model and a text to the plan that loses least, and what it loses on a text that it never saw."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from tidaldecode.calibrate.by_share import SharesByCodes
from tidaldecode.calibrate.calibration_run import CalibrationRun
from tidaldecode.calibrate.points import Point
from tidaldecode.calibrate.settings import CalibrationSettings, check_apart
from tidaldecode.errors import InputError, one_line
from tidaldecode.evaluate.study import OnProgress, quiet
from tidaldecode.texts.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What a calibration found.

    Attributes:
        chosen: the plan that was asked for, or the best so far.
        frontier: the best plans, the cheapest first: each loses less than those before it, but for `chosen`, which is
            always among them.
        tried: how many plans were tried.
        stopped: whether it was interrupted, or failed: plans may be left untried, and the check undone.
    """

    chosen: Point
    frontier: tuple[Point, ...]
    tried: int
    stopped: bool


def calibrate(
    model: PreTrainedModel,
    text: Text,
    heldout: Text,
    settings: CalibrationSettings,
    on_progress: OnProgress = quiet,
    tokenizer: Tokenizer | None = None,
) -> Found:
    """Finds the plan that loses least on a text, and measures what it loses on another.

    The windows of the text are read once, with full attention, and kept. A plan that is tried costs one pass over their
    decode steps; its loss is the divergence of its next-token distributions from full attention's (`Loss`). See
    docs/calibration.md for what the search does and why.

    Interrupted (Ctrl-C), or failing once a plan was tried, it returns the best plan so far.

    Args:
        model: with a plan applied (any).
        text: long enough, see `CalibrationSettings.starts`.
        heldout: likewise, see `CalibrationSettings.heldout`; shares no window with `text`.
        settings: what is looked for.
        on_progress: see `OnProgress`.
        tokenizer: asks the questions of `settings.answers`; without it there are none.

    Raises:
        InputError: the model can't be calibrated so, a text is too short, they overlap, or full attention's own
            predictions are not finite.
        KeyboardInterrupt: interrupted before any plan was tried.
    """
    settings.check(model.config)
    check_apart(text, settings.starts(text), heldout, settings.heldout(heldout))
    run = CalibrationRun(model, settings, on_progress, tokenizer)
    stopped = False
    try:
        run.read(text)
        search = SharesByCodes(run).search if settings.code_bits else run.search
        search()
        run.stretches.clear()  # their caches make room for the held-out windows'
        run.check(heldout)
    except (KeyboardInterrupt, InputError, torch.OutOfMemoryError) as error:
        if not run.points.best:
            raise
        if not isinstance(error, KeyboardInterrupt):
            _log.warning("the calibration ended early, and keeps the best plan so far: %s", one_line(error))
        stopped = True
    return Found(run.points.chosen, run.points.frontier, run.tried, stopped)
