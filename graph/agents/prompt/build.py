"""The prompt of one step: rules, state and table, then what was refused and why."""

import functools
import itertools
import json
import math
import traceback
from pathlib import Path
from typing import Any

from jinja2 import (
    BaseLoader,
    ChoiceLoader,
    FileSystemLoader,
    PackageLoader,
    StrictUndefined,
    TemplateSyntaxError,
)
from jinja2.sandbox import SandboxedEnvironment
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from prunewright.graph.agents.base import Observation
from prunewright.graph.agents.prompt.feedback import (
    compile_feedback,
    last_changes,
    last_measured,
    percent,
    told_best,
    told_probes,
    within,
)
from prunewright.graph.agents.prompt.proposed import domain_rows, proposal_words
from prunewright.graph.agents.prompt.table import (
    MAX_ROWS,
    shown_layers,
    signals_shown,
    signals_told,
    table,
)
from prunewright.graph.agents.proposal import propose
from prunewright.state import InputError
from prunewright.state.config import MAX_GOAL
from prunewright.state.decision import MAX_LESSON, MAX_LESSONS
from prunewright.state.shown import one_line

__all__ = ["MAX_ROWS", "check_prompts", "floor_digits", "prompt", "shown_layers"]

FILES = ("system.md", "step.md")
"""The templates: the rules, which stay the same over a run, and the state at one step."""
MAX_MEANING = 300
"""Characters of what a prompt says of a signal."""

_SAMPLE: dict[str, Any] = {
    "criterion": "wanda",
    "max_increase": 0.15,
    "max_delta": 0.15,
    "max_layer_sparsity": 0.9,
    "max_lessons": MAX_LESSONS,
    "max_lesson": MAX_LESSON,
    "step": 2,
    "steps": 40,
    "steps_left": 38,
    "target": 0.45,
    "sparsity": 0.1,
    "pace": 0.01,
    "budget": "0.05",
    "dense_perplexity": 20.0,
    "domains": [],
    "goal": None,
    "weighable": False,
    "proposal": "",
    "table": "name | share",
    "meanings": {"z_s": "how safe"},
}
_DOMAIN = {
    "name": "german",
    "dense": 20.0,
    "perplexity": None,
    "last_change": "",
    "bound": None,
    "weight": 1.0,
}
# What is empty, or None, without feedback or before the first step.
_FORMS: dict[str, tuple[Any, ...]] = {
    "pattern": (None, "2:4"),
    "signals": ([], ["z_s", "z_g"], ["z_s", "z_g", "z_c"]),
    "feedback": (True, False),
    "perplexity": (None, 21.0),
    "max_knowledge_drop": (None, 0.5),
    "last_change": ("", "+1.2 ± .10 %"),
    "gradient_age": (None, 1),
    "history": ("", "step gained"),
    "lessons": ([], ["a lesson"]),
}


def prompt(observation: Observation, rows: int = MAX_ROWS) -> list[BaseMessage]:
    """The messages of one step: rules, state and table, what was measured, refused answers and why.

    Nothing of a signal that is hidden is in them, and without feedback nothing of what
    earlier steps came to.

    Args:
        observation: what the agent may see.
        rows: layers shown at most.

    Raises:
        InputError: a template of the user's cannot be rendered.
    """
    values = _values(observation, rows)
    system, step = (_render(name, observation.prompts, values) for name in FILES)
    # Not by the template: nobody's own may leave out what was asked for.
    measured = told_probes(observation)
    words = f"{step}\n\n{measured}" if measured else step
    messages: list[BaseMessage] = [SystemMessage(system), HumanMessage(words)]
    for refusal in observation.refusals:
        if refusal.answer:
            messages.append(AIMessage(refusal.answer[:20_000]))
        problems = "\n".join(f"- {problem}" for problem in refusal.problems)
        messages.append(
            HumanMessage(
                f"That answer was refused and nothing was pruned:\n{problems}\n"
                "Answer again with a whole, corrected JSON object."
            )
        )
    return messages


