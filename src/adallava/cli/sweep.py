"""``adallava sweep``: accuracy over budgets, as a table or as JSON, with a progress bar on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from adallava.cli.group import Stopped
from adallava.errors import ConfigError
from adallava.evaluation.sweep import MEAN, NO_MODE, Listener, SweepSettings, flat
from adallava.evaluation.sweep import sweep as run_sweep
from adallava.mini.questions import FAMILIES
from adallava.plots.units import share_text
from adallava.results import ResultRow

_FILE_WIDTH = 120
_LAYERS, _TOKENS = "layers on", "tokens"
_NUMBER_WIDTH = len("100.0")


def sweep(models: Sequence[str], settings: SweepSettings, as_json: bool) -> None:
    """Run a sweep and print its rows; ``Stopped`` says after Ctrl-C how to go on."""
    try:
        with SweepBar() as bar:
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
        print_tables(rows, console)


def print_tables(rows: Sequence[ResultRow], console: Console) -> None:
    """Print both tables; where they are too wide, names are folded, and never a number."""
    accuracy = accuracy_table(rows)
    wanted = console.measure(accuracy, options=console.options.update(width=10 * console.width)).maximum
    if _selects(rows) and wanted > console.width:
        accuracy = accuracy_table(rows, narrow=True)
    console.print(accuracy, "", plan_table(rows), sep="\n")


def split_selections(text: str) -> list[str]:
    """Split a list of token selections at its commas; "setting=value" belongs to the selection before it.

    "none,fastv:layer=3,ratio=0.75,prumerge" is three. Raises ``ConfigError`` for an entry that belongs to none.
    """
    selections: list[str] = []
    for part in map(str.strip, text.split(",")):
        if not part:
            raise ConfigError(f"token selections {text!r} have an empty entry. Write a list such as 'none,prumerge+'.")
        if ":" in part or "=" not in part:
            selections.append(part)
        elif selections and ":" in selections[-1]:
            selections[-1] += f",{part}"
        else:
            raise ConfigError(
                f"token selections {text!r}: the setting {part!r} must come after a selection and a colon. Write "
                "'fastv:layer=3,ratio=0.75'."
            )
    return selections


def split_tasks(text: str) -> tuple[str, ...]:
    """Split a list of tasks; "mini" stands for all families of the mini benchmark."""
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise ConfigError(f"tasks {text!r} have an empty entry. Write a list such as 'mini' or 'pope,mme'.")
    return tuple(name for part in names for name in (FAMILIES if part == "mini" else (part,)))


def accuracy_table(rows: Sequence[ResultRow], narrow: bool = False) -> Table:
    """Return one line per run of a model: the mean with its 95 % interval, and each task.

    narrow: fold the names of tasks to the width of their numbers, which leaves more room for token selections.
    """
    tasks = _tasks(rows)
    limits = dict.fromkeys(row.config["limit"] for row in rows if row.name != MEAN)
    asked = " or ".join("all" if limit is None else f"{limit:,}" for limit in limits)
    title = f"Accuracy in %, {asked} questions per task, seed {rows[0].config['seed']}"
    others = {row.name: row.metrics["out_of"] for row in rows if row.metrics.get("out_of", 1) not in (1, 100)}
    title += "".join(f"; {task} out of {out_of:,.0f}" for task, out_of in others.items())
    table, groups = _start(title, rows, ("mean", *tasks), narrow)
    for key, group in groups.items():
        mean = group[MEAN].metrics
        accuracy = f"[bold]{100 * mean['accuracy']:.1f}[/bold] ± {100 * mean['interval']:.1f}"
        table.add_row(*map(escape, key), accuracy, *(_score(group[task].metrics) for task in tasks))
    return table


def _tasks(rows: Sequence[ResultRow]) -> list[str]:
    return list(dict.fromkeys(row.name for row in rows if row.name != MEAN))


def _score(metrics: dict[str, Any]) -> str:
    """In the unit that the task is told in: a share in percent, MME's points as they are."""
    out_of = metrics.get("out_of", 1)
    return f"{metrics['score']:.1f}" if out_of != 1 else f"{100 * metrics['accuracy']:.1f}"


