"""A run's directory: what it was given, each step, the trace, the results."""

import errno
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from packaging.version import InvalidVersion, Version
from pydantic import ValidationError

from prunewright.state import (
    InputError,
    ModelProfile,
    PruneConfig,
    PruneContext,
    PruneRequest,
    Spent,
    Step,
    StepSummary,
    StoreError,
    validate_config,
)
from prunewright.state.config import EMBEDDED, SELF
from prunewright.state.loading import parse_yaml
from prunewright.tools.store.manifest import (
    decides,
    raised,
    standing,
    surroundings,
    targets_of,
    until,
    version,
)
from prunewright.tools.store.standing import difference
from prunewright.tools.store.steps import StepLog, chained
from prunewright.tools.store.storage import (
    appearing,
    canonical_json,
    is_alive,
    is_unfinished,
    put_into_words,
    read_json,
    remove_unfinished,
    sha256_bytes,
    share,
    stamp,
    write_atomic,
    write_json,
)

FORMAT = 2
"""Of run directories; those of version 0.1.0 name none."""
_Stored = TypeVar("_Stored", ModelProfile, Step, Spent)
_Settings = TypeVar("_Settings", PruneRequest, PruneContext, PruneConfig)

_STEP_FILE = re.compile(r"steps/\d{4,}-[a-z]+-([0-9a-f]{12})\.json")
DENSE_MODEL = "dense"
"""Where a run keeps the model that it began with, if that was given in memory."""
OWN_TEXT = "self.jsonl"
"""Where a run keeps the text that its dense model wrote, if it calibrates on it."""


