"""Safetensors files that are written again with other values in their places. No model is known."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from prunewright.tools.fast import INTEGERS

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""What safetensors calls the dtypes of weights."""
Live = Callable[[str], Tensor | None]
"""The value that a stored tensor has now, by its name; None: it is to stay as it is."""


def read_header(path: Path) -> dict[str, Any]:
    """Each tensor's ``dtype``, ``shape`` and ``data_offsets`` (from the end of the header)."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: place for name, place in header.items() if name != "__metadata__"}


def rewrite(source: Path, target: Path, live: Live) -> None:
    """Copy a file with the values of some tensors changed, one tensor in memory at a time.

    Header, metadata, order and dtypes stay, and so does every bit of a tensor that has the stored
    values.
    """
    shutil.copyfile(source, target)
    with source.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    with safe_open(source, framework="pt") as stored, target.open("r+b") as out:
        for name, place in read_header(source).items():
            now = live(name)
            before = None if now is None else stored.get_tensor(name)
            if now is None or before is None or has_values(now, before):
                continue
            out.seek(start + place["data_offsets"][0])
            new = merge(before, now.cpu())
            out.write(new.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def has_values(live: Tensor, stored: Tensor) -> bool:
    """Whether a tensor's values are the stored ones, in its dtype, bit for bit."""
    return torch.equal(_bits(stored.to(live.dtype)), _bits(live.cpu()))


def would_be(live: Tensor, loaded: Tensor, dtypes: Iterable[str]) -> bool:
    """Whether a live tensor, written in one of some dtypes as `merge` does, is loaded so.

    Args:
        live: of any device.
        loaded: of its shape and dtype.
        dtypes: as safetensors names them.
    """
    live = live.cpu()
    if torch.equal(_bits(loaded), _bits(live)):
        return True
    same = _bits(loaded) == _bits(live)
    for dtype in filter(None, map(DTYPES.get, dtypes)):
        same |= _bits(loaded) == _bits(_fit(live, dtype).to(live.dtype))
    return bool(same.all())


def merge(stored: Tensor, live: Tensor) -> Tensor:
    """The values to write in place of the stored ones, in their dtype.

    Where the live value is the stored one in the dtype of computing, it is the stored one, exactly;
    else the live one. What the stored dtype cannot hold becomes the nearest number that it has,
    never an infinity, and 0 only where the live value is 0.

    Args:
        stored: as in the file, of a float dtype.
        live: of its shape, in the dtype that was computed in.
    """
    if live.dtype == stored.dtype:
        return live
    same = _bits(stored.to(live.dtype)) == _bits(live)
    # What the dtype of computing rounds to 0 has been counted as 0.
    return torch.where(same & ((live != 0) | (stored == 0)), stored, _fit(live, stored.dtype))


def _fit(values: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    fitted = values.double().clamp(info.min, info.max).to(dtype)
    smallest = torch.tensor(info.tiny * info.eps, dtype=dtype)
    lost = (fitted == 0) & (values != 0)
    return torch.where(lost, smallest.copysign(values.to(dtype)), fitted)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGERS[tensor.dtype.itemsize]) if tensor.is_floating_point() else tensor
