"""Perplexity of a text by each method: the first tokens of a window are read, the last ones decoded, teacher-forced."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tidaldecode.errors import InputError
from tidaldecode.evaluate.scoring import score_tokens
from tidaldecode.hf import TidalCache
from tidaldecode.methods.method import METHOD_KEY, Method, check_plan_names, with_full
from tidaldecode.models import model_shape
from tidaldecode.plans.find import find_plan
from tidaldecode.results.cells import Cells
from tidaldecode.results.perplexity import PplSummary, ppl_summary
from tidaldecode.texts.text import Text
from tidaldecode.texts.windows import Windows, read_prompt

CELL_KEY = ("window", *METHOD_KEY)
"""Fields that tell one cell from another; a window goes by its first token's place in the text."""

BIN_TOKENS = 32
"""Positions that a cell's `nll_by_position` averages over."""


@dataclass(frozen=True)
class PerplexityReport:
    """Perplexity by each method, and what it was measured on.

    Attributes:
        environment: command, versions, device.
        text: name of the text.
        seconds: of this run, without loading; of a run that was taken up again only the rest.
        rows: full attention, then each method at each budget.
        figures: the gap over the budget and the perplexity over the position, PNG files, if they were written.
    """

    environment: dict[str, object]
    model: str
    dtype: str
    text: str
    settings: Windows
    seconds: float
    rows: tuple[PplSummary, ...]
    figures: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as one flat object with a list of rows; `nll`, `full_nll` and `gap` of a single method on top."""
        fields = asdict(self)
        rows = [row.model_dump() for row in fields.pop("rows")]
        others = [row for row in rows if row["method"] != "full"] or rows
        single = {name: others[0][name] for name in ("nll", "full_nll", "gap")} if len(others) == 1 else {}
        return {**fields.pop("environment"), **fields.pop("settings"), **fields, **single, "rows": rows}


def cell_identity(settings: Windows, model: Mapping[str, Any], text: Text) -> dict[str, Any]:
    """What all cells of a file of results have in common.

    Args:
        model: see `tidaldecode.models.ModelFiles.identity`.
    """
    return {
        "kind": "ppl",
        **model,
        "text": text.digest(),
        "context": settings.context,
        "decode": settings.decode,
    }


def finished(settings: Windows, methods: Sequence[Method], cells: Cells) -> list[PplSummary] | None:
    """What `perplexity` returns, if nothing is left to be measured: then no model is needed.

    Raises:
        InputError: one plan's name stands for another in `cells`.
    """
    methods = with_full(methods)
    check_plan_names([*cells.rows, *(method.key() for method in methods)])
    # the cells of these methods and windows alone: the file may hold others
    rows = [cells.find(window=start, **method.key()) for method in methods for start in settings.starts]
    found = [row for row in rows if row is not None]
    return ppl_summary(found) if len(found) == len(rows) else None


def perplexity(
    model: PreTrainedModel,
    text: Text,
    settings: Windows,
    methods: Sequence[Method],
    cells: Cells,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[PplSummary]:
    """Negative log-likelihood of the last tokens of windows of a text, by full attention and by each method.

    Of a window `w[0 .. context)`, the tokens `w[0 .. context - decode - 1)` are read with full attention, once for all
    methods. Then `w[context - decode - 1 .. context - 1)` are decoded, each under the method, with the given tokens as
    input (teacher-forced): their logits predict `w[context - decode .. context)`, and these `decode` tokens are scored.
    So the last token of the prompt is decoded under the method too, and every scored token's logits are the method's.
    `nll` is the mean of `-ln p(token)` over them, in nats. All decode steps of a window go in one pass or a few
    (`tidaldecode.evaluate.scoring`).

    Args:
        model: with a plan applied.
        text: long enough, see `Windows.check_text`.
        methods: checked, see `check_methods`; `full` is added where it is missing.
        cells: what was measured before, which is not measured again; each new cell is appended when it is done.
        on_progress: told how many prefills and cells of how many are done, and in words what comes next.

    Returns:
        A summary of full attention, then of each method in the order given; each window counts the same.

    Raises:
        InputError: the text is too short, one plan's name stands for another in `cells`, or a likelihood is not
            finite.
    """
    settings.check(model.config)
    settings.check_text(text)
    methods = with_full(methods)
    check_plan_names([*cells.rows, *(method.key() for method in methods)])
    total, done = settings.windows * (1 + len(methods)), 0
    cache = TidalCache(model.config, find_plan("full", model.config), settings.context)
    for number, start in enumerate(settings.starts, start=1):
        missing = [method for method in methods if cells.find(window=start, **method.key()) is None]
        where = f"window {number} of {settings.windows}"
        if missing:
            on_progress(done, total, f"{where}: reading")
            window = read_prompt(model, cache, text.window(start, settings.context), settings.decode)
        done += 1 + len(methods) - len(missing)
        for method in missing:
            on_progress(done, total, f"{where}: {method.label}")
            cells.append(_cell(model, cache, window, start, method, cells))
            done += 1
    on_progress(done, total, "done")
    summary = finished(settings, methods, cells)
    assert summary is not None
    return summary


def _cell(
    model: PreTrainedModel, cache: TidalCache, rest: Tensor, start: int, method: Method, cells: Cells
) -> dict[str, Any]:
    """Scores the rest of a window under a method, and takes it out of the cache again."""
    began, prompt = time.perf_counter(), cache.get_seq_length()
    mark = cache.mark()
    cache.attention = method.attention(model_shape(model.config), cache.capacity)
    try:
        with torch.inference_mode():
            nll = -score_tokens(model, cache, rest).log_probs.double().cpu()
    except InputError as error:
        raise InputError(f"{method.label} at token {start}: {error}") from None
    cache.go_back(mark)
    mean = float(nll.mean())
    full = cells.find(window=start, **Method("full").key())
    return {
        "window": start,
        **method.key(),
        "nll": mean,
        "full_nll": mean if full is None else full["nll"],  # full attention goes first
        "tokens": len(nll),
        "first_position": prompt + 1,
        "bin_tokens": BIN_TOKENS,
        "nll_by_position": [float(part.mean()) for part in torch.split(nll, BIN_TOKENS)],
        "seconds": round(time.perf_counter() - began, 3),
    }
