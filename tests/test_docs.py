"""README and docs: commands and snippets run on a tiny model, or say what they need."""

import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

import prunewright
from prunewright.graph.cli import app
from prunewright.state.config import AdaptOptions
from prunewright.state.study import load_comparison_config
from tests.conftest import make_pico

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = {"json", "text", "yaml"}
"""Languages of blocks that nobody is meant to run."""
NEEDS = ("needs a key", "needs the hub", "needs a server", "needs files", "slow")
"""What a command that is not run says of itself, in a comment before its block or on its line."""

WINDOWS = {"calibration": 4, "gradient": 2, "guard": 3, "test": 3, "length": 48}
QUICK = {
    "run": ["model=my-model", f"texts.windows={WINDOWS}", "dtype=float32", "device=cpu"],
    "evaluate": [],
}
QUICK["baseline"] = QUICK["run"]
QUICK["adapt"] = ["adapt.tokens=800"]
"""What each command is given before the page's own options, which win."""
FEW = ["--limit", "3"]


@dataclass(frozen=True)
class Block:
    """A block of code of a page, with its language and the comment before it."""

    page: Path
    line: int
    language: str
    code: str
    marker: str

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"

    def commands(self) -> Iterator[tuple[str, str]]:
        """Each command with its comment, continued lines joined."""
        for line in self.code.replace("\\\n", " ").splitlines():
            command, _, comment = line.partition("  #")
            if command.strip() and not command.lstrip().startswith("#"):
                command, _, close = command.partition(" # ")
                yield command.strip(), comment or close


def blocks(page: Path) -> list[Block]:
    """The blocks of a page; what is indented by four columns without a fence is a shell's."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found: list[Block] = []
    marker, at = "", 0
    while at < len(lines):
        line, begun = lines[at], at + 1
        if fence := re.fullmatch(r"( *)```(\w*)", line):
            end = lines.index(f"{fence[1]}```", at + 1)
            code = "\n".join(text.removeprefix(fence[1]) for text in lines[at + 1 : end])
            found.append(Block(page, begun, fence[2], code, marker))
            at = end
        elif re.match(r"( {4}|\t)", line) and not lines[at - 1].strip():
            end = at
            while end < len(lines) and re.match(r"( {4}|\t)", lines[end]):
                end += 1
            found.append(Block(page, begun, "bash", "\n".join(lines[at:end]), marker))
            at = end - 1
        if comment := re.fullmatch(r" *<!-- not tested: (.+) -->", line):
            marker = comment[1]
        elif lines[at].strip():
            marker = ""
        at += 1
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted: a model, a run, a baseline, the configs."""
    folder = tmp_path_factory.mktemp("docs")
    make_pico(folder / "my-model", max_position_embeddings=2048)
    shutil.copytree(ROOT / "configs", folder / "configs")
    shared = {
        "model": str(folder / "my-model"),
        "dtype": "float32",
        "device": "cpu",
        "texts": {"windows": WINDOWS},
        "target": 0.2,
    }
    prunewright.run(shared | {"agent": "greedy"}, folder / "runs" / "q4")
    prunewright.baseline(shared, folder / "runs" / "wanda")
    return folder


