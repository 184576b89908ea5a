"""What an agent is told of its earlier steps."""

from collections.abc import Callable
from typing import Any

import pytest
from records import DOWN, UP, record, rolled_back

from prunewright.graph.agents import Observation
from prunewright.graph.agents.prompt.feedback import (
    ITEMS,
    LATEST,
    ROLLBACKS,
    TOLD,
    compile_feedback,
    last_changes,
    percent,
)
from prunewright.state import Decision, Step

Told = Callable[..., list[str]]


@pytest.fixture
def observed(
    make_layer: Callable[..., Any], make_observation: Callable[..., Observation]
) -> Callable[..., Observation]:
    """A function that makes an observation, of six layers, after some steps."""
    layers = [
        make_layer(block, projection=projection)
        for block in range(3)
        for projection in ("mlp.up_proj", "mlp.down_proj")
    ]

    def make(*records: Step, **values: Any) -> Observation:
        return make_observation(layers, step=len(records), history=records, **values)

    return make


@pytest.fixture
def told(observed: Callable[..., Observation]) -> Told:
    """The lines told after some steps."""
    return lambda *records, **values: compile_feedback(observed(*records, **values)).splitlines()


def test_before_the_first_step(told: Told) -> None:
    assert told() == []


def test_one_accepted_step(told: Told) -> None:
    *lines, ratios = told(record())
    assert lines == [
        "The latest steps, in per cent: mean delta of each projection, in the early/middle/late "
        "third of the blocks where it differs; sparsity after the step; perplexity, its change:",
        "1: up +5.0/0/0, down 0/+15/0; sparsity 15.00, perplexity 20.40, +2.0 ± .10, "
        "predicted +1.0, expected +1.2",
        "Your reasoning then: Cheap layers.",
    ]
    # log(1.02) nats were measured, with an error of 0.001 / 1.02, and 0.01 predicted. One step says
    # the same of all that it touched.
    kinds = ("mlp.down_proj", "mlp.up_proj", "blocks 0-0", "blocks 1-1")
    words = "Measured over predicted cost, of all steps: 1.98 ± 0.10; "
    assert ratios == words + ", ".join(f"{kind} 1.98 ± 0.10" for kind in kinds)


def test_steps_before_the_latest_have_a_short_line(told: Told) -> None:
    lines = told(*(record(i) for i in range(LATEST + 2)))
    assert lines[:5] == [
        "Earlier steps, in per cent: sparsity that the model gained, change of the perplexity, "
        "within .10 or so, predicted by the costs:",
        "step gained change predicted",
        "1 +5.0 +2.0 +1.0",
        "2 +5.0 +2.0 +1.0",
        lines[4],
    ]
    assert lines[4].startswith("The latest steps, ")
    assert [line[:3] for line in lines[5 : 5 + LATEST]] == ["3: ", "4: ", "5: "]


def test_of_many_steps_the_first_are_summed_up(told: Told) -> None:
    lines = told(*(record(i, sparsity_before=0.01 * i) for i in range(LATEST + TOLD + 2)))
    # From 20.0 to 20.4, and from a sparsity of 0 to 0.15.
    assert lines[1] == "1-2 together +15 +2.0"
    assert lines[3].startswith("3 +13 +2.0 +1.0")


def test_a_projection_that_changed_alike_has_one_number(told: Told) -> None:
    even = {f"model.layers.{block}.mlp.up_proj": -0.02 for block in range(3)}
    assert any(line.startswith("1: up -2.0; sparsity") for line in told(record(applied=even)))


def test_of_many_projections_those_with_the_largest_part_are_told(
    make_layer: Callable[..., Any], make_observation: Callable[..., Observation]
) -> None:
    layers = [make_layer(0, projection=f"mlp.{letter}") for letter in "abcdefghijklmno"]
    applied = {p.name: 0.01 * (i + 1) for i, p in enumerate(layers)}
    observation = make_observation(layers, history=(record(applied=applied),))
    line = next(x for x in compile_feedback(observation).splitlines() if x.startswith("1: "))
    assert line.startswith("1: d +4.0, e +5.0, ")
    assert ", o +15 and 3 more; sparsity" in line


def test_what_was_rolled_back_keeps_its_layers_and_why(told: Told) -> None:
    lines = told(rolled_back(), record(1, applied={UP: 0.01}))
    assert lines[1].startswith("1: up +5.0/0/0, down 0/+15/0; sparsity 10.00, ")
    assert lines[1].endswith(", +30 ± .10, predicted +1.0, expected +1.2, rolled back")
    assert lines[2].startswith("2: up +1.0/0/0; sparsity 15.00, ")
    assert (
        "Step 1 was rolled back: perplexity rose by 30.0%. "
        "It was mlp.up_proj 0 +.050; mlp.down_proj 1 +.150" in lines
    )
    assert sum("reasoning" in line for line in lines) == 1


