"""What people see in a terminal of 80 columns: whole words, whole numbers, one bar."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from comparisons import CONTROL, make_comparison
from records import record as make_record
from typer.testing import CliRunner

from prunewright.graph import run
from prunewright.graph.cli import app
from prunewright.graph.cli.screen.lines import Screen
from prunewright.graph.cli.screen.live import Live
from prunewright.graph.cli.screen.study import print_tables
from prunewright.graph.words.numbers import percent, perplexity
from prunewright.graph.words.steps import step_line, steps_to_go
from prunewright.state import PruneConfig
from prunewright.state.metrics import SOLVING, TRAINING, Stage
from prunewright.state.step import FromRanking
from prunewright.tools.report.tables import comparison_tables

WIDTH = 80
TERMINAL = {"COLUMNS": str(WIDTH), "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "0", "TERM": "dumb"}


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)


def printed(*args: str | Path, env: dict[str, str] | None = None) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], env=env or {})
    assert result.exit_code == 0, result.output
    return plain(result.stdout)


def too_long(text: str) -> list[str]:
    """Lines that do not fit, but for words that nobody can break, such as paths."""
    return [line for line in text.splitlines() if len(line) > WIDTH and " " in line.strip()[12:]]


@pytest.fixture(scope="module")
def finished(pico_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a rolled-back step."""
    windows = {"calibration": 4, "gradient": 2, "guard": 3, "test": 3, "length": 48}
    config = {
        "model": str(pico_models()),
        "dtype": "float32",
        "device": "cpu",
        "agent": "random",
        "target": 0.3,
        "step": 0.1,
        "max_steps": 4,
        "guard": {"max_increase": 0.0001},
        "texts": {"windows": windows},
    }
    return run(config, tmp_path_factory.mktemp("runs") / "run").directory


@pytest.mark.parametrize("options", [[], ["--step", "1"], ["--step", "4"]])
def test_show_says_the_same_in_80_columns(finished: Path, options: list[str]) -> None:
    narrow, wide = (printed("show", finished, *options, env=env) for env in (TERMINAL, None))
    assert too_long(narrow) == []
    assert narrow.split() == wide.split()


def test_show_layers_in_80_columns(finished: Path) -> None:
    layers = json.loads(printed("show", finished, "--layers", "--json"))["layers"]
    narrow = printed("show", finished, "--layers", env=TERMINAL)
    assert too_long(narrow) == []
    numbers = Counter(word for word in narrow.split() if "." in word and word[0].isdigit())
    assert numbers == Counter(f"{100 * sparsity:.1f}" for sparsity in layers.values())


def test_plan_and_agents_say_the_same_in_80_columns(
    pico_config: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "pico.yaml"
    path.write_text(yaml.safe_dump(pico_config))
    narrow, wide = (printed("agents", env=env) for env in (TERMINAL, None))
    assert too_long(narrow) == []
    assert Counter(narrow.split()) == Counter(wide.split())
    plan = printed("plan", "-c", path, env=TERMINAL)
    assert too_long(plan) == []
    assert f"{json.loads(printed('plan', '-c', path, '--json'))['prunable']:,} prunable" in plan


def test_evaluate_in_80_columns(pico_models: Callable[..., Path], tmp_path: Path) -> None:
    options = ["--task", "mmlu-cloze", "--shots", "0", "--limit", "14", "--dtype", "float32"]
    pair = ["evaluate", pico_models(), *options, "--against", pico_models("Qwen3Config")]
    pair += ["--out", tmp_path]
    (compared,) = json.loads(printed(*pair, "--json"))["comparisons"]
    narrow = printed(*pair, env=TERMINAL)
    assert too_long(narrow) == []
    for number in (f"{compared['accuracy']:.1%}", f"{compared['p_value']:.2g}"):
        assert number in narrow.split()
    assert f"[{compared['low']:+.3f}, {compared['high']:+.3f}]" in narrow


def test_a_comparison_keeps_names_and_numbers_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in TERMINAL.items():
        monkeypatch.setenv(name, value)
    tables = comparison_tables(make_comparison())[:2]
    print_tables(Screen(), tables)
    text = plain(capsys.readouterr().out)
    assert too_long(text) == []
    words = Counter(text.split())
    for table in tables:
        for row in table.rows:
            assert not Counter(" ".join(row).split()) - words
    # Each part of a table says which method and target its numbers are of.
    heads = [line.split() for line in text.splitlines() if line.startswith("method  ")]
    assert len(heads) > len(tables)
    assert all(head[:2] == ["method", "target"] for head in heads)
    assert text.count(f"\n{CONTROL} ") == len(heads) * 2


@pytest.mark.parametrize("change", [-0.0731, 0.0006, 0.1234, 98.7654, 1.3e6])
def test_a_step_fits_80_columns(change: float) -> None:
    record = make_record(
        step=119,
        change=change,
        change_stderr=0.0123,
        predicted_change=change,
        candidate_perplexity=12345.678,
        applied={f"model.layers.{i}.mlp.up_proj": 0.1 for i in range(197)},
    )
    line = step_line(record)
    assert len(line) <= WIDTH
    assert line.startswith("step 120  ")
    assert line.endswith(f"(predicted {percent(change)})  197 layers")
    assert "12345.68" in line
    edited = record.model_copy(update={"ranking": FromRanking(edits={"model.layers.0.a": 0.1})})
    assert step_line(edited) == f"{line}  proposal with 1 layer edited by the agent"


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.0213, "+2.13%"), (-0.5, "-50.0%"), (12.0, "+1200%"), (1e5, "+1e+07%"), (0.0, "+0.00%")],
)
def test_changes_are_short_whatever_their_size(value: float, words: str) -> None:
    assert percent(value) == words
    assert (perplexity(36.931), perplexity(2.5e7)) == ("36.93", "2.500e+07")


