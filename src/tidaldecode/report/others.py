"""Articles on what has no page of its own design: coherence, calibration, and files with rows or plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tidaldecode.report.article import (
    Article,
    Card,
    Table,
    environments_of,
    flattened,
    model_of,
    page_figure,
    written,
)
from tidaldecode.report.calibration_plots import frontier_figure
from tidaldecode.report.coherence_plots import recall_heatmaps, recall_over_distance
from tidaldecode.report.labels import signed
from tidaldecode.report.results import Result


def recall_article(result: Result, name: str) -> Article:
    """How much of what one layer attends to another layer's choice covers."""
    fields = dict(result.fields)
    recall = fields.pop("recall")
    recalls, distances = fields.pop("recalls", None) or {"": recall}, fields.pop("distances", None)
    figures = [
        page_figure(
            f"{name}-recall",
            "Recall between layers",
            "Share of the column layer’s attention that the row layer’s choice of tokens covers, 0 to 1.",
            partial(recall_heatmaps, recalls),
        )
    ]
    if distances:
        fields.pop("distance", None)
        figures.append(
            page_figure(
                f"{name}-distance",
                "Recall over distance",
                "The mean over all pairs of layers so far apart.",
                partial(recall_over_distance, distances),
            )
        )
    return Article(
        title=f"Coherence of {model_of(result)}",
        file=result.file,
        facts=tuple(flattened(fields)),
        figures=tuple(figures),
        environments=environments_of(result),
    )


def calibration_article(result: Result, name: str) -> Article:
    """What the search for a plan found."""
    fields = dict(result.fields)
    frontier, gaps = fields.pop("frontier", None) or [], []
    for on, words in (("calibration", "searched"), ("heldout", "held out")):
        if fields[f"{on}_gap"] is not None:
            gaps.append((signed(fields[f"{on}_gap"]), words))
    figures = []
    if frontier:
        figures.append(
            page_figure(
                f"{name}-frontier",
                "Loss over cost",
                "The best plans found: nats per token over the share of the KV cache that a step reads. Numbers at "
                "the points are full and select layers; bars are standard errors over windows.",
                partial(frontier_figure, frontier),
            )
        )
    return Article(
        title=f"Calibration: {model_of(result)}",
        file=result.file,
        facts=tuple(flattened(fields)),
        cards=(
            Card(
                "Gap of the calibrated plan",
                model_of(result),
                tuple(gaps),
                "text",
                "Nats per token above full attention.",
            ),
        ),
        figures=tuple(figures),
        tables=tuple(
            [
                _table(
                    "The best plans", [{key: value for key, value in row.items() if key != "plan"} for row in frontier]
                )
            ]
            if frontier
            else []
        ),
        environments=environments_of(result),
    )


def other_article(result: Result, name: str) -> Article:
    """Values as they are; rows, and objects of objects, as tables."""
    tables = []
    facts = {}
    for key, value in result.fields.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            tables.append(_table(key, value))
        elif isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
            tables.append(_table(key, [{"": row_name} | row for row_name, row in value.items()]))
        else:
            facts[key] = value
    return Article(
        title=result.file.rpartition("/")[2].removesuffix(".json").replace("_", " "),
        file=result.file,
        facts=tuple(flattened(facts)),
        tables=tuple(tables),
        environments=environments_of(result),
    )


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    body = tuple(tuple(written(row.get(name)) for name in columns) for row in rows)
    return Table(title.capitalize(), tuple(name.replace("_", " ") for name in columns), body)