class RunDirectory:
    """Paths and files of one run.

    Raises:
        InputError: nothing can lie at that path, or nobody may look there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.manifest_file = self.path / "manifest.json"
        self.database = self.path / "state.sqlite"
        self.trace_file = self.path / "trace.jsonl"
        self.metrics_file = self.path / "metrics.json"
        self.finishing_file = self.path / "finishing.json"
        self.control_file = self.path / "finishing-control.json"
        self.model = self.path / "model"
        self.steps = StepLog(self.trace_file, self.path / "steps")
        self.dense = self.path / DENSE_MODEL
        self.own_text = self.path / OWN_TEXT
        self.lock_file = self.path / ".lock"
        self.holder_file = self.path / ".lock-holder"
        try:
            with suppress(FileNotFoundError, NotADirectoryError):
                self.config_file.stat()
        except (OSError, ValueError) as error:
            words = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{self.path} cannot hold a run: {words}") from error

    @contextmanager
    def begun(
        self, config: PruneConfig, write_model: Callable[[Path], None] | None = None
    ) -> Iterator[None]:
        """Begin a run in an empty or absent directory, locked until the block ends.

        Of several processes that begin one there, exactly one goes on; the others are refused and
        touch nothing. A run that fails in the block, before anything was computed, leaves no
        directory behind; one that is interrupted does, since it can go on.

        Args:
            config: the run's.
            write_model: writes a model that was given in memory into an empty directory, which
                becomes `dense`.

        Raises:
            InputError: the directory holds something else, or another process works there.
            StoreError: it cannot be written.
        """
        self.check_free()
        with put_into_words(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with self.locked():
            self.check_free()  # again: another may have had the lock meanwhile
            try:
                if write_model is not None:
                    with appearing(self.dense, directory=True) as scratch:
                        write_model(scratch)
                write_atomic(self.config_file, config.to_yaml().encode())
                yield
            except Exception:
                self.abandon()
                raise

    def check_free(self) -> None:
        """Refuse a directory that is neither empty nor absent.

        What a process left that was killed before it began is nothing.

        Raises:
            InputError: it holds something.
        """
        if self.config_file.exists():
            raise InputError(
                f"{self.path} holds another run: resume it (prunewright resume {self.path}) "
                "or give another --out"
            )
        ours = (self.lock_file, self.holder_file)
        if self.path.exists() and (
            not self.path.is_dir()
            or any(p not in ours and not is_unfinished(p) for p in self.path.iterdir())
        ):
            raise InputError(f"{self.path} exists and is not empty: give another --out")

    def move(self, path: Path) -> None:
        """Give the directory, which may be locked, another name: that of an empty one, or a new.

        Raises:
            InputError: there is something else.
            StoreError: it cannot be written.
        """
        other = RunDirectory(path)
        other.check_free()
        with put_into_words(path):
            try:
                self.path.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise InputError(f"{path} exists and is not empty: give another --out") from error
        self.__dict__.update(other.__dict__)

    def branch(
        self,
        other: "RunDirectory",
        config: PruneConfig,
        thread: str,
        history: list[StepSummary],
        revisions: set[str],
        final: Path,
    ) -> None:
        """Write what another run needs to go on from a step of this one, but for its database.

        Args:
            other: where to; new.
            config: the other run's.
            thread: its name.
            history: this run's steps that the other takes over.
            revisions: names of those that it needs.
            final: where the other will lie.

        Raises:
            StoreError: a file is missing or damaged, or cannot be written.
        """
        lines = self.steps.chain(history)
        facts = until(self.manifest(), len(lines))
        if Path(config.model) == final.absolute() / DENSE_MODEL:
            for path in self.dense.iterdir():
                share(path, other.dense / path.name)
        if self.own_text.exists():
            share(self.own_text, other.own_text)
        for path in sorted((self.path / "steps").glob("*.json")):
            number = path.name.partition("-")[0]
            if number.isdigit() and int(number) < len(lines):
                share(path, other.path / "steps" / path.name)
        for line in lines:
            revisions = revisions | {line.step.revision}
            revisions |= {line.step.candidate} if line.step.candidate else set()
        from prunewright.tools.store.revisions import RevisionStore  # torch takes seconds

        RevisionStore(self.path / "revisions").share(
            RevisionStore(other.path / "revisions"), revisions
        )
        if lines:
            other.steps.write(lines)
        parent = {"directory": str(self.path), "thread": facts.get("thread"), "step": len(lines)}
        write_json(
            other.manifest_file,
            facts
            | {"thread": thread, "parent": parent, "context": decides(config)}
            | raised(facts, config.target, len(lines))
            | surroundings(final),
        )
        write_atomic(other.config_file, config.to_yaml().encode())

    def config(self) -> PruneConfig:
        """The configuration that the run was started with.

        Raises:
            InputError: there is no run here, or a newer version made it.
            StoreError: damaged.
        """
        self._refuse_newer()
        if not self.config_file.is_file():
            if self.started:
                raise StoreError(f"{self.config_file} is missing: the run cannot go on without it")
            raise InputError(f"{self.path} is not a run directory: it has no config.yaml")
        try:
            text = self.config_file.read_text(encoding="utf-8")
            return _parsed(text)
        except (OSError, UnicodeDecodeError, InputError) as error:
            raise StoreError(f"{self.config_file} is damaged: {error}") from error

    def _refuse_newer(self) -> None:
        """A newer version may write what this one would take for damage, or misread."""
        if not self.manifest_file.exists():
            return
        versions = self.manifest().get("versions")
        made_by = versions.get("prunewright") if isinstance(versions, dict) else None
        ours = version("prunewright")
        try:
            newer = Version(str(made_by)) > Version(ours)
        except InvalidVersion:  # one of them was not installed as a package
            return
        if newer:
            raise InputError(
                f"{self.path} was made by prunewright {made_by}, and this is {ours}: "
                "pip install --upgrade prunewright"
            )

    def abandon(self) -> None:
        """Take back what was begun if nothing was computed since; only for who holds the lock."""
        if self.started or self.trace_file.exists() or (self.path / "revisions").exists():
            return
        for path in (
            self.config_file,
            self.manifest_file,
            self.own_text,
            self.holder_file,
            *self.path.glob(f"{self.database.name}*"),
            self.lock_file,
        ):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.dense, ignore_errors=True)
        with suppress(OSError):  # not ours alone, or another process begins just now
            self.path.rmdir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out of the directory; the lock dies with its process.

        Raises:
            InputError: another process works here.
            StoreError: the directory cannot be written, or parts of it lie elsewhere.
        """
        self._check_inside()
        lock = FileLock(self.lock_file, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise InputError(
                f"another process (id {self._holder_words()}) is working in {self.path}: wait for "
                "it or stop it"
            ) from None
        except OSError as error:
            raise StoreError(f"cannot lock {self.path}: {error.strerror or error}") from error
        try:
            for folder in (self.path, self.path / "steps"):
                remove_unfinished(folder)
            write_atomic(self.holder_file, str(os.getpid()).encode())
            yield
        finally:
            self.holder_file.unlink(missing_ok=True)
            lock.release()

    def _holder_words(self) -> str:
        try:
            return self.holder_file.read_text()
        except OSError:
            return "unknown"

    def _check_inside(self) -> None:
        """Refuse links out of the directory: who made it would choose what is written or deleted.

        Raises:
            StoreError: there is one.
        """
        revisions = self.path / "revisions"
        for path in (
            *(self.lock_file, self.holder_file, self.config_file, self.manifest_file),
            *(self.trace_file, self.metrics_file, self.finishing_file, self.control_file),
            self.own_text,
            *(self.path / name for name in ("steps", "adapt", "adapt-control")),
            *(revisions, revisions / "masks", revisions / "manifests"),
            *self.path.glob(f"{self.database.name}*"),
        ):
            if path.is_symlink():
                raise StoreError(
                    f"{path} is a link: a run is only worked on where its files are its own. Put "
                    "there what it points to"
                )

    def holder(self) -> int | None:
        """The process of this machine that works here; None for nobody.

        The lock is not touched: to try it would keep a run from starting, if only for a moment.
        """
        try:
            number = int(self.holder_file.read_text())
            # A killed process leaves the file, and another may have its number since.
            return number if is_alive(number, self.holder_file) else None
        except (OSError, ValueError):
            return None

    def collect_garbage(self, keep: set[str]) -> tuple[int, int]:
        """Delete revisions not in ``keep`` nor in the trace, and what a killed process left.

        Args:
            keep: names of revisions that checkpoints and results refer to.

        Returns:
            Files and bytes deleted.
        """
        for record in self.read_trace():
            keep = keep | {record.revision} | ({record.candidate} if record.candidate else set())
        from prunewright.tools.store.revisions import RevisionStore

        return RevisionStore(self.path / "revisions").collect(keep)

    @property
    def started(self) -> bool:
        """Whether a step was begun here, so that there is something to lose."""
        return (self.path / "steps").is_dir()

    def begin(
        self,
        thread: str,
        request: PruneRequest,
        context: PruneContext,
        facts: dict[str, Any],
        **told: Any,
    ) -> None:
        """Record what the run stands on, or check that a resumed one stands on the same.

        Args:
            thread: the run's name.
            request: what it does.
            context: who decides.
            facts: of the model and the texts, as `Workbench.facts` gives them.
            told: what else is to be known of them later.

        Raises:
            StoreError: the request, the model or a text is not what the run began with.
        """
        if self.manifest_file.exists():
            self.check(request, facts)
            return
        if not self.config_file.exists():
            config = validate_config(request.model_dump() | context.model_dump())
            write_atomic(self.config_file, config.to_yaml().encode())
        write_json(
            self.manifest_file,
            {"format": FORMAT, "thread": thread, "request": request.model_dump(mode="json")}
            | told
            | facts
            | {"context": decides(self.config())}
            | surroundings(self.path),
        )

    def settle(self, thread: str, request: PruneRequest) -> PruneRequest:
        """The request to work by, once the run has begun: that of its configuration.

        A checkpoint is nothing that people read: what it says must not choose the model that is
        loaded, nor whose code runs with it.

        Raises:
            InputError: the directory holds another thread's run.
            StoreError: the given request, a checkpoint's, is another.
        """
        self.check_format()
        if self.manifest_file.exists() and (other := self.thread()) != thread:
            raise InputError(
                f"{self.path} holds another run (thread {other}): give another directory"
            )
        if not self.config_file.exists():
            return request
        own = self.config().request
        if changed := difference(self._identity(own), self._identity(request)):
            raise StoreError(
                f"the request in the checkpoints of {self.path} is not that of {self.config_file} "
                f"({changed})"
            )
        return self.locate(own)

    def check_format(self) -> None:
        """Refuse to go on with a run of version 0.1.0, whose steps were kept otherwise.

        Raises:
            InputError: it is one.
        """
        if self.manifest_file.exists() and self.manifest().get("format") != FORMAT:
            raise InputError(
                f"{self.path} was made by version 0.1.0, whose runs can be shown, reported and "
                "replayed, but not gone on with. Repeat its decisions in a new run: prunewright "
                f"run --config {self.config_file} --agent replay:{self.path} --out DIRECTORY"
            )

    def check(self, request: PruneRequest, facts: dict[str, Any]) -> None:
        """Refuse to go on with a run on another model, other texts or another request.

        Args:
            request: what it does now.
            facts: what it stands on now, as for `begin`.

        Raises:
            StoreError: saying what changed; or the manifest is missing or damaged.
        """
        now = standing({"request": request.model_dump(mode="json")} | facts)
        now["request"] = self._identity(request)
        before = standing(self.manifest())
        for key in now:
            if changed := difference(before[key], now[key]):
                raise StoreError(
                    f"the run in {self.path} cannot go on: its {key} is no longer what it "
                    f"began with ({changed})"
                )

    def edited(self) -> str:
        """What config.yaml says otherwise of who decides and how than when the run was at work.

        In words; "" if nothing, or where that is not recorded.
        """
        before = self.manifest().get("context") if self.manifest_file.exists() else None
        return difference(before, decides(self.config())) if isinstance(before, dict) else ""

    def keep(self, config: PruneConfig) -> None:
        """Store the configuration that the run goes on with.

        Raises:
            StoreError: it cannot be written.
        """
        if self.config() != config:
            write_atomic(self.config_file, config.to_yaml().encode())
        if self.edited():
            write_json(self.manifest_file, self.manifest() | {"context": decides(config)})

    def departure(self, other: "RunDirectory") -> str:
        """What this run stands on otherwise than another, in words; "" if one is not recorded.

        Raises:
            StoreError: a manifest is damaged.
        """
        if not (self.manifest_file.exists() and other.manifest_file.exists()):
            return ""
        return difference(standing(other.manifest()), standing(self.manifest()))

    def thread(self) -> str | None:
        """The run's thread; None if it was stopped before anything was computed.

        Raises:
            StoreError: the manifest is damaged, or missing though steps are here.
        """
        if not self.manifest_file.exists():
            if self.started:
                raise StoreError(
                    f"{self.manifest_file} is missing: the run cannot go on without it"
                )
            return None
        thread = self.manifest().get("thread")
        if not isinstance(thread, str):
            raise StoreError(f"{self.manifest_file} is damaged: it names no thread")
        return thread

    def forked_after(self) -> int | None:
        """How many steps of another run this one took over; None if it is no fork."""
        if not self.manifest_file.exists():
            return None
        parent = self.manifest().get("parent")
        step = parent.get("step") if isinstance(parent, dict) else None
        return step if isinstance(step, int) else None

    def begun_with(self, request: PruneRequest) -> bool:
        """Whether the run, as far as it is recorded, was begun with this request."""
        if not self.manifest_file.exists():
            return True
        return bool(standing(self.manifest())["request"] == self._identity(request))

    def raise_target(self, config: PruneConfig, step: int) -> None:
        """Let the run go on to the higher target of a configuration.

        The manifest is written first: what it names is then allowed in config.yaml and in the
        checkpoints, whichever of them a crash leaves at the target of before.

        Args:
            config: what the run goes on with.
            step: steps taken so far.

        Raises:
            StoreError: it cannot be written.
        """
        facts = self.manifest()
        write_json(self.manifest_file, facts | raised(facts, config.target, step))
        write_atomic(self.config_file, config.to_yaml().encode())

    def _identity(self, request: PruneRequest) -> dict[str, Any]:
        """A request to compare with the manifest's: any target of the run stands for the last."""
        values = request.identity()
        targets = targets_of(self.manifest()) if self.manifest_file.exists() else []
        return values | {"target": targets[-1]} if values["target"] in targets else values

    def locate(self, settings: _Settings) -> _Settings:
        """The settings with their paths as they are found now, from wherever it is looked at.

        They are looked for as they stand; where the run's directory lies; and where they lie if
        the project was moved or copied as a whole. What is found there is compared by its content
        before it is used.
        """
        found: dict[str, Any] = {}
        if isinstance(settings, PruneRequest):
            found["model"] = self._find(settings.model)
            if settings.pruned is not None:
                found["pruned"] = self._find(settings.pruned)
            found["texts"] = settings.texts.renamed(self._find)
        if isinstance(settings, PruneContext):
            if settings.prompts is not None:
                found["prompts"] = self._find(settings.prompts)
            for name, kinds in (("agent", ("replay", "exchange")), ("allocation", ("from",))):
                kind, _, path = (getattr(settings, name) or "").partition(":")
                if kind in kinds:
                    found[name] = f"{kind}:{self._find(path)}"
        return settings.model_copy(update=found)

    def _find(self, source: str) -> str:
        if source in (EMBEDDED, SELF):
            return source
        with suppress(OSError, RuntimeError):  # no path at all
            return next((str(p) for p in self._places(Path(source)) if p.exists()), source)
        return source

    def _places(self, source: Path) -> Iterator[Path]:
        yield source.expanduser()
        here = self.path.absolute()
        if not source.is_absolute():
            yield from (parent / source for parent in here.parents)
        began = self.manifest().get("place") if self.manifest_file.exists() else None
        if isinstance(began, dict):
            absolute = Path(str(began.get("working"))) / source.expanduser()
            there = Path(str(began.get("directory")))
            for new, old in zip((here, *here.parents), (there, *there.parents), strict=False):
                if absolute.is_relative_to(old):
                    yield new / absolute.relative_to(old)

    def manifest(self) -> dict[str, Any]:
        """What the run stands on: hashes, versions, seeds. Read once as it is.

        Raises:
            StoreError: missing or damaged.
        """
        try:
            content = _content(self.manifest_file.absolute(), stamp(self.manifest_file))
        except OSError as error:
            raise StoreError(f"cannot read {self.manifest_file}: {error.strerror}") from error
        if not isinstance(content, dict):
            raise StoreError(f"{self.manifest_file} is damaged: not a JSON object")
        return dict(content)

    def write_step_file(self, step: int, kind: str, value: dict[str, Any]) -> str:
        """Store a step's JSON under a name that its content makes unique; return the path."""
        data = canonical_json(value)
        name = _step_name(step, kind, data)
        if not (self.path / name).exists():
            write_atomic(self.path / name, data)
        return name

    def holds(self, step: int, kind: str, value: Any) -> bool:
        """Whether `write_step_file` stored this; true, too, where it stored nothing of the kind."""
        name = _step_name(step, kind, canonical_json(value))
        return (self.path / name).is_file() or not any(self.path.glob(f"steps/*-{kind}-*.json"))

    def write_spent(self, step: int, spent: Spent) -> None:
        """Keep what a step spent on an LLM that gave no decision in the end."""
        earlier = self._spent_files(step)
        name = self.write_step_file(step, "spent", spent.model_dump())
        for path in earlier:
            if path != self.path / name:
                with put_into_words(path):
                    path.unlink(missing_ok=True)

    def read_spent(self, step: int) -> Spent:
        """What `write_spent` kept of a step; nothing if it did not fail.

        Raises:
            StoreError: damaged.
        """
        # A crash between writing one and removing the one before leaves both, which only grow.
        found = [self._read(f"steps/{path.name}", Spent) for path in self._spent_files(step)]
        return max(found, key=lambda spent: (spent.calls, spent.tokens), default=Spent())

    def _spent_files(self, step: int) -> list[Path]:
        return list(self.path.glob(f"steps/{step:04d}-spent-*.json"))

    def read_profile(self, name: str) -> ModelProfile:
        """A profile that `write_step_file` stored.

        Raises:
            StoreError: missing or damaged.
        """
        return _read_profile(self.path.absolute(), name)

    def read_applied(self, name: str) -> Step:
        """A step as it was applied, which `write_step_file` stored.

        Raises:
            StoreError: missing or damaged.
        """
        return self._read(name, Step)

    def read_steps(self, history: list[StepSummary]) -> list[Step]:
        """All steps up to those of a history, which names the latest.

        Raises:
            StoreError: one is missing or damaged.
        """
        return [line.step for line in self.steps.chain(history)]

    def write_trace(self, steps: list[Step]) -> None:
        """Let trace.jsonl hold these steps, from the first on."""
        self.steps.write(chained(steps))

    def read_trace(self) -> list[Step]:
        """The steps of trace.jsonl; empty before the first.

        Raises:
            StoreError: damaged.
        """
        return self.steps.read(ended=self.metrics_file.exists())

    def _read(self, name: str, model: type[_Stored]) -> _Stored:
        return _read_step_file(self.path, name, model)


@functools.lru_cache(maxsize=32)
def _parsed(text: str) -> PruneConfig:
    """The configuration of a config.yaml, which every node asks for: parsing takes 8 ms."""
    return validate_config(parse_yaml(text, "it is"))


def _read_step_file(directory: Path, name: str, model: type[_Stored]) -> _Stored:
    """What a name of `RunDirectory.write_step_file` stands for.

    Raises:
        StoreError: missing or damaged, or no such name: a checkpoint's may be anything.
    """
    path = directory / name
    named = _STEP_FILE.fullmatch(name)
    if named is None:
        raise StoreError(f"{name[:200]!r} is not the name of a file of a step")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    if not sha256_bytes(data).startswith(named[1]):
        raise StoreError(f"{path} is damaged: its content does not match its name")
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise StoreError(f"{path} is damaged: {error}") from error


@functools.lru_cache(maxsize=32)
def _content(path: Path, stamp: tuple[int, int, int]) -> Any:
    """A manifest as it was at a time, which each node asks for several times."""
    return read_json(path)


@functools.lru_cache(maxsize=4)
def _read_profile(directory: Path, name: str) -> ModelProfile:
    """A profile, which several nodes ask for: what a name stands for never changes."""
    return _read_step_file(directory, name, ModelProfile)


def _step_name(step: int, kind: str, data: bytes) -> str:
    return f"steps/{step:04d}-{kind}-{sha256_bytes(data)[:12]}.json"
