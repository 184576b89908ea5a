"""The ranking's proposal as an answer: accepted, at other weights, edited; and its controls."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from profiles import make_model

from prunewright.graph.agents import Observation
from prunewright.graph.agents.asking import ask, check
from prunewright.graph.agents.chat.reading import answer_schema, read_answer
from prunewright.graph.agents.controls import BalanceAgent, GreedyAgent
from prunewright.graph.agents.proposal import HESITATION
from prunewright.state import (
    Decision,
    FromRanking,
    GroupDelta,
    LayerProfile,
    ModelProfile,
    PruneContext,
    Step,
    validate_config,
)
from prunewright.state.config import MAX_GOAL

MakeLayer = Callable[..., LayerProfile]
MakeObservation = Callable[..., Observation]
DOMAINS = ("general", "german", "facts")


class Answers:
    """An agent that gives the answer with a text, read as an LLM's is."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.text = json.dumps(answer)

    def decide(self, observation: Observation) -> Decision:
        return read_answer(self.text)


def answered(observation: Observation, **answer: Any) -> Step:
    """The step that an answer makes; refused answers are not sent back."""
    return ask("scripted", Answers(answer), observation, repairs=0)


@pytest.fixture
def observed(make_observation: MakeObservation) -> Observation:
    """Six blocks of a model with three domains, of which one counts twice."""
    weights = {"general": 1.0, "german": 2.0, "facts": 1.0}
    profile = make_model(6, domains=DOMAINS).at_weights(weights)
    plain = make_observation(profile.layers, target=0.6, weights=weights)
    return replace(plain, domains=dict.fromkeys(DOMAINS, (20.0, 22.0)))


def greedy(observation: Observation) -> dict[str, float]:
    return GreedyAgent().decide(observation).deltas


def seen_by(profile: ModelProfile, shares: dict[str, float]) -> ModelProfile:
    """The profile with the costs that the domains have by shares, which make up 1."""
    layers = []
    for p in profile.layers:
        mixed = {
            key: tuple(sum(s * costs[d][i] for d, s in shares.items()) for i in range(3))
            for key, costs in (("loss_cost", p.domain_costs), ("regrow_gain", p.domain_gains))
        }
        layers.append(p.model_copy(update=mixed))
    return profile.model_copy(update={"layers": layers})


# Accepted


@pytest.mark.parametrize("changes", [{}, {"stalls": 2}, {"target": 0.452}])
def test_an_accepted_proposal_is_what_greedy_does(
    changes: dict[str, Any], observed: Observation
) -> None:
    observation = replace(observed, **changes)
    step = answered(observation, accept=True)
    assert step.invalid_answers == []
    assert step.decision.deltas == greedy(observation)
    assert step.ranking == FromRanking()
    assert step.ranking.words == "as it is"
    assert not step.decision.takes_proposal
    stated = GreedyAgent().decide(observation).expected_ppl_change
    assert step.predicted_change == pytest.approx(stated)


