"""The model run block by block: one block's weights on the device, the others' elsewhere.

Elsewhere is the machine's own memory, or the files that the weights came from, of which only masks
and what a solve changed are in memory. All windows that have room go through a block before the
next one comes. A family whose blocks cannot take windows in turn is run window by window, with
every block coming and going each time.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunewright.tools.execution.base import Execution
from prunewright.tools.execution.splitting import SplitError
from prunewright.tools.execution.weights import LiveWeights
from prunewright.tools.fast import pack_bits, same_bits
from prunewright.tools.model.head import Progress, hidden_states
from prunewright.tools.model.layers import Layer, named_blocks
from prunewright.tools.model.observe import OnProduct, ProductObserver
from prunewright.tools.store.revisions import StoredLayer

SMALL = 2**20
"""Bytes up to which a parameter of a block (a norm, a bias) stays on the device."""
STATES = 2**30
"""Bytes of hidden states that a pass on a processor holds at most; a GPU's are a quarter of what
it has free."""


@dataclass
class _Moved:
    """A parameter that comes to the device with its block.

    Attributes:
        parameter: of the live model.
        home: its values elsewhere; the dense ones, if they lie in a file.
        dtype: of the values on the device.
        layer: the prunable layer, if it is one.
    """

    parameter: nn.Parameter
    home: Tensor
    dtype: torch.dtype
    layer: Layer | None


class OffloadedWeights(LiveWeights):
    """Live weights that are on the device only while their block is.

    Attributes:
        device: where the model computes.
        block: the block that is on the device now, if any.
        staying: layers that several blocks share, with their weights, which stay on the device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Mapping[str, Layer],
        device: torch.device,
        mapped: Mapping[str, Tensor] | None,
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        """Send a model's blocks away and the rest of it to the device.

        Args:
            model: on a processor.
            layers: its prunable layers, by name.
            device: where it computes.
            mapped: the dense weights of each layer as they lie in a file, by name; None where all
                are kept in memory.
            dtypes: of every parameter where it computes, by name.
        """
        super().__init__(model)
        self.device = device
        self._mapped = mapped is not None
        self._changed: dict[str, StoredLayer | Tensor] = {}
        """What layers have in place of the dense weights in their files."""
        self.block: int | None = None
        owners = {id(model.get_parameter(ly.parameter)): ly for ly in layers.values()}
        computing = {id(p): dtypes.get(name, p.dtype) for name, p in model.named_parameters()}
        blocks = [list(block.parameters()) for _, block in named_blocks(model)]
        uses = Counter(id(parameter) for block in blocks for parameter in block)
        self._moved: list[list[_Moved]] = []
        away = set()
        for block in blocks:
            self._moved.append([])
            for parameter in block:
                layer = owners.get(id(parameter))
                # What several blocks share would have to come with each of them.
                if uses[id(parameter)] > 1 or (layer is None and parameter.nbytes <= SMALL):
                    continue
                home = self._home(parameter, layer, mapped)
                self._moved[-1].append(_Moved(parameter, home, computing[id(parameter)], layer))
                parameter.data = home
                away.add(id(parameter))
        self._homes = {m.layer.name: m for block in self._moved for m in block if m.layer}
        for parameter in model.parameters():
            if id(parameter) not in away:
                parameter.data = parameter.data.to(device, computing[id(parameter)])
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self.staying = [
            (layer, self.read(layer)) for layer in layers.values() if layer.name not in self._homes
        ]

    def _home(
        self, parameter: Tensor, layer: Layer | None, mapped: Mapping[str, Tensor] | None
    ) -> Tensor:
        if mapped is not None:
            return parameter.data if layer is None else mapped[layer.name]
        if self.device.type == "cuda":
            return parameter.data.pin_memory()
        return parameter.data.clone()

    def fetch(self, block: int) -> list[tuple[Layer, Tensor]]:
        """Bring a block to the device, and send away the one that is there.

        Returns:
            Its prunable layers with their weights on the device.
        """
        if self.block != block:
            self.release()
            # First, so that what is interrupted is sent away.
            self.block = block
            for moved in self._moved[block]:
                moved.parameter.data = self._made(moved)
        return [(m.layer, m.parameter.data) for m in self._moved[block] if m.layer is not None]

    def release(self) -> None:
        """Send the block away that is on the device."""
        for moved in [] if self.block is None else self._moved[self.block]:
            moved.parameter.data = moved.home
        self.block = None

    def _made(self, moved: _Moved) -> Tensor:
        """A parameter's live values, on the device; they may be those of its home itself."""
        values = moved.home.to(device=self.device, dtype=moved.dtype, non_blocking=True)
        changed = self._changed.get(moved.layer.name) if moved.layer is not None else None
        if isinstance(changed, Tensor):
            return changed.to(self.device, non_blocking=True)
        if changed is not None:
            made = torch.empty_like(values)
            self._write_stored(made, values, changed)
            return made
        return values

    def home(self, layer: Layer) -> tuple[torch.device, torch.dtype]:
        """As for weights that lie in the model's parameters."""
        moved = self._homes.get(layer.name)
        return super().home(layer) if moved is None else (moved.home.device, moved.home.dtype)

    def place(self, layer: Layer) -> tuple[torch.device, torch.dtype]:
        """As for weights that lie in the model's parameters."""
        moved = self._homes.get(layer.name)
        return super().home(layer) if moved is None else (self.device, moved.dtype)

    def read(self, layer: Layer) -> Tensor:
        """As for weights that lie in the model's parameters."""
        moved = self._homes.get(layer.name)
        return super().read(layer) if moved is None else self._made(moved)

    def write(self, layer: Layer, values: Tensor) -> None:
        """As for weights that lie in the model's parameters."""
        moved = self._homes.get(layer.name)
        if moved is None:
            super().write(layer, values)
            return
        if self._mapped:
            self._changed[layer.name] = _small(values.to("cpu", moved.dtype), moved)
        else:
            moved.home.copy_(values)
        self._renew(moved)

    def restore(self, layer: Layer, dense: Tensor, stored: StoredLayer | None) -> None:
        """As for weights that lie in the model's parameters."""
        moved = self._homes.get(layer.name)
        if moved is None:
            super().restore(layer, dense, stored)
            return
        if not self._mapped:
            if stored is None:
                moved.home.copy_(dense)
            else:
                self._write_stored(moved.home, dense, stored)
        elif stored is None:
            self._changed.pop(layer.name, None)
        else:
            self._changed[layer.name] = stored
        self._renew(moved)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """As for weights that lie in the model's parameters; all of them at once, in memory."""
        self.release()
        homes = self._homes.values()
        try:
            for moved in homes if self._mapped else ():
                assert moved.layer is not None
                moved.parameter.data = self.read(moved.layer).cpu()
            yield
        finally:
            for moved in homes:
                moved.parameter.data = moved.home

    def let_go(self, layer: Layer) -> None:
        """As for weights that lie in the model's parameters."""
        if self._mapped:
            self._changed.pop(layer.name, None)

    def _renew(self, moved: _Moved) -> None:
        """Bring what changed at home to the device, if its block is there."""
        assert moved.layer is not None
        if moved.layer.block == self.block:
            moved.parameter.data = self._made(moved)


