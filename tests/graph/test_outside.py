"""A criterion, an allocation and a signal from outside: CONTRIBUTING's, run as they stand there."""

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loopback import FakeGemini
from safetensors.torch import load_file

from prunewright.graph import baseline, run
from prunewright.graph.agents import check_agent, make_agent, resolve_agent
from prunewright.graph.running.study import plan_experiments
from prunewright.state import InputError, PruneContext, PruneRequest
from prunewright.state.study import validate_comparison
from prunewright.tools import load_trace
from prunewright.tools.criteria import CRITERIA
from prunewright.tools.report import write_report
from prunewright.tools.signals import SIGNALS, find_signals
from prunewright.tools.study import Digests

TEXT = Path(__file__).parents[2] / "CONTRIBUTING.md"
ENTRY_POINTS = """
[prunewright.criteria]
relative = relative:RELATIVE
[prunewright.allocations]
mlp_first = mlp_first:MLP_FIRST
[prunewright.signals]
tails = tails:TAILS
[prunewright.agents]
patient = patient:Patient
"""
PATIENT = """
from prunewright.state import Decision


class Patient:
    def decide(self, observation):
        return Decision(reasoning="Later.", layers=[])
"""
BROKEN = """
from prunewright.tools.criteria import Criterion
from prunewright.tools.signals import Signal

SHORT = Criterion("row", lambda weight, statistics: weight.float().abs()[:, 1:])
WORDS = Signal("z_words", lambda found: "high", "words", "words")
TAKEN = Signal("z_s", lambda found: 1.0, "s", "s")
COLUMN = Signal("z_sparsity", lambda found: 1.0, "s", "s")
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with CONTRIBUTING's modules, as an installed package has them."""
    folder = tmp_path / "site"
    (folder / "mine-1.0.dist-info").mkdir(parents=True)
    modules = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", TEXT.read_text(), re.DOTALL))
    assert modules.keys() == {"relative", "mlp_first", "tails"}
    modules |= {"patient": PATIENT, "broken_outside": BROKEN}
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "mine-1.0.dist-info" / "METADATA").write_text("Name: mine\nVersion: 1.0\n")
    (folder / "mine-1.0.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in modules:
        sys.modules.pop(name, None)


def dense_and_pruned(config: dict[str, Any], directory: Path) -> list[tuple[str, Any, Any]]:
    """The weights of each prunable layer before and after."""
    dense, pruned = (
        {name: w.float().numpy() for name, w in load_file(path / "model.safetensors").items()}
        for path in (Path(config["model"]), directory / "model")
    )
    return [(name, dense[name], pruned[name]) for name in sorted(dense) if "_proj." in name]


@pytest.mark.parametrize(
    ("criterion", "allocation"),
    [
        ("import:relative:RELATIVE", "import:mlp_first:MLP_FIRST"),
        ("relative", "mlp_first"),
    ],
)
def test_a_baseline_prunes_by_a_criterion_and_an_allocation_from_outside(
    pico_config: dict[str, Any], outside: Path, tmp_path: Path, criterion: str, allocation: str
) -> None:
    config = pico_config | {
        "criterion": criterion,
        "allocation": allocation,
        "allocation_options": {"more": 0.2},
    }
    result = baseline(config, out=tmp_path / "run")
    layers = dense_and_pruned(config, result.directory)
    assert len(layers) == 14
    sizes = {name: dense.size for name, dense, _ in layers}
    total = sum(sizes.values())
    mlp = sum(size for name, size in sizes.items() if ".mlp." in name)
    attention = 0.3 - 0.2 * mlp / total
    zeros = 0
    for name, dense, pruned in layers:
        wanted = sizes[name] * (attention + 0.2 * (".mlp." in name))
        count = int((pruned == 0).sum())
        assert abs(count - wanted) <= 1, name
        zeros += count
        size = np.abs(dense.astype(np.float64))
        scores = size / size.sum(axis=1, keepdims=True) + size / size.sum(axis=0, keepdims=True)
        lowest = np.argsort(scores, axis=None)[:count]
        assert set(np.flatnonzero(pruned == 0)) == set(lowest), name
        assert (pruned[pruned != 0] == dense[pruned != 0]).all()
    assert zeros == int(0.3 * total)
    assert result.metrics.method["criterion"] == criterion


@pytest.mark.parametrize("name", ["import:tails:TAILS", "tails"])
def test_a_signal_from_outside_is_measured_shown_and_kept(
    pico_config: dict[str, Any], gemini: FakeGemini, outside: Path, tmp_path: Path, name: str
) -> None:
    gemini.otherwise = gemini.sensible
    config = pico_config | {
        "agent": gemini.agent,
        "agent_options": gemini.options(),
        "signals": ["z_g", "z_c", name],
        "guard": {"max_increase": 1e9},
        "max_steps": 1,
    }
    result = run(config, out=tmp_path / "run")
    found = {}
    for key, dense, _ in dense_and_pruned(config, result.directory):
        centred = dense.astype(np.float64) - dense.astype(np.float64).mean()
        found[key.removesuffix(".weight")] = (centred**4).mean() / (centred**2).mean() ** 2
    values = np.array(list(found.values()))
    expected = dict(zip(found, (values - values.mean()) / values.std(), strict=True))

    asked = gemini.received[0]
    text = asked.turns[0][1]
    assert "name | share | sparsity | z_g | z_c | z_tails | cost at" in text
    for row in asked.table:
        z = expected[f"model.layers.{row['name']}"]
        assert float(row["z_tails"]) == pytest.approx(z, abs=0.0051)
    assert "\n- z_tails: z-score of the kurtosis of the weights. Negative:" in asked.system
    profiles = load_trace(result.directory).profiles.set_index("layer")
    for layer, value in found.items():
        assert profiles.loc[layer, "tails"] == pytest.approx(value, rel=1e-9)
        assert profiles.loc[layer, "z_tails"] == pytest.approx(expected[layer], abs=1e-5)
        assert {"z_s", "z_g", "z_c", "s", "g", "c"} <= set(profiles.columns)

    # Whoever only looks at the run runs none of its code.
    (outside / "tails.py").write_text("raise SystemExit('this was run')")
    sys.modules.pop("tails", None)
    write_report([result.directory], tmp_path / "report.html")
    assert (
        '<option value="z_tails">z_tails, z-score</option>'
        in (tmp_path / "report.html").read_text()
    )


def test_a_run_does_not_go_on_with_another_code_of_its_criterion(
    pico_config: dict[str, Any], outside: Path, tmp_path: Path
) -> None:
    config = pico_config | {"criterion": "import:relative:RELATIVE", "max_steps": 1}
    directory = run(config, out=tmp_path / "run").directory
    path = outside / "relative.py"
    path.write_text(path.read_text().replace("dim=1", "dim=0"))
    command = f"import sys; sys.path.insert(0, {str(outside)!r}); " + (
        "from prunewright.graph.cli import main; main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", command, "resume", str(directory), "--set", "max_steps=2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "its code is no longer what it began with (criterion was" in " ".join(
        ended.stderr.split()
    )


def test_experiments_of_a_comparison_follow_from_code_from_outside(
    pico_config: dict[str, Any], outside: Path
) -> None:
    base = {k: v for k, v in pico_config.items() if k not in ("target", "agent")}
    config = validate_comparison(
        {
            "base": base | {"criterion": "relative"},
            "methods": [
                {"name": "even"},
                {"name": "mlp", "settings": {"allocation": "mlp_first"}},
                {"name": "llm", "settings": {"agent": "zscore", "signals": ["tails"]}},
            ],
            "evaluation": {"texts": [{"name": "own", "source": "embedded", "windows": 2}]},
        }
    )

    def keys() -> dict[str, str]:
        return {cell.method.name: cell.key for cell in plan_experiments(config, Digests())}

    before = keys()
    for module, changed in (
        ("mlp_first", {"mlp"}),
        ("tails", {"llm"}),
        ("relative", {"even", "mlp", "llm"}),
    ):
        path = outside / f"{module}.py"
        path.write_text(path.read_text() + "\n")
        now = keys()
        assert {name for name in now if now[name] != before[name]} == changed, module
        before = now


def test_an_agent_of_an_installed_package_is_named_shortly(outside: Path) -> None:
    context = PruneContext(agent="patient")
    assert check_agent(context).why == "the user's own class"
    assert type(make_agent(context)[1]).__name__ == "Patient"
    with pytest.raises(InputError, match="did you mean patient"):
        resolve_agent("patiant")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wandaa", "unknown criterion 'wandaa'; did you mean wanda?; known: magnitude, wanda"),
        ("relativ", "did you mean relative?"),
        ("import:relative", "not of the form import:package.module:name"),
        ("import:relative:ABSOLUTE", "AttributeError"),
        ("import:no_such_module:X", "is its folder on PYTHONPATH?"),
        ("import:relative:score", "is no prunewright.tools.criteria.Criterion"),
    ],
)
def test_a_criterion_that_cannot_be_used_is_refused_before_anything_is_loaded(
    outside: Path, tmp_path: Path, name: str, words: str
) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        baseline({"model": "no/such-model", "criterion": name}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "z_t",
            "unknown signal 'z_t'; did you mean z_s?; known: z_s, z_g, z_c, z_k, tails, import:",
        ),
        ("import:broken_outside:SHORT", "is no prunewright.tools.signals.Signal"),
        ("import:broken_outside:TAKEN", "has the name z_s of another one"),
        ("import:broken_outside:COLUMN", "cannot be called z_sparsity"),
    ],
)
def test_a_signal_that_cannot_be_used_is_refused_before_anything_is_loaded(
    outside: Path, name: str, words: str
) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        run({"model": "no/such-model", "agent": "greedy", "signals": [name]})


