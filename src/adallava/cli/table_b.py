"""``adallava table-b``: the paper's Table B beside what this package computes. So far its cost columns."""

from __future__ import annotations

import json

from rich.console import Console
from rich.text import Text

from adallava.cost.paper import TIME_COLUMN, Cell, table_b
from adallava.errors import ConfigError


def print_table_b(costs: bool, as_json: bool) -> None:
    """Print the cost columns, cell by cell; ``ConfigError`` without ``costs``."""
    if not costs:
        raise ConfigError(
            "table-b compares only the FLOPs and prefill-time columns so far. Pass --costs; the accuracy columns come "
            "later."
        )
    cells = table_b()
    if as_json:
        print(json.dumps([as_dict(cell) for cell in cells], indent=2))
    else:
        _show(cells)


def as_dict(cell: Cell) -> dict[str, object]:
    """One cell as plain data; "low" is the cheapest placement of the switches, as in H rows below 100 %."""
    return {
        "row": cell.row,
        "column": cell.column,
        "paper": cell.paper,
        "ours": cell.ours,
        "match": cell.match,
        "reason": cell.reason,
        "low": cell.low,
        "lengths": cell.lengths,
        "convention": "paper",
    }


def _show(cells: list[Cell]) -> None:
    console = Console(highlight=False)
    notes: list[str] = []
    group = ""
    for flops, time in zip(cells[::2], cells[1::2], strict=True):
        if flops.group != group:
            group = flops.group
            console.print(Text.assemble("\n", (group, "bold"), (f" ({flops.lengths})", "dim")), soft_wrap=True)
            console.print(f"{'':<19}{'TFLOPs':>7}{'ours':>8}{'':10}{'ms':>5}{'ours':>8}", style="dim", soft_wrap=True)
        line = Text(f"  {flops.plan:<17}{flops.paper:>7}{flops.ours:>8.3f} ")
        line.append_text(_mark(flops, notes)).append(f"{time.paper:>5}{time.ours:>8.2f} ")
        console.print(line.append_text(_mark(time, notes)), soft_wrap=True)
    console.print()
    for number, note in enumerate(notes, 1):
        console.print(f"[{number}] {note}.", style="dim", markup=False, soft_wrap=True)
    matching = sum(cell.match for cell in cells)
    console.print(
        f"{matching} of {len(cells)} cells round to what the paper prints. Prefill of the language model, batch 1, "
        f"nvidia_V100, paper convention; AdaLLaVA-H: head groups spread evenly. See docs/costs.md.",
        style="bold",
        soft_wrap=True,
    )


def _mark(cell: Cell, notes: list[str]) -> Text:
    """A mark nine characters wide, with the number of the note that says why there is no match."""
    if cell.match:
        return Text(f"{'yes':<9}", style="green")
    notes.append(f"{cell.row}, {'time' if cell.column == TIME_COLUMN else 'FLOPs'}: {cell.reason}")
    return Text(f"{f'no [{len(notes)}]':<9}", style="red")
