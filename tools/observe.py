"""Watching every product of a prunable weight while a model runs, whatever module makes it.

A `TorchFunctionMode` sees the calls of ``F.linear``, ``addmm`` and ``matmul`` themselves, so
Linear, GPT-2's Conv1D and the experts of a fused tensor are observed in one way, and leaving
the ``with`` block is all it takes to stop: there is no hook to forget on a module.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prunewright.tools.layers import Layer

OnProduct = Callable[[Layer, int | None, Tensor, Tensor], None]
"""Called with the layer, the expert's index (None: not fused), the inputs and the outputs."""

_OPERANDS: dict[Any, tuple[tuple[int, str], tuple[int, str]]] = {
    torch.nn.functional.linear: ((0, "input"), (1, "weight")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
    torch.matmul: ((0, "input"), (1, "other")),
    Tensor.matmul: ((0, "input"), (1, "other")),
    Tensor.__matmul__: ((0, "input"), (1, "other")),
    torch.mm: ((0, "input"), (1, "mat2")),
    Tensor.mm: ((0, "input"), (1, "mat2")),
}
"""Position and name of the two factors of each function that multiplies."""


class ProductObserver(TorchFunctionMode):
    """Calls ``on_product`` for each product of an observed weight inside the ``with`` block."""

    def __init__(self, weights: Iterable[tuple[Layer, Tensor]], on_product: OnProduct) -> None:
        super().__init__()
        self._on_product = on_product
        self._owners: dict[int, tuple[Layer, int | None]] = {}
        for layer, weight in weights:
            if weight.ndim == 2:
                self._owners[weight.data_ptr()] = (layer, None)
            else:
                for expert, matrix in enumerate(weight):
                    self._owners[matrix.data_ptr()] = (layer, expert)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        if func not in _OPERANDS:
            return outputs
        left, right = (
            args[position] if position < len(args) else kwargs.get(name)
            for position, name in _OPERANDS[func]
        )
        if owner := self._owner(right):
            self._on_product(*owner, left, outputs)
        elif owner := self._owner(left):
            # Mamba's weight @ inputs: the transposed product is observed in its place.
            flipped = outputs.transpose(-1, -2)
            self._on_product(*owner, right.transpose(-1, -2), flipped)
            return flipped.transpose(-1, -2)
        return outputs

    def _owner(self, factor: Any) -> tuple[Layer, int | None] | None:
        return self._owners.get(factor.data_ptr()) if isinstance(factor, Tensor) else None
