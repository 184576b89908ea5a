"""What the experiments of a comparison are made of, and what they come to together."""

import importlib.metadata
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunewright.state import InputError, PruneConfig, PrunewrightError, StoreError
from prunewright.state.config import SELF
from prunewright.state.metrics import Metrics
from prunewright.state.profile import KNOWLEDGE_SIGNAL
from prunewright.state.run import TOLERANCE
from prunewright.state.study import (
    DENSE_NAME,
    SCHEMA_VERSION,
    Comparison,
    ComparisonConfig,
    DenseExperiment,
    EvaluationOptions,
    EvaluationTask,
    Experiment,
    ExperimentResult,
    ExperimentState,
    Method,
    Scores,
    Spread,
    Summary,
    TextResult,
    experiment_name,
)
from prunewright.tools.evaluation import Evaluation
from prunewright.tools.evaluation.harness import Quiz, prepare_tasks
from prunewright.tools.model.loading import model_digest
from prunewright.tools.store.storage import canonical_json, read_json, sha256_bytes
from prunewright.tools.texts.questions import hash_questions, load_facts
from prunewright.tools.texts.windows import ROLES, Role, read_questions, source_digest

NOT_SCORED_FOR_CHOOSING = ("test", "llm")
"""Uses of tokens that choose nothing, or that are exchanged and not scored."""


@dataclass
class Digests:
    """Hashes of the contents that experiments stand on, each taken once."""

    _models: dict[str, str] = field(default_factory=dict)
    _texts: dict[tuple[str, Role], str] = field(default_factory=dict)
    _questions: dict[EvaluationTask, Quiz] = field(default_factory=dict)
    _answered: dict[tuple[str, Role], set[str]] = field(default_factory=dict)

    def model(self, name: str) -> str:
        """Of a model's files.

        Raises:
            InputError: no such model.
        """
        if name not in self._models:
            self._models[name] = model_digest(name)
        return self._models[name]

    def text(self, source: str, role: Role) -> str:
        """Of a source's documents.

        Raises:
            InputError: missing or unreadable.
        """
        if source == SELF:
            return SELF  # it follows from the model and the configuration
        if (source, role) not in self._texts:
            self._texts[source, role] = source_digest(source, role)
        return self._texts[source, role]

    def evaluation(self, evaluation: EvaluationOptions) -> dict[str, str]:
        """Of the evaluation's texts, by name."""
        return {text.name: self.text(text.source, "test") for text in evaluation.texts}

    def questions(self, evaluation: EvaluationOptions) -> dict[str, str]:
        """Of the evaluation's questions and their examples, by the task's name.

        Raises:
            InputError: they cannot be read, or lm-eval is missing.
        """
        for task in evaluation.tasks:
            if task not in self._questions:
                self._questions[task] = prepare_tasks([task])[0]
        return {task.name: self._questions[task].data_hash for task in evaluation.tasks}

    def answered(self, source: str, role: Role, evaluation: EvaluationOptions) -> str:
        """The first task of which a source has a question, with its answer; "" for none."""
        if (source, role) not in self._answered:
            self._answered[source, role] = read_questions(source, role)
        self.questions(evaluation)
        for task in evaluation.tasks:
            if self._questions[task].answered_by(self._answered[source, role]):
                return task.name
        return ""

    def calibration(self, config: PruneConfig) -> dict[str, str]:
        """Of a configuration's own texts, and of the facts that it asks, by role."""
        found: dict[str, str] = {}
        for role in ROLES:
            mix = config.texts.sources(role)
            digests = [self.text(one.source, role) for one in mix]
            weighed = [(text, one.weight) for text, one in zip(digests, mix, strict=True)]
            found[role] = digests[0] if len(mix) == 1 else sha256_bytes(canonical_json(weighed))
        if config.guard.max_knowledge_drop is not None or KNOWLEDGE_SIGNAL in config.signals:
            found["knowledge"] = hash_questions(load_facts(config.texts.knowledge))
        return found


@dataclass(frozen=True)
class Planned:
    """An experiment before it is run.

    Attributes:
        method: what is done; `DENSE_NAME` stands for the unpruned model.
        seed: of its windows.
        target: the sparsity asked for.
        config: its settled configuration.
        key: hash of all that its result follows from.
    """

    method: Method
    seed: int
    target: float
    config: PruneConfig
    key: str

    @property
    def name(self) -> str:
        """What people call it."""
        if self.method.name == DENSE_NAME:
            return DENSE_NAME
        return experiment_name(self.method.name, self.target, self.seed)


