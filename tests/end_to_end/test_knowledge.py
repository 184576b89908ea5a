"""The bound on what a model forgets: it rolls back what the perplexity would let pass."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunewright.graph import fork, run
from prunewright.state import InputError, StoreError
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.texts.questions import shown_form

QUESTIONS = [f"Who saw the {word}?" for word in ("river", "hill", "mill", "sea", "rose", "road")]


def open_model(directory: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(directory)


def recall(directory: Path, facts: Path) -> float:
    """Mean log-probability of the answers' tokens, by a whole forward pass for each fact."""
    model, tokenizer = open_model(directory)
    means = []
    for line in facts.read_text().splitlines():
        fact = json.loads(line)
        question = f"Question: {fact['question']}\nAnswer:"
        start = len(tokenizer(question).input_ids)
        ids = tokenizer(f"{question} {shown_form(fact['answers'])}").input_ids
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        scores = [float(rows[i - 1, ids[i]]) for i in range(start, len(ids))]
        means.append(sum(scores) / len(scores))
    return sum(means) / len(means)


@pytest.fixture
def facts(learned_model: Path, tmp_path: Path) -> Path:
    """What the dense model itself would answer: pruning makes that less likely."""
    model, tokenizer = open_model(learned_model)
    rows = []
    for question in QUESTIONS:
        ids = tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt").input_ids
        with torch.no_grad():
            made = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        answer = tokenizer.decode(made, skip_special_tokens=True).split()
        rows.append({"question": question, "answers": [" ".join(answer), "another form"]})
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def bounded(config: dict[str, Any], facts: Path) -> dict[str, Any]:
    """A run that no rise of the perplexity ends."""
    texts = config["texts"] | {"knowledge": str(facts), "facts": len(QUESTIONS)}
    return config | {"texts": texts, "guard": {"max_increase": 100.0}}


def test_a_fall_is_rolled_back_though_the_perplexity_holds(
    bounded: dict[str, Any], facts: Path, learned_model: Path, tmp_path: Path
) -> None:
    bounded["guard"]["max_knowledge_drop"] = 0.001
    bounded["max_stalls"] = 2
    metrics = run(bounded, out=tmp_path / "run").metrics
    records = RunDirectory(tmp_path / "run").read_trace()
    first = records[0]
    dense = recall(learned_model, facts)
    assert first.verdict == "rolled_back"
    assert first.knowledge_dense == pytest.approx(dense, abs=1e-4)
    assert first.candidate_knowledge is not None
    drop = first.knowledge_dense - first.candidate_knowledge
    assert drop > 0.001
    assert f"recall fell by {drop:.4f} nats a token below the dense model" in first.reason
    assert first.reason.endswith("more than guard.max_knowledge_drop 0.001")
    for record in records:
        assert record.candidate_knowledge is not None
        fell = dense - record.candidate_knowledge > 0.001
        assert record.verdict == ("rolled_back" if fell else "accepted")
    assert metrics.knowledge is not None
    assert metrics.knowledge.dense == first.knowledge_dense


def test_what_is_kept_is_what_the_saved_model_knows(
    bounded: dict[str, Any], facts: Path, learned_model: Path, tmp_path: Path
) -> None:
    plain = run(bounded, out=tmp_path / "plain").metrics
    assert plain.knowledge is None
    assert all(r.candidate_knowledge is None for r in RunDirectory(tmp_path / "plain").read_trace())
    bounded["guard"]["max_knowledge_drop"] = 100.0
    result = run(bounded, out=tmp_path / "run")
    # A bound that nothing passes changes nothing, and costs some tokens of the guard's.
    assert result.metrics.revision == plain.revision
    assert result.metrics.tokens["guard"] > plain.tokens["guard"]
    assert result.metrics.knowledge is not None
    assert result.metrics.knowledge.dense == pytest.approx(recall(learned_model, facts), abs=1e-4)
    final = recall(result.model_directory, facts)
    assert result.metrics.knowledge.final == pytest.approx(final, abs=1e-4)
    assert (tmp_path / "run" / "report.html").read_text().count("nats a token") >= 1


def test_a_killed_run_comes_to_the_same(
    bounded: dict[str, Any],
    submit: Callable[[dict[str, Any]], dict[str, Any]],
    same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    bounded["guard"]["max_knowledge_drop"] = 100.0
    bounded["agent"] = "greedy"
    run(bounded, out=tmp_path / "whole")
    kill = {
        "at": "prunewright.tools.bench.workbench:Workbench.knowledge",
        "when": "after",
        "nth": 3,
    }
    job = {"config": bounded, "out": str(tmp_path / "run")}
    assert submit(job | {"do": "run", "kill": kill}) == {"signal": signal.SIGKILL}
    answer = submit(job | {"do": "resume"})
    assert "error" not in answer, answer
    same_run(tmp_path / "whole", tmp_path / "run")


def test_a_bound_set_on_the_way_measures_what_it_needs(
    bounded: dict[str, Any], facts: Path, learned_model: Path, tmp_path: Path
) -> None:
    run(bounded | {"max_steps": 1}, out=tmp_path / "run")
    guard = {"max_increase": 100.0, "max_knowledge_drop": 1e-9}
    result = fork(tmp_path / "run", 1, tmp_path / "on", max_steps=2, guard=guard)
    records = RunDirectory(tmp_path / "on").read_trace()
    assert [r.verdict for r in records] == ["accepted", "rolled_back"]
    assert records[0].knowledge_dense is None
    assert result.metrics.knowledge is not None
    assert result.metrics.knowledge.dense == pytest.approx(recall(learned_model, facts), abs=1e-4)
    final = recall(result.model_directory, facts)
    assert result.metrics.knowledge.final == pytest.approx(final, abs=1e-4)
    assert math.isfinite(final)


def test_facts_that_changed_or_are_too_few(
    bounded: dict[str, Any], facts: Path, tmp_path: Path
) -> None:
    bounded["guard"]["max_knowledge_drop"] = 100.0
    bounded["texts"]["facts"] = 7
    with pytest.raises(InputError, match="6 questions, 7 are asked for"):
        run(bounded, out=tmp_path / "few")
    bounded["texts"]["facts"] = 6
    run(bounded | {"max_steps": 1}, out=tmp_path / "run")
    facts.write_text(facts.read_text().replace("another form", "a third form"))
    with pytest.raises(StoreError, match="no longer those that its earlier steps"):
        fork(tmp_path / "run", 1, tmp_path / "on", max_steps=2)
