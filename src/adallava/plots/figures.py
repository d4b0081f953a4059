"""The paper's figures, each a function from result rows to a picture.

Nothing here runs a model: what is drawn comes from result files. Lines differ in marker and dash as well as in colour,
and shades run from light to dark, so that a page printed in grey can be read. Every axis names its quantity and unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adallava.results import ResultRow

matplotlib.rcParams["svg.hashsalt"] = "adallava"  # the same rows give the same file

# Dark to light in grey as well: a blue, an orange, a green and a purple of falling darkness.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#1b3a6b", "marker": "o", "linestyle": "-"},
    {"color": "#c8501e", "marker": "s", "linestyle": "--"},
    {"color": "#3f8f5b", "marker": "^", "linestyle": "-."},
    {"color": "#9a6fb0", "marker": "D", "linestyle": ":"},
    {"color": "#777777", "marker": "v", "linestyle": (0, (5, 1))},
)
_SIZE = (6.0, 3.8)
PERCENT = 100.0


@dataclass(frozen=True)
class Line:
    """Points of one model: budget or FLOPs, accuracy and its 95 % interval, all as shares."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    interval: Sequence[float] = ()


def training_curve(rows: Sequence[ResultRow]) -> Figure:
    """Fig. A: loss over steps of one run, each step and a running mean; rows "train" of ``training.json``."""
    steps = np.array([row.metrics["step"] for row in rows])
    losses = np.array([row.metrics["loss"] for row in rows])
    figure, axes = _axes("Training step", "Loss (nats per token)")
    axes.plot(steps, losses, color="#b9c4d6", linewidth=0.8, label="each logged step")
    width = max(1, len(losses) // 30)
    if width > 1:
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color="#1b3a6b", linewidth=1.8, label=f"mean of {width}")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def accuracy_over_compute(lines: Sequence[Line], title: str = "") -> Figure:
    """Fig. C: accuracy over the share of the base model's prefill FLOPs, one line per design."""
    figure, axes = _axes("Prefill FLOPs (% of the base model)", "Accuracy (%)", title)
    for line, style in zip(lines, STYLES, strict=False):
        x, y = PERCENT * np.array(line.x), PERCENT * np.array(line.y)
        bars = PERCENT * np.array(line.interval) if line.interval else None
        axes.errorbar(x, y, yerr=bars, capsize=3, markersize=5, linewidth=1.5, label=line.label, **style)
    axes.legend(frameon=False)
    return figure


def learned_against_random(learned: Line, random: Mapping[str, Sequence[Line]], title: str = "") -> Figure:
    """Fig. D: the learned scheduler against random plans, the spread of their draws shaded.

    random: name -> one line per draw, over the same budgets.
    """
    figure, axes = _axes("Budget (% of the base model's FLOPs)", "Accuracy (%)", title)
    x = PERCENT * np.array(learned.x)
    bars = PERCENT * np.array(learned.interval) if learned.interval else None
    axes.errorbar(x, PERCENT * np.array(learned.y), yerr=bars, capsize=3, label=learned.label, **STYLES[0])
    for (name, draws), style in zip(random.items(), STYLES[1:], strict=False):
        values = PERCENT * np.array([draw.y for draw in draws])
        at = PERCENT * np.array(draws[0].x)
        many = f", mean of {len(draws)} draws" if len(draws) > 1 else ""
        axes.plot(at, values.mean(0), label=f"{name}{many}", **style)
        axes.fill_between(at, values.min(0), values.max(0), color=style["color"], alpha=0.25, linewidth=0)
    axes.legend(frameon=False)
    return figure


