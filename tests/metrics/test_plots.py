"""Plots show their figures, are the same bytes each time, and can be told apart without seeing colours."""

import functools
import itertools
import re
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

from common.metrics import plots
from common.metrics.effects import Effect

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

STYLES = plots.styles_of(["raw", "tuned"])
METRICS = [{"step": s, "loss": 3 / s} for s in range(1, 300)] + [{"step": 300, "em": 50.0}]
BINS = {"raw": [(0.1, 0.25, (0.05, 0.5), 4), (0.9, 0.75, (0.6, 0.8), 8)]}
FOREST = [
    Effect(
        "lora.rank=2", [0, 1], -2.0, (-3.0, -1.0), -1.5, (-2.5, -0.5), [-2.5, -1.5], [-1.0, -2.0], 0.01, 0.9, 2, 1.0
    ),
    Effect("path=a$b_{$", [0], 0.25, None, 0.5, None, [0.25], [0.5], None, None, 2, 1.0),
]
PLOTS = {
    "learning": (plots.learning, [("tuned", METRICS), ("tuned", METRICS[:100])]),
    "tradeoff": (plots.tradeoff, [("raw", 10.0, (8.0, 12.0), 200.0, None), ("tuned", 70.0, None, 90.0, (80.0, 99.0))]),
    "latencies": (plots.latencies, {"raw": [1.0, 5.0, 300.0], "tuned": [2.0]}),
    "reliability": (plots.reliability, BINS),
    "risk": (plots.risk_coverage, {"raw": (np.array([0.5, 1.0]), np.array([0.0, 0.25]))}),
    "forest": (lambda found, _: plots.forest(found), FOREST),
    "seeds": (plots.seeds, {"raw": [10.0, 11.0], "tuned": [70.0, 71.5, 69.0]}),
}
TITLES = {
    "forest": "Differences to the baseline",
    "learning": "Exact match and loss while training",
    "tradeoff": "Exact match against p95 latency",
    "latencies": "Distribution of latency",
    "risk": "Risk and coverage: errors among the answers that are given",
    "reliability": "Reliability: right answers against the model's own probability",
    "seeds": "Exact match by seed",
}


@functools.cache
def svg(name: str) -> str:
    draw, data = PLOTS[name]
    return draw(data, STYLES)


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_an_svg_in_the_colour_of_its_page(name):
    root = ElementTree.fromstring(svg(name))
    assert root.get("role") == "img"
    assert root.get("aria-label") == root[0].text == TITLES[name]
    assert root.get("viewBox")
    assert (root.get("width"), root.get("height")) == (None, None)
    assert "currentColor" in svg(name)
    assert plots.INK not in svg(name)
    assert "#000000" not in svg(name)
    assert re.match(r"<svg [^>]*><title>[^<]*</title>\s*<", svg(name))
    assert "<metadata" not in svg(name)
    assert "<text" in svg(name)
    assert "system-ui" in svg(name)
    ids = re.findall(r'\bid="([^"]+)"', svg(name))
    used = re.findall(r'(?:href="|url\()#([^")]+)', svg(name))
    assert used
    assert set(used) <= set(ids)
    (prefix,) = {id_.partition("-")[0] for id_ in ids}
    assert re.fullmatch("[0-9a-f]{8}", prefix)


def test_a_plot_is_the_same_bytes_each_time_and_shares_no_id_with_another():
    draw, data = PLOTS["seeds"]
    assert draw(data, STYLES) == svg("seeds")
    assert len({re.search(r'\bid="(\w+)-', svg(name))[1] for name in PLOTS}) == len(PLOTS)


# ---- what they show ------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """Draw, and return each pair of axes instead of their SVG."""
    figures = []

    def savefig(figure, file, **_):
        figures.append(figure)
        file.write("<?xml?><svg><g/></svg>")

    monkeypatch.setattr(Figure, "savefig", savefig)

    def draw(plot, data, styles=STYLES):
        plot(data, styles)
        return SimpleNamespace(figure=figures[-1], axes=figures[-1].axes)

    return draw


def points(line) -> list[tuple[float, ...]]:
    return [tuple(map(float, pair)) for pair in zip(*line.get_data(), strict=True)]


def error_bars(container) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """From where to where."""
    return [tuple(map(tuple, bar.round(9))) for bars in container.lines[2] for bar in bars.get_segments()]


def style(line) -> tuple[str, str, str]:
    return line.get_color(), line.get_marker(), line.get_linestyle()


def legend(figure) -> list[str]:
    """Its names; it stands below the axes."""
    assert {found._outside_loc for found in figure.legends} == {"lower"}
    return [text.get_text() for found in figure.legends for text in found.get_texts()]


