"""From an agent's deltas to whole weights: never over the target, the step or a layer's room."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from prunewright.graph.whole_layers import land_whole
from prunewright.tools.counting import most_zeros

if TYPE_CHECKING:
    from prunewright.tools.bench.workbench import Workbench


def changed_counts(
    bench: "Workbench",
    revision: str,
    deltas: dict[str, float],
    fill: float = 0.0,
    *,
    bounded: bool = True,
) -> tuple[dict[str, int], list[str]]:
    """As `land` at the live revision, of the layers whose number of zeros changes.

    With an N:M pattern as `land_whole`. Without bounds neither the target nor the step scales
    anything.
    """
    request, zeros = bench.request, bench.zeros()
    target, step = (request.target, request.step) if bounded else (1.0, 1.0)
    sizes = {name: layer.numel for name, layer in bench.loaded.layers.items()}
    if request.pattern_sparsity is not None:
        changes, notes = land_whole(
            deltas,
            pruned=bench.store.manifest(revision),
            counts={name: gain for name, gain in bench.pattern_gains().items() if gain},
            zeros=sum(zeros.values()),
            total=bench.loaded.prunable,
            target=target,
            step=step,
        )
        return {name: bench.dense_zeros[name] + gain for name, gain in changes.items()}, notes
    counts, notes = land(
        deltas,
        zeros,
        sizes,
        target,
        request.max_layer_sparsity,
        step,
        request.max_delta,
        fill,
        own=bench.dense_zeros,
    )
    return {name: count for name, count in counts.items() if count != zeros[name]}, notes


def land(
    deltas: dict[str, float],
    zeros: dict[str, int],
    numel: dict[str, int],
    target: float,
    ceiling: float = 1.0,
    step: float = 1.0,
    max_delta: float = 1.0,
    fill: float = 0.0,
    own: Mapping[str, int] = MappingProxyType({}),
) -> tuple[dict[str, int], list[str]]:
    """Zeros that each layer shall have; what is added is scaled to keep to the target and step.

    Counts are whole weights: each delta is rounded towards 0, and what the pruned layers as a
    whole lose by that goes, one weight each, to those that lost most. Where that ends less than
    ``fill`` below the target, what is added is scaled up to land on it to the weight, as far as
    the layers that are pruned have room.

    Args:
        deltas: sparsity to add by layer; negative restores.
        zeros: zeros of every layer now.
        numel: weights of every layer.
        target: sparsity that is never exceeded.
        ceiling: sparsity that no layer exceeds, to the next whole weight: agents count in
            fractions, and a fraction that could never be taken would be offered for ever.
        step: sparsity that is added to the model at most.
        max_delta: sparsity that scaling up adds to a layer at most.
        fill: sparsity below the target within which the step is scaled up to it.
        own: zeros of the dense model, which are never restored; 0 where it is not said.

    Returns:
        Counts of the layers named in ``deltas``, and a note where they were scaled.
    """
    back = {
        n: min(math.floor(-delta * numel[n] + 1e-6), zeros[n] - own.get(n, 0))
        for n, delta in deltas.items()
        if delta < 0
    }
    total = sum(numel.values())
    bounds = {
        "land on the target": most_zeros(target, total) - sum(zeros.values()),
        "keep to the step": step * total,
    }
    purpose = min(bounds, key=lambda words: bounds[words])
    left = max(0, bounds[purpose] + sum(back.values()))
    shares = {name: delta * numel[name] for name, delta in deltas.items() if delta >= 0}
    wanted = sum(shares.values())
    notes = []
    if wanted > left + 1e-6:
        scale = left / wanted
        shares = {name: scale * share for name, share in shares.items()}
        notes.append(f"deltas scaled by {scale:.4f} to {purpose}")
    room = {n: max(0, math.ceil(ceiling * numel[n] - 1e-6) - zeros[n]) for n in shares}
    gains = {n: math.floor(share + 1e-6) for n, share in shares.items()}
    lost = max(0, math.floor(sum(shares.values()) + 1e-3) - sum(gains.values()))
    open_ = [n for n in shares if gains[n] < min(room[n], shares[n])]
    for name in sorted(open_, key=lambda n: (gains[n] - shares[n], n))[:lost]:
        gains[name] += 1
    gains = {n: min(gain, room[n]) for n, gain in gains.items()}
    gained = sum(gains.values())
    missing = max(0, int(bounds["land on the target"]) + sum(back.values())) - gained
    if 0 < missing <= fill * total and gained:
        limits = {n: min(room[n], math.floor(max_delta * numel[n] + 1e-6)) for n in shares}
        gains = _raised(gains, shares, limits, min(missing, max(0, math.floor(left) - gained)))
        scale = sum(gains.values()) / gained
        if f"{scale:.4f}" != "1.0000":
            notes.append(f"deltas scaled by {scale:.4f} to land on the target")
    changes = gains | {name: -count for name, count in back.items()}
    return {name: zeros[name] + change for name, change in changes.items()}, notes


def _raised(
    gains: dict[str, int], shares: dict[str, float], limits: dict[str, int], missing: int
) -> dict[str, int]:
    """Gains with so many weights more, in proportion to the shares, none above its limit."""
    gains = dict(gains)
    while missing > 0:
        open_ = sorted((n for n in gains if gains[n] < limits[n]), key=lambda n: (-shares[n], n))
        if not open_:
            break
        scale = missing / max(sum(shares[n] for n in open_), 1e-9)
        more = {n: min(math.floor(scale * shares[n]), limits[n] - gains[n]) for n in open_}
        if not any(more.values()):
            more = dict.fromkeys(open_[:missing], 1)
        gains |= {n: gains[n] + count for n, count in more.items()}
        missing -= sum(more.values())
    return gains
