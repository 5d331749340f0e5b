"""Generation with its figures: how much of the KV cache was read, and how long a decode step took."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TextStreamer
from transformers import PreTrainedTokenizerBase as Tokenizer

from tidaldecode.errors import InputError
from tidaldecode.evaluate.generation_settings import GenerationSettings, Passes, Sampling
from tidaldecode.hf import TidalCache, applied_plan
from tidaldecode.hf.second_pass import DraftLength, Pace, Rounds
from tidaldecode.methods.protocol import Attention
from tidaldecode.plans.find import find_plan


@dataclass(frozen=True)
class Generation:
    """What came out of one prompt, and what it took.

    Attributes:
        context_tokens: tokens of the prompt.
        token_ids: the new tokens.
        text: the new tokens as text, special tokens left out.
        tokens_read: for each layer with a role, tokens read per new token and KV head, averaged over the new tokens;
            passes with full attention, of correction or verification, are counted too.
        kv_read_fraction: share of the KV cache of those layers read per new token, averaged likewise; 1.0 where there
            was no decode step, the first new token being prefill's.
        decode_ms_per_token: median milliseconds of a decode step, prefill left out, and on a GPU the first step, which
            is compiled and captured; with corrections or rounds, whose tokens take unlike times, the mean, on a GPU
            without the first correction's tokens, and without each round that is the first to draft so many tokens:
            its pass is compiled and captured. `None` where there is no other.
        accepted_per_round: tokens that came out of a round of lossless decoding, full attention's own included; `None`
            for other decoding, and where no round drafted.
        pace: what `--lossless auto` went by; `None` for other decoding, and where too few tokens came.
    """

    context_tokens: int
    token_ids: list[int]
    text: str
    tokens_read: dict[int, float]
    kv_read_fraction: float
    decode_ms_per_token: float | None
    accepted_per_round: float | None = None
    pace: Pace | None = None

    def mean_reads(self, layers: Sequence[int]) -> float:
        """Tokens that a KV head of these layers reads per new token, the mean over them."""
        return sum(self.tokens_read[layer] for layer in layers) / len(layers)

    def to_json(self) -> dict[str, Any]:
        """The figures as results hold them."""
        ms = self.decode_ms_per_token
        return {
            "context_tokens": self.context_tokens,
            "new_tokens": len(self.token_ids),
            "text": self.text,
            "token_ids": self.token_ids,
            "kv_read_fraction": round(self.kv_read_fraction, 6),
            "decode_ms_per_token": None if ms is None else round(ms, 3),
        }


def generate_measured(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompt: Tensor,
    settings: GenerationSettings,
    on_text: Callable[[str], None] = lambda text: None,
) -> tuple[Generation, TidalCache]:
    """Generates from one prompt by the model's plan.

    Args:
        model: a model with a plan applied.
        prompt: [1, n], token ids.
        settings: how; the model's plan is left as it is.
        on_text: called with each piece of text as it comes, the last one with a line's end behind it, and with nothing
            whenever a token came.

    Returns:
        The generation, and the cache that holds prompt and new tokens.
    """
    plan = applied_plan(model)
    if plan is None:
        raise InputError("the model has no plan: call tidaldecode.apply first")
    passes, new_tokens = settings.passes, settings.max_new_tokens
    # a round may draft more tokens than are still wanted
    spare = 0 if passes.lossless is None else DraftLength(passes.lossless, new_tokens).longest
    cache = TidalCache(model.config, plan, prompt.shape[1] + new_tokens + spare)
    torch.manual_seed(settings.sampling.seed)
    streamer = _TimedStreamer(tokenizer, on_text)
    options = settings.sampling.options() | {
        "lossless": passes.lossless,
        "correction_interval": passes.correction_interval,
    }
    output = _generate(model, prompt, cache, new_tokens, streamer, options)
    return _generation(model, streamer, cache, prompt.shape[1], output, passes), cache


def compare_with_full(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompt: Tensor,
    max_new_tokens: int,
    done: Generation,
    cache: TidalCache,
) -> Generation:
    """Greedy decoding of the same prompt with full attention, through the same kind of cache.

    The first new token is prefill's and the same for both, so the prompt is read again only if the cache can't be
    cropped back to it.

    Args:
        model, tokenizer, prompt, max_new_tokens: as in `generate_measured`.
        done: what `generate_measured` returned, greedy.
        cache: the cache that it returned; used up.
    """
    full = find_plan("full", model.config)
    context, first = prompt.shape[1], done.token_ids[:1]
    streamer = _TimedStreamer(tokenizer, lambda text: None)
    if cache.is_croppable and len(done.token_ids) > 1:
        cache.crop(context - cache.get_seq_length())
        cache.use_plan(full)
    else:
        cache, first = TidalCache(model.config, full, context + max_new_tokens), []
    start = torch.cat([prompt, torch.tensor([first], dtype=prompt.dtype)], dim=1) if first else prompt
    output = _generate(model, start, cache, max_new_tokens - len(first), streamer, Sampling().options())
    return _generation(model, streamer, cache, context, output, Passes())


def first_difference(one: list[int], other: list[int]) -> int | None:
    """Index of the first token in which two generations differ, `None` if they are the same."""
    pairs = itertools.zip_longest(one, other)
    return next((index for index, (here, there) in enumerate(pairs) if here != there), None)


def _generate(
    model: PreTrainedModel,
    start: Tensor,
    cache: TidalCache,
    new_tokens: int,
    streamer: _TimedStreamer,
    options: dict[str, Any],
) -> list[int]:
    output = model.generate(
        start.to(model.device),
        attention_mask=torch.ones_like(start, device=model.device),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        streamer=streamer,
        **options,
    )
    return output[0].tolist()


def _generation(
    model: PreTrainedModel,
    streamer: _TimedStreamer,
    cache: TidalCache,
    context: int,
    output: list[int],
    passes: Passes,
) -> Generation:
    new = output[context:]
    assert cache.get_seq_length() == context + max(0, len(new) - 1), "the figures are of another cache"
    rounds, attention = passes.lossless is not None, _attention(cache, passes)
    tokens = max(1, len(new) - 1)
    read_at = list(_read_at(passes, context, len(new) - 1, cache.rounds)) or [(context, len(new) < 2)]
    reads = [
        dict.fromkeys(attention.tokens_read(length), float(length)) if full else attention.tokens_read(length)
        for length, full in read_at
    ]
    return Generation(
        context_tokens=context,
        token_ids=new,
        text=streamer.tokenizer.decode(new, skip_special_tokens=True),
        tokens_read={layer: sum(read[layer] for read in reads) / tokens for layer in reads[0]},
        kv_read_fraction=_share(attention, read_at) / tokens,
        decode_ms_per_token=streamer.ms(passes, cache.rounds, compiled=int(model.device.type == "cuda")),
        accepted_per_round=cache.rounds.accepted_per_round if rounds and cache.rounds else None,
        pace=cache.rounds.pace if rounds and cache.rounds else None,
    )


def share_read(cache: TidalCache, passes: Passes, context: int, new_tokens: int) -> float:
    """Share of K and V read per new token, passes with full attention included.

    Args:
        context: tokens in the cache before the first new one.
    """
    rounds = cache.rounds if passes.lossless is not None else None
    before_rounds = 0 if rounds is None else new_tokens - sum(rounds.tokens)  # the first token, by full attention
    read_at = _read_at(passes, context + before_rounds, new_tokens, rounds)
    return (before_rounds + _share(_attention(cache, passes), read_at)) / new_tokens


def _attention(cache: TidalCache, passes: Passes) -> Attention:
    """One that rounds went through, if there were any."""
    return (cache if passes.lossless is None else cache.for_drafts(1)).attention


def _share(attention: Attention, read_at: Iterable[tuple[int, bool]]) -> float:
    """Of the passes, added up."""
    return sum(1.0 if full else attention.kv_read_fraction(length) for length, full in read_at)


def _read_at(passes: Passes, context: int, new_tokens: int, rounds: Rounds | None) -> Iterator[tuple[int, bool]]:
    """The passes of `new_tokens` tokens behind prefill's: the context of each, and whether it read all of it."""
    if passes.lossless is not None and rounds is not None:
        for drafted, tokens in zip(rounds.drafted, rounds.tokens, strict=True):
            yield from ((context + step, False) for step in range(1, drafted + 1))
            yield context + drafted + 1, True
            context += tokens
        return
    for step in range(1, new_tokens + 1):
        yield context + step, False
        if passes.correction_interval is not None and step % passes.correction_interval == 0:
            yield context + step, True


