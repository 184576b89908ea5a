"""Statistics against naive references: forward hooks, full logits, loops."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prunewright.state import InputError
from prunewright.state.profile import COST_DELTAS, ModelProfile
from prunewright.tools.calibration import gradients as gradients_module
from prunewright.tools.calibration import sample
from prunewright.tools.calibration.activations import measure_activations
from prunewright.tools.calibration.costs import (
    predict_each,
    predict_losses,
    predict_pattern_loss,
)
from prunewright.tools.calibration.gradients import Gradients, measure_gradients
from prunewright.tools.calibration.profile import build_profile
from prunewright.tools.calibration.sample import even_spread, salience_percentile
from prunewright.tools.criteria import LayerStatistics, fisher, prune_mask
from prunewright.tools.model.head import Head
from prunewright.tools.model.layers import find_layers
from prunewright.tools.model.loading import LoadedModel, load_model
from prunewright.tools.signals import z_scores

Load = Callable[..., LoadedModel]


class Reference:
    """Inputs and output gradients of every layer of a model, taken the ordinary way.

    Modules are watched with forward hooks; the experts' forward is replaced by a plain loop.
    Loss: the model's own full logits.
    """

    def __init__(self, loaded: LoadedModel, windows: Tensor, scored: Tensor | None = None) -> None:
        if scored is None:
            scored = torch.ones(len(windows), windows.shape[1] - 1, dtype=torch.bool)
        self.tokens = {name: self._zeros(loaded, name) for name in loaded.layers}
        self.inputs = {name: [0.0] * len(n) for name, n in self.tokens.items()}
        self.outputs = {name: [0.0] * len(n) for name, n in self.tokens.items()}
        self.g = dict.fromkeys(loaded.layers, 0.0)
        self._products: list[tuple[str, int, Tensor, Tensor]] = []
        model = loaded.model
        undo: list[Callable[[], Any]] = []
        for name, layer in loaded.layers.items():
            if len(layer.shape) == 2:
                module = model.get_submodule(name)
                undo.append(module.register_forward_hook(self._hook(name)).remove)
            elif name.endswith("down_proj"):
                module = model.get_submodule(name.rpartition(".")[0])
                module.forward = self._experts(module, name.rpartition(".")[0])
                undo.append(lambda module=module: delattr(module, "forward"))  # type: ignore[misc]
        parameters = {n: model.get_parameter(ly.parameter) for n, ly in loaded.layers.items()}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for window, some in zip(windows, scored, strict=True):
            self._window(model, window, some, parameters)
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        for act in undo:
            act()
        self.g = {name: value / len(windows) for name, value in self.g.items()}
        total = len(windows) * (windows.shape[1] - 1)
        self.gradient_square = {
            name: torch.stack([torch.as_tensor(v) / total for v in values])
            for name, values in self.outputs.items()
            if all(self.tokens[name])
        }

    @staticmethod
    def _zeros(loaded: LoadedModel, name: str) -> list[int]:
        shape = loaded.layers[name].shape
        return [0] * (shape[0] if len(shape) == 3 else 1)

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], outputs: Tensor) -> None:
            outputs.retain_grad()
            self._products.append((name, 0, args[0].detach(), outputs))

        return hook

    def _experts(self, module: Any, path: str) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            result = torch.zeros_like(hidden)
            for e in range(module.gate_up_proj.shape[0]):
                token, choice = (index == e).nonzero(as_tuple=True)
                if len(token) == 0:
                    continue
                x = hidden[token]
                both = x @ module.gate_up_proj[e].T
                half = both.shape[-1] // 2
                middle = module.act_fn(both[:, :half]) * both[:, half:]
                out = middle @ module.down_proj[e].T
                both.retain_grad()
                out.retain_grad()
                self._products.append((f"{path}.gate_up_proj", e, x.detach(), both))
                self._products.append((f"{path}.down_proj", e, middle.detach(), out))
                result = result.index_add(0, token, out * weights[token, choice, None])
            return result

        return forward

    def _window(
        self, model: Any, window: Tensor, some: Tensor, parameters: dict[str, nn.Parameter]
    ) -> None:
        self._products.clear()
        logits = model(input_ids=window.unsqueeze(0), use_cache=False).logits[0, :-1].float()
        functional.cross_entropy(logits[some], window[1:][some]).backward()
        # The squares of the summed loss, for each token that it is of.
        scale = math.sqrt(int(some.sum()) * len(some))
        for name, expert, inputs, outputs in self._products:
            assert outputs.grad is not None
            rows = inputs.reshape(-1, inputs.shape[-1]).double()
            d = outputs.grad.reshape(-1, outputs.shape[-1]).double() * scale
            self.inputs[name][expert] = self.inputs[name][expert] + rows.square().sum(0)
            self.outputs[name][expert] = self.outputs[name][expert] + d.square().sum(0)
            self.tokens[name][expert] += len(rows)
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            self.g[name] += float(parameter.grad[parameter.data != 0].abs().double().mean())
            parameter.grad = None


def squeezed(values: Tensor, like: Tensor) -> Tensor:
    return values.float().reshape(like.shape)


def close(one: Tensor, other: Tensor, relative: float = 1e-3) -> None:
    torch.testing.assert_close(one, other, rtol=relative, atol=relative * float(other.abs().max()))


def prune_some(loaded: LoadedModel) -> None:
    """Zero a third of every layer, so that active and pruned weights differ."""
    for layer in loaded.layers.values():
        weight = loaded.weight(layer)
        weight[weight.abs() < weight.abs().float().quantile(0.33)] = 0


def by_tokens(sums: list[Any], tokens: list[int]) -> Tensor:
    """Mean squares [experts, inputs]; up to 32 tokens are those of all experts, on the average."""
    like = sum(sums) / sum(tokens)
    lacking = [max(0, 32 - count) for count in tokens]
    return torch.stack(
        [(s + m * like) / (n + m) for s, n, m in zip(sums, tokens, lacking, strict=True)]
    )


def test_activations_are_mean_squares_of_the_inputs(
    load: Load, family: str, windows: Tensor
) -> None:
    loaded = load(family)
    reference = Reference(loaded, windows)
    measured = measure_activations(loaded, windows)
    assert set(measured.input_square) == set(loaded.layers)
    for name, values in measured.input_square.items():
        assert values.dtype == torch.float32
        close(values, squeezed(by_tokens(reference.inputs[name], reference.tokens[name]), values))
    scarce = any(count < 32 for counts in reference.tokens.values() for count in counts)
    assert bool(measured.notes) == scarce


def test_experts_of_a_batched_product_count_the_tokens_that_are_routed_to_them(
    load: Load, windows: Tensor
) -> None:
    """Llama 4 gives each expert all tokens, those of the others as zeros."""
    loaded = load("Llama4TextConfig")
    found: list[Tensor] = []
    moe = loaded.model.get_submodule("model.layers.1.feed_forward")
    with torch.no_grad(), moe.register_forward_pre_hook(lambda _, args: found.append(args[0])):
        for window in windows:
            loaded.model(input_ids=window.unsqueeze(0))
    hidden = torch.cat(found, dim=1)[0]
    logits = hidden @ loaded.model.get_parameter("model.layers.1.feed_forward.router.weight").T
    chosen = logits.argmax(dim=1)
    routed = [(hidden * logits.sigmoid()[:, e : e + 1])[chosen == e].square() for e in range(4)]
    values = measure_activations(loaded, windows).input_square
    expected = by_tokens([x.sum(0) for x in routed], [len(x) for x in routed])
    close(values["model.layers.1.feed_forward.experts.gate_up_proj"], expected)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_are_those_of_the_full_logits_loss(
    load: Load, family: str, windows: Tensor, checkpointing: bool
) -> None:
    loaded = load(family)
    prune_some(loaded)
    reference = Reference(loaded, windows)
    measured = measure_gradients(loaded, Head(loaded.model), windows, checkpointing=checkpointing)
    for name in loaded.layers:
        assert measured.mean_absolute[name] == pytest.approx(reference.g[name], rel=1e-3)
        values = measured.gradient_square[name]
        close(values, squeezed(reference.gradient_square[name], values))


DOMAINS = ("code", "facts", "code")
"""Of three windows; of the one of ``facts`` some tokens are scored."""


@pytest.fixture
def scored() -> Tensor:
    marks = torch.ones(3, 39, dtype=torch.bool)
    marks[1] = torch.arange(39) % 5 == 3
    return marks


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("family", ["LlamaConfig", "MixtralConfig"])
def test_gradients_of_domains_are_those_of_their_windows_alone(
    load: Load, family: str, windows: Tensor, scored: Tensor, exact: bool
) -> None:
    loaded = load(family)
    head = Head(loaded.model)
    head.exact = exact
    weights = {"code": 1.0, "facts": 3.0}
    measured = measure_gradients(
        loaded, head, windows, scored=scored, domains=DOMAINS, weights=weights, by_weight=True
    )
    parts = {"code": [0, 2], "facts": [1]}
    alone = {name: Reference(loaded, windows[at], scored[at]) for name, at in parts.items()}
    assert set(measured.domains) == set(parts)
    for name in loaded.layers:
        whole = torch.zeros(())
        for domain, reference in alone.items():
            values = measured.domains[domain][name]
            if name in reference.gradient_square:  # else an expert saw nothing
                expected = squeezed(reference.gradient_square[name], values)
                # What nothing reached has the mean of its like.
                close(values[expected != 0], expected[expected != 0])
            whole = whole + weights[domain] / 4 * values
        close(measured.gradient_square[name], whole, 1e-5)
        g = sum(weights[domain] / 4 * reference.g[name] for domain, reference in alone.items())
        assert measured.mean_absolute[name] == pytest.approx(g, rel=1e-3)
    one = measure_gradients(loaded, head, windows[1:2], scored=scored[1:2], by_weight=True)
    two = measure_gradients(loaded, head, windows[[0, 2]], by_weight=True)
    for name, values in measured.weight_gradient_square.items():
        mean = 0.75 * one.weight_gradient_square[name] + 0.25 * two.weight_gradient_square[name]
        close(values, mean, 1e-4)


def test_block_by_block_the_domains_are_told_apart_likewise(
    load: Load, pico_models: Callable[..., Path], windows: Tensor, scored: Tensor
) -> None:
    whole = load()
    blocks = load_model(str(pico_models()), dtype="float32", device="cpu", offload="cpu")
    try:
        found = [
            (
                measure_gradients(one, Head(one.model), windows, scored=scored, domains=DOMAINS),
                one.execution.window_losses(Head(one.model), windows, scored=scored),
            )
            for one in (whole, blocks)
        ]
    finally:
        blocks.close()
    (measured, losses), (apart, other) = found
    assert other == pytest.approx(losses, rel=1e-5)
    for name in whole.layers:
        assert apart.mean_absolute[name] == pytest.approx(measured.mean_absolute[name], rel=1e-4)
        for domain in measured.domains:
            close(apart.domains[domain][name], measured.domains[domain][name], 1e-4)


def test_losses_are_means_over_the_scored_tokens(
    load: Load, windows: Tensor, scored: Tensor
) -> None:
    loaded = load()
    losses = loaded.execution.window_losses(Head(loaded.model), windows, scored=scored)
    for window, some, loss in zip(windows, scored, losses, strict=True):
        with torch.no_grad():
            logits = loaded.model(input_ids=window.unsqueeze(0)).logits[0, :-1]
        expected = functional.cross_entropy(logits[some], window[1:][some])
        assert loss == pytest.approx(float(expected), rel=1e-5)


def test_pieces_of_a_window_make_no_difference(
    load: Load, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load()
    head = Head(loaded.model)
    whole = measure_gradients(loaded, head, windows)
    monkeypatch.setattr(gradients_module, "TOKENS_AT_ONCE", 7)
    pieces = measure_gradients(loaded, head, windows)
    for name in loaded.layers:
        close(pieces.gradient_square[name], whole.gradient_square[name], 1e-4)
        assert pieces.mean_absolute[name] == pytest.approx(whole.mean_absolute[name], rel=1e-4)


def test_a_head_that_is_not_exact_gives_the_same_gradients(load: Load, windows: Tensor) -> None:
    loaded = load("Gemma2Config")
    head = Head(loaded.model)
    fast = measure_gradients(loaded, head, windows)
    head.exact = False
    slow = measure_gradients(loaded, head, windows)
    for name in loaded.layers:
        close(fast.gradient_square[name], slow.gradient_square[name], 1e-4)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_measuring_leaves_the_model_as_it_was(
    load: Load, family: str, windows: Tensor, checkpointing: bool
) -> None:
    loaded = load(family)
    weights = {n: p.clone() for n, p in loaded.model.named_parameters()}
    own = {n: sorted(vars(m)) for n, m in loaded.model.named_modules()}
    measure_activations(loaded, windows)
    measure_gradients(loaded, Head(loaded.model), windows, checkpointing=checkpointing)
    assert not loaded.model.training
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks
    for name, module in loaded.model.named_modules():
        assert sorted(vars(module)) == own[name]
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_failure_leaves_the_model_as_it_was(load: Load, windows: Tensor) -> None:
    loaded = load()
    block = loaded.model.get_submodule("model.layers.1")
    forward = block.forward
    replaced = lambda *a, **k: forward(*a, **k)  # noqa: E731  # as accelerate replaces it
    block.forward = replaced

    def stop(label: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_gradients(loaded, Head(loaded.model), windows, progress=stop)
    assert block.forward is replaced
    assert "forward" not in vars(loaded.model.get_submodule("model.layers.0"))
    for parameter in loaded.model.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_statistics_are_those_of_the_weights_as_they_are(load: Load, windows: Tensor) -> None:
    loaded = load()
    before = measure_activations(loaded, windows)
    prune_some(loaded)
    after = measure_activations(loaded, windows)
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    assert torch.equal(before.input_square[first], after.input_square[first])
    assert not torch.allclose(before.input_square[last], after.input_square[last], rtol=1e-2)


@pytest.mark.parametrize("left", [0, 10])
@pytest.mark.parametrize("family", ["MixtralConfig", "Qwen3MoeConfig"])
def test_the_mean_of_its_like_stands_in_for_the_tokens_that_an_expert_lacks(
    load: Load, family: str, windows: Tensor, left: int
) -> None:
    loaded = load(family)
    experts = loaded.model.get_submodule("model.layers.1.mlp.experts")
    forward = experts.forward
    sums, counts = torch.zeros(4, 32), torch.zeros(4, dtype=torch.int64)

    def closed(hidden: Tensor, index: Tensor, weights: Tensor) -> Any:
        surplus = (index == 2).flatten().cumsum(0).view_as(index) + counts[2] > left
        index = torch.where((index == 2) & surplus, 3, index)
        for expert in range(4):
            inputs = hidden[(index == expert).nonzero()[:, 0]].detach()
            sums[expert] += inputs.square().sum(dim=0)
            counts[expert] += len(inputs)
        return forward(hidden, index, weights)

    experts.forward = closed
    activations = measure_activations(loaded, windows)
    assert counts[2] == left
    tokens = counts.tolist()
    values = activations.input_square["model.layers.1.mlp.experts.gate_up_proj"]
    close(values, by_tokens(list(sums), tokens), 1e-5)
    both = "{0} of 4 in model.layers.1.mlp.experts.gate_up_proj, {0} of 4 in "
    both += "model.layers.1.mlp.experts.down_proj"
    few = sum(0 < count < 32 for count in tokens)
    scarce = " saw fewer than 32 calibration tokens: the mean of their like stands in for the "
    assert few == 0 or any(f"{both.format(few)}{scarce}" in note for note in activations.notes)
    none = " saw no calibration token and count as the mean of their like"
    assert (both.format(1) + none in activations.notes) == (left == 0)
    if left:
        return
    counts[2] = 0
    gradients = measure_gradients(loaded, Head(loaded.model), windows)
    words = " got no gradient and count as the mean of their like"
    assert gradients.notes == [both.format(1) + words]
    for projection in ("gate_up_proj", "down_proj"):
        values = gradients.gradient_square[f"model.layers.1.mlp.experts.{projection}"]
        close(values[2], (values[0] + values[1] + values[3]) / 3, 1e-5)
        assert float(values[2].max()) > 0


def test_an_expert_that_is_a_module_of_its_own_gets_the_mean_of_its_like(
    load: Load, windows: Tensor
) -> None:
    loaded = load()
    skipped = loaded.model.get_submodule("model.layers.0.self_attn.k_proj")
    skipped.forward = lambda x: x[..., :16] * 0.5  # its weights take part in no product
    with pytest.raises(InputError, match=r"0\.self_attn\.k_proj took part in no product"):
        measure_activations(loaded, windows)

    class Experts(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.experts = nn.ModuleList(
                nn.ModuleDict({"up_proj": nn.Linear(32, 32)}) for _ in range(3)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[0]["up_proj"](x) + self.experts[2]["up_proj"](2 * x)  # type: ignore[index,no-any-return]

    loaded = load()
    block = loaded.model.get_submodule("model.layers.0")
    block.mlp = Experts(block.mlp)
    block.requires_grad_(False)
    loaded = replace(loaded, layers=find_layers(loaded.model))
    activations = measure_activations(loaded, windows)
    names = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(3)]
    assert activations.notes == [
        f"{names[1]} saw no calibration token and count as the mean of their like"
    ]
    seen = [activations.input_square[n] for n in names]
    close(seen[1], (seen[0] + seen[2]) / 2, 1e-5)


def test_a_layer_without_a_gradient_counts_as_the_mean_of_its_like(
    load: Load, windows: Tensor
) -> None:
    loaded = load()
    for path in ("0.self_attn.k_proj", "0.mlp.gate_proj", "1.mlp.gate_proj"):
        module = loaded.model.get_submodule(f"model.layers.{path}")
        forward = module.forward
        module.forward = lambda x, forward=forward: forward(x).detach()
    gradients = measure_gradients(loaded, Head(loaded.model), windows)
    unknown = [f"model.layers.{b}.{p}" for b, p in ((0, "mlp.gate_proj"), (1, "mlp.gate_proj"))]
    first, second = (f"model.layers.{b}.self_attn.k_proj" for b in (0, 1))
    assert gradients.notes == [
        f"{', '.join([first, *unknown])} got no gradient and count as the mean of their like"
    ]
    g, squares = gradients.mean_absolute, gradients.gradient_square
    assert g[first] == pytest.approx(g[second])
    assert g[first] > 0
    close(squares[first], squares[second], 1e-6)
    known = [name for name in loaded.layers if name not in (first, *unknown)]
    mean = sum(float(squares[name].mean()) for name in known) / len(known)
    for name in unknown:
        assert g[name] == pytest.approx(sum(g[n] for n in known) / len(known))
        close(squares[name], torch.full((64,), mean), 1e-5)


def test_statistics_that_are_not_finite_are_refused(load: Load, windows: Tensor) -> None:
    loaded = load()
    head = Head(loaded.model)
    loaded.weight(loaded.layers["model.layers.0.mlp.up_proj"])[0, 0] = torch.inf
    with pytest.raises(InputError, match=r"inputs of model\.layers\..* are not finite"):
        measure_activations(loaded, windows)
    with pytest.raises(InputError, match=r"gradients of model\.layers\..* are not finite"):
        measure_gradients(loaded, head, windows)
    assert all(p.grad is None for p in loaded.model.parameters())


def test_z_scores_are_those_of_numpy() -> None:
    values = [0.5, 3.0, -2.0, 7.25, 0.0, 3.0]
    array = np.array(values)
    expected = (array - array.mean()) / array.std()
    assert z_scores(values) == pytest.approx(expected.tolist(), rel=1e-6)


def test_z_scores_do_not_depend_on_the_unit() -> None:
    values = [1.0, 2.0, 4.0]
    assert z_scores([v * 1e-12 for v in values]) == pytest.approx(z_scores(values))


@pytest.mark.parametrize(
    "values", [[], [3.0], [2.0, 2.0, 2.0], [0.0, 0.0], [1.0, math.inf], [1.0, math.nan]]
)
def test_z_scores_are_zero_where_nothing_can_be_compared(values: list[float]) -> None:
    assert z_scores(values) == pytest.approx([0.0] * len(values), abs=1e-6)


@pytest.mark.parametrize("zeros", [0, 13, 59])
def test_salience_is_the_tenth_percentile_of_the_active_weights(zeros: int) -> None:
    generator = torch.Generator().manual_seed(zeros)
    weight = torch.randn(6, 10, generator=generator)
    weight.view(-1)[torch.randperm(60, generator=generator)[:zeros]] = 0
    square = torch.rand(10, generator=generator)
    scores = [
        abs(w) * math.sqrt(x)
        for row in weight.tolist()
        for w, x in zip(row, square.tolist(), strict=True)
        if w != 0
    ]
    expected = float(np.percentile(scores, 10, method="lower"))
    assert salience_percentile(weight, square) == pytest.approx(expected, rel=1e-5)


def test_salience_of_experts_is_taken_over_all_of_them_and_of_nothing_is_zero() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 6, 10, generator=generator)
    square = torch.rand(3, 10, generator=generator)
    scores = (weight.abs() * square.sqrt().unsqueeze(1)).reshape(-1).numpy()
    expected = float(np.percentile(scores, 10, method="lower"))
    assert salience_percentile(weight, square) == pytest.approx(expected, rel=1e-5)
    assert salience_percentile(torch.zeros(4, 5), torch.ones(5)) == 0.0


PREDICTED = ["magnitude", "wanda", "fisher", "sparsegpt", "obs"]
"""Inside rows and layers, in the order of the saliency and not."""


def predicted_by_loops(
    weight: Tensor, statistics: LayerStatistics, criterion: str, level: float
) -> float:
    """The saliency of what the criterion's own mask removes, weight by weight."""
    assert statistics.gradient_square is not None
    d = statistics.gradient_square.tolist()
    mean = sum(d) / len(d)
    mask = prune_mask(weight, statistics, criterion, pruned=round(level * weight.numel()))  # type: ignore[arg-type]
    return sum(
        0.5 * w * w * x * (d[i] + fisher.DAMPING * mean) / (1 + fisher.DAMPING)
        for i, (row, gone) in enumerate(zip(weight.tolist(), mask.tolist(), strict=True))
        for w, x, g in zip(row, statistics.input_square.tolist(), gone, strict=True)
        if g
    )