def test_steps_that_are_left_are_told_from_those_that_were_taken() -> None:
    def after(*sparsities: float, target: float = 0.4, most: int = 60) -> int | None:
        pairs = zip([0.0, *sparsities], sparsities, strict=False)
        records = [
            make_record(step=i, sparsity_before=a, sparsity=b) for i, (a, b) in enumerate(pairs)
        ]
        return steps_to_go(records, target, most)

    assert after() is None  # no ground yet
    assert after(0.1) == 3
    assert after(0.1, 0.1) == 6  # one came to nothing: three to go at half the pace
    assert after(0.0) is None
    assert after(0.1, most=3) == 2
    assert after(0.2, 0.3995) == 0
    assert after(0.1, most=1) == 0


def test_the_clock_tells_what_is_left_from_measured_steps(
    monkeypatch: pytest.MonkeyPatch, pico_config: dict[str, Any]
) -> None:
    now = 1000.0
    monkeypatch.setattr("prunewright.graph.cli.screen.live.time.monotonic", lambda: now)
    config = PruneConfig.model_validate(pico_config | {"target": 0.4})
    live = Live(Screen(quiet=True), config=config)

    def take(step: int, before: float, after: float) -> None:
        record = make_record(step=step, sparsity_before=before, sparsity=after)
        live.on_event("custom", {"step": record.model_dump(mode="json")})

    now += 90
    assert live.times() == "1:30"
    live.on_event("custom", {"progress": {"label": "activations", "done": 0, "total": 9}})
    now += 300
    assert live.times() == "6:30"  # no step is measured yet
    take(0, 0.0, 0.1)
    assert live.times() == "6:30, about 15 min left"  # three of five minutes each
    now += 60
    assert live.times() == "7:30, about 14 min left"
    now += 40
    take(1, 0.1, 0.4)
    assert live.times() == "8:10"


def test_the_clock_tells_what_is_left_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("prunewright.graph.cli.screen.live.time.monotonic", lambda: now)
    live = Live(Screen(quiet=True))

    def tell(label: str, done: int, total: int) -> None:
        live.on_event("custom", {"progress": {"label": label, "done": done, "total": total}})

    now += 30
    tell(f"{TRAINING}, token", 400, 1000)
    now += 120
    assert live.times() == "2:30"
    tell(f"{TRAINING}: KL 0.1 nats, token", 600, 1000)  # it went on from 400
    assert live.times() == "2:30, about 4 min left"
    tell("perplexity", 0, 8)
    now += 60
    assert live.times() == "3:30, about 3 min left"
    stage = Stage(name="adapt", revision="0", before=2, after=1, kept=True, seconds=1, tokens={})
    live.on_event("custom", {"stage": stage.model_dump(mode="json")})
    assert live.times() == "3:30"


def test_the_clock_tells_what_is_left_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("prunewright.graph.cli.screen.live.time.monotonic", lambda: now)
    live = Live(Screen(quiet=True))

    def tell(label: str, done: int, total: int) -> None:
        live.on_event("custom", {"progress": {"label": label, "done": done, "total": total}})

    tell(SOLVING, 10, 30)  # those before were solved before a kill
    now += 90
    tell("solving block 11 of 30: fit, step", 60, 84)
    assert live.times() == "1:30"
    now += 30
    tell(SOLVING, 11, 30)
    assert live.times() == "2:00, about 38 min left"
    now += 60
    tell("solving block 12 of 30: layer", 3, 7)
    assert live.times() == "3:00, about 37 min left"
    tell(SOLVING, 30, 30)
    assert live.times() == "3:00"


def run_in_terminal(command: list[str]) -> str:
    """What a command writes to a real terminal of `WIDTH` columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, WIDTH, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=env | {"TERM": "xterm"}
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return plain(written.decode())


def test_a_run_in_a_real_terminal(pico_config: dict[str, Any], tmp_path: Path) -> None:
    path, out = tmp_path / "pico.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(pico_config))
    code = "from prunewright.graph.cli import main; main()"
    options = ["run", "-c", str(path), "-o", str(out)]
    text = run_in_terminal([sys.executable, "-c", code, *options])
    screen = text.replace("\r\n", "\n")
    rows = [row for line in screen.split("\n") for row in line.split("\r")]
    assert [row for row in rows if len(row) > WIDTH and " " in row.strip()[12:]] == []
    # The head is there before anything is loaded, and each phase is told as it begins.
    assert screen.index("target     30.0%") < screen.index("loading the model and the texts")
    assert re.search(r"step 1: calibration 0/4 ", screen)
    metrics = json.loads((out / "metrics.json").read_text())
    steps = [row for row in rows if re.match(r"step +\d+  +\d", row)]
    assert len(steps) == metrics["steps"]
    assert re.search(r"step 2 of about \d+: .* 0:\d\d, under 1 min left", screen)
    parts = [f"the end: {what}" for what in ("perplexity 0/3", "sample text", "saving the model")]
    assert [part for part in parts if part not in screen] == []
    assert "the end: profiling" not in screen
    assert metrics["revision"] in screen
