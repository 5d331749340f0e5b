"""Names of the methods that are compared; apart from what they do, which takes PyTorch."""

METHODS = ("full", "tidal", "quest", "streaming", "oracle")
"""Full attention, TidalDecode by a plan, Quest, StreamingLLM, and each layer's own exact top-k."""

TIMED_METHODS = ("full", "sdpa", "tidal", "quest", "streaming")
"""`full` is full attention by this package's kernel, `sdpa` by PyTorch's; the others read a token budget."""
