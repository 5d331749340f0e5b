"""What is checked where the values that travel through the operations are made."""

from __future__ import annotations

import pytest
import torch

from tidaldecode.ops import KV, Choice

LENGTHS = torch.tensor([40, 20], dtype=torch.int32)


def cache(**other):
    """A cache on no device, so that GPU rules hold."""
    tensors = {
        "k": torch.empty(6, 16, 3, 8, device="meta"),
        "v": torch.empty(6, 16, 3, 8, device="meta"),
        "block_table": torch.empty(2, 3, dtype=torch.int32, device="meta"),
        "lengths": LENGTHS.to("meta"),
    }
    return KV(**{**tensors, **other})


@pytest.mark.parametrize("name", ["k", "v", "block_table", "lengths"])
def test_what_would_be_read_as_something_else_is_refused(name):
    tensor = getattr(cache(), name)
    with pytest.raises(ValueError, match=rf"{name} has a last stride of 2, not 1: pass {name}\.contiguous\(\)"):
        cache(**{name: torch.stack([tensor] * 2, -1)[..., 0]})


def test_plain_pytorch_reads_rows_of_any_stride():
    packed = torch.zeros(6, 3, 8, 16).permute(0, 3, 1, 2)  # vLLM's K on a CPU
    assert KV(packed, packed, torch.zeros(2, 3, dtype=torch.int32), LENGTHS).k.stride(-1) == 16


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"k": torch.empty(6, 16, 3, 9, device="meta")}, r"k is \[6, 16, 3, 9\] of float32, v is \[6, 16, 3, 8\]"),
        ({"v": torch.empty(6, 16, 3, 8, device="meta").half()}, r"v is \[6, 16, 3, 8\] of float16: both must be"),
        (
            {"block_table": torch.empty(2, 3, device="meta")},
            r"block_table is \[2, 3\] of float32, not \[B, max_blocks\]",
        ),
        ({"lengths": LENGTHS.to("meta").long()}, r"lengths is \[2\] of int64, not \[B\] of int32"),
        ({"block_table": torch.empty(1, 3, dtype=torch.int32, device="meta")}, "a row of block_table each"),
        ({"lengths": LENGTHS}, "lie on .*'meta', 'meta', 'meta', 'cpu'"),
    ],
)
def test_caches_that_fit_no_operation_are_refused(other, message):
    with pytest.raises(ValueError, match=message):
        cache(**other)


def test_a_cache_of_some_sequences():
    assert cache().of(slice(1)).lengths.shape == (1,) and cache().of(slice(1)).k is not None


@pytest.mark.parametrize(
    ("recents", "message"),
    [
        (LENGTHS.long(), r"recents is \[2\] of int64, not \[B\] of int32"),
        (LENGTHS[:1], r"recents is \[1\] of int32"),
        (torch.stack([LENGTHS] * 2, -1)[:, 0], "recents has a last stride of 2, not 1"),
    ],
)
def test_choices_that_fit_no_kernel_are_refused(recents, message):
    with pytest.raises(ValueError, match=message):
        Choice(LENGTHS, recents)


def test_one_choice_for_all_sequences():
    choice = Choice.alike(LENGTHS, 9, 2, 1)
    assert (choice.budgets.tolist(), choice.recents.tolist(), choice.sinks) == ([9, 9], [2, 2], 1)
    assert choice.of(slice(1)).budgets.tolist() == [9] and choice.of(slice(1)).sinks == 1
