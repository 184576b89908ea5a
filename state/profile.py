"""The profile of a model at one revision: what an agent sees of each layer."""

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints, model_validator

COST_DELTAS = (0.05, 0.10, 0.15)
"""The deltas, up and down, for which a profile predicts the change of the loss."""
SIGNAL_NAME = r"z_[a-z0-9_]{1,30}"
"""The form of a signal's name."""
SIGNALS = ("z_s", "z_g", "z_c")
"""The project's own signals, which every profile holds: those of `prunewright.tools.signals`."""
COST_SIGNAL = "z_c"
"""The signal that stands for all of the predicted cost."""
KNOWLEDGE_SIGNAL = "z_k"
"""The signal that takes gradients of right answers; a profile holds it where it is asked for."""

Costs = tuple[float, float, float]
"""Changes of the mean token loss, nats, at each of the `COST_DELTAS`."""

_SignalName = Annotated[str, StringConstraints(pattern=f"^{SIGNAL_NAME}$")]
_MEASURED = {"z_s": "s", "z_g": "g"}
"""Signals of profiles of version 0.1.0, whose values had fields of their own."""


def short_name(name: str) -> str:
    """The part of a layer's name from its block's index on."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[first:])


def unnumbered(path: str) -> str:
    """A path inside a block without the numbers of experts in it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


class LayerProfile(BaseModel):
    """One layer's signals and predicted costs (the costs after Optimal Brain Damage).

    ``signals``: each signal's z-score over all layers, by its name; negative is safer to prune.
    ``measured``: what each is the score of, by the same names, without those that the layer has
    not. `prunewright.tools.signals` says what they are.

    ``loss_cost``: predicted rise of the mean token loss, in nats, for taking the next
    `COST_DELTAS` from this layer with the criterion in use, less where the layer has less left,
    and dearer where it is sparser than the model. ``dense_sparsity``: the part of ``sparsity`` that
    the dense model has, and that no step can restore.
    ``regrow_gain``: predicted fall of it for restoring the last `COST_DELTAS`.
    ``domain_costs``, ``domain_gains``: the same by domain of the text, where a run has several;
    the two above are then their means at the run's weights.

    ``patterned``: whether the layer has the run's N:M pattern. ``pattern_cost``: predicted rise of
    the loss for taking the dense layer to it, and so the fall for restoring it, nats; None in an
    unstructured run, and where the layer's inputs do not divide into the pattern's groups.
    ``pattern_own``: how much of the pattern's sparsity the dense layer's own zeros make up.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    block: int
    projection: str
    parameters: int
    sparsity: float
    dense_sparsity: float = 0.0
    loss_cost: Costs
    regrow_gain: Costs = (0.0, 0.0, 0.0)
    domain_costs: dict[str, Costs] = {}
    domain_gains: dict[str, Costs] = {}
    signals: dict[_SignalName, float]
    measured: dict[_SignalName, float] = {}
    patterned: bool = False
    pattern_cost: float | None = None
    pattern_own: float = 0.0

    @model_validator(mode="before")
    @classmethod
    def _of_first_version(cls, data: Any) -> Any:
        """Version 0.1.0 had a field for each of its three signals."""
        if not isinstance(data, dict) or "signals" in data:
            return data
        data = dict(data)
        if found := {name: data.pop(name) for name in SIGNALS if name in data}:
            values = {z: data.pop(name) for z, name in _MEASURED.items() if name in data}
            data |= {"signals": found, "measured": values}
        return data

    @property
    def pruned(self) -> float:
        """Sparsity that steps have added, all of which can be restored."""
        return max(0.0, self.sparsity - self.dense_sparsity)

    def cost_of(self, delta: float) -> float:
        """Predicted change of the mean token loss, nats, for pruning ``delta`` further.

        A negative delta restores weights and lowers it. Linear between the `COST_DELTAS`, and
        beyond the last with its slope. With an N:M pattern layers change as a whole, so that only
        the sign counts. What is less than a `COST_DELTAS` away from dense, or from empty, has its
        whole cost there.
        """
        if self.pattern_cost is not None:
            return math.copysign(self.pattern_cost, delta) if delta else 0.0
        if delta < 0:
            return -_between(-delta, self.regrow_gain, self.pruned)
        return _between(delta, self.loss_cost, 1.0 - self.sparsity)

    def in_domain(self, domain: str) -> "LayerProfile":
        """The same layer as one domain alone sees it: its costs and gains."""
        return self.at_weights({domain: 1.0})

    def at_weights(self, weights: Mapping[str, float]) -> "LayerProfile":
        """The same layer with the means of the domains' costs and gains at other weights."""
        return self.model_copy(
            update={
                "loss_cost": _mean(self.domain_costs, weights),
                "regrow_gain": _mean(self.domain_gains, weights),
            }
        )

    @property
    def short_name(self) -> str:
        """Block and projection, ``7.mlp.down_proj``."""
        return f"{self.block}.{self.projection}"


