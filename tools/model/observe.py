"""Watching every product of a prunable weight while a model runs, whatever module makes it.

A `TorchFunctionMode` sees the calls of ``F.linear``, ``matmul``, ``einsum`` and others themselves,
so Linear, GPT-2's Conv1D, experts of a fused tensor one by one or in one batched product are
observed in one way, and leaving the ``with`` block is all it takes to stop: there is no hook to
forget on a module.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prunewright.tools.model.layers import Layer

OnProduct = Callable[[Layer, int | None, Tensor, Tensor], None]
"""Called with the layer, the expert's index (None: not fused), the inputs and the outputs."""

_FACTORS: dict[Any, tuple[tuple[int, str], tuple[int, str]]] = {
    torch.nn.functional.linear: ((0, "input"), (1, "weight")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
    Tensor.addmm: ((1, "mat1"), (2, "mat2")),
    torch.baddbmm: ((1, "batch1"), (2, "batch2")),
    Tensor.baddbmm: ((1, "batch1"), (2, "batch2")),
    torch.matmul: ((0, "input"), (1, "other")),
    Tensor.matmul: ((0, "input"), (1, "other")),
    Tensor.__matmul__: ((0, "input"), (1, "other")),
    torch.mm: ((0, "input"), (1, "mat2")),
    Tensor.mm: ((0, "input"), (1, "mat2")),
    torch.bmm: ((0, "input"), (1, "mat2")),
    Tensor.bmm: ((0, "input"), (1, "mat2")),
}
"""Position and name of the two factors of each function that multiplies."""
_GROUPED: set[Any] = {
    found
    for found in (
        getattr(torch, "_grouped_mm", None),
        getattr(torch.nn.functional, "grouped_mm", None),
    )
    if found is not None
}


@dataclass(frozen=True)
class _Product:
    """A product as ``left @ right``, whatever function makes it.

    Attributes:
        left: inputs [..., rows, inputs], or [inputs].
        right: the factor that may be a weight, [..., inputs, outputs].
        make: computes what the function returns, as ``left @ right`` is shaped.
        restore: turns that into what the function returns.
        ends: where the rows of each group end, of a grouped product.
    """

    left: Tensor
    right: Tensor
    make: Callable[[], Tensor]
    restore: Callable[[Tensor], Tensor]
    ends: Tensor | None = None


def _same(values: Tensor) -> Tensor:
    return values


def _transposed(values: Tensor) -> Tensor:
    return values.transpose(-1, -2)


def _products(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Product]:
    """What a call multiplies, seen with its one factor as the weight, and with the other."""
    if func is torch.einsum:
        return _einsum(args)
    if func not in _FACTORS and func not in _GROUPED:
        return []

    def make() -> Tensor:
        return cast(Tensor, func(*args, **kwargs))

    if func in _GROUPED:
        left, right = args[:2] if len(args) > 1 else (None, None)
        ends = kwargs.get("offs", args[2] if len(args) > 2 else None)
        if not (isinstance(ends, Tensor) and left.ndim == 2 and right.ndim == 3):
            return []
        return [_Product(left, right, make, _same, ends)]
    left, right = (
        args[position] if position < len(args) else kwargs.get(name)
        for position, name in _FACTORS[func]
    )
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return []
    if func is torch.nn.functional.linear:
        return [_Product(left, _transposed(right), make, _same)] if right.ndim == 2 else []
    found = [_Product(left, right, make, _same)] if right.ndim > 1 else []
    if left.ndim > 1 and right.ndim > 1:
        # Mamba's weight @ inputs: the transposed product is observed in its place.
        found.append(
            _Product(
                _transposed(right), _transposed(left), lambda: _transposed(make()), _transposed
            )
        )
    return found


def _einsum(args: tuple[Any, ...]) -> list[_Product]:
    """A sum over shared letters of two factors, written as a batched product."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if not isinstance(args[0], str) or len(operands) != 2 or "..." in args[0]:
        return []
    before, arrow, after = args[0].replace(" ", "").partition("->")
    first, _, second = before.partition(",")
    if not arrow or any(len(set(word)) < len(word) for word in (first, second)):
        return []
    found = []
    for x, w, left, right in ((first, second, *operands), (second, first, *operands[::-1])):
        batch = [c for c in w if c in x and c in after]
        inputs = [c for c in w if c in x and c not in after]
        outputs = [c for c in w if c not in x]
        rows = [c for c in x if c not in w]
        if set(rows) | set(batch) | set(outputs) != set(after) or not inputs or not outputs:
            continue
        size = dict(zip(x, left.shape, strict=True)) | dict(zip(w, right.shape, strict=True))
        a = _gathered(left, x, (batch, rows, inputs))
        b = _gathered(right, w, (batch, inputs, outputs))
        order = [*batch, *rows, *outputs]

        def restore(
            values: Tensor,
            shape: tuple[int, ...] = tuple(size[c] for c in order),
            places: tuple[int, ...] = tuple(order.index(c) for c in after),
        ) -> Tensor:
            return values.reshape(shape).permute(places)

        found.append(_Product(a, b, lambda a=a, b=b: torch.matmul(a, b), restore))  # type: ignore[misc]
    return found


def _gathered(values: Tensor, letters: str, groups: tuple[list[str], ...]) -> Tensor:
    """A factor with its dimensions in three groups; the first is left out where it is empty."""
    ordered = values.permute([letters.index(c) for group in groups for c in group])
    sizes = [
        torch.Size(values.shape[letters.index(c)] for c in group).numel()
        for group in groups
        if group or group is not groups[0]
    ]
    return ordered.reshape(sizes)


class ProductObserver(TorchFunctionMode):
    """Calls ``on_product`` for each product of an observed weight inside the ``with`` block."""

    def __init__(self, weights: Iterable[tuple[Layer, Tensor]], on_product: OnProduct) -> None:
        super().__init__()
        self._on_product = on_product
        self._owners: dict[int, tuple[Layer, int | None]] = {}
        self.watch(weights)

    def watch(self, weights: Iterable[tuple[Layer, Tensor]]) -> None:
        """Observe these weights from now on, and no others."""
        self._owners = {}
        for layer, weight in weights:
            matrix = layer.matrix(weight)
            if matrix.ndim == 2:
                self._owners[matrix.data_ptr()] = (layer, None)
            else:
                for expert, one in enumerate(matrix):
                    self._owners[one.data_ptr()] = (layer, expert)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for product in _products(func, args, kwargs or {}):
            if owners := self._owned(product.right):
                return product.restore(self._tell(product, owners, product.make()))
        return func(*args, **(kwargs or {}))

    def _owned(self, right: Tensor) -> list[tuple[Layer, int | None]]:
        """The weights that a factor is made of, one a matrix; empty unless it is all theirs."""
        places = itertools.product(*map(range, right.shape[:-2]))
        found = []
        for place in places:
            owner = self._owners.get(right[place].data_ptr() if place else right.data_ptr())
            if owner is None or right.shape[-2:] != (owner[0].inputs, owner[0].outputs):
                return []
            found.append(owner)
        return found

    def _tell(
        self, product: _Product, owners: list[tuple[Layer, int | None]], outputs: Tensor
    ) -> Tensor:
        """Tell of each matrix's part; returns the outputs through which the gradient must flow."""
        left = product.left
        if product.ends is not None:
            ends = product.ends.tolist()
            parts = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
            pieces = [outputs[part] for part in parts]
            for (layer, expert), part, piece in zip(owners, parts, pieces, strict=True):
                if len(piece):
                    self._on_product(layer, expert, left[part], piece)
            rest = outputs[ends[-1] :]
            return torch.cat([*pieces, rest]) if outputs.requires_grad else outputs
        if len(set(map(id, owners))) == 1 or product.right.ndim == 2:
            self._on_product(*owners[0], left, outputs)
            return outputs
        batch = outputs.shape[:-2]
        left = left.broadcast_to(*batch, *left.shape[-2:])
        shape = product.right.shape[:-2]
        index = torch.arange(len(owners)).view(shape).broadcast_to(batch).flatten().tolist()
        pieces = []
        for place, one in zip(itertools.product(*map(range, batch)), index, strict=True):
            layer, expert = owners[one]
            pieces.append(outputs[place])
            self._on_product(layer, expert, left[place], pieces[-1])
        return torch.stack(pieces).view(outputs.shape) if outputs.requires_grad else outputs


@dataclass(frozen=True)
class Use:
    """How products see a parameter: its ``form`` and whether it is ``transposed`` (see `Layer`).

    ``form`` is empty where they see less than whole matrices of it, or do not agree.
    """

    form: tuple[int, ...]
    transposed: bool


class UseObserver(TorchFunctionMode):
    """Finds out how the products inside the ``with`` block use some parameters.

    Attributes:
        uses: by parameter's name; those that take part in no product are missing.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.uses: dict[str, Use] = {}
        self._places = sorted((p.data_ptr(), name) for name, p in parameters.items() if p.numel())
        self._parameters = parameters

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for product in _products(func, args, kwargs or {}):
            self._see(product.right)
        return func(*args, **(kwargs or {}))

    def _see(self, right: Tensor) -> None:
        index = bisect.bisect_right(self._places, (right.data_ptr(), "\U0010ffff")) - 1
        if index < 0:
            return
        begin, name = self._places[index]
        parameter = self._parameters[name]
        offset, surplus = divmod(right.data_ptr() - begin, parameter.element_size())
        if offset >= parameter.numel() or surplus:
            return
        use = _use(parameter, right, offset)
        before = self.uses.setdefault(name, use)
        if before != use:
            self.uses[name] = Use((), False)


def _use(parameter: Tensor, right: Tensor, offset: int) -> Use:
    """What a factor that begins ``offset`` values into a parameter says of its matrices."""
    (inputs, outputs), (down, across) = right.shape[-2:], right.stride()[-2:]
    size = inputs * outputs
    whole = parameter.is_contiguous() and parameter.numel() % size == 0 and offset % size == 0
    batch = zip(right.shape[:-2], right.stride()[:-2], strict=True)
    whole = whole and all(length == 1 or stride % size == 0 for length, stride in batch)
    count = parameter.numel() // size
    if whole and (inputs == 1 or down == 1) and (outputs == 1 or across == inputs):
        form, transposed = (outputs, inputs), False
    elif whole and (outputs == 1 or across == 1) and (inputs == 1 or down == outputs):
        form, transposed = (inputs, outputs), True
    else:
        return Use((), False)
    return Use((count, *form) if count > 1 else form, transposed)