@pytest.fixture
def here(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("PRUNEWRIGHT_CACHE", str(checkout / "cache"))
    return checkout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_command_and_snippet_of_a_page_runs(
    page: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for block in blocks(page):
        assert block.language in SHOWN | {"bash", "python"}, block.where
        if block.marker:
            assert block.marker.startswith(NEEDS), block.where
        elif block.language == "python":
            run_snippet(block, here)
        elif block.language == "bash":
            for command, comment in block.commands():
                if not any(word in comment for word in NEEDS):
                    run_command(command, block, here, monkeypatch)


def run_snippet(block: Block, here: Path) -> None:
    """Run Python code on few short windows; code that begins with a file's name is that file."""
    if name := re.match(r"# (\w+\.py)\n", block.code):
        (here / name[1]).write_text(block.code, encoding="utf-8")
        return
    model = '"model": "./my-model"'
    code = block.code.replace(model, f'{model}, "device": "cpu", "texts": {{"windows": {WINDOWS}}}')
    for run in re.findall(r'out="(runs/\w+)"', code):
        shutil.rmtree(here / run, ignore_errors=True)
    exec(compile(code, block.where, "exec"), {"__name__": "__main__"})


def run_command(command: str, block: Block, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    while assigned := re.fullmatch(r"(\w+)=(.*)", words[0]):
        assert assigned[1] == "PYTHONPATH", block.where
        monkeypatch.syspath_prepend(str(here / assigned[2]))
        words = words[1:]
    what = f"{block.where}: {command}"
    if words[0] == "python":
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        return
    assert words[0] == "prunewright", f"{what}\nsay in a comment what it needs: {NEEDS}"
    name, given = words[1], words[2:]
    if name == "save":  # which the model's loss comes before
        shutil.rmtree(here / given[0] / "model")
    if name in ("run", "baseline") and "--out" in given:  # several pages begin it
        shutil.rmtree(here / given[given.index("--out") + 1], ignore_errors=True)
    before = [part for setting in QUICK.get(name, []) for part in ("--set", setting)]
    if "--task" in given:
        before += FEW
    result = CliRunner().invoke(app, [name, *before, *given])
    assert result.exit_code == 0, f"{what}\n{result.output}\n{result.exception!r}"


def test_a_block_that_is_not_run_must_say_why(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Words:\n\n    prunewright show x  # a run\n\n"
        "<!-- not tested: needs a key -->\n```bash\nmake \\\n    demo\n```\n\n"
        "- a list\n\n  ```python\n  print(1)\n  ```\n"
    )
    first, second, third = blocks(page)
    assert list(first.commands()) == [("prunewright show x", " a run")]
    assert (second.marker, list(second.commands())) == ("needs a key", [("make      demo", "")])
    assert (third.language, third.code, third.marker) == ("python", "print(1)", "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_keys_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`) *prunewright(?: --[\w-]+(?: info)?)* ([a-z]+)", text, re.M))
    assert named <= set(typer.main.get_command(app).commands)
    for key in re.findall(r"--set '?(?:base\.)?([\w.]+)=", text):
        found: Any = prunewright.PruneConfig(adapt=AdaptOptions()).model_dump()
        for part in key.split("."):
            if found == {}:  # options of an agent or an allocation
                break
            assert part in found, key
            found = found[part]


def test_the_comparison_that_docs_show_is_one(here: Path) -> None:
    (block,) = (b for b in blocks(ROOT / "docs" / "comparing.md") if b.language == "yaml")
    (here / "study.yaml").write_text(block.code)
    settled = load_comparison_config(here / "study.yaml", [])
    assert [m.name for m in settled.methods] == [
        m["name"] for m in yaml.safe_load(block.code)["methods"]
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_are_there_and_pictures_are_small(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
        if target.endswith((".svg", ".png")):
            assert (page.parent / target).stat().st_size < 200_000, target


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 9 * 1024


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_sentence_has_more_than_35_words(page: Path) -> None:
    text = re.sub(
        r"<!--.*?-->|^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S
    )
    parts = re.split(r"\n\s*\n|\n(?= *(?:[-*|#]|\d+\.) ?)", text)
    prose = [" ".join(part.split()) for part in parts if not re.match(r"\s*(\||    )", part)]
    sentences = [s for part in prose for s in re.split(r"(?<=[.!?])[)*]*\s", part)]
    assert [s for s in sentences if len(s.split()) > 35] == []


def test_the_graph_is_drawn_as_it_is() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "pictures" / "make.py"))
    drawn = (ROOT / "docs" / "pictures" / "graph.svg").read_text(encoding="utf-8")
    assert made["graph_svg"]() == drawn, "docs/pictures/graph.svg is old: make pictures"


def test_the_citation_names_this_version() -> None:
    citation: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == prunewright.__version__
