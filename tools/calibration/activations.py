"""The forward pass of the calibration: how large the inputs of each layer are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prunewright.tools.calibration.observed import (
    accumulators,
    finished,
    mean_squares,
)
from prunewright.tools.model.head import Progress
from prunewright.tools.model.layers import Layer
from prunewright.tools.model.loading import LoadedModel


@dataclass(frozen=True)
class Activations:
    """Input statistics of all layers at one revision.

    Attributes:
        input_square: E[x_j^2] by layer, float32 [inputs] or [experts, inputs], over the tokens
            that are routed to an expert (`mean_squares`).
        notes: what a reader must know, such as experts that few tokens reached.
    """

    input_square: dict[str, Tensor]
    notes: list[str]


@torch.no_grad()
def measure_activations(
    loaded: LoadedModel, windows: Tensor, progress: Progress | None = None
) -> Activations:
    """E[x_j^2] of every layer's inputs. The pass ends after the last block: no logits.

    Args:
        loaded: the model, at the revision to measure.
        windows: token ids [windows, length].
        progress: told after each window.

    Raises:
        InputError: a layer took part in no product, or its inputs are not finite.
    """
    squares, counts = accumulators(loaded, inputs=True)

    def on_product(layer: Layer, expert: int | None, inputs: Tensor, _: Tensor) -> None:
        tokens = inputs.reshape(-1, inputs.shape[-1])
        norms = torch.linalg.vector_norm(tokens, dim=0, dtype=torch.float32)
        index = expert or 0
        squares[layer.name][index] += norms.to(squares[layer.name].dtype).square()
        # A batched product gives an expert zeros in place of the tokens that are not its own.
        seen = len(tokens) if expert is None else int(tokens.ne(0).any(dim=1).sum())
        counts[layer.name][index] += seen

    execution = loaded.execution
    with execution.observe(on_product):
        for group in execution.groups("activations", windows, progress):
            execution.hidden_states(group)
    means, notes = mean_squares(loaded, squares, counts, windows.numel())
    return Activations(
        {name: finished(means[name], layer, "inputs") for name, layer in loaded.layers.items()},
        notes,
    )
