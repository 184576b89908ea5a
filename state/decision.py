"""What an agent answers: which layers to prune further, and by how much."""

import math

from pydantic import BaseModel, ConfigDict, Field

MAX_REASONING = 4_000
MAX_LAYERS = 4_096
MAX_NAME = 256
MAX_CHANGE = 1_000.0


class LayerDelta(BaseModel):
    """The sparsity that a step adds to one layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(max_length=MAX_NAME, description="the layer's name exactly as in the table")
    delta: float = Field(
        ge=-1, le=1, allow_inf_nan=False, description="sparsity to add to this layer in this step"
    )


class Decision(BaseModel):
    """One step's choice: the reasons, the layers with their deltas, the change expected."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reasoning: str = Field(
        max_length=MAX_REASONING, description="why these layers and amounts, in a few sentences"
    )
    layers: list[LayerDelta] = Field(max_length=MAX_LAYERS)
    expected_ppl_change: float | None = Field(
        None,
        ge=-1,
        le=MAX_CHANGE,
        allow_inf_nan=False,
        description="relative perplexity change expected of this step, 0.02 for two per cent",
    )


def check_decision(
    decision: Decision,
    room: dict[str, float],
    parameters: dict[str, int],
    *,
    max_delta: float,
    max_step: float,
) -> list[str]:
    """What is wrong with a decision, in words the agent can act on; empty if nothing is.

    Args:
        decision: schema-valid decision with full layer names.
        room: sparsity that each layer can still take, in [0, 1].
        parameters: weights of each layer.
        max_delta: bound of one layer's delta.
        max_step: sparsity that the step may add to the whole model.
    """
    tolerance = 1e-6
    problems = []
    seen: set[str] = set()
    total = sum(parameters.values())
    gain = 0.0
    for layer in decision.layers:
        name, delta = layer.name, layer.delta
        if name not in room:
            problems.append(f"unknown layer {name[:80]!r}: use a name from the table")
            continue
        if name in seen:
            problems.append(f"layer {name} is named twice")
            continue
        seen.add(name)
        gain += delta * parameters[name] / total
        if not 0 < delta <= max_delta + tolerance:
            problems.append(f"{name}: delta {delta:g} is not in (0, {max_delta:g}]")
        elif delta > room[name] + tolerance:
            problems.append(f"{name}: delta {delta:g} exceeds the room left, {room[name]:.3f}")
    if gain > max_step + tolerance:
        problems.append(
            f"the step adds {gain:.4f} to the model's sparsity, above the limit of {max_step:.4f}: "
            "choose fewer layers, or multiply every delta by "
            f"{math.floor(1000 * max_step / gain) / 1000:.3f}"
        )
    if len(problems) > 12:
        problems = [*problems[:12], f"and {len(problems) - 12} more"]
    return problems
