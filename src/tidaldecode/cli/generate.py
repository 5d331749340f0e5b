"""`tidaldecode generate`: a document, a question, and an answer that read a small share of the KV cache."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import typer
from rich.console import Console
from rich.table import Table

from tidaldecode.cli import options
from tidaldecode.cli.outline import Outline, outline_of
from tidaldecode.cli.prompt import Prompt, check_length, read_prompt
from tidaldecode.errors import InputError
from tidaldecode.models.find import find_model
from tidaldecode.plans import read_plan
from tidaldecode.report.labels import budget_words

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from tidaldecode.evaluate.generation import Generation
    from tidaldecode.hf.second_pass.drafting import Lossless
    from tidaldecode.plan import TidalPlan

_NO_CHAT = (
    "the model has no chat template, so it goes on with 'Question: ... Answer:', and behind the answer with the text"
)
_MARGIN = 1.01  # the class of tokenizer that Transformers chooses for a model may count a little otherwise


def generate(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to answer.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option("--prompt-file", metavar="F", help="A document; - or nothing: standard input.")
    ] = None,
    question: Annotated[str | None, typer.Option("--question", metavar="Q", help="Asked after the document.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 decodes greedily.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0, max=1, help="Nucleus to sample from.")] = 1.0,
    method: Annotated[
        Literal["tidal", "full"], typer.Option("--method", help="By the plan, or full attention in every layer.")
    ] = "tidal",
    compare: Annotated[
        bool, typer.Option("--compare", help="Decode with full attention too, and show both times.")
    ] = False,
    lossless: Annotated[
        str | None,
        typer.Option(
            "--lossless", metavar="T|auto", help="Draft T tokens by the plan, verify: the text is full attention's."
        ),
    ] = None,
    correction_interval: Annotated[
        int | None,
        typer.Option("--correction-interval", metavar="T", help="Run every T new tokens again with full attention."),
    ] = None,
    model: options.Model = "smollm2-135m",
    plan: options.Plan = "auto",
    budget: options.Budget = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    json_output: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Answers a prompt, or a question about a document, with TidalDecode."""
    token_budget = options.parse_budget(budget)
    _check_combination(method, compare, temperature, top_p)
    if method == "full" and (plan != "auto" or token_budget is not None):
        raise InputError("--method full reads everything: leave out --plan and --budget")
    rounds = _parse_lossless(lossless)
    _check_passes(method, rounds, correction_interval)
    asked = read_prompt(prompt, prompt_file, question)
    _check_plan_file(plan, token_budget, model)
    _check_early(outline_of(model), None if method == "full" else plan, asked, max_new_tokens)

    console = Console(stderr=True)
    with console.status("starting"):  # PyTorch takes seconds to import
        import torch
        from transformers.utils import logging as transformers_logging

        from tidaldecode.models.architecture import check_architecture, check_plan, model_shape

    if not console.is_terminal:
        transformers_logging.disable_progress_bar()
    target = options.parse_device(device)
    files = find_model(model, trust_remote_code=trust_remote_code)
    config = files.config()
    check_architecture(config)
    chosen = _plan(plan, method, token_budget, config)
    check_plan(chosen, config)
    tokenizer = files.tokenizer()
    tokens = torch.tensor([asked.token_ids(tokenizer)])
    check_length(tokens.shape[1], max_new_tokens, config.max_position_embeddings)
    with console.status("starting"):  # and so do Transformers' models, which the checks above do without
        from tidaldecode.evaluate.generation import (
            Passes,
            Sampling,
            compare_with_full,
            first_difference,
            generate_measured,
        )
        from tidaldecode.hf import apply
        from tidaldecode.hf.second_pass.correction import check_second_pass
        from tidaldecode.results.environment import environment

    for option, given in (("--lossless", rounds), ("--correction-interval", correction_interval)):
        if given is not None:
            check_second_pass(config, option)
    if asked.question and tokenizer.chat_template is None:
        console.print(_NO_CHAT, soft_wrap=True)
    loaded = apply(files.model(target, options.parse_dtype(dtype, target)), chosen)

    sampling = Sampling(temperature, top_p, seed)
    with _Stream(console, tokens.shape[1], sys.stderr if json_output else sys.stdout) as stream:
        passes = Passes(rounds, correction_interval)
        done, cache = generate_measured(loaded, tokenizer, tokens, max_new_tokens, sampling, stream.write, passes)
    full = None
    if compare:
        with console.status("decoding with full attention"):
            full = compare_with_full(loaded, tokenizer, tokens, max_new_tokens, done, cache)
    sets = chosen.sets_per_kv_head(model_shape(config))
    console.print(_table(chosen, method, done, full, sets))
    if full is not None:
        console.print(_difference(tokenizer, done, full), highlight=False, soft_wrap=True, markup=False)
    if json_output:
        answer: dict[str, Any] = {
            "model": model,
            "method": method,
            "plan": chosen.name,
            "token_budget": chosen.token_budget,
        }
        answer |= _figures(done)
        if sets:
            answer |= {"sets_per_kv_head": _rounded(sets, 4), "tokens_read_per_kv_head": _sparse_reads(chosen, done)}
        if rounds is not None:
            answer |= {"lossless": rounds, "accepted_per_round": _rounded(done.accepted_per_round, 4)}
        if correction_interval is not None:
            answer["correction_interval"] = correction_interval
        if full is not None:
            answer["full"] = _figures(full)
            answer["first_difference"] = first_difference(done.token_ids, full.token_ids)
            answer["step_over_full"] = _ratio(done, full)
        print(json.dumps(answer | {"dtype": str(loaded.dtype).removeprefix("torch."), **environment(target)}))


