"""report.html and comparison.html in a real browser: Debian's chromium, driven by Playwright."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comparisons import NAME, make_comparison
from page import make_runs
from playwright.sync_api import Browser, sync_playwright

from prunewright.graph import baseline
from prunewright.tools.report import write_report
from prunewright.tools.report.comparison import write_pages

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: apt-get install chromium"
)
WAIT = 240_000  # milliseconds; a busy machine takes long to draw


@pytest.fixture(scope="module")
def report(pico_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("page")
    return write_report(make_runs(pico_models(), directory), directory / "report.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Chromium's sandbox refuses root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments, timeout=WAIT)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser, report: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page as a device; ends with a look at what it complained of or asked for."""
    complaints: list[str] = []
    asked: list[str] = []
    opened: list[str] = []
    contexts = []

    def open_page(path: Path = report, **device: Any) -> Any:
        context = browser.new_context(**device)
        contexts.append(context)
        context.set_default_timeout(WAIT)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        opened.append(path.as_uri())
        page.wait_for_selector("body[data-drawn]", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert asked == opened


def test_one_step_has_two_ticks(
    opened: Callable[..., Any], pico_models: Callable[..., Path], tmp_path: Path
) -> None:
    windows = {"calibration": 1, "gradient": 1, "guard": 2, "test": 1, "length": 16}
    model = {"model": str(pico_models()), "dtype": "float32", "device": "cpu"}
    config = model | {"target": 0.2, "reconstruct": "none", "texts": {"windows": windows}}
    baseline(config, out=tmp_path / "run")
    page = opened(write_report([tmp_path / "run"], tmp_path / "report.html"))
    labels = page.locator("[data-chart=perplexity] svg .role-axis-label").first
    assert labels.locator("text").all_text_contents() == ["0", "1"]


def test_it_draws_filters_and_keeps_hostile_text_text(opened: Callable[..., Any]) -> None:
    page = opened(viewport={"width": 1100, "height": 800})
    charts = page.locator("figure[data-chart] svg")
    assert charts.count() == 5
    assert "rolled back" in page.locator("[data-chart=perplexity] svg").text_content()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert "<script>window.hacked" in page.locator("#decisions").text_content()

    rows = page.locator("#decisions article:visible")
    total = rows.count()
    page.fill("#filter-words", "STEP 3, plain")
    assert rows.count() == 1
    assert "step 3, plain" in rows.first.text_content()
    page.fill("#filter-words", "")
    page.select_option("#filter-verdict", "rolled_back")
    assert rows.count() == 1
    assert "rolled back" in rows.first.text_content()
    assert page.text_content("#filter-shown") == f"1 of {total} steps shown"
    page.select_option("#filter-verdict", "")
    assert rows.count() == total > 2

    heat = page.locator("[data-chart=heat] svg")
    before = heat.text_content()
    page.select_option("#heat-measure", "z_c")
    page.wait_for_function(
        "old => (document.querySelector('[data-chart=heat] svg') || {textContent: old})"
        ".textContent !== old",
        arg=before,
    )


def test_it_fits_a_phone_and_is_dark_where_the_device_is(opened: Callable[..., Any]) -> None:
    page = opened(viewport={"width": 360, "height": 740}, color_scheme="dark")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator("body").get_attribute("data-drawn") == "dark"
    # What is cut at the side scrolls, and a shadow says so.
    cut = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => e.scrollWidth > e.clientWidth + 1 &&"
        " ['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX))"
        ".map(e => [e.className, getComputedStyle(e).backgroundImage.includes('gradient')])"
    )
    assert cut
    assert all(hint == ["scroll", True] for hint in cut)

    def colour(verdict: str) -> str:
        path = f"article.{verdict} svg.map path"
        return str(page.evaluate(f"getComputedStyle(document.querySelector('{path}')).fill"))

    assert colour("accepted") != colour("rolled_back")
    marks = page.locator("[data-chart=perplexity] svg .mark-symbol path")
    assert len({mark.get_attribute("fill") for mark in marks.all()}) >= 2

    def lightness(script: str) -> float:
        """Mean of the red, green and blue of a computed colour."""
        words = page.evaluate(script)
        return sum(float(part) for part in words[words.index("(") + 1 : -1].split(",")[:3]) / 3

    back = lightness("getComputedStyle(document.body).backgroundColor")
    text = lightness("getComputedStyle(document.body).color")
    plot = lightness(
        "getComputedStyle(document.querySelector('[data-chart=sparsity] svg text')).fill"
    )
    assert back < 60 < 180 < min(text, plot)
    page.emulate_media(color_scheme="light")
    page.wait_for_selector("body[data-drawn=light]", state="attached")
    assert lightness("getComputedStyle(document.body).backgroundColor") > 200
    assert (
        lightness("getComputedStyle(document.querySelector('[data-chart=sparsity] svg text')).fill")
        < 90
    )


def test_a_comparison_draws_its_plots_on_a_phone_and_keeps_names_text(
    opened: Callable[..., Any], tmp_path: Path
) -> None:
    write_pages(make_comparison(), tmp_path)
    page = opened(tmp_path / "comparison.html", viewport={"width": 360, "height": 740})
    charts = page.locator("figure[data-chart] svg")
    assert charts.count() == 3
    for number in range(3):
        assert NAME[:30] in charts.nth(number).text_content()
    assert page.evaluate("window.hacked") is None
    assert page.locator("td code").count() == 3  # the settings of three methods, and no name's
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
