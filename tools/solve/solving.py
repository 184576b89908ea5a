"""The kept weights of a pruned model, solved block by block, and a sweep that prunes by itself."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from prunewright.state import PruneRequest
from prunewright.state.config import Reconstruct
from prunewright.state.metrics import SOLVING
from prunewright.tools.criteria import (
    LayerStatistics,
    expert_shares,
    find_criterion,
    fisher,
    prune_mask,
    sparsegpt,
)
from prunewright.tools.execution.base import Enough, Run
from prunewright.tools.fast import unpack_bits
from prunewright.tools.model.head import Progress
from prunewright.tools.model.layers import Layer
from prunewright.tools.model.loading import LoadedModel
from prunewright.tools.solve import reconstruction
from prunewright.tools.solve.fit import Fit, fit_block, held_out
from prunewright.tools.store.revisions import StoredLayer


def solves(request: PruneRequest) -> bool:
    """Whether weights that are kept get other values, which is done block by block."""
    return request.reconstruct != "none" or find_criterion(request.criterion).solves


@dataclass(frozen=True)
class Wanted:
    """What shall become of a layer: a mask that is given, or a number or pattern to choose one by.

    Attributes:
        bits: the packed mask of a layer whose kept weights are reconstructed, on the processor.
        pruned: weights that the criterion's sweep shall prune, the layer's own zeros included.
        pattern: ``(keep_n, group_m)`` for it.
        gradient_square: E[d_i^2] [outputs] or [experts, outputs], if anything weighs outputs.
        shrinkage: what the sweep adds of its own diagonal to X^T X (`sparsegpt.prune`).
    """

    bits: Tensor | None = None
    pruned: int | None = None
    pattern: tuple[int, int] | None = None
    gradient_square: Tensor | None = None
    shrinkage: float = 0.0

    def mask(self, layer: Layer, device: torch.device) -> Tensor | None:
        """The mask that is given, True where pruned, of the parameter's shape; None: none is."""
        if self.bits is None:
            return None
        flags = unpack_bits(self.bits.to(device), layer.numel)
        return flags.view(torch.bool).view(layer.shape)


@dataclass(frozen=True)
class Solved:
    """What became of a layer.

    Attributes:
        name: the layer's.
        mask: True where pruned, of the parameter's shape, on the device.
        weight: its weights, 0 there, in the model's dtype, on the device.
        notes: what must be told: that it needed more damping, or was left without an update.
    """

    name: str
    mask: Tensor
    weight: Tensor
    notes: list[str]


_Key = tuple[str, int]
"""A layer and the index of its expert, 0 where nothing is fused."""


@dataclass
class _Grams:
    """X^T X of the layers of a block, float32.

    Layers that are given the same tensor (queries, keys and values) share one.

    Attributes:
        later: layers whose inputs are not wanted: a window that comes to one has been seen.
    """

    later: dict[str, Layer] = field(default_factory=dict)
    _grams: dict[_Key, Tensor] = field(default_factory=dict)
    _tokens: dict[_Key, Tensor] = field(default_factory=dict)
    _leaders: dict[_Key, _Key] = field(default_factory=dict)
    _means: dict[_Key, Tensor] = field(default_factory=dict)
    _last: tuple[Tensor, _Key] | None = None

    def of(self, key: _Key, alike: list[_Key]) -> tuple[Tensor | None, bool]:
        """That of a matrix, None if it is not known; and whether its like stands in for tokens.

        An expert that saw fewer tokens than it has inputs is given the mean of its like for those
        that it lacks: its own say nothing of most directions, and the update of the kept weights
        would be fitted to chance. Measured on SmolLM2-135M (gate projections of three blocks, half
        of the weights pruned, tokens routed to eight clusters): with 64 tokens for 576 inputs the
        error of the outputs on other tokens falls by 27 to 43 %, below that of no update.

        Args:
            key: the matrix.
            alike: the experts whose inputs mean the same, it among them; empty if there are none.
        """
        own = self._grams[self._leaders[key]] if key in self._leaders else None
        seen = [self._leaders[one] for one in alike if one in self._leaders]
        if len(alike) < 2 or not seen:
            return own, False
        inputs = len(self._grams[seen[0]])
        lacking = inputs if own is None else inputs - int(self._tokens[self._leaders[key]])
        if lacking <= 0:
            return own, False
        if alike[0] not in self._means:
            total = torch.stack([self._tokens[one] for one in seen]).sum()
            self._means[alike[0]] = sum(
                (self._grams[one] / total for one in seen[1:]), self._grams[seen[0]] / total
            )
        mean = self._means[alike[0]] * lacking
        return mean if own is None else own + mean, True

    def see(self, layer: Layer, expert: int | None, inputs: Tensor, _: Tensor) -> None:
        """Add what a layer is given now."""
        if layer.name in self.later:
            raise Enough
        key = (layer.name, expert or 0)
        last, self._last = self._last, (inputs, key)
        if last is not None and _same(last[0], inputs):
            self._leaders[key] = self._leaders[last[1]]
            return
        self._leaders[key] = key
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        if key not in self._grams:
            self._grams[key] = x.new_zeros(x.shape[1], x.shape[1])
            self._tokens[key] = torch.zeros((), dtype=torch.int64, device=x.device)
        self._grams[key].addmm_(x.T, x)
        # A batched product gives an expert zeros in place of the tokens that are not its own.
        self._tokens[key] += x.any(dim=1).sum()


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, both alive, are views of the same values."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


