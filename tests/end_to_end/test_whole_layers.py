"""Runs with an N:M pattern: each layer is dense or has the pattern, and the target holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from prunewright.graph import fork, resume, run
from prunewright.graph.cli import app
from prunewright.graph.running.drive import RunResult
from prunewright.state import AgentError, InputError, Step
from prunewright.tools.store.rundir import RunDirectory

FIRST_BLOCK = [
    *(f"0.self_attn.{p}_proj" for p in "qkvo"),
    *(f"0.mlp.{p}_proj" for p in ("gate", "up", "down")),
]


@pytest.fixture
def config(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"pattern": "2:4", "target": 0.25, "max_delta": 0.05}


def states_of(config: dict[str, Any], directory: Path, pattern: str = "2:4") -> dict[str, bool]:
    """Whether each layer of a saved model has the pattern; it must have it, or be dense as it was.

    Read from the files alone.
    """
    keep, group = map(int, pattern.split(":"))
    dense = load_file(Path(config["model"]) / "model.safetensors")
    saved = load_file(directory / "model.safetensors")
    found = {}
    for name in (n for n in dense if "_proj" in n):
        if torch.equal(dense[name], saved[name]):
            found[name.removeprefix("model.layers.").removesuffix(".weight")] = False
            continue
        groups: Tensor = (saved[name] != 0).reshape(-1, group).sum(-1)
        assert groups.unique().tolist() == [keep], name
        found[name.removeprefix("model.layers.").removesuffix(".weight")] = True
    return found


def sparsity_of(directory: Path) -> float:
    saved = load_file(directory / "model.safetensors")
    layers = [w for name, w in saved.items() if "_proj" in name]
    return sum(int((w == 0).sum()) for w in layers) / sum(w.numel() for w in layers)


def trace(result: RunResult) -> list[Step]:
    return RunDirectory(result.directory).read_trace()


@pytest.mark.parametrize("agent", ["greedy", "zscore", "random", "uniform"])
def test_each_control_ends_at_the_target_with_whole_layers(
    config: dict[str, Any], agent: str, tmp_path: Path
) -> None:
    config |= {"agent": agent, "guard": {"max_increase": 9.0}}
    result = run(config, out=tmp_path / "run")
    assert result.metrics.status == "target_reached"
    states = states_of(config, result.model_directory)
    # 2 * (2048 * 3 + 1024 * 2 + 512 * 2) weights, of which the smallest layer takes 256.
    assert 0.25 - 256 / 18432 < sparsity_of(result.model_directory) <= 0.25
    assert result.metrics.sparsity == sparsity_of(result.model_directory)
    assert 0 < sum(states.values()) < len(states)
    gains = [record.sparsity - record.sparsity_before for record in trace(result)]
    assert all(0 < gain <= 0.1 for gain in gains)


@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "sparsegpt"},
        {"criterion": "wanda", "reconstruct": True},
        {"criterion": "fisher", "pattern": "4:8", "target": 0.2},
        {"criterion": "gblm", "pattern": "3:4", "target": 0.2},
    ],
)
def test_each_way_to_prune_takes_whole_layers(
    config: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    config |= settings | {"guard": {"max_increase": 9.0}}
    result = run(config, out=tmp_path / "run")
    assert result.metrics.status == "target_reached"
    states = states_of(config, result.model_directory, config["pattern"])
    assert 0 < sum(states.values()) < len(states)
    sparsity = sparsity_of(result.model_directory)
    assert config["target"] - 256 / 18432 < sparsity <= config["target"]


def test_layers_go_and_come_back_and_a_harmful_step_is_rolled_back(
    config: dict[str, Any], tmp_path: Path
) -> None:
    steps = [
        [("1.self_attn.q_proj", 0.5), ("1.self_attn.k_proj", 0.5)],
        [(name, 0.5) for name in FIRST_BLOCK[:-1]],
        [("1.self_attn.q_proj", -0.5), ("1.mlp.up_proj", 0.5)],
    ]
    config |= {
        "agent": "import:scripted_agents:Named",
        "agent_options": {"steps": steps},
        "step": 0.5,
        "max_steps": 3,
        "guard": {"max_increase": 0.06},
    }
    result = run(config, out=tmp_path / "run")
    first, second, third = trace(result)
    assert [r.verdict for r in (first, second, third)] == ["accepted", "rolled_back", "accepted"]
    assert second.revision == first.revision
    assert third.applied == {
        "model.layers.1.self_attn.q_proj": -0.5,
        "model.layers.1.mlp.up_proj": 0.5,
    }
    states = states_of(config, result.model_directory)
    assert {name for name, pruned in states.items() if pruned} == {
        "1.self_attn.k_proj",
        "1.mlp.up_proj",
    }
    # What a layer was predicted to cost is what restoring it is predicted to gain.
    directory = RunDirectory(result.directory)
    before = {p.name: p for p in directory.read_profile(third.profile).layers}
    back = before["model.layers.1.self_attn.q_proj"]
    assert back.patterned
    assert back.pattern_cost is not None
    assert back.cost_of(-0.5) == -back.pattern_cost < 0
    costs = third.predicted_costs
    assert costs["self_attn.q_proj@middle"] == pytest.approx(-back.pattern_cost)


def test_a_stopped_run_goes_on_to_what_an_uninterrupted_one_ends_at(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config |= {"step": 0.06}
    whole = run(config, out=tmp_path / "whole")
    assert whole.metrics.steps > 3

    class PowerError(Exception):
        """The power fails."""

    def fail(mode: str, event: dict[str, Any]) -> None:
        if mode == "updates" and "apply_prune" in event:
            seen.append(event)
            if len(seen) == 2:
                raise PowerError

    seen: list[Any] = []
    with pytest.raises(PowerError):
        run(config, out=tmp_path / "stopped", on_event=fail)
    again = resume(tmp_path / "stopped")
    assert again.metrics.revision == whole.metrics.revision
    assert again.metrics.perplexity == whole.metrics.perplexity
    assert [r.model_dump() for r in trace(again)] == [r.model_dump() for r in trace(whole)]
    forked = fork(tmp_path / "whole", 1, out=tmp_path / "fork")
    assert forked.metrics.revision == whole.metrics.revision


def test_a_layer_that_does_not_divide_stays_dense_and_is_named_once(
    config: dict[str, Any], pico_models: Callable[..., Path], tmp_path: Path
) -> None:
    # The 16 inputs of the experts' down_proj do not divide into groups of 32.
    model = str(pico_models("Qwen3MoeConfig"))
    config |= {"model": model, "pattern": "16:32", "target": 0.33, "step": 0.3}
    config |= {"guard": {"max_increase": 9.0}}
    result = run(config, out=tmp_path / "run")
    assert result.metrics.status == "target_reached"
    states = states_of(config, result.model_directory, "16:32")
    assert sum(states.values()) > 0
    assert not any(pruned for name, pruned in states.items() if "down_proj" in name)
    notes = [note for record in trace(result) for note in record.notes if "do not divide" in note]
    assert len(notes) == 1
    assert notes[0].endswith(": 0.mlp.experts.down_proj, 1.mlp.experts.down_proj")

    options = {"steps": [[("0.mlp.experts.down_proj", 0.5)]]}
    told = {"agent": "import:scripted_agents:Named", "agent_options": options, "max_stalls": 1}
    refused = run(config | told, out=tmp_path / "refused")
    assert refused.metrics.status == "stalled"
    assert "do not divide into the pattern's groups" in trace(refused)[0].invalid_answers[0]
    with pytest.raises(InputError, match=r"target 0\.45 cannot be reached with pattern 16:32"):
        run(config | {"target": 0.45}, out=tmp_path / "too-much")


def test_where_no_layer_fits_any_more_the_run_ends_and_says_what_is_missing(
    config: dict[str, Any], tmp_path: Path
) -> None:
    # Half of 512 weights is what the smallest layer adds to 18432: 0.0139.
    config |= {"target": 0.02, "step": 0.001}
    result = run(config, out=tmp_path / "run")
    assert result.metrics.status == "target_reached"
    assert result.metrics.sparsity == 256 / 18432
    (record,) = trace(result)
    assert record.notes == ["0.0061 is missing to the target, too little for any dense layer"]
    shown = CliRunner().invoke(app, ["resume", str(tmp_path / "run")])
    assert shown.exit_code == 0
    assert record.notes[0] in shown.output
    card = (result.model_directory / "README.md").read_text(encoding="utf-8")
    assert "Each layer is dense or 2:4 as a whole." in card
    with pytest.raises(InputError, match="nothing is left to do"):
        fork(tmp_path / "run", 1, out=tmp_path / "fork")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target": 0.6}, "target 0.6 is above 0.5"),
        ({"max_layer_sparsity": 0.4}, "max_layer_sparsity 0.4 does not admit pattern 2:4"),
        ({"pattern": "1:3"}, "no layer's inputs divide into groups of 3"),
        ({"target": 0.01}, "target 0.01 is too little for pattern 2:4"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    config: dict[str, Any], settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        run(config | settings, out=tmp_path / "run")
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_replay_repeats_the_run_and_refuses_other_deltas(
    config: dict[str, Any], tmp_path: Path
) -> None:
    first = run(config, out=tmp_path / "first")
    again = run(config | {"agent": f"replay:{first.directory}"}, out=tmp_path / "again")
    assert again.metrics.revision == first.metrics.revision
    unstructured = config | {"pattern": "unstructured", "agent": f"replay:{first.directory}"}
    with pytest.raises(AgentError, match="does not fit this run"):
        run(unstructured, out=tmp_path / "other")
