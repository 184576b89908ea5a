"""A person approves, edits or rejects each decision before anything is pruned by it."""

import json
import os
import pty
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command
from typer.testing import CliRunner

from prunewright.graph import build_graph, resume, run
from prunewright.graph.agents import Observation
from prunewright.graph.agents.controls import GreedyAgent
from prunewright.graph.agents.prompt.build import prompt
from prunewright.graph.cli import app
from prunewright.state import (
    Decision,
    InputError,
    PruneConfig,
    ReviewAnswer,
    ReviewPendingError,
    ReviewRequest,
)

UP, FULL = "1.mlp.up_proj", "model.layers.1.mlp.up_proj"
APPROVE = {"approve": True}


class Prompted(GreedyAgent):
    """Greedy; remembers the prompts that an LLM in its place would have been given."""

    seen: ClassVar[list[str]] = []

    def __init__(self, **_: Any) -> None:
        pass

    def decide(self, observation: Observation) -> Decision:
        Prompted.seen.append("\n".join(str(m.text) for m in prompt(observation)))
        return super().decide(observation)


class Script:
    """Answers from a list, then approves."""

    def __init__(self, *answers: Any) -> None:
        self.answers = iter(answers)
        self.asked: list[ReviewRequest] = []

    def __call__(self, request: ReviewRequest) -> Any:
        self.asked.append(request)
        return next(self.answers, APPROVE)


@pytest.fixture
def reviewed(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("scripted_agents.Prompted", Prompted, raising=False)
    Prompted.seen.clear()
    agent = "import:scripted_agents:Prompted"
    return config | {"agent": agent, "review": True, "max_stalls": 1, "guard": {"max_increase": 9}}


@pytest.fixture(autouse=True)
def _importable(config: dict[str, Any]) -> None:
    import scripted_agents  # type: ignore[import-not-found]  # noqa: F401


def trace(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "trace.jsonl").read_text().splitlines()]


def edit(name: str, delta: float) -> dict[str, Any]:
    return {"edit": {"layers": [{"name": name, "delta": delta}]}}


def test_approved_edited_and_rejected_decisions(reviewed: dict[str, Any], tmp_path: Path) -> None:
    script = Script(
        ReviewAnswer(approve=True),
        # Refused edits, each with its reason, and the answers after them.
        *(edit("9.nowhere", 0.1), edit(UP, 0.9), edit(UP, -0.4), {"edit": {"layers": "all"}}),
        *({"edit": {"layers": []}}, {"approve": False}, APPROVE | edit(UP, 0.1)),
        {"edit": {"groups": [{"projection": "mlp.up_proj", "from": 1, "to": 1, "delta": 0.2}]}},
        *({"reject": " "}, {"reject": "never \x1b[2J touch\nattention"}),
    )
    out = tmp_path / "run"
    result = run(reviewed, out=out, reviewer=script)
    # A rejection is no stall: max_stalls is 1, and the run went on.
    assert result.metrics.status == "target_reached"
    one, two, three, *rest = steps = trace(out)
    assert one["review"] == {"verdict": "approved", "words": "", "proposed": None, "refused": []}

    assert two["review"]["verdict"] == "edited"
    assert two["decision"]["layers"] == [{"name": FULL, "delta": 0.2}]
    assert list(two["applied"]) == [FULL]
    assert two["decision"]["expected_ppl_change"] is None
    asked = [request for request in script.asked if request.step == 2]
    assert two["review"]["proposed"]["layers"] == [
        {"name": f"model.layers.{layer.name}", "delta": layer.delta} for layer in asked[0].layers
    ]
    assert asked[0].problems == []
    assert asked[2].refused == edit(UP, 0.9)
    expected = ["unknown layer '9.nowhere'", "0.9 is not within 0.5", "restores more than"]
    expected += ["layers: Input should be a valid list", "the edit leaves no layer"]
    expected += ["approve: ", 'answer {"approve": true}']
    assert len(expected) == len(two["review"]["refused"]) == len(asked) - 1
    for words, problem, request in zip(expected, two["review"]["refused"], asked[1:], strict=True):
        assert words in problem
        assert "; ".join(request.problems) == problem
        assert request.layers == asked[0].layers  # nothing is lost by a refusal
    gained = sum(x.delta for x in asked[0].layers)
    assert gained > 0
    assert asked[0].sparsity_after > asked[0].sparsity == one["sparsity"]
    changed = {x.name: x.sparsity for x in asked[0].layers}
    assert changed[UP] == pytest.approx(one["applied"].get(FULL, 0.0), abs=1e-4)

    assert (three["verdict"], three["applied"]) == ("empty", {})
    assert three["reason"] == "Rejected in review: never \x1b[2J touch\nattention"
    assert three["review"]["words"] == "never \x1b[2J touch\nattention"
    assert three["review"]["proposed"]["layers"]
    assert three["revision"] == two["revision"]
    assert {step["review"]["verdict"] for step in rest} == {"approved"}
    assert len(Prompted.seen) == len(steps)  # the agent is asked once a step, whoever answers
    assert "A person edited your decision" in Prompted.seen[2]
    assert "A person rejected your last decision: never" in Prompted.seen[3]
    assert "attention" in Prompted.seen[3]

    result_of = CliRunner().invoke(app, ["show", str(out), "--step", "3"])
    assert "rejected: never \\x1b[2J touch" in result_of.stdout
    assert "the agent had chosen" in result_of.stdout
    # The trace replays without the person, where what was rejected is an empty decision.
    replaying = reviewed | {"agent": f"replay:{out}", "review": False, "max_stalls": 2}
    again = run(replaying, out=tmp_path / "again")
    assert again.metrics.revision == result.metrics.revision


