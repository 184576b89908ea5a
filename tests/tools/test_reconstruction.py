"""Reconstruction against the normal equations, one row at a time."""

import math

import pytest
import torch
from torch import Tensor

from prunewright.tools.solve import reconstruction
from prunewright.tools.solve.reconstruction import solve


def problem(
    rows: int = 7, inputs: int = 24, tokens: int = 300, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a mask, and inputs [tokens, inputs]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) / math.sqrt(inputs)
    x = torch.randn(tokens, inputs, generator=generator) @ (mixing + torch.eye(inputs))
    weight = torch.randn(rows, inputs, generator=generator)
    mask = torch.rand(rows, inputs, generator=generator) < 0.45
    return weight, mask, x


def rowwise(weight: Tensor, mask: Tensor, x: Tensor, damping: float) -> Tensor:
    """The minimum of |V X - W X|^2 + ridge |V - W|^2 on each row's kept weights."""
    x = x.double()
    ridge = damping * float((x.T @ x).diagonal().mean())
    best = torch.zeros(weight.shape, dtype=torch.float64)
    for i in range(len(weight)):
        kept = ~mask[i]
        if not kept.any():
            continue
        w = weight[i].double()
        part = x[:, kept]
        left = part.T @ part + ridge * torch.eye(int(kept.sum())).double()
        best[i, kept] = torch.linalg.solve(left, part.T @ (x @ w) + ridge * w[kept])
    return best


@pytest.mark.parametrize("damping", [0.001, 0.01, 0.5])
def test_every_row_reaches_its_least_squares(damping: float) -> None:
    weight, mask, x = problem()
    mask[3] = True  # a row with nothing left
    mask[4] = False
    found = solve(weight, mask, x.T @ x, ridge=damping, iterations=100)
    expected = rowwise(weight, mask, x, damping)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    assert not found[mask].any()


@pytest.mark.parametrize("seed", range(4))
def test_a_few_iterations_already_lower_the_error(seed: int) -> None:
    weight, mask, x = problem(seed=seed)

    def error(values: Tensor) -> float:
        return float(((values - weight) @ x.T).square().sum())

    errors = [error(solve(weight, mask, x.T @ x, iterations=n)) for n in (0, 2, 5, 20)]
    assert errors[0] == pytest.approx(error(weight.masked_fill(mask, 0)))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.8 * errors[0]


def test_a_dense_row_stays_as_it_is() -> None:
    weight, mask, x = problem()
    mask[:] = False
    torch.testing.assert_close(solve(weight, mask, x.T @ x), weight, rtol=1e-5, atol=1e-6)


def test_inputs_that_are_all_zero_leave_the_masked_weights() -> None:
    weight, mask, _ = problem()
    found = solve(weight, mask, torch.zeros(24, 24))
    assert torch.equal(found, weight.masked_fill(mask, 0))


def test_rows_are_pulled_to_the_dense_ones_as_little_as_their_gradients_are_large() -> None:
    """Against the normal equations of each row, whose pull is over its own damped gradient."""
    weight, mask, x = problem(rows=5, inputs=9)
    gram = (x.T @ x) / len(x)
    squares = torch.tensor([0.01, 0.3, 1.0, 4.0, 20.0])
    found = solve(weight, mask, gram, squares, ridge=0.1, iterations=200)
    outputs = (squares + reconstruction.DAMPING * squares.mean()).double()
    for i, row in enumerate(weight.double()):
        kept = ~mask[i]
        pull = 0.1 * gram.double().diagonal().mean() * outputs.mean() / outputs[i]
        whole = gram.double() + pull * torch.eye(9)
        best = torch.zeros(9, dtype=torch.float64)
        best[kept] = torch.linalg.solve(whole[kept][:, kept], (whole @ row)[kept])
        torch.testing.assert_close(found[i].double(), best, rtol=1e-3, atol=1e-4)
