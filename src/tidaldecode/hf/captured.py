"""A decode step as one CUDA graph: the model's own code, compiled, with the plan's attention as one opaque operation.

So is a pass over a chunk of new tokens with full attention: cache correction and verification, one graph a length.

`torch.compile` sees the attention of a layer as a call that takes the new token's query, key and value, and knows
nothing of cache, plan or length. So one compilation serves every cache and plan of a model, and the graph captured
from it stays right as the context grows: lengths are on the device and are counted up inside.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch._inductor.config
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from tidaldecode import ops
from tidaldecode.hf.applied import plain_forward
from tidaldecode.hf.merged import merged_products
from tidaldecode.hf.weights import weights_now

if TYPE_CHECKING:
    from tidaldecode.hf.cache import TidalCache

_logger = logging.getLogger("tidaldecode")
_RECOMPILE_LIMIT = 256  # one compilation for each model and batch size, of which a process may see many

_running = threading.local()  # its `attend` is the cache's, of the pass that is warmed up or captured
_capturing = threading.Lock()
_refused: WeakKeyDictionary[PreTrainedModel, set[str]] = WeakKeyDictionary()  # reasons that were said
_streams: WeakKeyDictionary[Cache, torch.cuda.Stream] = WeakKeyDictionary()  # cuBLAS keeps 32 MiB for each


@torch.library.custom_op("tidaldecode::decode_attention", mutates_args=())
def decode_attention(query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float) -> Tensor:
    """Writes the K and V of new tokens, and attends, through the cache of the running pass.

    Args:
        query: [B, Hq, N, D]; one token in a decode step, which goes by the plan.
        key, value: [B, Hkv, N, D].
        layer: index of the layer.
        scale: factor of the scores.

    Returns:
        [B, N, Hq, D].
    """
    attend: Callable[..., Tensor] = _running.attend
    return attend(layer, query, key, value, scale)


@decode_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float) -> Tensor:
    batch, heads, tokens, dim = query.shape
    return query.new_empty(batch, tokens, heads, dim)


class StepCache(Cache):
    """Stands for the cache while a step is traced: hands the new K and V on to the attention function, and is constant.

    The model asks it for nothing that changes from step to step, so that what was compiled stays valid.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new token's own K and V, as they are: `decode_attention` writes them."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """None: positions are given."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """None: positions are given."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """No mask is needed."""
        return 0, 0


_step_cache = StepCache()


