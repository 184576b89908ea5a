"""What asking an LLM costs besides the LLM, in processor time: observation, prompt, checking.

python benchmarks/asking.py --blocks 36 --steps 40 --repeats 20
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from typing import Any, cast

from prunewright.graph.agents import Observation
from prunewright.graph.agents.prompt import prompt
from prunewright.graph.agents.reading import read_answer
from prunewright.graph.asking import ask, observe
from prunewright.graph.correction import predicted_costs
from prunewright.state import (
    COST_DELTAS,
    Decision,
    LayerProfile,
    ModelProfile,
    PruneContext,
    PruneRequest,
    PruneState,
    StepRecord,
)
from prunewright.tools.rundir import RunDirectory
from prunewright.tools.storage import write_json

PROJECTIONS = {
    "self_attn.q_proj": 2560 * 4096,
    "self_attn.k_proj": 2560 * 1024,
    "self_attn.v_proj": 2560 * 1024,
    "self_attn.o_proj": 4096 * 2560,
    "mlp.gate_proj": 2560 * 9728,
    "mlp.up_proj": 2560 * 9728,
    "mlp.down_proj": 9728 * 2560,
}


class Prompted:
    """An LLM that answers at once: a fixed text, after the prompt was made."""

    def __init__(self, answer: str) -> None:
        self._answer = answer

    def decide(self, observation: Observation) -> Decision:
        prompt(observation)
        return read_answer(self._answer)


def make_profile(blocks: int) -> ModelProfile:
    """Signals of a model with Qwen3-4B's projections, drawn at random."""
    dice = random.Random(0)
    layers = []
    for block in range(blocks):
        for projection, parameters in PROJECTIONS.items():
            rate = dice.lognormvariate(-9, 0.6)
            layers.append(
                LayerProfile(
                    name=f"model.layers.{block}.{projection}",
                    block=block,
                    projection=projection,
                    parameters=parameters,
                    sparsity=dice.uniform(0.2, 0.5),
                    s=1.0,
                    g=1.0,
                    loss_cost=cast(Any, tuple(rate * d for d in COST_DELTAS)),
                    z_s=dice.gauss(0, 1),
                    z_g=dice.gauss(0, 1),
                    z_c=dice.gauss(0, 1),
                )
            )
    return ModelProfile(revision="r", gradient_revision="r", layers=layers)


def make_record(step: int, profile: ModelProfile, path: str) -> StepRecord:
    """A step that touched a fifth of the layers."""
    dice = random.Random(step)
    chosen = dice.sample(profile.layers, len(profile.layers) // 5)
    applied = {p.name: dice.uniform(0.02, 0.15) for p in chosen}
    costs = predicted_costs(applied, profile)
    return StepRecord(
        step=step,
        agent="prompted",
        verdict="rolled_back" if step % 9 == 5 else "accepted",
        reason="perplexity rose" if step % 9 == 5 else "",
        decision=Decision(
            reasoning="cheap layers " * 20,
            layers=cast(Any, [{"name": n, "delta": d} for n, d in applied.items()]),
            expected_ppl_change=0.01,
            lessons=["spare the first block " * 6] * 8,
        ),
        applied=applied,
        predicted_costs=costs,
        invalid_answers=[],
        notes=[],
        profile=path,
        revision="r",
        candidate="c",
        sparsity_before=0.01 * step,
        sparsity=0.01 * step + 0.01,
        perplexity_before=20.0,
        candidate_perplexity=20.2,
        change=1.3 * sum(costs.values()),
        change_stderr=0.001,
        predicted_change=sum(costs.values()),
        llm_tokens=6000,
    )


def main() -> None:
    """Time one asking of a run that lies on disk as a real one does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=36)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    profile = make_profile(options.blocks)
    request = PruneRequest(target=0.6)
    context = PruneContext(max_steps=options.steps + 20)
    answer = {
        "reasoning": "The cheapest layers.",
        "layers": [{"name": p.short_name, "delta": 0.02} for p in profile.layers],
        "expected_ppl_change": 0.01,
    }
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(folder)
        write_json(run.manifest_file, {"thread": "benchmark"})
        path = run.write_step_file(options.steps, "profile", profile.model_dump(mode="json"))
        records = [make_record(i, profile, path) for i in range(options.steps)]
        history = [
            {"record": run.write_step_file(r.step, "record", r.model_dump(mode="json"))}
            for r in records
        ]
        state = cast(
            PruneState,
            {
                "step": options.steps,
                "sparsity": 0.4,
                "perplexity": 24.0,
                "dense_perplexity": 20.0,
                "stalls": 0,
                "history": history,
                "profile": {"path": path},
            },
        )
        agent = Prompted(json.dumps(answer))
        parts: dict[str, list[float]] = {"observation": [], "prompt": [], "all": []}
        for _ in range(options.repeats + 1):
            began = time.process_time()
            observation = observe(state, request, context, run)
            seen = time.process_time()
            report = ask("prompted", agent, observation, repairs=0)
            ended = time.process_time()
            assert not report.invalid_answers, report.invalid_answers
            prompt(observation)
            parts["observation"].append(seen - began)
            parts["prompt"].append(time.process_time() - ended)
            parts["all"].append(ended - began)
    # The first one also compiles the templates.
    for name, seconds in parts.items():
        print(
            f"{name:12} median {1000 * statistics.median(seconds[1:]):6.1f} ms, "
            f"first {1000 * seconds[0]:6.1f} ms"
        )
    print(f"{len(profile.layers)} layers, {options.steps} steps of history")


if __name__ == "__main__":
    main()
