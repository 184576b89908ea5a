"""A comparison: methods over seeds and sparsities, and what comparison.json holds of it."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from prunewright.state.config import Options, PruneConfig, pattern_sparsity
from prunewright.state.errors import InputError
from prunewright.state.loading import describe_validation_error, read_settings, validate_config

SCHEMA_VERSION: Final = 2
"""Of comparison.json; raised with every change of their form."""
DENSE_NAME = "dense"
"""What the unpruned model is called; no method may be."""

_GIVEN = {
    "seed": "seeds says which",
    "out": "each experiment has a directory of its own",
    "review": "a person cannot be asked in a comparison",
    "with_control": "uniform pruning is a method of its own here",
}
# Perplexities of two models, or of one in two number formats, do not compare.
_SHARED = ("model", "trust_remote_code", "dtype")


def _printable(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError("a name is not empty and has printable characters only")
    return value.strip()


def _refuse_doubles(what: str, values: Any) -> None:
    for value in values:
        if list(values).count(value) > 1:
            raise ValueError(f"the {what} {value} stands there twice")


Name = Annotated[str, Field(max_length=80), AfterValidator(_printable)]
MethodKind = Literal["run", "baseline"]
ExperimentState = Literal["done", "failed", "pending"]


class Method(Options):
    """One way to prune: a run or a baseline with some keys of the configuration of its own."""

    name: Name = Field(description="what tables and plots call it")
    kind: MethodKind | None = Field(
        None, description="run or baseline; null: a run if the settings name an agent"
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="keys of the configuration; they win over those of base"
    )

    @property
    def resolved_kind(self) -> MethodKind:
        """Run or baseline."""
        return self.kind or ("run" if "agent" in self.settings else "baseline")


class EvaluationText(Options):
    """A text that every model is scored on."""

    name: Name = Field(description="what tables and plots call it")
    source: str = Field(description="embedded, a hub data set name[:config], or a local file")
    windows: int = Field(20, ge=1, description="how many of its first windows are scored")


class EvaluationTask(Options):
    """Questions that every model is asked, as by ``prunewright evaluate --task``."""

    name: Name = Field(description="what tables call it")
    task: str = Field(description="mmlu, mmlu-cloze or facts")
    data: str = Field("embedded", description="source of the questions")
    examples: str | None = Field(
        None, description="source of the examples; null: other questions of data"
    )
    shots: int = Field(5, ge=0, description="examples before each question")
    limit: int | None = Field(None, ge=1, description="questions at most; null: all")

    @property
    def columns(self) -> tuple[str, str]:
        """Names of its accuracy and of its mean log-probability of the right answers."""
        return self.name, f"{self.name}, log p"


class EvaluationOptions(Options):
    """What every model is scored on, once it is pruned; nothing is chosen on it."""

    texts: tuple[EvaluationText, ...] = Field(
        (EvaluationText(name="embedded", source="embedded"),), min_length=1
    )
    length: int = Field(1024, ge=8, description="tokens in one window")
    tasks: tuple[EvaluationTask, ...] = Field((), description="questions to ask")

    @model_validator(mode="after")
    def _usable(self) -> "EvaluationOptions":
        _refuse_doubles("text", [text.name for text in self.texts])
        _refuse_doubles("task", [name for task in self.tasks for name in task.columns])
        return self


class ComparisonConfig(Options):
    """A whole comparison, as one YAML file holds it."""

    base: dict[str, Any] = Field(
        default_factory=dict, description="keys of the configuration that all methods share"
    )
    methods: tuple[Method, ...] = Field(min_length=1, description="what is compared")
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field(
        (0,), min_length=1, description="each draws other calibration and guard windows"
    )
    targets: tuple[float, ...] | None = Field(
        None, min_length=1, description="sparsities; null: the target of base"
    )
    control: str | None = Field(
        None, description="the method that ratios are to, at the same seed and target"
    )
    evaluation: EvaluationOptions = Field(EvaluationOptions(), description="texts to score on")

    @model_validator(mode="after")
    def _consistent(self) -> "ComparisonConfig":
        names = [method.name for method in self.methods]
        _refuse_doubles("method", names)
        _refuse_doubles("seed", self.seeds)
        _refuse_doubles("target", self.targets or ())
        if DENSE_NAME in names:
            raise ValueError(f"{DENSE_NAME} is the unpruned model, which every comparison has")
        if self.control is not None and self.control not in names:
            raise ValueError(f"control: {unknown_name(self.control, names)}")
        for where, keys in [("base", self.base), *((m.name, m.settings) for m in self.methods)]:
            given = _GIVEN | ({"target": "targets says which"} if self.targets else {})
            for key in given.keys() & keys.keys():
                raise ValueError(f"{where}: {key} does not belong here: {given[key]}")
        for method in self.methods:
            for key in method.settings.keys() & set(_SHARED):
                raise ValueError(f"{method.name}: {key} belongs into base: all methods share it")
            if "agent" in self.base and method.kind is None and "agent" not in method.settings:
                raise ValueError(
                    f"{method.name}: base names an agent, so say kind: run or kind: baseline"
                )
        return self

    def targets_of(self, method: Method) -> tuple[float, ...]:
        """The sparsities that a method is run at; an N:M pattern fixes that of a baseline.

        Raises:
            InputError: the method's settings are no configuration.
        """
        settled = self.settle(method)
        fixed = pattern_sparsity(settled.pattern)
        if fixed is not None and method.resolved_kind == "baseline":
            return (fixed,)
        return self.targets or (settled.target,)

    def settle(
        self, method: Method | None = None, *, seed: int | None = None, target: float | None = None
    ) -> PruneConfig:
        """The configuration of one experiment; without a method, what all share.

        An N:M pattern fixes the sparsity of a baseline: a target is left out then.

        Raises:
            InputError: unknown key (with a suggestion) or invalid value, and whose.
        """
        own = method.settings if method is not None else {}
        data = _merged(self.base, own)
        if seed is not None:
            data["seed"] = seed
        fixed = data.get("pattern", "unstructured") != "unstructured"
        if fixed and (method is None or method.resolved_kind == "baseline"):
            target = None
        if target is not None:
            data["target"] = target
        try:
            return validate_config(data)
        except InputError as error:
            where = f"method {method.name}" if method is not None else "base"
            lines = str(error).splitlines()
            raise InputError("\n".join(f"{where}: {line}" for line in lines)) from None


def validate_comparison(data: dict[str, Any]) -> ComparisonConfig:
    """Validate a mapping as a `ComparisonConfig`, and the configuration of each of its experiments.

    Raises:
        InputError: unknown key (with a suggestion) or invalid value.
    """
    try:
        config = ComparisonConfig.model_validate(data)
    except ValidationError as error:
        raise InputError(describe_validation_error(error, ComparisonConfig)) from None
    config.settle()
    for method in config.methods:
        for target in config.targets_of(method):
            config.settle(method, target=target)
    return config


def load_evaluation_options(path: str | Path) -> EvaluationOptions:
    """Read a YAML file with the keys of a comparison's ``evaluation``.

    Raises:
        InputError: unreadable file, unknown key, or invalid value.
    """
    try:
        return EvaluationOptions.model_validate(read_settings(path))
    except ValidationError as error:
        raise InputError(describe_validation_error(error, EvaluationOptions)) from None


def load_comparison_config(
    path: str | Path,
    overrides: list[str] | None = None,
    *,
    seeds: str | None = None,
    methods: list[str] | None = None,
) -> ComparisonConfig:
    """Read a YAML file, apply ``key=value`` overrides, validate.

    Args:
        path: the YAML file.
        overrides: as given to ``--set``.
        seeds: instead of the file's, with commas between them.
        methods: names of those that are kept beside the control.

    Raises:
        InputError: unreadable file, unknown key or method, or invalid value.
    """
    data = read_settings(path, overrides)
    if seeds is not None:
        data["seeds"] = seeds.split(",")
    config = validate_comparison(data)
    if methods:
        names = [method.name for method in config.methods]
        for name in methods:
            if name not in names:
                raise InputError(unknown_name(name, names))
        kept = tuple(m for m in config.methods if m.name in (*methods, config.control))
        config = config.model_copy(update={"methods": kept})
    return config


def experiment_name(method: str, target: float, seed: int) -> str:
    """What people call an experiment."""
    return f"{method}, {100 * target:.4g} %, seed {seed}"


def unknown_name(name: str, known: list[str]) -> str:
    """What to say of a method that there is not."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
    return f"there is no method {name}; {hint}"


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Both mappings in one, at any depth; the second wins."""
    merged = dict(base)
    for key, value in own.items():
        before = merged.get(key)
        both = isinstance(before, dict) and isinstance(value, dict)
        merged[key] = _merged(before, value) if both else value  # type: ignore[arg-type]
    return merged


class _Result(BaseModel):
    """Base of what comparison.json holds: plain JSON, no NaN, no infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TextResult(_Result):
    """Perplexity on one text.

    Attributes:
        perplexity: exp of the mean of the losses.
        losses: mean token loss of each window in nats, so that any two experiments can be compared
            window by window.
    """

    perplexity: float
    losses: tuple[float, ...]


