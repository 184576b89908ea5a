"""What a finished run leaves behind, read with nothing of ours."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaPreTrainedModel
from typer.testing import CliRunner

from prunewright.graph import resume, run
from prunewright.graph.cli import app
from prunewright.graph.running.runner import save
from prunewright.state import InputError, PrunewrightError, load_config
from prunewright.state.loading import validate_config
from prunewright.tools.saving.shards import Live, rewrite

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def metrics(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "metrics.json").read_text())
    return content


def test_plain_transformers_loads_it_with_exactly_the_zeros_reported(reference: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(reference / "model")
    weights = {
        name: p
        for name, p in model.named_parameters()
        if name.split(".")[-2] in PROJECTIONS and name.startswith("model.layers.")
    }
    assert len(weights) == 14
    zeros = sum(int((p == 0).sum()) for p in weights.values())
    assert zeros / sum(p.numel() for p in weights.values()) == metrics(reference)["sparsity"]
    assert zeros > 0


def test_kept_weights_and_all_else_are_the_dense_ones(
    reference: Path, reference_config: dict[str, Any]
) -> None:
    dense = load_file(Path(reference_config["model"]) / "model.safetensors")
    saved = load_file(reference / "model" / "model.safetensors")
    assert saved.keys() == dense.keys()
    for name, weight in saved.items():
        if name.split(".")[-2] in PROJECTIONS:
            kept = weight != 0
            assert torch.equal(weight[kept], dense[name][kept])
        else:
            assert torch.equal(weight, dense[name])


@pytest.mark.parametrize("criterion", ["magnitude", "sparsegpt"])
def test_a_layer_that_is_kept_in_float32_keeps_its_own_values(
    criterion: str,
    reference_config: dict[str, Any],
    pico_models: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner.to(self.down_proj.weight.dtype)).to(x.dtype)  # type: ignore[no-any-return]

    # As T5 keeps one of its layers.
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules", ["down_proj"])
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    model = tmp_path / "model"
    shutil.copytree(pico_models(), model)
    dense = load_file(model / "model.safetensors")
    # A checkpoint of mixed dtypes, too: the last block's tensors are stored as bfloat16.
    dense = {n: w.bfloat16() if "layers.1." in n else w for n, w in dense.items()}
    save_file(dense, model / "model.safetensors", {"format": "pt"})
    changes = {"model": str(model), "dtype": "float16", "criterion": criterion, "agent": "uniform"}
    found = run(reference_config | changes, tmp_path / "run")
    assert found.metrics.steps > 1
    saved = load_file(found.model_directory / "model.safetensors")
    wide = [n for n in saved if "down_proj" in n]
    assert len(wide) == 2
    for name in wide:
        kept = saved[name] != 0
        assert saved[name].dtype == dense[name].dtype
        assert 0 < int(kept.sum()) < kept.numel()
        if criterion == "magnitude":
            assert torch.equal(saved[name][kept], dense[name][kept])
        assert bool((saved[name] - dense[name])[kept].abs().max() < 1)


def test_its_perplexity_is_the_reported_one(
    reference: Path, reference_config: dict[str, Any]
) -> None:
    """The test windows are the first of the test text; losses by transformers' own forward."""
    import random
    from importlib import resources

    model = transformers.AutoModelForCausalLM.from_pretrained(reference / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference / "model")
    folder = resources.files("prunewright.tools") / "data" / "corpus" / "test"
    pieces = sorted((p for p in folder.iterdir() if p.name.endswith(".txt")), key=lambda p: p.name)
    random.Random("test").shuffle(pieces)
    text = "\n\n".join(p.read_text(encoding="utf-8").strip() for p in pieces)
    ids = tokenizer(text).input_ids
    losses = []
    for index in range(3):
        window = torch.tensor([ids[48 * index : 48 * (index + 1)]])
        with torch.no_grad():
            losses.append(float(model(input_ids=window, labels=window).loss))
    reported = metrics(reference)["perplexity"]["test"]["final"]
    assert math.exp(sum(losses) / 3) == pytest.approx(reported, rel=1e-4)
    dense = transformers.AutoModelForCausalLM.from_pretrained(reference_config["model"])
    with torch.no_grad():
        before = [
            float(dense(input_ids=w, labels=w).loss)
            for w in (torch.tensor([ids[48 * i : 48 * (i + 1)]]) for i in range(3))
        ]
    assert math.exp(sum(before) / 3) == pytest.approx(
        metrics(reference)["perplexity"]["test"]["dense"], rel=1e-4
    )


def test_the_config_is_written_whole_and_reads_back(
    reference: Path, reference_config: dict[str, Any]
) -> None:
    assert load_config(reference / "config.yaml") == validate_config(reference_config)
    assert load_config(reference / "config.yaml").seed == 0


def test_the_manifest_says_what_the_run_stood_on(
    reference: Path, reference_config: dict[str, Any]
) -> None:
    manifest = json.loads((reference / "manifest.json").read_text())
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"]["transformers"] == transformers.__version__
    assert manifest["model"]["name"] == reference_config["model"]
    weights = load_file(Path(reference_config["model"]) / "model.safetensors")
    assert manifest["model"]["prunable_weights"] == sum(
        w.numel() for name, w in weights.items() if name.split(".")[-2] in PROJECTIONS
    )
    assert manifest["model"]["prunable_layers"] == 14
    assert len({text["sha256"] for text in manifest["texts"].values()}) == 3
    assert manifest["seed"] == 0
    assert manifest["dtype"] == "float32"
    assert manifest["device"] == "cpu"
    assert manifest["request"]["target"] == 0.3


