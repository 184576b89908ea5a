"""A model of each family through all of a run: a rollback, a stop, a resume, and the saved file."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from composite import gemma3, qwen2_audio
from quick import quick_config
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from prunewright.graph import baseline, resume, run
from prunewright.state import PruneConfig
from prunewright.tools.evaluation import evaluate
from prunewright.tools.texts.windows import load_windows
from tests.conftest import VOCABULARY, pico_tokenizer

WINDOWS = {"calibration": 2, "gradient": 1, "guard": 2, "test": 1, "length": 16}
STEPS = [{"layers": {"*": 0.1}}, {"layers": {"*": 0.8}}]
"""The second one breaks the model."""


@dataclass(frozen=True)
class Family:
    """What is odd about a family.

    Attributes:
        dense: in the names of tensors that stay as they are.
        criterion: of its run.
        reconstruct: likewise.
        inside: whether these tensors are in the blocks, so that notes name them.
        make: a random model of it, where `pico_models` has none.
    """

    dense: str
    criterion: str = "fisher"
    reconstruct: bool = False
    inside: bool = True
    make: Callable[[], transformers.PreTrainedModel] | None = None


FAMILIES: dict[str, Family] = {
    "GPT2Config": Family("wte", inside=False),
    "OpenAIGPTConfig": Family("tokens_embed", "obs", inside=False),
    "Gemma3TextConfig": Family("embed_tokens", inside=False),
    "Gemma3nTextConfig": Family("altup"),
    "Gemma4TextConfig": Family("router"),
    "Lfm2Config": Family("conv.conv"),
    "MixtralConfig": Family(".gate.", "sparsegpt", reconstruct=True),
    "Qwen3MoeConfig": Family(".gate."),
    "Qwen4ExpTextConfig": Family("indexer"),
    "DbrxConfig": Family("router"),
    "JetMoeConfig": Family("router", "gblm"),
    "Llama4TextConfig": Family("router", "sparsegpt", reconstruct=True),
    "LongcatFlashConfig": Family("router"),
    "DeepseekV32Config": Family("indexer"),
    "DeepseekV4Config": Family("indexer"),
    "GlmMoeDsaConfig": Family("indexer"),
    "MambaConfig": Family("conv1d"),
    "Mamba2Config": Family("conv1d", "wanda", reconstruct=True),
    "FalconMambaConfig": Family("conv1d"),
    "xLSTMConfig": Family("igate_preact"),
    "ZambaConfig": Family("conv1d"),
    "Zamba2Config": Family("conv1d"),
    "ZayaConfig": Family("router"),
    "Gemma 3": Family("vision", "sparsegpt", inside=False, make=gemma3),
    "Qwen2-Audio": Family("audio", "wanda", inside=False, make=qwen2_audio),
}


class PowerError(Exception):
    """The power fails."""


def fail(mode: str, event: dict[str, Any]) -> None:
    """The power fails once the first step is done."""
    if mode == "updates" and "reflect" in event:
        raise PowerError


def stored(directory: Path) -> dict[str, Tensor]:
    return {k: t for path in directory.glob("*.safetensors") for k, t in load_file(path).items()}


def trace(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "trace.jsonl").read_text().splitlines()]


def loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits.float(), ids[:, 1:].flatten())


def learn(model: Any, ids: Tensor) -> None:
    """Learn a few windows by heart, so that the loss of them tells what is broken."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        loss(model, ids).backward()
        optimizer.step()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_is_rolled_back_stopped_resumed_saved_and_evaluated(
    name: str,
    pico_models: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, source = FAMILIES[name], tmp_path / "source"
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    settings = {
        "model": str(source), "dtype": "float32", "device": "cpu",
        "criterion": family.criterion, "reconstruct": family.reconstruct,
        "agent": "import:scripted_agents:Steps", "agent_options": {"steps": STEPS},
        "target": 0.9, "step": 0.9, "max_delta": 0.9, "max_layer_sparsity": 0.95, "max_steps": 2,
        "guard": {"max_increase": 0.5}, "texts": {"windows": WINDOWS},
    }  # fmt: skip
    config = PruneConfig(**settings)
    windows = load_windows(config.texts, pico_tokenizer(), config.seed, rows=VOCABULARY)
    torch.manual_seed(0)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = family.make() if family.make else load(pico_models(name), dtype=torch.float32)
    learn(model, windows.guard)
    model.save_pretrained(source)
    pico_tokenizer().save_pretrained(source)

    with pytest.raises(PowerError):
        run(settings, tmp_path / "run", fail)
    monkeypatch.setattr("prunewright.tools.bench.workbench._current", None)  # a new process
    found = resume(tmp_path / "run")
    steps = trace(found.directory)
    assert [step["verdict"] for step in steps] == ["accepted", "rolled_back"]

    before, after = stored(source), stored(found.model_directory)
    assert {k: t.dtype for k, t in after.items()} == {k: t.dtype for k, t in before.items()}
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    zeros = sum(int((after[key] == 0).sum()) for key in changed)
    # Where blocks share a parameter the file may hold it under one name: it is counted once.
    total = sum(before[key].numel() for key in changed)
    manifest = json.loads((found.directory / "manifest.json").read_text())
    assert total == manifest["model"]["prunable_weights"]
    assert zeros / total == found.metrics.sparsity == pytest.approx(0.1, abs=0.001)
    left = [key for key in before if family.dense in key]
    assert left
    assert not set(left) & set(changed)
    assert any(family.dense.strip(".") in note for note in manifest["notes"]) == family.inside
    assert set(manifest["notes"]) <= set(steps[0]["notes"])
    if not family.reconstruct and family.criterion not in ("sparsegpt", "obs"):
        kept = [(before[key], after[key]) for key in changed]
        assert all(torch.equal(old[new != 0], new[new != 0]) for old, new in kept)

    whole = type(model).from_pretrained(found.model_directory).eval()
    with torch.no_grad():
        perplexity = math.exp(float(loss(whole, windows.test)))
    assert perplexity == pytest.approx(found.metrics.perplexity.test.final, rel=1e-3)
    scored = evaluate(
        str(found.model_directory), [("embedded", 1)], length=16, dtype="float32", device="cpu"
    )
    assert scored.sparsity == found.metrics.sparsity
    assert scored.texts[0].perplexity == pytest.approx(perplexity, rel=1e-3)


def test_a_run_and_a_baseline_tell_of_experts_that_saw_few_tokens(
    pico_models: Callable[..., Path], tmp_path: Path
) -> None:
    config = quick_config(pico_models("Qwen3MoeConfig"), criterion="wanda", max_steps=1)
    for result in (run(config, tmp_path / "run"), baseline(config, tmp_path / "baseline")):
        words = " ".join(trace(result.directory)[0]["notes"])
        assert "saw fewer than 16 calibration tokens" in words, result
