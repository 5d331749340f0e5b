"""From the names of a model and of texts to what is found: loads them, measures, and writes files of results."""

from __future__ import annotations

import time
from pathlib import Path

from tidaldecode.calibrate.calibration import calibrate
from tidaldecode.calibrate.coherence import coherence
from tidaldecode.calibrate.questions import check_questions
from tidaldecode.calibrate.settings import CalibrationSettings, CoherenceSettings, check_apart
from tidaldecode.calibrate.written import CalibrationReport, CoherenceReport
from tidaldecode.evaluate.study import OnProgress, load, measured_on, quiet
from tidaldecode.models import ModelOptions
from tidaldecode.results.rows import save_results
from tidaldecode.texts.text import Text, TextSource
from tidaldecode.whole_file import make_results_folder


def report_calibration(
    model: ModelOptions,
    source: TextSource,
    heldout_source: TextSource | None,
    settings: CalibrationSettings,
    plan_file: Path,
    results: Path | None = None,
    on_progress: OnProgress = quiet,
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
    check_questions(tokenizer, text, heldout, settings)
    if results is not None:
        make_results_folder("--results", results)
    loaded, began = load(chosen, settings.seed, on_progress), time.perf_counter()
    found = calibrate(loaded, text, heldout, settings, on_progress, tokenizer)
    about = {**measured_on(chosen, began), "text": title, "heldout_text": heldout_title}
    figure = None if results is None else str(results.with_suffix(".png"))
    report = CalibrationReport(about, settings, found, figure)
    try:
        report.plan.save(plan_file)
    finally:  # the results hold the plan, too
        if results is not None:
            save_results(report.to_json(), results)
    return report


def report_coherence(
    model: ModelOptions,
    source: TextSource,
    settings: CoherenceSettings,
    results: Path | None = None,
    on_progress: OnProgress = quiet,
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
    if results is not None:
        make_results_folder("--output", results)
    loaded, began = load(chosen, settings.seed, on_progress), time.perf_counter()
    found = coherence(loaded, text, settings, on_progress)
    about = {**measured_on(chosen, began), "text": source.title}
    names = ("coherence.png", "coherence_distance.png")
    figures = () if results is None else (str(results.with_name(name)) for name in names)
    report = CoherenceReport(about, settings, found, *figures)
    if results is not None:
        save_results(report.to_json(), results)
    return report
