"""A run that calibrates on what its dense model wrote: written once, kept, checked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunewright import baseline, fork, resume, run
from prunewright.state import InputError, StoreError
from prunewright.tools.bench import workbench
from tests.helpers.quick import quick_config


@pytest.fixture
def config(pico_models: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    config = quick_config(pico_models(), criterion="wanda", reconstruct="none")
    windows = config["texts"]["windows"] | {"calibration": 2}
    return config | {"texts": {"calibration": ["embedded", "self"], "windows": windows}}


def forget() -> None:
    """As in a new process, no model is held."""
    workbench._current = None


def text_hashes(run_directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_directory / "manifest.json").read_text())["texts"]
    return found


def test_it_is_written_once_and_a_run_goes_on_and_is_forked_with_it(
    config: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(config, out)
    own = (out / "self.jsonl").read_bytes()
    assert all(json.loads(line)["text"] for line in own.splitlines())
    source = text_hashes(out)["calibration"]["source"]
    assert source == "embedded[calibration] (1 windows) + self (1 windows)"
    # Text of a hundred steps that nobody would write again in the same way.
    stamp = (out / "self.jsonl").stat().st_mtime_ns
    forget()
    resume(out, target=0.25, offload="disk")
    assert (out / "self.jsonl").stat().st_mtime_ns == stamp
    other = tmp_path / "fork"
    forget()
    fork(out, 1, other)
    assert (other / "self.jsonl").read_bytes() == own
    # A model that is loaded anew writes the same; another run of the process has it from there.
    baseline(config, tmp_path / "again")
    assert (tmp_path / "again" / "self.jsonl").read_bytes() == own
    baseline(config, tmp_path / "and again")
    assert (tmp_path / "and again" / "self.jsonl").read_bytes() == own
    assert text_hashes(tmp_path / "and again") == text_hashes(out)


def test_a_run_does_not_go_on_with_other_text(config: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(config, out)
    path = out / "self.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({"text": f"x{r['text']}"}) + "\n" for r in rows))
    forget()
    with pytest.raises(StoreError, match="its texts is no longer what it began with"):
        resume(out, target=0.25)


def test_a_model_whose_blocks_are_elsewhere_takes_text_of_another_run(
    config: dict[str, Any], tmp_path: Path
) -> None:
    away = config | {"offload": "disk"}
    forget()
    with pytest.raises(InputError, match=r"let texts.calibration name the self.jsonl"):
        run(away, tmp_path / "away")
    assert not (tmp_path / "away").exists()
    baseline(config, tmp_path / "here")
    forget()
    given = {"calibration": str(tmp_path / "here" / "self.jsonl"), "guard": "embedded"}
    run(away | {"texts": config["texts"] | given}, tmp_path / "away")
    assert not (tmp_path / "away" / "self.jsonl").exists()
