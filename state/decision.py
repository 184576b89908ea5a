"""What an agent answers: which layers to prune further, or restore, and by how much."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

MAX_REASONING = 4_000
MAX_LAYERS = 65_536  # models with experts as layers of their own have thousands
MAX_GROUPS = 512
MAX_NAME = 256
MAX_CHANGE = 1_000.0
MAX_LESSONS = 8
MAX_LESSON = 300
MAX_MOVES = 4
"""Moves that one answer may have measured."""
SHOWN = 5e-4
"""How far a layer's sparsity is from the three digits shown, all of which may be restored."""

MAX_DOMAINS = 64
MAX_WEIGHT = 1_000.0

Lesson = Annotated[str, Field(max_length=MAX_LESSON)]
DomainName = Annotated[str, Field(max_length=MAX_NAME)]
Weight = Annotated[float, Field(ge=0, le=MAX_WEIGHT, allow_inf_nan=False)]


class LayerDelta(BaseModel):
    """The sparsity that a step adds to one layer; a negative one restores weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(max_length=MAX_NAME, description="the layer's name exactly as in the table")
    delta: float = Field(
        ge=-1,
        le=1,
        allow_inf_nan=False,
        description="sparsity to add to this layer in this step; negative restores weights",
    )


class GroupDelta(BaseModel):
    """The same delta for one projection over a range of blocks."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    projection: str = Field(
        max_length=MAX_NAME, description="the layers' name without the block, mlp.up_proj"
    )
    first: int = Field(alias="from", ge=0, description="first block, included")
    last: int = Field(alias="to", ge=0, description="last block, included")
    delta: float = Field(
        ge=-1, le=1, allow_inf_nan=False, description="as for one layer, the same for each"
    )


class Move(BaseModel):
    """Some layers with their deltas, to be measured together and not applied."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    layers: list[LayerDelta] = Field([], max_length=MAX_LAYERS)
    groups: list[GroupDelta] = Field([], max_length=MAX_GROUPS)


class Trials(BaseModel):
    """An answer in place of a decision: moves to measure first, after which one is asked again."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    moves: list[Move] = Field(
        min_length=1,
        max_length=MAX_MOVES,
        serialization_alias="probes",  # as an LLM says it
    )


ENOUGH: tuple[JsonDict, ...] = (
    {"required": ["reasoning", "layers"]},
    {"required": ["reasoning", "groups"], "properties": {"groups": {"minItems": 1}}},
    {"required": ["accept"], "properties": {"accept": {"const": True}}},
    {"required": ["weights"], "properties": {"weights": {"type": "object", "minProperties": 1}}},
)
"""What a decision holds at least, one of these, as a schema says it."""


class Decision(BaseModel):
    """One step's choice: the ranking's proposal, edits of it, or layers and deltas of one's own.

    Reasoning and layers may be left out of one that takes the proposal; its layers and groups are
    edits, added to the proposal's deltas.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        serialize_by_alias=True,
        json_schema_extra={"anyOf": [*ENOUGH]},
    )

    reasoning: str = Field(
        "", max_length=MAX_REASONING, description="why these layers and amounts, in a few sentences"
    )
    accept: bool | None = Field(
        None,
        description="true takes the proposal; layers and groups are then added to it; false or "
        "null: they are the whole decision",
    )
    weights: dict[DomainName, Weight] | None = Field(
        None,
        max_length=MAX_DOMAINS,
        description="takes the proposal that the ranking makes at these weights of the domains; a "
        "domain that is not named keeps its own",
    )
    layers: list[LayerDelta] = Field([], max_length=MAX_LAYERS)
    groups: list[GroupDelta] = Field(
        [], max_length=MAX_GROUPS, description="several layers at once: a projection, from to"
    )
    expected_ppl_change: float | None = Field(
        None,
        ge=-1,
        le=MAX_CHANGE,
        allow_inf_nan=False,
        description="relative perplexity change expected of this step, 0.02 for two per cent",
    )
    rebalance: bool = Field(
        False, description="true for a step that is meant to gain no sparsity as a whole"
    )
    done: bool = Field(
        True,
        description="false: the run goes on after the target is reached, while steps are left",
    )
    lessons: list[Lesson] | None = Field(
        None,
        max_length=MAX_LESSONS,
        description="what to remember in later steps; replaces the lessons so far",
    )

    @property
    def deltas(self) -> dict[str, float]:
        """Sparsity added to each layer that is named."""
        return {item.name: item.delta for item in self.layers}

    @property
    def takes_proposal(self) -> bool:
        """Whether it begins from the ranking's proposal."""
        return bool(self.accept or self.weights)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """A key that is null says nothing, and who chooses groups need not choose layers."""
        if not isinstance(data, dict):
            return data
        said = {k: v for k, v in data.items() if v is not None or k not in cls.model_fields}
        return {"layers": [], **said} if said.get("groups") else said

    @model_validator(mode="after")
    def _says_enough(self) -> "Decision":
        if self.weights and self.accept is False:
            words = "weights take a proposal: leave them out, or do not say accept: false"
            raise PydanticCustomError("torn", words)
        left_out = [key for key in ("reasoning", "layers") if key not in self.model_fields_set]
        if left_out and not self.takes_proposal:
            words = f"{' and '.join(left_out)} must be there, or accept: true"
            raise PydanticCustomError("missing", words)
        return self


