"""The graph's form, and that it runs wherever a host puts it."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from prunewright.graph import build_graph, run
from prunewright.state import InputError, PruneContext, PruneInput, PruneRequest
from prunewright.state.loading import validate_config

NODES = {
    "profile",
    "agent_decide",
    "apply_prune",
    "evaluate_ppl",
    "rollback",
    "reflect",
    "finish",
}


def halves(config: dict[str, Any], out: Path) -> tuple[PruneInput, PruneContext]:
    whole = validate_config(config)
    request: Any = whole.request.model_dump(mode="json")
    return {"request": request}, whole.context.model_copy(update={"out": str(out)})


def test_seven_nodes_and_two_conditional_edges() -> None:
    graph = build_graph().get_graph()
    assert set(graph.nodes) == NODES | {"__start__", "__end__"}
    plain = {(e.source, e.target) for e in graph.edges if not e.conditional}
    assert plain == {
        ("__start__", "profile"),
        ("profile", "agent_decide"),
        ("agent_decide", "apply_prune"),
        ("apply_prune", "evaluate_ppl"),
        ("rollback", "reflect"),
        ("finish", "__end__"),
    }
    conditional = {(e.source, e.target) for e in graph.edges if e.conditional}
    assert conditional == {
        ("evaluate_ppl", "rollback"),
        ("evaluate_ppl", "reflect"),
        ("reflect", "profile"),
        ("reflect", "finish"),
    }


def test_invoke_without_a_checkpointer_and_with_one_agree_with_run(
    pico_config: dict[str, Any], tmp_path: Path
) -> None:
    expected = run(pico_config, out=tmp_path / "run").metrics
    start, context = halves(pico_config, tmp_path / "plain")
    plain = build_graph().invoke(start, context=context)
    start, context = halves(pico_config, tmp_path / "memory")
    graph = build_graph(InMemorySaver())
    options: Any = {"configurable": {"thread_id": "mine"}}
    kept = graph.invoke(start, options, context=context)
    for state in (plain, kept):
        assert state["revision"] == expected.revision
        assert state["status"] == "target_reached"
    assert json.loads((tmp_path / "memory" / "manifest.json").read_text())["thread"] == "mine"
    for name in ("plain", "memory"):
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics["perplexity"] == expected.perplexity.model_dump()
    assert graph.get_state(options).next == ()


def test_a_request_object_is_as_good_as_its_dict_and_survives_the_checkpoint(
    pico_config: dict[str, Any], tmp_path: Path
) -> None:
    _, context = halves(pico_config, tmp_path / "run")
    request = validate_config(pico_config).request
    assert isinstance(request, PruneRequest)
    graph = build_graph(InMemorySaver())
    options: Any = {"configurable": {"thread_id": "mine"}}
    graph.invoke({"request": request}, options, context=context, interrupt_before=["apply_prune"])
    assert graph.get_state(options).next == ("apply_prune",)
    state = graph.invoke(None, options, context=context)
    assert state["status"] == "target_reached"
    assert state["request"] == request.model_dump(mode="json")


def test_a_partial_request_gets_the_defaults(pico_config: dict[str, Any], tmp_path: Path) -> None:
    _, context = halves(pico_config, tmp_path / "run")
    keys = ("model", "dtype", "texts", "target", "step")
    request: Any = {key: pico_config[key] for key in keys}
    state = build_graph().invoke({"request": request}, context=context)
    assert state["status"] == "target_reached"


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"tarket": 0.3}, "unknown key tarket; did you mean target?"),
        ({"texts": {"windows": {"lenght": 3}}}, "did you mean length?"),
        ({"target": 2}, "target:"),
        ({"target": "nan"}, "target:"),
        ({"texts": {"windows": {"guard": 0}}}, "texts.windows.guard:"),
        ({"agent": "greedy"}, "unknown key agent"),
        ({"pattern": "2:4", "target": 0.6}, "target 0.6 is above 0.5"),
        (None, 'no "request"'),
    ],
)
def test_a_bad_request_names_the_key(request_: Any, words: str, tmp_path: Path) -> None:
    context = PruneContext(agent="greedy", out=str(tmp_path / "run"))
    with pytest.raises(InputError) as caught:
        build_graph().invoke(cast(PruneInput, {"request": request_}), context=context)
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_second_run_without_threads_does_not_overwrite_the_first(
    pico_config: dict[str, Any], tmp_path: Path
) -> None:
    start, context = halves(pico_config, tmp_path / "run")
    build_graph().invoke(start, context=context)
    before = (tmp_path / "run" / "trace.jsonl").read_bytes()
    with pytest.raises(InputError, match="holds another run"):
        build_graph().invoke(start, context=context)
    assert (tmp_path / "run" / "trace.jsonl").read_bytes() == before


def test_a_thread_does_not_take_over_the_directory_of_another(
    pico_config: dict[str, Any], tmp_path: Path
) -> None:
    start, context = halves(pico_config, tmp_path / "run")
    graph = build_graph(InMemorySaver())
    graph.invoke(start, {"configurable": {"thread_id": "one"}}, context=context)
    with pytest.raises(InputError, match=r"thread one\)"):
        graph.invoke(start, {"configurable": {"thread_id": "two"}}, context=context)


def test_a_thread_keeps_its_request(pico_config: dict[str, Any], tmp_path: Path) -> None:
    start, context = halves(pico_config, tmp_path / "run")
    graph = build_graph(InMemorySaver())
    options: Any = {"configurable": {"thread_id": "one"}}
    graph.invoke(start, options, context=context, interrupt_before=["apply_prune"])
    other, _ = halves(pico_config | {"target": 0.2}, tmp_path / "run")
    with pytest.raises(Exception, match=r"request in the checkpoints.*was 0\.3, is 0\.2"):
        graph.invoke(other, options, context=context)


def test_two_threads_taking_turns_do_not_disturb_each_other(
    pico_config: dict[str, Any], tmp_path: Path
) -> None:
    agents = ("greedy", "zscore")
    alone = {
        agent: run(pico_config | {"agent": agent}, out=tmp_path / f"alone-{agent}").metrics
        for agent in agents
    }
    assert alone["greedy"].revision != alone["zscore"].revision
    graph = build_graph(InMemorySaver())
    streams = {}
    for agent in agents:
        start, context = halves(pico_config | {"agent": agent}, tmp_path / agent)
        options: Any = {"configurable": {"thread_id": agent}}
        streams[agent] = graph.stream(start, options, context=context, stream_mode="updates")
    order: list[str] = []
    while streams:
        for agent in list(streams):
            if next(streams[agent], None) is None:
                del streams[agent]
            else:
                order.append(agent)
    assert order[:6] == [*agents, *agents, *agents]  # they did take turns
    for agent in agents:
        metrics = json.loads((tmp_path / agent / "metrics.json").read_text())
        assert metrics["revision"] == alone[agent].revision
        assert metrics["perplexity"] == alone[agent].perplexity.model_dump()
        trace = (tmp_path / agent / "trace.jsonl").read_bytes()
        assert trace == (tmp_path / f"alone-{agent}" / "trace.jsonl").read_bytes()
