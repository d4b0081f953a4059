"""The KV cache of a plan: a layer holds only the rows that run it, and a partly-on layer only its heads.

Layers that never run hold nothing. Rows keep their place while the answer is decoded; beam search, which moves rows,
moves them within the rows of each layer, because all beams of a sample share its plan. A new token is written into room
left for it, where transformers' own layers copy all that they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from adallava.errors import PlanError
from adallava.hosts.execution import Bundle, LayerRun, Mode

if TYPE_CHECKING:
    from adallava.hosts.state import RequestState


ROOM = 64
"""Tokens for which room is made at once, in the first decoding step and whenever it is used up."""


class RoomyLayer(DynamicLayer):
    """Keys and values [R, heads, T, head_dim], with room behind them from the first decoding step on."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._rooms: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [R, heads, T', head_dim]; returns all keys and values."""
        if key_states.requires_grad or (self.is_initialized and self.keys.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # No room yet: a prompt may be all there will ever be.
            self.keys, self.values = key_states.contiguous(), value_states.contiguous()
            return self.keys, self.values
        held = self.keys.shape[-2]
        total = held + key_states.shape[-2]
        keys, values = self._room(held, total)
        keys[..., held:total, :], values[..., held:total, :] = key_states, value_states
        self.keys, self.values = keys[..., :total, :], values[..., :total, :]
        return self.keys, self.values

    def _room(self, held: int, total: int) -> tuple[Tensor, Tensor]:
        """Tensors that begin with the keys and values held and have room for ``total`` tokens."""
        rooms = self._rooms
        # Whoever has moved rows or cut tokens off has put other tensors, or views of these, into keys and values.
        if rooms is None or rooms[0].data_ptr() != self.keys.data_ptr() or rooms[0].shape[-2] < total:
            rooms = _with_room(self.keys, held, total), _with_room(self.values, held, total)
            self._rooms = rooms
        return rooms

    @property
    def nbytes(self) -> int:
        """Bytes held, room included."""
        if not self.is_initialized:
            return 0
        held = (self.keys, self.values)
        return sum(tensor.nbytes for tensor in (held if self._rooms is None else self._rooms))


def _with_room(x: Tensor, held: int, total: int) -> Tensor:
    room = x.new_empty(*x.shape[:-2], total + ROOM - 1, x.shape[-1])
    room[..., :held, :] = x
    return room


class KeptKV:
    """Keys and values [R, heads, T, head_dim] of one bundle of a prompt, as its attention module gives them."""

    keys: Tensor
    values: Tensor

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Note them."""
        self.keys, self.values = keys, values
        return keys, values


class AdaptiveCache(DynamicCache):
    """A ``DynamicCache`` that belongs to one request and one plan (``state``)."""

    def __init__(self, state: RequestState) -> None:
        super().__init__()
        self.layer_class_to_replicate = RoomyLayer
        self.state = state
        self._bundles: dict[tuple[int, int], RoomyLayer] = {}

    def bundle(self, layer: int, bundle: int) -> RoomyLayer:
        """The cache of one bundle of a partly-on layer: keys and values [R, heads, T, head_dim] of its heads only."""
        return self._bundles.setdefault((layer, bundle), RoomyLayer())

    def keep(self, layer: int, bundles: Sequence[Bundle], kept: Sequence[KeptKV], rows: int) -> None:
        """Keep what a prompt left in a partly-on layer of so many ``rows``, as decoding wants it: by ``bundles``."""
        held: dict[tuple[int, int], tuple[KeptKV, int, int]] = {}
        for one in kept:
            heads = [head for start, stop in one.bundle.spans for head in range(start, stop)]
            own = range(rows) if one.bundle.rows is None else one.bundle.rows.tolist()
            held |= {(row, head): (one, i, j) for i, row in enumerate(own) for j, head in enumerate(heads)}
        for number, bundle in enumerate(bundles):
            if len(kept) == 1 and kept[0].bundle.rows is None is bundle.rows:  # all rows have the same columns
                self.bundle(layer, number).update(kept[0].keys, kept[0].values)
                continue
            heads = [head for start, stop in bundle.spans for head in range(start, stop)]
            wanted = range(rows) if bundle.rows is None else bundle.rows.tolist()
            first = kept[0].keys
            keys = first.new_empty(len(wanted), len(heads), *first.shape[2:])
            values = first.new_empty(len(wanted), len(heads), *kept[0].values.shape[2:])
            for i, row in enumerate(wanted):
                for j, head in enumerate(heads):
                    one, own_row, own_head = held[row, head]
                    keys[i, j], values[i, j] = one.keys[own_row, own_head], one.values[own_row, own_head]
            self.bundle(layer, number).update(keys, values)

    @property
    def is_initialized(self) -> bool:
        """Whether a prompt was prefilled. Layer 0 tells, because it always runs and other layers may hold nothing."""
        return bool(self.layers) and self.layers[0].is_initialized

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values: after a prefill just those of the plan, later up to ``ROOM`` tokens more."""
        return sum(layer.nbytes for layer in (*self.layers, *self._bundles.values()))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Move rows as beam search asks: new row i continues old row ``beam_idx[i]``, int64 [B]."""
        runs = self.state.runs
        for index, layer in enumerate(self.layers):
            if layer.is_initialized:
                layer.reorder_cache(_local(runs[index] if runs else None, beam_idx))
        for (index, bundle), held in self._bundles.items():
            assert runs is not None, "a bundle is only filled after the plan is decided"
            local = _local(runs[index], beam_idx)
            held.reorder_cache(_within(runs[index].attention[bundle].rows, local))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not possible: rows of a cache belong to the plan they were computed under."""
        raise PlanError("the rows of a plan's KV cache cannot be repeated. Repeat the inputs before the prefill.")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Not possible, see ``batch_repeat_interleave``."""
        raise PlanError("the rows of a plan's KV cache cannot be selected. Select the inputs before the prefill.")


def _local(run: LayerRun | None, beam_idx: Tensor) -> Tensor:
    """Rows of the batch -> rows of one layer."""
    if run is None or run.rows is None or run.mode is Mode.SKIP:
        return beam_idx
    return _within(run.rows, beam_idx)


def _within(rows: Tensor | None, index: Tensor) -> Tensor:
    """Where the rows that ``rows`` [R] of a batch come from under ``index`` [B], as positions within ``rows``."""
    if rows is None:
        return index
    wanted = index[rows]
    position = torch.searchsorted(rows, wanted)
    assert bool((rows[position.clamp(max=len(rows) - 1)] == wanted).all()), "beams of one sample must share its plan"
    return position
