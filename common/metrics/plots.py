"""Plots of records as SVG to stand in a page: text and axes in the page's own colour, series told apart without colour.

Each series has a colour (of those that most people tell apart, on white and on black), a marker and a dash of its own.
By Matplotlib. Imports no torch.
"""

import contextlib
import hashlib
import html
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from common.metrics.stats import Bin, t_interval

import matplotlib
import numpy as np
from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's colour until the SVG is written
STYLES = [
    {"color": color, "marker": marker, "linestyle": dash}
    for color, marker, dash in (
        ("#0072b2", "o", "-"),  # Okabe and Ito's, of which yellow, sky and orange are too pale on white
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
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}
Interval = tuple[float, float] | None
Styles = Mapping[str, dict[str, Any]]


def styles_of(names: Iterable[str]) -> Styles:
    """One for each name, for all plots of a page; from the seventh on they come again."""
    return {name: {**STYLES[i % len(STYLES)], "markersize": 5} for i, name in enumerate(dict.fromkeys(names))}


def learning(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], styles: Styles) -> str:
    """Of (name, rows of metrics.jsonl) each: EM of every evaluation, and below it the loss, in means of many steps."""
    with _figure("Exact match and loss while training", height=4.6) as (figure, out):
        above, below = figure.subplots(2, 1, sharex=True)
        for name, rows in runs:
            scored = [(row["step"], row["em"]) for row in rows if row.get("em") is not None]
            losses = np.array([(row["step"], row["loss"]) for row in rows if row.get("loss") is not None])
            above.plot(*zip(*scored, strict=True), **styles[name], label=name) if scored else None
            parts = [part.mean(0) for part in np.array_split(losses, min(len(losses), 60))] if len(losses) else []
            below.plot(*zip(*parts, strict=True), **styles[name] | {"marker": ""}, label=name) if parts else None
        above.set_ylabel("EM")
        below.set(xlabel="optimizer step", ylabel="loss")
        _legend(figure, above if above.lines else below)
    return out[0]


def tradeoff(points: Sequence[tuple[str, float, Interval, float, Interval]], styles: Styles) -> str:
    """EM against p95 in ms, of (name, EM, its interval, p95, its interval) each."""
    with _figure("Exact match against p95 latency") as (figure, out):
        axes = figure.subplots()
        for name, em, em_interval, p95, p95_interval in points:
            axes.errorbar(
                p95, em, xerr=_around(p95, p95_interval), yerr=_around(em, em_interval), capsize=3, label=name,
                **styles[name] | {"linestyle": ""},
            )  # fmt: skip
        axes.set(xlabel="p95 of a query, ms", ylabel="EM")
        _from_zero(axes)
        _legend(figure, axes)
    return out[0]


def latencies(samples: Mapping[str, Sequence[float]], styles: Styles) -> str:
    """Share of queries that are answered within so many ms, of ms by name."""
    with _figure("Distribution of latency") as (figure, out):
        axes = figure.subplots()
        for name, ms in samples.items():
            line = axes.ecdf(ms, **styles[name], label=name)
            line.set_markevery(max(1, len(ms) // 8))
        axes.axhline(0.95, color=INK, linewidth=0.8)
        axes.set(xlabel="ms, from text to text", ylabel="share of queries", ylim=(0, 1.03))
        slow, fast = max(map(max, samples.values())), min(map(min, samples.values()))
        axes.set_xscale("log" if slow > 20 * fast else "linear")
        _legend(figure, axes)
    return out[0]


def reliability(bins: Mapping[str, Sequence[Bin]], styles: Styles) -> str:
    """Share of right answers against the model's own probability, of `stats.reliability` by name."""
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
    """EM of every seed, and the mean with its interval, of EM by name."""
    with _figure("Exact match by seed", height=1.4 + 0.5 * len(values)) as (figure, out):
        axes = figure.subplots()
        for i, (name, ems) in enumerate(values.items()):
            style = styles[name] | {"linestyle": ""}
            axes.plot(ems, [i] * len(ems), **style | {"markerfacecolor": "none"})
            mean = float(np.mean(ems))
            axes.errorbar(mean, i + 0.25, xerr=_around(mean, t_interval(ems)), capsize=3, **style)
        axes.set_yticks(range(len(values)), list(values))
        axes.set(xlabel="EM", ylim=(-0.5, len(values) - 0.25))
    return out[0]


# ---- how all of them look ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _figure(title: str, height: float = 3.2) -> Iterator[tuple[Figure, list[str]]]:
    """A figure to draw on; afterwards its SVG is in the list."""
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
    head = re.sub(r'\b(width|height)="[^"]*"', "", head)  # the page decides
    name = html.escape(title)
    svg = f'<svg role="img" aria-label="{name}"{head}><title>{name}</title>{body}'
    prefix = hashlib.sha256(body.encode()).hexdigest()[:8]  # ids are the whole page's
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg).replace('"#', f'"#{prefix}-').replace("url(#", f"url(#{prefix}-")
    out.append(svg.replace(INK, "currentColor").replace("'DejaVu Sans'", "system-ui"))


def _around(value: float, interval: Interval) -> list[list[float]]:
    """As Matplotlib wants it: how far down, how far up."""
    low, high = interval or (value, value)
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _from_zero(axes: Any) -> None:
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower left", handlelength=3.5)
