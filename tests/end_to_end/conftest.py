"""A pico model that has learned something, and processes that can be killed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def learned_model(
    pico_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The pico Llama trained for a moment on the calibration text, so that pruning does harm."""
    directory = tmp_path_factory.mktemp("learned")
    source = pico_models()
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    corpus = resources.files("prunewright.tools") / "data" / "corpus" / "calibration"
    files = sorted((p for p in corpus.iterdir()), key=lambda p: p.name)
    ids = torch.tensor(tokenizer("\n\n".join(p.read_text("utf-8") for p in files[:8])).input_ids)
    windows = ids[: len(ids) // 48 * 48].reshape(-1, 48)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(80):
        batch = windows[torch.randint(len(windows), (16,), generator=generator)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    model.eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def config(learned_model: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of some four steps on the learned model."""
    monkeypatch.syspath_prepend(str(HERE))
    return learned_config(learned_model)


def learned_config(model: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "dtype": "float32",
        "device": "cpu",
        "agent": "greedy",
        "agent_options": {},
        "criterion": "wanda",
        "allocation": "uniform",
        "reconstruct": "none",
        "target": 0.3,
        "step": 0.1,
        "max_delta": 0.5,
        "guard": {"max_increase": 0.08},
        "profile": {"gradient_every": 2},
        "texts": {
            "windows": {"calibration": 4, "gradient": 2, "guard": 3, "test": 3, "length": 48}
        },
    }


@pytest.fixture(scope="session")
def reference_config(learned_model: Path) -> dict[str, Any]:
    """A run whose second step is rolled back."""
    return learned_config(learned_model) | {"agent": "import:scripted_agents:HarmfulOnce"}


Submit = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="session")
def submit() -> Iterator[Submit]:
    """Hand a job to `forked.py` and return what became of it."""
    with subprocess.Popen(
        [sys.executable, str(HERE / "forked.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "LANGSMITH_TRACING": "false"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def send(job: dict[str, Any]) -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            return answer

        yield send
        process.stdin.close()


@pytest.fixture(scope="session")
def reference(
    reference_config: dict[str, Any], submit: Submit, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The directory of an uninterrupted run of `reference_config`, made in a process of its own."""
    out = tmp_path_factory.mktemp("reference") / "run"
    answer = submit({"do": "run", "config": reference_config, "out": str(out)})
    assert "error" not in answer, answer
    return out


@pytest.fixture
def same_run() -> Callable[[Path, Path], None]:
    """Asserts that two run directories hold the same run, but for times and repeated work."""
    return assert_same_run


def assert_same_run(one: Path, other: Path) -> None:
    a, b = (json.loads((path / "metrics.json").read_text()) for path in (one, other))
    vary = {"seconds", "tokens", "peak_memory_bytes"}
    for found in (a, b):
        found["stages"] = [
            {k: v for k, v in stage.items() if k not in vary} for stage in found["stages"]
        ]
    assert {k: v for k, v in a.items() if k not in vary} == {
        k: v for k, v in b.items() if k not in vary
    }
    assert (one / "trace.jsonl").read_bytes() == (other / "trace.jsonl").read_bytes()
    for name in ("model.safetensors", "README.md", "config.json"):
        assert (one / "model" / name).read_bytes() == (other / "model" / name).read_bytes(), name
    assert sorted(p.name for p in (one / "model").iterdir()) == sorted(
        p.name for p in (other / "model").iterdir()
    )
    request_a, request_b = (
        yaml.safe_load((path / "config.yaml").read_text()) for path in (one, other)
    )
    assert request_a == request_b


@pytest.fixture(scope="session")
def make_model(
    pico_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A function that saves a random pico Llama of a shape, with its tokenizer."""

    def make(**shape: Any) -> Path:
        source, directory = pico_models(), tmp_path_factory.mktemp("shape")
        config = transformers.AutoConfig.from_pretrained(source)
        for key, value in (shape | {"head_dim": None}).items():
            setattr(config, key, value)
        config.head_dim = config.hidden_size // config.num_attention_heads
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(directory)
        return directory

    return make
