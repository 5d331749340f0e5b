"""The Triton kernels against the reference in float64: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from test_ops import Case
from tidaldecode.methods.quest import page_bounds, page_scores
from tidaldecode.ops import KV, Choice, reference

pytest.importorskip("triton")
kernels = pytest.importorskip("tidaldecode.ops.kernels")
launch = pytest.importorskip("tidaldecode.ops.kernels.launch")
pytestmark = pytest.mark.kernels

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# the interpreter multiplies bfloat16 matrices as if they were integers
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# all head dims with one shape of heads, all shapes with one head dim
SHAPES = [(20, 6, 3), (20, 5, 1)]
if GPU:
    SHAPES = [(dim, 32, 8) for dim in (64, 80, 96, 128, 256)] + [(64, 1, 1), (64, 9, 3), (128, 32, 32), (128, 16, 1)]
LENGTHS = (1999, 1, 64, 0, 777, 128) if GPU else (161, 1, 64, 0)


@pytest.fixture(autouse=True)
def poison():
    """Outputs that are not written hold NaN, where the allocator hands the same memory out again."""
    poisoned = [torch.full((2**size,), torch.nan, device=DEVICE) for size in range(8, 20)]
    del poisoned


def cases(block_sizes):
    return pytest.mark.parametrize(
        ("dtype", "head_dim", "heads", "kv_heads", "block_size"),
        [
            (dtype, *shape, size)
            for number, dtype in enumerate(DTYPES)
            for shape in SHAPES
            for size in (block_sizes if GPU else [block_sizes[-number % len(block_sizes)]])  # the interpreter is slow
        ],
    )


def make(dtype, head_dim, heads, kv_heads, block_size, lengths=LENGTHS):
    """A case, and the same in float64."""
    case = Case(heads, kv_heads, head_dim, block_size, dtype=dtype, lengths=lengths)
    exact = Case(heads, kv_heads, head_dim, block_size, dtype=dtype, lengths=lengths)
    for name in ("query", "k_cache", "v_cache", "block_table", "lengths"):
        setattr(case, name, getattr(case, name).to(DEVICE))
        tensor = getattr(exact, name).to(DEVICE)
        setattr(exact, name, tensor.double() if tensor.is_floating_point() else tensor)
    return case, exact


def arguments(case):
    return case.query, case.kv, case.scale


def assert_near(actual, exact, dtype):
    assert actual.dtype == dtype
    assert (actual.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


ONE_BLOCK = 2048 if GPU else 256


@cases([ONE_BLOCK, 16])
def test_full_attention(dtype, head_dim, heads, kv_heads, block_size):
    case, exact = make(dtype, head_dim, heads, kv_heads, block_size)
    output = kernels.full_attention(*arguments(case))
    assert_near(output, reference.full_attention(*arguments(exact)), dtype)
    assert not output[3].any()  # the sequence of length 0


@pytest.mark.parametrize("lengths", [(200,), (161, 0, 7)])
def test_stretches_merged_in_a_launch_of_their_own(lengths, monkeypatch):
    """As for few KV heads, whose many stretches one program would merge too slowly."""
    monkeypatch.setattr("tidaldecode.ops.kernels.launch._MERGED_AT_ONCE", 1)
    monkeypatch.setattr("tidaldecode.ops.kernels.launch._MERGED_STRETCHES", 2)
    case, exact = make(torch.float32, 40, 6, 2, 256, lengths)
    launched = []
    monkeypatch.setattr(launch, "merge_kernel", Recorded(launch.merge_kernel, launched))
    assert_near(kernels.full_attention(*arguments(case)), reference.full_attention(*arguments(exact)), torch.float32)
    indices = torch.stack([torch.randperm(max(lengths), device=DEVICE)[:150].sort().values for _ in range(2)]).int()
    indices, counts = indices.expand(len(lengths), 2, -1).contiguous(), case.lengths.clamp(max=150)
    some = [b for b, length in enumerate(lengths) if length == max(lengths)]
    output = kernels.sparse_attention(case.query, case.kv, indices, counts, None, case.scale)[some]
    kv = exact.kv.of(torch.tensor(some, device=DEVICE))
    expected = reference.sparse_attention(exact.query[some], kv, indices[some], counts[some], None, exact.scale)
    assert_near(output, expected, torch.float32)
    importance = torch.zeros(len(lengths), 6, max(lengths), device=DEVICE)
    wanted = importance.double()
    output = kernels.full_attention_with_importance(*arguments(case), ["per_head"], importance)
    expected = reference.full_attention_with_importance(*arguments(exact), ["per_head"], wanted)
    assert_near(output, expected, torch.float32)
    importance = torch.zeros(len(lengths), 2, max(lengths), device=DEVICE)
    wanted = importance.double()
    kernels.full_attention_with_importance(*arguments(case), ["per_group"], importance)
    reference.full_attention_with_importance(*arguments(exact), ["per_group"], wanted)
    torch.testing.assert_close(importance[0].double(), wanted[0], rtol=1e-4, atol=1e-6)
    assert len(launched) == (4 if len(lengths) == 1 else 2)


class Recorded:
    """A kernel whose launches are counted."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        self.launched.append(grid)
        return self.kernel[grid]