def check_decision(
    decision: Decision,
    room: Mapping[str, float],
    pruned: Mapping[str, float],
    parameters: Mapping[str, int],
    *,
    max_delta: float,
    max_step: float,
    fixed: Mapping[str, float] | None = None,
) -> list[str]:
    """What is wrong with a decision, in words the agent can act on; empty if nothing is.

    Args:
        decision: schema-valid decision with full layer names, its groups expanded.
        room: sparsity that each layer can still take, in [0, 1].
        pruned: sparsity that steps have added to each layer, and so can be restored.
        parameters: weights of each layer.
        max_delta: bound of one layer's delta, either way.
        max_step: sparsity that the step may add to the whole model; inf: it may also add none.
        fixed: with an N:M pattern the one delta of each layer, 0 for those that have none; it
            takes the place of ``max_delta``, ``room`` and ``pruned``.
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
        if delta == 0:
            problems.append(f"{name}: delta is 0: leave the layer out")
        elif fixed is not None:
            problems += _fixed_problems(name, delta, fixed[name])
        elif abs(delta) > max_delta + tolerance:
            problems.append(f"{name}: delta {delta:g} is not within {max_delta:g} of 0")
        elif delta > room[name] + tolerance:
            digits = next(d for d in range(3, 9) if d == 8 or round(room[name], d) < delta)
            left = f"{room[name]:.{digits}f}"
            problems.append(f"{name}: delta {delta:g} exceeds the room left, {left}")
        elif -delta > pruned[name] + SHOWN:
            problems.append(f"{name}: delta {delta:g} restores more than {pruned[name]:.3f}")
    if gain > max_step + SHOWN:
        problems.append(
            f"the step adds {gain:.5f} to the model's sparsity, above the limit of {max_step:.5f}: "
            + _less(gain, max_step, fixed is not None)
        )
    if math.isinf(max_step):  # nothing but layers is bounded
        return first_problems(problems)
    if decision.rebalance and gain > SHOWN:
        problems.append(
            f"rebalance: true is for a step that gains no sparsity as a whole, and this one gains "
            f"{gain:.4f}: leave it out, or restore as much as you prune"
        )
    if seen and gain <= 0 and not decision.rebalance:
        problems.append(
            f"the step as a whole gains no sparsity ({gain:+.4f}): prune more than you restore, "
            "or say rebalance: true"
        )
    return first_problems(problems)


def first_problems(problems: list[str]) -> list[str]:
    """Each problem once, the first 12, and how many more there are."""
    problems = list(dict.fromkeys(problems))
    return [*problems[:12], *([f"and {len(problems) - 12} more"] if len(problems) > 12 else [])]


def _less(gain: float, max_step: float, whole: bool) -> str:
    """How a step that adds too much can be mended."""
    if max_step <= 0 and not whole:
        return "restore as much in the same step, with rebalance: true"
    factor = math.floor(1000 * max_step / gain) / 1000
    scaled = "" if whole else f", or multiply every delta by {factor:.3f}"
    return f"choose fewer layers{scaled}"


def _fixed_problems(name: str, delta: float, fixed: float) -> list[str]:
    """What is wrong with a delta where a pattern fixes it."""
    if fixed == 0:
        return [
            f"{name}: this layer cannot be chosen: its inputs do not divide into the pattern's "
            "groups, it has the pattern in the dense model, or it is too large for what is missing "
            "to the target"
        ]
    if abs(delta - fixed) <= SHOWN:
        return []
    words = "restores it" if fixed < 0 else "prunes it"
    return [f"{name}: delta {delta:g} must be {fixed:.4g}, which {words} as a whole"]
