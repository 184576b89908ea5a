"""`run` from any form of configuration, its events, and what it refuses before it begins."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunewright.graph import baseline, resume, run
from prunewright.state import InputError, StoreError, load_config
from prunewright.state.loading import validate_config
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.trace import load_metrics


def test_a_dict_a_file_and_an_object_are_the_same_run(
    pico_config: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(pico_config))
    forms = {"dict": pico_config, "path": file, "str": str(file), "object": load_config(file)}
    revisions = {n: run(c, out=tmp_path / n).metrics.revision for n, c in forms.items()}
    assert len(set(revisions.values())) == 1
    assert set(revisions) == set(forms)


def test_a_result_says_what_came_out(pico_config: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "<b>&\x1b[2J"
    result = run(pico_config, out=out)
    found = result.metrics
    html = result._repr_html_()
    for shown in (repr(result), html):
        assert f"target reached, {found.steps} steps, 0 rolled back" in shown
        assert f"{found.sparsity:.4f}" in shown
        assert f"{found.perplexity.test.dense:.3f} dense" in shown
        assert "\x1b" not in shown
    assert str(out).replace("\x1b", "\\x1b") in repr(result)
    assert "&lt;b&gt;&amp;" in html
    assert "<b>" not in html
    with pytest.raises(AttributeError):
        result.metrics = found  # type: ignore[misc]


def test_the_directory_comes_from_out_from_the_config_or_from_the_time(
    pico_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = pico_config | {"max_steps": 1}
    assert run(short).directory.parent == Path("runs")
    assert run(short | {"out": "mine"}).directory == Path("mine")
    result = run(short | {"out": "unused"}, out="other")
    assert result.directory == Path("other")
    assert not Path("unused").exists()
    assert (result.model_directory / "config.json").exists()
    # A run that was moved is resumed where it is.
    Path("mine").rename("moved")
    assert resume("moved").directory == Path("moved")


def test_events_tell_every_node_and_the_end(pico_config: dict[str, Any], tmp_path: Path) -> None:
    ran: list[str] = []
    custom: list[dict[str, Any]] = []

    def on_event(mode: str, event: dict[str, Any]) -> None:
        if mode == "updates":
            ran.extend(event)
        else:
            custom.append(event)

    result = run(pico_config, out=tmp_path / "run", on_event=on_event)
    steps = ["profile", "agent_decide", "apply_prune", "evaluate_ppl", "reflect"]
    assert ran == [*steps * result.metrics.steps, "finish"]
    assert [e["step"]["step"] for e in custom if "step" in e] == list(range(result.metrics.steps))
    assert [e["metrics"] for e in custom if "metrics" in e] == [
        result.metrics.model_dump(mode="json")
    ]
    progress = [e["progress"] for e in custom if "progress" in e]
    assert all(0 <= p["done"] <= p["total"] for p in progress)
    assert {"activations", "perplexity", "masks"} <= {p["label"] for p in progress}


def test_each_node_computes_in_a_thread_that_ends_with_it(
    pico_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    others_alive: list[bool] = []
    sync = Workbench.sync

    def watched(bench: Workbench, revision: str) -> None:
        here = threading.current_thread()
        others_alive.append(any(other.is_alive() for other in threads if other is not here))
        threads.append(here)
        sync(bench, revision)

    monkeypatch.setattr(Workbench, "sync", watched)
    run(pico_config, out=tmp_path / "run")
    assert len(set(threads)) > 3
    assert not any(others_alive)


def test_progress_is_told_of_both_ends_of_each_part_and_else_at_intervals(
    pico_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(interval: float) -> list[tuple[str, int, int]]:
        monkeypatch.setattr("prunewright.graph.nodes.common.INTERVAL", interval)
        reports: list[dict[str, Any]] = []

        def on_event(_: str, event: dict[str, Any]) -> None:
            if "progress" in event:
                reports.append(event["progress"])

        run(pico_config, out=tmp_path / str(interval), on_event=on_event)
        return [(r["label"], r["done"], r["total"]) for r in reports]

    # A process remembers statistics of the dense model: both runs find them.
    run(pico_config, out=tmp_path / "before")
    every, few = told(0.0), told(1e9)
    assert few == [(label, done, total) for label, done, total in every if done in (0, total)]
    assert 0 < len(few) < len(every)
    begun = [label for label, done, _ in few if done == 0]
    assert begun == [label for label, done, total in few if done == total]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tarket": 0.2}, "did you mean target?"),
        ({"agent": "gredy"}, "did you mean greedy?"),
        ({"agent": "google_genai:gemini-3-flash-preview"}, "GOOGLE_API_KEY"),
        ({"agent": "import:no.such.module:Agent"}, "cannot import"),
        ({"agent": "import:math:pi"}, "no class with a method decide"),
    ],
)
def test_a_config_that_cannot_work_leaves_no_directory(
    changes: dict[str, Any], words: str, pico_config: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        run(pico_config | changes, out=tmp_path / "run")
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("family", "pattern", "words"),
    [
        ("LlamaConfig", "3:5", "the 32 inputs of model.layers.0.self_attn.q_proj do not divide"),
        ("GPT2Config", "1:64", "the 32 inputs of transformer.h.0.attn.c_attn do not divide"),
        # The first layers divide; the experts' last does not.
        ("Qwen3MoeConfig", "16:32", "the 16 inputs of model.layers.0.mlp.experts.down_proj do"),
    ],
)
def test_a_pattern_that_does_not_divide_leaves_no_directory(
    family: str,
    pattern: str,
    words: str,
    pico_config: dict[str, Any],
    pico_models: Callable[..., Path],
    tmp_path: Path,
) -> None:
    told: list[str] = []
    with pytest.raises(InputError) as caught:
        baseline(
            pico_config | {"model": str(pico_models(family)), "pattern": pattern},
            out=tmp_path / "run",
            on_event=lambda kind, _: told.append(kind),
        )
    assert words in str(caught.value)
    assert told == []  # nothing was computed
    assert not (tmp_path / "run").exists()


def test_a_failing_event_handler_does_not_spoil_the_run(
    pico_config: dict[str, Any], tmp_path: Path
) -> None:
    seen = 0

    def on_event(mode: str, _: dict[str, Any]) -> None:
        nonlocal seen
        seen += mode == "updates"
        if seen == 4:
            raise RuntimeError("the screen is gone")

    expected = run(pico_config, out=tmp_path / "whole").metrics
    with pytest.raises(RuntimeError, match="the screen is gone"):
        run(pico_config, out=tmp_path / "run", on_event=on_event)
    again = resume(tmp_path / "run").metrics
    assert again.revision == expected.revision
    assert again.perplexity == expected.perplexity
    assert (tmp_path / "run" / "trace.jsonl").read_bytes() == (
        tmp_path / "whole" / "trace.jsonl"
    ).read_bytes()


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"status": "target_reached"}'])
def test_metrics_that_cannot_be_read(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(StoreError, match=r"metrics\.json"):
        load_metrics(RunDirectory(tmp_path))


def test_the_stored_config_is_complete_and_free_of_surprises(
    pico_config: dict[str, Any], tmp_path: Path
) -> None:
    run(pico_config | {"max_steps": 1}, out=tmp_path / "run")
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    expected = validate_config(pico_config | {"max_steps": 1}).model_dump(mode="json")
    assert stored == expected
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["request"].items() <= stored.items()