@cases([ONE_BLOCK])
def test_importance(dtype, head_dim, heads, kv_heads, block_size):
    case, exact = make(dtype, head_dim, heads, kv_heads, block_size)
    rules = ("unified", "per_head", "per_group")
    importance = torch.full((len(LENGTHS), 1 + heads + kv_heads, max(LENGTHS) + 3), torch.nan, device=DEVICE)
    wanted = importance.double()
    output = kernels.full_attention_with_importance(*arguments(case), rules, importance)
    expected = reference.full_attention_with_importance(*arguments(exact), rules, wanted)
    assert_near(output, expected, dtype)
    for b, length in enumerate(LENGTHS):
        torch.testing.assert_close(importance[b, :, :length].double(), wanted[b, :, :length], rtol=1e-4, atol=1e-4)


@cases([ONE_BLOCK, 16])
@pytest.mark.parametrize("sets", ["one", "per_group", "per_head"])
def test_sparse_attention(dtype, head_dim, heads, kv_heads, block_size, sets):
    case, exact = make(dtype, head_dim, heads, kv_heads, block_size)
    rows = {"one": 1, "per_group": kv_heads, "per_head": heads}[sets]
    counts = torch.tensor([min(length, 190) for length in LENGTHS], dtype=torch.int32, device=DEVICE)
    indices = torch.zeros(len(LENGTHS), rows + 2, 200, dtype=torch.int32, device=DEVICE)
    for b, length in enumerate(LENGTHS):
        for row in range(rows + 2):
            indices[b, row, : counts[b]] = torch.randperm(length, device=DEVICE)[: counts[b]].int()
    if sets != "one":  # each set has a count of its own
        fewer = counts // (1 + torch.arange(rows + 2, dtype=torch.int32, device=DEVICE)[:, None] % 3)
        counts = torch.maximum(fewer, counts.clamp(max=1)).T
    head_to_set = torch.randperm(rows + 2, device=DEVICE)[:rows]
    output = kernels.sparse_attention(case.query, case.kv, indices, counts, head_to_set, case.scale)
    some = [b for b, length in enumerate(LENGTHS) if length]
    kv = exact.kv.of(torch.tensor(some, device=DEVICE))
    expected = reference.sparse_attention(exact.query[some], kv, indices[some], counts[some], head_to_set, exact.scale)
    assert_near(output[some], expected, dtype)
    in_counts = counts if sets == "one" else counts.T[head_to_set].T
    in_order = kernels.sparse_attention(case.query, case.kv, indices[:, head_to_set], in_counts, None, case.scale)
    assert torch.equal(in_order, output)


def test_sparse_attention_refuses_a_map_of_another_length():
    case, _ = make(torch.float32, 16, 6, 3, 256, (40,))
    table = torch.zeros(1, 2, 8, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="head_to_set has 2 entries, not 1, 3 or 6"):
        kernels.sparse_attention(case.query, case.kv, table, case.lengths, None, case.scale)


