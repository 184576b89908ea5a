"""SparseGPT against Optimal Brain Surgeon with inverses taken again for every weight."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prunewright.tools.criteria import gblm, sparsegpt


def layer(
    rows: int = 6, inputs: int = 20, tokens: int = 200, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs [tokens, inputs]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) / math.sqrt(inputs)
    x = torch.randn(tokens, inputs, generator=generator) @ (mixing + torch.eye(inputs))
    return torch.randn(rows, inputs, generator=generator), x


def surgeon(
    weight: Tensor,
    gram: Tensor,
    pruned: int,
    panel: int,
    factors: Tensor,
    damping: float,
    shrinkage: float,
) -> tuple[list[list[bool]], Tensor]:
    """Left to right, each pruned weight's error on the weights to its right: all by definition."""
    rows, inputs = weight.shape
    h = gram.double() + damping * gram.diagonal().mean().double() * torch.eye(inputs).double()
    for j in range(inputs):
        h[j, j] += shrinkage * gram[j, j]
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(inputs)]
    w = weight.double().clone()
    mask = [[False] * inputs for _ in range(rows)]
    for start in range(0, inputs, panel):
        columns = range(start, min(start + panel, inputs))
        price = {
            (i, j): float(factors[i] * w[i, j] ** 2 / inverses[j][0, 0])
            for i in range(rows)
            for j in columns
        }
        share = pruned * (columns[-1] + 1) // inputs - pruned * start // inputs
        for i, j in sorted(price, key=price.__getitem__)[:share]:
            mask[i][j] = True
        for j in columns:
            for i in range(rows):
                if mask[i][j]:
                    step = w[i, j] / inverses[j][0, 0]
                    w[i, j:] = w[i, j:] - step * inverses[j][0]
    return mask, w


@pytest.mark.parametrize(("panel", "strip"), [(20, 32), (20, 6), (8, 3), (5, 5)])
@pytest.mark.parametrize("pruned", [0, 1, 53, 120])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("shrinkage", [0.0, 0.7])
def test_masks_and_weights_are_those_of_optimal_brain_surgeon(
    pruned: int,
    panel: int,
    strip: int,
    weighed: bool,
    shrinkage: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sparsegpt, "STRIP", strip)
    weight, x = layer()
    x *= torch.linspace(0.3, 3, 20)  # so that its own diagonal is another thing than the mean
    gram = x.T @ x
    factors = torch.tensor([0.1, 3.0, 1.0, 0.02, 1.0, 0.5]) if weighed else None
    first = 0.1 if weighed else 0.01
    found = sparsegpt.prune(
        weight,
        gram,
        pruned=pruned,
        factors=factors,
        dampings=(first, 1.0),
        shrinkage=shrinkage,
        panel=panel,
    )
    assert found is not None
    mask, weights, damping = found
    weighing = torch.ones(6) if factors is None else factors
    expected_mask, expected = surgeon(weight, gram, pruned, panel, weighing, first, shrinkage)
    assert mask.tolist() == expected_mask
    assert damping == first
    torch.testing.assert_close(weights, expected.float(), rtol=1e-3, atol=1e-4)
    assert int(mask.sum()) == pruned
    assert not weights[mask].any()


