"""Layers are solved on what the pruned blocks before them give."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prunewright.state.config import Reconstruct
from prunewright.tools.criteria import CRITERIA, sparsegpt
from prunewright.tools.fast import pack_bits
from prunewright.tools.model.loading import LoadedModel
from prunewright.tools.solve import reconstruction
from prunewright.tools.solve.solving import BlockSolver, Solved, Wanted

Loader = Callable[..., LoadedModel]


def windows(count: int = 4, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(2, 500, (count, length), generator=torch.Generator().manual_seed(seed))


def masks_of(loaded: LoadedModel, sparsity: float = 0.4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(layer.shape, generator=generator) < sparsity
        for name, layer in loaded.layers.items()
    }


def solve(
    loaded: LoadedModel, ids: Tensor, wanted: dict[str, Wanted], **options: Any
) -> tuple[dict[str, Solved], list[str]]:
    """All layers as they are when they are solved, and all notes."""
    solved: dict[str, Solved] = {}

    def take(block: list[Solved]) -> None:
        for found in block:
            assert torch.equal(found.weight, loaded.weight(loaded.layers[found.name]))
            solved[found.name] = dataclasses.replace(found, weight=found.weight.clone())

    BlockSolver(loaded, wanted, **options).solve(ids, take)
    return solved, [note for found in solved.values() for note in found.notes]


def weights(loaded: LoadedModel) -> dict[str, Tensor]:
    return {name: loaded.weight(layer).clone() for name, layer in loaded.layers.items()}


def watch(loaded: LoadedModel, ids: Tensor, *names: str) -> dict[str, Tensor]:
    """Inputs [tokens, inputs] of some Linear modules in whole forward passes, by hooks."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    for name in names:

        def hook(_: Any, inputs: tuple[Tensor, ...], name: str = name) -> None:
            seen[name].append(inputs[0].reshape(-1, inputs[0].shape[-1]))

        handles.append(loaded.model.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        for row in ids:
            loaded.model(input_ids=row.unsqueeze(0), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_blocks_that_return_a_list_are_solved(load: Loader) -> None:
    loaded = load("OpenAIGPTConfig")
    masks = masks_of(loaded)
    wanted = {name: Wanted(bits=pack_bits(mask)) for name, mask in masks.items()}
    solved, _ = solve(loaded, windows(), wanted, reconstruct="layer")
    assert all(torch.equal(solved[name].weight == 0, mask) for name, mask in masks.items())


def test_reconstruction_solves_each_layer_on_what_the_pruned_blocks_give(load: Loader) -> None:
    """The last block's first layer, from inputs taken by hooks from the solved model."""
    loaded = load()
    ids, masks = windows(8), masks_of(loaded)
    name = next(n for n in loaded.layers if loaded.layers[n].block == 1)
    dense = weights(loaded)
    wanted = {n: Wanted(bits=pack_bits(mask)) for n, mask in masks.items()}
    solved, notes = solve(loaded, ids, wanted, reconstruct="layer")
    assert notes == []
    x = watch(loaded, ids, name)[name].double()
    found, mask = solved[name].weight.double(), masks[name]

    ridge = reconstruction.RIDGE * float((x.T @ x).diagonal().mean())

    def objective(values: Tensor) -> float:
        fit = ((values - dense[name].double()) @ x.T).square().sum()
        return float(fit + ridge * (values - dense[name].double()).square().sum())

    best = 0.0
    for i in range(len(found)):
        kept = ~mask[i]
        w = dense[name][i].double()
        part = x[:, kept]
        left = part.T @ part + ridge * torch.eye(int(kept.sum())).double()
        row = torch.zeros_like(w)
        row[kept] = torch.linalg.solve(left, part.T @ (x @ w) + ridge * w[kept])
        best += float((x @ row - x @ w).square().sum() + ridge * (row - w).square().sum())
    start = objective(dense[name].double().masked_fill(mask, 0))
    assert best <= objective(found) < best + 0.02 * (start - best)


@pytest.mark.parametrize("reconstruct", ["none", "layer", "block"])
def test_masks_hold_and_the_live_model_has_what_is_returned(
    load: Loader, family: str, reconstruct: Reconstruct
) -> None:
    loaded = load(family)
    ids = windows()
    counts = {n: int(0.4 * layer.numel) for n, layer in loaded.layers.items()}
    wanted = {n: Wanted(pruned=count) for n, count in counts.items()}
    masks = masks_of(loaded)
    if reconstruct != "none":
        wanted = {n: Wanted(bits=pack_bits(mask)) for n, mask in masks.items()}
    solved, _ = solve(loaded, ids, wanted, reconstruct=reconstruct)
    assert set(solved) == set(wanted)
    for name, layer in solved.items():
        live = loaded.weight(loaded.layers[name])
        assert torch.equal(live, layer.weight)
        assert not layer.weight[layer.mask].any()
        if reconstruct != "none":
            assert torch.equal(layer.mask, masks[name])
        else:
            assert int(layer.mask.sum()) == counts[name]


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_sparsegpt_sees_dense_blocks_behind_pruned_ones(load: Loader, shrinkage: float) -> None:
    """Its own result, from inputs taken by hooks from whole passes of the model."""
    loaded = load()
    ids = windows(8)
    names = list(loaded.layers)
    counts = {n: loaded.layers[n].numel // 2 for n in names}
    first = [n for n in names if loaded.layers[n].block == 0]
    second = [n for n in names if loaded.layers[n].block == 1]
    dense = weights(loaded)
    expected = {}
    for part in (first, second):
        inputs = watch(loaded, ids, *part)  # all layers of a block are dense still
        for name in part:
            x = inputs[name].float()
            found = sparsegpt.prune(dense[name], x.T @ x, pruned=counts[name], shrinkage=shrinkage)
            assert found is not None
            expected[name] = found[:2]
        for name in part:
            loaded.weight(loaded.layers[name]).copy_(expected[name][1])
    wanted = {n: Wanted(pruned=counts[n], shrinkage=shrinkage) for n in names}
    solved, _ = solve(loaded, ids, wanted)
    for name in names:
        same = (solved[name].mask == expected[name][0]).float().mean()
        assert float(same) > 0.999  # sums in another order may flip a near tie
        torch.testing.assert_close(solved[name].weight, expected[name][1], rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("family", ["LlamaConfig", "Qwen3MoeConfig"])
def test_obs_weighs_outputs_by_the_mean_of_their_gradient_and_the_layers(
    load: Loader, family: str
) -> None:
    loaded = load(family)
    name = "model.layers.0.self_attn.v_proj"
    layer = loaded.layers[name]
    squares = torch.rand(layer.shape[0], generator=torch.Generator().manual_seed(1)) ** 4
    dense = loaded.dense(layer)
    x = watch(loaded, windows(), name)[name].float()
    wanted = {name: Wanted(pruned=layer.numel // 2, gradient_square=squares)}
    solved, notes = solve(loaded, windows(), wanted, criterion="obs")
    assert notes == []
    expected = sparsegpt.prune(
        dense,
        x.T @ x,
        pruned=layer.numel // 2,
        factors=(squares + squares.mean()) / 2,
        dampings=(0.1,),
    )
    assert expected is not None
    same = (solved[name].mask == expected[0]).float().mean()
    assert float(same) > 0.999  # sums in another order may flip a near tie
    by_row = solved[name].mask.sum(1)
    assert int(by_row[squares.argmin()]) > int(by_row[squares.argmax()])


def test_each_expert_is_swept_with_its_own_gradients(load: Loader) -> None:
    loaded = load("Qwen3MoeConfig")
    name = next(n for n, ly in loaded.layers.items() if len(ly.shape) == 3)
    layer = loaded.layers[name]
    experts, rows = layer.matrix(loaded.dense(layer)).shape[:2]
    squares = torch.ones(experts, rows)
    squares[1, 0] = 1e6
    wanted = {name: Wanted(pruned=layer.numel // 2, gradient_square=squares)}
    solved, _ = solve(loaded, windows(8), wanted, criterion="obs")
    by_row = layer.matrix(solved[name].mask).sum(-1).tolist()
    assert {sum(pruned) for pruned in by_row} == {layer.numel // 2 // experts}
    usual = layer.numel // 2 // experts // rows
    assert by_row[1][0] < usual / 2
    assert by_row[0][0] > usual / 2


def test_the_mean_of_its_like_stands_in_for_the_tokens_that_an_expert_lacks(load: Loader) -> None:
    loaded = load("MixtralConfig")
    experts = loaded.model.get_submodule("model.layers.0.mlp.experts")
    forward, seen = experts.forward, list[tuple[Tensor, Tensor]]()

    def closed(hidden: Tensor, index: Tensor, weights: Tensor) -> Any:
        index = torch.where(index == 2, 3, index)
        seen.append((hidden, index))
        return forward(hidden, index, weights)

    experts.forward = closed
    name = "model.layers.0.mlp.experts.gate_up_proj"
    dense = loaded.dense(loaded.layers[name])
    wanted = {name: Wanted(pruned=dense.numel() // 2)}
    solved, notes = solve(loaded, windows(2), wanted)
    routed = [
        torch.cat([x[(index == e).nonzero()[:, 0]] for x, index in seen[-2:]]) for e in range(4)
    ]  # the last two are the windows as the block was solved on them
    total = sum(x.T @ x for x in routed) / sum(map(len, routed))
    scarce = 0
    for weight, x, mask, updated in zip(
        dense, routed, solved[name].mask, solved[name].weight, strict=True
    ):
        lacking = max(0, 32 - len(x))
        scarce += lacking > 0
        expected = sparsegpt.prune(weight, x.T @ x + lacking * total, pruned=weight.numel() // 2)
        assert expected is not None
        assert float((mask == expected[0]).float().mean()) > 0.999
        alike = torch.isclose(updated, expected[1], rtol=0.05, atol=5e-3)
        assert float(alike.float().mean()) > 0.99  # a near tie that flips moves its row
    assert 0 < scarce < 4
    assert notes == [
        f"{scarce} of 4 in {name} saw fewer calibration tokens than inputs: for the missing ones "
        "stands the mean of their like"
    ]


def test_layers_that_are_not_wanted_keep_their_weights(load: Loader) -> None:
    loaded = load()
    before = weights(loaded)
    name = "model.layers.1.mlp.down_proj"
    solve(loaded, windows(), {name: Wanted(pruned=500)})
    after = weights(loaded)
    assert [n for n in before if not torch.equal(before[n], after[n])] == [name]


def test_patterns_and_failures_of_the_solve(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load()
    name = "model.layers.0.mlp.up_proj"
    solved, notes = solve(loaded, windows(), {name: Wanted(pattern=(2, 4))})
    kept = (~solved[name].mask).reshape(-1, 4).sum(-1)
    assert set(kept.tolist()) == {2}
    assert notes == []
    # With no damping to try, every matrix is one that cannot be factored.
    none = dataclasses.replace(CRITERIA["sparsegpt"], dampings=())
    monkeypatch.setitem(CRITERIA, "sparsegpt", none)
    dense = loaded.dense(loaded.layers[name])
    solved, notes = solve(loaded, windows(), {name: Wanted(pruned=700)})
    assert notes == [f"{name}: cannot be solved with any damping, so its weights are not updated"]
    assert int(solved[name].mask.sum()) == 700
    assert torch.equal(solved[name].weight, dense.masked_fill(solved[name].mask, 0))
