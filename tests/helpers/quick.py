"""The configuration of a run that takes a moment and is never rolled back."""

from pathlib import Path
from typing import Any


def quick_config(model: Path | str, **changes: Any) -> dict[str, Any]:
    """Two steps of `uniform` over a few tokens, unless changes say otherwise."""
    windows = {"calibration": 1, "gradient": 1, "guard": 2, "test": 1, "length": 16}
    return {
        "model": str(model),
        "dtype": "float32",
        "device": "cpu",
        "agent": "uniform",
        "target": 0.2,
        "step": 0.11,
        "guard": {"max_increase": 1e9},
        "texts": {"windows": windows},
    } | changes
