"""Questions with known answers: the embedded ones, local files, or data sets of the hub."""

import json
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prunewright.state import InputError
from prunewright.state.config import EMBEDDED
from prunewright.state.loading import problem_words
from prunewright.tools.sources import choose_split, find_local, loading_data_set
from prunewright.tools.store.storage import canonical_json, sha256_bytes
from prunewright.tools.texts.rows import Row, read_file

LETTERS = "ABCDEFGHIJ"
MARKS = ("question", "RawQuestion", "Parses")
"""A row of questions has one of these fields."""
QUESTION = "Question: "
"""What a question begins with where it is a document."""
_SPLITS = ("test", "validation", "train", "dev")


class ChoiceQuestion(BaseModel):
    """A question with choices, in the form of MMLU.

    Attributes:
        id: unique in its file.
        subject: questions are shown after examples of their own subject.
        question: the words.
        choices: two or more, of which one is right.
        answer: index of the right choice, from 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    id: str = Field(min_length=1)
    subject: str
    question: str = Field(min_length=1)
    choices: tuple[str, ...] = Field(min_length=2, max_length=len(LETTERS))
    answer: int = Field(ge=0)

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> "ChoiceQuestion":
        if self.answer >= len(self.choices):
            raise ValueError(f"answer {self.answer} names none of {len(self.choices)} choices")
        if not all(choice.strip() for choice in self.choices):
            raise ValueError("a choice is empty")
        return self


class FactQuestion(BaseModel):
    """A question of trivia, in the form of FreebaseQA.

    Attributes:
        id: unique in its file.
        subject: always empty: all questions share their examples.
        question: the words.
        answers: accepted forms, the preferred one first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    id: str = Field(min_length=1)
    subject: str = ""
    question: str = Field(min_length=1)
    answers: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _answers_say_something(self) -> "FactQuestion":
        if not all(answer.strip() for answer in self.answers):
            raise ValueError("an answer is empty")
        return self


Question = ChoiceQuestion | FactQuestion
_Q = TypeVar("_Q", ChoiceQuestion, FactQuestion)


def load_choices(source: str) -> list[ChoiceQuestion]:
    """Questions of MMLU's form: fields subject, question, choices, answer (index), perhaps id.

    Args:
        source: ``embedded``, a local file of rows (JSON lines, a JSON list, or an object that
            holds one; Parquet; CSV where no field is a list), or a hub data set
            ``name[:config[:split]]``, such as ``cais/mmlu:all:dev``; without a split the first
            of test, validation, train and dev that it has.

    Raises:
        InputError: missing, unreadable, or a row of another form; the message names it.
    """
    return _load(source, "questions.jsonl", _choice)


def load_facts(source: str) -> list[FactQuestion]:
    """Questions of FreebaseQA's form: its official JSON, or rows of question and answers.

    Args:
        source: as for `load_choices`.

    Raises:
        InputError: as for `load_choices`.
    """
    return _load(source, "facts.jsonl", _fact)


def shown_form(answers: Sequence[str]) -> str:
    """The form of an answer that is shown and scored: the first, with capitals.

    FreebaseQA writes most answers in lower case. A model that is shown "smiles of a summer night"
    writes names so, too, and recalls far less: 0 of 60 questions against 6 by
    SmolLM2-135M-Instruct. So a form without any capital gets one at each word.
    """
    form = answers[0].strip()
    if form != form.lower():
        return form
    return " ".join(word[:1].upper() + word[1:] for word in form.split(" "))


class Answered(str):
    """A question as a document, with its right answer.

    Attributes:
        answer: where the answer begins, with the space before it.
    """

    answer: int


def as_text(question: Question) -> Answered:
    """A question as a document, with its right answer."""
    right = (
        question.choices[question.answer].strip()
        if isinstance(question, ChoiceQuestion)
        else shown_form(question.answers)
    )
    asked = f"{QUESTION}{question.question.strip()}\nAnswer:"
    text = Answered(f"{asked} {right}")
    text.answer = len(asked)
    return text


