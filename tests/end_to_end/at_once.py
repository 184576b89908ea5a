"""Not a test: two processes that do the same on one directory at the same moment, several times.

    at_once.py CONFIG.json STOPPED_RUN WORKPLACE

It prints, for each kind, what both came to in each try: "done" or the error.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama
import transformers.models.llama.tokenization_llama  # noqa: F401

import prunewright.graph.nodes
import prunewright.tools.report.charts  # noqa: F401
from prunewright.graph import baseline, fork, resume, run
from prunewright.graph.running.runner import collect_garbage
from prunewright.graph.running.study import compare

torch.set_num_threads(1)

TRIES = {"run": 3, "baseline": 2, "resume": 2, "gc": 2, "fork": 2, "compare": 2}
STUDY: dict[str, Any] = {
    "methods": [{"name": "wanda", "kind": "baseline"}],
    "seeds": [0],
    "control": "wanda",
    "evaluation": {
        "length": 16,
        "texts": [{"name": "own", "source": "embedded", "windows": 1}],
    },
}


class BegunError(Exception):
    pass


def begun(mode: str, _: object) -> None:
    if mode == "experiment":
        raise BegunError


def main() -> None:
    config_file, stopped, place = sys.argv[1:]
    config = json.loads(Path(config_file).read_text())
    found: dict[str, list[list[str]]] = {}
    for kind, tries in TRIES.items():
        for number in range(tries):
            out = Path(place) / f"{kind}-{number}"
            if kind in ("resume", "gc"):
                shutil.copytree(stopped, out)
            acts: dict[str, Callable[[], object]] = {
                "run": partial(run, config, out=out),
                "baseline": partial(baseline, config, out=out),
                "resume": partial(resume, out),
                "gc": partial(collect_garbage, out),
                "fork": partial(fork, stopped, 1, out=out),
                "compare": partial(compare, STUDY | {"base": config}, out, begun),
            }
            second = "resume" if kind == "gc" else kind
            found.setdefault(kind, []).append(both(acts[kind], acts[second], Path(place)))
    print(json.dumps(found))


def both(one: Callable[[], object], other: Callable[[], object], place: Path) -> list[str]:
    ready, go = os.pipe()
    children = []
    for number, act in enumerate((one, other)):
        child = os.fork()
        if child == 0:
            os.close(go)
            os.read(ready, 1)  # ends for both at once, when the parent closes its end
            words = "done"
            try:
                act()
            except BegunError:
                pass
            except BaseException as error:
                words = f"{type(error).__name__}: {error}"
            (place / f"answer-{number}").write_text(words)
            os._exit(0)
        children.append(child)
    os.close(ready)
    os.close(go)
    for child in children:
        os.waitpid(child, 0)
    return [(place / f"answer-{number}").read_text() for number in (0, 1)]


if __name__ == "__main__":
    main()
