"""Answers' log-probabilities against whole forward passes."""

from collections.abc import Callable

import pytest
import torch

from prunewright.tools.model.continuations import answer_scores, continue_text, fact_tokens
from prunewright.tools.model.head import Head
from prunewright.tools.model.loading import LoadedModel
from prunewright.tools.texts.questions import load_facts, shown_form

Load = Callable[..., LoadedModel]


def reference(loaded: LoadedModel, context: list[int], answer: list[int]) -> list[float]:
    """By one whole forward pass without a cache."""
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([context + answer])).logits[0].float()
    rows = logits.log_softmax(-1)
    return [float(rows[len(context) + i - 1, token]) for i, token in enumerate(answer)]


def test_batched_answers_are_those_of_single_passes(load: Load, family: str) -> None:
    loaded = load(family)
    facts = load_facts("embedded")[:20]
    pairs = fact_tokens(facts, loaded.tokenizer, rows=512)
    text = loaded.tokenizer.decode(pairs[0][0] + pairs[0][1])
    assert text == f"Question: {facts[0].question}\nAnswer: {shown_form(facts[0].answers)}"
    told: list[tuple[str, int, int]] = []
    found = answer_scores(loaded.model, Head(loaded.model), pairs, lambda *p: told.append(p))
    for (context, answer), score in zip(pairs, found, strict=True):
        expected = reference(loaded, context, answer)
        assert score == pytest.approx(sum(expected) / len(expected), abs=2e-4)
    assert told == [("factual recall", 16, 20), ("factual recall", 20, 20)]


@pytest.mark.parametrize("family", ["LlamaConfig", "OpenAIGPTConfig", "MambaConfig"])
def test_a_text_goes_on_with_the_likeliest_token_of_each_whole_pass(
    load: Load, family: str
) -> None:
    """GPT-1 ignores caches, so its own generation is wrong."""
    loaded = load(family)
    prompt = "The text of"
    text = continue_text(loaded.model, loaded.tokenizer, prompt, rows=500, most=12)
    ids = loaded.tokenizer(prompt).input_ids
    expected: list[int] = []
    with torch.no_grad():
        for _ in range(12):
            logits = loaded.model(torch.tensor([ids + expected]), use_cache=False).logits
            expected.append(int(logits[0, -1, :500].argmax()))
    end = loaded.tokenizer.eos_token_id
    expected = expected[: expected.index(end)] if end in expected else expected
    assert text == loaded.tokenizer.decode(expected, skip_special_tokens=True)
