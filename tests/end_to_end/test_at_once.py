"""Two processes on one directory at the same moment: one goes on, the other touches nothing."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quick import quick_config

from prunewright.graph import resume, run

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def place(pico_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("at_once")


@pytest.fixture(scope="module")
def answers(pico_models: Callable[..., Path], place: Path) -> dict[str, list[list[str]]]:
    """What two processes at once came to, by kind and try."""
    config = quick_config(pico_models(), step=0.1)

    def stop(mode: str, event: dict[str, Any]) -> None:
        if mode == "updates" and "reflect" in event:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, out=place / "stopped", on_event=stop)
    (place / "config.json").write_text(json.dumps(config))
    command = [sys.executable, HERE / "at_once.py", place / "config.json", place / "stopped", place]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    found: dict[str, list[list[str]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kind", ["run", "baseline", "resume", "gc", "fork", "compare"])
def test_of_two_at_once_exactly_one_goes_on(
    kind: str, answers: dict[str, list[list[str]]], place: Path
) -> None:
    for number, both in enumerate(answers[kind]):
        out = place / f"{kind}-{number}"
        refused = [words for words in both if words != "done"]
        # Where it may be done twice, one may have ended before the other began.
        assert len(refused) == 1 or (kind in ("resume", "gc", "compare") and not refused), both
        for words in refused:
            assert words.startswith("InputError: "), both
            assert "working in" in words or "holds another run" in words or "not empty" in words
        if kind == "gc":
            resume(out)
        if kind != "compare":
            assert json.loads((out / "metrics.json").read_text())["revision"]
    assert [p.name for p in place.iterdir() if p.name.startswith(".forking")] == []