class Scores(_Result):
    """What one model scored, by the name of each text and task.

    Attributes:
        texts: perplexities.
        tasks: accuracies, and mean log-probabilities of the right answers in nats a token, by
            `EvaluationTask.columns`.
    """

    texts: dict[str, TextResult]
    tasks: dict[str, float] = {}


class ExperimentResult(_Result):
    """What one experiment came to.

    Attributes:
        status: why the run ended, as in metrics.json.
        sparsity: measured fraction of exact zeros over all prunable weights.
        steps: steps taken, rolled-back and empty ones included.
        rollbacks: steps that the guard rolled back.
        revision: hash of the final masks.
        tokens: by use, as in metrics.json.
        tokens_for_choosing: tokens of text scored to find masks: of all uses but ``test``; those
            exchanged with an LLM (``llm``) are not scored, and not counted here.
        seconds: wall time of the run or baseline, without the comparison's own evaluation.
        peak_memory_bytes: largest resident size of the experiment's own process until then.
        scores: on the comparison's texts and tasks.
    """

    status: str
    sparsity: float
    steps: int
    rollbacks: int
    revision: str
    tokens: dict[str, int]
    tokens_for_choosing: int
    seconds: float
    peak_memory_bytes: int
    scores: Scores


class Experiment(_Result):
    """One method at one seed and target.

    Attributes:
        method: its name.
        kind: run or baseline.
        seed: of the calibration and guard windows.
        target: the sparsity asked for.
        key: hash of all that the result follows from: configuration, evaluation, contents of
            model and texts, package version.
        state: done, failed, or not run yet.
        error: why it failed; "" if it did not.
        on_target: whether the measured sparsity is the target's, to within 0.001.
        result: what it came to; None unless done.
        ratio: by text, perplexity over the control's at the same seed and target; empty where
            there is none.
    """

    method: str
    kind: MethodKind
    seed: int
    target: float
    key: str
    state: ExperimentState
    error: str = ""
    on_target: bool = False
    result: ExperimentResult | None = None
    ratio: dict[str, float] = {}

    @property
    def name(self) -> str:
        """What people call it."""
        return experiment_name(self.method, self.target, self.seed)


