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

        from tidaldecode.evaluate.generation import compare_with_full, generate_measured
        from tidaldecode.hf import apply
        from tidaldecode.hf.second_pass.correction import check_second_pass

        for option in self.settings.passes.asked:  # not in `check`: what it imports takes seconds
            check_second_pass(self.chosen.config, option)
        model, prompt = apply(self.chosen.load(), self.plan), torch.tensor([self.token_ids])
        on_progress(0, 0, f"reading {len(self.token_ids):,} tokens")
        try:
            done, cache = generate_measured(model, self.tokenizer, prompt, self.settings, on_text)
        except BaseException:
            on_text("\n")
            raise
        if not self.settings.compare:
            return Answer(self, done)
        on_progress(0, 0, "decoding with full attention")
        full = compare_with_full(model, self.tokenizer, prompt, self.settings.max_new_tokens, done, cache)
        return Answer(self, done, full)


@dataclass(frozen=True)
class Answer:
    """An answer with its figures.

    Attributes:
        prompt: what was asked, and how.
        done: by the plan.
        full: with full attention, if that was asked for.
    """

    prompt: CheckedPrompt
    done: Generation
    full: Generation | None = None

    @property
    def sets_per_kv_head(self) -> float:
        """Of the plan, see `TidalPlan.sets_per_kv_head`."""
        return self.prompt.plan.sets_per_kv_head(model_shape(self.prompt.chosen.config))

    @property
    def step_over_full(self) -> float | None:
        """Time of a decode step over full attention's."""
        ms = self.done.decode_ms_per_token
        full_ms = None if self.full is None else self.full.decode_ms_per_token
        return None if ms is None or full_ms is None else round(ms / full_ms, 4)

    def to_json(self) -> dict[str, Any]:
        """The answer as one object."""
        from tidaldecode.evaluate.generation import first_difference
        from tidaldecode.results.environment import environment

        asked, done, passes, sets = self.prompt, self.done, self.prompt.settings.passes, self.sets_per_kv_head
        answer = {
            "model": asked.chosen.files.name,
            "method": asked.settings.method,
            "plan": asked.plan.name,
            "token_budget": asked.plan.token_budget,
            **done.to_json(),
        }
        if sets:
            tokens = round(done.mean_reads(asked.plan.reading), 2)
            answer |= {"sets_per_kv_head": round(sets, 4), "tokens_read_per_kv_head": tokens}
        if passes.lossless is not None:
            accepted = done.accepted_per_round
            rounded = None if accepted is None else round(accepted, 4)
            answer |= {"lossless": passes.lossless, "accepted_per_round": rounded}
        if passes.lossless == "auto":
            answer["pace"] = None if done.pace is None else done.pace.to_json()
        if passes.correction_interval is not None:
            answer["correction_interval"] = passes.correction_interval
        if self.full is not None:
            answer |= {
                "full": self.full.to_json(),
                "first_difference": first_difference(done.token_ids, self.full.token_ids),
                "step_over_full": self.step_over_full,
            }
        return answer | {"dtype": asked.chosen.dtype_name, **environment(asked.chosen.device)}