def experiment_key(
    kind: str,
    config: PruneConfig,
    evaluation: EvaluationOptions,
    digests: Digests,
    files: Mapping[str, str] | None = None,
) -> str:
    """Hash of all that an experiment's result follows from.

    Args:
        kind: run or baseline.
        config: the experiment's configuration.
        evaluation: what it is scored on.
        digests: gives the hashes of contents.
        files: hashes of other files that it reads, by name.

    Raises:
        InputError: the model or a text cannot be used, or an evaluation text chooses something.
    """
    own, scored = digests.calibration(config), digests.evaluation(evaluation)
    choosing = [(role, one) for role in ROLES[:2] for one in config.texts.sources(role)]
    for role, one in choosing:
        digest = digests.text(one.source, role)
        if name := next((n for n, value in scored.items() if value == digest), None):
            raise InputError(
                f"the evaluation text {name} is the {role} text too: results are only worth "
                "something on a text that chooses nothing. Give another"
            )
        if name := digests.answered(one.source, role, evaluation):
            raise InputError(
                f"the {role} text {one.source} answers questions that {name} asks: results are "
                "only worth something on others. Give them in two files"
            )
    return _key(
        kind=kind,
        request=config.request.identity(),
        context=_context(config),
        evaluation=_without_paths(evaluation),
        model=digests.model(config.model),
        texts=[own, scored],
        questions=digests.questions(evaluation),
        files=dict(files or {}),
    )


def dense_key(config: PruneConfig, evaluation: EvaluationOptions, digests: Digests) -> str:
    """As `experiment_key` for the unpruned model.

    Raises:
        InputError: the model or a text cannot be used.
    """
    return _key(
        kind="dense",
        config=config.model_dump(mode="json", include={"trust_remote_code", "dtype", "device"}),
        evaluation=_without_paths(evaluation),
        model=digests.model(config.model),
        texts=digests.evaluation(evaluation),
        questions=digests.questions(evaluation),
    )


def _context(config: PruneConfig) -> dict[str, Any]:
    """Who decides and how, without the paths of files, which have hashes of their own."""
    context = config.context.model_dump(mode="json", exclude={"out", "prompts"})
    for name, kind in (("agent", "replay:"), ("allocation", "from:")):
        if (context[name] or "").startswith(kind):
            context[name] = kind
    return context


def _without_paths(evaluation: EvaluationOptions) -> dict[str, Any]:
    each = {"texts": {"__all__": {"source"}}, "tasks": {"__all__": {"data", "examples"}}}
    return evaluation.model_dump(mode="json", exclude=each)


def _key(**parts: Any) -> str:
    identity = parts | {"schema": SCHEMA_VERSION, "version": package_version()}
    return sha256_bytes(canonical_json(identity))[:20]


def package_version() -> str:
    """Of the installed package."""
    return importlib.metadata.version("prunewright")


def read_scores(file: Path, evaluation: EvaluationOptions) -> Scores:
    """What ``evaluate`` found of a comparison's texts and questions.

    Args:
        file: its evaluation.json.
        evaluation: what was evaluated.

    Raises:
        StoreError: missing, damaged, or of other texts and questions.
        PrunewrightError: a score is not finite.
    """
    try:
        found = Evaluation.model_validate(read_json(file))
        texts = {}
        for text, score in zip(evaluation.texts, found.texts, strict=True):
            losses = tuple(loss for loss in score.losses if loss is not None)
            if score.perplexity is None or len(losses) < len(score.losses):
                raise PrunewrightError(f"the perplexity on {text.name} is not finite")
            texts[text.name] = TextResult(perplexity=score.perplexity, losses=losses)
        tasks: dict[str, float] = {}
        for task, answers in zip(evaluation.tasks, found.tasks, strict=True):
            if answers.log_probability is None:
                raise PrunewrightError(f"the log-probabilities of {task.name} are not finite")
            pair = answers.accuracy, answers.log_probability
            tasks |= dict(zip(task.columns, pair, strict=True))
    except ValueError as error:
        raise StoreError(f"{file} is damaged: delete {file.parent}: {error}") from error
    return Scores(texts=texts, tasks=tasks)