class DenseExperiment(_Result):
    """The unpruned model.

    Attributes:
        key: as of a `Experiment`.
        state: as of a `Experiment`.
        error: as of a `Experiment`.
        scores: None unless done.
    """

    key: str
    state: ExperimentState
    error: str = ""
    scores: Scores | None = None


class Spread(_Result):
    """A number over seeds.

    Attributes:
        mean: arithmetic mean.
        sd: sample standard deviation (n - 1); None for one seed.
        n: seeds.
    """

    mean: float
    sd: float | None
    n: int


class Summary(_Result):
    """One method at one target, over its seeds that are done.

    Attributes:
        method: its name.
        target: the sparsity asked for.
        seeds: how many are done.
        missing: how many failed or are not run yet.
        on_target: whether every sparsity is the target's, to within 0.001.
        sparsity: measured.
        tokens_for_choosing: see `ExperimentResult`.
        seconds: see `ExperimentResult`.
        peak_memory_bytes: see `ExperimentResult`.
        perplexity: by text.
        ratio: by text, of the experiments' ratios to the control; absent where there is none.
        tasks: by `EvaluationTask.columns`.
    """

    method: str
    target: float
    seeds: int
    missing: int
    on_target: bool
    sparsity: Spread | None
    tokens_for_choosing: Spread | None
    seconds: Spread | None
    peak_memory_bytes: Spread | None
    perplexity: dict[str, Spread]
    ratio: dict[str, Spread]
    tasks: dict[str, Spread]


class Comparison(_Result):
    """comparison.json.

    Attributes:
        schema_version: of this form.
        version: of the package that wrote it.
        config: what was compared, and how.
        dense: the unpruned model.
        experiments: every method, target and seed.
        summary: every method and target.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    version: str
    config: ComparisonConfig
    dense: DenseExperiment
    experiments: tuple[Experiment, ...]
    summary: tuple[Summary, ...]

    @property
    def errors(self) -> dict[str, str]:
        """Why experiments failed, by their names."""
        named = {DENSE_NAME: self.dense.error} | {
            experiment.name: experiment.error for experiment in self.experiments
        }
        return {name: error for name, error in named.items() if error}
