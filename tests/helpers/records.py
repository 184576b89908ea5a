"""Steps of a run as an agent may be told of them."""

from typing import Any

from prunewright.state import Decision, Step

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


def record(step: int = 0, **values: Any) -> Step:
    """An accepted step of two layers, but for what is said."""
    defaults: dict[str, Any] = {
        "step": step,
        "agent": "greedy",
        "verdict": "accepted",
        "reason": "",
        "decision": Decision(reasoning="Cheap\nlayers.", layers=[], expected_ppl_change=0.012),
        "applied": {UP: 0.05, DOWN: 0.15},
        "predicted_costs": {"mlp.up_proj@early": 0.004, "mlp.down_proj@middle": 0.006},
        "invalid_answers": [],
        "notes": [],
        "profile": "p",
        "revision": "r",
        "candidate": "r",
        "sparsity_before": 0.1,
        "sparsity": 0.15,
        "perplexity_before": 20.0,
        "candidate_perplexity": 20.4,
        "change": 0.02,
        "change_stderr": 0.001,
        "predicted_change": 0.01,
        "llm_tokens": 0,
    }
    return Step(**(defaults | values))


def rolled_back(step: int = 0, **values: Any) -> Step:
    """A step of two layers that was rolled back."""
    broke = {
        "verdict": "rolled_back",
        "reason": "perplexity rose by 30.0%",
        "change": 0.3,
        "sparsity": 0.1,
    }
    return record(step, **(broke | values))
