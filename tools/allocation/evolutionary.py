"""EvoPress (arXiv 2410.14649): an evolutionary search by level switches, within a budget."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from prunewright.state import InputError
from prunewright.state.config import Options
from prunewright.state.run import DENSE
from prunewright.tools.allocation.blocks import layer_bounds
from prunewright.tools.allocation.counts import Allotment, Bounds, exact_counts
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.calibration.profile import statistics_of
from prunewright.tools.criteria import find_criterion, prune_mask
from prunewright.tools.model.head import TOKENS_AT_ONCE, Head, Progress, hidden_states

_DRAWS = 50
"""Times that a mutation is drawn again which gives an allocation of the same generation."""


class EvolutionaryOptions(Options):
    """The search's budget and its shape."""

    tokens: int = Field(
        300_000, ge=1, description="tokens that the search may run through the model"
    )
    offspring: int = Field(16, ge=1, description="children of one generation")
    survivors: int = Field(2, ge=1, description="children that are scored on all windows")
    windows: int = Field(4, ge=1, description="calibration windows that the fitness is taken on")
    screen: int = Field(512, ge=2, description="tokens of one window that all children see first")
    swaps: int = Field(3, ge=1, description="most level switches of one mutation")
    level: float = Field(
        0.05, gt=0, le=0.5, description="weights that a switch moves, as a part of the mean layer"
    )


Fitness = Callable[[Mapping[str, int], int | None], float]
"""Of some counts: on the first tokens of one window, named by its index, or on all (None)."""


@dataclass(frozen=True)
class Found:
    """What a search came to: the best counts, the fitness of start and end, generations."""

    counts: dict[str, int]
    first: float
    last: float
    generations: int


def allocate(
    bench: Workbench, options: EvolutionaryOptions, progress: Progress | None = None
) -> Allotment:
    """The uniform allocation, improved generation by generation as long as the tokens last.

    Fitness is KL(dense || pruned) of the next-token distributions on the first calibration
    windows; the guard and the test text are not looked at. Masks are made by the criterion in
    use from dense statistics whenever a layer's count changes, so no database of weights is kept.

    Raises:
        InputError: the tokens do not last for one generation.
    """
    request = bench.request
    windows = bench.windows.calibration[: options.windows]
    length = windows.shape[1]
    screen = min(options.screen, length)
    survivors = min(options.survivors, options.offspring)
    generation = options.offspring * screen + survivors * windows.numel()
    rounds = (options.tokens - 2 * windows.numel()) // generation  # the dense model, the start
    if rounds < 1:
        raise InputError(
            "allocation_options.tokens is too small for one generation, which takes "
            f"{2 * windows.numel() + generation:,} tokens with the start: raise it, or lower "
            "offspring, survivors, windows or screen"
        )
    bounds = layer_bounds(bench)
    sizes = bounds.sizes
    start = exact_counts(dict.fromkeys(sizes, request.target), bounds, request.target)
    unit = max(1, round(options.level * bench.loaded.prunable / len(sizes)))
    trials = _Trials(bench, windows, progress)
    before = bench.tokens["allocation"]
    try:
        trials.remember_dense()
        found = search(
            start.counts,
            bounds,
            unit,
            lambda counts, index: trials.divergence(counts, index, screen),
            random.Random(f"{request.seed}/evolutionary"),
            rounds,
            len(windows),
            offspring=options.offspring,
            survivors=survivors,
            swaps=options.swaps,
            progress=progress,
        )
    finally:
        bench.sync(DENSE)
    shares = [count / sizes[name] for name, count in found.counts.items()]
    words = (
        f"evolutionary: {found.generations} generations of {options.offspring} children, a switch "
        f"moves {unit:,} weights; KL to the dense model on {len(windows)} calibration windows "
        f"{found.first:.4f} to {found.last:.4f} nats a token; "
        f"{bench.tokens['allocation'] - before:,} tokens; sparsities from {min(shares):.3f} to "
        f"{max(shares):.3f}"
    )
    return Allotment(found.counts, [words])


def search(
    start: Mapping[str, int],
    bounds: Bounds,
    unit: int,
    fitness: Fitness,
    draw: random.Random,
    rounds: int,
    windows: int,
    *,
    offspring: int,
    survivors: int,
    swaps: int,
    progress: Progress | None = None,
) -> Found:
    """An elitist (1 + lambda) search: the parent gives way only to a fitter child.

    All children are scored on a part of one window, another one each generation; the best few
    then on all windows, where the parent's fitness is known. So the fitness on all windows
    never rises, and the same seed gives the same result.

    Args:
        start: zeros of each layer; every allocation keeps their sum.
        bounds: of the layers.
        unit: weights that a switch moves from one layer to another.
        fitness: lower is better.
        draw: makes all choices.
        rounds: generations.
        windows: how many the fitness is taken on.
        offspring: children of one generation.
        survivors: how many of them are scored on all windows.
        swaps: most switches of one mutation; the less of two draws decides, so few are likelier.
        progress: told after each generation.
    """
    parent = dict(start)
    first = best = fitness(parent, None)
    for number in range(rounds):
        children = _children(parent, bounds, unit, draw, offspring, swaps)
        screened = [(fitness(child, number % windows), i) for i, child in enumerate(children)]
        finalists = [children[index] for _, index in sorted(screened)[:survivors]]
        for child in finalists:
            value = fitness(child, None)
            if value < best:
                parent, best = child, value
        if progress is not None:
            progress("allocation", number + 1, rounds)
    return Found(parent, first, best, rounds)


