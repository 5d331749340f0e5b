"""What TidalDecode is compared with, in the same engine: other ways to read less of the KV cache in a decode step."""

from tidaldecode.baselines.methods import Method
from tidaldecode.baselines.oracle import OracleAttention
from tidaldecode.baselines.quest import QuestAttention
from tidaldecode.baselines.streaming import StreamingAttention

__all__ = ["Method", "OracleAttention", "QuestAttention", "StreamingAttention"]
