"""Who decides: names and options of agents, and the controls without an LLM."""

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunewright.graph.agents import (
    Agent,
    Observation,
    check_agent,
    make_agent,
    resolve_agent,
)
from prunewright.graph.agents.asking import ask
from prunewright.graph.agents.chat.agent import LLMAgent
from prunewright.graph.agents.controls import (
    BalanceAgent,
    GreedyAgent,
    RandomAgent,
    UniformAgent,
    ZScoreAgent,
)
from prunewright.state import (
    COST_DELTAS,
    AgentError,
    Decision,
    InputError,
    LayerProfile,
    ModelProfile,
    PruneContext,
    check_decision,
)
from prunewright.state.config import DEFAULT_AGENT
from prunewright.state.run import Best

if TYPE_CHECKING:
    from tests.graph.conftest import FakeGemini

CONTROLS: list[type[Agent]] = [GreedyAgent, BalanceAgent, ZScoreAgent, RandomAgent, UniformAgent]

MakeObservation = Callable[..., Observation]
MakeLayer = Callable[..., LayerProfile]


# Names


@pytest.mark.parametrize("variable", ["GOOGLE_API_KEY", "GEMINI_API_KEY"])
def test_auto_with_a_key(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "a-key-of-some-length")
    resolved = resolve_agent("auto")
    assert resolved.name == DEFAULT_AGENT
    assert "key is set" in resolved.why


