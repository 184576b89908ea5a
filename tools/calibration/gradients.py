"""The backward pass of the calibration: how the loss feels each layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from prunewright.tools.calibration.observed import (
    accumulators,
    fill_from_afar,
    fill_unseen,
    finished,
    said_of,
)
from prunewright.tools.execution.base import Execution, ordered_attention
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
        domains: ``gradient_square`` of the windows of each domain; empty where there are none. The
            rest are the domains' means, by their weights.
        notes: what a reader must know, such as layers that no gradient reached.
    """

    mean_absolute: dict[str, float]
    gradient_square: dict[str, Tensor]
    weight_gradient_square: dict[str, Tensor]
    notes: list[str]
    domains: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def measure_gradients(
    loaded: LoadedModel,
    head: Head,
    windows: Tensor,
    *,
    scored: Tensor | None = None,
    domains: Sequence[str] = (),
    weights: Mapping[str, float] = MappingProxyType({}),
    checkpointing: bool = True,
    by_weight: bool = False,
    progress: Progress | None = None,
) -> Gradients:
    """g and E[d_i^2] of every layer, each window one sample.

    Each weight's gradient is reduced to a number and freed while the backward pass runs, and
    the loss is taken over pieces of the window, so that full logits never exist. Where only some
    tokens are scored, the squares are the sum over all of the window for each that is: what the
    mean loss of the scored ones feels.

    Args:
        loaded: the model, at the revision to measure.
        head: its head.
        windows: token ids [windows, length].
        scored: which tokens after the first have a loss, bool [windows, length - 1], at least one
            in each window; None: all.
        domains: of which domain each window is; empty where there are none.
        weights: how much each domain counts, not all 0.
        checkpointing: recompute activations block by block: less memory, more time.
        by_weight: keep the mean square of each weight's gradient, too: 4 bytes a weight.
        progress: told after each window.

    Raises:
        InputError: a gradient is not finite.
    """
    model, execution = loaded.model, loaded.execution
    tokens = windows.shape[1] - 1
    names = list(dict.fromkeys(domains)) or [""]
    kinds = [names.index(domain) for domain in domains] or [0] * len(windows)
    shares = _shares([weights.get(name, 1.0) for name in names])
    # Of each window: tokens with a loss, and what it counts in a mean of all windows.
    terms = [tokens] * len(windows) if scored is None else scored.sum(dim=1).tolist()
    counts = [shares[kind] * len(windows) / kinds.count(kind) for kind in kinds]
    squares = {
        name: torch.stack([square] * len(names))
        for name, square in accumulators(loaded, inputs=False)[0].items()
    }
    sums = {name: square.new_zeros(()) for name, square in squares.items()}
    kept = {n: torch.zeros(ly.shape) for n, ly in loaded.layers.items()} if by_weight else {}
    first = 0

    def on_product(layer: Layer, expert: int | None, _: Tensor, outputs: Tensor) -> None:
        def on_gradient(gradient: Tensor) -> None:
            at = first + execution.window
            rows = gradient.reshape(-1, gradient.shape[-1])
            norms = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32)
            found = norms.to(squares[layer.name].dtype).square().mul_(tokens / terms[at])
            squares[layer.name][kinds[at], expert or 0] += found

        if outputs.requires_grad:
            outputs.register_hook(on_gradient)

    def reducer(name: str) -> Callable[[Tensor], None]:
        # No number leaves the device before all windows are done: that would wait for it each time.
        def reduce(parameter: Tensor) -> None:
            assert parameter.grad is not None
            at = first + execution.window
            active = parameter != 0
            total = parameter.grad.abs().mul_(active).sum(dtype=torch.float32)
            # A bool tensor is counted twenty times as fast as it is summed up.
            count = active.count_nonzero().clamp(min=1)
            sums[name] += (total / count).to(sums[name].dtype) / terms[at] * counts[at]
            if by_weight:
                gradient = parameter.grad.float().div_(terms[at]).cpu()
                kept[name].addcmul_(gradient, gradient, value=counts[at] / len(windows))
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
        stack.enter_context(ordered_attention(execution.device))
        for group in execution.groups("gradients", windows, progress, gradients=True):
            for part in [group] if head.exact else group.split(1):
                marks = None if scored is None else scored[first : first + len(part)]
                _backward(execution, head, part, marks)
                first += len(part)
    means = {
        name: torch.stack([square[k] / (kinds.count(k) * tokens) for k in range(len(names))])
        for name, square in squares.items()
    }
    for name, value in sums.items():
        means[name] += 0 * value  # what is not finite is refused below
    reached = {name: (mean != 0).any(dim=2) for name, mean in means.items()}
    absolute = {
        name: (value / len(windows)).to("cpu", torch.float64).view(1, 1)
        for name, value in sums.items()
    }
    known = {name: (mean != 0).flatten() for name, mean in absolute.items()}
    # Exactly zero is not free but unknown: a weight that only chooses, say, has no gradient.
    of_domains = [
        ({n: mean[k] for n, mean in means.items()}, {n: there[k] for n, there in reached.items()})
        for k in range(len(names))
    ]
    for values, there in (*of_domains, (absolute, known)):
        fill_from_afar(loaded, values, there, fill_unseen(loaded, values, there))

    def finite(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: finished(values[name], ly, "gradients") for name, ly in loaded.layers.items()}

    whole = {
        name: sum((share * mean[k] for k, share in enumerate(shares)), torch.zeros_like(mean[0]))
        for name, mean in means.items()
    }
    return Gradients(
        {name: float(value) for name, value in absolute.items()},
        finite(whole),
        {name: loaded.layers[name].matrix(values) for name, values in kept.items()},
        said_of(
            "{} got no gradient and count as the mean of their like",
            {name: ~(there.any(dim=0) & known[name]) for name, there in reached.items()},
        ),
        {name: finite(values) for name, (values, _) in zip(names, of_domains, strict=True)}
        if domains
        else {},
    )


def _shares(weights: list[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def _backward(execution: Execution, head: Head, ids: Tensor, scored: Tensor | None) -> None:
    """Backward pass of the summed losses of each window's scored tokens.

    Args:
        execution: runs the model.
        head: its head.
        ids: a group of windows [windows, length]; of one where the head is not exact.
        scored: as for `measure_gradients`, of these windows.
    """
    if not head.exact:
        logits = execution.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        for some in _parts(len(logits), None if scored is None else scored[0], len(logits)):
            functional.cross_entropy(logits[some], ids[0, 1:][some], reduction="sum").backward()
        return
    hidden = execution.hidden_states(ids)
    leaf = hidden.detach().requires_grad_()
    for index, (states, targets) in enumerate(zip(leaf[:, :-1], ids[:, 1:], strict=True)):
        marks = None if scored is None else scored[index]
        for some in _parts(len(targets), marks, TOKENS_AT_ONCE):
            functional.cross_entropy(head(states[some]), targets[some], reduction="sum").backward()
    hidden.backward(leaf.grad)


def _parts(count: int, scored: Tensor | None, most: int) -> Iterator[slice | Tensor]:
    """The places of some losses, at most so many at once."""
    if scored is not None:
        yield from scored.nonzero().flatten().split(most)
    else:
        yield from (slice(start, start + most) for start in range(0, count, most))
