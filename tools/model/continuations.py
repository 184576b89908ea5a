"""Log-probabilities of answers after their questions, and greedy answers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from prunewright.tools.model.head import Head, Progress, hidden_states, tolerance
from prunewright.tools.model.tokens import check_ids, start_tokens
from prunewright.tools.texts.questions import FactQuestion, shown_form

CHECKED = 64
"""Tokens that a cached pass is compared on with a whole one."""
AT_ONCE = 16
"""Facts that are scored in one batch."""


class Continuations:
    """Scores and extends token sequences one by one, reusing what two in a row share.

    The keys and values of the last sequence are kept, so the examples in front of each question,
    and a question in front of each of its choices, run through the model once. Logits are made
    for the answer's tokens alone. Models whose state cannot be cut back to a shared beginning
    (recurrent ones), or whose logits differ with such a cache from those without, compute each
    sequence whole.
    """

    def __init__(self, model: PreTrainedModel, head: Head) -> None:
        self._model = model
        self._head = head
        self._reuses = False
        self._cache = DynamicCache()
        self._cached: list[int] = []
        self._reuses = not getattr(model, "_is_stateful", False) and self._cache_agrees()

    def log_probabilities(self, context: Sequence[int], continuation: Sequence[int]) -> Tensor:
        """Log-probabilities [continuation] of tokens after a context, in nats, and in float32.

        The second column, [continuation, 2], is the highest of any token at that place.

        Args:
            context: at least one token.
            continuation: at least one token.
        """
        ids = [*context, *continuation]
        scores = self._logits(ids[:-1], len(continuation)).log_softmax(dim=-1)
        targets = torch.tensor(continuation, device=scores.device).unsqueeze(1)
        return torch.cat([scores.gather(1, targets), scores.amax(dim=1, keepdim=True)], dim=1)

    def greedy(
        self, context: Sequence[int], most: int, ended: Callable[[list[int]], bool]
    ) -> list[int]:
        """The likeliest token after a context, again and again.

        Args:
            context: at least one token.
            most: tokens at most.
            ended: whether what was generated so far ends it.
        """
        found: list[int] = []
        while len(found) < most and not (found and ended(found)):
            found.append(int(self._logits([*context, *found], 1).argmax()))
        return found

    def _cache_agrees(self) -> bool:
        """Whether logits with a cache that was cut back are those of a whole pass."""
        config = self._model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        count = min(CHECKED, limit) if isinstance(limit, int) else CHECKED
        ids = [(7 * i + 1) % min(512, config.vocab_size) for i in range(count)]
        last = count // 4
        whole = self._logits(ids, last)
        self._reuses = True
        try:
            self._logits([*ids[: -2 * last], *ids[:last]], 1)
            parts = self._logits(ids, last)
        except Exception:  # a family that needs a cache of its own fails its own way
            return False
        finally:
            self._cache, self._cached = DynamicCache(), []
        return bool((whole - parts).abs().max() <= tolerance(self._model, whole))

    @torch.no_grad()
    def _logits(self, ids: list[int], last: int) -> Tensor:
        """Logits [last, vocabulary] after the last tokens of a sequence, float32."""
        kept = 0
        if self._reuses:
            kept = _shared(ids, self._cached)
            kept = min(kept, len(ids) - last)
        surplus = len(self._cached) - kept
        if not kept:
            self._cache = DynamicCache()
        elif surplus:
            self._cache.crop(-surplus)
        self._cached = []  # not known until the pass is over
        options = {"past_key_values": self._cache, "use_cache": True} if self._reuses else {}
        new = torch.tensor([ids[kept:]], device=self._model.device)
        if self._head.exact:
            logits = self._head(hidden_states(self._model, new, **options)[0, -last:])
        else:
            whole = self._model(input_ids=new, **{"use_cache": False, **options}).logits
            logits = whole[0, -last:].float()
        self._cached = ids if self._reuses else []
        return logits


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


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
        question = f"Question: {fact.question.strip()}\nAnswer:"
        context: list[int] = tokenizer(question, add_special_tokens=False).input_ids
        whole: list[int] = tokenizer(
            f"{question} {shown_form(fact.answers)}", add_special_tokens=False
        ).input_ids
        check_ids(whole, tokenizer, rows, f"the question {fact.id}")
        pairs.append((start + context, whole[len(context) :]))
    return pairs


@torch.no_grad()
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
        # Padding stands behind, where no token sees it; the mask keeps it from the experts.
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
            progress("facts", begin + len(batch), len(order))
    return scores
