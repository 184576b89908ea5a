"""A step of a run, from the proposal to the verdict, and what the state keeps of it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict

from prunewright.state.decision import Decision
from prunewright.state.review import Review

MAX_REFUSED = 4_000
"""Characters that are kept of an answer that was refused."""

Verdict = Literal["open", "accepted", "rolled_back", "empty"]
"""What became of a step; open while nothing did yet."""


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
    """A move that an agent had measured before it decided, and what it came to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: dict[str, float] = {}
    """Sparsity added to each layer, or restored if negative, while it was measured."""
    change: float | None = None
    """Relative perplexity change over the accepted revision; None: refused, or not finite."""
    change_stderr: float | None = None
    """Standard error of the paired change over the windows that it was measured on."""
    domains: dict[str, float] = {}
    """The same change by domain of the guard's text; empty where it is of one."""
    tokens: int = 0
    """Tokens of guard text scored."""
    refused: str = ""
    """Why it was not measured; "" if it was."""


class FromRanking(BaseModel):
    """What a decision took over from the ranking's proposal, and what the agent made of it.

    The proposal's delta of a layer is the decision's, less its edit; where there are edits and the
    layer has none, divided by ``scale`` if it prunes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: dict[str, float] = {}
    """By domain, those that the agent had the ranking use; empty: the run's."""
    edits: dict[str, float] = {}
    """By layer, what the agent added to the proposal's delta."""
    scale: float = 1.0
    """By what all other pruning was multiplied to keep to the step."""

    @property
    def words(self) -> str:
        """How it was taken, for people to read: ``as it is``, or what was changed."""
        parts = []
        if self.weights:
            told = ", ".join(f"{name} {weight:.3g}" for name, weight in self.weights.items())
            parts.append(f"at weights {told}")
        if self.edits:
            layers = "1 layer" if len(self.edits) == 1 else f"{len(self.edits)} layers"
            parts.append(f"with {layers} edited by the agent")
        if self.scale < 1:
            parts.append(f"the others scaled by {self.scale:.3f}")
        return ", ".join(parts) or "as it is"


class DomainMeasure(BaseModel):
    """How a domain of the guard's text fared in a step: perplexities, and the change between them.

    Of questions the perplexity is that of the right answers' tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dense: float
    """The dense model's."""
    before: float
    """The accepted revision's, before the step."""
    candidate: float | None = None
    """The candidate's; None: not evaluated, or not finite."""
    change: float | None = None
    """Relative change of the candidate over the revision accepted before."""
    change_stderr: float | None = None
    """Standard error of the paired change over the domain's guard windows."""


class Kept(BaseModel):
    """The earlier step whose revision a run ended with: the best at the target."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    """Its index, from 0."""
    perplexity: float
    """Guard perplexity of its revision."""


class Step(BaseModel):
    """One step of a run: proposed, then applied, measured, and judged.

    Each node fills in what it adds. `reflect` makes of it a line of trace.jsonl.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Proposed: who decided what, and how that came about.
    step: int
    """Counted from 0."""
    agent: str
    decision: Decision
    ranking: FromRanking | None = None
    """What the decision has of the ranking's proposal; None: it is the agent's own."""
    predicted_change: float | None = None
    """Relative perplexity change that the profile's loss_cost predicts for the decision."""
    invalid_answers: list[str] = []
    """What was wrong with each answer that was refused before this one."""
    refused_answers: list[str] = []
    """Their texts in the same order, cut at `MAX_REFUSED` characters, without keys."""
    repairs: int = 0
    """How many of them were sent back with what was wrong."""
    notes: list[str] = []
    llm_calls: int = 0
    """Requests to the LLM, failed ones too."""
    llm_tokens: int = 0
    """Tokens exchanged with it."""
    probes: list[ProbeReport] = []
    """Moves that the agent had measured before it decided."""
    review: Review | None = None
    """What a person said to the decision; None: nobody was asked."""

    # Where it began.
    profile: str = ""
    """Path of the step's profile in the run directory; "" for a baseline's."""
    sparsity_before: float
    perplexity_before: float
    asked: float | None = None
    """Sparsity that the step might add, within its bound and up to the target; None: a baseline."""

    # Applied.
    applied: dict[str, float] = {}
    """Sparsity really added to each layer, after the landing on the target."""
    predicted_costs: dict[str, float] = {}
    """Predicted rise of the mean token loss for it, nats, by ``projection@depth``."""
    predicted_domains: dict[str, float] = {}
    """The same rise by domain; empty where costs are not known by domain."""
    candidate: str | None = None
    """The revision that it made; None: it changed no weight."""

    # Measured.
    candidate_perplexity: float | None = None
    """None: not evaluated, or not finite (the reason says which)."""
    change: float | None = None
    """Relative perplexity change of the candidate over the revision accepted before."""
    change_stderr: float | None = None
    """Standard error of the paired change over the guard windows."""
    domains: dict[str, DomainMeasure] = {}
    """The same by domain; empty where the guard's text is of one."""
    knowledge_dense: float | None = None
    """Factual recall of the dense model: log-probability of the right answers, nats a token;
    None: the guard did not bound it."""
    candidate_knowledge: float | None = None
    """The candidate's; None: not measured, or not finite (the reason says so)."""

    # Judged.
    verdict: Verdict = "open"
    reason: str = ""
    """Why the step was rolled back or is empty; "" for an accepted one."""
    revision: str
    """The accepted revision, after the step once it is judged."""
    sparsity: float
    """Of that revision."""
    kept: Kept | None = None
    """Of the last step: the earlier one that the run went back to; None: it ended with its own."""
    previous: str = ""
    """Seal of the line of the step before in trace.jsonl; "" for the first step's."""

    @property
    def refused(self) -> bool:
        """Whether every answer was refused, the last repair's, too."""
        return len(self.invalid_answers) > self.repairs

    @property
    def accepted_perplexity(self) -> float:
        """Guard perplexity of the revision that the step left."""
        if self.kept is not None:
            return self.kept.perplexity
        if self.verdict == "accepted" and self.candidate_perplexity is not None:
            return self.candidate_perplexity
        return self.perplexity_before

    @property
    def accepted_domains(self) -> dict[str, float]:
        """Perplexity of each domain at that revision."""
        accepted = self.verdict == "accepted"
        return {
            name: one.candidate if accepted and one.candidate is not None else one.before
            for name, one in self.domains.items()
        }


class StepSummary(TypedDict):
    """What the checkpointed state keeps of a step; trace.jsonl has the whole."""

    step: int
    seal: str
    """Of the step's line in trace.jsonl."""
    verdict: Verdict
    sparsity: float
    perplexity: float
    change: float | None
    layers: int