def experiment_result(metrics: Metrics, scores: Scores) -> ExperimentResult:
    """What a finished run and its scores come to."""
    return ExperimentResult(
        status=metrics.status,
        sparsity=metrics.sparsity,
        steps=metrics.steps,
        rollbacks=metrics.rollbacks,
        revision=metrics.revision,
        tokens=metrics.tokens,
        tokens_for_choosing=sum(
            n for use, n in metrics.tokens.items() if use not in NOT_SCORED_FOR_CHOOSING
        ),
        seconds=metrics.seconds["total"],
        peak_memory_bytes=metrics.peak_memory_bytes,
        scores=scores,
    )


def build_comparison(
    config: ComparisonConfig,
    plan: Iterable[Planned],
    results: Mapping[str, ExperimentResult],
    errors: Mapping[str, str],
    dense: DenseExperiment,
) -> Comparison:
    """Put the experiments together with their ratios and sums.

    Args:
        config: the comparison's.
        plan: its experiments.
        results: those that are done, by key.
        errors: why others failed, by key.
        dense: the unpruned model.
    """
    plan = list(plan)
    control = {
        (experiment.seed, experiment.target): results[experiment.key]
        for experiment in plan
        if experiment.method.name == config.control and experiment.key in results
    }
    experiments = []
    for experiment in plan:
        result = results.get(experiment.key)
        state: ExperimentState = "done"
        if result is None:
            state = "failed" if experiment.key in errors else "pending"
        experiments.append(
            Experiment(
                method=experiment.method.name,
                kind=experiment.method.resolved_kind,
                seed=experiment.seed,
                target=experiment.target,
                key=experiment.key,
                state=state,
                error=errors.get(experiment.key, ""),
                on_target=result is not None
                and abs(result.sparsity - experiment.target) <= TOLERANCE,
                result=result,
                ratio=_ratio(result, control.get((experiment.seed, experiment.target))),
            )
        )
    return Comparison(
        version=package_version(),
        config=config,
        dense=dense,
        experiments=tuple(experiments),
        summary=tuple(summarise(config, experiments)),
    )


def _ratio(result: ExperimentResult | None, control: ExperimentResult | None) -> dict[str, float]:
    if result is None or control is None:
        return {}
    return {
        name: score.perplexity / control.scores.texts[name].perplexity
        for name, score in result.scores.texts.items()
    }


def summarise(config: ComparisonConfig, experiments: list[Experiment]) -> list[Summary]:
    """Mean and spread over seeds of each method at each target, in the order of the methods."""
    groups: dict[tuple[str, float], list[Experiment]] = {}
    for experiment in experiments:
        groups.setdefault((experiment.method, experiment.target), []).append(experiment)
    order = [method.name for method in config.methods]
    return [
        _summary(method, target, groups[method, target])
        for method, target in sorted(groups, key=lambda pair: (order.index(pair[0]), pair[1]))
    ]


def _summary(method: str, target: float, experiments: list[Experiment]) -> Summary:
    done = [
        (experiment, experiment.result)
        for experiment in experiments
        if experiment.result is not None
    ]
    results = [result for _, result in done]

    def spreads(values: list[Mapping[str, float]]) -> dict[str, Spread]:
        names = dict.fromkeys(name for by_name in values for name in by_name)
        return {n: spread([by_name[n] for by_name in values if n in by_name]) for n in names}

    return Summary(
        method=method,
        target=target,
        seeds=len(done),
        missing=len(experiments) - len(done),
        on_target=all(one.on_target for one, _ in done),
        sparsity=spread([r.sparsity for r in results]) if results else None,
        tokens_for_choosing=spread([r.tokens_for_choosing for r in results]) if results else None,
        seconds=spread([r.seconds for r in results]) if results else None,
        peak_memory_bytes=spread([r.peak_memory_bytes for r in results]) if results else None,
        perplexity=spreads([{n: s.perplexity for n, s in r.scores.texts.items()} for r in results]),
        ratio=spreads([one.ratio for one, _ in done]),
        tasks=spreads([r.scores.tasks for r in results]),
    )


def spread(values: Iterable[float]) -> Spread:
    """Mean and sample standard deviation of some numbers.

    Raises:
        statistics.StatisticsError: there are none.
    """
    numbers = list(values)
    return Spread(
        mean=statistics.fmean(numbers),
        sd=statistics.stdev(numbers) if len(numbers) > 1 else None,
        n=len(numbers),
    )
