"""Changes of a model's directory, such as other people's directories have."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

Change = Callable[[Path], object]


def configure(**values: Any) -> Change:
    """Set keys of config.json."""

    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def put(name: str, content: Any) -> Change:
    """Write a file; what is no bytes as JSON."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda directory: (directory / name).write_bytes(data)


def weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors."""
    return load_file(directory / "model.safetensors")


def store(directory: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> None:
    """Write a file of tensors as transformers does."""
    save_file({k: t.contiguous() for k, t in tensors.items()}, directory / name, {"format": "pt"})
