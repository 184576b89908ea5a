"""A seat for any LLM or person without an API: prompts and answers are files in a directory."""

import json
import logging
import stat
import time
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from prunewright.graph.agents.base import Observation
from prunewright.graph.agents.chat.reading import MAX_ANSWER, Answer, read_answer
from prunewright.graph.agents.prompt.build import prompt
from prunewright.graph.running.stopping import check_stop
from prunewright.state import AgentError, Decision, InputError, Trials
from prunewright.state.config import Options
from prunewright.state.loading import describe_validation_error
from prunewright.tools.store.storage import sha256_bytes, write_atomic, write_json

POLL = 0.5
"""Seconds between two looks for the answer."""

_ROLES = {"system": "Rules", "human": "Request", "ai": "Answer that was refused"}
_log = logging.getLogger("prunewright")


class ExchangeOptions(Options):
    """The agent's options."""

    timeout: float = Field(3600, gt=0, description="seconds that one answer is awaited")


class ExchangeAgent:
    """Writes each prompt, with its JSON schema, into a directory and awaits a file as answer.

    The names carry a hash of the run's thread and the prompt: an answer to another prompt, or of
    another run, is never taken, and a resumed run finds the answer to what it asked before.

    Attributes:
        notes: what was around the last answer's JSON object.
    """

    def __init__(self, directory: str | Path, options: dict[str, Any]) -> None:
        """Make it; nothing is written yet.

        Args:
            directory: where the files go; made if it is absent.
            options: see `ExchangeOptions`.

        Raises:
            InputError: unknown or invalid options, or something else lies at the directory's path.
        """
        self._directory = Path(directory).expanduser()
        if self._directory.exists() and not self._directory.is_dir():
            raise InputError(f"cannot exchange files in {self._directory}: it is no directory")
        try:
            self._options = ExchangeOptions.model_validate(options)
        except ValidationError as error:
            words = describe_validation_error(error, ExchangeOptions)
            raise InputError(f"agent_options of exchange: {words}") from None
        self.notes: list[str] = []

    def decide(self, observation: Observation) -> Decision | Trials:
        """Ask once and wait.

        Raises:
            InvalidAnswerError: the answer is not JSON, or not of the schema.
            AgentError: no answer came in time, or its file cannot be read.
            StoreError: the prompt cannot be written.
            StoppedError: the run was asked to stop meanwhile.
        """
        self.notes = []
        answer = self._ask(observation)
        data = self._await(answer)
        return read_answer(data.decode("utf-8", "replace"), self.notes)

    def _ask(self, observation: Observation) -> Path:
        """Write the prompt and its schema; return where the answer is awaited."""
        step, attempt = observation.step, observation.tries
        text = "".join(
            f"## {_ROLES[message.type]}\n\n{message.text}\n\n" for message in prompt(observation)
        )
        digest = sha256_bytes(json.dumps([observation.thread, step, text]).encode())[:8]
        stem = f"step-{step + 1:04d}-try-{attempt}-{digest}"
        answer = self._directory / f"{stem}.answer.json"
        text += (
            "## Where the answer goes\n\n"
            f"Into the file `{answer.name}` beside this one: the JSON object alone, of the schema "
            f"in `{stem}.schema.json`. Write it under another name and rename it, so that it is "
            "whole when it appears.\n"
        )
        # The schema first: who sees the prompt finds it.
        form = Answer if observation.probes_left else Decision
        write_json(self._directory / f"{stem}.schema.json", form.model_json_schema())
        write_atomic(self._directory / f"{stem}.prompt.md", text.encode("utf-8", "replace"))
        if not answer.exists():
            _log.warning("waiting for %s", answer)
        return answer

    def _await(self, path: Path) -> bytes:
        """The content of a file, once it is there and no longer grows."""
        end = time.monotonic() + self._options.timeout
        before: tuple[int, int] | None = None
        while True:
            check_stop()
            try:
                found = path.lstat()
                # A link could lead out of a directory that others may write to.
                if not stat.S_ISREG(found.st_mode):
                    raise AgentError(f"the answer {path} is not a plain file")
                now = (found.st_size, found.st_mtime_ns)
                if found.st_size and now == before:
                    with path.open("rb") as file:
                        return file.read(4 * MAX_ANSWER + 4)
                before = now
            except FileNotFoundError:
                before = None
            except OSError as error:
                raise AgentError(f"cannot read the answer {path}: {error.strerror}") from error
            if time.monotonic() > end:
                raise AgentError(
                    f"no answer came within {self._options.timeout:g} seconds: awaited was {path}"
                )
            time.sleep(POLL)
