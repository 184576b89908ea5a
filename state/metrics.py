"""metrics.json, typed."""

from pydantic import BaseModel, ConfigDict

NEGLIGIBLE = 5e-4
"""Fraction of the prunable weights up to which zeros of the dense model's own are not told of."""


TRAINING = "adapt (training)"
"""What people read of the stage that trains, wherever it is named."""
SOLVING = "solving blocks"
"""The same of the work that goes block by block."""


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


class Control(BaseModel):
    """Uniform pruning, measured to compare a run with: every layer alike, in one shot.

    Model, criterion, calibration, windows, sparsity and stages are the run's.

    Attributes:
        revision: hash of its masks.
        sparsity: fraction of exact zeros over all prunable weights.
        guard: perplexity on the guard text; None if it is not finite.
        test: perplexity on the test text; None if it is not finite.
        change: relative change of the test perplexity from the control to the run, below 0 if the
            run is better; None where the control's is not finite.
        change_stderr: standard error of the change, paired over the test windows.
        domains: perplexity of each domain of the guard text, None where it is not finite; empty
            where there are none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    revision: str
    sparsity: float
    guard: float | None
    test: float | None
    change: float | None
    change_stderr: float | None
    domains: dict[str, float | None] = {}


class Stage(BaseModel):
    """What was done to the kept weights after the last step, the masks alone being there before.

    Attributes:
        name: ``reconstruct``, or ``adapt``, which is training.
        revision: hash of the masks and weights that it came to, kept or not.
        before: perplexity on the guard text before it; None if it is not finite.
        after: perplexity on the guard text after it; None if it is not finite.
        kept: whether the next stage, and the saved model, begin from what it came to: where the
            guard's perplexity did not rise.
        seconds: wall time.
        tokens: run through the model, by use.
        notes: what must be told of it.
        curve: of a stage that trains, tokens seen so far and the loss there, nats a token.
        domains: perplexity of each domain of the guard text after it; empty where it has none, or
            one is not finite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    revision: str
    before: float | None
    after: float | None
    kept: bool
    seconds: float
    tokens: dict[str, int]
    notes: list[str] = []
    curve: list[tuple[int, float]] = []
    domains: dict[str, float] = {}

    @property
    def title(self) -> str:
        """Its name, with what nobody may miss: that the one trains."""
        return TRAINING if self.name == "adapt" else self.name

    @property
    def words(self) -> str:
        """What it came to on the guard text, in words."""
        before, after = (
            "not finite" if value is None else f"{value:.3f}" for value in (self.before, self.after)
        )
        change = ""
        if self.before is not None and self.after is not None:
            change = f" ({self.after / self.before - 1:+.2%})"
        words = f"{self.title}: guard perplexity {before} to {after}{change}"
        return words if self.kept else f"{words}, so it is not kept"


class Sample(BaseModel):
    """How the dense and the pruned model continue the same prompt, taking the likeliest token.

    Attributes:
        prompt: what they continue.
        dense: the dense model's continuation.
        pruned: the pruned model's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str
    dense: str
    pruned: str


class Metrics(BaseModel):
    """What a run or a baseline came to.

    Attributes:
        status: why it ended; ``target_reached``, ``max_steps``, ``stalled`` or ``baseline``.
        reason: how it ended and what to do about it, in words; "" of a baseline.
        saved: whether a model was saved; false where it would be the dense one.
        method: agent or ``baseline`` with its allocation, and the criterion.
        revision: hash of the final masks, and of the kept weights where a stage updated them.
        sparsity: fraction of exact zeros over all prunable weights.
        dense_sparsity: the part of it that the dense model has.
        steps: steps taken, rolled-back and empty ones included.
        rollbacks: steps that the guard rolled back.
        decisions: answers accepted as decisions.
        repairs: refused answers that were sent back with what was wrong.
        invalid_answers: answers refused.
        probes: moves measured before decisions.
        llm_calls: requests to the LLM, failed ones too.
        perplexity: see `Perplexities`.
        domains: perplexity of each domain of the guard text; empty where it has none.
        knowledge: factual recall, the mean log-probability of the right answers, nats a token,
            where the guard bounded it.
        stages: what was done after the last step, in order; its masks alone stood on the guard
            text at the first one's ``before``.
        control: the uniform control, where ``with_control`` asked for it.
        sample: text of the dense and the pruned model; None where none was saved.
        seconds: wall time, ``total``, by node and by stage.
        tokens: run through the model for calibration (forward), gradient (forward and backward),
            solve (through the blocks), guard, probes, the trials of an allocation, test, adapt, and
            all that the uniform control took; exchanged with the LLM. Statistics that a process
            still has are not taken again, so a run that was resumed counts those that it took once
            more.
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
    domains: dict[str, Pair] = {}
    knowledge: Pair | None = None
    stages: list[Stage] = []
    control: Control | None = None
    sample: Sample | None = None
    seconds: dict[str, float]
    tokens: dict[str, int]
    peak_memory_bytes: int

    @property
    def trained_words(self) -> str:
        """That the weights which are saved were trained, and on how much; "" if they were not."""
        trained = [one for one in self.stages if one.kept and one.name == "adapt"]
        tokens = [one.tokens.get("adapt", 0) for one in trained]
        if not tokens:
            return ""
        return (
            f"the kept weights were trained on {sum(tokens):,} tokens to follow the dense model, "
            "with masks fixed"
        )