def test_learning_shows_em_above_and_the_loss_in_means_of_many_steps_below(drawn):
    rows = [{"step": s, "loss": float(s), "em": None} for s in range(1, 121)]
    rows += [{"step": 60, "em": 40.0}, {"step": 120, "em": 50.0, "loss": None}]
    few = [{"step": 5, "loss": 2.5}, {"step": 7, "loss": 1.5}]
    found = drawn(plots.learning, [("tuned", rows), ("raw", few)])
    above, below = found.axes
    assert [points(line) for line in above.lines] == [[(60, 40), (120, 50)]]
    first, second = (points(line) for line in below.lines)
    assert first == [(s + 0.5, s + 0.5) for s in range(1, 121, 2)]
    assert second == [(5, 2.5), (7, 1.5)]
    assert style(above.lines[0]) == ("#d55e00", "s", "--")
    assert style(below.lines[0]) == ("#d55e00", "", "--")
    assert style(below.lines[1]) == ("#0072b2", "", "-")
    assert (above.get_ylabel(), below.get_ylabel(), below.get_xlabel()) == ("EM", "loss", "optimizer step")
    assert above.get_shared_x_axes().joined(above, below)
    assert legend(found.figure) == ["tuned"]
    assert tuple(found.figure.get_size_inches()) == (4.6, 4.6)


def test_learning_without_evaluations_or_losses_shows_what_there_is(drawn):
    found = drawn(plots.learning, [("raw", [{"step": 1, "loss": 2.0}]), ("tuned", [{"step": 1, "loss": 3.0}])])
    assert [len(axes.lines) for axes in found.axes] == [0, 2]
    assert legend(found.figure) == ["raw", "tuned"]
    found = drawn(plots.learning, [("raw", [{"step": 1, "em": 2.0}])])
    assert [len(axes.lines) for axes in found.axes] == [1, 0]


def test_tradeoff_has_p95_to_the_right_and_em_upwards_with_their_intervals(drawn):
    found = drawn(*PLOTS["tradeoff"])
    (axes,) = found.axes
    raw, tuned = axes.containers
    assert [points(container.lines[0]) for container in (raw, tuned)] == [[(200, 10)], [(90, 70)]]
    assert error_bars(raw) == [((200, 10), (200, 10)), ((200, 8), (200, 12))]
    assert error_bars(tuned) == [((80, 70), (99, 70)), ((90, 70), (90, 70))]
    assert style(raw.lines[0]) == ("#0072b2", "o", "None")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("p95 of a query, ms", "EM")
    assert (axes.get_xlim()[0], axes.get_ylim()[0]) == (0, 0)
    assert legend(found.figure) == ["raw", "tuned"]
    assert tuple(found.figure.get_size_inches()) == (4.6, 3.2)
    assert found.figure.patch.get_alpha() == axes.patch.get_alpha() == 0


def test_an_interval_that_does_not_hold_its_value_has_no_negative_bar(drawn):
    found = drawn(plots.tradeoff, [("raw", 10.0, (11.0, 12.0), 200.0, (100.0, 150.0))])
    assert error_bars(found.axes[0].containers[0]) == [((100, 10), (200, 10)), ((200, 10), (200, 12))]


@pytest.mark.parametrize(("slow", "scale"), [(39.9, "linear"), (40.0, "linear"), (40.1, "log")])
def test_latencies_are_shares_of_queries_and_logarithmic_where_they_are_far_apart(drawn, slow, scale):
    found = drawn(plots.latencies, {"raw": [5.0, 2.0, 4.0, 3.0], "tuned": [3.0, slow]})
    (axes,) = found.axes
    raw, tuned, level = axes.lines
    assert points(raw)[-4:] == [(2, 0.25), (3, 0.5), (4, 0.75), (5, 1)]
    assert points(tuned)[-2:] == [(3, 0.5), (slow, 1)]
    assert set(level.get_ydata()) == {0.95}
    assert level.get_color() == plots.INK
    assert (axes.get_xscale(), axes.get_ylim()) == (scale, (0, 1.03))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("ms, end to end", "share of queries")
    assert legend(found.figure) == ["raw", "tuned"]


@pytest.mark.parametrize(("n", "every"), [(3, 1), (16, 2), (80, 10)])
def test_eight_markers_or_so_stand_on_a_line_of_latencies(drawn, n, every):
    found = drawn(plots.latencies, {"raw": [*map(float, range(1, n + 1))]})
    assert found.axes[0].lines[0].get_markevery() == every


