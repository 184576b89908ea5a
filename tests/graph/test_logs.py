"""What an operator reads: levels, JSON lines, and a terminal that a progress bar shares."""

import io
import json
import logging
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from loopback import FakeGemini
from typer.testing import CliRunner, Result

from prunewright.graph import run
from prunewright.graph.cli import app
from prunewright.graph.cli.screen.lines import Screen
from prunewright.graph.cli.screen.live import Live
from prunewright.graph.running.logs import LOGGER, logging_to_stderr


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def records(text: str) -> list[dict[str, Any]]:
    """The JSON objects of a text that holds one a line and nothing else."""
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def config_file(pico_config: dict[str, Any], gemini: FakeGemini, tmp_path: Path) -> Path:
    """A run that asks the loopback Gemini, which has no time for its second step at first."""
    gemini.script = [gemini.sensible, gemini.error(429, f"too much of {gemini.key}")]
    gemini.otherwise = gemini.sensible
    asking = {"timeout": 30, "wait": 0.01}
    options = {"agent": gemini.agent, "agent_options": gemini.options(), "asking": asking}
    path = tmp_path / "pico.yaml"
    path.write_text(yaml.safe_dump(pico_config | options))
    return path


def test_json_lines_tell_the_whole_run(
    config_file: Path, gemini: FakeGemini, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    began = datetime.now(UTC)
    result = invoke("--log-json", "--log-level", "INFO", "run", "-c", config_file, "-o", out)
    assert result.exit_code == 0
    told = records(result.stderr)

    times = [datetime.fromisoformat(line["time"]) for line in told]
    assert times == sorted(times)
    assert all(time.utcoffset() == timedelta(0) for time in times)
    assert began - timedelta(seconds=1) <= times[0] <= times[-1] <= datetime.now(UTC)
    assert {(line["logger"], line["run"]) for line in told} == {("prunewright", str(out))}
    config = yaml.safe_load(config_file.read_text())
    named = {name: config[name] for name in ("model", "agent", "target")}
    assert named.items() <= told[0].items()
    assert (told[-1]["status"], told[-1]["level"]) == ("target_reached", "info")

    trace = [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()]
    nodes = ["profile", "agent_decide", "apply_prune", "evaluate_ppl", "reflect"]
    ended = [line for line in told if "seconds" in line and "node" in line]
    assert [(line["step"], line["node"]) for line in ended] == [
        *((number, node) for number in range(1, len(trace) + 1) for node in nodes),
        (len(trace), "finish"),
    ]
    verdicts = [line["verdict"] for line in ended if line["node"] == "reflect"]
    assert verdicts == [record["verdict"] for record in trace]
    assert any(str(out / "model") in line["message"] for line in told)

    (retry,) = [line for line in told if line["level"] == "warning"]
    assert (retry["step"], retry["node"]) == (2, "agent_decide")
    assert "429" in retry["message"]
    assert "[redacted]" in retry["message"]
    assert gemini.key not in result.stderr


def test_a_rollback_is_told_with_its_reason(pico_config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "pico.yaml"
    path.write_text(yaml.safe_dump(pico_config | {"guard": {"max_increase": 1e-9}}))
    options = ["-s", "max_steps=3", "-s", "max_delta=0.9", "-s", "step=0.3"]
    result = invoke("--log-level", "info", "run", "-c", path, "-o", tmp_path / "run", *options)
    trace = [json.loads(line) for line in (tmp_path / "run/trace.jsonl").read_text().splitlines()]
    reasons = [record["reason"] for record in trace if record["verdict"] == "rolled_back"]
    told = re.findall(r"INFO +rollback took [\d.]+ s: back at revision \w+: (.*)", result.stderr)
    assert reasons
    assert told == reasons


def test_levels_and_what_is_heard_without_asking(
    config_file: Path, gemini: FakeGemini, tmp_path: Path
) -> None:
    quiet = invoke("run", "-c", config_file, "-o", tmp_path / "one", "-t", "0.2")
    (line,) = quiet.stderr.splitlines()
    assert line.startswith(f"{gemini.agent}: try 1 failed:")
    assert gemini.key not in quiet.output
    assert "INFO" not in quiet.output

    debug = ["--log-level", "debug", "--log-json"]
    options = ["-c", config_file, "-o", tmp_path / "two", "-t", "0.1", "--json"]
    told = records(invoke(*debug, "run", *options).stderr)
    assert any("answered in" in line["message"] for line in told if line["level"] == "debug")
    assert any("activations: 0 of 4" in line["message"] for line in told)
    # Nothing of that stays behind in the process.
    assert not any("logs" in type(h).__module__ for h in logging.getLogger().handlers)


def test_errors_are_json_lines_too(config_file: Path, tmp_path: Path) -> None:
    failed = invoke("--log-json", "run", "-c", config_file, "--target", "3")
    assert failed.exit_code == 2
    (line,) = records(failed.stderr)
    assert line["level"] == "error"
    assert "3 % is 0.03" in line["message"]
    options = ["-s", "max_steps=1", "-a", "greedy", "-o", tmp_path / "run", "--json"]
    early = invoke("--log-json", "run", "-c", config_file, *options)
    assert early.exit_code == 3
    (line,) = records(early.stderr)
    assert (line["level"], line["message"][:24]) == ("warning", "Ended before the target:")
    assert json.loads(early.stdout)["status"] == "max_steps"


def test_the_words_of_an_error_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr("info", as_json=False, libraries=logging.ERROR):
        try:
            raise ValueError("of a model\x1b[2J\u202e")
        except ValueError:
            logging.getLogger("prunewright").exception("it failed")
    told = capsys.readouterr().err
    assert r"ValueError: of a model\x1b[2J\u202e" in told
    assert "Traceback" in told
    assert "\x1b" not in told


def test_a_library_says_nothing_unasked_and_is_heard_by_the_applications_handler(
    pico_config: dict[str, Any],
    gemini: FakeGemini,
    config_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    code = (
        "import logging\n"
        "import prunewright.state\n"
        f"logging.getLogger({LOGGER!r}).warning('not to be heard')\n"
        "assert not logging.getLogger().handlers\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    with caplog.at_level("INFO", LOGGER):
        run(config_file, out=tmp_path / "run")
    assert {"profile", "agent_decide", "reflect"} <= {
        getattr(record, "node", None) for record in caplog.records
    }


class Terminal(io.StringIO):
    """A terminal wide enough, which does what a progress bar asks of one."""

    def isatty(self) -> bool:
        return True

    def rows(self) -> list[str]:
        """What stands on it."""
        rows, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|.|\n", self.getvalue()):
            if part == "\n":
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            elif part == "\r":
                column = 0
            elif part.endswith("A") and len(part) > 1:
                row -= int(part[2:-1] or 1)
            elif part == "\x1b[2K":
                rows[row] = ""
            elif len(part) == 1:
                rows[row] = rows[row].ljust(column)[:column] + part + rows[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in rows]


def test_log_lines_do_not_tear_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    log = logging.getLogger(LOGGER)
    words = [f"message {number} \x1b[31m of a model\nand more" for number in range(20)]
    with logging_to_stderr("info", as_json=False, libraries=logging.ERROR):
        screen = Screen()
        with Live(screen) as live:
            for number, message in enumerate(words):
                live.progress("activations", number, 20)
                screen.line(f"screen {number}")
                log.info(message)
    rows = [row for row in terminal.rows() if row]
    assert rows[0::2] == [f"screen {number}" for number in range(20)]
    stamp = r"\d{4}-\d\d-\d\d [\d:,]+ INFO    "
    for number, row in enumerate(rows[1::2]):
        assert re.fullmatch(rf"{stamp}message {number} \\x1b\[31m of a model\\nand more", row), row
    # While standard error is a file, the lines are in it and not on the terminal.
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    before = len(terminal.getvalue())
    with logging_to_stderr(None, as_json=False, libraries=logging.ERROR), Live(Screen()):
        log.warning("for the file")
    assert file.getvalue() == "for the file\n"
    assert "for the file" not in terminal.getvalue()[before:]
