"""Reading a trace: what is no trace is refused with the line, whatever lies there."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prunewright.graph.agents import Observation, Refusal, check_agent, make_agent, resolve_agent
from prunewright.graph.agents import replay as module
from prunewright.graph.agents.asking import ask
from prunewright.graph.agents.replay import ReplayAgent
from prunewright.state import AgentError, Decision, InputError, LayerDelta, PruneContext, Step

MakeObservation = Callable[..., Observation]


def record(step: int, delta: float = 0.1, **changes: Any) -> Step:
    layer = LayerDelta(name="model.layers.1.mlp.down_proj", delta=delta)
    values: dict[str, Any] = {
        "step": step,
        "agent": "some:llm",
        "verdict": "accepted",
        "reason": "",
        "decision": Decision(
            reasoning=f"step {step}", layers=[layer], expected_ppl_change=0.01, lessons=["a"]
        ),
        "applied": {layer.name: delta},
        "invalid_answers": [],
        "notes": [],
        "profile": "steps/x.json",
        "revision": f"r{step}",
        "candidate": f"r{step}",
        "sparsity_before": 0.1,
        "sparsity": 0.1,
        "perplexity_before": 20.0,
        "candidate_perplexity": 20.0,
        "change": 0.0,
        "change_stderr": 0.0,
        "predicted_change": 0.0,
        "llm_tokens": 7,
    }
    return Step(**(values | changes))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    write(path, record(0), record(1, delta=0.02))
    return path


def write(path: Path, *records: Step) -> None:
    path.write_text("".join(r.model_dump_json() + "\n" for r in records))


def test_each_step_gets_its_decision(trace: Path, make_observation: MakeObservation) -> None:
    name, agent = make_agent(PruneContext(agent=f"replay:{trace}"))
    assert name == f"replay:{trace}"
    # In any order, as a resumed run asks, and by a run directory too.
    for asked in (agent, ReplayAgent(trace.parent)):
        for step in (1, 0):
            decision = asked.decide(make_observation(step=step))
            assert decision == record(step, delta=(0.1, 0.02)[step]).decision


def test_options_of_the_recorded_llm_do_not_matter(trace: Path) -> None:
    options = {"thinking_budget": 100, "temperature": 0.1}
    context = PruneContext(agent=f"replay:{trace}", agent_options=options)
    assert check_agent(context).why == "the decisions of an earlier trace"


def test_the_report_of_a_replayed_step(trace: Path, make_observation: MakeObservation) -> None:
    observation = make_observation(step=1)
    observation = replace(
        observation, profile=observation.profile.model_copy(update={"revision": "r0"})
    )
    report = ask("replay", ReplayAgent(trace), observation, repairs=2)
    assert report.decision == record(1, delta=0.02).decision
    assert (report.notes, report.llm_tokens, report.invalid_answers) == ([], 0, [])
    other = ask("replay", ReplayAgent(trace), make_observation(step=1), repairs=2)
    assert len(other.notes) == 1
    assert "the masks before this step are not the trace's" in other.notes[0]


@pytest.mark.parametrize(("sparsity", "noted"), [(0.10009, False), (0.1002, True), (0.0998, True)])
def test_another_sparsity_is_noted(
    sparsity: float, noted: bool, trace: Path, make_observation: MakeObservation
) -> None:
    agent = ReplayAgent(trace)
    agent.decide(make_observation(sparsity=sparsity))
    assert [f"{sparsity:.4f} before this step and was 0.1000" in n for n in agent.notes] == (
        [True] if noted else []
    )


def test_a_step_beyond_the_end(trace: Path, make_observation: MakeObservation) -> None:
    with pytest.raises(AgentError, match=r"the trace has ended: .* holds 2 steps"):
        ReplayAgent(trace).decide(make_observation(step=2))


def test_a_refused_decision_is_not_given_again(
    trace: Path, make_observation: MakeObservation
) -> None:
    refusals = (Refusal("{}", ("too much", "far too much")),)
    with pytest.raises(AgentError, match=r"does not fit this run.*: too much; far too much"):
        ReplayAgent(trace).decide(make_observation(refusals=refusals))


def test_a_layer_that_the_model_lacks_in_any_step(
    trace: Path, make_observation: MakeObservation
) -> None:
    bad = Decision(reasoning="", layers=[LayerDelta(name="lm_head\x1b[2J", delta=0.1)])
    write(trace, record(0), record(1), record(2, decision=bad))
    with pytest.raises(InputError) as caught:
        ReplayAgent(trace).decide(make_observation())
    assert "another model: its step 3 names 'lm_head\\x1b[2J'" in str(caught.value)


def no_such(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def blank_line(path: Path) -> None:
    path.write_text(path.read_text().replace("\n", "\n\n", 1))


def wrong_order(path: Path) -> None:
    write(path, record(0), record(2))


def more_keys(path: Path) -> None:
    path.write_text(path.read_text().replace('{"step":1,', '{"step":1,"more":1,'))


def huge_delta(path: Path) -> None:
    path.write_text(path.read_text().replace('"delta":0.02', '"delta":1e999'))


def nested(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"[" * 100_000 + b"\n")


def no_text(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\xff\xfe\x00\n")


def surrogate(path: Path) -> None:
    path.write_text(path.read_text().replace('"step 1"', '"\\ud800"'))


def long_line(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" " * (module.MAX_LINE + 10))


def too_large(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(module.MAX_TRACE + 1)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_such, "no such file"),
        (empty, "it holds no step"),
        (cut, "line 2: not a step of a trace: Unterminated string"),
        (blank_line, "line 2: not a step of a trace"),
        (wrong_order, "line 2: it holds step 2, not 1"),
        (more_keys, "line 2: not a step of a trace: more: Extra inputs"),
        (huge_delta, "line 2: not a step of a trace: 1e999 is no finite number"),
        (nested, "line 3: not a step of a trace"),
        (no_text, "line 3: not a step of a trace"),
        (surrogate, "line 2: not a step of a trace"),
        (long_line, "line 3: it is longer than 8,388,608 bytes"),
        (too_large, "it is larger than 268,435,456 bytes"),
        (a_pipe, "no such file"),
    ],
)
def test_what_is_no_trace(damage: Callable[[Path], None], words: str, trace: Path) -> None:
    damage(trace)
    with pytest.raises(InputError) as caught:
        check_agent(PruneContext(agent=f"replay:{trace}"))
    assert words in str(caught.value)
    assert str(trace) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_names_without_a_path() -> None:
    for name in ("replay:", "exchange:"):
        with pytest.raises(InputError, match="names no path"):
            resolve_agent(name)
