"""Not a test: agents for the tests, named in configs as ``import:scripted_agents:Class``."""

from typing import Any

from prunewright.graph.agents import Observation
from prunewright.graph.agents.controls import GreedyAgent
from prunewright.state import Decision, LayerDelta, Move, Trials

SEEN: list[Observation] = []
"""What `Seeing` was shown."""


class Seeing:
    """Greedy, and keeps what it is shown."""

    def __init__(self, **_: Any) -> None:
        pass

    def decide(self, observation: Observation) -> Decision:
        SEEN.append(observation)
        return GreedyAgent().decide(observation)


class HarmfulOnce:
    """Greedy, but in one step it takes as much as it may from the first block."""

    def __init__(self, step: int = 1, **_: Any) -> None:
        self.step = step

    def decide(self, observation: Observation) -> Decision:
        if observation.step == self.step:
            return harmful(observation)
        return GreedyAgent().decide(observation)


class Harmful:
    """Takes as much as it may from the first block, in every step."""

    def __init__(self, **_: Any) -> None:
        pass

    def decide(self, observation: Observation) -> Decision:
        return harmful(observation)


class Idle:
    """Chooses no layer from some step on."""

    def __init__(self, after: int = 0, **_: Any) -> None:
        self.after = after

    def decide(self, observation: Observation) -> Decision:
        if observation.step < self.after:
            return GreedyAgent().decide(observation)
        return Decision(reasoning="Nothing to do.", layers=[])


class Speck:
    """Asks for less than one weight."""

    def __init__(self, **_: Any) -> None:
        pass

    def decide(self, observation: Observation) -> Decision:
        name = observation.profile.layers[0].name
        return Decision(reasoning="A speck.", layers=[LayerDelta(name=name, delta=1e-7)])


class Wrong:
    """Names a layer that does not exist."""

    def __init__(self, **_: Any) -> None:
        pass

    def decide(self, observation: Observation) -> Decision:
        return Decision(reasoning="?", layers=[LayerDelta(name="9.nowhere", delta=0.1)])


def harmful(observation: Observation) -> Decision:
    room = observation.room()
    budget = observation.budget * observation.prunable
    layers = []
    for layer in observation.profile.layers:
        delta = min(observation.max_delta, room[layer.name], budget / layer.parameters)
        if layer.block == 0 and delta > 1e-3:
            layers.append(LayerDelta(name=layer.name, delta=delta))
            budget -= delta * layer.parameters
    return Decision(reasoning="To do harm.", layers=layers)


class Eventful:
    """Greedy, but for a harmful step, a refused one, an empty one, and one that restores."""

    def __init__(self, **_: Any) -> None:
        pass

    def decide(self, observation: Observation) -> Decision:
        if observation.step == 1:
            return harmful(observation)
        if observation.step == 2:
            return Wrong().decide(observation)
        if observation.step == 3:
            return Decision(reasoning="A rest.", layers=[])
        if observation.step == 4:
            fullest = max(observation.profile.layers, key=lambda p: p.sparsity).name
            layers = [
                LayerDelta(name=p.name, delta=-0.05 if p.name == fullest else 0.05)
                for p in observation.profile.layers
            ]
            return Decision(reasoning="Restores.", layers=layers, lessons=["restored"])
        return GreedyAgent().decide(observation)


class Named:
    """Names given layers with given deltas in the first steps, then is greedy."""

    def __init__(self, steps: list[list[tuple[str, float]]]) -> None:
        self.steps = steps

    def decide(self, observation: Observation) -> Decision:
        if observation.step >= len(self.steps):
            return GreedyAgent().decide(observation)
        layers = [
            LayerDelta(name=f"model.layers.{name}", delta=delta)
            for name, delta in self.steps[observation.step]
        ]
        return Decision(reasoning="As told.", layers=layers)


class Steps:
    """Answers with given decisions, one a step: name (or ``*`` for every layer) to delta."""

    def __init__(self, steps: list[dict[str, Any]]) -> None:
        self.steps = steps

    def decide(self, observation: Observation) -> Decision:
        step = dict(self.steps[min(observation.step, len(self.steps) - 1)])
        names = [layer.name for layer in observation.profile.layers]
        layers = [
            LayerDelta(name=name, delta=delta)
            for key, delta in step.pop("layers").items()
            for name in names
            if key in ("*", name.removeprefix("model.layers."))
        ]
        return Decision(reasoning="As told.", layers=layers, **step)


class Sure:
    """Has the step of `greedy` measured, then takes it."""

    def __init__(self, **_: Any) -> None:
        pass

    def decide(self, observation: Observation) -> Decision | Trials:
        decision = GreedyAgent().decide(observation)
        return decision if observation.probes else Trials(moves=[Move(layers=decision.layers)])
