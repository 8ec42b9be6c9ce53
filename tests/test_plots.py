"""Plots are the same bytes each time, in the page's colour, and can be told apart without seeing colours."""

import itertools
import xml.etree.ElementTree as ElementTree

from common import plots
from common.stats import reliability

import pytest

STYLES = plots.styles_of(["raw", "tuned"])
METRICS = [{"step": s, "loss": 3 / s} for s in range(1, 300)] + [{"step": 300, "em": 50.0}]
PLOTS = {
    "learning": (plots.learning, [("tuned", METRICS), ("tuned", METRICS[:100])]),
    "tradeoff": (plots.tradeoff, [("raw", 10.0, (8.0, 12.0), 200.0, None), ("tuned", 70.0, None, 90.0, (80.0, 99.0))]),
    "latencies": (plots.latencies, {"raw": [1.0, 5.0, 300.0], "tuned": [2.0]}),
    "reliability": (plots.reliability, {"raw": reliability({"a": 0.1, "b": 0.9}, {"a": False, "b": True})}),
    "seeds": (plots.seeds, {"raw": [10.0, 11.0], "tuned": [70.0, 71.5, 69.0]}),
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_an_svg_in_the_colour_of_its_page(name):
    draw, data = PLOTS[name]
    svg = draw(data, STYLES)
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert (root.get("width"), root.get("height")) == (None, None)
    assert "currentColor" in svg
    assert plots.INK not in svg
    assert "#000000" not in svg
    assert draw(data, STYLES) == svg


def test_every_series_is_named_in_a_plot():
    for name in ("tradeoff", "latencies", "seeds"):
        draw, data = PLOTS[name]
        svg = draw(data, STYLES)
        assert ">raw<" in svg
        assert ">tuned<" in svg


def test_no_two_series_differ_in_colour_alone():
    for a, b in itertools.combinations(plots.STYLES, 2):
        assert a["marker"] != b["marker"]
        assert a["linestyle"] != b["linestyle"]
        assert a["color"] != b["color"]


def test_colours_are_seen_on_white_and_on_black():
    def luminance(color: str) -> float:  # https://www.w3.org/TR/WCAG21/#dfn-relative-luminance
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for style in plots.STYLES:
        light = luminance(style["color"])
        assert 1.05 / (light + 0.05) >= 3  # WCAG's 3 to 1 for graphics
        assert (light + 0.05) / (luminance("#121212") + 0.05) >= 3
