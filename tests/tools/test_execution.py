"""However a model is run over windows, what is measured of it and made of it is the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor
from torch.nn import functional

from prunewright.graph import baseline, fork, resume, run
from prunewright.state import InputError
from prunewright.state.config import Offload
from prunewright.tools.calibration.activations import measure_activations
from prunewright.tools.calibration.gradients import measure_gradients
from prunewright.tools.evaluation import evaluate
from prunewright.tools.evaluation.harness import prepare_quizzes
from prunewright.tools.execution.base import Execution, ordered_attention
from prunewright.tools.execution.blocks import OffloadedWeights
from prunewright.tools.model.head import Head, hidden_states
from prunewright.tools.model.layers import Layer, named_blocks
from prunewright.tools.model.loading import LoadedModel, load_model
from prunewright.tools.store.revisions import RevisionStore
from tests.tools.conftest import FAMILIES

Load = Callable[[str], LoadedModel]
# Blocks that share weights, hand on more, or cannot take windows in turn among them.
MORE = ("JetMoeConfig", "MambaConfig", "OpenAIGPTConfig", "Zamba2Config", "ZayaConfig")


def loaded_as(directory: Path, offload: Offload, dtype: str = "float32") -> LoadedModel:
    return load_model(str(directory), dtype=dtype, device="cpu", offload=offload)


def measured(loaded: LoadedModel, windows: Tensor) -> dict[str, Any]:
    """Everything that the passes over a model give."""
    activations = measure_activations(loaded, windows)
    head = Head(loaded.model)
    gradients = measure_gradients(loaded, head, windows, by_weight=True)
    return {
        "losses": torch.tensor(loaded.execution.window_losses(head, windows)),
        **{f"x {n}": x for n, x in activations.input_square.items()},
        **{f"d {n}": d for n, d in gradients.gradient_square.items()},
        **{f"w {n}": w for n, w in gradients.weight_gradient_square.items()},
        **{f"g {n}": torch.tensor(g) for n, g in gradients.mean_absolute.items()},
    }


def close(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-9, msg=name)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_block_by_block_everything_measured_is_that_of_the_whole_model(
    pico_models: Callable[..., Path], family: str, windows: Tensor
) -> None:
    directory = pico_models(family)
    whole = measured(loaded_as(directory, "none"), windows)
    close(whole, measured(loaded_as(directory, "disk"), windows))
    if family == "LlamaConfig":
        close(whole, measured(loaded_as(directory, "cpu"), windows))


def test_windows_go_through_each_block_before_the_next_one_comes(
    pico_models: Callable[..., Path], windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_as(pico_models(), "disk")
    loaded.execution.window_losses(Head(loaded.model), windows)
    came: list[int] = []
    fetch = OffloadedWeights.fetch

    def noted(self: OffloadedWeights, block: int) -> list[tuple[Layer, Tensor]]:
        if self.block != block:
            came.append(block)
        return fetch(self, block)

    monkeypatch.setattr(OffloadedWeights, "fetch", noted)
    told: list[tuple[str, int, int]] = []
    head = Head(loaded.model)
    came.clear()
    loaded.execution.window_losses(head, windows, lambda *step: told.append(step))
    assert came == [0, 1]
    assert told == [("perplexity", n, 2) for n in (0, 1, 2)]
    came.clear()
    measure_gradients(loaded, head, windows)
    assert came == [0, 1, 0]  # and back
    told.clear()
    measure_gradients(loaded, head, windows[:1], progress=lambda *step: told.append(step))
    assert told == [("gradients", n, 4) for n in range(5)]


def test_only_one_blocks_weights_are_in_memory_and_the_others_in_their_file(
    pico_models: Callable[..., Path], windows: Tensor
) -> None:
    """In bfloat16 the files' float32 weights are converted, so that memory would be needed."""
    loaded = loaded_as(pico_models(), "disk", "bfloat16")
    at_work: list[set[int]] = []

    def look(*_: Any) -> None:
        parameters = {ly: loaded.model.get_parameter(ly.parameter) for ly in loaded.layers.values()}
        at_work.append({ly.block for ly, p in parameters.items() if p.dtype == torch.bfloat16})

    for _, block in named_blocks(loaded.model):
        block.register_forward_hook(look)
    loaded.execution.hidden_states(windows)
    assert {0} in at_work
    assert {1} in at_work
    assert all(len(blocks) == 1 for blocks in at_work)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize(
    "changes",
    [
        {"guard": {"max_increase": 0.01}, "max_steps": 3},
        {"criterion": "obs", "reconstruct": True},
        {"pattern": "2:4", "target": 0.4, "step": 0.2},
    ],
    ids=["rollback", "solved", "2:4"],
)
def test_a_run_block_by_block_ends_at_the_same_masks(
    pico_config: dict[str, Any], tmp_path: Path, offload: Offload, changes: dict[str, Any]
) -> None:
    found = []
    for how in ("none", offload):
        # A seed of its own: statistics that the process has from another test cost no tokens.
        config = pico_config | changes | {"offload": how, "seed": 7}
        result = run(config, out=tmp_path / how)
        found.append(result.metrics)
        if result.metrics.saved:
            directory = result.model_directory
            assert directory is not None
            saved = loaded_as(directory, "none")
            zeros = sum(int((saved.weight(ly) == 0).sum()) for ly in saved.layers.values())
            assert zeros == round(result.metrics.sparsity * saved.prunable)
    assert found[0].revision == found[1].revision
    assert found[0].rollbacks == found[1].rollbacks
    assert found[0].perplexity == found[1].perplexity
    assert found[0].tokens == found[1].tokens


