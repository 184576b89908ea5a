"""The notebooks run from their first cell to their last, on a pico model."""

import json
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from prunewright.graph.runner import load_metrics
from prunewright.tools.rundir import RunDirectory

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


@pytest.mark.usefixtures("kernel_of_this_python")
def test_quickstart_runs_on_a_pico_model(
    pico_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "run")
    monkeypatch.setenv("PRUNEWRIGHT_NOTEBOOK_SET", json.dumps(pico_config | {"out": str(run.path)}))
    notebook = nbformat.read(NOTEBOOKS / "quickstart.ipynb", as_version=4)

    # An error in a cell is raised here.
    NotebookClient(
        notebook,
        timeout=600,
        startup_timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()

    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    shown = [output.data for output in outputs if "data" in output]
    assert any("image/png" in data for data in shown)
    assert any("evaluate_ppl" in data.get("text/markdown", "") for data in shown)
    assert any("z_c" in data.get("text/html", "") for data in shown)
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    metrics = load_metrics(run)
    assert metrics.status == "target_reached"
    assert f"sparsity of the loaded model: {metrics.sparsity:.4f}" in printed
    assert (run.model / "model.safetensors").is_file()
    assert len(run.read_trace()) == metrics.steps


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.rglob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_valid_and_committed_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    for cell in code:
        assert cell.outputs == []
        assert cell.execution_count is None
