"""The backward pass of the calibration: how the loss feels each layer."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from prunewright.tools.calibration.observed import (
    accumulators,
    fill_from_afar,
    fill_unseen,
    finished,
    live_weights,
    unseen_words,
)
from prunewright.tools.model.head import TOKENS_AT_ONCE, Head, Progress, hidden_states, told
from prunewright.tools.model.layers import Layer, named_blocks
from prunewright.tools.model.loading import LoadedModel
from prunewright.tools.model.observe import ProductObserver


@dataclass(frozen=True)
class Gradients:
    """Gradient statistics of all layers at one revision.

    Attributes:
        mean_absolute: g, the mean over samples and active weights of |dL_i/dW|.
        gradient_square: E[d_i^2] by layer, float32 [outputs] or [experts, outputs].
        weight_gradient_square: mean over samples of (dL_i/dW)^2 by layer, float32, in the form
            [..., outputs, inputs]; empty unless it was asked for.
        notes: what a reader must know, such as layers that no gradient reached.
    """

    mean_absolute: dict[str, float]
    gradient_square: dict[str, Tensor]
    weight_gradient_square: dict[str, Tensor]
    notes: list[str]


def measure_gradients(
    loaded: LoadedModel,
    head: Head,
    windows: Tensor,
    *,
    checkpointing: bool = True,
    by_weight: bool = False,
    progress: Progress | None = None,
) -> Gradients:
    """g and E[d_i^2] of every layer, each window one sample.

    Each weight's gradient is reduced to a number and freed while the backward pass runs, and
    the loss is taken over pieces of the window, so that full logits never exist.

    Args:
        loaded: the model, at the revision to measure.
        head: its head.
        windows: token ids [windows, length].
        checkpointing: recompute activations block by block: less memory, more time.
        by_weight: keep the mean square of each weight's gradient, too: 4 bytes a weight.
        progress: told after each window.

    Raises:
        InputError: a gradient is not finite.
    """
    model = loaded.model
    squares, _ = accumulators(loaded, inputs=False)
    sums = dict.fromkeys(loaded.layers, 0.0)
    kept = {n: torch.zeros(ly.shape) for n, ly in loaded.layers.items()} if by_weight else {}
    tokens = windows.shape[1] - 1

    def on_product(layer: Layer, expert: int | None, _: Tensor, outputs: Tensor) -> None:
        def on_gradient(gradient: Tensor) -> None:
            rows = gradient.reshape(-1, gradient.shape[-1])
            norms = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32)
            squares[layer.name][expert or 0] += norms.to(squares[layer.name].dtype).square()

        if outputs.requires_grad:
            outputs.register_hook(on_gradient)

    def reducer(name: str) -> Callable[[Tensor], None]:
        def reduce(parameter: Tensor) -> None:
            assert parameter.grad is not None
            active = parameter != 0
            total = parameter.grad.abs().mul_(active).sum(dtype=torch.float32)
            sums[name] += float(total / active.sum().clamp(min=1)) / tokens
            if by_weight:
                gradient = parameter.grad.float().div_(tokens).cpu()
                kept[name].addcmul_(gradient, gradient, value=1 / len(windows))
            parameter.grad = None

        return reduce

    with ExitStack() as stack:
        for name, layer in loaded.layers.items():
            parameter = model.get_parameter(layer.parameter)
            parameter.requires_grad_(True)
            stack.callback(parameter.requires_grad_, False)
            stack.callback(parameter.register_post_accumulate_grad_hook(reducer(name)).remove)
        if checkpointing:
            stack.enter_context(_checkpointed(model))
        stack.enter_context(ProductObserver(live_weights(loaded), on_product))
        stack.enter_context(torch.enable_grad())
        for window in told("gradients", windows, len(windows), progress):
            _backward(model, head, window.to(loaded.device))
    means = {name: square / (len(windows) * tokens) for name, square in squares.items()}
    for name, value in sums.items():
        if not math.isfinite(value):
            means[name].fill_(value)  # refused below
    reached = {name: (mean != 0).any(dim=1) for name, mean in means.items()}
    absolute = {
        name: torch.tensor([[value / len(windows)]], dtype=torch.float64)
        for name, value in sums.items()
    }
    known = {name: (mean != 0).flatten() for name, mean in absolute.items()}
    # Exactly zero is not free but unknown: a weight that only chooses, say, has no gradient.
    for values, there in ((means, reached), (absolute, known)):
        fill_from_afar(loaded, values, there, fill_unseen(loaded, values, there))
    return Gradients(
        {name: float(value) for name, value in absolute.items()},
        {name: finished(means[name], ly, "gradients") for name, ly in loaded.layers.items()},
        {name: loaded.layers[name].matrix(values) for name, values in kept.items()},
        unseen_words(
            "{} got no gradient and count as the mean of their like",
            {name: there & known[name] for name, there in reached.items()},
        ),
    )


def _backward(model: PreTrainedModel, head: Head, ids: Tensor) -> None:
    """Backward pass of the summed token losses of one window [length]."""
    if not head.exact:
        logits = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, :-1].float()
        functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
        return
    hidden = hidden_states(model, ids.unsqueeze(0))
    leaf = hidden.detach().requires_grad_()
    states, targets = leaf[0, :-1], ids[1:]
    for start in range(0, len(targets), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        functional.cross_entropy(head(states[part]), targets[part], reduction="sum").backward()
    hidden.backward(leaf.grad)


@contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Recompute each block's activations in the backward pass, in evaluation mode too."""
    with ExitStack() as stack:
        for _, block in named_blocks(model):
            stack.enter_context(_recomputed(block))
        yield


@contextmanager
def _recomputed(block: nn.Module) -> Iterator[None]:
    forward, own = block.forward, "forward" in vars(block)
    block.forward = lambda *a, **k: checkpoint(forward, *a, use_reentrant=False, **k)
    try:
        yield
    finally:
        del block.forward  # the class's own method again
        if own:  # unless something had replaced it before, as accelerate does
            block.forward = forward