def decode_step(forward: Callable[..., Any], input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """The model's forward pass over N new tokens per sequence, inside `running`; one in a decode step.

    Args:
        forward: the model's own forward pass.
        input_ids, position_ids: [B, N], int64.

    Returns:
        Logits, [B, N, V].
    """
    return forward(
        input_ids=input_ids,
        position_ids=position_ids,
        past_key_values=_step_cache,
        use_cache=True,
        return_dict=True,
        tidal_cache=_step_cache,
    ).logits


_compiled_step = torch.compile(decode_step, fullgraph=True, dynamic=False)


@contextmanager
def running(cache: TidalCache, chunk: bool = False) -> Iterator[None]:
    """Makes a cache the one that `decode_attention` works on: in a decode step, or over a chunk."""
    _running.attend = cache.attend_chunk if chunk else cache.decode
    try:
        yield
    finally:
        del _running.attend


class CapturedStep:
    """A decode step, or a pass over a chunk with full attention, in a CUDA graph.

    Args:
        model: a model with a plan, on a GPU.
        cache: holds the sequences to go on with; its next step, or the chunk, must still fit.
        token_ids, position_ids: as `replay` takes them. The pass runs on them before it is captured, so that what it
            writes is right if the user stops it there: the rows may be a correction's, of tokens that the cache keeps.
        chunk: a pass over a chunk, not a decode step.

    Raises:
        Exception: whatever PyTorch says when a model can't be compiled or captured.
    """

    def __init__(
        self, model: PreTrainedModel, cache: TidalCache, token_ids: Tensor, position_ids: Tensor, chunk: bool = False
    ) -> None:
        # no reference to the cache, which holds this step: both would stay until the garbage collector comes by
        self._model, self._chunk = weakref.ref(model), chunk
        lengths = cache.sequences.lengths
        with torch.inference_mode(False):
            self._input_ids = torch.empty(token_ids.shape, dtype=torch.int64, device=lengths.device).copy_(token_ids)
            self._position_ids = torch.empty_like(self._input_ids).copy_(position_ids)
        with torch.cuda.device(lengths.device), merged_products(model):
            self._capture(cache, plain_forward(model))
        self._weights: int = weights_now(model)
        self._moves = cache.sequences.moves

    def _capture(self, cache: TidalCache, forward: Callable[..., Any]) -> None:
        lengths = cache.sequences.lengths
        stream = _stream(cache)
        self._graph = torch.cuda.CUDAGraph()
        before = lengths.clone()
        stream.wait_stream(torch.cuda.current_stream(lengths.device))
        try:
            with torch.no_grad(), running(cache, self._chunk), torch.cuda.stream(stream):
                with _more_compilations():
                    for _ in range(2):  # compiles, lets kernels compile and allocate what they keep
                        self._run(cache, forward)
                        lengths.copy_(before)
                stream.synchronize()
                with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                    self._logits = self._run(cache, forward)
        finally:  # also when the user stops the compilation
            torch.cuda.current_stream(lengths.device).wait_stream(stream)

    def _run(self, cache: TidalCache, forward: Callable[..., Any]) -> Tensor:
        if self._chunk:
            cache.advance_chunk(self._input_ids.shape[1])
        else:
            cache.advance()
        return _compiled_step(forward, self._input_ids, self._position_ids)

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """A copy of the cache captures a step of its own."""
        return _no_step, ()

    def serves(self, model: PreTrainedModel, cache: TidalCache) -> bool:
        """Whether this is the step of a model as it is now, with the weights and the cache that the graph reads."""
        mine = self._model()
        if mine is None or mine is not model or model.training or self._moves != cache.sequences.moves:
            return False
        return self._weights == weights_now(mine)

    def replay(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Runs the step.

        Args:
            input_ids: [B, N], the new tokens; N is 1 for a decode step.
            position_ids: [B, N] or [1, N], their positions.

        Returns:
            Logits, [B, N, V]; overwritten by the next replay.
        """
        with torch.cuda.device(self._input_ids.device):
            self._input_ids.copy_(input_ids)
            self._position_ids.copy_(position_ids)
            self._graph.replay()
        return self._logits


def _stream(cache: TidalCache) -> torch.cuda.Stream:
    """The stream that all graphs of a cache are captured on: no two of them are replayed at the same time."""
    if cache not in _streams:
        _streams[cache] = torch.cuda.Stream(cache.sequences.lengths.device)  # type: ignore[no-untyped-call]
    return _streams[cache]


def _no_step() -> None:
    return None


def captured_step(
    model: PreTrainedModel, cache: TidalCache, token_ids: Tensor, position_ids: Tensor
) -> CapturedStep | None:
    """The step of a model and a cache, captured when it is first asked for; `None` where that is impossible.

    The reason is logged, once a model.

    Args:
        token_ids, position_ids: what will be replayed with, [B, 1].
    """
    cache.prepare()
    if cache.step is not None and cache.step.serves(model, cache):
        return cache.step
    cache.step = None
    reason = _obstacle(model, cache)
    if reason is None and not cache.step_refused:
        cache.step, reason = _capture(model, cache, token_ids, position_ids)
        cache.step_refused = reason is not None
    _say_once(model, "the decode step", reason)
    return cache.step


def captured_chunk(
    model: PreTrainedModel, cache: TidalCache, token_ids: Tensor, position_ids: Tensor
) -> CapturedStep | None:
    """The pass of a model and a cache over a chunk of tokens, [B, N], with full attention, as `captured_step`."""
    tokens = token_ids.shape[1]
    pass_ = cache.chunks.get(tokens)  # `None` in a copy of a cache
    if pass_ is not None and pass_.serves(model, cache):
        return pass_
    cache.chunks.pop(tokens, None)
    reason = _obstacle(model, cache)
    if reason is None and tokens > ops.MOST_CHUNK_TOKENS:
        reason = f"there is no kernel for chunks of more than {ops.MOST_CHUNK_TOKENS} tokens"
    if reason is None and tokens not in cache.chunks_refused:
        pass_, reason = _capture(model, cache, token_ids, position_ids, chunk=True)
        if pass_ is not None:
            cache.chunks[tokens] = pass_
            return pass_
        cache.chunks_refused.add(tokens)
    _say_once(model, f"the pass over {tokens} tokens with full attention", reason)
    return None


def _say_once(model: PreTrainedModel, what: str, reason: str | None) -> None:
    if reason is not None and reason not in _refused.setdefault(model, set()):
        _refused[model].add(reason)
        _logger.warning("%s runs without a CUDA graph, and slower: %s", what, reason)


def _capture(
    model: PreTrainedModel, cache: TidalCache, token_ids: Tensor, position_ids: Tensor, chunk: bool = False
) -> tuple[CapturedStep | None, str | None]:
    """Captures the step of a cache, or its pass over a chunk; why that failed, if it did."""
    lengths = cache.sequences.lengths.clone()
    try:
        with _capturing, _progress(model, len(lengths), token_ids.shape[1] if chunk else None):
            return CapturedStep(model, cache, token_ids, position_ids, chunk), None
    except BaseException as error:  # of any part of PyTorch, for any reason; or the user's
        cache.sequences.lengths.copy_(lengths)
        if not isinstance(error, Exception):
            raise
        return None, f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _obstacle(model: PreTrainedModel, cache: TidalCache) -> str | None:
    """Why a step can't be captured, if that is known beforehand."""
    if not all(cache.has_role(layer) for layer in range(len(cache.layers))):
        return "some layers keep a sliding window, whose cache counts on the host"
    if model.training:
        return "the model is in training mode: call model.eval()"
    if not ops.has_kernel(cache.layers[0].keys):
        return "its attention has no kernels"
    return None


@contextmanager
def _more_compilations() -> Iterator[None]:
    limits = {"recompile_limit": _RECOMPILE_LIMIT, "accumulated_recompile_limit": 4 * _RECOMPILE_LIMIT}
    # to find out whether padded products are faster, Inductor would copy the model's largest weights
    with torch._dynamo.config.patch(limits), torch._inductor.config.patch(shape_padding=False):
        yield


_seen: WeakKeyDictionary[PreTrainedModel, set[tuple[int, int]]] = WeakKeyDictionary()  # what was compiled


@contextmanager
def _progress(model: PreTrainedModel, batch: int, chunk: int | None) -> Iterator[None]:
    """Says what is being waited for; the first compilation of a model takes a minute, later ones come from the disk."""
    shape = batch, chunk or 0
    if shape in _seen.setdefault(model, set()):
        yield
        return
    what = "the decode step" if chunk is None else f"the pass over {chunk} tokens"
    console = Console(file=sys.stderr)
    start = time.perf_counter()
    with console.status(f"tidaldecode compiles {what}: about a minute, once for a model on this machine"):
        yield
    _logger.info("compiled and captured %s in %.0f s", what, time.perf_counter() - start)
    _seen[model].add(shape)
