"""Pruning block by block with an update of the kept weights, on what the pruned blocks give."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunewright.tools import reconstruction
from prunewright.tools.blocks import BlockRunner
from prunewright.tools.criteria import LayerStatistics, expert_share, prune_mask, sparsegpt
from prunewright.tools.layers import Layer
from prunewright.tools.models import LoadedModel
from prunewright.tools.perplexity import Progress

PASSES = 3
"""Times that the windows go through the blocks; once more, for the dense model, to reconstruct."""


@dataclass(frozen=True)
class Wanted:
    """What shall become of a layer: a mask that is given, or a number or pattern to choose one by.

    Attributes:
        mask: True where pruned, of the parameter's shape; its kept weights are reconstructed.
        pruned: weights that SparseGPT shall prune.
        pattern: ``(keep_n, group_m)`` for SparseGPT.
    """

    mask: Tensor | None = None
    pruned: int | None = None
    pattern: tuple[int, int] | None = None


@dataclass(frozen=True)
class Solved:
    """A layer's mask, True where pruned, and its weights, 0 there; of the parameter's shape."""

    mask: Tensor
    weight: Tensor


_Key = tuple[str, int]
"""A layer and the index of its expert, 0 where nothing is fused."""


@dataclass
class _Grams:
    """X^T X, and Y^T X with the dense model's inputs Y, of the layers of a block.

    Layers that are given the same tensor (queries, keys and values) share one.
    """

    gram: dict[_Key, Tensor] = field(default_factory=dict)
    cross: dict[_Key, Tensor] = field(default_factory=dict)
    tokens: dict[_Key, int] = field(default_factory=dict)
    leaders: dict[_Key, _Key] = field(default_factory=dict)
    dense: dict[_Key, Tensor] = field(default_factory=dict)
    """Inputs of the dense model's layers for the window in hand."""
    _last: tuple[Tensor, _Key] | None = None

    def see_dense(self, layer: Layer, expert: int | None, inputs: Tensor, _: Tensor) -> None:
        """Keep what a dense layer is given; experts may be given other tokens, so not theirs."""
        if expert is None:
            self.dense[layer.name, 0] = inputs.reshape(-1, inputs.shape[-1])

    def see(self, layer: Layer, expert: int | None, inputs: Tensor, _: Tensor) -> None:
        """Add what a layer is given now."""
        key = (layer.name, expert or 0)
        last, self._last = self._last, (inputs, key)
        if last is not None and _same(last[0], inputs):
            self.leaders[key] = self.leaders[last[1]]
            return
        self.leaders[key] = key
        rows = inputs.reshape(-1, inputs.shape[-1])
        x = rows.float()
        if key not in self.gram:
            self.gram[key] = x.new_zeros(x.shape[1], x.shape[1])
            self.tokens[key] = 0
        self.gram[key].addmm_(x.T, x)
        self.tokens[key] += len(x)
        if (y := self.dense.get(key)) is not None:
            if key not in self.cross:
                self.cross[key] = torch.zeros_like(self.gram[key])
            self.cross[key].addmm_(y.float().T, x)

    def next_window(self) -> None:
        """Forget what belongs to one window."""
        self.dense.clear()
        self._last = None


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, both alive, are views of the same values."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


def solve_blocks(
    loaded: LoadedModel,
    windows: Tensor,
    wanted: dict[str, Wanted],
    *,
    reconstruct: bool,
    progress: Progress | None = None,
) -> tuple[dict[str, Solved], list[str]]:
    """Prune some layers block by block, each on what the blocks before it give once pruned.

    A layer whose mask is given is reconstructed: its outputs are drawn to those that the dense
    model's layer has for the same tokens, so that it makes up for the blocks before it, too. The
    others are pruned by SparseGPT, and reconstructed on its masks if ``reconstruct`` says so.

    Args:
        loaded: the model; layers that are not wanted keep their live weights. With
            ``reconstruct`` these are dense.
        windows: calibration token ids [windows, length].
        wanted: what to prune.
        reconstruct: see above.
        progress: told after each window of the first pass, and after each block.

    Returns:
        What was found by layer, in the model's dtype, on the processor; and notes on layers that
        needed more damping or were left without an update. The live model has these weights.

    Raises:
        InputError: this model's blocks cannot be run one by one.
        ValueError: a layer's inputs do not divide into groups of a pattern.
    """
    runner = BlockRunner(loaded, windows, progress)
    by_block: dict[int, list[Layer]] = {}
    for layer in loaded.layers.values():
        if layer.name in wanted:
            by_block.setdefault(layer.block, []).append(layer)
    last = max(by_block, default=-1)
    now = runner.first
    """What enters the block, by window."""
    ideal = now
    """What enters it in the dense model."""
    solved: dict[str, Solved] = {}
    notes: list[str] = []
    for index in range(last + 1):
        layers = by_block.get(index, [])
        dense = {ly.name: d for ly, d in zip(layers, loaded.dense_layers(layers), strict=True)}
        grams = _Grams()
        following = []
        _start(loaded, layers, dense, wanted)
        for window, hidden in enumerate(now if layers else []):
            if reconstruct:
                with _in_place(loaded, layers, dense):
                    left = runner.run(index, window, ideal[window], grams.see_dense, layers)
                following.append(left)
            runner.run(index, window, hidden, grams.see, layers)
            grams.next_window()
        for layer in layers:
            found, words = _solve(layer, dense[layer.name], wanted[layer.name], grams, reconstruct)
            loaded.weight(layer).copy_(found.weight)
            solved[layer.name] = Solved(found.mask.cpu(), loaded.weight(layer).cpu().clone())
            notes += words
        if index < last:
            apart = ideal is not now or bool(following)
            if apart and not following:
                following = [runner.run(index, w, hidden) for w, hidden in enumerate(ideal)]
            now = [runner.run(index, w, hidden) for w, hidden in enumerate(now)]
            ideal = following if apart else now
        if progress is not None:
            progress("solving blocks", index + 1, last + 1)
    return solved, notes


