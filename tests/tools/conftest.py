"""What the tests of `prunewright.tools` share: loaded pico models of every family."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prunewright.tools import fast, masks
from prunewright.tools.execution import weights
from prunewright.tools.model.loading import LoadedModel, load_model

FAMILIES = (
    "LlamaConfig",
    "Qwen3Config",
    "Gemma2Config",
    "OPTConfig",
    "GPT2Config",
    "GPTNeoXConfig",
    "PhiConfig",
    "MixtralConfig",
    "Qwen3MoeConfig",
)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each of the pico families in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEWRIGHT_CACHE", str(cache))


@pytest.fixture
def load(pico_models: Callable[..., Path]) -> Callable[[str], LoadedModel]:
    """A function that loads the pico model of a family in float32 on the CPU."""

    def get(family: str = "LlamaConfig") -> LoadedModel:
        return load_model(str(pico_models(family)), dtype="float32", device="cpu")

    return get


@pytest.fixture
def windows() -> Tensor:
    """Three windows of 40 random ids."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(2, 512, (3, 40), generator=generator)


@pytest.fixture
def copy(pico_models: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function that copies the directory of a pico model, to be changed."""

    def get(family: str = "LlamaConfig", name: str = "model") -> Path:
        return Path(shutil.copytree(pico_models(family), tmp_path / name))

    return get


@pytest.fixture(scope="module", params=["processor", "elsewhere"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways to a result: what a device other than the processor does runs here, too."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "elsewhere":
            go_elsewhere(patch)
        yield


def go_elsewhere(patch: pytest.MonkeyPatch) -> None:
    """Let tensors be taken for those of another device; all of its code runs on a processor."""
    for module in (fast, masks, weights):
        patch.setattr(module, "on_processor", lambda _: False)
    patch.setattr(fast, "SORTED", 1000)
