"""The profile of a model: every layer's signals and predicted costs at one revision."""

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from torch import Tensor

from prunewright.state.profile import COST_DELTAS, SIGNALS, Costs, LayerProfile, ModelProfile
from prunewright.tools.calibration.activations import Activations
from prunewright.tools.calibration.costs import (
    crowded_costs,
    crowding_exponent,
    predict_each,
    predict_pattern_loss,
)
from prunewright.tools.calibration.gradients import Gradients
from prunewright.tools.criteria import LayerStatistics
from prunewright.tools.model.loading import LoadedModel
from prunewright.tools.signals import Measured, find_signals, z_scores


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


def build_profile(
    loaded: LoadedModel,
    activations: Activations,
    gradients: Gradients,
    criterion: str,
    *,
    revision: str,
    gradient_revision: str,
    sparsities: dict[str, float],
    own: Mapping[str, float] = MappingProxyType({}),
    pattern: tuple[int, int] | None = None,
    pattern_own: Mapping[str, float] = MappingProxyType({}),
    patterned: Collection[str] = (),
    reconstruct: bool = False,
    signals: Iterable[str] = (),
    weights: Mapping[str, float] = MappingProxyType({}),
    knowledge: Mapping[str, Tensor] | None = None,
) -> ModelProfile:
    """Every layer's signals and their z-scores over the layers.

    Costs by domain are predicted where the gradients have domains and no pattern fixes what a layer
    gives: of the weights that the criterion would prune by the statistics of all.

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
        signals: names of signals as in a configuration, computed beside all of `SIGNALS`.
        weights: how much each domain of the gradients counts, not all 0.
        knowledge: E[d_i^2] of the right answers by layer, where a signal asks for it.

    Raises:
        InputError: a signal from outside cannot be used.
    """
    computed = find_signals([*SIGNALS, *signals])
    values: dict[str, list[float | None]] = {signal.name: [] for signal in computed}
    profiles = []
    exponent = crowding_exponent(reconstruct)
    mean = sum(sparsities[n] * ly.numel for n, ly in loaded.layers.items()) / loaded.prunable
    whole = 0.0 if pattern is None else 1 - pattern[0] / pattern[1]
    domains = {} if pattern is not None else gradients.domains
    layers = list(loaded.layers.values())
    # One layer's dense weights at a time: a whole model's would double the memory.
    for layer, weight in zip(layers, loaded.dense_layers(layers), strict=True):
        name, dense = layer.name, layer.matrix(weight)
        statistics = statistics_of(name, activations, gradients)
        middle, span = sparsities[name], (0.0, *COST_DELTAS)
        up = [min(middle + delta, 1.0) for delta in span]
        down = [max(middle - delta, own.get(name, 0.0)) for delta in span]
        others = [squares[name] for squares in domains.values()]
        others += [] if knowledge is None else [knowledge[name]]
        losses = predict_each(dense, statistics, criterion, [*up, *down], others)

        def crowded(levels: list[float], found: list[float]) -> Costs:
            first, second, third = crowded_costs(levels, found, mean, exponent)
            return first, second, third

        costs = [crowded(up, found[: len(span)]) for found in losses]
        gains = [crowded(down, found[len(span) :]) for found in losses]
        profile = LayerProfile(
            name=name,
            block=layer.block,
            projection=layer.projection,
            parameters=layer.numel,
            sparsity=middle,
            dense_sparsity=own.get(name, 0.0),
            loss_cost=costs[0],
            regrow_gain=gains[0],
            domain_costs=dict(zip(domains, costs[1:], strict=False)),
            domain_gains=dict(zip(domains, gains[1:], strict=False)),
            signals={},
        )
        if domains:
            profile = profile.at_weights(weights)
        pattern_cost = None
        if pattern is not None and layer.inputs % pattern[1] == 0:
            # Each layer makes the whole way, crowded alike: no `crowded_costs`.
            pattern_cost = predict_pattern_loss(dense, statistics, criterion, pattern)
        found = Measured(
            layer=layer,
            dense=dense,
            live=layer.matrix(loaded.weight(layer)),
            statistics=statistics,
            gradient=gradients.mean_absolute[name],
            sparsity=middle,
            dense_sparsity=own.get(name, 0.0),
            loss_cost=profile.loss_cost,
            pattern_cost=pattern_cost,
            pattern_gain=0.0 if pattern_cost is None else whole - pattern_own.get(name, 0.0),
            patterned=pattern is not None,
            knowledge_cost=None if knowledge is None else costs[-1],
        )
        for signal in computed:
            values[signal.name].append(signal.compute(found))
        profiles.append(
            profile.model_copy(
                update={
                    "patterned": pattern is not None and name in patterned,
                    "pattern_cost": pattern_cost,
                    "pattern_own": pattern_own.get(name, 0.0),
                }
            )
        )
    scores = {name: z_scores(column) for name, column in values.items()}
    return ModelProfile(
        revision=revision,
        gradient_revision=gradient_revision,
        layers=[
            profile.model_copy(
                update={
                    "signals": {name: column[i] for name, column in scores.items()},
                    "measured": {
                        name: value
                        for name, column in values.items()
                        if (value := column[i]) is not None
                    },
                }
            )
            for i, profile in enumerate(profiles)
        ],
        notes=[*loaded.notes, *activations.notes, *gradients.notes],
    )
