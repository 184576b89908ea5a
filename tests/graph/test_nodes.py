"""Landing on the target, and asking an agent."""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prunewright.graph.agents import InvalidAnswerError, Observation
from prunewright.graph.agents.asking import ask, expand
from prunewright.graph.nodes.landing import land
from prunewright.state import Decision, LayerDelta, LayerProfile, ModelProfile

TINY = Fraction(1, 10**6)
"""What the landing takes for rounding of a product of floats."""


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from("abcdefghij"), min_size=1, unique=True))
    numel = {n: draw(st.integers(1, 5_000)) for n in names}
    zeros = {n: draw(st.integers(0, numel[n] // 2)) for n in names}
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    return {
        "deltas": {n: draw(st.floats(1e-6, 0.4)) for n in chosen},
        "zeros": zeros,
        "numel": numel,
        "target": draw(st.floats(0.01, 0.95)),
        "ceiling": draw(st.sampled_from([0.6, 0.9, 1.0])),
    }


@example(
    {
        "deltas": {"a": 0.25},
        "zeros": {"a": 0, "b": 124},
        "numel": {"a": 152, "b": 253},
        "target": 0.39999999999999997,
        "ceiling": 0.6,
    }
)
@given(steps())
def test_landing(step: dict[str, Any]) -> None:
    deltas, zeros, numel = step["deltas"], step["zeros"], step["numel"]
    counts, notes = land(**step)
    assert counts.keys() == deltas.keys()
    total, present = sum(numel.values()), sum(zeros.values())
    after = present + sum(counts[n] - zeros[n] for n in counts)
    # The sparsity as it is reported is never over the target, unless it was before.
    assert after / total <= step["target"] or after == present
    allowed = max(n for n in range(total + 1) if n / total <= step["target"])
    wanted = sum(Fraction(d) * numel[n] for n, d in deltas.items())
    room = max(0, allowed - present)
    assert bool(notes) == (wanted > room) or abs(wanted - room) <= 1.001
    for name, count in counts.items():
        assert zeros[name] <= count < max(zeros[name], step["ceiling"] * numel[name]) + 1
        assert count - zeros[name] < deltas[name] * numel[name] + 1
    # Rounding costs the step less than two weights where no layer is at its ceiling.
    if all(zeros[n] + deltas[n] * numel[n] + 1 <= step["ceiling"] * numel[n] for n in deltas):
        assert after - present > min(wanted, room) - 2


def test_a_decision_beyond_the_target_is_scaled_in_proportion() -> None:
    counts, notes = land({"a": 0.4, "b": 0.2}, {"a": 0, "b": 0}, {"a": 1000, "b": 1000}, 0.15)
    assert counts == {"a": 200, "b": 100}
    assert notes == ["deltas scaled by 0.5000 to land on the target"]


def test_a_decision_a_little_beyond_the_step_is_scaled_to_it() -> None:
    """Whoever adds up the shares that a prompt shows is off by their rounding."""
    sizes = {"a": 10_000, "b": 10_000}
    counts, notes = land({"a": 0.1003, "b": -0.01}, {"a": 0, "b": 200}, sizes, 0.9, step=0.045)
    assert counts == {"a": 1000, "b": 100}  # 900, and what b restores
    assert notes == ["deltas scaled by 0.9970 to keep to the step"]


@given(steps(), st.data())
def test_landing_scales_only_what_is_added(step: dict[str, Any], data: st.DataObject) -> None:
    zeros, numel = step["zeros"], step["numel"]
    for name in data.draw(st.sets(st.sampled_from(sorted(step["deltas"])))):
        step["deltas"][name] = -data.draw(st.floats(1e-6, 0.6))
    counts, notes = land(**(step | {"ceiling": 1.0}))
    # In exact numbers: the give-backs first, then as much of the rest as the target leaves.
    target = Fraction(step["target"])
    deltas = {name: Fraction(delta) for name, delta in step["deltas"].items()}
    back = {n: min(math.floor(-d * numel[n] + TINY), zeros[n]) for n, d in deltas.items() if d < 0}
    most = math.floor(target * sum(numel.values()) + TINY)
    left = most - sum(zeros.values()) + sum(back.values())
    shares = {n: d * numel[n] for n, d in deltas.items() if d > 0}
    left = max(0, left)
    scale = min(Fraction(1), left / sum(shares.values())) if shares else 1
    assert counts.keys() == deltas.keys()
    for name, count in counts.items():
        if name in back:
            assert count == zeros[name] - back[name]
        else:
            share = scale * shares[name]
            assert -TINY <= count - zeros[name] < share + 1 + TINY
            assert count - zeros[name] > share - 1 - TINY
    added = sum(counts[name] - zeros[name] for name in shares)
    assert added <= left
    assert added > scale * sum(shares.values()) - 2
    assert bool(notes) == (sum(shares.values()) > left + TINY)


def test_a_decision_within_the_target_is_taken_as_it_is() -> None:
    zeros = {"a": 10, "b": 7, "c": 3}
    assert land({"a": 0.1}, zeros, {"a": 100, "b": 100, "c": 100}, 0.9) == ({"a": 20}, [])


def layer(name: str, sparsity: float = 0.0) -> LayerProfile:
    return LayerProfile(
        name=f"model.layers.{name}",
        block=int(name.partition(".")[0]),
        projection=name.partition(".")[2],
        parameters=100,
        sparsity=sparsity,
        loss_cost=(0.01, 0.02, 0.04),
        signals={"z_s": 0.0, "z_g": 0.0, "z_c": 0.0},
    )


def observation() -> Observation:
    names = ("0.mlp.up_proj", "1.mlp.up_proj")
    return Observation(
        step=0,
        steps_left=9,
        target=0.4,
        sparsity=0.0,
        max_step=0.2,
        max_delta=0.15,
        max_layer_sparsity=0.9,
        max_increase=0.15,
        criterion="wanda",
        dense_perplexity=20.0,
        perplexity=20.0,
        profile=ModelProfile(revision="r", gradient_revision="r", layers=[layer(n) for n in names]),
    )


class Script:
    """Answers from a list, and remembers what it was shown."""

    def __init__(self, *answers: Decision | Exception) -> None:
        self.answers: Iterator[Decision | Exception] = iter(answers)
        self.shown: list[Observation] = []

    def decide(self, observation: Observation) -> Decision:
        self.shown.append(observation)
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


def decision(name: str = "0.mlp.up_proj", delta: float = 0.1) -> Decision:
    return Decision(reasoning="so", layers=[LayerDelta(name=name, delta=delta)])


def test_a_valid_first_answer_is_taken_under_full_names() -> None:
    report = ask("script", Script(decision()), observation(), repairs=2)
    assert [(x.name, x.delta) for x in report.decision.layers] == [
        ("model.layers.0.mlp.up_proj", 0.1)
    ]
    assert report.invalid_answers == []
    assert report.predicted_change == pytest.approx(math.expm1(0.02))


def test_refused_answers_go_back_with_what_was_wrong() -> None:
    script = Script(decision("7.nowhere"), decision(delta=0.5), decision())
    report = ask("script", script, observation(), repairs=2)
    assert report.decision.layers[0].delta == 0.1
    assert [len(o.refusals) for o in script.shown] == [0, 1, 2]
    assert "unknown layer" in script.shown[1].refusals[0].problems[0]
    assert "7.nowhere" in script.shown[1].refusals[0].answer
    assert "0.5" in script.shown[2].refusals[1].problems[0]
    assert len(report.invalid_answers) == 2


@pytest.mark.parametrize("repairs", [0, 1, 3])
def test_after_the_last_refusal_the_decision_is_empty(repairs: int) -> None:
    script = Script(*[InvalidAnswerError("not valid JSON", "{") for _ in range(9)])
    report = ask("script", script, observation(), repairs=repairs)
    assert report.decision.layers == []
    assert report.predicted_change is None
    assert len(script.shown) == repairs + 1
    assert report.invalid_answers == ["not valid JSON"] * (repairs + 1)


def test_the_text_of_a_refused_answer_is_kept_in_part() -> None:
    script = Script(InvalidAnswerError("not valid JSON", "{\ud800" + "x" * 9_000), decision())
    report = ask("script", script, observation(), repairs=2)
    assert report.refused_answers == ["{?" + "x" * 3_998]
    assert not report.refused


def test_full_names_leave_unknown_ones_alone() -> None:
    both = Decision(
        reasoning="",
        layers=[
            LayerDelta(name="model.layers.1.mlp.up_proj", delta=0.1),
            LayerDelta(name="nothing", delta=0.1),
        ],
    )
    names = [x.name for x in expand(both, observation().profile)[0].layers]
    assert names == ["model.layers.1.mlp.up_proj", "nothing"]