def test_auto_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_API_KEY", "")
    resolved = resolve_agent("auto")
    assert resolved.name == "greedy"
    assert "GOOGLE_API_KEY" in resolved.why
    name, agent = make_agent(PruneContext(agent="auto"))
    assert name == "greedy"
    assert isinstance(agent, GreedyAgent)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("greedy", GreedyAgent),
        ("balance", BalanceAgent),
        ("zscore", ZScoreAgent),
        ("random", RandomAgent),
        ("uniform", UniformAgent),
    ],
)
def test_controls_by_name(name: str, kind: type[Agent]) -> None:
    assert check_agent(PruneContext(agent=name)).name == name
    made, agent = make_agent(PruneContext(agent=name))
    assert made == name
    assert isinstance(agent, kind)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gredy", "unknown agent 'gredy'; did you mean greedy?; known: auto, greedy, "),
        ("Random", "did you mean random?"),
        ("gemini-3-flash-preview", "did you mean google_genai:gemini-3-flash-preview?"),
        ("gpt", "unknown agent 'gpt'; known: auto, "),
        ("", "unknown agent ''"),
        ("adaptive", "no longer exists, as it was no better: use greedy"),
        ("local:embedded", "no longer exists: serve the model (Ollama, llama.cpp, vLLM)"),
        (":", "not of the form provider:model"),
        ("google_genai:", "not of the form provider:model"),
        (":gemini-3-flash-preview", "not of the form provider:model"),
        ("import:", "not of the form import:package.module:Class"),
        ("import:os.path", "not of the form import:package.module:Class"),
        ("import::Class", "not of the form import:package.module:Class"),
        ("import:os:", "not of the form import:package.module:Class"),
        ("import:no_such_module_anywhere:Agent", "is its folder on PYTHONPATH?"),
        ("import:os:NoSuchClass", "AttributeError"),
        ("import:pathlib:Path", "no class with a method decide"),
        ("import:os:getcwd", "no class with a method decide"),
        ("import:.relative:Agent", "cannot import the agent"),
    ],
)
def test_names_that_cannot_work(name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_agent(name)
    assert message in str(caught.value)
    with pytest.raises(InputError):
        make_agent(PruneContext(agent=name))


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        (DEFAULT_AGENT, "GOOGLE_API_KEY or GEMINI_API_KEY"),
        ("openai:gpt-5", "OPENAI_API_KEY"),
        ("anthropic:claude", "ANTHROPIC_API_KEY"),
    ],
)
def test_a_missing_key(name: str, variables: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: ModuleSpec(package, None))
    with pytest.raises(InputError) as caught:
        resolve_agent(name)
    assert f"set the environment variable {variables}" in str(caught.value)
    assert "--agent greedy" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        (DEFAULT_AGENT, "langchain-google-genai"),
        ("openai:gpt-5", "'prunewright[openai]'"),
        ("anthropic:claude", "'prunewright[anthropic]'"),
        ("ollama:qwen3", "'prunewright[ollama]'"),
    ],
)
def test_a_missing_package(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(InputError) as caught:
        resolve_agent(name)
    assert str(caught.value).endswith(f"pip install {package}")


def test_a_provider_that_nobody_knows() -> None:
    with pytest.raises(InputError, match="cannot use the agent gogle:gemini: Unsupported"):
        check_agent(PruneContext(agent="gogle:gemini"))


@pytest.mark.filterwarnings("ignore:WARNING! temp :UserWarning")
def test_an_llm_by_name(gemini: "FakeGemini") -> None:
    context = PruneContext(agent=gemini.agent, agent_options=gemini.options())
    assert check_agent(context).why == "an LLM"
    name, agent = make_agent(context)
    assert name == gemini.agent
    assert isinstance(agent, LLMAgent)
    with pytest.raises(InputError, match="no option temp"):
        check_agent(context.model_copy(update={"agent_options": {"temp": 1}}))
    assert gemini.received == []


# The user's own class


USERS = """
from prunewright.graph.agents import InvalidAnswerError, Observation
from prunewright.state import Decision, LayerDelta


class Plain:
    def decide(self, observation: Observation) -> Decision:
        first = observation.profile.layers[0]
        return Decision(reasoning="mine", layers=[LayerDelta(name=first.name, delta=0.02)])


class Warm(Plain):
    def __init__(self, temperature: float) -> None:
        self.temperature = temperature


class Picky(Plain):
    def __init__(self, *, depth: int, width: int = 3) -> None:
        self.size = depth, width


class Stubborn:
    def decide(self, observation: Observation) -> Decision:
        raise InvalidAnswerError(f"refused {len(observation.refusals)} times", "no")


class Loose:
    def decide(self, observation):
        return {"reasoning": "", "layers": []}
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's, on sys.path."""
    (tmp_path / "users_agents.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_agents", raising=False)
    return "import:users_agents"


def test_the_users_own_class(users: str, make_observation: MakeObservation) -> None:
    context = PruneContext(agent=f"{users}:Plain")
    assert check_agent(context).name == f"{users}:Plain"
    name, agent = make_agent(context)
    report = ask(name, agent, make_observation(), repairs=2)
    assert report.agent == f"{users}:Plain"
    assert report.decision.reasoning == "mine"
    assert [item.name for item in report.decision.layers] == ["model.layers.0.mlp.down_proj"]
    assert report.llm_tokens == 0


def test_the_users_own_class_has_its_options(users: str) -> None:
    _, picky = make_agent(PruneContext(agent=f"{users}:Picky", agent_options={"depth": 2}))
    assert vars(picky) == {"size": (2, 3)}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Plain", {"depth": 2}, "depth"),
        ("Picky", {"depth": 2, "breadth": 1}, "breadth"),
        ("Warm", {}, "temperature"),
    ],
)
def test_options_that_the_users_class_does_not_take(
    users: str, name: str, options: dict[str, Any], message: str
) -> None:
    context = PruneContext(agent=f"{users}:{name}", agent_options=options)
    for use in (make_agent, check_agent):
        with pytest.raises(InputError, match=f"does not take these agent_options: .*{message}"):
            use(context)


def test_the_users_own_refusals(users: str, make_observation: MakeObservation) -> None:
    name, agent = make_agent(PruneContext(agent=f"{users}:Stubborn"))
    report = ask(name, agent, make_observation(), repairs=1)
    assert report.decision.layers == []
    assert report.invalid_answers == ["refused 0 times", "refused 1 times"]


def test_the_users_class_must_return_a_decision(
    users: str, make_observation: MakeObservation
) -> None:
    name, agent = make_agent(PruneContext(agent=f"{users}:Loose"))
    with pytest.raises(AgentError, match=f"{name} returned a dict, not a Decision"):
        ask(name, agent, make_observation(), repairs=1)


