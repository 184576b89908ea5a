"""The live weights of prunable layers: where they are read, and how they are changed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunewright.tools.fast import INTEGERS, on_processor, unpack_bits, write_masked
from prunewright.tools.model.layers import Layer
from prunewright.tools.store.revisions import StoredLayer


class LiveWeights:
    """Live weights that lie in the model's parameters."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def read(self, layer: Layer) -> Tensor:
        """A layer's live weights, which must not be written to."""
        return self._model.get_parameter(layer.parameter).data

    def home(self, layer: Layer) -> tuple[torch.device, torch.dtype]:
        """Where a layer's live weights lie between passes, and the dtype of what lies there."""
        weight = self._model.get_parameter(layer.parameter)
        return weight.device, weight.dtype

    def place(self, layer: Layer) -> tuple[torch.device, torch.dtype]:
        """Where a layer computes, and in which dtype.

        That need not be the model's: some classes keep modules in float32 whatever is asked for.
        """
        return self.home(layer)

    def write(self, layer: Layer, values: Tensor) -> None:
        """Change a layer's live weights.

        Args:
            layer: which.
            values: of its shape, on any device, in a dtype that is converted.
        """
        self.read(layer).copy_(values)

    def restore(self, layer: Layer, dense: Tensor, stored: StoredLayer | None) -> None:
        """Set a layer to what a revision holds of it.

        Args:
            layer: which.
            dense: its dense weights, as `home` says.
            stored: its packed mask, and the kept values if a solve changed them; None: dense.
        """
        weight = self.read(layer)
        if stored is None:
            weight.copy_(dense)
        else:
            self._write_stored(weight, dense, stored)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let all live weights be the model's parameters, for whoever reads them there."""
        yield

    @contextmanager
    def lent(self, layers: list[Layer]) -> Iterator[list[Tensor]]:
        """Let layers have values of their own, which a training may write to in place.

        Args:
            layers: of the block that is at work.

        Yields:
            What they have; the model's parameters hold these tensors while the ``with`` block runs,
            and the live weights again after it.
        """
        parameters = [self._model.get_parameter(layer.parameter) for layer in layers]
        before = [parameter.data for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.data = parameter.data.clone()
            yield [parameter.data for parameter in parameters]
        finally:
            for parameter, data in zip(parameters, before, strict=True):
                parameter.data = data

    def let_go(self, layer: Layer) -> None:
        """Say that a layer's live weights are not read again before they are written."""

    def _write_stored(self, weight: Tensor, dense: Tensor, stored: StoredLayer) -> None:
        integers = INTEGERS[weight.dtype.itemsize]
        kept = unpack_bits(~stored.bits.to(weight.device), weight.numel())
        if on_processor(weight):
            # Used again for each layer, since fresh memory costs more time than the product.
            if len(self._scratch) < weight.nbytes:
                self._scratch = torch.empty(weight.nbytes, dtype=torch.uint8)
            kept = self._scratch[: weight.nbytes].view(integers).copy_(kept)
        kept = kept.to(integers).view(weight.shape)
        write_masked(weight, dense, kept)
        if stored.kept is not None:
            weight.masked_scatter_(kept.bool(), stored.kept.to(weight.device))
