"""Each allocation against its formula, done naively, and its exact total on small models."""

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from prunewright.graph import baseline, run
from prunewright.state import InputError, validate_config
from prunewright.state.run import DENSE
from prunewright.tools.allocation import ALLOCATIONS, Allotment, resolve_allocation
from prunewright.tools.allocation.alphapruning import alpha_sparsities, hill_exponent
from prunewright.tools.allocation.atp import atp_sparsities, largest_beta
from prunewright.tools.allocation.blocks import layer_counts
from prunewright.tools.allocation.counts import Bounds, exact_counts
from prunewright.tools.allocation.evolutionary import divergence, search
from prunewright.tools.allocation.global_ranking import lowest_counts
from prunewright.tools.allocation.owl import owl_sparsities
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.calibration.activations import measure_activations
from prunewright.tools.calibration.costs import crowded_costs
from prunewright.tools.calibration.gradients import measure_gradients
from prunewright.tools.losses import perplexity
from prunewright.tools.model.head import Head
from prunewright.tools.model.loading import load_model
from prunewright.tools.store.revisions import RevisionStore

SMALL = {"offspring": 4, "survivors": 2, "windows": 2, "screen": 16, "tokens": 2_500}


@pytest.fixture
def bench_of(
    pico_config: dict[str, Any], pico_models: Callable[..., Path], tmp_path: Path
) -> Callable[..., Workbench]:
    """A function that makes a workbench on a pico model of a family."""

    def get(family: str = "LlamaConfig", **values: Any) -> Workbench:
        request = validate_config(pico_config | {"model": str(pico_models(family))} | values)
        bench = Workbench(request.request)
        bench.store = RevisionStore(tmp_path / "revisions")
        return bench

    return get


def allot(bench: Workbench, name: str, **options: Any) -> Allotment:
    return resolve_allocation(name, options, "unstructured")(bench, None)


def dense_scores(bench: Workbench) -> dict[str, list[Tensor]]:
    """Wanda's scores of each matrix, in the plainest way."""
    inputs = measure_activations(bench.loaded, bench.windows.calibration).input_square
    found = {}
    for name, layer in bench.loaded.layers.items():
        weight = layer.matrix(bench.loaded.dense(layer)).double()
        scores = weight.abs() * inputs[name].double().sqrt().unsqueeze(-2)
        found[name] = list(scores) if scores.ndim == 3 else [scores]
    return found


# --- whole weights ---------------------------------------------------------------------------


@given(
    layers=st.lists(
        st.tuples(st.floats(-0.5, 1.5), st.integers(1, 3_001), st.sampled_from([0, 0, 0.3, 1])),
        min_size=1,
        max_size=12,
    ),
    target=st.floats(0.01, 0.9),
    room=st.floats(0, 1),
)
def test_counts_have_the_exact_total_and_keep_the_bounds(
    layers: list[tuple[float, int, float]], target: float, room: float
) -> None:
    wanted = {str(i): s for i, (s, _, _) in enumerate(layers)}
    sizes = {str(i): n for i, (_, n, _) in enumerate(layers)}
    least = {str(i): int(own * n) for i, (_, n, own) in enumerate(layers)}
    target = max(target, sum(least.values()) / sum(sizes.values()) + 1e-9)
    ceiling = target + room * (1 - target)
    bounds = Bounds(sizes, least, ceiling)
    counts = exact_counts(wanted, bounds, target).counts
    assert list(counts) == list(sizes)
    most = {n: max(int(ceiling * sizes[n]), least[n]) for n in sizes}
    assert all(least[n] <= counts[n] <= most[n] for n in sizes)
    total = min(math.floor(target * sum(sizes.values())), sum(most.values()))
    assert sum(counts.values()) == total
    # One common shift: a layer between the bounds lies where its neighbours' shift puts it.
    free = [n for n in sizes if least[n] + 1 < counts[n] < most[n] - 1]
    shifts = [counts[n] / sizes[n] - wanted[n] for n in free]
    errors = [2 / sizes[n] for n in free]
    for shift, error in zip(shifts, errors, strict=True):
        assert abs(shift - shifts[0]) <= error + errors[0] + 1e-9