def random_layer(rows: int, inputs: int, seed: int = 0) -> tuple[Tensor, LayerStatistics]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inputs, generator=generator), LayerStatistics(
        torch.rand(inputs, generator=generator) * 3, torch.rand(rows, generator=generator) ** 2
    )


@pytest.mark.parametrize("criterion", PREDICTED)
def test_predicted_losses_are_the_saliency_of_what_would_go(criterion: str) -> None:
    weight, statistics = random_layer(10, 20)
    levels = [0.0, 0.05, 0.3, 0.5, 0.95, 1.0]
    expected = [predicted_by_loops(weight, statistics, criterion, level) for level in levels]
    predicted = predict_losses(weight, statistics, criterion, levels)  # type: ignore[arg-type]
    assert predicted == pytest.approx(expected, rel=1e-4)
    assert predicted[0] == 0.0


@pytest.mark.parametrize("criterion", PREDICTED)
@pytest.mark.parametrize("pattern", [(2, 4), (4, 5), (1, 20)])
def test_the_predicted_loss_of_a_pattern_is_the_saliency_of_its_mask(
    criterion: str, pattern: tuple[int, int]
) -> None:
    weight, statistics = random_layer(10, 20)
    assert statistics.gradient_square is not None
    saliency = fisher.score(weight, statistics.input_square, statistics.gradient_square)
    mask = prune_mask(weight, statistics, criterion, pattern=pattern)  # type: ignore[arg-type]
    predicted = predict_pattern_loss(weight, statistics, criterion, pattern)  # type: ignore[arg-type]
    assert predicted == pytest.approx(float(saliency[mask].sum()), rel=1e-4)
    # Two experts that are alike cost twice as much; a sample of the rows tells the whole.
    both = LayerStatistics(
        torch.stack([statistics.input_square] * 2), torch.stack([statistics.gradient_square] * 2)
    )
    twice = predict_pattern_loss(torch.stack([weight] * 2), both, criterion, pattern)  # type: ignore[arg-type]
    assert twice == pytest.approx(2 * predicted, rel=1e-5)


