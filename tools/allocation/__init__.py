"""How a baseline shares the target out over the layers. One file each, one line each here."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import ValidationError

from prunewright.state import InputError
from prunewright.state.config import Options, describe_validation_error
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
from prunewright.tools.allocation.counts import Allotment
from prunewright.tools.bench.workbench import Workbench
from prunewright.tools.model.head import Progress

Allocate = Callable[[Workbench, Progress | None], Allotment]
"""Zeros of each layer for a workbench's target, with what was chosen on the way."""

FROM_RUN = "from:"


@dataclass(frozen=True)
class Allocation:
    """A function ``(bench, options, progress) -> Allotment`` and the model of its options."""

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


def resolve_allocation(name: str, options: dict[str, Any], pattern: str) -> Allocate:
    """The allocation of a configuration, before anything is loaded.

    Args:
        name: a key of `ALLOCATIONS`, or ``from:RUN_DIR``.
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
    elif name in ALLOCATIONS:
        found = ALLOCATIONS[name]
    else:
        close = difflib.get_close_matches(name, ALLOCATIONS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(
            f"unknown allocation {name!r}{hint}; known: {', '.join(ALLOCATIONS)}, from:RUN_DIR"
        )
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
    return lambda bench, progress: found.allocate(bench, settled, progress)
