"""Criteria against their formulas, written out as loops."""

import math

import pytest
import torch
from torch import Tensor

from prunewright.tools.criteria import CRITERIA, LayerStatistics, fisher, prune_mask


def random_layer(
    rows: int = 12, inputs: int = 20, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, LayerStatistics]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator).to(dtype)
    x = torch.rand(inputs, generator=generator) * 4
    d = torch.rand(rows, generator=generator) ** 4
    return weight, LayerStatistics(x, d, torch.rand(rows, inputs, generator=generator) * 1e-6)


def flags(mask: Tensor) -> list[list[bool]]:
    return mask.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.25, 0.5, 0.75, 1.0])
def test_wanda_takes_the_lowest_of_weight_times_norm_in_each_row(
    sparsity: float, seed: int
) -> None:
    weight, statistics = random_layer(seed=seed)
    each = int(20 * sparsity)
    mask = prune_mask(weight, statistics, "wanda", pruned=12 * each)
    for row, pruned in zip(weight.tolist(), flags(mask), strict=True):
        metric = [
            abs(w) * math.sqrt(x)
            for w, x in zip(row, statistics.input_square.tolist(), strict=True)
        ]
        order = sorted(range(20), key=metric.__getitem__)
        assert {j for j, gone in enumerate(pruned) if gone} == set(order[:each])


@pytest.mark.parametrize("pruned", [0, 1, 77, 120, 240])
def test_magnitude_takes_the_smallest_of_the_whole_layer(pruned: int) -> None:
    weight, statistics = random_layer(seed=3)
    mask = prune_mask(weight, statistics, "magnitude", pruned=pruned)
    sizes = [abs(w) for row in weight.tolist() for w in row]
    expected = set(sorted(range(240), key=sizes.__getitem__)[:pruned])
    assert {i for i, gone in enumerate(mask.reshape(-1).tolist()) if gone} == expected


def fisher_loop(weight: Tensor, statistics: LayerStatistics) -> list[list[float]]:
    assert statistics.gradient_square is not None
    d = statistics.gradient_square.tolist()
    mean = sum(d) / len(d)
    return [
        [
            0.5 * w * w * x * (d[i] + fisher.DAMPING * mean) / (1 + fisher.DAMPING)
            for w, x in zip(row, statistics.input_square.tolist(), strict=True)
        ]
        for i, row in enumerate(weight.tolist())
    ]


def test_fisher_scores_are_the_damped_formula() -> None:
    weight, statistics = random_layer(seed=1)
    assert statistics.gradient_square is not None
    scores = fisher.score(weight, statistics.input_square, statistics.gradient_square)
    torch.testing.assert_close(scores, torch.tensor(fisher_loop(weight, statistics)))


@pytest.mark.parametrize("pruned", [1, 60, 121, 239])
def test_fisher_compares_across_the_rows_of_a_layer(pruned: int) -> None:
    weight, statistics = random_layer(seed=2)
    flat = [v for row in fisher_loop(weight, statistics) for v in row]
    mask = prune_mask(weight, statistics, "fisher", pruned=pruned)
    expected = set(sorted(range(240), key=flat.__getitem__)[:pruned])
    assert {i for i, gone in enumerate(mask.reshape(-1).tolist()) if gone} == expected


def test_damping_keeps_rows_without_gradient_and_the_sum_over_rows() -> None:
    gradient = torch.tensor([0.0, 0.0, 3.0, 5.0])
    damped = fisher.damped(gradient)
    assert float(damped.sum()) == pytest.approx(float(gradient.sum()))
    assert damped.tolist() == pytest.approx([1.0, 1.0, 2.5, 3.5])
    weight = torch.arange(1.0, 17.0).reshape(4, 4)
    mask = prune_mask(weight, LayerStatistics(torch.ones(4), gradient), "fisher", pruned=4)
    assert not bool(mask[1].all())  # the larger weights of a row without gradient stay


def test_equal_gradients_make_fisher_a_ranking_of_weight_times_norm() -> None:
    weight, statistics = random_layer(seed=4)
    even = LayerStatistics(statistics.input_square, torch.full((12,), 0.3))
    metric = (weight.abs() * statistics.input_square.sqrt()).reshape(-1)
    expected = torch.zeros(240, dtype=torch.bool)
    expected[metric.argsort()[:100]] = True
    mask = prune_mask(weight, even, "fisher", pruned=100)
    assert mask.reshape(-1).tolist() == expected.tolist()


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("pattern", [(2, 4), (1, 2), (3, 5)])
def test_patterns_hold_in_every_group(criterion: str, pattern: tuple[int, int]) -> None:
    weight, statistics = random_layer()
    mask = prune_mask(weight, statistics, criterion, pattern=pattern)  # type: ignore[arg-type]
    keep, size = pattern
    groups = mask.reshape(12, 20 // size, size)
    assert set((~groups).sum(dim=-1).reshape(-1).tolist()) == {keep}


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_scores_are_float32_whatever_the_weights_are(
    criterion: str, dtype: torch.dtype
) -> None:
    weight, statistics = random_layer(dtype=dtype)
    rule = CRITERIA[criterion]  # type: ignore[index]
    before = weight.clone()
    scores = rule.score(weight, statistics)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, rule.score(weight.float(), statistics))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_experts_share_the_count_and_are_masked_one_by_one(criterion: str) -> None:
    layers = [random_layer(6, 8, seed) for seed in range(4)]
    weight = torch.stack([w for w, _ in layers])
    statistics = LayerStatistics(
        torch.stack([s.input_square for _, s in layers]),
        *(
            torch.stack([values for _, s in layers if (values := getattr(s, name)) is not None])
            for name in ("gradient_square", "weight_gradient_square")
        ),
    )
    mask = prune_mask(weight, statistics, criterion, pruned=50)  # type: ignore[arg-type]
    shares = [12, 13, 12, 13]
    assert mask.sum(dim=(1, 2)).tolist() == shares
    for expert, (matrix, own) in enumerate(layers):
        alone = prune_mask(matrix, own, criterion, pruned=shares[expert])  # type: ignore[arg-type]
        assert torch.equal(mask[expert], alone)


def test_what_is_asked_for_must_be_one_thing() -> None:
    weight, statistics = random_layer()
    with pytest.raises(ValueError, match="or a pattern"):
        prune_mask(weight, statistics, "wanda")
    with pytest.raises(ValueError, match="or a pattern"):
        prune_mask(weight, statistics, "wanda", pruned=3, pattern=(2, 4))


def test_fisher_without_gradients_is_refused() -> None:
    weight, statistics = random_layer()
    with pytest.raises(ValueError, match="needs gradients"):
        prune_mask(weight, LayerStatistics(statistics.input_square), "fisher", pruned=3)
    assert CRITERIA["fisher"].needs_gradients
    assert not CRITERIA["wanda"].needs_gradients
    assert not CRITERIA["magnitude"].needs_gradients


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_broken_statistics_are_refused(criterion: str) -> None:
    weight, statistics = random_layer()
    weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="not numbers"):
        prune_mask(weight, statistics, criterion, pruned=10)  # type: ignore[arg-type]