def test_at_the_target_an_accepted_exchange_need_not_say_that_it_is_one(
    make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    dear = make_layer(0, sparsity=0.5, regrow_gain=(0.4, 0.8, 1.2), loss_cost=(0.5, 1.0, 1.5))
    cheap = make_layer(1, sparsity=0.1, loss_cost=(0.1, 0.2, 0.3))
    observation = make_observation([dear, cheap], target=0.3)
    step = answered(observation, accept=True, done=False)
    assert step.invalid_answers == []
    assert step.decision.deltas == pytest.approx({dear.name: -0.15, cheap.name: 0.15})
    assert step.decision.rebalance
    # Where no exchange pays there is nothing to accept.
    level = dear.model_copy(update={"regrow_gain": (0.1 * HESITATION, 0.2, 0.3)})
    step = answered(make_observation([level, cheap], target=0.3), accept=True)
    assert (step.decision.layers, step.invalid_answers) == ([], [])
    assert step.notes == ["the ranking proposes no change"]


def test_what_an_agent_may_not_know_is_not_in_its_proposal(observed: Observation) -> None:
    blind = replace(observed, feedback=False, stalls=2)
    assert answered(blind, accept=True).decision.deltas == greedy(observed)


# Weights


def test_other_weights_make_another_proposal(observed: Observation) -> None:
    step = answered(observed, weights={"facts": 3})
    # Those that are not named keep theirs: 1, 2 and 3.
    shares = {"general": 1 / 6, "german": 2 / 6, "facts": 3 / 6}
    expected = greedy(replace(observed, profile=seen_by(observed.profile, shares)))
    assert step.decision.deltas == pytest.approx(expected)
    assert step.decision.deltas != pytest.approx(greedy(observed))
    assert step.ranking == FromRanking(weights={"general": 1, "german": 2, "facts": 3})
    assert step.ranking.words == "at weights general 1, german 2, facts 3"


@pytest.mark.parametrize(
    ("answer", "changes", "words"),
    [
        ({"weights": {"code": 1}}, {}, "unknown domain 'code'; its domains are general, german"),
        ({"weights": dict.fromkeys(DOMAINS, 0)}, {}, "weights: all are 0"),
        ({"weights": {"german": -1}}, {}, "weights.german: Input should be greater than or equal"),
        ({"weights": {"german": 2}, "accept": False}, {}, "do not say accept: false"),
        ({"weights": {"german": 2}}, {"pattern": "2:4"}, "no costs by domain"),
        ({"accept": True}, {"signals": ("z_s",)}, "no proposal in this run, which hides"),
        ({"weights": {}}, {}, "reasoning and layers must be there, or accept: true"),
        ({"accept": False, "reasoning": ""}, {}, "layers must be there, or accept: true"),
    ],
)
def test_a_proposal_that_cannot_be_had(
    answer: dict[str, Any], changes: dict[str, Any], words: str, observed: Observation
) -> None:
    step = answered(replace(observed, **changes), **answer)
    assert words in step.invalid_answers[0]
    assert (step.decision.layers, step.ranking) == ([], None)


# Edits


def test_edits_are_added_to_the_proposal(observed: Observation) -> None:
    # Half of what the step may add, after a rollback: there is room for more.
    observation = replace(observed, stalls=1)
    proposal = greedy(observation)
    name = next(n for n, d in proposal.items() if d <= 0.1 and "up_proj" not in n)
    spared = [p.name for p in observed.profile.layers if p.projection == "mlp.up_proj"]
    assert any(n in proposal for n in spared)
    step = answered(
        observation,
        accept=True,
        layers=[{"name": name.removeprefix("model.layers."), "delta": 0.03}],
        groups=[{"projection": "mlp.up_proj", "from": 0, "to": 5, "delta": -0.02}],
    )
    assert step.invalid_answers == []
    expected = dict(proposal)
    for up in spared:
        expected[up] = expected.get(up, 0.0) - 0.02
    expected[name] = proposal[name] + 0.03
    assert step.decision.deltas == pytest.approx(expected)
    assert step.ranking is not None
    assert step.ranking.edits == pytest.approx({name: 0.03} | dict.fromkeys(spared, -0.02))
    assert step.ranking.words == "with 7 layers edited by the agent"


def test_an_edit_of_a_group_is_cut_to_what_each_layer_can_take(
    make_layer: MakeLayer, make_observation: MakeObservation
) -> None:
    # The proposal takes 0.15, 0.05 and nothing of three layers without a zero.
    layers = [
        make_layer(i, sparsity=0.0, loss_cost=(c, 2 * c, 3 * c)) for i, c in enumerate((1, 2, 9))
    ]
    observation = make_observation(layers, max_step=0.2 / 3)
    names = [p.name for p in layers]
    group = {"projection": "mlp.down_proj", "from": 0, "to": 2}
    less = answered(observation, accept=True, groups=[{**group, "delta": -0.1}])
    assert less.decision.deltas == pytest.approx({names[0]: 0.05})
    assert less.ranking is not None
    assert less.ranking.edits == pytest.approx({names[0]: -0.1, names[1]: -0.05})
    more = answered(replace(observation, stalls=1), accept=True, groups=[{**group, "delta": 0.03}])
    # Half the budget, all of it in the first layer: 0.1.
    assert more.decision.deltas == pytest.approx(dict(zip(names, (0.13, 0.03, 0.03), strict=True)))


def test_what_is_not_edited_makes_room_for_what_is(observed: Observation) -> None:
    proposal = greedy(observed)
    spared = next(p.name for p in observed.profile.layers if p.name not in proposal)
    step = answered(observed, accept=True, layers=[{"name": spared, "delta": 0.1}])
    size = {p.name: p.parameters for p in observed.profile.layers}
    total = sum(size.values())
    left = observed.budget - 0.1 * size[spared] / total
    scale = left / sum(d * size[n] / total for n, d in proposal.items())
    assert 0 < scale < 1
    expected = {n: scale * d for n, d in proposal.items()} | {spared: 0.1}
    assert step.decision.deltas == pytest.approx(expected)
    assert step.notes == [f"to keep to the step, what was not edited was scaled by {scale:.4f}"]
    assert step.ranking is not None
    assert step.ranking.edits == {spared: 0.1}
    assert step.ranking.scale == pytest.approx(scale)


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({"layers": [{"name": "0.mlp.up_proj", "delta": 0.9}]}, "is not within 0.15 of 0"),
        ({"layers": [{"name": "0.mlp.up_proj", "delta": 1}]}, "is not within 0.15 of 0"),
        ({"layers": [{"name": "0.mlp.up_proj", "delta": -0.9}]}, "the proposal with your edits"),
        ({"layers": [{"name": "9.mlp.up_proj", "delta": 0.1}]}, "unknown layer '9.mlp.up_proj'"),
        ({"layers": [{"name": "0.mlp.up_proj", "delta": 0.01}] * 2}, "is named twice"),
        ({"groups": [{"projection": "up", "from": 0, "to": 1, "delta": 0.1}]}, "no such projecti"),
        (
            {
                "groups": [
                    {"projection": f"mlp.{name}_proj", "from": 0, "to": 5, "delta": 0.1}
                    for name in ("gate", "up", "down")
                ]
            },
            "above the limit of 0.05",
        ),
    ],
)
def test_edits_that_break_a_rule_are_refused(
    edits: dict[str, Any], words: str, observed: Observation
) -> None:
    step = answered(observed, accept=True, **edits)
    assert words in step.invalid_answers[0]
    assert (step.decision.layers, step.ranking) == ([], None)


