"""A pass over new tokens as one CUDA graph: the model's own code, compiled, with attention as one opaque operation.

A decode step, or a pass over a chunk with full attention: cache correction and verification, one graph a length.

`torch.compile` sees the attention of a layer as a call that takes the new tokens' query, key and value, and knows
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
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch._inductor.config
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from tidaldecode.hf.applied import plain_forward
from tidaldecode.hf.cache_name import CACHE
from tidaldecode.hf.merged import merged_products
from tidaldecode.hf.sequences import Sequences
from tidaldecode.hf.weights import weights_now

_logger = logging.getLogger("tidaldecode")
_RECOMPILE_LIMIT = 256  # one compilation for each model and batch size, of which a process may see many

_running = threading.local()  # its `attend` is that of the pass that is warmed up or captured
_capturing = threading.Lock()
_refused: WeakKeyDictionary[PreTrainedModel, set[str]] = WeakKeyDictionary()  # reasons that were said
_seen: WeakKeyDictionary[PreTrainedModel, set[tuple[int, str]]] = WeakKeyDictionary()  # what was compiled
_streams: WeakKeyDictionary[Sequences, torch.cuda.Stream] = WeakKeyDictionary()  # cuBLAS keeps 32 MiB for each


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
    """Stands for the cache while a pass is traced: hands the new K and V on to the attention function, and is constant.

    The model asks it for nothing that changes from pass to pass, so that what was compiled stays valid: positions are
    given, and no mask is needed.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new tokens' own K and V, as they are: `decode_attention` writes them."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """No mask."""
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
        use_cache=True,
        return_dict=True,
        tidal_cache=_step_cache,
        **{CACHE: _step_cache},
    ).logits


_compiled_step = torch.compile(decode_step, fullgraph=True, dynamic=False)


@contextmanager
def running(attend: Callable[..., Tensor]) -> Iterator[None]:
    """Makes this the attention that `decode_attention` calls, which takes what that takes: layer, query, key, ..."""
    _running.attend = attend
    try:
        yield
    finally:
        del _running.attend


class CapturedPass:
    """A pass of a model over new tokens in a CUDA graph.

    Args:
        model: a model with a plan, on a GPU.
        sequences: what the pass goes on with; the tokens must still fit.
        begin: starts the pass, on the device alone as far as the graph needs it.
        attend: see `running`.
        token_ids, position_ids: as `replay` takes them. The pass runs on them before it is captured, so that what it
            writes is right if the user stops it there: the rows may be a correction's, of tokens that the cache keeps.

    Raises:
        Exception: whatever PyTorch says when a model can't be compiled or captured.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Sequences,
        begin: Callable[[], None],
        attend: Callable[..., Tensor],
        token_ids: Tensor,
        position_ids: Tensor,
    ) -> None:
        # no reference to who begins and attends, which holds this: both would stay until the garbage collector comes by
        self._model = weakref.ref(model)
        lengths = sequences.lengths
        with torch.inference_mode(False):
            self._input_ids = torch.empty(token_ids.shape, dtype=torch.int64, device=lengths.device).copy_(token_ids)
            self._position_ids = torch.empty_like(self._input_ids).copy_(position_ids)
        forward = plain_forward(model)

        def run() -> Tensor:
            begin()
            return _compiled_step(forward, self._input_ids, self._position_ids)

        with torch.cuda.device(lengths.device), merged_products(model), running(attend):
            self._capture(sequences, run)
        self._weights: int = weights_now(model)
        self._moves = sequences.moves

    def _capture(self, sequences: Sequences, run: Callable[[], Tensor]) -> None:
        lengths = sequences.lengths
        if sequences not in _streams:  # one for all graphs of a cache: no two of them are replayed at the same time
            _streams[sequences] = torch.cuda.Stream(lengths.device)  # type: ignore[no-untyped-call]
        stream = _streams[sequences]
        self._graph = torch.cuda.CUDAGraph()
        before = lengths.clone()
        stream.wait_stream(torch.cuda.current_stream(lengths.device))
        try:
            with torch.no_grad(), torch.cuda.stream(stream):
                with _more_compilations():
                    for _ in range(2):  # compiles, lets kernels compile and allocate what they keep
                        run()
                        lengths.copy_(before)
                stream.synchronize()
                with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                    self._logits = run()
        finally:  # also when the user stops the compilation
            torch.cuda.current_stream(lengths.device).wait_stream(stream)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of the cache captures a pass of its own."""
        return type(None), ()

    def serves(self, model: PreTrainedModel, sequences: Sequences) -> bool:
        """Whether this is the pass of a model as it is now, with the weights and the cache that the graph reads."""
        mine = self._model()
        if mine is None or mine is not model or model.training or self._moves != sequences.moves:
            return False
        return self._weights == weights_now(mine)

    def replay(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Runs the pass.

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


def capture(
    model: PreTrainedModel,
    sequences: Sequences,
    begin: Callable[[], None],
    attend: Callable[..., Tensor],
    token_ids: Tensor,
    position_ids: Tensor,
    what: str,
) -> tuple[CapturedPass | None, str | None]:
    """A pass of a model, or why it could not be captured; arguments as of `CapturedPass`, and `what` it is called."""
    lengths = sequences.lengths.clone()
    try:
        with _capturing, _progress(model, len(lengths), what):
            return CapturedPass(model, sequences, begin, attend, token_ids, position_ids), None
    except BaseException as error:  # of any part of PyTorch, for any reason; or the user's
        sequences.lengths.copy_(lengths)
        if not isinstance(error, Exception):
            raise
        return None, f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def say_once(model: PreTrainedModel, what: str, reason: str) -> None:
    """Logs why a pass runs without a graph, each reason once a model."""
    if reason not in _refused.setdefault(model, set()):
        _refused[model].add(reason)
        _logger.warning("%s runs without a CUDA graph, and slower: %s", what, reason)


@contextmanager
def _more_compilations() -> Iterator[None]:
    limits = {"recompile_limit": _RECOMPILE_LIMIT, "accumulated_recompile_limit": 4 * _RECOMPILE_LIMIT}
    # to find out whether padded products are faster, Inductor would copy the model's largest weights
    with torch._dynamo.config.patch(limits), torch._inductor.config.patch(shape_padding=False):
        yield


@contextmanager
def _progress(model: PreTrainedModel, batch: int, what: str) -> Iterator[None]:
    """Says what is being waited for; the first compilation of a model takes a minute, later ones come from the disk."""
    if (batch, what) in _seen.setdefault(model, set()):
        yield
        return
    console = Console(file=sys.stderr)
    start = time.perf_counter()
    with console.status(f"tidaldecode compiles {what}: about a minute, once for a model on this machine"):
        yield
    _logger.info("compiled and captured %s in %.0f s", what, time.perf_counter() - start)
    _seen[model].add((batch, what))