def test_a_pattern_of_a_large_layer_is_estimated_from_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = random_layer(256, 64)
    whole = predict_pattern_loss(weight, statistics, "wanda", (2, 4))
    monkeypatch.setattr(sample, "SAMPLE", 64 * 64)
    assert predict_pattern_loss(weight, statistics, "wanda", (2, 4)) == pytest.approx(
        whole, rel=0.05
    )


@pytest.mark.parametrize("criterion", PREDICTED)
def test_predicted_losses_of_experts_add_up(criterion: str) -> None:
    layers = [random_layer(6, 10, seed) for seed in range(3)]
    fused = LayerStatistics(
        torch.stack([s.input_square for _, s in layers]),
        torch.stack([s.gradient_square for _, s in layers if s.gradient_square is not None]),
    )
    levels = [0.1, 0.4, 0.8]
    single = [predict_losses(w, s, criterion, levels) for w, s in layers]  # type: ignore[arg-type]
    together = predict_losses(torch.stack([w for w, _ in layers]), fused, criterion, levels)  # type: ignore[arg-type]
    assert together == pytest.approx([sum(v) for v in zip(*single, strict=True)], rel=1e-5)


@pytest.mark.parametrize("criterion", PREDICTED)
def test_other_losses_are_predicted_for_the_same_weights(criterion: str) -> None:
    weight, statistics = random_layer(10, 20)
    other = torch.rand(10, generator=torch.Generator().manual_seed(3)) ** 2
    levels = [0.05, 0.5, 1.0]
    own, found = predict_each(weight, statistics, criterion, levels, [other])
    assert own == predict_losses(weight, statistics, criterion, levels)
    factors = fisher.damped(other).unsqueeze(1)
    saliency = fisher.saliency(weight, statistics.input_square, factors)
    expected = [
        float(saliency[prune_mask(weight, statistics, criterion, pruned=round(200 * v))].sum())
        for v in levels
    ]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("criterion", ["wanda", "fisher"])
