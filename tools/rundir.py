"""A run's directory: what it was given, each step, the trace, the results."""

import importlib.metadata
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from pydantic import ValidationError

from prunewright.state import (
    InputError,
    ModelProfile,
    PruneConfig,
    PruneContext,
    PruneRequest,
    StepRecord,
    StepSummary,
    StoreError,
    validate_config,
)
from prunewright.tools.storage import (
    canonical_json,
    read_json,
    sha256_bytes,
    write_atomic,
    write_json,
)
from prunewright.tools.workbench import Workbench

_PACKAGES = (
    "prunewright",
    "torch",
    "transformers",
    "safetensors",
    "datasets",
    "langgraph",
    "langgraph-checkpoint-sqlite",
    "langchain-core",
    "langchain-google-genai",
    "pydantic",
    "numpy",
)


_Stored = TypeVar("_Stored", ModelProfile, StepRecord)


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.manifest_file = self.path / "manifest.json"
        self.database = self.path / "state.sqlite"
        self.trace_file = self.path / "trace.jsonl"
        self.metrics_file = self.path / "metrics.json"
        self.model = self.path / "model"

    def create(self, config: PruneConfig) -> None:
        """Begin a run in an empty or absent directory.

        Raises:
            InputError: the directory holds something else.
        """
        if self.config_file.exists():
            raise InputError(
                f"{self.path} holds another run: resume it (prunewright resume {self.path}) "
                "or give another --out"
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"{self.path} exists and is not empty: give another --out")
        write_atomic(self.config_file, config.to_yaml().encode())

    def config(self) -> PruneConfig:
        """The configuration that the run was started with.

        Raises:
            InputError: there is no run here.
        """
        if not self.config_file.is_file():
            raise InputError(f"{self.path} is not a run directory: it has no config.yaml")
        try:
            return validate_config(yaml.safe_load(self.config_file.read_text(encoding="utf-8")))
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise StoreError(f"{self.config_file} is damaged: {error}") from error

    def begin(
        self, thread: str, request: PruneRequest, context: PruneContext, bench: Workbench
    ) -> None:
        """Record what the run stands on, or check that a resumed one stands on the same.

        Raises:
            StoreError: the model or a text is not what the run began with.
        """
        facts = {
            "thread": thread,
            "model": {
                "name": request.model,
                "sha256": bench.loaded.fingerprint,
                "prunable_layers": len(bench.loaded.layers),
                "prunable_weights": bench.loaded.prunable,
            },
            "texts": {
                role: {"source": bench.windows.sources[role], "sha256": digest}
                for role, digest in bench.windows.hashes.items()
            },
            "seed": request.seed,
            "dtype": str(bench.loaded.dtype).removeprefix("torch."),
            "device": str(bench.loaded.device),
        }
        if self.manifest_file.exists():
            before = read_json(self.manifest_file)
            for key in ("model", "texts", "seed", "dtype"):
                if before.get(key) != facts[key]:
                    raise StoreError(
                        f"the run in {self.path} cannot go on: its {key} is no longer what it "
                        f"began with (was {before.get(key)}, is {facts[key]})"
                    )
            return
        if not self.config_file.exists():
            config = PruneConfig(**request.model_dump(), **context.model_dump())
            write_atomic(self.config_file, config.to_yaml().encode())
        write_json(
            self.manifest_file,
            facts
            | {
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": {"python": platform.python_version()}
                | {name: _version(name) for name in _PACKAGES},
                "platform": platform.platform(),
                "threads": torch.get_num_threads(),
            },
        )

    def thread(self) -> str | None:
        """The run's thread; None if it was stopped before anything was computed."""
        if not self.manifest_file.exists():
            return None
        return str(read_json(self.manifest_file)["thread"])

    def write_step_file(self, step: int, kind: str, value: dict[str, Any]) -> str:
        """Store a step's JSON under a name that its content makes unique; return the path."""
        data = canonical_json(value)
        name = f"steps/{step:04d}-{kind}-{sha256_bytes(data)[:12]}.json"
        if not (self.path / name).exists():
            write_atomic(self.path / name, data)
        return name

    def read_profile(self, name: str) -> ModelProfile:
        """A profile that `write_step_file` stored.

        Raises:
            StoreError: missing or damaged.
        """
        return self._read(name, ModelProfile)

    def read_records(self, history: list[StepSummary]) -> list[StepRecord]:
        """The full records of a history.

        Raises:
            StoreError: one is missing or damaged.
        """
        return [self._read(summary["record"], StepRecord) for summary in history]

    def write_trace(self, records: list[StepRecord]) -> None:
        """Write trace.jsonl, a line a step, as the history stands."""
        lines = "".join(record.model_dump_json() + "\n" for record in records)
        write_atomic(self.trace_file, lines.encode())

    def read_trace(self) -> list[StepRecord]:
        """The steps of trace.jsonl; empty before the first.

        Raises:
            StoreError: damaged.
        """
        if not self.trace_file.exists():
            return []
        try:
            lines = self.trace_file.read_text(encoding="utf-8").splitlines()
            return [StepRecord.model_validate_json(line) for line in lines]
        except (ValidationError, ValueError) as error:
            raise StoreError(f"{self.trace_file} is damaged: {error}") from error

    def _read(self, name: str, model: type[_Stored]) -> _Stored:
        path = self.path / name
        try:
            return model.model_validate(read_json(path))
        except ValidationError as error:
            raise StoreError(f"{path} is damaged: {error}") from error


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
