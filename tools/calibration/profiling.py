"""Calibration statistics and the profile of each layer (design: z-scores and loss cost)."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from prunewright.state import InputError
from prunewright.state.config import CriterionName
from prunewright.state.profile import COST_DELTAS, LayerProfile, ModelProfile
from prunewright.tools.criteria import CRITERIA, LayerStatistics, fisher, split_experts
from prunewright.tools.fast import ascending, count_zeros, kth_lowest
from prunewright.tools.masks import nm_mask
from prunewright.tools.model.head import TOKENS_AT_ONCE, Head, Progress, hidden_states
from prunewright.tools.model.layers import Layer, named_blocks
from prunewright.tools.model.loading import LoadedModel
from prunewright.tools.model.observe import ProductObserver

NAMED = 6
"""Layers that a note names."""
SAMPLE = 2**16
"""Weights of a layer that percentiles and loss costs are estimated on; all, if it has fewer."""
CROWDING = 2.0
"""Exponent of `crowded_costs`.

Chosen on the guard text with benchmarks/crowding.py: SmolLM2-135M, Wanda masks, 45 %, C4:
perplexity 53.1 for 0 and 51.2 for 2 (uniform 55.0).
"""


def crowding_exponent(reconstruct: bool) -> float:
    """The exponent of `crowded_costs` for a run.

    None where the kept weights are solved for: they make up for more in a layer that gives more.
    Compared on held-out text, one seed and only these two: SmolLM2-135M, `obs`, reconstructed, one
    shot, 45 %, 8 C4 windows, perplexity on other C4 / WikiText-2 validation windows: 61.1 / 25.3
    for 0, 61.9 / 25.5 for 2.
    """
    return 0.0 if reconstruct else CROWDING


@dataclass(frozen=True)
class Activations:
    """Input statistics of all layers at one revision.

    Attributes:
        input_square: E[x_j^2] by layer, float32 [inputs] or [experts, inputs].
        notes: what a reader must know, such as experts that no token reached.
    """

    input_square: dict[str, Tensor]
    notes: list[str]


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


def statistics_of(
    name: str, activations: Activations, gradients: Gradients | None
) -> LayerStatistics:
    """What is known of one layer."""
    if gradients is None:
        return LayerStatistics(activations.input_square[name])
    return LayerStatistics(
        activations.input_square[name],
        gradients.gradient_square[name],
        gradients.weight_gradient_square.get(name),
    )


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
    squares, counts = _accumulators(loaded, inputs=True)

    def on_product(layer: Layer, expert: int | None, inputs: Tensor, _: Tensor) -> None:
        tokens = inputs.reshape(-1, inputs.shape[-1])
        norms = torch.linalg.vector_norm(tokens, dim=0, dtype=torch.float32)
        index = expert or 0
        squares[layer.name][index] += norms.to(squares[layer.name].dtype).square()
        # A batched product gives an expert zeros in place of the tokens that are not its own.
        seen = len(tokens) if expert is None else int(tokens.ne(0).any(dim=1).sum())
        counts[layer.name][index] += seen

    with ProductObserver(_weights(loaded), on_product):
        for index, window in enumerate(windows):
            hidden_states(loaded.model, window.to(loaded.device).unsqueeze(0))
            if progress is not None:
                progress("activations", index + 1, len(windows))
    means = {n: squares[n] / counts[n].clamp(min=1).unsqueeze(1) for n in loaded.layers}
    seen = {name: count > 0 for name, count in counts.items()}
    if orphans := _fill_unseen(loaded, means, seen):
        raise InputError(
            f"{orphans[0]} took part in no product that could be observed while the model ran: "
            "this model has a kind of layer that is not supported"
        )
    return Activations(
        {name: _finished(means[name], layer, "inputs") for name, layer in loaded.layers.items()},
        _notes("{} saw no calibration token and count as the mean of their like", seen),
    )


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
    squares, _ = _accumulators(loaded, inputs=False)
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
        stack.enter_context(ProductObserver(_weights(loaded), on_product))
        stack.enter_context(torch.enable_grad())
        for index, window in enumerate(windows):
            _backward(model, head, window.to(loaded.device))
            if progress is not None:
                progress("gradients", index + 1, len(windows))
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
        _fill_from_afar(loaded, values, there, _fill_unseen(loaded, values, there))
    return Gradients(
        {name: float(value) for name, value in absolute.items()},
        {name: _finished(means[name], ly, "gradients") for name, ly in loaded.layers.items()},
        {name: loaded.layers[name].matrix(values) for name, values in kept.items()},
        _notes(
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


def build_profile(
    loaded: LoadedModel,
    activations: Activations,
    gradients: Gradients,
    criterion: CriterionName,
    *,
    revision: str,
    gradient_revision: str,
    sparsities: dict[str, float],
    own: Mapping[str, float] = MappingProxyType({}),
    pattern: tuple[int, int] | None = None,
    pattern_own: Mapping[str, float] = MappingProxyType({}),
    patterned: Collection[str] = (),
    reconstruct: bool = False,
) -> ModelProfile:
    """Every layer's signals and their z-scores over the layers.

    Args:
        loaded: the model at ``revision``.
        activations: taken at ``revision``.
        gradients: taken at ``gradient_revision``.
        criterion: the one that masks are made with.
        revision: the model's.
        gradient_revision: see above.
        sparsities: each layer's fraction of zeros.
        own: each layer's fraction of zeros in the dense model; 0 where it is not said.
        pattern: ``(keep_n, group_m)`` that layers are taken to as a whole, if the run has one.
        pattern_own: how much of the pattern's sparsity each layer's own zeros make up, likewise.
        patterned: names of the layers that steps have given it.
        reconstruct: whether the kept weights are solved for.
    """
    rows = []
    exponent = crowding_exponent(reconstruct)
    patterns: dict[str, float] = {}
    mean = sum(sparsities[n] * ly.numel for n, ly in loaded.layers.items()) / loaded.prunable
    layers = list(loaded.layers.values())
    for layer, weight in zip(layers, loaded.dense_layers(layers), strict=True):
        name, dense = layer.name, layer.matrix(weight)
        statistics = statistics_of(name, activations, gradients)
        live = layer.matrix(loaded.weight(layer))
        middle, span = sparsities[name], (0.0, *COST_DELTAS)
        up = [min(middle + delta, 1.0) for delta in span]
        down = [max(middle - delta, own.get(name, 0.0)) for delta in span]
        losses = predict_losses(dense, statistics, criterion, [*up, *down])
        if pattern is not None and layer.inputs % pattern[1] == 0:
            # Each layer makes the whole way, crowded alike: no `crowded_costs`.
            patterns[name] = predict_pattern_loss(dense, statistics, criterion, pattern)
        rows.append(
            (
                layer,
                salience_percentile(live, statistics.input_square),
                gradients.mean_absolute[name],
                crowded_costs(up, losses[: len(span)], mean, exponent),
                crowded_costs(down, losses[len(span) :], mean, exponent),
                middle,
            )
        )
    # The marginal price, per weight removed, of the middle delta.
    marginal = [
        cost[1] / max(layer.numel * (min(sparsity + COST_DELTAS[1], 1.0) - sparsity), 1.0)
        for layer, _, _, cost, _, sparsity in rows
    ]
    z_s = z_scores([row[1] for row in rows])
    z_g = z_scores([row[2] for row in rows])
    if pattern is None:
        z_c = z_scores(marginal)
    else:
        whole = 1 - pattern[0] / pattern[1]
        taken = {n: (whole - pattern_own.get(n, 0.0)) * loaded.layers[n].numel for n in patterns}
        prices = [cost / max(taken[name], 1.0) for name, cost in patterns.items()]
        scores = dict(zip(patterns, z_scores(prices), strict=True))
        z_c = [scores.get(row[0].name, 0.0) for row in rows]
    return ModelProfile(
        revision=revision,
        gradient_revision=gradient_revision,
        layers=[
            LayerProfile(
                name=layer.name,
                block=layer.block,
                projection=layer.projection,
                parameters=layer.numel,
                sparsity=sparsity,
                dense_sparsity=own.get(layer.name, 0.0),
                s=s,
                g=g,
                loss_cost=(cost[0], cost[1], cost[2]),
                regrow_gain=(gain[0], gain[1], gain[2]),
                z_s=z_s[i],
                z_g=z_g[i],
                z_c=z_c[i],
                patterned=pattern is not None and layer.name in patterned,
                pattern_cost=patterns.get(layer.name),
                pattern_own=pattern_own.get(layer.name, 0.0),
            )
            for i, (layer, s, g, cost, gain, sparsity) in enumerate(rows)
        ],
        notes=[*loaded.notes, *activations.notes, *gradients.notes],
    )


def crowded_costs(
    levels: list[float], losses: list[float], mean: float, exponent: float
) -> list[float]:
    """Predicted change of the loss from the first level to each other one, crowding included.

    A prediction that adds up single weights is too low where much of a layer goes. So what it
    says of the slice between two levels is multiplied by ((1 - mean) / (1 - lower level)) to the
    power of ``exponent``: dearer in layers that are above the model's mean, cheaper below it.

    Args:
        levels: sparsities of one layer, rising or falling from where it is.
        losses: predicted rise of the loss over the dense layer at each level, nats.
        mean: the model's sparsity.
        exponent: `crowding_exponent`.

    Returns:
        Absolute changes, nats, never negative, for each level but the first.
    """
    total, costs = 0.0, []
    for (near, loss), (far, next_loss) in pairwise(zip(levels, losses, strict=True)):
        factor = (max(1.0 - mean, 0.05) / max(1.0 - min(near, far), 0.05)) ** exponent
        total += abs(next_loss - loss) * factor
        costs.append(total)
    return costs


def z_scores(values: list[float]) -> list[float]:
    """(value - mean) / (std + 1e-8) over the values (arXiv 2601.09694), std of the population.

    A scale far below the paper's constant would flatten all scores to zero, so the values are
    first divided by their largest magnitude, which leaves z-scores as they are otherwise.
    """
    scale = max(map(abs, values), default=0.0)
    if scale == 0 or not all(map(math.isfinite, values)):
        return [0.0] * len(values)
    scaled = [v / scale for v in values]
    mean = math.fsum(scaled) / len(scaled)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in scaled) / len(scaled))
    return [(v - mean) / (std + 1e-8) for v in scaled]


def salience_percentile(weight: Tensor, input_square: Tensor, fraction: float = 0.1) -> float:
    """s of a layer: the 10th percentile of |W_ij| * ||X_j|| over its non-zero weights.

    ||X_j|| is the root mean square over tokens: the norm up to a factor that all layers share.
    Taken on an evenly spread sample of `SAMPLE` weights. 0 where no weight is left.

    Args:
        weight: live weights [..., outputs, inputs].
        input_square: E[x_j^2], [..., inputs].
        fraction: which percentile.
    """
    outputs, inputs = weight.shape[-2:]
    spread = _spread(weight.numel() // inputs, inputs, weight.device)
    values = spread.of(weight).float().abs()
    columns = spread.columns
    if weight.ndim == 3:
        columns = columns + spread.rows // outputs * inputs  # its own norms for each expert
    norms = input_square.sqrt().reshape(-1).index_select(0, columns)
    active = int(torch.count_nonzero(values))
    if active == 0:
        return 0.0
    # The weights that are gone score zero, so they come first.
    rank = len(values) - active + 1 + math.floor(fraction * (active - 1))
    return float(kth_lowest(values * norms, rank))


def predict_losses(
    weight: Tensor, statistics: LayerStatistics, criterion: CriterionName, levels: list[float]
) -> list[float]:
    """Predicted rise of the mean token loss over the dense layer at each sparsity level.

    The sum, over the weights that the criterion would prune, of the saliency of
    `criteria.fisher`. Large layers are estimated on a spread of whole rows (criteria that
    compare inside rows) or of single weights (others), scaled by the known saliency of all
    rows. Zeros of the layer's own count in the levels and cost nothing.

    Args:
        weight: dense weights [outputs, inputs], or [experts, outputs, inputs].
        statistics: with gradients.
        criterion: which weights would go.
        levels: sparsities in [0, 1].

    Returns:
        Nats a token, one a level.
    """
    totals = [0.0] * len(levels)
    wide = _wide(weight.device)
    experts = split_experts(weight, statistics)
    zeros = [count_zeros(matrix) / matrix.numel() for matrix, _ in experts]
    shares = [even_level(zeros, level) for level in levels]
    for matrix, stats in experts:
        assert stats.gradient_square is not None
        rule = CRITERIA[criterion]
        if rule.group == "row":
            rows, saliency, scale = _sampled_rows(matrix, stats)
            if rule.follows_saliency:
                ordered = ascending(saliency)
            else:
                order = rule.score(matrix[rows], stats.rows(rows)).argsort(dim=1)
                ordered = saliency.gather(1, order)
            running = ordered.sum(dim=0, dtype=wide).cumsum(0)
            own = (matrix[rows] == 0).float().mean(dim=1).tolist() if any(zeros) else []
            counts = [round(even_level(own, level) * len(running)) for level in shares]
        else:
            spread = _spread(matrix.shape[0], matrix.shape[1], matrix.device)
            inputs = stats.input_square.index_select(0, spread.columns)
            factors = fisher.damped(stats.gradient_square).index_select(0, spread.rows)
            saliency = fisher.saliency(spread.of(matrix), inputs, factors)
            if rule.follows_saliency:
                ordered = ascending(saliency)
            else:
                ordered = saliency[spread.of(rule.score(matrix, stats)).argsort()]
            running = ordered.cumsum(0, dtype=wide)
            scale = matrix.numel() / len(ordered)
            counts = [round(level * len(running)) for level in shares]
        losses = [scale * float(running[n - 1]) if n else 0.0 for n in counts]
        totals = [total + loss for total, loss in zip(totals, losses, strict=True)]
    return totals


def even_level(own: list[float], level: float) -> float:
    """The sparsity of most parts of one size, so that all together have that of ``level``.

    Parts with more zeros of their own keep them, and the others have as much less: what
    `masks.even_shares` gives, in fractions.

    Args:
        own: sparsity that each part has by itself.
        level: of all parts together.
    """
    rest = level * len(own)
    for index, most in enumerate(sorted(own, reverse=True)):
        if most <= (even := rest / (len(own) - index)):
            return even if index else level
        rest -= most
    return 0.0 if own else level


def predict_pattern_loss(
    weight: Tensor, statistics: LayerStatistics, criterion: CriterionName, pattern: tuple[int, int]
) -> float:
    """Predicted rise of the mean token loss over the dense layer for its N:M mask.

    As `predict_losses`, on a spread of whole rows whatever the criterion: groups lie in rows.

    Args:
        weight: dense weights [outputs, inputs], or [experts, outputs, inputs].
        statistics: with gradients.
        criterion: which weights of a group would go.
        pattern: ``(keep_n, group_m)``; the inputs divide into groups.

    Returns:
        Nats a token.
    """
    total = 0.0
    for matrix, stats in split_experts(weight, statistics):
        rows, saliency, scale = _sampled_rows(matrix, stats)
        mask = nm_mask(CRITERIA[criterion].score(matrix[rows], stats.rows(rows)), *pattern)
        total += scale * float(saliency.masked_fill(~mask, 0).sum(dtype=_wide(weight.device)))
    return total


def _sampled_rows(matrix: Tensor, stats: LayerStatistics) -> tuple[slice, Tensor, float]:
    """Evenly spread rows of some `SAMPLE` weights, their saliency, and all rows' over theirs."""
    assert stats.gradient_square is not None
    factors = fisher.damped(stats.gradient_square)
    step = min(math.ceil(matrix.numel() / SAMPLE), matrix.shape[0])
    rows = slice(step // 2, None, step)
    saliency = fisher.saliency(matrix[rows], stats.input_square, factors[rows].unsqueeze(1))
    whole = matrix.float().square() @ stats.input_square @ factors
    sampled = float(saliency.sum(dtype=_wide(matrix.device)))
    return rows, saliency, 0.5 * float(whole) / max(sampled, 1e-300)


@dataclass(frozen=True)
class _Spread:
    """Some weights of a matrix, evenly spread over rows and columns alike.

    Attributes:
        stride: from one to the next in the flattened matrix, the first one included.
        rows: of each [n], int32.
        columns: of each [n], int32.
    """

    stride: int
    rows: Tensor
    columns: Tensor

    def of(self, matrix: Tensor) -> Tensor:
        """Its values there [n]: a view, if the matrix is contiguous."""
        return matrix.reshape(-1)[:: self.stride]


def _spread(rows: int, inputs: int, device: torch.device) -> _Spread:
    """At most `SAMPLE` weights of a matrix [rows, inputs]."""
    stride = math.ceil(rows * inputs / SAMPLE)
    while math.gcd(stride, inputs) > 1:
        stride += 1
    return _Spread(stride, *_places(rows * inputs, inputs, stride, device))


@lru_cache(maxsize=8)  # a model has few shapes
def _places(numel: int, inputs: int, stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of every ``stride``-th weight."""
    index = torch.arange(0, numel, stride, device=device)
    return (index // inputs).int(), (index % inputs).int()


def _weights(loaded: LoadedModel) -> list[tuple[Layer, Tensor]]:
    return [(layer, loaded.weight(layer)) for layer in loaded.layers.values()]


def _accumulators(
    loaded: LoadedModel, *, inputs: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Zeros [experts or 1, inputs or outputs] in a wide dtype, and token counts, by layer."""
    squares, counts = {}, {}
    device = loaded.device
    for name, layer in loaded.layers.items():
        matrix = layer.matrix(loaded.weight(layer))
        experts = matrix.shape[0] if matrix.ndim == 3 else 1
        width = matrix.shape[-1] if inputs else matrix.shape[-2]
        squares[name] = torch.zeros(experts, width, dtype=_wide(device), device=device)
        counts[name] = torch.zeros(experts, dtype=torch.int64, device=device)
    return squares, counts


def _fill_unseen(
    loaded: LoadedModel, means: dict[str, Tensor], seen: dict[str, Tensor]
) -> list[str]:
    """Give what was not seen the mean of what stands beside it; name what has nothing beside.

    Beside an expert of a fused tensor stand the others; beside an expert that is a module of its
    own, those of its block.

    Args:
        loaded: the model.
        means: values [experts or 1, n] by layer, written in place.
        seen: [experts or 1] by layer.
    """
    orphans = []
    for name, layer in loaded.layers.items():
        if bool(seen[name].all()):
            continue
        beside = [
            means[n][seen[n]]
            for n, other in loaded.layers.items()
            if (other.block, other.form, other.kind) == (layer.block, layer.form, layer.kind)
        ]
        if sum(map(len, beside)) == 0:
            orphans.append(name)
        else:
            means[name][~seen[name]] = torch.cat(beside).mean(dim=0)
    return orphans


def _fill_from_afar(
    loaded: LoadedModel, means: dict[str, Tensor], seen: dict[str, Tensor], names: list[str]
) -> None:
    """Give layers that have nothing beside them the mean of the other blocks', or of all layers."""
    if not names:
        return
    anywhere = [means[n][seen[n]].mean().item() for n in loaded.layers if bool(seen[n].any())]
    for name in names:
        layer = loaded.layers[name]
        like = [
            means[n][seen[n]]
            for n, other in loaded.layers.items()
            if (other.form, other.kind) == (layer.form, layer.kind)
        ]
        if sum(map(len, like)):
            means[name][:] = torch.cat(like).mean(dim=0)
        elif anywhere:
            means[name].fill_(sum(anywhere) / len(anywhere))


def _notes(words: str, seen: dict[str, Tensor]) -> list[str]:
    """One sentence on what was not seen; none where all was."""
    parts = [
        name if len(there) == 1 else f"{int((~there).sum())} of {len(there)} in {name}"
        for name, there in seen.items()
        if not bool(there.all())
    ]
    more = f" and {len(parts) - NAMED} more" if len(parts) > NAMED else ""
    return [words.format(", ".join(parts[:NAMED]) + more)] if parts else []


def _finished(values: Tensor, layer: Layer, what: str) -> Tensor:
    """float32, without the leading dimension where nothing is fused.

    Raises:
        InputError: not finite.
    """
    values = values.float()
    if not bool(values.isfinite().all()):
        raise InputError(
            f"the {what} of {layer.name} are not finite: the model is broken, or its dtype is too "
            "narrow for it (try bfloat16 or float32)"
        )
    return values if len(layer.form) == 3 else values[0]


def _wide(device: torch.device) -> torch.dtype:
    """The dtype of long sums: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
