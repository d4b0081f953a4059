"""``adallava sweep``: accuracy over budgets, as a table or as JSON, with a progress bar on stderr."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from adallava.cli.group import Stopped
from adallava.evaluation.sweep import MEAN, NO_MODE, Listener, SweepSettings, flat
from adallava.evaluation.sweep import sweep as run_sweep
from adallava.mini.questions import FAMILIES
from adallava.plots.units import share_text
from adallava.results import ResultRow

_FILE_WIDTH = 120
_LAYERS = "layers on (· never, █ always)"


def sweep(models: Sequence[str], settings: SweepSettings, as_json: bool) -> None:
    """Run a sweep and print its rows; ``Stopped`` says after Ctrl-C how to go on."""
    try:
        with _Bar() as bar:
            rows = run_sweep(models, settings, bar)
    except KeyboardInterrupt as error:
        raise Stopped(_how_to_go_on(settings)) from error
    _warn_of_failures(rows)
    if as_json:
        print(json.dumps([flat(row) for row in rows], indent=2, allow_nan=False))
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = _FILE_WIDTH  # a pipe or file has no width of its own, and 80 columns would break headers
        console.print(accuracy_table(rows), "", plan_table(rows), sep="\n")


def accuracy_table(rows: Sequence[ResultRow]) -> Table:
    """Return one line per model, budget and mode: the mean with its 95 % interval, and each task."""
    first = rows[0].config
    title = f"Accuracy in %, {first['limit']:,} questions per task, seed {first['seed']}"
    table, groups = _start(title, rows, ("mean", *FAMILIES))
    for key, group in groups.items():
        mean = group[MEAN].metrics
        accuracy = f"[bold]{100 * mean['accuracy']:.1f}[/bold] ± {100 * mean['interval']:.1f}"
        table.add_row(
            *map(escape, key), accuracy, *(f"{100 * group[task].metrics['accuracy']:.1f}" for task in FAMILIES)
        )
    return table


def plan_table(rows: Sequence[ResultRow]) -> Table:
    """Return one line per model, budget and mode: FLOPs, how plans differ between inputs, how often a layer is on."""
    table, groups = _start(
        "Plans of all tasks: how many differ, and how often each layer after the prefix is on",
        rows,
        ("FLOPs", "plans", "commonest", _LAYERS),
    )
    for key, group in groups.items():
        mean = group[MEAN].metrics
        share = "-" if mean["flops_frac"] is None else share_text(mean["flops_frac"])
        plans = mean["plans"]
        told = (str(plans["distinct"]), share_text(plans["top_share"]), _levels(plans)) if plans else ("-", "-", "-")
        table.add_row(*map(escape, key), share, *told)
    return table


def _start(
    title: str, rows: Sequence[ResultRow], columns: Sequence[str]
) -> tuple[Table, dict[tuple[str, ...], dict[str, ResultRow]]]:
    """An empty table with the columns that name a row, and the rows by these names and by task."""
    table = Table(title=title, title_justify="left", box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    modes = {row.config["mode"] for row in rows} - {NO_MODE}
    names = ["model", "budget", *(["mode"] if modes - {"learned"} else [])]
    for name in (*names, *columns):
        left = name in ("model", "mode", _LAYERS)
        table.add_column(name, justify="left" if left else "right", no_wrap=name not in FAMILIES, overflow="fold")
    groups: dict[tuple[str, ...], dict[str, ResultRow]] = {}
    for row in rows:
        groups.setdefault(tuple(row.config[name] for name in names), {})[row.name] = row
    return table, groups


def _levels(plans: dict[str, Any]) -> str:
    return "".join("·▁▂▃▄▅▆▇█"[math.ceil(8 * frac)] for frac in plans["layer_on_frac"])


def _how_to_go_on(settings: SweepSettings) -> str:
    if settings.out is None:
        return "stopped. Nothing was kept: with --out FILE a sweep can go on where it was stopped."
    return f"stopped. Finished tasks are in {settings.out}; the same command goes on from there."


def _warn_of_failures(rows: Sequence[ResultRow]) -> None:
    failed = [row for row in rows if row.name != MEAN and row.metrics["failed"]]
    console = Console(stderr=True)
    for row in failed:
        console.print(
            f"warning: {row.metrics['failed']} of {row.metrics['n']} questions failed in {row.config['model']}, "
            f"{row.config['budget']}, {row.name}, and count as wrong. The first: {row.metrics['failures'][0]}",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


class _Bar(Listener):
    """A progress bar on a terminal, and a line per finished task in a log."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("questions"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("checking", total=None)

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def on_total(self, questions: int) -> None:
        self.progress.update(self.task, total=questions)

    def on_model(self, model: str) -> None:
        self.progress.update(self.task, description=f"loading {model}")

    def on_questions(self, count: int) -> None:
        self.progress.advance(self.task, count)

    def on_row(self, row: ResultRow) -> None:
        config, metrics = row.config, row.metrics
        mode = "" if config["mode"] in (NO_MODE, "learned") else f" {config['mode']}"
        self.progress.update(self.task, description=f"{config['model']} {config['budget']}{mode}")
        self.on_note(
            f"{config['model']} {config['budget']}{mode} {row.name}: "
            f"{100 * metrics['accuracy']:.1f} ± {100 * metrics['interval']:.1f} %"
        )

    def on_note(self, text: str) -> None:
        self.progress.console.print(text, style="dim", markup=False, soft_wrap=True)