def test_a_run_waits_across_processes_and_asks_again(
    reviewed: dict[str, Any], submit: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ReviewPendingError, match=r"step 1 waits for a review.*prunewright resume"):
        run(reviewed | {"agent": "greedy"}, out=out)
    assert not (out / "revisions").exists()
    assert not (out / "trace.jsonl").exists()
    asked: list[ReviewRequest] = []

    def leaves(request: ReviewRequest) -> dict[str, Any]:
        asked.append(request)
        if len(asked) == 1:
            return edit("9.nowhere", 0.1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resume(out, reviewer=leaves)
    # A process that is killed while it waits leaves no more than this; what was refused is known.
    script = Script(APPROVE)
    answer = submit({"do": "resume", "out": str(out)})
    assert answer["error"] == "ReviewPendingError"
    with pytest.raises(InputError, match="answered None: answer"):
        resume(out, reviewer=lambda _: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(InputError, match=r"answered \{\}: answer"):
        resume(out, reviewer=lambda _: {})
    with pytest.raises(InputError, match="answer was refused: unknown layer"):
        resume(out, reviewer=lambda _: edit("9.nowhere", 0.1))
    resume(out, reviewer=script)
    assert [request.step for request in script.asked][:2] == [1, 2]
    assert script.asked[0] == asked[1]
    assert len(trace(out)[0]["review"]["refused"]) == 1


def test_the_review_may_be_switched_off_while_a_decision_waits(
    reviewed: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ReviewPendingError):
        run(reviewed, out=tmp_path / "run")
    result = resume(tmp_path / "run", review=False)
    assert {step["review"] for step in trace(tmp_path / "run")} == {None}
    plain = run(reviewed | {"review": False}, out=tmp_path / "plain")
    assert result.metrics.revision == plain.metrics.revision


def test_the_graph_alone_is_answered_as_studio_does(
    reviewed: dict[str, Any], tmp_path: Path
) -> None:
    settled = PruneConfig.model_validate(reviewed | {"max_steps": 1})
    context = settled.context.model_copy(update={"out": str(tmp_path / "run")})
    graph = build_graph(InMemorySaver())
    thread: RunnableConfig = {"configurable": {"thread_id": "t"}}
    request: Any = settled.request.model_dump(mode="json")
    graph.invoke({"request": request}, thread, context=context)
    for answer in ("yes", edit(UP, 0.9)):
        (waiting,) = graph.get_state(thread).interrupts
        assert json.loads(json.dumps(waiting.value)) == waiting.value
        assert waiting.value["how"].startswith("answer")
        assert graph.get_state(thread).next == ("apply_prune",)
        graph.invoke(Command(resume=answer), thread, context=context)
    graph.invoke(Command(resume=edit(UP, 0.3)), thread, context=context)
    assert graph.get_state(thread).interrupts == ()
    (step,) = trace(tmp_path / "run")
    assert step["applied"] == {FULL: pytest.approx(0.3, abs=1e-3)}
    assert len(step["review"]["refused"]) == 2


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Standard input is a terminal, on which a person has typed ahead."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "r", encoding="utf-8") as stdin, os.fdopen(master, "wb", 0) as typed:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield lambda words: typed.write(words.encode()) and None


def test_a_person_at_a_terminal(
    reviewed: dict[str, Any],
    keyboard: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    # The editor: what it was given is kept, and each time it saves something else.
    editor = tmp_path / "editor"
    saves = ["layers: [", f"layers: [{{name: {UP}, delta: 0.9}}]", f"layers:\n- {{name: {UP}, "]
    saves[2] += "delta: 0.25}\nreasoning: mine\n"
    for number, text in enumerate(saves):
        (tmp_path / f"save-{number}").write_text(text)
    editor.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, shutil, sys\n"
        "here = pathlib.Path(__file__).parent\n"
        "number = len(list(here.glob('given-*')))\n"
        "shutil.copy(sys.argv[1], here / f'given-{number}')\n"
        "text = (here / f'save-{number}').read_text()\n"
        "pathlib.Path(sys.argv[1]).write_text(text)\n"
    )
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(editor))
    config, out = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(PruneConfig.model_validate(reviewed).to_yaml())
    # Approve; what is no choice is asked again; three edits; reject, without words and with; stop.
    keyboard("a\nx\ne\ne\ne\nr\n\nr\ntoo much\ns\n")
    with pytest.raises(SystemExit) as ended:
        app(["run", "--config", str(config), "--out", str(out), "--json"])
    assert ended.value.code == 128 + signal.SIGINT
    shown = capsys.readouterr()
    assert json.loads(shown.out)["resume"] == f"prunewright resume {out}"
    assert "Step 1: " in shown.err
    assert "not valid YAML" in shown.err
    assert "delta 0.9 is not within 0.5" in shown.err
    assert "or [s]top? " in shown.err
    assert "Why? The agent is told: " in shown.err
    assert f"go on with: prunewright resume {out}" in shown.err
    verdicts = [step["review"]["verdict"] for step in trace(out)]
    assert verdicts == ["approved", "edited", "rejected"]
    assert trace(out)[1]["decision"]["reasoning"] == "mine"
    assert trace(out)[1]["applied"] == {FULL: pytest.approx(0.25, abs=1e-3)}
    assert trace(out)[2]["reason"] == "Rejected in review: too much"
    given = [(tmp_path / f"given-{number}").read_text() for number in range(3)]
    assert "- {name: 0.mlp.down_proj, delta: " in given[0]
    assert given[1].strip() == saves[0]  # text that could not be read is not lost
    assert "# refused: model.layers.1.mlp.up_proj: delta 0.9" in given[2]
    # Another terminal goes on, and asks about the decision that waited.
    keyboard("s\n")
    with pytest.raises(SystemExit):
        app(["resume", str(out)])
    assert "Step 4: " in "".join(capsys.readouterr())
    assert len(trace(out)) == 3


def test_without_a_terminal_nobody_can_be_asked(
    reviewed: dict[str, Any], reference: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(PruneConfig.model_validate(reviewed).to_yaml())
    arguments = ["run", "--config", str(config), "--out", str(tmp_path / "run")]
    forking = ["fork", str(reference), "--step", "1", "--set", "review=true"]
    for command in (arguments, [*forking, "--out", str(tmp_path / "fork")]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert "standard input is no terminal" in result.stderr
        assert "--set review=false" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