def row_as_text(row: dict[str, Any], where: str) -> Answered:
    """A row of questions, of either form, as a document.

    Args:
        row: the row.
        where: it lies, for messages.

    Raises:
        InputError: it is no question.
    """
    if "choices" in row:
        return as_text(_checked(row, "1", where, _choice))
    return as_text(_checked(row, "1", where, _fact))


def hash_questions(questions: Sequence[Question]) -> str:
    """sha256 over all that the questions say."""
    return sha256_bytes(canonical_json([q.model_dump(mode="json") for q in questions]))


def _load(source: str, embedded: str, read: Callable[[dict[str, Any], str], _Q]) -> list[_Q]:
    found: dict[str, _Q] = {}
    for number, (place, row) in enumerate(_rows(source, embedded), 1):
        where = f"{source}, {place}, question {number}"
        if not isinstance(row, dict):
            raise InputError(f"{where}: not an object with fields, but {type(row).__name__}")
        question = _checked(row, str(number), where, read)
        if question.id in found:
            raise InputError(f"{where}: the id {question.id!r} is there twice")
        found[question.id] = question
    if not found:
        raise InputError(f"{source} holds no questions")
    return list(found.values())


def _checked(
    row: dict[str, Any], number: str, where: str, read: Callable[[dict[str, Any], str], _Q]
) -> _Q:
    """A row as a question, or an error that says where it is."""
    try:
        question = read(row, number)
    except ValidationError as error:
        raise InputError(f"{where}: {problem_words(error, 'question', 3)}") from None
    try:
        json.dumps(question.model_dump(), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half of a surrogate pair, which is no character") from error
    return question


def _choice(row: dict[str, Any], number: str) -> ChoiceQuestion:
    values = {key: row.get(key) for key in ("subject", "question", "choices", "answer")}
    return ChoiceQuestion.model_validate({"id": _id(row, "id", number)} | values)


def _fact(row: dict[str, Any], number: str) -> FactQuestion:
    if "Parses" in row:
        return FactQuestion.model_validate(
            {
                "id": _id(row, "Question-ID", number),
                "question": row.get("RawQuestion") or row.get("ProcessedQuestion"),
                "answers": list(dict.fromkeys(_answer_names(row["Parses"]))),
            }
        )
    values = {key: row.get(key) for key in ("question", "answers")}
    return FactQuestion.model_validate({"id": _id(row, "id", number)} | values)


def _id(row: dict[str, Any], key: str, number: str) -> Any:
    """A row's own id; its number, where it has none."""
    value = row.get(key)
    return number if value is None else value


def _answer_names(value: Any) -> Iterator[Any]:
    """All ``AnswersName`` in FreebaseQA's parses, however they are nested."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner) if key == "AnswersName" else _answer_names(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _answer_names(inner)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for inner in value:
            yield from _flat(inner)
    else:
        yield value if isinstance(value, str) else None


def _rows(source: str, embedded: str) -> Iterator[Row]:
    if source == EMBEDDED:
        file = resources.files("prunewright.tools") / "data" / embedded
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            yield Row(f"line {number}", json.loads(line))
        return
    path = find_local(source, "the source of questions")
    if path is None:
        yield from _data_set_rows(source)
        return
    if not path.is_file():
        raise InputError(f"the source of questions {source} is not a file")
    rows = read_file(path, "questions", MARKS).rows
    if rows is None:
        raise InputError(
            f"the questions {source} are plain text: give rows as JSON, JSON lines, CSV or Parquet"
        )
    yield from rows


def _data_set_rows(source: str) -> Iterator[Row]:
    import datasets

    name, config, wanted = (*source.split(":", 2), "", "")[:3]
    with loading_data_set(source, "the source of questions"):
        splits = datasets.get_dataset_split_names(name, config or None)
        split = choose_split(source, (wanted,) if wanted else _SPLITS, splits)
        rows = datasets.load_dataset(name, config or None, split=split)
        for number, row in enumerate(rows, 1):
            yield Row(f"row {number}", row)
