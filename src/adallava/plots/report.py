"""The demo's report: one HTML file that needs nothing else.

Picture, style and drawings are inside the file and nothing is fetched, so it can be mailed and opened anywhere. All
text that comes from a model or a user is escaped. It takes plain data (``Report``), not models.
"""

from __future__ import annotations

import base64
import importlib.resources
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean

from adallava.plots.drawing import PlanDrawing
from adallava.plots.units import flops_text, ms_text, share_text

# No script, no fetching: a browser enforces what the page promises.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Row:
    """One model's answer at one budget."""

    model: str
    budget: str
    answer: str
    right: bool | None
    """Whether the answer is right; None where the right answer is not known."""
    plan: PlanDrawing
    flops: float
    """Prefill FLOPs (paper convention)."""
    share: float
    """Share of the base model's prefill FLOPs."""
    first_token_ms: float
    total_ms: float
    series: int = 0
    """0 for the base model, 1 and up for the adaptive ones: the colour of its bars."""


@dataclass(frozen=True)
class Section:
    """One question with its answers, the base model's first."""

    question: str
    rows: tuple[Row, ...]
    truth: str | None = None
    family: str | None = None


@dataclass(frozen=True)
class Report:
    """Everything the page shows."""

    image: bytes
    """The picture as PNG."""
    caption: str
    sections: tuple[Section, ...]
    method: str
    """How the times were measured, in one sentence."""
    facts: tuple[tuple[str, str], ...]
    """Names and values for the foot of the page: versions, device, seed."""
    smooth: bool = False
    """Scale the picture smoothly, for a photograph; the drawn scenes are small and shown pixel by pixel."""


def write_report(report: Report, path: Path) -> None:
    """Write the page, all or nothing; a report that is there is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(to_html(report))
        os.chmod(temporary, 0o644)  # mkstemp keeps files to their owner
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def to_html(report: Report) -> str:
    """Return the page."""
    style = (importlib.resources.files("adallava.plots") / "report.css").read_text(encoding="utf-8")
    rows = [row for section in report.sections for row in section.rows]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="color-scheme" content="light dark">
<title>AdaLLaVA: one model, any budget</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<h1>One model, any budget</h1>
<p class="lead">The same questions at several compute budgets. For each request a small scheduler, after reading the
question and the budget, switches parts of the language model off.</p>
</header>
<div class="top">
{_picture(report)}
<div class="charts">
{_flops_chart(rows)}
{_time_chart(rows)}
</div>
</div>
{_legend(rows)}
{"".join(_section(section) for section in report.sections)}
{_foot(report)}
</main>
</body>
</html>
"""


# -- the top: picture and charts --------------------------------------------------------------------------------------


def _picture(report: Report) -> str:
    data = base64.b64encode(report.image).decode("ascii")
    kind = "smooth" if report.smooth else "pixels"
    return (
        f'<figure class="card picture"><img class="{kind}" alt="the picture that the questions are about" '
        f'src="data:image/png;base64,{data}"><figcaption>{escape(report.caption)}</figcaption></figure>'
    )


def _flops_chart(rows: Sequence[Row]) -> str:
    def bar(some: Sequence[Row], largest: float) -> str:
        flops = fmean(row.flops for row in some)
        text = f"{flops_text(flops)} <small>{share_text(fmean(row.share for row in some))}</small>"
        return _bar(some[0].series, [(flops / largest, "")], text)

    largest = max(fmean(row.flops for row in some) for some in _by_run(rows).values())
    note = "Prefill of the language model, mean over the questions; paper convention."
    return _chart("Compute", note, rows, lambda some: bar(some, largest))


def _time_chart(rows: Sequence[Row]) -> str:
    def bar(some: Sequence[Row], largest: float) -> str:
        first, total = fmean(row.first_token_ms for row in some), fmean(row.total_ms for row in some)
        text = f"{ms_text(total)} <small>first {ms_text(first)}</small>"
        return _bar(some[0].series, [(first / largest, ""), ((total - first) / largest, "rest")], text)

    largest = max(fmean(row.total_ms for row in some) for some in _by_run(rows).values())
    note = "Measured, mean over the questions: to the first token (full colour), then to the last one (pale)."
    return _chart("Time", note, rows, lambda some: bar(some, max(largest, 1e-9)))


