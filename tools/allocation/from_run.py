"""The final allocation of another run, pruned again in one shot."""

from pathlib import Path

from prunewright.state import InputError
from prunewright.state.config import Options
from prunewright.tools.allocation.counts import Allotment
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.model.head import Progress
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.trace import layer_sparsities, read_story

NEAR = 0.001
"""How far the run's sparsity may lie from the target."""


class FromRunOptions(Options):
    """None."""


def check(path: str) -> None:
    """Refuse what is no finished run, before anything is loaded.

    Raises:
        InputError: saying what it is.
        StoreError: a file of it is damaged.
    """
    if read_story(RunDirectory(Path(path).expanduser())).metrics is None:
        raise InputError(
            f"the run in {path} is not finished, so it has no final allocation: "
            f"prunewright resume {path}"
        )


def allocate(
    path: str, bench: Workbench, _: FromRunOptions, progress: Progress | None = None
) -> Allotment:
    """Exactly the zeros of each layer that a finished run ended with.

    Args:
        path: the run's directory.
        bench: at a model with the same layers.
        _: none.
        progress: not needed.

    Raises:
        InputError: other layers, or another sparsity than the target.
        StoreError: a file of the run is damaged.
    """
    story = read_story(RunDirectory(Path(path).expanduser()))
    layers = bench.loaded.layers
    found = layer_sparsities(story)
    if unknown := found.keys() ^ layers.keys():
        raise InputError(
            f"the run in {path} is of another model: {min(unknown)} is a layer of only one of them"
        )
    counts = {name: round(found[name] * layer.numel) for name, layer in layers.items()}
    if any(abs(counts[n] - found[n] * ly.numel) > 0.01 for n, ly in layers.items()):
        raise InputError(
            f"the run in {path} is of another model: its layers are of other sizes than those of "
            f"{bench.request.model}"
        )
    if fewer := [name for name, count in counts.items() if count < bench.dense_zeros[name]]:
        raise InputError(
            f"the run in {path} is of another model: {fewer[0]} has more zeros of its own in "
            f"{bench.request.model} than that run ended with"
        )
    sparsity = sum(counts.values()) / bench.loaded.prunable
    if abs(sparsity - bench.request.target) > NEAR:
        raise InputError(
            f"the run in {path} ended at a sparsity of {sparsity:.4f}, and the target is "
            f"{bench.request.target:g}: give --target {sparsity:.4f} for its allocation"
        )
    agents = ", then ".join(dict.fromkeys(record.agent for record in story.records))
    criterion = story.config.criterion
    return Allotment(counts, [f"the final allocation of {path} ({agents}, masks by {criterion})"])
