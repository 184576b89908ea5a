"""The live model goes to any revision and back, bit for bit."""

import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunewright.state import InputError, PruneRequest, StoreError, validate_config
from prunewright.state.run import DENSE
from prunewright.tools.bench import workbench as module
from prunewright.tools.bench.workbench import Workbench, workbench
from prunewright.tools.calibration.activations import measure_activations
from prunewright.tools.calibration.gradients import measure_gradients
from prunewright.tools.criteria import CRITERIA
from prunewright.tools.execution import weights as live_weights
from prunewright.tools.model.head import Head
from prunewright.tools.model.layers import Layer
from prunewright.tools.store.revisions import RevisionStore
from prunewright.tools.texts.windows import load_windows
from tests.tools.conftest import go_elsewhere

GATE, DOWN = "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.down_proj"

Request = Callable[..., PruneRequest]
Bench = Callable[..., Workbench]


@pytest.fixture
def request_of(
    pico_config: dict[str, Any], pico_models: Callable[..., Path], tmp_path: Path
) -> Request:
    """A function that makes a request on a pico model of a family, and a short text."""
    text = tmp_path / "text.txt"
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(900)]
    text.write_text(" ".join(words))
    texts = pico_config["texts"] | {"calibration": str(text), "test": str(text)}

    def get(family: str = "LlamaConfig", **values: Any) -> PruneRequest:
        config = pico_config | {"model": str(pico_models(family)), "texts": texts} | values
        return validate_config(config).request

    return get


@pytest.fixture
def bench_of(request_of: Request, tmp_path: Path) -> Bench:
    """A function that makes a workbench of its own, with a store in the test's directory."""

    def get(family: str = "LlamaConfig", store: str = "revisions", **values: Any) -> Workbench:
        bench = Workbench(request_of(family, **values))
        bench.store = RevisionStore(tmp_path / store)
        return bench

    return get


def weights(bench: Workbench) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in bench.loaded.model.named_parameters()}


