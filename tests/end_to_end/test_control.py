"""`run --with-control` measures what a uniform baseline comes to; samples are greedy text."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from page import Page
from typer.testing import CliRunner

from prunewright.graph import baseline, run
from prunewright.graph.cli import app
from prunewright.state import InputError, validate_config
from prunewright.tools.report import build_report


def metrics_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "metrics.json").read_text())
    return content


def test_the_control_is_the_uniform_baseline_and_changes_nothing_of_the_run(
    reference: Path, reference_config: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    assert config["model"] == reference_config["model"]
    written = tmp_path / "config.yaml"
    written.write_text(yaml.safe_dump(reference_config))
    out = tmp_path / "run"
    result = CliRunner().invoke(app, ["run", "-c", str(written), "--with-control", "-o", str(out)])
    assert result.exit_code == 0, result.output
    alone = baseline(reference_config, out=tmp_path / "alone").metrics
    found, without = metrics_of(out), metrics_of(reference)
    control = found["control"]
    assert (control["revision"], control["sparsity"]) == (alone.revision, alone.sparsity)
    assert control["test"] == pytest.approx(alone.perplexity.test.final)
    assert control["guard"] == pytest.approx(alone.perplexity.guard.final)
    own = found["perplexity"]["test"]["final"]
    assert control["change"] == pytest.approx(own / control["test"] - 1)
    assert control["change_stderr"] > 0
    # Windows of 48 tokens: 4 for its statistics, 3 of the guard, 3 of the test.
    assert found["tokens"].pop("control") == (4 + 3 + 3) * 48
    assert found["tokens"] == without["tokens"]
    parts = sum(value for name, value in found["seconds"].items() if name != "total")
    assert found["seconds"]["total"] == pytest.approx(parts)
    assert found["revision"] == without["revision"]
    assert (out / "trace.jsonl").read_bytes() == (reference / "trace.jsonl").read_bytes()
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (out, reference)]
    assert weights[0] == weights[1]
    card = (out / "model" / "README.md").read_text()
    page = Page(build_report([out]))
    than = "lower" if own < control["test"] else "higher"
    for text in (result.output, card, page.text):
        assert f"{control['test']:.3f}" in text
        assert f"{abs(control['change']):.1%} ± {control['change_stderr']:.1%} {than}" in text
    assert "was not measured" not in page.text


def test_a_run_that_is_killed_after_its_control_measures_it_again(
    reference_config: dict[str, Any],
    submit: Callable[[dict[str, Any]], dict[str, Any]],
    reference: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    job = {"config": reference_config | {"with_control": True}, "out": str(out)}
    measured = "prunewright.tools.results:_measure_control"
    kill = {"at": measured, "when": "after", "nth": 1}
    assert submit(job | {"do": "run", "kill": kill}) == {"signal": signal.SIGKILL}
    assert not (out / "metrics.json").exists()
    answer = submit(job | {"do": "resume"})
    assert answer["metrics"]["control"]["sparsity"] == pytest.approx(0.3, abs=0.001)
    assert answer["metrics"]["revision"] == metrics_of(reference)["revision"]


def test_a_run_that_ends_early_has_its_control_at_the_sparsity_reached(
    config: dict[str, Any], tmp_path: Path
) -> None:
    found = run(config | {"max_steps": 1, "with_control": True}, out=tmp_path / "run").metrics
    assert found.status == "max_steps"
    assert found.control is not None
    assert found.control.sparsity == pytest.approx(found.sparsity, abs=0.001)


def test_a_control_is_not_measured_where_there_is_none(
    config: dict[str, Any], tmp_path: Path
) -> None:
    itself = baseline(config | {"with_control": True}, out=tmp_path / "itself").metrics
    assert itself.control is None
    with pytest.raises(InputError, match=r"with_control: pattern 2:4 fixes"):
        validate_config(config | {"with_control": True, "pattern": "2:4"})


def test_the_sample_is_what_both_models_write_greedily(
    reference: Path, reference_config: dict[str, Any]
) -> None:
    sample = metrics_of(reference)["sample"]
    for kind, path in (("dense", reference_config["model"]), ("pruned", reference / "model")):
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        given = tokenizer(sample["prompt"], return_tensors="pt")
        ids = model.generate(
            input_ids=given.input_ids,
            attention_mask=given.attention_mask,
            do_sample=False,
            max_new_tokens=40,
        )
        written = ids[0, given.input_ids.shape[1] :]
        assert tokenizer.decode(written, skip_special_tokens=True) == sample[kind]
        assert sample[kind].strip()
    assert sample["dense"] != sample["pruned"]
    page = Page(build_report([reference]))
    assert sample["prompt"] + sample["pruned"] in page.text
    assert f"path = {str(reference / 'model')!r}" in page.text
