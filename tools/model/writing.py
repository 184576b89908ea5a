"""Text that a model writes by itself: from random beginnings, and as chats where it has a template.

A document begins with a random token and some greedy ones, and is sampled from there (LLM-QAT,
arXiv 2305.17888). A chat begins where the template has a user speak, so that the model writes
request and answer (Magpie, arXiv 2406.08464).
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from prunewright.state import InputError
from prunewright.tools.model.head import Progress
from prunewright.tools.model.tokens import start_tokens

AT_ONCE = 32
"""Documents that are written in one batch."""
LENGTH = 512
"""Tokens of a document: what is sampled further on strays."""
GREEDY = 4
"""Tokens after a random first one that are the likeliest each."""
TEMPERATURE = 1.0
"""Of the sampling. At 0.8 SmolLM2-135M repeats itself: zlib packs 300 tokens of its prose 2.5 to 1,
those of C4 2.0 to 1, and those written at 1.0 1.8 to 1."""
_SPARE = 1.03
"""Text in tokens is tokenized again, to a few less."""
_REQUEST = "REQUEST"


def write_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    seed: int,
    *,
    rows: int,
    progress: Progress | None = None,
) -> list[str]:
    """Documents that a model writes, half of them chats if its tokenizer has a template for them.

    No document ends before its length: what comes after an end token is the next one, or the next
    turn of a chat.

    Args:
        model: the causal LM; what its own generation settings say is not used.
        tokenizer: its tokenizer.
        tokens: how many are needed, at least.
        seed: of beginnings and samples; the same device writes the same again.
        rows: `embedding_rows` of the model.
        progress: told after each token of a batch.

    Raises:
        InputError: the model cannot generate.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = min(LENGTH, limit) if isinstance(limit, int) else LENGTH
    draw = random.Random(f"{seed}/self")
    barred, plain = _barred(tokenizer, rows)
    start, chat = start_tokens(tokenizer), _chat_beginning(tokenizer)
    chats = 0 < len(chat) < length // 2
    documents: list[str] = []
    writer = _Writer(model, tokenizer, sorted(barred), progress)
    with _own_settings(model), torch.random.fork_rng(_devices(model)), torch.no_grad():
        torch.manual_seed(draw.getrandbits(63))
        missing = float(tokens)
        while missing > 0:
            batches = batches_of(missing, length, chats=chats)
            given = (1 + len(start), len(chat))
            writer.total += sum(length - given[kind] for kind, _ in batches)
            for is_chat, size in batches:
                if is_chat:
                    ids, shown = torch.tensor([chat] * size), 0
                else:
                    first = [[*start, draw.choice(plain)] for _ in range(size)]
                    ids, shown = torch.tensor(first), len(first[0])
                    ids = writer.go_on(ids, shown + GREEDY, do_sample=False)
                ids = writer.go_on(ids, length, do_sample=True, temperature=TEMPERATURE)
                for row in ids.tolist():
                    begin = len(start) if is_chat and row[: len(start)] == start else shown
                    documents.append(str(tokenizer.decode(row[begin:])))
                    missing -= len(tokenizer(documents[-1], add_special_tokens=False).input_ids)
    return documents


def batches_of(tokens: float, length: int = LENGTH, *, chats: bool) -> list[tuple[int, int]]:
    """What is written for a number of tokens, in as few batches as there can be.

    Args:
        tokens: how many are needed.
        length: tokens of a document.
        chats: whether half of the documents are chats.

    Returns:
        Of each batch whether it is of chats (1) and the number of its documents.
    """
    wanted = math.ceil(tokens * _SPARE / length) + 1
    found = []
    for kind, count in enumerate([wanted - wanted // 2, wanted // 2] if chats else [wanted]):
        parts = math.ceil(count / AT_ONCE)
        found += [(kind, count // parts + (i < count % parts)) for i in range(parts)]
    return found


class _Writer(StoppingCriteria):
    """Writes batches and tells of each token."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        barred: list[int],
        progress: Progress | None,
    ) -> None:
        self._model = model
        end = tokenizer.eos_token_id
        self._common = {"suppress_tokens": barred or None, "pad_token_id": end or 0}
        self._progress = progress
        self._done = 0
        self.total = 0

    def go_on(self, ids: Tensor, length: int, **how: Any) -> Tensor:
        """Texts [texts, tokens] up to a length, by settings of transformers' generation."""
        how |= self._common
        if how["do_sample"]:
            how |= {"top_k": 0, "top_p": 1.0}
        settings = GenerationConfig(max_new_tokens=length - ids.shape[1], **how)
        ids = ids.to(self._model.device)
        generate: Any = self._model.generate
        try:
            found: Tensor = generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList([self]),
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            words = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(
                f"the model cannot write text by itself ({words}): name another source than self"
            ) from error
        return found

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Stop nothing; called once a token."""
        self._done += 1
        if self._progress is not None:
            self._progress("text of its own", self._done, self.total)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block no setting comes from the model's own, which are saved with it."""
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings


def _devices(model: PreTrainedModel) -> list[torch.device]:
    """Devices beside the processor whose random numbers are drawn."""
    return [model.device] if model.device.type == "cuda" else []


def _barred(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[set[int], list[int]]:
    """Tokens that are never written, and those that a text may begin with.

    Of the special tokens a text holds only those that end it, and those of a chat: others stand for
    an image, or for nothing.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {*tokenizer.all_special_ids}
    known = range(min(rows, len(tokenizer)))
    used = {tokenizer.eos_token_id, *_ids(tokenizer, _chat(tokenizer))}
    barred = {i for i in special - used if i < rows} | {*range(len(known), rows)}
    return barred, [i for i in known if i not in special]


def _chat_beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A chat up to where a user's words would stand; nothing without a template."""
    before, found, _ = _chat(tokenizer).partition(_REQUEST)
    return _ids(tokenizer, before) if found else []


def _chat(tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat of one request, to be answered; "" without a template that makes one."""
    if not tokenizer.chat_template:
        return ""
    turns = [{"role": "user", "content": _REQUEST}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError):  # it may ask for turns that we do not know
        return ""
    return text if isinstance(text, str) else ""


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found