def counts_at(bench: Workbench, sparsity: float) -> dict[str, int]:
    return {n: int(ly.numel * sparsity) for n, ly in bench.loaded.layers.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    assert [n for n in one if not torch.equal(one[n], other[n])] == []


def test_every_family_is_profiled_pruned_and_restored(bench_of: Bench, family: str) -> None:
    bench = bench_of(family, dtype="bfloat16")  # float32: tests/end_to_end/test_families.py
    dense = weights(bench)
    profile = bench.profile(DENSE, DENSE)
    assert [p.name for p in profile.layers] == list(bench.loaded.layers)
    assert all(min(*p.measured.values(), *p.loss_cost) > 0 for p in profile.layers)
    counts = counts_at(bench, 0.3)
    pruned = bench.prune(DENSE, DENSE, counts)
    assert_same(weights(bench), dense)  # the live model stays where it was

    bench.sync(pruned)
    live = weights(bench)
    parameters = {ly.parameter: n for n, ly in bench.loaded.layers.items()}
    for name, weight in live.items():
        if name in parameters:
            zero = weight == 0
            assert int(zero.sum()) == counts[parameters[name]]
            assert torch.equal(weight[~zero], dense[name][~zero])
        else:
            assert torch.equal(weight, dense[name])
    assert bench.zeros() == counts
    assert bench.sparsity() == sum(counts.values()) / bench.loaded.prunable
    assert bench.sparsities() == {n: counts[n] / ly.numel for n, ly in bench.loaded.layers.items()}
    assert bench.guard_losses(pruned) != bench.guard_losses(DENSE)
    assert_same(weights(bench), dense)
    assert bench.sparsity() == 0


@pytest.mark.parametrize("criterion", sorted(n for n, rule in CRITERIA.items() if not rule.solves))
@pytest.mark.parametrize("family", ["LlamaConfig", "GPT2Config", "Qwen3MoeConfig"])
def test_masks_follow_the_criterion_from_the_dense_weights(
    bench_of: Bench, family: str, criterion: str
) -> None:
    bench = bench_of(family, criterion=criterion)
    first = bench.prune(DENSE, DENSE, counts_at(bench, 0.25))
    second = bench.prune(first, DENSE, counts_at(bench, 0.5))
    activations = bench.activations(first)
    gradients = bench.gradients(DENSE)
    bench.sync(second)
    for name, layer in bench.loaded.layers.items():
        dense = layer.matrix(bench.loaded.dense(layer)).double()
        gone = layer.matrix(bench.loaded.weight(layer)) == 0
        x = activations.input_square[name].double().unsqueeze(-2)
        d = gradients.gradient_square[name].double().unsqueeze(-1)
        d = (d + d.mean(dim=-2, keepdim=True)) / 2
        pull = gradients.weight_gradient_square.get(name, torch.zeros(())).double().sqrt()
        scores = {
            "magnitude": dense.abs(),
            "wanda": dense.abs() * x.sqrt(),
            "gblm": dense.abs() * (x.sqrt() * 2048**0.5 + 100 * 128**0.5 * pull),
            "fisher": dense.square() * x * d,
        }[criterion]
        by_row = criterion in ("wanda", "gblm")
        groups = scores if by_row else scores.flatten(-2)
        flags = gone if by_row else gone.flatten(-2)
        worst_gone = groups.masked_fill(~flags, -1).amax(dim=-1)
        best_kept = groups.masked_fill(flags, torch.inf).amin(dim=-1)
        assert bool((worst_gone <= best_kept * (1 + 1e-5)).all())


@pytest.mark.parametrize(
    "asked",
    [
        {"criterion": "wanda"},
        {"criterion": "fisher"},
        {"criterion": "wanda", "pattern": "2:4"},
        {"criterion": "obs", "dtype": "bfloat16"},
        {"criterion": "wanda", "reconstruct": True},
    ],
)
def test_what_is_done_elsewhere_than_on_a_processor_makes_the_same_revisions(
    bench_of: Bench, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, live = [], []
    for store in ("here", "elsewhere"):
        if store == "elsewhere":
            go_elsewhere(monkeypatch)
        bench = bench_of("Qwen3MoeConfig", store=store, **asked)
        counts = None if "pattern" in asked else counts_at(bench, 0.4)
        attention = next(iter(bench.loaded.layers))
        first = bench.prune(DENSE, DENSE, counts)
        second = bench.prune(first, DENSE, {attention: 0} if counts else None)
        bench.sync(second)
        found.append((first, second, bench.zeros()))
        live.append(weights(bench))
    assert found[0] == found[1]
    assert_same(*live)


def test_only_layers_that_differ_are_touched(
    bench_of: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of()
    half = {n: bench.loaded.layers[n].numel // 2 for n in (GATE, DOWN)}
    one = bench.prune(DENSE, DENSE, {GATE: half[GATE]})
    both = bench.prune(one, DENSE, {DOWN: half[DOWN]})
    assert set(bench.store.manifest(both)) == {GATE, DOWN}
    assert bench.store.manifest(both)[GATE] == bench.store.manifest(one)[GATE]
    bench.sync(DENSE)

    read: list[str] = []
    original = bench.loaded.dense_layers

    def noted(layers: Iterable[Layer], *, home: bool = False) -> Iterator[Tensor]:
        layers = list(layers)
        read.extend(layer.name for layer in layers)
        return original(layers)

    monkeypatch.setattr(bench.loaded, "dense_layers", noted)
    others = {n: ly for n, ly in bench.loaded.layers.items() if n not in (GATE, DOWN)}
    pointers = {n: bench.loaded.weight(ly).data_ptr() for n, ly in others.items()}
    # From its file a layer is read only if it has a mask that must go.
    for revision, masked in (
        (one, []),
        (both, []),
        (both, []),
        (one, [DOWN]),
        (DENSE, [GATE]),
        (both, []),
        (DENSE, [GATE, DOWN]),
    ):
        read.clear()
        bench.sync(revision)
        assert read == masked
    assert pointers == {n: bench.loaded.weight(ly).data_ptr() for n, ly in others.items()}


def test_the_way_to_a_revision_does_not_matter(bench_of: Bench) -> None:
    bench = bench_of()
    first = bench.prune(DENSE, DENSE, counts_at(bench, 0.2))
    second = bench.prune(first, DENSE, counts_at(bench, 0.4))
    third = bench.prune(DENSE, DENSE, {GATE: 100})
    seen: dict[str, dict[str, Tensor]] = {}
    order = (second, third, DENSE, first, second, first, third, second, DENSE)
    for revision in order:
        bench.sync(revision)
        assert_same(weights(bench), seen.setdefault(revision, weights(bench)))
    fresh = bench_of()
    fresh.sync(second)
    assert_same(weights(fresh), seen[second])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_sequence_of_masks_leaves_the_dense_bits_and_positive_zeros(
    dtype: str, bench_of: Bench, pico_models: Callable[..., Path], tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(pico_models(), directory)
    file = directory / "model.safetensors"
    stored = {key: tensor.clone() for key, tensor in load_file(file).items()}
    for key, values in ((f"{GATE}.weight", [0.0, -0.0, 1e-7]), (f"{DOWN}.weight", [-0.0])):
        stored[key].view(-1)[: 9 * len(values)] = torch.tensor(values).repeat(9)
    save_file(stored, file, {"format": "pt"})
    bench = bench_of(model=str(directory), dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    revisions: dict[str, dict[str, Tensor]] = {DENSE: {}}
    for density in (0.2, 0.7, 0.4, 1.0, 0.0):  # some have fewer zeros than the one before
        for names in ([GATE], [GATE, DOWN], list(bench.loaded.layers)):
            masks = {
                n: torch.rand(bench.loaded.layers[n].shape, generator=generator) < density
                for n in names
            }
            with bench.store.writer({}) as writer:
                for name, mask in masks.items():
                    writer.add(name, mask)
            revisions[writer.revision] = masks
    draws = random.Random(3)
    for revision in [*draws.choices(list(revisions), k=40), DENSE]:
        bench.sync(revision)
        zeros = {}
        for name, layer in bench.loaded.layers.items():
            expected = stored[layer.parameter].to(getattr(torch, dtype))
            if name in revisions[revision]:
                expected = torch.where(revisions[revision][name], 0.0, expected)
            live = bench.loaded.weight(layer)
            assert torch.equal(live.view(torch.uint8), expected.view(torch.uint8))
            zeros[name] = int((expected == 0).sum())
        assert bench.zeros() == zeros


@pytest.mark.parametrize("criterion", ["wanda", "magnitude"])
def test_any_history_is_exact_with_zeros_that_were_there_before(
    criterion: str, bench_of: Bench, pico_models: Callable[..., Path], tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(pico_models("MixtralConfig"), directory)
    file = directory / "model.safetensors"
    draws, generator = random.Random(7), torch.Generator().manual_seed(7)
    stored = {key: tensor.clone() for key, tensor in load_file(file).items()}
    for key in stored:
        if "_proj" in key or ".w" in key:
            density = draws.choice([0.0, 0.3, 0.6])
            stored[key] *= torch.rand(stored[key].shape, generator=generator) >= density  # or -0.0
            stored[key][: len(stored[key]) // draws.choice([2, 4])] = 0
    save_file(stored, file, {"format": "pt"})
    bench = bench_of(model=str(directory), criterion=criterion)
    dense = weights(bench)
    parameters = {n: ly.parameter for n, ly in bench.loaded.layers.items()}
    own = {n: int((dense[p] == 0).sum()) for n, p in parameters.items()}
    assert bench.dense_zeros == own
    revision, counts = DENSE, dict(own)
    for _ in range(12):
        changed = {
            name: draws.choice(
                [own[name], draws.randint(own[name], dense[parameters[name]].numel())]
            )
            for name in draws.sample(list(own), 3)
        }
        counts |= changed
        revision = bench.prune(revision, DENSE, changed)
        bench.sync(revision)
        assert bench.zeros() == counts
        assert set(bench.store.manifest(revision)) == {n for n in own if counts[n] > own[n]}
        for name, parameter in parameters.items():
            live, before = bench.loaded.weight(bench.loaded.layers[name]), dense[parameter]
            assert int((live == 0).sum()) == counts[name]
            kept = live != 0
            assert torch.equal(live[kept], before[kept])
    assert bench.prune(revision, DENSE, own) == DENSE
    bench.sync(DENSE)
    assert_same(weights(bench), dense)


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("family", ["LlamaConfig", "MixtralConfig"])
def test_what_is_remembered_changes_no_result(bench_of: Bench, family: str, criterion: str) -> None:
    bench = bench_of(family, criterion=criterion)
    bench.profile(DENSE, DENSE)
    first = bench.prune(DENSE, DENSE, counts_at(bench, 0.2))
    bench.guard_losses(first)
    second = bench.prune(first, DENSE, counts_at(bench, 0.4))
    profile = bench.profile(second, first)
    losses = bench.guard_losses(second), bench.test_losses(second)

    fresh = bench_of(family, criterion=criterion)  # another process, at the same revision
    assert fresh.prune(first, DENSE, counts_at(bench, 0.4)) == second
    other = bench_of(family, store="other", criterion=criterion)  # one that begins again
    assert other.prune(DENSE, DENSE, counts_at(bench, 0.2)) == first
    assert other.prune(first, DENSE, counts_at(bench, 0.4)) == second
    assert other.profile(second, first) == profile
    assert (other.guard_losses(second), other.test_losses(second)) == losses


def test_statistics_are_taken_once_a_revision(
    bench_of: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(criterion="fisher")
    taken: list[str] = []
    for name, measure in (("x", measure_activations), ("d", measure_gradients)):

        def counted(*args: Any, name: str = name, measure: Any = measure, **options: Any) -> Any:
            taken.append(name)
            return measure(*args, **options)

        monkeypatch.setattr(module, measure.__name__, counted)
    bench.profile(DENSE, DENSE)
    first = bench.prune(DENSE, DENSE, {GATE: 100})
    assert sorted(taken) == ["d", "x"]
    bench.profile(first, DENSE)
    assert sorted(taken) == ["d", "x", "x"]
    tokens = {"calibration": 2 * 4 * 48, "gradient": 2 * 48}
    others = ("solve", "guard", "probe", "allocation", "adapt", "test")
    assert bench.tokens == tokens | dict.fromkeys(others, 0)


def test_statistics_are_those_of_the_revision_that_is_asked_for(bench_of: Bench) -> None:
    bench = bench_of()
    first = bench.prune(DENSE, DENSE, counts_at(bench, 0.5))
    bench.sync(DENSE)
    at_first = bench.activations(first)
    fresh = bench_of()
    fresh.sync(first)
    direct = measure_activations(fresh.loaded, fresh.windows.calibration)
    for name in bench.loaded.layers:
        assert torch.equal(at_first.input_square[name], direct.input_square[name])
    gradients = bench.gradients(first)
    direct_gradients = measure_gradients(fresh.loaded, fresh.head, fresh.windows.calibration[:2])
    assert gradients.mean_absolute == direct_gradients.mean_absolute


def test_losses_are_those_of_the_roles_windows(bench_of: Bench) -> None:
    bench = bench_of()
    first = bench.prune(DENSE, DENSE, counts_at(bench, 0.5))
    options, tokenizer = bench.request.texts, bench.loaded.tokenizer
    windows = load_windows(options, tokenizer, bench.request.seed, rows=512)
    told: list[tuple[str, int, int]] = []
    guard = bench.guard_losses(first, lambda *p: told.append(p))
    test = bench.test_losses(DENSE)
    assert told == [("perplexity", i, 3) for i in (0, 1, 2, 3)]
    fresh = bench_of()
    head = Head(fresh.loaded.model)
    assert test == fresh.loaded.execution.window_losses(head, windows.test)
    fresh.sync(first)
    assert guard == fresh.loaded.execution.window_losses(head, windows.guard)
    assert bench.tokens["guard"] == bench.tokens["test"] == 3 * 48


@pytest.mark.parametrize("family", ["LlamaConfig", "GPT2Config", "MixtralConfig"])
def test_a_pattern_holds_in_every_group_of_every_layer(bench_of: Bench, family: str) -> None:
    bench = bench_of(family, pattern="2:4")
    bench.sync(bench.prune(DENSE, DENSE))
    for layer in bench.loaded.layers.values():
        matrix = layer.matrix(bench.loaded.weight(layer))
        kept = (matrix != 0).unflatten(-1, (-1, 4)).sum(dim=-1)
        assert set(kept.flatten().tolist()) == {2}


@pytest.mark.parametrize("family", ["LlamaConfig", "GPT2Config", "Qwen3MoeConfig"])
def test_named_layers_take_the_pattern_others_stay_and_a_trial_measures_the_same(
    bench_of: Bench, family: str
) -> None:
    bench = bench_of(family, pattern="4:8")
    counts = bench.pattern_gains()
    first, second, *_ = counts
    one = bench.prune(DENSE, DENSE, {first: counts[first]})
    change = {first: 0, second: counts[second]}
    trial = bench.trial_losses(one, DENSE, change, windows=[2, 0])
    two = bench.prune(one, DENSE, change)
    assert set(bench.store.manifest(two)) == {second}
    assert [bench.guard_losses(two)[window] for window in (2, 0)] == trial
    assert bench.zeros() == {name: counts[name] * (name == second) for name in counts}


def test_a_pattern_that_does_not_divide_names_the_layer(bench_of: Bench) -> None:
    bench = bench_of(pattern="3:5")
    with pytest.raises(InputError, match=r"q_proj cannot be pruned so: 32 inputs do not divide"):
        bench.prune(DENSE, DENSE)


@pytest.mark.parametrize("count", [-1, 10**9])
def test_a_count_out_of_range_names_the_layer(count: int, bench_of: Bench) -> None:
    with pytest.raises(InputError, match=f"{GATE} cannot be pruned so: cannot prune {count}"):
        bench_of().prune(DENSE, DENSE, {GATE: count})


def test_a_layer_can_be_emptied_and_regrown(bench_of: Bench) -> None:
    bench = bench_of()
    numel = bench.loaded.layers[GATE].numel
    empty = bench.prune(DENSE, DENSE, {GATE: numel})
    bench.sync(empty)
    assert not bench.loaded.weight(bench.loaded.layers[GATE]).any()
    assert bench.profile(empty, empty).layers[0].parameters > 0
    back = bench.prune(empty, DENSE, {GATE: numel // 4})
    bench.sync(back)
    assert bench.zeros()[GATE] == numel // 4


def test_a_damaged_store_leaves_the_live_model_alone(bench_of: Bench) -> None:
    bench = bench_of()
    first = bench.prune(DENSE, DENSE, {GATE: 100})
    second = bench.prune(first, DENSE, {GATE: 200, DOWN: 300})
    bench.sync(first)
    before = weights(bench)
    path = bench.store.directory / "masks" / bench.store.manifest(second)[DOWN]
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    for _ in range(2):
        with pytest.raises(StoreError, match=path.name):
            bench.sync(second)
        assert_same(weights(bench), before)
        assert bench.zeros()[GATE] == 100
        path.unlink(missing_ok=True)
    with pytest.raises(StoreError, match="0" * 64):
        bench.sync("0" * 64)
    path.write_bytes(good)
    bench.sync(second)
    assert (bench.zeros()[GATE], bench.zeros()[DOWN]) == (200, 300)


def test_a_revision_of_another_model_is_refused(bench_of: Bench) -> None:
    other = bench_of("GPT2Config")
    revision = other.prune(DENSE, DENSE, {"transformer.h.0.mlp.c_fc": 10})
    bench = bench_of()
    before = weights(bench)
    with pytest.raises(StoreError, match=r"belongs to another model.*transformer\.h\.0\.mlp\.c_fc"):
        bench.sync(revision)
    assert_same(weights(bench), before)


def test_an_interrupt_in_the_middle_is_mended_by_the_next_sync(
    bench_of: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of()
    first = bench.prune(DENSE, DENSE, counts_at(bench, 0.3))
    second = bench.prune(first, DENSE, counts_at(bench, 0.6))
    bench.sync(first)
    expected = weights(bench)
    write = live_weights.write_masked
    calls = 0

    def interrupted(weight: Tensor, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            weight[0].fill_(7)  # half written
            raise KeyboardInterrupt
        write(weight, *args)

    with monkeypatch.context() as patch:
        patch.setattr(live_weights, "write_masked", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench.sync(second)
    bench.sync(first)
    assert_same(weights(bench), expected)
    assert bench.zeros() == counts_at(bench, 0.3)


def test_what_is_written_over_live_weights_never_comes_back(bench_of: Bench) -> None:
    bench = bench_of()
    first = bench.prune(DENSE, DENSE, counts_at(bench, 0.3))
    second = bench.prune(first, DENSE, counts_at(bench, 0.6))
    bench.sync(first)
    expected = weights(bench)
    for revision in (second, first, second):
        for name, layer in bench.loaded.layers.items():
            gone = torch.ones(layer.shape, dtype=torch.bool)
            bench.try_mask(name, gone, bench.loaded.dense(layer))
        bench.sync(revision)
    bench.sync(first)
    assert_same(weights(bench), expected)


@pytest.fixture
def _no_workbench() -> Iterator[None]:
    module._current = None
    yield
    module._current = None


@pytest.mark.usefixtures("_no_workbench")
def test_runs_with_one_request_share_the_model_each_with_its_store(
    request_of: Request, tmp_path: Path
) -> None:
    with workbench(request_of(), tmp_path / "one") as bench:
        first = bench.prune(DENSE, DENSE, {GATE: 100})
        bench.sync(first)
        model = bench.loaded.model
    with workbench(request_of(), tmp_path / "two") as other:
        assert other.loaded.model is model
        assert other.store.directory == tmp_path / "two" / "revisions"
        with pytest.raises(StoreError, match="two"):
            other.sync(first)
        assert other.prune(DENSE, DENSE, {GATE: 100}) == first
    with workbench(request_of(), tmp_path / "one") as again:
        again.sync(first)
        assert again.zeros()[GATE] == 100


@pytest.mark.usefixtures("_no_workbench")
def test_another_request_replaces_the_model(request_of: Request, tmp_path: Path) -> None:
    with workbench(request_of(), tmp_path / "one") as bench:
        old = bench.loaded.model
    with workbench(request_of(seed=7), tmp_path / "one") as other:
        assert other.loaded.model is not old
        assert other.request.seed == 7
    assert {p.device.type for p in old.parameters()} == {"meta"}
    with (
        pytest.raises(InputError, match=r"is .* a model directory\?"),
        workbench(request_of(model=str(tmp_path)), tmp_path / "one"),
    ):
        pytest.fail("not reached")
    with workbench(request_of(), tmp_path / "one") as again:
        assert len(again.guard_losses(DENSE)) == 3


@pytest.mark.usefixtures("_no_workbench")
def test_files_that_were_replaced_are_read_again(
    request_of: Request, pico_models: Callable[..., Path], tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(pico_models(), directory)
    asked = request_of(model=str(directory))
    store, file, text = tmp_path / "one", directory / "model.safetensors", tmp_path / "text.txt"
    with workbench(asked, store) as bench:
        first = bench
    with workbench(asked, store) as bench:
        assert bench is first

    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[f"{GATE}.weight"] += 1
    save_file(tensors, tmp_path / "new", {"format": "pt"})
    (tmp_path / "new").replace(file)
    with workbench(asked, store) as bench:
        second = bench
        layer = bench.loaded.layers[GATE]
        assert torch.equal(bench.loaded.weight(layer), tensors[layer.parameter])
        assert bench.loaded.fingerprint != first.loaded.fingerprint
        assert bench.windows.hashes == first.windows.hashes

    words = text.read_text().split()
    text.write_text(" ".join(reversed(words)))  # as long as before
    with workbench(asked, store) as bench:
        assert bench is not second
        assert bench.windows.hashes.keys() == second.windows.hashes.keys()
        assert not set(bench.windows.hashes.values()) & set(second.windows.hashes.values())


def test_a_solve_counts_the_tokens_that_ran_through_the_blocks(bench_of: Bench) -> None:
    bench = bench_of(criterion="sparsegpt")
    bench.check_blocks()  # tries a few tokens, which are not counted
    ran = 0

    def count(_: Any, __: Any, outputs: Tensor) -> None:
        nonlocal ran
        ran += outputs.shape[0] * outputs.shape[1]

    for index in range(2):
        bench.loaded.model.get_submodule(
            f"model.layers.{index}.input_layernorm"
        ).register_forward_hook(count)
    revision = bench.prune(DENSE, DENSE, counts_at(bench, 0.5))
    ran, calibration = 0, bench.tokens["calibration"]
    bench.solve(revision)
    # Both blocks before their layers are solved, and the first once more.
    assert bench.tokens["solve"] == ran / 2 == 48 * 3 * 4 / 2
    assert bench.tokens["calibration"] == calibration
