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

_LINEAR = torch.nn.functional.linear
_MATMUL = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


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
        outputs = func(*args, **(kwargs or {}))
        if func is _LINEAR or func in _MATMUL:
            inputs, weight = args[0], args[1] if len(args) > 1 else (kwargs or {}).get("weight")
        elif func is torch.addmm and len(args) == 3:
            inputs, weight = args[1], args[2]
        else:
            return outputs
        if isinstance(weight, Tensor):
            owner = self._owners.get(weight.data_ptr())
            if owner is not None:
                self._on_product(owner[0], owner[1], inputs, outputs)
        return outputs
