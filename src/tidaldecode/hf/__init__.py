"""TidalDecode in Transformers: `apply` a plan to a loaded model, then call `model.generate` as before."""

from tidaldecode.hf.apply import applied_plan, apply, remove
from tidaldecode.hf.cache import TidalCache

__all__ = ["TidalCache", "applied_plan", "apply", "remove"]
