"""A pruned block fitted as a whole to what the dense block gives, by a short descent.

Least squares knows single matrices; through the block's norms, attention and activations its
weights make up for one another (EBFT, arXiv 2402.12419; "A Free Lunch in LLM Compression", arXiv
2510.14444). Only one block has gradients and optimizer state at a time, so the memory is that of a
block, whatever the model's size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunewright.tools.execution.base import Run, ordered_attention
from prunewright.tools.execution.weights import LiveWeights
from prunewright.tools.model.head import Progress
from prunewright.tools.model.layers import Layer

BETAS = (0.9, 0.95)
HELD_OUT = 8
"""One window of so many is held out of the fit."""


@dataclass(frozen=True)
class Fit:
    """How a block is fitted.

    Attributes:
        epochs: times that each window is used.
        learning_rate: Adam's at the beginning; it falls to 0 on a cosine.
        batch: windows of one step.
        seed: draws the order of the windows.
    """

    epochs: int = 3
    learning_rate: float = 3e-4
    batch: int = 2
    seed: int = 0


def held_out(windows: int) -> int:
    """How many of the windows, the last ones, say when the fit shall stop."""
    return min(windows - 1, math.ceil(windows / HELD_OUT))


def fit_block(
    model: PreTrainedModel,
    weights: LiveWeights,
    run: Run,
    target: Tensor,
    masks: dict[Layer, Tensor],
    options: Fit,
    tell: Progress,
) -> dict[Layer, Tensor]:
    """Fit the kept weights of a block's layers to hidden states that shall leave the block.

    The loss is the sum of squares of the difference over the target's mean square: a mean's
    gradients are lost in half precision, and no larger than Adam's epsilon. After each epoch it is
    taken on the windows that are held out. The result is the weights of the best epoch, or
    those from before the first. Two epochs in a row without a gain end the fit.

    Args:
        model: the live model, whose block this is.
        weights: its live weights.
        run: the block with its windows.
        target: hidden states [windows, length, width].
        masks: of the layers to fit, True where pruned, of the parameter's shape.
        options: see `Fit`.
        tell: told of each step of the descent; it may raise to stop.

    Returns:
        Each layer's weights, 0 on the mask, in its dtype, on the device.
    """
    layers = list(masks)
    last = run.windows - held_out(run.windows)
    generator = torch.Generator().manual_seed(options.seed)
    scales = [run.part(i, target).float().square().mean() for i in range(run.windows)]

    def loss(window: int) -> Tensor:
        leaving = run.window(window, run.entering)
        # Where blocks are shared out, hidden states wait on another device than this block's.
        wanted, scale = (t.to(leaving.device) for t in (run.part(window, target), scales[window]))
        return (leaving.float() - wanted.float()).square().sum() / scale

    @torch.no_grad()
    def judged() -> float:
        # With a single window nothing can be held out.
        windows = range(last, run.windows) if last < run.windows else range(run.windows)
        return float(torch.stack([loss(window) for window in windows]).mean())

    with weights.lent(layers) as lent:
        parameters = [model.get_parameter(layer.parameter) for layer in layers]
        kept, device = [~masks[layer] for layer in layers], parameters[0].device
        masters = [values.float() for values in lent]
        optimizer = torch.optim.Adam(masters, lr=options.learning_rate, betas=BETAS)
        steps = options.epochs * math.ceil(last / options.batch)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        best, least, worse = [values.clone() for values in lent], judged(), 0
        for parameter in parameters:
            parameter.requires_grad_(True)
        tell("fit, step", 0, steps)
        try:
            for epoch in range(options.epochs):
                order = torch.randperm(last, generator=generator)
                for number, batch in enumerate(order.split(options.batch), start=1):
                    with torch.enable_grad(), ordered_attention(device):
                        for window in batch.tolist():
                            (loss(window) / len(batch)).backward()
                    for parameter, master, mask in zip(parameters, masters, kept, strict=True):
                        if parameter.grad is not None:  # an expert that no token came to has none
                            master.grad = parameter.grad.float().mul_(mask)
                            parameter.grad = None
                    optimizer.step()
                    optimizer.zero_grad()
                    falling.step()
                    for parameter, master in zip(parameters, masters, strict=True):
                        parameter.data.copy_(master)
                    tell("fit, step", epoch * (steps // options.epochs) + number, steps)
                now = judged()
                if now < least:
                    best, least, worse = [p.data.clone() for p in parameters], now, 0
                else:
                    worse += 1
                    if worse == 2:
                        break
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
    return dict(zip(layers, best, strict=True))
