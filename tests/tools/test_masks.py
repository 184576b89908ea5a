"""Masks against plain Python loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunewright.tools.masks import even_shares, nm_mask, unstructured_mask

pytestmark = pytest.mark.usefixtures("both_ways")


def lowest(values: list[float], count: int) -> set[int]:
    """Indices of the lowest values; equal values by index."""
    return set(sorted(range(len(values)), key=lambda i: (values[i], i))[:count])


def as_lists(chosen: list[set[int]], width: int) -> list[list[bool]]:
    return [[j in row for j in range(width)] for row in chosen]


# Few distinct values, so that ties are common.
matrices = st.integers(1, 6).flatmap(
    lambda rows: st.integers(1, 9).flatmap(
        lambda columns: st.lists(
            st.lists(st.integers(0, 4), min_size=columns, max_size=columns),
            min_size=rows,
            max_size=rows,
        )
    )
)


@settings(max_examples=150, deadline=None)
@given(matrices, st.data())
def test_layer_group_takes_the_lowest_of_the_whole_layer(
    values: list[list[int]], data: st.DataObject
) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    count = data.draw(st.integers(0, scores.numel()))
    flat = [float(v) for row in values for v in row]
    expected = [i in lowest(flat, count) for i in range(len(flat))]
    mask = unstructured_mask(scores, count, "layer")
    assert mask.dtype == torch.bool
    assert mask.shape == scores.shape
    assert mask.reshape(-1).tolist() == expected


@settings(max_examples=150, deadline=None)
@given(matrices, st.data())
def test_row_group_takes_the_lowest_of_each_row(
    values: list[list[int]], data: st.DataObject
) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    count = data.draw(st.integers(0, scores.numel()))
    mask = unstructured_mask(scores, count, "row")
    given_by_row = mask.sum(dim=1).tolist()
    assert sum(given_by_row) == count
    base = count // len(values)
    assert set(given_by_row) <= {base, base + 1}
    chosen = [
        lowest([float(v) for v in row], n) for row, n in zip(values, given_by_row, strict=True)
    ]
    assert mask.tolist() == as_lists(chosen, len(values[0]))


@pytest.mark.parametrize(("rows", "extra"), [(10, 1), (10, 3), (64, 7), (7, 6), (5, 0), (9, 4)])
def test_rows_that_give_one_more_are_evenly_spaced(rows: int, extra: int) -> None:
    counts = even_shares(4 * rows + extra, torch.zeros(rows, dtype=torch.int64)).tolist()
    assert sorted(set(counts)) == ([4, 5] if extra else [4])
    places = [i for i, n in enumerate(counts) if n == 5]
    assert len(places) == extra
    # Around the ring of rows, no gap differs from another by more than one.
    gaps = {(b - a) % rows or rows for a, b in zip(places, places[1:] + places[:1], strict=True)}
    assert not gaps or max(gaps) - min(gaps) <= 1


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1), st.data())
def test_parts_with_more_of_their_own_keep_it_and_the_others_share_evenly(
    parts: list[tuple[int, int]], data: st.DataObject
) -> None:
    sizes = torch.tensor([size for size, _ in parts])
    least = torch.tensor([min(own, size) for size, own in parts])
    total = data.draw(st.integers(int(least.sum()), int(sizes.sum())))
    shares = even_shares(total, least, sizes)
    assert int(shares.sum()) == total
    assert bool((shares >= least).all())
    assert bool((shares <= sizes).all())
    # A level so that each part has its own or that share of its size, to one weight.
    rising = sizes[shares > least]
    levels = (shares[shares > least].double() - 1) / rising
    kept = (least + 1.0)[shares == least] / sizes[shares == least]
    assert not len(levels) or not len(kept) or float(levels.max()) <= float(kept.min())
    assert not len(levels) or float(levels.max()) <= float(((levels * rising + 2) / rising).min())


@settings(max_examples=150, deadline=None)
@given(matrices, st.sampled_from(["row", "layer"]), st.data())
def test_own_zeros_are_of_the_mask_and_the_rest_is_the_lowest_of_what_is_not(
    values: list[list[int]], group: str, data: st.DataObject
) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    flags = data.draw(st.lists(st.booleans(), min_size=scores.numel(), max_size=scores.numel()))
    own = torch.tensor(flags).view(scores.shape)
    count = data.draw(st.integers(int(own.sum()), scores.numel()))
    mask = unstructured_mask(scores, count, group, own)  # type: ignore[arg-type]
    assert int(mask.sum()) == count
    assert bool(mask[own].all())
    rows = (scores, mask, own) if group == "row" else (t.view(1, -1) for t in (scores, mask, own))
    for row, gone, zero in zip(*rows, strict=True):
        chosen = gone & ~zero
        ranked = lowest([float(v) for v in row[~zero]], int(chosen.sum()))
        assert {i for i, taken in enumerate(chosen[~zero].tolist()) if taken} == ranked
    if group == "row":  # up to one level, but for rows with more of their own
        pairs = list(zip(mask.sum(dim=1).tolist(), own.sum(dim=1).tolist(), strict=True))
        level = max((n for n, z in pairs if n > z), default=0)
        assert all(n >= level - 1 and (n <= level or n == z) for n, z in pairs)
    if bool(own.any()):
        with pytest.raises(ValueError, match="of which are zero already"):
            unstructured_mask(scores, int(own.sum()) - 1, group, own)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_counts_are_exact_where_rounding_makes_ties(dtype: torch.dtype) -> None:
    scores = torch.randn(32, 100, generator=torch.Generator().manual_seed(0)).abs().to(dtype)
    for count in (1, 31, 32, 33, 1599, 1600, 3199, 3200):
        for group in ("row", "layer"):
            assert int(unstructured_mask(scores, count, group).sum()) == count


@pytest.mark.parametrize("count", [-1, 13])
@pytest.mark.parametrize("group", ["row", "layer"])
def test_a_count_out_of_range_is_refused(count: int, group: str) -> None:
    with pytest.raises(ValueError, match="of 12 weights"):
        unstructured_mask(torch.ones(3, 4), count, group)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([(1, 2), (2, 4), (4, 8), (1, 4), (3, 4)]), st.integers(0, 2**31))
def test_nm_keeps_exactly_the_highest_of_each_group(pattern: tuple[int, int], seed: int) -> None:
    keep, size = pattern
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (5, 3 * size), generator=generator).float()
    mask = nm_mask(scores, keep, size)
    for row, pruned in zip(scores.tolist(), mask.tolist(), strict=True):
        for start in range(0, len(row), size):
            group = row[start : start + size]
            expected = lowest(group, size - keep)
            assert {i for i in range(size) if pruned[start + i]} == expected


def test_nm_refuses_inputs_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="10 inputs do not divide into groups of 4"):
        nm_mask(torch.ones(2, 10), 2, 4)


def test_scores_that_are_not_numbers_are_refused() -> None:
    scores = torch.ones(4, 4)
    scores[2, 1] = torch.nan
    calls = [
        lambda s: unstructured_mask(s, 3, "row"),
        lambda s: unstructured_mask(s, 3, "layer"),
        lambda s: nm_mask(s, 2, 4),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="not numbers"):
            call(scores)


def test_infinite_scores_go_last() -> None:
    scores: Tensor = torch.tensor([[torch.inf, 1.0, 2.0, torch.inf]])
    assert unstructured_mask(scores, 3, "row").tolist() == [[True, True, True, False]]
