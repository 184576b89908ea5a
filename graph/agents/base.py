"""What an agent sees and what it must be able to do."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from prunewright.graph.whole_layers import fixed_deltas
from prunewright.state import (
    COST_DELTAS,
    Decision,
    ModelProfile,
    ProbeReport,
    PrunewrightError,
    Step,
    Trials,
)
from prunewright.state.config import pattern_sparsity
from prunewright.state.decision import MAX_NAME
from prunewright.state.profile import COST_SIGNAL, SIGNALS
from prunewright.state.run import Best
from prunewright.tools.counting import most_zeros


class InvalidAnswerError(PrunewrightError):
    """An agent's answer is not a decision; the message says what is wrong with it."""

    def __init__(self, problem: str, answer: str = "") -> None:
        super().__init__(problem)
        self.answer = answer


@dataclass(frozen=True)
class Refusal:
    """An answer of this step that was refused, and why."""

    answer: str
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Observation:
    """All that an agent may base a decision on.

    Attributes:
        step: index of the step, from 0.
        steps_left: steps until ``max_steps``, this one included.
        target: sparsity to reach over all prunable weights.
        sparsity: the accepted revision's.
        max_step: sparsity that this step may add to the whole model.
        max_delta: sparsity that it may add to one layer; without meaning where a pattern fixes it.
        max_layer_sparsity: ceiling of any layer.
        max_increase: relative perplexity rise that is rolled back; the smallest of ``bounds``.
        max_total_increase: rise over the dense model's perplexity that is rolled back; None: any.
        max_knowledge_drop: fall below the dense model, of the log-probability of the right answers
            to questions of fact, that is rolled back, nats a token; None: any.
        criterion: which weights go inside a layer.
        crowded: whether costs hold a factor for how sparse each layer is: `crowded_costs` in
            tools/calibration/costs.py.
        pattern: ``unstructured``, or ``2:4`` in a run that takes whole layers to that pattern.
        dense_perplexity: guard perplexity of the dense model.
        perplexity: guard perplexity of the accepted revision.
        profile: every layer's signals; with domains its costs are means at ``weights``.
        goal: what the user wants kept, in words of theirs; None: nothing was said.
        weights: how much each domain counts; empty where there is one text only.
        domains: by domain, guard perplexity of the dense model and of the accepted revision.
        bounds: by domain, the relative perplexity rise that is rolled back.
        signals: which z-scores an LLM is shown, as a configuration names them; z_c stands for all
            of the predicted cost.
        history: the earlier steps; empty without feedback.
        feedback: whether an LLM is told what its earlier steps did.
        prompts: folder with templates of the prompt that replace the project's.
        seed: the run's.
        thread: the run's name, which no other run has.
        stalls: steps just before this one that were rolled back or chose nothing, in a row.
        best: the best revision at the target so far; None until the target was reached.
        refusals: answers of this very step that were refused.
        probes: what the moves came to that were measured in this step, refused ones too.
        max_probes: moves that may be measured before this step is decided on.
        tries: answers of this very step so far, whatever became of them.
    """

    step: int
    steps_left: int
    target: float
    sparsity: float
    max_step: float
    max_delta: float
    max_layer_sparsity: float
    max_increase: float
    criterion: str
    dense_perplexity: float
    perplexity: float
    profile: ModelProfile
    max_total_increase: float | None = None
    max_knowledge_drop: float | None = None
    goal: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    domains: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)
    crowded: bool = False
    pattern: str = "unstructured"
    signals: tuple[str, ...] = SIGNALS
    history: tuple[Step, ...] = ()
    feedback: bool = True
    prompts: str | None = None
    seed: int = 0
    thread: str = ""
    stalls: int = 0
    best: Best | None = None
    refusals: tuple[Refusal, ...] = ()
    probes: tuple[ProbeReport, ...] = ()
    max_probes: int = 0
    tries: int = 0

    @property
    def pattern_sparsity(self) -> float | None:
        """Sparsity of a layer that has the pattern; None in an unstructured run."""
        return pattern_sparsity(self.pattern)

    @property
    def probes_left(self) -> int:
        """Moves that may still be measured before this step is decided on."""
        return max(0, self.max_probes - len(self.probes))

    @property
    def costs_shown(self) -> bool:
        """Whether an LLM is shown predicted costs."""
        return COST_SIGNAL in self.signals

    @property
    def weighable(self) -> bool:
        """Whether other weights of the domains make another proposal."""
        several = len(self.profile.domains) > 1
        return several and self.costs_shown and self.pattern_sparsity is None

    @property
    def gradient_age(self) -> int:
        """Steps since gradients were taken; 0 if nothing was changed since."""
        profile = self.profile
        unchanged = profile.gradient_revision == profile.revision
        return 0 if unchanged else self.step - profile.gradient_step

    @property
    def pace(self) -> float:
        """Mean sparsity a step that reaches the target in the steps left."""
        return (self.target - self.sparsity) / self.steps_left

    @property
    def budget(self) -> float:
        """Sparsity that this step may usefully add to the whole model.

        With a pattern at least the smallest layer that fits under the target. 0 where not one
        weight more fits: the target need not be a whole number of them.
        """
        if round(self.sparsity * self.prunable) >= most_zeros(self.target, self.prunable):
            return 0.0
        step = max(self.max_step, self.smallest / self.prunable)
        return max(0.0, min(step, self.target - self.sparsity))

    @property
    def smallest(self) -> float:
        """Weights of the smallest layer that a pattern can still take; 0 without a pattern."""
        fixed = self.fixed_deltas() or {}
        sizes = (fixed[p.name] * p.parameters for p in self.profile.layers if p.name in fixed)
        return min((size for size in sizes if size > 0), default=0.0)

    @property
    def prunable(self) -> int:
        """Number of prunable weights of the model."""
        return sum(p.parameters for p in self.profile.layers)

    @property
    def cost_deltas(self) -> tuple[float, ...]:
        """The deltas at which costs are told: the profile's, or the one that a pattern fixes."""
        return COST_DELTAS if self.pattern_sparsity is None else (self.pattern_sparsity,)

    @property
    def lessons(self) -> list[str]:
        """What the agent last said it learnt."""
        stated = (r.decision.lessons for r in reversed(self.history))
        return next((lessons for lessons in stated if lessons is not None), [])

    def room(self) -> dict[str, float]:
        """Sparsity that each layer can still take, whatever a step's bound."""
        fixed = self.fixed_deltas()
        if fixed is not None:
            return {name: max(0.0, delta) for name, delta in fixed.items()}
        return {p.name: max(0.0, self.max_layer_sparsity - p.sparsity) for p in self.profile.layers}

    def fixed_deltas(self) -> dict[str, float] | None:
        """With a pattern, the one delta that each layer may be given; None without one.

        It is positive for a dense layer, negative for one that has the pattern and can give it
        back, 0 for one that cannot be chosen.
        """
        if self.pattern_sparsity is None:
            return None
        return fixed_deltas(self.profile, self.pattern_sparsity, self.target)


class Agent(Protocol):
    """Whoever allocates sparsity. ``import:package.module:Class`` takes a class of this form."""

    def decide(self, observation: Observation) -> Decision | Trials:
        """Choose the layers of one step and their deltas, or moves to measure first.

        After moves it is called again, with what they came to in ``observation.probes``.

        Raises:
            InvalidAnswerError: the answer is no decision; it may be asked again.
            AgentError: the agent could not be asked; the run stops and can be resumed.
        """
        ...


def quote_name(name: str) -> str:
    """A layer's name as a prompt may hold it: plain, or a JSON string if it has more.

    Cut where it is longer than an answer may name.
    """
    if len(name) <= MAX_NAME and re.fullmatch(r"[\w.\-]+", name, re.ASCII):
        return name
    return json.dumps(name[:MAX_NAME])
