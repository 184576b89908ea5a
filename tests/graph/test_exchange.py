"""Whoever answers files: prompts, answers, repairs, resume, and what must never be taken."""

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from prunewright.graph import resume, run
from prunewright.graph.agents import Observation, check_agent, make_agent
from prunewright.graph.agents import exchange as module
from prunewright.graph.agents.asking import ask
from prunewright.graph.agents.chat.reading import MAX_ANSWER
from prunewright.graph.agents.exchange import ExchangeAgent
from prunewright.graph.agents.prompt.build import prompt
from prunewright.graph.cli import app
from prunewright.state import AgentError, InputError, PruneContext

MakeObservation = Callable[..., Observation]
GOOD = {"reasoning": "cheap", "layers": [{"name": "1.mlp.down_proj", "delta": 0.1}]}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL", 0.01)


class Seat:
    """Someone who sits at the directory and answers each new prompt, in a thread.

    Attributes:
        seen: the prompts in order, by file name.
        errors: what went wrong in the thread.
    """

    def __init__(self, directory: Path, answer: Callable[[str, str], bytes]) -> None:
        self.directory = directory
        self.seen: dict[str, str] = {}
        self.errors: list[BaseException] = []
        self._answer = answer
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sit)

    def __enter__(self) -> "Seat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        assert self.errors == []

    def _sit(self) -> None:
        try:
            while not self._over.wait(0.01):
                for path in sorted(self.directory.glob("*.prompt.md")):
                    if path.name not in self.seen:
                        text = path.read_text()
                        self.seen[path.name] = text
                        stem = path.name.removesuffix(".prompt.md")
                        schema = json.loads((self.directory / f"{stem}.schema.json").read_text())
                        jsonschema.Draft202012Validator.check_schema(schema)
                        answer = self.directory / f"{stem}.answer.json"
                        # The prompt says where, and nothing else does.
                        assert f"`{answer.name}`" in text
                        answer.with_suffix(".tmp").write_bytes(self._answer(path.name, text))
                        answer.with_suffix(".tmp").rename(answer)
        except BaseException as error:
            self.errors.append(error)


def encode(value: Any) -> bytes:
    return json.dumps(value).encode()


def awaited(agent: ExchangeAgent, observation: Observation) -> Path:
    """Where an answer is awaited: what a run that gave up says."""
    with pytest.raises(AgentError, match="no answer came within") as caught:
        agent.decide(observation)
    return Path(str(caught.value).split("awaited was ")[1])


def impatient(directory: Path) -> ExchangeAgent:
    return ExchangeAgent(directory, {"timeout": 0.05})


def test_a_prompt_an_answer_a_repair(tmp_path: Path, make_observation: MakeObservation) -> None:
    observation = make_observation(step=6, thread="a")
    wrong = GOOD | {"layers": [{"name": "lm_head", "delta": 0.1}]}
    replies = [b'{"reasoning": "I was', encode(wrong), encode(GOOD)]
    with Seat(tmp_path / "new", lambda *_: replies.pop(0)) as seat:
        report = ask("exchange", ExchangeAgent(tmp_path / "new", {}), observation, repairs=2)
    assert [item.name for item in report.decision.layers] == ["model.layers.1.mlp.down_proj"]
    assert len(report.invalid_answers) == 2
    names = sorted(seat.seen)
    assert [name[:15] for name in names] == [f"step-0007-try-{i}" for i in range(3)]
    first, second, third = (seat.seen[name] for name in names)
    for message in prompt(observation):
        assert str(message.text) in first
    assert "refused" not in first.split("## Request")[1]
    assert '## Answer that was refused\n\n{"reasoning": "I was\n' in second
    assert "cut off or left open" in second
    assert "unknown layer 'lm_head'" in third
    assert first.split("## Where")[0] in third


def test_the_schema_is_what_is_held_to(tmp_path: Path, make_observation: MakeObservation) -> None:
    impatient_agent = impatient(tmp_path)
    path = awaited(impatient_agent, make_observation())
    schema = json.loads(path.with_name(path.name.replace("answer", "schema")).read_text())
    group = {"projection": "mlp.down_proj", "from": 0, "to": 2, "delta": 0.05}
    for value, fits in (
        (GOOD, True),
        (GOOD | {"groups": [group], "lessons": ["a"], "expected_ppl_change": None}, True),
        (GOOD | {"layers": [{"name": "x", "delta": 2}]}, False),
        (GOOD | {"more": 1}, False),
        ({"accept": True}, True),
        ({"accept": True, "groups": [group | {"delta": -0.01}]}, True),
        ({"accept": False}, False),
        ({"layers": []}, False),
    ):
        assert jsonschema.Draft202012Validator(schema).is_valid(value) is fits
        path.write_bytes(encode(value))
        report = ask("exchange", impatient_agent, make_observation(), repairs=0)
        assert (not any("Field required" in p or ": " in p for p in report.invalid_answers)) is fits


