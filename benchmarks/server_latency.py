"""How soon LangGraph's server answers while a run computes.

python benchmarks/server_latency.py --config configs/demo.yaml --seconds 60
"""

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from langgraph_sdk import get_sync_client

from prunewright.state import load_config

ROOT = Path(__file__).resolve().parent.parent
PAUSE = 0.05
"""Seconds between two requests."""
IDLE = 10.0
"""Seconds of measurement before the run."""
BOUND = 0.1
"""Seconds within which an answer is wanted."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """The server of `make studio`, once it answers."""
    command = [
        str(Path(sysconfig.get_path("scripts")) / "langgraph"),
        *("dev", "--no-browser", "--no-reload", "--host", "127.0.0.1", "--port", str(port)),
        *("--n-jobs-per-worker", "4", "--config", str(ROOT / "langgraph.json")),
    ]
    environment = {
        "LANGGRAPH_CLI_NO_ANALYTICS": "1",
        "LANGGRAPH_NO_VERSION_CHECK": "true",
        "LANGSMITH_TRACING": "false",
        "NO_PROXY": "127.0.0.1",
    }
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=os.environ | environment, stdout=log, stderr=log
        )
    while True:
        if server.poll() is not None:
            sys.exit((folder / "server.log").read_text())
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ok", trust_env=False).is_success:
                return server
        except httpx.TransportError:
            time.sleep(0.1)


def ask(client: httpx.Client, path: str, taken: list[float]) -> Any:
    """What the server answers; how long it took is added to a list."""
    sent = time.perf_counter()
    answer = client.get(path).raise_for_status()
    taken.append(time.perf_counter() - sent)
    time.sleep(PAUSE)
    return answer.json()


def measure(port: int, request: dict[str, Any], seconds: float) -> dict[str, list[float]]:
    """Seconds of each answer, by what was asked for: of the idle server, then beside a run."""
    url = f"http://127.0.0.1:{port}"
    api = get_sync_client(url=url)
    thread = api.threads.create()["thread_id"]
    assistant = f"/assistants/{api.assistants.search()[0]['assistant_id']}"
    taken: dict[str, list[float]] = {
        name: [] for name in ("idle: assistant", "assistant", "thread state", "run")
    }
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        until = time.monotonic() + IDLE
        while time.monotonic() < until:
            ask(client, assistant, taken["idle: assistant"])
        began = api.runs.create(
            thread, "prunewright", input={"request": request}, context={"agent": "greedy"}
        )
        run = f"/threads/{thread}/runs/{began['run_id']}"
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            ask(client, assistant, taken["assistant"])
            ask(client, f"/threads/{thread}/state", taken["thread state"])
            status = ask(client, run, taken["run"])["status"]
            if status not in ("pending", "running"):
                print(f"the run has ended: {status}")
                return taken
        client.post(f"{run}/cancel", params={"wait": "true"})
    return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--set", action="append", dest="overrides", metavar="KEY=VALUE")
    options = parser.parse_args()
    request = load_config(options.config, options.overrides).request.model_dump(mode="json")
    with tempfile.TemporaryDirectory() as name:
        port = free_port()
        server = start(Path(name), port)
        try:
            load = psutil.getloadavg()[0]
            taken = measure(port, request, options.seconds)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait()
    for asked, values in taken.items():
        ordered = sorted(values)
        print(
            f"{asked:15} {len(ordered):5} answers  median {1000 * statistics.median(ordered):6.1f}"
            f"  95 % {1000 * ordered[int(0.95 * (len(ordered) - 1))]:6.1f}"
            f"  max {1000 * ordered[-1]:7.1f} ms, "
            f"{sum(value > BOUND for value in values)} over {1000 * BOUND:.0f} ms"
        )
    print(f"{os.cpu_count()} processors, load average {load:.1f} before the run")


if __name__ == "__main__":
    main()