def _by_run(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        runs.setdefault((row.budget, row.model), []).append(row)
    return runs


def _chart(title: str, note: str, rows: Sequence[Row], bar: Callable[[Sequence[Row]], str]) -> str:
    """Bars grouped by budget; the base model is a group of its own, the measure of all others."""
    groups: dict[str, list[str]] = {}
    for (budget, model), some in _by_run(rows).items():
        name = model if some[0].series == 0 else budget
        label = "" if some[0].series == 0 else f'<span class="who">{escape(model)}</span>'
        groups.setdefault(name, []).append(f'<div class="line">{label}{bar(some)}</div>')
    body = "".join(f"<dt>{escape(name)}</dt><dd>{''.join(lines)}</dd>" for name, lines in groups.items())
    return f'<section class="card"><h2>{title}</h2><dl class="chart">{body}</dl><p class="note">{note}</p></section>'


def _bar(series: int, parts: Sequence[tuple[float, str]], text: str) -> str:
    spans = "".join(
        f'<span class="fill s{min(series, 3)} {kind}" style="width:{100 * min(max(share, 0), 1):.2f}%"></span>'
        for share, kind in parts
    )
    return f'<span class="bar">{spans}</span><span class="value">{text}</span>'


def _legend(rows: Sequence[Row]) -> str:
    stacked = next((row.plan for row in rows if row.plan.per_layer > 1), None)
    entries = [
        (PlanDrawing(1), "always on (prefix)"),
        (PlanDrawing(0, (1,)), "layer on"),
        (PlanDrawing(0, (0,)), "layer off"),
    ]
    if stacked is not None:
        some, each = max(1, stacked.per_layer // 2), stacked.per_layer
        entries.append((PlanDrawing(0, (some,), each), f"{some} of a layer's {each} head groups on"))
    items = "".join(f"<li>{drawing.svg()} {escape(text)}</li>" for drawing, text in entries)
    return f'<ul class="legend"><li><span><b>Plan</b>, one column per layer:</span></li>{items}</ul>'


# -- the questions ----------------------------------------------------------------------------------------------------

_HEAD = (
    ("Model", ""),
    ("Budget", "number"),
    ("Answer", ""),
    ("Plan", ""),
    ("On", "number"),
    ("FLOPs", "number"),
    ("Share", "number"),
    ("First token", "number"),
    ("Total", "number"),
)


def _section(section: Section) -> str:
    family = f'<span class="tag">{escape(section.family)}</span>' if section.family else ""
    truth = f'<p class="truth">Right answer: <b>{escape(section.truth)}</b></p>' if section.truth is not None else ""
    head = "".join(f'<th scope="col" class="{kind}">{name}</th>' for name, kind in _HEAD)
    pairs = zip((None, *section.rows), section.rows, strict=False)
    body = "".join(_row(row, before is not None and row.model != before.model) for before, row in pairs)
    return (
        f'<section class="card question"><h2>{escape(section.question)} {family}</h2>{truth}'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>\n'
    )


def _row(row: Row, starts_group: bool) -> str:
    cells = (
        ("", f'<span class="dot s{min(row.series, 3)}"></span>{escape(row.model)}'),
        ("number", escape(row.budget)),
        ("answer", _answer(row)),
        ("", row.plan.svg()),
        ("number", row.plan.count),
        ("number", flops_text(row.flops)),
        ("number", share_text(row.share)),
        ("number", ms_text(row.first_token_ms)),
        ("number", ms_text(row.total_ms)),
    )
    kind = ' class="first"' if starts_group else ""
    return f"<tr{kind}>" + "".join(f'<td class="{name}">{text}</td>' for name, text in cells) + "</tr>\n"


def _answer(row: Row) -> str:
    text = escape(row.answer) if row.answer else "<i>(empty)</i>"
    if row.right is None:
        return text
    kind, mark, word = ("right", "✓", "right") if row.right else ("wrong", "✗", "wrong")
    return f'<span class="{kind}" title="{word}">{mark}</span> {text}'


def _foot(report: Report) -> str:
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in report.facts)
    return f'<footer><p>{escape(report.method)}</p><dl class="facts">{facts}</dl></footer>'