def plan_table(rows: Sequence[ResultRow]) -> Table:
    """Return one line per run of a model: FLOPs, tokens, how plans differ between inputs, how often a layer is on."""
    selects = _selects(rows)
    title = "Plans of all tasks: how many differ, how often each layer after the prefix is on (· never, █ always)"
    table, groups = _start(
        title + (", prompt tokens kept in the last layer" if selects else ""),
        rows,
        ("FLOPs", *(["kept"] if selects else []), "plans", "commonest", _LAYERS),
    )
    for key, group in groups.items():
        mean = group[MEAN].metrics
        share = "-" if mean["flops_frac"] is None else share_text(mean["flops_frac"])
        plans = mean["plans"]
        told = (str(plans["distinct"]), share_text(plans["top_share"]), _levels(plans)) if plans else ("-", "-", "-")
        table.add_row(*map(escape, key), share, *([_kept(mean)] if selects else []), *told)
    return table


def _start(
    title: str, rows: Sequence[ResultRow], columns: Sequence[str], narrow: bool = False
) -> tuple[Table, dict[tuple[str, ...], dict[str, ResultRow]]]:
    """An empty table with the columns that name a row, and the rows by these names and by task."""
    table = Table(title=title, title_justify="left", box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    tasks = _tasks(rows)
    modes = {row.config["mode"] for row in rows} - {NO_MODE}
    names = ["model", "budget", *(["mode"] if modes - {"learned"} else [])]
    names += ["token_selection"] if _selects(rows) else []
    titles = [_TOKENS if name == "token_selection" else name for name in names]
    for name in (*titles, *columns):
        table.add_column(
            name,
            justify="left" if name in ("model", "mode", _TOKENS, _LAYERS) else "right",
            no_wrap=name not in (*tasks, _TOKENS),
            max_width=_NUMBER_WIDTH if narrow and name in tasks else None,
            overflow="fold",
        )
    groups: dict[tuple[str, ...], dict[str, ResultRow]] = {}
    for row in rows:
        groups.setdefault(tuple(row.config[name] for name in names), {})[row.name] = row
    return table, groups


def _selects(rows: Sequence[ResultRow]) -> bool:
    return any(row.config["token_selection"] != "none" for row in rows)


def _kept(mean: dict[str, Any]) -> str:
    if mean["last_layer_tokens"] is None:
        return "-"
    return f"{mean['last_layer_tokens']:.0f} of {mean['prompt_tokens']:.0f}"


def _levels(plans: dict[str, Any]) -> str:
    return "".join("·▁▂▃▄▅▆▇█"[math.ceil(8 * frac)] for frac in plans["layer_on_frac"])


def _run_name(row: ResultRow) -> str:
    """The model, the budget, and what is not as usual."""
    config = row.config
    mode = [] if config["mode"] in (NO_MODE, "learned") else [config["mode"]]
    selection = [] if config["token_selection"] == "none" else [config["token_selection"]]
    return " ".join((config["model"], config["budget"], *mode, *selection))


def _how_to_go_on(settings: SweepSettings) -> str:
    if settings.out is None:
        return "stopped. Nothing was kept: with --out FILE a sweep can go on where it was stopped."
    return f"stopped. Finished tasks are in {settings.out}; the same command goes on from there."


def _warn_of_failures(rows: Sequence[ResultRow]) -> None:
    failed = [row for row in rows if row.name != MEAN and row.metrics["failed"]]
    console = Console(stderr=True)
    for row in failed:
        console.print(
            f"warning: {row.metrics['failed']} of {row.metrics['n']} questions failed in {_run_name(row)}, {row.name}, "
            f"and count as wrong. The first: {row.metrics['failures'][0]}",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


class SweepBar(Listener):
    """A progress bar on a terminal, and a line per finished task in a log."""

    def __init__(self) -> None:
        # The file itself: what a task prints meanwhile is kept from sys.stderr, and the bar must not be.
        self.console = Console(file=sys.stderr, highlight=False)
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

    def __enter__(self) -> SweepBar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def on_total(self, questions: int) -> None:
        """Set the length of the bar."""
        self.progress.update(self.task, total=questions)

    def on_model(self, model: str) -> None:
        """Name the model that is loaded."""
        self.progress.update(self.task, description=f"loading {model}")

    def on_questions(self, count: int) -> None:
        """Move the bar."""
        self.progress.advance(self.task, count)

    def on_row(self, row: ResultRow) -> None:
        """Name what comes next, and print a line."""
        metrics, name = row.metrics, _run_name(row)
        self.progress.update(self.task, description=name)
        self.on_note(f"{name} {row.name}: {100 * metrics['accuracy']:.1f} ± {100 * metrics['interval']:.1f} %")

    def on_note(self, text: str) -> None:
        """Print a line above the bar."""
        self.progress.console.print(text, style="dim", markup=False, soft_wrap=True)
