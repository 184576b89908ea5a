"""trace.jsonl: the steps of a run, one sealed line each.

A line holds a `Step` and its seal, which is a hash of the rest of the line; the rest names the seal
of the line before. So damage is noticed wherever it is, and the seal of the last step, which the
checkpoint keeps, stands for all of them.

LangGraph lets people go back in time within a thread. The lines of the way that was left are kept
beside the trace, each in a file named by its seal, and are put back if the run returns there.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunewright.state import Step, StepSummary, StoreError
from prunewright.tools.store.storage import (
    canonical_json,
    parse_json,
    put_into_words,
    sha256_bytes,
    stamp,
    write_atomic,
)

_SEAL = "seal"
_DIGITS = 32


@dataclass(frozen=True)
class Line:
    """A line of a trace."""

    step: Step
    seal: str
    """"" in a trace of version 0.1.0."""

    @property
    def bytes(self) -> bytes:
        """The line as it is written, with its end."""
        seal = {_SEAL: self.seal} if self.seal else {}
        value = _value(self.step) | seal
        words = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return f"{words}\n".encode()


_known: dict[Path, tuple[Any, list[Line], bool]] = {}
"""Each trace that this process has read or written: its stamp, its lines, whether one is cut."""


def seal(step: Step) -> Line:
    """A step with the hash of its values."""
    return Line(step, sha256_bytes(canonical_json(_value(step)))[:_DIGITS])


def chained(steps: Iterable[Step]) -> list[Line]:
    """Steps from the first on, each with the seal of the one before."""
    lines: list[Line] = []
    for step in steps:
        lines.append(seal(step.model_copy(update={"previous": lines[-1].seal if lines else ""})))
    return lines


def read_line(data: str | bytes) -> Line:
    """What a line of a trace holds.

    Raises:
        ValueError: it is no step (a ``ValidationError``), or not the step that was sealed.
    """
    value = parse_json(data)
    own = value.pop(_SEAL, "") if isinstance(value, dict) else ""
    step = Step.model_validate(value)
    # Version 0.1.0 knew no seals; since then each line has one.
    if own and (not isinstance(own, str) or seal(step).seal != own):
        raise ValueError(
            "it is damaged: its seal does not fit (who edits a line leaves the seal out)"
        )
    return Line(step, own)


class StepLog:
    """The steps of one run.

    Args:
        trace: the run's trace.jsonl, there or not.
        beside: directory for the lines of a way that was left.
    """

    def __init__(self, trace: Path, beside: Path) -> None:
        self._trace = trace.absolute()
        self._beside = beside

    def read(self, *, ended: bool) -> list[Step]:
        """All steps of the trace; empty before the first.

        Args:
            ended: whether the run is finished; before that its last line may be cut off by a
                kill.

        Raises:
            StoreError: damaged.
        """
        lines, cut = self._lines()
        if cut and ended:
            raise StoreError(f"{self._trace} is damaged: its last line is cut off")
        return [line.step for line in lines]

    def chain(self, history: list[StepSummary]) -> list[Line]:
        """The steps that a state's history stands for, in the trace or beside it.

        Raises:
            StoreError: one is missing or damaged.
        """
        if not history:
            return []
        lines, _ = self._lines()
        own, found = history[-1]["seal"], []
        for number in range(history[-1]["step"], -1, -1):
            line = lines[number] if number < len(lines) else None
            if line is None or line.seal != own:
                line = self._read_beside(number, own)
            found.append(line)
            own = line.step.previous
        return found[::-1]

    def append(self, step: Step, history: list[StepSummary]) -> Line:
        """Add the step after those of a history; may be done again after a crash.

        Returns:
            Its line.

        Raises:
            StoreError: an earlier line is missing or damaged, or the disk is full.
        """
        earlier = self.chain(history)
        line = seal(step.model_copy(update={"previous": earlier[-1].seal if earlier else ""}))
        now, cut = self._lines()
        if [*earlier, line] == now and not cut:
            return line
        if earlier == now and not cut:
            with put_into_words(self._trace), self._trace.open("ab") as file:
                file.write(line.bytes)
                file.flush()
                os.fsync(file.fileno())
            _known[self._trace] = (stamp(self._trace), [*now, line], False)
        else:
            self.write([*earlier, line])
        return line

    def write(self, lines: list[Line]) -> None:
        """Let the trace hold these lines, and keep those beside it that it held otherwise.

        Raises:
            StoreError: it cannot be written.
        """
        seals = {line.seal for line in lines}
        for line in self._lines()[0]:
            if line.seal and line.seal not in seals:
                write_atomic(self._path(line.step.step, line.seal), line.bytes)
        write_atomic(self._trace, b"".join(line.bytes for line in lines))
        _known[self._trace] = (stamp(self._trace), lines, False)

    def _read_beside(self, number: int, own: str) -> Line:
        path = self._path(number, own)
        try:
            line = read_line(path.read_bytes())
        except OSError:
            raise StoreError(
                f"{self._trace} is damaged: line {number + 1} is not the step that the run took"
            ) from None
        except ValueError as error:
            raise StoreError(f"{path} is damaged: {error}") from error
        if line.seal != own:
            raise StoreError(f"{path} is damaged: it holds another step")
        return line

    def _path(self, number: int, own: str) -> Path:
        return self._beside / f"{number:04d}-left-{sha256_bytes(own.encode())[:12]}.json"

    def _lines(self) -> tuple[list[Line], bool]:
        """What the trace holds, and whether its last line is cut off; read once as it is."""
        try:
            now = stamp(self._trace)
            if (known := _known.get(self._trace)) is not None and known[0] == now:
                return known[1], known[2]
            # As bytes: a kill may cut the last line within a character, and a reasoning may hold
            # other line ends, such as U+2028.
            *whole, rest = self._trace.read_bytes().split(b"\n")
        except FileNotFoundError:
            return [], False
        except OSError as error:
            raise StoreError(f"cannot read {self._trace}: {error.strerror}") from error
        lines: list[Line] = []
        for number, data in enumerate(whole):
            try:
                line = read_line(data.decode())
                if line.step.step != number:
                    raise ValueError(f"it holds step {line.step.step}, not {number}")
                if line.seal and line.step.previous != (lines[-1].seal if lines else ""):
                    raise ValueError("it does not follow the line before")
            except ValueError as error:
                words = f"line {number + 1}: {error}"
                raise StoreError(f"{self._trace} is damaged: {words}") from error
            lines.append(line)
        _known[self._trace] = (now, lines, bool(rest))
        return lines, bool(rest)


def _value(step: Step) -> dict[str, Any]:
    return step.model_dump(mode="json")
