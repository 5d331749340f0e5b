"""A model's answer to a prompt, by a plan and, to compare, with full attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from tidaldecode.evaluate.generation_settings import GenerationSettings
from tidaldecode.models import ChosenModel, ModelOptions, check_architecture, check_plan, model_shape
from tidaldecode.plan import TidalPlan
from tidaldecode.texts.prompt import Prompt, check_length

if TYPE_CHECKING:  # it takes seconds to import, and most mistakes are told without it
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from tidaldecode.evaluate.generation import Generation


@dataclass(frozen=True)
class Answer:
    """An answer with its figures, and what gave it.

    Attributes:
        environment: command, versions, device.
        done: by the plan.
        full: with full attention, if that was asked for.
        difference: the index of the first new token in which the two differ, and both texts from there on, a few
            tokens of each; `None` where they are the same, or there is one.
        sets_per_kv_head: of the plan, see `TidalPlan.sets_per_kv_head`.
    """

    environment: dict[str, object]
    model: str
    dtype: str
    settings: GenerationSettings
    plan: TidalPlan
    done: Generation
    full: Generation | None
    difference: tuple[int, str, str] | None
    sets_per_kv_head: float

    @property
    def step_over_full(self) -> float | None:
        """Time of a decode step over full attention's."""
        ms = self.done.decode_ms_per_token
        full_ms = None if self.full is None else self.full.decode_ms_per_token
        return None if ms is None or full_ms is None else round(ms / full_ms, 4)

    def to_json(self) -> dict[str, Any]:
        """The answer as one object."""
        passes, sets = self.settings.passes, self.sets_per_kv_head
        answer = {
            "model": self.model,
            "method": self.settings.method,
            "plan": self.plan.name,
            "token_budget": self.plan.token_budget,
            **self.done.to_json(),
        }
        if sets:
            tokens = self.done.mean_reads(self.plan, "sparse")
            answer |= {"sets_per_kv_head": round(sets, 4), "tokens_read_per_kv_head": round(tokens, 2)}
        if passes.lossless is not None:
            accepted = self.done.accepted_per_round
            answer |= {
                "lossless": passes.lossless,
                "accepted_per_round": None if accepted is None else round(accepted, 4),
            }
        if passes.correction_interval is not None:
            answer["correction_interval"] = passes.correction_interval
        if self.full is not None:
            answer |= {
                "full": self.full.to_json(),
                "first_difference": None if self.difference is None else self.difference[0],
                "step_over_full": self.step_over_full,
            }
        return answer | {"dtype": self.dtype, **self.environment}


@dataclass(frozen=True)
class CheckedPrompt:
    """A prompt, and a model whose weights are not loaded yet: what can be wrong without them is not.

    Attributes:
        token_ids: of the prompt.
    """

    chosen: ChosenModel
    tokenizer: Tokenizer
    token_ids: list[int]
    plan: TidalPlan
    settings: GenerationSettings

    @classmethod
    def check(cls, model: ModelOptions, prompt: Prompt, settings: GenerationSettings) -> Self:
        """Finds the model and its plan.

        Raises:
            InputError: the model or the plan is missing or not supported, or the prompt is too long.
        """
        chosen = model.find()
        check_architecture(chosen.config)
        plan = settings.find_plan(chosen.config)
        check_plan(plan, chosen.config)
        tokenizer = chosen.files.tokenizer()
        tokens = prompt.token_ids(tokenizer)
        check_length(len(tokens), settings.max_new_tokens, chosen.config.max_position_embeddings)
        return cls(chosen, tokenizer, tokens, plan, settings)

    def answer(self, on_progress: Callable[[int, int, str], None], on_text: Callable[[str], None]) -> Answer:
        """Loads the model and answers.

        Args:
            on_progress: told, in words behind 0 of 0, what is being waited for.
            on_text: see `generate_measured`; a line's end comes last, stopped or not.

        Raises:
            InputError: the weights can't be loaded, or the model's tokens can't run again where they would have to.
        """
        import torch

        from tidaldecode.evaluate.generation import compare_with_full, first_difference, generate_measured
        from tidaldecode.hf import apply
        from tidaldecode.hf.second_pass import check_second_pass
        from tidaldecode.results.environment import environment

        chosen, tokenizer = self.chosen, self.tokenizer
        for option in self.settings.passes.asked:
            check_second_pass(chosen.config, option)
        model, prompt = apply(chosen.load(), self.plan), torch.tensor([self.token_ids])
        on_progress(0, 0, f"reading {len(self.token_ids):,} tokens")
        try:
            done, cache = generate_measured(model, tokenizer, prompt, self.settings, on_text)
        finally:
            on_text("\n")
        full = difference = None
        if self.settings.compare:
            on_progress(0, 0, "decoding with full attention")
            full = compare_with_full(model, tokenizer, prompt, self.settings.max_new_tokens, done, cache)
            index = first_difference(done.token_ids, full.token_ids)
            if index is not None:
                here, there = (tokenizer.decode(one.token_ids[index : index + 12]) for one in (done, full))
                difference = index, here, there
        return Answer(
            environment=environment(chosen.device),
            model=self.chosen.files.name,
            dtype=chosen.dtype_name,
            settings=self.settings,
            plan=self.plan,
            done=done,
            full=full,
            difference=difference,
            sets_per_kv_head=self.plan.sets_per_kv_head(model_shape(chosen.config)),
        )
