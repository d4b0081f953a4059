"""What the demo page shows, as HTML, pictures and figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import matplotlib
import numpy as np
from PIL import Image

from adallava.cost import Cost
from adallava.plan import ExecutionPlan
from adallava.plots.drawing import PlanDrawing
from adallava.plots.units import flops_text, ms_text, share_text
from adallava.web.studio import Strain, Times, Told

PICTURE = 288
"""Pixels of a side."""
STYLE = """
.plan { height: 34px; width: auto; max-width: 100%; display: block; margin: 4px 0 6px; }
.plan .prefix { fill: #a9b4c4; } .plan .on { fill: #2563eb; } .plan .off { fill: none; stroke: #b6c0cf; }
.strains { display: flex; flex-wrap: wrap; gap: 12px; }
.strains figure { flex: 1 1 340px; margin: 0; }
.strains text { font-size: 11px; fill: currentColor; opacity: .8; }
.strains .end { text-anchor: end; }
.strains .axis { stroke: #8888; fill: none; } .strains .objective { stroke: currentColor; stroke-dasharray: 5 4; }
.facts { border: 0 !important; border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
.facts th, .facts td { text-align: right; padding: 3px 8px; font-weight: 400;
  border: 0 !important; border-bottom: 1px solid #8884 !important; }
.facts tr, .facts thead, .facts tbody { border: 0 !important; }
.facts th:first-child, .facts td:first-child { text-align: left; }
.facts thead th { opacity: .7; }
.said { font-size: 20px; min-height: 1.6em; font-weight: 600; margin: 0 0 2px; }
#picture img { width: 100%; object-fit: contain; image-rendering: pixelated; }
.soft { opacity: .75; font-size: 13px; margin: 0; }
.wrong { color: #c2410c; font-weight: 600; }
footer { display: none !important; }
"""
_NOTHING = "-"
_WIDE, _HIGH = 480, 200


def plan_html(plan: ExecutionPlan) -> str:
    """The plan as a row of switches, and what it is."""
    drawing = PlanDrawing.of(plan)
    each = "layer" if drawing.per_layer == 1 else f"group of heads and neurons, {drawing.per_layer} to a layer"
    told = f"{drawing.count} on; grey always runs, blue was chosen for this picture and question; a switch is a {each}."
    return f'<div>{drawing.svg()}<p class="soft">{escape(told)}</p></div>'


def answer_html(told: Told) -> str:
    """The answer so far."""
    more = "" if told.ended is not None else " ▍"
    remark = told.begun.remark if told.begun is not None else None
    below = f'<p class="soft">{escape(remark)}</p>' if remark else ""
    return f'<p class="said">{escape(told.text)}{more}</p>{below}'


def note_html(text: str) -> str:
    """A remark."""
    return f'<p class="soft">{escape(text)}</p>'


def error_html(error: Exception) -> str:
    """What is wrong."""
    return f'<p class="wrong">{escape(str(error))}</p>'


def facts_html(cost: Cost | None, ours: Times | None = None, theirs: Times | None = None) -> str:
    """FLOPs and times of this budget beside the whole model's; what is not known yet is a dash."""
    here, whole = (_NOTHING, _NOTHING), (_NOTHING, _NOTHING)
    if cost is not None:
        here = flops_text(cost.prefill_flops), share_text(cost.frac)
        whole = flops_text(cost.prefill_flops / cost.frac), share_text(1.0)
    rows = [
        ("prefill", here[0], whole[0]),
        ("share of the whole model", here[1], whole[1]),
        ("first token, foretold", *(_ms(times, "foretold_ms") for times in (ours, theirs))),
        ("first token, measured", *(_ms(times, "first_ms") for times in (ours, theirs))),
        ("of that, reading text and picture", *(_ms(times, "before_ms") for times in (ours, theirs))),
        ("each token after it", *(_ms(times, "each_ms") for times in (ours, theirs))),
        ("whole answer", *(_ms(times, "whole_ms") for times in (ours, theirs))),
    ]
    body = "".join(f"<tr><td>{name}</td><td>{one}</td><td>{other}</td></tr>" for name, one, other in rows)
    head = "<tr><th></th><th>this budget</th><th>whole model</th></tr>"
    told = "" if ours is None else f"times: medians of {ours.repetitions}, measured in turns after a warm-up"
    table = f'<table class="facts"><thead>{head}</thead><tbody>{body}</tbody></table>'
    return f'{table}<p class="soft">{told}</p>'


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


def strains_html(strains: Sequence[Strain]) -> str:
    """First tokens of the requests of each run over time, by how much of the model they got; refused ones on top.

    Drawn by hand: a plotting library, called beside a server in the same process, would be its heaviest load.
    """
    highest = max(2.0 * strain.objective_ms for strain in strains)
    highest = max([highest, *(_slowest(strain) for strain in strains)])
    return f'<div class="strains">{"".join(_strain(strain, highest) for strain in strains)}</div>'


def _strain(strain: Strain, highest: float) -> str:
    last = max((one.at_s for one in strain.asked if one.at_s is not None), default=0.0)
    across = _WIDE / max(last, 1.0)

    def place(at: float, ms: float) -> tuple[float, float]:
        return round(at * across, 1), round(_HIGH * (1 - ms / highest), 1)

    marks = []
    for one in strain.asked:
        if one.at_s is None:
            continue
        if one.begun is not None:
            x, y = place(one.at_s, one.begun.first_token_ms)
            light = 20 + round(100 * (one.begun.plan.fraction[0] - 0.5))
            marks.append(f'<circle cx="{x}" cy="{y}" r="3" fill="hsl(217 83% {100 - light}%)"/>')
        elif one.refused:
            x, _ = place(one.at_s, highest)
            marks.append(f'<path d="M{x - 3} 0l6 6m0 -6l-6 6" stroke="#c2410c" fill="none"/>')
    _, line = place(0, strain.objective_ms)
    return (
        f"<figure><figcaption><b>{escape(strain.policy)}</b>: {in_time(strain)}</figcaption>"
        f'<svg viewBox="-60 -8 {_WIDE + 70} {_HIGH + 34}">'
        f'<path d="M0 0V{_HIGH}H{_WIDE}" class="axis"/><path d="M0 {line}H{_WIDE}" class="objective"/>'
        f'<text x="-6" y="8" class="end">{ms_text(highest)}</text>'
        f'<text x="-6" y="{line + 4}" class="end">{ms_text(strain.objective_ms)}</text>'
        f'<text x="{_WIDE}" y="{_HIGH + 18}" class="end">arrival, {last:.0f} s</text>{"".join(marks)}</svg></figure>'
    )


def in_time(strain: Strain) -> str:
    """How many of those that came have been answered in time."""
    came = [one for one in strain.asked if one.at_s is not None and (one.begun is not None or one.refused)]
    well = [one for one in came if one.begun is not None and one.begun.first_token_ms <= strain.objective_ms]
    refused = sum(one.refused for one in came)
    return f"{len(well)} of {len(came)} in time" + (f", {refused} refused" if refused else "")


def _slowest(strain: Strain) -> float:
    return max((one.begun.first_token_ms for one in strain.asked if one.begun is not None), default=0.0)


def _ms(times: Times | None, name: str) -> str:
    value = None if times is None else getattr(times, name)
    return _NOTHING if value is None else ms_text(value)
