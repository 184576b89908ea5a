"""The observer sees each product of a weight, in whatever way it is written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prunewright.tools.layers import Layer
from prunewright.tools.models import LoadedModel
from prunewright.tools.observe import ProductObserver
from prunewright.tools.perplexity import hidden_states

Load = Callable[..., LoadedModel]

W = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))

# Each form computes X @ W.T, or its transpose.
FORMS: dict[str, tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]] = {
    "linear": (W, lambda x, w: functional.linear(x, w)),
    "linear with names": (W, lambda x, w: functional.linear(input=x, weight=w)),
    "linear with a bias": (W, lambda x, w: functional.linear(x, w, torch.ones(4))),
    "matmul": (W, lambda x, w: torch.matmul(x, w.t())),
    "matmul with names": (W, lambda x, w: torch.matmul(input=x, other=w.t())),
    "operator": (W, lambda x, w: x @ w.t()),
    "method": (W, lambda x, w: x.matmul(w.t())),
    "mm": (W, lambda x, w: torch.mm(x, w.t())),
    "mm method": (W, lambda x, w: x.mm(w.t())),
    "addmm, stored transposed": (W.t().contiguous(), lambda x, w: torch.addmm(torch.ones(4), x, w)),
    "weight first": (W, lambda x, w: (w @ x.t()).t()),
}


def layer_of(weight: Tensor, **values: Any) -> Layer:
    transposed = weight.shape[0] == 6
    return Layer("l", "l.weight", 0, "l", tuple(weight.shape), transposed, **values)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_product_is_seen_once(form: str) -> None:
    weight, multiply = FORMS[form]
    expected = multiply(X, weight)
    seen: list[tuple[Layer, int | None, Tensor, Tensor]] = []
    with ProductObserver([(layer_of(weight), weight)], lambda *call: seen.append(call)):
        result = multiply(X, weight)
        multiply(X, torch.randn_like(weight))
    assert torch.equal(result, expected)
    [(_, expert, inputs, outputs)] = seen
    assert expert is None
    assert torch.equal(inputs, X)
    assert torch.equal(outputs, expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_at_the_outputs_can_be_caught(form: str) -> None:
    weight, multiply = FORMS[form]
    weight = weight.clone().requires_grad_()
    caught: list[Tensor] = []

    def on_product(_: Layer, __: int | None, ___: Tensor, outputs: Tensor) -> None:
        outputs.register_hook(caught.append)

    target = torch.arange(12.0).reshape(3, 4)
    with ProductObserver([(layer_of(weight), weight)], on_product):
        (multiply(X, weight) * target).sum().backward()
    assert [g.tolist() for g in caught] == [target.tolist()]


def test_experts_of_a_fused_tensor_are_told_apart() -> None:
    weight = torch.randn(3, 4, 6)
    seen: list[tuple[int | None, Tensor]] = []
    with ProductObserver([(layer_of(weight), weight)], lambda _, e, x, __: seen.append((e, x))):
        for expert in (2, 0, 2):
            functional.linear(X * (expert + 1), weight[expert])
    assert [e for e, _ in seen] == [2, 0, 2]
    for expert, inputs in seen:
        assert expert is not None
        assert torch.equal(inputs, X * (expert + 1))


def test_nothing_is_seen_outside_the_block() -> None:
    seen: list[Any] = []
    observer = ProductObserver([(layer_of(W), W)], lambda *call: seen.append(call))
    functional.linear(X, W)
    with observer:
        pass
    functional.linear(X, W)
    with pytest.raises(RuntimeError, match="stop"), observer:
        raise RuntimeError("stop")
    functional.linear(X, W)
    assert seen == []


def test_inputs_are_what_ordinary_forward_hooks_see(
    load: Load, family: str, windows: Tensor
) -> None:
    loaded = load(family)
    modules = {n: ly for n, ly in loaded.layers.items() if len(ly.shape) == 2}
    expected: dict[str, list[Tensor]] = {name: [] for name in modules}
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args, __: expected[name].append(args[0].detach())

    handles = [
        loaded.model.get_submodule(name).register_forward_hook(hook(name)) for name in modules
    ]
    with torch.no_grad():
        hidden_states(loaded.model, windows[:1])
        for handle in handles:
            handle.remove()
        with ProductObserver(
            [(layer, loaded.weight(layer)) for layer in modules.values()],
            lambda layer, _, inputs, __: seen[layer.name].append(inputs),
        ):
            hidden_states(loaded.model, windows[:1])
    for name in modules:
        [one], [other] = seen[name], expected[name]
        # Conv1D flattens the batch.
        assert torch.equal(one.reshape(-1, one.shape[-1]), other.reshape(-1, other.shape[-1]))


def test_observing_leaves_nothing_on_the_model(load: Load, family: str, windows: Tensor) -> None:
    loaded = load(family)

    def traces() -> list[tuple[str, list[str], int]]:
        return [
            (
                name,
                sorted(vars(m)),
                len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks),
            )
            for name, m in loaded.model.named_modules()
        ]

    before = traces()
    with ProductObserver(
        [(ly, loaded.weight(ly)) for ly in loaded.layers.values()], lambda *_: None
    ):
        hidden_states(loaded.model, windows[:1])
    assert traces() == before


def test_a_product_without_an_observed_weight_is_left_alone() -> None:
    module = nn.Linear(6, 4)
    seen: list[Any] = []
    with ProductObserver([(layer_of(W), W)], lambda *call: seen.append(call)):
        result = module(X)
        2.0 * X @ torch.ones(6)
    assert seen == []
    torch.testing.assert_close(result, X @ module.weight.T + module.bias)