def _check_combination(method: str, compare: bool, temperature: float, top_p: float) -> None:
    if compare and method == "full":
        raise InputError("--compare compares a plan with full attention: leave out --method full")
    if compare and temperature > 0:
        raise InputError("--compare compares greedy decoding: leave out --temperature")
    if 0 < temperature < 0.01:
        raise InputError(f"--temperature {temperature} is too small to sample with: give 0 for greedy decoding")
    if top_p == 0:
        raise InputError("--top-p must be above 0")
    if top_p < 1 and temperature == 0:
        raise InputError("--top-p samples, and greedy decoding does not: give a --temperature above 0")


def _parse_lossless(text: str | None) -> Lossless | None:
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--lossless {text!r}: give the tokens to draft in a round, at least 1, or auto")
    return int(text)


def _check_passes(method: str, lossless: Lossless | None, correction_interval: int | None) -> None:
    if correction_interval is not None and correction_interval < 1:
        raise InputError(f"--correction-interval {correction_interval} must be at least 1 token")
    if lossless is not None and correction_interval is not None:
        raise InputError("--lossless corrects the cache in each round: leave out --correction-interval")
    if method == "full" and (lossless is not None or correction_interval is not None):
        raise InputError("--method full reads everything: leave out --lossless and --correction-interval")


def _check_plan_file(name: str, budget: int | float | None, model: str) -> None:
    """Finds a wrong plan or budget before anything is loaded, where the plan needs no model to be known."""
    plan = read_plan(model if (name, model) == ("auto", "smollm2-135m") else name)
    if plan is not None and budget is not None:
        plan.with_budget(budget)


def _plan(name: str, method: str, budget: int | float | None, config: PreTrainedConfig) -> TidalPlan:
    from tidaldecode.plans.find import find_plan

    if method == "full":
        return find_plan("full", config)
    plan = find_plan(name, config)
    return plan if budget is None else plan.with_budget(budget)


def _check_early(outline: Outline, plan: str | None, asked: Prompt, new_tokens: int) -> None:
    """Finds, without PyTorch, a plan for another model, and a prompt that is much too long."""
    if plan is not None:
        outline.check_plan(plan)
    positions = outline.positions
    if positions is None or asked.most_tokens() + new_tokens <= positions:
        return
    tokenizer = outline.tokenizer()
    if tokenizer is not None and (tokens := len(asked.token_ids(tokenizer))) + new_tokens > _MARGIN * positions:
        check_length(tokens, new_tokens, positions)