def radar(tasks: Sequence[str], lines: Sequence[Line], centre: float = 0.6) -> Figure:
    """Fig. B: accuracy of every task relative to the base model, from ``centre`` (of 1) in the middle outwards.

    lines: y and interval have a value per task; x is not used. Intervals are drawn a little beside each other.
    """
    angles = np.linspace(0, 2 * math.pi, len(tasks), endpoint=False)
    figure = Figure(figsize=(5.2, 5.2), layout="constrained")
    axes: Any = figure.add_subplot(projection="polar")
    for number, (line, style) in enumerate(zip(lines, STYLES, strict=False)):
        closed = PERCENT * np.append(line.y, line.y[0])
        axes.plot(np.append(angles, angles[0]), closed, markersize=4, linewidth=1.5, label=line.label, **style)
        bars = {"fmt": "none", "capsize": 2, "linewidth": 0.8, "ecolor": style["color"]}
        beside = angles + 0.04 * (number - (len(lines) - 1) / 2)
        axes.errorbar(beside, closed[:-1], yerr=PERCENT * np.array(line.interval), **bars)
    highest = max([1.0, *(y + bar for line in lines for y, bar in zip(line.y, line.interval, strict=True))])
    axes.set_ylim(PERCENT * centre, PERCENT * math.ceil(20 * highest) / 20)
    axes.set_xticks(angles, tasks)
    axes.set_rlabel_position(90 / max(1, len(tasks)))
    axes.set_title("Accuracy relative to the base model (%)", fontsize=10)
    if lines:
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)
    return figure


def plans(rows: Sequence[ResultRow], by: str = "budget") -> Figure:
    """Fig. E: what runs of each layer, one line per row; rows "plan" with "layer_frac".

    by: the entry of a row's config that names its line, "budget" or "question".
    """
    shares = np.array([row.metrics["layer_frac"] for row in rows])
    figure = Figure(figsize=(6.4, 0.9 + 0.36 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.pcolormesh(shares, cmap="Greys", vmin=0, vmax=1.25, edgecolors="white", linewidth=1.5)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(rows)) + 0.5, [_wrapped(row.config[by]) for row in rows])
    axes.set_xticks(np.arange(0, shares.shape[1], _stride(shares.shape[1])) + 0.5)
    axes.set_xticklabels([str(n) for n in range(0, shares.shape[1], _stride(shares.shape[1]))])
    axes.axvline(rows[0].metrics["prefix_layers"], color="#c8501e", linewidth=1.5)
    axes.set_xlabel("Decoder layer")
    axes.set_title(rows[0].config["model"], fontsize=10)
    axes.set_ylabel(by.capitalize())
    axes.tick_params(length=0)
    return figure


def overlays(picture: np.ndarray, rows: Sequence[ResultRow]) -> Figure:
    """Fig. F: where the latency token looks, over the picture [height, width, 3], one panel per question.

    rows: "attention" with "image" [side, side], shares of the attention on the image, and the config's "question".
    """
    columns = min(4, len(rows) + 1)
    lines = math.ceil((len(rows) + 1) / columns)
    figure = Figure(figsize=(2.5 * columns, 2.9 * lines), layout="constrained")
    every = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for axes in every:
        axes.set_axis_off()
    height, width = picture.shape[:2]
    every[0].imshow(picture)
    every[0].set_title("the picture", fontsize=8)
    grey = picture.mean(-1)
    for axes, row in zip(every[1:], rows, strict=False):
        grid = np.array(row.metrics["image"])
        axes.imshow(grey, cmap="gray", vmin=0, vmax=255, alpha=0.6)
        shown = axes.imshow(PERCENT * grid, cmap="inferno", alpha=0.65, extent=(0, width, height, 0), vmin=0)
        bar = figure.colorbar(shown, ax=axes, shrink=0.75, pad=0.02)
        bar.ax.tick_params(labelsize=6)
        bar.set_label("% of its attention", fontsize=6)
        axes.set_title(_wrapped(row.config["question"]), fontsize=8)
    return figure


def layers(rows: Sequence[ResultRow]) -> Figure:
    """Fig. G: the share of the latency token's attention on the image, and the attention over it, layer by layer.

    rows: "attention", one per layer that ran, with "image" [side, side] and the config's "layer".
    """
    columns = min(8, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(1.5 * columns, 1.75 * lines + 0.3), layout="constrained")
    every = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for axes in every:
        axes.set_axis_off()
    for axes, row in zip(every, rows, strict=False):
        grid = np.array(row.metrics["image"])
        axes.imshow(grid / max(grid.max(), 1e-9), cmap="inferno", vmin=0, vmax=1)
        axes.set_title(f"layer {row.config['layer']}\n{PERCENT * grid.sum():.0f} % on it", fontsize=8)
    figure.suptitle(
        "Where the latency token looks in the picture; each layer from its least (dark) to its most", fontsize=9
    )
    return figure


def _axes(x: str, y: str, title: str = "") -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _stride(count: int) -> int:
    return 1 if count <= 16 else 2 if count <= 32 else 4


def _wrapped(text: str, width: int = 30) -> str:
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