def check_prompts(folder: str | None) -> None:
    """Refuse templates of the user's that cannot work, before anything costs time.

    They are rendered for samples: with and without feedback, signals and earlier steps.

    Args:
        folder: theirs; None is the project's own, which work.

    Raises:
        InputError: no such folder, neither template in it, or an error in one, with its line.
    """
    if folder is None:
        return
    if not Path(folder).is_dir():
        raise InputError(f"prompts: {folder} is no folder")
    if not any((Path(folder) / name).is_file() for name in FILES):
        raise InputError(f"prompts: {folder} holds neither {' nor '.join(FILES)}")
    for changes in itertools.product(*([(key, v) for v in vs] for key, vs in _FORMS.items())):
        values = _SAMPLE | dict(changes)
        values["fixed_delta"] = 0.5 if values["pattern"] else None
        values["proposal"] = "The proposal" if "z_c" in values["signals"] else ""
        # With what they have nothing to do with, as every pair would take seconds.
        values["probes"], values["crowded"] = (4, True) if values["lessons"] else (0, False)
        values["max_total_increase"] = values["max_knowledge_drop"]
        values["best"] = "Best at the target" if values["history"] else ""
        if values["lessons"]:
            values |= {"goal": '"Keep it."', "domains": [_DOMAIN], "weighable": True}
        for name in FILES:
            _render(name, folder, values)


def floor_digits(value: float, digits: int = 4) -> str:
    """A bound as it may be shown: rounded down, so that who keeps to it is not refused."""
    if value <= 0:
        return "0"
    scale = 10.0 ** (digits - 1 - math.floor(math.log10(value)))
    return f"{math.floor(value * scale + 1e-6) / scale:.{digits}g}"


def _values(o: Observation, rows: int) -> dict[str, Any]:
    """What a template may use, as docs/prompts.md tells."""
    last, shown = last_measured(o), signals_shown(o)
    proposed = propose(o) if o.costs_shown else {}
    return {
        "criterion": o.criterion,
        "signals": [signal.name for signal in shown],
        "meanings": {s.name: one_line(s.meaning, MAX_MEANING) for s in signals_told(o)},
        "feedback": o.feedback,
        "max_increase": o.max_increase,
        "max_total_increase": o.max_total_increase,
        "max_knowledge_drop": o.max_knowledge_drop,
        "goal": None
        if o.goal is None
        else json.dumps(one_line(o.goal, MAX_GOAL), ensure_ascii=False),
        "weighable": o.weighable,
        "pattern": None if o.pattern_sparsity is None else o.pattern,
        "fixed_delta": o.pattern_sparsity,
        "max_delta": o.max_delta,
        "max_layer_sparsity": o.max_layer_sparsity,
        "max_lessons": MAX_LESSONS,
        "max_lesson": MAX_LESSON,
        "probes": o.max_probes,
        "step": o.step + 1,
        "steps": o.step + o.steps_left,
        "steps_left": o.steps_left - 1,
        "target": o.target,
        "sparsity": o.sparsity,
        "pace": o.pace,
        "budget": floor_digits(o.budget),
        "dense_perplexity": o.dense_perplexity,
        "perplexity": o.perplexity if o.feedback else None,
        "last_change": f"{percent(last.change)}{within(last.change_stderr)} %" if last else "",
        "domains": domain_rows(o),
        "best": told_best(o),
        "crowded": o.crowded,
        "gradient_age": o.gradient_age if any(s.gradients for s in shown) else None,
        "history": compile_feedback(o),
        "lessons": [" ".join(lesson.split()) for lesson in o.lessons] if o.feedback else [],
        "proposal": proposal_words(o, proposed) if o.costs_shown else "",
        "table": table(o, last_changes(o), proposed, rows),
    }


def _render(name: str, folder: str | None, values: dict[str, Any]) -> str:
    try:
        return _environment(folder).get_template(name).render(**values).strip()
    except Exception as error:  # a template may do whatever the sandbox allows
        # Jinja rewrites the traceback: its frames in templates have the template's own lines.
        frames = [
            (frame.filename, frame.lineno)
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename.endswith(".md")
        ]
        if isinstance(error, TemplateSyntaxError):
            frames.append((error.filename or name, error.lineno))
        file, line = frames[-1] if frames else (str(Path(folder or "") / name), None)
        where = f"{file}, line {line}" if line else file
        raise InputError(f"prompts: {where}: {type(error).__name__}: {error}") from error


@functools.cache
def _environment(folder: str | None) -> SandboxedEnvironment:
    loaders: list[BaseLoader] = [PackageLoader("prunewright.graph.agents.prompt", "")]
    if folder is not None:
        loaders.insert(0, FileSystemLoader(folder))
    return SandboxedEnvironment(
        loader=ChoiceLoader(loaders),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Who edits templates while a run goes on finds each change in the next step.
        cache_size=0 if folder else 400,
    )
