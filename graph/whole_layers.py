"""Runs with an N:M pattern: which layers can take it, and landing on a target with whole layers."""

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from prunewright.state import InputError, ModelProfile, PruneRequest
from prunewright.state.run import TOLERANCE
from prunewright.tools.counting import most_zeros

if TYPE_CHECKING:
    from prunewright.tools.model.loading import LoadedModel

MISSING = "is missing to the target, too little for any dense layer"
"""How the note ends with which a run says that it stopped short of its target."""
_NAMED = 5


def check_request(request: PruneRequest) -> None:
    """Refuse what no run of steps does: a pattern that other bounds rule out, a pruned copy.

    Raises:
        InputError: saying which.
    """
    if request.pruned is not None:
        raise InputError(
            "pruned: a run prunes the dense model step by step. A pruned copy is taken as it is by "
            "prunewright adapt (or baseline)"
        )
    whole = request.pattern_sparsity
    if whole is None:
        return
    if request.target > whole + 1e-9:
        raise InputError(
            f"target {request.target:g} is above {whole:.4g}, which is what pattern "
            f"{request.pattern} in every layer comes to: lower target, or take another pattern"
        )
    if request.max_layer_sparsity < whole - 1e-9:
        raise InputError(
            f"max_layer_sparsity {request.max_layer_sparsity:g} does not admit pattern "
            f"{request.pattern}, which takes a layer to {whole:.4g}: raise it"
        )


def check_model(
    request: PruneRequest, loaded: "LoadedModel", gains: Mapping[str, int], zeros: int
) -> None:
    """Refuse a pattern with which the target cannot be reached on a model.

    Args:
        request: with a pattern.
        loaded: the model.
        gains: weights that the pattern takes of each layer that divides into groups.
        zeros: of the dense model.

    Raises:
        InputError: no layer divides, those that do are not enough, or the smallest is too much.
    """
    group = request.pattern.partition(":")[2]
    if not gains:
        raise InputError(
            f"pattern {request.pattern} does not fit the model: no layer's inputs divide into "
            f"groups of {group}"
        )
    most = (zeros + sum(gains.values())) / loaded.prunable
    if request.target > most + TOLERANCE:
        raise InputError(
            f"target {request.target:g} cannot be reached with pattern {request.pattern}: the "
            f"inputs of {len(loaded.layers) - len(gains)} layers do not divide into groups of "
            f"{group}, and the others come to {most:.4f}"
        )
    least = min((gain for gain in gains.values() if gain), default=0)
    if least > most_zeros(request.target, loaded.prunable) - zeros:
        raise InputError(
            f"target {request.target:g} is too little for pattern {request.pattern}: the smallest "
            f"layer alone adds {least / loaded.prunable:.4g}"
        )


def fixed_deltas(profile: ModelProfile, whole: float, target: float) -> dict[str, float]:
    """The one delta that each layer may be given.

    For a dense layer that fits under the target, what is missing to the pattern's sparsity, which
    is ``whole`` unless the layer has zeros of its own; minus that for one that steps have given the
    pattern; and 0 for the others: too large, of inputs that do not divide into groups, or with the
    pattern in the dense model.

    Args:
        profile: of a run with a pattern.
        whole: sparsity of a layer that has it.
        target: of the run.
    """
    total = sum(p.parameters for p in profile.layers)
    zeros = sum(round(p.sparsity * p.parameters) for p in profile.layers)
    left = most_zeros(target, total) - zeros
    deltas = {}
    for p in profile.layers:
        delta = whole - p.pattern_own
        fits = p.pattern_cost is not None and 0 < round(delta * p.parameters) <= left
        deltas[p.name] = -delta if p.patterned else delta if fits else 0.0
    return deltas


def nothing_fits(
    profile: ModelProfile, applied: Mapping[str, float], whole: float, target: float
) -> bool:
    """Whether no dense layer fits under the target any more.

    Args:
        profile: before a step.
        applied: sparsity that the step added to each layer that it changed.
        whole: sparsity of a layer that has the pattern.
        target: of the run.
    """
    layers = [
        p.model_copy(
            update={"sparsity": p.sparsity + applied[p.name], "patterned": applied[p.name] > 0}
        )
        if p.name in applied
        else p
        for p in profile.layers
    ]
    after = profile.model_copy(update={"layers": layers})
    return max(fixed_deltas(after, whole, target).values()) <= 0


def land_whole(
    deltas: Mapping[str, float],
    pruned: Collection[str],
    counts: Mapping[str, int],
    zeros: int,
    total: int,
    target: float,
    step: float = 1.0,
) -> tuple[dict[str, int], list[str]]:
    """Weights that each layer shall give: the pattern's or none; never over the target.

    Layers are restored first, then pruned in the order of ``deltas`` as long as they fit under
    the target and the step's bound, which always admits the smallest layer that fits the target.

    Args:
        deltas: sparsity to add by layer; of a negative one the layer is restored.
        pruned: the layers that have the pattern now.
        counts: weights that the pattern takes of each layer that can be given it.
        zeros: zeros of the model now.
        total: its prunable weights.
        target: sparsity that is never exceeded.
        step: sparsity that is added to the model at most.

    Returns:
        Counts of the layers that change, and a note on those that were left out.
    """
    changes = {name: 0 for name, delta in deltas.items() if delta < 0 and name in pruned}
    back = sum(counts[name] for name in changes)
    under_target = most_zeros(target, total) - zeros
    fitting = [n for name, n in counts.items() if name not in pruned and n <= under_target]
    under_step = max(math.floor(step * total + 1e-5), min(fitting, default=0))
    left = {"the target": under_target + back, "the step": under_step + back}
    out: dict[str, list[str]] = {bound: [] for bound in left}
    for name, delta in deltas.items():
        if delta <= 0 or name in pruned or name not in counts:
            continue
        over = next((bound for bound, most in left.items() if counts[name] > most), None)
        if over is not None:
            out[over].append(name)
            continue
        changes[name] = counts[name]
        left = {bound: most - counts[name] for bound, most in left.items()}
    return changes, [
        f"left out to keep to {bound}, as layers are taken whole: {_listed(names)}"
        for bound, names in out.items()
        if names
    ]


def model_notes(profile: ModelProfile) -> list[str]:
    """What must be told once of a run with a pattern: the layers that cannot take it."""
    unfit = [p.short_name for p in profile.layers if p.pattern_cost is None]
    if not unfit:
        return []
    return [f"never pruned, as their inputs do not divide into groups: {_listed(unfit)}"]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
