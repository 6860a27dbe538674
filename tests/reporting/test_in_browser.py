"""Reports in a real browser, of a run and of a sweep of a hundred: ``apt install chromium``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_gather import make_run

from browser import CHROMIUM, Browser
from litdiffusion.report import rank
from litdiffusion.reporting.found import find_runs
from litdiffusion.reporting.gather import gather
from litdiffusion.reporting.page import write_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium"),
]

INPUT = """(() => {{ const found = document.getElementById({id!r}); found.value = {value!r};
found.dispatchEvent(new Event('input')); found.dispatchEvent(new Event('change')); }})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 runs, of which one failed and one is damaged."""
    folder = tmp_path_factory.mktemp("sweep")
    rows = ["job,status,schedule,loss,seed,run_dir,reason"]
    for job in range(100):
        schedule, loss, seed = ("linear", "cosine")[job % 2], ("l1", "l2")[job // 2 % 2], job // 4
        typed = f"schedule={schedule} loss={loss} seed={seed}"
        if job != 7:
            make_run(folder / str(job), rows=300, typed=typed, schedule={"_target_": schedule}, seed=seed)
        rows.append(f"{job},{'failed' if job == 7 else 'finished'},{schedule},{loss},{seed},{job},")
    (folder / "8/metrics.csv").write_text("<b>\n1")
    (folder / "sweep.csv").write_text("\n".join([*rows, ""]))
    write_page(folder / "report.html", "a sweep", gather(find_runs([folder]), rank))
    return folder / "report.html"


def type_into(browser: Browser, name: str, value: object) -> None:
    browser.evaluate(INPUT.format(id=name, value=str(value)))
    browser.settle()


def click(browser: Browser, selector: str) -> None:
    browser.evaluate(f"document.querySelector({selector!r}).click()")
    browser.settle()


def ask(browser: Browser, selector: str, what: str) -> Any:
    return browser.evaluate(f"document.querySelector({selector!r}).{what}")


def ink(browser: Browser, chart: str) -> Any:
    """What a chart shows; it is scrolled to, since only charts in view are drawn."""
    canvas = f"document.querySelector('#curves [data-chart=\"{chart}\"] canvas')"
    browser.evaluate(f"{canvas}.scrollIntoView({{block: 'center'}})")
    for _ in range(3):
        browser.settle()
    return browser.evaluate(f"{canvas}.toDataURL()")


def show(browser: Browser, page: Path, width: int) -> None:
    browser.requests.clear()
    browser.resize(width)
    browser.open(page)


def require_quiet(browser: Browser, page: Path) -> None:
    assert browser.errors == [], browser.errors
    assert {url for url in browser.requests if not url.startswith("data:")} == {page.as_uri()}


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which", ["run", "sweep"])
def test_it_fits_the_screen_and_fetches_nothing(
    browser: Browser, trained: Path, sweep: Path, which: str, width: int
) -> None:
    page = trained / "report.html" if which == "run" else sweep
    show(browser, page, width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    sections = {"setup", "curves", "levels", "samples", "reverse", "quality", "throughput", "provenance"}
    of_many = {"runs", "choices", "differences"}
    found = set(browser.evaluate("[...document.querySelectorAll('section')].map((each) => each.id)"))
    assert found >= (sections if which == "run" else of_many | sections - {"setup", "reverse"})
    assert ink(browser, "val/loss" if which == "run" else "train/loss")
    require_quiet(browser, page)


def test_sliders_and_toggles_of_a_run(browser: Browser, trained: Path) -> None:
    page = trained / "report.html"
    show(browser, page, 1280)
    shown = ask(browser, "#pair img", "src")
    type_into(browser, "reverse-step", 0)
    assert ask(browser, "#pair figcaption", "textContent") == "x_t at t = 1.00"
    assert ask(browser, "#pair img", "src") != shown
    chart = ink(browser, "val/loss")
    for act in (
        lambda: click(browser, "#curves [data-chart='val/loss'] button"),
        lambda: click(browser, "#steps"),
        lambda: click(browser, "#theme"),
    ):
        act()
        before, chart = chart, ink(browser, "val/loss")
        assert chart != before
    require_quiet(browser, page)


def test_hover_zoom_and_smoothing(browser: Browser, sweep: Path) -> None:
    show(browser, sweep, 1280)
    before = ink(browser, "train/loss")
    type_into(browser, "smooth", 20)
    smooth = ink(browser, "train/loss")
    assert smooth != before
    box = "document.querySelector('#curves [data-chart=\"train/loss\"] canvas').getBoundingClientRect()"
    left, top = browser.evaluate(f"[{box}.left, {box}.top]")
    browser.mouse("mouseMoved", left + 150, top + 80)
    browser.settle()
    assert "images seen" in ask(browser, "#tip", "textContent")
    browser.mouse("mousePressed", left + 100, top + 80)
    for across in (120, 160, 200):
        browser.mouse("mouseMoved", left + across, top + 80)
    browser.mouse("mouseReleased", left + 200, top + 80)
    assert ink(browser, "train/loss") != smooth
    click(browser, "#reset")
    assert ink(browser, "train/loss") == smooth
    require_quiet(browser, sweep)


def test_the_table_sorts_and_filters_and_the_charts_follow(browser: Browser, sweep: Path) -> None:
    show(browser, sweep, 1280)
    assert sweep.stat().st_size < 5_000_000
    everything, lines = ink(browser, "train/loss"), "document.querySelectorAll('#coordinates path').length"
    assert ask(browser, "#count", "textContent") == "100 of 100 shown"
    drawn = browser.evaluate(lines)
    type_into(browser, "filter", "schedule=linear seed<10")
    assert ask(browser, "#count", "textContent") == "20 of 100 shown"
    assert browser.evaluate(lines) == 20 < drawn
    assert ink(browser, "train/loss") != everything
    column = "[...document.querySelectorAll('#table tbody tr')].map((row) => row.children[4].textContent)"
    seed = "#table thead th:nth-child(5) button"
    click(browser, seed)
    click(browser, seed)
    assert browser.evaluate(column) == [str(9 - i // 2) for i in range(20)]
    type_into(browser, "filter", "failed")
    assert ask(browser, "#table tbody", "textContent").count("failed") == 1
    type_into(browser, "filter", "")
    click(browser, "#table tbody input")
    assert ask(browser, "#count", "textContent") == "99 of 100 shown"
    require_quiet(browser, sweep)
