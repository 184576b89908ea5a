"""A chat model that always takes the lowest predicted cost, through the whole LLM path.

It is behind a server on the loopback that speaks Gemini's protocol to the real client, reads
nothing but its prompt, and answers in JSON. Beside it `greedy` with the same configuration.

    python benchmarks/scripted_llm.py --config configs/demo.yaml --out runs/scripted
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

from prunewright.graph import run
from prunewright.state import load_config

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
from loopback import FakeGemini, Received, Reply, serve
from maps import read_map


def read_shares(prompt: str) -> dict[str, float]:
    """The layers' parts of all prunable weights, by short name."""
    line = next(line for line in prompt.splitlines() if line.startswith("share of each layer"))
    shares = {}
    for part in line.split("by blocks: ", 1)[1].split("; "):
        projection, ranges = part.split(" ", 1)
        for item in ranges.split(", "):
            blocks, share = item.split(" ")
            first, _, last = blocks.partition("-")
            for block in range(int(first), int(last or first) + 1):
                shares[f"{block}.{projection}"] = float(share) / 100
    return shares


def lowest_cost(delta: float, received: Received) -> str:
    """A decision: the layers with the lowest cost, each by ``delta``, until the step is full."""
    prompt = received.turns[0][1]
    costs, sparsity = (
        {name: float(cell) for name, cell in read_map(prompt, title).items()}
        for title in ("cost at", "sparsity in thousandths")
    )
    shares = read_shares(prompt)
    bound = re.search(r"may add at most ([\d.e-]+)\.", prompt)
    assert bound is not None
    left = float(bound[1])
    layers = []
    for name in sorted(costs, key=lambda name: costs[name]):
        room = 0.899 - sparsity[name] / 1000
        # Shares are shown to four digits.
        taken = min(delta, room, left / shares[name] * 0.999)
        if taken > 1e-4:
            layers.append({"name": name, "delta": round(taken, 5)})
            left -= taken * shares[name]
    words = f"The {len(layers)} layers with the lowest cost."
    return json.dumps({"reasoning": words, "layers": layers, "expected_ppl_change": 0.0})


def main() -> None:
    """Run both and print their perplexities."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=None)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--delta", type=float, default=0.1, help="given to each layer chosen")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    config = load_config(options.config, options.set)
    perplexities = {}
    with serve(FakeGemini) as gemini:
        os.environ.pop("GEMINI_API_KEY", None)
        os.environ[gemini.variable] = gemini.key

        def answer(received: Received) -> Reply:
            return gemini.text(lowest_cost(options.delta, received))

        gemini.otherwise = answer
        asked = {"agent": gemini.agent, "agent_options": gemini.options()}
        for name, changes in {"lowest cost": asked, "greedy": {"agent": "greedy"}}.items():
            settled = config.model_copy(update=changes)
            metrics = run(settled, out=options.out / name.replace(" ", "-")).metrics
            perplexities[name] = metrics.perplexity
            print(
                f"{name}: {metrics.steps} steps, sparsity {metrics.sparsity:.4f}, "
                f"{metrics.invalid_answers} invalid answers, perplexity "
                f"guard {metrics.perplexity.guard.final:.3f}, "
                f"test {metrics.perplexity.test.final:.3f}",
                flush=True,
            )
    ratio = perplexities["lowest cost"].test.final / perplexities["greedy"].test.final
    print(f"test perplexity over greedy's: {ratio:.4f}")


if __name__ == "__main__":
    main()
