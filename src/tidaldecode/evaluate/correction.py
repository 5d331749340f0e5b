"""The study of cache correction and lossless decoding: quality and time over the tokens between two full passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tidaldecode.evaluate.generation import first_difference
from tidaldecode.evaluate.scoring import score_tokens
from tidaldecode.hf import TidalCache
from tidaldecode.hf.second_pass import check_second_pass
from tidaldecode.methods.method import METHOD_KEY, Method, check_plan_names
from tidaldecode.models import model_shape
from tidaldecode.plan import TidalPlan
from tidaldecode.plans.find import find_plan
from tidaldecode.results.cells import Cells
from tidaldecode.results.correction import CorrectionRow, rows_of
from tidaldecode.texts.text import Text
from tidaldecode.texts.windows import Windows, read_prompt

CELL_KEY = ("window", "mode", "length", *METHOD_KEY)
"""Fields that tell one cell from another."""

MODES = ("full", "plain", "correction", "lossless")


@dataclass(frozen=True)
class Variant:
    """One way to decode.

    Attributes:
        mode: of `MODES`: full attention; the plan alone; with correction; lossless.
        length: tokens between two passes with full attention; `None` for `full` and `plain`.
        method: what decodes, or drafts.
    """

    mode: str
    length: int | None
    method: Method

    def key(self) -> dict[str, Any]:
        """The fields of a cell that tell the variant."""
        return {"mode": self.mode, "length": self.length, **self.method.key()}


@dataclass(frozen=True)
class CorrectionReport:
    """The rows, and what they were measured on."""

    environment: dict[str, object]
    model: str
    dtype: str
    text: str
    plan: str | None
    settings: Windows
    rows: tuple[CorrectionRow, ...]
    figure: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as one flat object with a list of rows."""
        fields = asdict(self)
        rows = [row.model_dump() for row in fields.pop("rows")]
        return {**fields.pop("environment"), **fields.pop("settings"), **fields, "rows": rows}


def variants(plan: TidalPlan, budgets: Sequence[int | float], lengths: Sequence[int]) -> Iterator[Variant]:
    """Full attention, then for each budget the plan alone, and correction and lossless decoding at each length."""
    yield Variant("full", None, Method("full"))
    for budget in budgets:
        method = Method("tidal", budget, plan)
        yield Variant("plain", None, method)
        for mode in ("correction", "lossless"):
            yield from (Variant(mode, length, method) for length in lengths)


def cell_identity(settings: Windows, model: Mapping[str, Any], text: Text) -> dict[str, Any]:
    """What all cells of a file of results have in common; `model` as `ModelFiles.identity` gives it."""
    parts = {"context": settings.context, "decode": settings.decode}
    return {"kind": "correction", **model, "text": text.digest(), **parts}


def study(
    model: PreTrainedModel,
    text: Text,
    settings: Windows,
    wanted: Sequence[Variant],
    cells: Cells,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[CorrectionRow]:
    """Decodes the ends of windows of a text by every variant: the given tokens for the gap, its own for the time.

    Args:
        model: with a plan applied.
        settings: windows; of each the last `decode` tokens are scored, and as many are generated greedily.
        wanted: of `variants`, full attention first.
        cells: what was measured before, which is not measured again.
        on_progress: told how many cells of how many are done, and in words what comes next.

    Raises:
        InputError: the model's tokens can't run twice, the text is too short, or one plan's name stands for another.
    """
    check_second_pass(model.config, "this model")
    settings.check(model.config)
    settings.check_text(text)
    check_plan_names([*cells.rows, *(variant.method.key() for variant in wanted)])
    longest = max((variant.length or 0 for variant in wanted), default=0)
    cache = TidalCache(model.config, find_plan("full", model.config), settings.context + longest)
    total, done = settings.windows * len(wanted), 0
    for start in settings.starts:
        missing = [variant for variant in wanted if cells.find(window=start, **variant.key()) is None]
        done += len(wanted) - len(missing)
        if missing:
            on_progress(done, total, f"window at token {start}: reading")
            window = text.window(start, settings.context)
            rest = read_prompt(model, cache, window, settings.decode)
        for variant in missing:
            on_progress(done, total, f"window at token {start}: {variant.mode} {variant.length or ''}")
            cells.append(_cell(model, cache, window, rest, start, variant, cells))
            done += 1
    return summary(settings, wanted, cells)


def _cell(
    model: PreTrainedModel, cache: TidalCache, window: Tensor, rest: Tensor, start: int, variant: Variant, cells: Cells
) -> dict[str, Any]:
    """Scores and generates by one variant, and takes the tokens out of the cache again."""
    full = cells.find(window=start, **Variant("full", None, Method("full")).key())
    cell: dict[str, Any] = {"window": start, **variant.key()}
    cache.attention = variant.method.attention(model_shape(model.config), cache.capacity)
    if variant.mode == "lossless":
        assert full is not None
        cell["nll"] = full["nll"]
    else:
        prompt = cache.get_seq_length()
        interval = variant.length if variant.mode == "correction" else None
        with torch.no_grad():  # not inference mode: graphs that are captured here serve `generate` below too
            scores = score_tokens(model, cache, rest, interval, own_steps=model.device.type == "cuda")
        cell["nll"] = -float(scores.log_probs.double().mean())
        cache.crop(prompt - cache.get_seq_length())
    if model.device.type == "cuda":  # what the rounds need is compiled and captured before the clock runs
        _generate(model, cache, window, variant, min(rest.shape[1] - 1, tokens_of_warm_up(variant.length)))
    tokens, cell["ms_per_token"] = _generate(model, cache, window, variant, rest.shape[1] - 1)
    cell["token_ids"] = tokens
    if variant.mode == "lossless":
        assert full is not None and cache.rounds is not None
        cell["accepted_per_round"] = cache.rounds.accepted_per_round
        cell["first_difference"] = first_difference(tokens, full["token_ids"])
    return cell


def tokens_of_warm_up(length: int | None) -> int:
    """New tokens in which a round drafts all `length` tokens that it may, also if a first one drafts none."""
    return (length or 0) + 3


def _generate(
    model: PreTrainedModel, cache: TidalCache, window: Tensor, variant: Variant, tokens: int
) -> tuple[list[int], float]:
    """So many greedy tokens behind the prompt, and their milliseconds per token."""
    held = cache.get_seq_length()
    prompt = window[:, : held + 1].to(model.device)
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    options |= {"eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    if variant.length is not None:
        options["lossless" if variant.mode == "lossless" else "correction_interval"] = variant.length
    began = time.perf_counter()
    output = model.generate(prompt, past_key_values=cache, max_new_tokens=tokens, **options)
    new = output[0, held + 1 :].tolist()  # waits for the device
    ms = (time.perf_counter() - began) * 1000 / tokens
    cache.crop(held - cache.get_seq_length())
    return new, ms


def summary(settings: Windows, wanted: Sequence[Variant], cells: Cells) -> list[CorrectionRow]:
    """A row for each variant over the windows, all of which must have been measured."""
    found = [cells.find(window=start, **variant.key()) for variant in wanted for start in settings.starts]
    return rows_of([cell for cell in found if cell is not None])
