"""Asking a person about a decision in a terminal."""

import sys
from typing import Any

import click
import yaml
from rich.prompt import Prompt
from rich.text import Text

from prunewright.graph.cli.screen.lines import Screen
from prunewright.graph.cli.screen.live import Live
from prunewright.state import InputError, ReviewRequest
from prunewright.state.loading import parse_yaml
from prunewright.state.shown import clean

SHOWN = 30
"""Layers of a decision that are listed: those that change most."""

_HEAD = (
    "# The decision of step {step}. What is saved is applied, once it keeps every bound;\n"
    "# close the editor without saving to go back. A negative delta restores weights.\n"
)


def check_terminal() -> None:
    """Refuse to review where nobody can be asked.

    Raises:
        InputError: standard input is no terminal.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise InputError(
            "review: true asks a person at each step, and standard input is no terminal: start it "
            "in one, give a reviewer from Python (prunewright.graph.resume(RUN_DIR, "
            "reviewer=...)), or --set review=false"
        )


class _Question(Prompt):
    """A question that ends with its own sign."""

    prompt_suffix = " "


class TerminalReviewer:
    """Shows a decision and asks whether to approve, edit or reject it, or to stop the run."""

    def __init__(self, screen: Screen, live: Live) -> None:
        self._screen = screen if screen.console.is_terminal else Screen(stderr=True)
        self._live = live

    def __call__(self, request: ReviewRequest) -> dict[str, Any]:
        """The person's answer.

        Raises:
            KeyboardInterrupt: the run shall stop; it can be resumed.
        """
        with self._live.paused():
            self._show(request)
            text = _as_yaml(request)
            while True:
                choice = self._ask("[a]pprove, [e]dit, [r]eject or [s]top?", list("aers"))
                if choice == "a":
                    return {"approve": True}
                if choice == "s":
                    raise KeyboardInterrupt
                if choice == "r":
                    if words := self._ask("Why? The agent is told:").strip():
                        return {"reject": words}
                    continue
                edited = self._edit(text)
                if edited is not None:
                    text = edited
                    if (found := self._read(text)) is not None:
                        return {"edit": found}

    def _ask(self, words: str, choices: list[str] | None = None) -> str:
        try:
            return _Question.ask(
                Text(words), console=self._screen.console, choices=choices, show_choices=False
            )
        except EOFError:  # Ctrl-D
            raise KeyboardInterrupt from None

    def _show(self, request: ReviewRequest) -> None:
        screen = self._screen
        if request.problems:
            for words in request.problems:
                screen.warn(words, "refused")
            return
        changes = [
            ("expected", request.expected_ppl_change, "by the agent"),
            ("predicted", request.predicted_change, "by the profile"),
        ]
        screen.line()
        screen.line((f"Step {request.step}: {request.agent} wants to prune", "bold"))
        screen.line(request.reasoning or "(no reasons given)")
        screen.pairs(
            [
                ("sparsity", f"{request.sparsity:.4f} -> {request.sparsity_after:.4f}"),
                ("perplexity", f"{request.perplexity:.3f} before the step"),
                *((name, f"{value:+.2%} {who}") for name, value, who in changes if value),
                *(("note", words) for words in request.notes),
            ]
        )
        largest = sorted(request.layers, key=lambda item: -abs(item.delta))[:SHOWN]
        screen.table(
            ["layer", "sparsity", "delta", "after"],
            [[x.name, f"{x.sparsity:.3f}", f"{x.delta:+.3f}", f"{x.after:.3f}"] for x in largest],
        )
        if more := len(request.layers) - len(largest):
            screen.line(f"and {more} more, which the editor shows")

    def _edit(self, text: str) -> str | None:
        """The text as the person saved it; None if it was not."""
        try:
            edited = click.edit(text, extension=".yaml")
        except click.ClickException as error:  # $EDITOR is wrong, for one
            self._screen.line(("Error: ", "bold red"), error.format_message())
            return None
        if edited is None:
            self._screen.line("Nothing was saved.")
        return edited

    def _read(self, text: str) -> dict[str, Any] | None:
        try:
            found = parse_yaml(text, "the edit is")
        except InputError as error:
            self._screen.warn(str(error), "refused")
            return None
        if not isinstance(found, dict):
            self._screen.warn("not a mapping of keys to values", "refused")
            return None
        return found


def _as_yaml(request: ReviewRequest) -> str:
    """What the editor opens with: the decision, or the edit of it that was refused."""
    head = _HEAD.format(step=request.step)
    head += "".join(f"# refused: {' '.join(clean(w).split())}\n" for w in request.problems)
    refused = request.refused
    if isinstance(refused, dict) and isinstance(refused.get("edit"), dict):
        content = refused["edit"]
    else:
        wanted = {"reasoning", "layers", "rebalance", "lessons"}
        content = request.decision.model_dump(mode="json", include=wanted)
    # None: a layer a line.
    return head + yaml.safe_dump(
        content, default_flow_style=None, sort_keys=False, allow_unicode=True, width=100
    )
