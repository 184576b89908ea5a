"""Not a test: runs jobs, each in a forked process that may kill itself or run out of disk.

Reads one job a line from standard input, as JSON, and answers with one line each. What takes
long to import is imported once, before the forks; nothing of a run is kept between them.

    {"do": "run" | "baseline" | "resume" | "fork" | "compare", "config": {...}, "of": "...",
     "step": 1, "out": "...", "changes": {...},
     "kill": {"at": "module:Class.function", "when": "before" | "after", "nth": 1,
              "match": "part of an argument", "caller": "function on the stack", "pause": seconds},
     "disk": {... as kill, and "bytes": 100, "for_good": false}}
"""

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama
import transformers.models.llama.tokenization_llama  # noqa: F401

import prunewright.graph
import prunewright.graph.nodes
import prunewright.graph.running.runner
import prunewright.tools.report.charts
from prunewright.graph.running.study import compare

torch.set_num_threads(1)


def intercept(point: dict[str, Any], act: Callable[[Callable[[], Any]], Any]) -> None:
    """Let ``act`` stand in for the nth matching call of a function; it is given that call."""
    module, path = point["at"].split(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)
    seen = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        values = [*args, *kwargs.values()]
        if point.get("match", "") in " ".join(map(str, values)) and on_stack(point.get("caller")):
            seen += 1
            if seen == point.get("nth", 1):
                return act(lambda: original(*args, **kwargs))
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


def on_stack(caller: str | None) -> bool:
    frame = sys._getframe(2)
    while caller is not None and frame is not None:
        if frame.f_code.co_name == caller and Path(frame.f_code.co_filename).parent.name == "nodes":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return caller is None


def kill(point: dict[str, Any]) -> None:
    def act(call: Callable[[], Any]) -> None:
        if point["when"] == "after":
            call()
        time.sleep(point.get("pause", 0))
        os.kill(os.getpid(), signal.SIGKILL)

    intercept(point, act)


def fill_disk(point: dict[str, Any]) -> None:
    """No file may grow beyond some bytes while the call lasts, or from then on."""

    def act(call: Callable[[], Any]) -> Any:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (point["bytes"], hard))
        try:
            return call()
        finally:
            if not point["for_good"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    intercept(point, act)


def work(job: dict[str, Any], answer: Any) -> None:
    if "kill" in job:
        kill(job["kill"])
    if "disk" in job:
        fill_disk(job["disk"])
    graph = prunewright.graph
    try:
        if job["do"] == "compare":
            sys.path.append(job["path"])
            report = compare(job["config"], job["out"]).errors
        else:
            if job["do"] in ("run", "baseline"):
                result = getattr(graph, job["do"])(job["config"], out=job["out"])
            elif job["do"] == "fork":
                result = graph.fork(job["of"], job["step"], out=job["out"])
            else:
                result = graph.resume(job["out"], **job.get("changes", {}))
            report = {"metrics": result.metrics.model_dump(mode="json")}
    except BaseException as error:
        report = {
            "error": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
    # The pipe-like scratch file was opened before any limit on file sizes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    answer.write(json.dumps(report))
    answer.flush()


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryFile("w+") as answer:
            child = os.fork()
            if child == 0:
                with contextlib.redirect_stdout(sys.stderr):
                    work(job, answer)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            answer.seek(0)
            report = json.loads(answer.read() or "{}")
        report["signal"] = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
