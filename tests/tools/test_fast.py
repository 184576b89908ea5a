"""Tricks against plain expressions: those for a processor, and what other devices do instead."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunewright.tools import fast
from prunewright.tools.fast import (
    count_bits,
    count_zeros,
    kth_lowest,
    pack_bits,
    read_at_once,
    unpack_bits,
)

pytestmark = pytest.mark.usefixtures("both_ways")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=5))
def test_bits_are_those_of_numpy_and_come_back(values: list[list[bool]]) -> None:
    flags = torch.tensor(values)
    for given_ in (flags, flags.T, flags[:, 0], flags[0]):
        bits = pack_bits(given_)
        assert bits.dtype == torch.uint8
        assert bits.tolist() == np.packbits(given_.numpy()).tolist()
        assert count_bits(bits) == int(given_.sum())
        found = unpack_bits(bits, given_.numel())
        assert found.dtype == torch.uint8
        assert found.tolist() == given_.flatten().int().tolist()


@pytest.mark.parametrize("sorted_", [0, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_kth_lowest_is_that_of_the_sorted_values(
    dtype: torch.dtype, sorted_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "SORTED", sorted_)
    values = torch.randn(9, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    tiny = torch.tensor(torch.finfo(dtype).tiny, dtype=dtype)
    values[1] = values[1].round()
    values[2, :9] = torch.stack([-tiny, tiny, -tiny / 2, tiny / 2, *values.new_zeros(5)])
    values[3, ::7], values[3, 1::7] = torch.inf, -torch.inf
    values[4] = 0.0
    values[4, ::2] = -0.0
    for ranks in ([1, 7, 7, 50, 25, 3, 26, 49, 2], [50] * 9, [23] * 9):
        found = kth_lowest(values, torch.tensor(ranks))
        assert found.dtype == dtype
        expected = [[sorted(row)[k - 1]] for row, k in zip(values.tolist(), ranks, strict=True)]
        assert found.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_zeros_of_either_sign_are_counted_and_nothing_else(dtype: torch.dtype) -> None:
    least = torch.tensor(torch.finfo(dtype).smallest_normal, dtype=dtype)
    values = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan")]
    weight = torch.tensor(values, dtype=dtype).repeat(3, 1)
    weight[1, 2], weight[1, 3] = least, -least
    weight[2, 2] = 0
    parts = (weight, weight.T, weight.T.contiguous()[0])
    assert read_at_once(count_zeros(part) for part in parts) == [7, 7, 3]
    assert read_at_once([]) == []
