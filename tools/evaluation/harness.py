"""Questions put to a live model through lm-evaluation-harness, resumable at any moment."""

import difflib
import importlib.metadata
import logging
import math
import random
from collections.abc import Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from prunewright.state import InputError
from prunewright.state.config import EMBEDDED
from prunewright.state.study import EvaluationTask
from prunewright.tools.evaluation.kept import Kept
from prunewright.tools.evaluation.scores import QuestionOutcome, TaskScore, summarize
from prunewright.tools.model.head import Progress
from prunewright.tools.model.loading import LoadedModel
from prunewright.tools.store.storage import sha256_bytes
from prunewright.tools.texts.questions import (
    ChoiceQuestion,
    Question,
    as_text,
    hash_questions,
    load_choices,
    load_facts,
)

SHOTS = 5
"""Examples before each question, unless fewer are asked for."""

_DEFINITIONS: dict[str, tuple[str, ...]] = {
    "mmlu": ("mmlu",),
    "mmlu-cloze": ("mmlu_cloze",),
    "facts": ("facts", "facts_answer"),
}
"""The definitions, by file, that make up a task."""
TASKS = tuple(_DEFINITIONS)


@dataclass(frozen=True)
class Quiz:
    """A task with its questions.

    Attributes:
        task: one of `TASKS`.
        source: where the questions are from.
        questions: all of them, in an order that a fixed seed draws.
        examples: those that examples are taken from; None takes other questions of the source.
        shots: examples before each question.
        asked: indices of the questions to ask, grouped by subject.
    """

    task: str
    source: str
    questions: Sequence[Question]
    examples: Sequence[Question] | None
    shots: int
    asked: list[int]

    @property
    def data_hash(self) -> str:
        """sha256 of all questions and examples."""
        hashes = [hash_questions(q) for q in (self.questions, self.examples or ())]
        return sha256_bytes("".join(hashes).encode())

    def answered_by(self, documents: Set[str]) -> bool:
        """Whether any question that is asked is among some documents, as `as_text` writes it."""
        return any(as_text(self.questions[index]) in documents for index in self.asked)


def prepare_quizzes(
    tasks: Sequence[str],
    *,
    data: Mapping[str, str] | None = None,
    examples: Mapping[str, str] | None = None,
    shots: int = SHOTS,
    limit: int | None = None,
) -> list[Quiz]:
    """Read and check the questions of some tasks; arguments as for `evaluate_tasks`.

    Raises:
        InputError: an unknown task; lm-eval is missing; questions that cannot be read, or too few
            of a subject for the examples.
    """
    data, examples = dict(data or {}), dict(examples or {})
    for name in [*tasks, *data, *examples]:
        if name not in TASKS:
            close = difflib.get_close_matches(name, TASKS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(TASKS)}"
            raise InputError(f"there is no task {name!r}; {hint}")
    if unused := sorted((data.keys() | examples.keys()) - set(tasks)):
        raise InputError(f"questions are named for {unused[0]}, which is not among the tasks")
    if tasks:
        _require_harness()
    quizzes = []
    for task in dict.fromkeys(tasks):
        load: Any = load_facts if task == "facts" else load_choices
        source = data.get(task, EMBEDDED)
        questions: list[Question] = load(source)
        # Files are sorted in one way or another; the first questions shall stand for all.
        random.Random(0).shuffle(questions)
        shown = load(examples[task]) if task in examples else None
        _check_examples(task, questions, shown, shots)
        asked = _round_robin(questions, limit)
        quizzes.append(Quiz(task, source, questions, shown, shots, asked))
    return quizzes


def prepare_tasks(tasks: Sequence[EvaluationTask]) -> list[Quiz]:
    """As `prepare_quizzes`, of a comparison's tasks."""
    return [
        quiz
        for task in tasks
        for quiz in prepare_quizzes(
            [task.task],
            data={task.task: task.data},
            examples={} if task.examples is None else {task.task: task.examples},
            shots=task.shots,
            limit=task.limit,
        )
    ]


def evaluate_tasks(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    data: Mapping[str, str] | None = None,
    examples: Mapping[str, str] | None = None,
    shots: int = SHOTS,
    limit: int | None = None,
    store: Path | None = None,
    progress: Progress | None = None,
) -> list[TaskScore]:
    """Put the questions of some tasks to a live model.

    ``mmlu`` takes the likeliest letter, ``mmlu-cloze`` the likeliest answer by its own words (by
    log-probability a UTF-8 byte), ``facts`` compares greedy answers with every accepted form.

    Args:
        loaded: the model; with ``store`` its weights must be those of its files.
        tasks: of `TASKS`.
        data: source of the questions by task; ``embedded`` where none is named. See
            `load_choices` and `load_facts`.
        examples: source of the examples by task; where none is named, examples are the first
            other questions of the same source (and subject).
        shots: examples before each question.
        limit: questions of each task, drawn by a fixed seed, equally many of every subject.
        store: directory where outcomes are kept, so that a killed evaluation goes on.
        progress: told, while questions are answered, of those done.

    Raises:
        InputError: as `prepare_quizzes`; or a question is too long for the model.
        StoreError: what is in ``store`` is damaged, or it cannot be written.
    """
    quizzes = prepare_quizzes(tasks, data=data, examples=examples, shots=shots, limit=limit)
    with closing(Kept(store, loaded)) as kept:
        return [ask(loaded, quiz, kept, progress) for quiz in quizzes]