def test_edits_of_whole_layers(make_layer: MakeLayer, make_observation: MakeObservation) -> None:
    """With a pattern a layer is taken out of the proposal or put into it as a whole."""
    # The second has zeros of its own, so that the pattern adds 0.4 to it.
    layers = [
        make_layer(i, sparsity=own, dense_sparsity=own, pattern_own=own, pattern_cost=0.1 * (i + 1))
        for i, own in enumerate((0.0, 0.1, 0.0, 0.0))
    ]
    observation = make_observation(layers, pattern="2:4", max_step=0.26, sparsity=0.025)
    names = [p.name for p in layers]
    assert greedy(observation) == pytest.approx({names[0]: 0.5, names[1]: 0.4})
    assert answered(observation, accept=True).decision.deltas == greedy(observation)
    edits = [{"name": names[1], "delta": -0.5}, {"name": names[3], "delta": 0.5}]
    step = answered(observation, accept=True, layers=edits)
    assert step.decision.deltas == pytest.approx({names[0]: 0.5, names[3]: 0.5})
    # More than all of a layer that is proposed already.
    group = {"projection": layers[0].projection, "from": 0, "to": 0, "delta": 0.6}
    step = answered(observation, accept=True, groups=[group])
    assert f"{names[0]}: delta 1 must be 0.5, which prunes it" in step.invalid_answers[0]
    # A layer that is too large for what is missing.
    near = make_observation(layers, pattern="2:4", target=0.03, sparsity=0.025)
    step = answered(near, accept=True, layers=[{"name": names[3], "delta": 0.5}])
    assert f"{names[3]}: this layer cannot be chosen" in step.invalid_answers[0]


