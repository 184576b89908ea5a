"""Kept weights are trained to give what the dense model gives, and nothing else changes."""

import gc
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from prunewright.state import InputError, PrunewrightError, StoreError, load_config, validate_config
from prunewright.state.config import AdaptOptions
from prunewright.state.run import DENSE
from prunewright.tools.adapt import training
from prunewright.tools.adapt.checkpoints import Checkpoints
from prunewright.tools.adapt.memory import check_disk, disk_bytes, free_memory, sizes_of
from prunewright.tools.adapt.training import Adapted, adapt
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.losses import perplexity
from prunewright.tools.store.revisions import RevisionStore

Bench = Callable[..., Workbench]
WINDOWS = {"calibration": 6, "gradient": 2, "guard": 3, "test": 3, "length": 48}
STEP = 4 * 48
"""Tokens of a step of four windows."""


@pytest.fixture
def bench_of(
    pico_config: dict[str, Any], pico_models: Callable[..., Path], tmp_path: Path
) -> Bench:
    """A function that makes a workbench with a store in the test's directory."""

    def get(family: str = "LlamaConfig", **values: Any) -> Workbench:
        texts = {"texts": {"windows": WINDOWS}}
        config = pico_config | {"model": str(pico_models(family))} | texts | values
        bench = Workbench(validate_config(config).request)
        bench.store = RevisionStore(tmp_path / "revisions")
        return bench

    return get


def pruned(bench: Workbench, sparsity: float = 0.5) -> str:
    layers = bench.loaded.layers.items()
    return bench.prune(DENSE, DENSE, {n: int(ly.numel * sparsity) for n, ly in layers})


def weights(bench: Workbench, revision: str) -> dict[str, Tensor]:
    bench.sync(revision)
    return {n: p.clone() for n, p in bench.loaded.model.named_parameters()}


def options(steps: int, **values: Any) -> AdaptOptions:
    return AdaptOptions(**{"tokens": steps * STEP, "batch": 4, "learning_rate": 1e-3} | values)


def test_training_is_what_a_plain_loop_over_full_logits_does(
    bench_of: Bench, tmp_path: Path
) -> None:
    bench = bench_of(texts={"windows": WINDOWS | {"calibration": 4}})
    revision = pruned(bench)
    # All four windows in each step; the rate rises in the first, and falls from the second on.
    found = adapt(bench, revision, options(3, warmup=0.3), tmp_path / "adapt")
    best = min(found.guard, key=lambda point: point[1])[0] // STEP
    assert best > 0
    ids = bench.windows.calibration
    dense, student = (
        AutoModelForCausalLM.from_pretrained(bench.loaded.directory, dtype=torch.float32)
        for _ in range(2)
    )
    student.load_state_dict(weights(bench, revision), strict=False)
    layers = [student.get_parameter(ly.parameter) for ly in bench.loaded.layers.values()]
    kept = [weight != 0 for weight in layers]
    optimizer = torch.optim.AdamW(layers, betas=(0.9, 0.95), weight_decay=0, fused=False)
    losses = []
    for rate in [1e-3, 1e-3, 5e-4][:best]:
        with torch.no_grad():
            wanted = dense(ids).logits.softmax(-1)
        logs = student(ids).logits.log_softmax(-1)
        loss = functional.kl_div(logs, wanted, reduction="sum") / ids.numel()
        student.zero_grad()
        loss.backward()
        losses.append(loss.item())
        for weight, mask in zip(layers, kept, strict=True):
            weight.grad.mul_(mask)
        norm = torch.stack([weight.grad.norm() for weight in layers]).norm()
        for weight in layers:
            weight.grad.div_(norm.clamp(min=1))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    assert [tokens for tokens, _ in found.curve] == [STEP, 2 * STEP, 3 * STEP]
    assert [loss for _, loss in found.curve][:best] == pytest.approx(losses, rel=1e-4)
    after = weights(bench, found.revision)
    for name, weight in student.named_parameters():
        assert torch.allclose(after[name], weight, atol=2e-6), name


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [("adamw", "float32"), ("adamw", "bfloat16"), ("adafactor", "bfloat16")],
)
def test_the_divergence_falls_and_only_kept_weights_of_pruned_layers_change(
    bench_of: Bench, tmp_path: Path, optimizer: str, dtype: str
) -> None:
    bench = bench_of(dtype=dtype)
    half = {n: ly.numel // 2 for n, ly in bench.loaded.layers.items() if "self_attn" in n}
    revision = bench.prune(DENSE, DENSE, half)
    before, dense = weights(bench, revision), weights(bench, DENSE)
    settings = options(12, optimizer=optimizer, learning_rate=1e-2)
    found = adapt(bench, revision, settings, tmp_path / "adapt")
    losses = [loss for _, loss in found.curve]
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])
    after = weights(bench, found.revision)
    pruned_names = {bench.loaded.layers[name].parameter for name in half}
    for name, weight in after.items():
        if name in pruned_names:
            assert torch.equal(weight == 0, before[name] == 0), name
            assert not torch.equal(weight, before[name]), name
        else:
            assert torch.equal(weight, dense[name]), name
    assert [p.requires_grad for p in bench.loaded.model.parameters()].count(True) == 0
    assert bench.tokens["adapt"] == found.tokens
    # What it began with is still there, and so is the dense model.
    assert all(torch.equal(weights(bench, revision)[name], before[name]) for name in before)


