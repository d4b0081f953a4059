"""Figures of measured time, each a function from the rows of ``adallava bench`` to pictures by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from adallava.errors import ConfigError
from adallava.plots.figures import PERCENT, STYLES
from adallava.results import ResultRow

_HELD, _MISSED = "#1b3a6b", "#c8501e"
_PANELS = {
    "prefill_ms": "Prefill (ms)",
    "decode_ms": "Decoding, per token (ms)",
    "kv_bytes": "KV cache (MB)",
}
_SCALE = {"kv_bytes": 1e-6}


def speed(rows: Sequence[ResultRow]) -> dict[str, Figure]:
    """What was promised and what came out: each measure's ratio as a dot, its share and allowance as a bar."""
    promised = [row for row in rows if row.metrics["allowance"] is not None]
    figure = Figure(figsize=(7.6, 0.9 + 0.27 * len(promised)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(promised):
        told = row.metrics
        limit, held = PERCENT * (told["share"] + told["allowance"]), told["held"]
        axes.barh(place, limit, height=0.62, color="#e3e8f1", edgecolor="#b9c4d6", linewidth=0.6)
        axes.plot([PERCENT * told["share"]] * 2, [place - 0.31, place + 0.31], color="#7d8aa3", linewidth=1.2)
        marker, color = ("o", _HELD) if held else ("X", _MISSED)
        axes.plot(PERCENT * told["ratio"], place, linestyle="none", markersize=6, marker=marker, color=color)
    axes.set_yticks(range(len(promised)), [row.config["measure"] for row in promised], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("% of the time (or bytes) of what it is held against")
    axes.spines[["top", "right"]].set_visible(False)
    key = [
        Line2D([], [], color="#7d8aa3", label="its share of FLOPs or bytes"),
        Line2D([], [], color="#b9c4d6", linewidth=6, label="with the allowance"),
        Line2D([], [], linestyle="none", marker="o", color=_HELD, label="measured, held"),
        Line2D([], [], linestyle="none", marker="X", color=_MISSED, label="measured, not held"),
    ]
    axes.legend(handles=key, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=4, fontsize=7)
    return {"speed": figure}


def scaling(rows: Sequence[ResultRow]) -> dict[str, Figure]:
    """Time and memory over each axis, both axes logarithmic; the exponents of the upper half are in the key."""
    made = {}
    for axis in dict.fromkeys(row.config["axis"] for row in rows):
        points = [row for row in rows if row.config["axis"] == axis and row.config.get("part") is None]
        exponents = {row.config["way"]: row.metrics for row in rows if row.config["axis"] == axis and row not in points}
        figure = Figure(figsize=(10.2, 3.4), layout="constrained")
        for axes, (number, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
            _grown(axes, points, exponents, number)
            axes.set_xlabel(
                {"requests": "Requests in a batch", "parameters": "Parameters of the decoder"}.get(
                    axis, axis.capitalize()
                )
            )
            axes.set_title(title, fontsize=10)
        made[f"scaling-{axis.replace(' ', '-')}"] = figure
    return made


def _grown(axes: Any, points: Sequence[ResultRow], exponents: Mapping[str, Mapping[str, Any]], number: str) -> None:
    ways = list(dict.fromkeys(row.config["way"] for row in points))
    for way, style in zip(ways, STYLES, strict=False):
        chosen = sorted((row for row in points if row.config["way"] == way), key=lambda row: row.config["at"])
        x = [row.config["at"] for row in chosen]
        y = _SCALE.get(number, 1.0) * np.array([row.metrics[number] for row in chosen], dtype=float)
        slope = exponents.get(way, {}).get(f"{number}_exponent")
        label = way if slope is None else f"{way}: n^{slope:.2f}"
        axes.plot(x, y, markersize=4, linewidth=1.4, label=label, **style)
    axes.set_xscale("log", base=2 if max(row.config["at"] for row in points) < 1e5 else 10)
    axes.set_yscale("log")
    if max(row.config["at"] for row in points) < 1e5:
        at = sorted({row.config["at"] for row in points})
        axes.set_xticks(at, [str(each) for each in at], fontsize=8)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)


def load(rows: Sequence[ResultRow]) -> dict[str, Figure]:
    """A server under load, by policy: who is in time, the slowest, how much of the model ran, right answers or rate."""
    panels = {
        "within_frac": ("First token within the objective (% of requests)", PERCENT, False),
        "first_token_ms_p95": ("First token, 95th percentile (ms)", 1.0, True),
        "mean_budget_frac": ("Mean budget (%)", PERCENT, False),
        "right_frac": ("Answered and right (% of requests)", PERCENT, False),
    }
    if all(row.metrics["right_frac"] is None for row in rows):  # random weights know no answers
        del panels["right_frac"]
        panels["goodput_per_s"] = ("First tokens within the objective (a second)", 1.0, False)
    figure = Figure(figsize=(9.2, 6.4), layout="constrained")
    for axes, (number, (title, scale, logarithmic)) in zip(figure.subplots(2, 2).ravel(), panels.items(), strict=True):
        for policy, style in zip(dict.fromkeys(row.config["policy"] for row in rows), STYLES, strict=False):
            chosen = [row for row in rows if row.config["policy"] == policy and row.metrics[number] is not None]
            x, y = ([row.config["load"] for row in chosen], [scale * row.metrics[number] for row in chosen])
            axes.plot(x, y, markersize=4, linewidth=1.4, label=policy, **style)
        if logarithmic:
            axes.axhline(rows[0].metrics["objective_ms"], color="#444444", linewidth=0.8, linestyle=":")
            axes.text(axes.get_xlim()[1], rows[0].metrics["objective_ms"], " the objective", fontsize=7, va="center")
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.05 * PERCENT if scale == PERCENT else None)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("Load (times the whole model's capacity)", fontsize=9)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    return {f"load-{Path(rows[0].config['model']).name}": figure}


FIGURES: dict[str, Callable[[Sequence[ResultRow]], dict[str, Figure]]] = {
    "speed": speed,
    "scaling": scaling,
    "load": load,
}


def figures_of(rows: Sequence[ResultRow]) -> dict[str, Figure]:
    """The figures of one benchmark's rows; ``ConfigError`` where there are none of it."""
    names = {row.name for row in rows}
    if len(names) != 1 or not names <= FIGURES.keys():
        raise ConfigError(
            f"there are no figures of {', '.join(sorted(names)) or 'no rows'}; there are of the rows of one of: "
            f"{', '.join(FIGURES)}."
        )
    return FIGURES[names.pop()](rows)