class _Stream:
    """The answer as it comes; until its first word, what is being waited for."""

    def __init__(self, console: Console, context: int, out: Any) -> None:
        self._out = out
        self._status = console.status(f"reading {context:,} tokens")

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def write(self, text: str) -> None:
        self._status.stop()  # compilation, if it comes to that, shows its own
        if text:
            print(text, end="", file=self._out, flush=True)

    def __exit__(self, *error: object) -> None:
        self._status.stop()  # or the terminal stays without its cursor
        print(file=self._out, flush=True)


def _figures(generation: Generation) -> dict[str, Any]:
    ms = generation.decode_ms_per_token
    return {
        "context_tokens": generation.context_tokens,
        "new_tokens": len(generation.token_ids),
        "text": generation.text,
        "token_ids": generation.token_ids,
        "kv_read_fraction": round(generation.kv_read_fraction, 6),
        "decode_ms_per_token": _rounded(ms, 3),
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _ratio(one: Generation, other: Generation) -> float | None:
    if one.decode_ms_per_token is None or other.decode_ms_per_token is None:
        return None
    return round(one.decode_ms_per_token / other.decode_ms_per_token, 4)


def _table(plan: TidalPlan, method: str, done: Generation, full: Generation | None, sets: float) -> Table:
    """The figures, side by side.

    Args:
        sets: index sets that the query heads of a KV head read in a sparse layer.
    """
    columns = [done] if full is None else [done, full]
    table = Table(show_header=full is not None)
    table.add_column("")
    for name in [method] if full is None else [method, "full"]:
        table.add_column(name, justify="right")
    table.add_row("context, tokens", *(f"{column.context_tokens:,}" for column in columns))
    table.add_row("new tokens", *(f"{len(column.token_ids):,}" for column in columns))
    for role in ("full", "select", "sparse"):
        layers = _layers(plan, role)
        if layers:
            label = f"tokens read per new token in each of {len(layers)} {role} layers"
            if role == "sparse" and sets > 1:
                label += f",\nper KV head: {sets:g} sets of {budget_words(plan.token_budget)}"
            table.add_row(label, *(f"{_mean_reads(column, layers):,.0f}" for column in columns))
    table.add_row("share of the KV cache read", *(f"{column.kv_read_fraction:.1%}" for column in columns))
    if done.accepted_per_round is not None:
        table.add_row("tokens out per round", f"{done.accepted_per_round:.2f}", *[""] * (len(columns) - 1))
    table.add_row("ms per token", *(_ms(column) for column in columns))
    if full is not None and (ratio := _ratio(done, full)) is not None:
        table.add_row("step time over full attention's", f"{ratio:.2f}", "1.00")
    return table


def _layers(plan: TidalPlan, role: str) -> list[int]:
    return [layer for layer, its_role in enumerate(plan.roles) if its_role == role]


def _sparse_reads(plan: TidalPlan, done: Generation) -> float:
    """Tokens that a KV head of a sparse layer read per new token."""
    return round(_mean_reads(done, _layers(plan, "sparse")), 2)


def _mean_reads(generation: Generation, layers: list[int]) -> float:
    return sum(generation.tokens_read[layer] for layer in layers) / len(layers)


def _ms(generation: Generation) -> str:
    return "-" if generation.decode_ms_per_token is None else f"{generation.decode_ms_per_token:.1f}"


def _difference(tokenizer: Tokenizer, done: Generation, full: Generation) -> str:
    from tidaldecode.evaluate.generation import first_difference

    index = first_difference(done.token_ids, full.token_ids)
    if index is None:
        return "both texts are the same"
    here, there = (repr(tokenizer.decode(generation.token_ids[index : index + 12])) for generation in (done, full))
    return f"the texts first differ at new token {index + 1}: {here}, with full attention {there}"