def test_what_rounding_loses_goes_to_those_that_lost_most() -> None:
    sizes = {"a": 7, "b": 11, "c": 13}  # 0.45: 3.15, 4.95, 5.85, in all 13.95
    bounds = Bounds(sizes, dict.fromkeys(sizes, 0), 0.9)
    found = exact_counts(dict.fromkeys(sizes, 0.45), bounds, 0.45)
    assert found.counts == {"a": 3, "b": 5, "c": 5}
    assert found.notes == []


def test_clamped_layers_are_told_and_the_others_make_up_for_them() -> None:
    sizes = {"a": 1000, "b": 1000, "c": 2000}
    wanted = {"a": -0.2, "b": 1.3, "c": 0.45}
    found = exact_counts(wanted, Bounds(sizes, dict.fromkeys(sizes, 0), 0.8), 0.5)
    assert found.counts == {"a": 0, "b": 800, "c": 1200}
    assert "2 of 3 layers were held at a sparsity of 0 or of 0.8" in found.notes[0]
    found = exact_counts(wanted, Bounds(sizes, {"a": 300, "b": 900, "c": 0}, 0.8), 0.5)
    assert found.counts == {"a": 300, "b": 900, "c": 800}
    assert "2 of 3 layers were held at the sparsity of their own zeros or of 0.8" in found.notes[0]


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
@pytest.mark.parametrize("family", ["LlamaConfig", "GPT2Config", "Qwen3MoeConfig"])
def test_every_allocation_has_the_exact_total(
    bench_of: Callable[..., Workbench], name: str, family: str
) -> None:
    bench = bench_of(family, target=0.37)
    options = SMALL if name == "evolutionary" else {"trials": 2} if name == "atp" else {}
    dense = {n: p.clone() for n, p in bench.loaded.model.named_parameters()}
    found = allot(bench, name, **options)
    sizes = {n: ly.numel for n, ly in bench.loaded.layers.items()}
    assert found.counts.keys() == sizes.keys()
    if name == "uniform":
        assert found.counts == {n: math.floor(0.37 * size) for n, size in sizes.items()}
        assert found.notes == []
    else:
        assert sum(found.counts.values()) == math.floor(0.37 * sum(sizes.values()))
        assert found.notes
        assert len({found.counts[n] / sizes[n] for n in sizes}) > 1
    assert all(0 <= found.counts[n] <= 0.9 * sizes[n] for n in sizes)
    bench.sync(DENSE)
    assert all(torch.equal(p, dense[n]) for n, p in bench.loaded.model.named_parameters())


# --- OWL -------------------------------------------------------------------------------------


def test_owl_by_the_paper() -> None:
    ratios, sizes = {0: 4.0, 1: 1.0, 2: 2.5}, {0: 10, 1: 10, 2: 10}
    found = owl_sparsities(ratios, sizes, 0.7, 0.08)
    # r = 0.16, 0, 0.08; mean 0.08.
    assert [found[b] for b in range(3)] == pytest.approx([0.62, 0.78, 0.70])
    uneven = owl_sparsities(ratios, {0: 30, 1: 10, 2: 10}, 0.7, 0.08)
    assert sum(uneven[b] * n for b, n in ((0, 30), (1, 10), (2, 10))) / 50 == pytest.approx(0.7)
    assert set(owl_sparsities({0: 2.0, 1: 2.0}, {0: 1, 1: 1}, 0.4, 0.08).values()) == {0.4}


@pytest.mark.parametrize("family", ["LlamaConfig", "GPT2Config", "Qwen3MoeConfig"])
def test_owl_on_a_model(bench_of: Callable[..., Workbench], family: str) -> None:
    bench = bench_of(family, criterion="magnitude")
    found = allot(bench, "owl", lam=0.1, m=3)
    scores = dense_scores(bench)
    ratios = []
    for block in range(2):
        names = [n for n, ly in bench.loaded.layers.items() if ly.block == block]
        whole = torch.cat([part.reshape(-1) for n in names for part in scores[n]])
        ratios.append(100 * float((whole > 3 * whole.mean()).double().mean()))
    # Two blocks of one size: the one with fewer outliers is at target + lam.
    less = min((0, 1), key=lambda b: ratios[b])
    for name, layer in bench.loaded.layers.items():
        wanted = 0.4 if layer.block == less else 0.2
        assert abs(found.counts[name] - wanted * layer.numel) <= 1, name
    assert f"{min(ratios):.3f} % of block {less}'s" in found.notes[0]
    assert bench.tokens["calibration"] == 4 * 48
    assert bench.tokens["gradient"] == bench.tokens["allocation"] == 0