def _between(delta: float, values: Costs, most: float) -> float:
    """The value at a delta, of those at the `COST_DELTAS`, none of which goes beyond ``most``."""
    points = [(0.0, 0.0)]
    for x, y in zip(COST_DELTAS, values, strict=True):
        if min(x, most) > points[-1][0]:
            points.append((min(x, most), y))
    for (x0, y0), (x1, y1) in pairwise(points):
        if delta <= x1 or x1 == points[-1][0]:
            return y0 + (y1 - y0) * (delta - x0) / (x1 - x0)
    return 0.0


def _mean(costs: Mapping[str, Costs], weights: Mapping[str, float]) -> Costs:
    """The mean of some domains' costs, by weight; a domain without one has none."""
    total = sum(weights.values())
    parts = [(weights.get(name, 0.0) / total, values) for name, values in costs.items()]
    first, second, third = (sum(w * values[i] for w, values in parts) for i in range(3))
    return first, second, third


class ModelProfile(BaseModel):
    """All layers' signals at one revision."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    revision: str
    gradient_revision: str
    gradient_step: int = 0
    """Index of the step at which gradients were last taken."""
    layers: list[LayerProfile]
    notes: list[str] = []

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that costs are known of one by one; none where there is one text only."""
        return tuple(self.layers[0].domain_costs) if self.layers else ()

    def at_weights(self, weights: Mapping[str, float]) -> "ModelProfile":
        """The profile whose costs and gains are the means of the domains' at other weights.

        Args:
            weights: by domain, not negative, and not all 0; a domain without one has none.
        """
        if not self.domains:
            return self
        layers = [layer.at_weights(weights) for layer in self.layers]
        return self.model_copy(update={"layers": layers})

    def predicted_changes(self, deltas: Mapping[str, float]) -> dict[str, float]:
        """`predicted_change` of each domain alone."""
        named = {p.name: p for p in self.layers if p.name in deltas}
        return {
            domain: _as_change(
                sum(named[n].in_domain(domain).cost_of(d) for n, d in deltas.items())
            )
            for domain in self.domains
        }

    def predicted_change(self, deltas: Mapping[str, float]) -> float:
        """Relative perplexity change that the layers' loss costs predict for some deltas."""
        layers = {p.name: p for p in self.layers}
        loss = sum(layers[name].cost_of(delta) for name, delta in deltas.items())
        return _as_change(loss)

    def table(self) -> dict[str, str]:
        """Compact rows by short name, under a head, for the checkpointed state."""
        names = list(self.layers[0].signals) if self.layers else []
        return {"layer": " ".join(["sparsity", *names])} | {
            p.short_name: " ".join([f"{p.sparsity:.3f}", *(f"{p.signals[n]:.2f}" for n in names)])
            for p in self.layers
        }


def _as_change(loss: float) -> float:
    """Relative change of the perplexity for that of the mean token loss, nats."""
    # Far beyond what is meant by a step, the sums run off: still a change that has a logarithm.
    return math.expm1(min(max(loss, -20.0), 50.0))
