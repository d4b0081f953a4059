"""From a plan to what each layer has to do: nothing, everything, some rows, or some heads of some rows.

Compiled when a plan is decided, layer by layer, so that the layers take no decision token by token. Work is cut
into *bundles*: the gate columns that are on for the same rows, so that a decoding step reads each weight once. A
prompt, whose many tokens are worth a weight's reading for each row, has bundles of rows with the same columns instead:
fewer, and larger. A bundle's columns are given as spans of adjacent columns, because adjacent columns are one
slice of a weight matrix, a view and never a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from adallava.plan import ExecutionPlan

Span = tuple[int, int]


class Mode(Enum):
    """What a layer does in one request."""

    SKIP = "skip"
    FULL = "full"
    ROWS = "rows"
    SLICES = "slices"


@dataclass(frozen=True)
class Bundle:
    """Gate columns that run on the same rows: ``rows`` int64 [R] within the layer's rows, None for all of them."""

    rows: Tensor | None
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class LayerRun:
    """One layer of a request. ``rows`` int64 [R] are the batch rows it runs on, None for all of them."""

    mode: Mode
    rows: Tensor | None = None
    attention: tuple[Bundle, ...] = ()
    mlp: tuple[Bundle, ...] = ()
    prompt_attention: tuple[Bundle, ...] = ()
    prompt_mlp: tuple[Bundle, ...] = ()


def compile_plan(plan: ExecutionPlan, device: torch.device, first: int = 0) -> tuple[LayerRun, ...]:
    """Compile a plan [B, L, 2, G] into one ``LayerRun`` per layer from ``first`` on, its row indices on ``device``."""
    gates = plan.gates[:, first:].transpose(0, 1)
    # Asked of all layers at once: a small model's request would notice a few operations for each of them.
    on, full = (flags.tolist() for flags in (gates.flatten(2).any(-1), gates.flatten(2).all(-1)))
    return tuple(_compile_layer(*layer, device) for layer in zip(gates, on, full, strict=True))


def _compile_layer(gates: Tensor, on: list[bool], full: list[bool], device: torch.device) -> LayerRun:
    """Gates of one layer: bool [B, 2, G] on the CPU. on, full: whether each row runs any of it, and all of it."""
    if all(full):
        return LayerRun(Mode.FULL)
    if not any(on):
        return LayerRun(Mode.SKIP)
    rows = None if all(on) else torch.tensor([row for row, some in enumerate(on) if some])
    active = gates if rows is None else gates[rows]
    rows = rows if rows is None else rows.to(device)
    if full == on:
        return LayerRun(Mode.ROWS, rows)
    attention, mlp = active[:, 0], active[:, 1]
    bundles = [make(half, device) for make in (_bundles, _by_row) for half in (attention, mlp)]
    return LayerRun(Mode.SLICES, rows, *bundles)


def _bundles(columns: Tensor, device: torch.device) -> tuple[Bundle, ...]:
    """Columns of one half of a layer: bool [R, G] -> bundles, in the order of their first column."""
    groups: dict[tuple[bool, ...], list[int]] = {}
    for index, pattern in enumerate(columns.T.tolist()):
        if any(pattern):
            groups.setdefault(tuple(pattern), []).append(index)
    return tuple(
        Bundle(
            None if all(pattern) else torch.tensor([i for i, on in enumerate(pattern) if on], device=device),
            _spans(indices),
        )
        for pattern, indices in groups.items()
    )


def _by_row(columns: Tensor, device: torch.device) -> tuple[Bundle, ...]:
    """Columns of one half of a layer: bool [R, G] -> bundles of the rows that have the same of them on."""
    groups: dict[tuple[bool, ...], list[int]] = {}
    for row, pattern in enumerate(columns.tolist()):
        if any(pattern):
            groups.setdefault(tuple(pattern), []).append(row)
    return tuple(
        Bundle(
            None if len(rows) == len(columns) else torch.tensor(rows, device=device),
            _spans([column for column, on in enumerate(pattern) if on]),
        )
        for pattern, rows in groups.items()
    )


def _spans(indices: list[int]) -> tuple[Span, ...]:
    spans: list[Span] = []
    for index in indices:
        if spans and spans[-1][1] == index:
            spans[-1] = (spans[-1][0], index + 1)
        else:
            spans.append((index, index + 1))
    return tuple(spans)
