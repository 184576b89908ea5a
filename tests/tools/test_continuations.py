"""Answers' log-probabilities against whole forward passes and lm-eval's own model."""

from collections.abc import Callable

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from prunewright.tools.model.continuations import Continuations, answer_scores, fact_tokens
from prunewright.tools.model.head import Head
from prunewright.tools.model.loading import LoadedModel
from prunewright.tools.texts.questions import load_facts, shown_form

Load = Callable[..., LoadedModel]
PREFIX = "Question: Who wrote it?\nAnswer: he did\n\n"
PAIRS = [
    (f"{PREFIX}Question: {question}\nAnswer:", f" {answer}")
    for question in ("What is the sea?", "What is seen from the hill?", "Who?")
    for answer in ("water and salt", "A", "B", "the old mill by the river")
]


def reference(loaded: LoadedModel, context: list[int], answer: list[int]) -> list[float]:
    """By one whole forward pass without a cache."""
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([context + answer])).logits[0].float()
    rows = logits.log_softmax(-1)
    return [float(rows[len(context) + i - 1, token]) for i, token in enumerate(answer)]


def test_what_is_reused_changes_nothing(load: Load, family: str) -> None:
    loaded = load(family)
    scorer = Continuations(loaded.model, Head(loaded.model))
    for context, answer in PAIRS:
        ids = loaded.tokenizer(context).input_ids, loaded.tokenizer(answer).input_ids
        found = scorer.log_probabilities(*ids)
        assert found[:, 0].tolist() == pytest.approx(reference(loaded, *ids), abs=2e-4)
        assert (found[:, 1] >= found[:, 0]).all()


@pytest.mark.parametrize("family", ["OpenAIGPTConfig", "Lfm2Config", "MambaConfig"])
def test_a_family_without_such_a_cache_is_scored_whole(load: Load, family: str) -> None:
    test_what_is_reused_changes_nothing(load, family)


def test_a_shared_beginning_runs_once(load: Load) -> None:
    loaded = load()
    scorer = Continuations(loaded.model, Head(loaded.model))
    seen: list[int] = []
    block = loaded.model.get_submodule("model.layers.0")
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    context = loaded.tokenizer(PAIRS[0][0]).input_ids
    for letter in (7, 8, 9):
        scorer.log_probabilities(context, [letter])
    assert seen == [len(context), 1, 1]


def test_without_the_head_the_whole_model_is_asked(load: Load) -> None:
    loaded = load()
    head = Head(loaded.model)
    head.exact = False
    scorer = Continuations(loaded.model, head)
    for context, answer in PAIRS[:3]:
        ids = loaded.tokenizer(context).input_ids, loaded.tokenizer(answer).input_ids
        found = scorer.log_probabilities(*ids)[:, 0].tolist()
        assert found == pytest.approx(reference(loaded, *ids), abs=2e-4)


def test_log_likelihoods_and_greedy_answers_are_lm_evals(load: Load) -> None:
    loaded = load()
    theirs = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1)
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in PAIRS]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    scorer = Continuations(loaded.model, Head(loaded.model))
    for (context, answer), (value, greedy) in zip(PAIRS, expected, strict=True):
        before = loaded.tokenizer(context).input_ids
        found = scorer.log_probabilities(
            before, loaded.tokenizer(context + answer).input_ids[len(before) :]
        )
        assert float(found[:, 0].sum()) == pytest.approx(value, abs=1e-3)
        assert bool((found[:, 0] == found[:, 1]).all()) is greedy
    contexts = list(dict.fromkeys(context for context, _ in PAIRS))
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    generated = theirs.generate_until(
        [Instance("generate_until", {}, (context, options), 0) for context in contexts],
        disable_tqdm=True,
    )
    decode, end = loaded.tokenizer.decode, loaded.tokenizer.eos_token_id
    for context, words in zip(contexts, generated, strict=True):
        ids = loaded.tokenizer(context).input_ids
        tokens = scorer.greedy(ids, 12, lambda t: t[-1] == end or "\n" in decode(t))
        assert decode(tokens, skip_special_tokens=True).split("\n")[0] == words


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
    assert told == [("facts", 16, 20), ("facts", 20, 20)]
