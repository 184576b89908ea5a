"""How a run says that it ended, whether there is a model then, and how it goes on."""

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from prunewright.graph import RunResult, baseline, resume, run
from prunewright.graph.cli import app
from prunewright.graph.running.study import compare
from prunewright.state import InputError, PrunewrightError
from prunewright.state.run import DENSE
from prunewright.tools.bench.workbench import Workbench

Prune = Callable[..., RunResult]
GOOD: dict[str, Any] = {"layers": {"*": 0.05}}
HARM: dict[str, Any] = {"layers": {"*": 0.5}}
IDLE: dict[str, Any] = {"layers": {}}
SPECK: dict[str, Any] = {"layers": {"0.mlp.up_proj": 1e-7}}
WRONG: dict[str, Any] = {"layers": {"0.mlp.up_proj": 0.7}}


@pytest.fixture
def prune(config: dict[str, Any], tmp_path: Path) -> Prune:
    """A function that makes a run whose decisions are given."""

    def make(*steps: dict[str, Any], **changes: Any) -> RunResult:
        agent = {"agent": "import:scripted_agents:Steps", "agent_options": {"steps": list(steps)}}
        bounds = {"target": 0.6, "step": 0.5, "max_steps": 9, "asking": {"repairs": 1}}
        return run(config | agent | bounds | changes, out=tmp_path / "run")

    return make


def test_a_baseline_that_is_broken_on_the_guard_alone_is_not_saved(
    pico_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = Workbench.guard_losses

    def broken(self: Workbench, revision: str, *rest: Any) -> list[float]:
        found = losses(self, revision, *rest)
        return found if revision == DENSE else [math.nan, *found[1:]]

    monkeypatch.setattr(Workbench, "guard_losses", broken)
    with pytest.raises(PrunewrightError, match="is broken and was not saved"):
        baseline(pico_config, out=tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("steps", "changes", "status", "words", "absent"),
    [
        (
            [HARM],
            {},
            "stalled",
            "3 steps, 3 were rolled back by the guard (the last: perplexity rose",
            "ask",
        ),
        ([WRONG], {}, "stalled", "3 steps, 3 had no valid answer (the last: model", "guard"),
        ([IDLE], {}, "stalled", "3 steps, 3 chose no layer", "guard"),
        ([SPECK], {}, "stalled", "3 steps, 3 had deltas that came to no weight", "guard"),
        ([HARM, WRONG, HARM], {}, "stalled", "2 were rolled back by the guard", "chose no"),
        (
            [HARM, WRONG],
            {"max_steps": 2},
            "max_steps",
            "of its 2 steps, 1 was rolled back",
            "chose no",
        ),
    ],
)
def test_a_run_without_an_accepted_step_says_why_and_saves_no_model(
    steps: list[dict[str, Any]],
    changes: dict[str, Any],
    status: str,
    words: str,
    absent: str,
    prune: Prune,
    tmp_path: Path,
) -> None:
    result = prune(*steps, **changes)
    metrics = result.metrics
    assert (metrics.status, metrics.saved, metrics.sparsity) == (status, False, 0)
    assert words in metrics.reason
    assert absent not in metrics.reason
    assert metrics.reason.endswith(
        "As no step was accepted, no model is saved: it would be the dense one"
    )
    assert result.model_directory is None
    assert not (tmp_path / "run" / "model").exists()
    assert ("loosen the guard (guard.max_increase)" in metrics.reason) == (HARM in steps)
    assert ("ask another model" in metrics.reason) == (WRONG in steps)
    shown = json.loads(command("show", str(tmp_path / "run"), "--json").stdout)
    assert shown["metrics"]["reason"] == metrics.reason
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "the model would be the dense one" in page
    scored = command("evaluate", str(tmp_path / "run"))
    assert scored.exit_code == 2
    assert "holds a run that saved no model" in scored.stderr


def test_a_comparison_scores_the_dense_model_where_a_run_came_to_nothing(
    config: dict[str, Any], tmp_path: Path
) -> None:
    options = {"steps": [IDLE]}
    settings = {"agent": "import:scripted_agents:Steps", "agent_options": options, "max_stalls": 1}
    study = {
        "base": config,
        "methods": [{"name": "idle", "settings": settings}],
        "evaluation": {
            "length": 48,
            "texts": [{"name": "test", "source": "embedded", "windows": 2}],
        },
    }
    found = compare(study, tmp_path / "out")
    (idle,) = found.experiments
    assert idle.result is not None, idle.error
    assert (idle.result.status, idle.result.sparsity) == ("stalled", 0)
    assert found.dense.scores is not None
    assert idle.result.scores.texts == found.dense.scores.texts
    assert Path(config["model"], "config.json").is_file()


def test_the_command_ends_with_3_and_its_advice_works(prune: Prune, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    prune(GOOD, HARM, target=0.55, guard={"max_increase": 0.05})
    ended = command("resume", out)
    assert ended.exit_code == 3
    assert "Ended before the target: too many steps in a row came to nothing; of the last 3" in (
        " ".join(ended.stderr.split())
    )
    advice = shlex.split(ended.stderr.partition("for example: prunewright ")[2])
    assert advice == ["resume", out, "--set", "guard.max_increase=0.1"]
    again = command(*advice[:-1], "guard.max_increase=1000000.0", "--json")
    assert again.exit_code == 0, again.output
    found = json.loads(again.stdout)
    assert (found["status"], found["reason"]) == (
        "target_reached",
        "the target sparsity is reached",
    )
    assert found["steps"] == 5
    assert Path(found["model_directory"], "config.json").is_file()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 5


def test_an_agent_that_gives_no_answer_is_replaced(prune: Prune, tmp_path: Path) -> None:
    prune(WRONG, target=0.1, max_stalls=1)
    result = resume(tmp_path / "run", agent="greedy", guard={"max_increase": 1e6})
    assert (result.metrics.status, result.metrics.saved) == ("target_reached", True)
    assert result.metrics.rollbacks == 0


def test_a_run_goes_on_only_with_a_change_that_lets_it(prune: Prune, tmp_path: Path) -> None:
    ended = prune(GOOD, max_steps=1, guard={"max_increase": 1e6})
    assert resume(tmp_path / "run").metrics == ended.metrics
    with pytest.raises(InputError, match=r"nothing is left to do after step 1 .*max_steps is used"):
        resume(tmp_path / "run", agent="uniform")
    assert resume(tmp_path / "run", max_steps=2).metrics.steps == 2


def test_what_was_refused_is_kept_with_its_words(
    prune: Prune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # What no configuration may hold, and the agent's words do.
    monkeypatch.setenv("SOME_API_KEY", "model.layers.0.mlp.up")
    told = {"lessons": ["<b>bold</b>"]}
    prune(WRONG | told, GOOD, target=0.05, max_steps=1)
    step = json.loads(command("show", str(tmp_path / "run"), "--step", "1", "--json").stdout)
    assert len(step["refused_answers"]) == len(step["invalid_answers"]) == 2
    first = json.loads(step["refused_answers"][0])
    assert first["layers"] == [{"name": "[redacted]_proj", "delta": 0.7}]
    assert first["lessons"] == told["lessons"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;bold" in page.partition("refused answer 2, its text")[2]
