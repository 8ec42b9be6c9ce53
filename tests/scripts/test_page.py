"""The report in a real browser: on a phone and a desk, by day and by night. `make test-page` runs these, and fails
without a Chromium; pictures are in runs/page/."""

import shutil
from dataclasses import replace
from pathlib import Path

from common.metrics import plots
from common.runs import ablations
from scripts import report
from tests.conftest import ROOT
from tests.metrics.test_plots import FOREST
from tests.scripts.test_report import runs  # noqa: F401

import pytest

pytestmark = pytest.mark.browser
LONG = "train.eval_every=170 early_stop.split=heldout early_stop.by=loss"
SIZES = {"phone": (360, 740), "desk": (1280, 900)}
FAMILY = {
    "name": "window",
    "of": "",
    "why": "How much context must be read?",
    "about": "a system",
    "table": [
        ablations.COLUMNS,
        [LONG, "3 of 3", "70.00 ± 0.41", "79.10 ± 0.38", *["-1.00 [-2.00, -0.50]"] * 2, "0.01", "1", "worse"],
    ],
    "costs": [ablations.COSTS, [LONG, "0.59%", "100", "5.00 GiB NVML"]],
    "sentences": [],
    "plot": plots.forest([replace(effect, variant=LONG) for effect in FOREST]),
    "missing": "",
    "again": "make ablate FAMILY=window",
}
MEASURE = """() => {
  const box = e => e.getBoundingClientRect();
  const texts = svg => [...svg.querySelectorAll("text")].map(t => [t.textContent.trim(), box(t)]).filter(t => t[0]);
  const overlap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = color => { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3) };
  const plots = [...document.querySelectorAll("figure svg")];
  return {
    scrolls: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    plots: plots.map(svg => [box(svg).width, box(svg).height]),
    smallest: Math.min(...plots.flatMap(svg => texts(svg).map(t => t[1].height))),
    outside: plots.flatMap(svg => texts(svg).filter(([, b]) => b.left < box(svg).left - 1
      || b.right > box(svg).right + 1).map(t => t[0])),
    overlaps: plots.flatMap(svg => { const all = texts(svg);
      return all.flatMap(([a, x], i) =>
        all.slice(i + 1).filter(([, y]) => overlap(x, y)).map(([b]) => a + " / " + b)) }),
    ink: rgb(getComputedStyle(document.body).color),
    paper: rgb(getComputedStyle(document.querySelector("th")).backgroundColor),
    axis: rgb(getComputedStyle(plots[0].querySelector("text")).fill),
  };
}"""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    assert found, "no Chromium in PATH: install one (on Debian: apt install chromium)"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_is_readable(runs, browser, size, theme, monkeypatch):  # noqa: F811
    monkeypatch.setattr(report.ablations, "pages", lambda done, systems: [FAMILY])
    report.main([str(runs)])
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.goto((runs / "report.html").resolve().as_uri())
    pictures = ROOT / "runs" / "page"
    pictures.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(pictures / f"{size}-{theme}.png"), full_page=True)
    found = page.evaluate(MEASURE)
    page.close()
    assert [Path(url).name for url in asked] == ["report.html"]
    assert complaints == []
    assert found["scrolls"] == 0  # tables scroll within themselves
    assert len(found["plots"]) == 7
    assert all(w >= 0.8 * min(width, 416) and h > 100 for w, h in found["plots"])
    assert found["smallest"] >= 9
    assert found["overlaps"] == []
    assert found["outside"] == []
    assert found["axis"] == found["ink"]
    assert (sum(found["ink"]) > 3 * 200) == (sum(found["paper"]) < 3 * 60) == (theme == "dark")