def test_costs_of_domains_have_the_costs_of_the_whole_as_their_mean(
    load: Load, windows: Tensor, scored: Tensor, criterion: str
) -> None:
    loaded = load()
    head, activations = Head(loaded.model), measure_activations(loaded, windows)
    gradients = measure_gradients(loaded, head, windows, scored=scored, domains=DOMAINS)

    def profile(gradients: Gradients, **changes: Any) -> ModelProfile:
        return build_profile(
            loaded,
            activations,
            gradients,
            criterion,
            revision="r",
            gradient_revision="r",
            sparsities=dict.fromkeys(loaded.layers, 0.2),
            **changes,
        )

    equal = {"code": 1.0, "facts": 1.0}
    found, whole = profile(gradients, weights=equal), profile(replace(gradients, domains={}))
    assert found.domains == ("code", "facts")
    assert whole.domains == ()
    for p, q in zip(found.layers, whole.layers, strict=True):
        assert p.loss_cost == pytest.approx(q.loss_cost, rel=1e-4)
        assert p.regrow_gain == pytest.approx(q.regrow_gain, rel=1e-4)
        assert p.signals["z_c"] == pytest.approx(q.signals["z_c"], abs=1e-3)
        assert p.domain_costs["code"] != p.domain_costs["facts"]
    deltas = {found.layers[0].name: 0.1, found.layers[3].name: -0.05}
    facts = profile(gradients, weights={"code": 0.0, "facts": 2.0})
    assert found.at_weights({"facts": 1.0}).layers[0].loss_cost == facts.layers[0].loss_cost
    changes = found.predicted_changes(deltas)
    assert changes["facts"] == pytest.approx(facts.predicted_change(deltas))
    mean = sum(math.log1p(change) for change in changes.values()) / 2
    assert mean == pytest.approx(math.log1p(found.predicted_change(deltas)))
    # The same gradients as those of answers cost the same, a weight removed.
    asked = profile(gradients, weights=equal, signals=["z_k"], knowledge=gradients.domains["facts"])
    for p in asked.layers:
        assert p.measured["z_k"] == pytest.approx(p.domain_costs["facts"][1] / p.parameters / 0.1)


