"""What is checkpointed is plain and small; what a step writes is bits of what it changed."""

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.sqlite import SqliteSaver
from safetensors.torch import load_file

from prunewright.graph import run

MEGABYTE = 2**20


def checkpoints(out: Path) -> Iterator[dict[str, Any]]:
    with closing(sqlite3.connect(out / "state.sqlite", check_same_thread=False)) as connection:
        for item in SqliteSaver(connection).list(None):
            yield item.checkpoint["channel_values"]


@pytest.fixture(scope="module")
def long_run(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[int, int]]:
    """Forty steps of a model with 210 layers, and the database's size after each."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 30}
    model = make_model(**shape, num_attention_heads=2, num_key_value_heads=2)
    out = tmp_path_factory.mktemp("long") / "run"
    config = {
        "model": str(model),
        "dtype": "float32",
        "device": "cpu",
        "agent": "uniform",
        "target": 0.8,
        "step": 0.02,
        "max_steps": 40,
        "guard": {"max_increase": 1e9},
        "profile": {"gradient_every": 40},
        "texts": {
            "windows": {"calibration": 1, "gradient": 1, "guard": 2, "test": 1, "length": 16}
        },
    }
    sizes: dict[int, int] = {}

    def on_event(mode: str, event: dict[str, Any]) -> None:
        if mode == "updates" and "reflect" in event:
            parts = out.glob("state.sqlite*")
            sizes[event["reflect"]["step"]] = sum(p.stat().st_size for p in parts)

    metrics = run(config, out=out, on_event=on_event).metrics
    assert metrics.steps == 40
    return out, sizes


def test_forty_steps_of_210_layers_fit_into_five_megabytes(
    long_run: tuple[Path, dict[int, int]],
) -> None:
    out, _ = long_run
    assert (out / "state.sqlite").stat().st_size <= 5 * MEGABYTE
    profile = json.loads(next((out / "steps").glob("0000-profile-*.json")).read_text())
    assert len(profile["layers"]) == 210


def test_a_step_late_in_the_run_costs_little_more_than_an_early_one(
    long_run: tuple[Path, dict[int, int]],
) -> None:
    """Each superstep stores the whole state, so the state itself must hardly grow."""
    out, _ = long_run
    size: dict[int, int] = {}
    for state in checkpoints(out):
        if "step" in state:
            step = state["step"]
            size[step] = max(size.get(step, 0), len(json.dumps(state)))
    assert set(size) == set(range(41))
    assert max(size.values()) <= 64 * 1024
    # What a step adds for good is its line of the history.
    assert (size[39] - size[1]) / 38 <= 1024


def test_the_state_holds_plain_values_only(long_run: tuple[Path, dict[int, int]]) -> None:
    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(type(k) is str and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return type(value) in (str, int, float, bool, type(None))

    seen = 0
    for state in checkpoints(long_run[0]):
        own = {k: v for k, v in state.items() if not k.startswith(("__", "branch:"))}
        for key, value in own.items():
            assert plain(value), key
            json.dumps(value, allow_nan=False)
        seen += len(own)
    assert seen > 200


@pytest.mark.parametrize("agent", ["greedy", "uniform", "random"])
def test_a_step_writes_one_bit_a_weight_of_what_it_changed(
    agent: str, config: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    numel = {
        name.removesuffix(".weight"): weight.numel()
        for name, weight in load_file(Path(config["model"]) / "model.safetensors").items()
    }
    written: list[int] = []
    changed: list[int] = []

    def stored() -> int:
        return sum(p.stat().st_size for p in (out / "revisions").rglob("*") if p.is_file())

    def on_event(mode: str, event: dict[str, Any]) -> None:
        if mode == "updates" and "apply_prune" in event:
            written.append(stored())
            outcome = json.loads((out / event["apply_prune"]["step_file"]).read_text())
            changed.append(sum(numel[name] for name in outcome["applied"]))

    run(config | {"agent": agent, "guard": {"max_increase": 1e6}}, out=out, on_event=on_event)
    assert len(written) >= 3
    before = 0
    for total, weights in zip(written, changed, strict=True):
        assert total - before <= weights / 8 + 64 * 1024
        assert total - before >= weights / 8  # the masks were really there
        before = total
    assert list(out.rglob("*.writing*")) == []
