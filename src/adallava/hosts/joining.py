"""Requests that decode together although they came one by one: their keys and values, taken apart and joined.

A ``Row`` is one request between two decoding steps: its plan, and what each layer holds of it. ``join`` makes one
batch of several, left-padded to the longest, under one plan whose rows are theirs; ``part`` takes a batch apart again.
So rows can come and go between any two steps. Keys and values are copied, so both are called only when rows change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adallava.errors import PlanError
from adallava.hosts.cache import AdaptiveCache, RoomyLayer
from adallava.hosts.execution import LayerRun, Mode
from adallava.hosts.state import RequestState
from adallava.plan import ExecutionPlan
from adallava.scheduling.scheduler import Scheduler


@dataclass(frozen=True)
class Row:
    """One request between two decoding steps."""

    plan: ExecutionPlan
    """One row."""
    tokens: int
    """In its cache: prompt, latency token, and the answer so far but for the last token."""
    held: tuple[tuple[Tensor, Tensor] | None, ...]
    """Keys and values [heads on, tokens, head_dim] of each layer; None where it does not run."""
    shift: int = 0
    """Positions of new tokens less the tokens before them, see ``inputs.rope_positions``."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(part.nbytes for pair in self.held if pair is not None for part in pair)


@dataclass(frozen=True)
class Joined:
    """A batch that is decoding: its cache, whose state has the plan, and which positions of each row are tokens."""

    cache: AdaptiveCache
    mask: Tensor
    """int64 [B, T], zero for padding."""

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.mask)


def part(joined: Joined) -> list[Row]:
    """Take a batch apart. Raises ``PlanError`` where tokens were dropped inside the decoder."""
    state, cache = joined.cache.state, joined.cache
    if state.cut is not None:
        raise PlanError("rows whose layers hold different tokens cannot be joined. Select visual tokens before them.")
    assert state.plan is not None and state.runs is not None, "a batch is decoding, so its plan was decided"
    padded, rows = joined.mask.shape[1], []
    for row, tokens in enumerate(joined.mask.sum(1).tolist()):
        held = tuple(_taken(cache, state.plan, run, layer, row, tokens) for layer, run in enumerate(state.runs))
        shift = 0 if state.rope_deltas is None else int(state.rope_deltas[row, 0]) + padded - tokens
        rows.append(Row(state.plan.row(row), tokens, held, shift))
    return rows


def join(rows: Sequence[Row], scheduler: Scheduler, *, positions: bool = False) -> Joined:
    """One batch of several rows. positions: the host counts positions by ``Row.shift``."""
    if not rows:
        raise PlanError("a batch of no rows. Join one at least.")
    state = RequestState.decided_by(scheduler, ExecutionPlan.cat([row.plan for row in rows]))
    device = next(pair for pair in rows[0].held if pair is not None)[0].device
    longest = max(row.tokens for row in rows)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        mask[number, longest - row.tokens :] = 1
    if positions:
        state.rope_deltas = torch.tensor([[row.shift - longest + row.tokens] for row in rows], device=device)
    cache = AdaptiveCache(state)
    assert state.runs is not None
    for layer, run in enumerate(state.runs):
        _fill(cache, run, layer, rows, longest)
    return Joined(cache, mask.to(device))


# -- one layer --------------------------------------------------------------------------------------------------------


def _taken(
    cache: AdaptiveCache, plan: ExecutionPlan, run: LayerRun, layer: int, row: int, tokens: int
) -> tuple[Tensor, Tensor] | None:
    """Keys and values of one row in one layer."""
    heads = plan.gates[row, layer, 0].nonzero()[:, 0].tolist()
    if not heads:
        return None
    place = _place(run.rows, row)
    if run.mode is not Mode.SLICES:
        held = cache.layers[layer]
        return held.keys[place, :, -tokens:], held.values[place, :, -tokens:]
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for number, bundle in enumerate(run.attention):
        if bundle.rows is not None and place not in bundle.rows.tolist():
            continue
        held, within = cache.bundle(layer, number), _place(bundle.rows, place)
        for at, head in enumerate(h for start, stop in bundle.spans for h in range(start, stop)):
            found[head] = held.keys[within, at, -tokens:], held.values[within, at, -tokens:]
    return torch.stack([found[head][0] for head in heads]), torch.stack([found[head][1] for head in heads])


def _fill(cache: AdaptiveCache, run: LayerRun, layer: int, rows: Sequence[Row], longest: int) -> None:
    """Put the rows' keys and values of one layer into its cache."""
    while len(cache.layers) <= layer:
        cache.layers.append(RoomyLayer())
    if run.mode is Mode.SKIP:
        return
    active = list(range(len(rows))) if run.rows is None else run.rows.tolist()
    if run.mode is not Mode.SLICES:
        _put(cache.layers[layer], [(rows[row], None) for row in active], layer, longest)
        return
    for number, bundle in enumerate(run.attention):
        chosen = active if bundle.rows is None else [active[at] for at in bundle.rows.tolist()]
        wanted = [head for start, stop in bundle.spans for head in range(start, stop)]
        parts = []
        for row in chosen:
            on = rows[row].plan.gates[0, layer, 0].nonzero()[:, 0].tolist()
            parts.append((rows[row], [on.index(head) for head in wanted]))
        _put(cache.bundle(layer, number), parts, layer, longest)


def _put(held: RoomyLayer, parts: Sequence[tuple[Row, list[int] | None]], layer: int, longest: int) -> None:
    """Fill a cache layer with rows, of each the heads at the given places of what it holds (None: all)."""
    pairs = []
    for row, places in parts:
        pair = row.held[layer]
        assert pair is not None, "what a layer runs for a row it has run for it before"
        pairs.append(pair if places is None else (pair[0][places], pair[1][places]))
    filled = []
    for which in (0, 1):
        first = pairs[0][which]
        whole = first.new_zeros(len(pairs), first.shape[0], longest, first.shape[-1])
        for number, pair in enumerate(pairs):
            whole[number, :, longest - pair[which].shape[1] :] = pair[which]
        filled.append(whole)
    held.update(*filled)


def _place(rows: Tensor | None, row: int) -> int:
    """Where a row of the batch is among ``rows``, int64 [R]."""
    return row if rows is None else rows.tolist().index(row)
