"""A folder of results as it is read: what is understood, and what is not and why."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from tidaldecode.errors import InputError
from tidaldecode.report.labels import written
from tidaldecode.results.answers import AnswerCell
from tidaldecode.results.cells import read_cells
from tidaldecode.results.correction import CorrectionCell, CorrectionRow, rows_of
from tidaldecode.results.needles import NeedleRow
from tidaldecode.results.perplexity import PplCell, PplSummary
from tidaldecode.results.rows import Count, Name, Number, Positive, Row, Share, Time
from tidaldecode.results.tasks import TaskRow
from tidaldecode.results.timings import DecodeRow, OperationRow
from tidaldecode.results.whole_runs import WholeRunCell

_LARGEST = 2**26  # bytes of a file
_BARS = "bars"  # folder of files that say which bars results have met: they hold no results of their own

_Shares = Annotated[list[Share | None], Field(min_length=1, max_length=512)]
_Matrix = Annotated[list[_Shares], Field(min_length=1, max_length=512)]


class _Recall(Row):
    recall: _Matrix
    recalls: dict[Name, _Matrix] = Field(default={}, max_length=8)
    distance: _Shares | None = None
    distances: dict[Name, _Shares] = Field(default={}, max_length=8)


class _FrontierRow(Row):
    full_layers: Count
    select_layers: Count
    quantized_select_layers: Count = 0
    token_budget: Positive
    kv_read_fraction: Number
    loss: Number
    text_divergence: Number
    calibration_gap: Number
    heldout_gap: Number | None
    heldout_error: Number | None


class _Calibration(Row):
    calibration_gap: Number
    heldout_gap: Number | None
    heldout_error: Number | None = None
    kv_read_fraction: Number | None = None
    seconds: Time | None = None
    frontier: list[_FrontierRow] = Field(default=[], max_length=4096)


_CELLS: dict[str, TypeAdapter[Any]] = {
    "ppl": TypeAdapter(list[PplCell]),
    "needle": TypeAdapter(list[NeedleRow]),
    "lm-eval": TypeAdapter(list[TaskRow]),
    "correction": TypeAdapter(list[CorrectionCell]),
    "answers": TypeAdapter(list[AnswerCell]),
    "generate": TypeAdapter(list[WholeRunCell]),
}
_PRINTED: dict[str, tuple[set[str], TypeAdapter[Any]]] = {
    "decode": ({"step_ms"}, TypeAdapter(list[DecodeRow])),
    "ops": ({"operation", "us"}, TypeAdapter(list[OperationRow])),
    "ppl": ({"nll", "full_nll", "windows"}, TypeAdapter(list[PplSummary])),
    "needle": ({"correct", "total", "accuracy"}, TypeAdapter(list[NeedleRow])),
    "correction": ({"mode", "length", "speedup", "differing"}, TypeAdapter(list[CorrectionRow])),
    "lm-eval": ({"task", "metrics"}, TypeAdapter(list[TaskRow])),
    "generate": ({"total_ms", "prefill_ms"}, TypeAdapter(list[WholeRunCell])),
    "answers": ({"surprise", "repetition", "loops"}, TypeAdapter(list[AnswerCell])),
}
"""Rows of JSON objects: the fields of the first one by which a kind is known, and all that they must have."""

_SUMS = ("needle", "answers")
"""Kinds whose rows are sums of their cells, which are shown in their place."""


@dataclass(frozen=True)
class Result:
    """A file that is understood.

    Attributes:
        file: its path in the folder, with `/`.
        kind: as in `_PRINTED`, `recall`, `calibration`, `plan`, or `values`, which are shown as they are.
        fields: everything beside the rows and the environments.
        rows: checked for the kind.
        environments: command, versions and device of each run that wrote it.
    """

    file: str
    kind: str
    fields: dict[str, Any]
    rows: list[dict[str, Any]]
    environments: list[dict[str, Any]]

    @property
    def of_cells(self) -> bool:
        """Whether it holds the cells of an evaluation, and not what `--json` said of them."""
        return self.file.endswith(".jsonl")

    @property
    def model(self) -> str:
        """The model's name, or the file's where it names none."""
        return written(self.fields.get("model") or self.file)

    @property
    def context(self) -> int | None:
        """Tokens of a window, where the file says them."""
        context = self.fields.get("context")
        return context if isinstance(context, int) else None

    @property
    def devices(self) -> str:
        """On what it was measured."""
        return " and ".join(dict.fromkeys(str(made["device"]) for made in self.environments if made.get("device")))


@dataclass(frozen=True)
class Skipped:
    """A file that is not, and why."""

    file: str
    reason: str


def read_results(folder: Path) -> tuple[list[Result], list[Skipped]]:
    """Reads the `.json` and `.jsonl` files of a folder and the folders in it but `bars`, in the order of their names.

    What `--json` of an evaluation said is left out where the cells of the same run are in the same folder.

    Raises:
        InputError: there is no such folder, nothing in it, or nothing that is understood.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder} is no folder: give the folder of results")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in (".json", ".jsonl") and path.is_file() and path.parent.name != _BARS
    )
    if not paths:
        raise InputError(f"{folder} has no results (.json, .jsonl): name it as --output of an evaluation or benchmark")
    results: list[Result] = []
    skipped: list[Skipped] = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        try:
            results.append(_read(path, name))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            skipped.append(Skipped(name, f"not as expected at {place}: {first['msg']}"))
        except (InputError, ValueError, RecursionError, OSError) as error:
            skipped.append(Skipped(name, (str(error) or type(error).__name__).splitlines()[0]))
    if not results:
        raise InputError(f"{folder} has nothing that is understood; {skipped[0].file}: {skipped[0].reason}")
    return [result for result in results if not any(_says_the_same(result, other) for other in results)], skipped


