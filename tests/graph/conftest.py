"""LLM providers on the loopback that answer from a script, and observations to decide on."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from loopback import CANARY, PROVIDERS, FakeGemini, FakeLLM, serve

from prunewright.graph.agents import Observation
from prunewright.state import LayerProfile, ModelProfile


@pytest.fixture
def gemini(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLLM]:
    """A server that speaks Gemini's protocol, and a canary for a key."""
    monkeypatch.setenv(FakeGemini.variable, CANARY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(FakeGemini) as fake:
        yield fake


@pytest.fixture(params=PROVIDERS)
def llm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLLM]:
    """A server of each provider in turn, and a canary for its key."""
    kind = PROVIDERS[request.param]
    monkeypatch.setenv(kind.variable, CANARY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(kind) as fake:
        yield fake


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., LayerProfile]:
    """A function that makes one layer's profile; what is not said is the same for all."""

    def make(index: int = 0, **values: Any) -> LayerProfile:
        block = values.get("block", index)
        projection = values.get("projection", "mlp.down_proj")
        defaults: dict[str, Any] = {
            "name": f"model.layers.{block}.{projection}",
            "block": block,
            "projection": projection,
            "parameters": 1000,
            "sparsity": 0.1,
            "loss_cost": (0.001, 0.003, 0.006),
            "signals": {name: values.pop(name, 0.0) for name in ("z_s", "z_g", "z_c")},
        }
        return LayerProfile(**(defaults | values))

    return make


@pytest.fixture(scope="session")
def make_observation(make_layer: Callable[..., LayerProfile]) -> Callable[..., Observation]:
    """A function that makes an observation of some layers, four alike by default."""

    def make(layers: list[LayerProfile] | None = None, **values: Any) -> Observation:
        layers = layers if layers is not None else [make_layer(i) for i in range(4)]
        total = sum(p.parameters for p in layers)
        defaults: dict[str, Any] = {
            "step": 0,
            "steps_left": 10,
            "target": 0.5,
            "sparsity": sum(p.parameters * p.sparsity for p in layers) / total,
            "max_step": 0.05,
            "max_delta": 0.15,
            "max_layer_sparsity": 0.9,
            "max_increase": 0.15,
            "criterion": "wanda",
            "dense_perplexity": 20.0,
            "perplexity": 21.0,
            "profile": ModelProfile(revision="dense", gradient_revision="dense", layers=layers),
        }
        return Observation(**(defaults | values))

    return make