def test_what_code_from_outside_gives_is_checked(
    pico_config: dict[str, Any], outside: Path, tmp_path: Path
) -> None:
    config = pico_config | {"criterion": "import:broken_outside:SHORT"}
    with pytest.raises(InputError, match=r"asked for was a tensor of the shape \(\d+, 32\)"):
        baseline(config, out=tmp_path / "scores")
    config = pico_config | {"signals": ["import:broken_outside:WORDS"]}
    with pytest.raises(InputError, match=r"is 'high' for model\.layers\.0"):
        run(config, out=tmp_path / "signal")
    text = (outside / "mlp_first.py").read_text()
    for code, words in (
        ("dict.fromkeys(bench.loaded.layers, 1)", "comes to 14 zeros, and the target to"),
        ("{}", "must give each layer of the model a count"),
        ("dict.fromkeys(bench.loaded.layers, 10**9)", "a whole number from 0 to"),
    ):
        sys.modules.pop("mlp_first", None)
        changed = text.replace("layer_counts(bench, wanted)", f"Allotment({code}, [])")
        (outside / "counts.py").write_text(changed)
        sys.modules.pop("counts", None)
        importlib.invalidate_caches()
        with pytest.raises(InputError, match=words):
            baseline(
                pico_config | {"allocation": "import:counts:MLP_FIRST"}, out=tmp_path / words[:4]
            )
    sys.modules.pop("counts", None)


def test_a_signal_comes_once_and_in_the_order_it_is_named(outside: Path) -> None:
    names = [s.name for s in find_signals(["z_c", "tails", "z_s", "z_c"])]
    assert names == ["z_c", "z_tails", "z_s"]


def test_what_the_configuration_names_is_all_that_there_is() -> None:
    assert PruneRequest.model_fields["criterion"].examples == list(CRITERIA)
    assert [*PruneContext().signals, "z_k"] == list(SIGNALS)
