"""What importing a part brings along: seconds that nobody should wait for."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "langgraph", "langchain", "langchain_core", "numpy", "rich"}


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
    script = f"import sys\n{code}\nprint(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
