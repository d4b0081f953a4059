"""The items of the paper in miniature: result rows in, tables and figures out, with the paper's numbers beside ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from adallava.plots import figures
from adallava.plots.figures import Line
from adallava.plots.tables import (
    TABLE_A,
    TABLE_A_COLUMNS,
    Table,
    relative,
    table_b,
)
from adallava.results import ResultRow

BASE, L, H = "base", "L", "H"
"""Roles of models; what others a reproduction has, "L-random" or "H-prumerge+", begins with the variant."""
_NAMES = {BASE: "base model", L: "AdaLLaVA-L", H: "AdaLLaVA-H"}
MEAN = "mean"
NOTHING = "-"


@dataclass(frozen=True)
class Item:
    """One table or figure of the paper, in miniature."""

    name: str
    title: str
    text: str
    """What is shown, and what the paper shows in its place."""
    tables: tuple[Table, ...] = ()
    figures: dict[str, Figure] = field(default_factory=dict)
    """File name without ending -> figure."""


class Runs:
    """The rows of sweeps, found by what they are about."""

    def __init__(self, rows: Iterable[ResultRow], roles: Mapping[str, str]) -> None:
        """Name the models of ``rows`` by their roles; rows of models that have none are left out."""
        self.rows = [
            replace(row, config={**row.config, "model": roles[row.config["model"]]})
            for row in rows
            if row.config["model"] in roles
        ]
        self._by_key = {(*self._key(row), row.name): row for row in self.rows}
        self.tasks = list(dict.fromkeys(row.name for row in self.rows if row.name != MEAN))

    @staticmethod
    def _key(row: ResultRow) -> tuple[str, ...]:
        return tuple(row.config[name] for name in ("model", "budget", "mode", "token_selection"))

    def find(
        self, model: str, budget: str, mode: str = "learned", selection: str = "none", task: str = MEAN
    ) -> dict[str, Any] | None:
        """The numbers of one run on one task, or None if it was not run."""
        row = self._by_key.get((model, budget, "none" if model == BASE else mode, selection, task))
        return None if row is None else row.metrics

    def values(self, model: str, budget: str, mode: str = "learned", selection: str = "none") -> list[float] | None:
        """Accuracies on every task, or None."""
        found = [self.find(model, budget, mode, selection, task) for task in self.tasks]
        return None if None in found else [metrics["accuracy"] for metrics in found if metrics is not None]

    def line(self, model: str, label: str, mode: str = "learned", over: str = "flops_frac") -> Line | None:
        """Mean accuracy over budgets; over: "flops_frac" or "budget"."""
        points = []
        for row in self.rows:
            config = row.config
            if row.name == MEAN and (config["model"], config["mode"], config["token_selection"]) == (
                model,
                mode,
                "none",
            ):
                x = row.metrics["flops_frac"] if over == "flops_frac" else float(config["budget"].rstrip("%")) / 100
                points.append((x, row.metrics["accuracy"], row.metrics["interval"]))
        x, y, bars = zip(*sorted(points), strict=True) if points else ((), (), ())
        return Line(label, x, y, bars) if points else None

    def models(self) -> list[str]:
        """All models, in order."""
        return list(dict.fromkeys(row.config["model"] for row in self.rows))


def percent(share: float | None, digits: int = 1) -> str:
    """ "84.6", or "-" for nothing."""
    return NOTHING if share is None else f"{100 * share:.{digits}f}"


def with_interval(metrics: dict[str, Any] | None) -> str:
    """ "84.6 ± 0.8", or "-"; of a task that is told in points, such as MME, in points."""
    if metrics is None:
        return NOTHING
    best = _best(metrics)
    return f"{metrics['accuracy'] * best:.1f} ± {metrics['interval'] * best:.1f}"


def _number(value: float | None, unit: float) -> str:
    """Three digits, or "-"."""
    return NOTHING if value is None else f"{value / unit:.3g}"


def in_its_unit(metrics: dict[str, Any] | None) -> str:
    """ "84.6" percent, or "1510.7" points; "-" for nothing."""
    return NOTHING if metrics is None else f"{metrics['accuracy'] * _best(metrics):.1f}"


def _best(metrics: dict[str, Any]) -> float:
    """What the best possible score is written as."""
    return metrics["out_of"] if metrics.get("out_of", 1) != 1 else 100


# -- tables -----------------------------------------------------------------------------------------------------------


def table_a(runs: Runs) -> Item:
    """Tab. A: every task of the benchmark, L against the base model."""
    rows = []
    for model, budget in ((BASE, "100%"), (L, "100%"), (L, "85%"), (L, "60%")):
        metrics = [runs.find(model, budget, task=task) for task in (*runs.tasks, MEAN)]
        cells = [with_interval(m) for m in metrics]
        rows.append((f"{_NAMES[model]}, {budget}", *cells))
    paper = tuple(
        (f"{'LLaVA-1.5-7B' if variant == 'base' else 'AdaLLaVA-L-7B'}, {budget}", *(f"{v:.1f}" for v in values))
        for (variant, budget), values in TABLE_A.items()
    )
    return Item(
        "table-a",
        "Tab. A: every task",
        "Accuracy in % (MME in points) with 95 % intervals; below it the paper's LLaVA-1.5-7B on the benchmarks "
        "that are named there.",
        (Table(("model", *runs.tasks, "mean"), tuple(rows)), Table(("paper", *TABLE_A_COLUMNS), paper)),
    )


def table_b_item(runs: Runs) -> Item:
    """Tab. B: models, budgets and token selections; the paper's accuracy relative to its base model beside ours."""
    base = runs.values(BASE, "100%")
    selections = list(dict.fromkeys(row.config["token_selection"] for row in runs.rows))
    rows = []
    for selection in selections:
        paper = table_b(selection.partition(":")[0])
        reference = table_b("none")["base", "100%"]
        for model, budget, trained in _lines_of_table_b(runs, selection):
            metrics = runs.find(trained, budget, selection=selection)
            if metrics is None:
                continue
            values = runs.values(trained, budget, selection=selection)
            cells = [in_its_unit(runs.find(trained, budget, selection=selection, task=task)) for task in runs.tasks]
            theirs = paper.get((model, budget))
            rows.append(
                (
                    f"{_NAMES[model]}{'' if trained == model else ', trained so'}",
                    _short(selection),
                    budget,
                    _number(metrics.get("prefill_flops"), 1e9),
                    percent(metrics["flops_frac"]),
                    _number(metrics.get("roofline_ms"), 1),
                    *cells,
                    with_interval(metrics),
                    percent(relative(values, base)) if values and base else NOTHING,
                    # The paper trains under PruMerge and PruMerge+.
                    percent(relative(theirs, reference)) if theirs else NOTHING,
                )
            )
    costs = ("GFLOPs", "FLOPs %", "prefill ms (roofline)")
    columns = ("model", "token selection", "budget", *costs, *runs.tasks, "mean", "relative %", "paper's relative %")
    text = (
        "Accuracy in %, MME in points. FLOPs of the prefill in the paper's convention, and as a share of the base "
        "model's with all visual tokens; time of the prefill on the paper's device, a V100, by its roofline. Relative: "
        "mean over tasks of the accuracy relative to the base model with all tokens; the paper's is that of "
        "LLaVA-1.5-7B on its six benchmarks, where AdaLLaVA is trained under PruMerge and PruMerge+; here only the "
        "lines that say so are, the others were trained with all tokens."
    )
    return Item("table-b", "Tab. B: models, budgets, token selection", text, (Table(columns, tuple(rows)),))


def _lines_of_table_b(runs: Runs, selection: str) -> list[tuple[str, str, str]]:
    """Model, budget, and the name of the run: the plain model, then the one that was trained under the selection."""
    lines = [(BASE, "100%", BASE)]
    for model in (L, H):
        for trained in (model, f"{model}-{_short(selection)}"):
            if trained in runs.models():
                lines += [(model, budget, trained) for budget in ("100%", "85%", "60%")]
    return lines


def _short(selection: str) -> str:
    """ "fastv" for its usual setting, "random:ratio=0.25" as it is."""
    return "fastv" if selection in ("fastv:ratio=0.5", "fastv:layer=2,ratio=0.5") else selection


def table_c(rows: Sequence[ResultRow]) -> Item:
    """Tab. C: answers to one picture under falling budgets; rows "plan"."""
    cells = tuple(
        (row.config["model"], row.config["question"], row.config["budget"], row.metrics["answer"]) for row in rows
    )
    text = "What the models say about one picture as the budget falls."
    return Item("table-c", "Tab. C: answers", text, (Table(("model", "question", "budget", "answer"), cells),))


def content(runs: Runs) -> Item:
    """Learned plans against the best single plan of each budget, which the paper does not show."""
    rows = []
    for model in (L, H):
        for budget in dict.fromkeys(row.config["budget"] for row in runs.rows):
            fixed = next(
                (
                    row.metrics
                    for row in runs.rows
                    if row.name == MEAN
                    and (row.config["model"], row.config["budget"]) == (model, budget)
                    and row.config["mode"].startswith("fixed:")
                ),
                None,
            )
            learned = runs.find(model, budget)
            if fixed is None or learned is None:
                continue
            gain = 100 * (learned["accuracy"] - fixed["accuracy"])
            plans = learned["plans"]
            told = (str(plans["distinct"]), percent(plans["top_share"])) if plans else (NOTHING, NOTHING)
            rows.append((_NAMES[model], budget, with_interval(learned), with_interval(fixed), f"{gain:+.1f}", *told))
    columns = ("model", "budget", "learned plans", "best fixed plan", "gain", "learned plans in use", "commonest, %")
    text = (
        "Does it help that plans follow the input? The best fixed plan of a budget was chosen on other questions: "
        "among all plans where there are at most twenty, else among the twenty that the scheduler chose most often."
    )
    return Item("content", "Learned plans against the best fixed plan", text, (Table(columns, tuple(rows)),))


