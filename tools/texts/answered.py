"""Questions with their answers as windows of tokens, of which only the answers' are scored."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from prunewright.state import InputError
from prunewright.tools.model.tokens import start_tokens
from prunewright.tools.texts.questions import Answered

_AT_ONCE = 256
"""Questions that are tokenized at once."""


def answered_tokens(
    documents: Sequence[Answered], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    """The tokens of each question up to ``Answer:``, and those of its answer.

    Args:
        documents: the questions.
        tokenizer: a model's.
    """
    if not documents:
        return []

    def ids(texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(texts, add_special_tokens=False).input_ids
        return found

    asked = ids([document[: document.answer] for document in documents])
    whole = ids([str(document) for document in documents])
    return [(a, w[len(a) :]) for a, w in zip(asked, whole, strict=True)]


def pack_answered(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    label: str,
    most: int,
    least: int = 0,
    limit: int | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.bool_], int]:
    """Questions one after the other in windows, each of which begins with a whole one.

    The one that a window has no room for fills its end, unscored, and begins the next window. One
    that is longer than a window is left out. The tail is dropped.

    Args:
        documents: the questions.
        tokenizer: the model's.
        length: tokens in a window.
        label: where they are from, for messages.
        most: windows after which no more need be read.
        least: characters before which reading does not end.
        limit: characters after which it does in any case.

    Returns:
        Windows [windows, length]; which tokens after the first are an answer's [windows, length -
        1], at least one in each; and how many characters they were made of.

    Raises:
        InputError: something among them is no question.
    """
    start = start_tokens(tokenizer)
    between: list[int] = tokenizer("\n\n", add_special_tokens=False).input_ids
    windows: list[list[int]] = []
    scored: list[list[bool]] = []
    row, marks, characters = list(start), [False] * len(start), 0
    for document, asked, answer in _tokens(documents, tokenizer, label):
        if (len(windows) >= most and characters >= least) or (limit and characters >= limit):
            break
        characters += len(document)
        size = len(asked) + len(answer)
        if not answer or len(start) + size > length:
            continue
        first = len(row) == len(start)
        gap = [] if first else between
        row += gap + asked + answer
        if len(row) > length:
            windows.append(row[:length])
            scored.append([*marks, *[False] * length][1:length])
            row, marks = [*start, *asked, *answer], [False] * len(start)
            gap = []
        marks += [False] * (len(gap) + len(asked)) + [True] * len(answer)
    ids = np.array(windows, dtype=np.int32).reshape(-1, length)
    return ids, np.array(scored, dtype=np.bool_).reshape(-1, length - 1), characters


def _tokens(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, label: str
) -> Iterator[tuple[Answered, list[int], list[int]]]:
    reading = iter(documents)
    while part := list(islice(reading, _AT_ONCE)):
        questions = [document for document in part if isinstance(document, Answered)]
        if len(questions) < len(part):
            raise InputError(
                f"{label} holds questions, and rows that are none: as a domain it is scored on the "
                "answers alone. Give the others in another file"
            )
        for document, (asked, answer) in zip(
            questions, answered_tokens(questions, tokenizer), strict=True
        ):
            yield document, asked, answer