def _children(
    parent: dict[str, int],
    bounds: Bounds,
    unit: int,
    draw: random.Random,
    offspring: int,
    swaps: int,
) -> list[dict[str, int]]:
    """Distinct mutations of a parent; fewer where there are no more."""
    children: list[dict[str, int]] = []
    for _ in range(offspring):
        for _ in range(_DRAWS):
            child = _mutate(parent, bounds, unit, draw, swaps)
            if child != parent and child not in children:
                children.append(child)
                break
    return children


def _mutate(
    parent: dict[str, int], bounds: Bounds, unit: int, draw: random.Random, swaps: int
) -> dict[str, int]:
    """Some level switches: one layer gets a unit of weights back that another one gives."""
    child, least, most = dict(parent), bounds.least, bounds.most
    for _ in range(min(draw.randint(1, swaps), draw.randint(1, swaps))):
        lower = [name for name in child if child[name] - unit >= least[name]]
        higher = [name for name in child if child[name] + unit <= most[name]]
        if lower and higher:
            child[draw.choice(lower)] -= unit
            child[draw.choice(higher)] += unit
    return child


class _Trials:
    """The live model, taken from one allocation to the next by the layers that differ."""

    def __init__(self, bench: Workbench, windows: Tensor, progress: Progress | None) -> None:
        rule = find_criterion(bench.request.criterion)
        self._bench = bench
        self._windows = windows
        self._activations = bench.activations(DENSE, progress)
        self._gradients = bench.gradients(DENSE, progress) if rule.needs_gradients else None
        self._at: dict[str, int] = {}
        self._dense: list[Tensor] = []

    def remember_dense(self) -> None:
        """Keep what the dense model's distributions are made from."""
        self._bench.sync(DENSE)
        self._dense = [self._outputs(window) for window in self._windows]

    def divergence(self, counts: Mapping[str, int], index: int | None, screen: int) -> float:
        """KL(dense || pruned), nats a token, as `Fitness` says."""
        self._prune(counts)
        if index is not None:
            states = self._outputs(self._windows[index][:screen])
            # Earlier tokens do not see later ones: these are the dense states of the part, too.
            return divergence(self._bench.head, self._dense[index][:screen], states)
        return sum(
            divergence(self._bench.head, dense, self._outputs(window))
            for window, dense in zip(self._windows, self._dense, strict=True)
        ) / len(self._windows)

    @torch.no_grad()
    def _outputs(self, ids: Tensor) -> Tensor:
        """The last hidden states [length, width]: small, and the head makes logits of them.

        Full logits where the head alone does not make the model's own.
        """
        model = self._bench.loaded.model
        ids = ids.to(model.device).unsqueeze(0)
        self._bench.tokens["allocation"] += ids.numel()
        if self._bench.head.exact:
            return hidden_states(model, ids)[0]
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
        return logits

    def _prune(self, counts: Mapping[str, int]) -> None:
        loaded = self._bench.loaded
        for name, count in counts.items():
            if self._at.get(name) == count:
                continue
            layer = loaded.layers[name]
            statistics = statistics_of(name, self._activations, self._gradients)
            dense = loaded.dense(layer)
            mask = prune_mask(
                layer.matrix(dense), statistics, self._bench.request.criterion, pruned=count
            )
            self._bench.try_mask(name, layer.stored(mask), dense)
            self._at[name] = count


@torch.no_grad()
def divergence(head: Head, dense: Tensor, pruned: Tensor) -> float:
    """Mean KL(dense || pruned) of next-token distributions, nats a token, in pieces.

    Args:
        head: makes logits of both, unless they are logits already.
        dense: hidden states or logits [tokens, width].
        pruned: the same of the pruned model.
    """
    total = 0.0
    for one, other in zip(dense.split(TOKENS_AT_ONCE), pruned.split(TOKENS_AT_ONCE), strict=True):
        logits = (head(one), head(other)) if head.exact else (one.float(), other.float())
        p, q = (part.log_softmax(dim=-1) for part in logits)
        total += float((p.exp() * (p - q)).sum())
    return total / len(dense)
