"""The pictures of the README: `make pictures`.

`graph.svg` is drawn from the compiled graph, `results.svg` from the table of docs/RESULTS.md.
`report.png` is a screenshot of the demo run's report.html, which needs Debian's chromium.
"""

import argparse
import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.sax.saxutils import escape

PICTURES = Path(__file__).resolve().parent
ROOT = PICTURES.parents[1]
CHROMIUM = shutil.which("chromium")
LARGEST = 200_000  # bytes; the README is read over slow lines, too

WORDS = {
    ("evaluate_ppl", "reflect"): "accepted",
    ("evaluate_ppl", "rollback"): "too much worse",
    ("reflect", "profile"): "the target is not reached yet",
}
"""What a conditional edge's condition is; edges without words are drawn without."""

INK, LINE, FILL = "#1b1b1f", "#55556a", "#eef2fb"
WIDTH, HEIGHT, GAP, DROP = 112, 42, 34, 84


def graph_svg() -> str:
    """The compiled graph as a drawing: a column a step, detours one row lower, ways back above."""
    from prunewright.graph.builder import build_graph

    drawn = build_graph().get_graph()
    following: dict[str, list[str]] = defaultdict(list)
    for edge in drawn.edges:
        following[edge.source].append(edge.target)
    back = _ways_back(following, "__start__")
    column = dict.fromkeys(drawn.nodes, 0)
    for _ in drawn.nodes:  # longest way from the start; as many rounds as nodes are enough
        for source, target in ((s, t) for s in following for t in following[s]):
            if (source, target) not in back:
                column[target] = max(column[target], column[source] + 1)
    # A node that an edge passes by lies below that edge.
    lower = {
        name
        for name in drawn.nodes
        if any(
            name in following[s] and t in following[name] for s in following for t in following[s]
        )
    }
    widths = {n: 24 if n.startswith("__") else WIDTH for n in drawn.nodes}
    left, x = {}, 12.0
    for index in range(max(column.values()) + 1):
        here = [name for name in drawn.nodes if column[name] == index]
        left |= dict.fromkeys(here, x)
        x += max(widths[name] for name in here) + GAP
    middle = {name: 78 + (DROP if name in lower else 0) for name in drawn.nodes}
    parts = []
    for edge in drawn.edges:
        source, target = edge.source, edge.target
        begin, end = left[source] + widths[source], left[target]
        y, z = middle[source], middle[target]
        label = (begin + end) / 2, (y + z) / 2 - 7, "middle"
        if (source, target) in back:
            begin, end = left[source] + widths[source] / 2, left[target] + widths[target] / 2
            top = y - HEIGHT / 2
            path = (
                f"M{begin} {top}V34Q{begin} 24 {begin - 10} 24"
                f"H{end + 10}Q{end} 24 {end} 34V{top - 2}"
            )
            label = (begin + end) / 2, 17, "middle"
        elif y == z:
            path = f"M{begin} {y}H{end - 2}"
        elif z > y:  # down into a detour
            at = left[source] + widths[source] / 2
            path = f"M{at} {y + HEIGHT / 2}V{z - 10}Q{at} {z} {at + 10} {z}H{end - 2}"
            label = at - 8, z - 22, "end"
        else:  # up again
            at = left[target] + widths[target] / 2
            path = f"M{begin} {y}H{at - 10}Q{at} {y} {at} {y - 10}V{z + HEIGHT / 2 + 2}"
        dashes = ' stroke-dasharray="5 4"' if edge.conditional else ""
        parts.append(f'<path d="{path}" marker-end="url(#tip)"{dashes}/>')
        if words := WORDS.get((source, target), ""):
            x0, y0, anchor = label
            parts.append(
                f'<text x="{x0}" y="{y0}" text-anchor="{anchor}" class="small">'
                f"{escape(words)}</text>"
            )
    for name in drawn.nodes:
        centre, y = left[name] + widths[name] / 2, middle[name]
        if name.startswith("__"):
            parts.append(f'<circle cx="{centre}" cy="{y}" r="12" class="node"/>')
            if name == "__end__":
                parts.append(f'<circle cx="{centre}" cy="{y}" r="7" fill="{LINE}"/>')
            parts.append(
                f'<text x="{centre}" y="{y + 30}" text-anchor="middle" class="small">'
                f"{name.strip('_')}</text>"
            )
            continue
        parts.append(
            f'<rect x="{left[name]}" y="{y - HEIGHT / 2}" width="{WIDTH}" height="{HEIGHT}" rx="8" '
            f'class="node"/><text x="{centre}" y="{y + 5}" text-anchor="middle">'
            f"{escape(name)}</text>"
        )
    wide, high = x - GAP + 12, 78 + DROP + HEIGHT / 2 + 12
    names = ", ".join(name for name in drawn.nodes if not name.startswith("__"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" '
        f'height="{high}" role="img" aria-label="The graph of a run: {escape(names)}">\n'
        f"<style>text{{font:14px system-ui,sans-serif;fill:{INK}}}.small{{font-size:12.5px}}"
        f".node{{fill:{FILL};stroke:{LINE}}}path{{fill:none;stroke:{LINE};stroke-width:1.4}}"
        "</style>\n"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        f'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" style="fill:{LINE};stroke:none"/>'
        "</marker></defs>\n"
        f'<rect width="{wide}" height="{high}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _ways_back(following: dict[str, list[str]], start: str) -> set[tuple[str, str]]:
    """The edges that lead back to a node on the way from the start."""
    found: set[tuple[str, str]] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        for target in following[name]:
            if target in way:
                found.add((name, target))
            else:
                walk(target, (*way, target))

    walk(start, (start,))
    return found


def results() -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Perplexities over sparsity, by text and method, as docs/RESULTS.md has them.

    Raises:
        SystemExit: the table is not there.
    """
    page = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    table = re.search(r"^\| sparsity \| method \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    if table is None:
        raise SystemExit("docs/RESULTS.md has no table with the columns sparsity and method")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[1].splitlines()]
    found: dict[str, dict[str, list[tuple[float, float]]]] = {"WikiText-2": {}, "C4": {}}
    dense = rows[0]
    for row in rows[1:]:
        for column, text in ((2, "WikiText-2"), (3, "C4")):
            start = [(0.0, float(dense[column]))]
            points = found[text].setdefault(row[1].replace("`", ""), start)
            points.append((float(row[0].rstrip(" %")), float(row[column].split()[0])))
    return found


def results_svg() -> str:
    """The plot of `results`."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "prunewright", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axes, (text, methods) in zip(both, results().items(), strict=True):
        styles = zip(("s--", "o-"), ("#b35900", "#0068b3"), strict=True)
        for (style, colour), (method, points) in zip(styles, methods.items(), strict=True):
            axes.plot(*zip(*points, strict=True), style, color=colour, label=method)
        dense = next(iter(methods.values()))[0][1]
        axes.axhline(dense, color="black", linewidth=0.8, linestyle=":", label="dense")
        axes.set_yscale("log")
        ticks = [tick for tick in (25, 40, 50, 100, 200) if tick > 0.95 * dense]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_title(text, fontsize=11)
        axes.set_xlabel("sparsity, per cent")
        axes.grid(alpha=0.3)
    both[0].set_ylabel("perplexity, logarithmic")
    both[0].legend(frameon=False)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"[ \t]+$", "", drawn.getvalue(), flags=re.MULTILINE)


def take_screenshot(report: Path, picture: Path) -> None:
    """The top of a run's report.html, in light mode, with 256 colours.

    Raises:
        SystemExit: the picture is too large.
    """
    from PIL import Image
    from playwright.sync_api import sync_playwright

    # Chromium's sandbox refuses root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        context = browser.new_context(
            viewport={"width": 1200, "height": 1000}, color_scheme="light"
        )
        page = context.new_page()
        page.goto(report.resolve().as_uri())
        page.wait_for_selector("body[data-drawn]", state="attached", timeout=240_000)
        shot = page.screenshot()
        browser.close()
    image = Image.open(io.BytesIO(shot)).convert("RGB").quantize(256)
    drawn = io.BytesIO()
    image.save(drawn, "PNG", optimize=True)
    if drawn.tell() > LARGEST:
        raise SystemExit(f"the screenshot has {drawn.tell():,} bytes, more than {LARGEST:,}")
    picture.write_bytes(drawn.getvalue())


