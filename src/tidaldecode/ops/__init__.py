"""The arithmetic of a decode step on tensors. Knows no model and no framework.

Every operation sees the KV cache the same way, so that one set of kernels serves a contiguous cache (one block per
sequence) and a paged one:

    k_cache, v_cache   [num_blocks, block_size, Hkv, D], any strides
    block_table        [B, max_blocks], integer; token `t` of sequence `b` lives in block
                       `block_table[b, t // block_size]`, row `t % block_size`
    lengths            [B], int32; tokens of each sequence in the cache, those of this step included

`B` sequences, `Hq` query heads, `Hkv` KV heads, `D` the head dim. Query head `h` reads KV head `h // (Hq // Hkv)`.

`reference` holds the plain PyTorch of each operation, which every device runs and which defines what is correct.
"""

from tidaldecode.ops.reference import (
    full_attention,
    full_attention_with_importance,
    multi_query_attention,
    select_tokens,
    sparse_attention,
    write_kv,
)

__all__ = [
    "full_attention",
    "full_attention_with_importance",
    "multi_query_attention",
    "select_tokens",
    "sparse_attention",
    "write_kv",
]
