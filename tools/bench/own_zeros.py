"""Zeros that a model has before any step: what is said of them, and what they rule out."""

from typing import TYPE_CHECKING

from prunewright.state import InputError
from prunewright.state.metrics import NEGLIGIBLE
from prunewright.tools.counting import most_zeros

if TYPE_CHECKING:
    from prunewright.tools.bench.workbench import Workbench


def own_zeros_words(zeros: int, prunable: int) -> str:
    """How many of a model's prunable weights are zero by themselves; "" if hardly any are."""
    if zeros < NEGLIGIBLE * prunable:
        return ""
    return (
        f"{zeros / prunable:.2%} of the prunable weights ({zeros:,}) are zero in the model itself: "
        "they count towards the target and are never restored"
    )


def check_target(bench: "Workbench") -> None:
    """Refuse a target that the zeros of the dense model reach, or that comes to no weight.

    Raises:
        InputError: it is one of these.
    """
    zeros, prunable = sum(bench.dense_zeros.values()), bench.loaded.prunable
    target = bench.request.target
    if not (most := most_zeros(target, prunable)):
        raise InputError(
            f"target {target:g} comes to none of the {prunable:,} prunable weights of "
            f"{bench.request.model}. Give a higher target"
        )
    if zeros and most <= zeros:
        raise InputError(
            f"target {target:g} is reached before any step: {zeros:,} of the {prunable:,} prunable "
            f"weights of {bench.request.model} are zero already, a sparsity of "
            f"{zeros / prunable:.4f}. Give a higher target"
        )


def check_pattern(bench: "Workbench") -> None:
    """Refuse a pattern that takes no weight, since all layers have it already.

    Raises:
        InputError: they do.
    """
    gains = bench.pattern_gains()
    if gains and not any(gains.values()):
        sparsity = sum(bench.dense_zeros.values()) / bench.loaded.prunable
        raise InputError(
            f"nothing is left to prune: every layer of {bench.request.model} that pattern "
            f"{bench.request.pattern} fits has it already ({sparsity:.4f} of the prunable weights "
            "are zero)"
        )
