"""Token losses against the full logits' cross entropy."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from prunewright.tools.losses import change_with_error, perplexity
from prunewright.tools.model import head as module
from prunewright.tools.model.head import Head, hidden_states, token_losses
from prunewright.tools.model.loading import LoadedModel

Load = Callable[..., LoadedModel]


@torch.no_grad()
def full_losses(loaded: LoadedModel, window: Tensor) -> Tensor:
    logits = loaded.model(input_ids=window.unsqueeze(0)).logits[0].float()
    log_probabilities = logits.log_softmax(dim=-1)
    return torch.stack([-log_probabilities[i, window[i + 1]] for i in range(len(window) - 1)])


def test_losses_are_those_of_the_full_logits(load: Load, family: str, windows: Tensor) -> None:
    loaded = load(family)
    head = Head(loaded.model)
    assert head.exact
    for window in windows:
        losses = token_losses(loaded.model, head, window)
        assert losses.shape == (39,)
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, full_losses(loaded, window), rtol=1e-4, atol=1e-4)


def test_the_cap_of_gemma_counts(load: Load, windows: Tensor) -> None:
    loaded = load("Gemma2Config")
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight.mul_(20)  # tied: logits far beyond the cap
    head = Head(loaded.model)
    assert head.exact
    uncapped = loaded.model.get_output_embeddings()(hidden_states(loaded.model, windows[:1]))
    assert float(uncapped.abs().max()) > 60
    torch.testing.assert_close(
        token_losses(loaded.model, head, windows[0]),
        full_losses(loaded, windows[0]),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("piece", [1, 7, 39, 40])
def test_pieces_make_no_difference(
    load: Load, windows: Tensor, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load()
    head = Head(loaded.model)
    whole = token_losses(loaded.model, head, windows[0])
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", piece)
    torch.testing.assert_close(token_losses(loaded.model, head, windows[0]), whole)


def distort(loaded: LoadedModel, change: Callable[[Tensor], Tensor]) -> None:
    """Let the model's forward do something to its logits that `Head` knows nothing of."""
    forward = loaded.model.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    loaded.model.forward = changed  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 1.01,
        lambda logits: 5 * torch.tanh(logits / 5),
        lambda logits: logits + torch.linspace(0, 1, logits.shape[-1]),
    ],
    ids=["scaled", "capped", "shifted"],
)
def test_an_unknown_head_is_scored_through_the_whole_model(
    load: Load, windows: Tensor, change: Callable[[Tensor], Tensor]
) -> None:
    loaded = load()
    plain = token_losses(loaded.model, Head(loaded.model), windows[0])
    distort(loaded, change)
    head = Head(loaded.model)
    assert not head.exact
    losses = token_losses(loaded.model, head, windows[0])
    torch.testing.assert_close(losses, full_losses(loaded, windows[0]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(losses, plain, rtol=1e-3)


def test_a_model_that_does_not_name_its_body_has_hidden_states(
    load: Load, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load()
    expected = hidden_states(loaded.model, windows[:1])
    monkeypatch.setattr(type(loaded.model), "base_model_prefix", "nothing")
    assert loaded.model.base_model is loaded.model
    assert torch.equal(hidden_states(loaded.model, windows[:1]), expected)


def test_window_losses_are_means_and_progress_is_told(load: Load, windows: Tensor) -> None:
    loaded = load()
    told: list[tuple[str, int, int]] = []
    losses = loaded.execution.window_losses(
        Head(loaded.model), windows, lambda *progress: told.append(progress)
    )
    assert losses == pytest.approx([float(full_losses(loaded, w).mean()) for w in windows])
    assert told == [("perplexity", i, 3) for i in (0, 1, 2, 3)]


def test_perplexity_of_a_uniform_model_is_the_vocabulary(load: Load, windows: Tensor) -> None:
    loaded = load()
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight.zero_()
    losses = loaded.execution.window_losses(Head(loaded.model), windows)
    assert perplexity(losses) == pytest.approx(512)


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    assert perplexity([1.0, 2.0, 4.5]) == pytest.approx(float(np.exp(7.5 / 3)))


@pytest.mark.parametrize(
    "losses", [[math.inf], [1.0, math.inf], [math.nan, 1.0], [2000.0], [math.inf, -math.inf]]
)
def test_perplexity_without_a_finite_value_is_infinite(losses: list[float]) -> None:
    assert perplexity(losses) == math.inf


def test_the_change_and_its_error_are_those_of_numpy() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(3, 1, 12)
    after = before + generator.normal(0.1, 0.05, 12)
    change, error = change_with_error(before.tolist(), after.tolist())
    difference = after - before
    assert change == pytest.approx(np.exp(after.mean()) / np.exp(before.mean()) - 1)
    expected = np.exp(difference.mean()) * difference.std(ddof=1) / np.sqrt(12)
    assert error == pytest.approx(expected)


def test_what_all_windows_share_is_no_noise() -> None:
    change, error = change_with_error([1.0, 5.0, 2.0], [1.5, 5.5, 2.5])
    assert change == pytest.approx(math.exp(0.5) - 1)
    assert error is not None
    assert error == pytest.approx(0, abs=1e-12)


def test_one_window_has_no_error_and_neither_has_an_overflow() -> None:
    assert change_with_error([1.0], [1.1]) == (pytest.approx(math.expm1(0.1)), None)
    assert change_with_error([1.0, 1.0], [900.0, 901.0]) == (math.inf, None)


def test_cross_entropy_agrees_with_torch(load: Load, windows: Tensor) -> None:
    loaded = load()
    with torch.no_grad():
        logits = loaded.model(input_ids=windows).logits[:, :-1].reshape(-1, 512)
    expected = functional.cross_entropy(logits, windows[:, 1:].reshape(-1))
    losses = loaded.execution.window_losses(Head(loaded.model), windows)
    assert sum(losses) / 3 == pytest.approx(float(expected), rel=1e-5)
