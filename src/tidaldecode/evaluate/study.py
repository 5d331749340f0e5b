"""One runner for studies: every case in every way, each cell measured once, kept at once, and summed up at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from tidaldecode.hf import apply
from tidaldecode.methods.method import check_plan_names
from tidaldecode.models import ChosenModel, ModelOptions, model_shape
from tidaldecode.results.cells import Cells
from tidaldecode.results.environment import environment
from tidaldecode.results.rows import Fields, Row
from tidaldecode.rules import RULES

OnProgress = Callable[[int, int, str], None]
"""Told how many parts of how many are done, 0 of 0 where nothing is counted, and in words what comes next."""


def quiet(done: int, total: int, what: str) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Case:
    """What is decoded in every way: a window of a text, a prompt that hides a needle, a task.

    Attributes:
        key: the fields of its cells that tell it from other cases.
        label: the same in words.
        what: what the study needs to decode it.
        parts: what it counts for where progress is told.
        made_of: more fields of its cells; a cell in which one of them is another is measured again.
    """

    key: Fields
    label: str
    what: Any
    parts: int = 1
    made_of: Fields = field(default_factory=dict)


class Way(Protocol):
    """How a case is decoded: a method, or what is made of one."""

    @property
    def label(self) -> str:
        """In a few words."""

    def key(self) -> dict[str, Any]:
        """The fields of its cells that tell it from other ways."""


@dataclass(frozen=True)
class Study:
    """What is measured. A new study is a function that makes one of these.

    Attributes:
        row: declares the fields of its cells, as a file keeps them.
        key: the fields that tell one cell from another.
        identity: what all cells of a file have in common beside the model: `kind`, digest of the text, ...
        cases, ways: each case is decoded in each way. Where full attention is the first way, its cells are at hand for
            the others.
        start: makes what measures, of a model with a plan applied (any).
        measure: of what `start` made, a case, a way and the case's cell by the first way (if there is one), the fields
            of a cell beside its keys; the last argument is told, as a share, how much is done.
        summary: of the cells of all cases and ways, case by case, the rows.
        to_json: of the rows, what a JSON object says beside model, environment and time.
        read: reads the prompt of a case for all ways; `None` where there is none.
    """

    row: type[Row]
    key: tuple[str, ...]
    identity: Fields
    cases: Sequence[Case]
    ways: Sequence[Way]
    start: Callable[[PreTrainedModel], Any]
    measure: Callable[[Any, Case, Any, Fields | None, Callable[[float], None]], Fields]
    summary: Callable[[Sequence[dict[str, Any]]], Sequence[Any]]
    to_json: Callable[[Sequence[Any]], dict[str, Any]]
    read: Callable[[Any, Case], None] | None = None


@dataclass(frozen=True)
class Report:
    """The rows of a study, and what they were measured on.

    Attributes:
        about: command, versions, device, model, dtype, and seconds of this run, without loading; of a run that was
            taken up again only of the rest.
        rows: as the study's `summary` gives them.
        sets_per_kv_head: sets of tokens that the query heads of one KV head read in a sparse layer, by what reads more
            than one.
    """

    study: Study
    about: dict[str, Any]
    rows: Sequence[Any]
    sets_per_kv_head: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The report as one flat object with a list of rows."""
        return {**self.about, **self.study.to_json(self.rows), "sets_per_kv_head": self.sets_per_kv_head}


def run_study(
    make: Callable[[ChosenModel, OnProgress], Study],
    model: ModelOptions,
    seed: int,
    results: Path | None = None,
    on_progress: OnProgress = quiet,
) -> Report:
    """Runs a study: the model is loaded only if something is left to be measured.

    Args:
        make: makes the study for a model whose weights are not loaded yet, and so refuses what would fail later.
        seed: of everything random that the study does not seed itself.
        results: the file of its cells, which a stopped run goes on from; `None` keeps them in memory.

    Raises:
        InputError: something that is needed is missing or wrong, or the file is of another study.
    """
    chosen = model.find()
    study, where = make(chosen, on_progress), environment(chosen.device)
    with Cells.open(results, {**chosen.identity(), **study.identity}, study.key, where) as cells:
        rows, began = finished(study, cells), time.perf_counter()
        if rows is None:
            loaded, began = load(chosen, seed, on_progress), time.perf_counter()
            rows = measure(study, loaded, cells, on_progress)
    return Report(study, measured_on(chosen, began), rows, sets_per_kv_head(study.ways, model_shape(chosen.config)))