def demo_page(given: Path | None) -> Path:
    """The page of a demo run in ``runs/demo`` of this folder, by this version.

    Args:
        given: a finished run; None takes that of `make demo`, by `greedy`, with a control.
    """
    from prunewright import load_config, run
    from prunewright.tools.report import write_report

    directory = Path("runs", "demo")
    if given is None:
        demo = ROOT / "configs" / "demo.yaml"
        run(load_config(demo, agent="greedy", with_control=True), out=directory)
    else:
        shutil.copytree(given, directory, ignore=shutil.ignore_patterns("model"))
    return write_report([directory], directory / "report.html")


def main() -> None:
    """The entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", type=Path, help="directory of a finished demo run; default: a new one, in minutes"
    )
    given: Path | None = parser.parse_args().run
    (PICTURES / "graph.svg").write_text(graph_svg(), encoding="utf-8")
    (PICTURES / "results.svg").write_text(results_svg(), encoding="utf-8")
    if CHROMIUM is None:
        raise SystemExit(
            "graph.svg and results.svg are made. The screenshot of report.html needs chromium, and "
            "there is none: apt-get install chromium"
        )
    with tempfile.TemporaryDirectory() as scratch:
        given = given and given.resolve()
        with contextlib.chdir(scratch):  # the page names the run's directory
            take_screenshot(demo_page(given), PICTURES / "report.png")
    sys.stdout.write(f"graph.svg, results.svg and report.png are in {PICTURES}\n")


if __name__ == "__main__":
    main()
