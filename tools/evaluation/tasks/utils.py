"""What the YAML files name: prompts, targets and verdicts, each of one question."""

import re
import string
from typing import Any

from datasets import Dataset

from prunewright.tools.texts.questions import shown_form

Doc = dict[str, Any]
Likelihood = tuple[float, bool]
"""Sum of the log-probabilities of a continuation's tokens, and whether it is the greedy one."""


def given(questions: list[Doc], examples: list[Doc], **_: Any) -> dict[str, Dataset]:
    """The data set: the questions, and those that examples are taken from."""
    return {"test": Dataset.from_list(questions), "examples": Dataset.from_list(examples)}


def lettered(doc: Doc) -> str:
    """A question with its choices by letter."""
    lines = [f"{x}. {choice}" for x, choice in zip(letters(doc), doc["choices"], strict=True)]
    return "\n".join([doc["question"].strip(), *lines, "Answer:"])


def asked(doc: Doc) -> str:
    """A question alone."""
    return f"Question: {doc['question'].strip()}\nAnswer:"


def letters(doc: Doc) -> list[str]:
    """The letters of a question's choices."""
    return list(string.ascii_uppercase[: len(doc["choices"])])


def choices(doc: Doc) -> list[str]:
    """The choices' own words."""
    return [choice.strip() for choice in doc["choices"]]


def right(doc: Doc) -> int:
    """Index of the right choice."""
    return int(doc["answer"])


def preferred(doc: Doc) -> str:
    """The accepted form that is shown in examples and scored."""
    return shown_form(doc["answers"])


def after_space(doc: Doc) -> str:
    """The preferred form, as it goes on after "Answer:"."""
    return f" {preferred(doc)}"


def choose(doc: Doc, results: list[Likelihood]) -> dict[str, float]:
    """Whether the likeliest choice is right, and the right one's log-probability."""
    values = [value for value, _ in results]
    return _verdict(values, values, right(doc))


def choose_by_bytes(doc: Doc, results: list[Likelihood]) -> dict[str, float]:
    """As `choose`, by log-probability a UTF-8 byte of the choice's words.

    Sums would favour short answers. Bytes, unlike tokens, are the same for every model.
    """
    values = [value for value, _ in results]
    sizes = [len(choice.encode()) for choice in choices(doc)]
    return _verdict([v / n for v, n in zip(values, sizes, strict=True)], values, right(doc))


def match(doc: Doc, results: list[str]) -> dict[str, float]:
    """Whether the answer is one of the accepted forms, after `normalise`."""
    accepted = {normalise(answer) for answer in doc["answers"]} - {""}
    return {"correct": float(normalise(results[0]) in accepted)}


def likelihood(_doc: Doc, results: list[Likelihood]) -> dict[str, float]:
    """The log-probability of the preferred form."""
    return {"likelihood": results[0][0]}


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and surplus spaces, as SQuAD's script has it."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _verdict(ranked: list[float], values: list[float], answer: int) -> dict[str, float]:
    best = max(range(len(ranked)), key=lambda i: ranked[i])
    return {"correct": float(best == answer), "likelihood": values[answer]}
