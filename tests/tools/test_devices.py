"""What runs on a GPU neither waits for it nor mixes devices.

A tensor on the device "meta" has no values, so that torch raises where code asks for one, or takes
what lies on the processor beside it.
"""

import pytest
import torch
from torch import Tensor

from prunewright.tools import fast
from prunewright.tools.criteria import sparsegpt
from prunewright.tools.fast import count_zeros, has_nan, kth_lowest, pack_bits, unpack_bits
from prunewright.tools.masks import lowest, nm_lowest


def is_there(found: Tensor, dtype: torch.dtype, *shape: int) -> bool:
    return (found.device.type, found.dtype, tuple(found.shape)) == ("meta", dtype, shape)


def test_such_a_tensor_tells_who_waits_for_it() -> None:
    weight = torch.rand(3, 5, device="meta")
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        bool(has_nan(weight))
    with pytest.raises(RuntimeError, match="not on the expected device"):
        torch.add(weight, torch.rand(3, 5))


@pytest.mark.parametrize("sorted_", [0, 10**6])
def test_masks_are_made_and_packed_without_waiting(
    sorted_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "SORTED", sorted_)
    scores, own = torch.rand(6, 20, device="meta"), torch.ones(6, 20, device="meta").bool()
    counts = torch.full((6,), 7)
    assert is_there(kth_lowest(scores, counts), torch.float32, 6, 1)
    for mask in (lowest(scores, counts), nm_lowest(scores, 2, 4, own)):
        assert is_there(mask, torch.bool, 6, 20)
        bits = pack_bits(mask)
        assert is_there(bits, torch.uint8, 15)
        assert is_there(unpack_bits(bits, 117), torch.uint8, 117)
    assert is_there(count_zeros(scores), torch.int64)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_the_sweep_waits_nowhere(pattern: tuple[int, int] | None) -> None:
    weight = torch.rand(6, 40, device="meta", dtype=torch.bfloat16)
    factor, factors = torch.rand(40, 40, device="meta"), torch.rand(6, device="meta")
    own = torch.ones(6, 40, device="meta").bool()
    shares = [] if pattern else [20, 30]
    mask, weights = sparsegpt.sweep(
        weight, factor, [(0, 36), (36, 40)], shares, pattern, factors, own
    )
    assert is_there(mask, torch.bool, 6, 40)
    assert is_there(weights, torch.float32, 6, 40)
