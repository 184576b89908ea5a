"""What happens once the masks are there: the stages that give the kept weights other values.

They come once, at the end of a run or a baseline, and each is judged on the guard text as a step
is: what leaves its perplexity higher than before is not kept. Each is stored as soon as it has
ended, so that a run that is killed between two of them does not do the first one again.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunewright.state.config import AdaptOptions
from prunewright.state.metrics import Stage
from prunewright.state.run import DENSE
from prunewright.tools.adapt.checkpoints import discard
from prunewright.tools.adapt.training import adapt
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.losses import perplexities, perplexity
from prunewright.tools.model.head import Progress
from prunewright.tools.solve.solving import solves
from prunewright.tools.store.finishing import Done, Finishing, read_finishing
from prunewright.tools.store.storage import write_json


@dataclass(frozen=True)
class Made:
    """What the work of a stage came to.

    Attributes:
        revision: its name.
        notes: what must be told of it.
        curve: tokens seen and the loss there, of a stage that trains.
        before: seconds that it took in processes before this one.
    """

    revision: str
    notes: list[str] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    before: float = 0.0


@dataclass(frozen=True)
class _Planned:
    """A stage that is to be done.

    Attributes:
        name: as in `Stage`.
        settings: what it is done by, as JSON values, beside the request, which never changes.
        work: makes a revision of the one that it is given.
    """

    name: str
    settings: dict[str, Any]
    work: Callable[[str], Made]


@dataclass(frozen=True)
class Finished:
    """What the stages came to.

    Attributes:
        revision: the last one that was kept.
        perplexity: its own on the guard text.
        domains: that of each domain; empty where there are none, or no stage was kept.
        stages: those that were done, kept or not.
    """

    revision: str
    perplexity: float
    domains: dict[str, float]
    stages: list[Stage]


def complete(
    file: Path,
    bench: Workbench,
    revision: str,
    guard: float,
    training: AdaptOptions | None = None,
    progress: Progress | None = None,
    tell: Callable[[Stage], None] | None = None,
) -> Finished:
    """Do the stages that are asked for, or what a crash left undone of them.

    What they take is told in their records alone, not in the bench's tokens.

    Args:
        file: finishing.json; what it holds of another end is replaced.
        bench: the live model.
        revision: the masks that a run or a baseline came to.
        guard: their perplexity on the guard text.
        training: how the kept weights are trained in the last stage; None: not at all.
        progress: told of the parts done.
        tell: told of each stage once it has ended, those from before a crash, too.

    Raises:
        InputError: the weights cannot be trained so.
        StoreError: the file is damaged, or something cannot be written.
    """
    folder = file.with_name(file.stem.replace("finishing", "adapt"))
    began, earlier, done = revision, read_finishing(file), list[Done]()
    domains: dict[str, float] = {}
    left = earlier.done if earlier is not None and earlier.revision == revision else []
    write_json(file, Finishing(revision=began, done=left).model_dump())
    stages = _planned(bench, training, folder, progress) if revision != DENSE else []
    for planned in stages:
        one = left[len(done)] if len(left) > len(done) else None
        if one is None or (one.stage.name, one.settings) != (planned.name, planned.settings):
            left = []  # those after a stage that is another one now began from something else
            stage = _run(planned, bench, revision, guard, progress)
            one = Done(settings=planned.settings, stage=stage)
            write_json(file, Finishing(revision=began, done=[*done, one]).model_dump())
        done.append(one)
        if tell is not None:
            tell(one.stage)
        if one.stage.kept and one.stage.after is not None:
            revision, guard, domains = one.stage.revision, one.stage.after, one.stage.domains
    discard(folder)
    return Finished(revision, guard, domains, [one.stage for one in done])


def _planned(
    bench: Workbench, training: AdaptOptions | None, folder: Path, progress: Progress | None
) -> list[_Planned]:
    """The stages that are asked for, in order."""
    planned = []
    if solves(bench.request):

        def reconstruct(revision: str) -> Made:
            found = bench.solve(revision, progress)
            return Made(found, bench.store.about(found).get("notes", []))

        planned.append(_Planned("reconstruct", {}, reconstruct))
    if training is not None:

        def train(revision: str) -> Made:
            found = adapt(bench, revision, training, folder, progress)
            return Made(found.revision, found.notes, found.curve, found.before)

        settings = training.model_dump(mode="json", exclude={"checkpoint_minutes"})
        planned.append(_Planned("adapt", settings, train))
    return planned


def _run(
    planned: _Planned, bench: Workbench, revision: str, before: float, progress: Progress | None
) -> Stage:
    """Do a stage, and judge it on the guard text."""
    began, tokens = time.perf_counter(), dict(bench.tokens)
    made = planned.work(revision)
    losses = bench.guard_losses(made.revision, progress)
    after = perplexity(losses)
    spent = {use: n - tokens.get(use, 0) for use, n in bench.tokens.items()}
    bench.tokens.update(dict.fromkeys(bench.tokens, 0) | tokens)  # the record tells them
    finite = math.isfinite(after)
    return Stage(
        name=planned.name,
        revision=made.revision,
        before=before if math.isfinite(before) else None,
        after=after if finite else None,
        kept=finite and not after > before and made.revision != revision,
        seconds=made.before + time.perf_counter() - began,
        tokens={use: n for use, n in spent.items() if n},
        notes=made.notes,
        curve=made.curve,
        domains=perplexities(bench.request.texts.domains("guard"), losses) if finite else {},
    )
