"""The exact prompt of a step, from a run's checkpoints: nobody is asked, nothing is changed."""

from dataclasses import dataclass
from typing import Any, cast

from langchain_core.messages import BaseMessage

from prunewright.graph.agents.asking import observe
from prunewright.graph.agents.chat.reading import answer_schema
from prunewright.graph.agents.prompt.build import prompt
from prunewright.graph.running.checkpoints import read_checkpoints
from prunewright.state import STATUS_WORDS, InputError, PruneState, StoreError
from prunewright.state.config import BASELINE
from prunewright.tools.ending import ended_words
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.trace import load_metrics


@dataclass(frozen=True)
class Preview:
    """What an LLM is asked at a step.

    Attributes:
        step: index of the step, from 0.
        about: which step of the run it is, in words.
        messages: the rules, and the state with its table.
        schema: JSON schema of the answer.
    """

    step: int
    about: str
    messages: list[BaseMessage]
    schema: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The preview as JSON values; the step is counted from 1."""
        return {
            "step": self.step + 1,
            "about": self.about,
            "messages": [{"role": m.type, "content": str(m.text)} for m in self.messages],
            "schema": self.schema,
        }


def preview(directory: RunDirectory, step: int | None = None) -> Preview:
    """The prompt of a step as the configuration that lies in the run directory makes it.

    Args:
        directory: of a run, finished or not; another process may work there.
        step: index of the step, from 0; None is the latest that has its profile.

    Raises:
        InputError: no run there, a baseline, or the step has no profile.
        StoreError: a file of the run is missing or damaged.
    """
    config = directory.config()
    directory.check_format()
    if config.agent == BASELINE:
        raise InputError(f"{directory.path} holds a baseline: no agent is asked in it")
    newest, state = _states(directory, step)
    if state is None:
        what = "step yet" if step is None else f"step {step + 1}"
        raise InputError(
            f"{directory.path} has the profile of no {what}; what goes on with the run: "
            f"prunewright resume {directory.path}"
        )
    status = newest.get("status", "running")
    if step is not None:
        about = f"step {step + 1} of the run"
    elif status != "running":
        finished = directory.metrics_file.exists()
        words = ended_words(load_metrics(directory)) if finished else STATUS_WORDS[status]
        about = f"the last step: the run has ended, {words}"
    elif state["step"] == newest["step"]:
        about = "the step that the run is at"
    else:
        about = f"the step before the next: step {newest['step'] + 1} has no profile yet"
    records = directory.read_steps(state["history"])
    observation = observe(state, config.request, config.context, directory, records)
    return Preview(state["step"], about, prompt(observation), answer_schema(observation))


def _states(directory: RunDirectory, step: int | None) -> tuple[dict[str, Any], PruneState | None]:
    """The newest checkpoint's values, and the newest in which the step has its profile."""
    thread = directory.thread()
    newest: dict[str, Any] = {}
    if thread is None:
        return newest, None
    with read_checkpoints(directory.database) as saver:
        for found in saver.list({"configurable": {"thread_id": thread}}):
            values = found.checkpoint["channel_values"]
            newest = newest or values
            if values.get("profile") and step in (None, values["step"]):
                return newest, cast(PruneState, values)
    if not newest:
        raise StoreError(f"{directory.database} is damaged: it holds none of the run's checkpoints")
    return newest, None
