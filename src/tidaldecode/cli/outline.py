"""What the files of a model say at once, before PyTorch and Transformers are imported: enough to find most mistakes.

What they leave open is left to the checks that follow, which know everything: nothing is refused here that those take.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidaldecode.errors import InputError
from tidaldecode.models import TESTED_ARCHITECTURES, gguf_of
from tidaldecode.models import demo as demo_model
from tidaldecode.models.cache import cache_folder
from tidaldecode.plans import read_plan
from tidaldecode.plans.find import shipped_for
from tidaldecode.texts.prompt import Prompt, check_length
from tidaldecode.texts.windows import check_context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_MARGIN = 1.01  # the class of tokenizer that Transformers chooses for a model may count a little otherwise
_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_query_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}


@dataclass(frozen=True)
class Outline:
    """A model by its files.

    Attributes:
        name: what its configuration will call it.
        folder: where its files are, in Transformers' format; `None` where they are not on this machine yet.
        config: what `config.json` says in so many words; nothing that an architecture's defaults would add.
    """

    name: str
    folder: Path | None
    config: dict[str, Any]

    @property
    def shape(self) -> dict[str, int]:
        """Those fields of its `ModelShape` that are known."""
        values = {name: self._number(key) for name, key in _KEYS.items()}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def positions(self) -> int | None:
        """Positions of the model, `None` where they are not known."""
        return self._number("max_position_embeddings")

    def check_plan(self, name: str, budget: int | float | None = None) -> None:
        """Refuses the name of a plan that is none, or of one that was made for another model, and a wrong budget.

        Raises:
            InputError: as `find_plan`, `check_plan` of a configuration and `TidalPlan.with_budget`.
        """
        is_demo = Path(self.name).name == demo_model.NAME  # whose plan is known before it is fetched
        plan = read_plan(demo_model.NAME if name == "auto" and is_demo else name)
        if plan is not None and (wrong := plan.mismatch(self.shape)) is not None:
            raise InputError(wrong)
        if plan is None and name == "auto" and self._may_work():
            plan = shipped_for(self.name, self.shape)
        if plan is not None and budget is not None:
            plan.with_budget(budget)

    def check_prompt(self, prompt: Prompt, new_tokens: int) -> None:
        """Refuses a prompt that is much too long.

        Raises:
            InputError: it is.
        """
        positions = self.positions
        if positions is None or prompt.most_tokens() + new_tokens <= positions:
            return
        tokenizer = self.tokenizer()
        if tokenizer is not None:
            tokens = len(prompt.token_ids(tokenizer))
            if tokens + new_tokens > _MARGIN * positions:
                check_length(tokens, new_tokens, positions)

    def check_context(self, tokens: int) -> None:
        """Refuses a context beyond the model's positions.

        Raises:
            InputError: it is.
        """
        if self.positions is not None:
            check_context(tokens, self.positions)

    def tokenizer(self) -> Tokenizer | None:
        """A tokenizer by its own file, without PyTorch; Transformers may choose a class that counts a little otherwise.

        Returns:
            `None` where there is no such file, or it can't be read.
        """
        if self.folder is None or not (self.folder / "tokenizer.json").is_file():
            return None
        from transformers import PreTrainedTokenizerFast

        try:
            return PreTrainedTokenizerFast.from_pretrained(self.folder)
        except Exception:  # whatever a damaged file makes the library raise; whoever needs it is told then
            return None

    def _may_work(self) -> bool:
        """Whether nothing but the plan can be missing: what else is wrong with a model is told first."""
        return self.config.get("model_type") in TESTED_ARCHITECTURES and not self.config.get("sliding_window")

    def _number(self, key: str) -> int | None:
        value = self.config.get(key)
        return value if type(value) is int else None


def outline_of(name: str) -> Outline:
    """The outline of a model, as far as its files are on this machine; nothing is fetched.

    Args:
        name: see `find_model`.

    Raises:
        InputError: there is no such file or folder, or no model in it.
    """
    if name == demo_model.NAME:
        folder: Path | None = cache_folder() / name
    elif gguf_of(name) is not None:
        folder = None
    else:
        folder = Path(name) if os.path.isdir(name) else _fetched(name)
    config = {} if folder is None else _config(folder)
    return Outline(str(folder) if name == demo_model.NAME else name, folder if config else None, config)


def _fetched(name: str) -> Path | None:
    """The folder of a hub model that was fetched before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(path).parent if isinstance(path, str) else None


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
