"""Lossless decoding: the plan drafts, full attention verifies, and what comes out is full attention's.

The verification pass is that of cache correction, whose logits are full attention's at each drafted position. Reading
them makes TidalDecode its own draft model in speculative decoding (Leviathan et al., ICML 2023). A plan may say that
drafts read what the pass chose (`drafting`); then a first round verifies alone, and drafts nothing. A round that is to
draft nothing (`auto`) is a decode step with full attention.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from tidaldecode.errors import InputError
from tidaldecode.hf.cache import TidalCache
from tidaldecode.hf.cache_name import CACHE
from tidaldecode.hf.rounds import Rounds
from tidaldecode.hf.second_pass.correction import full_pass
from tidaldecode.hf.second_pass.draft_length import DraftLength
from tidaldecode.hf.second_pass.processors import check_processors, may_mind
from tidaldecode.hf.second_pass.speculation import accept_greedy, accept_sampled
from tidaldecode.hf.second_pass.tokens import Output, TokenBuffer
from tidaldecode.hf.sequences import PREFILL_CHUNK

_logger = logging.getLogger("tidaldecode.lossless")


def lossless_loop(length: DraftLength, streamer: BaseStreamer | None, cache_is_kept: bool) -> Callable[..., Any]:
    """The loop that `generate` of Transformers calls instead of its own (`custom_generate`).

    Args:
        length: tokens to draft in a round.
        streamer: gets the new tokens, or `None`.
        cache_is_kept: the cache outlives the call, and must hold what it would hold after Transformers' own loop.
    """

    def loop(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        mode = generation_config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise InputError(f"lossless decoding is greedy or samples: it can't do {mode.value.replace('_', ' ')}")
        check_processors(logits_processor, input_ids, model.config.vocab_size)
        with model._optimize_model_for_decode():
            ends = next((rule.eos_token_id for rule in stopping_criteria if hasattr(rule, "eos_token_id")), None)
            speculation = _Speculation(
                model, input_ids, logits_processor, generation_config, length, ends, model_kwargs
            )
            output = Output(
                speculation.tokens, stopping_criteria, streamer, padding=generation_config._pad_token_tensor
            )
            sequences = speculation.run(output, cache_is_kept)
        if streamer is not None:
            streamer.end()
        if (pace := length.pace) is not None:  # behind the text, which may go to the same terminal
            _logger.log(logging.INFO if pace.length else logging.WARNING, "%s", pace)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE: speculation.cache})
        return sequences

    return loop


class _Speculation:
    """One generation at work: draft, verify, accept, round by round.

    Each sequence accepts its own number of tokens, so that their lengths in the cache drift apart; they draft and are
    verified side by side all the same, each behind its own end. On the host the cache counts the longest.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        config: GenerationConfig,
        length: DraftLength,
        ends: Tensor | None,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.model, self.processors, self.samples, self.length = model, processors, config.do_sample, length
        self.cache: TidalCache = model_kwargs[CACHE]
        self.cache.rounds = self._rounds = Rounds()
        self._most = config.max_length
        padding, room = config._pad_token_tensor, self._most - input_ids.shape[1] + length.longest + 1
        self.tokens = TokenBuffer(input_ids, room, padding, ends if processors else None)
        # where all sequences end Transformers would ask no more: a rule of allowed tokens may know none behind an end
        self._may_mind, self._all_ended = may_mind(processors), False
        self._first_logits = _read_prompt(model, self.cache, input_ids, config, model_kwargs)
        lengths, width = self.cache.sequences.lengths, input_ids.shape[1]
        # a token in column c of `tokens` lies in row c + origin of the cache, at position c + origin + offset
        self._origin, self._padded_origin = lengths.long() - width, self.cache.get_seq_length() - width
        positions = model_kwargs.get("position_ids")
        self._offset = 0 if positions is None else positions[:, -1].to(lengths.device) + 1 - lengths
        self._drafts = self.cache.for_drafts(length.longest)
        self._may_draft = self._drafts is self.cache  # else only behind a pass that chose

    def run(self, output: Output, cache_is_kept: bool) -> Tensor:
        """Generates until `output` is done; [B, W], prompt and new tokens."""
        try:
            first = self._choose(self.tokens.scores(self.processors, 0, self._first_logits))[0]
            del self._first_logits
            self.tokens.write(0, first)
            self.tokens.extend([1] * len(first))
            output.hand_out()
            while not output.done:
                self._align()
                self._round()
                output.hand_out()
            self._rounds.pace = self.length.pace
            if cache_is_kept:
                self._level(output.sequences)
        except BaseException:  # the user's too: the sequences end together, where the shortest does
            self.tokens.cut([min(self.tokens.counts)] * len(self.tokens.counts))
            self._align()
            raise
        return output.sequences.clone()

    def _round(self) -> None:
        tokens = self.tokens
        left = [0 if end else self._most - count for count, end in zip(tokens.counts, tokens.closed, strict=True)]
        began, steps = self._now(), int(self.length) == 0
        drafted, draft = self._draft(min(int(self.length), max(left) - 1) if self._may_draft else 0)
        between = self._now()
        accepted, behind = self._full_step() if steps else self._verify(drafted, draft)
        self._may_draft = self._drafts is self.cache or not steps
        tokens.write(accepted, behind)
        numbers, ended = accepted.tolist(), self._now()
        new = [min(number + 1, room) for number, room in zip(numbers, left, strict=True)]
        tokens.extend(new)
        drafts = drafted.shape[1]
        self._rounds.add(drafts, [count for count, room in zip(new, left, strict=True) if room])
        open_ones = [number for number, room in zip(numbers, left, strict=True) if room]
        self.length.saw(drafts, open_ones, between - began, ended - between)

    def _now(self) -> float:
        """Seconds, where they are wanted: then the device is waited for."""
        return now(self.model.device) if self.length.timed else 0.0

    def _draft(self, drafts: int) -> tuple[Tensor, Tensor | None]:
        """Decodes `drafts` tokens by the plan: the tokens [B, N], and when sampling their distributions [B, N, V].

        Fewer where every sequence ends before, if somebody might mind being asked what follows an end.
        """
        drafted, draft, self._all_ended = 0, None, False
        while drafted < drafts and not self._all_ended:
            token, distribution = self._decode(self._drafts, drafted)
            self.tokens.write(drafted, token)
            if self.samples:
                draft = _placed(distribution, draft, drafted, drafts)
            drafted += 1
            self._all_ended = self._may_mind and self.tokens.all_ended(drafted)
        return self.tokens.window(0, drafted), None if draft is None else draft[:, :drafted]

    def _decode(self, cache: TidalCache, drafted: int) -> tuple[Tensor, Tensor]:
        """Decodes a token behind `drafted` drafted ones; see `_choose`."""
        logits = self.model(
            input_ids=self._device(self.tokens.window(drafted - 1, 1)),
            position_ids=self._positions(1),
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: cache},
        ).logits[:, -1]
        return self._choose(self.tokens.scores(self.processors, drafted, logits))

    def _full_step(self) -> tuple[Tensor, Tensor]:
        """A decode step with full attention; as `_verify`."""
        token = self._decode(self.cache.for_full_steps(), 0)[0]
        return torch.zeros_like(token), token

    def _verify(self, drafted: Tensor, draft: Tensor | None) -> tuple[Tensor, Tensor]:
        """Runs each sequence's last token and the drafted ones with full attention.

        Returns:
            How many drafted tokens are accepted, and the token behind them; [B] each.
        """
        drafts, cache = drafted.shape[1], self._drafts
        cache.rewind(cache.get_seq_length() - drafts, cache.sequences.lengths - drafts)
        tokens = self._pass_length(drafts + 1)
        ids = self._device(self.tokens.window(-1, tokens))
        comes_again = drafts == int(self.length) or tokens in cache.session.graphs
        logits = full_pass(self.model, cache, ids, self._positions(tokens), capture=comes_again)
        last = LogitsProcessorList() if self._all_ended else self.processors
        rows = (
            self.tokens.scores(self.processors if step < drafts else last, step, logits[:, step])
            for step in range(drafts + 1)
        )
        if not self.samples:
            return accept_greedy(drafted, torch.stack([row.argmax(-1) for row in rows], 1))
        target = None
        for step, row in enumerate(rows):
            target = _placed(row.softmax(-1), target, step, drafts + 1)
        assert target is not None
        return accept_sampled(drafted, target[:, :0] if draft is None else draft, target)

    def _pass_length(self, tokens: int) -> int:
        """Tokens of a pass over `tokens`: more in a last, shorter round, where a captured pass and room are there."""
        if tokens > int(self.length):
            return tokens
        cache = self._drafts
        room = min(cache.capacity - cache.get_seq_length(), self.length.longest + 1)  # in `tokens` too
        return min((captured for captured in cache.session.graphs if tokens <= captured <= room), default=tokens)

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of each sequence, [B], and the distribution that it is drawn from, [B, V]."""
        if not self.samples:
            return scores.argmax(-1), scores
        distribution = scores.softmax(-1)
        return torch.multinomial(distribution, 1)[:, 0], distribution

    def _positions(self, tokens: int) -> Tensor:
        """Positions of the next `tokens` tokens behind those in the cache, [B, tokens]."""
        lengths = self.cache.sequences.lengths
        return (lengths + self._offset)[:, None].long() + torch.arange(tokens, device=lengths.device)

    def _device(self, ids: Tensor) -> Tensor:
        return ids.to(self.cache.sequences.lengths.device)

    def _align(self) -> None:
        """Lets the cache hold all tokens of each sequence but the last, and nothing else."""
        self.cache.rewind(
            self._padded_origin + max(self.tokens.counts) - 1, self._device(self.tokens.ends) + self._origin - 1
        )

    def _level(self, sequences: Tensor) -> None:
        """Lets the cache hold all tokens of [B, W] but the last column: the padding behind closed ones too."""
        tokens, width = self.tokens, sequences.shape[1]
        start = min(*tokens.counts, width) - 1
        tokens.cut([min(count, width) for count in tokens.counts])
        self._align()
        ends = self._device(tokens.ends) - 1
        for first in range(start, width - 1, PREFILL_CHUNK):
            stop = min(first + PREFILL_CHUNK, width - 1)
            new_lengths = (stop - ends).clamp(min=0, max=stop - first)
            self.cache.rewind(self._padded_origin + first, self.cache.sequences.lengths)
            positions = torch.arange(first, stop, device=ends.device) + (self._origin + self._offset)[:, None]
            ids = self._device(sequences[:, first:stop])
            full_pass(self.model, self.cache, ids, positions, new_lengths=new_lengths, last_logits=True, capture=False)
            ends = ends + new_lengths


def now(device: torch.device) -> float:
    """Seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _placed(row: Tensor, room: Tensor | None, step: int, steps: int) -> Tensor:
    """Puts a distribution [B, V] in its place among [B, steps, V] at once, for those of all steps are large."""
    room = row.new_empty(len(row), steps, row.shape[1]) if room is None else room
    room[:, step] = row
    return room


def _read_prompt(
    model: PreTrainedModel,
    cache: TidalCache,
    input_ids: Tensor,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> Tensor:
    """Reads what the cache does not hold yet with full attention; logits of the last token, [B, V]."""
    mask = model_kwargs.get("attention_mask")
    # where the mask is all ones, later versions of Transformers keep its length alone
    tokens = mask.shape[1] if mask is not None else getattr(config, "_mask_length", input_ids.shape[1])
    if cache.get_seq_length() > 0 and tokens - cache.get_seq_length() == 1:  # else taken for a decode step
        if model_kwargs.get("inputs_embeds") is not None:
            raise InputError("lossless decoding goes on from a cache with input_ids: embeddings alone won't do")
        cache.ready(len(input_ids), 1, mask)
        ids = input_ids[:, -1:].to(model.device)
        positions = model_kwargs["position_ids"][:, -1:].to(model.device).expand_as(ids)
        return full_pass(model, cache, ids, positions, capture=False)[:, -1]
    return model._prefill(input_ids, config, model_kwargs).logits[:, -1]
