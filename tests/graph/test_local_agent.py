"""A causal LM in this process as the agent: pico models with random weights write real answers."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from transformers import AutoTokenizer

from prunewright.graph import run
from prunewright.graph.agents import InvalidAnswerError, Observation, check_agent, make_agent
from prunewright.graph.agents.local import tokenize_prompt
from prunewright.graph.asking import ask
from prunewright.state import (
    AgentError,
    DecisionReport,
    InputError,
    LayerProfile,
    PruneContext,
    Spent,
)
from prunewright.state.config import AskingOptions

MakeLayer = Callable[..., LayerProfile]
MakeObservation = Callable[..., Observation]


@pytest.fixture(scope="module")
def writer(pico_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Llama with positions enough for a prompt."""
    directory = tmp_path_factory.mktemp("local") / "writer"
    shutil.copytree(pico_models(), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))
    return directory


def context_of(model: Path, **options: Any) -> PruneContext:
    values = {"rows": 6, "max_layers": 4, "temperature": 2.0, "dtype": "float32"} | options
    return PruneContext(agent=f"local:{model}", agent_options=values)


def asked(
    model: Path, observation: Observation, *, repairs: int = 0, **options: Any
) -> DecisionReport:
    name, agent = make_agent(context_of(model, **options))
    return ask(name, agent, observation, repairs=repairs)


