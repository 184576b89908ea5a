"""The graph's state: plain Python only, small enough to be stored at every superstep."""

import hashlib
import uuid
from datetime import datetime
from typing import Annotated, Any, Literal, NotRequired

from typing_extensions import TypedDict

from prunewright.state.config import PruneRequest
from prunewright.state.step import StepSummary

Status = Literal["running", "target_reached", "max_steps", "stalled"]

STATUS_WORDS: dict[Status, str] = {
    "running": "still running",
    "target_reached": "the target sparsity is reached",
    "max_steps": "max_steps is used up before the target",
    "stalled": "too many steps in a row came to nothing",
}
"""Each status in short; what a run's steps add to it, `prunewright.tools.ending` says."""

DENSE = hashlib.sha256(b"{}").hexdigest()
"""The name of the revision without masks, the dense model: the hash of an empty manifest."""
TOLERANCE = 0.001
"""Distance from the target sparsity that counts as reached."""


def new_thread() -> str:
    """A name for a run: when, and a few letters that make it the only one."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"


def add_up(left: dict[str, float], right: dict[str, float]) -> dict[str, float]:
    """Reducer: the sums, key by key."""
    return {key: left.get(key, 0) + right.get(key, 0) for key in left | right}


class Knowledge(TypedDict):
    """Factual recall: mean log-probability of the right answers, nats a token."""

    dense: float
    accepted: float
    revision: str
    """The accepted revision that it was measured at."""
    facts: str
    """sha256 of the questions."""


class StageEnd(TypedDict):
    """What a stage after the last step came to, as `prunewright.state.metrics.Stage` has it."""

    name: str
    before: float | None
    after: float | None
    kept: bool


class RunEnd(TypedDict):
    """What a finished run came to, for whoever sees its state only."""

    directory: str
    """The run's directory."""
    model_directory: str | None
    """The pruned model; None if none was saved, as it would be the dense one."""
    test_perplexity: dict[str, float]
    """On the text that nothing was chosen on: ``dense`` and ``final``."""
    stages: NotRequired[list[StageEnd]]
    """What was done after the last step; absent in runs that ended when there was none of it."""


class Best(TypedDict):
    """The best accepted revision at the target, by guard perplexity, and how refining it goes on.

    Absent until the target is first reached.
    """

    step: int
    """The step that made it."""
    revision: str
    sparsity: float
    perplexity: float
    losses: list[float]
    """Its mean loss on each guard window, nats a token."""
    knowledge: float | None
    """Its factual recall, where the guard bounds that."""
    returns: int
    """Times that a step has ended at the target since."""
    fruitless: int
    """How many of the latest in a row gained nothing, steps without a revision counted, too."""


class PruneInput(TypedDict):
    """What starts a run."""

    request: PruneRequest


class PruneState(TypedDict, total=False):
    """All that is checkpointed. Revisions and files are named, never contained.

    Keys are absent only before the first node has ended, but for those that say so.
    """

    summary: str
    """What the last node did, in words for whoever watches."""
    request: dict[str, Any]
    step: int
    status: Status
    revision: str
    """The accepted revision, masks alone: what stages make of it at the end is in the results."""
    sparsity: float
    perplexity: float
    """Guard perplexity of the accepted revision."""
    guard_losses: list[float]
    """Its mean loss on each guard window, nats a token."""
    dense_perplexity: float
    dense_domains: dict[str, float]
    """The same by domain of the guard's text; absent where it has none."""
    gradient_revision: str
    """The revision at which gradients were last taken."""
    gradient_step: int
    """Index of the step at which they were."""
    profile: dict[str, Any] | None
    """``path`` of the full profile in the run directory; a compact ``table`` until the decision."""
    proposal: dict[str, Any] | None
    """The `Step` as the agent proposed it, until it is applied."""
    candidate: str | None
    candidate_sparsity: float | None
    candidate_perplexity: float | None
    candidate_losses: list[float]
    knowledge: Knowledge | None
    """As last measured. Absent, like the candidate's, while the guard never bounded it."""
    candidate_knowledge: float | None
    """The candidate's; None: not measured, or not finite."""
    step_file: str
    """Path of the `Step` as applied in the run directory: too large for every checkpoint."""
    rollback_reason: str
    rollbacks: int
    stalls: int
    """Rollbacks and empty decisions in a row."""
    best: Best | None
    """What the run ends with once the target was reached, whatever comes after."""
    history: list[StepSummary]
    """The latest steps, by whose seals trace.jsonl is checked."""
    result: RunEnd | None
    """None, or absent, until `finish` has ended, whatever the status."""
    seconds: Annotated[dict[str, float], add_up]
    """Wall time by node."""
    tokens: Annotated[dict[str, float], add_up]
    """Tokens scored (calibration, guard) and exchanged with the LLM."""


PruneUpdate = PruneState
"""What a node returns: the keys that it changes."""
