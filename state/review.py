"""A person's look at a decision before it is applied: what is asked, answered and recorded."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from prunewright.state.decision import MAX_REASONING, Decision, LayerDelta

HOW = (
    'answer {"approve": true}, {"edit": {"layers": [{"name": "...", "delta": 0.1}, ...]}} or '
    '{"reject": "why"}'
)


class ReviewedLayer(BaseModel):
    """What a decision does to one layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Block and projection, or the full name."""
    sparsity: float
    delta: float
    after: float


class ReviewRequest(BaseModel):
    """A decision that waits for a person; nothing has been pruned by it yet."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    """Counted from 1."""
    agent: str
    reasoning: str
    layers: list[ReviewedLayer]
    rebalance: bool
    lessons: list[str] | None
    expected_ppl_change: float | None
    """Relative perplexity change that the agent expects."""
    predicted_change: float | None
    """The same as the profile predicts it."""
    perplexity: float
    """Guard perplexity before the step."""
    sparsity: float
    sparsity_after: float
    """Of the model, if the step is accepted."""
    notes: list[str] = []
    problems: list[str] = []
    """Why the last answer was refused; empty at first."""
    refused: Any = None
    """That answer."""
    how: str = HOW

    @property
    def decision(self) -> Decision:
        """The agent's decision."""
        return Decision(
            reasoning=self.reasoning,
            layers=[LayerDelta(name=item.name, delta=item.delta) for item in self.layers],
            expected_ppl_change=self.expected_ppl_change,
            rebalance=self.rebalance,
            lessons=self.lessons,
        )


class ReviewAnswer(BaseModel):
    """What a person says to a `ReviewRequest`: exactly one of the three."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    approve: Literal[True] | None = None
    edit: dict[str, Any] | None = None
    """Keys of a `Decision` that replace the agent's; layers and groups are replaced together."""
    reject: str | None = Field(None, max_length=MAX_REASONING // 2)
    """Why: it reaches the agent."""


class Review(BaseModel):
    """What became of a decision in a review."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    verdict: Literal["approved", "edited", "rejected"]
    words: str = ""
    """Why it was rejected."""
    proposed: Decision | None = None
    """The agent's decision, where another was applied or none."""
    refused: list[str] = []
    """What was wrong with each answer of the person that was sent back."""
