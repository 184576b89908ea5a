"""LangGraph's server, really started on the graph that langgraph.json names."""

import json
import os
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_langsmith import FakeLangSmith, serve_langsmith
from langgraph_sdk import get_sync_client

from prunewright.graph.running.runner import collect_garbage, resume
from prunewright.graph.running.runner import run as run_here
from prunewright.state import PruneContext, PruneRequest, StoreError
from prunewright.tools.store.rundir import RunDirectory
from prunewright.tools.store.trace import load_metrics

ROOT = Path(__file__).resolve().parents[2]
STEP = ["profile", "agent_decide", "apply_prune", "evaluate_ppl", "reflect"]
NODES = {*STEP, "rollback", "finish"}
GREEDY = {"agent": "greedy"}


class Server:
    """The server of `make studio`, in a folder of its own."""

    def __init__(self, folder: Path, langsmith: FakeLangSmith) -> None:
        self.folder = folder
        self.langsmith = langsmith
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.client = get_sync_client(url=f"http://127.0.0.1:{self.port}")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            str(Path(sysconfig.get_path("scripts")) / "langgraph"),
            *("dev", "--no-browser", "--no-reload", "--host", "127.0.0.1"),
            *("--port", str(self.port), "--n-jobs-per-worker", "4"),
            *("--config", str(ROOT / "langgraph.json")),
        ]
        environment = {
            "LANGGRAPH_CLI_NO_ANALYTICS": "1",
            "LANGGRAPH_NO_VERSION_CHECK": "true",
            "LANGSMITH_TRACING": "true",
            "OMP_NUM_THREADS": "1",
            **self.langsmith.environment,
        }
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=os.environ | environment, stdout=log, stderr=log
            )
        while True:
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/ok", trust_env=False).is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.1)

    def end(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait()

    def thread(self) -> str:
        return str(self.client.threads.create()["thread_id"])

    def directory(self, thread: str) -> RunDirectory:
        return RunDirectory(self.folder / "runs" / thread)

    def run(
        self,
        thread: str,
        request: dict[str, Any] | None,
        context: dict[str, Any],
        assistant: str = "prunewright",
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Events of a run on a thread."""
        given = None if request is None else {"request": request}
        yield from self.stream(thread, given, context, assistant)

    def stream(
        self,
        thread: str,
        given: dict[str, Any] | None,
        context: dict[str, Any],
        assistant: str = "prunewright",
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Events of a run on a thread, with any input."""
        for part in self.client.runs.stream(
            thread, assistant, input=given, context=context, stream_mode=["updates", "custom"]
        ):
            yield part.event, part.data

    def error(self, request: dict[str, Any], context: dict[str, Any], thread: str = "") -> str:
        """What the server says of a run that fails."""
        return self.failure({"request": request}, context, thread or self.thread())

    def failure(self, given: dict[str, Any], context: dict[str, Any], thread: str) -> str:
        """What the server says of a run that fails, with any input."""
        return str(dict(self.stream(thread, given, context))["error"]["message"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve_langsmith() as langsmith:
        made = Server(tmp_path_factory.mktemp("studio"), langsmith)
        made.start()
        try:
            yield made
        finally:
            made.end(signal.SIGKILL)


@pytest.fixture
def request_(pico_config: dict[str, Any]) -> dict[str, Any]:
    """What the input form sends."""
    form = {key: value for key, value in pico_config.items() if key in PruneRequest.model_fields}
    return form | {"reconstruct": True}


@pytest.fixture(scope="module")
def whole(server: Server) -> dict[str, Any]:
    """The finished run that others are compared with, once a test has made it."""
    return {}


@pytest.fixture
def finished(
    server: Server, request_: dict[str, Any], whole: dict[str, Any]
) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """A thread whose run has ended, and its events."""
    if not whole:
        thread = server.thread()
        whole |= {"thread": thread, "events": list(server.run(thread, request_, GREEDY))}
    return whole["thread"], whole["events"]


def revision(server: Server, thread: str) -> str:
    metrics = json.loads(server.directory(thread).metrics_file.read_text())
    assert metrics["status"] == "target_reached"
    return str(metrics["revision"])


def test_the_forms_have_descriptions_bounds_and_defaults(server: Server) -> None:
    assistant = server.client.assistants.search()[0]["assistant_id"]
    schemas: dict[str, Any] = dict(server.client.assistants.get_schemas(assistant))
    form = schemas["input_schema"]
    assert form["properties"]["request"]["$ref"] == "#/$defs/PruneRequest"
    asked = form["$defs"]["PruneRequest"]["properties"]
    carried = schemas["context_schema"]["properties"]
    assert set(asked) == set(PruneRequest.model_fields)
    of_baselines = {"allocation", "allocation_options"}
    assert set(carried) == {*PruneContext.model_fields, "criterion"} - of_baselines
    for name, field in {**asked, **carried}.items():
        assert field.get("description"), name
        assert "default" in field or name == "agent_options", name
    assert (asked["target"]["default"], asked["target"]["maximum"]) == (0.45, 0.95)
    assert asked["target"]["exclusiveMinimum"] == 0
    assert set(asked["criterion"]["examples"]) >= {"magnitude", "wanda", "fisher"}
    for name, node in {"agent": "agent_decide", "goal": "agent_decide", "adapt": "finish"}.items():
        assert carried[name]["langgraph_nodes"] == [node]
    graph: dict[str, Any] = dict(server.client.assistants.get_graph(assistant))
    drawn = {node["id"] for node in graph["nodes"]}
    assert drawn == NODES | {"__start__", "__end__"}


def test_a_whole_run_is_streamed_and_kept(
    server: Server, finished: tuple[str, list[tuple[str, dict[str, Any]]]]
) -> None:
    thread, events = finished
    updates = [update for mode, update in events if mode == "updates"]
    order = [node for update in updates for node in update]
    steps = order.count("reflect")
    assert steps >= 3
    assert order == [*STEP * steps, "finish"]
    assert all(update[node]["summary"] for update in updates for node in update)
    decision = updates[1]["agent_decide"]["proposal"]["decision"]
    assert decision["reasoning"].startswith("Lowest predicted cost")
    table = updates[0]["profile"]["profile"]["table"]
    assert len(table["0.mlp.down_proj"].split()) == len(table["layer"].split())
    custom = [data for mode, data in events if mode == "custom"]
    assert {"progress", "step", "finishing", "stage", "metrics"} == {
        key for data in custom for key in data
    }
    history = server.client.threads.get_history(thread, limit=100)
    assert [state["next"] for state in history[:2]] == [[], ["finish"]]
    assert history[0]["values"]["status"] == "target_reached"  # type: ignore[call-overload]
    # The state's revision is that of the masks, the results' that of what was saved.
    (*_, last) = server.directory(thread).read_trace()
    assert history[0]["values"]["revision"] == last.revision  # type: ignore[call-overload]
    metrics = load_metrics(server.directory(thread))
    (stage,) = metrics.stages
    assert stage.revision != last.revision
    assert metrics.revision == (stage.revision if stage.kept else last.revision)
    assert [data["stage"] for data in custom if "stage" in data] == [stage.model_dump(mode="json")]
    assert history[0]["values"]["result"] == {  # type: ignore[call-overload]
        "directory": f"runs/{thread}",
        "model_directory": f"runs/{thread}/model",
        "test_perplexity": metrics.perplexity.test.model_dump(),
        "stages": [stage.model_dump(include={"name", "before", "after", "kept"})],
    }
    assert (server.folder / "runs" / "studio" / "state.sqlite").is_file()


def test_every_domain_is_in_the_state_and_in_the_summaries(
    server: Server, request_: dict[str, Any], tmp_path: Path
) -> None:
    code = tmp_path / "code.txt"
    code.write_text("\n".join(f"def f{i}(x):\n    return x + {i % 7}" for i in range(200)))
    texts = {
        "calibration": {"general": "embedded", "code": str(code)},
        "windows": request_["texts"]["windows"] | {"guard": 4},
    }
    request = request_ | {"texts": texts, "reconstruct": "none"}
    request["weights"] = {"general": 1, "code": 2}
    thread = server.thread()
    goal = {"goal": "keep code; prose may suffer", "agent": "balance", "max_steps": 1}
    events = list(server.run(thread, request, goal))
    assert "error" not in dict(events), dict(events)["error"]
    told = {node: update["summary"] for mode, data in events if mode == "updates"
            for node, update in data.items()}  # fmt: skip
    (step,) = server.directory(thread).read_trace()
    assert set(step.domains) == {"code", "general"}
    values: Any = server.client.threads.get_state(thread)["values"]
    for name, domain in step.domains.items():
        assert values["dense_domains"][name] == domain.dense
        assert domain.change is not None
        assert f"{name} {domain.dense:.3f} to {domain.candidate:.3f}" in told["evaluate_ppl"]
        assert f"{name} {domain.change:+.1%}" in told["reflect"]
        assert f"{name} {domain.dense:.3f} to {domain.candidate:.3f}" in told["finish"]
    assert server.directory(thread).config().goal == goal["goal"]


def test_langsmith_is_told_what_the_run_is(
    server: Server,
    request_: dict[str, Any],
    finished: tuple[str, list[tuple[str, dict[str, Any]]]],
) -> None:
    thread, events = finished
    nodes = [node for mode, data in events if mode == "updates" for node in data]

    def traced() -> list[dict[str, Any]]:
        runs = list(server.langsmith.runs.values())
        ours = [run for run in runs if run["extra"]["metadata"].get("thread_id") == thread]
        return ours if ours and all(run.get("end_time") for run in ours) else []

    while not (runs := traced()):  # sent from another thread of the server, in batches
        time.sleep(0.1)
    expected = {
        "model": request_["model"],
        "agent": "greedy",
        "criterion": "wanda",
        "target": request_["target"],
    }
    (root,) = [run for run in runs if not run.get("parent_run_id")]
    steps = [run for run in runs if run.get("parent_run_id") == root["id"]]
    assert [run["name"] for run in sorted(steps, key=lambda run: run["start_time"])] == nodes
    for traced_run in [root, *steps]:
        assert expected.items() <= traced_run["extra"]["metadata"].items()
        assert {"wanda", "greedy"} <= set(traced_run["tags"])


def test_what_cannot_be_run_is_refused_in_our_words(
    server: Server,
    request_: dict[str, Any],
    finished: tuple[str, list[tuple[str, dict[str, Any]]]],
) -> None:
    thread = server.thread()
    wrong = request_ | {"target": 3, "modell": "x"}
    message = server.error(wrong, GREEDY, thread)
    assert "unknown key modell; did you mean model?" in message
    assert "target: a fraction is asked for: 3 % is 0.03" in message
    assert not server.directory(thread).path.exists()
    for nothing in ({}, {"request": None}):
        thread = server.thread()
        message = server.failure(nothing, GREEDY, thread)
        assert 'the input has no "request"' in message
        assert not server.directory(thread).path.exists()
    message = server.error(request_, {"agent": "google_genai:gemini-3-flash-preview"}, thread)
    assert "GOOGLE_API_KEY or GEMINI_API_KEY" in message
    assert "choose an agent without an LLM (agent greedy)" in message
    assert "--" not in message
    assert not server.directory(thread).path.exists()
    assert "did you mean greedy?" in server.error(request_, {"agent": "gready"})
    assert "has ended (target_reached)" in server.error(request_, GREEDY, finished[0])
    with server.directory(thread).locked():
        message = server.error(request_, GREEDY, thread)
    assert f"another process (id {os.getpid()}) is working in" in message
    # Its checkpoints are the server's: nobody else knows what they need.
    ended = server.directory(finished[0])
    masks = sorted((ended.path / "revisions").rglob("*"))
    for act in (collect_garbage, resume):
        with pytest.raises(StoreError, match="such a run goes on there"):
            act(ended.path)
    assert sorted((ended.path / "revisions").rglob("*")) == masks


def test_the_assistant_that_is_there_works_without_a_key(
    server: Server, request_: dict[str, Any]
) -> None:
    thread = server.thread()
    events = list(server.run(thread, request_, {"max_steps": 1}))
    updates = {
        node: data for mode, event in events if mode == "updates" for node, data in event.items()
    }
    words = "who decides: greedy (agent auto: no GOOGLE_API_KEY or GEMINI_API_KEY is set"
    assert words in updates["profile"]["summary"]
    assert updates["reflect"]["status"] == "max_steps"
    (record,) = server.directory(thread).read_trace()
    assert record.agent == "greedy"


def test_a_cancelled_run_has_stopped_and_goes_on(server: Server, request_: dict[str, Any]) -> None:
    windows = {"calibration": 300, "gradient": 1, "guard": 100, "test": 3, "length": 48}
    request = request_ | {"target": 0.1, "texts": {"windows": windows}}
    thread = server.thread()
    cancelled, last = "", {}
    run = ""
    for mode, data in server.run(thread, request, GREEDY):
        if mode == "metadata":
            run = data["run_id"]
        if mode == "custom":
            last = data["progress"]
            if not cancelled and last["label"] == "activations":
                cancelled = run
                server.client.runs.cancel(thread, run)
    assert (last["label"], last["done"] < 300) == ("activations", True)
    assert server.client.runs.get(thread, run)["status"] == "interrupted"
    # Held while a node works: nothing works any more.
    with server.directory(thread).locked():
        pass
    state = server.client.threads.get_state(thread)
    assert state["next"] == ["profile"]
    assert not server.directory(thread).started
    events = list(server.run(thread, None, GREEDY))
    assert "error" not in dict(events)
    assert revision(server, thread)


def test_two_threads_at_once_each_with_its_assistant(
    server: Server,
    request_: dict[str, Any],
    finished: tuple[str, list[tuple[str, dict[str, Any]]]],
) -> None:
    contexts: list[dict[str, Any]] = [
        GREEDY,
        {"agent": "uniform", "criterion": "magnitude", "max_steps": 2},
    ]
    threads = [server.thread() for _ in contexts]
    runs = []
    for thread, context in zip(threads, contexts, strict=True):
        assistant = server.client.assistants.create(
            "prunewright", context=context, name=str(context["agent"])
        )
        runs.append(
            server.client.runs.create(
                thread, assistant["assistant_id"], input={"request": request_}
            )
        )
    for thread, run in zip(threads, runs, strict=True):
        server.client.runs.join(thread, run["run_id"])
    assert revision(server, threads[0]) == revision(server, finished[0])
    other = server.directory(threads[1])
    config, records = other.config(), other.read_trace()
    assert (config.agent, config.criterion, config.max_steps) == ("uniform", "magnitude", 2)
    assert [record.agent for record in records] == ["uniform"] * 2


def test_a_person_edits_at_a_breakpoint_and_answers_a_review(
    server: Server, request_: dict[str, Any]
) -> None:
    client, thread = server.client, server.thread()
    context = GREEDY | {"review": True}

    def go_on(**what: Any) -> dict[str, Any]:
        events = client.runs.stream(thread, "prunewright", stream_mode="updates", **what)
        return {part.event: part.data for part in events}

    go_on(input={"request": request_}, context=context, interrupt_before=["apply_prune"])
    state: dict[str, Any] = dict(client.threads.get_state(thread))
    assert state["next"] == ["apply_prune"]
    report = state["values"]["proposal"]
    name = report["decision"]["layers"][0]["name"]

    def edit(delta: float) -> dict[str, Any]:
        decision = report["decision"] | {"layers": [{"name": name, "delta": delta}]}
        values = {"proposal": report | {"decision": decision}}
        client.threads.update_state(thread, values, as_node="agent_decide")
        return go_on(input=None, context=context)

    refused = edit(0.9)
    assert "cannot be applied" in refused["error"]["message"]
    assert "edit it again" in refused["error"]["message"]
    assert "error" not in edit(0.1)

    # The same decision waits for a review now.
    (waiting,) = dict(client.threads.get_state(thread))["interrupts"]
    assert waiting["value"]["step"] == 1
    assert "error" not in go_on(command={"resume": {"approve": True}}, context=context)
    first, *_ = server.directory(thread).read_trace()
    assert list(first.applied.values()) == [pytest.approx(0.1, abs=1e-3)]
    assert first.review is not None
    assert first.review.verdict == "approved"


def test_a_run_is_forked_from_an_earlier_step(server: Server, request_: dict[str, Any]) -> None:
    client, thread = server.client, server.thread()
    assert "error" not in dict(server.run(thread, request_, GREEDY))
    before = revision(server, thread)
    states: list[dict[str, Any]] = [dict(s) for s in client.threads.get_history(thread, limit=100)]
    old = next(s for s in states if s["next"] == ["profile"] and s["values"].get("step") == 1)
    client.runs.wait(
        thread, "prunewright", checkpoint=old["checkpoint"], context={"agent": "uniform"}
    )
    agents = [record.agent for record in server.directory(thread).read_trace()]
    assert agents == ["greedy"] + ["uniform"] * (len(agents) - 1)
    assert revision(server, thread) != before
    # The same from the command line's side: a run that took these decisions from the start.
    trace = server.directory(thread).path
    again = run_here(request_ | {"agent": f"replay:{trace}"}, out=server.folder / "again")
    assert again.metrics.revision == revision(server, thread)


def test_a_server_killed_in_the_middle_goes_on_to_the_same_end(
    server: Server,
    request_: dict[str, Any],
    finished: tuple[str, list[tuple[str, dict[str, Any]]]],
) -> None:
    thread = server.thread()
    events = server.run(thread, request_, GREEDY)
    for mode, data in events:
        if mode == "updates" and "apply_prune" in data:
            break
    server.end(signal.SIGKILL)
    assert not server.directory(thread).metrics_file.exists()
    server.start()
    # Its list of threads is written every ten seconds only; the checkpoints are always there.
    server.client.threads.create(thread_id=thread, graph_id="prunewright", if_exists="do_nothing")
    begun = server.client.threads.get_state(thread)["values"]
    assert begun["request"]["model"] == request_["model"]  # type: ignore[call-overload]
    assert "error" not in dict(server.run(thread, None, GREEDY))
    assert revision(server, thread) == revision(server, finished[0])