def load(chosen: ChosenModel, seed: int, on_progress: OnProgress) -> PreTrainedModel:
    """The model with a plan applied, that of full attention."""
    on_progress(0, 0, "loading the model")
    torch.manual_seed(seed)
    return apply(chosen.load(), "full")


def measured_on(chosen: ChosenModel, began: float) -> dict[str, Any]:
    """What results say of how they were measured, see `Report.about`; `began` is by `time.perf_counter`."""
    seconds = round(time.perf_counter() - began, 3)
    about = {"model": chosen.files.title, "dtype": chosen.dtype_name, "seconds": seconds}
    return {**environment(chosen.device), **about}


def measure(
    study: Study, model: PreTrainedModel, cells: Cells | None = None, on_progress: OnProgress = quiet
) -> Sequence[Any]:
    """Measures what is missing, and sums up.

    Args:
        model: with a plan applied (any).
        cells: what was measured before, which is not measured again; each new cell is appended when it is done.
        on_progress: told prompts and cells.

    Raises:
        InputError: one plan's name stands for another in `cells`, or something can't be measured.
    """
    cells = Cells(study.key) if cells is None else cells
    rows = finished(study, cells)
    if rows is None:
        _measure_missing(study, model, cells, on_progress)
        rows = finished(study, cells)
        assert rows is not None
    return rows


def finished(study: Study, cells: Cells) -> Sequence[Any] | None:
    """The rows of a study, if nothing is left to be measured; the file may hold other cells too.

    Raises:
        InputError: one plan's name stands for another in `cells`.
    """
    check_plan_names([*cells.rows, *(way.key() for way in study.ways)])
    found = [_found(cells, case, way) for case in study.cases for way in study.ways]
    rows = [cell for cell in found if cell is not None]
    return study.summary(rows) if len(rows) == len(found) else None


def _found(cells: Cells, case: Case, way: Way) -> dict[str, Any] | None:
    """A cell that was measured, of the case as it is now."""
    cell = cells.find(**case.key, **way.key())
    return cell if cell is not None and cell.items() >= case.made_of.items() else None


def _measure_missing(study: Study, model: PreTrainedModel, cells: Cells, on_progress: OnProgress) -> None:
    reads = int(study.read is not None)
    total, done = sum(reads + case.parts * len(study.ways) for case in study.cases), 0
    at = study.start(model)
    for case in study.cases:
        missing = [way for way in study.ways if _found(cells, case, way) is None]
        if missing and study.read is not None:
            on_progress(done, total, f"{case.label}: reading")
            study.read(at, case)
        done += reads + case.parts * (len(study.ways) - len(missing))
        for way in missing:

            def on_part(share: float, done: int = done, case: Case = case, way: Way = way) -> None:
                on_progress(done + int(share * case.parts), total, f"{case.label}: {way.label}")

            on_part(0)
            fields = study.measure(at, case, way, _found(cells, case, study.ways[0]), on_part)
            cells.append(_cell(study.row, case, way, fields))
            done += case.parts
    on_progress(done, total, "done")


def _cell(row: type[Row], case: Case, way: Way, fields: Fields) -> dict[str, Any]:
    cell = {**case.key, **way.key(), **case.made_of, **fields}
    if undeclared := cell.keys() - row.model_fields.keys():
        raise TypeError(f"{row.__name__} does not declare {', '.join(sorted(undeclared))}")
    return cell


def sets_per_kv_head(ways: Sequence[Any], shape: Any) -> dict[str, float]:
    """See `Report`."""
    sets = {}
    for method in (getattr(way, "method", way) for way in ways):
        if (count := method.sets_per_kv_head(shape)) > 1:
            what = str(method.kind)
            sets[f"{method.name}, {what.replace('_', ' ') if what in RULES else what}"] = round(count, 4)
    return sets
