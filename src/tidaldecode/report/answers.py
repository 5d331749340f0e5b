"""Answers to questions: their table, the figure of what they cost and read, and the texts side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tidaldecode.report.article import Article, Table, Texts, article, drawn
from tidaldecode.report.compared import left_out
from tidaldecode.report.drawing import Line, line_panels, line_styles
from tidaldecode.report.folder import Result
from tidaldecode.report.labels import budget_label, counted, percent, ratio, signed
from tidaldecode.report.shares import SharesRead
from tidaldecode.results.answers import AnswerSummary, Mean, answer_summary, nll_over_floor, who_wrote
from tidaldecode.results.rows import Fields, shared_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SAID = ("model", "figure", "surprise", "rows")


def answers(result: Result, name: str, shares: SharesRead) -> Article:
    """What each method's answers are like, and the answers themselves."""
    cells = shared_rows(result.rows, ("question",))
    rows = answer_summary(cells.rows)
    floor = " The floor is full attention at another seed." if any(row.draw for row in rows) else ""
    title = f"Answers to {counted(rows[0].questions, 'question')} ± one standard error; surprise in nats per token."
    table = Table(title + floor + left_out(cells, "question"), answer_table(rows))
    figures = drawn(name, {surprise_over_share: rows}, left_out(cells, "question"))
    found = article(result, f"Answers of {result.model}", figures, (table,), *_SAID)
    return replace(found, texts=_side_by_side(result.rows))


def answer_table(rows: Sequence[AnswerSummary], brief: bool = False) -> list[dict[str, str]]:
    """A row of text for each method and budget; columns of which nothing is known are left out.

    Args:
        brief: for a terminal's width: no standard errors but of the surprise, and F1 alone.
    """
    sampled = any(row.draw for row in rows)
    referenced = not brief and any(row.means["reference_f1"] for row in rows)
    table = []
    for row in rows:
        of, full = row.means, row.method["method"] == "full" and not row.draw
        share, surprise, tokens = of["kv_read_fraction"], of["surprise"], of["tokens"]
        cells = {"method": row.label, "budget": budget_label(row.method["budget"]) or "–"}
        cells["read" if brief else "K and V read"] = percent(share and share.value)
        cells["surprise"] = "–" if full or not surprise else signed(*surprise)
        if sampled:
            cells["nats / floor"] = ratio(nll_over_floor(row, rows))
        cells |= {"repeated": _percent(of["repetition"], brief), "loops": f"{row.loops}"}
        for head, name in {"ROUGE-L": "rouge_l", "F1": "f1"}.items() if not brief else [("F1", "f1")]:
            cells[head] = "–" if full else _percent(of[name], brief)
            if referenced:
                cells[f"{head}, reference"] = _percent(of[f"reference_{name}"], brief)
        if not brief:
            cells |= {"tokens": f"{tokens.value:,.0f}" if tokens else "–", "ended": f"{row.ended}"}
        table.append(cells)
    return table


def _percent(mean: Mean | None, brief: bool) -> str:
    if mean is None or brief or mean.error is None:
        return percent(mean and mean.value)
    return f"{mean.value * 100:.1f} ± {mean.error * 100:.1f}\N{NO-BREAK SPACE}%"


def surprise_over_share(rows: Sequence[AnswerSummary], width: float) -> Figure | None:
    """Surprise of answers over what is read.

    How much less probable full attention finds the answers of a method than its own, in nats per token, over the share
    of K and V that their decode steps read; 0, dashed, is full attention’s own answers. Bars are one standard error
    over questions.

    Args:
        width: inches.
    """
    own = [row for row in rows if row.method["budget"] is not None]
    if not own:
        return None
    variants = list(dict.fromkeys(row.label for row in own))
    methods = [next(row.method["method"] for row in own if row.label == label) for label in variants]
    lines = []
    for label, style in zip(variants, line_styles(methods), strict=True):
        places = ((row.means["kv_read_fraction"], row.means["surprise"]) for row in own if row.label == label)
        known = sorted((share, surprise) for share, surprise in places if share and surprise)
        xs, ys, errors = zip(*((100 * share.value, *surprise) for share, surprise in known), strict=True)
        lines.append(Line(label, style, xs, ys, errors))
    labels = "K and V that a step reads, %", "surprise, nats per token"
    figure, (axis,) = line_panels(width, 2.8, [("", lines)], *labels, level=0)
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    return figure


def _side_by_side(cells: Sequence[Fields]) -> list[Texts]:
    """The answers to each question, the question and its references above them."""
    found: dict[str, Texts] = {}
    for cell in sorted(cells, key=lambda cell: cell["method"] != "full"):
        asked = {"reference": "\n".join(cell["references"])} if cell["references"] else {}
        kind = f" ({cell['task']})" if cell["task"] else ""
        texts = found.setdefault(cell["question"], Texts(f"{cell['question']}{kind}: {cell['asked']}", asked))
        label = ", ".join(filter(None, (who_wrote(cell), budget_label(cell["budget"]))))
        notes = [] if cell["method"] == "full" and not cell["draw"] else [signed(cell["nll"] - cell["full_nll"])]
        notes += ["loops"] if cell["loops"] else []
        texts.texts[", ".join([label, *notes])] = cell["text"].strip() or "(nothing)"
    return list(found.values())
