"""A comparison without models: names that attack what shows them, a failure, a missed target."""

import math
from typing import Any

from prunewright.state.study import (
    Comparison,
    ComparisonConfig,
    DenseExperiment,
    ExperimentResult,
    Scores,
    TextResult,
    validate_comparison,
)
from prunewright.tools.study import Planned, build_comparison

_HOSTILE = "<script>window.hacked = 1</script> | `x` **b** [a](javascript:0) {{ 7 * 7 }} $m$ \\"
NAME = _HOSTILE[:80].strip()
BROKE = f"it broke: {_HOSTILE}"
CONTROL = "control"
SEEDS, TARGETS = (0, 1, 2), (0.3, 0.5)


def make_result(seed: int, target: float, factor: float, sparsity: float) -> ExperimentResult:
    losses = [3.0 + target + 0.1 * seed + math.log(factor), 3.4 + 0.05 * seed]
    text = TextResult(perplexity=math.exp(sum(losses) / 2), losses=tuple(losses))
    return ExperimentResult(
        status="target_reached",
        sparsity=sparsity,
        steps=3,
        rollbacks=1,
        revision="abc",
        tokens={"calibration": 100 * (seed + 1), "guard": 50, "test": 999, "llm": 7},
        tokens_for_choosing=100 * (seed + 1) + 50,
        seconds=10.0 + seed * factor,
        peak_memory_bytes=2**30 + seed,
        scores=Scores(texts={"web <i>": text}),
    )


def make_config(**keys: Any) -> ComparisonConfig:
    methods = [{"name": CONTROL}, {"name": NAME, "settings": {"agent": "greedy"}}]
    methods.append({"name": "2:4", "settings": {"pattern": "2:4"}})
    data = {
        "methods": methods,
        "seeds": list(SEEDS),
        "targets": list(TARGETS),
        "control": CONTROL,
        "evaluation": {"texts": [{"name": "web <i>", "source": "embedded", "windows": 2}]},
    }
    return validate_comparison(data | keys)


def make_comparison(config: ComparisonConfig | None = None) -> Comparison:
    """All experiments done but one, which failed, and one that is off its target."""
    config = config or make_config()
    plan, results, errors = [], {}, {}
    for number, method in enumerate(config.methods):
        for target in config.targets_of(method):
            for seed in config.seeds:
                key = f"{number}-{target}-{seed}"
                settled = config.settle(method, seed=seed, target=target)
                plan.append(Planned(method, seed, target, settled, key))
                if key == "1-0.5-2":
                    errors[key] = BROKE
                    continue
                off = 0.0011 if key == "1-0.3-1" else 0.0009
                results[key] = make_result(seed, target, 1 + 0.1 * number + seed, target - off)
    dense = DenseExperiment(key="d", state="done", scores=make_result(0, 0.0, 0.5, 0.0).scores)
    return build_comparison(config, plan, results, errors, dense)