@pytest.mark.parametrize("seed", range(6))
def test_every_finished_answer_keeps_every_bound(
    writer: Path, make_layer: MakeLayer, make_observation: MakeObservation, seed: int
) -> None:
    """Sizes, rooms and budgets that a model which draws at random would break at once."""
    layers = [
        make_layer(
            i,
            parameters=(10, 1000, 64, 3_000_000)[i % 4],
            sparsity=(0.0, 0.8996, 0.3, 0.9)[(i // 2) % 4],
            loss_cost=(0.001 * (1 + i * 7 % 11), 0.01, 0.02),
        )
        for i in range(16)
    ]
    budget = (0.05, 0.0003)[seed % 2]
    sparsity = make_observation(layers).sparsity
    observation = make_observation(layers, target=sparsity + budget, seed=seed)
    report = asked(writer, observation)
    assert report.invalid_answers == []
    chosen = {item.name: item.delta for item in report.decision.layers}
    assert 1 <= len(chosen) == len(report.decision.layers) <= 4
    open_layers = [p for p in layers if p.sparsity < 0.9]
    cheapest = sorted(open_layers, key=lambda p: p.loss_cost[0] / p.parameters)[:6]
    sizes = {p.name: p for p in cheapest}
    assert set(chosen) <= set(sizes)
    total = sum(p.parameters for p in layers)
    assert sum(d * sizes[n].parameters for n, d in chosen.items()) <= budget * total * (1 + 1e-9)
    for name, delta in chosen.items():
        assert 0 < delta <= min(0.15, 0.9 - sizes[name].sparsity) + 1e-12
    assert 0 < len(report.decision.reasoning) <= 200
    assert report.decision.expected_ppl_change is not None
    assert 0 <= report.decision.expected_ppl_change <= 1


def test_the_same_observation_gives_the_same_decision(
    writer: Path, make_observation: MakeObservation
) -> None:
    observation = make_observation(seed=3)
    first = asked(writer, observation)
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    assert asked(writer, observation) == first
    assert torch.equal(torch.get_rng_state(), before)
    others = [
        asked(writer, make_observation(seed=4)),
        asked(writer, make_observation(seed=3, step=1)),
    ]
    assert all(other.decision != first.decision for other in others)


def test_without_temperature_the_seed_does_not_matter(
    writer: Path, make_observation: MakeObservation
) -> None:
    one = asked(writer, make_observation(seed=1), temperature=0)
    assert asked(writer, make_observation(seed=2), temperature=0) == one


def test_torchs_threads_are_given_back(writer: Path, make_observation: MakeObservation) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        asked(writer, make_observation())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_cut_answer_is_refused(writer: Path, make_observation: MakeObservation) -> None:
    _, agent = make_agent(context_of(writer, max_new_tokens=20))
    with pytest.raises(InvalidAnswerError, match="cut off after 20 tokens") as caught:
        agent.decide(make_observation())
    assert caught.value.answer.startswith('{"reasoning": "')

    report = asked(writer, make_observation(), repairs=1, max_new_tokens=20)
    assert report.decision.layers == []
    assert len(report.invalid_answers) == 2
    assert all("cut off" in problem for problem in report.invalid_answers)
    # What was read and written twice, the second time with the first answer in the prompt.
    once = asked(writer, make_observation(), max_new_tokens=20).tokens
    assert report.tokens > 2 * once


def test_the_budget_of_the_run(writer: Path, make_observation: MakeObservation) -> None:
    context = context_of(writer, max_new_tokens=20)
    context = context.model_copy(update={"asking": AskingOptions(max_tokens=5000), "out": "a run"})
    _, agent = make_agent(context, Spent(calls=1, tokens=4999))
    with pytest.raises(InvalidAnswerError):
        agent.decide(make_observation())
    with pytest.raises(AgentError, match=r"prunewright resume 'a run' --set asking\.max_tokens="):
        agent.decide(make_observation())


def test_no_room_left(
    writer: Path, make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    full = [make_layer(i, sparsity=0.9) for i in range(3)]
    report = asked(writer, make_observation(full, target=0.95))
    assert report.decision.layers == []
    assert report.tokens == 0
    assert "no layer has room" in report.notes[0]


def test_a_prompt_beyond_the_models_positions(
    pico_models: Callable[..., Path], make_observation: MakeObservation
) -> None:
    with pytest.raises(AgentError, match=r"256 positions.*agent_options\.rows"):
        asked(pico_models(), make_observation())


def test_a_model_is_loaded_once_and_dropped_for_another(
    writer: Path, tmp_path: Path, make_observation: MakeObservation
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(writer, copy)
    first = asked(copy, make_observation())
    shutil.rmtree(copy)
    assert asked(copy, make_observation()) == first
    asked(writer, make_observation())
    with pytest.raises(InputError, match="not a directory"):
        asked(copy, make_observation())


def test_a_run(writer: Path, pico_config: dict[str, Any], tmp_path: Path) -> None:
    config = pico_config | {
        "agent": f"local:{writer}",
        "agent_options": {"dtype": "float32", "rows": 5, "max_layers": 4},
        "target": 0.02,
        "step": 0.015,
        "max_delta": 0.5,
    }
    result = run(config, out=tmp_path / "one")
    assert result.metrics.status == "target_reached"
    assert result.metrics.method["agent"] == f"local:{writer}"
    trace = [json.loads(line) for line in (tmp_path / "one/trace.jsonl").read_text().splitlines()]
    assert len(trace) >= 2
    assert all(record["invalid_answers"] == [] for record in trace)
    assert all(record["llm_tokens"] > 1000 for record in trace)
    assert result.metrics.tokens["llm"] == sum(record["llm_tokens"] for record in trace)
    again = run(config, out=tmp_path / "two")
    assert again.metrics.revision == result.metrics.revision


def test_without_llguidance(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"pip install 'prunewright\[local\]'"):
        check_agent(context_of(writer))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("local:", {}, "names no model after local:"),
        ("local:/no/such/model", {}, "/no/such/model is not a directory"),
        ("local:embedded", {"max_layer": 5}, "did you mean max_layers"),
        ("local:embedded", {"rows": 64}, "rows: Input should be less than or equal to 63"),
        ("local:embedded", {"temperature": -1}, "temperature"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(
    name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        check_agent(PruneContext(agent=name, agent_options=options))
    assert words in str(caught.value)


MESSAGES = [
    SystemMessage("Rules."),
    HumanMessage("A layer <s> and </s>."),
    AIMessage("{}"),
    HumanMessage("Refused."),
    HumanMessage("Again."),
]
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "Rules.\n\nA layer < s> and < /s>.\n\n{}\n\nRefused.\n\nAgain.\n\n"),
        (
            TURNS,
            "[system]Rules.[user]A layer < s> and < /s>.[assistant]{}"
            "[user]Refused.\n\nAgain.[assistant]",
        ),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            + TURNS,
            "[user]Rules.\n\nA layer < s> and < /s>.[assistant]{}"
            "[user]Refused.\n\nAgain.[assistant]",
        ),
    ],
)
def test_the_prompt_as_the_model_reads_it(
    writer: Path, template: str | None, expected: str
) -> None:
    """Turns alternate, and nothing in a message is read as a special token."""
    tokenizer = AutoTokenizer.from_pretrained(writer)
    tokenizer.chat_template = template
    ids = tokenize_prompt(tokenizer, list(MESSAGES))
    assert tokenizer.decode(ids[0]) == expected
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[0].tolist())


def test_a_chat_template_that_takes_no_prompt(writer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(writer)
    tokenizer.chat_template = "{{ raise_exception('tools only') }}"
    with pytest.raises(AgentError, match="tools only"):
        tokenize_prompt(tokenizer, list(MESSAGES))
