"""What the demo page shows, as HTML, pictures and figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from adallava.plots.drawing import PlanDrawing
from adallava.plots.units import flops_text, ms_text, share_text
from adallava.web.studio import Foreseen, Strain, Told

PICTURE = 288
"""Pixels of a side."""
STYLE = """
.plan { height: 34px; width: auto; max-width: 100%; display: block; margin: 4px 0 6px; }
.plan .prefix { fill: #a9b4c4; } .plan .on { fill: #2563eb; } .plan .off { fill: none; stroke: #b6c0cf; }
.facts { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
.facts th, .facts td { text-align: right; padding: 3px 8px; border-bottom: 1px solid #8884; font-weight: 400; }
.facts th:first-child, .facts td:first-child { text-align: left; }
.facts thead th { opacity: .7; }
.said { font-size: 20px; min-height: 1.6em; font-weight: 600; margin: 0 0 2px; }
.soft { opacity: .75; font-size: 13px; margin: 0; }
.wrong { color: #c2410c; font-weight: 600; }
footer { display: none !important; }
"""
_NOTHING = "-"


def plan_html(foreseen: Foreseen) -> str:
    """The plan as a row of switches, and what it is."""
    drawing = PlanDrawing.of(foreseen.plan)
    each = "layer" if drawing.per_layer == 1 else f"group of heads and neurons, {drawing.per_layer} to a layer"
    told = f"{drawing.count} on; grey always runs, blue was chosen for this picture and question; a switch is a {each}."
    return f'<div>{drawing.svg()}<p class="soft">{escape(told)}</p></div>'


def answer_html(told: Told) -> str:
    """The answer so far."""
    more = "" if told.ended is not None else " ▍"
    remark = told.begun.remark if told.begun is not None else None
    below = f'<p class="soft">{escape(remark)}</p>' if remark else ""
    return f'<p class="said">{escape(told.text)}{more}</p>{below}'


def error_html(error: Exception) -> str:
    """What is wrong."""
    return f'<p class="wrong">{escape(str(error))}</p>'


def facts_html(foreseen: Foreseen | None, told: Told | None = None, whole: Told | None = None) -> str:
    """FLOPs and times of this budget beside the whole model's; what is not measured yet is a dash."""
    cost = told.begun.cost if told is not None and told.begun is not None else foreseen.cost if foreseen else None
    rows = [
        ("prefill", *(flops_text(cost.prefill_flops), flops_text(cost.prefill_flops / cost.frac)))
        if cost is not None
        else ("prefill", _NOTHING, _NOTHING),
        ("share of the base model", share_text(cost.frac) if cost is not None else _NOTHING, share_text(1.0)),
        ("first token, measured", _first(told), _first(whole)),
        ("first token, foretold", _foretold(foreseen, told), _foretold(None, whole)),
        ("whole answer", _total(told), _total(whole)),
        ("each token after the first", _each(told), _each(whole)),
    ]
    body = "".join(f"<tr><td>{name}</td><td>{ours}</td><td>{theirs}</td></tr>" for name, ours, theirs in rows)
    head = "<tr><th></th><th>this budget</th><th>whole model</th></tr>"
    return f'<table class="facts"><thead>{head}</thead><tbody>{body}</tbody></table>'


def overlay(picture: Image.Image, attention: np.ndarray | None) -> Image.Image:
    """The picture in grey, and over it where the latency token looks; the picture alone where that is not known."""
    size = (PICTURE, max(1, round(PICTURE * picture.height / picture.width)))
    base = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    if attention is None:
        return base
    grid = attention / max(float(attention.max()), 1e-9)
    heat = Image.fromarray((255 * grid).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    colours = matplotlib.colormaps["inferno"](np.asarray(heat) / 255.0)[..., :3]
    grey = np.asarray(base.convert("L"), dtype=float)[..., None] / 255.0
    return Image.fromarray((255 * (0.4 * grey + 0.6 * colours)).astype(np.uint8))


def strain_figure(strains: Sequence[Strain]) -> Figure:
    """First tokens of the requests of each run over time, by how much of the model they got; refused ones on top."""
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    every = np.atleast_1d(figure.subplots(1, max(1, len(strains)), sharey=True))
    highest = max([2.0 * strain.objective_ms for strain in strains] + [_slowest(strain) for strain in strains])
    for axes, strain in zip(every, strains, strict=False):
        done = [(one.at_s, one.begun) for one in strain.asked if one.begun is not None]
        x = [at for at, _ in done]
        y = [begun.first_token_ms for _, begun in done]
        shares = [100 * begun.plan.fraction[0] for _, begun in done]
        shown = axes.scatter(x, y, c=shares, cmap="viridis", vmin=50, vmax=100, s=16)
        refused = [one.at_s for one in strain.asked if one.refused]
        axes.plot(refused, [highest] * len(refused), "x", color="#c2410c", markersize=5)
        axes.axhline(strain.objective_ms, color="#444444", linewidth=0.9, linestyle="--")
        axes.set_ylim(0, 1.06 * highest)
        axes.set_title(f"{strain.policy}: {in_time(strain)}", fontsize=10)
        axes.set_xlabel("Arrival (s)", fontsize=9)
        axes.grid(color="#dddddd", linewidth=0.5)
    every[0].set_ylabel("First token (ms); dashed: the objective", fontsize=9)
    bar = figure.colorbar(shown, ax=list(every))
    bar.set_label("Budget given (%)", fontsize=9)
    return figure


def in_time(strain: Strain) -> str:
    """How many of those that came have been answered in time."""
    came = [one for one in strain.asked if one.at_s is not None and (one.begun is not None or one.refused)]
    well = [one for one in came if one.begun is not None and one.begun.first_token_ms <= strain.objective_ms]
    refused = sum(one.refused for one in came)
    return f"{len(well)} of {len(came)} in time" + (f", {refused} refused" if refused else "")


def _slowest(strain: Strain) -> float:
    return max((one.begun.first_token_ms for one in strain.asked if one.begun is not None), default=0.0)


def _first(told: Told | None) -> str:
    return _NOTHING if told is None or told.begun is None else ms_text(told.begun.first_token_ms)


def _foretold(foreseen: Foreseen | None, told: Told | None) -> str:
    if told is not None and told.begun is not None and told.begun.predicted_ms is not None:
        return ms_text(told.begun.predicted_ms)
    if foreseen is not None and foreseen.budget.forecast is not None:
        return ms_text(foreseen.budget.forecast.ms)
    return _NOTHING


def _total(told: Told | None) -> str:
    return _NOTHING if told is None or told.ended is None else ms_text(told.ended.total_ms)


def _each(told: Told | None) -> str:
    if told is None or told.begun is None or told.ended is None or told.ended.new_tokens < 2:
        return _NOTHING
    return ms_text((told.ended.total_ms - told.begun.first_token_ms) / (told.ended.new_tokens - 1))
