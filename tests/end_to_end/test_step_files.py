"""The files of a run's steps: a flip is noticed, and a late step costs what an early one does."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from quick import quick_config

from prunewright.graph import build_graph, fork, resume, run
from prunewright.graph.running.checkpoints import write_checkpoints
from prunewright.state import InputError, StoreError
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.trace import load_metrics, read_story


@pytest.fixture(scope="module")
def config(pico_models: Callable[..., Path]) -> dict[str, Any]:
    return quick_config(pico_models(), target=0.24, step=0.0205)


@pytest.fixture(scope="module")
def finished(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps, more than the state holds of a history."""
    out = tmp_path_factory.mktemp("finished") / "run"
    places: set[int] = set()

    def on_event(mode: str, event: dict[str, Any]) -> None:
        if mode == "updates" and "reflect" in event:
            places.add((out / "trace.jsonl").stat().st_ino)
            assert len(event["reflect"]["history"]) <= 8

    assert run(config, out=out, on_event=on_event).metrics.steps == 12
    assert len(places) == 1  # each line was appended to the one file
    return out


def stop_in_the_tenth_step(config: dict[str, Any], node: str, out: Path) -> Path:
    """A run that was stopped when the node had ended."""
    seen = 0

    def stop(mode: str, event: dict[str, Any]) -> None:
        nonlocal seen
        seen += mode == "updates" and node in event
        if seen == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, out=out, on_event=stop)
    return out