def _says_the_same(result: Result, cells: Result) -> bool:
    """Whether a result is what `--json` said of cells beside it: of one kind, model, data type, context, ..."""
    if result.of_cells or not cells.of_cells or result.kind != cells.kind:
        return False
    shared = (result.fields.keys() & cells.fields.keys()) - {"text"}  # a name in the one, a digest in the other
    return PurePosixPath(result.file).parent == PurePosixPath(cells.file).parent and all(
        result.fields[name] == cells.fields[name] for name in shared
    )


def _read(path: Path, name: str) -> Result:
    if path.stat().st_size > _LARGEST:
        raise InputError(f"larger than {_LARGEST >> 20} MiB")
    result = _read_cells(path, name) if path.suffix == ".jsonl" else _read_json(path, name)
    json.dumps(asdict(result), ensure_ascii=False).encode()  # half a surrogate pair can't be written on a page
    return result


def _read_cells(path: Path, name: str) -> Result:
    try:
        header, rows = read_cells(path)
    except InputError:
        raise InputError("no cells of an evaluation, or the first line is damaged") from None
    kind = header.pop("kind")
    if kind not in _CELLS:
        raise InputError(f"cells of an unknown kind, {kind!r}")
    if not rows:
        raise InputError("no cells yet")
    header.pop("key")
    environments = [environment for environment in header.pop("environments") if isinstance(environment, dict)]
    return Result(name, kind, header, _checked(kind, rows, _CELLS[kind]), environments)


def _read_json(path: Path, name: str) -> Result:
    try:
        content = json.loads(path.read_bytes())  # of any UTF, with or without a byte order mark
    except ValueError:
        raise InputError("no JSON") from None
    if not isinstance(content, dict):
        raise InputError("no JSON object")
    kind = _kind(content)
    environment = {key: content.pop(key) for key in ("command", "versions", "device") if key in content}
    rows = []
    if kind in _PRINTED:
        rows = content.pop("rows")
        rows = content.pop("cells") if kind in _SUMS else rows
        rows = _checked(kind, rows, _PRINTED[kind][1])
    return Result(name, kind, content, rows, [environment] if environment else [])


def _kind(content: Mapping[str, Any]) -> str:
    """What an object is by what it holds; it is ours if it says how it was made, or holds rows or a measure of ours."""
    rows = content.get("rows")
    first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
    for kind, (marks, _) in _PRINTED.items():
        if marks <= first.keys() and (kind not in _SUMS or content.get("cells")):
            return kind
    if "recall" in content:
        coherence = TypeAdapter(_Recall).validate_python(content)
        if any(len(row) != len(of) for of in (coherence.recall, *coherence.recalls.values()) for row in of):
            raise InputError("recall is no square matrix")
        return "recall"
    if "calibration_gap" in content:
        TypeAdapter(_Calibration).validate_python(content)
        return "calibration"
    if {"roles", "selection", "token_budget"} <= content.keys():
        return "plan"
    if first or "versions" in content:
        return "values"
    raise InputError("no results of tidaldecode")


def _checked(kind: str, rows: Any, declared: TypeAdapter[Any]) -> list[dict[str, Any]]:
    declared.validate_python(rows)
    if kind == "correction" and rows and "window" in rows[0]:
        lossless = [row for row in rows if row["mode"] == "lossless"]
        if any(row.get("accepted_per_round") is None or "first_difference" not in row for row in lossless):
            raise InputError("lossless cells without accepted_per_round or first_difference")
        rows_of(rows)  # there is a window to show
    if kind == "ppl" and len({(len(row["nll_by_position"]), row["bin_tokens"]) for row in rows}) > 1:
        raise InputError("windows of different lengths")
    return plans_told_apart(rows)


def plans_told_apart(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Plans that share a name get their digest behind it: a plan file may have changed between two runs."""
    digests: dict[str | None, set[str | None]] = {}
    for row in rows:
        digests.setdefault(row.get("plan"), set()).add(row.get("plan_digest"))
    shared = {plan for plan, known in digests.items() if plan is not None and len(known) > 1}
    return [
        row | {"plan": f"{row['plan']} ({str(row.get('plan_digest'))[:6]})"} if row.get("plan") in shared else row
        for row in rows
    ]