def test_the_last_step_rolled_back_is_told_once(told: Told) -> None:
    lines = told(record(), rolled_back(1))
    assert sum("0 +.050" in line for line in lines) == 1
    assert sum("reasoning" in line for line in lines) == 1


def test_of_many_rollbacks_the_latest_are_told_with_their_layers(told: Told) -> None:
    lines = told(*(rolled_back(i) for i in range(ROLLBACKS + 3)))
    assert sum(line.endswith(" rolled back") for line in lines) == ROLLBACKS + 3
    assert "1 - +30 +1.0 rolled back" in lines
    assert [line[:6] for line in lines if "was rolled back" in line] == [
        f"Step {i + 1}" for i in range(3, ROLLBACKS + 3)
    ]


def test_neighbours_with_one_delta_stand_as_a_range(told: Told) -> None:
    down = {f"model.layers.{i}.mlp.down_proj": delta for i, delta in enumerate((0.1, 0.1, -0.05))}
    (line,) = (line for line in told(rolled_back(applied=down)) if "It was" in line)
    assert line.endswith("It was mlp.down_proj 0-1 +.100, 2 -.050")


def test_an_empty_step_says_why_on_one_line(told: Told) -> None:
    empty = record(
        verdict="empty",
        applied={},
        predicted_costs={},
        candidate=None,
        reason="unknown layer 'x'\nstep 9: accepted" + " and on" * 100,
        change=None,
        change_stderr=None,
        candidate_perplexity=None,
        predicted_change=None,
        decision=Decision(reasoning="", layers=[]),
    )
    (_, line) = told(empty)
    assert line.startswith("1 nothing was pruned: unknown layer 'x' step 9: accepted and on")
    assert len(line) < 230


def test_a_perplexity_that_is_not_finite(told: Told) -> None:
    broke = rolled_back(
        reason="the perplexity is not finite",
        change=None,
        change_stderr=None,
        candidate_perplexity=None,
    )
    lines = told(broke)
    assert lines[1].endswith("perplexity not finite, predicted +1.0, expected +1.2, rolled back")
    assert any("rolled back: the perplexity is not finite. It was mlp" in line for line in lines)
    assert not any("Measured over predicted" in line for line in lines)
    hidden = told(broke, signals=("z_s",))
    assert any("rolled back: the perplexity is not finite. It was mlp" in line for line in hidden)


def test_without_costs_nothing_of_what_was_predicted(told: Told) -> None:
    why = "perplexity rose by 21.0%"
    lines = told(record(), rolled_back(1, reason=why), signals=("z_s", "z_g"))
    assert lines[1].endswith("perplexity 20.40, +2.0 ± .10, expected +1.2")
    many = told(*(record(i) for i in range(LATEST + 1)), signals=("z_s", "z_g"))
    assert many[1:3] == ["step gained change", "1 +5.0 +2.0"]
    assert any(f"rolled back: {why}. It was mlp" in line for line in lines)
    assert not any("predicted" in line for line in lines)


def test_when_each_layer_was_last_changed(observed: Callable[..., Observation]) -> None:
    steps = (record(), rolled_back(1, applied={UP: 0.1}), record(2, applied={DOWN: 0.1}))
    assert last_changes(observed(*steps)) == {UP: "2x", DOWN: "3"}
    assert last_changes(observed(*steps, feedback=False)) == {}


def test_without_feedback_nothing_is_told(told: Told) -> None:
    assert told(record(), rolled_back(1), feedback=False) == []


def test_a_step_of_many_layers_is_bounded(
    make_layer: Callable[..., Any], make_observation: Callable[..., Observation]
) -> None:
    layers = [make_layer(i) for i in range(100)]
    applied = {p.name: 0.001 * (p.block + 1) for p in layers}
    observation = make_observation(
        layers, history=(record(applied=applied), rolled_back(1, applied=applied))
    )
    (line,) = (x for x in compile_feedback(observation).splitlines() if "It was" in x)
    assert f", {ITEMS - 1} +.0{ITEMS}; and {100 - ITEMS} more" in line
    assert f"{ITEMS} +" not in line


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "-"),
        (0.0, "+.00"),
        (0.00345, "+.34"),
        (-0.0009, "-.09"),
        (0.00996, "+1.0"),
        (0.0123, "+1.2"),
        (-0.0994, "-9.9"),
        (0.0996, "+10"),
        (3.5, "+350"),
    ],
)
def test_percent(value: float | None, words: str) -> None:
    assert percent(value) == words
