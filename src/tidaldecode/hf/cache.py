"""The KV cache of a model with a plan: written in place, read by token, and it grows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from tidaldecode.errors import InputError
from tidaldecode.hf.layers import LEFT_IN_THE_MIDDLE, TidalLayer, WindowLayer, check_codes
from tidaldecode.hf.rounds import Rounds
from tidaldecode.hf.sequences import Sequences
from tidaldecode.hf.session import Correction, Kind, Session
from tidaldecode.methods.protocol import Attention
from tidaldecode.methods.tidal import DecodeAttention
from tidaldecode.methods.verified import VerifiedDrafts
from tidaldecode.models import check_plan, model_shape, sliding_windows, steady_channels
from tidaldecode.plans.find import PlanLike, find_plan


@dataclass(frozen=True)
class Mark:
    """Where a cache stood: its tokens, left padding counted, and copies of the layers that keep a window alone."""

    padded_length: int
    lengths: Tensor
    windows: dict[int, WindowLayer]


class TidalCache(Cache):
    """The cache that a model with a plan decodes with; `generate` makes one, a loop of your own passes it.

    Args:
        config: the model's configuration.
        plan: the plan that was applied to the model, in any form that `tidaldecode.apply` takes.
        capacity: tokens to allocate for each sequence, prompt and new tokens together. The cache grows where more come,
            which moves it and has the decode step captured anew.

    Raises:
        InputError: there is no such plan, it does not fit the model, or the capacity is no positive whole number.

    Attributes:
        sequences: lengths of the sequences.
        session: the attention at work on it, and its captured passes.
        correction: when decoded tokens run again with full attention; `None` for never.
        rounds: what the rounds of the latest lossless generation drafted and accepted; `None` before the first.
    """

    def __init__(self, config: PreTrainedConfig, plan: PlanLike, capacity: int) -> None:
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
            raise InputError(f"capacity {capacity!r} must be a positive whole number of tokens")
        self.config = config
        self.sequences = Sequences(capacity)
        self.correction: Correction | None = None
        self.rounds: Rounds | None = None
        self._views: dict[str, TidalCache] = {}  # of the same sequences and rows, with sessions of their own
        self._one_mask = self._mask_seen = False
        attention = self._attention_of(plan)
        windows = sliding_windows(config)
        super().__init__(
            layers=[
                TidalLayer(self.sequences, windows.count(None), first=layer == windows.index(None))
                if window is None
                else WindowLayer(window)
                for layer, window in enumerate(windows)
            ]
        )
        self._keep_codes(attention)
        self.session = Session(self.sequences, self.layers, attention)

    def _keep_codes(self, attention: Attention) -> None:
        """Lets the layers keep what an attention chooses by: all of them, or as they were where memory is short."""
        bits = [attention.code_bits(index) for index in range(len(self.layers))]
        steady = torch.tensor(steady_channels(self.config), dtype=torch.float32)
        kept = [(layer, its) for layer, its in zip(self.layers, bits, strict=True) if isinstance(layer, TidalLayer)]
        check_codes(kept)
        for layer, _ in kept:
            layer.steady = steady
        codes = [layer.codes_of(its) for layer, its in kept]
        for (layer, its), of_layer in zip(kept, codes, strict=True):
            layer.bits_of_all = bits
            layer.use_codes(its, of_layer)

    def _attention_of(self, plan: PlanLike) -> DecodeAttention:
        plan = find_plan(plan, self.config)
        check_plan(plan, self.config)
        return DecodeAttention(plan, model_shape(self.config))

    def use_plan(self, plan: PlanLike) -> None:
        """Lets the steps that follow go by another plan: after `crop`, one prompt serves several.

        Raises:
            InputError: there is no such plan, it does not fit the model, or memory is too short for its codes of keys;
                the cache goes on as before.
        """
        self.attention = self._attention_of(plan)

    @property
    def attention(self) -> Attention:
        """What attends in a decode step: a plan at work, or what it is compared with."""
        return self.session.attention

    @attention.setter
    def attention(self, attention: Attention) -> None:
        self._keep_codes(attention)
        self.session.use(attention)
        self._views.pop("drafts", None)

    def for_drafts(self, longest: int) -> TidalCache:
        """The cache as rounds of lossless decoding see it, which draft at most `longest` tokens.

        This one, or, if the plan drafts out of verification, one over the same sequences and rows with an attention and
        captured passes of its own.
        """
        plan = self.attention.plan if isinstance(self.attention, DecodeAttention) else None
        if plan is None or plan.drafting == "plan":
            return self
        drafts = self._views.get("drafts")
        if drafts is not None and isinstance(drafts.attention, VerifiedDrafts) and drafts.attention.longest >= longest:
            return drafts
        return self._view("drafts", VerifiedDrafts(plan, model_shape(self.config), longest))

    def for_full_steps(self) -> TidalCache:
        """The cache as decode steps with full attention see it, whatever attends in this one's."""
        steps = self._views.get("full")
        return self._view("full", self._attention_of("full")) if steps is None else steps

    def _view(self, name: str, attention: Attention) -> TidalCache:
        """A cache over the same sequences and rows, with an attention and captured passes of its own."""
        view = copy.copy(self)
        view._views, view.session = {}, Session(self.sequences, self.layers, attention)
        self._views[name] = view
        return view

    # ---- a forward pass

    @property
    def capacity(self) -> int:
        """Tokens of each sequence that are allocated, left padding counted."""
        return self.sequences.capacity

    def ready(self, batch: int, new_tokens: int, attention_mask: Tensor | None = None) -> None:
        """Makes the cache ready for a pass over so many tokens of each of `batch` sequences, captured or not.

        Args:
            attention_mask: [batch, tokens so far with the new ones], ones and zeros; `None` if no new token is padding.

        Raises:
            InputError: no tokens, another number of sequences than the cache holds, a mask that is not left-padded as
                the cache is, a cache that was left in the middle of a forward pass, or memory is too short. The cache
                is as it was.
        """
        self.sequences.check(batch, new_tokens)
        self._check_whole()
        if attention_mask is not None and not self._mask_seen:
            self.sequences.check_mask(attention_mask, batch, new_tokens)
            self._mask_seen = self._one_mask
        self.make_room(new_tokens)

    def _check_whole(self) -> None:
        lengths = {layer.padded_length for layer in self.layers if isinstance(layer, TidalLayer)}
        if lengths - {self.sequences.padded_length}:
            raise InputError(LEFT_IN_THE_MIDDLE)

    @contextmanager
    def one_mask(self) -> Iterator[None]:
        """While it lasts the mask of the first pass alone is looked at, for that waits for the GPU.

        For Transformers' own loop, which lets ones follow that mask.
        """
        self._one_mask, self._mask_seen = True, False
        try:
            yield
        finally:
            self._one_mask = self._mask_seen = False

    def make_room(self, new_tokens: int) -> None:
        """Lets the cache grow where so many more tokens of each sequence do not fit.

        By half at least, if memory allows: however many tokens come one by one, each is moved a few times only.

        Raises:
            InputError: memory is too short; the cache stays as it was.
        """
        capacity = self.sequences.padded_length + new_tokens
        if capacity <= self.capacity:
            return
        wanted = max(capacity, self.capacity + self.capacity // 2)
        layer = next(layer for layer in self.layers if isinstance(layer, TidalLayer))
        with suppress(InputError):
            layer.check_growth(wanted)
            capacity = wanted
        layer.check_growth(capacity)
        self.session.moved()  # before, so that its graphs hold no memory
        for view in self._views.values():
            view.session.moved()
        for layer in self.layers:
            layer.grow(capacity)
        self.sequences.capacity = capacity

    def begin(
        self,
        batch: int,
        new_tokens: int,
        device: torch.device,
        new_lengths: Tensor | None = None,
        kind: Kind = "full",
    ) -> None:
        """Starts a forward pass over [batch, new_tokens] tokens, after `ready`.

        Args:
            new_lengths: [batch], integer; tokens of each sequence, without left padding; `None` for all of them.
            kind: what the tokens attend to; "steps" are those of one sequence.
        """
        lengths = self.sequences.lengths
        self.sequences.begin(batch, new_tokens, device, new_lengths)
        if self.sequences.lengths is not lengths:  # another number of sequences, or device
            self.session.moved()
            self._views.clear()
        self.session.begin(kind, new_tokens)

    def count(self, tokens: int) -> None:
        """Counts, on the host, the tokens per sequence that a captured pass adds on the device."""
        self.sequences.padded_length += tokens
        for layer in self.layers:
            layer.padded_length += tokens

    def replay(self, model: PreTrainedModel, token_ids: Tensor, position_ids: Tensor, kind: Kind) -> Tensor | None:
        """Takes new tokens in by a captured pass, after `ready`; `None` where there can be none.

        Args:
            token_ids: [B, N], int64; N is 1 for a decode step.
            position_ids: [B, N] or [1, N], int64.
            kind: "step", or "full" for a chunk.

        Returns:
            Logits, [B, N, V]; overwritten by the next such pass.
        """
        graph = self.session.captured(model, token_ids, position_ids, kind)
        if graph is None:
            return None
        logits = graph.replay(token_ids, position_ids)
        self.count(token_ids.shape[1])
        self.session.prepared = self.session.prepared and kind == "step"
        return logits

    def fill(
        self, batch: int, tokens: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        """Holds random K and V of `tokens` tokens instead of a prompt's: for benchmarks of the decode step."""
        self.reset()
        self.ready(batch, tokens)
        self.begin(batch, tokens, device)
        shape = model_shape(self.config)
        new = torch.empty(batch, shape.num_kv_heads, 0, shape.head_dim, device=device, dtype=dtype)
        for layer in self.layers:
            layer.prepare(new, new)
            for rows in (layer.keys, layer.values):
                rows[:, :, :tokens].normal_(generator=generator)
            layer.padded_length = tokens
            layer.code_all()

    # ---- going back

    def mark(self) -> Mark:
        """Remembers where the cache stands, for `go_back`; the windows of sliding-window layers are copied."""
        windows = {
            index: copy.deepcopy(layer) for index, layer in enumerate(self.layers) if isinstance(layer, WindowLayer)
        }
        return Mark(self.sequences.padded_length, self.sequences.lengths.clone(), windows)

    def go_back(self, mark: Mark) -> None:
        """Forgets the tokens that came since `mark`, in every layer; a mark can be used again.

        Raises:
            InputError: the cache holds fewer tokens than it did, or other sequences.
        """
        if len(mark.lengths) != len(self.sequences.lengths):
            raise InputError("the cache holds other sequences than when it was marked: fill it again")
        missing = mark.padded_length - self.sequences.padded_length
        if missing > 0:
            raise InputError(f"the cache holds {missing} tokens fewer than when it was marked: fill it again")
        for index, layer in mark.windows.items():
            self.layers[index] = copy.deepcopy(layer)
        self._forget(-missing, mark.lengths)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens of every sequence (the number is negative, as in Transformers).

        Raises:
            InputError: the number is positive or larger than the cache, or a layer keeps only a sliding window, whose
                older tokens are gone.
        """
        if not -self.sequences.padded_length <= tokens_to_remove <= 0:
            raise InputError(
                f"crop({tokens_to_remove}) of a cache of {self.sequences.padded_length} tokens: give the tokens to "
                "remove as a negative number"
            )
        if not self.is_croppable:
            raise InputError("a cache with sliding-window layers can't be cropped")
        self._forget(-tokens_to_remove, (self.sequences.lengths + tokens_to_remove).clamp(min=0))

    def _forget(self, tokens: int, lengths: Tensor) -> None:
        self.rewind(self.sequences.padded_length - tokens, lengths)
        if self.correction is not None:
            self.correction.forget(tokens)

    def rewind(self, padded_length: int, lengths: Tensor) -> None:
        """Lets every sequence end at its own length; the rows behind are free. Also after a pass that was stopped.

        Args:
            padded_length: tokens with left padding, at least the longest length.
            lengths: [B], integer; all rows up to them must have been written.
        """
        self.sequences.rewind(padded_length, lengths)
        self.session.prepared = False
        for layer in self.layers:
            if isinstance(layer, TidalLayer):
                layer.padded_length = padded_length

    @contextmanager
    def kept_if_stopped(self) -> Iterator[None]:
        """Gives every sequence the length that it has now, if what runs inside is stopped by an error or the user."""
        padded_length, lengths = self.sequences.padded_length, self.sequences.lengths.clone()
        try:
            yield
        except BaseException:
            self.rewind(padded_length, lengths)
            raise

    def reset(self) -> None:
        """Forgets all sequences; what is allocated stays."""
        self.sequences.padded_length = 0
        if self.correction is not None:
            self.correction.forget()
        super().reset()

    # ---- what Transformers' recipes ask of a cache

    @property
    def batch_size(self) -> int:
        """Sequences in the cache; -1 before the first."""
        return len(self.sequences.lengths) or -1

    max_batch_size, max_cache_len = batch_size, capacity  # by the names of earlier versions

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take tokens out of all layers; Transformers 5.16 does not say so of its caches."""
        return all(layer.is_croppable for layer in self.layers)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Holds each sequence `repeats` times, one copy behind the other: one prompt, several continuations.

        Raises:
            InputError: the number is not positive.
        """
        self._take(torch.arange(len(self.sequences.lengths)).repeat_interleave(max(0, repeats)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences alone, in this order.

        Args:
            indices: [N], integer, or [B], bool.

        Raises:
            InputError: there is none among them, or one that the cache does not hold.
        """
        try:
            rows = torch.arange(len(self.sequences.lengths))[torch.as_tensor(indices).cpu()]
        except IndexError:
            raise InputError(
                f"batch_select_indices: the cache holds sequences 0 to {len(self.sequences.lengths) - 1}"
            ) from None
        self._take(rows)

    def _take(self, rows: Tensor) -> None:
        if self.sequences.padded_length == 0:
            return
        if len(rows) == 0:
            raise InputError("no sequence would stay in the cache: reset() it, or keep at least one")
        self._check_whole()
        for layer in self.layers:
            layer.take(rows)
        self.sequences.take(rows)
        self.session.moved()
        self._views.clear()
        if self.correction is not None:
            self.correction.take(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: beam search is not supported."""
        raise InputError("a TidalCache can't follow beam search: use greedy decoding or sampling")
