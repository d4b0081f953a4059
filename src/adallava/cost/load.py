"""``LayerLoad``: how much of one decoder layer runs, the form in which the cost room takes a plan.

A plan is one entry per layer: either a ``LayerLoad`` or just the number of heads on, which then stands for the same
share of the MLP, as in the paper. 0 means that the layer is absent. Plans are plain data, so that costs can be asked
for plans that no model has made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from adallava.cost.spec import ModelSpec
from adallava.errors import PlanError


@dataclass(frozen=True)
class LayerLoad:
    """What of one layer runs; ``PlanError`` for values out of range."""

    heads_on: int
    """Attention (query) heads on; 0 when the attention block is absent."""
    mlp_frac: Fraction
    """Share of the MLP's neurons on, from 0 (the MLP block is absent) to 1; exact, so that costs stay exact."""

    def __post_init__(self) -> None:
        """Check the range that holds for every model."""
        if isinstance(self.heads_on, bool) or not isinstance(self.heads_on, int) or self.heads_on < 0:
            raise PlanError(f"heads_on is {self.heads_on!r}, expected a whole number of 0 or more.")
        if not isinstance(self.mlp_frac, int | Fraction) or not 0 <= self.mlp_frac <= 1:
            raise PlanError(f"mlp_frac is {self.mlp_frac!r}, expected a Fraction from 0 to 1, such as Fraction(1, 4).")
        object.__setattr__(self, "mlp_frac", Fraction(self.mlp_frac))

    @property
    def runs(self) -> bool:
        """Whether anything of the layer runs."""
        return self.heads_on > 0 or self.mlp_frac > 0


PlanLike = Sequence[int | LayerLoad]
"""One entry per layer: heads on (and the same share of the MLP), or a ``LayerLoad``."""


def full_loads(spec: ModelSpec) -> tuple[LayerLoad, ...]:
    """Return the plan that runs everything."""
    return (LayerLoad(spec.num_heads, Fraction(1)),) * spec.num_layers


def as_loads(spec: ModelSpec, plan: PlanLike) -> tuple[LayerLoad, ...]:
    """Check ``plan`` against ``spec`` and return it as one ``LayerLoad`` per layer.

    Raises ``PlanError`` for another number of layers, more heads than a layer has, or a split key/value head.
    """
    if len(plan) != spec.num_layers:
        raise PlanError(
            f"the plan has {len(plan)} layers, but the model has {spec.num_layers}. "
            "Give one entry per layer, 0 for a layer that is skipped."
        )
    return tuple(_as_load(spec, layer, entry) for layer, entry in enumerate(plan))


def plan_loads(
    spec: ModelSpec, plan: Any, row: int | None = None, *, whole_neurons: bool = False
) -> tuple[LayerLoad, ...]:
    """Return the loads of one row of an ``ExecutionPlan``.

    plan: an ``ExecutionPlan``, or anything with ``gates`` [B, L, 2, G] (axis 2: attention, MLP; G groups of heads),
        a tensor, array or nested sequence of truth values.
    row: which row; may be left out when there is only one.
    whole_neurons: count the neurons that a model really runs. Where the groups do not divide the MLP, the first ones
        have one neuron more; the paper's convention gives each an equal share.
    Raises ``PlanError`` for gates of another model, and when ``row`` is needed or out of range.
    """
    gates = plan.gates.tolist() if hasattr(plan.gates, "tolist") else plan.gates
    if row is None:
        if len(gates) != 1:
            raise PlanError(f"the plan has {len(gates)} rows. Say which one: row=0 to row={len(gates) - 1}.")
        row = 0
    if not 0 <= row < len(gates):
        raise PlanError(f"row {row} of a plan with {len(gates)} rows. Pass 0 to {len(gates) - 1}.")
    return as_loads(spec, [_gates_load(spec, attention, mlp, whole_neurons) for attention, mlp in gates[row]])


def _as_load(spec: ModelSpec, layer: int, entry: int | LayerLoad) -> LayerLoad:
    # Checked before the share is formed, which would complain about mlp_frac where heads are meant.
    heads = entry.heads_on if isinstance(entry, LayerLoad) else entry
    if isinstance(heads, bool) or not isinstance(heads, int) or not 0 <= heads <= spec.num_heads:
        raise PlanError(
            f"layer {layer} has {heads!r} heads on, expected a whole number from 0 (skipped) to {spec.num_heads}."
        )
    if heads % spec.heads_per_kv_head:
        raise PlanError(
            f"layer {layer} has {heads} heads on, but {spec.heads_per_kv_head} query heads share one key/value head, "
            f"which is never split. Use a multiple of {spec.heads_per_kv_head}."
        )
    return entry if isinstance(entry, LayerLoad) else LayerLoad(heads, Fraction(heads, spec.num_heads))


def _gates_load(spec: ModelSpec, attention: Sequence[Any], mlp: Sequence[Any], whole_neurons: bool) -> LayerLoad:
    groups = len(attention)
    if not groups or len(mlp) != groups or spec.num_heads % groups:
        raise PlanError(
            f"gates have {groups} attention and {len(mlp)} MLP groups, expected equal numbers that divide the "
            f"{spec.num_heads} heads of the model. Use the spec of the model that the plan is for."
        )
    heads = sum(map(bool, attention)) * (spec.num_heads // groups)
    if not whole_neurons:
        return LayerLoad(heads, Fraction(sum(map(bool, mlp)), groups))
    share, larger = divmod(spec.intermediate_size, groups)
    neurons = sum(share + (group < larger) for group, on in enumerate(mlp) if on)
    return LayerLoad(heads, Fraction(neurons, spec.intermediate_size))
