"""The command line, as a user or a script meets it: output, files, exit codes."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from prunewright.graph.cli import app
from prunewright.state import load_config
from prunewright.tools.bench import workbench
from tests.conftest import make_pico

CORPUS = resources.files("prunewright.tools") / "data" / "corpus" / "calibration"

AGENTS = '''
import os
import signal
import sys
import threading
import time

import torch
from prunewright.state import AgentError, Decision, LayerDelta

class Named:
    """Prunes two layers a step, and says things meant for a terminal and for Rich."""

    def decide(self, observation):
        room = observation.room()
        names = sorted(room, key=lambda name: -room[name])[:2]
        layers = [LayerDelta(name=name, delta=0.1) for name in names]
        words = "[red]not markup[/red] [/] \\x1b[2J\\u202e end"
        return Decision(reasoning=words, layers=layers)

class Silent(Named):
    """Fails at its second step."""

    def decide(self, observation):
        if observation.step:
            raise AgentError("the line is dead")
        return super().decide(observation)

class Hungry:
    def decide(self, observation):
        torch.empty(2**52)

class Broken:
    def decide(self, observation):
        raise ZeroDivisionError("nobody thought of this")

class Idle:
    def decide(self, observation):
        return Decision(reasoning="", layers=[])

class Overdoing(Named):
    """Wants more than one layer may give; its second answer is moderate."""

    def decide(self, observation):
        decision = super().decide(observation)
        if observation.refusals:
            return decision
        layers = [layer.model_copy(update={"delta": 0.9}) for layer in decision.layers]
        return decision.model_copy(update={"layers": layers})

class Hanging:
    """Ctrl-C is pressed while it waits for an answer that never comes."""

    def decide(self, observation):
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(600)

class Stuck(Idle):
    """Cannot be stopped between two windows: it hangs before it is asked."""

    def __init__(self):
        print("stuck", file=sys.stderr, flush=True)
        time.sleep(600)
'''


@pytest.fixture
def config_file(pico_config: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "pico.yaml"
    path.write_text(yaml.safe_dump(pico_config))
    return path


@pytest.fixture
def agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The prefix that names an agent of `AGENTS`."""
    (tmp_path / "agents_of_test_cli.py").write_text(AGENTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield "import:agents_of_test_cli:"
    sys.modules.pop("agents_of_test_cli", None)


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def flat(text: str) -> str:
    return " ".join(text.split())


def test_help_and_version_need_no_torch() -> None:
    code = (
        "import sys\n"
        "from prunewright.graph.cli import main\n"
        "sys.argv = ['prunewright', '--version']\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'langgraph', 'langchain_core'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"prunewright \d+\.\d+\.\d+\S*\n", done.stdout)


@pytest.mark.parametrize(
    "command",
    ["run", "resume", "baseline", "compare", "show", "evaluate", "plan", "pack", "unpack"],
)
def test_every_command_has_help(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_run_tells_what_it_does(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = invoke("run", "--config", config_file, "--out", out)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    text = flat(result.stdout)
    assert "greedy (a control without an LLM)" in text
    assert "30.0% of the prunable weights" in text
    assert f"run {out}" in text
    assert "float32 on cpu, 14 layers" in text
    metrics = json.loads((out / "metrics.json").read_text())
    dense = metrics["perplexity"]["guard"]["dense"]
    assert f"dense perplexity {dense:.3f} on 3 guard windows of 48 tokens" in text
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == metrics["steps"]
    number = r"[+-]\d+\.\d\d%"
    pattern = (
        rf"step   1   +\d+\.\d\d%  ppl +[\d.]+  {number} ± .*\(predicted {number}\)  \d+ layers"
    )
    assert re.fullmatch(pattern, steps[0])
    assert lines.index(steps[0]) > next(i for i, ln in enumerate(lines) if ln.startswith("dense"))
    assert metrics["revision"] in text
    assert "neither smaller on disk nor faster" in text
    assert "the target sparsity is reached" in text
    assert result.stderr == ""


def test_run_json_is_alone_on_stdout(config_file: Path, tmp_path: Path) -> None:
    result = invoke("run", "-c", config_file, "-o", tmp_path / "run", "--target", "0.1", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["status"] == "target_reached"
    assert found["exit_code"] == 0
    assert found["sparsity"] == pytest.approx(0.1, abs=1e-3)
    assert Path(found["model_directory"], "config.json").is_file()
    assert "step   1" in result.stderr


def test_options_win_over_set_and_set_over_the_file(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--set", "target=0.2", "--set", "texts.windows.guard=2", "--agent", "uniform"]
    result = invoke("run", "-c", config_file, *options, "--target", "0.1", "-o", out)
    assert result.exit_code == 0, result.output
    kept = yaml.safe_load((out / "config.yaml").read_text())
    assert kept["target"] == 0.1
    assert kept["agent"] == "uniform"
    assert kept["texts"]["windows"]["guard"] == 2
    assert kept["texts"]["windows"]["test"] == 3


def test_an_end_before_the_target_is_exit_code_3(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = invoke("run", "-c", config_file, "--set", "max_steps=1", "-o", out, "--json")
    assert result.exit_code == 3
    assert "Ended before the target: max_steps is used up" in result.stderr
    found = json.loads(result.stdout)
    assert found["status"] == "max_steps"
    assert "raise max_steps" in found["reason"]
    assert (out / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "targt=0.3"], "unknown key targt; did you mean target?"),
        (["--set", "texts.windows.gaurd=3"], "did you mean guard?"),
        (["--set", "target"], "--set wants key=value"),
        (["--target", "0"], "target: Input should be greater than 0"),
        (["--target", "45"], "a fraction is asked for: 45 % is 0.45"),
        (["--target", "0.96"], "target: Input should be less than or equal to 0.95"),
        (["--model", "/no/such/model"], "the model /no/such/model"),
        (["--model", "no-such-org/no-such-model"], "nor could be fetched from the hub"),
        (["--set", "texts.windows.length=257"], "longer than the 256 that the model"),
        (["--set", "texts.test=/no/such.txt"], "/no/such.txt"),
        (["--agent", "google_genai:gemini-3-flash-preview"], "GOOGLE_API_KEY or GEMINI_API_KEY"),
        (["--agent", "gredy"], "did you mean greedy?"),
        (["--set", "device=cuda:97"], "device 'cuda:97' cannot be used here"),
        (["--set", "pattern=2:4", "--target", "0.6"], "target 0.6 is above 0.5"),
        (["--set", "pattern=1:3"], "no layer's inputs divide into groups of 3"),
    ],
)
def test_bad_input_is_exit_code_2_and_leaves_nothing(
    config_file: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    out = tmp_path / "run"
    result = invoke("run", "-c", config_file, "-o", out, *options)
    assert result.exit_code == 2, result.output
    assert message in flat(result.stderr)
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_what_people_reach_for_has_an_option(config_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(p.read_text("utf-8") for p in list(CORPUS.iterdir())[:2]))
    options = ["--seed", "3", "--device", "cpu", "--preset", "paper"]
    options += ["--calibration", text, "--calibration", "embedded"]
    for command in ("run", "baseline"):
        out = tmp_path / command
        result = invoke(command, "-c", config_file, "-o", out, *options, "--target", "0.1")
        assert result.exit_code == 0, result.output
        found = load_config(out / "config.yaml")
        assert (found.seed, found.device, found.signals) == (3, "cpu", ("z_s", "z_g"))
        assert [one.source for one in found.texts.mix] == [str(text), "embedded"]
    asked = invoke("run", "-c", config_file, "-o", tmp_path / "nobody", "--review")
    assert asked.exit_code == 2  # nobody sits here


def test_a_text_too_short_for_a_window(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Not much.")
    out = tmp_path / "run"
    text = f"texts.test={tmp_path / 'short.txt'}"
    result = invoke("run", "-c", config_file, "-o", out, "--set", text)
    assert result.exit_code == 2
    assert "the test text, is too short for one window of 48 tokens" in flat(result.stderr)
    assert not out.exists()


def test_a_target_above_the_pattern_is_refused(config_file: Path, tmp_path: Path) -> None:
    for command in ("run", "plan"):
        options = ["--set", "pattern=2:4", "--target", "0.6", "-o", tmp_path / "r"]
        result = invoke(command, "-c", config_file, *options)
        assert result.exit_code == 2
        assert "target 0.6 is above 0.5" in flat(result.stderr)


def test_a_pickled_model_is_refused(
    pico_models: Callable[..., Path], config_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    shutil.copy(pico_models() / "config.json", tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for command in ("run", "plan"):
        result = invoke(command, "-c", config_file, "-m", tmp_path / "model", "-o", tmp_path / "r")
        assert result.exit_code == 2
        assert "only pickled weights (pytorch_model.bin)" in flat(result.stderr)


def test_usage_errors_are_exit_code_2() -> None:
    for args in (["run", "--no-such-option"], ["no-such-command"], ["show"], ["run", "-t", "x"]):
        assert invoke(*args).exit_code == 2


def test_an_unreadable_config_file(tmp_path: Path) -> None:
    result = invoke("run", "-c", tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert "cannot read the config file" in flat(result.stderr)


def test_errors_as_json(config_file: Path) -> None:
    result = invoke("run", "-c", config_file, "--target", "7", "--json")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert found["exit_code"] == 2
    assert found["kind"] == "InputError"
    assert "target" in found["error"]
    assert "target" in result.stderr


def test_a_directory_that_holds_another_run(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke("run", "-c", config_file, "-o", out, "-t", "0.1").exit_code == 0
    before = (out / "metrics.json").read_bytes()
    result = invoke("run", "-c", config_file, "-o", out)
    assert result.exit_code == 2
    assert f"prunewright resume {out}" in flat(result.stderr)
    assert (out / "metrics.json").read_bytes() == before


def test_a_failing_agent_and_the_resume_with_another(
    config_file: Path, tmp_path: Path, agents: str
) -> None:
    out = tmp_path / "run"
    failed = invoke("run", "-c", config_file, "-o", out, "-a", f"{agents}Silent", "--json")
    assert failed.exit_code == 1
    found = json.loads(failed.stdout)
    assert found["error"] == "the line is dead"
    assert found["resume"] == f"prunewright resume {out}"
    assert found["resume"] in flat(failed.stderr)

    shown = invoke("show", out)
    assert shown.exit_code == 0
    assert "Not finished, 1 steps so far" in shown.stdout

    refused = invoke("resume", out, "--set", "target=0.2", "--set", "agent=greedy")
    assert refused.exit_code == 2
    assert "needs a new run" in flat(refused.stderr)

    done = invoke("resume", out, "--set", "agent=greedy", "--set", "guard.max_increase=0.9")
    assert done.exit_code == 0, done.output
    assert "resumed after step 1" in flat(done.stdout)
    kept = yaml.safe_load((out / "config.yaml").read_text())
    assert kept["agent"] == "greedy"
    assert kept["guard"]["max_increase"] == 0.9
    agents_shown = flat(invoke("show", out).stdout)
    assert f"agent {agents}Silent, then greedy" in agents_shown

    again = invoke("resume", out, "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["revision"] == json.loads(
        (out / "metrics.json").read_text()
    ).get("revision")


def test_a_damaged_mask_is_named(
    config_file: Path, tmp_path: Path, agents: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert invoke("run", "-c", config_file, "-o", out, "-a", f"{agents}Silent").exit_code == 1
    mask = next((out / "revisions" / "masks").iterdir())
    data = bytearray(mask.read_bytes())
    data[-1] ^= 1
    mask.write_bytes(data)
    monkeypatch.setattr(workbench, "_current", None)  # as in a new process
    result = invoke("resume", out, "--set", "agent=greedy")
    assert result.exit_code == 1
    assert mask.name in flat(result.stderr)
    assert "is damaged" in flat(result.stderr)


def test_a_full_disk_loses_nothing(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    real, calls = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 25:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = invoke("run", "-c", config_file, "-o", out)
    assert result.exit_code == 1, result.output
    assert "No space left on device" in flat(result.stderr)
    assert "resume" in result.stderr
    assert "Traceback" not in result.stderr
    resumed = invoke("resume", out, "--json")
    assert resumed.exit_code == 0, resumed.output
    straight = invoke("run", "-c", config_file, "-o", whole, "--json")
    assert json.loads(resumed.stdout)["revision"] == json.loads(straight.stdout)["revision"]


def test_a_path_that_nothing_can_lie_at_is_told(
    config_file: Path, tmp_path: Path, pico_models: Callable[..., Path]
) -> None:
    long, below = tmp_path / ("n" * 300), config_file / "below"
    read = [["show"], ["resume"], ["watch"], ["gc"], ["ask"], ["fork", "--step", "1"], ["report"]]
    tried = [[*command, long] for command in read]
    tried += [["run", "-c", config_file, "-o", long], ["baseline", "-c", config_file, "-o", long]]
    tried += [["evaluate", long, "--text", "embedded"], ["pack", long, tmp_path / "packed"]]
    tried += [["pack", pico_models(), place] for place in (long, below)]
    for command in tried:
        result = invoke(*command)
        assert result.exit_code in (1, 2), command
        words = "cannot write" if below in command else "File name too long"
        assert words in flat(result.stderr), command
        assert "not foreseen" not in result.stderr, command
    assert config_file.is_file()


def test_too_little_memory_becomes_advice(config_file: Path, tmp_path: Path, agents: str) -> None:
    result = invoke("run", "-c", config_file, "-o", tmp_path / "run", "-a", f"{agents}Hungry")
    assert result.exit_code == 1
    for setting in ("offload=cpu", "texts.windows.length", "dtype", "--offload", "--length"):
        assert setting in result.stderr
    assert f"prunewright resume {tmp_path / 'run'}" in flat(result.stderr)


def test_an_unforeseen_error_hides_its_traceback_until_asked(
    config_file: Path, tmp_path: Path, agents: str
) -> None:
    options = ["-c", config_file, "-a", f"{agents}Broken"]
    quiet = invoke("run", *options, "-o", tmp_path / "a")
    assert quiet.exit_code == 1
    assert "ZeroDivisionError: nobody thought of this" in quiet.stderr
    assert "--debug" in quiet.stderr
    assert "Traceback" not in quiet.stderr
    loud = invoke("--debug", "run", *options, "-o", tmp_path / "b")
    assert loud.exit_code == 1
    assert "Traceback" in loud.stderr


@pytest.mark.parametrize("command", ["run", "baseline"])
def test_an_unforeseen_error_before_anything_was_computed_leaves_the_directory_free(
    command: str, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("nobody thought of this")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("prunewright.tools.execution.base.Execution.window_losses", fail)
        result = invoke(command, "-c", config_file, "-o", out)
    assert result.exit_code == 1
    assert "nobody thought of this" in result.stderr
    assert "resume" not in result.stderr
    assert not out.exists()
    assert invoke(command, "-c", config_file, "-o", out).exit_code == 0


def test_show_writes_an_agents_words_out(config_file: Path, tmp_path: Path, agents: str) -> None:
    out = tmp_path / "run"
    ran = invoke("run", "-c", config_file, "-o", out, "-a", f"{agents}Named", "-s", "max_steps=2")
    assert ran.exit_code == 3
    result = invoke("show", out, "--step", "2")
    assert result.exit_code == 0
    assert r"[red]not markup[/red] [/] \x1b[2J\u202e end" in result.stdout
    assert "\x1b" not in result.stdout
    record = json.loads(invoke("show", out, "--step", "2", "--json").stdout)
    for name in record["applied"]:
        assert name in result.stdout
    assert invoke("show", out, "--step", "3").exit_code == 2


def test_show_layers_agrees_with_the_model(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke("run", "-c", config_file, "-o", out).exit_code == 0
    found = json.loads(invoke("show", out, "--layers", "--json").stdout)
    from safetensors.torch import load_file

    weights = load_file(out / "model" / "model.safetensors")
    assert len(found["layers"]) == 14
    for name, sparsity in found["layers"].items():
        zeros = float((weights[f"{name}.weight"] == 0).float().mean())
        assert sparsity == pytest.approx(zeros, abs=1e-6)
    assert found["finished"] is True
    assert len(found["steps"]) == found["metrics"]["steps"]
    table = invoke("show", out, "--layers").stdout.splitlines()
    assert table[1].split()[:2] == ["block", "self_attn.q_proj"]
    first = found["layers"]["model.layers.0.self_attn.q_proj"]
    assert table[2].split()[:2] == ["0", f"{100 * first:.1f}"]


def test_failure_signatures_are_reported(config_file: Path, tmp_path: Path, agents: str) -> None:
    options = ["-c", config_file, "-s", "max_stalls=5", "-s", "max_steps=5"]
    idle = invoke("run", *options, "-o", tmp_path / "idle", "-a", f"{agents}Idle", "--json")
    assert idle.exit_code == 3
    found = json.loads(idle.stdout)
    assert found["status"] == "stalled"
    assert found["signatures"] == ["no progress over steps 1 to 4: sparsity gained 0.0000"]
    assert "chose no layer" in idle.stderr
    # Said as soon as it shows, not only at the end.
    lines = idle.stderr.splitlines()
    warned = next(i for i, line in enumerate(lines) if "no progress over" in line)
    assert lines[warned - 1].startswith("step   4  empty")
    assert lines[warned + 1].startswith("step   5  empty")
    wild = invoke("run", *options, "-o", tmp_path / "wild", "-a", f"{agents}Overdoing")
    assert wild.exit_code == 3
    for text in (wild.stdout, invoke("show", tmp_path / "wild").stdout):
        assert "warning    5 of 10 answers were invalid (50%)" in text
        assert "agent      5 decisions, 5 answers refused, 5 of them sent back\n" in text
        assert re.search(r"scored     .*guard [\d,]+,.* tokens\n", text)
        assert re.search(r"time       .*\(.*profile [\d.]+ s.*\)\n", text)
    step = invoke("show", tmp_path / "wild", "--step", "1").stdout
    assert re.search(r"refused +.*delta 0.9 is not within 0.15 of 0", step)


def test_show_refuses_what_is_no_run(tmp_path: Path) -> None:
    result = invoke("show", tmp_path)
    assert result.exit_code == 2
    assert "is not a run directory" in flat(result.stderr)


def test_baseline_by_target_and_by_pattern(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "uniform"
    result = invoke("baseline", "-c", config_file, "--criterion", "magnitude", "-o", out, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["status"] == "baseline"
    assert found["method"]["criterion"] == "magnitude"
    assert found["sparsity"] == pytest.approx(0.3, abs=5e-3)
    out = tmp_path / "pattern"
    result = invoke("baseline", "-c", config_file, "--pattern", "2:4", "-o", out)
    assert result.exit_code == 0, result.output
    assert "50.0% of the prunable weights, fixed by the pattern" in flat(result.stdout)
    shown = json.loads(invoke("show", out, "--layers", "--json").stdout)
    assert set(shown["layers"].values()) == {0.5}
    assert invoke("baseline", "-c", config_file, "--criterion", "wnda").exit_code == 2


def test_evaluate_agrees_with_the_run(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke("run", "-c", config_file, "-o", out).exit_code == 0
    metrics = json.loads((out / "metrics.json").read_text())
    text = tmp_path / "more.txt"
    text.write_text("The river rose again in the spring, and the mill stood still. " * 200)
    options = ["--windows", "3", "--length", "48", "--dtype", "float32", "--text", "embedded"]
    result = invoke("evaluate", out, *options, "--text", text, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["sparsity"] == pytest.approx(metrics["sparsity"], abs=1e-9)
    embedded, own = found["texts"]
    assert embedded["perplexity"] == pytest.approx(metrics["perplexity"]["test"]["final"])
    assert (embedded["windows"], embedded["length"]) == (3, 48)
    assert own["source"] == str(text)
    words = flat(invoke("evaluate", out / "model", *options).stdout)
    assert f"perplexity {embedded['perplexity']:.3f} ±" in words
    assert "3 windows of 48 tokens" in words


def test_an_interrupted_evaluation_says_what_goes_on(
    pico_models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prunewright.graph.cli.evaluating.log_progress", interrupt)
    command = ["evaluate", str(pico_models()), "--windows", "2", "--length", "48"]
    monkeypatch.setattr("sys.argv", ["prunewright", *command, "--out", "all of it"])
    lost = invoke(*command)
    assert lost.exit_code == 130
    assert "Interrupted. Nothing was kept." in lost.output
    kept = invoke(*command, "--out", tmp_path / "out")
    assert kept.exit_code == 130
    assert f"go on with: prunewright {' '.join(command)} --out 'all of it'" in flat(kept.output)


def test_evaluate_against_another_model(pico_models: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "scores"
    options = ["--task", "mmlu-cloze", "--shots", "0", "--limit", "28", "--dtype", "float32"]
    pair = (pico_models(), *options, "--against", pico_models("Qwen3Config"), "--out", out)
    result = invoke("evaluate", *pair, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["texts"] == []
    ours, theirs = (
        {o["id"]: o["correct"] for o in one["tasks"][0]["outcomes"]}
        for one in (found, found["against"])
    )
    (pairs,) = found["comparisons"]
    assert pairs["lost"] == sum(theirs[i] and not ours[i] for i in ours)
    assert pairs["gained"] == sum(ours[i] and not theirs[i] for i in ours)
    assert json.loads((out / "evaluation.json").read_text()) == found
    words = flat(invoke("evaluate", *pair).stdout)
    assert "right of 28 questions from embedded, 0-shot" in words
    assert "retention lost gained" in " ".join(words.split())
    assert " %" not in words


def test_evaluate_refuses_questions_that_the_run_has_seen(
    config_file: Path, tmp_path: Path
) -> None:
    rows = [{"question": f"Who rules land {n}?", "answers": [f"king {n}"]} for n in range(80)]
    seen, rest = tmp_path / "seen.jsonl", tmp_path / "rest.jsonl"
    seen.write_text("".join(json.dumps(row) + "\n" for row in rows[:60]))
    rest.write_text("".join(json.dumps(row) + "\n" for row in rows[60:]))
    mix = f"--set=texts.calibration=[embedded, '{seen}']"
    out = tmp_path / "run"
    made = invoke("baseline", "-c", config_file, mix, "--set=texts.guard=embedded", "-o", out)
    assert made.exit_code == 0, made.output

    def evaluate(model: Path, data: Path) -> Result:
        options = ["--task", "facts", "--data", f"facts={data}", "--shots", "0", "--limit", "4"]
        return invoke("evaluate", model, *options, "--dtype", "float32")

    for model in (out, out / "model"):
        refused = evaluate(model, seen)
        assert refused.exit_code == 2
        assert "the calibration text" in flat(refused.output)
        assert "answers questions" in flat(refused.output)
    assert evaluate(out, rest).exit_code == 0
    seen.unlink()
    unknown = evaluate(out, rest)
    assert unknown.exit_code == 0
    assert "whether the run has seen these questions is not known" in flat(unknown.output)


def test_evaluate_takes_a_file_as_it_takes_options(
    pico_models: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "evaluation.yaml"
    text = {"name": "ours", "source": "embedded", "windows": 2}
    path.write_text(yaml.safe_dump({"length": 48, "texts": [text], "tasks": []}))
    given = [["--config", path], ["--text", "embedded", "--windows", "2", "--length", "48"]]
    found = [invoke("evaluate", pico_models(), *options, "--json").stdout for options in given]
    assert json.loads(found[0]) == json.loads(found[1])
    path.write_text(yaml.safe_dump({"lenght": 48}))
    result = invoke("evaluate", pico_models(), "--config", path)
    assert result.exit_code == 2
    assert "did you mean length?" in flat(result.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--windows", "100000"], "100000 are asked for"),
        (["--length", "4096"], "longer than the 256 that the model"),
        (["--text", "/no/such.txt"], "/no/such.txt"),
        (["--dtype", "int8"], "dtype"),
        (["--protocol", "papers"], "windows or literature"),
        (["--protocol", "literature", "--windows", "3"], "leave out --windows"),
        (["--task", "mmul"], "did you mean mmlu"),
        (["--task", "facts", "--data", "facts"], "TASK=SOURCE"),
        (["--task", "facts", "--data", "facts=/no/such.json"], "does not exist"),
        (["--task", "mmlu", "--shots", "1"], "fewer --shots"),
        (["--config", "evaluation.yaml"], "leave out the options about it"),
    ],
)
def test_evaluate_refuses(
    pico_models: Callable[..., Path], options: list[str], message: str
) -> None:
    result = invoke("evaluate", pico_models(), "--length", "48", *options)
    assert result.exit_code == 2, result.output
    assert message in flat(result.stderr)


def test_plan_counts_and_touches_nothing(
    config_file: Path, tmp_path: Path, pico_models: Callable[..., Path]
) -> None:
    out = tmp_path / "run"
    result = invoke("plan", "-c", config_file, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    assert not out.exists()
    plan = json.loads(result.stdout)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pico_models())
    prunable = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    )
    everything = sum(p.numel() for p in model.parameters())
    assert (plan["blocks"], plan["layers"], plan["prunable"]) == (2, 14, prunable)
    assert plan["parameters"] == everything
    assert plan["stored"] == {"float32": 4 * everything}
    assert plan["weights"] == 4 * everything
    assert plan["disk"]["masks"] == prunable // 8
    # A directory is named once.
    words = flat(invoke("plan", "-c", config_file, "-o", out).stdout)
    assert words.count(str(pico_models())) == 1
    for dtype in ("float32", "bfloat16"):  # saved as it is stored, whatever is computed in
        result = invoke("plan", "-c", config_file, "--set", f"dtype={dtype}", "--json")
        assert json.loads(result.stdout)["disk"]["model"] == 4 * everything
    assert plan["steps"] == 3
    assert plan["memory"]["peak"] > plan["weights"]
    # 4 windows of 48 tokens through the blocks: 2 a weight, 4 a block, width and token pair.
    assert plan["flops"]["activations"] == 4 * 48 * (2 * prunable + 4 * 2 * 32 * 48)
    assert plan["seconds"] == {}
    words = flat(invoke("plan", "-c", config_file, "-o", out).stdout)
    assert f"14 in 2 blocks, {prunable:,} prunable of {everything:,} parameters" in words
    assert "3 steps or more; --time loads the model" in words
    # A full step of max_delta fits all layers alike only.
    for step, alike in (("0.1", False), ("0.2", True)):
        settings = ["--set", "max_delta=0.2", "--set", f"step={step}"]
        words = flat(invoke("plan", "-c", config_file, *settings).stdout)
        assert ("all layers alike" in words) is alike


def test_plan_predicts_the_time_from_one_window(config_file: Path) -> None:
    plan = json.loads(invoke("plan", "-c", config_file, "--time", "--json").stdout)
    seconds, flops = plan["seconds"], plan["flops"]
    windows = yaml.safe_load(config_file.read_text())["texts"]["windows"]["guard"]
    each = seconds["window"] * windows / flops["guard"]
    step = sum(n for name, n in flops.items() if name != "finish") + seconds["masks"] / each
    assert seconds["window"] > 0
    assert seconds["masks"] > 0
    assert seconds["step"] == pytest.approx(step * each)
    assert seconds["finish"] == pytest.approx(flops["finish"] * each)
    whole = flops["guard"] + 3 * step + flops["finish"]
    assert seconds["run"] == pytest.approx(whole * each)
    words = flat(invoke("plan", "-c", config_file, "--time").stdout)
    assert "a step, 3 steps or more" in words


def test_plan_counts_the_text_that_the_model_writes(config_file: Path) -> None:
    without = json.loads(invoke("plan", "-c", config_file, "--json").stdout)
    own = ["-c", config_file, "--calibration", "embedded", "--calibration", "self"]
    plan = json.loads(invoke("plan", *own, "--time", "--json").stdout)
    windows = yaml.safe_load(config_file.read_text())["texts"]["windows"]
    # Half of the calibration windows, and one of three of the guard.
    scored = without["flops"]["guard"] / windows["guard"]
    assert plan["flops"]["own text"] == pytest.approx(scored * (windows["calibration"] // 2 + 1))
    # Keys and values of 2 heads of 8 in 2 blocks, 512 tokens of 32 texts; logits of these.
    assert plan["memory"]["own text"] == 32 * (512 * 2 * (2 * 2 * 8) * 4 + 3 * 4 * 512)
    seconds = plan["seconds"]
    rest = seconds["window"] * windows["guard"] + 3 * seconds["step"] + seconds["finish"]
    assert seconds["own text"] > 0
    assert seconds["run"] == pytest.approx(rest + seconds["own text"])
    assert "for text of its own" in flat(invoke("plan", *own, "--time").stdout)
    away = json.loads(invoke("plan", *own, "--set", "offload=disk", "--json").stdout)
    assert "does not write text by itself" in away["warnings"][0]


def test_plan_counts_the_training_at_the_end(config_file: Path) -> None:
    training = ["-c", config_file, "-s", "adapt={tokens: 1600, batch: 4}"]
    result = invoke("plan", *training, "--time", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    found, prunable = plan["adapt"], plan["prunable"]
    windows = yaml.safe_load(config_file.read_text())["texts"]["windows"]
    # Eight steps of four windows of 48 tokens. Back is two passes more, and one as activations are
    # made again; the head once more, for the dense model's logits.
    body = 48 * (2 * prunable + 4 * 2 * 32 * 48)
    head = 48 * 2 * 32 * 512
    trained = 32 * 4 * (body + head)
    measured = 11 * windows["guard"] * (body + head)
    assert found["flops"] == trained + windows["calibration"] * body + measured
    each = plan["seconds"]["window"] / (body + head)
    assert found["seconds"] == pytest.approx(found["flops"] * each)
    seconds = plan["seconds"]
    rest = seconds["window"] * windows["guard"] + 3 * seconds["step"] + seconds["finish"]
    assert seconds["run"] == pytest.approx(rest + found["seconds"])
    # Two checkpoints of float32 weights with two moments, two sets of weights, and hidden states.
    states = windows["calibration"] * 48 * 32 * 4
    assert found["disk"] == 2 * (4 + 8 + 4) * prunable + states
    some = [*training, "-s", "adapt.layers=['*.down_proj']"]
    fewer = json.loads(invoke("plan", *some, "--json").stdout)
    # Gradients and moments, over a peak that has what the process itself holds now.
    over, less = (one["adapt"]["memory"] - one["memory"]["peak"] for one in (plan, fewer))
    assert over - less == (4 + 8) * (prunable - 2 * 32 * 64)
    assert "seconds" not in fewer["adapt"]
    assert json.loads(invoke("plan", "-c", config_file, "--json").stdout)["adapt"] == {}
    away = invoke("plan", *training, "-s", "offload=disk").stdout
    assert "adapt takes about" in flat(away)
    assert "adapt trains all blocks at once" in flat(away)
    assert "recommended: none" in flat(away)


def test_plan_takes_what_a_run_takes(config_file: Path) -> None:
    dense = json.loads(invoke("plan", "-c", config_file, "--json").stdout)
    assert dense["memory"]["gradients"] == dense["disk"]["copy"] == 0
    options = ["--criterion", "gblm", "--agent", "gredy"]
    result = invoke("plan", "-c", config_file, *options, "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    # The mean squares of all gradients, and beside them those that they replace.
    assert plan["memory"]["gradients"] == 2 * 4 * plan["prunable"]
    assert "unknown agent 'gredy'" in plan["warnings"][0]
    words = flat(invoke("plan", "-c", config_file, *options[:2], "--agent", "greedy").stdout)
    assert "a control without an LLM" in words


def test_plan_counts_the_weights_that_are_copied_since_they_have_other_names(
    config_file: Path, tmp_path: Path, pico_models: Callable[..., Path]
) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "renamed"
    shutil.copytree(pico_models(), model)
    tensors = load_file(model / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, model / "model.safetensors", metadata={"format": "pt"})
    result = invoke("plan", "-c", config_file, "-m", model, "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["disk"]["copy"] == 4 * plan["prunable"]
    assert plan["disk"]["total"] >= plan["disk"]["copy"] + plan["disk"]["model"]


def test_plan_needs_no_weights_of_a_hub_model(
    config_file: Path,
    tmp_path: Path,
    pico_models: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    cached = tmp_path / "hub" / "models--some--pico"
    snapshot = cached / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    for path in pico_models().glob("*.json"):
        (snapshot / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    result = invoke("plan", "-c", config_file, "-m", "some/pico", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["stored"] == {}
    assert plan["layers"] == 14


def test_plan_warns_of_what_does_not_fit(config_file: Path) -> None:
    options = ["-s", "texts.windows.length=2000000000"]  # one block's activations: 4 TB
    result = invoke("plan", "-c", config_file, *options, "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["memory"]["peak"] > plan["memory_available"]
    assert "lower texts.windows.length" in plan["warnings"][0]
    assert "warning    the run needs about" in invoke("plan", "-c", config_file, *options).stdout
    assert json.loads(invoke("plan", "-c", config_file, "--json").stdout)["warnings"] == []


def test_plan_recommends_the_way_that_fits(
    pico_models: Callable[..., Path], config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunewright.tools.plan._base", lambda: 0)  # it grows with the tests
    plan = json.loads(invoke("plan", "-c", config_file, "--json").stdout)
    assert plan["recommended"] == "none"
    assert plan["ways"]["none"]["device"] == plan["memory"]["peak"]
    deep = make_pico(config_file.parent / "deep", "LlamaConfig", num_hidden_layers=40)
    options = ["-c", config_file, "-m", deep]
    ways = json.loads(invoke("plan", *options, "--json").stdout)["ways"]
    assert ways["disk"]["host"] < ways["none"]["host"]
    between = (ways["disk"]["host"] + ways["none"]["host"]) // 2
    monkeypatch.setattr("prunewright.tools.plan.free_memory", lambda _: between)
    plan = json.loads(invoke("plan", *options, "--json").stdout)
    assert plan["recommended"] == "disk"
    assert plan["warnings"][0].endswith("set offload=disk")
    plan = json.loads(invoke("plan", *options, "-s", "offload=disk", "--json").stdout)
    assert plan["warnings"] == []
    words = flat(invoke("plan", *options).stdout)
    assert "recommended: disk" in words


def test_ctrl_c_does_not_wait_for_an_agents_answer(
    config_file: Path, tmp_path: Path, agents: str
) -> None:
    out = tmp_path / "run"
    result = invoke("run", "-c", config_file, "-o", out, "-a", f"{agents}Hanging", "--json")
    assert result.exit_code == 130
    assert json.loads(result.stdout)["resume"] == f"prunewright resume {out}"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert invoke("resume", out, "-s", "agent=greedy").exit_code == 0


def _started(config_file: Path, out: Path, until: str, agent: str) -> "subprocess.Popen[str]":
    """A run in a process of its own, once it has printed a line."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "prunewright.graph.cli", "run", "--json"),
            *("-c", str(config_file), "-o", str(out), "-a", agent),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(config_file.parent)},
    )
    _read_until(process, until)
    return process


def _read_until(process: "subprocess.Popen[str]", start: str) -> None:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith(start):
            return
    raise AssertionError(f"ended with {process.wait()} before {start!r}: {seen}")


def test_ctrl_c_stops_the_run_and_resume_ends_the_same(
    pico_config: dict[str, Any], tmp_path: Path
) -> None:
    pico_config["texts"]["windows"] |= {"calibration": 40, "guard": 30}
    config_file = tmp_path / "many.yaml"
    config_file.write_text(yaml.safe_dump(pico_config))
    out = tmp_path / "a run"
    process = _started(config_file, out, "step   1", "greedy")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "stopping after the window or layer in hand" in stderr
    assert f"prunewright resume '{out}'" in stderr
    assert "Traceback" not in stderr
    assert json.loads(stdout)["error"] == "interrupted"
    assert not (out / "metrics.json").exists()
    resumed = invoke("resume", out, "--json")
    assert resumed.exit_code == 0, resumed.output
    straight = invoke("run", "-c", config_file, "-o", tmp_path / "whole", "--json")
    ends = [json.loads(result.stdout) for result in (resumed, straight)]
    assert ends[0]["revision"] == ends[1]["revision"]
    assert ends[0]["steps"] == ends[1]["steps"]


def test_a_second_signal_ends_a_stuck_run_at_once(
    config_file: Path, tmp_path: Path, agents: str
) -> None:
    out = tmp_path / "run"
    process = _started(config_file, out, "stuck", f"{agents}Stuck")
    process.send_signal(signal.SIGTERM)
    _read_until(process, "stopping after")
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"go on with: prunewright resume {out}" in stderr
    assert stdout == ""
    assert invoke("resume", out, "-s", "agent=greedy").exit_code == 0
