"""Benchmarks run on tiny models through their command lines, and print what can be checked."""

import math
import re
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def rows_of(printed: str, head: str) -> list[list[str]]:
    """The cells of the Markdown table that begins with a word, without its head."""
    lines = printed.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith(f"| {head} |"))
    rows = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def number(cell: str) -> float:
    found = re.match(r"[\d.e+-]+", cell)
    assert found is not None, cell
    return float(found[0])


def run_benchmark(
    name: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    return capsys.readouterr().out


def test_each_ratio_of_the_gpu_benchmark_is_that_of_the_numbers_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--size", "tiny", "--device", "cpu", "--folder", str(tmp_path)]
    printed = run_benchmark("gpu.py", words, monkeypatch, capsys)
    bare = {name: number(seconds) for name, seconds in rows_of(printed, "bare part")}
    assert all(0 < seconds < math.inf for seconds in bare.values())
    steps = [[number(cell) for cell in row[1:]] for row in rows_of(printed, "step, seconds")]
    ratios = {what: (number(a), number(b), number(c)) for what, a, b, c, _ in
              rows_of(printed, "what")}  # fmt: skip
    assert len(ratios) == 7
    for value, least, ratio in ratios.values():
        assert 0 < value < math.inf
        assert ratio == pytest.approx(value / least, rel=0.01)
    needed = bare["forward"] + bare["backward"] / 3 + bare["guard"] + bare["masks"]
    mean = sum(map(sum, steps[1:])) / 3
    assert ratios["a step"][:2] == pytest.approx((mean, needed), rel=0.01)
    assert ratios["first profile, with loading"][0] == steps[0][0]
    assert ratios["the end"][1] == pytest.approx(bare["writing"] + bare["reading"], rel=0.01)
    assert list(tmp_path.iterdir()) == []