def test_a_model_that_is_saved_by_transformers_is_saved_from_its_files_too(
    pico_models: Callable[..., Path], pico_config: dict[str, Any], tmp_path: Path
) -> None:
    """The experts of Mixtral are stored one by one and live in one tensor."""
    config = pico_config | {"model": str(pico_models("MixtralConfig"))}
    whole = baseline(config, tmp_path / "whole")
    disk = baseline(config | {"offload": "disk"}, tmp_path / "disk")
    assert whole.model_directory is not None
    assert disk.model_directory is not None
    for path in sorted(whole.model_directory.glob("*.safetensors")):
        assert path.read_bytes() == (disk.model_directory / path.name).read_bytes()


def test_where_the_blocks_are_may_change_when_a_run_goes_on(
    pico_config: dict[str, Any], tmp_path: Path
) -> None:
    whole = run(pico_config, out=tmp_path / "whole")
    run(pico_config | {"max_steps": 1}, out=tmp_path / "run")
    changes = {"offload": "disk", "max_steps": 40}
    found = resume(tmp_path / "run", **changes)
    assert found.metrics.revision == whole.metrics.revision
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["request"]["offload"] == "none"
    again = fork(tmp_path / "whole", 1, tmp_path / "fork", offload="cpu")
    assert again.metrics.revision == whole.metrics.revision


