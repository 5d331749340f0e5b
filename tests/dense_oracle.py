"""TidalDecode written a second time, with dense masks over the whole sequence and no cache.

One forward pass over prompt and decoded tokens gives every step at once: the K and V of a decoded token come from its
own sparsely computed hidden states in the same pass, as they do step by step.
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface, PreTrainedModel

from tidaldecode import TidalPlan


class DenseOracle:
    """Attention function that masks what the plan would not read, and remembers what was chosen.

    Args:
        plan: the plan, without `sources`.
        mask: [B, T], ones where there is a token, left-padded; prompt and decoded tokens.
        prompt_width: columns of the mask that are prompt.
    """

    def __init__(self, plan: TidalPlan, mask: torch.Tensor, prompt_width: int) -> None:
        self.plan, self.mask, self.prompt_width = plan, mask.bool(), prompt_width
        self.chosen: dict[int, torch.Tensor] = {}  # select layer -> [B, Hq, T, T], True where query t reads token u

    def logits(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """Logits of every position, [B, T, vocabulary]."""
        AttentionInterface.register("dense_oracle", self.attention)
        before = model.config._attn_implementation
        model.set_attn_implementation("dense_oracle")
        positions = (self.mask.long().cumsum(1) - 1).clamp(min=0)
        output = model(ids, position_ids=positions, use_cache=False).logits
        model.set_attn_implementation(before)
        return output

    def attention(self, module, query, key, value, attention_mask, scaling, sliding_window=None, **kwargs):
        """One layer: eager attention in float64 with the mask of its role."""
        batch, heads, width, _ = query.shape
        groups = heads // key.shape[1]
        key, value = (states.repeat_interleave(groups, 1).double() for states in (key, value))
        scores = query.double() @ key.transpose(2, 3) * scaling
        position = torch.arange(width)
        visible = (position[:, None] >= position)[None, None] & self.mask[:, None, None]
        if sliding_window is not None:
            visible = visible & (position[:, None] - position < sliding_window)
        visible = visible.expand(batch, heads, width, width)
        role = self.plan.roles[module.layer_idx]
        if role == "sparse":
            nearest = max(layer for layer in self.chosen if layer < module.layer_idx)
            visible = visible & self.chosen[nearest]
        # a padding query sees nothing: let it see itself, nobody reads it
        probabilities = scores.masked_fill(~(visible | torch.eye(width).bool()), -torch.inf).softmax(-1)
        if role == "select":
            self.chosen[module.layer_idx] = self.choose(scores, probabilities, groups)
        return (probabilities @ value).to(query.dtype).transpose(1, 2), None

    def choose(self, scores, probabilities, groups):
        """The tokens that each decode step may read in the sparse layers above, [B, Hq, T, T]."""
        batch, heads, width, _ = scores.shape
        if self.plan.selection == "per_head":
            importance = scores
        elif self.plan.selection == "per_group":
            importance = probabilities.unflatten(1, (-1, groups)).mean(2).repeat_interleave(groups, 1)
        else:
            importance = probabilities.mean(1, keepdim=True).expand(-1, heads, -1, -1)
        chosen = torch.ones(batch, heads, width, width, dtype=torch.bool)
        for b in range(batch):
            pad = int((~self.mask[b]).sum())
            for step in range(self.prompt_width, width):
                context = step + 1 - pad
                budget = self.plan.budget_for(context)
                if budget >= context:
                    continue
                recent = self.plan.recent_for(budget)
                for head in range(heads):
                    forced = {*range(self.plan.sink_tokens), *range(context - recent, context)}
                    order = importance[b, head, step, pad : step + 1].argsort(descending=True).tolist()
                    ranked = [token for token in order if token not in forced]
                    tokens = [*forced, *ranked[: budget - len(forced)]]
                    chosen[b, head, step] = False
                    chosen[b, head, step, pad + torch.tensor(tokens)] = True
        return chosen
