"""The rules that a decision has to keep, whoever decided."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from prunewright.state import Decision, LayerDelta, check_decision

ROOM = {"a": 0.9, "b": 0.05, "c": 0.0}
SPARSITY = {"a": 0.0, "b": 0.85, "c": 0.9}
PARAMETERS = {"a": 100, "b": 300, "c": 600}


def check(*layers: tuple[str, float], max_delta: float = 0.15, max_step: float = 0.03) -> list[str]:
    decision = Decision(
        reasoning="", layers=[LayerDelta(name=name, delta=delta) for name, delta in layers]
    )
    return check_decision(
        decision, ROOM, SPARSITY, PARAMETERS, max_delta=max_delta, max_step=max_step
    )


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [("a", 0.15)],
        [("a", 1e-9)],
        [("b", 0.05)],
        [("a", 0.15), ("b", 0.05)],
        [("a", 0.15 + 1e-7)],
        [("a", 0.15), ("b", -0.04)],
        [("b", 0.05), ("c", -0.02)],
    ],
)
def test_within_the_rules(layers: list[tuple[str, float]]) -> None:
    assert check(*layers) == []


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ([("d", 0.1)], "unknown layer 'd': use a name from the table"),
        ([("a", 0.0), ("b", 0.01)], "a: delta is 0: leave the layer out"),
        ([("a", -0.01), ("b", 0.05)], "a: delta -0.01 restores more than 0.000"),
        ([("a", 0.2)], "a: delta 0.2 is not within 0.15 of 0"),
        ([("b", 0.06)], "b: delta 0.06 exceeds the room left, 0.050"),
        ([("c", 0.01)], "c: delta 0.01 exceeds the room left, 0.000"),
        ([("a", 0.05), ("a", 0.05)], "layer a is named twice"),
    ],
)
def test_one_broken_rule(layers: list[tuple[str, float]], problem: str) -> None:
    assert check(*layers) == [problem]


def test_the_step_as_a_whole() -> None:
    assert check(("a", 0.15), ("b", 0.05), max_step=0.03) == []
    assert check(("a", 0.15), ("b", 0.05), max_step=0.02) == [
        "the step adds 0.03000 to the model's sparsity, above the limit of 0.02000: "
        "choose fewer layers, or multiply every delta by 0.666"
    ]


def test_a_step_that_gains_nothing_must_say_so() -> None:
    layers = [LayerDelta(name="a", delta=0.06), LayerDelta(name="b", delta=-0.02)]
    kept = {"max_delta": 0.15, "max_step": 0.03}
    (problem,) = check_decision(
        Decision(reasoning="", layers=layers), ROOM, SPARSITY, PARAMETERS, **kept
    )
    assert problem.startswith("the step as a whole gains no sparsity (+0.0000)")
    rebalancing = Decision(reasoning="", layers=layers, rebalance=True)
    assert check_decision(rebalancing, ROOM, SPARSITY, PARAMETERS, **kept) == []
    gaining = Decision(reasoning="", layers=layers[:1], rebalance=True)
    (problem,) = check_decision(gaining, ROOM, SPARSITY, PARAMETERS, **kept)
    assert problem.startswith("rebalance: true is for a step that gains no sparsity as a whole")
    far = Decision(reasoning="", layers=[LayerDelta(name="b", delta=-0.16)], rebalance=True)
    assert check_decision(far, ROOM, SPARSITY, PARAMETERS, **kept) == [
        "b: delta -0.16 is not within 0.15 of 0"
    ]


def test_all_that_is_shown_of_a_layer_may_be_given_back() -> None:
    kept = {"a": 0.29951, "b": 0.3}  # both are shown as 0.300

    def problems(delta: float) -> list[str]:
        layers = [LayerDelta(name="a", delta=delta), LayerDelta(name="b", delta=0.29)]
        decision = Decision(reasoning="", layers=layers)
        room = {name: 0.9 - sparsity for name, sparsity in kept.items()}
        return check_decision(decision, room, kept, PARAMETERS, max_delta=0.5, max_step=0.5)

    assert problems(-0.3) == []
    assert problems(-0.301) == ["a: delta -0.301 restores more than 0.300"]


def test_the_factor_that_it_names_is_enough() -> None:
    layers = [("a", 0.14), ("b", 0.047)]
    problem = check(*layers, max_step=0.0123)[0]
    factor = float(problem.rsplit(" ", 1)[1])
    assert check(*((name, delta * factor) for name, delta in layers), max_step=0.0123) == []


def test_all_broken_rules_are_named_up_to_a_dozen() -> None:
    problems = check(*((f"x{i}", 0.1) for i in range(20)))
    assert len(problems) == 13
    assert problems[-1] == "and 8 more"
    assert len(check(("d", 0.1), ("a", 0.2), ("c", 0.1))) == 4  # and the step as a whole


def test_a_name_without_end_is_cut() -> None:
    (problem,) = check(("x" * 256, 0.1))
    assert len(problem) < 130


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.floats(-1, 1, allow_nan=False)), max_size=6),
    st.floats(0.01, 0.95),
    st.floats(0.001, 0.95),
)
def test_nothing_wrong_means_within_every_bound(
    layers: list[tuple[str, float]], max_delta: float, max_step: float
) -> None:
    problems = check(*layers, max_delta=max_delta, max_step=max_step)
    names = [name for name, _ in layers]
    gain = sum(PARAMETERS.get(name, 0) * delta for name, delta in layers) / 1000
    sound = (
        len(set(names)) == len(names)
        and all(
            name in ROOM
            and delta != 0
            and abs(delta) <= max_delta + 1e-6
            and -SPARSITY[name] - 5e-4 <= delta <= ROOM[name] + 1e-6
            for name, delta in layers
        )
        and (not layers or gain > 0)
        and gain <= max_step + 5e-4
    )
    assert (problems == []) == sound


@pytest.mark.parametrize(
    "values",
    [
        {"name": "a", "delta": float("nan")},
        {"name": "a", "delta": float("inf")},
        {"name": "a", "delta": 1.01},
        {"name": "a" * 257, "delta": 0.1},
        {"name": "a", "delta": 0.1, "more": 1},
        {"name": "a"},
    ],
)
def test_what_no_delta_can_be(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LayerDelta.model_validate(values)


def test_decisions_do_not_change() -> None:
    decision = Decision(reasoning="", layers=[])
    with pytest.raises(ValidationError, match="frozen"):
        decision.reasoning = "another"  # type: ignore[misc]
