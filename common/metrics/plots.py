"""SVG plots of records in the text colour of their page. No two series differ in colour alone. Imports no torch."""

import hashlib
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, cast

from common.metrics.confidence import Bin
from common.metrics.effects import Effect
from common.metrics.stats import Interval, t_interval

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray


class Style(TypedDict):
    color: str
    marker: str
    linestyle: str | tuple[int, tuple[int, ...]]  # a dash: (offset, (points drawn, points left out, …))
    markersize: int  # points


INK = "#010203"  # replaced by the page's colour when the SVG is written
STYLES: list[Style] = [
    # Okabe and Ito 2008, whose yellow, sky blue and orange are too pale on white
    {"color": "#0072b2", "marker": "o", "linestyle": "-", "markersize": 5},
    {"color": "#d55e00", "marker": "s", "linestyle": "--", "markersize": 5},
    {"color": "#009e73", "marker": "^", "linestyle": "-.", "markersize": 5},
    {"color": "#b5659b", "marker": "D", "linestyle": ":", "markersize": 5},
    {"color": "#7f7f7f", "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "markersize": 5},
    {"color": "#a6761d", "marker": "P", "linestyle": (0, (1, 1)), "markersize": 5},
]
LOOK: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "squad-qlora",  # the same bytes for the same figures
    "figure.figsize": (4.6, 3.2),  # inches
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.15,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys((f"{key}color" for key in ("text.", "xtick.", "ytick.", "grid.", "axes.label", "axes.edge")), INK),
}
SEED: dict[str, Any] = {**STYLES[1], "linestyle": "", "markerfacecolor": "none", "markersize": 4}  # of a forest plot
MEAN: dict[str, Any] = {**STYLES[0], "linestyle": "", "capsize": 3}
NAME_POINTS = 8  # of variants: 65 characters fit above both panels
LOSS_POINTS = 60  # of a curve, each a mean over steps: more are noise at this size
FAR = 20  # ratio of the slowest query to the fastest from which on the axis is logarithmic
Styles = Mapping[str, Style]


def styles_of(names: Iterable[str]) -> Styles:
    """One style for each name, for all plots of a page; they repeat from the seventh on."""
    return {name: STYLES[i % len(STYLES)] for i, name in enumerate(dict.fromkeys(names))}


@matplotlib.rc_context(LOOK)
def learning(runs: Sequence[tuple[str, Sequence[Mapping[str, float | None]]]], styles: Styles) -> str:
    """EM in percent of every evaluation, and below it the mean loss, by (name, rows of metrics.jsonl)."""
    above, below = Figure(figsize=(4.6, 4.6)).subplots(2, 1, sharex=True)
    for name, rows in runs:
        scored = [(row["step"], row["em"]) for row in rows if row.get("em") is not None]
        losses = np.array([(row["step"], row["loss"]) for row in rows if row.get("loss") is not None])
        if scored:
            above.plot(*zip(*scored, strict=True), **styles[name], label=name)
        if len(losses):
            parts = [part.mean(0) for part in np.array_split(losses, min(len(losses), LOSS_POINTS))]
            below.plot(*zip(*parts, strict=True), **styles[name] | {"marker": ""}, label=name)
    above.set_ylabel("EM")
    below.set(xlabel="optimizer step", ylabel="loss")
    return _svg(above if above.lines else below, "Exact match and loss while training")


@matplotlib.rc_context(LOOK)
def tradeoff(points: Sequence[tuple[str, float, Interval | None, float, Interval | None]], styles: Styles) -> str:
    """EM in percent against p95 in ms; a point is (name, EM, its interval, p95, its interval)."""
    axes = Figure().subplots()
    for name, em, em_interval, p95, p95_interval in points:
        x, y = _around([p95], [p95_interval]), _around([em], [em_interval])
        axes.errorbar(p95, em, xerr=x, yerr=y, capsize=3, label=name, **styles[name] | {"linestyle": ""})
    axes.set(xlabel="p95 of a query, ms", ylabel="EM", xlim=(0, None), ylim=(0, None))
    return _svg(axes, "Exact match against p95 latency")