def test_an_answer_of_another_run_or_state_is_not_taken(
    tmp_path: Path, make_observation: MakeObservation
) -> None:
    agent = impatient(tmp_path)
    observation = make_observation(thread="a")
    path = awaited(agent, observation)
    path.write_bytes(encode(GOOD))
    for other in (
        make_observation(thread="b"),
        make_observation(thread="a", perplexity=22.0),
        make_observation(thread="a", step=1),
    ):
        assert awaited(agent, other) != path
    assert agent.decide(observation).reasoning == "cheap"


def test_prompts_are_written_again_the_same(
    tmp_path: Path, make_observation: MakeObservation
) -> None:
    awaited(impatient(tmp_path), make_observation())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(name.split(".", 1)[1] for name in before) == ["prompt.md", "schema.json"]
    awaited(impatient(tmp_path), make_observation())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_that_still_grows_is_waited_for(
    tmp_path: Path, make_observation: MakeObservation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look finds a little more of the answer; the last one finds no change."""
    agent = ExchangeAgent(tmp_path, {"timeout": 60})
    path = awaited(impatient(tmp_path), make_observation())
    text = encode(GOOD)
    written = 0

    def grow(_: float) -> None:
        nonlocal written
        written = min(len(text), written + 7)
        if path.stat().st_size < written:
            path.write_bytes(text[:written])

    path.write_bytes(b"")  # an editor's new file
    monkeypatch.setattr(module.time, "sleep", grow)
    assert agent.decide(make_observation()).reasoning == "cheap"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b" \n", "the answer is empty"),
        (b"\xff\xfe{", "not valid JSON"),
        (b'{}{"a": 1}', "2 different JSON objects"),
        (b'{"reasoning": "r", "layers": [{"name": "x", "delta": NaN}]}', "NaN is no number"),
        (b" " * (MAX_ANSWER + 1) + b"{}", "more than 200000"),
        ("ü".encode() * (4 * MAX_ANSWER), "more than 200000"),
    ],
)
def test_answers_are_read_strictly(
    data: bytes, words: str, tmp_path: Path, make_observation: MakeObservation
) -> None:
    agent = impatient(tmp_path)
    awaited(agent, make_observation()).write_bytes(data)
    report = ask("exchange", agent, make_observation(), repairs=0)
    assert report.decision.layers == []
    assert words in report.invalid_answers[0]


def test_a_byte_order_mark_is_no_fault(tmp_path: Path, make_observation: MakeObservation) -> None:
    agent = impatient(tmp_path)
    awaited(agent, make_observation()).write_bytes(b"\xef\xbb\xbf" + encode(GOOD))
    assert agent.decide(make_observation()).reasoning == "cheap"


def test_a_link_is_not_followed(tmp_path: Path, make_observation: MakeObservation) -> None:
    """Its content would stand in the next prompt, for whoever may read there."""
    agent = impatient(tmp_path / "seat")
    path = awaited(agent, make_observation())
    (tmp_path / "secret").write_text("secret")
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(AgentError, match="is not a plain file"):
        agent.decide(make_observation())
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(AgentError, match="is not a plain file"):
        agent.decide(make_observation())


def test_options(tmp_path: Path) -> None:
    name = f"exchange:{tmp_path / 'new'}"
    assert check_agent(PruneContext(agent=name)).name == name  # the default is for chat models
    made, agent = make_agent(PruneContext(agent=name, agent_options={"timeout": "90"}))
    assert (made, type(agent)) == (name, ExchangeAgent)
    for options, words in (
        ({"timeuot": 3}, "unknown key timeuot; did you mean timeout?"),
        ({"timeout": 0}, "timeout: Input should be greater than 0"),
        ({"timeout": "soon"}, "timeout: Input should be a valid number"),
    ):
        with pytest.raises(InputError) as caught:
            check_agent(PruneContext(agent=name, agent_options=options))
        assert words in str(caught.value)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("important")
    with pytest.raises(InputError, match="it is no directory"):
        check_agent(PruneContext(agent=f"exchange:{tmp_path / 'file'}"))


# Whole runs


def sensible(name: str, text: str) -> bytes:
    """A decision from the prompt alone: what the step may add, but for a bit, in every layer."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("name | "))
    rows = []
    for line in lines[start + 1 :]:
        if " | " not in line:
            break
        rows.append(line.split(" | ")[0])
    most = re.search(r"may add at most ([\d.e-]+)\.\n", text)
    assert most is not None
    layers = [{"name": row, "delta": 0.999 * float(most[1])} for row in rows]
    return encode({"reasoning": f"for {name}", "layers": layers})


@pytest.fixture
def exchange_config(pico_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    options = {"timeout": 120}
    return pico_config | {"agent": f"exchange:{tmp_path / 'seat'}", "agent_options": options}


def traced(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "trace.jsonl").read_text().splitlines()]


def test_a_run_by_files_and_a_second_one_that_is_asked_again(
    exchange_config: dict[str, Any], tmp_path: Path
) -> None:
    for number in (1, 2):
        with Seat(tmp_path / "seat", sensible) as seat:
            result = run(exchange_config, out=tmp_path / f"run{number}")
        assert result.metrics.status == "target_reached"
        steps = traced(result.directory)
        own = {step["decision"]["reasoning"].removeprefix("for ") for step in steps}
        assert len(own) == len(steps) == result.metrics.steps
        assert own <= set(seat.seen)
        assert all(step["invalid_answers"] == [] for step in steps)
    # The first run's prompts were there, and none of its answers was taken.
    assert own.isdisjoint(s["decision"]["reasoning"][4:] for s in traced(tmp_path / "run1"))


def test_a_timeout_names_the_file_and_the_command_that_goes_on(
    exchange_config: dict[str, Any], tmp_path: Path
) -> None:
    config, out = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(exchange_config | {"agent_options": {"timeout": 0.05}}))
    runner = CliRunner()
    result = runner.invoke(app, ["run", "-c", str(config), "-o", str(out)])
    assert result.exit_code == 1
    (prompt_file,) = (tmp_path / "seat").glob("*.prompt.md")
    answer = prompt_file.with_name(prompt_file.name.replace("prompt.md", "answer.json"))
    assert str(answer) in result.stderr
    assert f"prunewright resume {out}" in result.stderr

    # The answer comes while nobody waits: the resumed run asks the same and takes it.
    answer.write_bytes(sensible(prompt_file.name, prompt_file.read_text()))
    again = runner.invoke(app, ["resume", str(out)])
    assert again.exit_code == 1
    assert [step["decision"]["reasoning"] for step in traced(out)] == [f"for {prompt_file.name}"]
    (tmp_path / "seat" / "stray.txt").write_text("what else lies there does not matter")
    with Seat(tmp_path / "seat", sensible) as seat:
        finished = resume(out, agent_options={"timeout": 120})
    assert finished.metrics.status == "target_reached"
    assert len(seat.seen) == finished.metrics.steps


