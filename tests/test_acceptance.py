"""Speculative decoding's accept rules on tensors: what comes out is distributed as the target."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chi_square import p_value
from tidaldecode.hf.second_pass import speculation
from tidaldecode.hf.second_pass.speculation import accept_greedy, accept_sampled

DRAWS, VOCABULARY, DRAFTS = 40_000, 5, 2


def random_tables(seed=0):
    """Target and draft distribution after every text of up to DRAFTS tokens, by the text's number: [V**n, V] each."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [VOCABULARY**length for length in range(DRAFTS + 1)]
    return [[(torch.randn(size, VOCABULARY, generator=generator) * 1.5).softmax(1) for size in sizes] for _ in range(2)]


def draw_texts(target, draft, accept):
    """Texts of DRAFTS + 1 tokens out of one round each, completed from the target where the round gave fewer."""
    text, drafted, drafts, targets = torch.zeros(DRAWS).long(), [], [], [target[0].expand(DRAWS, -1)]
    for step in range(DRAFTS):
        drafts.append(draft[step][text])
        drafted.append(torch.multinomial(drafts[-1], 1)[:, 0])
        text = text * VOCABULARY + drafted[-1]
        targets.append(target[step + 1][text])
    drafted = torch.stack(drafted, 1)
    accepted, behind = accept(drafted, torch.stack(drafts, 1), torch.stack(targets, 1))
    texts = torch.zeros(DRAWS).long()
    for step in range(DRAFTS + 1):
        fresh = torch.multinomial(target[step][texts], 1)[:, 0]
        token = torch.where(accepted == step, behind, fresh)
        if step < DRAFTS:
            token = torch.where(accepted > step, drafted[:, step], token)
        texts = texts * VOCABULARY + token
    return texts.bincount(minlength=VOCABULARY ** (DRAFTS + 1))


def expected_texts(target):
    probabilities = torch.ones(1, 1)
    for table in target:
        probabilities = (probabilities.view(-1, 1) * table).view(-1, 1)
    return probabilities.flatten() * DRAWS


def test_sampled_tokens_are_distributed_as_the_target():
    torch.manual_seed(1)
    target, draft = random_tables()
    assert p_value(draw_texts(target, draft, accept_sampled), expected_texts(target)) > 0.01


def accepts_too_much(drafted, draft, target):
    return accept_sampled(drafted, draft * 0.8, target)


def resamples_from_the_target(drafted, draft, target):
    accepted, _ = accept_sampled(drafted, draft, target)
    here = target[torch.arange(len(target)), accepted]
    return accepted, torch.multinomial(here, 1)[:, 0]


def accepts_what_agrees(drafted, draft, target):
    return accept_greedy(drafted, target.argmax(-1))


@pytest.mark.parametrize("rule", [accepts_too_much, resamples_from_the_target, accepts_what_agrees])
def test_a_broken_rule_is_found(rule):
    torch.manual_seed(1)
    target, draft = random_tables()
    assert p_value(draw_texts(target, draft, rule), expected_texts(target)) < 1e-6


def test_the_same_distribution_is_always_accepted():
    target, _ = random_tables()
    drafted = torch.multinomial(target[0].expand(1000, -1), 2, replacement=True)
    distributions = target[0].expand(1000, 3, -1)
    accepted, behind = accept_sampled(drafted, distributions[:, :2], distributions)
    assert accepted.eq(2).all() and behind.lt(VOCABULARY).all()


def test_disjoint_distributions_are_never_accepted():
    draft, target = torch.tensor([0.5, 0.5, 0, 0]), torch.tensor([0, 0, 0.5, 0.5])
    drafted = torch.randint(0, 2, (1000, 3))
    accepted, behind = accept_sampled(drafted, draft.expand(1000, 3, -1), target.expand(1000, 4, -1))
    assert not accepted.any()
    assert behind.ge(2).all()


def test_nothing_left_by_rounding():
    """All mass of p lies below q's, by rounding alone: the token comes from p."""
    q = torch.tensor([[[0.5, 0.5 + 1e-7, 0.0]]])
    p = torch.tensor([[[0.0, 0.5, 0.0], [1.0, 0.0, 0.0]]])
    accepted, behind = accept_sampled(torch.tensor([[0]]), q, p)
    assert (accepted.item(), behind.item()) == (0, 1)


class LargestResult(TorchDispatchMode):
    """Sees the numbers of entries of what is computed, and not of views."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **kwargs or {})
        if isinstance(output, torch.Tensor) and not operation.is_view:
            self.entries = max(self.entries, output.numel())
        return output


@pytest.mark.parametrize("drafts", [0, 3])
def test_the_distributions_are_not_copied(drafts):
    """Of 16 sequences with 16 drafts and a vocabulary of 152K, a copy takes 158 MB."""
    draft, target = (torch.rand(2, length, 1000).softmax(-1) for length in (drafts, drafts + 1))
    drafted = torch.zeros(2, drafts).long()
    with LargestResult() as largest:
        accept_sampled(drafted, draft, target)
    assert 0 < largest.entries <= 2 * 1000


def test_without_drafts_a_round_is_a_step():
    torch.manual_seed(0)
    target = torch.tensor([0.2, 0.8]).expand(DRAWS, 1, -1)
    accepted, behind = accept_sampled(torch.zeros(DRAWS, 0).long(), target[:, :0], target)
    assert not accepted.any()
    assert p_value(behind.bincount(), torch.tensor([0.2, 0.8]) * DRAWS) > 0.01


def test_greedy():
    drafted = torch.tensor([[1, 2, 3], [1, 9, 3], [9, 2, 3]])
    target = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    accepted, behind = accept_greedy(drafted, target)
    assert accepted.tolist() == [3, 1, 0]
    assert behind.tolist() == [4, 2, 1]
    accepted, behind = accept_greedy(drafted[:, :0], target[:, :1])
    assert accepted.tolist() == [0, 0, 0]
    assert behind.tolist() == [1, 1, 1]


def test_leading():
    flags = torch.tensor([[True, True, False, True], [False, True, True, True], [True] * 4])
    assert speculation._leading(flags).tolist() == [2, 0, 4]
