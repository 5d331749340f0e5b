"""`tidaldecode generate`: a document, a question, and an answer that read a small share of the KV cache."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tidaldecode.cli.command import command
from tidaldecode.cli.outline import outline_of
from tidaldecode.cli.output import Json, print_json
from tidaldecode.cli.progress import progress
from tidaldecode.cli.prompt import PromptOptions
from tidaldecode.evaluate.generation_settings import GenerationSettings
from tidaldecode.models import ModelOptions
from tidaldecode.report.labels import budget_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from tidaldecode.evaluate.answer import Answer
    from tidaldecode.evaluate.generation import Generation

_NO_CHAT = (
    "the model has no chat template, so it goes on with 'Question: ... Answer:', and behind the answer with the text"
)


@command
def generate(
    prompt: PromptOptions, settings: GenerationSettings, model: ModelOptions, json_output: Json = False
) -> None:
    """Answers a prompt, or a question about a document, with TidalDecode."""
    asked = prompt.read()
    outline = outline_of(model.model)
    if settings.method != "full":
        outline.check_plan(settings.plan, settings.budget)
    outline.check_prompt(asked, settings.max_new_tokens)
    console = Console(stderr=True)
    with progress(console) as on_progress:  # PyTorch and Transformers take seconds to import
        from transformers.utils import logging as transformers_logging

        from tidaldecode.evaluate.answer import CheckedPrompt

        if not console.is_terminal:
            transformers_logging.disable_progress_bar()
        checked = CheckedPrompt.check(model, asked, settings)
        if asked.question and checked.tokenizer.chat_template is None:
            console.print(_NO_CHAT, soft_wrap=True)
        out = sys.stderr if json_output else sys.stdout

        def on_text(text: str) -> None:
            on_progress(0, 0, "")  # the first word is there
            print(text, end="", file=out, flush=True)

        answer = checked.answer(on_progress, on_text)
    console.print(_table(answer))
    if (pace := answer.done.pace) is not None and pace.length:  # that it switched itself off is logged
        console.print(str(pace), highlight=False, soft_wrap=True, markup=False)
    if answer.full is not None:
        console.print(
            _difference(answer.prompt.tokenizer, answer.done, answer.full),
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    print_json(json_output, answer.to_json())


def _table(answer: Answer) -> Table:
    """The figures, side by side."""
    plan, sets, done, full = answer.prompt.plan, answer.sets_per_kv_head, answer.done, answer.full
    columns = [done] if full is None else [done, full]
    table = Table(show_header=full is not None)
    table.add_column("")
    for name in (answer.prompt.settings.method, "full")[: len(columns)]:
        table.add_column(name, justify="right")
    table.add_row("context, tokens", *(f"{column.context_tokens:,}" for column in columns))
    table.add_row("new tokens", *(f"{len(column.token_ids):,}" for column in columns))
    for role in ("full", "select", "quantized_select", "sparse"):
        if layers := [layer for layer, its_role in enumerate(plan.roles) if its_role == role]:
            label = f"tokens read per new token in each of {len(layers)} {role.replace('_', ' ')} layers"
            if layers[0] in plan.reading and sets > 1:
                label += f",\nper KV head: {sets:g} sets of {budget_words(plan.token_budget)}"
            table.add_row(label, *(f"{column.mean_reads(layers):,.0f}" for column in columns))
    table.add_row("share of the KV cache read", *(f"{column.kv_read_fraction:.1%}" for column in columns))
    if done.accepted_per_round is not None:
        table.add_row("tokens out per round", f"{done.accepted_per_round:.2f}")
    times = (column.decode_ms_per_token for column in columns)
    table.add_row("ms per token", *("-" if ms is None else f"{ms:.1f}" for ms in times))
    if answer.step_over_full is not None:
        table.add_row("step time over full attention's", f"{answer.step_over_full:.2f}", "1.00")
    return table


def _difference(tokenizer: Tokenizer, done: Generation, full: Generation) -> str:
    from tidaldecode.evaluate.generation import first_difference

    index = first_difference(done.token_ids, full.token_ids)
    if index is None:
        return "both texts are the same"
    here, there = (repr(tokenizer.decode(generation.token_ids[index : index + 12])) for generation in (done, full))
    return f"the texts first differ at new token {index + 1}: {here}, with full attention {there}"
