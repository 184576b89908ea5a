"""What importing a part brings along: seconds that nobody should wait for."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "langgraph", "langchain", "langchain_core", "numpy", "rich"}


def loaded_by(code: str) -> set[str]:
    """Which of `HEAVY` a piece of code brings along."""
    script = f"import sys\n{code}\nprint(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import prunewright, prunewright.graph",
        "import prunewright.graph.agents",
        "import prunewright.graph.agents.asking, prunewright.graph.whole_layers",
        "import prunewright.graph.words.summary, prunewright.graph.words.runs",
        "from prunewright.graph.agents import resolve_agent; resolve_agent('greedy')",
    ],
)
def test_what_decides_and_what_is_said_needs_neither_torch_nor_a_terminal(code: str) -> None:
    assert loaded_by(code) == set()


def test_the_graph_is_built_without_a_model() -> None:
    # LangGraph brings rich along by itself.
    found = loaded_by("from prunewright.graph import build_graph, resume, run; build_graph()")
    assert not found & {"torch", "transformers"}


def test_a_run_directory_is_read_without_torch() -> None:
    found = loaded_by("import prunewright.tools.store.rundir, prunewright.tools.report")
    assert not found & {"torch", "transformers"}