class BlockSolver:
    """Solves some layers block by block, each on what the blocks before it give once pruned.

    A layer whose mask is given is reconstructed: its outputs are drawn to what its dense weights
    make of the same inputs. The others are pruned by the sweep of the criterion. (To draw layers to
    the outputs of the dense model, whose inputs are others, was tried: what is fitted to inputs
    that are half noise shrinks, block after block, and SmolLM2-135M broke.) With ``block`` each
    block as a whole is then fitted to what the dense block makes of the dense model's hidden
    states: a nonlinear map of many weights makes up for such inputs.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        wanted: dict[str, Wanted],
        *,
        criterion: str = "sparsegpt",
        reconstruct: Reconstruct = "none",
        fit: Fit | None = None,
    ) -> None:
        """Make it.

        Args:
            loaded: the model; layers that are not wanted keep their live weights.
            wanted: what to solve.
            criterion: one that solves, for layers whose mask is not given.
            reconstruct: what is done to the weights that are left.
            fit: how blocks are fitted, with ``block``.
        """
        self._loaded, self._execution = loaded, loaded.execution
        self._wanted, self._criterion = wanted, criterion
        self._reconstruct, self._fit = reconstruct, fit or Fit()
        self._blocks: dict[int, list[Layer]] = {}
        for layer in loaded.layers.values():
            if layer.name in wanted:
                self._blocks.setdefault(layer.block, []).append(layer)

    def solve(
        self,
        windows: Tensor,
        take: Callable[[list[Solved]], None],
        known: Callable[[Layer], StoredLayer | None] = lambda _: None,
        progress: Progress | None = None,
    ) -> int:
        """Solve the wanted layers.

        Args:
            windows: calibration token ids [windows, length].
            take: is given the layers of each block once they are solved.
            known: what a layer came to that was solved before, which is taken as it is.
            progress: told of each block, layer and step of a fit; it may raise to stop.

        Returns:
            The tokens that went through the model. The live weights of the wanted layers must be
            set before they are used again.

        Raises:
            InputError: this model's blocks cannot be run one by one.
            ValueError: a layer's inputs do not divide into groups of a pattern.
        """
        if not self._blocks:
            return 0
        last, tell_all = max(self._blocks), progress or (lambda *_: None)
        dense: Tensor | None = None
        """What the dense model gives to the block at work, where that is another than what the
        pruned one does."""

        def visit(index: int, run: Run) -> Tensor:
            nonlocal dense
            layers = self._blocks.get(index, [])

            def tell(what: str, done: int, total: int) -> None:
                tell_all(f"solving block {index + 1} of {last + 1}: {what}", done, total)

            tell("layer", 0, len(layers))
            before = self._loaded.dense_layers(layers)
            weights = {ly.name: w for ly, w in zip(layers, before, strict=True)}
            target = self._target(run, layers, weights, dense)
            found = [known(layer) for layer in layers]
            if all(stored is not None for stored in found):
                for layer, stored in zip(layers, found, strict=True):
                    self._execution.weights.restore(layer, weights[layer.name], stored)
            else:
                tell_all(SOLVING, index, last + 1)
                take(self._solved(run, layers, weights, target, tell))
                tell_all(SOLVING, index + 1, last + 1)
            # No block needs what leaves the last one.
            states = run.entering if index == last else run()
            # A block that nothing is pruned in gives the dense model's states as long as it is
            # given them.
            dense = target if target is not None or dense is None else run(dense)
            for layer in layers:
                self._execution.weights.let_go(layer)
            return states

        return self._execution.visit(windows, last + 1, visit)

    def _target(
        self, run: Run, layers: list[Layer], weights: dict[str, Tensor], dense: Tensor | None
    ) -> Tensor | None:
        """What the dense block makes of the dense model's hidden states; None: nobody needs it."""
        if self._reconstruct != "block" or not layers:
            return None
        for layer in layers:
            self._execution.weights.write(layer, weights[layer.name])
        return run(dense)

    def _solved(
        self,
        run: Run,
        layers: list[Layer],
        weights: dict[str, Tensor],
        target: Tensor | None,
        tell: Progress,
    ) -> list[Solved]:
        """The layers of one block."""
        write = self._execution.weights.write
        for layer in layers:
            mask = self._wanted[layer.name].mask(layer, weights[layer.name].device)
            values = weights[layer.name]
            write(layer, values if mask is None else values.masked_fill(mask, 0))
        # What is held out of the fit is held out of its start, too.
        seen = run.windows if target is None else run.windows - held_out(run.windows)
        alike = _alike(layers, run.entering.shape[-1])
        done: dict[str, Solved] = {}
        for stage, later in self._stages(run, layers):
            grams = _Grams(later)
            with self._execution.observe(grams.see, [*stage, *later.values()]):
                run.partly(seen)
            for layer in stage:
                beside = alike.get((layer.form, layer.kind), [])
                done[layer.name] = self._layer(layer, weights[layer.name], grams, beside)
                write(layer, done[layer.name].weight)
                tell("layer", len(done), len(layers))
            del grams  # as large as the layer's inputs squared, and the fit has no use for it
        if target is not None:
            masks = {layer: done[layer.name].mask for layer in layers}
            model, held = self._loaded.model, self._execution.weights
            for layer, weight in fit_block(
                model, held, run, target, masks, self._fit, tell
            ).items():
                done[layer.name] = replace(done[layer.name], weight=weight)
                write(layer, weight)
        return [done[layer.name] for layer in layers]

    def _stages(self, run: Run, layers: list[Layer]) -> list[tuple[list[Layer], dict[str, Layer]]]:
        """The layers of a block in the order of its work, those given the same inputs together.

        So each is solved on what the layers before it give once they are solved.

        Returns:
            The layers of each part, and by name one that begins the part after it, at which a
            window can end; none where experts come in turn.
        """
        if self._reconstruct == "none":
            return [(layers, {})]
        kinds: list[list[tuple[tuple[int, ...], str]]] = []
        last: Tensor | None = None

        def see(layer: Layer, _: int | None, inputs: Tensor, __: Tensor) -> None:
            nonlocal last
            kind = (layer.form, layer.kind)
            if not any(kind in part for part in kinds):
                if last is not None and _same(last, inputs):
                    kinds[-1].append(kind)
                else:
                    kinds.append([kind])
            last = inputs

        with self._execution.observe(see, layers):
            run.window(0, run.entering)
        unseen = {(ly.form, ly.kind) for ly in layers} - {kind for part in kinds for kind in part}
        kinds += [sorted(unseen)] if unseen else []
        parts = [[ly for ly in layers if (ly.form, ly.kind) in part] for part in kinds]
        turns = any(len(part) > len(kind) for part, kind in zip(parts, kinds, strict=True))
        ends = [{} if turns else {ly.name: ly for ly in part} for part in parts[1:]]
        return list(zip(parts, [*ends, {}], strict=True))

    def _layer(self, layer: Layer, dense: Tensor, grams: _Grams, alike: list[_Key]) -> Solved:
        """One layer, expert by expert, of the parameter's shape."""
        matrix = layer.matrix(dense)
        fused = matrix.ndim == 3
        experts = list(matrix) if fused else [matrix]
        wanted = self._wanted[layer.name]
        given = wanted.mask(layer, dense.device)
        if given is not None:
            given = layer.matrix(given)
        shares = expert_shares(wanted.pruned, experts)
        masks, weights, notes, scarce = [], [], [], 0
        for index, weight in enumerate(experts):
            name = f"{layer.name}, expert {index}" if fused else layer.name
            gram, lacked = grams.of((layer.name, index), alike)
            scarce += lacked
            squares = wanted.gradient_square
            if squares is not None and fused:
                squares = squares[index]
            if given is not None:
                mask = given[index] if fused else given
                found = weight.float().masked_fill(mask, 0)
            else:
                mask, found, words = _sweep(
                    weight,
                    gram,
                    shares[index],
                    wanted.pattern,
                    squares if find_criterion(self._criterion).needs_gradients else None,
                    wanted.shrinkage,
                    self._criterion,
                    name,
                )
                notes += words
            if not mask.any():
                found = weight  # dense, and stays so
            elif self._reconstruct != "none" and gram is not None:
                better = reconstruction.solve(weight, mask, gram, squares)
                if bool(better.isfinite().all()):
                    found = better
                else:
                    notes.append(f"{name}: its solve is not finite, so its weights are not updated")
            elif gram is None:
                notes.append(f"{name}: saw no calibration token, so its weights are not updated")
            masks.append(mask)
            weights.append(found)
        if scarce:
            which = f"{scarce} of {len(experts)} in {layer.name}" if fused else layer.name
            notes.append(
                f"{which} saw fewer calibration tokens than inputs: for the missing ones stands "
                "the mean of their like"
            )
        mask, found = (torch.stack(m) if fused else m[0] for m in (masks, weights))
        found = layer.stored(found.to(dense.dtype))
        return Solved(layer.name, layer.stored(mask), found, notes)


