"""Following a run that another process drives, from its files only."""

import time
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from prunewright.state import Step
from prunewright.state.metrics import Stage
from prunewright.tools.store.finishing import read_finishing
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.trace import load_metrics

POLL = 1.0
"""Seconds between two looks."""
# The file that each node leaves when it ends.
_NODES = {"profile": "profile", "applied": "apply_prune"}


def follow(directory: RunDirectory, poll: float = POLL) -> Iterator[tuple[str, dict[str, Any]]]:
    """What happens in a run, from its first step on until it ends.

    Yields ``custom`` and ``updates`` events as the runner tells them, the latter without what a
    node wrote, and ``holder`` events: the ``process`` that works on the run, None for nobody.

    Args:
        directory: of a run; nothing in it is written or locked.
        poll: seconds between two looks.

    Raises:
        InputError: there is no run.
        StoreError: a file is damaged.
    """
    directory.config()
    steps: list[Step] = []
    stamp: tuple[int, int] | None = None
    looks: list[int | None] = []
    told: tuple[int | None] | None = None
    phase = ""
    ending: tuple[int, int] | None = None
    stages: list[Stage] = []
    over = False
    while True:
        # In this order: the last step is in the trace before the metrics are there.
        metrics = load_metrics(directory) if directory.metrics_file.exists() else None
        if stamp != (stamp := _stamp(directory.trace_file)):
            now = directory.read_trace()
            pairs = zip(steps, now, strict=False)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            # Steps that were taken otherwise, after going back in time, are told again.
            for step in now[same:]:
                yield "custom", {"step": step.model_dump(mode="json")}
            steps = now
        if ending != (ending := _stamp(directory.finishing_file)):
            finishing = read_finishing(directory.finishing_file)
            # Going back in time leaves that of an earlier end there.
            if finishing is not None and steps and finishing.revision != steps[-1].revision:
                finishing = None
            over = finishing is not None
            done = [one.stage for one in finishing.done] if finishing is not None else []
            if over and metrics is None:
                yield "custom", {"finishing": True}
            for stage in done[len(stages) :]:
                yield "custom", {"stage": stage.model_dump(mode="json")}
            stages = done
        if metrics is not None:
            yield "custom", {"metrics": metrics.model_dump(mode="json")}
            return
        looks = [*looks[-1:], directory.holder()]
        # Studio holds a run node by node: one look may fall between two.
        if len(looks) == 2 and looks[0] == looks[1] and told != (looks[1],):
            told = (looks[1],)
            yield "holder", {"process": looks[1]}
        if not over and (found := _ended(directory, len(steps))) != phase:
            phase = found
            if phase:
                yield "updates", {phase: {}}
        time.sleep(poll)


def _stamp(path: Path) -> tuple[int, int]:
    """What changes whenever a file is replaced."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_ino)


def _ended(directory: RunDirectory, step: int) -> str:
    """The node that ended last, as far as files tell; "" before the first."""
    kinds = {path.name.split("-")[1] for path in directory.path.glob(f"steps/{step:04d}-*.json")}
    found = [node for kind, node in _NODES.items() if kind in kinds]
    return found[-1] if found else "reflect" if step else ""