@pytest.mark.parametrize(("keep_n", "group_m"), [(2, 4), (4, 8), (1, 5)])
def test_patterns_hold_exactly(keep_n: int, group_m: int) -> None:
    weight, x = layer(rows=7, inputs=40)
    found = sparsegpt.prune(weight, x.T @ x, pattern=(keep_n, group_m), panel=16)
    assert found is not None
    kept = (~found[0]).reshape(7, 40 // group_m, group_m).sum(-1)
    assert set(kept.reshape(-1).tolist()) == {keep_n}


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_zeros_that_were_there_are_of_the_mask_and_change_no_other_weight(
    pattern: tuple[int, int] | None,
) -> None:
    weight, x = layer(rows=7, inputs=40)
    weight[1:3], weight[:, 5], weight[4, 8:12] = 0, 0, -0.0
    own = weight == 0
    before = weight.clone()
    pruned = None if pattern else 160
    found = sparsegpt.prune(weight, x.T @ x, pruned=pruned, pattern=pattern, panel=16)
    assert found is not None
    mask, weights, _ = found
    assert torch.equal(weight, before)
    assert bool(mask[own].all())
    assert torch.equal(weights == 0, mask)
    by_group = own.reshape(7, 10, 4).sum(-1).clamp(min=2)
    assert int(mask.sum()) == (160 if pattern is None else int(by_group.sum()))
    if pattern is not None:
        assert torch.equal(mask.reshape(7, 10, 4).sum(-1), by_group)
    assert sparsegpt.prune(weight, x.T @ x, pruned=int(own.sum())) is not None
    with pytest.raises(ValueError, match="of which are zero already"):
        sparsegpt.prune(weight, x.T @ x, pruned=int(own.sum()) - 1)


@pytest.mark.parametrize("asked", [{"pruned": 60}, {"pattern": (2, 4)}])
def test_weights_that_are_not_numbers_are_refused(asked: dict[str, Any]) -> None:
    weight, x = layer()
    weight[2, 19] = torch.nan
    with pytest.raises(ValueError, match="not numbers"):
        sparsegpt.prune(weight, x.T @ x, **asked)
    with pytest.raises(ValueError, match="cannot prune 121 of 120 weights"):
        sparsegpt.prune(weight, x.T @ x, pruned=121)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shrinkage", [0.0, 0.2])
def test_the_update_lowers_the_error_of_the_mask_alone(seed: int, shrinkage: float) -> None:
    weight, x = layer(rows=16, inputs=32, tokens=400, seed=seed)
    found = sparsegpt.prune(weight, x.T @ x, pruned=16 * 32 // 2, shrinkage=shrinkage)
    assert found is not None
    mask, weights, _ = found

    def error(pruned: Tensor) -> float:
        return float(((pruned - weight) @ x.T).square().sum())

    assert error(weights) < error(weight.masked_fill(mask, 0))


@pytest.mark.parametrize("shrinkage", [0.0, 0.2])
def test_an_input_that_is_never_used_goes_first_and_breaks_nothing(shrinkage: float) -> None:
    weight, x = layer()
    x[:, 3] = 0
    found = sparsegpt.prune(weight, x.T @ x, pruned=40, shrinkage=shrinkage)
    assert found is not None
    mask, weights, _ = found
    assert bool(mask[:, 3].all())
    assert bool(weights.isfinite().all())
    assert int((weights == 0).sum()) == 40


def test_damping_grows_until_the_matrix_can_be_factored_and_no_further() -> None:
    weight, x = layer()
    gram = x.T @ x
    low = torch.linalg.eigvalsh(gram.double())[0]
    mean = float(gram.diagonal().mean())
    # The lowest eigenvalue is then -0.05 of the mean of the diagonal that is left.
    lowered = gram - torch.eye(20) * (float(low) + 0.05 * mean) / 1.05
    found = sparsegpt.prune(weight, lowered, pruned=60)
    assert found is not None
    assert found[2] == 0.1
    assert sparsegpt.prune(weight, -gram, pruned=60) is None
    assert sparsegpt.prune(weight, gram * math.nan, pruned=60) is None


@pytest.mark.parametrize("seed", range(5))
def test_what_is_fitted_to_few_tokens_holds_better_on_others_if_it_is_shrunk(seed: int) -> None:
    weight, x = layer(rows=32, inputs=64, tokens=2000, seed=seed)
    few, others = x[:80], x[80:]
    errors = []
    for shrinkage in (0.0, 0.2):
        found = sparsegpt.prune(weight, few.T @ few, pruned=1024, shrinkage=shrinkage)
        assert found is not None
        errors.append(float(((found[1] - weight) @ others.T).square().sum()))
    assert errors[1] < errors[0]


def test_a_group_that_does_not_divide_is_refused() -> None:
    weight, x = layer()
    with pytest.raises(ValueError, match="do not divide"):
        sparsegpt.prune(weight, x.T @ x, pattern=(2, 6))
    with pytest.raises(ValueError, match="or a pattern"):
        sparsegpt.prune(weight, x.T @ x)


def test_gblm_adds_weight_times_gradient_norm_to_wanda() -> None:
    weight, x = layer(rows=3, inputs=5)
    gradients = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(9)) * 1e-3
    score = gblm.score(weight, x.square().mean(0), gradients.square().mean(0))
    for i in range(3):
        for j in range(5):
            norm = math.sqrt(2048 * float(x[:, j].square().mean()))
            pull = math.sqrt(128 * float(gradients[:, i, j].square().mean()))
            expected = abs(float(weight[i, j])) * (norm + 100 * pull)
            assert float(score[i, j]) == pytest.approx(expected, rel=1e-4)
