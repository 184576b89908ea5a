"""Tensor code that is odd because it is fast on a processor: each trick with what it gains.

The factors are against the plain torch expression named, on one core of an AMD EPYC with torch
2.13, for a matrix [1536, 576] in bfloat16 (scores in float32) unless another size is said. The
numbers are the same in all cases: these are other ways to the same result, and the tests hold them
against the plain ones.
"""

import numpy as np
import torch
from torch import Tensor, nn

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""What holds the bits of a number, by its bytes."""


def on_processor(tensor: Tensor) -> bool:
    """Whether the tricks for processors hold for a tensor; elsewhere torch does all, in place."""
    return tensor.device.type == "cpu"


def count_zeros(weight: Tensor) -> int:
    """How many weights are zero, of either sign.

    By their bits, shifted to drop the sign: four times as fast as ``(weight == 0).sum()``, and up
    to forty times where a processor has no instructions for bfloat16.
    """
    bits = weight.view(INTEGERS[weight.dtype.itemsize])
    return weight.numel() - int(torch.count_nonzero(bits << 1))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bits.

    By numpy, three times as fast as ``torch.equal`` on the same integers (49152 x 576).
    """
    integers = INTEGERS[one.dtype.itemsize]
    one, other = one.view(integers), other.view(integers)
    if on_processor(one):
        return np.array_equal(one.numpy(), other.numpy())
    return torch.equal(one, other)


def is_finite(values: Tensor) -> bool:
    """Whether all values are finite.

    By their extremes, to which NaN spreads: a hundred times as fast as ``isfinite().all()``
    (49152 x 576; thirty times in float32).
    """
    return not values.numel() or all(map(torch.isfinite, torch.aminmax(values)))


def kth_lowest(values: Tensor, k: int) -> Tensor:
    """The ``k``-th lowest along the last dimension, which is dropped; ``k`` counts from 1.

    By numpy's partition, two (over the whole matrix) to four times (in its rows) as fast as
    ``torch.kthvalue``.
    """
    if not on_processor(values):
        return values.kthvalue(k, dim=-1).values
    # numpy has no bfloat16; float32 holds its numbers exactly.
    numbers = values.float() if values.dtype == torch.bfloat16 else values
    found = np.partition(numbers.numpy(), k - 1, axis=-1)[..., k - 1].copy()
    return torch.from_numpy(found).to(values.dtype)


def ascending(values: Tensor) -> Tensor:
    """Values in ascending order along the last dimension, float32.

    By numpy, which keeps no index of the order: nine times as fast as ``torch.sort`` (2^16 values).
    """
    if on_processor(values):
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(dim=-1).values


def write_masked(weight: Tensor, dense: Tensor, kept: Tensor) -> None:
    """Set weights to their dense values, bit for bit, and to +0.0 where they are not kept.

    As a product of integers: fifty times as fast as ``torch.where`` or ``masked_fill_``, and a
    product of floats would leave -0.0.

    Args:
        weight: what is written.
        dense: of its shape and dtype.
        kept: 1 where a weight is kept and 0 elsewhere, of its shape, in its `INTEGERS`.
    """
    integers = INTEGERS[weight.dtype.itemsize]
    torch.mul(dense.view(integers), kept, out=weight.view(integers))


def pack_bits(flags: Tensor) -> Tensor:
    """Flags as bits, eight a byte, the first the highest: numpy's packbits, on any device.

    By numpy on a processor, thirty times as fast as by shifts.

    Args:
        flags: bool, of any shape.

    Returns:
        uint8 [bytes] on their device, the last byte filled up with zeros.
    """
    flat = flags.reshape(-1)
    if on_processor(flat):
        return torch.from_numpy(np.packbits(flat.numpy()))
    eights = nn.functional.pad(flat.view(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    return (eights << _places(eights)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """The inverse of `pack_bits`, one byte a flag.

    By numpy on a processor, fifteen times as fast as by shifts.

    Args:
        bits: uint8 [bytes].
        count: of flags.

    Returns:
        uint8 [count] on their device: 0 or 1.
    """
    if on_processor(bits):
        return torch.from_numpy(np.unpackbits(bits.numpy(), count=count))
    return (bits.unsqueeze(1) >> _places(bits)).bitwise_and_(1).view(-1)[:count]


def _places(bits: Tensor) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)


def count_bits(bits: Tensor) -> int:
    """How many bits are set, of bytes on the processor.

    Five times as fast as counting the flags.
    """
    return int(np.bitwise_count(bits.numpy()).sum())