def test_a_device_without_room_names_the_settings_and_loses_nothing(
    pico_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(pico_config, out=tmp_path / "whole")
    losses = Execution.window_losses
    calls = 0

    def full(self: Execution, *args: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return losses(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Execution, "window_losses", full)
        with pytest.raises(InputError, match=r"offload=cpu.*texts\.windows\.batch=1") as error:
            run(pico_config, out=tmp_path / "run")
    assert "Tried to allocate 2.00 GiB" in str(error.value)
    found = resume(tmp_path / "run", offload="cpu")
    assert found.metrics.revision == whole.metrics.revision


@pytest.mark.parametrize("batch", [2, 8])
def test_batches_of_windows_change_nothing_but_rounding(
    pico_models: Callable[..., Path], windows: Tensor, batch: int
) -> None:
    one = measured(loaded_as(pico_models(), "none"), windows)
    some = load_model(str(pico_models()), dtype="float32", device="cpu", batch=batch)
    rows: list[int] = []
    some.model.base_model.norm.register_forward_hook(lambda _, __, out: rows.append(len(out)))
    measure_activations(some, windows)
    assert rows == ([2, 1] if batch == 2 else [3])
    close(one, measured(some, windows))


def test_a_model_spread_over_devices_is_measured_as_on_one(
    pico_models: Callable[..., Path], windows: Tensor
) -> None:
    """The hooks that move what blocks are given are there; both devices are this processor."""
    whole = loaded_as(pico_models(), "none")
    expected = measured(whole, windows)
    spread = loaded_as(pico_models(), "none")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu"}
    dispatch_model(spread.model, places, main_device="cpu", force_hooks=True)
    close(expected, measured(spread, windows))
    states: list[Tensor] = []

    def visit(_: int, passing: Callable[[], Tensor]) -> Tensor:
        states.append(passing())
        return states[-1]

    assert spread.execution.visit(windows, 2, visit) == windows.numel()
    with torch.no_grad():
        final = whole.model.base_model.norm(states[-1])
        expected_states = torch.cat([hidden_states(whole.model, w[None]) for w in windows])
    torch.testing.assert_close(final, expected_states)


def test_attention_adds_up_its_gradients_in_order_and_nothing_else_must(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is asked of a GPU's attention, on the processor's, whose nodes have like names."""
    events: list[object] = []
    monkeypatch.setattr(
        torch, "use_deterministic_algorithms", lambda on, warn_only: events.append((on, warn_only))
    )
    # Heads of 12: a device pads them to 16, and what computes the gradients is a node further.
    for width in (16, 12):
        queries, keys, values = torch.randn(3, 1, 2, 8, width).unbind()
        queries.requires_grad_(True).register_hook(lambda _: events.append("gradient"))
        with ordered_attention(torch.device("cuda")):
            found = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
            (found * 2).sum().backward()
        assert events == [(True, False), (True, True), "gradient"]
        events.clear()
    with ordered_attention(torch.device("cpu")):
        functional.scaled_dot_product_attention(queries, keys, values).sum().backward()
    assert events == ["gradient"]


def test_device_all_is_refused_where_there_are_no_gpus(pico_models: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="shares a model out over several GPUs"):
        load_model(str(pico_models()), device="all")


def test_a_visit_runs_the_models_own_blocks_and_ends_after_the_last_asked_for(
    load: Load, family: str, windows: Tensor
) -> None:
    loaded = load(family)
    blocks = [block for _, block in named_blocks(loaded.model)]
    alone: list[Tensor] = []

    def note(_: Any, __: Any, out: Any) -> None:
        alone.append(out if isinstance(out, Tensor) else out[0])

    with torch.no_grad(), blocks[0].register_forward_hook(note):
        for window in windows:
            hidden_states(loaded.model, window.unsqueeze(0))
    seen = []

    def visit(index: int, passing: Callable[[], Tensor]) -> Tensor:
        seen.append((index, passing()))
        return passing()

    assert loaded.execution.visit(windows, 1, visit) == windows.numel()
    ((index, states),) = seen
    assert index == 0
    assert torch.equal(states, torch.cat(alone))
    assert "forward" not in vars(blocks[0])


def test_what_lies_between_the_blocks_is_run_as_the_family_wrote_it(
    load: Load, windows: Tensor
) -> None:
    loaded = load("LlamaConfig")
    blocks = [block for _, block in named_blocks(loaded.model)]
    double = lambda _, args, kw: ((args[0] * 2, *args[1:]), kw)  # noqa: E731
    handle = blocks[1].register_forward_pre_hook(double, with_kwargs=True)
    expected = torch.cat([hidden_states(loaded.model, w.unsqueeze(0)) for w in windows])
    states = []

    def visit(_: int, passing: Callable[[], Tensor]) -> Tensor:
        states.append(passing())
        return states[-1]

    loaded.execution.visit(windows, 2, visit)
    handle.remove()
    torch.testing.assert_close(loaded.model.base_model.norm(states[-1]), expected)


def test_blocks_that_cannot_take_windows_in_turn_are_refused(load: Load, windows: Tensor) -> None:
    loaded = load("LlamaConfig")
    second = named_blocks(loaded.model)[1][1]
    mixed = lambda _, args, kw: ((args[0] + args[0].mean(0, True), *args[1:]), kw)  # noqa: E731
    with (
        second.register_forward_pre_hook(mixed, with_kwargs=True),
        pytest.raises(InputError, match="change when windows take each block in turn"),
    ):
        loaded.execution.check_blocks(windows)
    loaded = load("LlamaConfig")
    handed: list[Tensor] = []
    first, second = (block for _, block in named_blocks(loaded.model))
    forwards = first.forward, second.forward
    first.forward = lambda *args, **kw: (forwards[0](*args, **kw), handed.append(args[0]))[0]
    second.forward = lambda x, *args, **kw: forwards[1](x + handed[-1][:1], *args, **kw)
    with pytest.raises(InputError, match="change when windows take each block in turn"):
        loaded.execution.check_blocks(windows)


def test_an_allocation_tries_masks_on_a_model_that_is_elsewhere(
    pico_config: dict[str, Any], tmp_path: Path
) -> None:
    options = {"tokens": 2000, "offspring": 2, "survivors": 1, "windows": 2, "screen": 16}
    changes = {"allocation": "evolutionary", "allocation_options": options}
    found = [
        baseline(pico_config | changes | {"offload": how}, tmp_path / how).metrics.revision
        for how in ("none", "disk")
    ]
    assert found[0] == found[1]
    assert RevisionStore(tmp_path / "disk" / "revisions").manifest(found[1])


def test_texts_and_questions_are_scored_block_by_block(pico_models: Callable[..., Path]) -> None:
    quizzes = prepare_quizzes(["facts"], data={}, examples={}, shots=0, limit=4)
    found = [
        evaluate(
            str(pico_models()),
            [("embedded", 2)],
            quizzes,
            length=32,
            dtype="float32",
            device="cpu",
            offload=how,
        )
        for how in ("none", "disk")
    ]
    assert found[0] == found[1]
