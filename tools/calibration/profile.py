"""The profile of a model: every layer's signals and predicted costs at one revision."""

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from prunewright.state.profile import COST_DELTAS, LayerProfile, ModelProfile
from prunewright.tools.calibration.activations import Activations
from prunewright.tools.calibration.costs import (
    crowded_costs,
    crowding_exponent,
    predict_losses,
    predict_pattern_loss,
)
from prunewright.tools.calibration.gradients import Gradients
from prunewright.tools.criteria import LayerStatistics
from prunewright.tools.model.loading import LoadedModel
from prunewright.tools.signals import SIGNALS, Measured, find_signals, z_scores


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
        signals: names of signals as in a configuration, computed beside all of `SIGNALS`.

    Raises:
        InputError: a signal from outside cannot be used.
    """
    computed = find_signals([*SIGNALS, *signals])
    values: dict[str, list[float | None]] = {signal.name: [] for signal in computed}
    profiles = []
    exponent = crowding_exponent(reconstruct)
    mean = sum(sparsities[n] * ly.numel for n, ly in loaded.layers.items()) / loaded.prunable
    whole = 0.0 if pattern is None else 1 - pattern[0] / pattern[1]
    layers = list(loaded.layers.values())
    # One layer's dense weights at a time: a whole model's would double the memory.
    for layer, weight in zip(layers, loaded.dense_layers(layers), strict=True):
        name, dense = layer.name, layer.matrix(weight)
        statistics = statistics_of(name, activations, gradients)
        middle, span = sparsities[name], (0.0, *COST_DELTAS)
        up = [min(middle + delta, 1.0) for delta in span]
        down = [max(middle - delta, own.get(name, 0.0)) for delta in span]
        losses = predict_losses(dense, statistics, criterion, [*up, *down])
        cost = crowded_costs(up, losses[: len(span)], mean, exponent)
        gain = crowded_costs(down, losses[len(span) :], mean, exponent)
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
            loss_cost=tuple(cost),
            pattern_cost=pattern_cost,
            pattern_gain=0.0 if pattern_cost is None else whole - pattern_own.get(name, 0.0),
            patterned=pattern is not None,
        )
        for signal in computed:
            values[signal.name].append(signal.compute(found))
        profiles.append(
            LayerProfile(
                name=name,
                block=layer.block,
                projection=layer.projection,
                parameters=layer.numel,
                sparsity=middle,
                dense_sparsity=own.get(name, 0.0),
                loss_cost=(cost[0], cost[1], cost[2]),
                regrow_gain=(gain[0], gain[1], gain[2]),
                signals={},
                patterned=pattern is not None and name in patterned,
                pattern_cost=pattern_cost,
                pattern_own=pattern_own.get(name, 0.0),
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
