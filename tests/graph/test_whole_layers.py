"""Whole layers by an N:M pattern: landing, what may be chosen, what agents see and answer."""

import random
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from loopback import FakeGemini, Received, Reply
from profiles import QWEN3_4B, make_model

from prunewright.graph import run
from prunewright.graph.agents import Observation, make_agent
from prunewright.graph.agents.asking import ask, check
from prunewright.graph.agents.prompt.build import prompt
from prunewright.graph.whole_layers import land_whole
from prunewright.state import Decision, LayerDelta, LayerProfile, ModelProfile, PruneContext
from prunewright.tools.store.rundir import RunDirectory

MakeLayer = Callable[..., LayerProfile]
MakeObservation = Callable[..., Observation]


@st.composite
def landings(draw: st.DrawFn) -> dict[str, Any]:
    """A model of layers that give half, quarter or no part of their weights; a decision on it."""
    sizes = draw(st.lists(st.integers(1, 500), min_size=1, max_size=8))
    counts = {f"layer {i}": 2 * n for i, n in enumerate(sizes)}
    total = 2 * sum(counts.values()) + draw(st.sampled_from([0, 40]))
    pruned = draw(st.sets(st.sampled_from(sorted(counts))))
    named = draw(st.lists(st.sampled_from([*sorted(counts), "unfit"]), unique=True))
    zeros = sum(counts[name] for name in pruned)
    target = draw(st.floats(0.01, 0.5))
    return {
        "deltas": {name: -0.5 if name in pruned else 0.5 for name in named},
        "pruned": pruned,
        "counts": counts,
        "zeros": zeros,
        "total": total,
        "target": target,
        "step": draw(st.floats(0.001, 0.95)),
    }


@example(
    {
        "deltas": {"layer 0": 0.5},
        "pruned": {"layer 1", "layer 2"},
        "counts": {"layer 0": 2, "layer 1": 2, "layer 2": 2},
        "zeros": 4,
        "total": 12,
        "target": 0.49999999999999994,
        "step": 0.125,
    }
)
@given(landings())
def test_landing_takes_whole_layers_in_order_and_never_exceeds_the_target(
    landing: dict[str, Any],
) -> None:
    changes, notes = land_whole(**landing)
    counts, pruned, zeros = landing["counts"], landing["pruned"], landing["zeros"]
    assert all(changes[n] == (0 if n in pruned else counts[n]) for n in changes)
    back = sum(counts[n] for n in changes if n in pruned)
    added = sum(counts[n] for n in changes if n not in pruned)
    bound = Fraction(landing["target"]) * landing["total"]
    assert zeros - back + added <= max(bound, zeros - back) + Fraction(1, 10**4)
    # The step's bound, or the smallest layer that there is for it.
    open_ = [n for name, n in counts.items() if name not in pruned and zeros + n <= bound]
    step = max(Fraction(landing["step"]) * landing["total"], min(open_, default=0))
    assert added - back <= step + Fraction(1, 10**4)
    # One after the other: what was left out would not have fitted when it came.
    seen = 0
    for name in (n for n in landing["deltas"] if n not in pruned and n in counts):
        if name in changes:
            seen += counts[name]
        else:
            room = min(bound - zeros, step) + back - seen
            assert counts[name] > room - Fraction(1, 10**4)
    assert {n for n, d in landing["deltas"].items() if d < 0} <= set(changes)
    left_out = [n for n in landing["deltas"] if n in counts and n not in changes]
    assert bool(notes) == bool(left_out)


def whole(make_layer: MakeLayer, make_observation: MakeObservation, **values: Any) -> Observation:
    """Layer 0 has 2:4; 1 and 2 are dense, 2 too large; 3 does not divide."""
    layers = [
        make_layer(0, sparsity=0.5, patterned=True, pattern_cost=0.02),
        make_layer(1, sparsity=0.0, pattern_cost=0.01),
        make_layer(2, sparsity=0.0, pattern_cost=0.03, parameters=4000),
        make_layer(3, sparsity=0.0),
    ]
    return make_observation(layers, **({"pattern": "2:4", "target": 0.2} | values))


@pytest.mark.parametrize(
    ("block", "delta", "problem"),
    [
        (1, 0.5, ""),
        (1, 0.15, "delta 0.15 must be 0.5, which prunes it as a whole"),
        (1, -0.5, "delta -0.5 must be 0.5"),
        (0, 0.5, "delta 0.5 must be -0.5, which restores it as a whole"),
        (2, 0.5, "too large for what is missing to the target"),
        (3, 0.5, "its inputs do not divide into the pattern's groups"),
    ],
)
def test_each_layer_has_one_delta_and_a_wrong_one_is_told_the_right_one(
    make_layer: MakeLayer,
    make_observation: MakeObservation,
    block: int,
    delta: float,
    problem: str,
) -> None:
    observation = whole(make_layer, make_observation)
    layers = [LayerDelta(name=f"{block}.mlp.down_proj", delta=delta)]
    _, problems = check(Decision(reasoning="", layers=layers), observation)
    assert problem in "; ".join(problems)
    assert bool(problems) == bool(problem)