@pytest.mark.parametrize("criterion", PREDICTED)
def test_predicted_losses_rise_with_the_level(criterion: str) -> None:
    weight, statistics = random_layer(16, 40, seed=7)
    levels = [i / 50 for i in range(51)]
    losses = predict_losses(weight, statistics, criterion, levels)  # type: ignore[arg-type]
    assert losses == sorted(losses)
    assert losses[0] < losses[25] < losses[50]


@pytest.mark.parametrize("criterion", PREDICTED)
@pytest.mark.parametrize("shape", [(256, 256), (1024, 64), (16, 4096)])
def test_a_large_layer_is_estimated_from_a_sample(
    criterion: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, statistics = random_layer(*shape, seed=9)
    levels = [0.2, 0.5, 0.8]
    exact = predict_losses(weight, statistics, criterion, levels)  # type: ignore[arg-type]
    percentile = salience_percentile(weight, statistics.input_square)
    monkeypatch.setattr(sample, "SAMPLE", 2**14)
    estimate = predict_losses(weight, statistics, criterion, levels)  # type: ignore[arg-type]
    assert estimate != exact
    assert estimate == pytest.approx(exact, rel=0.15)
    sampled = salience_percentile(weight, statistics.input_square)
    assert sampled == pytest.approx(percentile, rel=0.15)


def test_a_layer_with_fewer_rows_than_the_sample_skips_is_still_estimated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sample, "SAMPLE", 16)
    weight, statistics = random_layer(3, 1000)
    losses = predict_losses(weight, statistics, "wanda", [0.5, 1.0])
    exact = predicted_by_loops(weight, statistics, "wanda", 1.0)
    assert 0 < losses[0] < losses[1]
    assert losses[1] == pytest.approx(exact, rel=1e-3)  # the whole is known, whatever is sampled