# -- figures ----------------------------------------------------------------------------------------------------------


def fig_a(rows: Sequence[ResultRow]) -> Item:
    """Fig. A: the training curve."""
    text = "Loss of the adaptive stage, a random budget for every sample."
    return Item("fig-a", "Fig. A: training curve", text, figures={"training": figures.training_curve(rows)})


def _relative_to(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float]:
    """A ratio of accuracies and its interval, as if the two had been asked different questions."""
    ratio = ours["accuracy"] / theirs["accuracy"]
    return ratio, float(np.hypot(ours["interval"], ratio * theirs["interval"]) / theirs["accuracy"])


def fig_b(runs: Runs) -> Item:
    """Fig. B: every task relative to the base model."""
    lines = []
    base = [runs.find(BASE, "100%", task=task) for task in runs.tasks]
    for budget in ("100%", "85%", "60%"):
        found = [runs.find(L, budget, task=task) for task in runs.tasks]
        pairs = [(ours, theirs) for ours, theirs in zip(found, base, strict=True) if ours and theirs]
        if pairs and len(pairs) == len(base) and all(theirs["accuracy"] for _, theirs in pairs):
            told = [_relative_to(ours, theirs) for ours, theirs in pairs]
            lines.append(Line(f"AdaLLaVA-L, {budget}", (), *zip(*told, strict=True)))
    text = (
        "AdaLLaVA-L on every task, relative to the base model, with 95 % intervals (the paper: Mipha-3B on MME's "
        "tasks, also from 60 % in the centre; it loses 3.4 % on average at a budget of 85 % and 6.1 % at 60 %)."
    )
    return Item("fig-b", "Fig. B: tasks", text, figures={"tasks": figures.radar(runs.tasks, lines)})


def fig_c(runs: Runs, designs: Mapping[str, str]) -> Item:
    """Fig. C: designs of switches; designs: role -> what it says."""
    lines = [line for role, told in designs.items() if (line := runs.line(role, told)) is not None]
    text = (
        "Accuracy over compute: number of switches, size of head groups, L against H (the paper: 16 and 24 switches, "
        "groups of 8 and 4 heads)."
    )
    return Item("fig-c", "Fig. C: switches", text, figures={"switches": figures.accuracy_over_compute(lines)})


def fig_d(runs: Runs) -> Item:
    """Fig. D: the learned scheduler against random plans."""
    learned = runs.line(L, "learned", over="budget")
    draws: dict[str, list[Line]] = {}
    for model, label in ((L, "random plans, same weights"), (f"{L}-random", "trained under random plans")):
        modes = dict.fromkeys(row.config["mode"] for row in runs.rows if row.config["model"] == model)
        found = [runs.line(model, label, mode, "budget") for mode in modes if mode.startswith("random")]
        if kept := [line for line in found if line is not None]:
            draws[label] = kept
    text = "AdaLLaVA-L with its scheduler and with plans drawn at random; shaded: from the worst to the best draw."
    drawn = {} if learned is None else {"random": figures.learned_against_random(learned, draws)}
    return Item("fig-d", "Fig. D: learned against random plans", text, figures=drawn)


def fig_e(rows: Sequence[ResultRow], by: str = "budget") -> Item:
    """Fig. E: plans of one input under falling budgets, or of several questions (by "question") at one."""
    by_model: dict[str, list[ResultRow]] = {}
    for row in rows:
        by_model.setdefault(row.config["model"], []).append(row)
    drawn = {f"plans-{model}": figures.plans(some, by) for model, some in by_model.items()}
    about = f'for one picture and "{rows[0].config["question"]}", as the budget falls' if by == "budget" else ""
    text = (
        f"What runs of each layer {about or 'for each question'}. Layers to the left of the line always run; the "
        "darker, the more of a layer runs."
    )
    return Item("fig-e", "Fig. E: plans", text, figures=drawn)


def fig_f(picture: np.ndarray, rows: Sequence[ResultRow]) -> Item:
    """Fig. F: where the latency token looks, for different questions."""
    text = "The latency token's attention over the picture, mean over the layers that ran, for different questions."
    return Item("fig-f", "Fig. F: attention by question", text, figures={"questions": figures.overlays(picture, rows)})


def fig_g(rows: Sequence[ResultRow]) -> Item:
    """Fig. G: the latency token's attention layer by layer."""
    text = f'The same layer by layer, for the question "{rows[0].config["question"]}".'
    return Item("fig-g", "Fig. G: attention by layer", text, figures={"layers": figures.layers(rows)})
