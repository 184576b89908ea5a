"""What the shell offers, and the help's examples."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from prunewright.graph.cli import _COMMANDS, app, completing
from prunewright.graph.cli.session import Session
from prunewright.state import load_config
from prunewright.tools.allocation import ALLOCATIONS
from prunewright.tools.criteria import CRITERIA


def test_what_is_offered_is_what_there_is() -> None:
    assert set(completing.ALLOCATIONS) == set(ALLOCATIONS)
    assert completing.criteria("") == [*CRITERIA, "import:"]
    assert completing.agents("gr") == ["greedy"]
    assert completing.patterns("2") == ["2:4"]


def test_every_offered_key_of_set_is_known() -> None:
    keys = completing.settings("")
    assert "texts.windows.guard=" in keys
    settled = load_config(None, None).model_dump()
    for key in keys:
        value = settled
        for part in key.removesuffix("=").split("."):
            assert part in value
            value = value[part]
    assert completing.settings("guard.max_t") == ["guard.max_total_increase="]


def test_run_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert completing.run_directories("") == []
    for name in ("runs/a", "runs/b", "runs/empty", "other/c"):
        Path(name).mkdir(parents=True)
        if "empty" not in name:
            Path(name, "config.yaml").touch()
    assert completing.run_directories("") == ["runs/a", "runs/b"]
    assert completing.run_directories("runs/b") == ["runs/b"]
    assert completing.run_directories("other/") == ["other/c"]
    assert completing.run_directories("/no/such/folder/") == []


def test_the_shell_is_answered_without_torch(tmp_path: Path) -> None:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: sys.stdout.write(str('torch' in sys.modules)))\n"
        "from prunewright.graph.cli import main; main()"
    )
    asked = {
        "_PRUNEWRIGHT_COMPLETE": "complete_bash",
        "COMP_WORDS": "prunewright baseline --allocation e",
        "COMP_CWORD": "3",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked
    )
    assert done.stdout.splitlines() == ["evolutionary", "False"], done.stderr


EXAMPLES = [example for _, _, examples in _COMMANDS.values() for example in examples]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_of_the_help_can_be_typed(example: str) -> None:
    name, *arguments = shlex.split(example.partition(" > ")[0])
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    above = group.context_class(group, obj=Session())
    group.commands[name].make_context(name, arguments, parent=above)
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "120"}).stdout
    assert f"prunewright {example}" in shown


def test_a_model_that_stands_by_itself_gets_a_hint() -> None:
    for command in ("run", "baseline", "plan"):
        result = CliRunner().invoke(app, [command, "tiny"], env={"COLUMNS": "120"})
        assert result.exit_code == 2
        assert "A model is named by -m: -m tiny" in result.stderr
