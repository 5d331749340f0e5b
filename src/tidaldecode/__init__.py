"""TidalDecode: long-context LLM decoding that reads a few tokens of the KV cache instead of all of them."""

from tidaldecode.errors import InputError
from tidaldecode.plan import PAPER_RESELECT_LAYERS, ModelShape, Source, TidalPlan

__version__ = "0.1.0"

__all__ = [
    "PAPER_RESELECT_LAYERS",
    "InputError",
    "ModelShape",
    "Source",
    "TidalCache",
    "TidalPlan",
    "applied_plan",
    "apply",
    "remove",
]


def __getattr__(name: str) -> object:
    """Imports the Transformers wing when it is first used, so that reading a plan takes no seconds."""
    if name in ("TidalCache", "applied_plan", "apply", "remove"):
        from tidaldecode import hf

        return getattr(hf, name)
    raise AttributeError(f"module 'tidaldecode' has no attribute {name!r}")
