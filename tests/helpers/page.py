"""A run with a hostile reasoning and a rolled-back step, and a page taken apart."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from prunewright.graph import baseline, run
from prunewright.state import Decision, LayerDelta
from prunewright.state.review import Review
from prunewright.tools.store.rundir import RunDirectory

HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> "
    "</script><!-- {{ 7 * 7 }} \u2028\u2029 \x1b[2J\x07\x9b1m "
    "\u200b\u202eright to left \u05e9\u05dc\u05d5\u05dd " + "w" * 3000
)


class Hostile:
    """Prunes two layers a step with a reasoning that attacks the page; a delta too large once."""

    def decide(self, observation: Any) -> Decision:
        free = [layer for layer in observation.profile.layers if layer.sparsity < 0.5]
        return Decision(
            reasoning=HOSTILE if observation.step == 0 else f"step {observation.step + 1}, plain",
            layers=[LayerDelta(name=layer.name, delta=0.3) for layer in free[:4]],
        )


def make_runs(model: Path, directory: Path) -> tuple[Path, Path]:
    """A run of `Hostile`, whose second step is recorded as rolled back, and a uniform baseline."""
    windows = {"calibration": 4, "gradient": 2, "guard": 3, "test": 3, "length": 48}
    config = {
        "model": str(model),
        "dtype": "float32",
        "device": "cpu",
        "agent": "import:page:Hostile",
        "target": 0.3,
        "step": 0.2,
        "max_delta": 0.3,
        "guard": {"max_increase": 10.0},
        "criterion": "wanda",
        "reconstruct": True,
        "texts": {"windows": windows},
    }
    one, other = directory / "run <b>one", directory / "uniform"
    run(config, out=one)
    stored = RunDirectory(one)
    records = stored.read_trace()
    broken = {
        "verdict": "rolled_back",
        "reason": "perplexity rose by 30.0%",
        "change": 0.3,
        "sparsity": records[0].sparsity,
        "invalid_answers": [HOSTILE],
        "notes": [HOSTILE],
        "review": Review(verdict="edited", words=HOSTILE),
    }
    stored.write_trace([records[0], records[1].model_copy(update=broken), *records[2:]])
    baseline(config | {"allocation": "uniform"}, out=other)
    return one, other


class Page(HTMLParser):
    """Text, numbers, scripts and what a browser would load, of one page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.numbers: list[float] = []
        self.scripts: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.policy = ""
        self.text = ""
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self._open.append(tag)
        self.links += [values[key] for key in ("src", "href", "data", "action") if key in values]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        if tag == "data":
            self.numbers.append(float(values["value"]))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass
