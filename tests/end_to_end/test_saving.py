"""The saved directory is the input's with other weights, and what would fail is found before."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunewright.graph import baseline, fork, resume, run
from prunewright.graph.running.study import compare
from prunewright.state import InputError, StoreError
from prunewright.tools.saving.shards import merge


@pytest.fixture
def store(pico_models: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function that stores a pico model again, in a dtype and in shards."""

    def make(family: str = "LlamaConfig", dtype: str = "float32", shard: str = "5GB") -> Path:
        source, directory = pico_models(family), tmp_path / "input"
        shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype)
        )
        model.save_pretrained(directory, max_shard_size=shard)
        return directory

    return make


@pytest.fixture
def settings(pico_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return pico_config | {"model": str(tmp_path / "input"), "dtype": "bfloat16"}


def tensors(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def headers(directory: Path) -> dict[str, bytes]:
    return {
        path.name: (data := path.read_bytes())[: 8 + int.from_bytes(data[:8], "little")]
        for path in directory.glob("*.safetensors")
    }


def without_prefix(directory: Path) -> None:
    """Names as GPT-2's own file has them."""
    path = directory / "model.safetensors"
    renamed = {n.removeprefix("transformer."): t for n, t in load_file(path).items()}
    save_file(renamed, path, {"format": "pt"})


def with_ties(directory: Path) -> None:
    """A configuration that ties the head, beside weights that have one of its own."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


@pytest.mark.parametrize(
    ("family", "dtype", "shard", "alter"),
    [
        ("LlamaConfig", "float32", "5GB", None),
        ("LlamaConfig", "float16", "60KB", None),
        ("LlamaConfig", "float16", "5GB", with_ties),
        ("LlamaConfig", "bfloat16", "60KB", None),
        ("GPT2Config", "float32", "5GB", without_prefix),  # its embedding is tied, too
        ("Qwen3MoeConfig", "float16", "60KB", None),  # its experts are fused when it is loaded
        ("MixtralConfig", "bfloat16", "5GB", None),
    ],
)
def test_what_no_mask_touched_is_stored_as_it_was(
    store: Callable[..., Path],
    settings: dict[str, Any],
    tmp_path: Path,
    family: str,
    dtype: str,
    shard: str,
    alter: Callable[[Path], None] | None,
) -> None:
    source = store(family, dtype, shard)
    if alter is not None:
        alter(source)
    result = baseline(settings, out=tmp_path / "run")
    before, after = tensors(source), tensors(result.model_directory)
    assert headers(source) == headers(result.model_directory)
    zeros = total = 0
    for name, tensor in before.items():
        kept = after[name] != 0
        assert torch.equal(after[name][kept], tensor[kept])
        if not torch.equal(after[name], tensor):
            zeros, total = zeros + int((~kept).sum()), total + kept.numel()
    assert zeros / total == result.metrics.sparsity
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            assert (result.model_directory / path.name).read_bytes() == path.read_bytes()
    card = (result.model_directory / "README.md").read_text()
    words = f"computed in bfloat16, perplexities too; the values saved are the stored {dtype} ones"
    assert (words in card) == (dtype != "bfloat16")


def test_updated_weights_are_stored_in_the_dtype_of_the_file(
    learned_model: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    # One that has learned something: of another an update is not kept, as it makes nothing better.
    source = Path(shutil.copytree(learned_model, tmp_path / "input"))
    halves = {name: tensor.half() for name, tensor in tensors(source).items()}
    save_file(halves, source / "model.safetensors", {"format": "pt"})
    windows = {"calibration": 16, "gradient": 2, "guard": 8, "test": 3, "length": 48}
    more = {"criterion": "sparsegpt", "target": 0.5, "texts": {"windows": windows}}
    result = baseline(settings | more, out=tmp_path / "run")
    assert result.metrics.stages[0].kept
    before, after = tensors(source), tensors(result.model_directory)
    pruned = [n for n in before if "_proj" in n]
    assert {t.dtype for t in after.values()} == {torch.float16}
    zeros = sum(int((after[n] == 0).sum()) for n in pruned)
    assert zeros / sum(after[n].numel() for n in pruned) == result.metrics.sparsity
    assert all((after[n] != before[n])[after[n] != 0].any() for n in pruned)
    assert all(torch.equal(after[n], before[n]) for n in before if n not in pruned)


def test_no_value_becomes_zero_or_infinite_in_a_narrower_dtype() -> None:
    stored = torch.tensor([1.0, 1 / 3, 0.0, 2.0, 2.0, 2.0, -0.0]).half()
    live = torch.tensor([0.0, 1 / 3, 0.0, 1e30, -1e-30, 3.0, -0.0]).bfloat16()
    live[1] = stored[1].bfloat16()
    written = merge(stored, live)
    assert written.tolist() == [0.0, stored[1].item(), 0.0, 65504.0, -(2.0**-24), 3.0, 0.0]
    assert bool(torch.signbit(written[-1]))


@pytest.mark.parametrize("family", ["LlamaConfig", "MixtralConfig"])
@pytest.mark.parametrize("where", ["among the others", "in a shard of their own"])
def test_tensors_that_the_model_does_not_hold_stay(
    store: Callable[..., Path],
    settings: dict[str, Any],
    tmp_path: Path,
    family: str,
    where: str,
) -> None:
    source = store(family)
    extra = {"mtp.head.weight": torch.randn(8, 32), "mtp.norm.weight": torch.randn(32).half()}
    known = load_file(source / "model.safetensors")
    if where == "among the others":
        save_file(known | extra, source / "model.safetensors", {"format": "pt", "by": "me"})
    else:
        (source / "model.safetensors").unlink()
        parts = {
            "model-00001-of-00002.safetensors": known,
            "model-00002-of-00002.safetensors": extra,
        }
        for name, part in parts.items():
            save_file(part, source / name, {"format": "pt"})
        weight_map = {key: name for name, part in parts.items() for key in part}
        (source / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
        )
    result = baseline(settings, out=tmp_path / "run")
    after = tensors(result.model_directory)
    assert headers(source) == headers(result.model_directory)
    assert all(torch.equal(after[name], tensor) for name, tensor in extra.items())
    words = "2 tensors that are not part of the loaded model (mtp.head.weight, mtp.norm.weight)"
    assert words in (result.model_directory / "README.md").read_text()
    assert words in (tmp_path / "run" / "trace.jsonl").read_text()


def test_files_that_belong_to_the_model_are_copied_and_no_others(
    store: Callable[..., Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    source = store()
    (tmp_path / "secret").write_text("mine")
    kept = [
        "LICENSE", "NOTICE.md", "preprocessor_config.json", "chat_template.jinja", "code.py",
        "templates/tool.jinja",
    ]  # fmt: skip
    left = [
        "pytorch_model.bin", "model.gguf", "consolidated.00.pth", "optimizer.pt", ".gitattributes",
        ".cache/x", "original/params.json", "original/consolidated.00.pth", "onnx/model.onnx",
        "onnx/config.json",
    ]  # fmt: skip
    for name in kept + left:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    (source / "elsewhere").symlink_to(tmp_path)
    # What transformers reads may be a link to anywhere, and generation settings that it would
    # refuse to write are no reason not to prune.
    (source / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (source / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    (source / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": false}')
    # A run's directory may lie in the model's.
    model = baseline(settings, out=source / "runs" / "one").model_directory
    for name in [*kept, "tokenizer.json", "generation_config.json", "config.json"]:
        assert (model / name).read_bytes() == (source / name).read_bytes()
        assert not (model / name).is_symlink()
    left += ["notes.txt", "elsewhere", "runs"]
    assert [name for name in left if (model / name).exists()] == []
    modes = {path.stat().st_mode for path in model.iterdir() if path.is_file()}
    assert modes == {(model / "README.md").stat().st_mode}


def too_large(source: Path) -> None:
    with (source / "samples.dat").open("wb") as file:
        file.truncate(2**42)  # holes: it takes no room here


@pytest.mark.parametrize("act", [run, baseline])
def test_too_little_room_is_refused_before_anything_is_scored(
    store: Callable[..., Path],
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[..., Any],
) -> None:
    too_large(store())
    monkeypatch.setattr("prunewright.tools.execution.base.Execution.window_losses", pytest.fail)
    with pytest.raises(StoreError, match=r"too little room.* 4,39\d(,\d{3}){3} of them"):
        act(settings, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("act", [run, baseline])
def test_what_cannot_be_solved_block_by_block_is_refused_before_anything_is_scored(
    pico_models: Callable[..., Path],
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[..., Any],
) -> None:
    monkeypatch.setattr("prunewright.tools.execution.base.Execution.window_losses", pytest.fail)
    settings |= {"model": str(pico_models("HrmTextConfig")), "criterion": "sparsegpt"}
    with pytest.raises(InputError, match="cannot be pruned block by block"):
        act(settings, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_fork_tries_to_save_in_its_own_directory(
    store: Callable[..., Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    source = store()
    run(settings, out=tmp_path / "run")
    too_large(source)
    with pytest.raises(StoreError, match="fork has too little room"):
        fork(tmp_path / "run", 1, out=tmp_path / "fork")
    (source / "samples.dat").unlink()
    assert resume(tmp_path / "fork").metrics.status == "target_reached"


def test_a_file_that_cannot_be_read_again_is_named(
    store: Callable[..., Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    source = store()
    (source / "generation_config.json").write_text("none")
    with pytest.raises(InputError, match=f"'{source}/generation_config.json' is not a valid JSON"):
        run(settings, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_comparison_that_cannot_be_saved_scores_nothing(
    store: Callable[..., Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    too_large(store())
    config = {
        "base": {key: settings[key] for key in settings if key not in ("target", "agent")},
        "methods": [{"name": "wanda"}],
        "seeds": [0],
        "targets": [0.3],
        "evaluation": {"texts": [{"name": "test", "source": "embedded", "windows": 2}]},
    }
    found = compare(config, tmp_path / "out")
    (experiment,) = found.experiments
    assert "too little room" in experiment.error
    assert "not scored" in found.dense.error
    assert not list((tmp_path / "out").rglob("evaluation.json"))


def test_any_error_of_saving_leaves_a_run_that_can_go_on(
    store: Callable[..., Path],
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, out = store(), tmp_path / "run"

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("nobody thought of this")

    with monkeypatch.context() as patch:
        patch.setattr("prunewright.tools.saving.model.rewrite", fail)
        with pytest.raises(StoreError, match=f"nobody thought of this.*resume {out}"):
            run(settings, out=out)
    assert not (out / "model").exists()
    assert resume(out).metrics.status == "target_reached"
    assert headers(source) == headers(out / "model")


def in_the_hubs_cache(source: Path) -> Path:
    """Move a model to where the hub's client keeps it: a snapshot of links to blobs."""
    repository = source.parent / "models--some-org--Some-Model-7B"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        blob = path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


@pytest.mark.parametrize(
    ("noted", "cached", "base"),
    [
        (None, False, None),
        ("/home/me/models/llama", False, None),
        ("results/checkpoint-500", False, None),
        ("some-org/Some-Model-7B", False, "some-org/Some-Model-7B"),
        (None, True, "some-org/Some-Model-7B"),
    ],
)
def test_the_card_names_the_base_model_where_the_hub_knows_it(
    store: Callable[..., Path],
    settings: dict[str, Any],
    tmp_path: Path,
    noted: str | None,
    cached: bool,
    base: str | None,
) -> None:
    source = store()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"_name_or_path": noted}))
    (source / "LICENSE").write_text("terms")
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: terms\ntags: [x]\n---\nText\n---\n"
    )
    if cached:
        source = in_the_hubs_cache(source)
    settings |= {"model": str(source), "max_steps": 1, "allocation": "owl"}
    result = baseline(settings | {"allocation_options": {"lam": 0.1}}, out=tmp_path / "run")
    assert (result.model_directory / "LICENSE").read_text() == "terms"
    _, front, text = (result.model_directory / "README.md").read_text().split("---\n", 2)
    found = yaml.safe_load(front)
    assert found.get("base_model") == base
    assert found["pipeline_tag"] == "text-generation"
    assert (found["license"], found["license_name"]) == ("other", "terms")
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["allocation_options"] == {"lam": 0.1}
    assert recipe["guard"]["max_increase"] == 0.15
    assert recipe["agent"] == "baseline"