@pytest.mark.parametrize("lengths", [(200, 33), (17, 16)])
def test_sparse_attention_over_pages(lengths):
    case, exact = make(torch.float32, 16, 6, 3, 256, lengths)
    pages = torch.tensor([-(-length // 16) for length in lengths], dtype=torch.int32, device=DEVICE)
    indices = torch.zeros(2, 3, 5, dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    for b, count in enumerate(pages.tolist()):
        chosen = min(count, 5)
        for row in range(3):
            indices[b, row, :chosen] = torch.randperm(count, device=DEVICE)[:chosen].int()
            indices[b, row, :chosen] = torch.cat(
                [indices[b, row, :chosen][indices[b, row, :chosen] != count - 1][: chosen - 1], pages[b : b + 1] - 1]
            )
        counts[b] = (chosen - 1) * 16 + lengths[b] - (count - 1) * 16
    output = kernels.sparse_attention(case.query, case.kv, indices, counts, None, case.scale, 16)
    expected = reference.sparse_attention(exact.query, exact.kv, indices, counts, None, exact.scale, 16)
    assert_near(output, expected, torch.float32)


@cases([ONE_BLOCK, 16])
@pytest.mark.parametrize("queries", [1, 7, 33] if GPU else [1, 5, 33])
def test_multi_query_attention(dtype, head_dim, heads, kv_heads, block_size, queries):
    case, exact = make(dtype, head_dim, heads, kv_heads, block_size)
    new = torch.tensor([min(queries, length, 1 + 3 * b) for b, length in enumerate(LENGTHS)], dtype=torch.int32)
    query = torch.randn(len(LENGTHS), queries, heads, head_dim, device=DEVICE).to(dtype)
    new = new.to(DEVICE)
    output = kernels.multi_query_attention(query, case.kv, new, case.scale)
    expected = reference.multi_query_attention(query.double(), exact.kv, new, exact.scale)
    assert_near(output, expected, dtype)
    for b, count in enumerate(new.tolist()):
        assert not output[b, : queries - count].any()


@pytest.mark.parametrize("rule", ["per_head", "per_group", "unified"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "block_size"),
    [(6, 3, 1, 2600), (6, 3, 5, 16), (5, 1, 33, 2600)] + [(32, 8, 9, 2600), (32, 32, 17, 2600)] * GPU,
)
def test_a_chunk_that_chooses(rule, heads, kv_heads, queries, block_size):
    """With more rows of queries than one program takes, too; the second sequence leaves no choice."""
    lengths = (2500, 1 + queries, 1300, 30 + queries) if GPU else (1100, 1 + queries, 64 + queries)
    case, exact = make(torch.float32, 16, heads, kv_heads, block_size, lengths)
    new = torch.tensor([queries, 1, max(1, queries - 2), queries][: len(lengths)], dtype=torch.int32, device=DEVICE)
    query = torch.randn(len(lengths), queries, heads, 16, device=DEVICE)
    sets = {"per_head": heads, "per_group": kv_heads, "unified": 1}[rule]
    table = torch.full((len(lengths), sets, 99), -7, dtype=torch.int32, device=DEVICE)
    expected = table.clone()
    choice = rule, Choice.alike(new, 60, 5, 3), 2600
    output = kernels.multi_query_attention_with_selection(query, case.kv, new, case.scale, *choice, table)
    wanted = reference.multi_query_attention_with_selection(
        query.double(), exact.kv, new, exact.scale, *choice, expected
    )
    assert_near(output, wanted, torch.float32)
    for b, count in enumerate(new.tolist()):
        assert not output[b, : queries - count].any()
    different = table.sort(-1).values != expected.sort(-1).values
    assert different.sum() <= 2 * len(lengths)  # scores within rounding at a budget's border


@pytest.mark.parametrize("block_size", [256, 16, 5])
def test_write_kv(block_size):
    case, _ = make(torch.float32, 24, 6, 3, block_size, (200, 7, 1, 64))
    new = torch.tensor([3, 7, 1, 0], dtype=torch.int32, device=DEVICE)
    key, value = torch.randn(2, 4, 7, 3, 24, device=DEVICE)
    written = [cache.clone() for cache in (case.k_cache, case.v_cache)]
    kernels.write_kv(key, value, KV(*written, case.block_table, case.lengths), new)
    reference.write_kv(key, value, case.kv, new)
    for cache, expected in zip(written, (case.k_cache, case.v_cache), strict=True):
        torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)


def test_strides_of_a_cache_of_several_layers():
    """K and V may lie in memory in any order, as long as rows are contiguous; queries too."""
    case, exact = make(torch.float32, 16, 6, 3, 256, (200, 33))
    for name in ("k_cache", "v_cache"):
        setattr(case, name, getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2))
    case.v_cache = torch.stack([case.v_cache, case.v_cache], 1)[:, 0]  # not the strides of K
    case.query = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    assert_near(kernels.full_attention(*arguments(case)), reference.full_attention(*arguments(exact)), torch.float32)


def check_sets(importance, lengths, budgets, recent, sink):
    """Chooses tokens by kernel and by reference: the same sets, but for equal importances."""
    batch, sets, _ = importance.shape
    importance = importance.to(DEVICE)
    as_tensor = lambda values: torch.tensor(values, dtype=torch.int32, device=DEVICE)  # noqa: E731
    chosen = as_tensor(lengths), Choice(as_tensor(budgets), as_tensor([recent] * batch), sink)
    for b, length in enumerate(lengths):
        importance[b, :, length:] = torch.nan
    table = torch.full((batch, sets, max(budgets)), -7, dtype=torch.int32, device=DEVICE)
    expected = table.clone()
    kernels.select_tokens(importance, *chosen, table)
    reference.select_tokens(importance, *chosen, expected)
    for b, (length, budget) in enumerate(zip(lengths, budgets, strict=True)):
        count = min(length, budget)
        assert (table[b, :, count:] == -7).all()
        for row in range(sets):
            tokens, wanted = table[b, row, :count].long(), expected[b, row, :count].long()
            forced = set(range(min(sink, length))) | set(range(max(0, length - recent), length))
            assert len(set(tokens.tolist())) == count
            assert forced <= set(tokens.tolist()) <= set(range(length))
            values = importance[b, row]
            torch.testing.assert_close(values[tokens].sort().values, values[wanted].sort().values, rtol=0, atol=0)
    return table


TAILS = {
    "probabilities": lambda *shape: torch.randn(*shape).mul(2).softmax(-1),
    "scores": lambda *shape: torch.randn(*shape) * 5 - 3,
    "few values": lambda *shape: torch.randint(0, 3, shape).float() * 1e-20,
    "all equal": lambda *shape: torch.zeros(*shape),
    "all in one bin": lambda *shape: 1 + torch.rand(*shape) / 100,
    "huge and tiny": lambda *shape: (torch.randn(*shape) * 40).exp(),
    "infinities": lambda *shape: torch.where(torch.rand(*shape) < 0.2, -torch.inf, torch.randn(*shape)),
}


@pytest.mark.parametrize(
    ("tail", "capacity"),
    [(tail, capacity) for tail in TAILS for capacity in ([50, 1000, 8192, 8193, 20011] if GPU else [50, 1000])]
    + [(tail, 8200) for tail in ("scores", "few values", "all in one bin") if not GPU],
)
def test_selection(tail, capacity):
    torch.manual_seed(capacity)
    lengths = [capacity, capacity * 3 // 4, 40, capacity - 1]
    budgets = [max(capacity // 9, 12), 16, 40, max(capacity // 3, 12)]
    table = check_sets(TAILS[tail](4, 2, capacity), lengths, budgets, 5, 4)
    if GPU or tail == "few values":  # the same order too
        torch.manual_seed(capacity)
        assert torch.equal(table, check_sets(TAILS[tail](4, 2, capacity), lengths, budgets, 5, 4))


@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (1500, 3), (4, 3000)])
def test_selection_with_many_forced_tokens(sink, recent):
    check_sets(torch.rand(2, 2, 9000), [9000, 6000], [4000, 5500], recent, sink)


@pytest.mark.gpu  # too long for the interpreter
@pytest.mark.parametrize(("capacity", "budget"), [(100_000, 16), (100_000, 16_000), (1_000_000, 1024)])
def test_selection_from_long_contexts(capacity, budget):
    check_sets(torch.randn(1, 8, capacity).softmax(-1), [capacity - 3], [budget], 1, 0)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 3), (5, 1)])
