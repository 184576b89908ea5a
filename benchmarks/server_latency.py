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


def measure(port: int, request: dict[str, Any], seconds: float) -> dict[str, list[float]]:
    """Seconds of each answer, by what was asked for, while a run goes on."""
    url = f"http://127.0.0.1:{port}"
    api = get_sync_client(url=url)
    thread = api.threads.create()["thread_id"]
    began = api.runs.create(
        thread, "prunewright", input={"request": request}, context={"agent": "greedy"}
    )
    run = f"/threads/{thread}/runs/{began['run_id']}"
    assistant = api.assistants.search()[0]["assistant_id"]
    asked = {
        "run": run,
        "thread state": f"/threads/{thread}/state",
        "assistant": f"/assistants/{assistant}",
    }
    taken: dict[str, list[float]] = {name: [] for name in asked}
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        # Before the first node has written anything there is no state to ask for.
        while not client.get(asked["thread state"]).json().get("values"):
            time.sleep(1)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for name, path in asked.items():
                sent = time.perf_counter()
                answer = client.get(path).raise_for_status()
                taken[name].append(time.perf_counter() - sent)
                if name == "run" and answer.json()["status"] not in ("pending", "running"):
                    print(f"the run has ended: {answer.json()['status']}")
                    return taken
                time.sleep(PAUSE)
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
    rows = {**taken, "all": [value for values in taken.values() for value in values]}
    for asked, values in rows.items():
        ordered = sorted(values)
        print(
            f"{asked:13} {len(ordered):5} answers  median {1000 * statistics.median(ordered):6.1f}"
            f"  95 % {1000 * ordered[int(0.95 * (len(ordered) - 1))]:6.1f}"
            f"  max {1000 * ordered[-1]:6.1f} ms"
        )
    print(f"{os.cpu_count()} processors, load average {load:.1f} before the run")


if __name__ == "__main__":
    main()
