"""Plots of a report: SVG without a file of its own, its text and lines in the colours of the page around it."""

import io
import re
from collections.abc import Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

# What stands for colours that the page decides, light or dark: replaced in the SVG's text.
TEXT, LINE, ACCENT, SECOND = "#010101", "#020202", "#030303", "#040404"
ROLES = {TEXT: "currentColor", LINE: "var(--line)", ACCENT: "var(--accent)", SECOND: "var(--second)"}
BINS = 48
FEW = 40  # up to so many images each is a point


def distributions(values: Mapping[str, Numbers], label: str) -> str:
    """Return how a figure is distributed over the images for each method: density, middle half and median.

    Args:
        values: title of the method -> its figures; NaN is left out.
        label: of the axis.
    """
    titles = list(values)
    finite = {title: numbers[np.isfinite(numbers)] for title, numbers in values.items()}
    together = np.concatenate([*finite.values(), np.empty(0)])
    if not len(together):
        return ""
    low, high = _range(together)
    figure, axes = _axes(0.36 * len(titles) + 0.6)
    for place, title in enumerate(titles):
        numbers, y = finite[title], len(titles) - 1 - place
        if not len(numbers):
            continue
        inside = np.clip(numbers, low, high)
        if len(numbers) <= FEW:
            axes.plot(inside, np.full(len(inside), y), "o", color=ACCENT, alpha=0.55, markersize=5, markeredgewidth=0)
        else:
            counts, edges = np.histogram(inside, bins=BINS, range=(low, high))
            heights = 0.42 * counts / counts.max()
            middles = (edges[1:] + edges[:-1]) / 2
            axes.fill_between(middles, y - heights, y + heights, color=ACCENT, alpha=0.30, linewidth=0)
        first, median, last = np.percentile(inside, [25, 50, 75])
        axes.plot([first, last], [y, y], color=ACCENT, linewidth=3.5, solid_capstyle="butt", alpha=0.9)
        axes.plot([median, median], [y - 0.27, y + 0.27], color=TEXT, linewidth=2, solid_capstyle="butt")
    axes.set_yticks(range(len(titles)), titles[::-1])
    axes.set_ylim(-0.6, len(titles) - 0.4)
    margin = 0.02 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    axes.set_xlabel(label)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    return _svg(figure, f"{label}, by method")


def confidences(right: Numbers, wrong: Numbers) -> str:
    """Return how sure the model was where it was right and where it was wrong, in tenths."""
    figure, axes = _axes(2.1)
    edges = np.linspace(0.0, 1.0, 11)
    middles = (edges[1:] + edges[:-1]) / 2
    for numbers, colour, shift, name in ((right, ACCENT, -0.02, "right"), (wrong, SECOND, 0.02, "wrong")):
        counts, _ = np.histogram(numbers[np.isfinite(numbers)], bins=edges)
        axes.bar(middles + shift, counts, width=0.036, color=colour, linewidth=0, label=name)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, labelcolor=TEXT, handlelength=0.8, borderpad=0)
    axes.set_xlim(0, 1)
    axes.set_xticks(np.linspace(0, 1, 6), [f"{tick:.0%}" for tick in np.linspace(0, 1, 6)])
    axes.set_xlabel("probability of the predicted class")
    axes.set_ylabel("images")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    return _svg(figure, "Probability of the predicted class, right and wrong predictions")


def _range(numbers: Numbers) -> tuple[float, float]:
    """Return where the axis ends: all values, unless a few are far outside, which are drawn at its end."""
    low, high = float(numbers.min()), float(numbers.max())
    if len(numbers) > FEW:
        first, last = np.percentile(numbers, [1, 99])
        spread = float(last - first)
        low, high = max(low, float(first) - spread), min(high, float(last) + spread)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.8, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(LINE)
    axes.tick_params(color=LINE, labelcolor=TEXT, length=0, labelsize=10)
    axes.xaxis.label.set_color(TEXT)
    axes.yaxis.label.set_color(TEXT)
    return figure, axes


def _svg(figure: Figure, description: str) -> str:
    """Return the <svg> element: text as text, no background, nothing named that another element may name too."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        FigureCanvasSVG(figure)
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="patch_1">.*?</g>', "", text, count=1, flags=re.DOTALL)  # the figure's background
    text = re.sub(r'<g id="patch_2">.*?</g>', "", text, count=1, flags=re.DOTALL)  # that of the axes
    text = re.sub(r' id="(?:figure|axes|patch|matplotlib|xtick|ytick|line2d|text|FillBetween\w*)[\w.-]*"', "", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    for colour, role in ROLES.items():
        text = text.replace(colour, role)
    return text.replace("<svg", f'<svg role="img" aria-label="{description}"', 1).strip()