def _start(
    loaded: LoadedModel, layers: list[Layer], dense: dict[str, Tensor], wanted: dict[str, Wanted]
) -> None:
    """Give layers the weights that a block is first seen with: dense, or masked if it is known."""
    for layer in layers:
        weight, mask = loaded.weight(layer).copy_(dense[layer.name]), wanted[layer.name].mask
        if mask is not None:
            weight.masked_fill_(mask.to(weight.device), 0)


@contextmanager
def _in_place(
    loaded: LoadedModel, layers: list[Layer], weights: dict[str, Tensor]
) -> Iterator[None]:
    """Other tensors in the place of some layers' weights, inside the block."""
    parameters = {ly.name: loaded.model.get_parameter(ly.parameter) for ly in layers}
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def _solve(
    layer: Layer, dense: Tensor, wanted: Wanted, grams: _Grams, reconstruct: bool
) -> tuple[Solved, list[str]]:
    """One layer, expert by expert, of the parameter's shape; and what must be told of it."""
    matrix = layer.matrix(dense)
    fused = matrix.ndim == 3
    experts = list(matrix) if fused else [matrix]
    given = None if wanted.mask is None else layer.matrix(wanted.mask.to(dense.device))
    masks, weights, notes = [], [], []
    for index, weight in enumerate(experts):
        key = (layer.name, index)
        name = f"{layer.name}, expert {index}" if fused else layer.name
        leader = grams.leaders.get(key)
        gram = None if leader is None else grams.gram[leader]
        if given is not None:
            mask = given[index] if fused else given
            found = weight.float().masked_fill(mask, 0)
        else:
            share = wanted.pruned and expert_share(wanted.pruned, index, len(experts))
            mask, found, words = _sparsegpt(weight, gram, share, wanted.pattern, name)
            notes += words
        if not mask.any():
            found = weight  # dense, and stays so
        elif reconstruct and gram is not None:
            assert leader is not None
            better = reconstruction.solve(weight, mask, gram, grams.cross.get(leader))
            if bool(better.isfinite().all()):
                found = better
            else:
                notes.append(f"{name}: its solve is not finite, so its weights are not updated")
        elif gram is None:
            notes.append(f"{name}: saw no calibration token, so its weights are not updated")
        masks.append(mask)
        weights.append(found)
    mask, found = (torch.stack(masks), torch.stack(weights)) if fused else (masks[0], weights[0])
    return Solved(layer.matrix(mask), layer.matrix(found.to(dense.dtype))), notes


def _sparsegpt(
    weight: Tensor,
    gram: Tensor | None,
    pruned: int | None,
    pattern: tuple[int, int] | None,
    name: str,
) -> tuple[Tensor, Tensor, list[str]]:
    """Mask and weights of one matrix; by magnitude where no token came, and without an update
    where no damping helps."""
    found = None
    if gram is not None:
        found = sparsegpt.prune(weight, gram, pruned=pruned, pattern=pattern)
        if found is not None:
            mask, updated, damping = found
            if damping == sparsegpt.DAMPINGS[0]:
                return mask, updated, []
            return mask, updated, [f"{name}: solved with a damping of {damping:g}"]
    squares = torch.ones(weight.shape[1], device=weight.device)
    notes = []
    if gram is not None:
        squares = gram.diagonal().nan_to_num()
        notes = [f"{name}: cannot be solved with any damping, so its weights are not updated"]
    mask = prune_mask(weight, LayerStatistics(squares), "sparsegpt", pruned=pruned, pattern=pattern)
    return mask, weight.float().masked_fill(mask, 0), notes
