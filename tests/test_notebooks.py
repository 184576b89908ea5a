"""The notebooks run from their first cell to their last, on a pico model."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.trace import load_metrics

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


@pytest.fixture
def kernel_of_this_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernel ``python3`` is this interpreter's, whatever the user has installed."""
    kernel = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(
        json.dumps(
            {
                "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "display_name": "Python 3",
                "language": "python",
            }
        )
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))


@pytest.fixture
def execute(
    kernel_of_this_python: None,
    pico_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[list[dict[str, Any]], str]]:
    """Run a notebook on the pico model; what it shows, and what it prints."""

    def run(name: str, **keys: Any) -> tuple[list[dict[str, Any]], str]:
        monkeypatch.setenv("PRUNEWRIGHT_NOTEBOOK_SET", json.dumps(pico_config | keys))
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        # An error in a cell is raised here.
        NotebookClient(
            notebook,
            timeout=600,
            startup_timeout=300,
            kernel_name="python3",
            resources={"metadata": {"path": str(tmp_path)}},
        ).execute()
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        outputs = [output for cell in cells for output in cell.outputs]
        assert [output.text for output in outputs if output.get("name") == "stderr"] == []
        shown = [output.data for output in outputs if "data" in output]
        return shown, "".join(o.text for o in outputs if o.output_type == "stream")

    return run


Execute = Callable[..., tuple[list[dict[str, Any]], str]]


def pictures(shown: list[dict[str, Any]]) -> int:
    return sum("image/png" in data for data in shown)


def test_quickstart_runs_on_a_pico_model(execute: Execute, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    shown, printed = execute("quickstart", out=str(run.path))
    assert pictures(shown) == 2
    assert any("z_c" in data.get("text/html", "") for data in shown)
    (bar,) = (data for data in shown if "<progress" in data.get("text/html", ""))
    assert '<progress value="0.3000" max="0.3"></progress>' in bar["text/html"]
    assert "sparsity 0.3000 of 0.3, target reached\nstep 1 accepted" in bar["text/plain"]
    metrics = load_metrics(run)
    assert bar["text/plain"].count("\n") == metrics.steps + len(metrics.stages)
    assert metrics.status == "target_reached"
    assert f"sparsity of the loaded model: {metrics.sparsity:.4f}" in printed
    assert (run.model / "model.safetensors").is_file()
    assert len(run.read_trace()) == metrics.steps


def test_swap_the_agent_compares_runs_of_several_agents(
    execute: Execute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    shown, printed = execute("swap_the_agent", out=str(tmp_path / "runs"), target=0.15)
    runs = {path.name: RunDirectory(path) for path in (tmp_path / "runs").iterdir()}
    assert {name: run.config().agent for name, run in runs.items()} == {
        "greedy": "greedy",
        "zscore": "zscore",
        "gemini's-stand-in": "google_genai:gemini-3-flash-preview",
        "uniform": "baseline",
    }
    metrics = {name: load_metrics(run) for name, run in runs.items()}
    assert all(found.sparsity == pytest.approx(0.15, abs=1e-3) for found in metrics.values())
    # Each decision of the stand-in came through Gemini's client, and at once.
    asked = metrics.pop("gemini's-stand-in")
    assert asked.llm_calls == asked.decisions == asked.steps > 1
    assert [found.llm_calls for found in metrics.values()] == [0, 0, 0]
    assert pictures(shown) == 2
    assert sum("<progress" in data.get("text/html", "") for data in shown) == len(runs)
    (table,) = [data["text/html"] for data in shown if "of uniform" in data.get("text/html", "")]
    for found in (asked, *metrics.values()):
        assert f"{found.perplexity.test.final:.3f}" in table
    assert "The stand-in takes the cheaper half of the table." in printed


def test_explore_a_trace_forks_from_the_middle_of_a_run(execute: Execute, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "first")
    shown, printed = execute("explore_a_trace", out=str(run.path), agent="greedy", target=0.2)
    assert pictures(shown) == 4
    assert "the steps up to there are the same: True" in printed
    (other,) = [path for path in run.path.parent.iterdir() if path != run.path]
    fork = RunDirectory(other)
    middle = len(run.read_trace()) // 2
    assert fork.manifest()["parent"]["step"] == middle >= 1
    agents = [record.agent for record in fork.read_trace()]
    assert agents[:middle] == ["greedy"] * middle
    assert set(agents[middle:]) == {"random"}
    for found in (run, fork):
        test = load_metrics(found).perplexity.test.final
        assert any(f"{test:.6f}".rstrip("0") in data.get("text/html", "") for data in shown)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.rglob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_valid_and_their_outputs_are_of_one_whole_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    outputs = [output for cell in code for output in cell.outputs]
    if outputs:
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {output.output_type for output in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    text = path.read_text(encoding="utf-8")
    assert len(text) < 500_000
    assert [place for place in ("/tmp/", "/root/", "/home/", "/Users/") if place in text] == []
