"""Texts as they are given: what is scored is their words, or they are refused before a step."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from prunewright.graph import run
from prunewright.graph.cli import app
from prunewright.state import InputError
from prunewright.tools.evaluation import evaluate

WORDS = ["The mill stood still, and nobody knew why. " * 60, None, "The river rose again. " * 60]


def test_json_lines_of_any_name_are_scored_as_the_text_that_they_hold(
    pico_models: Callable[..., Path], tmp_path: Path
) -> None:
    lines = "\n".join(json.dumps({"url": "http://x", "text": words}) for words in WORDS)
    names = ["c4-train.00000-of-01024.json", "DATA.JSONL", "lines.txt", "bare"]
    for name in names:
        (tmp_path / name).write_text(lines)
    (tmp_path / "plain.txt").write_text("\n\n".join(words or "" for words in WORDS))
    texts = [(str(tmp_path / name), 4) for name in [*names, "plain.txt"]]
    found = evaluate(str(pico_models()), texts, length=48, dtype="float32")
    assert len({text.perplexity for text in found.texts}) == 1


def test_a_token_beyond_the_embedding_is_found_before_anything_is_scored(
    pico_config: dict[str, Any], pico_models: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(pico_models(), model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<odd>"])
    tokenizer.save_pretrained(model)
    text = tmp_path / "test.txt"
    text.write_text("Some words and <odd> more. " * 200)
    config = pico_config | {"model": str(model)}
    config["texts"] = config["texts"] | {"test": str(text)}
    told: list[Any] = []
    with pytest.raises(InputError, match=r"the test text, holds the token '<odd>' with the id 512"):
        run(config, tmp_path / "run", told.append)
    assert not any("perplexity" in str(event) or "activations" in str(event) for event in told)
    facts = tmp_path / "facts.jsonl"
    facts.write_text(json.dumps({"question": "Is it <odd>?", "answers": ["Yes"]}))
    known = pico_config | {"model": str(model), "guard": {"max_knowledge_drop": 0.1}}
    known["texts"] = pico_config["texts"] | {"knowledge": str(facts), "facts": 1}
    with pytest.raises(InputError, match="the question 1 holds the token '<odd>'"):
        run(known, tmp_path / "known", told.append)
    assert not any("perplexity" in str(event) or "activations" in str(event) for event in told)
    command = ["evaluate", str(model), "--text", str(text), "--windows", "4", "--length", "48"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "512 rows, and its tokenizer 513 tokens" in " ".join(result.output.split())
