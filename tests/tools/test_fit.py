"""Blocks fitted as a whole to what the dense blocks give."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prunewright.state.config import Offload, Reconstruct
from prunewright.state.metrics import SOLVING
from prunewright.tools.fast import pack_bits
from prunewright.tools.model.loading import LoadedModel, load_model
from prunewright.tools.solve.fit import Fit, held_out
from prunewright.tools.solve.solving import BlockSolver, Solved, Wanted
from prunewright.tools.store.revisions import StoredLayer

Loader = Callable[..., LoadedModel]
FIT = Fit(epochs=5, learning_rate=1e-2)


def windows(count: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 500, (count, 24), generator=torch.Generator().manual_seed(seed))


def wanted_of(loaded: LoadedModel) -> dict[str, Wanted]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: Wanted(bits=pack_bits(torch.rand(layer.shape, generator=generator) < 0.3))
        for name, layer in loaded.layers.items()
    }


def last_states(loaded: LoadedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([loaded.execution.hidden_states(row.unsqueeze(0)) for row in ids])


def solve(
    loaded: LoadedModel,
    how: Reconstruct,
    ids: Tensor,
    known: Callable[..., StoredLayer | None] = lambda _: None,
    take: Callable[[list[Solved]], None] = lambda _: None,
    fit: Fit = FIT,
) -> dict[str, Tensor]:
    """The weights of all layers, which are live again after the solve."""
    solved: dict[str, Tensor] = {}

    def taken(block: list[Solved]) -> None:
        solved.update((layer.name, layer.weight.clone()) for layer in block)
        take([dataclasses.replace(layer, weight=layer.weight.clone()) for layer in block])

    BlockSolver(loaded, wanted_of(loaded), reconstruct=how, fit=fit).solve(ids, taken, known)
    for name, weight in solved.items():
        loaded.execution.weights.write(loaded.layers[name], weight)
    return solved


@pytest.mark.parametrize("family", ["LlamaConfig", "GPT2Config", "MixtralConfig"])
def test_a_fit_brings_unseen_text_nearer_to_the_dense_model(load: Loader, family: str) -> None:
    unseen, errors = windows(6, seed=9), {}
    for how in ("layer", "block"):
        loaded = load(family)
        dense = last_states(loaded, unseen)
        weights = solve(loaded, how, windows(40))
        errors[how] = float((last_states(loaded, unseen) - dense).square().mean())
        for name, wanted in wanted_of(loaded).items():
            layer = loaded.layers[name]
            mask = wanted.mask(layer, torch.device("cpu"))
            assert mask is not None
            assert not weights[name][mask].any()
    assert errors["block"] < 0.95 * errors["layer"]


def test_a_fit_that_helps_no_held_out_window_changes_nothing(load: Loader) -> None:
    layer = solve(load(), "layer", windows(7))
    # The same windows for least squares: eight less the one that is held out.
    wild = solve(load(), "block", windows(8), fit=Fit(epochs=2, learning_rate=1e3))
    assert held_out(8) == 1
    assert all(torch.equal(wild[name], weight) for name, weight in layer.items())


def test_a_fit_can_be_stopped_after_any_step(load: Loader) -> None:
    loaded, told, whole = load(), list[tuple[str, int, int]](), list[tuple[str, int, int]]()

    def stop_in_the_second_block(label: str, done: int, total: int) -> None:
        (whole if label == SOLVING else told).append((label, done, total))
        if "block 2" in label and "fit" in label and done == 3:
            raise KeyboardInterrupt

    def none_of_the_second(block: list[Solved]) -> None:
        assert all(loaded.layers[layer.name].block == 0 for layer in block)

    solver = BlockSolver(loaded, wanted_of(loaded), reconstruct="block", fit=FIT)
    with pytest.raises(KeyboardInterrupt):
        solver.solve(windows(8), none_of_the_second, progress=stop_in_the_second_block)
    first = [one for one in told if "block 1 of 2" in one[0]]
    # Seven layers, then five epochs of seven windows in pairs; a fit may end before.
    assert first[:8] == [("solving block 1 of 2: layer", done, 7) for done in range(8)]
    assert first[8:] == [("solving block 1 of 2: fit, step", n, 20) for n in range(len(first) - 8)]
    assert (len(first) - 9) % 4 == 0
    assert told[-1] == ("solving block 2 of 2: fit, step", 3, 20)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert whole == [(SOLVING, 0, 2), (SOLVING, 1, 2), (SOLVING, 1, 2)]
    anew, again = solve(load(), "block", windows(8)), solve(loaded, "block", windows(8))
    assert all(torch.equal(anew[name], weight) for name, weight in again.items())


def test_a_solve_goes_on_block_by_block_to_the_same_weights(load: Loader) -> None:
    whole = solve(load(), "block", windows(8))
    done: dict[str, StoredLayer] = {}

    def stop_after_one(block: list[Solved]) -> None:
        if done:
            raise KeyboardInterrupt
        for layer in block:
            done[layer.name] = StoredLayer(
                pack_bits(layer.mask), layer.weight.masked_select(~layer.mask)
            )

    with pytest.raises(KeyboardInterrupt):
        solve(load(), "block", windows(8), take=stop_after_one)
    left = solve(load(), "block", windows(8), known=lambda layer: done.get(layer.name))
    assert set(left) == set(whole) - set(done)
    assert all(torch.equal(whole[name], weight) for name, weight in left.items())


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_a_fit_block_by_block_is_that_of_the_whole_model(
    load: Loader, pico_models: Callable[..., Path], offload: Offload
) -> None:
    whole = solve(load(), "block", windows(8))
    directory = str(pico_models("LlamaConfig"))
    loaded = load_model(directory, dtype="float32", device="cpu", offload=offload)
    apart = solve(loaded, "block", windows(8))
    assert all(torch.equal(whole[name], weight) for name, weight in apart.items())


def test_a_fit_in_half_precision_gains_as_much_as_in_full(
    pico_models: Callable[..., Path],
) -> None:
    """One token is as large as the first one of real models, so that others are a tiny part."""
    draw = torch.Generator().manual_seed(0)
    ids, gains = torch.randint(3, 500, (5, 256), generator=draw), {}
    ids[:, 0] = 2
    directory = str(pico_models())
    for dtype in ("float32", "float16"):
        errors = {}
        for how in ("layer", "block"):
            loaded = load_model(directory, dtype=dtype, device="cpu")
            loaded.model.get_input_embeddings().weight.data[2] *= 1e4
            dense = last_states(loaded, ids[:4]).float()
            solve(loaded, how, ids, fit=Fit(epochs=3, learning_rate=3e-3))
            errors[how] = float((last_states(loaded, ids[:4]).float() - dense).square().mean())
        gains[dtype] = 1 - errors["block"] / errors["layer"]
    assert gains["float32"] > 0.1
    assert gains["float16"] == pytest.approx(gains["float32"], rel=0.1)