def _alike(layers: list[Layer], width: int) -> dict[tuple[tuple[int, ...], str], list[_Key]]:
    """Experts of a block that are given its hidden states, by form and kind.

    Not their second matrices, whose inputs mean another thing in each expert.
    """
    found: dict[tuple[tuple[int, ...], str], list[_Key]] = {}
    for layer in layers:
        if layer.inputs == width != layer.outputs:
            experts = range(layer.form[0] if len(layer.form) == 3 else 1)
            found.setdefault((layer.form, layer.kind), []).extend((layer.name, i) for i in experts)
    return found


def _sweep(
    weight: Tensor,
    gram: Tensor | None,
    pruned: int | None,
    pattern: tuple[int, int] | None,
    gradient_square: Tensor | None,
    shrinkage: float,
    criterion: str,
    name: str,
) -> tuple[Tensor, Tensor, list[str]]:
    """Mask and weights of one matrix; by what is known of single weights, and without an update,
    where no token came or no damping helps."""
    dampings = find_criterion(criterion).dampings
    notes = []
    inputs = torch.ones(weight.shape[1], device=weight.device)
    if gram is not None:
        factors = None if gradient_square is None else fisher.damped(gradient_square)
        found = sparsegpt.prune(
            weight,
            gram,
            pruned=pruned,
            pattern=pattern,
            factors=factors,
            dampings=dampings,
            shrinkage=shrinkage,
        )
        if found is not None:
            mask, updated, damping = found
            if damping != dampings[0]:
                notes = [f"{name}: solved with a damping of {damping:g}"]
            return mask, updated, notes
        inputs = gram.diagonal().nan_to_num()
        notes = [f"{name}: cannot be solved with any damping, so its weights are not updated"]
    statistics = LayerStatistics(inputs, gradient_square)
    mask = prune_mask(weight, statistics, criterion, pruned=pruned, pattern=pattern)
    return mask, weight.float().masked_fill(mask, 0), notes