def test_the_card_has_the_numbers(reference: Path) -> None:
    card = (reference / "model" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    values = metrics(reference)
    assert "pruning" in front["tags"]
    assert f"{values['sparsity']:.2%}" in card
    for text in ("guard", "test"):
        for which in ("dense", "final"):
            assert f"{values['perplexity'][text][which]:.3f}" in card
    assert values["revision"] in card
    assert f"{values['steps']} steps, {values['rollbacks']} rolled back" in card


def test_metrics_agree_with_the_trace(reference: Path) -> None:
    values = metrics(reference)
    lines = (reference / "trace.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert values["steps"] == len(steps)
    assert values["decisions"] == len(steps)
    assert values["rollbacks"] == sum(s["verdict"] == "rolled_back" for s in steps)
    assert values["revision"] == steps[-1]["revision"]
    assert values["sparsity"] == steps[-1]["sparsity"]
    assert values["perplexity"]["guard"]["dense"] == steps[0]["perplexity_before"]
    assert values["perplexity"]["guard"]["final"] == steps[-1]["candidate_perplexity"]
    nodes = {"profile", "agent_decide", "apply_prune", "evaluate_ppl", "rollback"}
    assert nodes <= set(values["seconds"])
    parts = sum(v for k, v in values["seconds"].items() if k != "total")
    assert values["seconds"]["total"] == pytest.approx(parts)
    # Guard windows: the dense model and one candidate a step, 3 windows of 48 tokens each.
    assert values["tokens"]["guard"] == (1 + len(steps)) * 3 * 48
    assert values["tokens"]["test"] == 2 * 3 * 48
    assert values["peak_memory_bytes"] > 50_000_000


def perturb(name: str, index: int, value: float | None) -> Any:
    def spoil(source: Path, target: Path, live: Live) -> None:
        rewrite(source, target, live)
        tensors = load_file(target)
        flat = tensors[name].view(-1)
        flat[index] = flat[index] * 3 + 2 if value is None else value
        save_file(tensors, target, {"format": "pt"})

    return spoil


def first_zero(run_directory: Path, name: str) -> int:
    weight = load_file(run_directory / "model" / "model.safetensors")[name].view(-1)
    return int((weight == 0).nonzero()[0])


@pytest.mark.parametrize("what", ["a pruned weight", "a kept weight", "an embedding"])
def test_a_model_that_saves_wrongly_is_caught_and_the_run_can_be_finished(
    what: str,
    reference: Path,
    reference_config: dict[str, Any],
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = "model.layers.0.mlp.down_proj.weight"
    pruned = first_zero(reference, layer)
    assert config["model"] == reference_config["model"]
    spoilt = {
        "a pruned weight": perturb(layer, pruned, 1e-3),
        "a kept weight": perturb("model.layers.1.self_attn.o_proj.weight", 5, 60.0),
        "an embedding": perturb("model.norm.weight", 3, 40.0),
    }[what]
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("prunewright.tools.saving.model.rewrite", spoilt)
        with pytest.raises(PrunewrightError, match="reloads with other"):
            run(reference_config, out=out)
    assert not (out / "model").exists()
    assert not (out / "metrics.json").exists()
    assert [p.name for p in out.iterdir() if "saving" in p.name] == []
    assert resume(out).metrics.revision == metrics(reference)["revision"]
    assert (out / "model" / "model.safetensors").read_bytes() == (
        reference / "model" / "model.safetensors"
    ).read_bytes()


def test_whoever_may_read_the_run_may_read_the_weights(reference: Path) -> None:
    weights = sorted((reference / "model").glob("*.safetensors"))
    assert weights
    for file in weights:
        assert file.stat().st_mode == (reference / "metrics.json").stat().st_mode


def test_a_model_that_was_deleted_is_made_from_its_masks_again(
    reference: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(reference, tmp_path / "run"))
    before = {p.name: p.read_bytes() for p in (out / "model").iterdir()}
    runner = CliRunner()
    refused = runner.invoke(app, ["save", str(out)])
    assert refused.exit_code == 2
    assert "is there already" in " ".join(refused.stderr.split())
    shutil.rmtree(out / "model")
    told = runner.invoke(app, ["resume", str(out)])
    assert f"prunewright save {out}" in "".join(told.output.split("\n"))
    done = runner.invoke(app, ["save", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["model_directory"] == str(out / "model")
    assert {p.name: p.read_bytes() for p in (out / "model").iterdir()} == before


def test_what_has_no_model_to_save_is_told(
    config: dict[str, Any], reference: Path, tmp_path: Path
) -> None:
    unfinished = Path(shutil.copytree(reference, tmp_path / "unfinished"))
    (unfinished / "metrics.json").unlink()
    with pytest.raises(InputError, match=r"not finished: prunewright resume"):
        save(unfinished)
    nothing = tmp_path / "nothing"
    run(config | {"guard": {"max_increase": 1e-9}, "max_stalls": 1}, out=nothing)
    with pytest.raises(InputError, match="pruned nothing"):
        save(nothing)