def test_giving_back_needs_the_word_rebalance_and_then_passes(
    make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    observation = whole(make_layer, make_observation)
    back = Decision(reasoning="", layers=[LayerDelta(name="0.mlp.down_proj", delta=-0.5)])
    assert "gains no sparsity" in "; ".join(check(back, observation)[1])
    assert check(back.model_copy(update={"rebalance": True}), observation)[1] == []


def test_the_prompt_says_that_layers_are_taken_whole(
    make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    observation = whole(make_layer, make_observation)
    system, step = (str(message.text) for message in prompt(observation))
    assert "the sparsity pattern 2:4, each as a whole" in system
    assert "A delta is exactly 0.5 for a dense layer, and exactly -0.5 for one that has" in system
    assert "0.15" not in system.replace("15 %", "")
    lines = step.splitlines()
    head = lines.index("name | share | sparsity | z_s | z_g | z_c | cost at 0.5 | proposed")
    # Layer 1: 1 % of 1000 of 7000 weights is 0.07 of the model's sparsity: 0.01 / (0.5 / 7) = 0.14.
    assert lines[head + 1 : head + 4] == [
        "1.mlp.down_proj | 14.29 | 0.000 | 0.00 | 0.00 | 0.00 | 0.14 | +.500",
        "Have the pattern 2:4 already, with the cost that restoring the layer takes away: "
        "mlp.down_proj 0 0.28",
        "No room left in: mlp.down_proj 2-3",
    ]
    hidden = replace(observation, signals=("z_s", "z_g"))
    system, step = (str(message.text) for message in prompt(hidden))
    assert "cost" not in step
    assert "Have the pattern 2:4 already: mlp.down_proj 0" in step


@pytest.mark.parametrize("blocks", [20, 60])
def test_maps_and_summaries_tell_the_cost_of_the_pattern_alone(
    make_observation: MakeObservation, blocks: int
) -> None:
    profile = make_model(blocks, sizes=QWEN3_4B)
    layers = [
        p.model_copy(update={"sparsity": 0.0, "pattern_cost": p.loss_cost[2] * 4})
        for p in profile.layers
    ]
    _, step = prompt(make_observation(layers, pattern="4:8", target=0.4))
    text = str(step.text)
    assert "cost at 0.5" in text
    assert "cost at 0.05" not in text
    assert "cost at 0.1" not in text


@pytest.mark.parametrize("agent", ["greedy", "zscore", "random", "uniform"])
@pytest.mark.parametrize("stalls", [0, 2])
@pytest.mark.parametrize("seed", range(8))
def test_what_a_control_chooses_is_accepted(
    make_observation: MakeObservation, agent: str, stalls: int, seed: int
) -> None:
    dice = random.Random(seed)
    layers = []
    for p in make_model(4, seed=seed).layers:
        patterned = dice.random() < 0.4
        fit = patterned or dice.random() < 0.8
        layers.append(
            p.model_copy(
                update={
                    "sparsity": 0.5 * patterned,
                    "patterned": patterned,
                    "pattern_cost": dice.lognormvariate(-5, 1) if fit else None,
                }
            )
        )
    plain = make_observation(layers, pattern="2:4", stalls=stalls)
    observation = replace(
        plain,
        seed=seed,
        target=plain.sparsity + dice.uniform(0.01, 0.1),
        max_step=dice.choice([0.001, 0.02, 0.2]),
    )
    name, chooser = make_agent(PruneContext(agent=agent))
    report = ask(name, chooser, observation, repairs=0)
    assert report.invalid_answers == []
    if any(room > 0 for room in observation.room().values()):
        assert report.decision.layers


def test_greedy_gives_back_a_layer_that_others_are_cheaper_than(
    make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    costs = [0.5, 0.01, 0.02, 0.3]
    layers = [
        make_layer(i, sparsity=0.5 * (i == 0), patterned=i == 0, pattern_cost=cost)
        for i, cost in enumerate(costs)
    ]
    observation = make_observation(layers, pattern="2:4", target=0.26, max_step=0.2)
    _, greedy = make_agent(PruneContext(agent="greedy"))
    # One layer is 0.125 of the model: 0.26 holds two.
    deltas = {item.name: item.delta for item in greedy.decide(observation).layers}
    assert deltas == {
        "model.layers.0.mlp.down_proj": -0.5,
        "model.layers.1.mlp.down_proj": 0.5,
        "model.layers.2.mlp.down_proj": 0.5,
    }


def test_an_llm_is_told_the_right_deltas_and_goes_on_with_them(
    pico_config: dict[str, Any], gemini: FakeGemini, tmp_path: Path
) -> None:
    def cheapest(received: Received) -> Reply:
        """As many of the cheapest layers as the step admits, from the prompt alone."""
        left, chosen = received.budget, []
        for row in sorted(received.table, key=lambda row: float(row["cost"])):
            gain = 0.5 * float(row["share"]) / 100
            if gain <= left + 1e-4:
                left -= gain
                chosen.append((str(row["name"]), 0.5))
        return gemini.decision(*chosen)

    gemini.script = [
        gemini.decision(("0.mlp.up_proj", 0.1)),
        gemini.decision(("0.mlp.up_proj", 0.5)),
        gemini.decision(("0.mlp.up_proj", 0.5)),
        gemini.decision(("0.mlp.up_proj", -0.5), ("1.mlp.up_proj", 0.5), ("1.mlp.gate_proj", 0.5)),
    ]
    gemini.otherwise = cheapest
    config = pico_config | {
        "pattern": "2:4",
        "target": 0.25,
        "agent": gemini.agent,
        "agent_options": gemini.options(),
        "guard": {"max_increase": 9.0},
    }
    result = run(config, out=tmp_path / "run")
    assert result.metrics.status == "target_reached"
    assert 0.249 <= result.metrics.sparsity <= 0.25
    first, second, *_ = RunDirectory(result.directory).read_trace()
    assert "delta 0.1 must be 0.5" in first.invalid_answers[0]
    assert first.applied == {"model.layers.0.mlp.up_proj": 0.5}
    assert "delta 0.5 must be -0.5" in second.invalid_answers[0]
    assert second.applied["model.layers.0.mlp.up_proj"] == -0.5
    assert "Have the pattern 2:4 already" in gemini.received[2].turns[0][1]


def test_an_observation_without_a_pattern_fixes_nothing(
    make_observation: MakeObservation,
) -> None:
    observation = make_observation()
    assert observation.fixed_deltas() is None
    assert observation.smallest == 0
    assert isinstance(observation.profile, ModelProfile)
    assert observation.budget == observation.max_step


def test_a_layer_with_zeros_of_its_own_gives_what_the_pattern_takes_beyond_them(
    make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    own = {"pattern_cost": 0.01, "pattern_own": 0.2, "dense_sparsity": 0.2}
    layers = [
        make_layer(0, sparsity=0.2, **own),
        make_layer(1, sparsity=0.5, patterned=True, **own),
        make_layer(2, sparsity=0.5, pattern_cost=0.0, pattern_own=0.5, dense_sparsity=0.5),
        make_layer(3, sparsity=0.0, pattern_cost=0.02),
    ]
    observation = make_observation(layers, target=0.5, sparsity=0.3, pattern="2:4", max_step=0.5)
    names = [p.name for p in layers]
    fixed = observation.fixed_deltas()
    assert fixed is not None
    assert list(fixed.values()) == pytest.approx([0.3, -0.3, 0.0, 0.5])
    for delta in (0.5, 0.3):  # the pattern's, or what it comes to
        asked = {names[0]: delta, names[1]: -delta, names[3]: 0.5}
        answer = Decision(
            reasoning="", layers=[LayerDelta(name=n, delta=d) for n, d in asked.items()]
        )
        decision, problems = check(answer, observation)
        assert problems == []
        assert [item.delta for item in decision.layers] == pytest.approx([0.3, -0.3, 0.5])
    wrong = Decision(reasoning="", layers=[LayerDelta(name=names[2], delta=0.5)])
    assert "it has the pattern in the dense model" in check(wrong, observation)[1][0]
    words = str(prompt(observation)[1].content)
    assert (
        "cannot be restored, and the pattern adds as much less: mlp.down_proj 0-1 200, 2 500"
        in (words)
    )


def test_zeros_of_the_dense_model_cannot_be_given_back(
    make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    layers = [make_layer(i, sparsity=0.4, dense_sparsity=0.3) for i in range(4)]
    observation = make_observation(layers, sparsity=0.4, target=0.6)
    for delta, problems in ((-0.1, []), (-0.12, ["restores more than 0.100"])):
        answer = Decision(
            reasoning="", layers=[LayerDelta(name=layers[0].name, delta=delta)], rebalance=True
        )
        found = check(answer, observation)[1]
        assert len(found) == len(problems)
        assert all(word in text for word, text in zip(problems, found, strict=True))
    greedy = make_agent(PruneContext(agent="greedy"))[1].decide(observation)
    assert all(item.delta >= -0.1 - 1e-9 for item in greedy.layers)
    assert "cannot be restored: mlp.down_proj 0-3 300" in str(prompt(observation)[1].content)
