"""From the names of a model and of texts to what is found: loads them, measures, and writes files of results."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from tidaldecode.calibrate.calibration import calibrate
from tidaldecode.calibrate.coherence import coherence
from tidaldecode.calibrate.settings import CalibrationSettings, CoherenceSettings, check_apart
from tidaldecode.calibrate.written import CalibrationReport, CoherenceReport
from tidaldecode.hf import apply
from tidaldecode.models import ChosenModel, ModelOptions
from tidaldecode.results.environment import environment
from tidaldecode.results.rows import save_results
from tidaldecode.texts.text import Text, TextSource
from tidaldecode.whole_file import make_results_folder

Found = TypeVar("Found")
OnProgress = Callable[[int, int, str], None]
"""Told how many parts of how many are done, 0 of 0 while something is loaded, and in words what comes next."""


def report_calibration(
    model: ModelOptions,
    source: TextSource,
    heldout_source: TextSource | None,
    settings: CalibrationSettings,
    plan_file: Path,
    results: Path | None = None,
    on_progress: OnProgress = lambda done, total, what: None,
) -> CalibrationReport:
    """Loads a model and texts, and finds a plan.

    Args:
        source: of the text that the plan is chosen on.
        heldout_source: of the one that it is checked on; `None` takes the second half of the first.
        plan_file: where the plan is saved.
        results: a JSON file for the report, whose folder is made; the figure that it names, beside it, is left to the
            caller.

    Raises:
        InputError: see `calibrate`; or something can't be loaded or written.
    """
    chosen = model.find()
    settings.check(chosen.config)
    on_progress(0, 0, "reading the text")
    tokenizer = chosen.files.tokenizer()
    text, title = Text.tokenize(tokenizer, source.parts()), source.title
    if heldout_source is None:
        text, heldout = text.halves()
        title, heldout_title = f"{title}, first half", f"{title}, second half"
    else:
        heldout, heldout_title = Text.tokenize(tokenizer, heldout_source.parts()), heldout_source.title
    check_apart(text, settings.starts(text), heldout, settings.heldout(heldout))
    about, found = _measure(
        chosen,
        settings.seed,
        lambda loaded: calibrate(loaded, text, heldout, settings, on_progress),
        on_progress,
        None if results is None else ("--results", results),
    )
    about |= {"text": title, "heldout_text": heldout_title}
    figure = None if results is None else str(results.with_suffix(".png"))
    report = CalibrationReport(about, settings, found, figure)
    report.plan.save(plan_file)
    if results is not None:
        save_results(report.to_json(), results)
    return report


def report_coherence(
    model: ModelOptions,
    source: TextSource,
    settings: CoherenceSettings,
    results: Path | None = None,
    on_progress: OnProgress = lambda done, total, what: None,
) -> CoherenceReport:
    """Loads a model and a text, and measures coherence.

    Args:
        results: a JSON file for the report, whose folder is made; the figures that it names, beside it, are left to
            the caller.

    Raises:
        InputError: see `coherence`; or something can't be loaded or written.
    """
    chosen = model.find()
    settings.check(chosen.config)
    on_progress(0, 0, "reading the text")
    text = Text.tokenize(chosen.files.tokenizer(), source.parts())
    settings.windows.check_text(text)
    about, found = _measure(
        chosen,
        settings.seed,
        lambda loaded: coherence(loaded, text, settings, on_progress),
        on_progress,
        None if results is None else ("--output", results),
    )
    names = ("coherence.png", "coherence_distance.png")
    figures = () if results is None else (str(results.with_name(name)) for name in names)
    report = CoherenceReport({**about, "text": source.title}, settings, found, *figures)
    if results is not None:
        save_results(report.to_json(), results)
    return report


def _measure(
    chosen: ChosenModel,
    seed: int,
    measure: Callable[[PreTrainedModel], Found],
    on_progress: OnProgress,
    output: tuple[str, Path] | None,
) -> tuple[dict[str, Any], Found]:
    """Loads a model and measures, once there is a folder for the results.

    Args:
        output: the option that names the folder, and the file of results.

    Returns:
        What it was measured on, see `CalibrationReport.about`, and what was found.
    """
    if output is not None:
        make_results_folder(*output)
    on_progress(0, 0, "loading the model")
    torch.manual_seed(seed)
    loaded = apply(chosen.load(), "full")
    began = time.perf_counter()
    found = measure(loaded)
    seconds = round(time.perf_counter() - began, 3)
    about = {"model": chosen.files.title, "dtype": chosen.dtype_name, "seconds": seconds}
    return {**environment(chosen.device), **about}, found