def test_reliability_has_the_probability_to_the_right_and_the_share_upwards_beside_the_diagonal(drawn):
    found = drawn(*PLOTS["reliability"])
    (axes,) = found.axes
    assert points(axes.lines[0]) == [(0, 0), (1, 1)]
    assert axes.lines[0].get_color() == plots.INK
    (raw,) = axes.containers
    assert points(raw.lines[0]) == [(0.1, 0.25), (0.9, 0.75)]
    assert error_bars(raw) == [((0.1, 0.05), (0.1, 0.5)), ((0.9, 0.6), (0.9, 0.8))]
    assert style(raw.lines[0]) == ("#0072b2", "o", "-")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("probability of the answer", "share that is right")
    assert axes.get_xlim() == axes.get_ylim() == (-0.03, 1.03)
    assert legend(found.figure) == ["raw"]


def test_risk_and_coverage_have_the_answered_share_to_the_right_and_errors_upwards(drawn):
    found = drawn(*PLOTS["risk"])
    (axes,) = found.axes
    (raw,) = axes.lines
    assert points(raw) == [(0.5, 0), (1, 0.25)]
    assert style(raw) == ("#0072b2", "o", "-")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("share of questions answered", "share of these wrong")
    assert legend(found.figure) == ["raw"]


def test_seeds_have_a_mark_each_and_above_them_the_mean_and_its_interval(drawn):
    found = drawn(plots.seeds, {"raw": [10.0, 11.0], "tuned": [70.0]})
    (axes,) = found.axes
    raw, tuned = axes.containers
    marks = [points(line) for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert marks == [[(10, 0), (11, 0)], [(70, 1)]]
    assert points(raw.lines[0]) == [(10.5, 0.25)]
    ((left, right),) = error_bars(raw)
    assert left == pytest.approx((10.5 - 6.3531, 0.25), abs=1e-4)  # 12.7062 standard errors of 0.5
    assert right == pytest.approx((10.5 + 6.3531, 0.25), abs=1e-4)
    assert error_bars(tuned) == [((70, 1.25), (70, 1.25))]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["raw", "tuned"]
    assert [*axes.get_yticks()] == [0, 1]
    assert (axes.get_ylim(), axes.get_xlabel()) == ((-0.5, 1.75), "EM")
    assert {style(line)[2] for line in axes.lines} == {"None"}
    assert tuple(found.figure.get_size_inches()) == pytest.approx((4.6, 2.4))


# ---- styles --------------------------------------------------------------------------------------------------------


def test_each_name_has_a_style_and_from_the_seventh_on_they_come_again():
    found = plots.styles_of(["a", "b", "a", "c", "d", "e", "f", "g"])
    assert list(found) == ["a", "b", "c", "d", "e", "f", "g"]
    assert [of["color"] for of in found.values()] == [of["color"] for of in [*plots.STYLES, plots.STYLES[0]]]
    assert {of["markersize"] for of in found.values()} == {5}


def test_no_two_series_differ_in_colour_alone():
    assert len([Line2D([0], [0], **of) for of in plots.STYLES]) == 6
    assert [of["linestyle"] for of in plots.STYLES[4:]] == [(0, (5, 1, 1, 1, 1, 1)), (0, (1, 1))]  # dashes and gaps
    for a, b in itertools.combinations(plots.STYLES, 2):
        assert a["marker"] != b["marker"]
        assert a["linestyle"] != b["linestyle"]
        assert a["color"] != b["color"]


def test_colours_are_seen_on_white_and_on_black():
    def luminance(color: str) -> float:  # https://www.w3.org/TR/WCAG21/#dfn-relative-luminance
        parts = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    for of in plots.STYLES:
        light = luminance(of["color"])
        assert 1.05 / (light + 0.05) >= 3  # WCAG's 3 to 1 for graphics
        assert (light + 0.05) / (luminance("#121212") + 0.05) >= 3


def test_a_forest_has_a_gain_its_interval_and_the_seeds_of_each_variant(drawn):
    em, f1 = drawn(lambda found, _: plots.forest(found), FOREST).axes
    assert [text.get_text() for text in em.texts] == ["lora.rank=2", "path=a$b_{$"]
    heights = [c.lines[0].get_ydata()[0] for c in em.containers]
    assert all(y < text.get_position()[1] < y + 1 for y, text in zip(heights, em.texts, strict=True))
    for axes, gains, bars, seeds in (
        (em, [-2.0, 0.25], [(-3.0, -1.0)], [[-2.5, -1.5], [0.25]]),
        (f1, [-1.5, 0.5], [(-2.5, -0.5)], [[-1.0, -2.0], [0.5]]),
    ):
        assert [c.lines[0].get_xdata()[0] for c in axes.containers] == gains
        ends = [(start[0], end[0]) for c in axes.containers for start, end in error_bars(c)]
        assert ends == [*bars, (gains[1], gains[1])]
        hollow = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
        assert [list(line.get_xdata()) for line in hollow] == seeds
    assert [round(x, 6) for x in (em.patches[0].get_x(), em.patches[0].get_width())] == [-1.0, 2.0]  # the margin
    assert not f1.patches
