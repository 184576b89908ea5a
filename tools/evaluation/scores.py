"""What questions came to, for one model and for two on the same questions."""

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from prunewright.state import InputError

NORMAL_95 = 1.959963984540054
"""Quantile of the normal distribution at 0.975."""


class QuestionOutcome(BaseModel):
    """One question.

    Attributes:
        id: the question's.
        correct: whether the answer is right.
        log_probability: mean log-probability of the right answer's tokens, nats a token; None
            where it is not finite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    correct: bool
    log_probability: float | None


class TaskScore(BaseModel):
    """One task.

    Attributes:
        task: its name.
        data: where the questions are from.
        data_hash: sha256 of the questions of that source and of those that examples are from.
        shots: examples before each question.
        questions: how many were asked.
        accuracy: fraction answered rightly.
        stderr: its standard error over the questions; None for one question.
        log_probability: mean over the questions of the mean log-probability of the right
            answer's tokens, nats a token; None where one is not finite. It still moves where
            accuracy is near chance.
        outcomes: each question's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    data: str
    data_hash: str
    shots: int
    questions: int
    accuracy: float
    stderr: float | None
    log_probability: float | None
    outcomes: list[QuestionOutcome]


class Comparison(BaseModel):
    """A model against another, mostly a pruned one against the dense, on the same questions.

    Attributes:
        task: its name.
        questions: how many both answered.
        accuracy: the model's.
        reference_accuracy: the other's.
        retention: the model's accuracy in per cent of the other's; None where that is 0.
        lost: questions that only the other answered rightly.
        gained: questions that only the model answered rightly.
        p_value: two-sided exact McNemar test of lost against gained.
        log_probability_change: mean difference of the log-probability of the right answers, nats
            a token; negative: the model finds them less likely. None where one is not finite.
        low: lower end of its 95 % interval, by the normal distribution over the questions.
        high: upper end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    questions: int
    accuracy: float
    reference_accuracy: float
    retention: float | None
    lost: int
    gained: int
    p_value: float
    log_probability_change: float | None
    low: float | None
    high: float | None


def summarize(
    task: str, data: str, data_hash: str, shots: int, outcomes: list[QuestionOutcome]
) -> TaskScore:
    """The score of a task's outcomes, of which there is at least one."""
    n = len(outcomes)
    accuracy = sum(o.correct for o in outcomes) / n
    values = _finite([o.log_probability for o in outcomes])
    return TaskScore(
        task=task,
        data=data,
        data_hash=data_hash,
        shots=shots,
        questions=n,
        accuracy=accuracy,
        stderr=math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else None,
        log_probability=sum(values) / n if values else None,
        outcomes=outcomes,
    )


def compare(score: TaskScore, reference: TaskScore) -> Comparison:
    """A model's score of a task against another model's, question by question.

    Raises:
        InputError: the two are not of the same task, shots and questions.
    """
    ids = [o.id for o in score.outcomes]
    same = all(getattr(score, k) == getattr(reference, k) for k in ("task", "shots", "data_hash"))
    if not same or ids != [o.id for o in reference.outcomes]:
        raise InputError(
            f"{score.task} and {reference.task} cannot be compared: they are not of the same "
            "questions, asked alike"
        )
    pairs = list(zip(score.outcomes, reference.outcomes, strict=True))
    lost = sum(r.correct and not o.correct for o, r in pairs)
    gained = sum(o.correct and not r.correct for o, r in pairs)
    differences = None
    ours = _finite([o.log_probability for o, _ in pairs])
    theirs = _finite([r.log_probability for _, r in pairs])
    if ours and theirs:
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    change, low, high = mean_interval(differences) if differences else (None, None, None)
    known = reference.accuracy > 0
    return Comparison(
        task=score.task,
        questions=len(ids),
        accuracy=score.accuracy,
        reference_accuracy=reference.accuracy,
        retention=100 * score.accuracy / reference.accuracy if known else None,
        lost=lost,
        gained=gained,
        p_value=mcnemar(lost, gained),
        log_probability_change=change,
        low=low,
        high=high,
    )


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p-value: the discordant questions as tosses of a fair coin.

    Q. McNemar, Psychometrika 12 (1947), with the binomial distribution itself.
    """
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1))
    return min(1.0, float(2 * tail / 2**n))


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The mean and the ends of its 95 % interval by the normal distribution; no ends for one."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, None, None
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, mean - NORMAL_95 * error, mean + NORMAL_95 * error


def _finite(values: Sequence[float | None]) -> list[float]:
    """The values if all are known; else none."""
    known = [v for v in values if v is not None]
    return known if len(known) == len(values) else []