@pytest.fixture
def interrupting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Ctrl-C is pressed at the third look for an answer; the looks are counted."""
    looks: list[int] = []
    pause = threading.Event()

    def sleep(_: float) -> None:
        looks.append(len(looks))
        if len(looks) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        pause.wait(0.02)

    monkeypatch.setattr(module.time, "sleep", sleep)
    yield looks
    pause.set()


def test_ctrl_c_while_waiting(
    exchange_config: dict[str, Any], tmp_path: Path, interrupting: list[int]
) -> None:
    config, out = tmp_path / "config.yaml", tmp_path / "run"
    # An hour: a wait that does not end would end the test by its own timeout.
    config.write_text(yaml.safe_dump(exchange_config | {"agent_options": {"timeout": 3600}}))
    before = threading.enumerate()
    result = CliRunner().invoke(app, ["run", "-c", str(config), "-o", str(out)])
    assert result.exit_code == 130, result.output
    assert f"prunewright resume {out}" in result.stderr
    assert len(interrupting) >= 3
    # The thread that waited ends, too: a notebook lives on.
    for thread in threading.enumerate():
        if thread not in before and thread.name.endswith("(run)"):
            thread.join(30)
            assert not thread.is_alive()


def test_a_repair_of_a_resumed_step(tmp_path: Path, make_observation: MakeObservation) -> None:
    """Stopped at the second try, it goes on there: the refused answer is read and refused again."""
    agent = impatient(tmp_path)
    observation = make_observation(thread="t")
    awaited(agent, observation).write_bytes(b"{}")
    with pytest.raises(AgentError, match="try-1"):
        ask("exchange", agent, observation, repairs=1)
    with pytest.raises(AgentError, match="try-1") as caught:
        ask("exchange", agent, observation, repairs=1)
    Path(str(caught.value).split("awaited was ")[1]).write_bytes(encode(GOOD))
    report = ask("exchange", agent, observation, repairs=1)
    assert len(report.decision.layers) == len(report.invalid_answers) == 1
