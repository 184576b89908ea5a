"""A run's progress where a notebook shows it: one bar for the whole run, and a line a step."""

import sys
from html import escape
from typing import Any

from prunewright.state.metrics import Stage
from prunewright.state.shown import clean
from prunewright.tools.store.rundir import RunDirectory


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel, which can show more than plain text."""
    ipython = sys.modules.get("IPython")  # a kernel has it; nobody else need load it for us
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


class NotebookBar:
    """Shows a run below the cell that started it; pass it to the runner as ``on_event``.

    The display is replaced as a whole, so a saved notebook holds its last state only.
    """

    def __init__(self, directory: RunDirectory, target: float) -> None:
        """Show it.

        Args:
            directory: of the run; its earlier steps say where the bar begins.
            target: sparsity at which the bar is full.
        """
        from IPython.display import display

        records = directory.read_trace()
        self._sparsity = records[-1].sparsity if records else 0.0
        self._target = target
        self._words = "loading the model and the texts"
        self._lines: list[str] = []
        show: Any = display
        self._handle = show(self._bundle(), raw=True, display_id=True)

    def __call__(self, mode: str, event: dict[str, Any]) -> None:
        """Take an event of the runner."""
        if mode == "updates":
            for node, update in event.items():
                if node == "reflect":
                    self._lines.append(update["summary"])
                    self._words = update["status"].replace("_", " ")
                elif node != "finish":  # how the run ended stays
                    self._words = f"{node} is done"
        elif "progress" in event:
            part = event["progress"]
            self._words = f"{part['label']} {part['done']} of {part['total']}"
        elif "stage" in event:
            self._lines.append(Stage.model_validate(event["stage"]).words)
        elif "step" in event:
            self._sparsity = event["step"]["sparsity"]
        elif "metrics" in event:
            self._sparsity = event["metrics"]["sparsity"]
            self._words = event["metrics"]["status"].replace("_", " ")
        self._handle.update(self._bundle(), raw=True)

    def _bundle(self) -> dict[str, str]:
        """The same as a page and as plain text. Names from models and LLMs are untrusted."""
        words = clean(f"sparsity {self._sparsity:.4f} of {self._target:g}, {self._words}")
        lines = clean("\n".join(self._lines))
        bar = f'<progress value="{self._sparsity:.4f}" max="{self._target:g}"></progress>'
        page = f"<div>{bar} {escape(words)}</div><pre>{escape(lines)}</pre>"
        return {"text/html": page, "text/plain": f"{words}\n{lines}"}