class _TimedStreamer(TextStreamer):
    """Passes text on as it comes and remembers when each token came."""

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self._times: list[float] = []

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self._times.append(time.perf_counter())
            self._on_text("")  # something came, if not yet a whole word
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text + "\n" if stream_end else text)

    def ms(self, passes: Passes, rounds: Rounds | None, compiled: int) -> float | None:
        """Milliseconds per token of a generation, as `Generation.decode_ms_per_token` says.

        Args:
            rounds: of lossless decoding.
            compiled: 1 where the first pass of each kind is compiled and captured, else 0.
        """
        if passes.lossless is not None and rounds is not None:
            return self._rounds_ms(rounds, compiled)
        times = self._times[compiled * (passes.correction_interval or 1) :]
        if len(times) < 2:
            return None
        if passes.correction_interval is not None:
            return (times[-1] - times[0]) / (len(times) - 1) * 1000
        return statistics.median(later - earlier for earlier, later in itertools.pairwise(times)) * 1000

    def _rounds_ms(self, rounds: Rounds, compiled: int) -> float | None:
        """Mean milliseconds of a token of rounds, the first `compiled` of each number of drafted tokens left out."""
        seen: Counter[int] = Counter()
        seconds, tokens, last = 0.0, 0, 0
        for drafted, new in zip(rounds.drafted, rounds.tokens, strict=True):
            end = min(last + new, len(self._times) - 1)  # behind an end of sequence nothing comes
            if seen[drafted] >= compiled:
                seconds, tokens = seconds + self._times[end] - self._times[last], tokens + end - last
            seen[drafted] += 1
            last = end
        return seconds / tokens * 1000 if tokens else None