def test_layers_are_chosen_by_patterns(bench_of: Bench, tmp_path: Path) -> None:
    bench = bench_of()
    revision = pruned(bench)
    before = weights(bench, revision)
    chosen = options(4, layers=["*.down_proj", "model.layers.1.self_attn.*"])
    after = weights(bench, adapt(bench, revision, chosen, tmp_path / "adapt").revision)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        *(f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qkvo"),
    }
    with pytest.raises(InputError, match=r"no layer has a name like '\*\.nothing'"):
        adapt(bench, revision, options(4, layers=["*.nothing"]), tmp_path / "other")


class Interrupted:
    """Progress that is stopped, or killed in its place, after some calls."""

    def __init__(self, calls: int, error: BaseException) -> None:
        self._left, self._error = calls, error

    def __call__(self, *_: object) -> None:
        self._left -= 1
        if self._left < 0:
            raise self._error


@pytest.mark.parametrize(
    ("family", "dtype", "optimizer"),
    [
        ("LlamaConfig", "float32", "adamw"),
        ("LlamaConfig", "bfloat16", "adafactor"),
        ("Qwen3MoeConfig", "bfloat16", "adamw"),
    ],
)
def test_training_that_is_stopped_and_killed_ends_at_the_same_weights(
    bench_of: Bench, tmp_path: Path, family: str, dtype: str, optimizer: str
) -> None:
    bench = bench_of(family, dtype=dtype)
    revision = pruned(bench)
    settings = options(3, optimizer=optimizer)
    whole = adapt(bench, revision, settings, tmp_path / "whole")
    assert whole.revision != revision
    attempts, found = 0, None
    while found is None:
        # A stop leaves a checkpoint; what is killed has only the one of the last whole step.
        stopped = attempts % 2 == 0
        error = PrunewrightError("stopped") if stopped else KeyboardInterrupt()
        minutes = {"checkpoint_minutes": 10.0 if stopped else 0.0}
        try:
            found = adapt(
                bench,
                revision,
                settings.model_copy(update=minutes),
                tmp_path / "adapt",
                Interrupted(17 + attempts, error),
            )
        except (PrunewrightError, KeyboardInterrupt) as raised:
            assert raised is error  # noqa: PT017 - nothing else may end it
            bench = bench_of(family, dtype=dtype)
        attempts += 1
        assert attempts < 10
    assert attempts > 2
    assert found == whole


