"""Signals: what an agent is told of each layer. One file each, one line each in the registry."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from prunewright.state import InputError
from prunewright.state.plugins import Registry
from prunewright.state.profile import LayerProfile
from prunewright.tools.signals import cost, gradient, knowledge, salience
from prunewright.tools.signals.base import Measured, Signal, two_digits, z_scores

__all__ = ["SIGNALS", "Measured", "Signal", "find_signals", "two_digits", "z_scores"]

SIGNALS: dict[str, Signal] = {
    found.name: found for found in (salience.SIGNAL, gradient.SIGNAL, cost.SIGNAL, knowledge.SIGNAL)
}
"""The project's own, in the order of columns."""

_TAKEN = {*LayerProfile.model_fields, "step", "layer"}
"""Columns of a trace beside a signal's own: its z-score, and its value without ``z_``."""

REGISTRY = Registry(
    kind="signal",
    group="prunewright.signals",
    known=SIGNALS,
    fits=lambda found: isinstance(found, Signal),
    must="is no prunewright.tools.signals.Signal",
)


def find_signals(names: Iterable[str]) -> list[Signal]:
    """The signals that a configuration names, each once.

    Raises:
        InputError: a name is unknown or cannot be imported, two signals have one name, or one
            has that of another column.
    """
    found: dict[str, Signal] = {}
    for name in dict.fromkeys(names):
        signal = REGISTRY.find(name)
        if name not in SIGNALS:
            if signal.name in SIGNALS or signal.name in found:
                raise InputError(f"the signal {name!r} has the name {signal.name} of another one")
            if signal.name.removeprefix("z_") in _TAKEN:
                raise InputError(f"the signal {name!r} cannot be called {signal.name}")
            signal = replace(signal, compute=_checked(name, signal.compute))
        found[signal.name] = signal
    return list(found.values())


def _checked(
    name: str, compute: Callable[[Measured], float | None]
) -> Callable[[Measured], float | None]:
    """A signal from outside, whose values are looked at."""

    def wrapper(measured: Measured) -> float | None:
        value = compute(measured)
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError(
                f"the signal {name!r} is {value!r} for {measured.layer.name}: a finite number or "
                "None is asked for"
            )
        return number

    return wrapper
