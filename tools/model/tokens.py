"""Token ids of texts, and whether a model knows them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from prunewright.state import InputError

_PIECE = 500_000
"""Characters that are tokenized at once: what a tokenizer keeps of them takes some 60 MiB."""
_OVERLAP = 2_000
_ALIKE = 8
"""Tokens on either side of a seam that two pieces must have in common."""


class Piece(NamedTuple):
    """A piece of a text.

    Attributes:
        ids: its token ids [tokens], int32.
        characters: of the text, up to where it ends.
    """

    ids: NDArray[np.int32]
    characters: int


def token_ids(text: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """The token ids of a text piece by piece: together those of the whole text at once.

    Neighbours share some characters, and meet where both have the same tokens around. Only a text
    without such a place, a word of thousands of characters, has other tokens there. A tokenizer
    written in Python does not say where its tokens are, and is given the whole text.

    Args:
        text: in parts.
        tokenizer: a model's.
    """
    reader = _Reader(text)
    if not tokenizer.is_fast:
        whole = reader.take(None)
        yield Piece(_ids(_encoded(whole, tokenizer)), len(whole))
        return
    here = reader.take(_PIECE)
    encoded, begin, first = _encoded(here, tokenizer), 0, 0
    while new := reader.take(_PIECE - 2 * _OVERLAP):
        cut = len(here) - 2 * _OVERLAP
        following = _encoded(here[cut:] + new, tokenizer)
        seam = _seam(encoded, following, cut)
        if seam is None:
            end = encoded.char_to_token(cut + _OVERLAP)
            end = len(encoded.input_ids) if end is None else end + 1
            cut = _span(encoded, end - 1)[1]
            following = _encoded(here[cut:] + new, tokenizer)
            seam = end, 0
        yield Piece(_ids(encoded)[first : seam[0]], begin + cut)
        here, begin, encoded, first = here[cut:] + new, begin + cut, following, seam[1]
    yield Piece(_ids(encoded)[first:], begin + len(here))


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer begins every text with, such as Llama's BOS; often nothing."""
    probe: list[int] = tokenizer("a", add_special_tokens=False).input_ids
    dressed: list[int] = tokenizer("a").input_ids
    return next(
        (dressed[:i] for i in range(len(dressed)) if dressed[i : i + len(probe)] == probe), []
    )


def embedding_rows(model: PreTrainedModel) -> int:
    """Token ids that a model has a vector and a logit for: from 0 to this, exclusively."""
    found = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [getattr(module, "weight", None) for module in found]
    sizes = [w.shape[0] for w in weights if isinstance(w, Tensor) and w.ndim == 2]
    return min(sizes, default=torch.iinfo(torch.int32).max)


def check_ids(
    ids: Tensor | Sequence[int], tokenizer: PreTrainedTokenizerBase, rows: int, what: str
) -> None:
    """Refuse token ids that a model does not know.

    Args:
        ids: of any shape.
        tokenizer: that they come from.
        rows: `embedding_rows` of the model.
        what: the text that they are of, for the message.

    Raises:
        InputError: an id is negative, or beyond the model's embedding.
    """
    ids = torch.as_tensor(ids)
    strange = ids[(ids < 0) | (ids >= rows)].flatten()
    if len(strange):
        token = int(strange[0])
        name = tokenizer.convert_ids_to_tokens(token) if token >= 0 else None
        raise InputError(
            f"{what} holds the token {name!r} with the id {token}, which the model does not know: "
            f"its embedding has {rows:,} rows, and its tokenizer {len(tokenizer):,} tokens. Give "
            "it the tokenizer that it was trained with, or a text without this token"
        )


class _Reader:
    """Takes a number of characters at a time from a text in parts."""

    def __init__(self, text: Iterable[str]) -> None:
        self._parts = iter(text)
        self._part = ""
        self._at = 0

    def take(self, count: int | None) -> str:
        """The next characters, fewer at the end; all, if no number is given."""
        taken: list[str] = []
        left = count
        while left is None or left > 0:
            if self._at == len(self._part):
                part = next(self._parts, None)
                if part is None:
                    break
                self._part, self._at = part, 0
            piece = self._part[self._at : None if left is None else self._at + left]
            self._at += len(piece)
            taken.append(piece)
            left = None if left is None else left - len(piece)
        return "".join(taken)


def _encoded(text: str, tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    encoded: BatchEncoding = tokenizer(text, add_special_tokens=False, verbose=False)
    return encoded


def _span(encoded: BatchEncoding, token: int) -> tuple[int, int]:
    """The characters of a token."""
    span = encoded.token_to_chars(token)
    assert span is not None  # only special tokens that are added have none
    return span.start, span.end


def _ids(encoded: BatchEncoding) -> NDArray[np.int32]:
    return np.array(encoded.input_ids, dtype=np.int32)


def _seam(one: BatchEncoding, other: BatchEncoding, cut: int) -> tuple[int, int] | None:
    """The tokens, of each of two pieces, before which they meet.

    Args:
        one: a piece.
        other: the next.
        cut: character of the first where the second begins.
    """
    left, right = one.input_ids, other.input_ids
    for position in range(_OVERLAP, 2 * _OVERLAP):
        a, b = one.char_to_token(cut + position), other.char_to_token(position)
        if a is None or b is None or b < _ALIKE or min(len(left) - a, len(right) - b) < _ALIKE:
            continue
        begins = _span(one, a)[0] == cut + position and _span(other, b)[0] == position
        if begins and left[a - _ALIKE : a + _ALIKE] == right[b - _ALIKE : b + _ALIKE]:
            return a, b
    return None
