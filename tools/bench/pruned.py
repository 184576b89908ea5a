"""A model that was pruned before, by whomever: its zeros and kept weights as a revision."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunewright.state import InputError
from prunewright.state.run import DENSE
from prunewright.tools.fast import is_finite
from prunewright.tools.model.checkpoint import read_configuration
from prunewright.tools.model.head import Progress, told
from prunewright.tools.model.layers import Layer
from prunewright.tools.model.loading import load_files, resolve_directory

if TYPE_CHECKING:
    from prunewright.tools.bench.workbench import Workbench

ALIKE = 0.01
"""How far what is not pruned may be from the dense model's, relative to its norm: it may have been
stored in another precision."""


class PrunedCopy:
    """The layers of a pruned copy of a bench's model, read from its files."""

    def __init__(self, bench: "Workbench", name: str) -> None:
        """Open it, and check that it is one.

        Args:
            bench: the dense model.
            name: of the copy, a local directory or hub name.

        Raises:
            InputError: no such model, another model, or one that is not pruned.
        """
        self._bench, self._name = bench, name
        directory = resolve_directory(name)
        own, other = (
            read_configuration(place).get("architectures")
            for place in (bench.loaded.directory, directory)
        )
        if own != other:
            raise self._refused(f"the one is {_listed(other)}, the other {_listed(own)}")
        dtype = str(bench.loaded.dtype).removeprefix("torch.")
        self._model = load_files(
            directory, trust_remote_code=bench.request.trust_remote_code, dtype=dtype
        )
        self._check()

    def _check(self) -> None:
        """Refuse a copy that is none.

        Raises:
            InputError: saying why.
        """
        loaded = self._bench.loaded
        self._bench.sync(DENSE)
        layers = {layer.parameter: layer for layer in loaded.layers.values()}
        own, zeros = dict(self._model.named_parameters()), 0
        for name, parameter in loaded.model.named_parameters():
            other = own.get(name)
            if other is None or other.shape != parameter.shape:
                shape = "none" if other is None else f"one of shape {list(other.shape)}"
                raise self._refused(
                    f"{name} is of shape {list(parameter.shape)}, and it has {shape}"
                )
            if not is_finite(other.data):
                raise InputError(f"{self._name} is broken: {name} holds values that are not finite")
            if name not in layers:
                self._check_alike(name, parameter.data, other.data)
                continue
            gone = int((other == 0).sum())
            zeros += max(gone - self._bench.dense_zeros[layers[name].name], 0)
            if gone <= self._bench.dense_zeros[layers[name].name]:
                self._check_alike(name, parameter.data, other.data)
        if not zeros:
            raise InputError(
                f"{self._name} is not pruned: its layers have no more zeros than those of "
                f"{self._bench.request.model}. Prune it first: prunewright run"
            )

    def _check_alike(self, name: str, dense: Tensor, other: Tensor) -> None:
        """Refuse other values where nothing is pruned."""
        there = other.to(dense.device, torch.float32)
        distance = torch.linalg.vector_norm(there - dense.float())
        if distance > ALIKE * torch.linalg.vector_norm(dense.float()):
            raise self._refused(f"{name}, where nothing is pruned, has other values")

    def _refused(self, why: str) -> InputError:
        model = self._bench.request.model
        return InputError(
            f"{self._name} is no pruned copy of {model}: {why}. Name the dense model that it was "
            "made from: --model"
        )

    def store(self, progress: Progress | None = None) -> str:
        """The revision that it is: its zeros are masks, and what is left keeps its values.

        Args:
            progress: told of each layer.

        Raises:
            StoreError: cannot write.
        """
        bench = self._bench
        layers = list(bench.loaded.layers.values())
        with bench.store.writer({}, {"parent": DENSE, "pruned": self._name}) as writer:
            pairs = zip(layers, bench.loaded.dense_layers(layers), strict=True)
            for layer, dense in told("reading the pruned model", pairs, len(layers), progress):
                weight = self._weight(layer, dense)
                mask = weight == 0
                kept = None if torch.equal(weight, dense.masked_fill(mask, 0)) else weight
                writer.add(layer.name, mask, kept, own=bench.dense_zeros[layer.name])
        return writer.revision

    def _weight(self, layer: Layer, dense: Tensor) -> Tensor:
        return self._model.get_parameter(layer.parameter).data.to(dense.device, dense.dtype)


def _listed(names: object) -> str:
    return ", ".join(map(str, names)) if isinstance(names, list) and names else "of no named class"
