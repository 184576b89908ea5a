"""The observer sees each product of a weight, in whatever way it is written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prunewright.tools.model.head import hidden_states
from prunewright.tools.model.layers import Layer
from prunewright.tools.model.loading import LoadedModel
from prunewright.tools.model.observe import ProductObserver, UseObserver

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


E = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(2))
B = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3))

# Each form computes B[e] @ E[e].T for every expert e, as [3, 5, 4].
BATCHED: dict[str, tuple[Tensor, tuple[int, ...] | None, Callable[[Tensor], Tensor]]] = {
    "bmm": (E, None, lambda w: torch.bmm(B, w.mT)),
    "bmm method": (E, None, lambda w: B.bmm(w.transpose(1, 2))),
    "baddbmm": (E, None, lambda w: torch.baddbmm(torch.zeros(3, 1, 4), B, w.mT)),
    "matmul": (E, None, lambda w: B @ w.mT),
    "stored transposed": (E.mT.contiguous(), None, lambda w: torch.bmm(B, w)),
    "one above the other": (E.reshape(12, 8), (3, 4, 8), lambda w: B @ w.view(3, 4, 8).mT),
    "weight first, a batch between": (E, None, lambda w: (w[:, None] @ B[:, None].mT).mT[:, 0]),
    "einsum": (E, None, lambda w: torch.einsum("eti,eoi->eto", B, w)),
    "einsum, weight first": (E, None, lambda w: torch.einsum("eoi,eti->teo", w, B).transpose(0, 1)),
    "grouped": (
        E,
        None,
        lambda w: torch.nn.functional.grouped_mm(
            B.reshape(15, 8), w.mT, offs=torch.tensor([5, 10, 15], dtype=torch.int32)
        ).view(3, 5, 4),
    ),
    "one by one": (E, None, lambda w: torch.stack([x @ m.t() for x, m in zip(B, w, strict=True)])),
}


@pytest.mark.parametrize("form", BATCHED)
def test_each_expert_of_a_batched_product_is_seen_with_its_inputs_and_gradients(form: str) -> None:
    stored, view, multiply = BATCHED[form]
    weight = stored.clone().requires_grad_()
    with UseObserver({"w": weight}) as uses:
        multiply(weight)
    use = uses.uses["w"]
    assert use.transposed == (form == "stored transposed")
    assert use.form == (view or tuple(stored.shape))
    layer = Layer("w", "w", 0, "w", tuple(stored.shape), use.transposed, view)
    inputs: dict[int | None, Tensor] = {}
    gradients: dict[int | None, Tensor] = {}

    def on_product(_: Layer, expert: int | None, x: Tensor, outputs: Tensor) -> None:
        inputs[expert] = x.reshape(-1, 8)
        torch.testing.assert_close(outputs.reshape(-1, 4), B[expert] @ E[expert].t())
        outputs.register_hook(lambda g: gradients.__setitem__(expert, g.reshape(-1, 4)))

    target = torch.arange(60.0).reshape(3, 5, 4)
    with ProductObserver([(layer, weight)], on_product):
        result = multiply(weight)
        (result * target).sum().backward()
    torch.testing.assert_close(result, torch.einsum("eti,eoi->eto", B, E))
    assert set(inputs) == set(gradients) == {0, 1, 2}
    for expert in range(3):
        assert torch.equal(inputs[expert], B[expert])
        assert torch.equal(gradients[expert], target[expert])
    assert weight.grad is not None
    expected = torch.einsum("eto,eti->eoi", target, B)
    torch.testing.assert_close(layer.matrix(weight.grad), expected)


def test_an_einsum_over_several_letters_is_one_matrix() -> None:
    weight = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0))
    with UseObserver({"w": weight}) as uses:
        torch.einsum("ti,ind->tnd", X, weight)
    layer = Layer("w", "w", 0, "w", (6, 2, 4), uses.uses["w"].transposed, uses.uses["w"].form)
    assert (layer.outputs, layer.inputs) == (8, 6)
    seen: list[Tensor] = []
    with ProductObserver([(layer, weight)], lambda *call: seen.append(call[3])):
        result = torch.einsum("ti,ind->tnd", X, weight)
    torch.testing.assert_close(result, torch.einsum("ti,ind->tnd", X, weight))
    torch.testing.assert_close(seen[0].view(3, 2, 4), result)


def test_a_part_of_a_matrix_is_no_matrix() -> None:
    weights = {"rows": W.clone(), "columns": W.clone(), "both": W.clone()}
    with UseObserver(weights) as observer:
        functional.linear(X, weights["rows"][1:])
        functional.linear(X[:, :3], weights["columns"][:, :3])
        functional.linear(X, weights["both"])
        weights["both"] @ torch.ones(6, 2)
    assert {n: u.form for n, u in observer.uses.items()} == {
        "rows": (),
        "columns": (),
        "both": (4, 6),
    }


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
