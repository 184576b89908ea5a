"""How a baseline shares the target out over the layers. One file each, one line each here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import ValidationError

from prunewright.state import InputError
from prunewright.state.config import Options
from prunewright.state.loading import describe_validation_error
from prunewright.state.plugins import Registry
from prunewright.tools.allocation import (
    alphapruning,
    atp,
    evolutionary,
    from_run,
    global_ranking,
    greedy,
    owl,
    uniform,
)
from prunewright.tools.allocation.blocks import block_counts, by_block, layer_bounds, layer_counts
from prunewright.tools.allocation.counts import Allotment
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.model.head import Progress

__all__ = [
    "ALLOCATIONS",
    "REGISTRY",
    "Allocate",
    "Allocation",
    "Allotment",
    "block_counts",
    "by_block",
    "layer_counts",
    "resolve_allocation",
]

Allocate = Callable[[Workbench, Progress | None], Allotment]
"""Zeros of each layer for a workbench's target, with what was chosen on the way."""

FROM_RUN = "from:"


@dataclass(frozen=True)
class Allocation:
    """How a target is shared out.

    Attributes:
        options: the model of its options; `Options` itself for none.
        allocate: of a workbench, the options, and who is told of progress. `layer_counts` and
            `block_counts` turn sparsities wanted into whole weights.
    """

    options: type[Options]
    allocate: Callable[[Workbench, Any, Progress | None], Allotment]


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Allocation(uniform.UniformOptions, uniform.allocate),
    "owl": Allocation(owl.OwlOptions, owl.allocate),
    "alphapruning": Allocation(alphapruning.AlphaPruningOptions, alphapruning.allocate),
    "atp": Allocation(atp.AtpOptions, atp.allocate),
    "greedy": Allocation(greedy.GreedyOptions, greedy.allocate),
    "evolutionary": Allocation(evolutionary.EvolutionaryOptions, evolutionary.allocate),
    "global": Allocation(global_ranking.GlobalOptions, global_ranking.allocate),
}

REGISTRY = Registry(
    kind="allocation",
    group="prunewright.allocations",
    known=ALLOCATIONS,
    fits=lambda found: isinstance(found, Allocation),
    must="is no prunewright.tools.allocation.Allocation",
    others=("from:RUN_DIR",),
)


def resolve_allocation(name: str, options: dict[str, Any], pattern: str) -> Allocate:
    """The allocation of a configuration, before anything is loaded.

    Args:
        name: a key of `ALLOCATIONS`, ``from:RUN_DIR``, or the name of one from outside.
        options: its own; what it does not know is an error.
        pattern: of the request.

    Raises:
        InputError: unknown name or option, no finished run at RUN_DIR, or an N:M pattern, which
            fixes each layer's sparsity.
        StoreError: a file of the run at RUN_DIR is damaged.
    """
    if name.startswith(FROM_RUN):
        path = name.removeprefix(FROM_RUN)
        if not path:
            raise InputError("the allocation from: names no run directory: from:RUN_DIR")
        found = Allocation(from_run.FromRunOptions, partial(from_run.allocate, path))
        from_run.check(path)
    else:
        found = REGISTRY.find(name)
    if pattern != "unstructured" and name != "uniform":
        raise InputError(
            f"pattern {pattern} fixes each layer's sparsity, so there is nothing for the "
            f"allocation {name} to share out: leave one of the two away"
        )
    if options and not found.options.model_fields:
        raise InputError(
            f"the allocation {name} takes no options, and allocation_options has {min(options)}"
        )
    try:
        settled = found.options.model_validate(options)
    except ValidationError as error:
        lines = describe_validation_error(error, found.options)
        raise InputError(f"allocation_options of {name}: {lines}") from None

    def allocate(bench: Workbench, progress: Progress | None) -> Allotment:
        allotment = found.allocate(bench, settled, progress)
        if name not in ALLOCATIONS and not name.startswith(FROM_RUN):
            _check_allotment(name, allotment, bench)
        return allotment

    return allocate


def _check_allotment(name: str, allotment: Allotment, bench: Workbench) -> None:
    """Refuse counts from outside that are not the target's.

    As of uniform, the total may be below it by less than one weight a layer.

    Raises:
        InputError: saying what is wrong.
    """
    if not isinstance(allotment, Allotment):
        raise InputError(f"the allocation {name!r} gave a {type(allotment).__name__}, no Allotment")
    counts, bounds = allotment.counts, layer_bounds(bench)
    if counts.keys() != bounds.sizes.keys():
        missing = ", ".join(sorted(counts.keys() ^ bounds.sizes.keys())[:5])
        raise InputError(
            f"the allocation {name!r} must give each layer of the model a count, and no other: "
            f"look at {missing}"
        )
    for layer, count in counts.items():
        least, most = bounds.least[layer], bounds.most[layer]
        if not isinstance(count, int) or not least <= count <= most:
            raise InputError(
                f"the allocation {name!r} gives {layer} {count!r} zeros: a whole number from "
                f"{least} to {most} is asked for"
            )
    total, wanted = sum(counts.values()), bounds.total(bench.request.target)
    if not wanted - len(counts) < total <= wanted:
        raise InputError(
            f"the allocation {name!r} comes to {total} zeros, and the target to {wanted}: "
            "prunewright.tools.allocation.layer_counts makes such counts from sparsities"
        )