def test_selection_by_attention(heads, kv_heads):
    lengths = (2500, 1, 1300, 30)
    case, _ = make(torch.float32, 16, heads, kv_heads, 2600, lengths)
    budgets, recents = (
        torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in ([99, 99, 700, 10], [5] * 4)
    )
    rules = ("per_group", "unified", "per_head")
    table = torch.full((4, 1 + heads + kv_heads, 700), -7, dtype=torch.int32, device=DEVICE)
    expected = table.clone()
    chosen = rules, Choice(budgets, recents, 3), 2600
    output = kernels.full_attention_with_selection(*arguments(case), *chosen, table)
    wanted = reference.full_attention_with_selection(*arguments(case), *chosen, expected)
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    different = table.sort(-1).values != expected.sort(-1).values
    assert different.sum() <= 2 * len(lengths)  # scores within rounding at a budget's border


@pytest.mark.parametrize("rule", ["per_head", "per_group", "unified"])
def test_decode_steps_that_share_a_block(rule):
    """As teacher-forced decoding has them: one sequence's steps, of several lengths, all over its one block."""
    one, _ = make(torch.float32, 20, 6, 3, 300, (290,))
    counts = torch.tensor((270, 290, 1, 64, 271, 289, 2), dtype=torch.int32, device=DEVICE)
    query = torch.randn(len(counts), 6, 20, device=DEVICE)
    kv = KV(one.k_cache, one.v_cache, one.block_table.expand(len(counts), 1), counts)
    choice = Choice.alike(counts, 40, 4, 2)
    sets = {"per_head": 6, "per_group": 3, "unified": 1}[rule]
    table = torch.full((len(counts), sets, 40), -7, dtype=torch.int32, device=DEVICE)
    expected = table.clone()
    chosen = one.scale, [rule], choice, 300
    output = kernels.full_attention_with_selection(query, kv, *chosen, table)
    wanted = reference.full_attention_with_selection(query, kv, *chosen, expected)
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(table.sort(-1).values, expected.sort(-1).values)
    read = torch.minimum(choice.budgets, counts)
    sparse = kernels.sparse_attention(query, kv, table, read, None, one.scale)
    torch.testing.assert_close(
        sparse, reference.sparse_attention(query, kv, table, read, None, one.scale), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("lengths", [(160, 161, 175, 176, 177, 290), (290, 5)])
def test_page_scores_of_sequences_that_share_a_block(lengths):
    """Each sees its own rows alone, whatever pages the others have filled."""
    quest_kernel = pytest.importorskip("tidaldecode.methods.quest_kernel")
    one, _ = make(torch.float32, 24, 6, 3, 300, (290,))
    query, table = torch.randn(len(lengths), 6, 24, device=DEVICE), one.block_table.expand(len(lengths), 1)
    counts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    bounds, scores = page_bounds(one.k_cache, 16), torch.full((len(lengths), 3, 19), torch.nan, device=DEVICE)
    kept = bounds.clone()
    quest_kernel.launch(query, KV(one.k_cache, one.v_cache, table, counts), bounds, scores, 16)
    torch.testing.assert_close(bounds, kept, rtol=0, atol=0, equal_nan=True)
    for b, length in enumerate(lengths):
        pages = one.k_cache[one.block_table[0, 0], :length].split(16)
        limits = torch.stack([torch.stack([page.amin(0), page.amax(0)]) for page in pages])  # [pages, 2, Hkv, D]
        upper = (query[b].view(3, 2, 24) * limits.repeat_interleave(2, 2).unflatten(2, (3, 2))).amax(1).sum(-1)
        assert_near(scores[b, :, : len(pages)], upper.amax(-1).T.double(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_page_scores(dtype):
    case, exact = make(dtype, 24, 6, 3, 300, (290, 1, 64, 33))
    quest_kernel = pytest.importorskip("tidaldecode.methods.quest_kernel")
    bounds = page_bounds(case.k_cache, 16)
    wanted_bounds = bounds.double()
    scores = torch.full((4, 3, 19), torch.nan, device=DEVICE)
    wanted = scores.double()
    quest_kernel.launch(case.query, case.kv, bounds, scores, 16)
    page_scores(exact.query, exact.kv, wanted_bounds, wanted, 16)
    torch.testing.assert_close(bounds.double(), wanted_bounds, rtol=0, atol=0, equal_nan=True)
    for b, length in enumerate((290, 1, 64, 33)):
        assert_near(scores[b, :, : -(-length // 16)], wanted[b, :, : -(-length // 16)], torch.float32)


def test_queries_that_would_be_read_as_something_else_are_refused():
    case, _ = make(torch.float32, 16, 6, 3, 16, (40, 20))
    case.query = torch.stack([case.query] * 2, -1)[..., 0]
    with pytest.raises(ValueError, match="query has a last stride of 2, not 1"):
        kernels.full_attention(*arguments(case))


def test_importances_of_another_dtype_are_refused():
    integers = torch.tensor([[40], [9], [2]], dtype=torch.int32, device=DEVICE)
    table = torch.zeros(1, 1, 9, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"importance is torch\.bfloat16, not float32"):
        kernels.select_tokens(torch.rand(1, 1, 40, device=DEVICE).bfloat16(), integers[0], Choice(*integers[1:]), table)


@pytest.mark.parametrize("capacity", [60, 8200])
def test_importances_that_are_no_numbers_are_the_largest(capacity):
    importance = torch.rand(1, 1, capacity, device=DEVICE)
    importance[0, 0, 20:23] = torch.tensor([torch.nan, -torch.nan, torch.inf])
    integers = torch.tensor([[capacity], [9], [2]], dtype=torch.int32, device=DEVICE)
    table = torch.full((1, 1, 9), -7, dtype=torch.int32, device=DEVICE)
    kernels.select_tokens(importance, integers[0], Choice(*integers[1:], 1), table)
    chosen = set(table.flatten().tolist())
    assert len(chosen) == 9 and {0, 20, 21, 22, capacity - 2, capacity - 1} <= chosen


@pytest.mark.parametrize("rule", ["unified", "per_head"])
def test_sets_depend_on_neither_rounds_nor_capacity_nor_what_lay_in_memory(rule, monkeypatch):
    """The sequences in one round, in rounds of about one, and with room for many times their length."""
    case, _ = make(torch.float32, 16, 6, 3, 2600, (1100, 30, 700))
    choice = Choice.alike(case.lengths, 60, 5, 3)
    tables = []
    for room, capacity in ((2**29, 1100), (1, 1100), (2**29, 40_000)):
        monkeypatch.setattr("tidaldecode.ops.rounds.ROOM", room)
        table = torch.full((3, 6 if rule == "per_head" else 1, 60), -7, dtype=torch.int32, device=DEVICE)
        kernels.full_attention_with_selection(*arguments(case), [rule], choice, capacity, table)
        tables.append(table.sort(-1).values)
    assert torch.equal(tables[0], tables[1]) and torch.equal(tables[0], tables[2])


@pytest.mark.parametrize("operation", ["full", "importance", "sparse", "chunk"])
def test_offsets_of_64_bits(operation, monkeypatch):
    """As for a block of 2^31 elements or more, on one that is small."""
    monkeypatch.setattr("tidaldecode.ops.kernels.launch._WIDE", 0)
    case, exact = make(torch.float32, 20, 6, 3, ONE_BLOCK, (70, 1, 20))
    outputs = []
    for backend, given in ((kernels, case), (reference, exact)):
        if operation == "full":
            outputs.append(backend.full_attention(*arguments(given)))
        elif operation == "importance":
            importance = torch.zeros(3, 6, 70, dtype=given.query.dtype, device=DEVICE)
            outputs.append(backend.full_attention_with_importance(*arguments(given), ["per_head"], importance))
        elif operation == "sparse":
            indices = torch.arange(0, 70, 2, dtype=torch.int32, device=DEVICE).expand(3, 3, -1).contiguous()
            counts = torch.tensor([35, 1, 10], dtype=torch.int32, device=DEVICE)
            outputs.append(backend.sparse_attention(given.query, given.kv, indices, counts, None, given.scale))
        else:
            query = given.query[:, None].expand(-1, 3, -1, -1).contiguous()
            new = torch.tensor([3, 1, 2], dtype=torch.int32, device=DEVICE)
            outputs.append(backend.multi_query_attention(query, given.kv, new, given.scale))
    assert_near(*outputs, torch.float32)


def test_rows_beyond_2_31_elements_of_a_block():
    """Written and read; only the rows themselves are ever touched of the memory between them."""
    row, tokens = 2**30, 3
    memory = torch.empty(tokens * row, dtype=torch.float16, device=DEVICE)
    k, v = (memory[start:].as_strided((1, tokens, 1, 16), (tokens * row, row, 16, 1)) for start in (0, 16))
    lengths, new = (torch.tensor([tokens], dtype=torch.int32, device=DEVICE) for _ in range(2))
    kv = KV(k, v, torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), lengths)
    query = torch.randn(1, 2, 16, device=DEVICE).half()
    key, value = torch.randn(2, 1, tokens, 1, 16, device=DEVICE).half()
    kernels.write_kv(key, value, kv, new)
    assert torch.equal(memory[2 * row : 2 * row + 16], key[0, 2, 0])
    exact = KV(key.double(), value.double(), kv.block_table, lengths)
    assert_near(
        kernels.full_attention(query, kv, 0.25), reference.full_attention(query.double(), exact, 0.25), torch.float16
    )
    indices = torch.tensor([[[2, 0]]], dtype=torch.int32, device=DEVICE)
    chosen = indices, torch.full_like(lengths, 2), None, 0.25
    expected = reference.sparse_attention(query.double(), exact, *chosen)
    assert_near(kernels.sparse_attention(query, kv, *chosen), expected, torch.float16)
