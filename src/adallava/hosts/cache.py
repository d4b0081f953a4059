"""The KV cache of a plan: a layer holds only the rows that run it, and a partly-on layer only its heads.

Layers that never run hold nothing. Rows keep their place while the answer is decoded; beam search, which moves rows,
moves them within the rows of each layer, because all beams of a sample share its plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from adallava.errors import PlanError
from adallava.hosts.execution import LayerRun, Mode

if TYPE_CHECKING:
    from adallava.hosts.state import RequestState


class AdaptiveCache(DynamicCache):
    """A ``DynamicCache`` that belongs to one request and one plan (``state``)."""

    def __init__(self, state: RequestState) -> None:
        super().__init__()
        self.state = state
        self._bundles: dict[tuple[int, int], DynamicLayer] = {}

    def bundle(self, layer: int, bundle: int) -> DynamicLayer:
        """The cache of one bundle of a partly-on layer: keys and values [R, heads, T, head_dim] of its heads only."""
        return self._bundles.setdefault((layer, bundle), DynamicLayer())

    @property
    def is_initialized(self) -> bool:
        """Whether a prompt was prefilled. Layer 0 tells, because it always runs and other layers may hold nothing."""
        return bool(self.layers) and self.layers[0].is_initialized

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        held = [*self.layers, *self._bundles.values()]
        return sum(t.nbytes for layer in held if layer.is_initialized for t in (layer.keys, layer.values))

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
