"""What asking an LLM costs besides the LLM, in processor time, and how long its prompt is.

python benchmarks/asking.py --blocks 36 --steps 40 --domains 3 --repeats 20
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer

from prunewright.graph.agents import Observation
from prunewright.graph.agents.asking import ask, observe
from prunewright.graph.agents.chat.reading import read_answer
from prunewright.graph.agents.prompt.build import prompt
from prunewright.graph.correction import predicted_costs
from prunewright.state import (
    Decision,
    ModelProfile,
    PruneContext,
    PruneRequest,
    PruneState,
    Step,
    Trials,
)
from prunewright.tools.model.loading import resolve_directory
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.storage import write_json

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
from profiles import make_model


class Prompted:
    """An LLM that answers at once: a fixed text, after the prompt was made."""

    def __init__(self, answer: str) -> None:
        self._answer = answer

    def decide(self, observation: Observation) -> Decision | Trials:
        prompt(observation)
        return read_answer(self._answer)


def make_record(step: int, profile: ModelProfile, path: str) -> Step:
    """A step that touched a fifth of the layers."""
    dice = random.Random(step)
    chosen = dice.sample(profile.layers, len(profile.layers) // 5)
    applied = {p.name: dice.uniform(0.02, 0.15) for p in chosen}
    costs = predicted_costs(applied, profile)
    return Step(
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
    parser.add_argument("--domains", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    domains = tuple(f"domain{i + 1}" for i in range(options.domains))
    profile = make_model(options.blocks, domains=domains)
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
        run.write_trace(records)
        state = cast(
            PruneState,
            {
                "step": options.steps,
                "sparsity": 0.4,
                "perplexity": 24.0,
                "dense_perplexity": 20.0,
                "dense_domains": {},
                "guard_losses": [],
                "stalls": 0,
                "profile": {"path": path},
            },
        )
        agent = Prompted(json.dumps(answer))
        parts: dict[str, list[float]] = {"observation": [], "prompt": [], "all": []}
        for _ in range(options.repeats + 1):
            began = time.process_time()
            observation = observe(state, request, context, run, run.read_trace())
            observation = replace(
                observation,
                goal="Keep German and facts as well as you can; code may suffer.",
                domains=dict.fromkeys(domains, (20.0, 24.0)),
            )
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
    # The embedded model's tokenizer splits numbers into digits.
    tokenizer = AutoTokenizer.from_pretrained(resolve_directory("embedded"))
    count = sum(len(tokenizer(str(message.text)).input_ids) for message in prompt(observation))
    print(f"{count} tokens: {len(profile.layers)} layers, {options.steps} steps of history")


if __name__ == "__main__":
    main()