def _small(values: Tensor, moved: _Moved) -> StoredLayer | Tensor:
    """Weights in little memory: as their mask, where the kept ones are the dense ones."""
    kept = values != 0
    if same_bits(moved.home.to(moved.dtype).masked_fill(~kept, 0), values):
        return StoredLayer(pack_bits(~kept))
    return values.clone()


class BlockByBlock(Execution):
    """Runs a model that has only one block's weights on the device at a time."""

    def __init__(
        self, model: PreTrainedModel, layers: dict[str, Layer], weights: OffloadedWeights
    ) -> None:
        """Make it.

        Args:
            model: the model, its blocks sent away.
            layers: its prunable layers, by name.
            weights: who brings a block to the device.
        """
        super().__init__(model, layers, weights.device)
        self.weights = self._offloaded = weights
        self._observers: list[tuple[ProductObserver, set[str]]] = []
        self._hooks = ExitStack()
        self._hooks.enter_context(super()._hooked())
        self._splitter.recompute = True
        self._splits: bool | None = None

    def _ready(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def ready(*args: Any, **keywords: Any) -> Any:
            weights = [*self._offloaded.fetch(index), *self._offloaded.staying]
            with ExitStack() as stack:
                # Here and not around the pass: a backward pass calls this from within a function
                # of torch, where no mode is on, or from a thread of its own.
                for observer, names in () if self._splitter.trying else self._observers:
                    observer.watch((ly, w) for ly, w in weights if ly.name in names)
                    stack.enter_context(observer)
                return forward(*args, **keywords)

        return ready

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        yield  # as they always are

    def groups(
        self,
        label: str,
        windows: Tensor,
        progress: Progress | None = None,
        *,
        gradients: bool = False,
    ) -> Iterator[Tensor]:
        """As of a whole model; progress counts the blocks of all passes."""
        groups = windows.split(self._at_most(windows, gradients=gradients))
        each = self._splitter.blocks * (2 if gradients else 1)
        done = 0

        def told() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(label, min(done, each * len(groups)), each * len(groups))

        if progress is not None:
            progress(label, 0, each * len(groups))
        before, self._splitter.told = self._splitter.told, told
        try:
            for number, group in enumerate(groups, 1):
                yield group.to(self.device)
                if progress is not None and done != each * number:
                    done = each * number
                    progress(label, done, each * len(groups))
        finally:
            self._splitter.told = before

    @property
    def window(self) -> int:
        """As of a whole model; here several windows go back together."""
        return self._splitter.window

    def hidden_states(self, ids: Tensor) -> Tensor:
        """As of a whole model."""
        # As for `_at_most`: a weight that blocks share is reached once by a plain backward pass.
        if not self._splits or (len(ids) == 1 and self._offloaded.staying):
            return hidden_states(self.model, ids)
        with self._splitter.splitting(ids):
            return hidden_states(self.model, ids)

    @contextmanager
    def observe(self, on_product: OnProduct, layers: list[Layer] | None = None) -> Iterator[None]:
        """As of a whole model."""
        chosen = list(self.layers.values()) if layers is None else layers
        names = {layer.name for layer in chosen}
        observer = ProductObserver([], on_product)
        self._observers.append((observer, names))
        try:
            yield
        finally:
            self._observers.remove((observer, names))

    def close(self) -> None:
        """Let go of the model."""
        self._offloaded.release()
        self._hooks.close()

    def _at_most(self, windows: Tensor, *, gradients: bool) -> int:
        """Windows of one pass: as many as their hidden states have room."""
        # Gradients of a weight that blocks share add up over them before anyone is told.
        if not self._splits_windows(windows) or (gradients and self._offloaded.staying):
            return 1
        config = self.model.config.get_text_config()
        state = windows.shape[1] * config.hidden_size * self.model.dtype.itemsize
        # What enters and what leaves a block; in a backward pass what enters each of them, and
        # gradients.
        held = state * (self._splitter.blocks + 3 if gradients else 3)
        return max(1, int(self._room() // held))

    def _room(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0]) // 4
        return min(STATES, psutil.virtual_memory().available // 4)

    def _splits_windows(self, windows: Tensor) -> bool:
        if self._splits is None:
            try:
                with self._splitter.splitting(windows[:2].to(self.device)):
                    self._splits = True
            except SplitError:
                self._splits = False
        return self._splits
