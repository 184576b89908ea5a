"""A run in words: what it is asked to do, and what it came to."""

import math

from prunewright.graph.words.numbers import calls, count, duration
from prunewright.state import PruneConfig
from prunewright.state.config import BASELINE, AdaptOptions, pattern_sparsity
from prunewright.state.metrics import NEGLIGIBLE, Metrics, Pair


def request_rows(config: PruneConfig) -> list[tuple[str, str]]:
    """What a run is asked to do: target, criterion, texts."""
    windows, texts = config.texts.windows, config.texts
    return [
        ("target", target_words(config)),
        ("criterion", config.criterion_words),
        *([] if config.agent == BASELINE else [("steps", _steps_words(config))]),
        *([("goal", " ".join(config.goal.split()))] if config.goal else []),
        *([("adapt", adapt_words(config.adapt))] if config.adapt else []),
        (
            "texts",
            f"calibration {texts.calibration_words}, {windows.calibration} windows; "
            f"guard {texts.guard_words}, {windows.guard}; test {texts.test}, {windows.test}; "
            f"{windows.length} tokens each",
        ),
        *([("weights", _weights_words(config))] if config.weights else []),
    ]


def _steps_words(config: PruneConfig) -> str:
    words = f"at most {100 * config.step:.3g}% of the prunable weights each"
    if pattern_sparsity(config.pattern) is not None:
        return words
    words += f", {100 * config.max_delta:.3g}% of one layer"
    if config.step < config.max_delta:
        return words
    return f"{words}: a full step takes all layers alike, a smaller step leaves a choice"


def _weights_words(config: PruneConfig) -> str:
    return ", ".join(f"{name} {weight:g}" for name, weight in config.domain_weights.items())


def adapt_words(options: AdaptOptions) -> str:
    """How the kept weights are trained in the end."""
    layers = "" if options.layers is None else f", layers {', '.join(options.layers)}"
    return (
        f"training: the kept weights follow the dense model on {options.tokens:,} tokens, "
        f"{options.optimizer}, learning rate {options.learning_rate:g}, {options.batch} windows a "
        f"step{layers}"
    )


def target_words(config: PruneConfig) -> str:
    """The target in words; a baseline's is fixed by a pattern, a run takes whole layers to it."""
    if config.pruned is not None:
        return f"the zeros of {config.pruned}"
    whole = pattern_sparsity(config.pattern)
    if whole is None:
        return f"{config.target:.1%} of the prunable weights"
    if config.agent == BASELINE:
        return f"{whole:.1%} of the prunable weights, fixed by the pattern"
    return f"{config.target:.1%} of the prunable weights, by whole layers of {config.pattern}"


def sparsity_words(metrics: Metrics) -> str:
    """The sparsity that was reached, and how much of it the dense model had."""
    words = f"{metrics.sparsity:.2%} of the prunable weights are exactly zero"
    if metrics.dense_sparsity < NEGLIGIBLE:
        return words
    return f"{words}, {metrics.dense_sparsity:.2%} were before"


def knowledge_rows(pair: Pair | None) -> list[tuple[str, str]]:
    """What is left of the facts; nothing where the guard did not bound it."""
    if pair is None:
        return []
    words = f"right answers at {pair.final:+.3f} nats a token, dense {pair.dense:+.3f}"
    return [("facts", words)]


def agent_words(metrics: Metrics) -> str:
    """What the agent decided, and what that took."""
    words = [count(metrics.decisions, "decision")]
    if metrics.invalid_answers:
        refused = count(metrics.invalid_answers, "answer")
        words.append(f"{refused} refused, {metrics.repairs} of them sent back")
    if metrics.probes:
        words.append(count(metrics.probes, "probe"))
    asked = calls(metrics.llm_calls, metrics.tokens.get("llm", 0))
    return "; ".join([", ".join(words), *([f"LLM: {asked}"] if asked else [])])


def scored_words(tokens: dict[str, int]) -> str:
    """Tokens of text by what they were scored for."""
    return ", ".join(f"{use} {n:,}" for use, n in tokens.items() if use != "llm") + " tokens"


def time_words(seconds: dict[str, float]) -> str:
    """How long a run took, and which node how long."""
    parts = sorted((-value, node) for node, value in seconds.items() if node != "total")
    named = ", ".join(f"{node} {duration(-value)}" for value, node in parts)
    return f"{duration(seconds.get('total', math.nan))} ({named})"


def pair_row(name: str, pair: Pair) -> list[str]:
    """A measure before and after, and its relative change."""
    change = (pair.final - pair.dense) / pair.dense
    return [name, f"{pair.dense:.3f}", f"{pair.final:.3f}", f"{change:+.2%}"]
