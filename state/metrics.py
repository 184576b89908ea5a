"""metrics.json, typed."""

from pydantic import BaseModel, ConfigDict

NEGLIGIBLE = 5e-4
"""Fraction of the prunable weights up to which zeros of the dense model's own are not told of."""


class Pair(BaseModel):
    """A measure before and after."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dense: float
    final: float


class Perplexities(BaseModel):
    """Perplexity on the text that steps were accepted on, and on the text reported on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    guard: Pair
    test: Pair


class Metrics(BaseModel):
    """What a run or a baseline came to.

    Attributes:
        status: why it ended; ``target_reached``, ``max_steps``, ``stalled`` or ``baseline``.
        reason: how it ended and what to do about it, in words; "" of a baseline.
        saved: whether a model was saved; false where it would be the dense one.
        method: agent or ``baseline`` with its allocation, and the criterion.
        revision: hash of the final masks.
        sparsity: fraction of exact zeros over all prunable weights.
        dense_sparsity: the part of it that the dense model has.
        steps: steps taken, rolled-back and empty ones included.
        rollbacks: steps that the guard rolled back.
        decisions: answers accepted as decisions.
        repairs: refused answers that were sent back with what was wrong.
        invalid_answers: answers refused.
        probes: trials measured before decisions.
        llm_calls: requests to the LLM, failed ones too.
        perplexity: see `Perplexities`.
        knowledge: mean log-probability of the right answers to the facts, nats a token, where the
            guard bounded it.
        seconds: wall time, ``total`` and by node.
        tokens: run through the model for calibration (forward), gradient (forward and backward),
            solve (through the blocks), guard, probes, the trials of an allocation, and test;
            exchanged with the LLM. Statistics that a process still has are not taken again, so
            a run that was resumed counts those that it took once more.
        peak_memory_bytes: largest resident size of the process so far.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: str
    reason: str = ""
    saved: bool = True
    method: dict[str, str]
    revision: str
    sparsity: float
    dense_sparsity: float = 0.0
    steps: int
    rollbacks: int
    decisions: int
    repairs: int = 0
    invalid_answers: int
    probes: int = 0
    llm_calls: int = 0
    perplexity: Perplexities
    knowledge: Pair | None = None
    seconds: dict[str, float]
    tokens: dict[str, int]
    peak_memory_bytes: int