@pytest.fixture(scope="module")
def stopped(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is to evaluate its tenth step."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    return stop_in_the_tenth_step(config, "apply_prune", out)


@pytest.fixture(scope="module")
def profiled(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is to decide its tenth step."""
    return stop_in_the_tenth_step(config, "profile", tmp_path_factory.mktemp("profiled") / "run")


def flip(path: Path, seed: int = 0) -> None:
    """Change one digit of a JSON file, so that it is JSON still."""
    data = bytearray(path.read_bytes())
    places = [i for i, byte in enumerate(data) if byte in b"12345678"]
    data[random.Random(seed).choice(places)] += 1
    path.unlink()  # a fork's files are the run's own
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("pattern", "stage"),
    [
        ("trace.jsonl", "stopped"),
        ("steps/0009-profile-*.json", "profiled"),
        ("steps/0009-applied-*.json", "stopped"),
    ],
)
def test_a_flip_in_what_a_run_goes_on_from_is_named(
    pattern: str, stage: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(request.getfixturevalue(stage), tmp_path / "run"))
    (path,) = out.glob(pattern)
    whole = path.read_bytes()
    for seed in range(3):
        flip(path, seed)
        with pytest.raises(StoreError, match=rf"{path.name} is damaged"):
            resume(out)
        path.write_bytes(whole)
    assert resume(out).metrics.steps == 12


def values_of(path: Path) -> object:
    """What a JSON file, or each line of it, holds; None if it is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
        return list(map(json.loads, text.splitlines() if path.suffix == ".jsonl" else [text]))
    except ValueError:
        return None


def test_a_flip_in_what_is_reported_is_named(finished: Path, tmp_path: Path) -> None:
    for seed in range(10):
        for name in ("trace.jsonl", "metrics.json"):
            out = Path(shutil.copytree(finished, tmp_path / f"{name}-{seed}"))
            flip(out / name, seed)
            if values_of(out / name) == values_of(finished / name):
                continue  # an E in place of an e, say: nothing that is read has changed
            with pytest.raises(StoreError, match=rf"{name} is damaged"):
                read_story(RunDirectory(out))
            if name == "trace.jsonl":
                with pytest.raises(InputError, match=r"line \d+.*(damaged|holds step|not a step)"):
                    run({"agent": f"replay:{out}"}, out=tmp_path / "replay")


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e400", "[" * 100_000])
def test_a_number_that_is_not_finite_is_damage(number: str, finished: Path, tmp_path: Path) -> None:
    """Also in a run from somebody else, whose steps have no files to compare with."""
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    for path in out.glob("steps/*"):
        if "-metrics-" in path.name:
            path.unlink()
    metrics, trace, manifest = (
        out / name for name in ("metrics.json", "trace.jsonl", "manifest.json")
    )
    whole = metrics.read_text()
    metrics.write_text(re.sub(r'("final": )[\d.]+', rf"\g<1>{number}", whole, count=1))
    with pytest.raises(StoreError, match=r"metrics\.json is damaged"):
        read_story(RunDirectory(out))
    metrics.write_text(whole)
    manifest.write_text(f'{{"notes": {number}, {manifest.read_text()[1:]}')
    with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
        fork(out, 1, out=tmp_path / "forked")
    trace.write_text(
        re.sub(r'("\S+@early":)[-\d.e]+', rf"\g<1>{number}", trace.read_text(), count=1)
    )
    with pytest.raises(StoreError, match=r"trace\.jsonl is damaged"):
        RunDirectory(out).read_trace()
    with pytest.raises(InputError, match=r"line 1.*(not a step)"):
        run({"agent": f"replay:{out}"}, out=tmp_path / "replay")


def test_a_checkpoint_cannot_name_a_file_elsewhere(finished: Path, tmp_path: Path) -> None:
    directory = RunDirectory(Path(shutil.copytree(finished, tmp_path / "run")))
    outside = tmp_path / "profile.json"
    outside.write_bytes(next(directory.path.glob("steps/0000-profile-*")).read_bytes())
    for name in ("../profile.json", "steps/../../profile.json", str(outside)):
        with pytest.raises(StoreError, match="not the name of a file of a step"):
            directory.read_profile(name)


def test_the_trace_holds_each_step_once_whatever_was_cut_off(
    stopped: Path, finished: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(stopped, tmp_path / "run"))
    assert len(RunDirectory(out).read_trace()) == 9
    with (out / "trace.jsonl").open("ab") as file:
        # A kill while it was appended, within a character.
        file.write('{"step": 9, "reasoning": "größ'.encode()[:-1])
    assert len(RunDirectory(out).read_trace()) == 9
    resume(out)
    assert (out / "trace.jsonl").read_bytes() == (finished / "trace.jsonl").read_bytes()
    with (out / "trace.jsonl").open("ab") as file:
        file.write('{"step": 12, "reasoning": "größ'.encode()[:-1])
    with pytest.raises(StoreError, match="cut off"):
        RunDirectory(out).read_trace()


def test_a_fork_has_all_steps_before_it(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "fork"
    fork(finished, 11, out=out)
    lines = [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(12))
    assert load_metrics(RunDirectory(out)).revision == load_metrics(RunDirectory(finished)).revision


def test_a_step_adds_as_much_late_as_early(finished: Path) -> None:
    def added(step: int) -> int:
        return sum(p.stat().st_size for p in finished.glob(f"steps/{step:04d}-*"))

    assert added(11) < 1.2 * added(1)


def test_who_goes_back_in_a_thread_and_returns_finds_the_steps_again(
    stopped: Path, tmp_path: Path
) -> None:
    """As Studio does, where each way of a thread stays open."""
    out = Path(shutil.copytree(stopped, tmp_path / "run"))
    trace = out / "trace.jsonl"
    before = trace.read_bytes()
    with write_checkpoints(out / "state.sqlite") as saver:
        graph = build_graph(saver)
        newest: RunnableConfig = {"configurable": {"thread_id": RunDirectory(out).thread()}}
        history = list(graph.get_state_history(newest))
        tip = history[0]
        fourth = next(s for s in history if s.next == ("profile",) and s.values["step"] == 3)
        context = RunDirectory(out).config().context
        other = context.model_copy(update={"out": str(out), "agent": "random", "max_steps": 5})
        graph.invoke(None, fourth.config, context=other)
        steps = RunDirectory(out).read_trace()
        assert [step.agent for step in steps] == ["uniform"] * 3 + ["random"] * 2
        assert (
            b"".join(before.splitlines(keepends=True)[:3])
            == trace.read_bytes()[: before.index(b'{"step":3')]
        )
        same = context.model_copy(update={"out": str(out), "max_steps": 10})
        graph.invoke(None, tip.config, context=same)
    assert trace.read_bytes().startswith(before)
    assert [step.step for step in RunDirectory(out).read_trace()] == list(range(10))
