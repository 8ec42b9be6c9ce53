"""SVG plots of records in the text colour of their page. No two series differ in colour alone. Imports no torch."""

import contextlib
import hashlib
import html
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

from common.metrics.calibration import Bin
from common.metrics.stats import Interval, t_interval

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


class Style(TypedDict):
    color: str
    marker: str
    linestyle: str | tuple[int, tuple[int, ...]]  # a dash: (offset, (points drawn, points left out, …))
    markersize: int  # points


INK = "#010203"  # replaced by the page's colour when the SVG is written
STYLES: list[Style] = [
    {"color": color, "marker": marker, "linestyle": dash, "markersize": 5}
    for color, marker, dash in (
        ("#0072b2", "o", "-"),  # Okabe and Ito 2008, whose yellow, sky blue and orange are too pale on white
        ("#d55e00", "s", "--"),
        ("#009e73", "^", "-."),
        ("#b5659b", "D", ":"),
        ("#7f7f7f", "v", (0, (5, 1, 1, 1, 1, 1))),
        ("#a6761d", "P", (0, (1, 1))),
    )
]
LOOK: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "squad-qlora",  # the same bytes for the same figures
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    **dict.fromkeys((f"{part}.color" for part in ("text", "xtick", "ytick", "grid")), INK),
    **dict.fromkeys(("axes.labelcolor", "axes.edgecolor"), INK),
}
LOSS_POINTS = 60  # of a curve, each a mean over steps: more are noise at this size
FAR = 20  # ratio of the slowest query to the fastest from which on the axis is logarithmic
Styles = Mapping[str, Style]


def styles_of(names: Iterable[str]) -> Styles:
    """One style for each name, for all plots of a page; they repeat from the seventh on."""
    return {name: STYLES[i % len(STYLES)] for i, name in enumerate(dict.fromkeys(names))}


def learning(runs: Sequence[tuple[str, Sequence[Mapping[str, float | None]]]], styles: Styles) -> str:
    """EM in percent of every evaluation, and below it the mean loss, by (name, rows of metrics.jsonl)."""
    with _figure("Exact match and loss while training", height=4.6) as (figure, out):
        above, below = figure.subplots(2, 1, sharex=True)
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
        _legend(figure, above if above.lines else below)
    return out[0]


def tradeoff(points: Sequence[tuple[str, float, Interval | None, float, Interval | None]], styles: Styles) -> str:
    """EM in percent against p95 in ms; a point is (name, EM, its interval, p95, its interval)."""
    with _figure("Exact match against p95 latency") as (figure, out):
        axes = figure.subplots()
        for name, em, em_interval, p95, p95_interval in points:
            x, y = _around(p95, p95_interval), _around(em, em_interval)
            axes.errorbar(p95, em, xerr=x, yerr=y, capsize=3, label=name, **styles[name] | {"linestyle": ""})
        axes.set(xlabel="p95 of a query, ms", ylabel="EM", xlim=(0, None), ylim=(0, None))
        _legend(figure, axes)
    return out[0]


def latencies(samples: Mapping[str, Sequence[float]], styles: Styles) -> str:
    """The share of queries that are answered within so many ms; `samples` are ms by name."""
    with _figure("Distribution of latency") as (figure, out):
        axes = figure.subplots()
        for name, ms in samples.items():
            line = axes.ecdf(ms, **styles[name], label=name)
            line.set_markevery(max(1, len(ms) // 8))
        axes.axhline(0.95, color=INK, linewidth=0.8)
        axes.set(xlabel="ms, end to end", ylabel="share of queries", ylim=(0, 1.03))
        slow, fast = max(map(max, samples.values())), min(map(min, samples.values()))
        axes.set_xscale("log" if slow > FAR * fast else "linear")
        _legend(figure, axes)
    return out[0]


def reliability(bins: Mapping[str, Sequence[Bin]], styles: Styles) -> str:
    """The share of right answers against the model's own probability, by `calibration.reliability`."""
    with _figure("Reliability: right answers against the model's own probability") as (figure, out):
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8)
        for name, rows in bins.items():
            x, y = [row[0] for row in rows], [row[1] for row in rows]
            around = np.array([_around(share, interval) for _, share, interval, _ in rows]).squeeze(2).T
            axes.errorbar(x, y, yerr=around, capsize=2, label=name, **styles[name])
        axes.set(xlabel="probability of the answer", ylabel="share that is right")
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        _legend(figure, axes)
    return out[0]


def seeds(values: Mapping[str, Sequence[float]], styles: Styles) -> str:
    """EM in percent of every seed, and the mean over seeds with its 95 % interval."""
    with _figure("Exact match by seed", height=1.4 + 0.5 * len(values)) as (figure, out):
        axes = figure.subplots()
        for i, (name, ems) in enumerate(values.items()):
            style = styles[name] | {"linestyle": ""}
            axes.plot(ems, [i] * len(ems), **style, markerfacecolor="none")
            mean = float(np.mean(ems))
            axes.errorbar(mean, i + 0.25, xerr=_around(mean, t_interval(ems)), capsize=3, **style)
        axes.set_yticks(range(len(values)), list(values))
        axes.set(xlabel="EM", ylim=(-0.5, len(values) - 0.25))
    return out[0]


# ---- how all of them look ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _figure(title: str, height: float = 3.2) -> Iterator[tuple[Figure, list[str]]]:
    """A figure to draw on, and a list that holds its SVG afterwards."""
    out: list[str] = []
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(4.6, height), layout="constrained")
        figure.patch.set_alpha(0)
        yield figure, out
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue().partition("<svg")[2], flags=re.DOTALL)
    head, _, body = svg.partition(">")
    head = re.sub(r'\b(width|height)="[^"]*"', "", head)  # the page sets the size
    name = html.escape(title)
    svg = f'<svg role="img" aria-label="{name}"{head}><title>{name}</title>{body}'
    prefix = hashlib.sha256(body.encode()).hexdigest()[:8]  # ids must be unique in the whole page
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg).replace('"#', f'"#{prefix}-').replace("url(#", f"url(#{prefix}-")
    out.append(svg.replace(INK, "currentColor").replace("'DejaVu Sans'", "system-ui"))


def _around(value: float, interval: Interval | None) -> list[list[float]]:
    """Distances from `value` to the ends of its interval, as Matplotlib takes error bars, [2, 1]: below, above."""
    low, high = interval or (value, value)
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower left", handlelength=3.5)
