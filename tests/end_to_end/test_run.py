"""The whole run, through the public path, on a pico model."""

from pathlib import Path
from typing import Any

import pytest

from prunewright.graph import run


def test_greedy_run_reaches_the_target(pico_config: dict[str, Any], tmp_path: Path) -> None:
    result = run(pico_config, out=tmp_path / "run")
    assert result.metrics.status == "target_reached"
    assert result.metrics.sparsity == pytest.approx(0.3, abs=1e-3)
    assert result.metrics.sparsity <= 0.3
