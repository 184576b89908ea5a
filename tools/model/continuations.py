"""Log-probabilities of answers after their questions."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from prunewright.tools.model.head import Head, Progress, hidden_states
from prunewright.tools.model.tokens import check_ids, start_tokens
from prunewright.tools.texts.answered import answered_tokens
from prunewright.tools.texts.questions import FactQuestion, as_text

AT_ONCE = 16
"""Questions of fact that are scored in one batch."""
GUESSES = 2
"""Times that a model's own generation is asked, before its text is made by whole passes."""
SAMPLED = 40
"""Tokens of a text that a model writes by itself."""


def fact_tokens(
    facts: Sequence[FactQuestion], tokenizer: PreTrainedTokenizerBase, *, rows: int
) -> list[tuple[list[int], list[int]]]:
    """Each fact as the tokens of ``Question: ...``, ``Answer:``, and those of its first answer.

    Args:
        facts: the questions.
        tokenizer: the model's.
        rows: `embedding_rows` of the model.

    Raises:
        InputError: a question or answer holds a token that the model does not know.
    """
    start = start_tokens(tokenizer)
    pairs = []
    for fact in facts:
        ((context, answer),) = answered_tokens([as_text(fact)], tokenizer)
        check_ids(context + answer, tokenizer, rows, f"the question {fact.id}")
        pairs.append((start + context, answer))
    return pairs


@torch.no_grad()
def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    rows: int,
    most: int = SAMPLED,
) -> str:
    """What a model writes after a prompt if it takes the likeliest token each time.

    Args:
        model: the causal LM.
        tokenizer: its tokenizer.
        prompt: what is continued; its tokens that the model does not know are left out.
        rows: `embedding_rows` of the model.
        most: tokens that are written at most; fewer where the model has no positions for them.

    Returns:
        The text up to the model's end token, without the prompt.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = [token for token in tokenizer(prompt).input_ids if token < rows]
    if isinstance(limit, int):
        most = min(most, limit - len(context))
    if not context or most < 1:
        return ""
    end = tokenizer.eos_token_id
    written: list[int] = []
    guesses = GUESSES
    while len(written) < most:
        known = context + written
        guess: list[int] = []
        if guesses:
            guesses -= 1
            guess = _guess(model, known, most - len(written), end)
        # A whole pass, without a cache, decides: that every family that can be scored can do.
        ids = torch.tensor([known + guess], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(known) - 1 :, :rows]
        for token, guessed in zip_longest(logits.argmax(-1).tolist(), guess):
            if token == end or len(written) == most:
                return str(tokenizer.decode(written, skip_special_tokens=True))
            written.append(token)
            if token != guessed:
                break
    return str(tokenizer.decode(written, skip_special_tokens=True))


def _guess(model: PreTrainedModel, known: list[int], most: int, end: int | None) -> list[int]:
    """What the model's own generation, with a cache, writes next; nothing where it fails.

    Some families ignore caches or take none: it is a guess that saves passes.
    """
    ids = torch.tensor([known], device=model.device)
    settings = GenerationConfig(
        max_new_tokens=most, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    generate: Any = model.generate
    try:
        found = generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # each family fails its own way
        return []
    guess: list[int] = found[0, len(known) :].tolist()
    return guess


def answer_scores(
    model: PreTrainedModel,
    head: Head,
    pairs: Sequence[tuple[list[int], list[int]]],
    progress: Progress | None = None,
) -> list[float]:
    """Mean log-probability of each answer's tokens after its question, nats a token.

    Args:
        model: the causal LM.
        head: its head.
        pairs: token ids of question and answer, both not empty.
        progress: told after each batch.
    """
    scores = [0.0] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    for begin in range(0, len(order), AT_ONCE):
        batch = order[begin : begin + AT_ONCE]
        rows = [torch.tensor(pairs[i][0] + pairs[i][1][:-1]) for i in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
        # Padding comes behind, where no token sees it; the mask keeps it from the experts.
        mask = (torch.arange(ids.shape[1]) < lengths).long().to(model.device)
        if head.exact:
            states = hidden_states(model, ids, attention_mask=mask)
        else:
            states = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, index in enumerate(batch):
            context, answer = pairs[index]
            end = len(context) + len(answer) - 1
            after = states[row, len(context) - 1 : end]
            logits = head(after) if head.exact else after.float()
            chosen = torch.tensor(answer, device=logits.device).unsqueeze(1)
            scores[index] = float(logits.log_softmax(-1).gather(1, chosen).cpu().double().mean())
        if progress is not None:
            progress("factual recall", begin + len(batch), len(order))
    return scores