def test_a_module_that_cannot_be_imported(
    users: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_agents.py").write_text("def decide(:\n")
    monkeypatch.delitem(sys.modules, "broken_agents", raising=False)
    with pytest.raises(InputError, match=r"cannot import the agent .*SyntaxError"):
        resolve_agent("import:broken_agents:Agent")


# Controls


@st.composite
def profiles(draw: st.DrawFn) -> ModelProfile:
    """Layers of any size, with any signals, some full, with costs that rise with the delta."""
    layers = []
    for index in range(draw(st.integers(1, 8))):
        slopes = draw(st.tuples(*[st.floats(0, 0.05)] * 3))
        first, second, third = slopes if draw(st.booleans()) else sorted(slopes)
        costs = (first, first + second, first + second + third)
        gains = draw(st.tuples(*[st.floats(0, 0.05)] * 3).map(sorted))
        z_scores = [draw(st.floats(-3, 3)) for _ in range(3)]
        layers.append(
            LayerProfile(
                name=f"model.layers.{index}.mlp.up_proj",
                block=index,
                projection="mlp.up_proj",
                parameters=draw(st.integers(1, 100_000)),
                sparsity=draw(st.floats(0, 0.9)),
                loss_cost=costs,
                regrow_gain=tuple(gains),
                signals=dict(zip(("z_s", "z_g", "z_c"), z_scores, strict=True)),
            )
        )
    return ModelProfile(revision="r", gradient_revision="r", layers=layers)


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    profile = draw(profiles())
    total = sum(p.parameters for p in profile.layers)
    sparsity = sum(p.parameters * p.sparsity for p in profile.layers) / total
    return Observation(
        step=draw(st.integers(0, 40)),
        steps_left=draw(st.integers(1, 40)),
        target=draw(st.floats(min(sparsity + 0.001, 0.95), 0.95)),
        sparsity=sparsity,
        max_step=draw(st.floats(0.001, 0.5)),
        max_delta=draw(st.floats(0.01, 0.5)),
        max_layer_sparsity=draw(st.floats(0.5, 1.0)),
        max_increase=0.15,
        criterion="wanda",
        dense_perplexity=20.0,
        perplexity=21.0,
        profile=profile,
        seed=draw(st.integers(0, 5)),
    )


def gain(observation: Observation, decision: Decision) -> float:
    """Sparsity that a decision adds to the whole model."""
    parameters = {p.name: p.parameters for p in observation.profile.layers}
    return sum(parameters[item.name] * item.delta for item in decision.layers) / sum(
        parameters.values()
    )


def capacity(observation: Observation) -> float:
    """Sparsity that a step could add at most, whatever its budget."""
    return (
        sum(
            p.parameters
            * max(0.0, min(observation.max_delta, observation.max_layer_sparsity - p.sparsity))
            for p in observation.profile.layers
        )
        / observation.prunable
    )


@pytest.mark.parametrize("kind", CONTROLS)
@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(observation=observations())
def test_every_control_keeps_the_rules(kind: type[Agent], observation: Observation) -> None:
    decision = kind().decide(observation)
    problems = check_decision(
        decision,
        observation.room(),
        {p.name: p.sparsity for p in observation.profile.layers},
        {p.name: p.parameters for p in observation.profile.layers},
        max_delta=observation.max_delta,
        max_step=observation.budget,
    )
    assert problems == []
    assert kind().decide(observation) == decision
    # They take all that they may.
    expected = min(observation.budget, capacity(observation))
    assert gain(observation, decision) == pytest.approx(expected, abs=1e-6)


def cheapest(observation: Observation, grains: int = 400) -> float:
    """Lowest price of any step that fills the budget: dynamic programming on a grid.

    Layers must be alike in size. It knows nothing of slices or of marginal costs.
    """
    layers = observation.profile.layers
    width = observation.budget * len(layers) / grains
    best = [0.0] + [float("inf")] * grains
    for layer in layers:
        room = min(observation.max_delta, observation.max_layer_sparsity - layer.sparsity)
        own = [layer.cost_of(k * width) for k in range(int(max(0.0, room) / width + 1e-9) + 1)]
        best = [
            min(best[n - k] + own[k] for k in range(min(n, len(own) - 1) + 1))
            for n in range(grains + 1)
        ]
    return best[grains]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    slopes=st.lists(st.tuples(*[st.floats(0.001, 1)] * 3).map(sorted), min_size=2, max_size=4),
    sparsities=st.lists(st.sampled_from([0.0, 0.3, 0.6]), min_size=4, max_size=4),
    budget=st.floats(0.02, 0.1),
)
def test_greedy_is_as_cheap_as_any_step_can_be(
    slopes: list[list[float]], sparsities: list[float], budget: float
) -> None:
    layers = []
    for index, (first, second, third) in enumerate(slopes):
        costs = (0.05 * first, 0.05 * (first + second), 0.05 * (first + second + third))
        layers.append(
            LayerProfile(
                name=f"{index}",
                block=index,
                projection="p",
                parameters=1000,
                sparsity=sparsities[index],
                loss_cost=costs,
                signals={"z_s": 0, "z_g": 0, "z_c": 0},
            )
        )
    observation = Observation(
        step=0,
        steps_left=10,
        target=0.95,
        sparsity=0.0,
        max_step=budget,
        max_delta=0.15,
        max_layer_sparsity=0.95,
        max_increase=0.15,
        criterion="wanda",
        dense_perplexity=20.0,
        perplexity=20.0,
        profile=ModelProfile(revision="r", gradient_revision="r", layers=layers),
    )
    decision = GreedyAgent().decide(observation)
    assert gain(observation, decision) == pytest.approx(budget, abs=1e-9)
    by_name = {p.name: p for p in layers}
    cost = sum(by_name[item.name].cost_of(item.delta) for item in decision.layers)
    reference = cheapest(observation)
    # The grid misses the kinks of the curves by at most a grain of each layer.
    grain = budget * len(layers) / 400
    assert cost <= reference + 1e-9
    assert cost >= reference - grain * len(layers)


def test_greedy_equalises_the_marginal_cost(
    make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    # The cost of a weight in each layer: 1, 2, 3 / 2, 4, 6 / 10, 10, 10, in some unit.
    layers = [
        make_layer(0, loss_cost=(0.05, 0.15, 0.30)),
        make_layer(1, loss_cost=(0.10, 0.30, 0.60)),
        make_layer(2, loss_cost=(0.50, 1.00, 1.50)),
    ]
    observation = make_observation(layers, max_step=0.2 / 3)
    taken = {item.name[13]: item.delta for item in GreedyAgent().decide(observation).layers}
    assert taken == pytest.approx({"0": 0.15, "1": 0.05})
    taken = {
        item.name[13]: item.delta
        for item in GreedyAgent().decide(replace(observation, max_step=0.27 / 3)).layers
    }
    assert taken == pytest.approx({"0": 0.15, "1": 0.12})


def test_greedy_takes_no_cheap_slice_behind_a_dear_one(
    make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    layers = [
        make_layer(0, loss_cost=(0.50, 0.51, 0.52)),
        make_layer(1, loss_cost=(0.10, 0.20, 0.30)),
    ]
    decision = GreedyAgent().decide(make_observation(layers, max_step=0.05))
    assert [(item.name[13], item.delta) for item in decision.layers] == [("1", pytest.approx(0.1))]


def test_greedy_weighs_cost_by_the_weights_that_it_buys(
    make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    flat = (0.05, 0.10, 0.15)
    layers = [
        make_layer(0, parameters=100, loss_cost=flat),
        make_layer(1, parameters=900, loss_cost=flat),
    ]
    decision = GreedyAgent().decide(make_observation(layers, max_step=0.05))
    assert [item.name for item in decision.layers] == ["model.layers.1.mlp.down_proj"]
    assert decision.expected_ppl_change == pytest.approx(0.0571, rel=0.01)


def test_greedy_gives_back_where_weights_have_become_dear(
    make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    """What is restored buys more elsewhere; a gain of less than a fifth is left alone."""
    dear = {"sparsity": 0.12, "loss_cost": (0.5, 1.0, 1.5)}
    layers = [
        make_layer(0, **dear, regrow_gain=(0.40, 0.70, 0.70)),
        make_layer(1, **dear, regrow_gain=(0.11, 0.20, 0.20)),
        make_layer(2, loss_cost=(0.1, 0.2, 0.3)),
        make_layer(3, loss_cost=(0.1, 0.2, 0.3)),
        make_layer(4, loss_cost=(0.4, 0.8, 1.2)),
    ]
    observation = make_observation(layers, max_step=0.02, sparsity=0.048)
    decision = GreedyAgent().decide(observation)
    taken = {item.name[13]: item.delta for item in decision.layers}
    # Layer 0 gets 8 and then 6 a weight for what costs 2 elsewhere, layer 1 only 2.2.
    assert taken["0"] == pytest.approx(-0.10)
    assert taken["2"] + taken["3"] == pytest.approx(5 * 0.02 + 0.10)
    assert set(taken) == {"0", "2", "3"}
    change = math.log1p(decision.expected_ppl_change or 0)
    assert change == pytest.approx(2 * 0.20 - 0.70)


def test_a_control_may_name_thousands_of_layers(
    make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    """Experts that are layers of their own are many."""
    observation = make_observation([make_layer(i) for i in range(6_000)])
    decision = UniformAgent().decide(observation)
    assert len(decision.layers) == 6_000
    assert Decision.model_validate_json(decision.model_dump_json()) == decision


def test_greedy_keeps_to_the_bounds_of_a_layer(
    make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    free = (0.0, 0.0, 0.0)
    layers = [make_layer(0, loss_cost=free), make_layer(1, sparsity=0.85, loss_cost=free)]
    layers += [make_layer(i, loss_cost=(1, 2, 3)) for i in (2, 3)]
    observation = make_observation(layers, max_step=0.3, target=0.9, max_delta=0.12)
    taken = {item.name[13]: item.delta for item in GreedyAgent().decide(observation).layers}
    assert taken == pytest.approx({"0": 0.12, "1": 0.05, "2": 0.12, "3": 0.12})


def test_zscore_takes_the_lowest_sums_first(
    make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    sums = {0: (1.0, 1.0), 1: (-2.0, 3.5), 2: (-0.5, -1.5), 3: (3.0, -3.9), 4: (0.0, 0.0)}
    layers = [make_layer(i, z_s=s, z_g=g, z_c=-9.0 * i) for i, (s, g) in sums.items()]
    observation = make_observation(layers, max_step=0.07)
    taken = {item.name[13]: item.delta for item in ZScoreAgent().decide(observation).layers}
    assert taken == pytest.approx({"2": 0.15, "3": 0.15, "4": 0.05})


def test_random_depends_on_seed_and_step_only(
    make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    observation = make_observation([make_layer(i) for i in range(40)])

    def drawn(**values: Any) -> frozenset[str]:
        decision = RandomAgent().decide(replace(observation, **values))
        return frozenset(item.name for item in decision.layers)

    assert drawn() == drawn(perplexity=99.0, history=(), feedback=False, steps_left=2)
    draws = {drawn(seed=seed, step=step) for seed in range(3) for step in range(3)}
    assert len(draws) == 9


def test_uniform_brings_all_layers_to_one_level(
    make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    layers = [make_layer(i, parameters=100 * (i + 1), sparsity=0.2) for i in range(5)]
    observation = make_observation(layers, max_step=0.05)
    decision = UniformAgent().decide(observation)
    assert [item.delta for item in decision.layers] == pytest.approx([0.05] * 5)
    # Layers that are behind catch up; those ahead wait.
    layers = [make_layer(0, sparsity=0.1), make_layer(1, sparsity=0.2), make_layer(2, sparsity=0.6)]
    taken = {
        item.name[13]: item.delta
        for item in UniformAgent().decide(make_observation(layers, max_step=0.08)).layers
    }
    assert taken == pytest.approx({"0": 0.15, "1": 0.09})


def test_a_controls_steps_go_on_to_the_target(
    make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    """Each control, step after step on the same signals, reaches the target and not more."""
    for kind in CONTROLS:
        layers = [make_layer(i, parameters=500 * (i + 1), sparsity=0.0) for i in range(6)]
        sparsities = [0.0]
        for step in range(20):
            observation = make_observation(layers, step=step, target=0.42)
            taken = {i.name: i.delta for i in kind().decide(observation).layers}
            layers = [
                p.model_copy(update={"sparsity": p.sparsity + taken.get(p.name, 0.0)})
                for p in layers
            ]
            sparsities.append(make_observation(layers).sparsity)
        assert sparsities[-1] == pytest.approx(0.42, abs=1e-6)
        assert all(b - a <= 0.05 + 1e-9 for a, b in pairwise(sparsities))


def test_the_cost_curve_of_a_layer(make_layer: MakeLayer) -> None:
    layer = make_layer(0, loss_cost=(0.1, 0.3, 0.7))
    assert [layer.cost_of(d) for d in (0, *COST_DELTAS)] == pytest.approx([0, 0.1, 0.3, 0.7])
    assert layer.cost_of(0.075) == pytest.approx(0.2)
    assert layer.cost_of(0.2) == pytest.approx(1.1)


# Secrets


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": "x"},
        {"google_api_key": "x"},
        {"apiKey": "x"},
        {"client_secret": "x"},
        {"password": "x"},
        {"credentials": "x"},
        {"token": "x"},
        {"access_token": "x"},
        {"additional_headers": {"x-goog-api-key": "x"}},
        {"additional_headers": {"Authorization": "x"}},
        {"client_args": [{"headers": {"Cookie": "x"}}]},
        {"base_url": "https://user:x@example.org"},
    ],
)
def test_no_secret_gets_into_a_config(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="does not belong into a config") as caught:
        PruneContext(agent_options=options)
    assert "'x'" not in str(caught.value)


def test_options_that_only_look_like_secrets() -> None:
    options = {"max_tokens": 10, "token_limit": 3, "stop": ["key"], "base_url": "http://h:1/a@b"}
    assert PruneContext(agent_options=options).agent_options == options


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_halves_its_step_after_each_rollback(
    control: type[Agent], make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    layers = [make_layer(i, parameters=10_000) for i in range(8)]

    def gain(stalls: int) -> float:
        observation = make_observation(layers, max_step=0.04, stalls=stalls)
        return sum(item.delta for item in control().decide(observation).layers) / len(layers)

    assert [gain(n) for n in range(4)] == pytest.approx([0.04, 0.02, 0.01, 0.005], rel=1e-6)


# Refining


@pytest.mark.parametrize(
    ("agent", "refine", "words"),
    [
        ("greedy", -1, "agent_options.refine: -1 is no number of cycles, 0 or more"),
        ("greedy", True, "agent_options.refine: True is no number of cycles"),
        ("greedy", "2", "agent_options.refine: '2' is no number of cycles"),
        ("zscore", 1, "agent zscore does not refine: leave agent_options.refine away"),
    ],
)
def test_who_refines_how_often(agent: str, refine: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        check_agent(PruneContext(agent=agent, agent_options={"refine": refine}))
    assert words in str(caught.value)


def test_a_control_leaves_an_llms_options_alone() -> None:
    options = {"temperature": 0.5, "refine": 2}
    assert isinstance(
        make_agent(PruneContext(agent="greedy", agent_options=options))[1], GreedyAgent
    )
    assert check_agent(PruneContext(agent="uniform", agent_options={"temperature": 0.5}))


def test_whole_layers_are_not_refined(make_observation: MakeObservation) -> None:
    with pytest.raises(InputError, match="a pattern takes layers as a whole"):
        GreedyAgent(refine=1).decide(make_observation(pattern="2:4"))


def test_before_the_target_and_without_steps_left_nothing_is_restored(
    make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    def best(returns: int) -> Best:
        kept: Any = {"step": 1, "revision": "r", "perplexity": 20.0, "losses": [], "fruitless": 0}
        return {**kept, "sparsity": 0.3, "knowledge": None, "returns": returns}

    layers = [make_layer(i, sparsity=0.3 if i else 0.02) for i in range(4)]
    sparsity = sum(p.sparsity for p in layers) / 4
    there = make_observation(layers, target=sparsity, best=best(0), max_step=0.05)
    restored = GreedyAgent(refine=1).decide(there)
    assert [item.delta for item in restored.layers] == [-0.02, -0.05, -0.05, -0.05]
    assert (restored.rebalance, restored.done) == (True, False)
    # The second cycle is over, or its second step is not left.
    for other in (replace(there, best=best(1)), replace(there, steps_left=1)):
        assert not GreedyAgent(refine=1).decide(other).layers
    below = replace(there, target=sparsity + 0.04)
    for refine, returns, left, done in (
        *((0, None, 9, True), (1, None, 9, False), (1, None, 2, True), (1, None, 3, False)),
        *((1, 0, 9, True), (2, 0, 9, False), (2, 1, 9, True)),
    ):
        seen = replace(below, best=None if returns is None else best(returns), steps_left=left)
        decision = GreedyAgent(refine=refine).decide(seen)
        assert all(item.delta > 0 for item in decision.layers)
        assert decision.done == done, (refine, returns, left)
