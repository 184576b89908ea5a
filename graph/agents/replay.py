"""The decisions of an earlier trace, so that a run repeats without its LLM."""

from pathlib import Path

from pydantic import ValidationError

from prunewright.graph.agents.base import Observation
from prunewright.state import AgentError, Decision, InputError, Step
from prunewright.state.loading import problem_words
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.steps import read_line

MAX_LINE = 8 * 2**20
"""Bytes of one line of a trace; a step of 4,096 layers takes less than three million."""
MAX_TRACE = 256 * 2**20
"""Bytes of a trace that are read."""
TOLERANCE = 1e-4
"""Difference of sparsity from the recorded one that is noted."""

_MOST = 600
"""Characters that are told of what differs."""


class ReplayAgent:
    """Gives each step the decision that a trace holds for it, rolled back or empty ones too.

    Attributes:
        notes: where the run is no longer the one that the trace recorded.
    """

    def __init__(self, path: str | Path, run: str | Path | None = None) -> None:
        """Read the trace.

        Args:
            path: a trace.jsonl, or the directory of a run.
            run: the directory of the run that repeats it.

        Raises:
            InputError: no such file, or not a trace; the message names the line.
        """
        self._path = _trace(path)
        self._run = run
        self._records = _read(self._path)
        self.notes: list[str] = []

    def decide(self, observation: Observation) -> Decision:
        """The recorded decision of the observation's step.

        Raises:
            InputError: the trace belongs to another model.
            AgentError: the trace has no such step, or its decision breaks a bound of this run.
        """
        self._check_layers(observation)
        step, count = observation.step, len(self._records)
        if step >= count:
            raise AgentError(
                f"the trace has ended: {self._path} holds {count} steps and the run goes on. "
                "Resume it with another agent (--set agent=...)"
            )
        if observation.refusals:
            raise AgentError(
                f"the decision of step {step + 1} of {self._path} does not fit this run, whose "
                f"bounds or state are others: {'; '.join(observation.refusals[-1].problems)}. "
                "Resume with another agent (--set agent=...), or replay under the configuration "
                "that lies beside the trace"
            )
        record = self._records[step]
        self.notes = self._differences(observation, record)
        return record.decision

    def _check_layers(self, observation: Observation) -> None:
        known = {layer.name for layer in observation.profile.layers}
        for record in self._records:
            for item in record.decision.layers:
                if item.name not in known:
                    raise InputError(
                        f"{self._path} belongs to another model: its step {record.step + 1} names "
                        f"{item.name[:80]!r}, which this model does not have"
                    )

    def _differences(self, observation: Observation, record: Step) -> list[str]:
        other = other_standing(self._path, self._run) if self._run is not None else ""
        if other and not any(other in earlier.notes for earlier in observation.history):
            return [other, *self._deviations(observation, record)]
        return self._deviations(observation, record)

    def _deviations(self, observation: Observation, record: Step) -> list[str]:
        before = record.sparsity_before
        if not abs(observation.sparsity - before) <= TOLERANCE:
            return [
                f"replay: sparsity is {observation.sparsity:.4f} before this step and was "
                f"{before:.4f} in the trace: an earlier step ended otherwise"
            ]
        masks = self._records[record.step - 1].revision if record.step else None
        if masks is not None and observation.profile.revision != masks:
            return [
                "replay: the masks before this step are not the trace's: other texts, another "
                "configuration or another machine"
            ]
        return []


def other_standing(path: str | Path, run: str | Path) -> str:
    """How a run differs from the one whose trace it repeats, in words.

    Args:
        path: as for `ReplayAgent`.
        run: the directory of the run that repeats it.

    Returns:
        "" where it does not, or where no manifest lies beside the trace.

    Raises:
        StoreError: a manifest is damaged.
    """
    found = RunDirectory(run).departure(RunDirectory(_trace(path).parent))
    if not found:
        return ""
    found = found if len(found) <= _MOST else f"{found[:_MOST]}..."
    return f"replay: this run differs from the trace's: {found}"


def _trace(path: str | Path) -> Path:
    path = Path(path).expanduser()
    return path / "trace.jsonl" if path.is_dir() else path


def _read(path: Path) -> list[Step]:
    if not path.is_file():
        raise InputError(f"cannot replay {path}: no such file (give a trace.jsonl or a run)")
    steps: list[Step] = []
    try:
        if path.stat().st_size > MAX_TRACE:
            raise InputError(f"cannot replay {path}: it is larger than {MAX_TRACE:,} bytes")
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                where = f"cannot replay {path}, line {len(steps) + 1}"
                if len(line) > MAX_LINE:
                    raise InputError(f"{where}: it is longer than {MAX_LINE:,} bytes")
                steps.append(_step(line, where))
                if steps[-1].step != len(steps) - 1:
                    raise InputError(
                        f"{where}: it holds step {steps[-1].step}, not {len(steps) - 1}"
                    )
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if not steps:
        raise InputError(f"cannot replay {path}: it holds no step")
    return steps


def _step(line: bytes, where: str) -> Step:
    try:
        step = read_line(line).step
        step.decision.model_dump_json()  # lone surrogates are legal JSON that no file can hold
        return step
    except ValidationError as error:
        problems = problem_words(error, "line", most=4)
        raise InputError(f"{where}: not a step of a trace: {problems[:500]}") from None
    except ValueError as error:
        raise InputError(f"{where}: not a step of a trace: {str(error)[:200]}") from None
