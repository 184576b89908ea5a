"""Runs on texts of several domains: what each is measured by, bounded by, and told of."""

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from prunewright import baseline, load_trace, resume, run
from prunewright.graph.cli import app
from prunewright.state.loading import validate_config
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.texts.windows import Windows, load_windows

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("code", "facts", "general")


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Any]:
    """Three domains, one of them of questions, with two guard windows each."""
    code, facts = tmp_path / "code.txt", tmp_path / "facts.jsonl"
    code.write_text("\n".join(f"def f{i}(x):\n    return x + {i % 7}" for i in range(200)))
    rows = [
        {"question": f"What is {i} and {i}?", "answers": [f"the number {2 * i}"]} for i in range(90)
    ]
    facts.write_text("\n".join(map(json.dumps, rows)))
    windows = {"calibration": 6, "gradient": 3, "guard": 6, "test": 2, "length": 48}
    named = {"general": "embedded", "code": str(code), "facts": str(facts)}
    return {"calibration": named, "windows": windows}


def perplexities(directory: Path, drawn: Windows) -> dict[str, float]:
    """Of each domain of the guard's text, by whole forward passes of a saved model."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found: dict[str, list[float]] = {}
    for window, marks, domain in zip(
        drawn.guard, drawn.scored["guard"], drawn.domains["guard"], strict=True
    ):
        with torch.no_grad():
            logits = model(input_ids=window.unsqueeze(0)).logits[0, :-1]
        loss = functional.cross_entropy(logits[marks], window[1:][marks])
        found.setdefault(domain, []).append(float(loss))
    return {name: math.exp(sum(losses) / len(losses)) for name, losses in found.items()}


def test_a_probe_measures_every_domain_as_the_step_does_that_follows_it(
    config: dict[str, Any], texts: dict[str, Any], tmp_path: Path
) -> None:
    config |= {"texts": texts, "agent": "import:scripted_agents:Sure", "max_steps": 1}
    metrics = run(config, out=tmp_path / "run").metrics
    (step,) = RunDirectory(tmp_path / "run").read_trace()
    (probe,) = step.probes
    # Of so few windows all are measured: two a domain.
    assert (probe.tokens, metrics.tokens["probe"]) == (6 * 48, 6 * 48)
    assert probe.layers == step.applied
    assert probe.change == pytest.approx(step.change)
    assert tuple(probe.domains) == NAMES
    assert probe.domains == pytest.approx({n: one.change for n, one in step.domains.items()})


def test_every_step_measures_every_domain(
    config: dict[str, Any],
    texts: dict[str, Any],
    learned_model: Path,
    tmp_path: Path,
) -> None:
    weights = {"general": 2.0, "code": 1.0, "facts": 0.5}
    config |= {
        "texts": texts,
        "weights": weights,
        "agent": "import:scripted_agents:Seeing",
        "guard": {"max_increase": dict.fromkeys(NAMES, 9.0)},
        "signals": ["z_s", "z_g", "z_c", "z_k"],
    }
    observed = import_module("scripted_agents").SEEN
    observed.clear()
    out = tmp_path / "run"
    run(config | {"max_steps": 1}, out=out)
    # It goes on in the same windows with the same domains.
    result = resume(out, max_steps=9)
    metrics, steps = result.metrics, RunDirectory(out).read_trace()
    settled = validate_config(config)
    tokenizer = AutoTokenizer.from_pretrained(learned_model)
    drawn = load_windows(settled.texts, tokenizer, 0, rows=512, weights=weights)
    dense, final = perplexities(learned_model, drawn), perplexities(result.model_directory, drawn)
    assert tuple(metrics.domains) == NAMES
    for name in NAMES:
        assert metrics.domains[name].dense == pytest.approx(dense[name], rel=1e-4)
        assert metrics.domains[name].final == pytest.approx(final[name], rel=1e-4)
    mean = sum(math.log(pair.final) for pair in metrics.domains.values()) / 3
    assert metrics.perplexity.guard.final == pytest.approx(math.exp(mean))
    before = {name: metrics.domains[name].dense for name in NAMES}
    for step in steps:
        assert tuple(step.domains) == NAMES
        for name, one in step.domains.items():
            assert (one.dense, one.before) == (metrics.domains[name].dense, before[name])
            assert one.candidate is not None
            assert one.change == pytest.approx(one.candidate / one.before - 1)
            assert one.change_stderr is not None
            assert one.change_stderr > 0
            before[name] = one.candidate
    # The agent was shown what the weights and bounds are, and what each domain stands at.
    for seen, step in zip(observed, steps, strict=True):
        assert seen.weights == weights
        assert seen.bounds == dict.fromkeys(NAMES, 9.0)
        assert seen.domains == {n: (d.dense, d.before) for n, d in step.domains.items()}
        assert seen.profile.domains == NAMES
        predicted = {
            name: sum(
                p.in_domain(name).cost_of(step.applied.get(p.name, 0.0))
                for p in seen.profile.layers
            )
            for name in NAMES
        }
        assert step.predicted_domains == pytest.approx(predicted)
        for layer in seen.profile.layers:
            costs = layer.domain_costs
            mean_cost = [sum(weights[n] / 3.5 * costs[n][i] for n in NAMES) for i in (0, 1, 2)]
            assert layer.loss_cost == pytest.approx(mean_cost)
            room = min(0.1, 1 - layer.sparsity) * layer.parameters
            expected = costs["facts"][1] / room
            assert layer.measured["z_k"] == pytest.approx(expected)
    # And everybody is told.
    frame = load_trace(out).domains
    assert list(frame.domain) == list(NAMES) * len(steps)
    assert frame.candidate.iloc[-1] == steps[-1].domains["general"].candidate
    card = (result.model_directory / "README.md").read_text()
    table = (out / "report.html").read_text().partition('<table id="domains">')[2]
    _, *told = table.partition("</table>")[0].split("<tr><td>")
    for name, row in zip(NAMES, told, strict=True):
        assert row.startswith(f"{name}<")
        pair = metrics.domains[name]
        assert f"{pair.dense:.3f}" in row
        assert f"{pair.final:.3f}" in row
        assert f"guard text, {name} | {pair.dense:.3f} | {pair.final:.3f} |" in card
    shown = CliRunner().invoke(app, ["show", str(out)]).stdout
    change = steps[0].domains["code"].change
    assert f"code {change:+.1%}, facts " in shown
    assert "weights    code 1, facts 0.5, general 2" in shown


def test_a_bound_of_one_domain_rolls_back_what_the_others_let_pass(
    config: dict[str, Any], texts: dict[str, Any], tmp_path: Path
) -> None:
    bounds = {"code": 1e3, "facts": 1e3, "general": 1e-4}
    agent = "import:scripted_agents:Harmful"
    config |= {"texts": texts, "agent": agent, "max_stalls": 1, "guard": {"max_increase": bounds}}
    metrics = run(config, out=tmp_path / "run").metrics
    (step,) = RunDirectory(tmp_path / "run").read_trace()
    assert step.verdict == "rolled_back"
    rise = step.domains["general"].change
    assert rise is not None
    assert rise > 1e-4
    words = "perplexity of general rose by "
    assert step.reason.startswith(words)
    assert "loosen the guard (guard.max_increase.general)" in metrics.reason
    assert {name: pair.final for name, pair in metrics.domains.items()} == {
        name: one.dense for name, one in step.domains.items()
    }
    bounds["general"] = 1e3
    again = resume(tmp_path / "run", guard={"max_increase": bounds}, max_steps=2, max_stalls=3)
    assert again.metrics.rollbacks == 1


def test_domains_of_the_guard_alone_change_no_mask(
    config: dict[str, Any], texts: dict[str, Any], tmp_path: Path
) -> None:
    windows = texts["windows"]
    other = tmp_path / "other.txt"
    other.write_text(Path(texts["calibration"]["code"]).read_text())
    plain = {"calibration": str(other), "guard": "embedded", "windows": windows}
    named = plain | {"guard": {"general": "embedded", "facts": texts["calibration"]["facts"]}}
    config |= {"criterion": "fisher", "allocation": "greedy"}
    one = baseline(config | {"texts": plain}, out=tmp_path / "one").metrics
    two = baseline(config | {"texts": named}, out=tmp_path / "two").metrics
    assert one.revision == two.revision
    assert one.domains == {}
    assert tuple(two.domains) == ("facts", "general")
    (step,) = RunDirectory(tmp_path / "two").read_trace()
    assert step.domains["facts"].candidate == two.domains["facts"].final


def test_balance_weighs_by_what_each_domain_has_lost(
    config: dict[str, Any], texts: dict[str, Any], tmp_path: Path
) -> None:
    guard = {"max_increase": 9.0}
    result = run(
        config | {"texts": texts, "agent": "balance", "guard": guard, "max_steps": 3},
        out=tmp_path / "run",
    )
    steps = RunDirectory(result.directory).read_trace()
    assert len(steps) == 3
    for step in steps:
        raised = {name: (one.before / one.dense) ** 5 for name, one in step.domains.items()}
        mean = sum(raised.values()) / 3
        told = ", ".join(f"{name} {raised[name] / mean:.2f}" for name in NAMES)
        assert step.decision.reasoning.startswith(f"Weights after what each has lost: {told}. ")
    assert "code 1.00, facts 1.00, general 1.00" in steps[0].decision.reasoning
    assert "code 1.00, facts 1.00, general 1.00" not in steps[2].decision.reasoning


def test_the_uniform_control_is_told_by_domain(
    config: dict[str, Any], texts: dict[str, Any], tmp_path: Path
) -> None:
    config |= {"texts": texts, "guard": {"max_increase": 9.0}}
    alone = baseline(config | {"allocation": "uniform"}, out=tmp_path / "alone").metrics
    out = tmp_path / "run"
    one = run(config | {"agent": "greedy", "with_control": True}, out=out)
    assert one.metrics.control is not None
    domains = one.metrics.control.domains
    assert domains == pytest.approx({name: pair.final for name, pair in alone.domains.items()})
    shown = CliRunner().invoke(app, ["show", str(out)]).stdout
    card = (one.model_directory / "README.md").read_text()
    table = (out / "report.html").read_text().partition('<table id="domains">')[2]
    _, *rows = table.partition("</table>")[0].split("<tr><td>")
    for name, row in zip(NAMES, rows, strict=True):
        pair, value = one.metrics.domains[name], f"{domains[name]:.3f}"
        assert f"guard text, {name} | {pair.dense:.3f} | {pair.final:.3f} | {value} |" in card
        assert f">{value}</data></td></tr>" in row.rpartition('<td class="n">')[2]
        (line,) = [line for line in shown.splitlines() if line.startswith(f"guard, {name} ")]
        assert line.split()[-1] == value


def test_the_benchmarks_ranking_is_greedys_at_the_weights_of_the_run(
    config: dict[str, Any], texts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    del texts["calibration"]["code"]
    weights = {"general": 2.0, "facts": 0.5}
    config |= {"texts": texts, "weights": weights, "max_steps": 1}
    greedy = run(config, out=tmp_path / "greedy").metrics
    config["agent"] = "import:weighted_ranking:WeightedRanking"
    same = run(config | {"agent_options": weights}, out=tmp_path / "same").metrics
    assert same.revision == greedy.revision
    facts = {"general": 0.0, "facts": 1.0}
    other = run(config | {"agent_options": facts}, out=tmp_path / "other").metrics
    assert other.revision != greedy.revision