@matplotlib.rc_context(LOOK)
def latencies(samples: Mapping[str, Sequence[float]], styles: Styles) -> str:
    """The share of queries that are answered within so many ms; `samples` are ms by name."""
    axes = Figure().subplots()
    for name, ms in samples.items():
        axes.ecdf(ms, **styles[name], label=name, markevery=max(1, len(ms) // 8))
    axes.axhline(0.95, color=INK, linewidth=0.8)
    scale = "log" if max(map(max, samples.values())) > FAR * min(map(min, samples.values())) else "linear"
    axes.set(xlabel="ms, end to end", ylabel="share of queries", ylim=(0, 1.03), xscale=scale)
    return _svg(axes, "Distribution of latency")


@matplotlib.rc_context(LOOK)
def reliability(bins: Mapping[str, Sequence[Bin]], styles: Styles) -> str:
    """The share of right answers against the model's own probability, by `confidence.reliability`."""
    axes = Figure().subplots()
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8)
    for name, rows in bins.items():
        x, y, intervals, _ = zip(*rows, strict=True)
        axes.errorbar(x, y, yerr=_around(y, intervals), capsize=2, label=name, **styles[name])
    axes.set(xlabel="probability of the answer", ylabel="share that is right", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    return _svg(axes, "Reliability: right answers against the model's own probability")


@matplotlib.rc_context(LOOK)
def risk_coverage(curves: Mapping[str, tuple[NDArray, NDArray]], styles: Styles) -> str:
    """The error rate of the answered questions against their share, by `confidence.risk_coverage`."""
    axes = Figure().subplots()
    for name, (answered, wrong) in curves.items():
        axes.plot(answered, wrong, **styles[name], label=name, markevery=max(1, len(answered) // 8))
    axes.set(xlabel="share of questions answered", ylabel="share of these wrong", xlim=(-0.03, 1.03))
    return _svg(axes, "Risk and coverage: errors among the answers that are given")


@matplotlib.rc_context(LOOK)
def seeds(values: Mapping[str, Sequence[float]], styles: Styles) -> str:
    """EM in percent of every seed, and the mean over seeds with its 95 % interval."""
    axes = Figure(figsize=(4.6, 1.4 + 0.5 * len(values))).subplots()
    for i, (name, ems) in enumerate(values.items()):
        style = styles[name] | {"linestyle": ""}
        axes.plot(ems, [i] * len(ems), **style, markerfacecolor="none")
        mean = float(np.mean(ems))
        axes.errorbar(mean, i + 0.25, xerr=_around([mean], [t_interval(ems)]), capsize=3, **style)
    axes.set(yticks=range(len(values)), yticklabels=list(values), xlabel="EM", ylim=(-0.5, len(values) - 0.25))
    return _svg(axes, "Exact match by seed", legend=False)


@matplotlib.rc_context(LOOK)
def forest(found: Sequence[Effect]) -> str:
    """Differences to a baseline in points of EM and F1: a mark with its 95 % interval, and seeds as hollow points.

    The shaded band is the margin within which EM counts as equal. Names of variants stand above their marks.
    """
    figure = Figure(figsize=(4.6, 0.9 + 0.62 * len(found)))
    panels = figure.subplots(1, 2, sharey=True)
    rows = range(len(found), 0, -1)
    for axes, what in zip(panels, ("em", "f1"), strict=True):
        axes.axvline(0, color=INK, linewidth=0.8)
        for y, effect in zip(rows, found, strict=True):
            gain, interval = getattr(effect, f"{what}_gain"), getattr(effect, f"{what}_interval")
            by_seed = getattr(effect, f"{what}_by_seed")
            axes.plot(by_seed, [y - 0.25] * len(by_seed), **SEED)
            axes.errorbar(gain, y, xerr=_around([gain], [interval]), **MEAN)
        axes.set(xlabel=f"difference in {what.upper()}, points", yticks=[], ylim=(0.5, len(found) + 0.7))
        axes.spines["left"].set_visible(False)
    panels[0].axvspan(-found[0].margin, found[0].margin, color=STYLES[4]["color"], alpha=0.15, linewidth=0)
    for y, effect in zip(rows, found, strict=True):
        place = panels[0].get_yaxis_transform()  # x in the panel's width
        name = panels[0].text(0, y + 0.3, effect.variant, transform=place, fontsize=NAME_POINTS, parse_math=False)
        name.set_in_layout(False)
    return _svg(panels[0], "Differences to the baseline", legend=False)


# ---- how all of them look ------------------------------------------------------------------------------------------


def _svg(axes: Axes, title: str, legend: bool = True) -> str:
    """The figure of these axes as SVG, its ids unique, with a legend of what has a label in them below it."""
    figure = cast(Figure, axes.figure)
    if legend:
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), loc="outside lower left", handlelength=3.5)
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_alpha(0)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue().partition("<svg")[2], flags=re.DOTALL)
    head, _, body = svg.partition(">")
    head = re.sub(r'\b(width|height)="[^"]*"', "", head)  # the page sets the size
    name = html.escape(title)
    svg = f'<svg role="img" aria-label="{name}"{head}><title>{name}</title>{body}'
    prefix = hashlib.sha256(body.encode()).hexdigest()[:8]  # ids must be unique in the whole page
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg).replace('"#', f'"#{prefix}-').replace("url(#", f"url(#{prefix}-")
    return svg.replace(INK, "currentColor").replace("'DejaVu Sans'", "system-ui")


def _around(values: Sequence[float], intervals: Sequence[Interval | None]) -> NDArray:
    """Distances from values to the ends of their intervals, as Matplotlib takes error bars, [2, n]: below, above."""
    low, high = np.transpose([interval or (value, value) for value, interval in zip(values, intervals, strict=True)])
    return np.maximum(0, [values - low, high - values])
