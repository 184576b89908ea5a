"""Tricks against plain expressions: those for a processor, and what other devices do instead."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunewright.tools import fast
from prunewright.tools.fast import count_bits, pack_bits, unpack_bits


@pytest.fixture(params=["processor", "elsewhere"])
def _device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to a result: what a device other than the processor does runs here, too."""
    if request.param == "elsewhere":
        monkeypatch.setattr(fast, "on_processor", lambda _: False)


once = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@once
@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=5))
@pytest.mark.usefixtures("_device")
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
