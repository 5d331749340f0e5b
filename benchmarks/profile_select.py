"""One full, one select and one sparse layer, for `ncu` to look at: 8 KV heads, 102,400 tokens, a budget of 1,024.

ncu empties the caches before each kernel, so that the short kernels take longer than in a decode step.
"""

import torch

from tidaldecode import ops
from tidaldecode.ops import KV, Choice

CONTEXT, BUDGET = 102_400, 1024


def main() -> None:
    """Runs each layer twice; the first time compiles."""
    device = torch.device("cuda")
    query = torch.randn(1, 32, 128, device=device, dtype=torch.bfloat16)
    keys, values = (torch.randn(1, 8, CONTEXT, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    integers = torch.tensor([0, CONTEXT, BUDGET, 1], device=device, dtype=torch.int32)
    block_table, (lengths, budgets, recents) = integers[:1, None], integers[1:, None]
    kv = KV(keys.transpose(1, 2), values.transpose(1, 2), block_table, lengths)
    indices = torch.zeros(1, 8, BUDGET, device=device, dtype=torch.int32)
    scale = 128**-0.5
    for _ in range(2):
        ops.full_attention(query, kv, scale)
        ops.full_attention_with_selection(query, kv, scale, ["per_group"], Choice(budgets, recents), CONTEXT, indices)
        ops.sparse_attention(query, kv, indices, budgets, None, scale)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