# --- AlphaPruning ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (8, 8)])
def test_the_hill_exponent_by_its_sum(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    gram = matrix.double() @ matrix.double().T if shape[0] < shape[1] else (
        matrix.double().T @ matrix.double()
    )  # fmt: skip
    e = sorted(float(v) for v in torch.linalg.eigvalsh(gram))
    k = len(e) // 2
    n = len(e) - k
    expected = 1 + n / (sum(math.log(v) for v in e[k:]) - n * math.log(e[k]))
    assert hill_exponent(matrix) == pytest.approx(expected, rel=1e-4)


def test_a_flat_spectrum_has_no_exponent() -> None:
    assert hill_exponent(torch.zeros(4, 4)) is None


def test_alphapruning_by_the_paper() -> None:
    alphas, sizes = {0: 2.0, 1: 6.0, 2: 4.0}, {0: 10, 1: 20, 2: 10}
    found = alpha_sparsities(alphas, sizes, 0.45, 0.3)
    # r = 0.7, 1.3, 1.0; sum P r = 43.
    assert [found[b] for b in range(3)] == pytest.approx(
        [0.7 * 0.45 * 40 / 43, 1.3 * 0.45 * 40 / 43, 0.45 * 40 / 43]
    )
    assert alpha_sparsities({0: 3.0, 1: 3.0}, {0: 1, 1: 2}, 0.4, 0.3) == {0: 0.4, 1: 0.4}


@pytest.mark.parametrize(("criterion", "eps"), [("wanda", 0.3), ("magnitude", 0.5)])
def test_alphapruning_on_a_model(
    bench_of: Callable[..., Workbench], criterion: str, eps: float
) -> None:
    bench = bench_of("Qwen3MoeConfig", criterion=criterion)
    found = allot(bench, "alphapruning")
    means = []
    for block in range(2):
        exponents: list[float | None] = []
        for layer in bench.loaded.layers.values():
            if layer.block == block:
                dense = bench.loaded.dense(layer)
                matrices = list(dense) if dense.ndim == 3 else [dense]
                exponents += [hill_exponent(m) for m in matrices]
        values = [e for e in exponents if e is not None]
        assert len(values) == len(exponents)
        means.append(sum(values) / len(values))
    larger = max((0, 1), key=lambda b: means[b])
    for name, layer in bench.loaded.layers.items():
        factor = 1 + eps if layer.block == larger else 1 - eps
        assert abs(found.counts[name] - 0.3 * factor * layer.numel) <= 1, name
    assert not any(bench.tokens.values())


# --- ATP -------------------------------------------------------------------------------------


def test_atp_by_the_paper() -> None:
    found = atp_sparsities(5, 0.5, 0.1)
    assert found == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert atp_sparsities(4, 0.45, largest_beta(4, 0.45))[0] == pytest.approx(0)
    assert atp_sparsities(4, 0.7, largest_beta(4, 0.7))[-1] == pytest.approx(1)


def test_atp_takes_the_trial_with_the_lowest_guard_perplexity(
    bench_of: Callable[..., Workbench],
) -> None:
    bench = bench_of()
    found = allot(bench, "atp", trials=3)
    assert bench.tokens["allocation"] == 3 * 3 * 48
    assert bench.tokens["guard"] == bench.tokens["probe"] == 0
    values = []
    for beta in (0.0, 0.15, 0.3):  # two blocks at 0.3: the largest legal difference is 0.6
        given = allot(bench, "atp", beta=beta)
        for name, layer in bench.loaded.layers.items():
            wanted = 0.3 + beta * (layer.block - 0.5)
            assert abs(given.counts[name] - wanted * layer.numel) <= 1
        revision = bench.prune(DENSE, DENSE, given.counts)
        values.append((perplexity(bench.guard_losses(revision)), given.counts))
    assert found.counts == min(values, key=lambda v: v[0])[1]
    for value, _ in values:
        assert f"{value:.3f}" in found.notes[0]


# --- greedy ----------------------------------------------------------------------------------


def test_greedy_has_the_lowest_predicted_total(bench_of: Callable[..., Workbench]) -> None:
    """No exchange of a slice between two layers lowers what single weights add up to."""
    bench = bench_of(target=0.4)
    found = allot(bench, "greedy")
    inputs = measure_activations(bench.loaded, bench.windows.calibration).input_square
    outputs = measure_gradients(
        bench.loaded, Head(bench.loaded.model), bench.windows.calibration[:2]
    ).gradient_square
    prices: dict[str, list[float]] = {}
    for name, layer in bench.loaded.layers.items():
        weight = bench.loaded.dense(layer).double()
        x, d = inputs[name].double(), outputs[name].double()
        d = (d + d.mean()) / 2
        saliency = 0.5 * weight.square() * x * d.unsqueeze(1)
        order = (weight.abs() * x.sqrt()).argsort(dim=1)
        sorted_rows = saliency.gather(1, order).cumsum(dim=1).sum(dim=0)
        levels = [0.025 * i for i in range(37)]
        columns = [round(level * layer.shape[1]) for level in levels]
        losses = [float(sorted_rows[c - 1]) if c else 0.0 for c in columns]
        costs = [0.0, *crowded_costs(levels, losses, 0.4, 2.0)]
        prices[name] = [
            (costs[i + 1] - costs[i]) / (0.025 * layer.numel) for i in range(len(levels) - 1)
        ]
    highest = {n: [max(p[: i + 1]) for i in range(len(p))] for n, p in prices.items()}
    sizes = {n: ly.numel for n, ly in bench.loaded.layers.items()}
    taken = {n: found.counts[n] / sizes[n] / 0.025 for n in sizes}
    last = max(highest[n][math.ceil(taken[n] - 0.5) - 1] for n in sizes if taken[n] > 0.5)
    rest = min(highest[n][int(taken[n] + 0.5)] for n in sizes if taken[n] < 35.4)
    assert last <= rest * (1 + 1e-6)


# --- global ----------------------------------------------------------------------------------


@given(
    layers=st.lists(
        st.lists(st.sampled_from([0.0, 1e-30, 0.5, 0.50000006, 1.0, 3.0, 3e7]), max_size=30),
        min_size=1,
        max_size=5,
    ),
    part=st.floats(0, 1),
    bound=st.floats(0, 1),
)
def test_the_lowest_of_all_layers_with_bounds(
    layers: list[list[float]], part: float, bound: float
) -> None:
    caps = {str(i): math.ceil(bound * len(v)) for i, v in enumerate(layers)}
    total = int(part * sum(caps.values()))
    scores = {str(i): (lambda v=v: [torch.tensor(v)]) for i, v in enumerate(layers)}
    found = lowest_counts(scores, caps, total)
    expected = dict.fromkeys(caps, 0)
    everything = sorted((value, i) for i, values in enumerate(layers) for value in values)
    for _, i in everything:
        if sum(expected.values()) < total and expected[str(i)] < caps[str(i)]:
            expected[str(i)] += 1
    assert found == expected


def test_global_masks_are_those_of_one_ranking(bench_of: Callable[..., Workbench]) -> None:
    bench = bench_of(criterion="fisher", max_layer_sparsity=1.0)
    bench.sync(bench.prune(DENSE, DENSE, allot(bench, "global").counts))
    activations, gradients = bench.activations(DENSE), bench.gradients(DENSE)
    gone, kept = [], []
    for name, layer in bench.loaded.layers.items():
        zero = bench.loaded.weight(layer) == 0
        d = gradients.gradient_square[name]
        saliency = (
            bench.loaded.dense(layer).square()
            * activations.input_square[name]
            * (d + d.mean()).unsqueeze(1)
        )
        gone.append(saliency[zero].max())
        kept.append(saliency[~zero].min())
    assert float(max(gone)) <= float(min(kept)) * (1 + 1e-5)
    assert bench.sparsity() == math.floor(0.3 * bench.loaded.prunable) / bench.loaded.prunable


# --- evolutionary ----------------------------------------------------------------------------


def quadratic(counts: Mapping[str, int], index: int | None) -> float:
    """Least where the layers' counts are 30, 90, 60 ...; a window sees it with its own noise."""
    best = {"a": 30, "b": 90, "c": 60, "d": 20}
    noise = 0.0 if index is None else (hash((index, *counts.values())) % 100) / 10
    return sum((counts[n] - best[n]) ** 2 for n in best) + noise


def searched(seed: int = 0, rounds: int = 60, **values: Any) -> Any:
    start = dict.fromkeys("abcd", 50)
    bounds = Bounds(dict.fromkeys("abcd", 100), dict.fromkeys("abcd", 0), 1.0)
    shape = {"offspring": 8, "survivors": 2, "swaps": 3} | values
    return search(start, bounds, 5, quadratic, random.Random(seed), rounds, 4, **shape)


def test_the_search_finds_the_least_and_keeps_the_total() -> None:
    found = searched()
    assert found.counts == {"a": 30, "b": 90, "c": 60, "d": 20}
    assert (found.first, found.last, found.generations) == (
        quadratic(dict.fromkeys("abcd", 50), None),
        0.0,
        60,
    )
    assert searched(rounds=3) == searched(rounds=3)
    assert searched(rounds=3).counts != searched(seed=1, rounds=3).counts


@pytest.mark.parametrize("seed", range(5))
def test_no_generation_is_worse_than_the_one_before(seed: int) -> None:
    last = [searched(seed, rounds).last for rounds in range(1, 8)]
    assert last == sorted(last, reverse=True)
    for rounds in range(1, 8):
        counts = searched(seed, rounds).counts
        assert sum(counts.values()) == 200
        assert all(0 <= count <= 100 for count in counts.values())


def test_the_divergence_is_the_naive_sum(bench_of: Callable[..., Workbench]) -> None:
    head = bench_of("Gemma2Config").head
    generator = torch.Generator().manual_seed(3)
    one, other = (torch.randn(300, 32, generator=generator) for _ in range(2))
    p, q = (functional.softmax(head(part).double(), dim=-1) for part in (one, other))
    expected = float((p * (p.log() - q.log())).sum(dim=-1).mean())
    assert divergence(head, one, other) == pytest.approx(expected, rel=1e-4)
    assert divergence(head, one, one) == 0


@pytest.mark.parametrize("criterion", ["wanda", "fisher"])
def test_evolutionary_lowers_the_divergence_on_its_windows(
    bench_of: Callable[..., Workbench], criterion: str
) -> None:
    bench = bench_of(criterion=criterion)
    options = SMALL | {"tokens": 6_000, "level": 0.1}
    found = allot(bench, "evolutionary", **options)
    assert 0 < bench.tokens["allocation"] <= 6_000
    assert f"{bench.tokens['allocation']:,} tokens" in found.notes[0]
    assert bench.tokens["guard"] == bench.tokens["test"] == 0

    def measured(counts: dict[str, int]) -> float:
        windows = bench.windows.calibration[:2]
        model = bench.loaded.model
        with torch.no_grad():
            bench.sync(DENSE)
            dense = model(input_ids=windows).logits.double().log_softmax(-1)
            bench.sync(bench.prune(DENSE, DENSE, counts))
            pruned = model(input_ids=windows).logits.double().log_softmax(-1)
        bench.sync(DENSE)
        return float((dense.exp() * (dense - pruned)).sum(-1).mean())

    start = dict.fromkeys(bench.loaded.layers, 0.3)
    before = measured(layer_counts(bench, start).counts)
    after = measured(found.counts)
    assert after < before
    assert f"{before:.4f} to {after:.4f} nats" in found.notes[0]
    assert allot(bench_of(criterion=criterion), "evolutionary", **options) == found


def test_too_few_tokens_for_a_generation(bench_of: Callable[..., Workbench]) -> None:
    bench = bench_of()
    with pytest.raises(InputError, match="takes 448 tokens with the start"):
        allot(bench, "evolutionary", **(SMALL | {"tokens": 447}))
    assert not any(bench.tokens.values())
    assert allot(bench, "evolutionary", **(SMALL | {"tokens": 448})).counts
    assert bench.tokens["allocation"] == 448


# --- as a user meets them --------------------------------------------------------------------


def test_a_baseline_tells_its_allocation(pico_config: dict[str, Any], tmp_path: Path) -> None:
    options = {"trials": "2"}  # as --set gives it
    config = pico_config | {"allocation": "atp", "allocation_options": options}
    metrics = baseline(config, out=tmp_path / "atp").metrics
    assert metrics.method["allocation"] == "atp"
    assert json.loads(metrics.method["allocation_options"]) == options
    assert metrics.tokens["allocation"] == 2 * 3 * 48
    assert metrics.tokens["calibration"] == 4 * 48
    assert metrics.tokens["guard"] == 2 * 3 * 48
    assert metrics.seconds["allocation"] > 0
    (line,) = (tmp_path / "atp" / "trace.jsonl").read_text().splitlines()
    assert "ATP, beta" in json.loads(line)["notes"][0]
    assert "allocation atp" in (tmp_path / "atp" / "model" / "README.md").read_text()
    # A second one in this process counts its own statistics.
    again = baseline(config, out=tmp_path / "again").metrics
    assert (again.tokens, again.revision) == (metrics.tokens, metrics.revision)


def zeros_of(directory: Path) -> dict[str, int]:
    loaded = load_model(str(directory / "model"), dtype="float32", device="cpu")
    return {n: int((loaded.weight(ly) == 0).sum()) for n, ly in loaded.layers.items()}


def test_the_allocation_of_another_run(
    pico_config: dict[str, Any], pico_models: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "greedy"
    run(pico_config | {"guard": {"max_increase": 1e9}}, out=source)
    config = pico_config | {"allocation": f"from:{source}", "criterion": "magnitude"}
    metrics = baseline(config, out=tmp_path / "again").metrics
    counts = zeros_of(source)
    assert len({counts[n] for n in counts}) > 2
    assert zeros_of(tmp_path / "again") == counts
    assert metrics.method["allocation"] == f"from:{source}"
    # And of a baseline, with its own.
    second = baseline(config | {"allocation": f"from:{tmp_path / 'again'}"}, out=tmp_path / "third")
    assert second.metrics.revision == metrics.revision

    for changes, words in (
        ({"target": 0.4}, r"ended at a sparsity of 0\.\d{4}.* --target 0\.\d{4}"),
        ({"model": str(pico_models("GPT2Config"))}, "another model"),
        ({"allocation_options": {"lam": 1}}, "takes no options, and allocation_options has lam"),
        ({"allocation": "from:"}, "names no run directory"),
        ({"allocation": f"from:{tmp_path / 'nowhere'}"}, "is not a run directory"),
    ):
        with pytest.raises(InputError, match=words):
            baseline(config | changes, out=tmp_path / "refused")
        assert not (tmp_path / "refused").exists()


def test_an_unfinished_run_has_no_final_allocation(
    pico_config: dict[str, Any], tmp_path: Path
) -> None:
    run(pico_config | {"max_steps": 1}, out=tmp_path / "source")
    (tmp_path / "source" / "metrics.json").unlink()
    with pytest.raises(InputError, match="is not finished"):
        baseline(pico_config | {"allocation": f"from:{tmp_path / 'source'}"}, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"allocation": "owls"}, "unknown allocation 'owls'; did you mean owl?"),
        ({"allocation": "zzz"}, "unknown allocation 'zzz'; known: uniform, owl"),
        (
            {"allocation": "owl", "allocation_options": {"lamb": 0.1}},
            "allocation_options of owl: unknown key lamb; did you mean lam?",
        ),
        (
            {"allocation": "owl", "allocation_options": {"lam": "x"}},
            "allocation_options of owl: lam",
        ),
        ({"allocation_options": {"lam": 0.1}}, "the allocation uniform takes no options"),
        ({"allocation": "owl", "pattern": "2:4"}, "pattern 2:4 fixes each layer's sparsity"),
    ],
)
def test_what_cannot_be_allocated_is_refused_at_once(
    changes: dict[str, Any], words: str, pico_config: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        baseline(pico_config | changes, out=tmp_path / "run")
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["allocation", "allocation_options"])
def test_a_run_leaves_the_allocation_to_its_agent(
    key: str, pico_config: dict[str, Any], tmp_path: Path
) -> None:
    values = {"allocation": "owl", "allocation_options": {"lam": 0.1}}
    with pytest.raises(InputError, match="is for `prunewright baseline`"):
        run(pico_config | {key: values[key]}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