def test_the_users_own_class_and_a_person_may_take_the_proposal(observed: Observation) -> None:
    decision = Decision(
        accept=True,
        groups=[
            GroupDelta.model_validate(
                {"projection": "mlp.up_proj", "from": 1, "to": 2, "delta": -0.01}
            )
        ],
    )
    found, problems = check(decision, observed)
    assert problems == []
    kept = {n: d for n, d in greedy(observed).items() if "up_proj" not in n}
    assert {n: d for n, d in found.deltas.items() if "up_proj" not in n} == kept


# The schema


def test_the_schema_offers_what_there_is(
    observed: Observation, make_observation: MakeObservation
) -> None:
    schema = answer_schema(observed)
    keys = [*("reasoning", "accept", "weights", "layers", "groups", "expected_ppl_change")]
    keys += ["rebalance", "done", "lessons"]
    assert list(schema["properties"]) == keys
    assert schema["required"] == ["reasoning", "accept"]
    weights = schema["properties"]["weights"]
    assert weights["required"] == list(weights["properties"]) == list(DOMAINS)
    assert weights["additionalProperties"] is False
    assert schema["properties"]["accept"]["type"] == "boolean"
    # OpenAI wants every key of every object, so that null says nothing.
    strict = answer_schema(observed, strict=True)
    assert strict["required"] == keys
    kinds = {key: value["type"] for key, value in strict["properties"].items()}
    assert kinds["reasoning"] == "string"
    assert kinds["weights"] == ["object", "null"]
    assert kinds["lessons"] == ["array", "null"]
    said = dict.fromkeys(keys[2:]) | {"reasoning": "", "accept": True}
    assert read_answer(json.dumps(said)) == Decision(reasoning="", accept=True, layers=[])
    # One text has nothing to weigh; without costs there is no proposal.
    assert "weights" not in answer_schema(make_observation())["properties"]
    hidden = answer_schema(replace(observed, signals=("z_s",)))
    assert not {"accept", "weights"} & hidden["properties"].keys()
    assert hidden["required"] == list(hidden["properties"])


# Balance


def balanced(observation: Observation, **now: float) -> Observation:
    return replace(observation, domains={n: (20.0, ppl) for n, ppl in now.items()})


def test_balance_is_greedy_while_all_have_lost_alike(observed: Observation) -> None:
    alike = BalanceAgent().decide(balanced(observed, general=25, german=25, facts=25))
    assert alike.deltas == pytest.approx(greedy(observed))
    one = replace(observed, profile=make_model(6), domains={})
    assert BalanceAgent().decide(one) == GreedyAgent().decide(one)


def test_balance_spares_the_domain_that_has_lost_most(observed: Observation) -> None:
    """exp(5 log(30 / 20)) is 1.5 ** 5: the weights of all steps' losses together."""
    decision = BalanceAgent().decide(balanced(observed, general=20, german=20, facts=30))
    raised = {"general": 1.0, "german": 2.0, "facts": 1.5**5}
    total = sum(raised.values())
    shares = {name: weight / total for name, weight in raised.items()}
    expected = greedy(replace(observed, profile=seen_by(observed.profile, shares)))
    assert decision.deltas == pytest.approx(expected)
    assert f"facts {3 * shares['facts']:.2f}" in decision.reasoning
    predicted = [
        observed.profile.predicted_changes(d)["facts"] for d in (decision.deltas, greedy(observed))
    ]
    assert predicted[0] < predicted[1]


# The goal


@pytest.mark.parametrize(
    "goal",
    ["", "  ", "x" * (MAX_GOAL + 1), "keep\x1b[2J", "keep \u202e all", "sk-0123456789abcdefgh"],
)
def test_a_goal_is_bounded_and_all_of_it_is_seen(goal: str) -> None:
    with pytest.raises(Exception, match="goal"):
        validate_config({"goal": goal})
    assert validate_config({"goal": " keep German\nand facts "}).goal == "keep German\nand facts"
    assert PruneContext().goal is None
