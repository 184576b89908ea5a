"""What is kept of each step: the full record on disk, a short one in the state."""

from typing import Literal

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict

from prunewright.state.decision import Decision
from prunewright.state.review import Review

MAX_REFUSED = 4_000
"""Characters that are kept of an answer that was refused."""

Verdict = Literal["accepted", "rolled_back", "empty"]


class Spent(BaseModel):
    """What asking an LLM took."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    calls: int = 0
    """Requests, failed ones too."""
    tokens: int = 0
    """Tokens exchanged, as the provider counts them."""

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(calls=self.calls + other.calls, tokens=self.tokens + other.tokens)


class ProbeReport(BaseModel):
    """A trial that an agent had measured before it decided, and what it came to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: dict[str, float] = {}
    """Sparsity added to each layer, or given back if negative, for the time of the trial."""
    change: float | None = None
    """Relative perplexity change over the accepted revision; None: refused, or not finite."""
    change_stderr: float | None = None
    """Standard error of the paired change over the windows of the trial."""
    tokens: int = 0
    """Tokens of guard text scored."""
    refused: str = ""
    """Why it was not measured; "" if it was."""


class DecisionReport(BaseModel):
    """A decision and how it came about."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    agent: str
    decision: Decision
    predicted_change: float | None = None
    """Relative perplexity change that the profile's loss_cost predicts for the decision."""
    invalid_answers: list[str] = []
    """What was wrong with each answer that was refused before this one."""
    refused_answers: list[str] = []
    """Their texts in the same order, cut at `MAX_REFUSED` characters, without keys."""
    repairs: int = 0
    """How many of them were sent back."""
    notes: list[str] = []
    calls: int = 0
    """Requests to the LLM, failed ones too."""
    tokens: int = 0
    """Tokens exchanged with it."""
    probes: list[ProbeReport] = []
    """Trials measured before it."""
    review: Review | None = None
    """What a person said to it; None: nobody was asked."""

    @property
    def refused(self) -> bool:
        """Whether every answer was refused, the last repair's, too."""
        return len(self.invalid_answers) > self.repairs


class AppliedDecision(BaseModel):
    """A decision and what came of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    report: DecisionReport
    applied: dict[str, float] = {}
    """Sparsity really added to each layer, after the landing on the target."""
    predicted_costs: dict[str, float] = {}
    """Predicted rise of the mean token loss for it, nats, by ``projection@depth``."""
    notes: list[str] = []


class StepRecord(BaseModel):
    """One step, whole: a line of trace.jsonl."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    agent: str
    verdict: Verdict
    reason: str
    """Why the step was rolled back or is empty; "" for an accepted one."""
    decision: Decision
    applied: dict[str, float]
    """Sparsity really added to each layer, after the landing on the target."""
    predicted_costs: dict[str, float] = {}
    """Predicted rise of the mean token loss for it, nats, by ``projection@depth``."""
    invalid_answers: list[str]
    refused_answers: list[str] = []
    """Texts of the answers that were refused, as in `DecisionReport`."""
    notes: list[str]
    profile: str
    """Path of the step's profile in the run directory."""
    revision: str
    """The accepted revision after the step."""
    candidate: str | None
    sparsity_before: float
    sparsity: float
    asked: float | None = None
    """Sparsity that the step might add, within its bound and up to the target; None: a baseline."""
    perplexity_before: float
    candidate_perplexity: float | None
    """None: not evaluated, or not finite (the reason says which)."""
    change: float | None
    """Relative perplexity change of the candidate over the revision accepted before."""
    change_stderr: float | None
    """Standard error of the paired change over the guard windows."""
    knowledge_dense: float | None = None
    """Mean log-probability of the right answers to the facts by the dense model, nats a token;
    None: the guard did not bound it."""
    candidate_knowledge: float | None = None
    """The candidate's; None: not measured, or not finite (the reason says so)."""
    predicted_change: float | None
    repairs: int = 0
    """Refused answers that were sent back with what was wrong."""
    llm_calls: int = 0
    """Requests to the LLM, failed ones too."""
    llm_tokens: int
    probes: list[ProbeReport] = []
    """Trials that the agent had measured before it decided."""
    review: Review | None = None
    """What a person said to the decision; None: nobody was asked."""
    previous: str = ""
    """Path of the record of the step before in the run directory; "" for the first step's."""

    @property
    def refused(self) -> bool:
        """Whether every answer of the step was refused."""
        return len(self.invalid_answers) > self.repairs


class StepSummary(TypedDict):
    """What the checkpointed state keeps of a step; the record lies in ``record``."""

    step: int
    record: str
    verdict: Verdict
    sparsity: float
    perplexity: float
    change: float | None
    layers: int