def ask(loaded: LoadedModel, quiz: Quiz, kept: Kept, progress: Progress | None = None) -> TaskScore:
    """Put a quiz to a live model.

    Args:
        loaded: the model.
        quiz: of `prepare_quizzes`.
        kept: what the model answered before, and answers now.
        progress: told, while questions are answered, of those done.

    Raises:
        InputError: a question with its examples is too long for the model.
        StoreError: an answer cannot be kept.
    """
    from lm_eval.evaluator import evaluate

    from prunewright.tools.evaluation.live import LiveModel

    # It warns of each of the ways it is used in here.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    asked = [quiz.questions[index] for index in quiz.asked]
    requests = sum(len(q.choices) if isinstance(q, ChoiceQuestion) else 2 for q in asked)
    done = 0

    def tick(answered: int) -> None:
        nonlocal done
        done += answered
        if progress is not None and answered:
            progress(quiz.task, len(asked) * done // requests, len(asked))

    model = LiveModel(loaded, kept, tick)
    places = _places(quiz.questions)
    wanted: dict[str, list[int]] = {}
    for index in quiz.asked:
        subject, place = places[index]
        wanted.setdefault(subject, []).append(place)
    tasks = _build_tasks(quiz)
    found = evaluate(
        lm=model,
        task_dict={
            "tasks": {name: task for name, (_, task) in tasks.items()},
            "groups": {},
            "group_map": {},
        },
        samples={name: sorted(wanted[subject]) for name, (subject, _) in tasks.items()},
        bootstrap_iters=0,
    )
    merged: dict[str, dict[str, float]] = {}
    for samples in found["samples"].values():
        for sample in samples:
            merged.setdefault(sample["doc"]["id"], {}).update(_read(sample, model))
    outcomes = [
        QuestionOutcome(
            id=question.id,
            correct=bool(merged[question.id]["correct"]),
            log_probability=_known(merged[question.id]["likelihood"]),
        )
        for question in asked
    ]
    return summarize(quiz.task, quiz.source, quiz.data_hash, quiz.shots, outcomes)


def _read(sample: dict[str, Any], model: Any) -> dict[str, float]:
    """What a sample says, its likelihood by token."""
    values: dict[str, float] = {
        k: float(sample[k]) for k in ("correct", "likelihood") if k in sample
    }
    if "likelihood" in values:
        arguments = sample["arguments"]
        right = sample["target"] if len(arguments) > 1 else 0
        context, words = arguments[right]
        count = len(model.tok_encode(context + words))
        values["likelihood"] /= count - len(model.tok_encode(context))
    return values


def _build_tasks(quiz: Quiz) -> dict[str, tuple[str, Any]]:
    """Subject and lm-eval task by a name of its own."""
    from lm_eval.tasks import TaskManager

    folder = _folder()
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    asked = {quiz.questions[i].subject for i in quiz.asked}
    by_subject: dict[str, list[dict[str, Any]]] = {subject: [] for subject in sorted(asked)}
    shown: dict[str, list[dict[str, Any]]] = {subject: [] for subject in asked}
    for found, questions in ((by_subject, quiz.questions), (shown, quiz.examples or ())):
        for question in questions:
            if question.subject in found:
                found[question.subject].append(question.model_dump(mode="json"))
    tasks: dict[str, tuple[str, Any]] = {}
    for number, (subject, rows) in enumerate(by_subject.items()):
        for definition in _DEFINITIONS[quiz.task]:
            changes = {
                "task": definition,
                "num_fewshot": quiz.shots,
                "dataset_kwargs": {"questions": rows, "examples": shown[subject] or rows},
            }
            if quiz.examples is None:
                # The same split, of which lm-eval leaves out the question itself.
                changes["fewshot_split"] = "test"
            # As a member of a group: a task by itself cannot be loaded with changes.
            built = manager.load({"group": quiz.task, "task": [changes]})["tasks"]
            tasks[f"{definition}-{number}"] = (subject, built[definition])
    return tasks


def _places(questions: Sequence[Question]) -> list[tuple[str, int]]:
    """Subject of each question, and its place among the questions of that."""
    counts: dict[str, int] = {}
    places = []
    for question in questions:
        place = counts.get(question.subject, 0)
        places.append((question.subject, place))
        counts[question.subject] = place + 1
    return places


def _round_robin(questions: Sequence[Question], limit: int | None) -> list[int]:
    """Indices of the first questions of every subject, grouped by subject."""
    places = _places(questions)
    chosen = sorted(range(len(questions)), key=lambda i: (places[i][1], i))[:limit]
    return sorted(chosen, key=lambda i: (places[i][0], i))


def _check_examples(
    task: str, questions: Sequence[Question], examples: Sequence[Question] | None, shots: int
) -> None:
    counts: dict[str, int] = {}
    for question in questions if examples is None else examples:
        counts[question.subject] = counts.get(question.subject, 0) + 1
    # Without examples of their own, a question is not an example of itself.
    own = 1 if examples is None else 0
    for subject in dict.fromkeys(q.subject for q in questions):
        available = counts.get(subject, 0) - own
        if available < shots:
            raise InputError(
                f"{task}: {shots} examples are to come before each question, and there are "
                f"{max(available, 0)}{f' of the subject {subject!r}' if subject else ''}: ask "
                "with fewer --shots, or name more examples (--examples)"
            )


def _folder() -> Path:
    return Path(str(resources.files("prunewright.tools.evaluation") / "tasks"))


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _require_harness() -> None:
    """Refuse to begin without lm-evaluation-harness.

    Raises:
        InputError: it is not installed.
    """
    try:
        importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            "tasks are scored by lm-evaluation-harness, which is not installed: "
            "pip install 'prunewright[eval]'"
        ) from None
