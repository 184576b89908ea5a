"""Where training that was killed goes on: the newest state of it, whole or absent."""

import json
import logging
import shutil
import time
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunewright.state import StoreError
from prunewright.tools.store.storage import appearing, put_into_words, read_json, write_json

_log = logging.getLogger("prunewright")


@dataclass
class Standing:
    """How far training is.

    Attributes:
        step: steps of the optimizer so far.
        losses: KL divergence by step, mean over its tokens, nats.
        guard: steps after which the guard was measured, each with the mean loss then, nats a token.
        best: the step after which that was lowest.
        diverged: whether what came after these steps was not finite, so that training is over.
        seconds: that they took, in all processes.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    guard: list[tuple[int, float]] = field(default_factory=list)
    best: int = 0
    diverged: bool = False
    seconds: float = 0.0

    @property
    def turned(self) -> int:
        """How many times in a row the guard was worse than at its best."""
        return len(self.guard) - 1 - [step for step, _ in self.guard].index(self.best)


class Checkpoints:
    """States of training in a folder of their own: ``standing.json`` names those that count.

    Tensors are written layer by layer, a file each, so that no second copy of them is in memory.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """Open the folder; what another training left there is removed.

        Args:
            folder: where; made when something is stored.
            identity: what the training is of, as JSON values.
        """
        self.folder = folder
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._file = folder / "standing.json"
        self._opened = time.monotonic()
        self.before = 0.0
        """Seconds that earlier processes trained."""
        self.saved = Standing()
        """What the newest checkpoint holds; nothing but zeros before the first."""
        if not self._file.exists():
            return
        found = read_json(self._file)
        try:
            if found["identity"] == self._identity:
                guard = [(int(step), float(loss)) for step, loss in found["guard"]]
                losses = [float(loss) for loss in found["losses"]]
                diverged = bool(found.get("diverged", False))  # an earlier version wrote none
                best = int(found["best"])
                seconds = float(found.get("seconds", 0.0))  # nor this
                self.saved = Standing(int(found["step"]), losses, guard, best, diverged, seconds)
                self.before = seconds
                return
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{self._file} is damaged: delete {folder}, and resume; adapt then begins again"
            ) from error
        _log.warning("adapt begins again: it is no longer what its checkpoint was made for")
        discard(folder)

    def state(self, step: int) -> Path:
        """Where masters and moments after a step are."""
        return self.folder / f"state-{step:06d}"

    def best(self, step: int) -> Path:
        """Where the weights after a step are, if they were the best then."""
        return self.folder / f"best-{step:06d}"

    def save_state(
        self, standing: Standing, layers: Iterable[tuple[str, dict[str, Tensor]]]
    ) -> None:
        """Make a checkpoint, and remove what only the one before needed.

        Raises:
            StoreError: it cannot be written.
        """
        self._write(self.state(standing.step), layers)
        self._name(standing)

    def end(self, standing: Standing) -> None:
        """Say that training has ended: of its tensors only the best weights are left.

        Raises:
            StoreError: it cannot be written.
        """
        self._name(standing)
        shutil.rmtree(self.state(standing.step), ignore_errors=True)

    def _name(self, standing: Standing) -> None:
        standing.seconds = self.before + time.monotonic() - self._opened
        write_json(self._file, {"identity": self._identity} | asdict(standing))
        self.saved = deepcopy(standing)
        self._clear({standing.best})

    def save_best(self, step: int, layers: Iterable[tuple[str, dict[str, Tensor]]]) -> None:
        """Keep the weights after a step beside those that the last checkpoint names.

        Raises:
            StoreError: they cannot be written.
        """
        self._write(self.best(step), layers)
        self._clear({step, self.saved.best})

    def _clear(self, best: set[int]) -> None:
        keep = {self.state(self.saved.step), *map(self.best, best)}
        for path in [*self.folder.glob("state-*"), *self.folder.glob("best-*")]:
            if path not in keep:
                shutil.rmtree(path, ignore_errors=True)

    def _write(self, path: Path, layers: Iterable[tuple[str, dict[str, Tensor]]]) -> None:
        shutil.rmtree(
            path, ignore_errors=True
        )  # of a training that was killed since, and is done again
        with appearing(path, directory=True) as scratch:
            for name, tensors in layers:
                save_file(tensors, scratch / f"{name}.safetensors")

    def read(self, path: Path, name: str) -> dict[str, Tensor]:
        """The tensors of a layer, mapped from its file.

        Raises:
            StoreError: missing or damaged.
        """
        return read_tensors(path / f"{name}.safetensors")


def discard(folder: Path) -> None:
    """Delete the folder of a training, and all that is in it.

    Raises:
        StoreError: it cannot be deleted.
    """
    with put_into_words(folder):
        if folder.exists():
            shutil.rmtree(folder)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of this folder, mapped.

    Raises:
        StoreError: missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"cannot read {path}: {error}. Delete {path.parent.parent}, and resume; adapt then "
            "begins again"
        ) from error
