"""The profile's own arithmetic."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from prunewright.state import COST_DELTAS, LayerProfile, ModelProfile


def layer(
    name: str = "model.layers.7.mlp.down_proj",
    costs: tuple[float, float, float] = (0.01, 0.03, 0.08),
) -> LayerProfile:
    return LayerProfile(
        name=name,
        block=7,
        projection="mlp.down_proj",
        parameters=1000,
        sparsity=0.25,
        loss_cost=costs,
        signals={"z_s": -0.5, "z_g": 1.234, "z_c": 0.0},
    )


@given(
    costs=st.tuples(*[st.floats(0, 1)] * 3).map(lambda c: tuple(sorted(c))),
    delta=st.floats(0, COST_DELTAS[-1]),
)
def test_costs_are_linear_between_the_deltas(
    costs: tuple[float, float, float], delta: float
) -> None:
    expected = np.interp(delta, [0.0, *COST_DELTAS], [0.0, *costs])
    assert layer(costs=costs).cost_of(delta) == pytest.approx(float(expected), abs=1e-12)


def test_beyond_the_last_delta_its_slope_goes_on() -> None:
    assert layer().cost_of(0.25) == pytest.approx(0.08 + (0.08 - 0.03) / 0.05 * 0.10)


@pytest.mark.parametrize("sparsity", [0.02, 0.04, 0.05, 0.07, 0.13, 0.4])
def test_all_that_was_pruned_gains_what_it_cost(sparsity: float) -> None:
    """The loss is 10 times the sparsity; no gain reaches below the dense layer."""
    gains = tuple(10 * min(delta, sparsity) for delta in COST_DELTAS)
    pruned = layer().model_copy(update={"sparsity": sparsity, "regrow_gain": gains})
    for part in (0.3, 0.8, 1.0):
        delta = min(sparsity, COST_DELTAS[-1]) * part
        assert pruned.cost_of(-delta) == pytest.approx(-10 * delta)
    dense = pruned.model_copy(update={"dense_sparsity": sparsity})
    assert dense.cost_of(-0.01) == 0


def test_a_layer_that_is_nearly_empty_costs_all_of_it_at_the_end() -> None:
    costs = tuple(10 * min(delta, 0.02) for delta in COST_DELTAS)
    full = layer(costs=costs).model_copy(update={"sparsity": 0.98})  # type: ignore[arg-type]
    assert [full.cost_of(d) for d in (0.01, 0.02)] == pytest.approx([0.1, 0.2])


def test_a_models_predicted_change_is_that_of_the_summed_losses() -> None:
    layers = [layer("a"), layer("b", (0.02, 0.05, 0.1)), layer("c")]
    profile = ModelProfile(revision="r", gradient_revision="r", layers=layers)
    assert profile.predicted_change({"a": 0.05, "b": 0.1}) == pytest.approx(math.exp(0.06) - 1)
    assert profile.predicted_change({}) == 0


def test_a_prediction_stays_finite() -> None:
    costs = (1e3, 1e4, 1e5)
    profile = ModelProfile(revision="r", gradient_revision="r", layers=[layer("a", costs)])
    assert math.isfinite(profile.predicted_change({"a": 0.15}))


def test_the_table_is_compact() -> None:
    profile = ModelProfile(revision="r", gradient_revision="r", layers=[layer()])
    assert profile.table() == {
        "layer": "sparsity z_s z_g z_c",
        "7.mlp.down_proj": "0.250 -0.50 1.23 0.00",
    }


def test_profiles_of_the_first_version_are_read() -> None:
    fields = {"name": "model.layers.7.mlp.down_proj", "block": 7, "projection": "mlp.down_proj"}
    scores = {"s": 0.5, "g": 2e-4, "z_s": -0.5, "z_g": 1.234, "z_c": 0.0}
    old = fields | {"parameters": 1000, "sparsity": 0.25, "loss_cost": [0.01, 0.03, 0.08]} | scores
    text = json.dumps({"revision": "r", "gradient_revision": "r", "layers": [old]})
    measured = {"z_s": 0.5, "z_g": 2e-4}
    assert ModelProfile.model_validate_json(text).layers == [
        layer().model_copy(update={"measured": measured})
    ]
    with pytest.raises(ValidationError, match="signals"):
        LayerProfile.model_validate({k: v for k, v in old.items() if not k.startswith("z_")})


@pytest.mark.parametrize("name", ["s", "z_", "z_A", "z_<b>", "z_a b", "z_" + "a" * 31])
def test_a_signals_name_is_plain(name: str) -> None:
    with pytest.raises(ValidationError):
        LayerProfile.model_validate(layer().model_dump() | {"signals": {name: 0.0}})


def test_it_survives_json() -> None:
    profile = ModelProfile(revision="r", gradient_revision="r", layers=[layer()], notes=["n"])
    assert ModelProfile.model_validate_json(profile.model_dump_json()) == profile