@pytest.mark.parametrize(("rows", "inputs"), [(64, 64), (100, 30), (7, 4096), (33, 27)])
def test_the_sample_visits_rows_and_columns_evenly(
    rows: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "SAMPLE", 512)
    spread = even_spread(rows, inputs, torch.device("cpu"))
    assert len(spread.rows) == len(spread.columns) <= 512
    matrix = torch.randn(rows, inputs)
    assert torch.equal(spread.of(matrix), matrix[spread.rows, spread.columns])
    visits = torch.bincount(spread.columns, minlength=inputs)
    assert int(visits.max() - visits.min()) <= 2
    by_row = torch.bincount(spread.rows, minlength=rows)
    assert int(by_row.max() - by_row.min()) <= 1


def priced(levels: list[float], losses: list[float], mean: float, power: int) -> list[float]:
    """Each slice of the predicted loss, dearer by a power of how crowded its layer is."""
    prices = []
    for k in range(1, len(levels)):
        slices = [
            abs(losses[i + 1] - losses[i])
            * ((1 - mean) / max(0.05, 1 - min(levels[i], levels[i + 1]))) ** power
            for i in range(k)
        ]
        prices.append(sum(slices))
    return prices


@pytest.mark.parametrize(("reconstruct", "power"), [(False, 2), (True, 0)])
def test_a_profile_holds_every_layer_with_its_signals(
    load: Load, family: str, windows: Tensor, reconstruct: bool, power: int
) -> None:
    loaded = load(family)
    activations = measure_activations(loaded, windows)
    gradients = measure_gradients(loaded, Head(loaded.model), windows)
    sparsities = dict.fromkeys(loaded.layers, 0.0)
    full = next(iter(loaded.layers))
    sparsities[full] = 1.0
    profile = build_profile(
        loaded,
        activations,
        gradients,
        "wanda",
        revision="r",
        gradient_revision="q",
        sparsities=sparsities,
        reconstruct=reconstruct,
    )
    assert (profile.revision, profile.gradient_revision) == ("r", "q")
    assert [p.name for p in profile.layers] == list(loaded.layers)
    sizes = {name: layer.numel for name, layer in loaded.layers.items()}
    mean = sum(sparsities[n] * sizes[n] for n in sizes) / sum(sizes.values())
    marginal = []
    for p in profile.layers:
        layer = loaded.layers[p.name]
        statistics = LayerStatistics(
            activations.input_square[p.name], gradients.gradient_square[p.name]
        )
        dense = layer.matrix(loaded.dense(layer))
        assert (p.block, p.projection) == (layer.block, layer.projection)
        assert p.parameters == layer.numel
        assert p.measured["z_g"] == gradients.mean_absolute[p.name]
        assert p.measured["z_s"] == salience_percentile(dense, statistics.input_square)
        start = sparsities[p.name]
        levels = [min(start + d, 1.0) for d in (0.0, *COST_DELTAS)]
        losses = predict_losses(dense, statistics, "wanda", levels)
        assert p.loss_cost == pytest.approx(priced(levels, losses, mean, power))
        levels_down = [max(start - d, 0.0) for d in (0.0, *COST_DELTAS)]
        losses_down = predict_losses(dense, statistics, "wanda", levels_down)
        assert p.regrow_gain == pytest.approx(priced(levels_down, losses_down, mean, power))
        marginal.append(p.loss_cost[1] / max(layer.numel * (levels[2] - start), 1.0))
    assert profile.layers[0].loss_cost == (0.0, 0.0, 0.0)
    assert all(p.loss_cost[0] > 0 for p in profile.layers[1:])
    for values, scores in (
        ([p.measured["z_s"] for p in profile.layers], [p.signals["z_s"] for p in profile.layers]),
        ([p.measured["z_g"] for p in profile.layers], [p.signals["z_g"] for p in profile.layers]),
        (marginal, [p.signals["z_c"] for p in profile.layers]),
    ):
        array = np.array(values)
        expected = (array - array.mean()) / array.std()
        assert scores == pytest.approx(expected.tolist(), abs=1e-4)


def test_progress_is_told_as_a_phase_begins_and_after_each_window(
    load: Load, windows: Tensor
) -> None:
    loaded = load()
    told: list[tuple[str, int, int]] = []
    measure_activations(loaded, windows, lambda *p: told.append(p))
    measure_gradients(loaded, Head(loaded.model), windows, progress=lambda *p: told.append(p))
    assert told == [
        (label, done, 3) for label in ("activations", "gradients") for done in (0, 1, 2, 3)
    ]