def test_best_weights_that_could_not_be_written_are_not_named(
    bench_of: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, folder = bench_of(), tmp_path / "adapt"
    revision = pruned(bench)
    whole = adapt(bench, revision, options(5), tmp_path / "whole")

    def full(*_: object) -> None:
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save_best", full)
        with pytest.raises(StoreError, match="full") as caught:
            adapt(bench, revision, options(5), folder)
    assert not list(folder.glob("best-*"))
    # Its frames are kept by whoever keeps the error; what the training held is not.
    students = [one for one in gc.get_objects() if type(one) is training._Student]
    assert caught.tb is not None
    assert students
    assert not any(one.masters or one.optimizer.state for one in students)
    found = adapt(bench, revision, options(5), folder)
    assert found == whole
    assert found.before > 0
    assert found.revision != revision


def test_training_begins_again_once_it_is_another(bench_of: Bench, tmp_path: Path) -> None:
    bench, folder = bench_of(), tmp_path / "adapt"
    revision = pruned(bench)
    with pytest.raises(PrunewrightError, match="stopped"):
        adapt(bench, revision, options(5), folder, Interrupted(25, PrunewrightError("stopped")))
    assert list(folder.glob("state-*"))
    other = options(5, learning_rate=2e-3)
    found = adapt(bench, revision, other, folder)
    assert found == adapt(bench, revision, other, tmp_path / "new")


def test_a_damaged_checkpoint_is_refused(bench_of: Bench, tmp_path: Path) -> None:
    bench, folder = bench_of(), tmp_path / "adapt"
    revision = pruned(bench)
    with pytest.raises(PrunewrightError, match="stopped"):
        adapt(bench, revision, options(5), folder, Interrupted(25, PrunewrightError("stopped")))
    (state,) = folder.glob("state-*")
    (state / "000003.safetensors").write_bytes(b"damaged")
    with pytest.raises(StoreError, match=r"000003\.safetensors.*begins again"):
        adapt(bench, revision, options(5), folder)
    (folder / "standing.json").write_text("{}")
    with pytest.raises(StoreError, match=r"standing\.json is damaged"):
        adapt(bench, revision, options(5), folder)


def test_training_ends_once_the_guard_turns_and_the_best_weights_count(
    bench_of: Bench, tmp_path: Path
) -> None:
    bench = bench_of()
    revision = pruned(bench)
    # The guard falls while the rate is low; a rate of chaos would end elsewhere on each processor.
    settings = options(40, learning_rate=0.03, warmup=0.7)
    told: list[tuple[str, int, int]] = []
    found = adapt(bench, revision, settings, tmp_path / "adapt", lambda *one: told.append(one))
    assert ("adapt (training)", 40 * STEP, 40 * STEP) in told  # the clock counts it as over
    losses = [value for _, value in found.guard]
    assert [tokens // STEP for tokens, _ in found.guard] == list(range(0, 4 * len(losses), 4))
    turned = [min(losses[: i + 1]) < losses[i] for i in range(len(losses))]
    assert 0 < losses.index(min(losses)) < 5
    assert len(losses) < 11, "this rate should be too high"
    assert all(turned[-5:])
    assert not any(all(turned[i : i + 5]) for i in range(len(losses) - 5))
    best = bench.guard_losses(found.revision)
    assert perplexity(best) == pytest.approx(min(losses), rel=1e-6)
    assert found.tokens == found.guard[-1][0] == found.curve[-1][0]
    steps = 4 * losses.index(min(losses))
    assert f"ended after {found.tokens // STEP} of 40 steps" in " ".join(found.notes)
    assert f"keeps the weights after {steps} steps" in " ".join(found.notes)


def test_a_rate_that_breaks_the_model_ends_the_training(bench_of: Bench, tmp_path: Path) -> None:
    bench = bench_of()
    revision = pruned(bench)
    before = weights(bench, revision)
    settings = options(5, learning_rate=1e38)
    found = adapt(bench, revision, settings, tmp_path / "adapt")
    # Nothing was better than the weights that it began with.
    assert found.revision == revision
    assert all(math.isfinite(loss) for _, loss in [*found.curve, *found.guard])
    (words,) = [note for note in found.notes if "not finite" in note]
    assert "adapt ended after 1 of 5 steps" in words
    assert "Lower adapt.learning_rate" in words
    assert all(torch.equal(weights(bench, revision)[name], before[name]) for name in before)
    # It is over: nothing is trained when the run is taken up again.
    assert adapt(bench, revision, settings, tmp_path / "adapt") == found
    assert not list((tmp_path / "adapt").glob("state-*"))


def test_training_that_does_not_fit_is_refused_with_what_would(
    bench_of: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of()
    revision = pruned(bench)
    sizes = {ly.kind: 2 * ly.numel for ly in bench.loaded.layers.values()}
    trained = sum(sizes.values())

    def refused(free: int) -> str:
        monkeypatch.setattr(training, "free_memory", lambda _: free)
        with pytest.raises(InputError, match="adapt needs about") as caught:
            adapt(bench, revision, options(5), tmp_path / "adapt")
        return str(caught.value)

    # Beside logits and activations it takes 12 bytes a weight with AdamW, 4 with Adafactor.
    passes = 6 * 4 * 48 * 512 + 240_000
    assert "Nothing of it fits" in refused(100_000)
    assert "adapt.optimizer=adafactor" in refused(passes + 8 * trained)
    some = refused(passes + 3 * trained)
    assert "*.mlp." in some
    assert "adapt.layers" in some
    assert not (tmp_path / "adapt").exists()
    # The advice, taken from a shell and followed.
    _, _, advice = some.partition("What would fit: ")
    words = shlex.split(advice)
    assert words[::2] == ["--set"] * (len(words) // 2)
    followed = load_config(None, [f"adapt={{tokens: {STEP}, batch: 4}}", *words[1::2]]).adapt
    assert followed is not None
    assert adapt(bench, revision, followed, tmp_path / "adapt").tokens == STEP
    # Where the rest of it holds already, only the layers are left to say.
    with pytest.raises(InputError, match=r"What would fit: --set 'adapt\.layers=[^']+'$"):
        adapt(bench, revision, options(1, optimizer="adafactor"), tmp_path / "other")
    monkeypatch.undo()
    assert isinstance(adapt(bench, revision, options(1), tmp_path / "other"), Adapted)


def test_what_a_training_has_on_disk_already_needs_no_room(
    bench_of: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, folder = bench_of(), tmp_path / "adapt"
    layers, settings = list(bench.loaded.layers.values()), options(1)
    where = (bench.loaded.dtype, bench.loaded.device)
    sizes = sizes_of(bench.loaded.model, layers, bench.request, settings, *where)
    needed = disk_bytes(settings, sizes, 8)
    free = needed - 1
    disk = SimpleNamespace(free=free)
    monkeypatch.setattr("prunewright.tools.adapt.memory.shutil.disk_usage", lambda _: disk)
    with pytest.raises(InputError, match=r"set adapt\.optimizer=adafactor, or give another --out"):
        check_disk(settings, sizes, 8, folder)
    (folder / "dense").mkdir(parents=True)
    (folder / "dense" / "000000.safetensors").write_bytes(b"1")
    check_disk(settings, sizes, 8, folder)
    disk.free -= 1
    with pytest.raises(InputError, match=r"free some space$"):
        check_disk(settings, sizes, 8, folder)


def test_what_gpus_have_left_together_counts_each_of_them_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = {0: 30 * 2**30, 1: 20 * 2**30}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (left[device.index], 2**40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2**30)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert free_memory([first]) == 32 * 2**30
    assert free_memory([first, second, first]) == 54 * 2**30


def test_what_cannot_be_trained_is_refused(bench_of: Bench, tmp_path: Path) -> None:
    bench = bench_of()
    with pytest.raises(InputError, match="no layer is pruned"):
        adapt(bench, DENSE, options(1), tmp_path / "adapt")
    away = bench_of(offload="disk")
    with pytest.raises(InputError, match="offload is disk"):
        adapt(away, pruned(away), options(1), tmp_path / "adapt")
