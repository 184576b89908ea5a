"""The backward pass of the calibration: how the loss feels each layer."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunewright.tools.calibration.observed import (
    accumulators,
    fill_from_afar,
    fill_unseen,
    finished,
    said_of,
)
from prunewright.tools.execution.base import Execution
from prunewright.tools.model.head import TOKENS_AT_ONCE, Head, Progress
from prunewright.tools.model.layers import Layer
from prunewright.tools.model.loading import LoadedModel


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
    model, execution = loaded.model, loaded.execution
    squares, _ = accumulators(loaded, inputs=False)
    sums = {name: square.new_zeros(()) for name, square in squares.items()}
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
        # No number leaves the device before all windows are done: that would wait for it each time.
        def reduce(parameter: Tensor) -> None:
            assert parameter.grad is not None
            active = parameter != 0
            total = parameter.grad.abs().mul_(active).sum(dtype=torch.float32)
            # A bool tensor is counted twenty times as fast as it is summed up.
            count = active.count_nonzero().clamp(min=1)
            sums[name] += (total / count).to(sums[name].dtype) / tokens
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
        stack.enter_context(execution.recomputing(checkpointing))
        stack.enter_context(execution.observe(on_product))
        stack.enter_context(torch.enable_grad())
        if execution.device.type == "cuda":
            # The other kernels add up gradients in whatever order their threads end.
            ways = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
            stack.enter_context(sdpa_kernel(ways, set_priority=True))
        for group in execution.groups("gradients", windows, progress, gradients=True):
            _backward(execution, head, group)
    means = {name: square / (len(windows) * tokens) for name, square in squares.items()}
    for name, value in sums.items():
        means[name] += 0 * value  # what is not finite is refused below
    reached = {name: (mean != 0).any(dim=1) for name, mean in means.items()}
    absolute = {
        name: (value / len(windows)).to("cpu", torch.float64).view(1, 1)
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
        said_of(
            "{} got no gradient and count as the mean of their like",
            {name: ~(there & known[name]) for name, there in reached.items()},
        ),
    )


def _backward(execution: Execution, head: Head, ids: Tensor) -> None:
    """Backward pass of the summed token losses of each window of a group [windows, length]."""
    if not head.exact:
        for window in ids:
            logits = execution.model(input_ids=window.unsqueeze(0), use_cache=False).logits[0, :-1]
            functional.cross_entropy(logits.float(), window[1:], reduction="sum").backward()
        return
    hidden = execution.hidden_states(ids)
    leaf = hidden.detach().requires_grad_()
    for states, targets in zip(leaf[:, :-1], ids[:, 1:], strict=True):
        for start in range(0, len(targets), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            functional.cross_entropy(head(states[part]), targets[part], reduction="sum").backward()
    hidden.backward(leaf.grad)
