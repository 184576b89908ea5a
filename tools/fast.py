"""Tensor code that is odd because it is fast on a processor: each trick with what it gains.

The factors are against the plain torch expression named, on one core of an AMD EPYC with torch
2.13, for a matrix [1536, 576] in bfloat16 (scores in float32) unless another size is said. The
numbers are the same in all cases: these are other ways to the same result, and the tests hold them
against the plain ones.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""What holds the bits of a number, by its bytes."""
SORTED = 2**22
"""Values that are sorted elsewhere than on a processor: 64 MiB of index and copy."""


def on_processor(tensor: Tensor) -> bool:
    """Whether the tricks for processors hold for a tensor; elsewhere torch does all, in place."""
    return tensor.device.type == "cpu"


def count_zeros(weight: Tensor) -> Tensor:
    """How many weights are zero, of either sign: int64 [], on their device, for `read_at_once`.

    By their bits, shifted to drop the sign: four times as fast as ``(weight == 0).sum()``, and up
    to forty times where a processor has no instructions for bfloat16.
    """
    bits = weight.view(INTEGERS[weight.dtype.itemsize])
    return weight.numel() - torch.count_nonzero(bits << 1)


def read_at_once(counts: Iterable[Tensor]) -> list[int]:
    """Counts [] that are on devices: it is waited for them once, and not for each of them.

    A processor's are read one by one. Kept, they would lie in its heap between large temporaries,
    whose room could not be used again: 0.9 GiB for 600M weights in bf16.
    """
    found = [int(count) if on_processor(count) else count for count in counts]
    there = [count for count in found if isinstance(count, Tensor)]
    read = iter(torch.stack([c.to(there[0].device) for c in there]).tolist() if there else [])
    return [next(read) if isinstance(count, Tensor) else count for count in found]


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
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def has_nan(values: Tensor) -> Tensor:
    """Whether a value is not a number: bool [], on their device.

    By their largest, to which NaN spreads: twenty times as fast as ``isnan().any()``.
    """
    return values.amax().isnan()


def kth_lowest(values: Tensor, ranks: Tensor) -> Tensor:
    """The value of a rank in each row.

    By numpy's partition, two (one row) to four times (many) as fast as ``torch.kthvalue``, which on
    a GPU gives a row to one of its processors and takes one rank for all rows. There few values are
    sorted; for many the index of a sort is too large, and the value is found bit by bit.

    Args:
        values: floats [rows, columns], none of them NaN.
        ranks: counted from 1, int64 [rows], on the processor.

    Returns:
        [rows, 1], of the values' dtype.
    """
    if on_processor(values):
        # numpy has no bfloat16; float32 holds its numbers exactly.
        numbers = values.float() if values.dtype == torch.bfloat16 else values
        found = numbers.new_empty(len(numbers), 1)
        for rank in ranks.unique().tolist():
            rows = ranks == rank
            part = numbers if bool(rows.all()) else numbers[rows]
            placed = np.partition(part.numpy(), rank - 1, axis=1)[:, rank - 1 : rank]
            found[rows] = torch.from_numpy(placed)
        return found.to(values.dtype)
    wanted = ranks.to(values.device, non_blocking=True).unsqueeze(1)
    if values.numel() <= SORTED:
        return values.sort(dim=1).values.gather(1, wanted - 1)
    integers = INTEGERS[values.dtype.itemsize]
    least, most = torch.iinfo(integers).min, torch.iinfo(integers).max
    sign = 8 * values.dtype.itemsize - 1

    def ordered(bits: Tensor) -> Tensor:
        """Integers in the order of the floats whose bits they are, and back."""
        return bits ^ ((bits >> sign) & most)

    keys = ordered(values.view(integers))
    low = torch.full((len(keys), 1), least, dtype=integers, device=keys.device)
    for place in range(sign, -1, -1):
        higher = low ^ (least if place == sign else 1 << place)
        below = (keys < higher).sum(dim=1, keepdim=True)
        low = torch.where(below < wanted, higher, low)
    return ordered(low).view(values.dtype)


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
